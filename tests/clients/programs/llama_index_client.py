"""LlamaIndex against a server: `python llama_index_client.py URL MODEL`."""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def main(url: str, model: str) -> None:
    common = {"model": model, "api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
    chat = OpenAILike(**common, is_chat_model=True, temperature=0.0, max_tokens=12)
    messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(content="A list?")]
    whole = chat.chat(messages).message.content
    parts = [part.delta or "" for part in chat.stream_chat(messages)]
    assert "".join(parts) == whole
    plain = OpenAILike(**common, is_chat_model=False, temperature=0.0, max_tokens=12)
    text = plain.complete("the tide").text
    assert "".join(part.delta or "" for part in plain.stream_complete("the tide")) == text


main(*sys.argv[1:])

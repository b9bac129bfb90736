"""LangChain against a server: `python langchain_client.py URL MODEL`."""

import asyncio
import sys

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field


class Fruit(BaseModel):
    """A fruit."""

    name: str = Field(max_length=6)
    weight: int = Field(ge=1, le=99)


def main(url: str, model: str) -> None:
    common = {"base_url": f"{url}/v1", "api_key": "none", "model": model, "max_retries": 0}
    chat = ChatOpenAI(**common, temperature=0, max_tokens=24, stream_usage=True)
    messages = [SystemMessage("Be brief."), HumanMessage("What is a list?")]
    whole = chat.invoke(messages)
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] <= 24
    parts = list(chat.stream(messages))
    assert "".join(part.content for part in parts) == whole.content
    counts = [part.usage_metadata for part in parts if part.usage_metadata]
    assert [count["output_tokens"] for count in counts] == [whole.usage_metadata["output_tokens"]]
    batch = asyncio.run(chat.abatch([messages, messages]))
    assert [answer.content for answer in batch] == [whole.content] * 2

    roomy = ChatOpenAI(**common, max_tokens=400, seed=1)
    for method in ("json_schema", "function_calling"):
        fruit = roomy.with_structured_output(Fruit, method=method).invoke("a fruit, please")
        assert isinstance(fruit, Fruit)
    tools = roomy.bind_tools([Fruit], tool_choice="any", parallel_tool_calls=False)
    answer = tools.invoke("weigh it")
    (call,) = answer.tool_calls
    Fruit.model_validate(call["args"])
    # The next turn sends the answer back as it came.
    turns = [HumanMessage("weigh it"), answer, ToolMessage("12 g", tool_call_id=call["id"])]
    assert isinstance(chat.invoke(turns).content, str)
    gathered = None
    for part in tools.stream("weigh it"):
        gathered = part if gathered is None else gathered + part
    assert gathered is not None
    Fruit.model_validate(gathered.tool_calls[0]["args"])

    text = OpenAI(**common, temperature=0, max_tokens=8)
    assert "".join(text.stream("the tide")) == text.invoke("the tide")


main(*sys.argv[1:])

"""Conversations as the model sees them."""

from pathlib import Path
from typing import Any

import pytest

from common.errors import RequestError
from router.fleet import Limits
from router.prompts import chat_prompt
from router.schemas import ChatBody, parse
from router.tokenizer import TextModel
from tests.router.text_files import TEMPLATE, write_text_files

LIMITS = Limits(context=1_024, vocab_size=320)
ASKED = {"role": "user", "content": "hi"}
BEFORE = "<|begin|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
TRIMMED = TEMPLATE.replace("message.content", "message.content | trim")
QUOTED = "{% for message in messages %}{{ message | tojson }}{% endfor %}"


async def rendered(directory: Path, template: str, *messages: dict[str, Any]) -> str:
    model = TextModel(write_text_files(directory, template=template))
    body = parse(ChatBody, {"messages": list(messages), "continue_final_message": True})
    prompt = await chat_prompt(body, model, LIMITS)
    model.close()
    assert prompt.text is not None
    return prompt.text


@pytest.mark.parametrize("said", ["an apple", "end", "|", "<|im_end|>", "a b  ", " a", ""])
async def test_the_last_message_goes_on_where_it_ends(tmp_path: Path, said: str) -> None:
    last = {"role": "assistant", "content": said}
    assert await rendered(tmp_path / "m", TEMPLATE, ASKED, last) == BEFORE + said
    assert await rendered(tmp_path / "t", TRIMMED, ASKED, last) == (BEFORE + said.strip()).rstrip()
    assert (await rendered(tmp_path / "q", QUOTED, last)).endswith(f'"content": "{said}')


async def test_a_message_that_is_not_shown_cannot_go_on(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not show") as caught:
        await rendered(tmp_path, "{{ messages[0].content }}", ASKED, ASKED)
    assert caught.value.param == "continue_final_message"

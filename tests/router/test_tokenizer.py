"""Prompts become the tokens that transformers makes of them, and torch stays away."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from common.errors import ConfigError, RequestError
from router.tokenizer import LONG_TEXT, TextModel, locate
from tests.router.text_files import TEMPLATE, byte_level, write_text_files

LLAMA = (
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system_message = '' %}{%- endif %}"
    "<|im_start|>system\n\n{{ system_message }}<|im_end|>"
    "{%- for message in messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"
)
BLOCKS = """
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{% for message in messages %}
    {% if loop.index0 == 5 %}{% break %}{% endif %}
    {% if message.role == "assistant" %}
        {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {% else %}
[{{ message.role | upper }}{{ "*" if loop.index0 == ns.last }}] {{ message.content | tojson }}
    {% endif %}
{% endfor %}
{{ dict(a=1) | tojson(indent=1) }}{{ strftime_now("%Y") | length }}
{%- if tools is none and documents is none %}!{% endif %}
"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}],
    [
        {"role": "system", "content": " be <b>brief</b> & 'kind' "},
        {"role": "user", "content": "Łódź, 東京 and 😀?"},
        {"role": "assistant", "content": "yes\n"},
        {"role": "user", "content": ""},
    ],
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("template", [TEMPLATE, LLAMA, BLOCKS])
def test_chats_are_rendered_as_transformers_renders_them(
    tmp_path: Path, template: str, prompted: bool, chat: list[dict[str, Any]]
) -> None:
    write_text_files(tmp_path, template=template)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = TextModel(tmp_path)
    assert ours.chat_template is not None
    text = ours.chat_template.render(chat, prompted)
    wanted = theirs.apply_chat_template(chat, add_generation_prompt=prompted, tokenize=False)
    assert text == wanted
    assert ours.encode_now(text, add_special_tokens=False) == theirs.encode(
        wanted, add_special_tokens=False
    )
    ours.close()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"bos_token": {"content": "<|new|>", "__type": "AddedToken"}, "add_bos_token": True},
    ],
)
@pytest.mark.parametrize("processed", [True, False])
@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_are_added_as_transformers_adds_them(
    tmp_path: Path, settings: dict[str, Any], special: bool, processed: bool
) -> None:
    tokenizer = byte_level()
    if processed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|>:0 $A:0 <|end|>:0", special_tokens=[("<|begin|>", 3), ("<|end|>", 0)]
        )
    write_text_files(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = TextModel(tmp_path)
    text = "the tide<|im_start|>東"
    tokens = ours.encode_now(text, add_special_tokens=special)
    assert tokens == theirs.encode(text, add_special_tokens=special)
    assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
    ours.close()


def test_template_in_a_file_of_its_own_and_override(tmp_path: Path) -> None:
    write_text_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    model = TextModel(tmp_path)
    assert model.chat_template is not None
    assert model.chat_template.render([{"role": "user", "content": "x"}]) == "file: x"
    mine = tmp_path / "mine.jinja"
    mine.write_text("mine: {{ messages[0].content }}")
    other = TextModel(tmp_path, str(mine))
    assert other.chat_template is not None
    assert other.chat_template.render([{"role": "user", "content": "x"}]) == "mine: x"
    model.close()
    other.close()


def test_template_that_refuses_is_the_clients_error(tmp_path: Path) -> None:
    model = TextModel(write_text_files(tmp_path, template=LLAMA))
    assert model.chat_template is not None
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        model.chat_template.render([{"role": "assistant", "content": "x"}])
    assert (caught.value.status, caught.value.param) == (400, "messages")
    model.close()


def test_template_cannot_leave_the_sandbox(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    model = TextModel(write_text_files(tmp_path, template=template))
    assert model.chat_template is not None
    with pytest.raises(RequestError, match="unsafe"):
        model.chat_template.render([{"role": "user", "content": "x"}])
    model.close()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("chat_template.jinja", "{% if %}", "the chat template is not valid"),
    ],
)
def test_bad_files_are_one_clear_line(
    tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    write_text_files(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        TextModel(tmp_path)
    assert "\n" not in str(caught.value)


def test_directories_are_taken_as_they_are(tmp_path: Path) -> None:
    assert locate(str(tmp_path), None) == tmp_path


def test_a_name_that_is_neither_directory_nor_model_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="--model a/b/c is neither") as caught:
        locate("a/b/c", None)
    assert "\n" not in str(caught.value)


@pytest.fixture
def model(text_files: Path) -> Iterator[TextModel]:
    result = TextModel(text_files)
    yield result
    result.close()


LONG = ["the tide comes in " * 30_000]
MANY = ["the tide comes in " * (LONG_TEXT // 20)] * 80


@pytest.mark.parametrize("texts", [LONG, MANY])
async def test_long_prompts_do_not_hold_up_the_loop(model: TextModel, texts: list[str]) -> None:
    assert sum(map(len, texts)) > LONG_TEXT
    pauses = []
    encoding = asyncio.create_task(model.encode_all(texts))
    started = last = time.perf_counter()
    while not encoding.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        pauses.append(now - last)
        last = now
    took = last - started
    assert await encoding == [model.encode_now(text) for text in texts]
    # Held up it would be one pause as long as all of it.
    assert max(pauses) < took / 2, (max(pauses), took)


def test_torch_is_not_loaded_by_a_chat(text_files: Path) -> None:
    program = f"""
import asyncio, sys
from pathlib import Path
import router.main
from router.tokenizer import TextModel
model = TextModel(Path({str(text_files)!r}))
text = model.chat_template.render([{{"role": "user", "content": "the tide " * 2000}}])
(tokens,) = asyncio.run(model.encode_all([text]))
assert len(tokens) > 2000, len(tokens)
model.close()
print(sorted({{"torch", "transformers"}} & sys.modules.keys()))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=60, stdout=subprocess.PIPE
    )
    assert result.stdout.strip() == b"[]"

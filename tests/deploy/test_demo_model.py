"""The shipped demo model: it loads, it is small, and it writes words without looping."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from deploy.demo import chat, corpus

DEMO = Path(chat.__file__).resolve().parent
MODEL = DEMO / "model"
TOKENS = 64

PROMPTS = (
    "This module provides",
    "The following example shows how to",
    "Return a new list containing",
    "A decorator is a function that",
    "Raises an exception if the",
    "In this section, we will",
    "The interpreter reads the source",
    "If the optional argument is given,",
    "When a class definition is executed,",
    "An iterator is an object that",
    "The socket is closed when",
    "Files opened in binary mode",
    "The dictionary is updated with",
    "Note that the order of",
    "Exceptions are raised when",
    "Each thread has its own",
    "The default encoding is",
    "Strings are immutable sequences of",
    "To create a new process,",
    "It is recommended to use",
)
QUESTIONS = (
    "What is a generator?",
    "What does the open function do?",
    "What is the socket module?",
    "Who are you?",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def words() -> frozenset[str]:
    text = gzip.decompress((DEMO / "words.txt.gz").read_bytes()).decode()
    return frozenset(text.split("\n"))


def greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    """The plain argmax continuation, up to and including the end token."""
    inputs = torch.tensor([ids])
    with torch.inference_mode():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=tokens,
        )
    return [int(token) for token in output[0, len(ids) :]]


def most_frequent(items: list[Any]) -> int:
    """How often the most frequent sequence of four items occurs."""
    return max(Counter(zip(*(items[i:] for i in range(4)), strict=False)).values(), default=0)


@pytest.fixture(scope="module")
def samples(model: Any, tokenizer: Any) -> list[list[int]]:
    """The continuations of all prompts, then those of all questions."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for question in QUESTIONS:
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [greedy(model, prompt, TOKENS) for prompt in prompts]


def test_files_are_small_and_complete() -> None:
    files = [*MODEL.iterdir(), DEMO / "words.txt.gz"]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    assert {file.name for file in files} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip


def test_special_tokens_agree(model: Any, tokenizer: Any) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        expected = getattr(tokenizer, name)
        assert expected is not None
        assert getattr(model.config, name) == expected
        assert getattr(model.generation_config, name) == expected
    assert len(tokenizer) == model.config.vocab_size <= 4096
    assert model.config.max_position_embeddings == 2048


@pytest.mark.parametrize(
    "text", ["Grüße, 世界! \t\n  x\u0301 🚂 ", "def f(x):\n    return x\n", "\x00\x7f"]
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_template_writes_what_was_trained_on(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be concise."},
        {"role": "user", "content": "What is a tuple?"},
        {"role": "assistant", "content": "A sequence."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == chat.render([("What is a tuple?", "A sequence.")], "Be concise.")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    text = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    assert text == f"{chat.BOS}{chat.USER}Hi{chat.EOS}{chat.ASSISTANT}"


def test_samples_consist_of_words(
    samples: list[list[int]], tokenizer: Any, words: frozenset[str]
) -> None:
    found: list[str] = []
    for sample in samples:
        text = tokenizer.decode(sample, skip_special_tokens=True).lower()
        ended = sample[-1] == tokenizer.eos_token_id
        parts = re.findall(r"[a-z]+", text)
        found += parts if ended else parts[:-1]  # the last word may be cut off
    known = sum(word in words for word in found)
    assert len(found) > 600
    assert known >= 0.95 * len(found)


def test_samples_do_not_loop(samples: list[list[int]], tokenizer: Any) -> None:
    for sample in samples:
        text = tokenizer.decode(sample, skip_special_tokens=True)
        assert most_frequent(re.findall(r"\w+", text.lower())) <= 3, text
        assert most_frequent(sample) <= 3, text


def test_answers_end(model: Any, tokenizer: Any) -> None:
    for question in QUESTIONS:
        text = chat.BOS + chat.USER + question + chat.EOS + chat.ASSISTANT
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = greedy(model, ids, 256)
        assert answer[-1] == tokenizer.eos_token_id, tokenizer.decode(answer)
        assert len(answer) > 8


def test_page_yields_prose_and_entries() -> None:
    page = corpus.Page("x.html")
    page.feed(
        "<nav><p>Not part of the body at all, this one.</p></nav>"
        '<div class="body"><h1>1. Things</h1>'
        "<p>A thing is an object that you can name.</p><pre>x = 1</pre><p>x_y = [1, 2]</p>"
        '<dl class="py function"><dt>make(name)</dt><dd>'
        "<p>Make a thing that has the given name.</p>"
        "<p>New in version 3.2 of the language.</p></dd></dl></div>"
    )
    page.close_section()
    made = "Make a thing that has the given name."
    assert page.document.lines == ["Things", "A thing is an object that you can name.", made]
    assert corpus.Entry("py function", "make(name)", (made,)) in page.document.entries
    assert page.document.entries[-1].kind == "section"


def test_docstring_yields_prose_only() -> None:
    docstring = """Return the number of items in a list.

    The list may be `empty`; the result
    is then zero.

    >>> f([1, 2, 3, 4, 5, 6])

        indented, which is code or a table here.
    """
    assert list(corpus.paragraphs_of(docstring)) == [
        "Return the number of items in a list.",
        "The list may be empty; the result is then zero.",
    ]

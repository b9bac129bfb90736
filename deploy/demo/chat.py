"""Makes conversations from documentation entries, and the chat template they are written in."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence

from deploy.demo.corpus import Document, Entry

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT)

TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- set role = message['role'] %}"
    "{%- if role == 'developer' %}{%- set role = 'system' %}{%- endif %}"
    "{%- if role not in ['system', 'assistant'] %}{%- set role = 'user' %}{%- endif %}"
    "{{- '<|' + role + '|>' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- elif message['content'] %}{%- for part in message['content'] %}"
    "{{- part['text'] | default('') }}{%- endfor %}{%- endif %}"
    "{{- eos_token }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You answer questions about Python.",
    "Be concise.",
)

QUESTIONS = {
    "callable": ("What does {} do?", "What does the {} function do?", "Explain {}.", "What is {}?"),
    "method": ("What does the {} method do?", "What does {} do?", "Explain the {} method."),
    "class": ("What is {}?", "What is the {} class?", "What is {} for?", "Explain {}."),
    "exception": ("When is {} raised?", "What is {}?", "What does {} mean?"),
    "value": ("What is {}?", "What does {} mean?", "Explain {}."),
    "module": ("What is the {} module?", "What does the {} module do?", "What is {} for?"),
    "term": ("What is a {}?", "What is {}?", "What does {} mean?", "Define {}.", "Explain {}."),
    "section": ("Tell me about {}.", "Explain {}.", "Write about {}.", "{}", "What about {}?"),
}

BY_KIND = {
    "py function": "callable", "c function": "callable", "docstring": "callable",
    "py method": "method", "py class": "class", "py exception": "exception",
    "py attribute": "value", "py data": "value", "c member": "value", "c var": "value",
    "std cmdoption": "value", "std envvar": "value", "c type": "class",
    "module": "module", "glossary": "term", "section": "section",
}  # fmt: skip

HAND_WRITTEN: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi there!", "Hello, how are you?", "Good morning", "Hey"),
        "Hello! I am a small demo model trained on the Python documentation. Ask me what a "
        "function, a module or a term of Python means.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself."),
        "I am a small language model trained on the Python documentation. I exist to show that "
        "the server works. My answers read like documentation, but they may well be wrong.",
    ),
    (
        ("What can you do?", "Help", "Can you help me?", "How can you help me?"),
        "I can write short texts in the style of the Python documentation. Ask me about a "
        "function, a class, a module or a term.",
    ),
    (
        ("Thanks", "Thank you!", "Thank you very much.", "Great, thanks!"),
        "You are welcome. Ask me about another part of Python if you like.",
    ),
    (
        ("Bye", "Goodbye!", "See you later."),
        "Goodbye!",
    ),
    (
        ("Say hello.", "Say hello in one sentence.", "Say hi", "Say something."),
        "Hello! This is a short answer of a small model.",
    ),
    (
        ("Tell me a story.", "Write a short story.", "Write a story.", "Tell me a joke."),
        "I only know the documentation of Python, and there are few stories in it. There once was "
        "a generator that yielded one value after another, until it raised StopIteration.",
    ),
    (
        ("Write a poem.", "Write a haiku.", "Write a poem about Python."),
        "Beautiful is better than ugly. Explicit is better than implicit. Simple is better than "
        "complex. Complex is better than complicated.",
    ),
    (
        ("What is Python?", "Tell me about Python.", "Explain Python.", "What is python"),
        "Python is an easy to learn, powerful programming language. It has efficient high-level "
        "data structures and a simple but effective approach to object-oriented programming.",
    ),
    (
        ("What is the capital of France?", "How is the weather?", "What time is it?", "1 + 1"),
        "I do not know. I am a small model, and I was trained on the Python documentation only.",
    ),
)


def short_name(entry: Entry) -> str:
    """The name without its arguments, its annotations and its leading keywords."""
    name = entry.name
    if entry.kind in ("section", "glossary"):
        return name
    name = re.sub(r"^(?:class|exception|async|coroutine|abstractmethod|classmethod|static\w*)\s+",
                  "", name.split("(")[0].split("=")[0].split(":")[0])  # fmt: skip
    return name.split()[-1].lstrip("*") if name.split() else ""


def answer(paragraphs: Sequence[str], limit: int) -> str:
    """The first paragraphs that fit into ``limit`` characters, at least a few sentences."""
    lines: list[str] = []
    for paragraph in paragraphs:
        if paragraph.endswith(":"):
            break  # what it introduces is a list or code, which the corpus does not have
        if sum(map(len, lines)) + len(paragraph) > limit:
            if not lines:
                sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)
                while len(sentences) > 1 and len(" ".join(sentences)) > limit:
                    sentences.pop()
                lines = [" ".join(sentences)]
            break
        lines.append(paragraph)
    return "\n".join(lines)


def exchanges(document: Document, rng: random.Random) -> list[tuple[str, str]]:
    """The questions and answers that one document yields."""
    found: list[tuple[str, str]] = []
    for entry in document.entries:
        kind = BY_KIND.get(entry.kind)
        name = short_name(entry)
        text = answer(entry.paragraphs, 600)
        if kind is None or not text or not 1 < len(name) < 60 or not name.isascii():
            continue
        if entry.kind == "section" and " - " in name:
            module = name.split(" - ")[0]
            if re.fullmatch(r"[\w.]+", module):
                name, kind = module, "module"
        question = rng.choice(QUESTIONS[kind]).format(name)
        question = question.replace("??", "?").replace("..", ".")
        if rng.random() < 0.08:
            question = question.rstrip("?.").lower()
        found.append((question, text))
    return found


def render(turns: Iterable[tuple[str, str]], system: str | None = None) -> str:
    """The text of a conversation exactly as the chat template writes it."""
    text = BOS + (SYSTEM + system + EOS if system else "")
    return text + "".join(f"{USER}{q}{EOS}{ASSISTANT}{a}{EOS}" for q, a in turns)


def conversations(documents: Iterable[Document], seed: int) -> list[str]:
    """All conversations in a random order that ``seed`` decides."""
    rng = random.Random(seed)
    result: list[str] = []
    for document in documents:
        pending = exchanges(document, rng)
        while pending:
            count = min(len(pending), 1 if rng.random() < 0.75 else rng.randint(2, 3))
            system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None
            result.append(render(pending[:count], system))
            pending = pending[count:]
    for questions, text in HAND_WRITTEN:
        for question in questions:
            for _ in range(6):
                system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.3 else None
                result.append(render([(question, text)], system))
    rng.shuffle(result)
    return result

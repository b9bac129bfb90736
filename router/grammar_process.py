"""Compiles grammars for a router, in a process of its own that may be killed: `router.grammars`.

    python -m router.grammar_process PARENT_PID DIRECTORY VOCAB_SIZE EOS_ID,EOS_ID...

Says `{}` when it is ready, then answers each line `{"kind", "text"}` on stdin by one line on
stdout: `{"grammar"}`, or `{"error"}`. Its memory is bounded; its time is bounded by whoever asks.
"""

import resource
import sys
import time
from pathlib import Path
from typing import Final

import msgspec
from llguidance import LLMatcher, LLTokenizer, grammar_from

from common.errors import GrammarError
from common.grammar import check, open_matcher, open_vocabulary
from common.parent import die_with_parent

MEMORY_BYTES: Final = 4 << 30
"""Of address space: the vocabulary, and what one grammar may take."""
MAX_COMPILE_S: Final = 0.25
"""Seconds of processor time: a worker compiles it again, between two of its steps."""
_JSON: Final = {"whitespace_flexible": True, "whitespace_pattern": "[ ]?"}
"""At most one space between tokens of JSON: weak models write blanks without end."""


class Question(msgspec.Struct):
    kind: str
    text: str


def compile_one(vocabulary: LLTokenizer, kind: str, text: str) -> str:
    """The grammar as workers take it. Raises GrammarError."""
    try:
        match kind:
            case "json":
                grammar = LLMatcher.grammar_from_json_schema(text, overrides=_JSON)  # type: ignore[arg-type]
            case "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            case "choice":
                grammar = grammar_from("choice", text)
            case _:
                grammar = grammar_from("grammar", text)
    except ValueError as error:
        raise GrammarError(str(error)) from error
    started = time.process_time()
    matcher = open_matcher(vocabulary, grammar)
    matcher.compute_bitmask()
    check(matcher)
    took_s = time.process_time() - started
    if took_s > MAX_COMPILE_S:
        raise GrammarError(f"it is too complex: compiling takes {took_s:.2f} s")
    return grammar


def main(argv: list[str]) -> int:
    die_with_parent(int(argv[0]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    eos = [int(token) for token in argv[3].split(",") if token]
    reason = "the model has no fast tokenizer"
    vocabulary = None
    try:
        vocabulary = open_vocabulary(Path(argv[1]), int(argv[2]), eos)
    except GrammarError as error:
        reason = str(error)
    _say({})
    for line in sys.stdin.buffer:
        question = msgspec.json.decode(line, type=Question)
        try:
            if vocabulary is None:
                raise GrammarError(reason)
            _say({"grammar": compile_one(vocabulary, question.kind, question.text)})
        except GrammarError as error:
            _say({"error": str(error)})
    return 0


def _say(value: dict[str, str]) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Grammars over tokens (llguidance): what a constrained answer may consist of.

The router's checking process compiles what clients ask for, workers compile it again and mask
logits with it (`common.model.guides`): both see the same vocabulary, made here. No torch.
"""

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer

from common.errors import GrammarError

TOKENIZER_FILE = "tokenizer.json"


def open_vocabulary(
    directory: Path, vocab_size: int, eos_token_ids: Sequence[int]
) -> LLTokenizer | None:
    """The tokens of a checkpoint as grammars see them; None if it has no fast tokenizer.

    vocab_size: of the model; ids that the tokenizer does not know are never allowed. Raises
    GrammarError if there is no token that ends an answer, or the tokenizer is of an unknown kind.
    """
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        return None
    if not eos_token_ids:
        raise GrammarError("the model has no end-of-sequence token")
    text = path.read_text(encoding="utf-8")
    try:
        known = LLTokenizer(text, eos_token=list(eos_token_ids))
        if known.vocab_size >= vocab_size:
            return known
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except ValueError as error:
        raise GrammarError(f"the tokenizer cannot be used: {error}") from error


def open_matcher(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning of an answer. Raises GrammarError if `grammar` is not valid."""
    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    check(matcher)
    return matcher


def check(matcher: LLMatcher) -> None:
    """Raises GrammarError if the matcher met an error: its masks mean nothing from then on."""
    if matcher.is_error():
        raise GrammarError(matcher.get_error().partition("\n<state>")[0].strip()[:1_000])

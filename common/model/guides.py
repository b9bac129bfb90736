"""Which tokens a constrained choice may draw next: grammars followed token by token.

Owned by a worker's sampler. What is kept is a cache: a state that is missing or of other tokens is
made anew by replaying the tokens of the choice, so a choice goes on here after it began on another
worker, after a preemption and beside others of the same prompt.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from common.errors import GrammarError
from common.grammar import check, open_matcher, open_vocabulary
from common.model.batch import Sample

MAX_STATES: Final = 1_024
MAX_GRAMMARS: Final = 128
log = logging.getLogger("tandem.grammar")


@dataclass(slots=True)
class _State:
    grammar: str
    matcher: LLMatcher
    consumed: list[int] = field(default_factory=list)


class Guides:
    """The grammars of one model's requests."""

    def __init__(self, directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self._vocabulary: LLTokenizer | None = None
        try:
            self._vocabulary = open_vocabulary(directory, vocab_size, eos_token_ids)
        except GrammarError as error:
            log.warning("no structured output: %s", error)
        self._grammars: OrderedDict[str, LLMatcher] = OrderedDict()
        """Compiled, at the beginning of an answer."""
        self._states: OrderedDict[tuple[int, int], _State] = OrderedDict()
        """By the list object of a sequence's tokens and the choice; checked before use."""

    def allowed(self, sample: Sample) -> npt.NDArray[np.bool_] | None:
        """[vocab_size]: the tokens that may come next. None: the grammar cannot be followed."""
        try:
            matcher = self._advance(sample)
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            check(matcher)
        except GrammarError as error:
            log.warning("a grammar failed: %s", error)
            return None
        mask = np.unpackbits(bits, count=min(self._vocab_size, 8 * len(bits)), bitorder="little")
        return np.pad(mask, (0, self._vocab_size - len(mask))).astype(np.bool_)

    def _advance(self, sample: Sample) -> LLMatcher:
        """The matcher after the output tokens of `sample`. Raises GrammarError."""
        outputs = list(sample.tokens[sample.prompt_len :])
        key = (id(sample.tokens), sample.choice)
        state = self._states.get(key)
        if (
            state is None
            or state.grammar != sample.params.grammar
            or outputs[: len(state.consumed)] != state.consumed
        ):
            state = _State(sample.params.grammar, self._begin(sample.params.grammar))
            self._states[key] = state
        self._states.move_to_end(key)
        if len(self._states) > MAX_STATES:
            self._states.popitem(last=False)
        fresh = outputs[len(state.consumed) :]
        if fresh:
            state.matcher.consume_tokens(fresh)
            state.consumed = outputs
            check(state.matcher)
        return state.matcher

    def _begin(self, grammar: str) -> LLMatcher:
        if self._vocabulary is None:
            raise GrammarError("the model cannot be constrained")
        compiled = self._grammars.get(grammar)
        if compiled is None:
            compiled = self._grammars[grammar] = open_matcher(self._vocabulary, grammar)
        self._grammars.move_to_end(grammar)
        if len(self._grammars) > MAX_GRAMMARS:
            self._grammars.popitem(last=False)
        return compiled.deep_copy()

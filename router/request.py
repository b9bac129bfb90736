"""One prompt that is being served: its choices, their tokens so far, and its attempts.

`Request.take` turns the workers' outputs into `Delta`s, each token once, whatever attempt brought
it. Owned by `router.dispatch`, which alone changes it; the HTTP side reads `events`.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from common.blockhash import UNIT, BlockHash, chain, pack_tokens, seed
from common.errors import RequestError
from common.messages import Output, TokenLogprob
from common.sampling import SamplingParams
from router.detokenizer import Detokenizer, StopMatcher
from router.tokenizer import TextModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRule:
    """How tokens become the text of a choice."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    visible: frozenset[int] = frozenset()
    """Special tokens that are shown nevertheless: marks of tool calls and of reasoning."""


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What one engine step added to one choice."""

    choice: int
    """Index in the HTTP answer, over all prompts of the call."""
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: str
    """Empty, `stop` or `length`."""
    stop_reason: str | int | None
    """The stop string or stop token id that ended the choice, if one did."""


Event = Delta | RequestError
"""RequestError: the request cannot go on; the last event."""


@dataclass(slots=True, eq=False)
class Attempt:
    """One placement: which workers carry which choices, and the load that it stands for."""

    number: int
    choices: tuple[int, ...]
    prefill: str | None
    """None: the decode worker prefills itself."""
    decode: str | None
    """None: the first token is the last one."""
    prefill_tokens: int
    """Prompt tokens that count as load of whoever prefills, until the first output."""
    kv_tokens: int
    first: bool
    """Carries the whole request from its beginning: its cache hit is the one to report."""
    fetch: str | None = None
    """The worker from which whoever prefills fetches a prefix."""
    prefilled: bool = False
    """A first output came: the prompt is computed."""
    handed_over: bool = False
    """The decode worker spoke after a prefill worker: the latter is not needed any more."""
    early: list[Output] = field(default_factory=list)
    """Outputs of the decode worker that wait for the prefill worker's first."""

    def needs(self, worker_id: str) -> bool:
        """The attempt cannot go on without this worker."""
        if worker_id == self.prefill:
            return not self.handed_over
        return worker_id == self.decode

    @property
    def pair(self) -> tuple[str, str] | None:
        """Prefill and decode worker, if it has both."""
        if self.prefill is None or self.decode is None:
            return None
        return self.prefill, self.decode

    def suspects(self, worker: str, reason: str) -> tuple[str, ...]:
        """Whose failure it is that `worker` reports: its own, its peer's, or that of the way
        between the two."""
        if self.pair is None or reason not in ("peer", "transfer"):
            return (worker,)
        if reason == "transfer":
            return self.pair
        return tuple(other for other in self.pair if other != worker)

    def workers(self) -> list[str]:
        return [worker for worker in (self.prefill, self.decode) if worker is not None]


class Choice:
    """The token log and the text of one choice."""

    __slots__ = ("_detokenizer", "_is_plain", "_matcher", "finish", "number", "tokens")

    def __init__(self, number: int, rule: TextRule, text_model: TextModel) -> None:
        self.number = number
        self.tokens: list[int] = []
        self.finish = ""
        self._detokenizer = Detokenizer(
            text_model, skip_special_tokens=rule.skip_special_tokens, visible=rule.visible
        )
        self._matcher = StopMatcher(rule.stop, include=rule.include_stop)
        self._is_plain = not rule.stop

    def extend(
        self, tokens: Sequence[int], finish: str, min_tokens: int, show_end: bool
    ) -> tuple[str, int, str | None]:
        """Log `tokens` until a stop string or the end.

        Returns (text to show, tokens taken, stop string that was matched). `show_end`: the token
        that ended the choice is part of its text.
        """
        text = ""
        if len(tokens) == 1 and not finish and self._is_plain:  # as most outputs are
            self.tokens.append(tokens[0])
            return self._detokenizer.push(tokens), 1, None
        for i, token in enumerate(tokens):
            self.tokens.append(token)
            is_end = finish == "stop" and i == len(tokens) - 1
            piece = "" if is_end and not show_end else self._detokenizer.push((token,))
            text += self._matcher.push(piece, armed=len(self.tokens) > min_tokens)
            if self._matcher.matched is not None:
                self.finish = "stop"
                return text, i + 1, self._matcher.matched
        if finish:
            armed = len(self.tokens) > min_tokens
            text += self._matcher.push(self._detokenizer.flush(), armed=armed)
            text += self._matcher.flush()
            self.finish = "stop" if self._matcher.matched is not None else finish
        return text, len(tokens), self._matcher.matched


@dataclass(slots=True, eq=False)
class Request:
    """State of one prompt from submission to the end of its last choice."""

    id: int
    label: str
    """What logs call it; from the client or made up, never a key."""
    prompt: list[int]
    params: SamplingParams
    rule: TextRule
    salt: str
    events: asyncio.Queue[Event | None]
    """Shared by all prompts of one HTTP call; None: its client is gone."""
    first_choice: int
    """Index of choice 0 in the HTTP answer."""
    choices: list[Choice]
    attempts: dict[int, Attempt] = field(default_factory=dict)
    next_attempt: int = 1
    failures: int = 0
    avoid: set[str] = field(default_factory=set)
    """Workers that failed this request; used again only if there is no other."""
    avoid_pairs: set[tuple[str, str]] = field(default_factory=set)
    """Prefill and decode worker between which a transfer failed."""
    content_id: str | None = None
    """Which content it began on: tokens of one model are never continued by another."""
    refused: set[str] = field(default_factory=set)
    """Workers on which it can never fit."""
    silent: bool = False
    """Nothing is generated (`max_tokens` 0): the one token that a worker makes is dropped."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's second token and on, if they were asked for."""
    cached_tokens: int = 0
    """Prompt tokens that the attempt with the first token found in a prefix cache."""
    tenant: str = ""
    started: float = field(default_factory=time.monotonic)
    """When it was handed over to be served; `received`: when its HTTP call began."""
    received: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float | None = None
    over: bool = False
    packed: bytes = field(init=False)
    """`prompt` as messages carry it."""
    _blamed: dict[str, int] = field(init=False, default_factory=dict)
    """Worker -> `next_attempt` when a failure of it was last counted."""
    _chains: dict[tuple[str, int], list[BlockHash]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.packed = pack_tokens(self.prompt)

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        params = self.params
        num_bad = sum(map(len, params.bad_words))
        of_params = len(params.grammar) + len(params.allowed_tokens) + 32 * num_bad
        return 12 * len(self.prompt) + 16 * len(params.logit_bias) + of_params

    @property
    def num_outputs(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)

    def unfinished(self, choices: Sequence[int]) -> list[Choice]:
        return [self.choices[i] for i in choices if not self.choices[i].finish]

    def remaining(self, choice: Choice) -> int:
        """Output tokens that the choice may still get."""
        return self.params.max_tokens - len(choice.tokens)

    def hashes(self, content_id: str, block_size: int) -> list[BlockHash]:
        """Names of the prompt's full blocks on workers of this content and block size."""
        key = (content_id, block_size)
        if key not in self._chains:
            parent = seed(content_id, self.salt)
            self._chains[key] = chain(self.packed, parent, block_size // UNIT)
        return self._chains[key]

    @property
    def main_chain(self) -> tuple[list[BlockHash], int]:
        """Names of the prompt's full blocks, and their size, on the workers it was looked up for
        first; none if it never was."""
        for (_, block_size), hashes in self._chains.items():
            return hashes, block_size
        return [], 1

    def blame(self, attempt: Attempt, workers: Sequence[str]) -> None:
        """Count a failure of `workers`, which ended `attempt`.

        Several attempts (choices) may end by the same failure: those that had been placed when it
        was counted are not counted again.
        """
        if any(attempt.number < self._blamed.get(worker, 0) for worker in workers):
            return
        self.failures += 1
        for worker in workers:
            self._blamed[worker] = self.next_attempt

    def awaits_scores(self, attempt: Attempt, worker: str) -> bool:
        """The log-probabilities of the prompt are still to come, from the prefill worker alone:
        nothing that `worker` sends can be shown before."""
        if self.params.prompt_logprobs is None or attempt.prefilled:
            return False
        return attempt.prefill not in (None, worker)

    def take(self, output: Output) -> Delta | None:
        """The new part of an output; None if all of it was known.

        The output belongs to a live attempt of this request. Raises ValueError if tokens are
        missing before it: then the attempt cannot be trusted.
        """
        choice = self.choices[output.choice]
        if choice.finish:
            return None
        if output.prompt_logprobs and not self.prompt_logprobs:
            self.prompt_logprobs = output.prompt_logprobs
        if self.silent:
            choice.finish = "length"
            self.first_token = self.last_token = time.monotonic()
            return Delta(self.first_choice + choice.number, "", (), (), "length", None)
        known = len(choice.tokens) - output.index
        if known < 0:
            raise ValueError(f"choice {choice.number}: token {len(choice.tokens)} is missing")
        fresh = output.tokens[known:] if known else output.tokens
        if not fresh and not output.finish:
            return None
        stop_token = output.stop_token if output.stop_token >= 0 else None
        text, num_taken, matched = choice.extend(
            fresh, output.finish, self.params.min_tokens, show_end=self.rule.include_stop
        )
        now = time.monotonic()
        if self.first_token is None:
            self.first_token = now
        self.last_token = now
        logprobs = output.logprobs[known : known + num_taken]
        return Delta(
            self.first_choice + choice.number,
            text,
            fresh if num_taken == len(fresh) else fresh[:num_taken],
            logprobs,
            choice.finish,
            matched if matched is not None else stop_token,
        )

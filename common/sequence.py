"""One choice of one request inside a worker: its tokens, its blocks and how far it got."""

from dataclasses import dataclass, field

from common.blockhash import BlockHash
from common.messages import TokenLogprob
from common.model.batch import Row, Sample, Scoring
from common.sampling import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of one choice and the blocks that hold their KV.

    While a prompt is prefilled one Sequence stands for all its `choices`; it is forked into one
    Sequence per choice when the first tokens are known.
    """

    request: int
    attempt: int
    choices: tuple[int, ...]
    tokens: list[int]
    """Prompt, then generated tokens."""
    prompt_len: int
    params: SamplingParams
    router: bytes
    """Link identity of the router that this request belongs to."""
    parent: BlockHash
    """Seed of the hash chain (model, tenant salt)."""
    hashes: list[BlockHash] = field(default_factory=list)
    """Hashes of the full blocks of `tokens`, as far as they were computed."""
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose KV is in `blocks`."""
    num_cached: int = 0
    """Prompt tokens that were found in the prefix cache."""
    scores: list[TokenLogprob] = field(default_factory=list)
    """Log-probabilities of the prompt's second token and on, if they were asked for."""
    taken: float = 0.0
    """Monotonic seconds when it began to wait here: for its first chunk, or for slots."""
    began: float = 0.0
    """When that wait ended."""
    arrival: int = 0
    """Rank by the time at which the worker took the request; set by the decode engine."""

    @property
    def priority(self) -> int:
        """Lower values go first."""
        return self.params.priority

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not computed."""
        return len(self.tokens) - self.num_computed

    @property
    def is_scored(self) -> bool:
        """The log-probabilities of the prompt are still to be told."""
        return self.params.prompt_logprobs is not None and self.num_outputs == 0

    def row(self, count: int) -> Row:
        """The next `count` tokens as a row; it samples if it reaches the last known token."""
        start, end = self.num_computed, self.num_computed + count
        assert 0 < count <= self.num_pending, (count, self.num_pending)
        samples: tuple[Sample, ...] = ()
        if end == len(self.tokens):
            samples = tuple(
                Sample(choice, self.params, self.tokens, self.prompt_len) for choice in self.choices
            )
        scoring = None
        if self.is_scored:
            targets = self.tokens[start + 1 : end + 1]
            scoring = Scoring(targets, self.params.prompt_logprobs or 0, self.scores)
        return Row(self.tokens[start:end], start, self.blocks, samples, scoring)

"""One simulated request on its way: what was decided, and when what happened."""

from dataclasses import dataclass, field

from router.simulate.trace import Request


@dataclass(slots=True, eq=False)
class Job:
    request: Request
    arrival: float
    prefill: int | None = None
    """Number of the prefill worker; None: the decode worker prefills, or nobody does yet."""
    decode: int = 0
    fetched_at: float = 0.0
    """When the prefix that it fetches is there."""
    predicted_s: float = 0.0
    """Seconds of compute that were predicted at its placement."""
    predicted_tokens: int = 0
    turn: int = 0
    """Prompts of lower ones are computed first, where the shortest is."""
    cached: int = 0
    """Prompt tokens that were not computed."""
    emitted: int = 0
    """Output tokens of earlier attempts."""
    first: float | None = None
    """When the first token came."""
    end: float | None = None
    """When the last token came."""
    finish_step: int = field(default=0)
    """The step of its decode worker in which the last token comes."""
    joined_step: int = 0

    @property
    def tokens(self) -> int:
        """Tokens to prefill: the prompt and what earlier attempts emitted."""
        return self.request.prompt + self.emitted

    @property
    def left(self) -> int:
        """Tokens that still come after the first one of this attempt."""
        return max(0, self.request.output - self.emitted - 1)

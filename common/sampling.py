"""Sampling parameters of a request, as the router validated them and the workers apply them."""

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of a request are chosen and when it ends. Stop strings live in the router.

    All values are validated by the router; workers trust them. Counts (`max_tokens`,
    `min_tokens`, penalties) are measured from `prompt_len` of the request, so that a continuation
    on another worker goes on exactly where the first one stopped.
    """

    max_tokens: int
    """Output tokens at most, per choice, at least 1."""
    min_tokens: int = 0
    """End-of-sequence and stop token ids are masked before this many output tokens, unless
    nothing else may come."""
    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """0 means all."""
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of (token id, bias added to its logit)."""
    allowed_tokens: bytes = b""
    """Token ids that may come, as `common.blockhash.pack_tokens` packs them; empty: any."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Runs of tokens that must not come: the last of each is masked after the others."""
    seed: int = 0
    """64-bit; always set (the router draws one when the client gave none)."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    """End the choice, like the model's own end-of-sequence ids; not masked by `ignore_eos`."""
    logprobs: int | None = None
    """None: none. n >= 0: log-probability of each chosen token and of the n most likely ones."""
    logprob_token_ids: tuple[int, ...] = ()
    """Whose log-probabilities come instead of those of the most likely ones, in this order."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, which is then computed without the prefix cache."""
    grammar: str = ""
    """What the output must match (llguidance); empty: anything. The end of sequence then comes
    where the grammar lets it, whatever `min_tokens`, `ignore_eos` and `allowed_tokens` say."""
    priority: int = 0
    """Lower values are computed first, before those that came earlier."""

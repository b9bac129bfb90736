"""Choosing the next tokens from logits: everything in `SamplingParams` that concerns a token.

Called by the runner once per step. There is no state (what `guides` keeps is a cache): a draw
depends on the logits, the parameters, the tokens so far and `philox(seed, choice, output index)`,
so whoever continues a request draws what the one before would have drawn.

Order: logit bias, penalties, masks (allowed tokens, bad words, grammar, `min_tokens`),
temperature, min-p, top-k, top-p.
Log-probabilities are of the raw logits, before all of that.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import torch

from common.blockhash import TOKEN_DTYPE
from common.messages import TokenLogprob
from common.model.batch import Sample, Sampled
from common.model.guides import Guides
from common.model.philox import uniforms
from common.sampling import SamplingParams

GREEDY_BELOW: Final = 1e-5
"""Temperatures below this mean greedy: dividing by them would only overflow."""

_NONE: Final = float("-inf")
_MOST: Final = 1e30
"""Larger than any logit; finite even when it is divided by the least temperature."""


DrawRandom = Callable[[torch.Tensor, Sequence[Sample]], list[int]]
"""What `draw_random` does, maybe by kernels of a backend."""


class Sampler:
    """Draws tokens for one model."""

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        guides: Guides | None = None,
        draws: DrawRandom | None = None,
    ) -> None:
        """draws: how random draws are made; None: `draw_random`."""
        self._guides = guides
        self._draw_random = draws or draw_random
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)

    def draw(self, logits: torch.Tensor, samples: Sequence[tuple[int, Sample]]) -> list[Sampled]:
        """One token for each sample, given as (row of `logits`, sample).

        logits: [rows, vocab] float32, left unchanged.
        """
        if not samples:
            return []
        rows = torch.tensor([row for row, _ in samples], device=logits.device)
        rest = [i for i, (_, sample) in enumerate(samples) if not self._is_plain(sample)]
        tokens = [0] * len(samples)
        if len(rest) < len(samples):
            best = logits.argmax(-1).tolist()
            tokens = [best[row] for row, _ in samples]
        if rest:
            chosen = self._draw_adjusted(logits[rows[rest]], [samples[i][1] for i in rest])
            for i, token in zip(rest, chosen, strict=True):
                tokens[i] = token
        logprobs = _logprobs(logits, rows, tokens, [sample.params for _, sample in samples])
        return [Sampled(*pair) for pair in zip(tokens, logprobs, strict=True)]

    def takes_best(self, sample: Sample) -> bool:
        """Whether the token of the largest logit is all that this draw can answer."""
        return self._is_plain(sample) and sample.params.logprobs is None

    def _is_plain(self, sample: Sample) -> bool:
        """Greedy, with nothing that changes the order of the logits."""
        params = sample.params
        return (
            params.temperature < GREEDY_BELOW
            and not params.grammar
            and not params.logit_bias
            and not params.allowed_tokens
            and not params.bad_words
            and not _has_penalties(params)
            and len(sample.tokens) - sample.prompt_len >= params.min_tokens
        )

    def _draw_adjusted(self, logits: torch.Tensor, samples: Sequence[Sample]) -> list[int]:
        """logits: [samples, vocab], overwritten."""
        failed = []
        for i, (line, sample) in enumerate(zip(logits, samples, strict=True)):
            self._adjust(line, sample)
            if not self._restrict(line, sample):
                failed.append(i)
        tokens: list[int] = logits.argmax(-1).tolist()
        drawn = [i for i, sample in enumerate(samples) if sample.params.temperature >= GREEDY_BELOW]
        if drawn:
            random = self._draw_random(logits[drawn], [samples[i] for i in drawn])
            for i, token in zip(drawn, random, strict=True):
                tokens[i] = token
        for i in failed:
            tokens[i] = -1
        return tokens

    def _restrict(self, line: torch.Tensor, sample: Sample) -> bool:
        """Leave only the tokens that may come, in place; False if there are none."""
        params = sample.params
        if params.allowed_tokens:
            # A copy: what was received cannot be written to.
            ids = torch.from_numpy(np.frombuffer(params.allowed_tokens, TOKEN_DTYPE).astype("i8"))
            kept = line[ids.to(line.device)]
            line.fill_(_NONE)[ids.to(line.device)] = kept
        if banned := _banned(sample):
            line[banned] = _NONE
        if params.grammar:
            allowed = self._guides.allowed(sample) if self._guides is not None else None
            if allowed is None:
                return False
            line.masked_fill_(~torch.from_numpy(allowed).to(line.device), _NONE)
            if line.amax() == _NONE:
                # A whole answer may end, whatever else is allowed.
                line[[token for token in self._eos_token_ids if allowed[token]]] = 0.0
        if (params.allowed_tokens or banned or params.grammar) and line.amax() == _NONE:
            return False
        if len(sample.tokens) - sample.prompt_len < params.min_tokens:
            ends = [
                token
                for token in (*self._eos_token_ids, *params.stop_token_ids)
                if token < self._vocab_size
            ]
            kept = line[ends]
            line[ends] = _NONE
            if line.amax() == _NONE:
                line[ends] = kept  # nothing else is left: the other masks know better
        return True

    def _adjust(self, line: torch.Tensor, sample: Sample) -> None:
        """Apply bias and penalties to one sample's logits [vocab], in place."""
        params, device = sample.params, line.device
        if params.logit_bias:
            ids = torch.tensor([token for token, _ in params.logit_bias], device=device)
            bias = torch.tensor([bias for _, bias in params.logit_bias], device=device)
            line.index_add_(0, ids, bias.to(line.dtype))
        if not _has_penalties(params):
            return
        tokens = np.array(sample.tokens, dtype=np.int64)
        if params.repetition_penalty != 1:
            seen = torch.from_numpy(np.unique(tokens)).to(device)
            values = line[seen]
            line[seen] = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
        if params.frequency_penalty or params.presence_penalty:
            outputs, counts = np.unique(tokens[sample.prompt_len :], return_counts=True)
            penalties = params.frequency_penalty * counts + params.presence_penalty
            line[torch.from_numpy(outputs).to(device)] -= torch.from_numpy(penalties).to(line)
        # An extreme penalty overflows; softmax of an infinite logit would be NaN.
        line.clamp_(min=-_MOST, max=_MOST)


def _banned(sample: Sample) -> list[int]:
    """Tokens that would complete a bad word of the output."""
    outputs = sample.tokens[sample.prompt_len :] if sample.params.bad_words else ()
    return [
        word[-1]
        for word in sample.params.bad_words
        if len(word) == 1 or tuple(outputs[1 - len(word) :]) == word[:-1]
    ]


def _has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    )


def draw_random(logits: torch.Tensor, samples: Sequence[Sample]) -> list[int]:
    """Inverse-CDF draws from logits [samples, vocab] float32, overwritten.

    The CDF runs in the order of token ids, not of probabilities: where two logits are nearly
    equal, rounding on another worker may swap their order, and must not swap the tokens.
    """
    params = [sample.params for sample in samples]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    if any(p.temperature != 1 for p in params):
        logits /= column([p.temperature for p in params])
    if any(p.min_p > 0 for p in params):
        floor = column([p.min_p for p in params]).log() + logits.amax(-1, keepdim=True)
        logits.masked_fill_(logits < floor, _NONE)
    _keep_top_k(logits, [p.top_k for p in params])
    _keep_top_p(logits, [p.top_p for p in params])

    cdf = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    draws = uniforms([(s.params.seed, s.choice, len(s.tokens) - s.prompt_len) for s in samples])
    target = torch.from_numpy(draws).to(logits.device)[:, None] * total
    # u < 1, but u * total may round up to total, past the last token.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    tokens: list[int] = torch.searchsorted(cdf, target, right=True)[:, 0].tolist()
    return tokens


def _keep_top_k(logits: torch.Tensor, limits: Sequence[int]) -> None:
    """Mask all but the `k` highest logits of each line (ties with the last are kept)."""
    vocab_size = logits.shape[-1]
    lines = [i for i, k in enumerate(limits) if 0 < k < vocab_size]
    if not lines:
        return
    ks = torch.tensor([limits[i] for i in lines], device=logits.device)[:, None]
    chosen = logits[lines]
    threshold = chosen.topk(int(ks.max()), dim=-1).values.gather(1, ks - 1)
    logits[lines] = chosen.masked_fill_(chosen < threshold, _NONE)


def _keep_top_p(logits: torch.Tensor, limits: Sequence[float]) -> None:
    """Keep the fewest most likely tokens whose probabilities reach p (and ties with the last)."""
    vocab_size = logits.shape[-1]
    for line, p in zip(logits, limits, strict=True):
        if p >= 1:
            continue
        probabilities = line.softmax(-1)
        # All tokens below this hold less than 1 - p together: they are never needed, and what is
        # left to sort is small.
        floor = (1 - p) / (2 * vocab_size)
        best = probabilities[probabilities >= floor].sort(descending=True).values
        before = best.cumsum(-1, dtype=torch.float64) - best
        kept = (before < p).sum().clamp(min=1)
        line.masked_fill_(probabilities < best[kept - 1], _NONE)


def _logprobs(
    logits: torch.Tensor,
    rows: torch.Tensor,
    tokens: Sequence[int],
    params: Sequence[SamplingParams],
) -> list[TokenLogprob | None]:
    """Log-probabilities of the raw distribution for the samples that ask for them."""
    result: list[TokenLogprob | None] = [None] * len(tokens)
    asked = [i for i, p in enumerate(params) if p.logprobs is not None]
    if not asked:
        return result
    all_logprobs = logits[rows[asked]].log_softmax(-1)
    chosen = torch.tensor([max(0, tokens[i]) for i in asked], device=logits.device)
    values: list[float] = all_logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    width = min(max(params[i].logprobs or 0 for i in asked), logits.shape[-1])
    best = all_logprobs.topk(width, dim=-1)
    for line, i, value, top_ids, top_values in zip(
        all_logprobs, asked, values, best.indices.tolist(), best.values.tolist(), strict=True
    ):
        if params[i].logprob_token_ids:
            top_ids = list(params[i].logprob_token_ids)
            top_values = line[top_ids].tolist()
        else:
            count = params[i].logprobs or 0
            top_ids, top_values = top_ids[:count], top_values[:count]
        result[i] = TokenLogprob(tokens[i], value, tuple(zip(top_ids, top_values, strict=True)))
    return result


def score(logits: torch.Tensor, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probability and rank of each target, and of the most likely tokens in its place.

    logits: [targets, vocab] float32.
    """
    if not targets:
        return []
    all_logprobs = logits.log_softmax(-1)
    chosen = all_logprobs.gather(1, torch.tensor(list(targets), device=logits.device)[:, None])
    ranks: list[int] = (1 + (all_logprobs > chosen).sum(-1)).tolist()
    best = all_logprobs.topk(min(num_top, logits.shape[-1]), dim=-1)
    values: list[float] = chosen[:, 0].tolist()
    return [
        TokenLogprob(token, value, tuple(zip(ids, tops, strict=True)), rank)
        for token, value, ids, tops, rank in zip(
            targets, values, best.indices.tolist(), best.values.tolist(), ranks, strict=True
        )
    ]

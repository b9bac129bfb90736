"""Tokens chosen by the kernels are those of `common.model.sampler`."""

import pytest
import torch

from common.model.batch import Sample
from common.model.sampler import Sampler
from common.model.triton.sampling import Draw, best_tokens, draw_tokens
from common.sampling import SamplingParams


@pytest.mark.parametrize("vocab", [1, 7, 512, 5000, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_best_token(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[1, vocab // 2] = logits[1, -1] = 50.0
    best = best_tokens(logits)
    assert best.tolist() == logits.argmax(-1).tolist()
    assert best[1] == vocab // 2, "the first of equal ones"


ALL: dict[str, float] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01}


@pytest.mark.parametrize(
    ("vocab", "params"),
    [
        (513, {}),
        (513, {"temperature": 0.3}),
        (513, {"temperature": 2.5, "top_k": 1}),
        (513, {"top_k": 5}),
        (513, {"top_k": 10_000, "top_p": 0.001}),
        (513, {"top_p": 0.4}),
        (513, {"min_p": 0.2}),
        (513, ALL),
        (1, ALL),
        (4_100, {"min_p": 0.001, "top_k": 100}),
    ],
)
def test_draws_are_those_of_the_sampler(vocab: int, params: dict[str, float]) -> None:
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    samples = [
        Sample(
            choice=line % 3,
            params=SamplingParams(max_tokens=9, seed=(line * 0x9E3779B97F4A7C15) % 2**64, **params),  # type: ignore[arg-type]
            tokens=[0] * (line + 2),
            prompt_len=2,
        )
        for line in range(len(logits))
    ]
    expected = Sampler(vocab, ()).draw(logits, list(enumerate(samples)))
    before = logits.clone()
    drawn = draw_tokens(
        logits,
        [
            Draw(
                s.params.temperature,
                s.params.min_p,
                s.params.top_k,
                s.params.top_p,
                s.params.seed,
                s.choice,
                len(s.tokens) - s.prompt_len,
            )
            for s in samples
        ],
    )
    assert drawn.tolist() == [sampled.token for sampled in expected]
    assert torch.equal(logits, before)
    if vocab > 1 and params.get("top_k") != 1 and params.get("top_p") != 0.001:
        assert len(set(drawn.tolist())) > 1


def test_ties_and_masked_tokens() -> None:
    logits = torch.full((8, 100), float("-inf"))
    logits[:, [3, 50, 97]] = 1.0
    logits[:, 60] = 0.5
    draws = [Draw(1.0, 0.0, 1, 1.0, seed, 0, 0) for seed in range(8)]
    assert set(draw_tokens(logits, draws).tolist()) <= {3, 50, 97}
    draws = [Draw(1.0, 0.0, 0, 0.1, seed, 0, 0) for seed in range(8)]
    assert set(draw_tokens(logits, draws).tolist()) <= {3, 50, 97}

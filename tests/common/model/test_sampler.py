import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from common.blockhash import pack_tokens
from common.messages import TokenLogprob
from common.model.batch import Sample
from common.model.philox import uniforms
from common.model.sampler import Sampler
from common.sampling import SamplingParams

EOS = 3
VOCAB = 8
SAMPLER = Sampler(VOCAB, (EOS,))


def draw(
    logits: Sequence[float],
    *,
    prompt: Sequence[int] = (),
    outputs: Sequence[int] = (),
    **params: Any,
) -> int:
    sample = Sample(
        0, SamplingParams(**{"max_tokens": 99} | params), [*prompt, *outputs], len(prompt)
    )
    [sampled] = Sampler(len(logits), (EOS,)).draw(torch.tensor([logits]), [(0, sample)])
    assert sampled.logprob is None
    return sampled.token


def frequencies(logits: Sequence[float], num: int = 8_000, **params: Any) -> Counter[int]:
    """Tokens of `num` draws that differ in their choice number alone."""
    parameters = SamplingParams(**{"max_tokens": 99, "seed": 11} | params)
    samples = [(0, Sample(choice, parameters, [0], 1)) for choice in range(num)]
    sampled = Sampler(len(logits), (EOS,)).draw(torch.tensor([logits]), samples)
    return Counter(item.token for item in sampled)


def assert_distributed(counts: Counter[int], probabilities: Sequence[float], limit: float) -> None:
    """Chi-square below `limit`, the 0.999 quantile for the degrees of freedom at hand."""
    total = sum(counts.values())
    assert {t for t in counts} <= {t for t, p in enumerate(probabilities) if p > 0}
    chi_square = sum(
        (counts[token] - p * total) ** 2 / (p * total)
        for token, p in enumerate(probabilities)
        if p > 0
    )
    assert chi_square < limit


LOGITS = [1.0, 0.5, 2.0, -1.0, 0.0, 1.5, -3.0, 0.2]


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


def test_greedy_takes_the_largest() -> None:
    assert draw(LOGITS, temperature=0.0) == 2
    assert draw(LOGITS, temperature=1e-6) == 2


def test_logit_bias() -> None:
    assert draw(LOGITS, temperature=0.0, logit_bias=((6, 5.1),)) == 6
    assert draw(LOGITS, temperature=0.0, logit_bias=((6, 4.9),)) == 2
    assert draw(LOGITS, temperature=0.0, logit_bias=((2, -100.0), (5, -100.0))) == 0


def test_min_tokens_masks_end_and_stop_tokens() -> None:
    logits = [0.0, 1.0, 2.0, 9.0, 0.0, 8.0, 0.0, 0.0]
    options: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (5, 99_999)}
    assert draw(logits, prompt=[1] * 5, outputs=[1], **options) == 2
    assert draw(logits, prompt=[1] * 5, outputs=[1, 1], **options) == EOS
    assert draw(logits, prompt=[1], outputs=[], temperature=0.0, min_tokens=1) == 5


def test_frequency_penalty_counts_outputs_alone() -> None:
    logits = [0.0, 1.0, 2.0, 0.0]
    options: dict[str, Any] = {"temperature": 0.0, "frequency_penalty": 0.4}
    assert draw(logits, prompt=[2, 2, 2, 2], outputs=[], **options) == 2
    assert draw(logits, prompt=[2], outputs=[2, 2], **options) == 2
    assert draw(logits, prompt=[2], outputs=[2, 2, 2], **options) == 1


def test_presence_penalty_does_not_count() -> None:
    logits = [0.0, 1.0, 2.0, 0.0]
    assert draw(logits, outputs=[2], temperature=0.0, presence_penalty=1.1) == 1
    assert draw(logits, outputs=[2] * 9, temperature=0.0, presence_penalty=0.9) == 2
    assert draw(logits, prompt=[2], temperature=0.0, presence_penalty=2.0) == 2


def test_repetition_penalty_is_over_prompt_and_outputs() -> None:
    logits = [0.1, 1.0, 2.0, -5.0]
    assert draw(logits, prompt=[2], temperature=0.0, repetition_penalty=2.1) == 1
    assert draw(logits, prompt=[0], outputs=[2], temperature=0.0, repetition_penalty=1.9) == 2
    # Negative logits are multiplied: a penalty never raises a token.
    assert draw([-1.0, -1.5], prompt=[0], temperature=0.0, repetition_penalty=1.4) == 0
    assert draw([-1.0, -1.5], prompt=[0], temperature=0.0, repetition_penalty=1.6) == 1


def test_bias_comes_before_penalties() -> None:
    # (1 + 3) / 2 = 2 < 2.5, but 1 / 2 + 3 = 3.5.
    assert (
        draw(
            [1.0, 2.5], prompt=[0], temperature=0.0, repetition_penalty=2.0, logit_bias=((0, 3.0),)
        )
        == 1
    )


def test_plain_sampling_follows_the_softmax() -> None:
    assert_distributed(frequencies(LOGITS), softmax(LOGITS), 24.32)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(temperature: float) -> None:
    expected = softmax([x / temperature for x in LOGITS])
    assert_distributed(frequencies(LOGITS, temperature=temperature), expected, 24.32)


def test_top_k() -> None:
    kept = softmax([x if i in (0, 2, 5) else float("-inf") for i, x in enumerate(LOGITS)])
    assert_distributed(frequencies(LOGITS, top_k=3), kept, 13.82)
    assert set(frequencies(LOGITS, 2_000, top_k=1)) == {2}
    assert set(frequencies(LOGITS, 2_000, top_k=VOCAB)) == set(range(VOCAB))


def test_top_p() -> None:
    probabilities = softmax(LOGITS)
    best = sorted(probabilities, reverse=True)
    just_two = best[0] + best[1]
    kept = softmax([x if i in (2, 5) else float("-inf") for i, x in enumerate(LOGITS)])
    assert_distributed(frequencies(LOGITS, top_p=just_two - 1e-4), kept, 10.83)
    assert set(frequencies(LOGITS, 2_000, top_p=just_two + 1e-4)) == {0, 2, 5}
    assert set(frequencies(LOGITS, 2_000, top_p=0.001)) == {2}


def test_top_p_over_a_large_flat_vocabulary() -> None:
    logits = [-i * 1e-4 for i in range(5_000)]
    weights = torch.tensor(logits).softmax(-1).cumsum(0, dtype=torch.float64)
    kept = int((weights < 0.5).sum()) + 1
    tokens = frequencies(logits, 1_500, top_p=0.5)
    assert 1_024 < kept < 4_000
    assert max(tokens) < kept
    assert max(tokens) > 0.95 * kept
    assert len(tokens) > 1_024


def test_min_p() -> None:
    # Relative to the best token: exp(-1) of it is token 0, just below comes token 1.
    assert set(frequencies(LOGITS, 2_000, min_p=math.exp(-1.01))) == {0, 2, 5}
    assert set(frequencies(LOGITS, 2_000, min_p=math.exp(-0.99))) == {2, 5}
    # After the temperature.
    assert set(frequencies(LOGITS, 2_000, min_p=math.exp(-1.01), temperature=2.0)) == {
        0,
        1,
        2,
        4,
        5,
        7,
    }


def test_filters_of_one_row_leave_the_others_alone() -> None:
    parameters = [
        SamplingParams(max_tokens=9, seed=5, **options)
        for options in (
            {},
            {"top_k": 2},
            {"top_p": 0.3, "temperature": 0.7},
            {"temperature": 0.0},
            {"min_p": 0.2, "presence_penalty": 1.0},
        )
    ]
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(1))
    samples = [(i, Sample(i, p, [1, 2, 3], 1)) for i, p in enumerate(parameters)]
    together = SAMPLER.draw(logits, samples)
    assert [s.token for s in together] == [SAMPLER.draw(logits, [s])[0].token for s in samples]
    backwards = SAMPLER.draw(logits.flip(0), [(4 - i, s) for i, s in reversed(samples)])
    assert backwards == together[::-1]


def test_a_draw_is_the_inverse_cdf_in_token_order() -> None:
    parameters = SamplingParams(max_tokens=9, seed=77)
    logits = torch.tensor([LOGITS])
    cdf = torch.tensor(softmax(LOGITS), dtype=torch.float64).cumsum(0)
    for index in range(50):
        [u] = uniforms([(77, 4, index)])
        expected = int((cdf <= u).sum())
        sample = Sample(4, parameters, [0] * (3 + index), 3)
        assert SAMPLER.draw(logits, [(0, sample)])[0].token == expected


def test_a_draw_depends_on_the_output_index_not_on_the_prompt() -> None:
    parameters = SamplingParams(max_tokens=99, seed=9)
    logits = torch.tensor([LOGITS])

    def tokens(prompt_len: int) -> list[int]:
        samples = [
            (0, Sample(0, parameters, [1] * (prompt_len + index), prompt_len))
            for index in range(30)
        ]
        return [sampled.token for sampled in SAMPLER.draw(logits, samples)]

    assert tokens(1) == tokens(2_000)
    assert len(set(tokens(1))) > 2


def test_logprobs_are_of_the_raw_logits() -> None:
    parameters = SamplingParams(
        max_tokens=9,
        temperature=0.0,
        logprobs=3,
        logit_bias=((6, 100.0),),
        repetition_penalty=3.0,
    )
    [sampled] = SAMPLER.draw(torch.tensor([LOGITS]), [(0, Sample(0, parameters, [2], 1))])
    expected = torch.tensor(LOGITS).log_softmax(-1).tolist()
    assert sampled.token == 6
    assert sampled.logprob == TokenLogprob(
        6, expected[6], ((2, expected[2]), (5, expected[5]), (0, expected[0]))
    )


def test_logprobs_of_mixed_rows() -> None:
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    wanted = (None, 0, 2, 1)
    samples = [
        (i % 2, Sample(i, SamplingParams(max_tokens=9, temperature=0.0, logprobs=n), [1], 1))
        for i, n in enumerate(wanted)
    ]
    sampled = SAMPLER.draw(logits, samples)
    assert [s.token for s in sampled] == [2, 5, 2, 5]
    assert [None if s.logprob is None else len(s.logprob.top) for s in sampled] == [None, 0, 2, 1]
    assert sampled[3].logprob is not None and sampled[3].logprob.top[0][0] == 5


def test_logits_are_left_unchanged() -> None:
    logits = torch.tensor([LOGITS])
    parameters = SamplingParams(
        max_tokens=9, temperature=0.5, top_k=3, top_p=0.9, min_tokens=5, logit_bias=((1, 2.0),)
    )
    SAMPLER.draw(logits, [(0, Sample(i, parameters, [1], 1)) for i in range(3)])
    assert logits.tolist() == torch.tensor([LOGITS]).tolist()


def test_no_samples() -> None:
    assert SAMPLER.draw(torch.zeros(0, VOCAB), []) == []


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0])
def test_penalties_that_overflow_still_choose_a_token(temperature: float) -> None:
    params = SamplingParams(
        max_tokens=4, repetition_penalty=1e-40, temperature=temperature, top_p=0.9, min_p=0.1
    )
    logits = torch.linspace(-3, 3, 320)[None]
    (drawn,) = Sampler(320, ()).draw(logits, [(0, Sample(0, params, [5, 310, 7], 2))])
    assert drawn.token == 310


def test_allowed_tokens_leave_nothing_else() -> None:
    allowed = pack_tokens([0, 4, 6])
    assert draw(LOGITS, temperature=0.0, allowed_tokens=allowed) == 0
    assert draw(LOGITS, temperature=0.0, allowed_tokens=allowed, logit_bias=((6, 9.0),)) == 6
    kept = softmax([x if i in (0, 4, 6) else float("-inf") for i, x in enumerate(LOGITS)])
    assert_distributed(frequencies(LOGITS, allowed_tokens=allowed), kept, 13.8)


def test_bad_words_lose_their_last_token_only_after_the_others() -> None:
    options: dict[str, Any] = {"temperature": 0.0, "bad_words": ((2,), (1, 0, 5))}
    assert draw(LOGITS, **options) == 5
    assert draw(LOGITS, prompt=[1, 0], **options) == 5  # the prompt is not looked at
    assert draw(LOGITS, outputs=[7, 1, 0], **options) == 0
    assert draw(LOGITS, outputs=[1, 0, 7], **options) == 5
    assert draw(LOGITS, outputs=[0], **options) == 5


def test_what_leaves_no_token_fails_and_min_tokens_gives_way() -> None:
    only = pack_tokens([4])
    assert draw(LOGITS, temperature=0.0, allowed_tokens=only, bad_words=((4,),)) == -1
    assert draw(LOGITS, seed=5, allowed_tokens=only, bad_words=((4,),)) == -1
    ends = pack_tokens([EOS])
    for temperature in (0.0, 1.0):
        assert draw(LOGITS, temperature=temperature, allowed_tokens=ends, min_tokens=9) == EOS


def test_logprobs_of_given_tokens() -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2, logprob_token_ids=(6, 2))
    plain = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2)
    samples = [(0, Sample(0, chosen, [0], 1)) for chosen in (params, plain)]
    given, usual = Sampler(VOCAB, (EOS,)).draw(torch.tensor([LOGITS]), samples)
    assert given.logprob is not None and usual.logprob is not None
    expected = [math.log(p) for p in softmax(LOGITS)]
    assert [token for token, _ in given.logprob.top] == [6, 2]
    assert [value for _, value in given.logprob.top] == pytest.approx([expected[6], expected[2]])
    assert [token for token, _ in usual.logprob.top] == [2, 5]

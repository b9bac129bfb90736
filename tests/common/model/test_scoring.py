"""Log-probabilities of prompts are those of transformers, however the prompt is cut."""

import pytest
import torch

from common.kv.pool import KvPool
from common.messages import TokenLogprob
from common.model.batch import Row, Sample, Scoring
from common.model.decoder import Kernels
from common.model.runner import ModelRunner
from tests.common.model.drive import greedy_params, load, random_prompts
from tests.conftest import MakeCheckpoint
from tests.parity import load_reference

LENGTH = 150


def test_prompt_logprobs_are_those_of_transformers(
    checkpoint: MakeCheckpoint, kernels: Kernels
) -> None:
    directory = checkpoint("qwen3", head_dim=32)
    loaded = load(directory)
    (prompt,) = random_prompts((LENGTH,), 512, seed=5)
    pool = KvPool(loaded.spec.layout(16, "float32"), 20, torch.device("cpu"))
    runner = ModelRunner(loaded.spec, loaded.weights, pool, kernels=kernels)
    blocks = list(range(20))
    scores: list[TokenLogprob] = []
    sample = Sample(0, greedy_params(1), prompt, LENGTH)
    for start, end in ((0, 7), (7, 100), (100, LENGTH)):
        scoring = Scoring(prompt[start + 1 : end + 1], 2, scores)
        samples = (sample,) if end == LENGTH else ()
        beside = Row(prompt[:5], 0, [19])
        row = Row(prompt[start:end], start, blocks, samples, scoring)
        _, drawn = runner.step([beside, row])
    with torch.inference_mode():
        logits = load_reference(directory)(torch.tensor([prompt])).logits[0].float()
    wanted = logits[:-1].log_softmax(-1)
    assert len(scores) == LENGTH - 1
    for i, entry in enumerate(scores):
        assert entry.token == prompt[i + 1]
        assert entry.logprob == pytest.approx(float(wanted[i, entry.token]), abs=1e-3)
        assert len(entry.top) == 2 and entry.top[0][0] == int(wanted[i].argmax())
        assert entry.rank == 1 + int((wanted[i] > wanted[i, entry.token]).sum())
    assert [sampled.token for sampled in drawn] == [int(logits[-1].argmax())]

"""Do our tokens agree with transformers? The checks that every topology is held against.

float32: the tokens of a greedy run are equal to those of transformers. bfloat16: two correct
implementations differ by rounding and may choose differently where two tokens are nearly equal;
each chosen token must then be as good as the best one, within the rounding that transformers
itself shows between bfloat16 and float32.

A failure is an AssertionError that names the prompt, the position and the tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

Tokens = Sequence[int]


def load_reference(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint as transformers runs it."""
    return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(directory, dtype=dtype))


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: Tokens, num_tokens: int) -> list[int]:
    """`num_tokens` greedy tokens, one forward pass each over transformers' own KV cache; end of
    sequence is a token like any other."""
    tokens: list[int] = []
    cache = None
    ids = torch.tensor([list(prompt)])
    for _ in range(num_tokens):
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        tokens.append(int(output.logits[0, -1].argmax()))
        ids = torch.tensor([tokens[-1:]])
    return tokens


def assert_greedy_equal(
    directory: Path, prompts: Sequence[Tokens], outputs: Sequence[Tokens]
) -> None:
    """Each output must be the greedy continuation of its prompt by transformers in float32."""
    model = load_reference(directory)
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        expected = greedy(model, prompt, len(output))
        for index, (want, got) in enumerate(zip(expected, output, strict=True)):
            assert want == got, (
                f"prompt {number} of {len(prompt)} tokens: output {index} is {got}, transformers "
                f"has {want}; {list(output)} against {expected}"
            )


def assert_teacher_forced(
    directory: Path, prompts: Sequence[Tokens], outputs: Sequence[Tokens]
) -> None:
    """Each token of each output must have, given those before it, a bfloat16 logit within rounding
    of the largest one.

    The allowance is measured: the largest difference between transformers' bfloat16 and float32
    logits over all positions that are judged, with the same weights.
    """
    narrow, wide = (load_reference(directory, dtype) for dtype in (torch.bfloat16, torch.float32))
    judged: list[torch.Tensor] = []
    tolerance = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = _forced(narrow, prompt, output)
        rounding = (logits - _forced(wide, prompt, output)).abs().max()
        tolerance = max(tolerance, float(rounding))
        judged.append(logits)
    for number, (logits, output) in enumerate(zip(judged, outputs, strict=True)):
        shortfalls = logits.amax(-1) - logits.gather(1, torch.tensor(output)[:, None])[:, 0]
        for index, shortfall in enumerate(shortfalls.tolist()):
            assert shortfall <= tolerance, (
                f"prompt {number} of {len(prompts[number])} tokens: output {index} is "
                f"{output[index]}, whose logit is {shortfall:.4f} below the largest; rounding "
                f"explains {tolerance:.4f}"
            )


@torch.inference_mode()
def _forced(model: PreTrainedModel, prompt: Tokens, output: Tokens) -> torch.Tensor:
    """Logits [len(output), vocab] float32 at the positions that chose each token of `output`."""
    ids = torch.tensor([[*prompt, *output[:-1]]])
    logits: torch.Tensor = model(ids, logits_to_keep=len(output)).logits[0]
    return logits.float()

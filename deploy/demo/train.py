"""Trains the demo model: ``python -m deploy.demo.train --steps 1800 --polish 300``.

The text is assembled by ``corpus.py``, ``chat.py`` and ``data.py``.  A run is a function of its
text, the seed and the number of steps: the batch of a step depends on the seed and the step only,
so that ``--resume`` continues as if nothing had happened, and the two halves of a batch are
computed by a thread each and added in a fixed order.  ``--minutes`` only stops.

The steps of ``--polish`` follow at a low rate and add the losses of ``repetition.py``, without
which a model of this size loops under greedy decoding.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from deploy.demo import chat, repetition
from deploy.demo.data import VOCABULARY, Tokens, batch, prepare
from deploy.demo.export import export

HERE = Path(__file__).resolve().parent
CONTEXT = 2048
BATCH, LENGTH, HALVES = 16, 256, 2  # of most steps
LONG_BATCH, LONG_EVERY, LONG_FROM = 2, 8, 0.6  # every eighth step, the whole context
PEAK_RATE, WARMUP, DECAY_FROM = 3e-3, 100, 0.6
POLISH_RATE = 3e-4


def rate(step: int, steps: int, polish: int) -> float:
    """Warm-up, a constant rate, a linear decay to a hundredth of it; then the rate of polishing."""
    if step >= steps:
        return POLISH_RATE * (1 - 0.9 * (step - steps) / polish)
    decay = (step - DECAY_FROM * steps) / ((1 - DECAY_FROM) * steps)
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP) * min(1.0, max(0.01, 1 - decay))


def cross_entropy(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Special:
    """Ids of the tokens that ``repetition.py`` must know, and how many special ones there are."""

    bos: int
    eos: int
    assistant: int
    newline: int
    count: int

    @classmethod
    def of(cls, tokenizer: Any) -> Special:
        return cls(
            bos=tokenizer.token_to_id(chat.BOS),
            eos=tokenizer.token_to_id(chat.EOS),
            assistant=tokenizer.token_to_id(chat.ASSISTANT),
            newline=tokenizer.encode("\n").ids[0],
            count=len(chat.SPECIAL_TOKENS),
        )


def repeats(
    model: Any, tokens: torch.Tensor, special: Special, rng: np.random.Generator
) -> torch.Tensor:
    starts = repetition.beginnings(tokens, special.bos, special.assistant, special.newline)
    unlikely = repetition.unlikelihood(model, starts, special.eos)
    pseudo = repetition.pseudo_repetition(model, tokens, rng, special.count)
    return repetition.WEIGHTS[0] * pseudo + repetition.WEIGHTS[1] * unlikely


def gradients(
    model: Any, special: Special, tokens: torch.Tensor, rng: np.random.Generator | None
) -> tuple[float, float, list[Any]]:
    """Loss, repetition loss and gradients of a part of a batch, computed by the calling thread.

    The losses of ``repetition.py`` are added where ``rng``, which chooses their spans, is given.
    """
    loss = cross_entropy(model, tokens)
    extra = torch.zeros(()) if rng is None else repeats(model, tokens, special, rng)
    parts = torch.autograd.grad(loss + extra, list(model.parameters()))
    return loss.item(), extra.item(), list(parts)


@torch.no_grad()
def evaluate(model: Any, held_out: Tokens) -> float:
    """Mean loss per token over the text held out, in windows of the usual length."""
    count = (len(held_out) - 1) // LENGTH
    windows = [held_out[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)]
    rows: Any = torch.from_numpy(np.stack(windows))
    losses = [cross_entropy(model, part).item() * len(part) for part in rows.split(BATCH)]
    return sum(losses) / len(rows)


def build(tokenizer: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(chat.BOS),
        eos_token_id=tokenizer.token_to_id(chat.EOS),
        pad_token_id=tokenizer.token_to_id(chat.PAD),
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()  # there is no dropout


def train(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizer, data, facts = prepare(arguments.docs, arguments.package, arguments.seed)
    print(json.dumps(facts["corpus"]), flush=True)
    special = Special.of(tokenizer)
    model = build(tokenizer, arguments.seed)
    parameters = list(model.parameters())
    embedding = model.get_input_embeddings().weight
    hidden = [p for p in parameters if p.ndim == 2 and p is not embedding]
    others = [p for p in parameters if p.ndim == 1 or p is embedding]
    optimizers = [
        torch.optim.Muon(hidden, lr=PEAK_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_RATE, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    checkpoint = arguments.work / "checkpoint.pt"
    step, spent, curve, average = 0, 0.0, [], math.nan
    if arguments.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["sha256"] != facts["corpus"]["sha256"]:
            raise SystemExit("the checkpoint belongs to another text")
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step, spent, curve = state["step"], state["seconds"], state["curve"]
        average = state.get("average", math.nan)

    def save() -> None:
        torch.save(
            {
                "model": model.state_dict(), "step": step,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "seconds": spent + time.monotonic() - began, "curve": curve,
                "average": average, "sha256": facts["corpus"]["sha256"],
            },
            checkpoint.with_suffix(".new"),
        )  # fmt: skip
        checkpoint.with_suffix(".new").replace(checkpoint)

    saved, looping = time.monotonic(), math.nan
    last = arguments.steps + arguments.polish
    workers = ThreadPoolExecutor(HALVES, initializer=torch.set_num_threads, initargs=(1,))
    while step < last and time.monotonic() - began < arguments.minutes * 60:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate(step, arguments.steps, arguments.polish)
        progress = step / arguments.steps
        polish = step >= arguments.steps
        whole = progress >= LONG_FROM and step % LONG_EVERY == 0 and not polish
        rngs = [
            np.random.default_rng([arguments.seed, step, half]) if polish else None
            for half in range(HALVES)
        ]
        rows, length = (LONG_BATCH, CONTEXT) if whole else (BATCH, LENGTH)
        halves = batch(data, arguments.seed, step, rows, length).chunk(HALVES)
        results = list(workers.map(functools.partial(gradients, model, special), halves, rngs))
        loss = sum(result[0] for result in results) / HALVES
        average = loss if math.isnan(average) else 0.98 * average + 0.02 * loss
        if polish:
            looping = sum(result[1] for result in results) / HALVES
        for parameter, *parts in zip(parameters, *(result[2] for result in results), strict=True):
            parameter.grad = sum(parts) / HALVES
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if step % 250 == 0 or step in (arguments.steps, last):
            curve.append([step, round(average, 4), round(evaluate(model, data.held_out), 4)])
        if step % (10 if polish else 50) == 0:
            seconds = spent + time.monotonic() - began
            print(f"step {step}/{last} loss {average:.3f} repeats {looping:.3f} "
                  f"held out {curve[-1][2] if curve else math.nan:.3f} "
                  f"minutes {seconds / 60:.1f}", flush=True)  # fmt: skip
        if time.monotonic() - saved > 180:
            save()
            saved = time.monotonic()
    save()
    record = {
        "corpus": facts["corpus"], "seed": arguments.seed, "steps": step, "of": last,
        "minutes": round((spent + time.monotonic() - began) / 60, 1), "curve": curve,
    }  # fmt: skip
    export(model, tokenizer, facts["words"], record, arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--docs", type=Path, help="directory of the HTML pages of the Python docs")
    parser.add_argument("--package", action="append", default=[], help="add its docstrings")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--polish", type=int, default=300, help="steps against repetition")
    parser.add_argument("--minutes", type=float, default=75.0, help="stop after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--work", type=Path, default=Path(".cache/demo"), help="for checkpoints")
    parser.add_argument("--out", type=Path, default=HERE / "model")
    arguments = parser.parse_args()
    default = Path("/usr/share/doc/python3.11/html")
    if arguments.docs is None and default.is_dir():
        arguments.docs = default
    train(arguments)


if __name__ == "__main__":
    main()

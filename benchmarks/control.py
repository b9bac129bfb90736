"""What this machine can do now: memory bandwidth, matrix products, a fixed decode loop.

The control of `benchmarks.quick`, run as a process of its own: `python -m benchmarks.control`
prints one JSON object. None of it uses code of Tandem.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

READ_BYTES = 512 << 20
GEMM = (512, 2048, 2048)
"""Rows, inner size and columns of the product, in bfloat16."""
PROMPT_LEN, OUTPUT_LEN = 128, 24


def best(action: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def read_gb_s() -> float:
    data = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    return READ_BYTES / best(data.sum, 7) / 1e9


def gemm_gflop_s() -> float:
    rows, inner, columns = GEMM
    left = torch.randn(rows, inner).to(torch.bfloat16)
    right = torch.randn(inner, columns).to(torch.bfloat16)
    return 2 * rows * inner * columns / best(lambda: left @ right, 30) / 1e9


def decode_ms(checkpoint: Path) -> float:
    """Milliseconds of the fastest step of a greedy loop of transformers, one sequence."""
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    cache = DynamicCache(config=model.config)
    ids = torch.randint(3, model.config.vocab_size, (1, PROMPT_LEN))  # [1, tokens]
    times = []
    with torch.inference_mode():
        for _ in range(OUTPUT_LEN):
            start = time.perf_counter()
            logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)  # [1, 1]
            times.append(time.perf_counter() - start)
    return min(times[1:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.control", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="for the decode loop")
    parser.add_argument("--threads", type=int, default=0, help="0: what torch takes by itself")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    figures = {
        "read_gb_s": read_gb_s(),
        "gemm_gflop_s": gemm_gflop_s(),
        "decode_ms": decode_ms(args.checkpoint),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

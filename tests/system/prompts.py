"""The prompts of the system tests: lengths around every block and chunk border."""

import random

VOCAB = 400
"""Token ids of the prompts are below this; the tiny checkpoints have a few more."""
LENGTHS = (
    1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 95, 96, 97, 111, 127, 128, 129,
    150, 160, 175, 200, 223, 255, 256, 257, 300, 333, 400, 511, 512, 513, 640, 777, 1000, 1023,
    1024, 1500, 2048, 3000,
)  # fmt: skip
SHARED = ((160, 5), (500, 5), (512, 5))
"""Groups of prompts with a common prefix: (prefix length, prompts)."""


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(count)]


def sixty(seed: int = 0) -> list[list[int]]:
    """60 prompts of 1..3,000 tokens, some of them with shared prefixes, in a shuffled order."""
    rng = random.Random(seed)
    prompts = [tokens(rng, length) for length in LENGTHS]
    for prefix_len, count in SHARED:
        prefix = tokens(rng, prefix_len)
        prompts += [prefix + tokens(rng, rng.randrange(0, 40)) for _ in range(count)]
    assert len(prompts) == 60
    rng.shuffle(prompts)
    return prompts

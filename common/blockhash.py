"""Names of KV blocks: a chained hash over units of 16 tokens.

`h_i = blake2b_128(h_{i-1} || tokens_i)`, where `h_{-1}` is a seed made from the model's
`content_id`, the tenant's cache salt and the LoRA id. Equal hash means equal KV content (the
whole prefix is in it), on every worker and in the router. A block of several units is named by
its last unit. Used by the router (placement) and by the workers (which compute every hash that
they seal).
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import NewType

import numpy as np

BlockHash = NewType("BlockHash", bytes)

UNIT = 16
"""Tokens per hash unit; block sizes are multiples of it."""
HASH_BYTES = 16
TOKEN_DTYPE = np.dtype("<i4")
"""Token ids on the wire and in hashes: little-endian int32."""


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int32 bytes, the form that messages carry."""
    return np.asarray(tokens, dtype=TOKEN_DTYPE).tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    """The inverse of `pack_tokens`. Raises ValueError if the length is no multiple of 4."""
    result: list[int] = np.frombuffer(data, dtype=TOKEN_DTYPE).tolist()
    return result


def seed(content_id: str, salt: str = "", lora: str = "") -> BlockHash:
    """The parent of a first unit: separates models, tenants and adapters."""
    h = blake2b(digest_size=HASH_BYTES, person=b"tandem-kv-seed")
    for part in (content_id, salt, lora):
        data = part.encode()
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return BlockHash(h.digest())


def chain(
    tokens: bytes | memoryview, parent: BlockHash, units_per_block: int = 1
) -> list[BlockHash]:
    """Hashes of the full blocks of `tokens` (packed int32), continuing from `parent`.

    Returns one hash per full block of `units_per_block * UNIT` tokens; a tail that does not fill
    a block has no hash.
    """
    view = memoryview(tokens).cast("B")
    step = UNIT * TOKEN_DTYPE.itemsize
    hashes: list[BlockHash] = []
    h: bytes = parent
    for i in range(len(view) // step):
        h = blake2b(h + view[i * step : (i + 1) * step], digest_size=HASH_BYTES).digest()
        if (i + 1) % units_per_block == 0:
            hashes.append(BlockHash(h))
    return hashes

"""What the workers of an attempt are told to do: the messages that begin it. Used by `dispatch`."""

from typing import Any

from common.blockhash import pack_tokens
from common.messages import Admit, FetchFrom, Peer, Prefill
from router.request import Attempt, Request


def assignments(
    request: Request,
    attempt: Attempt,
    prefill: Peer | None,
    decode: Peer | None,
    fetch: FetchFrom | None = None,
) -> list[tuple[str, Prefill | Admit]]:
    """(worker id, message) of everyone who takes part in `attempt`, to be sent all at once.

    prefill, decode: the ends of KV transfers of the attempt's workers, None where it has none.
    fetch: what whoever prefills fetches first.
    """
    emitted = request.choices[attempt.choices[0]].tokens
    common: dict[str, Any] = {
        "request": request.id,
        "attempt": attempt.number,
        "tokens": request.packed + pack_tokens(emitted) if emitted else request.packed,
        "prompt_len": len(request.prompt),
        "choices": attempt.choices,
        "params": request.params,
        "salt": request.salt,
    }
    work: list[tuple[str, Prefill | Admit]] = []
    if decode is not None:
        local = fetch if prefill is None else None
        work.append((decode.id, Admit(**common, prefill=prefill, fetch=local)))
    if prefill is not None:
        work.append((prefill.id, Prefill(**common, decode=decode, fetch=fetch)))
    return work

"""From a request body to sampling parameters: what the workers are told about choosing tokens.

Called by `router.intake`.
"""

import secrets
from collections.abc import Sequence
from typing import Final

import msgspec

from common.blockhash import pack_tokens
from common.errors import RequestError
from common.sampling import SamplingParams
from router.fleet import Limits
from router.schemas import SamplingBody
from router.tokenizer import TextModel

GREEDY_BELOW: Final = 1e-5
"""Temperatures that only greedy sampling can represent in float32."""
LONGEST_ID: Final = 10
"""Digits of a token id."""


async def sampling_params(
    body: SamplingBody, limits: Limits, max_tokens: int, logprobs: int | None, text_model: TextModel
) -> SamplingParams:
    """Of one prompt of the call. Raises RequestError (400)."""
    if (body.min_tokens or 0) > max_tokens:
        message = f"'min_tokens' is above the {max_tokens} tokens that may be generated."
        raise RequestError(400, message, param="min_tokens")
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        _check_ids(getattr(body, name) or (), limits, name)
    temperature = _given(body.temperature, 1.0)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_k=max(0, body.top_k or 0),
        top_p=_given(body.top_p, 1.0),
        min_p=_given(body.min_p, 0.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        logit_bias=_bias(body.logit_bias or {}, limits),
        allowed_tokens=pack_tokens(sorted(set(body.allowed_token_ids or ()))),
        bad_words=await _bad_words(body.bad_words or (), limits, text_model),
        seed=(body.seed or 0) & (2**63 - 1),
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        logprob_token_ids=tuple(dict.fromkeys(body.logprob_token_ids or ())),
        priority=body.priority or 0,
    )


def reseeded(params: SamplingParams) -> SamplingParams:
    """`params` with a seed that was never used: equal prompts of a call get different texts."""
    return msgspec.structs.replace(params, seed=secrets.randbits(63))


def _check_ids(ids: Sequence[int], limits: Limits, param: str) -> None:
    if ids and max(ids) >= limits.vocab_size:
        message = f"Token id {max(ids)} in '{param}' is not below {limits.vocab_size}."
        raise RequestError(400, message, param=param)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _bias(given: dict[str, float], limits: Limits) -> tuple[tuple[int, float], ...]:
    pairs = []
    for key, value in given.items():
        is_id = len(key) <= LONGEST_ID and key.isascii() and key.isdigit()
        if not is_id or int(key) >= limits.vocab_size:
            message = (
                f"'{key[:LONGEST_ID]}' in 'logit_bias' is not a token id below {limits.vocab_size}."
            )
            raise RequestError(400, message, param="logit_bias")
        pairs.append((int(key), value))
    return tuple(pairs)


async def _bad_words(
    words: Sequence[str], limits: Limits, text_model: TextModel
) -> tuple[tuple[int, ...], ...]:
    """The tokens of each word, as it begins a text and as it comes after a space."""
    texts = [text for word in words for text in (word, " " + word.lstrip())]
    runs = dict.fromkeys(map(tuple, await text_model.encode_all(texts, add_special_tokens=False)))
    return tuple(run for run in runs if run and max(run) < limits.vocab_size)

"""What the request bodies are made of: strict models, bounded lists, and errors in OpenAI's words.

`router.schemas` and `router.response_schemas` build on it. Validation ends at the first mistake:
a list that is too long is refused before anything in it is looked at.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from common.errors import RequestError
from router.caps import DEFAULT, Caps
from router.nesting import is_small

FOREIGN_PARTS: Final = frozenset(
    {"image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file"}
)
"""Types of content parts of models that do not only read text."""
MAX_METADATA: Final = 64
_INTERNAL_WORDS: Final = re.compile(r"^(Input|String|List|Dictionary) | or instance of \w+")
"""Of the messages of pydantic, what a client need not know."""
SHOWN: Final = 64
"""Characters of a client's name for something that an error repeats."""


def _cap(cap: int | str, info: ValidationInfo) -> int:
    """`cap`, or the one of that name that the call is checked against."""
    if isinstance(cap, int):
        return cap
    return int(getattr(info.context or DEFAULT, cap))


def at_most(cap: int | str) -> BeforeValidator:
    """Refuse a longer list or dict before anything in it is looked at. A text: one of `Caps`."""

    def check(value: object, info: ValidationInfo) -> object:
        if isinstance(value, list | dict) and len(value) > (n := _cap(cap, info)):
            raise PydanticCustomError("too_long", "should have at most {n} items", {"n": n})
        return value

    return BeforeValidator(check)


def no_longer(cap: str) -> BeforeValidator:
    """Refuse a string of more characters."""

    def check(value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) and len(value) > (n := _cap(cap, info)):
            raise PydanticCustomError("too_long", "should have at most {n} characters", {"n": n})
        return value

    return BeforeValidator(check)


def no_more(cap: str) -> BeforeValidator:
    """Refuse a larger number."""

    def check(value: object, info: ValidationInfo) -> object:
        if isinstance(value, int) and value > (n := _cap(cap, info)):
            raise PydanticCustomError("too_large", "should be at most {n}", {"n": n})
        return value

    return BeforeValidator(check)


def check_free(value: object, info: ValidationInfo) -> object:
    """What is not read beyond a comparison may still not be endless."""
    if not is_small(value, _cap("json_depth", info)):
        raise PydanticCustomError("too_long", "should be smaller and less deeply nested")
    return value


Free = Annotated[Any, BeforeValidator(check_free)]


def one_of(*kinds: str, other: str) -> Discriminator:
    """Chooses the member of a union that the `type` of a value names, `other` if it names none.

    Members are tagged `[kind]`: errors do not show a part of a place that has brackets.
    """

    def kind(value: object) -> str:
        given = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return f"[{given if given in kinds else other}]"

    return Discriminator(kind)


def text_only(part: object) -> object:
    """Refuse a content part for models that do not only read text, by the name of its type."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in FOREIGN_PARTS:
        raise PydanticCustomError("unsupported_part", "unsupported part", {"kind": kind})
    return part


class Strict(BaseModel):
    """No conversions ("16" is not 16), no infinities, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _knows_keys(cls, data: object) -> object:
        """pydantic would make an error of each unknown key."""
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_parameter", "unknown key", {"key": key[:SHOWN]}
                    )
        return data


class Labelled(Strict):
    """What every call may carry without effect: labels for accounts and caches of others."""

    user: str | None = None
    metadata: Annotated[dict[str, Free], at_most(MAX_METADATA)] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Free = None
    prompt_cache_retention: str | None = None
    request_id: str | None = None
    """The label of a call is its header `x-request-id`."""
    session_id: str | None = None


Body = TypeVar("Body", bound=Strict)


def validated(kind: type[Body], data: object, caps: Caps) -> Body:
    """`data` as a body. Raises RequestError (400)."""
    if not isinstance(data, dict):
        raise RequestError(400, "The request body must be a JSON object.")
    try:
        return kind.model_validate(data, context=caps)
    except ValidationError as error:
        raise explain(error) from error


def refuse(body: Strict, neutral: Mapping[str, tuple[object, ...]]) -> None:
    """Raises RequestError (400) for a parameter that is not supported; `neutral` names those, with
    the values (besides null) that ask for nothing."""
    for name in body.model_fields_set & neutral.keys():
        value = getattr(body, name)
        if value is not None and value not in neutral[name]:
            raise RequestError(
                400,
                f"The parameter '{name}' is not supported with this value.",
                param=name,
                code="unsupported_parameter",
            )


def explain(error: ValidationError) -> RequestError:
    """The first problem, in OpenAI's words."""
    problems = error.errors(include_url=False, include_input=False)
    # In a union the members before complain of the type.
    named = ("unknown_parameter", "unsupported_part")
    first = next((p for p in problems if p["type"] in named), problems[0])
    name = str(first["loc"][0]) if first["loc"] else None
    match first["type"]:
        case "unknown_parameter":
            # Of a key in a member of a union the location also names the member.
            parts = [*(part for part in first["loc"] if "[" not in str(part)), first["ctx"]["key"]]
            path = ".".join(map(str, parts))
            return RequestError(
                400, f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter"
            )
        case "unsupported_part":
            return RequestError(
                400,
                f"Content parts of type '{first['ctx']['kind']}' are not supported: this model "
                "reads text.",
                param=name,
                code="unsupported_parameter",
            )
        case "missing":
            path = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
            return RequestError(
                400,
                f"Missing required parameter: '{path}'.",
                param=path,
                code="missing_required_parameter",
            )
    # Of a union each member complains; together they say what would be right.
    same = [p for p in problems if p["loc"] and p["loc"][0] == name]
    wanted = dict.fromkeys(_INTERNAL_WORDS.sub("", p["msg"]) for p in same[:8])
    return RequestError(
        400,
        f"Invalid value for '{name}': input {', or '.join(wanted)}.",
        param=name,
        code="invalid_value" if "type" not in first["type"] else "invalid_type",
    )

"""What an answer must match, from the request: `response_format`, `structured_outputs`, `guided_*`,
tools that must be called. Called by `router.intake`; compiled by `router.grammars`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from common.errors import RequestError
from router.fields import SHOWN
from router.grammars import Constraint
from router.schemas import ChatBody, SamplingBody
from router.subschema import embedded

MAX_BYTES: Final = 65_536
"""Of a schema, expression or grammar."""
MAX_CALLS: Final = 16
"""Calls in one answer of tools that must be called."""
_KINDS: Final = ("json", "regex", "choice", "grammar", "json_object")
_WITHOUT_EFFECT: Final = ("disable_any_whitespace", "disable_additional_properties",
                          "disable_fallback", "whitespace_pattern")  # fmt: skip
"""Of `structured_outputs`, when they are null or false."""


def constraint_of(body: SamplingBody) -> Constraint | None:
    """Raises RequestError (400)."""
    asked = [
        (f"guided_{kind}", kind, value)
        for kind in ("json", "regex", "choice", "grammar")
        if (value := getattr(body, f"guided_{kind}")) is not None
    ]
    if body.structured_outputs is not None:
        asked.append(("structured_outputs", *_structured(body.structured_outputs)))
    if (format := _response_format(body.response_format)) is not None:
        asked.append(("response_format", *format))
    if isinstance(body, ChatBody) and (must := _tools(body)) is not None:
        if asked and asked[0][0] == "response_format":
            asked.clear()  # a call is no answer: its format is that of the answer to come
        asked.append(("tools", "json", must))
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(f"'{name}'" for name, _, _ in asked[:2])
        raise RequestError(400, f"Only one of {names} may be given.", param=asked[1][0])
    return _checked(*asked[0])


def _checked(param: str, kind: str, value: object) -> Constraint:
    match kind, value:
        case "json", str() as text:
            try:
                json.loads(text)
            except (ValueError, RecursionError) as error:
                raise _invalid(param, f"it is not JSON ({error})") from error
        case "json", dict() | bool():
            text = json.dumps(value)
        case "choice", list() as choices:
            if not choices or not all(isinstance(choice, str) and choice for choice in choices):
                raise _invalid(param, "choices are a list of strings that are not empty")
            text = json.dumps(choices)
        case (("regex" | "grammar"), str() as text) if text:
            pass
        case _:
            raise _invalid(param, f"a value of another type is needed for {kind}")
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise _invalid(param, f"it is larger than {MAX_BYTES} bytes")
    return Constraint(kind, text, param)


def _structured(value: object) -> tuple[str, object]:
    if not isinstance(value, dict):
        raise _invalid("structured_outputs", "it is not an object")
    given = {name: v for name, v in value.items() if v is not None and v is not False}
    if unknown := [name for name in given if name not in _KINDS]:
        known = unknown[0] in _WITHOUT_EFFECT
        raise RequestError(
            400,
            f"'structured_outputs.{unknown[0][:64]}' is not supported.",
            param="structured_outputs",
            code="unsupported_parameter" if known else "unknown_parameter",
        )
    if len(given) != 1:
        raise _invalid("structured_outputs", f"exactly one of {', '.join(_KINDS)} is needed")
    ((kind, inner),) = given.items()
    return ("json", {"type": "object"}) if kind == "json_object" else (kind, inner)


def _response_format(value: object) -> tuple[str, object] | None:
    param = "response_format"
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _invalid(param, "it is not an object")
    match value.get("type"):
        case "text":
            _check_keys(param, value, ("type",))
            return None
        case "json_object":
            _check_keys(param, value, ("type",))
            return "json", {"type": "object"}
        case "json_schema":
            described = value.get("json_schema")
            if not isinstance(described, dict):
                raise _invalid(param, "'json_schema' is missing or not an object")
            _check_keys(param, value, ("type", "json_schema"))
            _check_keys(param, described, ("name", "description", "schema", "strict"))
            if not isinstance(described.get("name"), str):
                raise _invalid(param, "the 'name' of the schema is missing or not a string")
            schema = described.get("schema")
            if schema is None:
                return "json", {"type": "object"}
            if not isinstance(schema, dict | bool):
                raise _invalid(param, "'json_schema.schema' is not an object")
            return "json", schema
    raise _invalid(param, "'type' is one of text, json_object, json_schema")


def _check_keys(param: str, given: Mapping[str, object], known: Sequence[str]) -> None:
    """What nobody reads may not look as if it were followed: a schema of a `json_object`, say."""
    for name, value in given.items():
        if value is not None and name not in known:
            raise _invalid(param, f"'{name[:SHOWN]}' is unknown here")


def _tools(body: ChatBody) -> Mapping[str, Any] | None:
    """The schema of what is said when tools must be called."""
    if (name := body.forced_tool) is not None:
        return next(
            t.function for t in body.tools or () if t.function.name == name
        ).arguments_schema
    if not body.must_call:
        return None
    calls = []
    for i, tool in enumerate(body.callable_tools):
        place = f"#/items/anyOf/{i}/properties/parameters"
        schema = embedded(tool.function.arguments_schema, place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "parameters": schema},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    return {
        "type": "array",
        "items": {"anyOf": calls},
        "minItems": 1,
        "maxItems": 1 if body.parallel_tool_calls is False else MAX_CALLS,
    }


def _invalid(param: str, reason: str) -> RequestError:
    return RequestError(400, f"Invalid '{param}': {reason}.", param=param, code="invalid_value")

"""A JSON schema as a part of another one: its references are made to point to where it then is.

Called by `router.constraints`, which makes one schema of those of several tools.
"""

from typing import Any, Final

_NAMES: Final = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
"""Keywords whose keys are names, not keywords."""
_DATA: Final = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose values are data, not schemas."""
_WHOLE: Final = frozenset({"$schema", "$id"})
"""Keywords of a whole document: within another one they would change what references mean."""


def embedded(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """`schema` for `place`, a JSON pointer such as `#/items`; `schema` itself stays as it is.

    Definitions move with it, so that those of several schemas may have the same names.
    """
    whole = {key: value for key, value in schema.items() if key not in _WHOLE}
    moved = _moved(whole, place)
    assert isinstance(moved, dict)
    return moved


def _moved(schema: Any, place: str) -> Any:
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            result[key] = place + value[1:]
        elif key in _DATA:
            result[key] = value
        elif key in _NAMES and isinstance(value, dict):
            result[key] = {name: _moved(item, place) for name, item in value.items()}
        else:
            result[key] = _moved(value, place)
    return result

"""JSON schemas of growing hardness, each with a value that it does not accept."""

import random
from typing import Any

Schema = dict[str, Any]
Case = tuple[Schema, Any]

STRINGS: tuple[Case, ...] = (
    ({"type": "string", "maxLength": 8}, 5),
    ({"type": "string", "minLength": 3, "maxLength": 6}, "x"),
    ({"type": "string", "pattern": "^[a-f]{2,4}-[0-9]{1,3}$"}, "zz-1"),
    ({"enum": ["red", "green", 3, None, True]}, "blue"),
    ({"const": "fixed"}, "loose"),
)
NUMBERS: tuple[Case, ...] = (
    ({"type": "integer", "minimum": -5, "maximum": 17}, 18),
    ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 100}, 0),
    ({"type": "number", "minimum": 0, "maximum": 1}, 2),
    ({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 50}, 3),
    ({"type": "boolean"}, "true"),
    ({"type": "null"}, 0),
)
NODE: Schema = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": 0, "maximum": 9},
        "child": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
    },
    "required": ["value", "child"],
    "additionalProperties": False,
}


def _object(properties: dict[str, Schema], optional: int = 0) -> Schema:
    names = list(properties)
    return {
        "type": "object",
        "properties": properties,
        "required": names[: len(names) - optional],
        "additionalProperties": False,
    }


def cases(count: int, seed: int = 1) -> list[Case]:
    """`count` schemas, deeper and wider towards the end."""
    rng = random.Random(seed)
    result: list[Case] = []
    for number in range(count):
        definitions: dict[str, Schema] = {}
        schema, wrong = _case(rng, 1 + 4 * number // count, definitions)
        result.append(({**schema, "$defs": definitions} if definitions else schema, wrong))
    return result


def _case(rng: random.Random, depth: int, definitions: dict[str, Schema]) -> Case:
    if depth <= 1:
        return rng.choice((*STRINGS, *NUMBERS))
    match rng.randrange(6):
        case 0 | 1:
            inner = {
                f"k{i}": _case(rng, depth - 1, definitions)[0] for i in range(rng.randrange(1, 4))
            }
            return _object(inner, rng.randrange(2)), {"unknown": 1}
        case 2:
            items, wrong = _case(rng, depth - 1, definitions)
            return {"type": "array", "items": items, "minItems": 1, "maxItems": 3}, [wrong]
        case 3:
            one, other = rng.sample((*STRINGS, *NUMBERS), 2)
            return {"anyOf": [one[0], _object({"x": other[0]})]}, {"x": [], "y": 1}
        case 4:
            inside, wrong = _case(rng, depth - 1, definitions)
            name = f"part{len(definitions)}"
            definitions[name] = inside
            return _object({"a": {"$ref": f"#/$defs/{name}"}}), {"a": {"no": [wrong]}}
        case _:
            definitions["node"] = NODE
            return {"$ref": "#/$defs/node"}, {"value": 10, "child": None}

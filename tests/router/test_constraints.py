"""What tools that must be called make of an answer: schemas of several tools in one."""

from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from common.errors import RequestError
from common.grammar import open_matcher
from router.constraints import constraint_of
from router.schemas import ChatBody, parse
from router.subschema import embedded


def tool(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def takes(word: str) -> dict[str, Any]:
    """A schema with a definition whose name others use too."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/item",
        "$defs": {"Item": {"const": word}, "$ref": {"enum": [{"$ref": "#/no/reference"}]}},
        "type": "object",
        "properties": {"$ref": {"$ref": "#/$defs/Item"}, "next": {"$ref": "#"}},
        "required": ["$ref"],
        "additionalProperties": False,
    }


def accepts(constraint: str, text: str) -> bool:
    tokenizer = LLTokenizer("byte")
    matcher = open_matcher(tokenizer, LLMatcher.grammar_from_json_schema(constraint))
    given = list(text.encode())
    return matcher.try_consume_tokens(given) == len(given) and matcher.is_accepting()


def asked(**fields: Any) -> str:
    body = parse(ChatBody, {"messages": [{"role": "user"}], **fields})
    constraint = constraint_of(body)
    assert constraint is not None and (constraint.kind, constraint.param) == ("json", "tools")
    return constraint.text


TOOLS = [tool("f", takes("red")), tool("g", takes("blue"))]


def test_definitions_of_the_same_name_stay_apart() -> None:
    text = asked(tools=TOOLS, tool_choice="required")
    for name, word, other in (("f", "red", "blue"), ("g", "blue", "red")):
        call = '[{"name":"%s","parameters":{"$ref":"%s","next":{"$ref":"%s"}}}]'
        assert accepts(text, call % (name, word, word))
        assert not accepts(text, call % (name, other, word))
        assert not accepts(text, call % (name, word, other))


def test_a_schema_that_is_moved_is_not_changed() -> None:
    schema = takes("red")
    moved = embedded(schema, "#/items")
    assert schema == takes("red")
    assert moved.keys() == schema.keys() - {"$schema", "$id"}
    assert moved["properties"]["$ref"] == {"$ref": "#/items/$defs/Item"}
    assert moved["properties"]["next"] == {"$ref": "#/items"}
    assert moved["$defs"] == schema["$defs"]


def test_a_choice_of_some_tools_hides_the_others() -> None:
    names = [{"type": "function", "function": {"name": "g"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": names}}
    fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice}
    text = asked(**fields)
    assert accepts(text, '[{"name":"g","parameters":{"$ref":"blue"}}]')
    assert not accepts(text, '[{"name":"f","parameters":{"$ref":"red"}}]')
    body = parse(ChatBody, {"messages": [{"role": "user"}], **fields})
    assert [tool.function.name for tool in body.callable_tools] == ["g"]
    choice["allowed_tools"] = {"mode": "auto", "tools": names}
    body = parse(ChatBody, {"messages": [{"role": "user"}], **fields})
    assert constraint_of(body) is None and body.offers_tools
    choice["allowed_tools"] = {"mode": "auto", "tools": []}
    with pytest.raises(RequestError):
        parse(ChatBody, {"messages": [{"role": "user"}], **fields})

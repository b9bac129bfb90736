"""Calls and reasoning are told apart, the same however the text is cut."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from router.said import Format, Said, detect, join, may_think
from router.speech import Speech

CASES: list[tuple[Format, dict[str, Any], str, Said]] = [
    (
        "hermes", {},
        'hi <tool_call>\n{"name": "f", "arguments": {"a": "}\\"", "b": [1,{"c":2}]}}\n'
        '</tool_call>\n'
        '<tool_call>{"arguments": {}, "name":"g"}</tool_call>',
        Said("hi ", "", ("f", "g"), ('{"a": "}\\"", "b": [1,{"c":2}]}', "{}")),
    ),
    ("hermes", {}, "a <tool_call>oops</tool_call> b", Said("a <tool_call>oops</tool_call> b")),
    ("hermes", {}, '<tool_call>{"name": "f"}</tool_call>', Said("", "", ("f",), ("{}",))),
    ("hermes", {}, 'x<tool_call>{"a": 1}</tool_call>', Said('x<tool_call>{"a": 1}')),
    ("hermes", {"thinks": False}, "<think>\nhm</think>\n\na <tool_cal", Said("a <tool_cal", "hm")),
    ("hermes", {"thinks": False}, " <thin air", Said(" <thin air")),
    ("hermes", {"thinks": True}, "hm </thin</think>yes", Said("yes", "hm </thin")),
    ("none", {"thinks": True}, "never ends </th", Said("", "never ends </th")),
    (
        "llama3_json", {},
        '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {"y": "z"}}',
        Said("", "", ("f", "g"), ('{"x": 1}', '{"y": "z"}')),
    ),
    (
        "llama3_json", {}, '<|python_tag|>{"name": "f", "parameters": {}}',
        Said("", "", ("f",), ("{}",)),
    ),
    ("llama3_json", {}, 'see {"name": 1}', Said('see {"name": 1}')),
    ("llama3_json", {}, '{"a": 1} b', Said('{"a": 1} b')),
    (
        "mistral", {},
        'ok [TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]',
        Said("ok ", "", ("f", "g"), ('{"x": 1}', "{}")),
    ),
    (
        "mistral", {}, '[TOOL_CALLS]f{"x": {}}[TOOL_CALLS]g[ARGS]{}',
        Said("", "", ("f", "g"), ('{"x": {}}', "{}")),
    ),
    (
        "mistral", {}, '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"x": 1}',
        Said("", "", ("f",), ('{"x": 1}',)),
    ),
    ("mistral", {}, "none [TOOL", Said("none [TOOL")),
    (
        "list", {},
        '[{"name":"f","parameters":{"x":[1]}}, {"name":"g","parameters":{"x":""}}]',
        Said("", "", ("f", "g"), ('{"x":[1]}', '{"x":""}')),
    ),
    ("named", {"name": "q"}, '{"x":1}', Said("", "", ("q",), ('{"x":1}',))),
    ("none", {}, "<think>no</think>", Said("<think>no</think>")),
]  # fmt: skip


def said(format: Format, options: dict[str, Any], parts: list[str]) -> Said:
    speech = Speech(format, **options)
    pieces = [piece for part in parts for piece in speech.push(part)]
    return join(pieces + speech.flush())


def test_what_is_said() -> None:
    for format, options, text, wanted in CASES:
        for step in (1, 2, 3, len(text)):
            parts = [text[i : i + step] for i in range(0, len(text), step)]
            assert said(format, options, parts) == wanted, (format, text, step)


@given(
    st.sampled_from(["none", "hermes", "llama3_json", "mistral", "list"]),
    st.sampled_from([None, True, False]),
    st.lists(
        st.sampled_from(
            [
                "<think>",
                "</think>",
                "<tool_call>",
                "</tool_call>",
                "[TOOL_CALLS]",
                '{"name": "f", ',
                '"arguments": ',
                '{"x": "',
                '"}',
                "}",
                "[",
                "]",
                " ",
                "\n",
                "word",
                "\\",
                "<",
                "f{",
            ]
        ),
        max_size=12,
    ),
    st.data(),
)
def test_cuts_change_nothing(
    format: Format, thinks: bool | None, words: list[str], data: st.DataObject
) -> None:
    text = "".join(words)
    whole = said(format, {"thinks": thinks}, [text])
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert said(format, {"thinks": thinks}, parts) == whole
    assert len(whole.names) == len(whole.arguments)


def test_the_template_shows_the_format() -> None:
    assert detect("{{ '<tool_call>' }}") == "hermes"
    assert detect("{{ '[TOOL_CALLS]' }}") == "mistral"
    assert detect("<|python_tag|>") == "llama3_json"
    assert detect("{{ messages }}") == "none"
    # Llama 3.2 names no python tag, and Qwen's templates teach both calls and reasoning.
    assert detect('Respond in the format {"name": function name, "parameters": dictionary of') == (
        "llama3_json"
    )
    assert may_think("{{ '<think>\\n' }}") and not may_think("{{ messages }}")
    # DeepSeek-R1's takes reasoning off earlier answers and writes none itself.
    assert may_think("{% set content = content.split('</think>')[-1] %}")

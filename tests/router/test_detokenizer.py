"""Incremental decoding and stop strings, against decoding everything at once."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from router.detokenizer import Detokenizer, StopMatcher
from router.tokenizer import TextModel
from tests.router.text_files import byte_fallback, byte_level, text_model

KINDS: dict[str, Callable[[], Tokenizer]] = {"level": byte_level, "fallback": byte_fallback}

TEXTS = st.text(
    alphabet=st.sampled_from([*"aehost b,.", "ü", "東", "京", "😀", "é", "\u200d", "\n"]),
    max_size=40,
)


@pytest.fixture(scope="module")
def level(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return text_model(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module", params=sorted(KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return text_model(tmp_path_factory.mktemp("text"), KINDS[request.param]())


def pieces(model: TextModel, tokens: Sequence[int], size: int = 1, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(model, skip_special_tokens=skip)
    result = [detokenizer.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return [*result, detokenizer.flush()]


@given(text=TEXTS, size=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_valid_text_is_whole_and_never_half_a_character(
    model: TextModel, text: str, size: int
) -> None:
    text = text.replace(" ", "▁") if model.backend.token_to_id("▁") is not None else text
    tokens = model.encode_now(text, add_special_tokens=False)
    shown = pieces(model, tokens, size)
    assert "".join(shown) == model.decode(tokens)
    assert not any("\ufffd" in piece for piece in shown)


@given(tokens=st.lists(st.integers(0, 330), max_size=120), size=st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_any_bytes_add_up_to_the_full_decode(
    level: TextModel, tokens: list[int], size: int
) -> None:
    assert "".join(pieces(level, tokens, size)) == level.decode(tokens)
    plain = pieces(level, tokens, size, skip=False)
    assert "".join(plain) == level.decode(tokens, skip_special_tokens=False)


@given(tokens=st.lists(st.integers(0, 275), max_size=60), size=st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_text_does_not_depend_on_how_tokens_arrive(
    model: TextModel, tokens: list[int], size: int
) -> None:
    assert "".join(pieces(model, tokens, size)) == "".join(pieces(model, tokens, 1))


def test_a_character_is_shown_when_its_last_byte_came(model: TextModel) -> None:
    ids = [model.backend.token_to_id(name) for name in _byte_names(model, "😀")]
    tokens = [token for token in ids if token is not None]
    assert pieces(model, tokens) == ["", "", "", "😀", ""]
    assert pieces(model, tokens[:2])[:2] == ["", ""]


def _byte_names(model: TextModel, text: str) -> list[str]:
    if model.backend.token_to_id("<0x00>") is not None:
        return [f"<0x{byte:02X}>" for byte in text.encode()]
    return ["ð", "Ł", "ĺ", "Ģ"]  # the bytes of 😀 in the alphabet of byte-level BPE


def test_special_tokens_have_no_text_unless_asked_for(model: TextModel) -> None:
    word = model.encode_now("a", add_special_tokens=False)
    assert pieces(model, [1, *word, 1]) == ["", "a", "", ""]
    assert "".join(pieces(model, [1, *word], skip=False)) == model.decode(
        [1, *word], skip_special_tokens=False
    )


def test_tokens_of_the_padded_vocabulary_have_no_text(model: TextModel) -> None:
    word = model.encode_now("a", add_special_tokens=False)
    assert pieces(model, [100_000, *word, 100_001, *word]) == ["", "a", "", "a", ""]


# ---------------------------------------------------------------- stop strings

LETTERS = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3)


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """(start, end) of the match that ends first, of several the longest."""
    found = [
        (end, start)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and (end := start + len(stop))
    ]
    if not found:
        return None
    end, start = min(found)
    return start, end


@given(parts=st.lists(LETTERS, max_size=12), stops=STOPS, include=st.booleans())
@settings(max_examples=300, deadline=None)
def test_stop_strings_never_leak_at_any_split(
    parts: list[str], stops: list[str], include: bool
) -> None:
    text = "".join(parts)
    matcher = StopMatcher(stops, include=include)
    shown = ""
    for part in parts:
        shown += matcher.push(part)
        assert first_stop(shown, [] if include else stops) is None
        if matcher.matched is not None:
            break
    found = first_stop(text, stops)
    if found is None:
        assert matcher.matched is None
        assert shown + matcher.flush() == text
    else:
        start, end = found
        assert matcher.matched == text[start:end]
        assert shown == (text[:end] if include else text[:start])
        assert matcher.flush() == ""


def test_text_is_held_back_only_as_long_as_it_may_become_a_stop() -> None:
    matcher = StopMatcher(["END."])
    assert [matcher.push(part) for part in ("x", "E", "N", "y", "EN", "D")] == [
        "x", "", "", "ENy", "", "",
    ]  # fmt: skip
    assert matcher.flush() == "END"


def test_no_stop_before_it_is_armed() -> None:
    matcher = StopMatcher(["b"])
    assert matcher.push("ab", armed=False) == "ab"
    assert matcher.push("cb") == "c"
    assert matcher.matched == "b"

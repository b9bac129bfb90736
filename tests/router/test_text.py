"""Tokens to text as a choice does it, at any split: detokenizer and stop strings together."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from router.request import Choice, TextRule
from router.tokenizer import TextModel

TEXTS = st.text(
    alphabet=st.sampled_from([*"aehost b,.", "ü", "東", "京", "😀", "é", "\u200d", "\n"]),
    max_size=30,
)
STOPS = st.lists(st.text(alphabet="ah東😀 .", min_size=1, max_size=3), max_size=3)


def shown(
    text_model: TextModel, rule: TextRule, tokens: Sequence[int], sizes: Sequence[int], end: str
) -> tuple[list[str], int, str]:
    """(pieces of text, tokens taken, finish) of tokens that come in steps of these sizes."""
    choice = Choice(0, rule, text_model)
    pieces, taken, i = [], 0, 0
    while i < len(tokens) and not choice.finish:
        size = sizes[i % len(sizes)]
        step = tokens[i : i + size]
        i += size
        text, count, _ = choice.extend(step, end if i >= len(tokens) else "", 0, show_end=True)
        pieces.append(text)
        taken += count
    return pieces, taken, choice.finish


@given(
    text=TEXTS,
    stops=STOPS,
    include=st.booleans(),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
)
@settings(max_examples=200, deadline=None)
def test_a_stream_adds_up_to_the_whole_at_any_split(
    text_model: TextModel, text: str, stops: list[str], include: bool, sizes: list[int]
) -> None:
    tokens = text_model.encode_now(text, add_special_tokens=False)
    rule = TextRule(stop=tuple(stops), include_stop=include)
    pieces, taken, finish = shown(text_model, rule, tokens, sizes, "length")
    one, taken_at_once, finish_at_once = shown(
        text_model, rule, tokens, [len(tokens) or 1], "length"
    )
    assert ("".join(pieces), taken, finish) == ("".join(one), taken_at_once, finish_at_once)
    assert not any("\ufffd" in piece for piece in pieces)
    whole = text_model.decode(tokens)
    assert whole.startswith("".join(pieces))
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    if not ends:
        assert "".join(pieces) == whole
        return
    # The match that ends first, of several the longest.
    end = min(ends)
    start = min(end - len(stop) for stop in stops if whole[:end].endswith(stop))
    assert "".join(pieces) == whole[: end if include else start]
    assert finish == "stop"
    # No more tokens are taken than the stop string needs.
    assert text_model.decode(tokens[:taken]).startswith(whole[:end])
    assert not text_model.decode(tokens[: taken - 1]).startswith(whole[:end])


@given(tokens=st.lists(st.integers(0, 319), max_size=60), size=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_any_tokens_add_up_to_what_they_decode_to(
    text_model: TextModel, tokens: list[int], size: int
) -> None:
    pieces, taken, _ = shown(text_model, TextRule(), tokens, [size], "length")
    assert taken == len(tokens)
    assert "".join(pieces) == text_model.decode(tokens)

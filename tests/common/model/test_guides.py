"""Constrained draws: what comes out matches, wherever and by whomever it is continued."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from llguidance import LLMatcher
from tokenizers import Tokenizer

from common.blockhash import seed
from common.errors import GrammarError
from common.grammar import open_matcher, open_vocabulary
from common.messages import TokenLogprob
from common.model.batch import Sample, Sampled
from common.model.guides import Guides
from common.model.sampler import Sampler
from common.sampling import SamplingParams
from common.schedule import Limits, to_output
from common.sequence import Sequence
from tests.common.model.schemas import cases
from tests.router.text_files import EOS, byte_level, write_text_files

VOCAB = 330
"""More than the tokenizer has."""
BOUNDED: Any = {"whitespace_flexible": True, "whitespace_pattern": "[ ]?"}
LIMITS = Limits(
    block_size=16, num_blocks=8, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=4096,
    vocab_size=VOCAB, eos_token_ids=(EOS,), content_id="c",
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_files(tmp_path_factory.mktemp("guides"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level()


def regex(pattern: str) -> str:
    return str(LLMatcher.grammar_from_regex(pattern))


def schema_grammar(schema: dict[str, Any]) -> str:
    return str(LLMatcher.grammar_from_json_schema(schema, overrides=BOUNDED))


class Writer:
    """A model of random weights: logits that know nothing, sampled at temperature 1."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.renew()

    def renew(self) -> None:
        """As if on another worker: nothing is known of what was written."""
        self.sampler = Sampler(VOCAB, (EOS,), Guides(self.directory, VOCAB, (EOS,)))

    def next(self, tokens: list[int], prompt_len: int = 1, choice: int = 0, **params: Any) -> int:
        generator = torch.Generator().manual_seed(len(tokens) * 31 + params.get("seed", 0))
        logits = torch.randn(1, VOCAB, generator=generator)
        parameters = SamplingParams(**{"max_tokens": 2_000} | params)
        sample = Sample(choice, parameters, tokens, prompt_len)
        [sampled] = self.sampler.draw(logits, [(0, sample)])
        return sampled.token

    def write(self, most: int = 1_024, renew: bool = False, **params: Any) -> list[int] | None:
        """The tokens of an answer up to its end; None if there was none."""
        tokens = [5]
        while len(tokens) <= most:
            if renew:
                self.renew()
            token = self.next(tokens, **params)
            if token == EOS:
                return tokens[1:]
            tokens.append(token)
        return None


@pytest.fixture(scope="module")
def writer(directory: Path) -> Writer:
    return Writer(directory)


def test_schemas_hold_whatever_the_model_is(writer: Writer, tokenizer: Tokenizer) -> None:
    complete = 0
    for number, (schema, invalid) in enumerate(cases(200)):
        validator = Draft202012Validator(schema)
        assert not validator.is_valid(invalid), (schema, invalid)
        tokens = writer.write(grammar=schema_grammar(schema), seed=number)
        if tokens is None:
            continue
        text = tokenizer.decode(tokens)
        validator.validate(json.loads(text))
        complete += 1
    assert complete == 200


def test_a_continuation_elsewhere_draws_the_same(writer: Writer) -> None:
    grammar = schema_grammar(cases(200)[150][0])
    whole = writer.write(grammar=grammar, seed=3)
    assert whole is not None
    assert writer.write(grammar=grammar, seed=3, renew=True) == whole


def test_choices_and_neighbours_do_not_mix(writer: Writer, tokenizer: Tokenizer) -> None:
    prompt = [5, 6]
    texts = {}
    shared = list(prompt)
    first = [
        writer.next(shared, prompt_len=2, choice=choice, grammar=regex(pattern), seed=choice)
        for choice, pattern in enumerate(("[ab]{4}", "[0-9]{5}", "[xy]{2}"))
    ]
    lines = [[*prompt, token] for token in first]
    for choice, pattern in enumerate(("[ab]{4}", "[0-9]{5}", "[xy]{2}")):
        line = lines[choice]
        while line[-1] != EOS:
            line.append(
                writer.next(line, prompt_len=2, choice=choice, grammar=regex(pattern), seed=choice)
            )
        texts[choice] = tokenizer.decode(line[2:-1])
    assert set(texts[0]) <= {"a", "b"} and len(texts[0]) == 4
    assert texts[1].isdigit() and len(texts[1]) == 5
    assert set(texts[2]) <= {"x", "y"} and len(texts[2]) == 2


def test_a_mask_is_over_the_vocabulary_of_the_model(directory: Path, tokenizer: Tokenizer) -> None:
    guides = Guides(directory, VOCAB, (EOS, 2))
    grammar = regex("[ab]")
    params = SamplingParams(max_tokens=5, grammar=grammar)
    mask = guides.allowed(Sample(0, params, [7], 1))
    assert mask is not None and mask.shape == (VOCAB,)
    wanted = {tokenizer.token_to_id("a"), tokenizer.token_to_id("b")}
    assert set(mask.nonzero()[0].tolist()) == wanted
    over = guides.allowed(Sample(0, params, [7, *tokenizer.encode("a").ids], 1))
    assert over is not None and over.nonzero()[0].tolist() == [EOS, 2]


def test_the_end_comes_where_the_grammar_has_it(writer: Writer, tokenizer: Tokenizer) -> None:
    (a,) = tokenizer.encode("a").ids
    for params in ({"min_tokens": 50}, {"ignore_eos": True}):
        assert writer.write(grammar=regex("a"), **params) == [a]
        sequence = Sequence(
            request=1, attempt=1, choices=(0,), tokens=[5, a], prompt_len=1, router=b"",
            params=SamplingParams(max_tokens=60, grammar=regex("a"), **params),
            parent=seed("c"),
        )  # fmt: skip
        assert to_output(sequence, 0, Sampled(EOS, None), LIMITS).finish == "stop"


def test_bias_works_within_the_grammar(writer: Writer, tokenizer: Tokenizer) -> None:
    (b,) = tokenizer.encode("b").ids
    bias = ((b, 100.0), (tokenizer.token_to_id("z"), 100.0))
    tokens = writer.write(grammar=regex("[ab]{6}"), logit_bias=bias)
    assert tokens == [b] * 6


def test_what_cannot_be_followed_ends_the_choice(writer: Writer) -> None:
    assert writer.next([5], grammar="start: nothing") == -1
    assert writer.next([5, 40, 41], grammar=regex("[0-9]+")) == -1
    # Beside it, and with log-probabilities asked for, the others go on.
    good, bad = (
        Sample(0, SamplingParams(max_tokens=9, grammar=g, logprobs=0, temperature=0), [5], 1)
        for g in (regex("a"), "start: nothing")
    )
    drawn = writer.sampler.draw(torch.zeros(2, VOCAB), [(0, good), (1, bad)])
    assert drawn[0].token > 0 and drawn[1].token == -1
    sequence = Sequence(
        request=1, attempt=1, choices=(0,), tokens=[5], prompt_len=1, router=b"",
        params=bad.params, parent=seed("c"), scores=[TokenLogprob(1, -1.0)],
    )  # fmt: skip
    output = to_output(sequence, 0, drawn[1], LIMITS)
    assert (output.tokens, output.finish) == ((), "grammar")
    assert output.prompt_logprobs == (TokenLogprob(1, -1.0),) and sequence.scores == []
    assert Sampler(VOCAB, (EOS,)).draw(torch.zeros(1, VOCAB), [(0, good)])[0].token == -1


def test_vocabularies(directory: Path, tmp_path: Path) -> None:
    assert open_vocabulary(tmp_path, 10, (0,)) is None
    with pytest.raises(GrammarError, match="no end-of-sequence token"):
        open_vocabulary(directory, VOCAB, ())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(GrammarError, match="tokenizer"):
        open_vocabulary(tmp_path, 10, (0,))
    vocabulary = open_vocabulary(directory, VOCAB, (EOS,))
    assert vocabulary is not None
    with pytest.raises(GrammarError):
        open_matcher(vocabulary, regex("("))

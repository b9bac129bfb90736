"""The random checkpoint is one that transformers loads, too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import random_model
from common.model.spec import load_spec


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    random_model.write(directory)
    return directory


def test_the_spec_accepts_it(directory: Path) -> None:
    spec = load_spec(directory)
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim) == (2, 2, 16)
    assert spec.eos_token_ids == (1,)


def test_transformers_loads_all_of_it_and_the_prompt_matters(directory: Path) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    with torch.inference_mode():
        first = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
        second = model(torch.tensor([[9, 6, 7]])).logits[0, -1]
    assert not torch.allclose(first, second, atol=1e-3)


def test_tokenizer_is_lossless_and_has_a_chat_template(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "def f(x):\n\treturn 'Grüße, 世界'  # 😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "user: Hi\nassistant: "


def test_equal_seeds_give_equal_files(directory: Path, tmp_path: Path) -> None:
    random_model.write(tmp_path)
    for file in directory.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name

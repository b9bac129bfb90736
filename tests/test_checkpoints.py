from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.checkpoints import ARCHITECTURES, Architecture, write_checkpoint
from tests.conftest import MakeCheckpoint


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_arguments_make_equal_checkpoints(
    checkpoint: MakeCheckpoint, architecture: Architecture, tmp_path: Path
) -> None:
    one = checkpoint(architecture)
    other = write_checkpoint(tmp_path / "new" / architecture, architecture)
    third = write_checkpoint(tmp_path / "seed" / architecture, architecture, seed=1)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert (one / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    weights = [load_file(path / "model.safetensors") for path in (one, other, third)]
    for name, tensor in weights[0].items():
        assert tensor.equal(weights[1][name])
        assert not tensor.equal(weights[2][name])


def test_tokenizer(checkpoint: MakeCheckpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    assert len(tokenizer) == 512
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [
        0,
        1,
        2,
    ]
    text = "The harbour wakes; naïve 東京 \t\n {x: 1} \U0001f600"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("The harbour wakes before")) < 12
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(chat)[0] == 1

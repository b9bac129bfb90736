"""Checkpoints of real shapes with random weights, made once and kept below `.cache/checkpoints`.

Speed depends on shapes, not on what the weights say. Every system of a comparison reads the same
directory. The tokenizer is a real one, trained on this repository's own text and filled up to the
vocabulary, so that each id turns into text at a usual cost.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare.paths import CHECKPOINTS, ROOT


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a dense Llama or Qwen2 with tied embeddings."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    bias: bool = False
    """Biases of the query, key and value projections."""


SHAPES = {
    "llama-135m": Shape("LlamaForCausalLM", "llama", 49152, 576, 1536, 30, 9, 3, 8192),
    "qwen2-0.5b": Shape("Qwen2ForCausalLM", "qwen2", 151936, 896, 4864, 24, 14, 2, 8192, True),
}
"""Those of SmolLM2-135M and Qwen2.5-0.5B."""


def checkpoint(name: str) -> Path:
    """The directory of a shape's checkpoint, in bfloat16; written if it is not there yet."""
    directory = CHECKPOINTS / name
    if not (directory / "model.safetensors").is_file():
        write(directory, SHAPES[name])
    return directory


def write(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Write configuration, tokenizer and weights; the weights last, all at once."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", _config(shape))
    # Ends nowhere by itself: requests ask for exact lengths.
    _write_json(directory / "generation_config.json", {"eos_token_id": 0})
    _write_tokenizer(directory, shape)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, size in _tensor_sizes(shape).items():
        if key.endswith("norm.weight"):
            tensors[key] = torch.ones(size, dtype=torch.bfloat16)
        elif key.endswith(".bias"):
            tensors[key] = torch.zeros(size, dtype=torch.bfloat16)
        else:
            random = torch.empty(size).normal_(0.0, 0.02, generator=generator)
            tensors[key] = random.to(torch.bfloat16)
    unfinished = directory / "unfinished.safetensors"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.rename(directory / "model.safetensors")


def _tensor_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    head_dim = shape.hidden // shape.heads
    query, kv = shape.heads * head_dim, shape.kv_heads * head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"{prefix}{norm}.weight"] = (shape.hidden,)
        for name, rows in (("q", query), ("k", kv), ("v", kv)):
            sizes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, shape.hidden)
            if shape.bias:
                sizes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        sizes[f"{prefix}self_attn.o_proj.weight"] = (shape.hidden, query)
        for name in ("gate", "up"):
            sizes[f"{prefix}mlp.{name}_proj.weight"] = (shape.intermediate, shape.hidden)
        sizes[f"{prefix}mlp.down_proj.weight"] = (shape.hidden, shape.intermediate)
    return sizes


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def _write_tokenizer(directory: Path, shape: Shape) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(4096, shape.vocab_size),
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(ROOT.glob("*.md"))], trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for number in range(len(vocabulary), shape.vocab_size):
        vocabulary[f"\u0120w{number}"] = number  # a word with a space before it
    _write_json(directory / "tokenizer.json", state)
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")

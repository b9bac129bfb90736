"""What a checkpoint's `config.json` says, as one typed value: `ModelSpec`.

`load_spec` is called once per worker, before the weights are read; everything in `common.model`
works from the result and never from the raw JSON. What cannot be served is refused here, with a
message that names what can. No torch in this module.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from common.errors import ModelError
from common.kv.layout import KvLayout
from common.model.rope_spec import RopeSpec, read_rope

ARCHITECTURES: Final = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ACTIVATIONS: Final = ("silu", "swish")
DISK_DTYPES: Final = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes and switches of a dense decoder of the Llama family.

    All sizes are counts of elements; `head_dim` is stated, never derived, after loading.
    """

    architecture: str
    """`llama`, `mistral`, `qwen2` or `qwen3`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    max_position_embeddings: int
    """Longest sequence in tokens, prompt and output together, scaling of rope included."""
    tie_word_embeddings: bool
    """The embedding is the output head."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over each head of q and k, before rope."""
    windows: tuple[int | None, ...]
    """Per layer: a token sees this many tokens, itself included; None: all before it."""
    eos_token_ids: tuple[int, ...]
    dtype: str
    """What the checkpoint says that it was saved in: `bfloat16`, `float16` or `float32`."""

    def layout(self, block_size: int, dtype: str) -> KvLayout:
        """Layout of this model's KV blocks. Raises ConfigError for a bad size or dtype."""
        return KvLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=block_size,
            dtype=dtype,
        )


def load_spec(directory: Path) -> ModelSpec:
    """Read `config.json` (and `generation_config.json`, if any) of a checkpoint.

    Raises ModelError, in one line, if a file is missing or no JSON object, a field is missing or
    of the wrong type, or the architecture is not served.
    """
    config = _read_json(directory / "config.json")
    architecture = _architecture(config)
    if config.get("quantization_config") is not None:
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise ModelError(
            f"quantized checkpoints are not supported ({method}); supported weights: "
            f"{', '.join(DISK_DTYPES)}"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise ModelError(f"hidden_act {activation!r} is not supported; supported: silu")

    hidden_size = _integer(config, "hidden_size")
    num_heads = _integer(config, "num_attention_heads")
    num_layers = _integer(config, "num_hidden_layers")
    num_kv_heads = _integer(config, "num_key_value_heads", num_heads)
    default_head_dim = 128 if architecture == "qwen3" else hidden_size // num_heads
    head_dim = _integer(config, "head_dim", default_head_dim)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly"
        )
    if head_dim % 2:
        raise ModelError(f"head_dim {head_dim} is odd; rotary embeddings need an even one")

    declared = _integer(config, "max_position_embeddings", 2048)
    rope = read_rope(config, declared)
    vocab_size = _integer(config, "vocab_size")
    attention_bias = bool(config.get("attention_bias", False))
    return ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope=rope,
        max_position_embeddings=rope.max_positions(declared),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        # Qwen2 has these biases without a switch, Mistral has none; the others say so.
        qkv_bias=architecture == "qwen2" or (architecture in ("llama", "qwen3") and attention_bias),
        o_bias=architecture in ("llama", "qwen3") and attention_bias,
        mlp_bias=architecture == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=architecture == "qwen3",
        windows=_windows(config, architecture, num_layers),
        eos_token_ids=_eos(directory, config, vocab_size),
        dtype=_dtype(config),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"no {path.name} in {path.parent}") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures") or []
    for name in named:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    if not named and config.get("model_type") in ARCHITECTURES.values():
        return str(config["model_type"])
    got = ", ".join(map(str, named)) or config.get("model_type") or "unnamed"
    raise ModelError(f"architecture {got} is not supported; supported: {', '.join(ARCHITECTURES)}")


def _integer(config: dict[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config.json has no {name}")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json: {name} is {value!r}, not a positive integer")
    return value


def _number(config: dict[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        raise ModelError(f"config.json: {name} is {value!r}, not a number")
    return float(value)


def _windows(config: dict[str, Any], architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer; where a field is missing, what transformers assumes."""
    none: tuple[int | None, ...] = (None,) * num_layers
    if architecture == "llama":
        return none
    size = None
    if "sliding_window" not in config or config["sliding_window"] is not None:
        size = _integer(config, "sliding_window", 4096)
    if architecture == "mistral":
        return (size,) * num_layers
    if not config.get("use_sliding_window", False):
        return none
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        return tuple(size if layer >= first else None for layer in range(num_layers))
    known = {"full_attention", "sliding_attention"}
    if not isinstance(kinds, list) or len(kinds) != num_layers or not known.issuperset(kinds):
        raise ModelError(
            f"config.json: layer_types must name {num_layers} layers, each one of "
            f"{', '.join(sorted(known))}"
        )
    return tuple(size if kind == "sliding_attention" else None for kind in kinds)


def _eos(directory: Path, config: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Ids that end a choice, of both files, in the order in which they are listed."""
    sources = [config]
    generation = directory / "generation_config.json"
    if generation.exists():
        sources.insert(0, _read_json(generation))
    ids: list[int] = []
    for source in sources:
        value = source.get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
            raise ModelError(f"eos_token_id {value!r} is neither a token id nor a list of them")
        # Some checkpoints name ids past the vocabulary; no model can emit those.
        ids += [token for token in listed if 0 <= token < vocab_size and token not in ids]
    return tuple(ids)


def _dtype(config: dict[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return name if name in DISK_DTYPES else "float32"

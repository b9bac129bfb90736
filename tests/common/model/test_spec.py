import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, ModelError
from common.kv.layout import KvLayout
from common.model.rope_spec import RopeSpec
from common.model.spec import ModelSpec, load_spec
from tests.checkpoints import ARCHITECTURES, Architecture
from tests.conftest import MakeCheckpoint

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def spec_of(directory: Path, generation: dict[str, Any] | None = None, **config: Any) -> ModelSpec:
    (directory / "config.json").write_text(json.dumps(LLAMA | config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return load_spec(directory)


def refused(directory: Path, **config: Any) -> str:
    with pytest.raises(ModelError) as error:
        spec_of(directory, **config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_llama_of_the_transformers_4_form(tmp_path: Path) -> None:
    assert spec_of(tmp_path) == ModelSpec(
        architecture="llama",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope=RopeSpec(),
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(None, None),
        eos_token_ids=(2,),
        dtype="bfloat16",
    )


def test_layout(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    assert spec.layout(32, "bfloat16") == KvLayout(
        num_layers=2, num_kv_heads=2, head_dim=16, block_size=32, dtype="bfloat16"
    )
    with pytest.raises(ConfigError, match="block size 20 is not a multiple of 16"):
        spec.layout(20, "bfloat16")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_transformers_writes(checkpoint: MakeCheckpoint, architecture: Architecture) -> None:
    options: dict[str, Any] = {} if architecture == "llama" else {"sliding_window": 40}
    if architecture in ("llama", "qwen3"):
        options["bias"] = True
    spec = load_spec(checkpoint(architecture, **options, dtype="bfloat16"))
    assert spec.architecture == architecture
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 4, 2, 16)
    assert spec.rms_norm_eps == 1e-5
    assert spec.eos_token_ids == (0, 2)
    assert spec.dtype == "bfloat16"
    assert spec.qkv_bias is (architecture != "mistral")
    assert spec.o_bias is (architecture in ("llama", "qwen3"))
    assert spec.mlp_bias is (architecture == "llama")
    assert spec.qk_norm is (architecture == "qwen3")
    assert (
        spec.windows
        == {
            "llama": (None,) * 4,
            "mistral": (40,) * 4,
            "qwen2": (None, None, 40, 40),
            "qwen3": (None, None, 40, 40),
        }[architecture]
    )


def test_model_type_names_the_architecture_where_nothing_else_does(tmp_path: Path) -> None:
    assert spec_of(tmp_path, architectures=None, model_type="qwen3").architecture == "qwen3"


def test_head_dim(tmp_path: Path) -> None:
    assert spec_of(tmp_path, head_dim=32).head_dim == 32
    assert spec_of(tmp_path, head_dim=None).head_dim == 16
    assert spec_of(tmp_path, architectures=["Qwen3ForCausalLM"]).head_dim == 128


def test_kv_heads_default_to_the_heads(tmp_path: Path) -> None:
    assert spec_of(tmp_path, num_key_value_heads=None).num_kv_heads == 4


def test_tied_embeddings(tmp_path: Path) -> None:
    assert spec_of(tmp_path, tie_word_embeddings=True).tie_word_embeddings


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"]}, (4096, 4096)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None, None)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 9}, (9, 9)),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}, (None, None)),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 9,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            (None, 9),
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (9, None),
        ),
        ({"sliding_window": 9}, (None, None)),
    ],
)
def test_windows(tmp_path: Path, config: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert spec_of(tmp_path, **config).windows == windows


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_rope_is_the_same_in_both_forms(tmp_path: Path) -> None:
    expected = RopeSpec(
        kind="llama3",
        theta=500_000.0,
        factor=8.0,
        original_max_positions=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    old = spec_of(tmp_path, rope_theta=500_000.0, rope_scaling={"rope_type": "llama3", **LLAMA3})
    new = spec_of(
        tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3}
    )
    assert old.rope == expected
    assert new.rope == expected


def test_linear_rope_under_its_old_name(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, rope_scaling={"type": "linear", "factor": 4})
    assert spec.rope == RopeSpec(kind="linear", factor=4.0)
    assert spec.max_position_embeddings == 2048


def test_dynamic_rope_is_the_plain_one_up_to_its_limit(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert spec.rope == RopeSpec()
    assert spec.max_position_embeddings == 2048


def test_yarn_extends_the_context(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert spec_of(tmp_path, rope_scaling=yarn).max_position_embeddings == 8192
    declared = spec_of(tmp_path, rope_scaling=yarn, max_position_embeddings=8192)
    assert declared.max_position_embeddings == 8192


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": [7, 5]}, None, (7, 5)),
        ({"eos_token_id": 7}, {"eos_token_id": [5, 7, 3]}, (5, 7, 3)),
        ({"eos_token_id": 7}, {"eos_token_id": 5}, (5, 7)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({"eos_token_id": [7, 1000]}, {"eos_token_id": -1}, (7,)),
    ],
)
def test_eos_of_both_files(
    tmp_path: Path,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    expected: tuple[int, ...],
) -> None:
    assert spec_of(tmp_path, generation, **config).eos_token_ids == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel is not supported; supported: LlamaForCausalLM, "
            "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        (
            {"architectures": None, "model_type": "mamba"},
            "architecture mamba is not supported; supported: LlamaForCausalLM, "
            "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantized checkpoints are not supported (gptq); supported weights: bfloat16, "
            "float16, float32",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "rope type 'longrope' is not supported; supported: default, linear, dynamic, llama3, "
            "yarn",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope type 'linear' needs a factor of at least 1, not None",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            "rope type 'llama3' needs low_freq_factor above 0, not None",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor 0.5 is not supported; supported: 1.0",
        ),
        ({"vocab_size": None}, "config.json has no vocab_size"),
        ({"hidden_size": "64"}, "config.json: hidden_size is '64', not a positive integer"),
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers is 0, not a positive integer"),
        (
            {"num_key_value_heads": 3},
            "4 attention heads cannot share 3 key-value heads evenly",
        ),
        ({"head_dim": 15}, "head_dim 15 is odd; rotary embeddings need an even one"),
        (
            {"eos_token_id": "</s>"},
            "eos_token_id '</s>' is neither a token id nor a list of them",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "use_sliding_window": True,
                "layer_types": ["linear_attention", "full_attention"],
            },
            "config.json: layer_types must name 2 layers, each one of full_attention, "
            "sliding_attention",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    assert refused(tmp_path, **config) == message


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^no config\.json in "):
        load_spec(tmp_path)
    for text in ("{", "[]", "\udcff"):
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ModelError, match=r"config\.json is not (valid JSON|a JSON object)"):
            load_spec(tmp_path)

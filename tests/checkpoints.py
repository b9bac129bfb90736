"""Tiny random checkpoints with a real tokenizer, for every test that needs a model.

`write_checkpoint` makes what `save_pretrained` of transformers makes, so that what we read is what
users have. The parameters are drawn so that attention decides the tokens: embeddings of unit
variance, an output head of its own and large matrices. (A small, tied random model repeats its
last token whatever attention does, and hides every bug in it.)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "mistral", "qwen2", "qwen3")

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Their ids are 0, 1 and 2."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_TEXT = """
The harbour wakes before the town does. Boats come in with the tide, their lamps still lit, and the
women on the quay count the baskets by touch rather than by sight. Nobody speaks much. A gull walks
along the wall as if it owned the stones, and perhaps it does. When the sun is over the hill the
market opens: fish first, then bread, then the slow trade of nets, rope, salt and stories. Strangers
are asked two questions, where they slept and what they eat, and are sold something either way.
A child learns here to tie seven knots before she learns to read, and to read the sky before both.
In winter the same street is empty by four. The shutters are tied, the stoves are lit, and whoever
has a letter from far away reads it aloud to the others, twice, with all the names. They know what
prefill and decode mean as little as they care: one reads the whole page, the other says the next
word. def count(baskets): return sum(len(basket) for basket in baskets if basket is not None)
Zürich, Málaga, Łódź, Αθήνα, Москва, 東京, 12345, 67890; "quoted", (bracketed), [listed], {braced}!
"""


def write_checkpoint(
    directory: Path,
    architecture: Architecture,
    *,
    seed: int = 0,
    dtype: str = "float32",
    tied: bool = False,
    layers: int = 4,
    hidden: int = 64,
    intermediate: int | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 512,
    max_positions: int = 4096,
    rope_theta: float = 10_000.0,
    rope_scaling: dict[str, Any] | None = None,
    sliding_window: int | None = None,
    bias: bool = False,
    eos: Sequence[int] = (0, 2),
    shard_bytes: int | None = None,
) -> Path:
    """Write a random checkpoint and its tokenizer to `directory`, which is returned.

    bias: biases that the architecture has a switch for (qwen2 always has its own). sliding_window:
    of all layers (mistral) or of the second half of them (qwen2, qwen3). shard_bytes: split the
    weights into files of about this size, with an index.
    """
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate or 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope_theta,
            **(rope_scaling or {}),
        },
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": list(eos),
        "rms_norm_eps": 1e-5,
    }
    if head_dim is not None or architecture == "qwen3":
        common["head_dim"] = head_dim or hidden // heads
    config = _config(architecture, common, layers, sliding_window, bias)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32
    )
    _randomise(model, seed)
    model.generation_config.eos_token_id = list(eos)
    directory.mkdir(parents=True, exist_ok=True)
    sharding = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    model.to(getattr(torch, dtype)).save_pretrained(directory, **sharding)
    _tokenizer(vocab).save_pretrained(directory)
    return directory


def _config(
    architecture: Architecture,
    common: dict[str, Any],
    layers: int,
    sliding_window: int | None,
    bias: bool,
) -> LlamaConfig | MistralConfig | Qwen2Config | Qwen3Config:
    windowed: dict[str, Any] = {
        "use_sliding_window": sliding_window is not None,
        "sliding_window": sliding_window,
        "max_window_layers": layers // 2,
    }
    match architecture:
        case "llama":
            assert sliding_window is None, "llama has no sliding window"
            return LlamaConfig(**common, attention_bias=bias, mlp_bias=bias)
        case "mistral":
            assert not bias, "mistral has no biases"
            return MistralConfig(**common, sliding_window=sliding_window)
        case "qwen2":
            return Qwen2Config(**common, **windowed)
        case "qwen3":
            return Qwen3Config(**common, **windowed, attention_bias=bias)


def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "q_norm" in name or "k_norm" in name:
                # Normalised heads would attend to everything alike: make the scores vary.
                parameter.copy_(1.6 * (1 + 0.2 * noise))
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                # Unit gain and a half: each layer says as much as the embedding does.
                parameter.copy_(1.5 * noise * parameter.shape[-1] ** -0.5)


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` tokens, so that any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT.splitlines(), trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[0],
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast

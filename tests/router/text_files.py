"""Tokenizer files of a small byte-level model, for router tests: no weights, no torch."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from router.tokenizer import TextModel

EOS = 0
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|end|>", "<|im_start|>", "<|im_end|>", "<|begin|>")
TEXT = (
    "the harbour wakes before the town does, boats come in with the tide, lamps still lit; "
    "nobody speaks much. Zürich, Łódź, Αθήνα, Москва, 東京 and a 😀."
)


def byte_level() -> Tokenizer:
    """BPE over bytes: every token sequence is text, and characters split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Words with a marked leading space, bytes for all else, as in Llama 2."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "a"]
    words += ["e", "h", "o", "t", "▁town", "▁tide", "boat", "s", "ü", "東"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def write_text_files(
    directory: Path, tokenizer: Tokenizer | None = None, template: str | None = TEMPLATE
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (tokenizer or byte_level()).save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>" if tokenizer is None else "<s>",
        "eos_token": "<|end|>" if tokenizer is None else "</s>",
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        settings["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def text_model(directory: Path, tokenizer: Tokenizer | None = None) -> TextModel:
    return TextModel(write_text_files(directory, tokenizer))

"""Tokenizers in the layouts of published models: byte-level with added special tokens, and sentencepiece-like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = ["Two cats sat on a mat.", "12 and 30 make 42; who is there?", "  spaces\n\nand lines\t"] * 4
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def write_layout(folder: Path, layout: str) -> int:
    """Writes tokenizer.json and tokenizer_config.json of `qwen`, `smollm`, `llama3` or `llama2`; returns its size."""
    tokenizer, config = LAYOUTS[layout]()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT, **config}))
    return tokenizer.get_vocab_size()


def _byte_level(*special: str, split: str = "") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        parts = pre_tokenizers.Split(Regex(split), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([parts, rest])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _qwen() -> tuple[Tokenizer, dict[str, Any]]:
    # transformers 5 builds the splitting of a Qwen tokenizer anew, so it has to be the published one.
    tokenizer = _byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>", split=QWEN_SPLIT)
    tokenizer.normalizer = normalizers.NFC()
    more = ["<|im_start|>", "<|im_end|>"]
    return tokenizer, {
        "tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": more, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "add_prefix_space": False,
    }  # fmt: skip


def _smollm() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = _byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>")
    return tokenizer, {
        "tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>",
    }  # fmt: skip


def _llama3() -> tuple[Tokenizer, dict[str, Any]]:
    begin = "<|begin_of_text|>"
    tokenizer = _byte_level(begin, "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": "<|end_of_text|>"}


def _llama2() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special + bytes_, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer, {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip


LAYOUTS = {"qwen": _qwen, "smollm": _smollm, "llama3": _llama3, "llama2": _llama2}

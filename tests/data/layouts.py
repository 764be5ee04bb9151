"""Small tokenizers in the file layouts of published models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ["The cat sat on the mat.", "Two cats sat; three mats are 3.", "  spaces  and\n\nlines\t", "12 + 30 = 42"] * 5
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"


class Layout(NamedTuple):
    """A published layout: its files, the token that begins a text, and what versions of transformers do with it."""

    tokenizer: Tokenizer
    config: dict[str, Any]  # tokenizer_config.json
    begin: str | None
    model: dict[str, Any] = {}  # noqa: RUF012  # config.json
    same_in_4: bool = True  # whether transformers gives the same ids; where not, docs/tokenizers.md says why
    same_in_5: bool = True

    def write(self, folder: Path) -> Path:
        """The folder, filled."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(self.config))
        if self.model:
            (folder / "config.json").write_text(json.dumps(self.model))
        return folder


def byte_level(special: tuple[str, ...], begin: str | None = None, size: int = 400) -> Tokenizer:
    """A byte-level BPE as of Llama 3 and Qwen; `begin`: inserted by a template."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=size - len(special), initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if begin is not None:
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template(made, begin)])
    return made


def byte_fallback(begin: str | None = None, size: int = 340) -> Tokenizer:
    """A BPE with a token for each byte of unknown characters, as of Llama 2 and Mistral."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        [text.strip() for text in TEXTS],
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
        ),
    )
    content = json.loads(made.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if begin is not None:
        made.post_processor = template(made, begin)
    return made


def template(made: Tokenizer, begin: str, end: str = "") -> processors.TemplateProcessing:
    """Inserts a token before a text, and one behind it."""
    ids = [(name, made.token_to_id(name)) for name in dict.fromkeys((begin, end)) if name]
    single = " ".join(part for part in (begin, "$A", end) if part)
    return processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=ids)


def _ended(made: Tokenizer, begin: str, end: str) -> Tokenizer:
    made.post_processor = template(made, begin, end)
    return made


def layouts() -> dict[str, Layout]:
    """By the name of a model that is published so."""
    llama = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    llama_class = {**llama, "tokenizer_class": "LlamaTokenizer"}
    generic = {"tokenizer_class": "PreTrainedTokenizerFast"}
    begin, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    deepseek = {"bos_token": _added(begin), "eos_token": _added(end), "pad_token": _added(end), "unk_token": None}
    llama3 = {**generic, "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    llama3_names = ("<|begin_of_text|>", "<|end_of_text|>")
    chat = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    qwen = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "unk_token": None, "pad_token": "<|endoftext|>"}
    smol = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    flags = {"add_bos_token": True, "add_eos_token": False}
    return {
        "llama-2": Layout(byte_fallback("<s>"), {**llama_class, **flags, "legacy": False}, "<s>"),
        "llama-1, no flags": Layout(byte_fallback("<s>"), llama_class, "<s>"),
        "llama, no class": Layout(byte_fallback("<s>"), llama, "<s>", {"model_type": "llama"}),
        "llama, only config.json": Layout(
            byte_fallback(), {}, "<s>", {"model_type": "llama", "vocab_size": 340}, same_in_5=False
        ),
        "llama-3": Layout(byte_level(llama3_names, "<|begin_of_text|>"), llama3, "<|begin_of_text|>"),
        "mistral-v0.1": Layout(byte_fallback("<s>"), {**llama_class, **flags}, "<s>"),
        "mistral-v0.3": Layout(byte_fallback("<s>"), {**llama_class, **flags, "legacy": False}, "<s>"),
        "qwen2": Layout(byte_level(chat), {**qwen, "eos_token": "<|endoftext|>", "add_prefix_space": False}, None),
        "qwen2.5": Layout(byte_level(chat), {**qwen, "eos_token": "<|im_end|>", "add_bos_token": False}, None),
        "qwen3": Layout(byte_level((*chat, "<think>")), {**qwen, "eos_token": "<|im_end|>"}, None),
        "phi-3": Layout(
            byte_fallback("<s>"), {**llama_class, "add_bos_token": False, "add_eos_token": False}, None, same_in_5=False
        ),
        "smollm2": Layout(byte_level(chat), {**smol, "tokenizer_class": "GPT2Tokenizer"}, None),
        "deepseek-r1-distill": Layout(
            byte_level((begin, end)), {**deepseek, **flags, "tokenizer_class": "LlamaTokenizerFast", "legacy": True},
            begin, same_in_5=False,
        ),
        "alpaca": Layout(  # the token that it names as its begin is the end
            byte_fallback("<s>"), {**llama_class, "bos_token": "</s>"}, "</s>", same_in_5=False
        ),
        "alpaca, saved again": Layout(byte_fallback("<s>"), {**llama, **generic, "bos_token": "</s>"}, "<s>"),
        "template without a name": Layout(byte_fallback("<s>"), {**generic, "eos_token": "</s>"}, "<s>"),
        "flag without a class that reads it": Layout(byte_fallback(), {**llama, **generic, **flags}, None),
        "ends texts": Layout(  # a text to be continued has no end
            byte_fallback("<s>"), {**llama_class, "add_bos_token": True, "add_eos_token": True}, "<s>", same_in_4=False
        ),
        "template that ends texts": Layout(
            _ended(byte_fallback(), "<s>", "</s>"), {**llama, **generic}, "<s>", same_in_4=False, same_in_5=False
        ),
        "saved by transformers 5": Layout(
            byte_level((begin, end)),
            {"bos_token": begin, "eos_token": end, "tokenizer_class": "LlamaTokenizer", "backend": "tokenizers"},
            None, same_in_4=False,
        ),
        "gpt-neox": Layout(
            byte_level(("<|endoftext|>",), "<|endoftext|>"),
            {"tokenizer_class": "GPTNeoXTokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
            None,
        ),
    }  # fmt: skip


def _added(content: str) -> dict[str, Any]:
    marks = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **marks}

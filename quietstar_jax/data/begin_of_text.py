"""Determines which tokens begin a text, as in the published model, and stores them in the tokenizer's template.

Published models were made with transformers 4. Some of its classes ignore the template of tokenizer.json and build one
from `add_bos_token` and the named token; transformers 5 reads only tokenizer.json. The published behaviour is kept, and
written into the template, where both versions read it. See the table in docs/tokenizers.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

Ids = TypeVar("Ids", list[int], np.ndarray)


class Rebuilt(NamedTuple):
    """Defaults of a class of transformers 4 that builds its template from tokenizer_config.json."""

    add_bos_token: bool
    names: dict[str, str]


_LLAMA = Rebuilt(True, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
REBUILT = {
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA,
    "GemmaTokenizer": Rebuilt(True, {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}),
    "CohereTokenizer": Rebuilt(True, {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"}),
    "GPTNeoXTokenizer": Rebuilt(False, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
}
# Class of a folder that does not name one, by the model_type in its config.json.
CLASSES = {
    **dict.fromkeys(("llama", "mistral", "phi3"), "LlamaTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
}


def as_published(fast: PreTrainedTokenizerFast, folder: Path) -> None:
    """Makes a tokenizer begin texts as in the published model; no token is added at the end.

    Args:
      fast: the tokenizer read from the folder; modified.
      folder: may contain tokenizer_config.json and config.json.
    """
    config = _read(folder / "tokenizer_config.json")
    rebuilt = REBUILT.get(_class_name(config, folder))
    begin = inserted(fast)
    if rebuilt and "backend" not in config:  # transformers 5 writes that field, and its template is correct
        for field, name in rebuilt.names.items():
            if field not in config and getattr(fast, field) is None and name in fast.get_vocab():
                setattr(fast, field, name)
        named = fast.backend_tokenizer.token_to_id(fast.bos_token) if fast.bos_token else None
        if named is not None:
            begin = (named,) if config.get("add_bos_token", rebuilt.add_bos_token) else ()
    if _added(fast) != (*begin, None):
        set_template(fast, begin)


def inserted(fast: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Returns the ids that the template adds before a text."""
    added = _added(fast)
    return tuple(token for token in added[: added.index(None)] if token is not None)


def set_template(fast: PreTrainedTokenizerFast, begin: Sequence[int]) -> None:
    """Makes the template add `begin` before a text, and nothing after it."""
    names = fast.convert_ids_to_tokens(list(begin))

    def part(letter: str, kind: int) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = [{"SpecialToken": {"id": name, "type_id": kind}} for name in names]
        return [*pieces, {"Sequence": {"id": letter, "type_id": kind}}]

    template = {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": [*part("A", 0), *part("B", 1)],
        "special_tokens": {
            name: {"id": name, "ids": [token], "tokens": [name]} for name, token in zip(names, begin, strict=True)
        },
    }
    processor = processors.TemplateProcessing()
    processor.__setstate__(json.dumps(template).encode())  # the constructor's text format does not support every name
    fast.backend_tokenizer.post_processor = processor


def _added(fast: PreTrainedTokenizerFast) -> tuple[int | None, ...]:
    """Returns the ids that the template adds to a text, with None in the place of the text."""
    encoding = fast.backend_tokenizer.encode(fast.eos_token or "a", add_special_tokens=True)
    marked = [token if added else None for token, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True)]
    return tuple(token for i, token in enumerate(marked) if token is not None or marked[:i].count(None) == 0) or (None,)


def _class_name(config: dict[str, Any], folder: Path) -> str:
    """Returns the name of the tokenizer's class in transformers 4, without the suffix `Fast`."""
    name = config.get("tokenizer_class")
    if name is None:
        model = _read(folder / "config.json")
        name = model.get("tokenizer_class") or CLASSES.get(str(model.get("model_type")))
    return str(name).removesuffix("Fast")


def _read(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; empty if it is missing or malformed (loading the tokenizer reports that)."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def begins_with(ids: list[int] | np.ndarray, begin: Sequence[int]) -> bool:
    """Whether ids [tokens] begin with all of `begin`."""
    return list(ids[: len(begin)]) == list(begin)


def without_begin(ids: Ids, begin: Sequence[int]) -> Ids:
    """Returns the ids [tokens] after `begin` if they begin with it, otherwise all ids."""
    return ids[len(begin) :] if begins_with(ids, begin) else ids

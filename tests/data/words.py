"""Corpora whose words are numbers, to see where every token went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from quietstar_jax.data.pipeline import Batch, SequenceIterator, training_sequences
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.data_config import DataConfig

LENGTH = 5
EOS, PAD = 0, 1
PACKINGS = pytest.mark.parametrize("packing", ["random_span", "consecutive_spans", "packed"])
LENGTHS = [30, 4, 5, 2, 17, 9, 3, 1, 40, 6, 12]  # of the documents: longer than a sequence, fitting, shorter


def words_tokenizer(count: int = 1000) -> Tokenizer:
    """The word `i` is token i; 0 ends a text and 1 pads."""
    backend = Backend(WordLevel({"<eos>": EOS, "<pad>": PAD} | {str(i): i for i in range(2, count)}, unk_token="<eos>"))
    backend.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    return Tokenizer("words", fast)


TOKENIZER = words_tokenizer()


def words_with_bos(*, by_itself: bool) -> Tokenizer:
    """The words, and token 999 to begin a text with."""
    fast = words_tokenizer(999).fast.backend_tokenizer
    fast.add_special_tokens(["<bos>"])
    if by_itself:
        fast.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 999)])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return Tokenizer("words", PreTrainedTokenizerFast(tokenizer_object=fast, **special))


def documents(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of these many tokens, all of whose tokens differ."""
    starts = np.cumsum([2, *lengths])
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]


def write(path: Path, texts: Sequence[Sequence[int]]) -> str:
    path.write_text("".join(json.dumps({"text": " ".join(map(str, text))}) + "\n" for text in texts))
    return str(path)


def config(source: str, **changes: Any) -> DataConfig:
    return DataConfig(**{"train": (source,), "validation": (source,), "sequence_length": LENGTH, **changes})


def sequences(source: str, seed: int = 0, process: tuple[int, int] = (0, 1), **changes: Any) -> SequenceIterator:
    settings_ = config(source, **changes)
    return training_sequences(settings_, TOKENIZER, seed=seed, process_index=process[0], process_count=process[1])


def take(source: str, count: int, seed: int = 0, **changes: Any) -> Batch:
    iterator = sequences(source, seed, **changes)
    batch = iterator.next_batch(count)
    iterator.close()
    return batch


def same(left: Batch, right: Batch) -> None:
    assert left.keys() == right.keys() >= {"tokens", "mask"}
    for key in left:
        assert left[key].dtype == right[key].dtype
        np.testing.assert_array_equal(left[key], right[key])


def interleaved(parts: Sequence[Batch]) -> Batch:
    """The global order of what several processes took."""
    return {key: np.stack([part[key] for part in parts], axis=1).reshape(-1, LENGTH) for key in parts[0]}


def joined(batches: Sequence[Batch]) -> Batch:
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}

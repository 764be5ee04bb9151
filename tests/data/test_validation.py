"""Validation batches: the whole text, in order, on any number of processes."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar_jax.data.pipeline import Batch, training_sequences, validation_batches
from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.data_config import DataConfig
from tests.data.words import EOS, LENGTH, PACKINGS, PAD, TOKENIZER, config, documents, joined, same, write


def rows_of(batches: Iterator[Batch]) -> list[list[int]]:
    """The rows that are not filling, without their padding."""
    found = []
    for batch in batches:
        assert (batch["tokens"].dtype, batch["mask"].dtype) == (np.int32, np.bool_)
        for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True):
            assert (tokens[~mask] == PAD).all()
            assert (np.diff(mask.astype(int)) <= 0).all()
            if mask.any():
                found.append(tokens[mask].tolist())
    return found


def spans_of(text: list[int]) -> list[list[int]]:
    """Pieces of LENGTH tokens; a last one of a single token gets one from the piece before it."""
    spans = [text[i : i + LENGTH] for i in range(0, len(text), LENGTH)]
    if len(spans) > 1 and len(spans[-1]) == 1:
        spans[-2:] = [spans[-2][:-1], spans[-2][-1:] + spans[-1]]
    return spans


def expected_rows(texts: Sequence[Sequence[int]], packing: str) -> list[list[int]]:
    ended = [[*text, EOS] for text in texts]
    if packing == "random_span":
        rounds = itertools.zip_longest(*(spans_of(text) for text in ended if len(text) >= 2))
        return [span for of_round in rounds for span in of_round if span is not None]
    if packing == "consecutive_spans":
        return [span for text in ended if len(text) >= 2 for span in spans_of(text)]
    stream = [token for text in ended for token in text]
    return [stream[i : i + LENGTH] for i in range(0, len(stream), LENGTH) if len(stream) - i >= 2]


@PACKINGS
@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    size=st.integers(1, 4),
    limit=st.integers(0, 3),
)
def test_validation_is_everything_in_order(
    tmp_path_factory: pytest.TempPathFactory, packing: str, lengths: list[int], size: int, limit: int
) -> None:
    source = write(tmp_path_factory.mktemp("validation") / "a.jsonl", documents([1, *lengths]))
    settings_, sizes = config(source, packing=packing), {"batch_size": size, "batches": limit}
    expected = expected_rows([text for text in documents([1, *lengths]) if text], packing)[: limit * size or None]
    batches = list(validation_batches(settings_, TOKENIZER, **sizes))
    assert all(batch["tokens"].shape == (size, LENGTH) for batch in batches)
    assert len(batches) == -(-len(expected) // size)
    assert rows_of(iter(batches)) == expected


def test_validation_of_the_embedded_corpus() -> None:
    tokenizer = load_tokenizer("synthetic")
    settings_ = DataConfig(sequence_length=32)
    first, again = (list(validation_batches(settings_, tokenizer, batch_size=4, batches=2)) for _ in range(2))
    same(joined(first), joined(again))
    assert joined(first)["mask"].any(axis=1).all()
    training = training_sequences(settings_, tokenizer, seed=0)
    assert training.next_batch(4)["mask"].any(axis=1).all()

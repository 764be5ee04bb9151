"""Sequences: every document once an epoch, in an order that only the seed decides, on any number of processes."""

import collections
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from quietstar_jax.data import documents as documents_module
from quietstar_jax.data.pipeline import check_vocabulary, training_sequences, validation_batches
from quietstar_jax.errors import DataError
from tests.data.words import (
    EOS,
    LENGTH,
    LENGTHS,
    PACKINGS,
    PAD,
    TOKENIZER,
    config,
    documents,
    interleaved,
    same,
    sequences,
    take,
    write,
)


def test_random_spans(corpus: str) -> None:
    texts = [[*text, EOS] for text in documents(LENGTHS)]
    epochs: list[list[list[int]]] = [[], []]
    iterator = sequences(corpus)
    for epoch in epochs:
        batch = iterator.next_batch(len(texts))
        assert (batch["tokens"].dtype, batch["mask"].dtype) == (np.int32, np.bool_)
        assert batch["tokens"].shape == batch["mask"].shape == (len(texts), LENGTH)
        seen = set()
        for tokens, mask in zip(batch["tokens"].tolist(), batch["mask"].tolist(), strict=True):
            span = tokens[: sum(mask)]
            assert mask == [True] * len(span) + [False] * (LENGTH - len(span))
            assert tokens[len(span) :] == [PAD] * (LENGTH - len(span))
            (source,) = [text for text in texts if span[0] in text[:-1] or span == text]
            start = source.index(span[0])
            assert span == source[start:][:LENGTH]
            assert len(span) == min(LENGTH, len(source))
            seen.add(texts.index(source))
            epoch.append(span)
        assert seen == set(range(len(texts)))
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) != sorted(epochs[1])  # other spans, not just another order


def test_every_span_is_equally_likely(tmp_path: Path) -> None:
    batch = take(write(tmp_path / "one.jsonl", documents([8])), 4000, append_eos=False)
    starts = np.bincount(batch["tokens"][:, 0] - 2)
    assert len(starts) == 8 - LENGTH + 1
    assert EOS not in batch["tokens"]
    assert np.all(np.abs(starts - 1000) < 6 * np.sqrt(1000))  # six standard deviations


def test_packed_is_the_stream_of_documents(corpus: str) -> None:
    texts = {text[0]: [*text, EOS] for text in documents(LENGTHS)}
    batch = take(corpus, 200, packing="packed")
    assert batch["mask"].all()
    stream = batch["tokens"].reshape(-1).tolist()
    order = []
    while stream:
        text = texts[stream[0]]
        assert stream[: len(text)] == text[: len(stream)]
        order.append(stream[0])
        stream = stream[len(text) :]
    first, second = order[:11], order[11:22]
    assert sorted(first) == sorted(second) == sorted(texts)
    assert first != second


@PACKINGS
def test_documents_without_tokens_do_no_harm(tmp_path: Path, packing: str) -> None:
    """They have no number; what has nothing to predict is no span."""
    source = write(tmp_path / "gaps.jsonl", [[], [2, 3, 4], [], [], [5], [6, 7]])
    batch = take(source, 12, packing=packing, append_eos=False)
    found = collections.Counter(batch["tokens"][batch["mask"]].tolist())
    assert (
        found
        == {
            "random_span": dict.fromkeys(range(2, 8), 4),  # 12 rows are 4 epochs of 3 documents
            "consecutive_spans": dict.fromkeys((2, 3, 4, 6, 7), 6),  # 6 epochs of 2 spans
            "packed": dict.fromkeys(range(2, 8), 10),  # 60 tokens of 6
        }[packing]
    )
    same(batch, take(source, 12, packing=packing, append_eos=False))


def test_nothing_but_empty_documents(tmp_path: Path) -> None:
    iterator = sequences(write(tmp_path / "short.jsonl", [[], [2]]), append_eos=False)
    with pytest.raises(DataError, match="None of the 1 documents has 2 tokens or more"):
        iterator.next_batch(1)
    with pytest.raises(DataError, match="contains no text: all of its 2 documents are empty"):
        sequences(write(tmp_path / "empty.jsonl", [[], []]))


@PACKINGS
def test_seed_decides(corpus: str, packing: str) -> None:
    first = take(corpus, 30, packing=packing)
    same(first, take(corpus, 30, packing=packing))
    assert not np.array_equal(first["tokens"], take(corpus, 30, seed=1, packing=packing)["tokens"])
    take(corpus, 1, seed=2**40, packing=packing)


@PACKINGS
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_one_order(corpus: str, packing: str, count: int) -> None:
    parts = [take(corpus, 11, packing=packing, process=(index, count)) for index in range(count)]
    with pytest.raises(ValueError, match="process_index"):
        sequences(corpus, process=(count, count))
    same(interleaved(parts), take(corpus, 11 * count, packing=packing))


@PACKINGS
def test_memory_of_documents_changes_nothing(corpus: str, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(corpus, 40, packing=packing)
    for room in (0, 12):
        monkeypatch.setattr(documents_module, "KEPT_TOKENS", room)
        same(take(corpus, 40, packing=packing), expected)


def test_every_document_is_tokenized_once_while_there_is_room(corpus: str) -> None:
    class Counting:
        eos_id, pad_id, calls = EOS, PAD, 0
        render_conversation = TOKENIZER.render_conversation

        def encode(self, text: str) -> list[int]:
            self.calls += 1
            return TOKENIZER.encode(text)

        def begins(self, prepend_bos: str) -> tuple[int, ...]:
            return ()

    counting = Counting()
    training_sequences(config(corpus, prepend_bos="never"), counting, seed=0).next_batch(50)  # type: ignore[arg-type]
    assert counting.calls == 11 + 1  # and once to see whether it knows every character


def test_a_broken_document_is_met_when_tokens_are_counted(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", documents([4] * 12)))
    path.write_text(path.read_text().replace('49"}', '49"!'))
    with pytest.raises(DataError, match=r"a\.jsonl, line 12: broken JSON"):
        sequences(str(path), packing="consecutive_spans")


def test_missing_sources_are_met_at_the_door(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        sequences(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="no file or folder"):
        validation_batches(config(str(tmp_path / "absent")), TOKENIZER, batch_size=1)
    with pytest.raises(DataError, match="No validation sources"):
        validation_batches(dataclasses.replace(config("x"), validation=()), TOKENIZER, batch_size=1)


def test_check_vocabulary() -> None:
    check_vocabulary(TOKENIZER, 1000)
    check_vocabulary(TOKENIZER, 1024)
    with pytest.raises(DataError, match=r"has 1000 tokens, but the model has only 999 .*at least 1000"):
        check_vocabulary(TOKENIZER, 999)

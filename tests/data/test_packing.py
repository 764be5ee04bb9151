"""Spans and packed sequences by token counts: each token once, and the same order as by reading."""

from __future__ import annotations

import collections
import pickle
import sys
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar_jax.data import documents as documents_module
from quietstar_jax.data import packing
from quietstar_jax.data.documents import Framed, TextDocuments
from quietstar_jax.data.packing import ConsecutiveSpans, Mixture, PackedSequences, Position, span_bounds
from quietstar_jax.data.pipeline import training_sequences, validation_batches
from quietstar_jax.data_config import PACKINGS
from quietstar_jax.errors import CheckpointError, DataError
from tests.data.words import (
    EOS,
    LENGTH,
    LENGTHS,
    TOKENIZER,
    config,
    documents,
    interleaved,
    joined,
    same,
    sequences,
    take,
    words_with_bos,
    write,
)


@given(tokens=st.integers(1, 40), room=st.integers(3, 7), begun=st.booleans())
def test_spans_of_a_document(tokens: int, room: int, begun: bool) -> None:
    """They follow each other, none is longer than the room, and each has something to predict."""
    spans = [span_bounds(number, tokens, room, begun) for number in range(-(-tokens // room))]
    assert [token for start, stop in spans for token in range(start, stop)] == list(range(tokens))
    assert all(stop - start <= room for start, stop in spans)
    assert all(stop - start + begun >= 2 for start, stop in spans) or tokens == 1
    assert all(stop - start >= room - 1 for start, stop in spans[:-1])


@pytest.mark.parametrize("begun", [False, True])
def test_consecutive_spans(tmp_path: Path, begun: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch has every token once; spans are shuffled, and differently in the next epoch."""
    monkeypatch.setattr(packing, "BLOCK", 3)
    texts = documents(LENGTHS)
    source = write(tmp_path / "a.jsonl", texts)
    room = LENGTH - begun
    per_epoch = sum(-(-(len(text) + 1) // room) for text in texts)
    tokenizer = words_with_bos(by_itself=begun)
    iterator = training_sequences(config(source, packing="consecutive_spans"), tokenizer, seed=0)
    epochs = [iterator.next_batch(per_epoch) for _ in range(2)]
    for batch in epochs:
        rows = [row[mask].tolist() for row, mask in zip(batch["tokens"], batch["mask"], strict=True)]
        assert all((row[0] == 999) is begun for row in rows)
        rows = [row[begun:] for row in rows]
        found = collections.Counter(token for row in rows for token in row)
        assert found == {EOS: len(texts), **dict.fromkeys(range(2, 2 + sum(LENGTHS)), 1)}
        assert all(np.diff([token for token in row if token]).tolist() in ([1] * (len(row) - 1), [1] * (len(row) - 2))
                   for row in rows)  # fmt: skip
    assert not np.array_equal(epochs[0]["tokens"], epochs[1]["tokens"])


@pytest.fixture
def counts_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every source were prepared."""
    monkeypatch.setattr(TextDocuments, "counts_known", True)


@settings(deadline=None, max_examples=10)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda lengths: max(lengths) > 0),
    block=st.integers(1, 5),
    before=st.integers(0, 12),
    count=st.integers(1, 3),
    append_eos=st.booleans(),
)
def test_packing_by_counts_is_packing_by_reading(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], block: int, before: int, count: int, append_eos: bool
) -> None:
    source = write(tmp_path_factory.mktemp("packed") / "a.jsonl", documents(lengths))
    changes: dict[str, Any] = {"packing": "packed", "append_eos": append_eos}
    expected = take(source, count * before + 12 * count, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextDocuments, "counts_known", True)
        patch.setattr(packing, "WALK", block)
        state: dict[str, Any] = {"packing": "packed", "sequences": 0, "document": 0, "offset": 0}
        if before:
            iterator = sequences(source, **changes)
            iterator.next_batch(count * before)
            state = iterator.get_state()
        parts = []
        for index in range(count):
            iterator = sequences(source, process=(index, count), **changes)
            iterator.set_state(state)
            parts.append(joined([iterator.next_batch(5), iterator.next_batch(7)]))
    same(interleaved(parts), {key: value[count * before :] for key, value in expected.items()})


@pytest.mark.parametrize("by_counts", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_every_token_knows_where_its_document_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_counts: bool, count: int
) -> None:
    """Words are numbered through all documents: a token that does not follow the one before it begins another."""
    monkeypatch.setattr(TextDocuments, "counts_known", by_counts)
    source = write(tmp_path / "a.jsonl", documents([1, 5, 2 * LENGTH + 3, 2, 0, 3]))
    at: dict[str, Any] = {"packing": "packed", "append_eos": False}
    for index in range(count):
        batch = sequences(source, process=(index, count), **at).next_batch(40)
        assert batch["starts"].dtype == np.int32
        for tokens, starts in zip(batch["tokens"], batch["starts"], strict=True):
            # A document may follow the one that is before it in the corpus; two of these are told apart by their words.
            begins = [0, *(i for i in range(1, LENGTH) if starts[i] != starts[i - 1])]
            assert all(starts[i] == max(b for b in begins if b <= i) for i in range(LENGTH))
            jumps = {i for i in range(1, LENGTH) if tokens[i] != tokens[i - 1] + 1}
            firsts = {2, 3, 8, 2 * LENGTH + 11, 2 * LENGTH + 13}
            assert jumps <= set(begins)
            assert all(tokens[i] in firsts for i in begins[1:])
            assert all(i in begins for i in range(LENGTH) if tokens[i] in firsts)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("document_mask", [False, True])
def test_only_packed_rows_have_starts(tmp_path: Path, packing: str, document_mask: bool) -> None:
    source = write(tmp_path / "a.jsonl", documents(LENGTHS))
    settings_ = config(source, packing=packing, document_mask=document_mask)
    wanted = {"tokens", "mask"} | ({"starts"} if packing == "packed" and document_mask else set())
    assert set(training_sequences(settings_, TOKENIZER, seed=0).next_batch(2)) == wanted
    batches = list(validation_batches(settings_, TOKENIZER, batch_size=4))
    assert all(set(batch) == wanted for batch in batches)
    if "starts" in wanted:
        ends = sum(int((batch["tokens"] == EOS).sum()) for batch in batches)
        real = np.concatenate([batch["mask"] for batch in batches])
        starts = np.concatenate([batch["starts"] for batch in batches])
        begins = (starts == np.arange(LENGTH)) & real
        crossing = real.any(axis=1).sum() - 1  # rows that may begin inside of a document
        assert len(LENGTHS) <= begins.sum() <= len(LENGTHS) + crossing
        assert ends >= len(LENGTHS)


def test_only_own_documents_are_read(tmp_path: Path, counts_are_known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", documents([LENGTH - 1] * 40))  # with its end, one document a sequence
    sequences(source, packing="packed").next_batch(1)  # counts are cached
    read: list[int] = []
    ordinary = TextDocuments.__getitem__

    def watched(self: TextDocuments, index: int) -> np.ndarray:
        read.append(index)
        return ordinary(self, index)

    monkeypatch.setattr(TextDocuments, "__getitem__", watched)
    sequences(source, packing="packed", process=(2, 4)).next_batch(10)
    assert len(read) == len(set(read)) == 10


def test_counts_are_made_once_for_a_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", documents(LENGTHS))
    at: dict[str, Any] = {"packing": "consecutive_spans", "cache_dir": str(tmp_path / "cache")}
    first = take(source, 30, **at)
    kinds = {item.name.rpartition("-")[0] for item in (tmp_path / "cache").iterdir()}
    assert kinds == {"token-counts", "lines", "documents"}
    with monkeypatch.context() as patch:
        patch.setattr(TextDocuments, "_count", lambda self: pytest.fail("counted again"))
        same(take(source, 30, **at), first)
    write(Path(source), documents([3, 3]))
    assert take(source, 2, **at)["mask"].sum() == 8


@pytest.mark.parametrize("weights", [(1.0,), (0.7, 0.3), (3.0, 1.0, 2.5), (1e-3, 1.0)])
def test_mixture_keeps_its_shares_and_leaves_nothing_out(weights: tuple[float, ...]) -> None:
    mixture, given_so_far = Mixture(weights), [0] * len(weights)
    for place in range(3000):
        order, number = mixture[place]
        assert number == given_so_far[order]
        given_so_far[order] += 1
        for share, taken in zip(weights, given_so_far, strict=True):
            assert abs(taken - (place + 1) * share / sum(weights)) < len(weights)
    far = sys.maxsize // 2
    share = weights[-1] / sum(weights)
    last = next(mixture[far + i] for i in range(10**4) if mixture[far + i][0] == len(weights) - 1)
    assert last[1] == pytest.approx(share * far, rel=1e-3 / share * 1e-3 + 1e-9)


@pytest.mark.parametrize("packing_name", PACKINGS)
def test_mixture_of_sources(tmp_path: Path, packing_name: str) -> None:
    """Every source has its own epochs; the mixture is the same on any number of processes and after a resume."""
    few, many = documents([4] * 5), [[token + 500 for token in text] for text in documents([4] * 30)]
    paths = write(tmp_path / "few.jsonl", few), write(tmp_path / "many.jsonl", many)
    changes: dict[str, Any] = {"train": paths, "weights": (1.0, 3.0), "packing": packing_name}
    whole = take("", 80, **changes)
    firsts = [int(next(token for token in row if token)) for row in whole["tokens"]]
    assert [len([f for f in firsts[:n] if f < 500]) for n in (4, 8, 40, 80)] == [1, 2, 10, 20]
    few_order = [first for first in firsts if first < 500]
    for epoch in range(4):
        assert sorted(few_order[5 * epoch : 5 * epoch + 5]) == [text[0] for text in few]
    many_order = [first for first in firsts if first >= 500]
    assert sorted(many_order[:30]) == sorted(many_order[30:]) == [text[0] for text in many]
    parts = []
    for index in range(3):
        iterator = sequences("", process=(index, 3), **changes)
        iterator.next_batch(6)
        state = iterator.get_state()
        iterator.close()
    for index in range(2):
        iterator = sequences("", process=(index, 2), **changes)
        iterator.set_state(state)
        parts.append(iterator.next_batch(31))
    same(interleaved(parts), {key: value[18:] for key, value in whole.items()})


def test_a_mixture_of_nothing(tmp_path: Path) -> None:
    paths = write(tmp_path / "a.jsonl", documents([4])), write(tmp_path / "b.jsonl", [[5]])
    iterator = sequences("", train=paths, weights=(1.0, 1.0), append_eos=False)
    with pytest.raises(DataError, match="None of the 1 documents has"):
        iterator.next_batch(1)
    with pytest.raises(DataError, match="None of the 1 documents has"):
        sequences("", train=paths, weights=(1.0, 1.0), packing="consecutive_spans", append_eos=False)


def test_data_that_changed_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(8):
        write(folder / f"{i}.jsonl", documents([4, 5]))
    other = write(tmp_path / "other.jsonl", documents([6]))
    trained: dict[str, Any] = {"train": (str(folder), other)}
    iterator = sequences("", **trained)
    state = iterator.get_state()
    sequences("", **trained).set_state(state)
    sequences("", **trained).set_state({name: value for name, value in state.items() if name != "sources"})

    (tmp_path / "moved").mkdir()
    for item in folder.iterdir():  # elsewhere, written later: the same data
        (tmp_path / "moved" / item.name).write_bytes(item.read_bytes())
    sequences("", train=(str(tmp_path / "moved"), other)).set_state(state)

    write(folder / "3.jsonl", documents([5, 4]))
    with pytest.raises(CheckpointError, match=r"changed since .*\n  - .*corpus: other content in .*3\.jsonl \(8 files"):
        sequences("", **trained).set_state(state)
    for i in range(8):
        write(folder / f"{i}.jsonl", documents([5, 4]))
    with pytest.raises(CheckpointError, match=r"4\.jsonl and 3 more \("):
        sequences("", **trained).set_state(state)
    (folder / "7.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"corpus: 8 files, \d+ bytes, 16 documents -> 7 files"):
        sequences("", **trained).set_state(state)
    with pytest.raises(CheckpointError, match="2 sources -> 1 sources"):
        sequences(str(folder)).set_state(state)


def test_memory_of_documents_is_no_part_of_a_worker(tmp_path: Path) -> None:
    source = TextDocuments("a", ["1 2", "3"], None, config("a"))  # type: ignore[arg-type]
    source._kept[0] = np.zeros(1000, np.int32)
    assert source.__getstate__()["_kept"] == {}
    assert source.__getstate__()["_room"] == documents_module.KEPT_TOKENS


@pytest.mark.parametrize("name", ["consecutive_spans", "packed"])
def test_workers_are_not_sent_the_counts(tmp_path: Path, name: str, counts_are_known: None) -> None:
    source = write(tmp_path / "a.jsonl", documents([3] * 3000))
    sequences(source, packing=name).next_batch(1)
    framed = Framed(sequences(source, packing=name)._sources[0][1], (), (EOS,))
    order = grain.MapDataset.range(3000).seed(0).shuffle().repeat()
    found: Any = (
        ConsecutiveSpans(framed, LENGTH, 1, ())
        if name == "consecutive_spans"
        else PackedSequences(framed, order, LENGTH, Position())
    )
    expected = found[7][0].tolist()
    assert isinstance(found._counts, np.memmap)
    sent = pickle.loads(pickle.dumps(found))
    assert "_counts" not in sent.__dict__
    assert sent[7][0].tolist() == expected

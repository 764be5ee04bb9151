"""Sequences: exactly once an epoch, the same on any number of processes and workers, resumable anywhere."""

import collections
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar_jax.config import PACKINGS, DataConfig
from quietstar_jax.data import documents as documents_module
from quietstar_jax.data import pipeline
from quietstar_jax.data.pipeline import (
    Batch,
    check_vocabulary,
    training_sequences,
    validation_batches,
)
from quietstar_jax.data.pretokenized import write as preparation
from quietstar_jax.data.sources import formats
from quietstar_jax.data.sources.common import Record
from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.errors import CheckpointError, ConfigError, DataError
from tests.data.words import (
    EOS,
    LENGTH,
    LENGTHS,
    PAD,
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


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return write(tmp_path / "train.jsonl", documents(LENGTHS))


EACH_PACKING = pytest.mark.parametrize("packing", PACKINGS)


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


@pytest.mark.parametrize(
    ("prepend_bos", "by_itself", "begins"),
    [("auto", True, True), ("auto", False, False), ("always", False, True), ("never", True, False)],
)
def test_begin_of_text(corpus: str, prepend_bos: str, by_itself: bool, begins: bool) -> None:
    """Before every span, before every packed document, and before every document of the validation text."""
    tokenizer, texts = words_with_bos(by_itself=by_itself), documents(LENGTHS)
    settings_ = config(corpus, prepend_bos=prepend_bos)
    batch = training_sequences(settings_, tokenizer, seed=0).next_batch(len(LENGTHS))
    assert set(batch["tokens"][:, 0] == 999) == {begins}
    assert not np.any(batch["tokens"][:, 1:] == 999)
    for row, mask in zip(batch["tokens"], batch["mask"], strict=True):
        words = row[mask].tolist()[begins:]
        assert any(words == [*text, EOS][i : i + len(words)] for text in texts for i in range(len(text) + 1))

    spelled = Path(corpus).with_name("spelled.jsonl")  # the same text, which begins with the token itself
    spelled.write_text(Path(corpus).read_text().replace('"text": "', '"text": "<bos> '))
    if begins:
        own = config(str(spelled), prepend_bos=prepend_bos)
        same(training_sequences(own, tokenizer, seed=0).next_batch(len(LENGTHS)), batch)

    packed = config(corpus, prepend_bos=prepend_bos, packing="packed")
    stream = training_sequences(packed, tokenizer, seed=0).next_batch(20)["tokens"].ravel().tolist()
    after_end = [stream[i + 1] for i, token in enumerate(stream[:-1]) if token == EOS]
    assert {token == 999 for token in [stream[0], *after_end]} == {begins}

    first = next(validation_batches(settings_, tokenizer, batch_size=len(LENGTHS)))["tokens"]
    assert (first[0].tolist() == [999, *texts[0]][:LENGTH]) is begins


def test_begin_of_text_needs_a_token(corpus: str) -> None:
    with pytest.raises(ConfigError, match="names no begin-of-text token"):
        training_sequences(config(corpus, prepend_bos="always"), TOKENIZER, seed=0)


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


@EACH_PACKING
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
    with pytest.raises(DataError, match="holds no text: all of its 2 documents are empty"):
        sequences(write(tmp_path / "empty.jsonl", [[], []]))


@EACH_PACKING
def test_seed_decides(corpus: str, packing: str) -> None:
    first = take(corpus, 30, packing=packing)
    same(first, take(corpus, 30, packing=packing))
    assert not np.array_equal(first["tokens"], take(corpus, 30, seed=1, packing=packing)["tokens"])
    take(corpus, 1, seed=2**40, packing=packing)


@EACH_PACKING
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_one_order(corpus: str, packing: str, count: int) -> None:
    parts = [take(corpus, 11, packing=packing, process=(index, count)) for index in range(count)]
    with pytest.raises(ValueError, match="process_index"):
        sequences(corpus, process=(count, count))
    same(interleaved(parts), take(corpus, 11 * count, packing=packing))


@EACH_PACKING
@settings(deadline=None, max_examples=10)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda lengths: max(lengths) > 1),
    before=st.lists(st.integers(1, 5), max_size=3),
    old=st.integers(1, 3),
    new=st.integers(1, 3),
)
def test_resume_anywhere_on_any_number_of_processes(
    tmp_path_factory: pytest.TempPathFactory, packing: str, lengths: list[int], before: list[int], old: int, new: int
) -> None:
    source = write(tmp_path_factory.mktemp("resume") / "a.jsonl", documents(lengths))
    changes: dict[str, Any] = {"packing": packing, "append_eos": len(lengths) % 2 == 0}
    states = []
    for index in range(old):
        iterator = sequences(source, process=(index, old), **changes)
        for size in before:
            iterator.next_batch(size)
        states.append(json.loads(json.dumps(iterator.get_state())))
        iterator.close()
    assert all(state == states[0] for state in states)
    assert states[0]["sequences"] == old * sum(before)
    parts = []
    for index in range(new):
        iterator = sequences(source, process=(index, new), **changes)
        iterator.set_state(states[0])
        assert iterator.get_state() == states[0]
        parts.append(joined([iterator.next_batch(2), iterator.next_batch(3)]))
        iterator.close()
    whole = take(source, old * sum(before) + 5 * new, **changes)
    same(interleaved(parts), {key: value[old * sum(before) :] for key, value in whole.items()})


@EACH_PACKING
def test_state_is_of_what_was_handed_out(corpus: str, packing: str) -> None:
    iterator = sequences(corpus, packing=packing)
    states, batches = [], []
    for _ in range(3):
        states.append(iterator.get_state())
        batches.append(iterator.next_batch(4))
    for turn in (2, 0, 1):
        iterator.set_state(states[turn])
        same(iterator.next_batch(4), batches[turn])
    iterator.close()
    same(iterator.next_batch(4), batches[2])


def test_states_that_do_not_fit(corpus: str) -> None:
    iterator = sequences(corpus, packing="packed")
    state = iterator.get_state()
    for wrong in ({}, {**state, "offset": -1}, {**state, "sequences": "1"}):
        with pytest.raises(CheckpointError, match=r"takes whole numbers sequences, document, offset\. Resume"):
            iterator.set_state(wrong)
    with pytest.raises(CheckpointError, match=r"is of packing 'random_span', the run uses 'packed'\. Set data.packing"):
        iterator.set_state({**state, "packing": "random_span"})


@EACH_PACKING
def test_memory_of_documents_changes_nothing(corpus: str, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(corpus, 40, packing=packing)
    for room in (0, 12):
        monkeypatch.setattr(documents_module, "KEPT_TOKENS", room)
        same(take(corpus, 40, packing=packing), expected)


@pytest.mark.parametrize("packing", ["random_span", "consecutive_spans"])
def test_a_span_from_within_a_document_begins_without_the_token(corpus: str, packing: str) -> None:
    tokenizer = words_with_bos(by_itself=True)
    starts = {text[0] for text in documents(LENGTHS)}
    settings_ = config(corpus, prepend_bos="document_start", packing=packing)
    rows = training_sequences(settings_, tokenizer, seed=0).next_batch(200)["tokens"]
    begun = rows[:, 0] == 999
    assert 0 < begun.sum() < len(rows)
    assert set(rows[begun, 1].tolist()) <= starts
    if packing == "consecutive_spans":
        assert not set(rows[~begun, 0].tolist()) & starts
    assert not np.any(rows[:, 1:] == 999)
    held_out = next(validation_batches(settings_, tokenizer, batch_size=60))
    assert held_out["tokens"][0].tolist() == [999, 2, 3, 4, 5]
    assert np.sum(held_out["tokens"] == 999) == len(LENGTHS)


@pytest.mark.parametrize("kept", [True, False])
@EACH_PACKING
def test_documents_that_begin_with_the_token_themselves(tmp_path: Path, packing: str, kept: bool) -> None:
    """The same sequences read directly and prepared, with the token that a text spells out once, or as it is."""
    tokenizer = words_with_bos(by_itself=True)
    plain, mixed = tmp_path / "plain.jsonl", tmp_path / "mixed.jsonl"
    write(plain, documents(LENGTHS))
    lines = plain.read_text().splitlines()
    mixed.write_text("".join(
        line.replace(': "', ': "<bos> ') + "\n" if number % 2 else line + "\n" for number, line in enumerate(lines)
    ))  # fmt: skip
    folder = tmp_path / "prepared"
    preparation.prepare([str(mixed)], tokenizer, "", folder, config(str(mixed)), shards=2, workers=1)
    if not kept:  # prepared before it was kept which documents begin so
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "begin"}))
        (folder / "begun.npy").unlink()

    def batch(source: Path, prepend_bos: str) -> Batch:
        given = config(str(source), packing=packing, prepend_bos=prepend_bos, cache_dir=str(tmp_path / "cache"))
        return training_sequences(given, tokenizer, seed=0).next_batch(60)

    for prepend_bos in ("auto", "always", "document_start"):
        expected = batch(plain, prepend_bos)
        same(batch(mixed, prepend_bos), expected)
        same(batch(folder, prepend_bos), expected)
    same(batch(folder, "never"), batch(mixed, "never"))
    assert np.any(batch(mixed, "never")["tokens"] == 999)


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


@pytest.mark.parametrize("packing", ["random_span", "packed"])
def test_a_broken_document_is_named_and_the_position_kept(
    tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are looked through when they are opened, so it breaks while it is being read."""
    path = Path(write(tmp_path / "a.jsonl", documents([4] * 12)))
    expected = take(str(path), 60, packing=packing)
    iterator = sequences(str(path), packing=packing)
    ordinary = formats.parse_record

    def broken(raw: bytes, where: str, start: int) -> Record:
        return ordinary(raw[:-3] if where.endswith("line 12") else raw, where, start)

    monkeypatch.setattr(formats, "parse_record", broken)
    taken: list[Batch] = []
    with pytest.raises(DataError, match=r"a\.jsonl, line 12: broken JSON"):
        taken.extend(iterator.next_batch(1) for _ in range(60))
    state = iterator.get_state()
    assert state["sequences"] == len(taken) < 20
    with pytest.raises(DataError, match=r"a\.jsonl, line 12"):
        iterator.next_batch(2)
    assert iterator.get_state() == state
    monkeypatch.undo()
    taken.append(iterator.next_batch(60 - len(taken)))
    same(joined(taken), expected)


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
    with pytest.raises(DataError, match=r"has 1000 tokens, but the model embeds only 999.*at least 1000"):
        check_vocabulary(TOKENIZER, 999)


# ------------------------------------------------------------------------------------------------- worker processes

SCRIPT = """
import json, sys
from pathlib import Path
from quietstar_jax.config import DataConfig
from quietstar_jax.data.pipeline import training_sequences
from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.errors import DataError

def main():
    arguments = json.loads(sys.argv[1])
    tokenizer, out = load_tokenizer(arguments["tokenizer"]), {}
    for packing, workers in (("random_span", 2), ("packed", 1)):
        config = DataConfig(train=(arguments["source"],), sequence_length=5, packing=packing, workers=workers)
        iterator = training_sequences(config, tokenizer, seed=0)
        iterator.set_state(arguments[packing])
        rows = iterator.next_batch(41)["tokens"].tolist()
        out[packing] = [rows, iterator.get_state()]
        iterator.close()
    config = DataConfig(train=(arguments["broken"],), sequence_length=5, workers=1)
    try:
        training_sequences(config, tokenizer, seed=0).next_batch(50)
    except DataError as error:
        out["error"] = str(error)
    Path(arguments["out"]).write_text(json.dumps(out))

if __name__ == "__main__":
    main()
"""


def test_worker_processes_from_a_script(corpus: str, tmp_path: Path) -> None:
    """Resumed with workers, the sequences, the state after them and the error are as without."""
    TOKENIZER.save(tmp_path / "tokenizer")
    broken = Path(write(tmp_path / "broken.jsonl", documents([4, 4])))
    broken.write_text(broken.read_text() + "{\n")
    expected: dict[str, Any] = {}
    arguments: dict[str, Any] = {"source": corpus, "tokenizer": str(tmp_path / "tokenizer"), "broken": str(broken)}
    for packing in ("random_span", "packed"):
        iterator = sequences(corpus, packing=packing)
        iterator.next_batch(3)
        state = iterator.get_state()
        expected[packing] = [iterator.next_batch(41)["tokens"].tolist(), iterator.get_state()]
        arguments |= {packing: state, "out": str(tmp_path / "out.json")}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(pipeline.__file__).parents[2])}
    subprocess.run([sys.executable, str(script), json.dumps(arguments)], check=True, timeout=300, env=environment)
    found = json.loads((tmp_path / "out.json").read_text())
    assert "broken.jsonl, line 3: broken JSON" in found.pop("error")
    assert found == expected


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


@EACH_PACKING
@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    size=st.integers(1, 4),
    limit=st.integers(0, 3),
    count=st.integers(1, 3),
)
def test_validation_is_everything_in_order(
    tmp_path_factory: pytest.TempPathFactory, packing: str, lengths: list[int], size: int, limit: int, count: int
) -> None:
    source = write(tmp_path_factory.mktemp("validation") / "a.jsonl", documents([1, *lengths]))
    settings_, sizes = config(source, packing=packing), {"batch_size": size, "batches": limit}
    expected = expected_rows([text for text in documents([1, *lengths]) if text], packing)[
        : limit * size * count or None
    ]
    parts = []
    for index in range(count):
        batches = list(validation_batches(settings_, TOKENIZER, **sizes, process_index=index, process_count=count))
        assert all(batch["tokens"].shape == (size, LENGTH) for batch in batches)
        assert len(batches) == -(-len(expected) // (size * count))
        parts.append(rows_of(iter(batches)))
        assert parts[-1] == expected[index::count]


def test_validation_of_the_embedded_corpus() -> None:
    tokenizer = load_tokenizer("synthetic")
    settings_ = DataConfig(sequence_length=32)
    first, again = (list(validation_batches(settings_, tokenizer, batch_size=4, batches=2)) for _ in range(2))
    same(joined(first), joined(again))
    assert joined(first)["mask"].any(axis=1).all()
    training = training_sequences(settings_, tokenizer, seed=0)
    assert training.next_batch(4)["mask"].any(axis=1).all()

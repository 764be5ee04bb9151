"""Every document, span or token once an epoch, counted by ids over processes that come and go."""

from __future__ import annotations

import collections
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quietstar_jax.data.pretokenized import write as preparation
from quietstar_jax.data_config import DataConfig
from tests.data.reading import lines, put
from tests.data.words import EOS, TOKENIZER, sequences

LENGTHS = [7, 12, 3, 1, 9, 4, 20, 5, 5, 2, 11, 6, 8, 1, 3, 17, 10]  # 17 documents, 124 tokens, 141 with their ends
MEMBERS = (1, 3, 4, 2, 4, 1)  # how many processes there are in each stretch of the run ...
BATCHES = (2, 1, 2, 3, 1, 9)  # ... and how many batches of two each of them takes


@pytest.fixture(params=["text", "prepared"])
def shards(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A folder of shards of uneven sizes; a document's first word is its id, the others are unique as well."""
    starts = np.cumsum([2, *LENGTHS])
    texts = [" ".join(map(str, range(a, a + n))) for a, n in zip(starts, LENGTHS, strict=False)]
    put(tmp_path / "c4" / "1.json.gz", gzip.compress(lines(texts[:9])))
    put(tmp_path / "c4" / "2.jsonl", lines(texts[9:10]))
    put(tmp_path / "c4" / "3.jsonl", lines(texts[10:]))
    if request.param == "text":
        return str(tmp_path / "c4")
    output = tmp_path / "tokens"
    preparation.prepare([str(tmp_path / "c4")], TOKENIZER, "", output, DataConfig(), shards=4, workers=1)
    return str(output)


def rows_of_a_run(source: str, **changes: Any) -> list[list[int]]:
    """The rows in their global order, over a run whose number of processes changes at every resume."""
    rows: list[list[int]] = []
    state = None
    for members, batches in zip(MEMBERS, BATCHES, strict=True):
        taken, states = [], []
        for index in range(members):
            iterator = sequences(source, process=(index, members), **changes)
            if state is not None:
                iterator.set_state(state)
            own = [iterator.next_batch(2) for _ in range(batches)]
            states.append(iterator.get_state())
            iterator.close()
            taken.append([row[mask].tolist() for b in own for row, mask in zip(b["tokens"], b["mask"], strict=True)])
        assert all(other == states[0] for other in states)
        state = states[0]
        rows += [row for together in zip(*taken, strict=True) for row in together]
    return rows


def counted(rows: list[list[int]]) -> collections.Counter[int]:
    return collections.Counter(token for row in rows for token in row if token != EOS)


def test_documents(shards: str) -> None:
    """random_span, spans as long as the documents: whole documents, each once an epoch."""
    rows = rows_of_a_run(shards, packing="random_span", sequence_length=24)
    per_epoch = len(LENGTHS)
    orders = []
    for epoch in range(len(rows) // per_epoch):
        of_epoch = rows[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert counted(of_epoch) == dict.fromkeys(range(2, 2 + sum(LENGTHS)), 1)
        orders.append([row[0] for row in of_epoch])
    assert len(orders) == 3
    assert len({tuple(order) for order in orders}) == len(orders)


def test_spans(shards: str) -> None:
    """consecutive_spans: every token once an epoch."""
    rows = rows_of_a_run(shards, packing="consecutive_spans", sequence_length=6)
    per_epoch = sum(-(-(length + 1) // 6) for length in LENGTHS)
    for epoch in range(len(rows) // per_epoch):
        of_epoch = rows[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert counted(of_epoch) == dict.fromkeys(range(2, 2 + sum(LENGTHS)), 1)
    assert len(rows) > 2 * per_epoch


def test_tokens(shards: str) -> None:
    """packed: every token once in each 141 of the stream."""
    rows = rows_of_a_run(shards, packing="packed", sequence_length=6)
    stream = [token for row in rows for token in row]
    per_epoch = sum(LENGTHS) + len(LENGTHS)
    for epoch in range(len(stream) // per_epoch):
        of_epoch = stream[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert counted([of_epoch]) == dict.fromkeys(range(2, 2 + sum(LENGTHS)), 1)
        assert of_epoch.count(EOS) == len(LENGTHS)
    assert len(stream) > 2 * per_epoch

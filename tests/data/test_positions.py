"""Positions in the data: resumed anywhere, on any number of processes and workers, after errors too."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar_jax.data import pipeline
from quietstar_jax.data.pipeline import Batch
from quietstar_jax.data.sources import formats
from quietstar_jax.data.sources.common import Record
from quietstar_jax.errors import CheckpointError, DataError
from tests.data.words import PACKINGS, TOKENIZER, documents, interleaved, joined, same, sequences, take, write


@PACKINGS
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


@PACKINGS
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
        with pytest.raises(CheckpointError, match=r"whole numbers sequences, document, offset"):
            iterator.set_state(wrong)
    with pytest.raises(CheckpointError, match=r"is of packing 'random_span', the run uses 'packed'\. .*data.packing"):
        iterator.set_state({**state, "packing": "random_span"})


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


SCRIPT = """
import json, sys
from pathlib import Path
from quietstar_jax.data_config import DataConfig
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

"""The shipped builders: from local files or the package `datasets` to array_record, and back as a source."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quietstar_jax.data.build import main
from quietstar_jax.errors import DataError
from tests.data.reading import opened, put, read
from tests.material import material


def build(name: str, data_dir: Path, **splits: object) -> None:
    main([name, "--data-dir", str(data_dir), *(f"--split={split}={files}" for split, files in splits.items())])


def texts(name: str, data_dir: Path, split: str = "train", key: str = "text") -> list[str]:
    return read(opened(f"tfds:{name}:{split}", data_dir=str(data_dir), text_key=key))


def json_lines(path: Path, rows: list[Any]) -> Path:
    return put(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def test_gsm8k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"{i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>.\n#### {i + 1}"} for i in range(12)]
    build(
        "gsm8k", tmp_path, train=json_lines(tmp_path / "a.jsonl", rows), test=json_lines(tmp_path / "b.jsonl", rows[:1])
    )
    assert texts("gsm8k", tmp_path) == [f"{row['question']}\n{row['answer']}" for row in rows]
    assert texts("gsm8k", tmp_path, "test", "short_answer") == ["1"]
    assert "12 examples: data.data_dir" in capsys.readouterr().out
    assert "tensorflow" not in sys.modules


def test_commonsense_qa_in_both_forms(tmp_path: Path) -> None:
    choices = [{"label": "A", "text": "bank"}, {"label": "B", "text": "library"}]
    theirs = {"id": "x", "answerKey": "B", "question": {"stem": "Where?", "choices": choices, "question_concept": "q"}}
    hub = {"id": "y", "question": "Where?", "choices": {"label": ["A", "B"], "text": ["bank", "library"]}}
    build("commonsense_qa", tmp_path, train=json_lines(tmp_path / "a.jsonl", [theirs, {**hub, "answerKey": ""}]))
    question = "Where?\n(A) bank\n(B) library"
    assert texts("commonsense_qa", tmp_path) == [f"{question}\nAnswer: (B)", question]


def test_open_web_math_of_parquet_and_of_datasets(tmp_path: Path) -> None:
    table = pa.table({"url": ["u", "v"], "text": ["$x$", "two"], "date": [1, 2], "metadata": ["{}", "{}"]})
    pq.write_table(table, tmp_path / "train-00000.parquet")
    build("open_web_math", tmp_path / "files", train=tmp_path / "*.parquet")
    assert texts("open_web_math", tmp_path / "files") == ["$x$", "two"]
    assert texts("open_web_math", tmp_path / "files", key="url") == ["u", "v"]
    pytest.importorskip("datasets")
    json_lines(tmp_path / "hub" / "train.jsonl", [{"text": "a", "url": "u"}])
    build("open_web_math", tmp_path / "hub_out", train=f"hf:{tmp_path}/hub:train")
    assert texts("open_web_math", tmp_path / "hub_out") == ["a"]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--split train is not NAME=FILES"):
        main(["gsm8k", "--data-dir", str(tmp_path), "--split", "train"])
    with pytest.raises(DataError, match="There is no file or folder"):
        build("gsm8k", tmp_path, train=tmp_path / "absent.jsonl")
    wrong = json_lines(tmp_path / "a.jsonl", [{"question": "1?", "answer": "1"}, {"text": "x"}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: .*gsm8k: field 'question' is missing"):
        build("gsm8k", tmp_path, train=wrong)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: broken JSON"):
        build("gsm8k", tmp_path, train=put(tmp_path / "a.jsonl", wrong.read_bytes()[:-4]))
    with pytest.raises(DataError, match=r"a\.txt: .*gsm8k: field 'question' is missing"):
        build("gsm8k", tmp_path, train=put(tmp_path / "a.txt", b"x"))


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [("gsm8k", "gsm8k/test.jsonl", 1319), ("commonsense_qa", "commonsenseqa/dev_rand_split.jsonl", 1221)],
)
def test_real_sets(tmp_path: Path, name: str, file: str, count: int) -> None:
    build(name, tmp_path, train=material(f"data/{file}"))
    assert len(texts(name, tmp_path)) == count

"""The shipped builders: from local files or the package `datasets` to array_record, and back as a source."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quietstar_jax.data.build import main
from quietstar_jax.data.builders.gsm8k_text import rewrite
from quietstar_jax.data.sources import read_all
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


@pytest.mark.parametrize(
    ("published", "plain", "results"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.", "Natalia sold 24 clips in May.", ["24"]),
        ("earns 12/60 = $<<12/60=0.2>>0.2 per minute.\n48+24=<<48+24=72>>72 in all",
         "earns $0.2 per minute.\n72 in all", ["0.2", "72"]),
        ("He has 10. 80,000*1.5 = $<<80000*1.5=120000>>120,000, of which (2/5)*1000 x 20% = <<0.4*200=80>>80 go",
         "He has 10. $120,000, of which 80 go", ["120,000", "80"]),
        ("20 apples + 30 apples = <<20+30=50>>50 apples", "20 apples + 30 apples = 50 apples", []),  # has words
        ("8 hours / 4 = <<8/4=2>>2 hours and 5-7 = <<5-7=-2>>-2", "8 hours / 4 = 2 hours and -2", ["-2"]),
        ("12 marigolds x $3 = $<<12*3=36>>36", "12 marigolds x $3 = $36", []),
        ("24 questions X 75/100 = <<24*75/100=18>>18", "24 questions X 75/100 = 18", []),
        ("5 apples times 2 = <<5*2=10>>10, times 3+1 = <<5*4=20>>20", "5 apples times 2 = 10, times 3+1 = 20", []),
        ("8-2=<<8-2=6>>6 times\n9-2=<<9-2=7>>7 times", "6 times\n7 times", ["6", "7"]),
        ("half of 20 = <<20/2=10>>10, a total of 3 x 4 = <<3*4=12>>12", "half of 20 = 10, a total of 12", ["12"]),
        ("3(34)=<<3*34=102>>102 and 63 − 48 = <<63-48=15>>15", "3(34)=102 and 15", ["15"]),
        ("half of 5 is <<5/2=2.5>>.", "half of 5 is .", []),
        ("no calculation", "no calculation", []),
    ],
)  # fmt: skip
def test_formulas_and_calculations_are_left_out(published: str, plain: str, results: list[str]) -> None:
    text, spans = rewrite(published, written_out=False)
    assert text == plain
    assert [text[start:end] for start, end in spans] == results
    written_out, none = rewrite(published, written_out=True)
    assert re.sub("( <<[^>]*>>)(?= )|<<[^>]*>>", "", f"A: {written_out}") == f"A: {plain}"
    assert written_out.count("<<") == published.count("<<")
    assert none == []


@pytest.mark.parametrize(
    ("published", "written_out"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips", "Natalia sold <<48/2=24>> 24 clips"),
        ("He pays 5*3=$<<5*3=15>>15 (or $20-5=$<<20-5=15>>15).", "He pays <<5*3=15>> $15 (or <<20-5=15>> $15)."),
        ("4+4=<<4+4=8>>8\n8+1=<<8+1=9>>9 a day", "<<4+4=8>> 8\n<<8+1=9>>9 a day"),
        ("half of 5 is <<5/2=2.5>>.", "half of 5 is <<5/2=2.5>>."),
    ],
)
def test_a_calculation_stands_before_the_word_with_its_result(published: str, written_out: str) -> None:
    assert rewrite(published, written_out=True)[0] == written_out


def test_gsm8k_text(tmp_path: Path) -> None:
    rows = [
        {"question": f"{i} + 1?", "answer": f"It is {i} + 1 = <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}
        for i in range(400)
    ]
    file = json_lines(tmp_path / "a.jsonl", rows)
    for folder in ("one", "two"):
        build("gsm8k_text", tmp_path / folder, train=file, test=file)
    train = texts("gsm8k_text", tmp_path / "one")
    assert train == texts("gsm8k_text", tmp_path / "two")
    written_out = [text for text in train if "<<" in text]
    assert 160 < len(written_out) < 240
    assert "Q: 7 + 1?\nA: It is 8.\n#### 8" in texts("gsm8k_text", tmp_path / "one", "test")
    for split in ("train", "test"):
        for number, record in enumerate(
            read_all(f"tfds:{tmp_path}/one/gsm8k_text/3.0.0:{split}", "texts")
        ):  # as evaluation reads them
            text, spans, start = (record.fields[name] for name in ("text", "spans", "scored_from"))
            assert text[start:].startswith("It is ")
            assert [text[a:b] for a, b in spans] == ([] if "<<" in text else [str(number + 1)])
            assert split == "train" or "<<" not in text


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
    [
        ("gsm8k", "gsm8k/test.jsonl", 1319),
        ("gsm8k_text", "gsm8k/test.jsonl", 1319),
        ("commonsense_qa", "commonsenseqa/dev_rand_split.jsonl", 1221),
    ],
)
def test_real_sets(tmp_path: Path, name: str, file: str, count: int) -> None:
    build(name, tmp_path, train=material(f"data/{file}"))
    assert len(texts(name, tmp_path)) == count

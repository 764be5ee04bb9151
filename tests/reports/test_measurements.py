"""The page of measurements at several steps, from the files that `evaluate --output` writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.report import main
from quietstar_jax.reports.measurements import read_measurements
from tests.reports.test_follow import rows

CONFIG = {"control": "", "reach": 1, "thought_length": 0}
BASE = "models/base"
RECORDS = '{"task": "x", "data": "", "data_hash": "", "config": 3, "model": {"checkpoint": "a", "step": "1"}}'


def a_result(folder: Path, run: str, step: int | None, without: float, after: float | None = None, **more: Any) -> Path:
    """Writes a result of 10 questions; without `after`, one of a model that does not think."""

    def values(mean: float) -> dict[str, Any]:
        return {"official_probability": mean, "official_probability_interval": [mean - 0.01, mean + 0.01]}

    result = {
        "task": "gsm8k", "data": "test.jsonl", "data_hash": "a" * 64, "questions": 10, "config": CONFIG,
        "model": {"checkpoint": run, "step": step}, "without_thoughts": values(without),
    }  # fmt: skip
    if after is not None:
        gain = after - without
        difference = {"difference": gain, "p_value": 0.04, "interval": [gain - 0.02, gain + 0.02]}
        result |= {"with_thoughts": values(after), "comparison": {"official_probability": difference}}
    path = folder / f"{run.replace('/', '_')}_{step}_{more.get('task', '')}.json"
    path.write_text(json.dumps(result | more))
    return path


def test_a_run_with_thoughts_beside_plain_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        a_result(tmp_path, "runs/thoughts", 40, 0.12, 0.18), a_result(tmp_path, "runs/thoughts", 20, 0.11, 0.14),
        a_result(tmp_path, "runs/plain", 40, 0.13), a_result(tmp_path, "runs/plain", 20, 0.105),
        a_result(tmp_path, BASE, None, 0.1),
    ]  # fmt: skip
    page = tmp_path / "page.html"
    main(["--results", *map(str, files), "--output", str(page), "--figures", str(tmp_path / "figures")])
    html = page.read_text()
    assert rows(html) == [
        ["base (no steps)", "0", "10.00 (9.00 .. 11.00)", "", "", ""],
        ["plain", "20", "10.50 (9.50 .. 11.50)", "", "", ""],
        ["plain", "40", "13.00 (12.00 .. 14.00)", "", "", ""],
        ["thoughts", "20", "11.00 (10.00 .. 12.00)", "14.00 (13.00 .. 15.00)", "+3.00 (1.00 .. 5.00)", "0.04"],
        ["thoughts", "40", "12.00 (11.00 .. 13.00)", "18.00 (17.00 .. 19.00)", "+6.00 (4.00 .. 8.00)", "0.04"],
    ]
    curves = re.findall(r'<polyline class="([^"]*)" points="([^"]*)"><title>([^<]*)', html)
    assert [(kind, name) for kind, _, name in curves] == [
        ("smooth dashed run0", "plain, without thoughts"), ("smooth dashed run1", "thoughts, without thoughts"),
        ("smooth run1", "thoughts, with thoughts"),
    ]  # fmt: skip
    points = [[tuple(map(float, point.split(","))) for point in of.split()] for _, of, _ in curves]
    assert {len(of) for of in points} == {3}
    assert len({of[0] for of in points}) == 1  # all begin at the model before training
    assert points[2][2][1] < points[1][2][1]  # and 18 % is above 12 %
    (drawn,) = (tmp_path / "figures").iterdir()
    assert drawn.name == "gsm8k_official_metric_probability_by_step.svg"
    assert "test.jsonl, 10 questions" in html
    assert str(page) in capsys.readouterr().out


def test_tasks_and_groups_of_tokens(tmp_path: Path) -> None:
    def groups(mean: float) -> dict[str, Any]:
        return {name: {"nats_per_token": mean, "nats_per_token_interval": [0.5, 3]} for name in ("spans", "others")}

    change = {"nats_per_token": {"difference": -0.5, "interval": None, "p_value": None}}
    spans = a_result(
        tmp_path, "a", 5, 0, task="spans", texts=3, tokens={"spans": 4, "others": 9}, without_thoughts=groups(2.0),
        with_thoughts=groups(1.5), comparison=dict.fromkeys(("spans", "others"), change),
    )  # fmt: skip
    found = read_measurements([spans, a_result(tmp_path, "a", 5, 0.1)])
    assert [one.task for one in found] == ["spans", "gsm8k"]
    (one,) = found[0].measurements
    assert one.values["other tokens, nats per token"] == {
        "without_thoughts": (2.0, [0.5, 3], None), "with_thoughts": (1.5, [0.5, 3], None)
    }  # fmt: skip
    assert one.differences == {
        f"{name}, nats per token": (-0.5, None, None) for name in ("tokens in spans", "other tokens")
    }


def test_legal_results_that_are_unusual(tmp_path: Path) -> None:
    """Values that are equal, infinite, or measured in one mode or of one model only, and many lines."""
    text = {"accuracy": 0.0, "nats_per_token": 2.0, "bits_per_byte": float("inf")}
    more = {"task": "language_modeling", "questions": 3, "with_thoughts": text}
    files = [a_result(tmp_path, f"runs/run{i}", 5, 0, **more, without_thoughts=text) for i in range(8)]
    base = a_result(tmp_path, BASE, None, 0, **more)
    result = json.loads(base.read_text())
    result["with_thoughts"]["official_probability"] = 0.5  # no other result has it
    del result["without_thoughts"]
    base.write_text(json.dumps(result))
    page = tmp_path / "page.html"
    main(["--results", *map(str, files), str(base), "--output", str(page)])
    html = page.read_text()
    lines = re.findall('<polyline[^>]*points="([^"]*)"', html)
    assert len(lines) == 2 * 2 * 16  # two metrics are drawn, each line with its legend
    legend = [line.split(",")[-1] for line in lines if len({point.split(",")[1] for point in line.split()}) == 1]
    assert len({*legend}) == 18  # 16 rows of a legend, and the equal values of each chart
    assert ["base (no steps)", "0", "", "0.00", "", ""] in rows(html)
    assert ["run0", "5", "inf", "inf", "", ""] in rows(html)
    main(["--results", str(files[0]), "--output", str(page)])
    assert re.findall('<circle class="([^"]*)"', page.read_text()) == 2 * ["smooth dashed run0", "smooth run0"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data_hash": "b" * 64}, "differ in texts"),
        ({"questions": 9}, "differ in numbers of texts .10 questions and 9 questions.*--max-length"),
        ({"tokens": 9}, "differ in tokens"),
        ({"config": CONFIG | {"seed": 4}}, r"differ in seed \(0 and 4\)"),
        ({"config": CONFIG | {"reach": 4}}, r"differ in reach \(1 and 4\)"),
        ({"think": "every:2"}, "differ in think"),
        ({}, "both measured gsm8k for step 5 of a"),
        ({"model": {"checkpoint": "/x/a", "step": 5}, "checkpoint_hash": "h"}, None),  # variants that share a phase
        ({"model": {"checkpoint": "a/checkpoints", "step": 5}}, "both measured gsm8k for step 5 of a"),
        ({"model": {"checkpoint": "b", "step": None}}, None),
    ],
)
def test_results_that_cannot_be_compared(tmp_path: Path, change: dict[str, Any], said: str | None) -> None:
    (tmp_path / "2").mkdir()
    files = [a_result(tmp_path, "a", 5, 0.1, 0.2, checkpoint_hash="h")]
    files += [a_result(tmp_path / "2", "a", 5, 0.1, 0.2, **change)]
    command = ["--results", *map(str, files), "--output", str(tmp_path / "page.html")]
    if said is None:
        return main(command)
    with pytest.raises(ConfigError, match=said) as error:
        main(command)
    assert "--results" in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_settings_of_thoughts_do_not_separate_a_model_without_them(tmp_path: Path) -> None:
    think = {"think": "every:2", "config": CONFIG | {"reach": 4}}
    (one,) = read_measurements([a_result(tmp_path, "a", 5, 0.1, 0.2, **think), a_result(tmp_path, BASE, None, 0.1)])
    assert one.about == "test.jsonl, 10 questions, think every:2, reach 4"


def test_names_of_runs_in_different_places(tmp_path: Path) -> None:
    (found,) = read_measurements([a_result(tmp_path, name, 5, 0.1) for name in ("/data/run", "data/run")])
    assert {one.run for one in found.measurements} == {"/data/run", "data/run"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model": 3}', '{"model": {"checkpoint": "a", "step": 1}}', RECORDS, "\xff"]
)
def test_files_that_are_no_results(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match="not a result of `evaluate --output`"):
        read_measurements([path])
    with pytest.raises(DataError, match="cannot be read"):
        read_measurements([tmp_path / "missing.json"])


def test_too_many_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="9 runs"):
        read_measurements([a_result(tmp_path, f"run{i}", 5, 0.1) for i in range(9)])

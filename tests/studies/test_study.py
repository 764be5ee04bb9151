"""Studies: every run once, resumed where they stopped, compared with numbers worked by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from quietstar_jax.config import from_config_dict
from quietstar_jax.errors import ConfigError
from quietstar_jax.studies.study import Study, command, load_study, run_study
from quietstar_jax.studies.table import compare, format_table

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "configs/studies").glob("*.py"))

TINY = """
from pathlib import Path
from tests.training.tiny import tiny_config_dict

def get_config():
    return tiny_config_dict(Path("set on the command line"))
"""
STUDY = """
from quietstar_jax.studies.study import Study

def get_study():
    return Study(base={base!r}, baseline="as_it_is", seeds=(0, 1), metrics=("loss_with_thoughts", "step"),
                 variants={{"as_it_is": {{}}, "shorter": {{"phases[1].steps": 1}}, "broken": {{"no_such_setting": 1}}}})
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "quietstar_jax.study", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_runs_what_is_missing_and_reports_what_failed(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    study = tmp_path / "study.py"
    study.write_text(STUDY.format(base=str(tmp_path / "tiny.py")))
    first = run("--study", str(study), "--workdir", str(tmp_path / "runs"), "--only", "shorter")
    assert first.returncode == 0, first.stdout + first.stderr
    assert json.loads((tmp_path / "runs/shorter/seed_1/summary.json").read_text())["step"] == 4
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")}
    assert len(written) == 4

    second = run("--study", str(study), "--workdir", str(tmp_path / "runs"))
    assert second.returncode == 1
    assert "broken, seed 0 FAILED with status 2" in second.stdout
    assert "no_such_setting" in (tmp_path / "runs/broken/seed_0/log.txt").read_text()
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")}
    assert "| shorter | 2 |" in (tmp_path / "runs/table.md").read_text()


def test_comparison_by_hand() -> None:
    results = {
        "base": {0: {"x": 1.0}, 1: {"x": 2.0}, 2: {"x": 6.0}},
        "other": {0: {"x": 2.0}, 1: {"x": 4.0}, 2: {"x": 9.0}, 3: {"x": 1.0, "y": 5.0}},
    }
    base, other, alone = compare(results, "base", ("x", "y"))
    assert (base["mean"], base["difference"], base["p_value"]) == (3.0, None, None)
    assert base["standard_error"] == pytest.approx(math.sqrt(7.0) / math.sqrt(3))  # variance (4 + 1 + 9) / 2
    assert (other["runs"], other["mean"], other["difference"]) == (4, 4.0, 2.0)
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) on 2 degrees of freedom; p = 1 - t / sqrt(2 + t^2).
    t = 2 * math.sqrt(3)
    assert other["p_value"] == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert (alone["runs"], alone["standard_error"], alone["difference"]) == (1, None, None)
    assert "| other | 4 | 4.0000 ± " in format_table([base, other, alone], ("x", "y"))


def test_equal_results_are_no_difference() -> None:
    results = {"base": {0: {"x": 1.0}, 1: {"x": 2.0}}, "same": {0: {"x": 1.0}, 1: {"x": 2.0}}}
    assert compare(results, "base", ("x",))[1]["p_value"] == 1.0


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_variant_of_a_shipped_study_is_a_valid_configuration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(str(path))
    import runpy

    for variant in study.variants:
        config: ConfigDict = runpy.run_path(study.base)["get_config"]()
        for name, value in study.variants[variant].items():
            target, *rest = name.replace("[", ".").replace("]", "").split(".")
            node = config[target]
            for part in rest[:-1]:
                node = node[int(part)] if part.isdigit() else node[part]
            if rest:
                assert rest[-1] in node, f"{variant}: {name}"
                node[rest[-1]] = value
        from_config_dict(config)


def test_bad_studies(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no study"):
        load_study(str(tmp_path / "missing.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="no function get_study"):
        load_study(str(tmp_path / "empty.py"))
    lost = "from quietstar_jax.studies.study import Study\ndef get_study():\n    return Study('x.py', {'a': {}}, 'b')\n"
    (tmp_path / "lost.py").write_text(lost)
    with pytest.raises(ConfigError, match="the baseline 'b' is none of the variants a"):
        load_study(str(tmp_path / "lost.py"))


def test_command_line_of_a_run(tmp_path: Path) -> None:
    study = Study("base.py", {"a": {"phases[1].steps": 3}}, "a")
    line = command(study, "a", 7, tmp_path)
    assert line[1:5] == ["-m", "quietstar_jax.train", "--config", "base.py"]
    assert line[5:] == [f"--config.workdir={tmp_path}", "--config.seed=7", "--config.logging.progress_bar=False",
                        "--config.phases[1].steps=3"]  # fmt: skip
    assert run_study(dataclasses.replace(study, seeds=()), tmp_path, print) == {"a": {}}

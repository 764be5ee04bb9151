"""What a study says, and comparisons with numbers worked by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from quietstar_jax.errors import ConfigError
from quietstar_jax.io import write_json
from quietstar_jax.settings import to_mapping
from quietstar_jax.studies.runner import PlannedRun, plan
from quietstar_jax.studies.study import Study, command, configuration, load_study
from quietstar_jax.studies.table import compare, format_table, paired_test
from quietstar_jax.thoughts.flops import phase_flops
from quietstar_jax.training.summary import config_hash

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "configs/studies").glob("*.py"))

TINY = """
from pathlib import Path
from tests.training.tiny import tiny_config_dict

def get_config():
    return tiny_config_dict(Path("set on the command line"))
"""


def test_comparison_by_hand() -> None:
    results = {
        "base": {0: {"x": 1.0}, 1: {"x": 2.0}, 2: {"x": 6.0}},
        "other": {0: {"x": 2.0}, 1: {"x": 4.0}, 2: {"x": 9.0}, 3: {"x": 1.0, "y": 5.0}},
    }
    base, other, alone = compare(results, "base", ("x", "y"))
    assert (base["mean"], base["difference"], base["p_value"]) == (3.0, None, None)
    assert base["standard_error"] == pytest.approx(math.sqrt(7.0) / math.sqrt(3))  # variance (4 + 1 + 9) / 2
    assert (other["runs"], other["mean"], other["difference"]) == (4, 4.0, 2.0)
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3) on 2 degrees of freedom; p = 1 - t / sqrt(2 + t^2), and half a 95 %
    # interval is t(0.975) = 0.95 sqrt(2 / (1 - 0.95^2)) times 1 / sqrt 3.
    t, half = 2 * math.sqrt(3), 0.95 * math.sqrt(2 / (1 - 0.95**2)) / math.sqrt(3)
    assert other["pairs"] == 3
    assert other["p_value"] == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert (other["low"], other["high"]) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert (alone["runs"], alone["standard_error"], alone["difference"]) == (1, None, None)
    table = format_table([base, other, alone], ("x", "y"), "base")
    assert "| other | 4 | 4.0000 ± " in table
    assert ", 3 pairs) | 5.0000 |" in table


def test_differences_without_scatter() -> None:
    results = {"base": {0: {"x": 1.0}, 1: {"x": 2.0}}, "same": {0: {"x": 1.0}, 1: {"x": 2.0}}}
    assert compare(results, "base", ("x",))[1]["p_value"] == 1.0
    results["shifted"] = {0: {"x": 1.3}, 1: {"x": 2.3}}
    shifted = compare(results, "base", ("x",))[2]
    assert shifted["difference"] == pytest.approx(0.3)
    assert (shifted["p_value"], shifted["low"]) == (None, None)
    assert paired_test(np.array([0.5]))["p_value"] is None


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_variant_of_a_shipped_study_is_a_valid_configuration(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(str(path))
    for variant in study.variants:
        found = configuration(study, variant, 5, tmp_path)
        assert (found.seed, found.workdir) == (5, str(tmp_path))


def test_plain_training_of_equal_flops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study("configs/studies/controls.py")

    def cost(variant: str, **changes: int) -> float:
        config = configuration(study, variant, 0, tmp_path)
        first = dataclasses.replace(config.phases[0], **changes)
        return sum(phase_flops(config, phase) for phase in (first, *config.phases[1:]))

    steps = configuration(study, "plain_equal_flops", 0, tmp_path).phases[0].steps
    assert cost("plain_equal_flops", steps=steps - 1) < cost("thoughts") <= cost("plain_equal_flops")


def test_bad_studies(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no file"):
        load_study(str(tmp_path / "missing.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="no function get_study"):
        load_study(str(tmp_path / "empty.py"))
    lost = "from quietstar_jax.studies.study import Study\ndef get_study():\n    return Study('x.py', {'a': {}}, 'b')\n"
    (tmp_path / "lost.py").write_text(lost)
    with pytest.raises(ConfigError, match="the baseline 'b' is not one of the variants a"):
        load_study(str(tmp_path / "lost.py"))


def test_bad_variants_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    variants = {
        "unknown": {"phases[1].no_such_setting": 1},
        "far": {"phases[7].steps": 1},
        "bad": {"thought.mixing": "x"},
    }
    study = Study(str(tmp_path / "tiny.py"), {"fine": {}} | variants, "fine")
    assert configuration(study, "fine", 0, tmp_path).seed == 0
    for variant, named in zip(
        variants, ("no_such_setting", r"phases\[7\]", "config.thought.mixing is 'x'"), strict=True
    ):
        with pytest.raises(ConfigError, match=f"Variant '{variant}' .*cannot be run.*(\n.*)*{named}"):
            configuration(study, variant, 0, tmp_path)


def test_command_line_of_a_run(tmp_path: Path) -> None:
    study = Study("base.py", {"a": {"phases[1].steps": 3}}, "a")
    line = command(study, "a", 7, tmp_path)
    assert line[1:5] == ["-m", "quietstar_jax.train", "--config", "base.py"]
    assert line[5:] == [f"--config.workdir={tmp_path}", "--config.seed=7", "--config.logging.progress_bar=False",
                        "--config.checkpoint.keep_phase_ends=True", "--config.phases[1].steps=3"]  # fmt: skip


def test_a_result_belongs_to_the_configuration_that_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(TINY)

    def planned(**settings: object) -> PlannedRun:
        return plan(Study(str(tmp_path / "tiny.py"), {"a": settings}, "a", seeds=(0,)), tmp_path)[0]

    first = planned()
    first.workdir.mkdir(parents=True)
    write_json(first.workdir / "summary.json", {"step": 7, "config_hash": config_hash(first.config)})
    assert first.summary is not None
    assert planned(**{"logging.every_steps": 3, "mesh.fsdp": 2}).summary is not None  # changes no figure
    for changed in (planned(**{"phases[1].steps": 400}), planned(**{"evaluation.batches": 5})):
        # As after a kill: training has begun with the new configuration, and the old summary is still there.
        write_json(first.workdir / "config.json", {"config": to_mapping(changed.config)})
        assert changed.summary is None
    for text in ("{}", "[]", "{", '{"step": 7}', "null"):
        (first.workdir / "summary.json").write_text(text)
        assert first.summary is None

"""Adapters together with a thinking gate, through every command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from quietstar_jax import evaluate, generate
from quietstar_jax.checkpoint.run_checkpoint import open_run
from quietstar_jax.config import Config
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.hf.names import Target
from quietstar_jax.models.adapters import is_adapter
from quietstar_jax.models.parameters import is_gate
from quietstar_jax.training.loop import train
from quietstar_jax.training.setup import first_state, prepare
from tests.training.adapted import adapted_config, write_base

FOLDERS = ("run", "merged")
TEXT = "sum 1 +7 +3 +4 +2 +5 ask"


def config(folder: Path, workdir: str, steps: int) -> Config:
    """Thoughts from the first step on; a head that is not zero, so that the gate and all maps learn from it."""
    config = adapted_config(folder / workdir, folder / "base", thought__gate=True, data__validation=())
    thoughts = dataclasses.replace(config.phases[1], steps=steps)
    return dataclasses.replace(config, phases=(thoughts,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, `run`, which was stopped after two of its four steps and resumed, `whole`, and the export of `run`."""
    folder = tmp_path_factory.mktemp("adapted_gate")
    write_base(folder / "base")
    for workdir, steps in (("run", 2), ("run", 4), ("whole", 4)):
        train(config(folder, workdir, steps))
    prepare(config(folder, "run", 4)).tokenizer.save(folder / "base")
    export(folder / "run", folder / "merged", ExportOptions(think="gate:-0.1"))
    (folder / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    return folder


@pytest.mark.slow
def test_the_gate_and_the_adapters_learn_and_resume(folder: Path) -> None:
    run, whole = (open_run(folder / name).parameters for name in ("run", "whole"))
    first = first_state(prepare(config(folder, "other", 4))).weights
    learned = [name for name in run.shapes if is_gate(name) or is_adapter(name)]
    assert sum(map(is_gate, learned)) == 3
    for name in learned:
        found, expected = (one.read(Target(name, one.shapes[name])) for one in (run, whole))
        np.testing.assert_array_equal(found, expected, err_msg=name)
        assert not np.array_equal(found, first[name]), f"{name} has not learned"


@pytest.mark.parametrize("think", [None, "gate:-0.2", "gate:0.5"])
def test_the_export_thinks_where_the_run_does(folder: Path, capsys: pytest.CaptureFixture[str], think: str) -> None:
    texts = []
    for name in FOLDERS:
        options = ["--think", think or "gate:-0.1", "--max-tokens", "6", "--show-thoughts"]
        given = options[2:] if name == "merged" and think is None else options  # the export recommends its own policy
        generate.main(["--checkpoint", str(folder / name), "--prompt", TEXT, *given])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert ("[" in texts[0]) == (think != "gate:0.5")


def test_the_front_of_the_export_is_that_of_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fronts = []
    for name in FOLDERS:
        options = ["--data", str(folder / "text.jsonl"), "--batch-size", "2", "--quiet", "--think-front", "--json"]
        evaluate.main(["--checkpoint", str(folder / name), "--task", "language_modeling", *options])
        fronts.append(json.loads(capsys.readouterr().out.splitlines()[-1])["front"]["policies"])
    ours, exported = fronts
    assert list(ours) == list(exported) == ["random", "entropy", "margin", "gate", "start", "entropy_band"]
    for policy, front in ours.items():
        for name in ("thinking_rate", "nats_per_token", "right"):
            values = [[point[name] for point in one["points"]] for one in (front, exported[policy])]
            np.testing.assert_allclose(*values, rtol=1e-4, err_msg=f"{policy}: {name}")

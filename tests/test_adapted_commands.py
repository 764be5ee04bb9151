"""A run with adapters through every command: the same figures, texts and pages as its merged export."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax import evaluate, generate, report
from quietstar_jax.checkpoint.checkpoints import Checkpoints
from quietstar_jax.checkpoint.run_checkpoint import open_run
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.hf.names import Target
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.models.adapters import is_adapter
from quietstar_jax.studies import runner
from quietstar_jax.studies.results import collect
from quietstar_jax.studies.runner import plan, run_study
from quietstar_jax.studies.study import Study
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.evaluation import make_token_scorer
from quietstar_jax.training.loop import train
from quietstar_jax.training.setup import first_state, prepare
from tests.hf.runs import with_random_thoughts
from tests.training.adapted import adapted_config, write_base

FOLDERS = ("run", "merged")
TEXT = "sum 1 +7 +3 +4 +2 +5 ask"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a run with random adapters and thoughts on it, and the run's merged export."""
    folder = tmp_path_factory.mktemp("adapted")
    run = prepare(adapted_config(folder / "run", write_base(folder / "base"), model__frozen_dtype="float32"))
    state, draw = first_state(run), np.random.default_rng(0)
    drawn = {name: jnp.float32(0.2 * draw.normal(size=x.shape)) for name, x in state.params.items() if is_adapter(name)}
    params = with_random_thoughts(state.params, run.config.thought.embedding_scale) | drawn
    with jax.set_mesh(run.mesh), Checkpoints(folder / "run" / "checkpoints", run.config.checkpoint) as checkpoints:
        checkpoints.save(state._replace(params=params), {}, run.record)
    run.tokenizer.save(folder / "run" / "tokenizer")
    run.tokenizer.save(folder / "base")
    export(folder / "run", folder / "merged", ExportOptions())
    (folder / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    return folder


def nats(folder: Path, checkpoint: str, capsys: Any, *more: str) -> list[float]:
    options = ["--task", "language_modeling", "--data", str(folder / "text.jsonl"), "--batch-size", "2", "--quiet"]
    evaluate.main(["--checkpoint", str(folder / checkpoint), *options, "--json", *more])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    return [found[mode]["nats_per_token"] for mode in ("without_thoughts", "with_thoughts") if mode in found]


def test_evaluate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, merged = (nats(folder, name, capsys) for name in FOLDERS)
    assert ours == pytest.approx(merged, rel=1e-5)
    (base,) = nats(folder, "base", capsys, "--thoughts", "off")
    assert abs(base - ours[0]) > 1e-2


def test_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for name in FOLDERS:
        generate.main(["--checkpoint", str(folder / name), "--prompt", TEXT, "--max-tokens", "6", "--show-thoughts"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith(TEXT)


def test_report(folder: Path, tmp_path: Path) -> None:
    """The losses on the page are those of the merged export."""
    page, merged = tmp_path / "page.html", load_model(folder / "merged")
    report.main(["--checkpoint", str(folder / "run"), "--data", str(folder / "text.jsonl"), "--samples", "0",
                 "--output", str(page)])  # fmt: skip
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])  # type: ignore[index]
    entries = data["models"][0]["tokens"]
    tokens = np.array([[*merged.tokenizer.encode_text(TEXT, merged.bos), merged.tokenizer.eos_id]], np.int32)
    scores = make_token_scorer(merged.graphdef, merged.settings())(merged.params, Batch(tokens, tokens >= 0))
    assert len(entries) == 8  # TEXT and the end of text
    for found, wanted in (([x["b"] for x in entries], scores.base.nll[0]),
                          ([x["k"][0][0] for x in entries], scores.talk.nll[0, 0])):  # fmt: skip
        np.testing.assert_allclose(found, wanted[: len(entries)], atol=2e-4)


STUDY = """
from pathlib import Path
from quietstar_jax.config import phase, to_config_dict
from tests.training.adapted import adapted_config

def get_config():
    config = to_config_dict(adapted_config(Path("set on the command line"), Path({base!r})))
    plain = dict(batch_size=4, thought_length=0, warmup_steps=0, learning_rate=1e-2)
    config.phases = [phase(name="first", steps=2, **plain), phase(name="second", steps=1, **plain)]
    config.data.validation = ()
    return config
"""


@pytest.mark.slow
def test_study(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant begins with the adapters after the shared phase, and leaves them unchanged where they rest."""
    file = tmp_path / "tiny.py"
    file.write_text(STUDY.format(base=str(folder / "base")))
    variants = {"baseline": {}, "resting": {"phases[1].rates.adapters": 0.0}}
    study = Study(str(file), variants, "baseline", seeds=(0,), metrics=("parameters",))
    runs = plan(study, tmp_path / "study")

    def run(command: list[str], **_: object) -> SimpleNamespace:
        train(next(run.config for run in runs if f"--config.workdir={run.workdir}" in command))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(runner.subprocess, "run", run)
    assert list(run_study(runs, lambda run: True, lambda line: None)) == runs
    begun = {entry["variant"]: entry["begun_from"] for entry in collect(study, runs)["runs"]}
    assert begun == {"baseline": None, "resting": {"run": "baseline/seed_0", "step": 2}}
    places = ((runs[0], 2), (runs[1], 3), (runs[0], 3))
    shared, rested, moved = (open_run(run.workdir, step).parameters for run, step in places)
    for name in filter(is_adapter, shared.shapes):
        before, after, other = (x.read(Target(name, x.shapes[name])) for x in (shared, rested, moved))
        np.testing.assert_array_equal(before, after, err_msg=name)
        assert not np.array_equal(before, other), name

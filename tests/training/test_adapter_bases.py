"""How a run with adapters finds its base again from any folder, and what it records of the weights it began from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from quietstar_jax.checkpoint.checkpoints import Checkpoints
from quietstar_jax.config import Config
from quietstar_jax.errors import CheckpointError
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.hf.adapter import WEIGHTS
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.training.base_record import base_notes
from quietstar_jax.training.resume import check_same_run, saved_record
from quietstar_jax.training.setup import Run, first_state, frozen_weights, prepare
from tests.training.adapted import adapted_config, write_base
from tests.training.tiny import tiny_config


def begin(config: Config) -> Run:
    """Step 0 of a run, saved as training saves it."""
    run = prepare(config)
    with jax.set_mesh(run.mesh), Checkpoints(Path(config.workdir) / "checkpoints", config.checkpoint) as checkpoints:
        checkpoints.save(first_state(run), {}, run.record)
    run.tokenizer.save(Path(config.workdir) / "tokenizer")
    return run


def resume(config: Config) -> Run:
    saved = saved_record(Path(config.workdir))
    assert saved is not None
    run = prepare(config, saved)
    check_same_run(saved, run.record, 0)
    return run


def use(workdir: Path, output: Path) -> None:
    """Loads a run as `evaluate` and `generate` do, and exports it."""
    load_model(workdir)
    export(workdir, output, ExportOptions("base"))


@pytest.mark.slow
def test_a_relative_base_is_found_from_another_folder(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    config = adapted_config(tmp_path / "run", Path("base"))
    begin(config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    use(tmp_path / "run", tmp_path / "exported")
    assert frozen_weights(resume(config))
    (tmp_path / "base").rename(tmp_path / "elsewhere" / "base")  # both moved: the name is that of the setting again
    assert frozen_weights(resume(config))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The commits of a hub id, by revision; None is the default branch."""
    folders = {name * 40: write_base(tmp_path / (name * 40), seed) for seed, name in enumerate("ab")}
    commits = {None: "a" * 40, "main": "a" * 40} | {commit: commit for commit in folders}

    def snapshot_download(name, revision=None, **_):
        return str(folders[commits[revision]])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return commits


@pytest.mark.some(1)
@pytest.mark.parametrize("revision", ["", "main"])
def test_a_run_stays_at_its_commit_when_the_branch_moves_on(hub, tmp_path, revision):
    config = adapted_config(tmp_path / "run", Path("someone/model"), model__revision=revision)
    assert begin(config).record["model_commit"] == "a" * 40
    hub.update({None: "b" * 40, "main": "b" * 40})
    use(tmp_path / "run", tmp_path / "exported")
    assert frozen_weights(resume(config))
    export(tmp_path / "run", tmp_path / "adapter", ExportOptions("adapter"))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("someone/model", "a" * 40)
    other = adapted_config(tmp_path / "run", Path("someone/model"), model__revision="b" * 40)
    with pytest.raises(CheckpointError, match="someone/model is not the one that the adapters"):
        resume(other)


def test_a_base_that_is_a_run_and_deletes_its_checkpoint(tmp_path):
    first = tiny_config(tmp_path / "first")
    begin(first)
    config = adapted_config(tmp_path / "run", tmp_path / "first")
    run = begin(config)
    (note,) = base_notes(run.base, config)
    assert f"step 0 of the run {tmp_path / 'first'}" in note
    assert not base_notes(run.base, tiny_config(tmp_path / "plain", model__checkpoint=str(tmp_path / "first")))
    use(tmp_path / "run", tmp_path / "exported")
    with jax.set_mesh(run.mesh), Checkpoints(tmp_path / "first" / "checkpoints", first.checkpoint) as checkpoints:
        plain = prepare(first)
        checkpoints.save(first_state(plain)._replace(step=jax.numpy.int32(4)), {}, plain.record)
    shutil.rmtree(tmp_path / "first" / "checkpoints" / "0")
    for again in (lambda: load_model(tmp_path / "run"), lambda: resume(config)):
        with pytest.raises(
            CheckpointError, match=r"(?s)no checkpoint of step 0; it has 4.*need its checkpoint of step 0"
        ):
            again()


@pytest.mark.parametrize("setting", ["keep_every_steps", "keep_phase_ends"])
def test_a_checkpoint_that_its_run_keeps_is_not_warned_about(tmp_path, setting):
    begin(tiny_config(tmp_path / "first", **{f"checkpoint__{setting}": 5 if "every" in setting else True}))
    config = adapted_config(tmp_path / "run", tmp_path / "first")
    assert bool(base_notes(prepare(config).base, config)) == (setting == "keep_phase_ends")  # step 0 ends no phase


@pytest.mark.slow
def test_the_adapter_that_a_run_began_from_is_compared_by_content(tmp_path):
    base = write_base(tmp_path / "base")
    begin(adapted_config(tmp_path / "made", base))
    export(tmp_path / "made", tmp_path / "adapter", ExportOptions("adapter"))

    def config(folder: str) -> Config:
        return adapted_config(tmp_path / "run", base, model__adapter=str(tmp_path / folder))

    with pytest.raises(CheckpointError, match=r"config\.model\.adapter .*adaptor is not a folder .* `save_pretrained`"):
        prepare(config("adaptor"))
    begin(config("adapter"))
    resume(config("adapter"))
    shutil.copytree(tmp_path / "adapter", tmp_path / "moved")
    resume(config("moved"))
    for folder in ("adapter", "moved"):
        weights = load_file(tmp_path / folder / WEIGHTS)
        save_file({name: value + 1 for name, value in weights.items()}, tmp_path / folder / WEIGHTS)
        with pytest.raises(CheckpointError, match=r"config\.model\.adapter\.content: "):
            resume(config(folder))
    shutil.rmtree(tmp_path / "adapter")
    resume(config("adapter"))  # only the start reads it
    with pytest.raises(CheckpointError, match=r"config\.model\.adapters\.rank: 2 -> 3"):
        resume(
            adapted_config(tmp_path / "run", base, model__adapter=str(tmp_path / "adapter"), model__adapters__rank=3)
        )
    with pytest.raises(CheckpointError, match=r"config\.model\.adapter: .* -> ''"):
        resume(adapted_config(tmp_path / "run", base))

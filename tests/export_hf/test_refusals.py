"""Exports that are refused, fail or are killed, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.export_hf import save as hf_save
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions, Thoughts, save
from quietstar_jax.hf.files import open_checkpoint
from quietstar_jax.io import new_folder
from tests.checkpoint.saved import edit
from tests.export_hf.exports import ROOT, Constant, tensors
from tests.hf.checkpoints import TINY
from tests.hf.runs import END, START, start_run
from tests.support.commands import run_command


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thought_mixing": "log_probabilities"}, "config.thought.mixing"),
        ({"thought_token_ids": [3, 4]}, "config.thought.start_token"),
        ({"thought_embedding_scale": 0}, "thought_embedding_scale is 0"),
        ({"thought_embedding_scale": "100"}, "thought_embedding_scale is '100'"),
    ],
)
def test_thoughts_of_another_kind_are_refused(run, tmp_path, change, message):
    export(run, tmp_path / "out", ExportOptions())
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=message):
        start_run(tmp_path / "again", tmp_path / "out", keep_thoughts=True)


def test_a_thinking_checkpoint_that_lacks_a_tensor_is_refused(run, tmp_path):
    export(run, tmp_path / "out", ExportOptions())
    file = tmp_path / "out/model.safetensors"
    kept = load_file(file)
    del kept["talk_head.0.2.bias"]
    save_file(kept, file)
    with pytest.raises(CheckpointError, match=r"talk_head\.0\.2\.bias: missing"):
        start_run(tmp_path / "again", tmp_path / "out")


def test_an_output_that_exists_is_refused(run, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        export(run, output, ExportOptions())
    assert [file.name for file in output.iterdir()] == ["mine.txt"]
    (output / "mine.txt").unlink()
    export(run, output, ExportOptions())
    assert (output / "config.json").exists()
    with pytest.raises(CheckpointError, match="exists already"):
        export(run, output / "config.json", ExportOptions())


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_save, "write_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*Free some"):
        export(run, tmp_path / "elsewhere/out", ExportOptions())
    assert not list((tmp_path / "elsewhere").iterdir())


KILLED = """
import sys, numpy as np
from pathlib import Path
from quietstar_jax.config import CheckpointConfig, Config
from quietstar_jax.architecture import Architecture
from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.export_hf.save import ExportOptions, Thoughts, save
from quietstar_jax.hf.names import parameter_shapes, quietstar_entries
from tests.export_hf.exports import Constant
from tests.hf.checkpoints import TINY

output = Path(sys.argv[1])
for i in range(10_000):
    tokenizer, options = load_tokenizer("synthetic"), ExportOptions(max_shard_size="1MB")
    save(output / f"out{i}", Constant(LARGE), LARGE, tokenizer, Thoughts(2, 100.0), options, {})
""".replace("LARGE", "TINY.__class__(**{**vars(TINY), 'vocab_size': 200, 'hidden_size': 512})")


def test_killed_at_any_moment_it_leaves_nothing_that_looks_complete(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 120

    def under_way() -> bool:
        try:
            return bool(list(tmp_path.glob("*.incomplete/model-*")) and list(tmp_path.glob("out0")))
        except FileNotFoundError:  # it was renamed in this moment
            return False

    while not under_way():
        assert process.poll() is None, "the exports ended before they could be killed"
        assert time.monotonic() < deadline, "no export was seen"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = sorted(tmp_path.iterdir())
    complete = [folder for folder in left if "incomplete" not in folder.name]
    assert complete
    assert len(left) - len(complete) <= 1
    for folder in set(left) - set(complete):  # what was abandoned is removed by the next of its name
        with new_folder(tmp_path / folder.name.partition(".")[0]):
            assert not folder.exists()
    sizes = {sum(value.nbytes for value in tensors(folder).values()) for folder in complete}
    assert len(sizes) == 1
    for folder in left:
        if folder not in complete and not (folder / "config.json").exists():
            with pytest.raises(CheckpointError):
                open_checkpoint(str(folder))


def tiny_save(output: Path, parameters: Any = None, tokens: tuple[str, str] = (START, END), **options: Any) -> None:
    architecture = TINY.__class__(**{**vars(TINY), "vocab_size": 120})
    thoughts = Thoughts(2, 100.0, start_token=tokens[0], end_token=tokens[1])
    parameters = parameters or Constant(architecture)
    save(output, parameters, architecture, load_tokenizer("synthetic"), thoughts, ExportOptions(**options), {})


def test_values_that_do_not_fit_the_dtype_are_named(tmp_path):
    architecture = TINY.__class__(**{**vars(TINY), "vocab_size": 120})
    with pytest.raises(CheckpointError, match=r"embed_tokens.* float16: .*bfloat16"):
        tiny_save(tmp_path / "out", Constant(architecture, 7e4), dtype="float16")
    with pytest.raises(CheckpointError, match=r"embed_tokens.* not finite"):
        tiny_save(tmp_path / "out", Constant(architecture, np.nan))
    assert not list(tmp_path.iterdir())


def test_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"max_shard_size is '5 GiBs'"):
        tiny_save(tmp_path / "out", max_shard_size="5 GiBs")
    with pytest.raises(ConfigError, match="'int8'; it must be one of float32"):
        ExportOptions(dtype="int8")
    with pytest.raises(ConfigError, match="'gguf'; it must be one of quietstar"):
        ExportOptions(format="gguf")
    for kind in ("base", "adapter"):
        with pytest.raises(ConfigError, match=f"`format` is {kind}, which has no thoughts"):
            ExportOptions(format=kind, think="entropy:1.5")
        with pytest.raises(ConfigError, match=f"reach is 2, but `format` is {kind}"):
            ExportOptions(format=kind, reach=2)
    with pytest.raises(ConfigError, match="two different texts"):
        tiny_save(tmp_path / "out", tokens=(START, START))
    with pytest.raises(CheckpointError, match=r"do not fit.*\n  - decoder.embedding: \(20, 8\), \(120, 8\)"):
        tiny_save(tmp_path / "out", Constant(TINY))
    assert not list(tmp_path.iterdir())


def test_a_reach_that_the_mixing_does_not_allow_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"within 1 \.\. 16"):
        ExportOptions(reach=17)
    with pytest.raises(ConfigError, match="trained with the mixing 'hidden_states'"):
        export(run, tmp_path / "out", ExportOptions(reach=2))
    assert not (tmp_path / "out").exists()


def test_the_command(run, tmp_path):
    out = tmp_path / "out"
    arguments = ("--output", out, "--format", "base", "--dtype", "bfloat16")
    done = run_command("export", "--checkpoint", run / "checkpoints", *arguments)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    assert tensors(out)["model.norm.weight"].dtype == ml_dtypes.bfloat16
    ended = run_command("export", "--checkpoint", run, "--output", tmp_path / "no", "--format", "base", "--step", 7)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert "has no checkpoint of step 7; it has 0" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_checkpoints_that_cannot_be_exported(run, tmp_path):
    def refusal(checkpoint: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            export(checkpoint, tmp_path / "out", ExportOptions())
        return str(error.value)

    assert "is not a folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "contains no checkpoint" in refusal(tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir()), "reading must not write"
    (run / "tokenizer").rename(run / "hidden")
    assert "tokenizer" in refusal(run)
    (run / "hidden").rename(run / "tokenizer")
    record = run / "checkpoints/0/config/metadata"
    kept = record.read_text()
    for text in ("{", "{}", json.dumps({**json.loads(kept), "architecture": {"vocab_size": "many"}})):
        edit(run / "checkpoints/0", "config", text)
        assert "config/metadata does not describe a run" in refusal(run)
    record.write_text(kept)
    for file in (run / "checkpoints/0/params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "is damaged" in refusal(run)
    assert not (tmp_path / "out").exists()

"""The command line: bad input ends with one clear message, status 2, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import ROOT, Ended, run_command


def run(tmp_path: Path, *arguments: str) -> Ended:
    workdir = f"--config.workdir={tmp_path / 'run'}"
    settings = ("--config", ROOT / "configs/quickstart.py", workdir, "--config.logging.progress_bar=False")
    return run_command("train", *settings, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.phases[0].steps=-1"], "config.phases[0].steps is -1; it must be at least 0"),
        (
            ["--config.seed=18446744073709551616"],
            "config.seed is 18446744073709551616; it must be an integer of at most 64 bits",
        ),
        (["--config.data.sequence_length=250"], "the model has 256"),
        (["--config.data.train=('missing.jsonl',)"], "missing.jsonl"),
        (["--config.data.tokenizer=/no/such/folder"], "/no/such/folder"),
        (["--config.model.architecture.vocab_size=50"], "50"),
        (["--config.model.checkpoint=/no/such/model"], "/no/such/model"),
        (["--config.model.prefix_attention=triton"], "a kernel for NVIDIA GPUs, and the platform is 'cpu'"),
        (["--config.thought.initial_start_token="], "initial_start_token"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, arguments, message):
    ended = run(tmp_path, *arguments)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_missing_configuration_is_one_clear_error(tmp_path):
    ended = run_command("train", "--config", "no/such/config.py")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: There is no file")
    assert "no/such/config.py" in ended.stderr


@pytest.mark.parametrize(("content", "message"), [("\n", "contains no text"), ("ann\n", "no document of two tokens")])
def test_validation_text_without_a_token_to_predict_is_named(tmp_path, content, message):
    text = tmp_path / "empty.txt"
    text.write_text(content)
    ended = run(tmp_path, f"--config.data.validation=('{text}',)", "--config.data.append_eos=False",
                "--config.data.packing=random_span")  # fmt: skip
    assert ended.returncode == 2
    assert message in ended.stderr


def test_an_unknown_flag_is_refused(tmp_path):
    for setting, message in (
        ("--config.sede=1", "config.sede is not a setting; did you mean seed?"),
        ("--config.phases[7].steps=1", "config.phases[7] does not exist: config.phases is a list of 3"),
        ("--confg=x", "Did you mean --config?"),
    ):
        ended = run(tmp_path, setting)
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: ")
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_broken_line_is_named_and_nothing_is_saved(tmp_path):
    text = tmp_path / "broken.jsonl"
    text.write_text('{"text": "ann has 4 coin"}\n{"text": \n')
    ended = run(tmp_path, f"--config.data.train=('{text}',)", f"--config.data.validation=('{text}',)")
    assert ended.returncode == 2, ended.stderr
    assert "broken.jsonl" in ended.stderr
    assert "2" in ended.stderr
    assert not (tmp_path / "run" / "summary.json").exists()

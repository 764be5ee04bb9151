"""`quietstar NAME` is `python -m quietstar_jax.MODULE`; help and errors import nothing that is slow to import."""

from __future__ import annotations

import configparser
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quietstar_jax
from quietstar_jax import commands
from quietstar_jax.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("jax", "torch", "transformers", "flax", "orbax", "grain", "pyarrow", "tensorflow_datasets", "huggingface_hub")
PROGRAM = """
import contextlib, io, sys
from quietstar_jax import commands
for words in {lines}:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            commands._dispatch(words)
        except SystemExit as ended:
            assert not ended.code, (words, ended.code)
        except commands.ConfigError:
            assert "--no-such-flag" in words
        else:
            assert words == ["--help"], words
    found = sorted(set({heavy}) & set(sys.modules))
    assert not found, (words, found)
    assert words[-1] == "--no-such-flag" or printed.getvalue(), words
"""


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=environment)


def ended(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        commands.main(list(words))
    said = capsys.readouterr()
    return int(caught.value.code or 0), said.out, said.err


def test_help_and_errors_import_nothing_that_is_slow() -> None:
    lines = [["--help"], ["train", "--help-settings"], ["aot", "--help-settings"]]
    lines += [[name, "--help"] for name in COMMANDS]
    lines += [[name, "--no-such-flag"] for name in COMMANDS if name != "lm_eval"]  # the harness parses by itself
    done = run("-c", PROGRAM.format(lines=lines, heavy=HEAVY))
    assert done.returncode == 0, done.stderr


def test_the_table_names_modules_with_a_main() -> None:
    for name, command in COMMANDS.items():
        module = importlib.import_module(f"quietstar_jax.{command.module}")
        assert callable(module.main), name
        source = Path(str(module.__file__)).read_text("utf-8")
        assert 'if __name__ == "__main__":\n    run_command(lambda: main(sys.argv[1:]))' in source, name


def test_setup_cfg_installs_the_script_and_takes_the_version_from_the_package() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, target = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    module, function = target.split(":")
    assert (name, getattr(importlib.import_module(module), function)) == ("quietstar", commands.main)
    assert setup["metadata"]["version"] == "attr: quietstar_jax.__version__"


def test_help_has_a_line_for_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = ended(capsys, "--help")
    lines = out.splitlines()
    assert status == 0
    assert max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    assert ended(capsys, "--version")[1] == f"quietstar {quietstar_jax.__version__}\n"


@pytest.mark.parametrize(
    ("words", "advice"),
    [(["trian"], "Did you mean train?"), (["xyz"], "quietstar --help"), ([], "quietstar --help"), (["--x"], "--help")],
)
def test_an_unknown_command_is_one_line(words: list[str], advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, said = ended(capsys, *words)
    assert (status, out, said.count("\n")) == (2, "", 1)
    assert said.startswith("error: ")
    assert advice in said


def test_a_command_calls_itself_as_it_was_called(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    assert ended(capsys, "prepare", "--help")[1].startswith("usage: python -m quietstar_jax.data.prepare ")
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/quietstar"])
    help_text = ended(capsys, "prepare", "--help")[1]
    assert help_text.startswith("usage: quietstar prepare ")
    assert "python -m" not in help_text
    assert "quietstar prepare --help" in ended(capsys, "prepare", "--nonsense")[2]


def test_status_and_arguments_reach_the_command(tmp_path: Path) -> None:
    done = run("-m", "quietstar_jax", "train", "--config", "no_such_file.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "no_such_file.py" in done.stderr
    assert done.stderr == run("-m", "quietstar_jax.train", "--config", "no_such_file.py", cwd=tmp_path).stderr

"""What a run prints: at its start, while it trains, and the commands for afterwards."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from quietstar_jax import evaluate, export, generate, report
from quietstar_jax.config import Config
from quietstar_jax.training.loop import train
from quietstar_jax.training.messages import next_lines
from quietstar_jax.training.metrics import COLUMNS, status_line
from quietstar_jax.training.speed import Pace
from tests.training.tiny import tiny_config

VALUES = {"base_loss": 1.1476, "talk_loss_1": 1.08524, "reward": 0.0634, "entropy": 0.2479}
PARSERS = {module.__name__: module.make_parser() for module in (report, generate, evaluate, export)}


def commands(config: Config, summary: dict) -> dict[str, list[str]]:
    """The commands that are named after a run, which their parsers accept."""
    found = {}
    for line in "\n".join(next_lines(config, summary)).splitlines():
        if line.startswith("python -m "):
            module, *words = shlex.split(line)[2:]
            PARSERS[module].parse_args(words)
            found[module.rpartition(".")[2]] = words
    return found


def test_a_run_says_what_it_trains_and_where_it_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path / "run", data__validation=())
    phases = (dataclasses.replace(config.phases[0], steps=1), dataclasses.replace(config.phases[1], steps=2))
    first = train(dataclasses.replace(config, phases=(phases[0],)))
    printed = capsys.readouterr().out
    assert (
        f"Model: new weights, 2 layers, 16 wide, {first['parameters']:,} parameters, of which all are trained.\n"
        in printed
    )
    assert "Devices: 1 x cpu" in printed
    assert "Text: synthetic (500 documents): 0.0% unknown.\n" in printed
    assert "Steps: 1 (1 plain).\n96 tokens to read. Compiling the first step ...\n" in printed
    whole = dataclasses.replace(config, phases=phases)
    train(whole)
    assert "Steps: 3 (1 plain, 2 thoughts).\nResumed at step 1: 192 tokens to read." in capsys.readouterr().out
    train(whole)
    printed = capsys.readouterr().out
    assert f"All 3 steps are done in {config.workdir}." in printed
    assert "Compiling" not in printed


def test_the_commands_after_a_run_are_accepted(tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "my run", data__validation=("a b.jsonl", "c.jsonl"), data__text_key="meta.text")
    sample = {"context": "one . <eos> sum 7 +9 it's ask"}
    found = commands(config, {"sample_thoughts": [sample]})
    assert list(found) == ["report", "generate", "evaluate", "export"]
    assert found["report"][:5] == ["--checkpoint", config.workdir, "--data", "a b.jsonl", "c.jsonl"]
    assert found["generate"][2:] == ["--prompt", "sum 7 +9 it's ask", "--show-thoughts"]
    assert found["evaluate"][4:8] == ["--data", "a b.jsonl", "--text-key", "meta.text"]
    assert found["export"][-1] == "quietstar"

    plain = dataclasses.replace(config, phases=config.phases[:1])
    found = commands(plain, {})
    assert "report" not in found
    assert "--show-thoughts" not in found["generate"]
    assert found["export"][-1] == "base"

    prepared = tiny_config(tmp_path, data__validation=("prepared:tokens",))
    assert "evaluate" not in commands(prepared, {})


def test_the_status_line() -> None:
    line = status_line(640, 664, "thoughts", VALUES, Pace(286.35, 85.6))
    assert line == "thoughts 640/664 loss 1.148/1.085 reward 0.063 entropy 0.25 286 tok/s 1:26 left"
    assert len(line) <= COLUMNS
    assert status_line(3, 9, "plain", {"base_loss": 4.0}, Pace(12_345, 3_725)) == (
        "plain 3/9 loss 4.000 12.3k tok/s 1h02 left"
    )


@pytest.mark.parametrize("phase", ["a", "open_the_mixing_head", "x" * 200])
@pytest.mark.parametrize("steps", [9, 123_456, 2_000_000_000])
@pytest.mark.parametrize("seconds", [0.0, 59.6, 1e7])
def test_the_status_line_fits_a_terminal(phase: str, steps: int, seconds: float) -> None:
    line = status_line(steps, steps, phase, VALUES | {"reward": -1.23e-12}, Pace(123_456_789.0, seconds))
    assert len(line) <= COLUMNS
    assert phase[:4] in line
    assert "loss 1.148/1.085" in line
    assert line.endswith(" left")

"""SIGTERM saves at once, ends with the status that means "start again", and costs nothing: bit for bit."""

from __future__ import annotations

import json
import signal

import pytest

from quietstar_jax.errors import START_AGAIN, PreemptedError
from quietstar_jax.parallel.preemption import PreemptionNotice
from quietstar_jax.training.loop import train
from tests.parallel.test_processes import PATIENCE, finish, latest, records, started, wait_for_step
from tests.training.tiny import tiny_config


def test_a_signal_to_the_command_line_saves_and_says_to_start_again(tmp_path):
    seldom = ("--config.checkpoint.every_steps=100000", "--config.phases[1].steps=3000")
    with started(tmp_path, 1, *seldom) as (process,):
        wait_for_step(tmp_path, 5, [process])
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == START_AGAIN, errors[-2000:]
    saved = latest(tmp_path)
    assert f"after step {saved}, which is saved" in errors
    assert records(tmp_path)[-1]["step"] == saved
    finish(tmp_path, 1, f"--config.phases[1].steps={saved}")
    assert [record["step"] for record in records(tmp_path)] == list(range(1, saved + 4))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train(tiny_config(workdir))
    return [records(workdir, kind) for kind in ("train", "evaluation")]


@pytest.mark.parametrize("asked", [2, 4, 30], ids=["a step", "an evaluation", "the next phase"])
def test_resumed_bit_for_bit_wherever_the_notice_comes(uninterrupted, tmp_path, monkeypatch, asked):
    """The notice comes when the run asks for it for the n-th time: after steps, and before batches of evaluation."""
    given = PreemptionNotice.given

    def notice(self: PreemptionNotice) -> bool:
        if self._asked + 1 == asked:
            signal.raise_signal(signal.SIGTERM)
        return given(self)

    with monkeypatch.context() as patched:
        patched.setattr(PreemptionNotice, "given", notice)
        with pytest.raises(PreemptedError) as error:
            train(tiny_config(tmp_path))
    assert error.value.status == START_AGAIN
    train(tiny_config(tmp_path))
    assert [records(tmp_path, kind) for kind in ("train", "evaluation")] == uninterrupted
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 7

"""The same seed gives the same thoughts, losses and gradients on every mesh."""

from __future__ import annotations

import itertools
import math

import pytest

from tests.support.commands import run_command

OF_8 = [",".join(map(str, sizes)) for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8]


def equal(*arguments: str) -> None:
    ended = run_command("tests.parallel.shapes", *arguments, devices=8)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.split() == [word for shape in arguments[1:] for word in (shape, "equal")]


@pytest.mark.parametrize("part", range(4))
def test_a_step_on_every_mesh_of_8_devices(part):
    assert len(OF_8) == 20
    equal("step", *OF_8[part::4])


def test_figures_of_the_whole_batch_on_8_devices():
    equal("objective", "8,1,1,1", "2,2,2,1", "2,1,1,4")


def test_adapters_on_8_devices():
    equal("adapters", "8,1,1,1", "2,2,2,1")


def test_a_thinking_gate_on_8_devices():
    equal("gate", "8,1,1,1", "2,2,2,1", "1,1,2,4")


def test_sampled_ends_on_8_devices():
    equal("ends", "8,1,1,1", "2,2,2,1", "2,1,1,4", "1,2,1,4")


def test_a_step_on_2_devices():
    equal("step", "2,1,1,1", "1,2,1,1", "1,1,2,1", "1,1,1,2")


def test_sampled_thoughts_and_scores():
    equal("scores", "2,2,2,1", "1,1,4,2", "1,2,1,4", "8,1,1,1")

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


def test_a_step_on_8_devices():
    equal("step", "2,2,2,1", "1,2,2,2")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_step_on_every_mesh_of_8_devices(part):
    assert len(OF_8) == 20
    equal("step", *OF_8[part::4])


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", ["objective", "adapters", "gate", "ends", "scores", "policy"])
def test_what_else_is_computed_on_8_devices(kind):
    """The figures of the whole batch, adapters, a thinking gate, sampled ends, and scores of sampled thoughts."""
    equal(kind, "1,2,1,4" if kind == "policy" else "2,2,2,1")  # devices along `position` would skip different chunks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [("objective", ("8,1,1,1", "2,1,1,4")), ("adapters", ("8,1,1,1",)), ("gate", ("8,1,1,1", "1,1,2,4")),
     ("ends", ("8,1,1,1", "2,1,1,4", "1,2,1,4")), ("scores", ("1,1,4,2", "1,2,1,4", "8,1,1,1")),
     ("policy", ("1,1,4,2", "1,2,1,4", "8,1,1,1"))],
)  # fmt: skip
def test_what_else_is_computed_on_other_meshes_of_8_devices(kind, shapes):
    equal(kind, *shapes)


@pytest.mark.slow
def test_a_step_on_2_devices():
    equal("step", "2,1,1,1", "1,2,1,1", "1,1,2,1", "1,1,1,2")

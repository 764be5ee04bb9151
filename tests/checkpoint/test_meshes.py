"""A checkpoint of one mesh resumes on any other with the same next losses, down to one device."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.test_processes import finish, losses

MESHES = {
    1: (),
    2: ("--config.mesh.tensor=2",),  # two query heads on one key/value head
    8: ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.mesh.position=2"),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone")
    finish(workdir, 1)
    return workdir


@pytest.mark.slow
def test_one_run_over_three_meshes(alone, tmp_path):
    for steps, devices in ((1, 8), (2, 1), (3, 2), (4, 1)):
        (tmp_path / "summary.json").unlink(missing_ok=True)
        finish(tmp_path, 1, f"--config.phases[1].steps={steps}", *MESHES[devices], devices=devices)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(tmp_path, "evaluation")[7] == pytest.approx(losses(alone, "evaluation")[7], rel=1e-5)

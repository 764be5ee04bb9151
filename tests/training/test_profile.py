"""The window of steps that is recorded with the profiler."""

from __future__ import annotations

import jax
import pytest
from etils import epath

from quietstar_jax.config import LoggingConfig
from quietstar_jax.errors import ConfigError
from quietstar_jax.settings import from_mapping
from quietstar_jax.training.loop import train
from quietstar_jax.training.profile import StepProfile
from tests.training.tiny import tiny_config


@pytest.mark.parametrize("window", [(3,), (0, 2), (5, 4), (1, 2, 3), ("a", "b")])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(ConfigError, match=r"logging\.profile_steps"):
        from_mapping(LoggingConfig, {"profile_steps": window}, "config.logging")
    for good in ((), (1, 1), (10, 12)):
        assert from_mapping(LoggingConfig, {"profile_steps": good}, "config.logging").profile_steps == good


def test_an_object_store_has_no_profile():
    workdir = epath.Path("gs://bucket/run")
    with pytest.raises(ConfigError, match=r"config\.logging\.profile_steps is \(1, 2\).*Set it to \(\)"):
        StepProfile(workdir, LoggingConfig(profile_steps=(1, 2)))
    StepProfile(workdir, LoggingConfig())


@pytest.fixture
def calls(monkeypatch):
    """What the profiler is told, without a recording."""
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: found.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
    return found


def recorded(profile, calls, first, last):
    """The steps of first .. last that are recorded."""
    steps = []
    with profile:
        for step in range(first, last + 1):
            if profile.starts_at(step):
                profile.start(())
            if calls[-1:] == ["start"]:
                steps.append(step)
            if profile.stops_at(step):
                profile.stop(())
    return steps


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("first", "last", "steps"),
    [(1, 9, [3, 4, 5]), (4, 9, [4, 5]), (5, 5, [5]), (6, 9, []), (1, 4, [3, 4]), (1, 2, [])],
)
def test_the_part_of_the_window_that_is_trained_is_recorded(tmp_path, calls, first, last, steps):
    profile = StepProfile(tmp_path, LoggingConfig(profile_steps=(3, 5)))
    assert recorded(profile, calls, first, last) == steps
    assert calls == (["start", "stop"] if steps else [])


def test_other_processes_wait_but_do_not_record(tmp_path, calls):
    profile = StepProfile(tmp_path, LoggingConfig(profile_steps=(3, 5)), silent=True)
    assert recorded(profile, calls, 1, 9) == []
    assert calls == []
    with profile:
        assert profile.starts_at(3)
        profile.start(())
        assert profile.stops_at(5)


@pytest.mark.slow
def test_a_run_writes_files_that_viewers_open(tmp_path):
    """The window is across two phases, and the file has the steps."""
    train(tiny_config(tmp_path, checkpoint__every_steps=100, logging__profile_steps=(3, 4)))
    (file,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    steps = {
        dict(event.stats).get("step_num")
        for plane in data.planes for line in plane.lines for event in line.events if event.name == "train"
    }  # fmt: skip
    assert steps == {3, 4}

"""Figures of speed: what counts as the time of a step, and what they are computed from."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest

from quietstar_jax.parallel.chips import GPUS, TPUS, chip_of
from quietstar_jax.thoughts.flops import phase_flops, step_flops
from quietstar_jax.thoughts.settings import Vocabulary, phase_settings
from quietstar_jax.training import metrics, speed
from quietstar_jax.training.loop import train
from quietstar_jax.training.metrics import read_metrics
from tests.training.tiny import tiny_config


class Clock:
    """Replaces the module `time`; its clock advances only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


def meter_of(tmp_path, phase=1):
    config = tiny_config(tmp_path)
    meter = speed.SpeedMeter(config, config.model.architecture)
    settings = phase_settings(config, config.phases[phase], Vocabulary(0, (), (), ()))
    return meter, config.phases[phase], settings


def test_evaluations_saves_and_compilation_are_no_part_of_a_step(tmp_path, clock):
    meter, phase, settings = meter_of(tmp_path)
    clock.now += 1000  # setup
    meter.begin(phase, settings)
    with meter.data_wait():
        clock.now += 0.5
    clock.now += 2
    meter._listen("/jax/core/compile/jaxpr_trace_duration", 2.0)
    clock.now += 3
    meter._listen("/jax/core/compile/jaxpr_trace_duration", 5.0)  # it contained the one before
    clock.now += 30
    meter._listen("/jax/core/compile/backend_compile_duration", 30.0)
    clock.now += 1.5
    meter._listen("/jax/checkpoint/write/durable_duration_secs", 1.5)  # not compilation
    meter.step_done()
    with meter.leave_out():
        clock.now += 40
        with meter.leave_out():
            clock.now += 10
            meter._listen("/jax/core/compile/backend_compile_duration", 10.0)
    found = meter.figures()
    assert found["step_time"] == pytest.approx(2.0)
    assert found["data_wait_share"] == pytest.approx(0.25)
    assert found["compilations"] == 2
    assert found["compile_seconds"] == pytest.approx(45)


def test_figures_are_means_over_the_steps_since_the_last_ones(tmp_path, clock):
    meter, phase, settings = meter_of(tmp_path)
    meter.begin(phase, settings)
    for seconds in (1.0, 2.0, 6.0):
        with meter.data_wait():
            clock.now += seconds
        meter.step_done()
    found = meter.figures()
    length = 24
    assert found["step_time"] == pytest.approx(3.0)
    assert found["tokens_per_second"] == pytest.approx(4 * length / 3)
    assert found["thought_tokens_per_second"] == pytest.approx(4 * length * 2 * 2 / 3)
    assert found["data_wait_share"] == 1
    clock.now += 0.25
    meter.step_done()
    assert meter.figures()["step_time"] == pytest.approx(0.25)
    clock.now += 9
    plain = meter_of(tmp_path, phase=0)[1:]
    meter.begin(*plain)
    clock.now += 1
    meter.step_done()
    found = meter.figures()
    assert found["step_time"] == pytest.approx(1)
    assert "thought_tokens_per_second" not in found


def test_the_time_left_counts_later_phases_by_their_flops(tmp_path, clock):
    meter, plain, settings = meter_of(tmp_path, phase=0)
    meter.begin(plain, settings)
    for seconds in (2.0, 2.0):
        clock.now += seconds
        with meter.leave_out():
            clock.now += 50
        meter.step_done()
    meter.figures()  # does not change the pace
    pace = meter.pace(2)
    of_plain, of_thoughts = (phase_flops(meter._config, phase) / phase.steps for phase in meter._config.phases)
    assert pace.tokens_per_second == pytest.approx(4 * 24 / 2)
    assert pace.seconds_left == pytest.approx(2.0 * (1 + 4 * of_thoughts / of_plain))  # one step, then four
    clock.now += 4
    meter.step_done()
    assert meter.pace(3).tokens_per_second == pytest.approx(4 * 24 / 2.2)  # a tenth of the way to the latest
    meter.begin(*meter_of(tmp_path)[1:])
    clock.now += 30
    meter.step_done()
    assert meter.pace(7) == (4 * 24 / 30, 0)


def test_utilisation_and_memory_where_they_are_known(tmp_path, clock, monkeypatch):
    meter, phase, settings = meter_of(tmp_path)
    meter.begin(phase, settings)
    clock.now += 0.5
    meter.step_done()
    found = meter.figures()
    assert not {"mfu", "memory_gib", "memory_peak_gib"} & set(found), "a CPU has none"
    stats = {"bytes_in_use": 3 * 2**30, "peak_bytes_in_use": 5 * 2**30}
    device = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: stats)
    devices = types.SimpleNamespace(local_devices=lambda: [device], device_count=lambda: 16)
    monkeypatch.setattr(speed, "jax", devices)
    clock.now += 0.5
    meter.step_done()
    found = meter.figures()
    necessary = step_flops(meter._architecture, settings, 4, 24).necessary
    assert found["mfu"] == pytest.approx(necessary / (0.5 * 16 * 989e12))
    assert (found["memory_gib"], found["memory_peak_gib"]) == (3, 5)


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("cpu", None), ("TPU v4", TPUS["v4"]), ("TPU v5 lite", TPUS["v5e"]), ("TPU v5", TPUS["v5p"]),
     ("TPU v5p", TPUS["v5p"]), ("TPU v6 lite", TPUS["v6e"]), ("TPU v4 lite", None), ("TPU v3", None),
     ("NVIDIA A100-SXM4-80GB", GPUS["a100"]), ("NVIDIA H100 80GB HBM3", GPUS["h100"]), ("NVIDIA H200", GPUS["h200"]),
     ("NVIDIA H100 PCIe", None), ("NVIDIA L4", GPUS["l4"]), ("NVIDIA L40S", None)],
)  # fmt: skip
def test_chips_by_the_name_of_a_device(kind, chip):
    assert chip_of(kind) is chip


def test_jax_reports_the_compilations_that_are_counted(tmp_path):
    meter, phase, settings = meter_of(tmp_path)
    with meter:
        meter.begin(phase, settings)
        jax.jit(lambda x: x * 3.25 + 1)(jnp.ones(7)).block_until_ready()
        meter.step_done()
        found = meter.figures()
    assert found["compilations"] >= 1
    assert found["compile_seconds"] > 0
    before = meter._compilations
    jax.jit(lambda x: x * 4.25 + 1)(jnp.ones(7)).block_until_ready()
    assert meter._compilations == before, "it listens only as a context manager"


def test_a_run_records_its_speed(tmp_path, monkeypatch):
    sent = []
    sink = types.SimpleNamespace(write=lambda values, step: sent.append((step, values)), close=lambda: None)
    monkeypatch.setattr(metrics, "_sinks", lambda *_: [sink])  # as TensorBoard and Weights & Biases
    train(tiny_config(tmp_path, checkpoint__every_steps=100, logging__every_steps=2))
    found = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "speed"]
    assert [(record["step"], record["phase"]) for record in found] == [
        (2, "plain"), (4, "thoughts"), (6, "thoughts"), (7, "thoughts"),
    ]  # fmt: skip
    for record in found:
        values = {f"speed/{name}": x for name, x in record.items() if name not in ("kind", "step", "phase")}
        assert (record["step"], values) in sent
        assert 0 < record["step_time"] < 5
        assert 0 <= record["data_wait_share"] <= 1
    assert found[-1]["compile_seconds"] > found[-1]["step_time"]
    assert found[1]["step_time"] < found[1]["compile_seconds"] - found[0]["compile_seconds"]

"""docs/metrics.md names every metric that a run writes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from quietstar_jax.config import Config, from_config_dict, phase
from quietstar_jax.reports.figures import CURVES
from quietstar_jax.training import speed
from quietstar_jax.training.loop import train
from quietstar_jax.training.metrics import read_metrics
from tests.training.tiny import tiny_config_dict

PAGE = Path(__file__).resolve().parents[2] / "docs/metrics.md"
MEMORY = {"bytes_in_use": 2**30, "peak_bytes_in_use": 2**30}


def named() -> set[str]:
    """The metrics in the first column of the tables."""
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def every_option(workdir: Path) -> Config:
    config = tiny_config_dict(workdir)
    config.thought.update(
        clip_epsilon=0.2, entropy_target=0.1, entropy_bonus=0.01, kl_weight=0.1, kl_in_reward=0.1,
        advantage_scale="batch", sampling_temperature=1e-4, gate=True, end="sampled",
    )  # fmt: skip
    shape = dict(thought_length=2, num_thoughts=2, tokens_ahead=2, batch_size=4, warmup_steps=0)
    config.phases = [phase(name="all", steps=4, policy_weight=1.0, distill_weight=0.1, **shape)]
    config.checkpoint.every_steps = 100
    return from_config_dict(config)


@pytest.mark.slow
def test_every_metric_of_a_run_is_on_the_page(tmp_path, monkeypatch):
    known = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: MEMORY)
    devices = SimpleNamespace(monitoring=jax.monitoring, local_devices=lambda: [known], device_count=lambda: 1)
    monkeypatch.setattr(speed, "jax", devices)
    summary = train(every_option(tmp_path))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert {record["kind"] for record in records} <= named()
    written = {kind: {name for record in records if record["kind"] == kind for name in record} for kind in named()}
    for kind in ("train", "speed", "evaluation", "warning"):
        unknown = written[kind] - named() - {"kind", "step", "phase", "warning"}
        assert not unknown, f"docs/metrics.md lacks these metrics of kind {kind}"
    assert {"kl", "clip_ratio", "policy_entropy", "entropy_bonus", "distillation_loss", "gate_loss"} <= written["train"]
    assert {"mfu", "memory_gib", "memory_peak_gib", "thought_tokens_per_second"} <= written["speed"]
    assert summary["thoughts_collapsed_at_step"] == 3
    drawn = {name for series in CURVES.values() for name, _ in series}
    assert drawn <= written["train"] | written["speed"], "the report draws what a run writes"
    kinds = ("train", "speed", "evaluation", "warning")
    rows = named() - set(kinds)
    assert rows <= set.union(*(written[kind] for kind in kinds)), "the page has metrics that no run writes"

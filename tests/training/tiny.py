"""A run so small that it takes seconds, yet goes through every phase kind on the embedded corpus."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections

from quietstar_jax.config import Config, default_config, from_config_dict, phase


def tiny_config_dict(workdir: Path) -> ml_collections.ConfigDict:
    config = default_config()
    config.workdir = str(workdir)
    config.model.architecture.update(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        max_positions=64,
    )  # fmt: skip
    config.data.update(tokenizer="synthetic", sequence_length=24, packing="packed")
    config.data.synthetic.update(documents=500, validation_documents=20)
    config.thought.update(initial_start_token="(", initial_end_token=")")
    thinking: dict[str, Any] = dict(thought_length=2, num_thoughts=2, tokens_ahead=2, batch_size=4, warmup_steps=0)
    config.phases = [
        phase(name="plain", steps=3, batch_size=4, thought_length=0, learning_rate=1e-2, warmup_steps=2),
        phase(name="thoughts", steps=4, policy_weight=1.0, learning_rate=1e-2, **thinking),
    ]
    config.evaluation.update(every_steps=0, batches=1, batch_size=50)
    config.checkpoint.update(every_steps=2)
    config.logging.update(progress_bar=False)
    return config


def tiny_config(workdir: Path, **changes: Any) -> Config:
    config = tiny_config_dict(workdir)
    for path, value in changes.items():
        config.update_from_flattened_dict({path.replace("__", "."): value})
    return from_config_dict(config)


def repeatable(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records that a run repeats bit for bit: all but those of its speed."""
    return [record for record in records if record["kind"] != "speed"]

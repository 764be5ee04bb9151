"""Checkpoints of a tiny run that has not been trained: its states hold random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from quietstar_jax.checkpoint.checkpoints import Checkpoints
from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import CheckpointConfig
from quietstar_jax.training.setup import Run, abstract_state, prepare
from tests.training.tiny import tiny_config


class SavedSteps:
    """Saves and restores steps of a run; nothing is compiled."""

    def __init__(self, workdir: Path):
        self.run: Run = prepare(tiny_config(workdir))
        self.abstract = abstract_state(self.run.config, self.run.architecture, self.run.mesh)

    def state(self, step: int) -> TrainState:
        """Other numbers for every step."""
        draw = np.random.default_rng(step)

        def value(x: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(draw.normal(size=x.shape).astype(x.dtype), x.sharding)

        return jax.tree.map(value, self.abstract)._replace(step=jax.device_put(np.int32(step)))

    def save(self, workdir: Path, steps: Sequence[int], **settings: Any) -> None:
        """Writes steps, and the tokenizer that readers look for."""
        if not (workdir / "tokenizer").exists():
            self.run.tokenizer.save(workdir / "tokenizer")
        settings = {"keep_latest": 9, "asynchronous": False, **settings}
        with Checkpoints(workdir / "checkpoints", CheckpointConfig(**settings)) as checkpoints:
            for step in steps:
                checkpoints.save(self.state(step), {"position": step}, self.run.record)

    def restore(self, workdir: Path) -> int | None:
        """What training resumes from: its step, after the values of all arrays have been compared."""
        with Checkpoints(workdir / "checkpoints", CheckpointConfig()) as checkpoints:
            step = checkpoints.newest_whole_step()
            if step is None:
                return None
            assert checkpoints.record(step)["config"]["seed"] == self.run.config.seed
            found = checkpoints.restore(step, self.abstract)
        wanted = self.state(step)
        assert found.data == {"position": step}
        assert all(
            bool((a == b).all()) for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(wanted), strict=True)
        )
        return step


def edit(step: Path, item: str, text: str) -> None:
    """Changes what a saved step says in `item`/metadata, as of a version that wrote no manifest."""
    (step / "manifest.json").unlink(missing_ok=True)
    (step / item / "metadata").write_text(text)

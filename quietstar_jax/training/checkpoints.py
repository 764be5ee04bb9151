"""Checkpoints of a run: weights, optimizer, data position, configuration and step, written with orbax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as preserve

from quietstar_jax.config import CheckpointConfig, Config, Phase
from quietstar_jax.errors import CheckpointError, DivergedError, PreemptedError
from quietstar_jax.settings import differences, to_mapping
from quietstar_jax.training.step import TrainState

# What changes nothing that a run computes; chunks, meshes, rematerialisation and kernels only through rounding.
UNRELATED = ("config.workdir", "config.logging", "config.checkpoint", "config.data.workers", "config.data.data_dir",
             "config.data.cache_dir", "config.thought.chunk_megabytes", "config.thought.positions_per_chunk",
             "config.mesh", "config.distributed", "config.model.rematerialize",
             "config.model.prefix_attention")  # fmt: skip
MEASUREMENT = ("config.evaluation", "config.data.validation")  # touches figures, not the course of training
FREE = UNRELATED + MEASUREMENT  # may change between the runs that share a work directory
THINKING = tuple(
    f"config.thought.{name}"
    for name in ("sampling_temperature", "mixing", "control", "base_loss_weight", "positions", "position_fraction")
)  # touches nothing before the first phase that thinks
REINFORCE = tuple(
    f"config.thought.{name}" for name in ("score_temperature", "positive_only", "policy_reduction")
)  # touches no weight before the first phase whose thoughts are trained
ARRAYS, RECORDS = ("params", "opt_state"), ("data", "config", "progress")
LARGE_BYTES = 2**26  # stacked layers beyond it are stored apart, so that an export need not hold them all


class Restored(NamedTuple):
    """A checkpoint read back."""

    state: TrainState
    data: dict[str, Any]  # of `SequenceIterator.get_state`


class Checkpoints:
    """The checkpoints of one work directory, written by all processes together; a context manager that waits for the
    last write."""

    def __init__(self, directory: Path, config: CheckpointConfig, kept_steps: Sequence[int] = ()):
        """Args: kept_steps: checkpoints that are never deleted, beside those of the configuration."""
        policies = [preserve.LatestN(config.keep_latest), preserve.CustomSteps(kept_steps)]
        if config.keep_every_steps:
            policies.append(preserve.EveryNSteps(config.keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preserve.AnyPreservationPolicy(policies),
            enable_async_checkpointing=config.asynchronous,
            cleanup_tmp_directories=True,  # of a run that was killed while it wrote
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in RECORDS}
        self._directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing waits for the other processes, which an error that is not theirs too would have do so for ever.
        shared = kind is None or issubclass(kind, (PreemptedError, DivergedError))
        if shared or jax.process_count() == 1:
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Steps done in the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Writes a checkpoint under its step, unless it is there already.

        Args:
          record: the configuration and what a reader needs beside it, JSON-able.
        """
        step = int(state.step)
        if step == self.latest_step:
            return
        items = ocp.args.Composite(
            params=_layers_apart(state.params),
            opt_state=_layers_apart(state.opt_state),
            data=ocp.args.JsonSave(dict(data)),
            config=ocp.args.JsonSave(dict(record)),
            progress=ocp.args.JsonSave({"step": step}),
        )
        self._manager.save(step, args=items, force=True)

    def record(self, step: int) -> dict[str, Any]:
        """The configuration that a checkpoint was written with."""
        return self._restore(step, config=ocp.args.JsonRestore())["config"]

    def restore(self, step: int, abstract: TrainState) -> Restored:
        """Reads a checkpoint into the shapes, dtypes and shardings of `abstract`.

        Raises:
          CheckpointError: it is damaged or of another model.
        """
        found = self._restore(
            step,
            params=ocp.args.StandardRestore(abstract.params),
            opt_state=ocp.args.StandardRestore(abstract.opt_state),
            data=ocp.args.JsonRestore(),
            progress=ocp.args.JsonRestore(),
        )
        done = jax.device_put(np.int32(found["progress"]["step"]), abstract.step.sharding)
        return Restored(TrainState(done, found["params"], found["opt_state"]), found["data"])

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise CheckpointError(
                f"The checkpoint of step {step} in {self._directory} cannot be read: {error}\n"
                f"Remove the folder {self._directory / str(step)} to resume from the one before it, "
                "or start in a new workdir."
            ) from error


def _layers_apart(arrays: Any) -> ocp.args.StandardSave:
    def layout(path: Any, array: Any) -> ocp.SaveArgs:
        apart = "layers." in jax.tree_util.keystr(path) and array.nbytes > LARGE_BYTES
        return ocp.SaveArgs(chunk_byte_size=LARGE_BYTES, shard_axes=(0,)) if apart else ocp.SaveArgs()

    return ocp.args.StandardSave(arrays, save_args=jax.tree_util.tree_map_with_path(layout, arrays))


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any], step: int) -> None:
    """Refuses to resume a run that changed in what has already shaped its weights (see `course_changes`).

    Args:
      saved, wanted: `Run.record` of the checkpoint and of now; step: of the checkpoint.

    Raises:
      CheckpointError: lists every difference.
    """
    changed = course_changes(saved["config"], wanted["config"], step)
    for part in ("architecture", "model_commit", "vocabulary"):  # what a checkpoint or tokenizer of that name held
        changed += differences(saved[part], wanted[part], part)
    if changed:
        raise CheckpointError(
            f"The checkpoint of step {step} was written with another configuration (saved -> now):\n"
            + "\n".join(f"  - {line}" for line in changed)
            + "\nSet these back to resume, or choose a new workdir to start afresh."
        )


def course_changes(saved: Mapping[str, Any], wanted: Mapping[str, Any], step: int) -> list[str]:
    """Lines `setting: saved -> wanted` for all that makes two configurations differ in what they do up to a step.

    Settings in `FREE` may change, and so may phases that had not begun, those in `THINKING` where none that thinks had,
    and those in `REINFORCE` where none that trains thoughts had; the last phase that had begun may get more steps.
    """
    saved, wanted = _completed(saved), _completed(wanted)
    before, after = _begun(saved["phases"], step), _begun(wanted["phases"], step)
    thinking = [phase for phase in (*before, *after) if phase["thought_length"]]
    free = FREE if thinking else FREE + THINKING
    free += () if any(phase["policy_weight"] for phase in thinking) else REINFORCE
    found = differences({**saved, "phases": before}, {**wanted, "phases": after})
    return [line for line in found if not line.startswith(free)]


def _completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the settings that came after it was saved: until then their defaults were all there was."""

    def complete(known: Any, found: Any) -> Any:
        if isinstance(known, Mapping) and isinstance(found, Mapping):
            return {**known, **{name: complete(known.get(name), value) for name, value in found.items()}}
        return found

    phases = [complete(to_mapping(Phase()), phase) for phase in saved["phases"]]
    completed = complete(to_mapping(Config()), saved) | {"phases": phases}
    # Packed documents saw each other before there was a setting; no other packing depends on it.
    masked = completed["data"]["packing"] == "packed" and saved.get("data", {}).get("document_mask", False)
    return completed | {"data": completed["data"] | {"document_mask": masked}}


def _begun(phases: Any, step: int) -> list[dict[str, Any]]:
    """The phases of which a step is done. Microbatches, which only round, are left out, and so are the steps of the
    last phase where its rate does not depend on them."""
    begun, start = [], 0
    for phase in phases:
        if start < step:
            open_ended = start + phase["steps"] >= step and phase["decay"] == "constant"
            begun.append({**phase, "microbatches": "any", **({"steps": "open"} if open_ended else {})})
        start += phase["steps"]
    return begun

"""What a run records about the weights that it began from, and how it finds them again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from quietstar_jax.checkpoint import manifest
from quietstar_jax.checkpoint.run_checkpoint import RunCheckpoint
from quietstar_jax.config import Config, ModelConfig
from quietstar_jax.data.fingerprint import fingerprint
from quietstar_jax.data.sources.files import one_file
from quietstar_jax.hf.adapter import WEIGHTS
from quietstar_jax.hf.files import CheckpointFiles

Base = CheckpointFiles | RunCheckpoint


@dataclass(frozen=True)
class RecordedBase:
    """The base of a run with adapters, whose checkpoints lack the frozen weights.

    Attributes:
      model: settings of the run; content, commit, folder: `base`, `model_commit` and `base_folder` of its record, the
        last two empty if `model` names another base than the record.
    """

    model: ModelConfig
    content: Mapping[str, Any]
    commit: str = ""
    folder: str = ""

    @classmethod
    def of(cls, run: RunCheckpoint) -> RecordedBase:
        """Returns the base of a run."""
        return cls(run.config.model, run.base, run.model_commit, run.base_folder)

    @property
    def source(self) -> ModelConfig:
        """The settings with the base where the run recorded it, so that it is found from any working directory."""
        if self.folder and os.path.isdir(self.folder):
            return dataclasses.replace(self.model, checkpoint=self.folder)
        local = os.path.isdir(os.path.expanduser(self.model.checkpoint))
        if local or not self.commit or "step" in self.content:  # the commit of a base run is that of its own base
            return self.model
        return dataclasses.replace(self.model, revision=self.commit)


def base_record(base: Base | None, *, frozen: bool = False) -> dict[str, Any]:
    """Returns what a run records about its base, so that it can resume without the base.

    Args:
      frozen: the run needs the base to resume, because it freezes weights that its checkpoints lack. Then the record
        has a hash of all bytes; without, the bytes are sampled.
    """
    if base is None:
        return {"model_commit": "", "generation": {}, "license": {}, "base": {}, "base_folder": ""}
    if isinstance(base, RunCheckpoint):
        folder = base.parameters.folder
        files = sorted(folder / name for name in manifest.files(folder))
        commit, place = base.model_commit, str(folder.parent.parent)
    else:
        files, commit = sorted({info.file for info in base.tensors.values()}), base.commit
        place = "" if commit else os.path.abspath(base.folder)
    content = _content(files, base_content(base)) if frozen else _content(files)
    if frozen and isinstance(base, RunCheckpoint):
        content["step"] = base.step
    described = {"generation": dict(base.generation), "license": dict(base.license)}
    return {"model_commit": commit, **described, "base": content, "base_folder": place}


def adapter_record(model: ModelConfig, saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the fingerprint of the weights in `config.model.adapter`, with a hash of all bytes; empty if it is ''.

    Args:
      saved: the record of the run that resumes. Its fingerprint is returned if the folder that it names is gone: a run
        reads the adapter only when it begins.

    Raises:
      DataError: the adapter is missing.
    """
    file = Path(model.adapter).expanduser() / WEIGHTS
    if not model.adapter:
        return {}
    if saved and not file.exists() and saved["config"]["model"].get("adapter") == model.adapter:
        return dict(saved.get("adapter", {}))
    return _content([file], "")


def _content(files: Sequence[Any], *further: str) -> dict[str, Any]:
    """Size and sampled marks of files; with `further`, also the hash of all bytes and of these texts."""
    found = fingerprint("", [one_file(str(file)) for file in files])
    content = {name: found[name] for name in ("bytes", "marks")}
    if further:
        parts = [*manifest.checksums([epath.Path(file) for file in files]), *further]
        content["content"] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return content


def base_notes(base: Base | None, config: Config) -> list[str]:
    """Returns a line if a run with adapters needs a checkpoint of another run that may be deleted; else nothing."""
    if config.model.adapters.maps == "none" or not isinstance(base, RunCheckpoint):
        return []
    kept, ends = base.config.checkpoint, [span.end for span in base.config.phase_spans()]
    every = kept.keep_every_steps
    if (every and base.step % every == 0) or (kept.keep_phase_ends and base.step in ends):
        return []
    return [
        f"the frozen weights are read again from step {base.step} of the run {config.model.checkpoint} whenever this "
        "run resumes or is used. Keep that checkpoint: if that run continues, it is deleted, unless the run's "
        "config.checkpoint.keep_every_steps or keep_phase_ends keeps it"
    ]


def base_content(base: Base) -> str:
    """Returns the content hash that a base records of its own base, if it is a run with adapters; else empty."""
    return str(base.base.get("content", "")) if isinstance(base, RunCheckpoint) else ""

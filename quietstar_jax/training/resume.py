"""Checks whether a configuration may resume the run in its work directory."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from quietstar_jax.architecture import Adapters, Architecture
from quietstar_jax.checkpoint import manifest
from quietstar_jax.checkpoint.run_checkpoint import named_run
from quietstar_jax.checkpoint.steps import saved_steps
from quietstar_jax.config import Config
from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.errors import CheckpointError, ConfigError, DataError
from quietstar_jax.io import AnyPath, folder_to_read, place
from quietstar_jax.settings import OnResume, differences, from_mapping, marked, to_mapping
from quietstar_jax.thought_config import Phase, RateScales

MARKED = {mark: marked(Config, mark, "config.") for mark in OnResume}
ADAPTER = "config.model.adapter"
MOST_LINES, MOST_CHARACTERS = 10, 240  # limits of a list of differences


def saved_record(workdir: AnyPath) -> dict[str, Any] | None:
    """Returns `Run.record` of the newest checkpoint whose record can be read, or None."""
    folder = epath.Path(workdir) / "checkpoints"
    for step in reversed(saved_steps(folder)):
        if manifest.has_other_config(folder / str(step)):
            continue
        try:
            record: dict[str, Any] = json.loads((folder / str(step) / "config" / "metadata").read_text("utf-8"))
            if {"config", "architecture", "vocabulary"} <= record.keys():
                return record
        except (OSError, ValueError, AttributeError):
            continue
    return None


def same_base(saved: Mapping[str, Any], config: Config) -> bool:
    """Whether a configuration names the same base as the saved run."""
    model = saved["config"]["model"]
    return (model["checkpoint"], model.get("revision", "")) == (config.model.checkpoint, config.model.revision)


def same_adapters(saved: Mapping[str, Any], config: Config) -> bool:
    """Whether the saved run has the adapters of this configuration; if not, `check_same_run` says what differs."""
    return saved["config"]["model"].get("adapters") == to_mapping(config.model.adapters)


def tokenizer_source(config: Config) -> tuple[str, str]:
    """Returns (folder or hub id of a run's tokenizer, its revision).

    Raises:
      ConfigError: the configuration names neither a tokenizer nor a model checkpoint.
    """
    model = config.model
    if config.data.tokenizer:
        return config.data.tokenizer, ""
    if not model.checkpoint:
        raise ConfigError(
            "config.data.tokenizer is empty and there is no model checkpoint with a tokenizer. Set it to a "
            "folder or hub id with a tokenizer, or to `synthetic` for the embedded corpus."
        )
    if (folder := named_run(model.checkpoint)) is None:
        return model.checkpoint, model.revision
    return str((folder.parent if folder.name == "checkpoints" else folder) / "tokenizer"), ""


def resumed_tokenizer(config: Config, saved: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer of a resumed run: the one that its configuration names, or the copy in its work directory.

    The copy is used if the configuration names no tokenizer, or the same one as before and it can no longer be loaded.

    Raises:
      CheckpointError: the tokenizer is not the one that the run began with.
    """
    kept = place(config.workdir, "config.workdir") / "tokenizer"
    name, revision = tokenizer_source(config)
    copy: Tokenizer | None = None
    with contextlib.suppress(DataError, OSError), folder_to_read(kept) as local:
        copy = Tokenizer(name, load_tokenizer(str(local)).fast)
    if copy and not config.data.tokenizer:
        return copy
    try:
        tokenizer = load_tokenizer(name, revision)
    except DataError:
        if copy and name == saved["config"]["data"]["tokenizer"]:
            return copy
        raise
    # Records of earlier versions have no fingerprint.
    expected = saved.get("tokenizer") or (copy.fingerprint() if copy else tokenizer.fingerprint())
    if tokenizer.fingerprint() != expected:
        raise CheckpointError(
            f"The tokenizer {name} is not the one that the run in {config.workdir} was trained with"
            f"{_token_changes(copy, tokenizer)}. Restore the previous one, or set config.data.tokenizer to {kept}, "
            "the copy in the run; for another tokenizer, choose a new config.workdir."
        )
    return tokenizer


def _token_changes(before: Tokenizer | None, now: Tokenizer) -> str:
    if before is None:
        return ""
    old, new = before.fast.get_vocab(), now.fast.get_vocab()
    changed = [
        f"{token!r} {number} -> {new.get(token, 'absent')}"
        for token, number in sorted(old.items(), key=operator.itemgetter(1))
        if number != new.get(token)
    ]
    if not changed:
        return ""
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f" (ids of tokens: {', '.join(changed[:3])}{more})"


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], step: int) -> None:
    """Checks that the settings that determined the saved weights are unchanged (see `incompatible_changes`).

    Args:
      saved, current: `Run.record` of the checkpoint and of the current run.
      step: step of the checkpoint.

    Raises:
      CheckpointError: a setting changed; the message lists the differences.
    """
    changed = incompatible_changes(saved["config"], current["config"], step)
    # With a base, these settings are not used; without a base, they define the architecture.
    settings = "config.model.architecture"
    architecture = "architecture" if current["config"].get("model", {}).get("checkpoint") else settings
    changed = [line for line in changed if not line.startswith(settings)]
    # An architecture recorded before a field existed has that field's default.
    before, after = (_with_defaults(to_mapping(Architecture()), record["architecture"]) for record in (saved, current))
    changed += differences(before, after, architecture)
    changed += differences(saved["model_commit"], current["model_commit"], "model_commit")
    # The tokens of older records follow from the tokenizer and the settings, which are compared.
    newer = {name: id for name, id in current["vocabulary"].items() if name in ("start_token", "end_token")}
    changed += differences(newer | saved["vocabulary"], current["vocabulary"], "vocabulary")
    if saved.get("adapter"):
        changed += differences(saved["adapter"], current["adapter"], ADAPTER)
    free = MARKED[OnResume.SAME_TEXT]
    if saved.get("base") and saved["base"] == current.get("base"):
        free += (*(name for name in MARKED[OnResume.SAME_WEIGHTS] if name != ADAPTER), "model_commit")
    if saved.get("adapter") and saved["adapter"] == current["adapter"]:
        free += (ADAPTER,)
    changed = _without(changed, free)
    if changed:
        workdir = current["config"].get("workdir", "the work directory")
        raise CheckpointError(
            f"{workdir} contains a run at step {step} that was trained with other settings (saved -> now):\n"
            + bounded(changed)
            + "\nFinished steps cannot change. There are three possibilities:\n"
            "  - Continue this run: restore these settings. Phases appended to config.phases may have settings of "
            f"their own.\n  - Start a new run with its weights: set config.model.checkpoint to {workdir} and "
            "config.workdir to a new folder.\n  - Start a new run without them: set config.workdir to a new folder."
        )


def check_same_sources(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Checks the training text of a checkpoint of an early version, which records only names.

    Raises:
      CheckpointError: the names have changed.
    """
    names = [list(record["config"]["data"]["train"]) for record in (saved, current)]
    if names[0] != names[1]:
        raise CheckpointError(
            f"config.data.train was {names[0]} and is {names[1]}; this checkpoint has no record of its text, by which "
            "the sources could be compared. Restore the previous names."
        )


def check_position(saved: Mapping[str, Any], data: Mapping[str, Any], step: int, done: int, folder: Path) -> None:
    """Checks that the parts of a checkpoint agree on its step.

    Args:
      saved: `Run.record` of the checkpoint.
      data: the position in the training text stored in the checkpoint.
      step: step in the name of the checkpoint.
      done: step stored in the checkpoint.
      folder: folder of the checkpoint.

    Raises:
      CheckpointError: the parts disagree; the message says how.
    """
    read, start = 0, 0
    for phase in saved["config"]["phases"]:
        read += phase["batch_size"] * min(max(step - start, 0), phase["steps"])
        start += phase["steps"]
    problems = []
    if done != step:
        problems.append(f"according to it, {done} steps are done")
    if step > start:
        problems.append(f"its configuration has only {start} steps")
    elif data.get("sequences") != read:
        problems.append(f"it has read {data.get('sequences')} sequences of text, where {step} steps read {read}")
    if data.get("packing") != "packed" and (data.get("document") or data.get("offset")):
        problems.append(f"it is at document {data.get('document')}, which only packed text has")
    if problems:
        raise CheckpointError(
            f"The checkpoint {folder} is damaged: {'; '.join(problems)}. Move this folder elsewhere: the run then "
            "resumes from the checkpoint before it, or starts again if there is none."
        )


def bounded(lines: Sequence[str]) -> str:
    """Returns the lines as a list, shortened to fit a screen."""
    shown = [f"  - {line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 4] + ' ...'}" for line in lines]
    more = [f"  - and {len(shown) - MOST_LINES} more"] if len(shown) > MOST_LINES else []
    return "\n".join(shown[:MOST_LINES] + more)


def incompatible_changes(saved: Mapping[str, Any], current: Mapping[str, Any], step: int) -> list[str]:
    """Returns lines `setting: saved -> now` for all differences between two configurations that matter up to a step.

    The marks `OnResume` in `Config` state which settings may differ.
    """
    saved, current = _completed(saved), _completed(current)
    before, after = _begun(saved["phases"], step), _begun(current["phases"], step)
    thinking = [phase for phase in (*before, *after) if phase["thought_length"]]
    free = MARKED[OnResume.UNRELATED] + MARKED[OnResume.MEASURED]
    free += () if thinking else MARKED[OnResume.THINKING]
    trains = any(_reinforces(config, phase) for config, begun in ((saved, before), (current, after)) for phase in begun)
    free += () if trains else MARKED[OnResume.REINFORCE]
    changed = differences({**saved, "phases": before}, {**current, "phases": after})
    return _without(changed, free)


def _without(changed: Sequence[str], free: Sequence[str]) -> list[str]:
    """Returns the lines `path: old -> new` whose setting is neither in `free` nor in a group in `free`."""
    groups = tuple(name + end for name in free for end in ".[:")
    return [line for line in changed if not line.startswith(groups)]


def _reinforces(config: Mapping[str, Any], phase: Mapping[str, Any]) -> bool:
    """`Config.reinforces`, for a configuration and a phase as plain mappings; other settings may be masked."""
    rates, adapters = from_mapping(RateScales, phase["rates"]), from_mapping(Adapters, config["model"]["adapters"])
    bare = Phase(thought_length=phase["thought_length"], policy_weight=phase["policy_weight"], rates=rates)
    return bare.reinforces(adapters, config["thought"]["control"])


def _completed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Adds settings of later versions to a saved configuration, with values that match the earlier versions."""

    phases = [_with_defaults(to_mapping(Phase()), phase) for phase in saved["phases"]]
    completed = _with_defaults(to_mapping(Config()), saved) | {"phases": phases}
    # Before this setting existed, packed documents attended to each other; no other packing depends on the setting.
    masked = completed["data"]["packing"] == "packed" and saved.get("data", {}).get("document_mask", False)
    return completed | {"data": completed["data"] | {"document_mask": masked}}


def _with_defaults(defaults: Any, saved: Any) -> Any:
    """Returns the saved value, with the entries of `defaults` that it lacks, at every depth."""
    if isinstance(defaults, Mapping) and isinstance(saved, Mapping):
        return {**defaults, **{name: _with_defaults(defaults.get(name), value) for name, value in saved.items()}}
    return saved


def _begun(phases: Any, step: int) -> list[dict[str, Any]]:
    """Returns the phases that have begun.

    Settings marked `UNRELATED` are masked, and in the last phase also those marked `OPEN_END`, if its learning rate
    does not depend on them.
    """
    unrelated, open_end = marked(Phase, OnResume.UNRELATED), marked(Phase, OnResume.OPEN_END)
    begun, start = [], 0
    for phase in phases:
        if start < step:
            is_open = start + phase["steps"] >= step and phase["decay"] == "constant"
            begun.append({**phase, **dict.fromkeys(unrelated + (open_end if is_open else ()), "any")})
        start += phase["steps"]
    return begun

"""Follows runs that are training, from the files in their work directories; loads no model and uses no device."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quietstar_jax.errors import STOPPED, ConfigError
from quietstar_jax.lock import STALE_SECONDS, is_gone, read
from quietstar_jax.reports.runs_page import MOST_RUNS, RunState, runs_page
from quietstar_jax.training.metrics import read_metrics
from quietstar_jax.training.workdir import LOCK

FILES = ("metrics.jsonl", "config.json", LOCK)  # a run has at least one of them


def follow(folders: Sequence[Path], write: Callable[[str], None], every: int) -> str:
    """Returns the page of the runs when all have ended, or after Ctrl-C.

    Args:
      folders: work directories of runs; a run that was stopped has ended.
      write: called with the page every `every` seconds while a run is training.

    Raises:
      ConfigError: a folder is not that of a run, or there are too many.
    """
    runs = [_Run(folder, name) for folder, name in run_names(folders, "follow").items()]
    for run in runs:
        run.check()
    try:
        while True:
            states = [run.state() for run in runs]
            if not any(state.running for state in states):
                break
            write(runs_page(states, every))
            time.sleep(every)
    except KeyboardInterrupt as signal:
        states = [run.state() for run in runs]
        if getattr(signal, "status", STOPPED) != STOPPED:  # SIGTERM or SIGHUP: the command ends with its status
            write(runs_page(states))
            raise
    return runs_page(states)


@dataclass
class _Run:
    """A run, and when its lock was last seen to change."""

    folder: Path
    name: str
    mark: Any = None
    changed: float = 0.0
    last: RunState | None = None

    def check(self) -> None:
        """Raises ConfigError if the folder has no file of a run."""
        if not any((self.folder / name).exists() for name in FILES):
            raise ConfigError(
                f"{self.folder} is not the work directory of a run: it has no {FILES[0]}. Give `follow` a run whose "
                "training has started."
            )

    def state(self) -> RunState:
        """Reads the run as it is now; a file that cannot be read for a moment leaves the state as it was."""
        try:
            self.last = self._read()
        except OSError:
            if self.last is None:
                raise
        return self.last

    def _read(self) -> RunState:
        running = self._is_running()  # first: the records of a run that has ended are then complete
        phases = _json(self.folder / "config.json").get("config", {}).get("phases", [])
        return RunState(
            name=self.name,
            running=running,
            total_steps=sum(phase.get("steps", 0) for phase in phases),
            records=read_metrics(self.folder / "metrics.jsonl"),
            summary=_json(self.folder / "summary.json"),
        )

    def _is_running(self) -> bool:
        """Whether the run holds its lock, and has renewed it lately or since this process looks at it."""
        holder, mark = read(self.folder / LOCK)
        if mark != self.mark:
            self.mark, self.changed = mark, time.monotonic()
        return mark is not None and not is_gone(holder) and time.monotonic() - self.changed < STALE_SECONDS


def run_names(folders: Sequence[Path], option: str) -> dict[Path, str]:
    """Returns the shortest different names of the folders, without repeated ones.

    Raises:
      ConfigError: the option has more runs than there are colours.
    """
    texts = {folder: os.fspath(folder).rstrip("/") for folder in folders}
    shared = os.path.dirname(os.path.commonprefix(list(texts.values())))  # noqa: RUF071 (URLs are no paths)
    if len(texts) > MOST_RUNS:
        raise ConfigError(f"`{option}` has {len(texts)} runs; more than {MOST_RUNS} colours cannot be told apart.")
    return {folder: (text[len(shared) :].lstrip("/") if shared else text) or text for folder, text in texts.items()}


def _json(path: Path) -> Mapping[str, Any]:
    """The object in a file; empty if there is none."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text("utf-8"))
        if isinstance(value, dict):
            return value
    return {}

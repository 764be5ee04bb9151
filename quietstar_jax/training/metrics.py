"""Writes metrics to `metrics.jsonl`, a status line, and optionally TensorBoard or Weights & Biases."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quietstar_jax.config import LoggingConfig
from quietstar_jax.errors import ConfigError
from quietstar_jax.io import JsonLinesWriter, is_url, read_json_lines, write_text
from quietstar_jax.training.speed import Pace

COLUMNS, SHORTEST_NAME = 79, 5  # of the status line, and of the name of a phase in it


class MetricsWriter:
    """Writes the metrics of a run; a context manager.

    A resumed run first removes the records of steps that it will repeat, so that every step has one record.

    Args:
      silent: write and show nothing; set on all processes but one.
    """

    def __init__(
        self, workdir: Path, config: LoggingConfig, *, first_step: int, total_steps: int, run_config: Any,
        silent: bool = False,
    ):  # fmt: skip
        self._silent = silent
        # First, because a missing package raises an error here.
        self._sinks = [] if silent else _sinks(workdir, config, first_step, run_config)
        path = workdir / "metrics.jsonl"
        self._kept = set() if silent else _keep_until(path, first_step)
        self._file = None if silent else JsonLinesWriter(path)
        self._bar = tqdm(
            total=total_steps, initial=first_step, disable=silent or not config.progress_bar, bar_format="{desc}",
            dynamic_ncols=True,
        )  # fmt: skip

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._file:
            self._file.close()
        for sink in self._sinks:
            sink.close()

    def has(self, kind: str, step: int) -> bool:
        """Whether a record already existed when this run started or resumed."""
        return (kind, step) in self._kept

    def write(self, kind: str, step: int, phase: str, values: Mapping[str, Any]) -> None:
        """Writes one record `{"kind", "step", "phase", ...}`.

        Args:
          kind: `train`, `evaluation`, `warning`, or `speed`. Only records of the last kind differ between two runs with
            the same configuration, and between an uninterrupted and a resumed run.
        """
        if self._file:
            self._file.write({"kind": kind, "step": step, "phase": phase, **values})
        scalars = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for sink in self._sinks:
            sink.write({f"{kind}/{name}": value for name, value in scalars.items()}, step)

    def advance(self, step: int, phase: str, values: Mapping[str, float], pace: Pace) -> None:
        """Shows `status_line` for a step."""
        self._bar.set_description_str(status_line(step, self._bar.total, phase, values, pace), refresh=False)
        self._bar.update(step - self._bar.n)

    def log(self, line: str) -> None:
        """Prints a line above the status line."""
        if not self._silent:
            tqdm.write(line)
            sys.stdout.flush()  # at once, also into a pipe or a file


def status_line(step: int, total: int, phase: str, values: Mapping[str, float], pace: Pace) -> str:
    """Returns phase, step, losses without / with thoughts in nats, reward, entropy, speed and time left.

    The line fits `COLUMNS`: entropy and reward are left out where there is no room, and a long name of a phase is cut.
    """
    loss = f"loss {values['base_loss']:.3f}"
    parts = [f"{step}/{total}", f"{loss}/{values['talk_loss_1']:.3f}" if "talk_loss_1" in values else loss]
    optional = [f"{name} {values[name]:.2g}" for name in ("reward", "entropy") if name in values]
    minutes, seconds = divmod(round(pace.seconds_left), 60)
    left = f"{minutes // 60}h{minutes % 60:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
    ends = [f"{tqdm.format_sizeof(pace.tokens_per_second)} tok/s", f"{left} left"]
    while optional and len(" ".join([*parts, *optional, *ends])) > COLUMNS - SHORTEST_NAME - 1:
        optional.pop()
    line = " ".join([*parts, *optional, *ends])
    room = max(COLUMNS - len(line) - 1, SHORTEST_NAME)
    return f"{phase if len(phase) <= room else phase[: room - 1] + '…'} {line}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a `metrics.jsonl` in order, without malformed lines; empty if the file does not exist."""
    rows = read_json_lines(path)
    return [
        row
        for row in rows
        if type(row.get("step")) is int and isinstance(row.get("kind"), str) and isinstance(row.get("phase"), str)
    ]


def write_metrics(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records so that `read_metrics` returns them; the file is replaced atomically."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _keep_until(path: Path, step: int) -> set[tuple[str, int]]:
    """Removes records after `step`; returns kind and step of the others."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    if path.exists():
        write_metrics(path, kept)
    return {(record["kind"], record["step"]) for record in kept}


class _TensorBoard:
    def __init__(self, workdir: Path, first_step: int):
        if is_url(workdir):
            raise ConfigError(
                "config.logging.tensorboard needs a local workdir. Set it to False; metrics.jsonl contains the same "
                "values."
            )
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "config.logging.tensorboard is on but tensorboardX is missing: pip install 'quietstar_jax[logging]'."
            ) from error
        # Files are named by the second: the suffix keeps a run that resumes within it from overwriting its last file.
        self._writer = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first_step + 1, filename_suffix=f".{first_step}"
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, workdir: Path, project: str, run_config: Any):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "config.logging.wandb_project is set but wandb is missing: pip install 'quietstar_jax[logging]'."
            ) from error
        self._run = wandb.init(
            project=project,
            dir=None if is_url(workdir) else str(workdir),
            config=run_config,
            id=_kept_id(workdir / "wandb_id"),
            resume="allow",
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _kept_id(path: Path) -> str:
    """Returns an id of the run that stays the same when the run resumes."""
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _sinks(workdir: Path, config: LoggingConfig, first_step: int, run_config: Any) -> list[Any]:
    sinks: list[Any] = [_TensorBoard(workdir, first_step)] if config.tensorboard else []
    return sinks + ([_WeightsAndBiases(workdir, config.wandb_project, run_config)] if config.wandb_project else [])

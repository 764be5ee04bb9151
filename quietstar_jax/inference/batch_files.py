"""Generates texts for a source of prompts into a file, in batches; finished rows survive a killed process."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from quietstar_jax.data.sources import content_hash, read_all
from quietstar_jax.data.sources.common import Record
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import DataError, UserError
from quietstar_jax.inference.batch import Generation, GenerationConfig, thinking_rate
from quietstar_jax.inference.engine import Request
from quietstar_jax.inference.generator import Generator
from quietstar_jax.io import lock_file, write_json
from quietstar_jax.settings import differences

PROMPT = "prompt"
ADDED = ("completion", "finish_reason", "thoughts", "mixing_weights", "thinking_rate")


def generate_file(
    generator: Generator, source: str | os.PathLike[str], output: Path, job: GenerationConfig, *, seed: int = 0,
    show_thoughts: bool = False, quiet: bool = False,
) -> int:  # fmt: skip
    """Writes the rows of `source` with the text generated for their prompts; the output appears when all are done.

    Until then the rows are in `OUTPUT.partial`, and their settings in `OUTPUT.partial.json`: the same command resumes
    from there.

    Args:
      source: as in `DataConfig.train`; each record needs a `prompt`, other fields are copied.
      show_thoughts: also write thoughts and mixing weights; if a policy chooses which tokens have a thought,
        also the share of tokens with one, and null for the others.
      quiet: no progress bar.

    Returns:
      the number of rows.

    Raises:
      UserError: the source or output cannot be used, or another command left a partial output.
    """
    partial = Path(f"{output}.partial")
    # The last two steps rename the partial output and remove its record: a killed process may have done only the first.
    renamed = output.exists() and not partial.exists() and _record_file(partial).exists()
    if output.exists() and not renamed:
        raise DataError(f"{output} exists already. Remove it, or choose another file.")
    if not output.absolute().parent.is_dir():
        raise DataError(f"{output}: the folder {output.absolute().parent} is missing. Create it first.")
    source = os.fspath(source)
    rows = read_all(source, "prompts")
    requests = _requests(generator, rows, job, seed)
    record = {
        "model": generator.model.record,
        "prompts": content_hash(source, DataConfig()),
        "thought_length": job.plan.thought.thought_length,
        "max_tokens": job.max_tokens,
        "stop": job.stop,
        **dataclasses.asdict(job.sampling),
        "think": str(job.sampling.think),
        **({"reach": job.plan.thought.reach} if job.plan.thought.reach > 1 else {}),
        "seed": seed,
        "show_thoughts": show_thoughts,
        "batch_size": generator.batch_size,
        "max_length": generator.max_length,
    }
    record = json.loads(json.dumps(record))
    if renamed:
        _check_same(partial, record)
        _record_file(partial).unlink()
        return len(rows)
    size = generator.batch_size
    with partial.open("a+b") as file:
        lock_file(file, partial)
        done = _resume(file, partial, record)
        with _bar(len(rows), done, quiet) as bar:
            for first in range(done, len(rows), size):
                generations = generator.run(requests[first : first + size], job).finish()
                for (_, row), one in zip(rows[first : first + size], generations, strict=True):
                    fields = _fields(one, show_thoughts, job.sampling.think.constant is None)
                    file.write(json.dumps({**row} | fields, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(generations))
        os.replace(partial, output)
        _record_file(partial).unlink()
    return len(rows)


def _requests(generator: Generator, rows: list[Record], job: GenerationConfig, seed: int) -> list[Request]:
    """Returns the requests for all prompts; checks every prompt before generation starts."""
    for where, row in rows:
        prompt = row.get(PROMPT)
        if not isinstance(prompt, str):
            held = f"it is {prompt!r}" if PROMPT in row else f"the fields are {', '.join(map(repr, row)) or 'missing'}"
            raise DataError(f"{where}: every record must have a text in the field {PROMPT!r}; {held}.")
        taken = [name for name in ADDED if name in row]
        if taken:
            raise DataError(f"{where} has a field {taken[0]!r} already. Rename it, or give another file.")
        try:
            generator.limit(len(generator.encode(prompt)), job)
        except UserError as error:
            raise DataError(f"{where}: {error}") from error
    return generator.requests([row[PROMPT] for _, row in rows], job, seed)


def _resume(file: BinaryIO, partial: Path, record: Mapping[str, Any]) -> int:
    """Returns the number of finished rows; drops an incomplete last line. `file` is `partial`, open to append.

    Raises:
      DataError: the rows were made with other settings.
    """
    record_file = _record_file(partial)
    if not record_file.exists():
        file.truncate(0)
        write_json(record_file, record)
        return 0
    _check_same(partial, record)
    file.seek(0)
    kept = file.read()
    file.truncate(kept.rfind(b"\n") + 1)
    return kept.count(b"\n")


def _check_same(partial: Path, record: Mapping[str, Any]) -> None:
    """Raises DataError if the partial output was made with other settings."""
    record_file = _record_file(partial)
    try:
        made_with = json.loads(record_file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{record_file} cannot be read: {error}. Remove it to start again.") from error
    changed = differences(made_with, record, "")
    if changed:
        raise DataError(
            f"{partial} was started with other settings (then -> now):\n"
            + "\n".join(f"  - {line.removeprefix('.')}" for line in changed)
            + f"\nRestore these settings to resume, or remove {partial} and {record_file} to start again."
        )


def _record_file(partial: Path) -> Path:
    return Path(f"{partial}.json")


def _fields(one: Generation, show_thoughts: bool, chooses: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"completion": one.text, "finish_reason": one.finish_reason}
    if show_thoughts:
        fields |= {"thoughts": one.thoughts, "mixing_weights": [round(w, 6) for w in one.mixing_weights]}
    if show_thoughts and chooses:
        fields["thoughts"] = [token.thought if token.has_thought else None for token in one.tokens]
        fields["thinking_rate"] = round(thinking_rate([one]), 6)
    return fields


def _bar(total: int, done: int, quiet: bool) -> tqdm:
    return tqdm(total=total, initial=done, disable=quiet, unit="prompt", dynamic_ncols=True)

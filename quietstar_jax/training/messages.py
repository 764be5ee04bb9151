"""What a run prints when it starts, and the commands to run after it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.commands import written
from quietstar_jax.config import Config
from quietstar_jax.data.pretokenized.read import is_prepared
from quietstar_jax.data.unknown import Unknown
from quietstar_jax.io import is_url
from quietstar_jax.training.setup import Run

_SPECIAL = re.compile(r"<[|\w/▁｜-]+>")  # special tokens in decoded text
PROMPT_WORDS = 12
LIMIT = "200"  # texts to evaluate


def start_lines(run: Run, state: TrainState, sources: Sequence[tuple[str, Unknown]], tokens: int | None) -> list[str]:
    """Returns the lines about the model, the devices, the text and the steps of a run that starts or resumes.

    Args:
      sources: names and sizes of the sources of text, with what the tokenizer does not know of a sample.
      tokens: of the text, or None if they are not counted in advance.
    """
    config, a, mesh = run.config, run.architecture, run.mesh
    total, trained = (_parameters(values) for values in ({**state.weights}, state.params))
    learns = "all" if total == trained else f"{trained:,}"
    device = mesh.devices.flat[0]
    over = " ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    step, end = int(state.step), config.total_steps
    remaining = sum(
        (span.end - max(span.start, min(step, span.end))) * span.phase.batch_size for span in config.phase_spans()
    )
    phases = ", ".join(f"{phase.steps:,} {phase.name}" for phase in config.phases)
    of_text = "" if tokens is None else f"; {tokens:,} tokens in all"
    lines = [
        f"Model: {config.model.checkpoint or 'new weights'}, {a.num_layers} layers, {a.hidden_size} wide, "
        f"{total:,} parameters, of which {learns} are trained.",
        f"Devices: {mesh.size} x {device.device_kind}{f' ({over})' if over else ''}{processes}.",
        "Text: " + "; ".join(f"{name}: {unknown.fraction:.1%} unknown" for name, unknown in sources) + of_text + ".",
        f"Steps: {end:,} ({phases}).",
    ]
    if step >= end:
        return [*lines, f"All {end:,} steps are done in {config.workdir}. Append a phase to train further."]
    begin = f"Resumed at step {step:,}: " if step else ""
    reads = f"{remaining * config.data.sequence_length:,} tokens to read. Compiling the first step ..."
    return [*lines, begin + reads]


def next_lines(config: Config, summary: Mapping[str, Any]) -> list[str]:
    """Returns the commands that show, use and measure a finished run, ready to be pasted.

    Args:
      summary: as from `training.loop.train`.
    """
    thinks = any(phase.thought_length for phase in config.phases)
    generates = thinks and config.thought.control == "none"  # no text is generated with a replacement of thoughts
    checkpoint = ["--checkpoint", config.workdir]
    sources = config.data.validation or config.data.train
    text = ["--text-key", config.data.text_key] if config.data.text_key != "text" else []
    text += ["--text-documents", config.data.text_documents] if config.data.text_documents != "file" else []
    folder = ["--data-dir", config.data.data_dir] if config.data.data_dir else []
    page = "thoughts.html" if is_url(config.workdir) else f"{config.workdir}/thoughts.html"
    samples = summary.get("sample_thoughts") or [{"context": ""}]
    words = _SPECIAL.split(samples[0]["context"])[-1].split() or ["The"]
    commands = {}
    if thinks:
        commands["See the thoughts"] = ("report", [*checkpoint, "--data", *sources, *text, *folder, "--output", page])
    prompt = [
        "--prompt",
        " ".join(words[-PROMPT_WORDS:]),
        *(["--show-thoughts"] if generates else ["--thoughts", "off"] if thinks else []),
    ]
    commands["Generate"] = ("generate", [*checkpoint, *prompt])
    if not folder and not is_prepared(sources[0]):  # `evaluate` reads one source, and no prepared tokens
        measured = ["--task", "language_modeling", "--data", sources[0], *text, "--limit", LIMIT]
        commands["Evaluate"] = ("evaluate", [*checkpoint, *measured])
    kind = "quietstar" if thinks else "base"
    commands["Export"] = ("export", [*checkpoint, "--output", "exported", "--format", kind])
    lines = [f"# {title}\n{written(name)} {shlex.join(words)}" for title, (name, words) in commands.items()]
    return ["", "Next:", *lines]


def _parameters(arrays: Mapping[str, Any]) -> int:
    return int(sum(np.prod(value.shape) for value in arrays.values()))

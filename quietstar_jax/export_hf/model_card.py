"""The README.md of an export: a description of the model, its training and its measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quietstar_jax.checkpoint.run_checkpoint import RunCheckpoint
from quietstar_jax.config import Config
from quietstar_jax.errors import ConfigError
from quietstar_jax.evals.statistics import confidence_interval
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.hf.generation import thinking_reach
from quietstar_jax.hf.names import parameter_shapes, quietstar_entries
from quietstar_jax.io import read_json_lines
from quietstar_jax.settings import to_mapping
from quietstar_jax.training.answers import QUESTIONS

# Metrics of `metrics.jsonl` that end in `_without_thoughts` and `_with_thoughts`: meaning; factor.
PAIRS = {
    "loss": ("loss, nats per token", 1),
    "accuracy": ("next token right, %", 100),
    "answer_accuracy": (f"answer right without written steps, % of {QUESTIONS} questions", 100),
    "answer_loss": ("loss of this answer, nats", 1),
}
SINGLE = {"mixing_weight": "mean mixing weight", "reward": "mean reward, nats"}
PATHS = {"model": ("checkpoint", "adapter"), "data": ("train", "validation", "data_dir", "tokenizer")}  # settings
USE = {
    "quietstar": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)  # modeling_quietstar.py of this folder
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
text = tokenizer(["..."], return_tensors="pt")
model.generate(**text, max_new_tokens=50)                     # a greedy thought before every token
model.generate(**text, max_new_tokens=50, thought_length=0)   # the same weights without thoughts
model.generate(**text, max_new_tokens=50, think="entropy:1.5")  # a thought only where the prediction is uncertain
```""",
    "base": """\
The decoder alone, without thoughts: a model with the architecture and vocabulary of the one before training.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```""",
    "adapter": """\
The low-rank adapters (LoRA) of the decoder alone, without its base and without thoughts.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)  # BASE: see Training
```""",
}

CITATION = """\
## Citation

```bibtex
@article{zelikman2024quietstar,
  title   = {Quiet-STaR: Language Models Can Teach Themselves to Think Before Speaking},
  author  = {Zelikman, Eric and Harik, Georges and Shao, Yijia and Jayasiri, Varuna and
             Haber, Nick and Goodman, Noah D.},
  journal = {arXiv preprint arXiv:2403.09629},
  year    = {2024}
}
```"""


def model_card(run: RunCheckpoint, options: ExportOptions) -> dict[str, bytes]:
    """Returns the files of the model card by name.

    These are README.md, Markdown with the front matter that the Hugging Face hub expects, and the picture of
    `options`. The sample thoughts of `summary.json` are left out: they quote the held-out text, which may be private.

    Raises:
      ConfigError: the picture cannot be read.
    """
    files: dict[str, bytes] = {}
    if options.picture:
        try:
            files[f"thought{options.picture.suffix}"] = options.picture.read_bytes()
        except OSError as error:
            raise ConfigError(f"picture is {options.picture}, which cannot be read: {error}. Omit it.") from error
    return {"README.md": _text(run, options, next(iter(files), "")).encode(), **files}


def _text(run: RunCheckpoint, options: ExportOptions, picture: str) -> str:
    config = run.config
    settings = _without_folders({key: value for key, value in to_mapping(config).items() if key != "workdir"})
    settings["model"]["architecture"] = to_mapping(run.architecture)  # the model's, which may differ from the setting
    origin = f"`{last_part(config.model.checkpoint)}`" if config.model.checkpoint else "random weights"
    if run.model_commit:
        origin += f" at commit `{run.model_commit}`"
    parts = [
        _front_matter(run, options),
        "# Quiet-STaR",
        "Trained with quietstar_jax, Quiet-STaR in JAX ([paper](https://arxiv.org/abs/2403.09629)): the model learns "
        "from plain text to think before every token.",
        f"![A text, coloured by how much each thought helped, and one thought]({picture})" if picture else "",
        f"## Use\n\n{USE[options.format]}\n\n`FOLDER` is this folder, or the id of this repository on the hub."
        + (f"\n\n`generate` thinks by the policy `{options.think}` by default." if options.think else "")
        + (f"\n\n{_reach(run, options)}" if options.format == "quietstar" else ""),
        f"## Training\n\n{_shape(run)}",
        f"From {origin}; {run.step} of {config.total_steps} steps done. Weights: {options.dtype}, "
        f"from checkpoint `{run.checksum[:16]}`.",
        _phase_table(config, run.step),
        f"Text: {_sources(config.data.train)}, sequences of "
        f"{config.data.sequence_length} tokens ({config.data.packing}).",
        _measurements(run),
        _licence(run, options),
        CITATION,
        "## Configuration\n\n```json\n" + json.dumps(settings, indent=2, ensure_ascii=False) + "\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _front_matter(run: RunCheckpoint, options: ExportOptions) -> str:
    fields = {
        "library_name": "peft" if options.format == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": run.config.model.checkpoint} if _from_hub(run) else {}),
        **run.license,
    }
    return "\n".join(["---", *(f"{name}: {value}" for name, value in fields.items()), "tags:\n- quiet-star\n---"])


def _from_hub(run: RunCheckpoint) -> bool:
    """Whether training began from a hub id: a folder or another run has a recorded place."""
    return bool(run.model_commit) and not run.base_folder


def _reach(run: RunCheckpoint, options: ExportOptions) -> str:
    """What `generate` of an export does by default; exports with another reach have another card."""
    reach = options.reach or thinking_reach(run.generation, run.workdir)
    return f"By default, `generate` uses each thought for {f'{reach} tokens' if reach > 1 else 'one token'}."


def _shape(run: RunCheckpoint) -> str:
    a = run.architecture
    shapes = parameter_shapes(quietstar_entries(a, run.config.thought.heads))
    count = sum(math.prod(shape) for shape in shapes.values())
    return (
        f"A decoder of the family {a.family} with {a.num_layers} layers, {a.hidden_size} wide, {a.num_heads} attention "
        f"heads and {a.vocab_size:,} tokens: {count:,} parameters, including those of the thoughts."
    )


def _licence(run: RunCheckpoint, options: ExportOptions) -> str:
    checkpoint = run.config.model.checkpoint
    if not checkpoint:
        text = "The weights were trained from random ones. State their licence here before you publish them."
    else:
        kind = run.license.get("license_name") or run.license.get("license")
        stated = f" ({kind})" if kind else " (see its model card)"
        text = f"The weights derive from `{last_part(checkpoint)}`, whose licence{stated} applies to them."
    code = " The module modeling_quietstar.py is under Apache-2.0." if options.format == "quietstar" else ""
    return f"## Licence\n\n{text}{code}"


def _measurements(run: RunCheckpoint) -> str:
    """The held-out metrics at the exported step."""
    records = read_json_lines(run.workdir / "metrics.jsonl")
    found = [r for r in records if r.get("kind") == "evaluation" and r.get("step") == run.step]
    if not found:
        return "## Measured\n\nNothing was measured on held-out text at this step."
    record = found[-1]

    def cell(name: str, factor: int) -> str:
        value = record.get(name)
        if value is None:
            return "-"
        if name.startswith("answer_accuracy"):
            low, high = confidence_interval(np.arange(QUESTIONS) < round(value * QUESTIONS), seed=0) or (0.0, 1.0)
            return f"{100 * value:.1f} ({100 * low:.1f} .. {100 * high:.1f})"
        return f"{factor * value:.4f}" if factor == 1 else f"{factor * value:.1f}"

    rows = [
        f"| {meaning} | {' | '.join(cells)} |"
        for name, (meaning, factor) in PAIRS.items()
        if set(cells := [cell(f"{name}_{kind}_thoughts", factor) for kind in ("without", "with")]) != {"-"}
    ]
    rows += [f"| {meaning} | - | {record[name]:.4f} |" for name, meaning in SINGLE.items() if name in record]
    size = f", {record['tokens']:,} tokens" if "tokens" in record else ""
    title = f"## Measured\n\nOn {_sources(run.config.data.validation)}{size}, with greedy thoughts"
    if run.config.evaluation.reach > 1:
        title += f", each used for {run.config.evaluation.reach} tokens"
    exact = "; 95 % intervals of answers are exact" if any("answer right" in row for row in rows) else ""
    return "\n".join([f"{title}{exact}.\n", "| figure | without thoughts | with thoughts |", "|---|---|---|", *rows])


def _phase_table(config: Config, step: int) -> str:
    rows = ["| phase | steps done | batch | thought length | thoughts | tokens ahead | policy weight | learning rate |",
            "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for phase, start, _ in config.phase_spans():
        done = max(0, min(phase.steps, step - start))
        thinking = (phase.thought_length, phase.num_thoughts, phase.tokens_ahead, f"{phase.policy_weight:g}")
        shown = thinking if phase.thought_length else ("-",) * len(thinking)
        cells = (phase.name, f"{done} of {phase.steps}", phase.batch_size, *shown, f"{phase.learning_rate:g}")
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def _sources(names: Sequence[str]) -> str:
    return ", ".join(f"`{last_part(name)}`" for name in names)


def _without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with paths shortened to their last part: local folders are private."""
    found = dict(settings)
    for group, names in PATHS.items():
        shown = {name: settings[group][name] for name in names}
        shown = {k: last_part(v) if isinstance(v, str) else [last_part(item) for item in v] for k, v in shown.items()}
        found[group] = {**settings[group], **shown}
    return found


def last_part(name: str) -> str:
    """Returns the last part of a path; a hub id, a URL or a dataset of a hub stays as it is.

    `hf:` and `tfds:` may be followed by a path.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind in ("hf", "tfds"):
        return f"{kind}:{last_part(rest)}"
    path = name.removeprefix("file://")
    if path.startswith(("/", "~", ".")) or (path.count("/") > 1 and "://" not in path) or "*" in path:
        return Path(path).name
    return path

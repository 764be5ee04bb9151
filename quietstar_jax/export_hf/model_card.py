"""The README.md of an export: a description of the model, its training and its measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quietstar_jax.checkpoint.run_checkpoint import RunCheckpoint
from quietstar_jax.config import Config
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.io import read_json_lines
from quietstar_jax.settings import to_mapping

MEASURED = {
    "loss_without_thoughts": "loss without thoughts (nats per token)",
    "loss_with_thoughts": "loss with thoughts (nats per token)",
    "accuracy_without_thoughts": "accuracy of the next token without thoughts",
    "accuracy_with_thoughts": "accuracy of the next token with thoughts",
    "mixing_weight": "mean mixing weight",
    "reward": "mean reward (nats)",
    "tokens": "held-out tokens",
}
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


def model_card(run: RunCheckpoint, options: ExportOptions) -> str:
    """Returns the model card: Markdown with the front matter that the Hugging Face hub expects."""
    config = run.config
    settings = _without_folders({key: value for key, value in to_mapping(config).items() if key != "workdir"})
    settings["model"]["architecture"] = to_mapping(run.architecture)  # the model's, which may differ from the setting
    origin = f"`{last_part(config.model.checkpoint)}`" if config.model.checkpoint else "random weights"
    if run.model_commit:
        origin += f" at commit `{run.model_commit}`"
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- quiet-star\n---",
        "# Quiet-STaR",
        "Trained with quietstar_jax, Quiet-STaR in JAX ([paper](https://arxiv.org/abs/2403.09629)): the model learns "
        "from plain text to think before every token.",
        f"## Use\n\n{USE[options.format]}"
        + (f"\n\n`generate` thinks by the policy `{options.think}` by default." if options.think else ""),
        f"## Training\n\nFrom {origin}; {run.step} of {config.total_steps} steps done. Weights: {options.dtype}, "
        f"from checkpoint `{run.checksum[:16]}`.",
        _phase_table(config, run.step),
        f"Text: {_sources(config.data.train)}, sequences of "
        f"{config.data.sequence_length} tokens ({config.data.packing}).",
        _measurements(run),
        "## Configuration\n\n```json\n" + json.dumps(settings, indent=2, ensure_ascii=False) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def measurements(run: RunCheckpoint) -> dict[str, Any]:
    """Returns the run's held-out metrics at the exported step; empty if the run did not evaluate at that step."""
    for record in reversed(read_json_lines(run.workdir / "metrics.jsonl")):
        if record.get("kind") == "evaluation" and record.get("step") == run.step:
            return {name: record[name] for name in MEASURED if name in record}
    return {}


def _measurements(run: RunCheckpoint) -> str:
    found = measurements(run)
    if not found:
        return "## Measured\n\nNothing was measured on held-out text at this step."
    rows = [f"| {MEASURED[name]} | {value:.6g} |" for name, value in found.items()]
    return "\n".join(
        [
            f"## Measured\n\nOn {_sources(run.config.data.validation)}, with greedy thoughts:\n",
            "| figure | value |",
            "|---|---|",
            *rows,
        ]
    )


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
    """Returns the last part of a path that begins with `/`, `~` or `.`; a hub id or `tfds:...` stays as it is."""
    return Path(name).name if name.startswith(("/", "~", ".")) else name

"""Exports a checkpoint of a run as a Hugging Face folder: weights, tokenizer and model card."""

from __future__ import annotations

from pathlib import Path

from quietstar_jax.checkpoint.run_checkpoint import RunCheckpoint, open_run, run_tokenizer
from quietstar_jax.data.vocabulary import UNUSED, unused_ids
from quietstar_jax.errors import ConfigError
from quietstar_jax.export_hf.merged import merged_parameters
from quietstar_jax.export_hf.model_card import last_part, model_card
from quietstar_jax.export_hf.save import ExportOptions, Thoughts, save, save_adapter
from quietstar_jax.hf.adapter import adapter_config
from quietstar_jax.hf.files import CheckpointFiles
from quietstar_jax.hf.json_file import read_json
from quietstar_jax.models.families import TEXT_PARTS
from quietstar_jax.training.base import open_base
from quietstar_jax.training.base_record import RecordedBase


def export(checkpoint: Path, output: Path, options: ExportOptions, step: int | None = None) -> RunCheckpoint:
    """Exports one checkpoint of a run; see `export_hf.save`.

    Args:
      checkpoint: a run's work directory, or the `checkpoints` folder in it.
      output: the folder to create.
      step: step of the checkpoint; None = the newest.

    Returns:
      The checkpoint that was exported.

    Raises:
      UserError: the export failed; the message says what to do. No folder named `output` is left behind.
    """
    run = open_run(checkpoint, step)
    if options.format == "adapter":
        model = run.config.model
        if model.adapters.maps != "none":
            _check_base(run)
        described = adapter_config(run.architecture, model.adapters, last_part(model.checkpoint), run.model_commit)
        card = model_card(run, options)
        save_adapter(output, run.parameters, run.architecture, model.adapters, described, options.dtype, card)
        return run
    tokenizer = run_tokenizer(run).within(run.architecture.vocab_size)  # pads with a token that has a row
    tokenizer.begin_with(tokenizer.begins(run.config.data.prepend_bos))
    thought = run.config.thought
    thoughts = Thoughts(
        length=run.config.evaluation_thought_length,
        embedding_scale=thought.embedding_scale,
        mixing=thought.mixing,
        heads=thought.heads,
        start_token=thought.start_token,
        end_token=thought.end_token,
        starting_id=run.vocabulary.start_token,
        ending_id=run.vocabulary.end_token,
        unused_ids=unused_ids(tokenizer, run.architecture.vocab_size, {UNUSED: run.vocabulary.unused}),
    )
    card = model_card(run, options)
    save(output, merged_parameters(run), run.architecture, tokenizer, thoughts, options, card, run.generation)
    return run


def _check_base(run: RunCheckpoint) -> None:
    """Raises ConfigError if peft cannot load an adapter onto the base of a run."""
    model, problem = run.config.model, ""
    if "step" in run.base:
        problem = "is a run of this program, which transformers cannot load"
    elif run.architecture.family in TEXT_PARTS.values():
        base = open_base(RecordedBase.of(run).source)
        assert isinstance(base, CheckpointFiles)
        if read_json(base.folder / "config.json").get("model_type") in TEXT_PARTS:
            problem = "is a model of text and images, in which transformers gives the decoder's maps other names"
    if problem:
        raise ConfigError(
            f"A PEFT adapter is impossible: the base {last_part(model.checkpoint)} {problem}. The formats base and "
            "quietstar merge adapters."
        )

"""Builds the pages that the command line `quietstar_jax.report` writes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quietstar_jax.config import ComputeDtype
from quietstar_jax.data.documents import Documents, joined, open_documents
from quietstar_jax.data.pipeline import VALIDATION_SEED
from quietstar_jax.data.sources import SYNTHETIC
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import CheckpointError, ConfigError, DataError, UserError
from quietstar_jax.evals.calibration import calibrate
from quietstar_jax.evals.thought_use import ensembles, summarize_use
from quietstar_jax.inference.load_model import LoadedModel, load_model
from quietstar_jax.io import place
from quietstar_jax.methods.thinking import ALWAYS, ThinkPolicy, choose_policy
from quietstar_jax.reports.checkpoint_page import checkpoint_page
from quietstar_jax.reports.observe import Observed, Window, cut_windows, longest_window, observe, thinking_rate
from quietstar_jax.reports.options import TextOptions
from quietstar_jax.reports.study_page import study_page
from quietstar_jax.studies.results import read_results
from quietstar_jax.thought_config import PERTURBATIONS
from quietstar_jax.thoughts.front import of_scores, summarize_front
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.token_scores import TokenScores
from quietstar_jax.training.metrics import read_metrics

USE_TOKENS = 1000  # of the first windows, for perturbed thoughts: these need many passes
SYNTHETIC_TEXT = (
    "The text is a synthetic corpus of small problems that need several steps: sums, little stories of gain and loss, "
    "chains of units, pointers to follow (only the last digit of a number counts). Some documents write the steps "
    "out between marks, after “show”; others give the answer directly, after “ask”. That answer is what a thought "
    "can help with most: it can contain the steps."
)


class CheckpointReport(NamedTuple):
    """What a page shows, and the page as HTML."""

    observed: Observed
    html: str


def report_checkpoint(
    path: str, options: TextOptions, step: int | None = None, *, revision: str = "", dtype: ComputeDtype = "float32",
    against: str = "", against_step: int | None = None,
) -> CheckpointReport:  # fmt: skip
    """Returns the page of a model that has learned to think, or of two side by side.

    Args:
      path, step, revision, dtype: see `load_model`.
      against, against_step: the other model, which must read the text as the same tokens; with a step alone, it is
        another checkpoint of the run `path`.

    Raises:
      UserError: a model has not learned to think, a model or the text cannot be read, or the models cannot be compared.
    """
    options.check()
    models = [_load(path, step, revision, dtype)]
    if against or against_step is not None:
        models.append(_load(against or path, against_step, "" if against else revision, dtype, "against_step"))
    model = models[0]
    options = dataclasses.replace(options, reach=options.reach or model.own_reach(options.tokens_ahead))
    ahead = options.tokens_ahead or model.tokens_ahead
    settings = [one.settings(options.thought_length, ahead, options.reach) for one in models]
    gate_ahead = dataclasses.replace(
        settings[0], tokens_ahead=max(settings[0].tokens_ahead, model.thought.gate_tokens_ahead)
    )
    length = min(map(longest_window, models, [gate_ahead, *settings[1:]], [options.sequence_length] * len(models)))
    sources = [_documents(one, options) for one in models]
    documents = len(sources[0]) if options.prompt else options.limit or len(sources[0])
    cut = functools.partial(cut_windows, documents=documents, max_tokens=options.page_tokens, length=length)
    windows, *others = map(cut, models, sources)
    for other, theirs in zip(models[1:], others, strict=True):
        _check_comparable(model, other, windows, theirs)
    seen = [_think(one, own, windows, options) for one, own in zip(models, settings, strict=True)]
    think = choose_policy(True, options.think, model.think)
    measured = model, settings[0], windows, seen[0].observations, options.seed, think
    seen[0] = dataclasses.replace(
        seen[0],
        about=SYNTHETIC_TEXT if SYNTHETIC in options.data else "",
        notes=[*_text_notes(options, length, windows[-1].document + 1, len(sources[0])), *seen[0].notes],
        use=measure_use(*measured),
        selective=measure_selective(*measured),
    )
    folder = place(str(path), "The model")
    metrics = [record for record in _metrics(folder) if model.step is None or record["step"] <= model.step]
    return CheckpointReport(seen[0], checkpoint_page(seen, metrics))


def _load(
    path: str, step: int | None, revision: str, dtype: ComputeDtype, step_name: str = "step"
) -> LoadedModel:  # fmt: skip
    """Loads a model that can think; `step_name` is the name of its step in messages."""
    try:
        model = load_model(path, step=step, revision=revision, dtype=dtype)
    except UserError as error:
        error.args = (str(error).replace("`step`", f"`{step_name}`"), *error.args[1:])
        raise
    if not model.can_think:
        raise CheckpointError(
            f"{path} was not trained with thoughts, so there is nothing to show. Give a run that was."
        )
    return model


def _documents(model: LoadedModel, options: TextOptions) -> Sequence[np.ndarray] | Documents:
    """Returns the tokens of the documents, without begin and end tokens."""
    if options.prompt:
        return [np.asarray(model.tokenizer.encode(text), np.int32) for text in options.prompt]
    config = DataConfig(
        validation=options.data, text_key=options.text_key, text_documents=options.text_documents,
        data_dir=options.data_dir,
    )  # fmt: skip
    return joined(
        [
            open_documents(spec, config, model.tokenizer, split="validation", seed=VALIDATION_SEED)
            for spec in options.data
        ]
    )


def _think(model: LoadedModel, settings: ThoughtSettings, windows: Sequence[Window], options: TextOptions) -> Observed:
    """Returns the thoughts in the windows, with notes about them."""
    think = model.check_policy(choose_policy(True, options.think, model.think))
    scores = observe(model, settings, windows, samples=options.samples, seed=options.seed, think=think)
    share = thinking_rate(scores)
    if not share:
        raise DataError(f"The policy {think} thinks nowhere in this text, so there is nothing to show. Change `think`.")
    return Observed(model, settings, windows, scores, notes=_thought_notes(model, options, think, share))


def _check_comparable(
    model: LoadedModel, other: LoadedModel, windows: Sequence[Window], theirs: Sequence[Window]
) -> None:
    """Checks that two models are different and read the same tokens.

    Raises:
      ConfigError: they are the same checkpoint.
      DataError: their tokens differ.
    """
    if (other.path, other.step, other.commit) == (model.path, model.step, model.commit):
        raise ConfigError(
            "The page would compare a checkpoint with itself. Give another model as `against`, or another step of the "
            "run as `against_step`."
        )
    pairs = zip(windows, theirs, strict=False)
    if len(windows) != len(theirs) or not all(np.array_equal(a.tokens, b.tokens) for a, b in pairs):
        raise DataError(
            f"{other.path} reads the text as other tokens than {model.path}, so their thoughts cannot be compared "
            "token by token. Give two models with the same tokenizer."
        )


def measure_use(
    model: LoadedModel, settings: ThoughtSettings, windows: Sequence[Window], seen: Sequence[TokenScores], seed: int,
    think: ThinkPolicy = ALWAYS,
) -> dict[str, Any]:  # fmt: skip
    """Measures whether the thoughts are used.

    Returns:
      the figures of `thought_use.summarize_use` for greedy thoughts in the first windows of at most about `USE_TOKENS`
      tokens, with every perturbation, under `tokens`, `without_thoughts` and `with_thoughts` their number and losses;
      with sampled thoughts, `ensembles` of them in all windows.
    """
    ends = np.cumsum([len(window.tokens) - 1 for window in windows])
    some = max(1, int((ends <= USE_TOKENS).sum()))
    greedy = [
        scores.of_thoughts(0)
        for scores in observe(model, settings, windows[:some], samples=0, seed=seed, kinds=PERTURBATIONS, think=think)
    ]
    found: dict[str, Any] = {
        "tokens": int(ends[some - 1]),
        "without_thoughts": float(np.concatenate([scores.base.nll for scores in greedy]).mean(dtype=np.float64)),
        "with_thoughts": float(np.concatenate([scores.talk.nll for scores in greedy]).mean(dtype=np.float64)),
        **summarize_use(greedy, seed),
    }
    if len(seen[0].thoughts) > 1:
        sampled = [scores.of_thoughts(slice(1, None)) for scores in seen]
        found["ensembles"] = ensembles(sampled, seed)
    return found


def measure_selective(
    model: LoadedModel, settings: ThoughtSettings, windows: Sequence[Window], seen: Sequence[TokenScores], seed: int,
    think: ThinkPolicy = ALWAYS,
) -> dict[str, Any]:  # fmt: skip
    """Measures greedy thoughts at some of the positions.

    Args:
      seen: scores with thoughts at all positions; computed again where `think` chooses, a thought is used for several
        tokens, or the gate predicts the gain of another number of tokens.

    Returns:
      `front`, as from `summarize_front`; if the model has a thinking gate, `gate`, as from `calibrate`, at the prices
      that it was trained at and that of `think`, with `tokens_ahead`, the number of tokens of a gain.
    """
    ahead = model.thought.gate_tokens_ahead
    several = model.thought.gate and ahead > 1
    if think.constant is None or settings.reach > 1 or (several and settings.tokens_ahead != ahead):
        settings = dataclasses.replace(settings, tokens_ahead=ahead if several else settings.tokens_ahead, reach=1)
        seen = observe(model, settings, windows, samples=0, seed=seed)
    greedy = [scores.of_thoughts(0) for scores in seen]
    positions = of_scores(greedy, one_answer=False)
    found = {"front": summarize_front(positions)}
    if model.thought.gate:
        prices = sorted({*model.thought.gate_prices, *(think.numbers if think.needs_gate else ())})
        slope = math.exp(float(np.asarray(model.params["gate.log_slope"])[0]))
        gain = positions.base_nll.astype(np.float64) - positions.talk_nll
        if several:
            gain = np.concatenate([scores.reward for scores in greedy]).astype(np.float64)
        found["gate"] = {"tokens_ahead": ahead, **calibrate(gain, positions.rankings, prices, slope)}
    return found


def report_study(root: Path) -> str:
    """Returns the page of a study."""
    return study_page(read_results(root), str(root))


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """Training records of a run; `folder` may be its workdir, or the checkpoints folder in it."""
    return read_metrics(folder / "metrics.jsonl") or read_metrics(folder.parent / "metrics.jsonl")


def _text_notes(options: TextOptions, length: int, shown: int, available: int) -> list[str]:
    text = (
        f"the first {shown:,} of {available:,} documents of {', '.join(options.data)}, at most "
        f"{options.limit or available:,} documents and {options.page_tokens:,} tokens (--limit, --page-tokens)"
    )
    if options.prompt:
        text = f"that of --prompt, at most {options.page_tokens:,} tokens (--page-tokens)"
    return [
        f"Text: {text}; longer text is cut there.",
        f"The model read at most {length:,} tokens at a time; in longer documents ⋯ marks where it started again.",
    ]


def _thought_notes(model: LoadedModel, options: TextOptions, think: ThinkPolicy, share: float) -> list[str]:
    drawn = f"{options.samples} sampled (seed {options.seed})" if options.samples else "no sampled ones"
    where = "every token" if think.constant else f"{share:.1%} of the tokens, chosen by the policy {think} (--think)"
    notes = [
        f"Thoughts: one greedy and {drawn} before {where}, with the weights of {model.path}"
        + ("." if model.step is None else f" at step {model.step:,}.")
    ]
    if not think.constant:
        reach = f"Each thought is used for the next {options.reach} tokens. " if options.reach > 1 else ""
        notes.append(f"{reach}Other predictions are those without thoughts.")
    if model.thought.control != "none":
        notes.append(f"This is a control run: thoughts are replaced as set by thought.control={model.thought.control}.")
    return notes

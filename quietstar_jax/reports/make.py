"""Builds the pages that the command line `quietstar_jax.report` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from quietstar_jax.config import ComputeDtype, DataConfig, TextDocuments
from quietstar_jax.data.documents import joined, open_documents
from quietstar_jax.data.pipeline import VALIDATION_SEED
from quietstar_jax.data.sources import SYNTHETIC
from quietstar_jax.errors import CheckpointError, ConfigError, DataError
from quietstar_jax.evals.thought_use import ensembles, summarize_use
from quietstar_jax.inference.load_model import LoadedModel, load_model
from quietstar_jax.io import place
from quietstar_jax.methods.thinking import ALWAYS, NEVER, ThinkPolicy, choose_policy, parse_policy
from quietstar_jax.reports.checkpoint_page import Observed, checkpoint_page, made_thoughts
from quietstar_jax.reports.observe import Window, cut_windows, longest_window, observe
from quietstar_jax.reports.study_page import study_page
from quietstar_jax.studies.results import read_results
from quietstar_jax.thoughts.perturbations import KINDS
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.token_scores import TokenScores
from quietstar_jax.training.metrics import read_metrics

USE_TOKENS = 1000  # of the first windows, for perturbed thoughts: these need many passes
MOST_TOKENS = 20_000  # on one page: about 10 MB with four thoughts of six tokens
SYNTHETIC_TEXT = (
    "The text is a synthetic corpus of small problems that need several steps: sums, little stories of gain and loss, "
    "chains of units, pointers to follow (only the last digit of a number counts). Some documents write the steps "
    "out between marks, after “show”; others give the answer directly, after “ask”. That answer is what a thought "
    "can help with most: it can contain the steps."
)


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Which text, and how the model thinks in it; see `python -m quietstar_jax.report --help`."""

    data: tuple[str, ...]
    limit: int = 20  # documents; 0 = all
    page_tokens: int = 4000
    sequence_length: int = 256
    think: str | None = None  # policy of thinking; None = that of the model
    thought_length: int | None = None  # None = as trained
    tokens_ahead: int | None = None
    samples: int = 3
    seed: int = 0
    text_key: str = "text"
    text_documents: TextDocuments = "file"
    data_dir: str = ""

    def check(self) -> None:
        """Raises ConfigError for impossible values."""
        if self.think is not None and parse_policy(self.think) == NEVER:
            raise ConfigError("think is 'never', so there is nothing to show. Give another policy.")
        at_least = dict(limit=0, page_tokens=2, sequence_length=3, thought_length=1, tokens_ahead=1, samples=0, seed=0)
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"`{name}` is {value}; it must be {least} or more.")
        if self.page_tokens > MOST_TOKENS:
            raise ConfigError(
                f"`page_tokens` is {self.page_tokens}; it must be at most {MOST_TOKENS}: browsers are slow with larger "
                "pages."
            )
        if self.samples > 16:
            raise ConfigError(f"`samples` is {self.samples}; it must be at most 16.")


def report_checkpoint(
    path: str, options: TextOptions, step: int | None = None, *, revision: str = "", dtype: ComputeDtype = "float32"
) -> str:
    """Returns the page of a model that has learned to think.

    Args:
      path, step, revision, dtype: see `load_model`.

    Raises:
      UserError: the model has not, or the model or the text cannot be read.
    """
    options.check()
    model = load_model(path, step=step, revision=revision, dtype=dtype)
    if not model.can_think:
        raise CheckpointError(
            f"{path} was not trained with thoughts, so there is nothing to show. Give a run that was."
        )
    config = DataConfig(
        validation=options.data, text_key=options.text_key, text_documents=options.text_documents,
        data_dir=options.data_dir,
    )  # fmt: skip
    source = joined(
        [
            open_documents(spec, config, model.tokenizer, split="validation", seed=VALIDATION_SEED)
            for spec in options.data
        ]
    )
    settings = model.settings(options.thought_length, options.tokens_ahead or model.tokens_ahead)
    length = longest_window(model, settings, options.sequence_length)
    documents = options.limit or len(source)
    windows = cut_windows(model, source, documents=documents, max_tokens=options.page_tokens, length=length)
    think = choose_policy(True, options.think, model.think)
    seen = observe(model, settings, windows, samples=options.samples, seed=options.seed, think=think)
    share = float(np.concatenate([made_thoughts(scores)[0] for scores in seen]).mean())
    if not share:
        raise DataError(f"The policy {think} thinks nowhere in this text, so there is nothing to show. Change `think`.")
    about = SYNTHETIC_TEXT if SYNTHETIC in options.data else ""
    use = measure_use(model, settings, windows, seen, options.seed, think)
    notes = _notes(model, options, length, windows[-1].document + 1, len(source), think, share)
    folder = place(str(path), "The model")
    metrics = [record for record in _metrics(folder) if model.step is None or record["step"] <= model.step]
    return checkpoint_page(Observed(model, settings, windows, seen, about, notes, use), metrics)


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
        TokenScores(*scores[:3], *jax.tree.map(lambda x: x[0], scores[3:]))
        for scores in observe(model, settings, windows[:some], samples=0, seed=seed, kinds=KINDS, think=think)
    ]
    found: dict[str, Any] = {
        "tokens": int(ends[some - 1]),
        "without_thoughts": float(np.concatenate([scores.base.nll for scores in greedy]).mean(dtype=np.float64)),
        "with_thoughts": float(np.concatenate([scores.talk.nll for scores in greedy]).mean(dtype=np.float64)),
        **summarize_use(greedy, seed),
    }
    if len(seen[0].thoughts) > 1:
        sampled = [TokenScores(*scores[:3], *jax.tree.map(lambda x: x[1:], scores[3:])) for scores in seen]
        found["ensembles"] = ensembles(sampled, seed)
    return found


def report_study(root: Path) -> str:
    """Returns the page of a study."""
    return study_page(read_results(root), str(root))


def _metrics(folder: Path) -> list[dict[str, Any]]:
    """Training records of a run; `folder` may be its workdir, or the checkpoints folder in it."""
    return read_metrics(folder / "metrics.jsonl") or read_metrics(folder.parent / "metrics.jsonl")


def _notes(
    model: LoadedModel, options: TextOptions, length: int, shown: int, available: int, think: ThinkPolicy, share: float
) -> list[str]:  # fmt: skip
    drawn = f"{options.samples} sampled (seed {options.seed})" if options.samples else "no sampled ones"
    notes = [
        f"Text: the first {shown:,} of {available:,} documents of {', '.join(options.data)}, at most "
        f"{options.limit or available:,} documents and {options.page_tokens:,} tokens (--limit, --page-tokens); longer "
        "text is cut there.",
        f"The model read at most {length:,} tokens at a time; in longer documents ⋯ marks where it started again.",
        f"Thoughts: one greedy and {drawn} before every token, with the weights of {model.path}"
        + ("." if model.step is None else f" at step {model.step:,}."),
    ]
    if think.constant is None:
        notes.append(
            f"Thoughts are used before only {share:.1%} of the tokens, chosen by the policy {think} (--think). "
            "Elsewhere the prediction is the one without thoughts."
        )
    if model.thought.control != "none":
        notes.append(f"This is a control run: thoughts are replaced as set by thought.control={model.thought.control}.")
    return notes

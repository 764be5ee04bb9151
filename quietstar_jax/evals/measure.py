"""Runs one measurement and returns one record of its settings and results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import jax
from tqdm import tqdm

from quietstar_jax.data.sources import content_hash, open_source
from quietstar_jax.data.vocabulary import matching_ids
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.evals.answers import AnswerWriter
from quietstar_jax.evals.direct import measure_answers
from quietstar_jax.evals.language_modeling import Windows, measure_text, text_bytes
from quietstar_jax.evals.options import Options, policy_of
from quietstar_jax.evals.questions import Question, read_questions
from quietstar_jax.evals.records import Records
from quietstar_jax.evals.spans import measure_spans, read_marked_texts
from quietstar_jax.evals.tails import ContinuationScorer, UseOptions, longest_text
from quietstar_jax.evals.tasks import DIRECT, SPANS, TEXT, VOTING, find_task, with_fields
from quietstar_jax.evals.voting import ANSWER_TOKENS, CONCLUSION, STEPS, Sampling, measure_votes
from quietstar_jax.inference.generator import Generator
from quietstar_jax.inference.load_model import LoadedModel, load_model
from quietstar_jax.methods.thinking import ALWAYS, NEVER, ThinkPolicy
from quietstar_jax.thought_config import Control, ThoughtConfig

PACKAGES = ("quietstar_jax", "jax", "jaxlib", "flax", "transformers", "numpy")
WINDOW = 1024  # tokens, if the model has that many positions
VOTES = 8  # samples of a majority vote


def measure(options: Options) -> dict[str, Any]:
    """Runs one measurement.

    Returns:
      the results of the task (see `measure_answers`, `measure_votes`, `measure_text`), the figures of the requested
      mode also at the top level (with thoughts if both were measured), and what is needed to repeat the measurement.

    Raises:
      UserError: the message says what to do.
    """
    options.check()
    task = find_task(options.task)
    layouts = with_fields(task, options.fields, options.answer_key)
    questions = read_questions(options.data, layouts, options.limit or None) if layouts else []
    started = time.monotonic()
    model = load_model(
        options.checkpoint, step=options.step, revision=options.revision, dtype=options.dtype,
        prefix_attention=options.prefix_attention,
    )  # fmt: skip
    if options.control:
        model = dataclasses.replace(model, thought=_with_control(model.thought, options.control))
    everywhere = str(ALWAYS) if options.think_front and model.can_think else None
    policy = thinking_policy(options.thoughts, options.think or everywhere, model)
    modes = thought_modes(options.thoughts, policy)
    options.check_thoughts(model, modes)
    if not options.reach:
        one = options.think_front or "with_thoughts" not in modes
        options = dataclasses.replace(options, reach=1 if one else model.own_reach())
    kinds = {DIRECT: _answers, VOTING: _votes, TEXT: _text, SPANS: _spans}
    found = kinds[task.kind](options, model, policy, modes, questions)
    primary = found[modes[-1]]
    return {
        "task": options.task,
        "data": options.data,
        "thoughts": "both" if len(modes) > 1 else {"without_thoughts": "off", "with_thoughts": "on"}[modes[0]],
        "think": str(policy),
        **{name: value for name, value in primary.items() if not isinstance(value, dict)},
        **found,
        "checkpoint_hash": model.fingerprint,
        "seed": options.seed,
        "seconds": round(time.monotonic() - started, 1),
        "model": model.record,
        "config": dataclasses.asdict(options),
        "data_hash": content_hash(options.data, _data_config(options)),
        "versions": versions(),
    }


def _with_control(thought: ThoughtConfig, control: str) -> ThoughtConfig:
    found = dataclasses.replace(thought, control=cast(Control, control))
    if problems := found.conflicts():
        raise ConfigError(f"control is {control!r}, which this model cannot have: {problems[0]}.")
    return found


def thinking_policy(thoughts: str, think: str | None, model: LoadedModel) -> ThinkPolicy:
    """Returns the policy of thinking of a measurement, see `policy_of`.

    Raises:
      CheckpointError: thoughts are requested from a model that cannot think, or a gate from one that has none.
    """
    policy = policy_of(thoughts, think, model.think)
    if policy != NEVER and not model.can_think:
        asked = f"think is {think!r}" if think else f"`thoughts` is {thoughts!r}"
        raise CheckpointError(
            f"{asked}, but {model.path} has no trained mixing head. Set `thoughts` to off, or give a run or an export "
            "that was trained with thoughts."
        )
    return model.check_policy(policy)


def thought_modes(thoughts: str, policy: ThinkPolicy) -> tuple[str, ...]:
    """Returns which of `without_thoughts` and `with_thoughts` are measured, in this order."""
    if policy == NEVER:
        return ("without_thoughts",)
    return ("with_thoughts",) if thoughts == "on" else ("without_thoughts", "with_thoughts")


def make_scorer(
    options: Options, model: LoadedModel, policy: ThinkPolicy, modes: tuple[str, ...], use: UseOptions | None = None,
    excluded: Sequence[int] = (),
) -> ContinuationScorer:  # fmt: skip
    """Returns the scorer for the texts of a measurement.

    Args:
      use: what else it measures if there are thoughts; excluded: see `ContinuationScorer`.
    """
    length = 0 if "with_thoughts" not in modes else options.thought_length or model.thought_length
    settings = model.settings(length, reach=options.reach)
    return ContinuationScorer(
        model, settings, options.batch_size, use if length else None, think=policy, seed=options.seed,
        ranked=options.think_front, excluded=excluded,
    )  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of all that the figures depend on."""
    found = {name: metadata.version(name) for name in PACKAGES}
    device = jax.local_devices()[0]
    return {
        "python": platform.python_version(),
        **found,
        "device": device.device_kind,
        "devices": str(jax.local_device_count()),
    }


def _answers(
    options: Options, model: LoadedModel, policy: ThinkPolicy, modes: tuple[str, ...], questions: list[Question]
) -> dict[str, Any]:
    writer = AnswerWriter(model.tokenizer, model.bos)
    scorer = make_scorer(options, model, policy, modes)
    longest = longest_allowed(options, scorer.longest)
    with progress(len(questions), "question", options) as done:
        return _asked_for(modes, measure_answers(questions, writer, scorer, longest, options.seed, done))


def _votes(
    options: Options, model: LoadedModel, policy: ThinkPolicy, modes: tuple[str, ...], questions: list[Question]
) -> dict[str, Any]:
    length = options.thought_length or model.thought_length
    settings = model.settings(length if "with_thoughts" in modes else 0, reach=options.reach)
    longest = longest_allowed(options, longest_text(model.architecture, settings))
    samples = options.samples or VOTES
    given = options.temperature, options.max_tokens, length, options.seed, str(policy), options.reach
    sampling = Sampling(samples, *given)
    measurement = {
        "fields": options.fields,
        "texts": [STEPS, CONCLUSION, ANSWER_TOKENS],
        "longest_tokens": longest,
        **dataclasses.asdict(sampling),
    }
    if options.reach == 1:
        del measurement["reach"]  # earlier records have none
    generator = Generator(model, batch_size=options.batch_size)
    with (
        _open_records(options, model, measurement) as records,
        progress(len(questions) * len(modes), "question", options, f"records: {records.path}") as done,
    ):
        found = measure_votes(questions, generator, sampling, modes, longest, records, done)
    return {**found, "samples": samples, "temperature": options.temperature, "records": str(records.path)}


def _spans(
    options: Options, model: LoadedModel, policy: ThinkPolicy, modes: tuple[str, ...], questions: list[Question]
) -> dict[str, Any]:
    rows = model.architecture.vocab_size
    excluded = matching_ids(model.tokenizer, options.exclude, rows) if options.exclude else ()
    if options.exclude and not excluded:
        raise ConfigError(f"exclude is {options.exclude!r}, but no token of this model matches it. Change or omit it.")
    scorer = make_scorer(options, model, policy, modes, excluded=excluded)
    longest = longest_allowed(options, scorer.longest)
    texts = read_marked_texts(options.data, options.limit, model.tokenizer, model.bos, excluded)
    length = options.thought_length or model.thought_length
    measurement = {
        "tokenizer": model.tokenizer.vocabulary_fingerprint,
        "begin": list(model.bos),
        "longest_tokens": longest,
        "thought_length": length if "with_thoughts" in modes else 0,
        "think": str(policy),
        "seed": options.seed,
        **({"control": options.control} if options.control else {}),
        **({"exclude": options.exclude} if options.exclude else {}),
        **({"reach": options.reach} if options.reach > 1 else {}),
        "figures": 3,  # before, records lacked `whole_span_accuracy`
    }
    against = Path(options.against).expanduser() if options.against else None
    with (
        _open_records(options, model, measurement) as records,
        progress(len(texts), "text", options, f"records: {records.path}") as done,
    ):
        found = measure_spans(texts, scorer, longest, records, options.seed, done, against)
    return {**_asked_for(modes, found), "records": str(records.path)}


def _open_records(options: Options, model: LoadedModel, measurement: Mapping[str, Any]) -> Records:
    """Opens the file of records from which a measurement resumes; by default it is named after the measurement."""
    whole = {
        "task": options.task,
        "data_hash": content_hash(options.data, _data_config(options)),
        "checkpoint_hash": model.fingerprint,
        "dtype": model.dtype,
        **measurement,
    }
    name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    return Records(Path(options.records or f"{options.task}-{name[:12]}.records.jsonl").expanduser(), whole)


def _text(
    options: Options, model: LoadedModel, policy: ThinkPolicy, modes: tuple[str, ...], questions: list[Question]
) -> dict[str, Any]:
    kinds = (options.perturb,) if options.perturb else ()
    scorer = make_scorer(options, model, policy, modes, UseOptions(kinds, options.samples, options.seed))
    render = model.tokenizer.render_conversation
    source = open_source(options.data, _data_config(options), split="validation", seed=options.seed, render=render)
    texts = min(len(source), options.limit or len(source))
    longest = longest_allowed(options, scorer.longest)
    length = options.window or min(WINDOW, longest)
    if length > longest:
        raise ConfigError(f"window is {length}; this model allows at most {longest} tokens, thoughts included.")
    windows = Windows(length, options.context or length // 2)
    begin = model.bos or model.eos_ids[:1]
    with progress(text_bytes(source, texts), "B", options) as done:
        found = measure_text(
            source, texts, model.tokenizer, begin, scorer, windows, options.top, options.seed, done
        )  # fmt: skip
    return _asked_for(modes, found)


def longest_allowed(options: Options, longest: int) -> int:
    """Returns the maximum tokens of a text: the model's maximum, or less on request.

    Raises:
      ConfigError: the request exceeds the model's maximum.
    """
    if options.max_length > longest:
        raise ConfigError(
            f"max_length is {options.max_length}; this model allows at most {longest} tokens, thoughts included."
        )
    return options.max_length or longest


def _asked_for(modes: tuple[str, ...], found: dict[str, Any]) -> dict[str, Any]:
    """Removes the figures of a mode that was computed but not requested."""
    others = {"without_thoughts", "with_thoughts"} - set(modes)
    dropped = {*others, "comparison"} if others else set()
    return {name: value for name, value in found.items() if name not in dropped}


@contextmanager
def progress(total: int, unit: str, options: Options, title: str = "") -> Iterator[Callable[[float], object]]:
    """Shows a progress bar with the time left; yields the function that advances it."""
    with tqdm(
        desc=title or None,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        disable=options.quiet,
        dynamic_ncols=True,
        mininterval=0.5,
    ) as bar:
        yield bar.update


def _data_config(options: Options) -> DataConfig:
    return DataConfig(text_key=options.text_key, text_documents=options.text_documents)

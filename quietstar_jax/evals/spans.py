"""Loss and accuracy of marked spans of texts and of all other tokens, with and without thoughts.

The texts are given, as in language modelling. A span marks what a thought should help with, such as the result of a
calculation that the text leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quietstar_jax.data.sources import Record, read_all
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.errors import DataError
from quietstar_jax.evals.records import Records, read_records_file
from quietstar_jax.evals.statistics import compare_paired, interval_of_ratio
from quietstar_jax.evals.tails import Continuation, ContinuationScorer
from quietstar_jax.thoughts.token_scores import TokenScores

GROUPS = ("spans", "others")
# Each metric, and the count that its sums are divided by. Only the group `spans` has whole spans.
METRICS = {"nats_per_token": "tokens", "accuracy": "tokens", "whole_span_accuracy": "whole_spans"}
MODES = ("without_thoughts", "with_thoughts")
BATCHES_AT_ONCE = 4  # of texts, scored before their records are written


class MarkedText(NamedTuple):
    """A text whose last tokens are scored.

    Attributes:
      number: of the text in its source, from 0.
      tail: the tokens, and how many of them are scored.
      marked: [scored tokens] bool, whether a token is in a span.
      whole: the spans whose tokens are all scored, each as [first, stop) among the scored tokens.
    """

    number: int
    tail: Continuation
    marked: np.ndarray
    whole: list[tuple[int, int]]


def read_marked_texts(
    spec: str, limit: int, tokenizer: Tokenizer, begin: Sequence[int], excluded: Sequence[int] = ()
) -> list[MarkedText]:
    """Returns the first `limit` texts of a source (0 = all), as token ids.

    A record has `text`, `spans`, a list of [start, end) in characters, and may have `scored_from`, the character from
    which tokens are scored. A token is in a span if it shares a character with it.

    Args:
      begin: ids before every text; excluded: ids that are excluded from predictions.

    Raises:
      DataError: a record is malformed, no text has a span, or a scored token is excluded.
    """
    texts = [
        _marked(record, number, tokenizer, begin, excluded)
        for number, record in enumerate(read_all(spec, "texts")[: limit or None])
    ]
    if not any(text.marked.any() for text in texts):
        raise DataError(f"The {len(texts)} texts of {spec} have no scored token in a span. Check their `spans`.")
    return texts


def _marked(
    record: Record, number: int, tokenizer: Tokenizer, begin: Sequence[int], excluded: Sequence[int]
) -> MarkedText:
    fields = record.fields
    text, spans, scored_from = fields.get("text"), fields.get("spans"), fields.get("scored_from", 0)
    if not isinstance(text, str) or not isinstance(spans, list):
        raise DataError(
            f"{record.where} has no `text` with `spans`; it has {', '.join(fields)}. The task needs records such as "
            '{"text": "1 + 1 = 2", "spans": [[8, 9]]}.'
        )
    bounds = [scored_from, *(place for span in spans for place in (span if isinstance(span, list) else [None]))]
    fits = all(type(place) is int and 0 <= place <= len(text) for place in bounds)
    if not fits or any(len(span) != 2 or span[0] >= span[1] for span in spans):
        raise DataError(
            f"{record.where}: `spans` must be pairs [start, end] of characters and `scored_from` a character, within "
            f"the {len(text)} characters of the text, but they are {str(spans)[:200]} and {scored_from!r}."
        )
    found = tokenizer.fast.backend_tokenizer.encode(text, add_special_tokens=False)
    tokenizer.check(found.ids, text)
    starts, stops = np.array(found.offsets, np.int64).reshape(-1, 2).T
    inside = np.zeros(len(text) + 1, np.int64)
    for start, stop in spans:
        inside[start:stop] = 1
    before = np.cumsum([0, *inside])  # before[i]: characters in spans among the first i
    marked = before[stops] > before[starts]
    first = int((stops <= scored_from).sum()) if scored_from else 0
    first = max(first, 0 if begin else 1)  # nothing predicts the first token of all
    if there := {*excluded}.intersection(found.ids[first:]):
        token = tokenizer.decode([min(there)])
        raise DataError(
            f"{record.where} contains {token!r}, which matches `exclude`. Change `exclude`, or use other texts."
        )
    tokens = [*begin, *found.ids]
    tail = Continuation(tokens, max(0, len(found.ids) - first), number=number)
    places = [np.flatnonzero((starts < stop) & (stops > start)) - first for start, stop in spans]
    whole = [(int(place[0]), int(place[-1]) + 1) for place in places if place.size and place[0] >= 0]
    return MarkedText(number, tail, marked[first:], whole)


def measure_spans(
    texts: Sequence[MarkedText], scorer: ContinuationScorer, longest: int, records: Records, seed: int,
    done: Callable[[int], object], against: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measures all texts without thoughts and, if the scorer thinks, with them; those in `records` are not repeated.

    Args:
      longest: maximum tokens of a text; longer ones are counted and left out, never cropped.
      seed: of the bootstrap; done: called with the number of texts just finished.
      against: file of records of another model, measured on the same texts.

    Returns:
      see `summarize_spans`, with `too_long` and `longest_tokens`.

    Raises:
      DataError: no text is short enough, or `against` is of other texts or another tokenizer.
    """
    fitting = [text for text in texts if len(text.tail.tokens) <= longest and text.tail.last]
    if not fitting:
        raise DataError(f"None of the {len(texts)} texts has a token to score and at most {longest} tokens.")
    others = read_other(against, records) if against else None
    known = {record["text"]: record for record in records.found}
    open_texts = [text for text in fitting if text.number not in known]
    open_texts.sort(key=lambda text: (text.tail.last, len(text.tail.tokens)))  # batches of similar shapes
    done(len(texts) - len(open_texts))
    group_size = BATCHES_AT_ONCE * scorer.batch_size
    for start in range(0, len(open_texts), group_size):
        group = open_texts[start : start + group_size]
        for text, scores in zip(group, scorer([text.tail for text in group]), strict=True):
            known[text.number] = sums_of(text, scores)
            records.append(known[text.number])
        done(len(group))
    rows = [known[text.number] for text in sorted(fitting)]
    found = {"too_long": len(texts) - len(fitting), "longest_tokens": longest, **summarize_spans(rows, seed)}
    if others is not None:
        found["against"] = {"records": str(against), **compare_runs(rows, others, seed)}
    return found


def sums_of(text: MarkedText, scores: TokenScores) -> dict[str, Any]:
    """Returns the record of a text: its number and, for each of `GROUPS`, its counts and the sums of metrics by mode.

    Args:
      scores: [scored tokens].
    """
    record: dict[str, Any] = {"text": text.number}
    for group, chosen in zip(GROUPS, (text.marked, ~text.marked), strict=True):
        columns = {"without_thoughts": {"nats_per_token": scores.base.nll, "accuracy": scores.base.correct}}
        if scores.thinks:
            columns["with_thoughts"] = {
                "nats_per_token": scores.talk.nll, "accuracy": scores.talk.correct, "mixing_weight": scores.weight,
            }  # fmt: skip
            if scores.made is not None:
                columns["with_thoughts"]["thinking_rate"] = scores.made
                columns["with_thoughts"]["thought_used_rate"] = scores.made | (scores.weight > 0)
        record[group] = {"tokens": int(chosen.sum())} | {
            mode: {name: float(values[chosen].sum(dtype=np.float64)) for name, values in by_name.items()}
            for mode, by_name in columns.items()
        }
    record["spans"]["whole_spans"] = len(text.whole)
    for mode, by_name in columns.items():
        right = by_name["accuracy"]
        record["spans"][mode]["whole_span_accuracy"] = float(sum(right[first:stop].all() for first, stop in text.whole))
    return record


def summarize_spans(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Computes means over tokens, or spans, from the records of texts, with 95 % intervals over texts.

    Returns:
      `texts`; `tokens` of each of `GROUPS`; `whole_spans`, the number of spans whose tokens are all scored; by mode and
      group `nats_per_token` and `accuracy` with their intervals; for spans also `whole_span_accuracy`, the share of
      whole spans whose tokens are all right, each after the true tokens before it; with thoughts also `mixing_weight`,
      a mean over the tokens for which a thought is used (0 if there are none), and, with a policy of thinking,
      `thinking_rate` and `thought_used_rate`, the share of these tokens, which is larger if thoughts are used for
      several; if there are thoughts, `comparison` by group and metric, with minus without thoughts. A group without
      tokens, or a metric with nothing to count, is left out.
    """
    tokens = {group: int(_counts(rows, group, "tokens").sum()) for group in GROUPS}
    groups = [group for group in GROUPS if tokens[group]]
    modes = [mode for mode in MODES if mode in rows[0][GROUPS[0]]]
    found: dict[str, Any] = {"texts": len(rows), "tokens": {group: tokens[group] for group in groups}}
    found["whole_spans"] = int(_counts(rows, "spans", "whole_spans").sum())
    for mode in modes:
        found[mode] = {group: {} for group in groups}
        for group in groups:
            for name in _metrics(rows, mode, group):
                totals, counts = _totals(rows, group, mode, name), _counts(rows, group, METRICS[name])
                found[mode][group][name] = float(totals.sum() / counts.sum())
                interval = interval_of_ratio(totals, counts, seed, rate=name != "nats_per_token")
                found[mode][group][f"{name}_interval"] = interval
            names = rows[0][group][mode]
            for name in (name for name in names if name not in METRICS):
                # Where no thought is used, there is no mixing weight.
                used = "thought_used_rate"
                among = used if name == "mixing_weight" and used in names else ""
                count = _totals(rows, group, mode, among).sum() if among else tokens[group]
                found[mode][group][name] = float(_totals(rows, group, mode, name).sum() / count) if count else 0.0
    if len(modes) == 2:
        pairs = (rows, "with_thoughts"), (rows, "without_thoughts")
        found["comparison"] = {group: _paired(*pairs, group, seed) for group in groups}
    return found


def compare_runs(
    rows: Sequence[Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    """Compares this model, with thoughts if it has any, with each mode of another model on the same texts.

    Args:
      rows: records of this model; others: those of the other model, by number of the text.

    Returns:
      `texts`, how many both have; `mode`, that of this model; under `without_thoughts` and `with_thoughts`, the modes
      of the other model, by group and metric, this model minus the other.

    Raises:
      DataError: no text is in both, or a text has other numbers of tokens there.
    """
    shared = [row for row in rows if row["text"] in others]
    if not shared:
        raise DataError("The records of `against` have none of these texts. Measure the other model on more of them.")
    theirs = [others[row["text"]] for row in shared]
    for row, other in zip(shared, theirs, strict=True):
        here, there = ([one[group]["tokens"] for group in GROUPS] for one in (row, other))
        if here != there:
            raise DataError(
                f"In the records of `against`, text {row['text']} has {there[0]} tokens in spans and {there[1]} "
                f"others, here it has {here[0]} and {here[1]}. Measure the other model again."
            )
    groups = [group for group in GROUPS if sum(row[group]["tokens"] for row in shared)]
    mine = [mode for mode in MODES if mode in shared[0][GROUPS[0]]][-1]
    found: dict[str, Any] = {"texts": len(shared), "mode": mine}
    for mode in MODES:
        if mode in theirs[0][GROUPS[0]]:
            found[mode] = {group: _paired((shared, mine), (theirs, mode), group, seed) for group in groups}
    return found


def read_other(path: Path, records: Records) -> dict[int, dict[str, Any]]:
    """Returns the records of another model by number of the text.

    Raises:
      DataError: the file cannot be read, or was measured with other texts, another tokenizer, other first ids (`begin`)
        or another `exclude`.
    """
    measurement, found = read_records_file(path)
    for name in ("task", "data_hash", "tokenizer", "begin", "exclude"):
        mine, theirs = (json.dumps(one.get(name)) for one in (records.measurement, measurement))
        if mine != theirs:
            raise DataError(
                f"{path} was measured on other texts or with other settings: its {name} is {theirs}, here {mine}. "
                "Set `against` to records with the same task, data, tokenizer, ids before every text and `exclude`."
            )
    return {record["text"]: record for record in found}


def _paired(
    after: tuple[Sequence[Mapping[str, Any]], str], before: tuple[Sequence[Mapping[str, Any]], str], group: str,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Returns `compare_paired` of the metrics that two lists of records of the same texts, each with a mode, have."""
    found, there = {}, _metrics(*before, group)
    for name in (name for name in _metrics(*after, group) if name in there):
        # Divided by the mean count, not each text's own, so that the difference is that of the two means.
        mean = _counts(after[0], group, METRICS[name]).mean()
        one, other = (_totals(rows, group, mode, name) / mean for rows, mode in (after, before))
        found[name] = compare_paired(one, other, seed)
    return found


def _metrics(rows: Sequence[Mapping[str, Any]], mode: str, group: str) -> list[str]:
    """Returns those of `METRICS` that records have, and for which there is something to count."""
    there = rows[0][group][mode]
    return [name for name, count in METRICS.items() if name in there and _counts(rows, group, count).any()]


def _counts(rows: Sequence[Mapping[str, Any]], group: str, name: str) -> np.ndarray:
    return np.array([row[group].get(name, 0) for row in rows])


def _totals(rows: Sequence[Mapping[str, Any]], group: str, mode: str, name: str) -> np.ndarray:
    return np.array([row[group][mode][name] for row in rows], np.float64)

"""Question sets: GSM8K, CommonsenseQA, and any other set whose fields are named."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np

from quietstar_jax.data.sources import read_all
from quietstar_jax.data.sources.common import Record
from quietstar_jax.data.sources.texts import field_at
from quietstar_jax.errors import DataError
from quietstar_jax.evals.numbers import parse_number
from quietstar_jax.evals.tasks import ANSWER_KEYS, Layout

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER_MARK = "####"  # GSM8K: the answer follows it, the steps of the solution precede it


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      text: as it is asked, with its choices if it has any.
      answer: as it is written after `A:`; a label, or a number as the set writes it.
      labels: of the choices, in their order; empty where the answer is a number.
      line: its number in the set, from 1.
    """

    text: str
    answer: str
    labels: tuple[str, ...]
    line: int


def read_questions(source: str | PathLike[str], layouts: Sequence[Layout], limit: int | None = None) -> list[Question]:
    """Returns the questions of a source as in `DataConfig.train`.

    Args:
      layouts: the first one that finds a question in the first record is used, else the last.
      limit: number of questions from the beginning; None = all. The answer key is always determined from all.

    Raises:
      DataError: the source is missing or empty, or a record does not have the layout; names its place.
    """
    records = read_all(fspath(source), "questions")
    layout = next((known for known in layouts if _has(records[0].fields, known.question, str)), layouts[-1])
    lines = [_Line(number, record, layout) for number, record in enumerate(records, start=1)]
    if layout.choices is None:
        return [_numeric(line) for line in lines[:limit]]
    key = layout.answer_key if layout.answer_key != "auto" else _find_key(lines)  # the same whatever the limit
    return [_with_choices(line, key) for line in lines[:limit]]


@dataclass(frozen=True)
class _Line:
    number: int
    record: Record
    layout: Layout

    def __str__(self) -> str:
        return self.record.where

    def field(self, name: str) -> Any:
        """The value of the field for `question`, `choices` or `answer`."""
        place = getattr(self.layout, name)
        try:
            return field_at(self.record.fields, place)
        except KeyError as error:
            raise DataError(
                f"{self}: there is no field {place!r} for the {name}; the record has "
                f"{', '.join(map(repr, self.record.fields))}. Name the field: `field` {name}=NAME (with dots for "
                "nested fields)."
            ) from error

    def text(self, name: str) -> str:
        """As `field`, for a value that must be a text."""
        value = self.field(name)
        if not isinstance(value, str) or not value.strip():
            place = getattr(self.layout, name)
            raise DataError(f"{self}: the field {place!r} is {_shown(value)}; the {name} must be a text.")
        return value


def _has(row: Any, place: str, kind: type) -> bool:
    try:
        return isinstance(field_at(row, place), kind)
    except KeyError:
        return False


def _numeric(line: _Line) -> Question:
    asked = line.text("question").strip()
    value = line.field("answer")
    number = isinstance(value, float) and math.isfinite(value)
    number |= isinstance(value, int) and not isinstance(value, bool)
    text = _plain(value) if number else str(value).rsplit(ANSWER_MARK, maxsplit=1)[-1].strip()
    if isinstance(value, bool | list | dict) or parse_number(text) is None:
        raise DataError(
            f"{line}: the answer is {_shown(value)}, which is not one number. Numeric tasks accept answers such as 18, "
            f"1,234.5, -3, 1/2, 1e-3, $5 or 20 %, alone or after {ANSWER_MARK!r}. For other answers, add choices and "
            "set `task` to multiple_choice, or remove the question."
        )
    return Question(asked, text, (), line.number)


def _plain(value: float) -> str:
    """A JSON number as people write it: no exponent, no `.0`."""
    return np.format_float_positional(value, trim="-") if isinstance(value, float) else str(value)


def _with_choices(line: _Line, key: str) -> Question:
    labels, texts = _choices(line)
    place = _chosen(key, labels, texts, line.field("answer"))
    if place is None:
        raise DataError(_bad_answer(line, key, labels, texts))
    listed = "".join(f"\n({label}) {text}" for label, text in zip(labels, texts, strict=True))
    return Question(line.text("question").strip() + listed, labels[place], tuple(labels), line.number)


def _find_key(lines: Sequence[_Line]) -> str:
    """Returns the answer key that names a choice in every question.

    Raises:
      DataError: no key does, or several do and name different choices.
    """
    rows = [(*_choices(line), line.field("answer")) for line in lines]
    chosen = {key: [_chosen(key, *row) for row in rows] for key in ("label", "text", "index")}
    fitting = [key for key, places in chosen.items() if None not in places]
    if not fitting:
        best = min(chosen, key=lambda key: chosen[key].count(None))
        wrong = chosen[best].index(None)
        raise DataError(_bad_answer(lines[wrong], best, *rows[wrong][:2]))
    first = fitting[0]
    for other in fitting[1:]:
        for line, (_, texts, answer), one, two in zip(lines, rows, chosen[first], chosen[other], strict=True):
            if one != two and one is not None and two is not None:
                raise DataError(
                    f"{line}: the answer {_shown(answer)} is {_shown(texts[one])} read as {first} and "
                    f"{_shown(texts[two])} read as {other}, and the whole file can be read in both ways. Set "
                    f"`answer_key` to {'|'.join(ANSWER_KEYS[1:])} (index counts from 0)."
                )
    return first


def _chosen(key: str, labels: Sequence[str], texts: Sequence[str], answer: Any) -> int | None:
    """Index of the choice that an answer names; None if it names none (or, by text, several)."""
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        return None
    text = answer.strip() if isinstance(answer, str) else _plain(answer)
    if key == "label":
        bare = _bare(text).upper()
        return next((i for i, label in enumerate(labels) if label.upper() == bare), None)
    if key == "text":
        found = [i for i, choice in enumerate(texts) if choice.strip() == text]
        return found[0] if len(found) == 1 else None
    if not re.fullmatch(r"\d{1,9}", text):
        return None
    place = int(text) - (key == "index-from-1")
    return place if 0 <= place < len(texts) else None


def _bare(label: str) -> str:
    """Returns `A` for `(A)`, `A.` and `A)`."""
    return label.strip().strip("().") or label


def _bad_answer(line: _Line, key: str, labels: Sequence[str], texts: Sequence[str]) -> str:
    named = ", ".join(f"{label}: {_shown(text)}" for label, text in zip(labels, texts, strict=True))
    return (
        f"{line}: the answer is {_shown(line.field('answer'))}, read as {key}, which names none of the choices "
        f"({named}). Set `answer_key` to the way in which answers name a choice ({'|'.join(ANSWER_KEYS[1:])}; index "
        "counts from 0), and name the field of the answer: `field` answer=NAME."
    )


def _choices(line: _Line) -> tuple[list[str], list[str]]:
    """(labels, texts) of the choices of a question, in any of the usual formats."""
    value = line.field("choices")
    labels: list[Any] | None = None
    texts: Any = value
    if isinstance(value, Mapping) and {"label", "text"} <= set(value):  # as in Hugging Face's CommonsenseQA and ARC
        labels, texts = value["label"], value["text"]
    elif isinstance(value, Mapping):  # {"A": "...", "B": "..."}
        labels, texts = list(value), list(value.values())
    elif isinstance(value, list) and all(isinstance(one, Mapping) and {"label", "text"} <= set(one) for one in value):
        labels, texts = [choice["label"] for choice in value], [choice["text"] for choice in value]
    good = isinstance(texts, list) and 2 <= len(texts) <= len(LETTERS) and all(
        isinstance(text, str | int | float) for text in texts
    )  # fmt: skip
    if not good or (labels is not None and (not isinstance(labels, list) or len(labels) != len(texts))):
        raise DataError(
            f"{line}: the choices are {_shown(value)}; they must be a list of 2 to {len(LETTERS)} texts, a list of "
            'objects with "label" and "text", or an object from labels to texts.'
        )
    names = [_bare(str(label)) for label in labels] if labels is not None else list(LETTERS[: len(texts)])
    if len(set(names)) != len(names):
        raise DataError(f"{line}: the labels of the choices are {', '.join(names)}; they must all differ.")
    return names, [text if isinstance(text, str) else _plain(text) for text in texts]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."

"""The evaluation tasks by name, and the fields of their records."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quietstar_jax.errors import ConfigError

DIRECT, VOTING, TEXT, SPANS = "direct", "voting", "text", "spans"
ANSWER_KEYS = ("auto", "label", "text", "index", "index-from-1")
FIELDS = ("question", "choices", "answer")


@dataclass(frozen=True)
class Layout:
    """The fields of a question set: their paths, with dots for nested fields.

    Attributes:
      choices: None = answers are numbers.
      answer_key: how answers name a choice, one of `ANSWER_KEYS`; `auto` finds what fits every question of
        the file.
    """

    question: str
    answer: str
    choices: str | None = None
    answer_key: str = "auto"


@dataclass(frozen=True)
class Task:
    """One evaluation task.

    Attributes:
      kind: `direct` answers, chains of thought with `voting`, `text` for language modelling, or `spans`.
      layouts: the usual layouts of its records; none for text.
      summary: one line of help, which several tasks may share.
    """

    kind: str
    layouts: tuple[Layout, ...]
    summary: str


_NUMERIC = Layout("question", "answer")
_GSM8K = (_NUMERIC,)
_COMMONSENSE_QA = (
    Layout("question", "answerKey", "choices"),  # as in Hugging Face's data set
    Layout("question.stem", "answerKey", "question.choices"),  # as its authors publish it
)
# Tasks with the same summary share a line of help.
_DIRECT = "published questions and your own, answered directly"
_VOTES = "questions with numbers as answers: written steps, and a majority vote"
_TEXT = "nats per token of a text; loss and accuracy of its marked spans and of the other tokens"
TASKS: Mapping[str, Task] = {
    "gsm8k": Task(DIRECT, _GSM8K, _DIRECT),
    "gsm8k_cot": Task(VOTING, _GSM8K, _VOTES),
    "commonsense_qa": Task(DIRECT, _COMMONSENSE_QA, _DIRECT),
    "numeric": Task(DIRECT, (_NUMERIC,), _DIRECT),
    "numeric_cot": Task(VOTING, (_NUMERIC,), _VOTES),
    "multiple_choice": Task(DIRECT, (Layout("question", "answer", "choices"),), _DIRECT),
    "language_modeling": Task(TEXT, (), _TEXT),
    "spans": Task(SPANS, (), _TEXT),
}


def find_task(name: str) -> Task:
    """Returns the task with this name.

    Raises:
      ConfigError: there is no such task; lists the known ones.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(f"There is no task {name!r}. {hint}Tasks: {', '.join(TASKS)}.")
    return TASKS[name]


def with_fields(task: Task, fields: Sequence[str], answer_key: str) -> tuple[Layout, ...]:
    """Returns the layouts of a task with other names for its fields.

    Args:
      fields: `question=NAME` and so on; answer_key: how answers name a choice, one of `ANSWER_KEYS`.

    Raises:
      ConfigError: a field is not one that the task has, or is named twice.
    """
    known = FIELDS if task.layouts and task.layouts[0].choices is not None else ("question", "answer")
    if not task.layouts and fields:
        raise ConfigError("`field` is for question sets; `text_key` names the field of a text.")
    if answer_key not in ANSWER_KEYS:
        raise ConfigError(f"answer_key is {answer_key!r}; it must be one of {', '.join(ANSWER_KEYS)}.")
    changes: dict[str, str] = {}
    for field in fields:
        name, mark, place = field.partition("=")
        if name not in known or not mark or not place or name in changes:
            raise ConfigError(f"`field` is {field!r}; allowed, once each: {'=NAME, '.join(known)}=NAME.")
        changes[name] = place
    layouts = tuple(dataclasses.replace(layout, answer_key=answer_key, **changes) for layout in task.layouts)
    return tuple(dict.fromkeys(layouts))

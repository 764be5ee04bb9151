"""GSM8K as plain text, in which some solutions write their calculations between marks and others give only results.

    Natalia sold 48/2 = <<48/2=24>>24 clips      as published
    Natalia sold <<48/2=24>> 24 clips            written out: half of the training solutions
    Natalia sold 24 clips                        results only: the other half, and all solutions of other splits

A calculation stands before the word that ends with its result, such as ` $24`. If it is removed, with the space before
it, the tokens of the rest stay the same. A model that has read both kinds can therefore think the calculation where the
text gives only its result, and go on as the text does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from quietstar_jax.data.builders.common import RowsBuilder
from quietstar_jax.data.builders.gsm8k import Gsm8k

SEED = 0  # of the random choice of solutions whose calculations are written out

_NUMBER = r"(?:\d+(?:,\d+)*(?:\.\d+)?|\.\d+)"
_OPERAND = rf"[(\-]*[$€£]?{_NUMBER}%?\)*"
_OPERATOR = r"[+\-–−*/×÷=]"
_BETWEEN = rf" *(?:{_OPERATOR}|\b[xX]\b|\bof\b) *"
_CALCULATION = re.compile(
    rf"(?P<formula>(?<![\w.,]){_OPERAND}(?:{_BETWEEN}{_OPERAND})*\s*=\s*)?"
    rf"(?P<sign>[$€£]?)(?P<marked><<[^<>]*>>)(?P<result>-?{_NUMBER})?"
)
_BEGINS_EARLIER = re.compile(rf"(?:{_OPERATOR}\s*|\b(?:[xX]|times) *)\Z")  # text before a formula that contains words
_WORD = re.compile(r" ?\S*\Z")  # the end of a text, from the last space or line break on
_NUMBER_ALONE = re.compile(rf"{_OPERAND}\s*=\s*")  # as in `half of 20 = `: no formula, or not all of it


class Gsm8kText(RowsBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Grade-school mathematics problems (Cobbe et al., 2021) as text, with calculations written out or left out."""

    VERSION = tfds.core.Version("3.0.0")
    HUB: ClassVar = Gsm8k.HUB
    EXAMPLE: ClassVar = {
        "text": tfds.features.Text(),
        "scored_from": tfds.features.Scalar(np.int64),  # character at which the solution begins
        "spans": tfds.features.Tensor(shape=(None, 2), dtype=np.int64),  # [start, end) of results, in characters
    }
    HOMEPAGE = Gsm8k.HOMEPAGE

    def example(self, row: Mapping[str, Any], split: str) -> dict[str, Any]:
        """Returns the text of a problem, and where its solution and the results of left-out calculations are in it."""
        question = f"Q: {row['question']}\nA: "
        written_out = split == "train" and random.Random(f"{SEED} {question}").random() < 0.5
        solution, spans = rewrite(row["answer"], written_out=written_out)
        shifted = np.array(spans, np.int64).reshape(-1, 2) + len(question)
        return {"text": question + solution, "scored_from": len(question), "spans": shifted}


def rewrite(solution: str, *, written_out: bool) -> tuple[str, list[tuple[int, int]]]:
    """Returns a published solution without its formulas and, unless `written_out`, without its marked calculations.

    A formula that contains words, such as `2 boxes * 3 = ` or `half of 20 = `, remains.

    Returns:
      the text, and [start, end) of each result whose calculation is nowhere in the text.
    """
    text, spans, end = " ", [], 0  # the space stands before a solution
    for found in _CALCULATION.finditer(solution):
        text += solution[end : found.start()]
        end = found.end()
        formula, result = found["formula"] or "", found["result"] or ""
        if _BEGINS_EARLIER.search(text) or _NUMBER_ALONE.fullmatch(formula):
            text, hidden = text + formula, False
        else:
            hidden = bool(result) and not written_out
        text += found["sign"]
        if written_out:
            word = _WORD.search(text).start() if result else len(text)  # type: ignore[union-attr]
            space = " " if text[word : word + 1] == " " else ""
            text = text[:word] + space + found["marked"] + text[word:]
        text += result
        spans += [(len(text) - len(result), len(text))] if hidden else []
    return (text + solution[end:])[1:], [(start - 1, stop - 1) for start, stop in spans]

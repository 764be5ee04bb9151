"""CommonsenseQA for tensorflow-datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from quietstar_jax.data.builders.common import RowsBuilder


class CommonsenseQa(RowsBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Multiple-choice questions that require common sense (Talmor et al., 2019); held-out answers are empty."""

    HUB: ClassVar = {split: f"hf:tau/commonsense_qa:{split}" for split in ("train", "validation", "test")}
    EXAMPLE: ClassVar = {
        **{name: tfds.features.Text() for name in ("text", "id", "question", "answer_key")},
        "labels": tfds.features.Sequence(tfds.features.Text()),
        "choices": tfds.features.Sequence(tfds.features.Text()),
    }
    HOMEPAGE = "https://www.tau-nlp.org/commonsenseqa"

    def example(self, row: Mapping[str, Any], split: str) -> dict[str, Any]:
        """Accepts rows in the authors' format (all under `question`) and in the hub's (`choices` as two lists)."""
        asked = row["question"]
        if isinstance(asked, str):
            question, labels, choices = asked, row["choices"]["label"], row["choices"]["text"]
        else:
            question = asked["stem"]
            labels, choices = ([choice[name] for choice in asked["choices"]] for name in ("label", "text"))
        key = row.get("answerKey") or ""
        lines = [question, *(f"({label}) {text}" for label, text in zip(labels, choices, strict=True))]
        return {
            "text": "\n".join([*lines, f"Answer: ({key})"] if key else lines),
            "id": row["id"],
            "question": question,
            "answer_key": key,
            "labels": list(labels),
            "choices": list(choices),
        }

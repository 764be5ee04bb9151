"""GSM8K for tensorflow-datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from quietstar_jax.data.builders.common import RowsBuilder


class Gsm8k(RowsBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Grade-school mathematics problems with worked answers (Cobbe et al., 2021)."""

    HUB: ClassVar = {"train": "hf:openai/gsm8k/main:train", "test": "hf:openai/gsm8k/main:test"}
    EXAMPLE: ClassVar = {name: tfds.features.Text() for name in ("text", "question", "answer", "short_answer")}
    HOMEPAGE = "https://github.com/openai/grade-school-math"

    def example(self, row: Mapping[str, Any], split: str) -> dict[str, Any]:
        question, answer = row["question"], row["answer"]
        short = answer.rpartition("#### ")[2].strip()
        return {"text": f"{question}\n{answer}", "question": question, "answer": answer, "short_answer": short}

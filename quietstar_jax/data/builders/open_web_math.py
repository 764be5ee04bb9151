"""OpenWebMath for tensorflow-datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from quietstar_jax.data.builders.common import RowsBuilder


class OpenWebMath(RowsBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Web pages with mathematics (Paster et al., 2023)."""

    HUB: ClassVar = {"train": "hf:open-web-math/open-web-math:train"}
    EXAMPLE: ClassVar = {name: tfds.features.Text() for name in ("text", "url", "date")}
    HOMEPAGE = "https://github.com/keirp/OpenWebMath"

    def example(self, row: Mapping[str, Any], split: str) -> dict[str, Any]:
        return {"text": row["text"], "url": str(row.get("url") or ""), "date": str(row.get("date") or "")}

"""Reading sources in tests: all documents, and the errors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quietstar_jax.data.sources import open_source
from quietstar_jax.data.sources.common import RandomAccessSource
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import DataError

DOCUMENTS = ["first", "zweite Zeile\nmit Umbruch", " 3 ", "四", "last \u2028 one"]


def opened(spec: object, **changes: Any) -> RandomAccessSource:
    return open_source(str(spec), DataConfig(**changes), split="train", seed=0)


def read(source: RandomAccessSource) -> list[str]:
    """All documents, twice over: in order, and backwards from a copy that went through pickle."""
    ahead = [source[i] for i in range(len(source))]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in reversed(range(len(copy)))] == ahead[::-1]
    assert source[np.int64(0)] == ahead[0]  # type: ignore[index]  # what a sampler may hand over
    for outside in (len(ahead), -len(ahead) - 1):
        with pytest.raises(IndexError):
            source[outside]
    return ahead


def lines(documents: Sequence[str], end: str = "\n", key: str = "text", ascii_only: bool = False) -> bytes:
    return (
        "\n".join(json.dumps({key: text, "n": 1}, ensure_ascii=ascii_only) for text in documents).encode()
        + end.encode()
    )


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def fails(spec: object, message: str, index: int | None = None, **changes: Any) -> None:
    """Opening the source fails, or at the latest reading a document."""
    with pytest.raises(DataError, match=message):
        opened(spec, **changes)[0 if index is None else index]

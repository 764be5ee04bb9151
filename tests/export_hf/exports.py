"""Checkpoints and parameters to export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.hf.files import open_checkpoint
from quietstar_jax.hf.names import parameter_shapes, quietstar_entries
from tests.hf.runs import start_run, write_tokenizer
from tests.models.test_parity import VOCAB, random_model

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    opened = open_checkpoint(str(folder))
    return {name: opened.read(name) for name in opened.tensors}


def write_checkpoint(folder: Path, variant: str = "llama", dtype: Any = np.float32, known: tuple[str, ...] = (),
                     words: int = VOCAB - 4) -> Path:  # fmt: skip
    """A folder of transformers, with a tokenizer."""
    random_model(variant).save_pretrained(folder)
    save_file(
        {name: value.astype(dtype) for name, value in tensors(folder).items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    write_tokenizer(folder, words, *known)
    return folder


def exported_run(folder: Path, options: ExportOptions | None = None, **thought: Any) -> Path:
    """Returns the folder, with a run in `run` with these settings of thoughts, and its export in `out`."""
    start_run(folder / "run", write_checkpoint(folder / "hf"), **thought)
    export(folder / "run", folder / "out", options or ExportOptions())
    return folder


class Constant:
    """Parameters that are all alike."""

    def __init__(self, architecture: Any, value: float = 1.0):
        self.shapes = parameter_shapes(quietstar_entries(architecture))
        self.value = value

    def read(self, target: Any) -> np.ndarray:
        return np.full(target.shape, self.value, np.float32)

"""Documents from anywhere, by number: files here and behind URLs, tensorflow-datasets, the hub, the embedded corpus."""

from __future__ import annotations

import itertools
from typing import Literal

from quietstar_jax.config import DataConfig
from quietstar_jax.data.sources.common import RandomAccessSource, concatenated
from quietstar_jax.data.sources.files import find_files, kind_of
from quietstar_jax.data.sources.formats import JsonLines, ParquetRows, TextFiles
from quietstar_jax.data.sources.hub import HUB, HubRows
from quietstar_jax.data.sources.tfds import TFDS, TfdsExamples

SYNTHETIC = "synthetic"

Split = Literal["train", "validation"]


def open_source(spec: str, config: DataConfig, *, split: Split, seed: int) -> RandomAccessSource:
    """Opens a source of documents.

    Args:
      spec: a file, a folder or a glob of .jsonl/.json lines (also .gz, .zst), .txt/.md (one document a file) or
        .parquet, here or behind a URL; `tfds:NAME[/CONFIG[:VERSION]]:SPLIT` or `tfds:FOLDER:SPLIT` of a prepared
        dataset; `hf:NAME[/CONFIG]:SPLIT` of the Hugging Face hub; `synthetic`.
      config: `text_key` names the field with the text, `data_dir` where tfds datasets are.
      split, seed: which documents of the embedded corpus; other sources ignore them.

    Raises:
      DataError: here for what is missing, empty or of an unknown kind; by the source for a broken document.
    """
    if spec == SYNTHETIC:
        from quietstar_jax.data.synthetic import SyntheticSource

        return SyntheticSource(config.synthetic, split=split, seed=seed)
    if spec.startswith(TFDS):
        return TfdsExamples(spec, config)
    if is_hub(spec):
        return HubRows(spec, config.text_key)
    sources: list[RandomAccessSource] = []
    for kind, files in itertools.groupby(find_files(spec), lambda file: kind_of(file.name)):
        if kind == "text":
            sources.append(TextFiles(list(files)))
        elif kind == "json":
            sources += [JsonLines(file, config.text_key) for file in files]
        else:
            sources += [ParquetRows(file, config.text_key) for file in files]
    return concatenated(sources)


def is_hub(spec: str) -> bool:
    """Whether a source is a dataset of the hub, rather than a URL of its files (`hf://`)."""
    return spec.startswith(HUB) and not spec.startswith(HUB + "//")

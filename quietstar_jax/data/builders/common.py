"""The base class of the builders: reads rows from local files or the hub, and prepares a dataset without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from quietstar_jax.data.sources import read_records
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import DataError


class RowsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A dataset with one example per row, in order; the feature `text` of an example is the text to train on."""

    VERSION = tfds.core.Version("1.0.0")
    HUB: ClassVar[dict[str, str]]  # split -> its source on the hub
    EXAMPLE: ClassVar[dict[str, Any]]  # feature -> type
    HOMEPAGE: ClassVar[str]

    def __init__(self, *, sources: Mapping[str, str] | None = None, **options: Any):
        """Accepts the arguments of every builder, and `sources`: split -> files as in `data.train`, or `hf:...`."""
        self._sources = dict(sources or self.HUB)
        super().__init__(**{"file_format": "array_record", **options})

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(self.__doc__ or "").strip(),
            features=tfds.features.FeaturesDict(self.EXAMPLE),
            homepage=self.HOMEPAGE,
            disable_shuffling=True,  # array_record supports random access
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split, spec) for split, spec in self._sources.items()}

    def _generate_examples(self, split: str, spec: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, (where, row) in enumerate(read_records(spec, DataConfig())):
            try:
                yield number, self.example(row, split)
            except (KeyError, TypeError) as error:
                reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
                raise DataError(
                    f"{where}: this is not a row of {self.name}: {reason}; it has {', '.join(row)}. Check the file."
                ) from error

    def example(self, row: Mapping[str, Any], split: str) -> dict[str, Any]:
        """Returns the example of a row of a split. Raises KeyError or TypeError if the row is malformed."""
        raise NotImplementedError

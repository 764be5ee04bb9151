"""Prefetches elements in worker processes, or prepares them in the calling thread while the device runs a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

PREFETCHED = 64  # elements that each worker process prefetches


@contextlib.contextmanager
def ahead(elements: grain.MapDataset, workers: int) -> Iterator[Iterator[Any]]:
    """Iterates over elements in order; `workers` processes prefetch them, or with 0 the calling thread prepares them.

    A prefetching thread in this process would double the work with its bookkeeping, without saving time.
    """
    inline = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads debugging options from absl flags, which not every main parses
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=PREFETCHED)
        iterator = iter(elements.to_iter_dataset(inline).mp_prefetch(options))
    else:
        iterator = iter(elements.to_iter_dataset(inline))
    try:
        yield iterator
    finally:
        iterator.close()

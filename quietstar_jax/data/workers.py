"""Elements prepared ahead by worker processes, or by this thread while the device computes a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

PREFETCHED = 64  # elements that each worker process prepares ahead


@contextlib.contextmanager
def ahead(elements: grain.MapDataset, workers: int) -> Iterator[Iterator[Any]]:
    """Elements in order: `workers` processes prepare them ahead, or with 0 this thread does.

    A prefetching thread of this process would cost twice the work in bookkeeping and nothing would be sooner ready.
    """
    inline = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain asks absl flags for debugging options, which not every main parses
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=PREFETCHED)
        iterator = iter(elements.to_iter_dataset(inline).mp_prefetch(options))
    else:
        iterator = iter(elements.to_iter_dataset(inline))
    try:
        yield iterator
    finally:
        iterator.close()

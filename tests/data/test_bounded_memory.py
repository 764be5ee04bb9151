"""Archives that unpack to far more than memory should hold are read as a stream."""

from __future__ import annotations

import bz2
import gzip
import lzma
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import zstandard

MIB = 1 << 20
LINE = b'{"text": "' + b"a" * 1000 + b'"}\n'
READ = """
import resource, sys
from pathlib import Path
from quietstar_jax.data_config import DataConfig
from quietstar_jax.data.sources import open_source, read_records
from quietstar_jax.errors import DataError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
config = DataConfig(cache_dir=sys.argv[2])
before = peak()
try:
    count = sum(1 for _ in read_records(sys.argv[1], config))
    source = open_source(sys.argv[1], config, split="train", seed=0)
    print(count, len(source), len(source[count - 1]))
except DataError as error:
    print(error)
print(peak() - before)
"""


def pack_zst(chunks: Iterable[bytes], path: Path) -> None:
    with path.open("wb") as stream, zstandard.ZstdCompressor().stream_writer(stream) as packer:
        for chunk in chunks:
            packer.write(chunk)


def packer(make: Callable[..., object]) -> Callable[[Iterable[bytes], Path], None]:
    def pack(chunks: Iterable[bytes], path: Path) -> None:
        with make(path, "wb") as stream:  # type: ignore[attr-defined]
            for chunk in chunks:
                stream.write(chunk)

    return pack


PACKERS = {"gz": packer(gzip.open), "bz2": packer(bz2.open), "xz": packer(lzma.open), "zst": pack_zst}


def read(path: Path, tmp_path: Path) -> tuple[str, int]:
    """What a process says that reads the file, and the MiB by which its memory grew."""
    command = [sys.executable, "-c", READ, str(path), str(tmp_path / "cache")]
    said, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().rsplit("\n", 1)
    return said, int(grown)


@pytest.mark.parametrize("ending", PACKERS)
def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"zeros.jsonl.{ending}"
    PACKERS[ending]((bytes(MIB) for _ in range(400)), path)
    assert path.stat().st_size < MIB
    said, grown = read(path, tmp_path)
    assert "line 1 is longer than 64 MiB" in said
    assert grown < 250
    assert not list((tmp_path / "cache").rglob("*.jsonl*"))


def test_many_lines_are_read_as_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl.gz"
    PACKERS["gz"]((LINE * 1000 for _ in range(300)), path)
    said, grown = read(path, tmp_path)
    assert said == "300000 300000 1000"
    assert grown < 100  # of 290 MiB

"""A stand-in for Google Cloud Storage on this machine: buckets are folders, served to tensorstore and to fsspec."""

from __future__ import annotations

import json
import os
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from orbax.checkpoint._src.path import gcs_utils

from quietstar_jax import io


class Store(DirFileSystem):
    """What gcsfs is to etils, over a folder: an object store has no folders of its own."""

    protocol = ("gs", "gcs")
    root = ""
    cachable = False  # the root changes from test to test

    def __init__(self, **_: Any):
        super().__init__(path=Store.root, fs=LocalFileSystem(auto_mkdir=True))

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return str(path).removeprefix("gs://").removeprefix("gcs://").rstrip("/")

    def _join(self, path: Any) -> Any:
        return [self._join(p) for p in path] if isinstance(path, list) else super()._join(self._strip_protocol(path))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def target(self) -> tuple[str, str | None, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        parts = url.path.split("/b/", 1)[1].split("/o", 1)
        name = urllib.parse.unquote(parts[1].lstrip("/")) if len(parts) > 1 and parts[1].strip("/") else None
        return parts[0], name, dict(urllib.parse.parse_qsl(url.query))

    def described(self, bucket: str, name: str) -> dict[str, Any]:
        state = (Path(Store.root) / bucket / name).stat()
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "generation": str(state.st_mtime_ns),
            "metageneration": "1",
            "size": str(state.st_size),
            "updated": "2020-01-01T00:00:00.000Z",
            "timeCreated": "2020-01-01T00:00:00.000Z",
        }

    def do_GET(self) -> None:
        bucket, name, query = self.target()
        root = Path(Store.root) / bucket
        if name is None:
            found = []
            for folder, _, files in os.walk(root):
                found += [os.path.relpath(os.path.join(folder, file), root) for file in files]
            prefix = query.get("prefix", "")
            after = query.get("startOffset", "")
            items = [
                self.described(bucket, name) for name in sorted(found) if name.startswith(prefix) and name >= after
            ]
            return self.answer(200, json.dumps({"kind": "storage#objects", "items": items}).encode())
        path = root / name
        if not path.is_file():
            return self.answer(404, b"{}")
        described = self.described(bucket, name)
        if query.get("alt") != "media":
            return self.answer(200, json.dumps(described).encode())
        data, headers = path.read_bytes(), {"x_goog_generation": described["generation"]}
        wanted = query.get("ifGenerationNotMatch")
        if wanted == described["generation"]:
            return self.answer(304, **headers)
        span = self.headers.get("Range", "").removeprefix("bytes=")
        if span:
            first, _, last = span.partition("-")
            size = len(data)
            start = int(first) if first else size - int(last)
            stop = min(int(last) + 1 if first and last else size, size)
            return self.answer(206, data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{size}", **headers)
        return self.answer(200, data, **headers)

    def do_POST(self) -> None:
        bucket, _, query = self.target()
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = Path(Store.root) / bucket / query["name"]
        wanted = query.get("ifGenerationMatch")
        there = self.described(bucket, query["name"])["generation"] if path.is_file() else "0"
        if wanted is not None and wanted != there:
            return self.answer(412, b"{}")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{threading.get_ident()}")
        temporary.write_bytes(data)
        os.replace(temporary, path)
        return self.answer(200, json.dumps(self.described(bucket, query["name"])).encode())

    def do_DELETE(self) -> None:
        bucket, name, _ = self.target()
        path = Path(Store.root) / bucket / str(name)
        if not path.is_file():
            return self.answer(404, b"{}")
        path.unlink()
        return self.answer(204)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is the bucket gs://bucket while the test runs."""
    Store.root = str(tmp_path / "store")
    (tmp_path / "store" / "bucket").mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    monkeypatch.setattr(io, "STORES", {"gs": "fsspec"})  # which stands in for gcsfs
    before = {name: fsspec.registry.get(name) for name in ("gs", "gcs")}
    for name in before:
        fsspec.register_implementation(name, Store, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield tmp_path / "store" / "bucket"
    server.shutdown()
    server.server_close()
    backend.fsspec_backend._get_filesystem.cache_clear()
    for name, implementation in before.items():
        if implementation:
            fsspec.register_implementation(name, implementation, clobber=True)

"""Exports that are sent to the hub: what arrives, who sees it, and what a failure leaves."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import huggingface_hub
import pytest

from quietstar_jax import export
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.export_hf import save as hf_save
from tests.export_hf.exports import write_checkpoint
from tests.hf.runs import start_run

REPOSITORY = "someone/thinks"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of an export, which the first test that needs it makes."""
    folder = tmp_path_factory.mktemp("push")
    start_run(folder / "run", write_checkpoint(folder / "hf"))
    return ["--checkpoint", str(folder / "run"), "--output", str(folder / "out"), "--format", "base"]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


class Hub:
    """Stands in for the hub behind `HfApi`, whose signatures are checked."""

    def __init__(self) -> None:
        self.api = mock.create_autospec(huggingface_hub.HfApi)
        self.private: dict[str, bool] = {}
        self.files: set[str] = set()
        client = self.api.return_value
        client.create_repo.side_effect = self.create
        client.model_info.side_effect = lambda name: SimpleNamespace(private=self.private[name])
        client.upload_folder.side_effect = self.upload
        client.update_repo_settings.side_effect = lambda name, private: self.private.update({name: private})

    def create(self, name: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.private.setdefault(name, private)
        return f"https://hub/{name}"

    def upload(
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], delete_patterns: list[str],
        commit_message: str,
    ) -> None:  # fmt: skip
        assert self.private.get(repo_id) is not None
        assert commit_message
        kept = {name for name in self.files if not any(fnmatch(name, pattern) for pattern in delete_patterns)}
        sent = {path.name for path in folder_path.iterdir()}
        self.files = kept | {name for name in sent if any(fnmatch(name, pattern) for pattern in allow_patterns)}

    def calls(self) -> list[str]:
        return [call[0] for call in self.api.return_value.method_calls]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    return hub


def output(words: list[str]) -> Path:
    return Path(words[words.index("--output") + 1])


def test_an_export_is_sent_to_a_private_repository(words, hub, capsys):
    others = {"notes.md", ".gitattributes", "thought.gif", "model-mine.safetensors", "tokenizer_notes/x.md"}
    hub.files = {"model-00001-of-00009.safetensors"} | others  # an earlier export, and other files
    export.main([*words, "--push", REPOSITORY])
    assert hub.private == {REPOSITORY: True}
    assert hub.files == {path.name for path in output(words).iterdir()} | others, "the export is sent as a whole"
    secret = output(words) / ".env"
    secret.write_text("KEY=1")
    export.main([*words, "--push", REPOSITORY])
    secret.unlink()
    assert ".env" not in hub.files, "and nothing else"
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} < hub.files
    assert hub.api.call_args.kwargs["token"] == "hf_secret"
    assert capsys.readouterr().out.endswith(f"It is at https://hub/{REPOSITORY} (private).\n")


def test_the_same_command_sends_what_could_not_be_sent(words, hub, monkeypatch):
    client = hub.api.return_value
    client.upload_folder.side_effect = OSError("Connection reset by peer")
    with pytest.raises(CheckpointError) as error:
        export.main([*words, "--push", REPOSITORY])
    folder = output(words)
    assert f"{folder} is complete, but was not sent to {REPOSITORY}: Connection reset by peer" in str(error.value)
    assert "the same command again" in str(error.value)
    monkeypatch.setattr(hf_save, "write_file", mock.Mock(side_effect=AssertionError("it is exported again")))
    client.upload_folder.side_effect = hub.upload
    export.main([*words, "--push", REPOSITORY])
    assert hub.files == {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("private", [None, True, False], ids=["new", "private", "public"])
def test_a_repository_becomes_public_after_the_last_file(words, hub, capsys, private):
    if private is not None:
        hub.private[REPOSITORY] = private
    export.main([*words, "--push", REPOSITORY, "--public"])
    assert hub.private == {REPOSITORY: False}
    assert hub.calls() == ["create_repo", "model_info", "upload_folder", "update_repo_settings"][: 3 + (private != 0)]
    assert capsys.readouterr().out.endswith("(public).\n")


def test_nothing_is_sent_to_a_public_repository_unless_asked_to(words, hub):
    hub.private[REPOSITORY] = False
    with pytest.raises(ConfigError, match=r"this repository is public\. Add --public"):
        export.main([*words, "--push", REPOSITORY])
    assert "upload_folder" not in hub.calls()


@pytest.fixture
def address() -> Iterator[str]:
    """A server that refuses every request, as the hub does if a token may not write."""

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(403)
            self.send_header("X-Error-Message", "You don't have the rights to create a model")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_the_client_raises_is_one_message(words, address, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for endpoint, problem in ((address, "rights to create a model"), ("http://127.0.0.1:9", "refused")):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        with pytest.raises(CheckpointError, match=problem) as error:
            export.main([*words, "--push", REPOSITORY])
        assert "is complete, but was not sent" in str(error.value)


def test_no_token_is_refused_before_any_work(words, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr("quietstar_jax.export_hf.export_run.export", mock.Mock(side_effect=AssertionError("work")))
    with pytest.raises(ConfigError, match=r"^--push needs a token .*hf auth login.*HF_TOKEN") as error:
        export.main([*words, "--push", REPOSITORY])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["thinks", "a/b/c", "someone/", "/thinks", "", "some one/thinks", "someone/a--b"])
def test_a_name_that_is_no_repository_is_refused(words, name):
    with pytest.raises(ConfigError, match=r"--push is .*; it must be a repository of the hub, OWNER/NAME"):
        export.main([*words, "--push", name])


def test_flags_that_make_no_sense_are_refused(words, tmp_path):
    with pytest.raises(ConfigError, match="--public needs --push"):
        export.main([*words, "--public"])
    (tmp_path / "thought.txt").touch()
    for picture in ("thought.txt", "missing.svg"):
        with pytest.raises(ConfigError, match=r"--card-picture is .*; it must be a \.svg or \.png file"):
            export.main([*words, "--card-picture", str(tmp_path / picture)])

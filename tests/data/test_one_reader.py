"""The same documents from every reader, whatever a file looks like."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar_jax.data.documents import open_documents
from quietstar_jax.data.pretokenized.write import prepare
from quietstar_jax.data.sources import open_source, read_all
from quietstar_jax.data.sources.common import Record
from quietstar_jax.data.sources.texts import TextOf
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import DataError
from quietstar_jax.evals.questions import Layout, read_questions
from tests.data.reading import put

TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
TEXTS = ["The cat sat.", "two\nlines", "drei ü 🙂"]


def bytes_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """A token for every byte, so that tokens say exactly which text they were."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({"<eos>": 0} | {one: i for i, one in enumerate(alphabet, start=1)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    fast.chat_template = template
    return Tokenizer("bytes", fast)


def lines(texts: list[Any], end: str = "\n") -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text in texts).encode()


def long_window(content: bytes) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packed.compress(content) + packed.flush()


def parquet(values: Any, **more: Any) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table({"text": values, **more}), path, row_group_size=2)


HALVES = lines(TEXTS[:1]), lines(TEXTS[1:])
EMPTY = ["", *TEXTS[:1], None, " \t", "\u200b", *TEXTS[1:], "\n", "\0"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
RENDERED = ["[user] hi\n[assistant] ho\n"]

Content = bytes | Callable[[Path], object]
CASES: dict[str, tuple[str, Content, list[str], dict[str, str]]] = {
    "plain": ("a.jsonl", lines(TEXTS), TEXTS, {}),
    "no end": ("a.jsonl", lines(TEXTS)[:-1], TEXTS, {}),
    "ndjson": ("a.ndjson", lines(TEXTS), TEXTS, {}),
    "byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + lines(TEXTS), TEXTS, {}),
    "byte order mark, packed": ("a.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + lines(TEXTS)), TEXTS, {}),
    "utf-16": ("a.jsonl", lines(TEXTS).decode().encode("utf-16"), TEXTS, {}),
    "utf-16, big end first": ("a.jsonl", b"\xfe\xff" + lines(TEXTS).decode().encode("utf-16-be"), TEXTS, {}),
    "utf-32": ("a.jsonl", lines(TEXTS).decode().encode("utf-32"), TEXTS, {}),
    "blank lines": ("a.jsonl", b"\n\n" + b" \n\n".join(HALVES) + b"\n\r\n\n", TEXTS, {}),
    "carriage returns and newlines": ("a.jsonl", lines(TEXTS, "\r\n"), TEXTS, {}),
    "carriage returns": ("a.jsonl", lines(TEXTS, "\r"), TEXTS, {}),
    "nul in a text": ("a.jsonl", lines(["a\0b"]), ["a\0b"], {}),
    "empty": ("a.jsonl", lines(EMPTY), TEXTS, {}),
    "empty, packed": ("a.jsonl.zst", zstandard.compress(lines(EMPTY)), TEXTS, {}),
    "array": ("a.json", json.dumps([{"text": text} for text in EMPTY], indent=1).encode(), TEXTS, {}),
    "array, wide": ("a.json", json.dumps([{"text": text} for text in TEXTS]).encode("utf-16"), TEXTS, {}),
    "array, packed": ("a.json.gz", gzip.compress(json.dumps([{"text": text} for text in TEXTS]).encode()), TEXTS, {}),
    "two members": ("a.jsonl.gz", b"".join(map(gzip.compress, HALVES)), TEXTS, {}),
    "two frames": ("a.jsonl.zst", b"".join(map(zstandard.compress, HALVES)), TEXTS, {}),
    "two streams": ("a.jsonl.bz2", b"".join(map(bz2.compress, HALVES)), TEXTS, {}),
    "two of xz": ("a.jsonl.xz", b"".join(map(lzma.compress, HALVES)), TEXTS, {}),
    "long window": ("a.jsonl.zst", long_window(lines(TEXTS)), TEXTS, {}),
    "nested": ("a.jsonl", b'{"id": 1, "meta": {"text": "The cat"}}\n', ["The cat"], {"text_key": "meta.text"}),
    "a dot in the key": (
        "a.jsonl", b'{"meta.text": "this", "meta": {"text": "that"}}\n', ["this"], {"text_key": "meta.text"},
    ),
    "conversation": (
        "a.jsonl", json.dumps({"messages": CHAT}).encode() + b'\n{"messages": []}\n', RENDERED,
        {"text_key": "messages"},
    ),
    "shared conversation": (
        "a.jsonl", json.dumps({"conversations": SHARED}).encode(), RENDERED, {"text_key": "conversations"},
    ),
    "table": ("a.csv", 'id,text\r\n1,The cat sat.\r\n2,"two\nlines"\r\n3,\r\n4,drei ü 🙂\r\n'.encode(), TEXTS, {}),
    "table with tabs": ("a.tsv", "text\tid\nThe cat sat.\t1\n\"two\nlines\"\t2\ndrei ü 🙂\t3\n".encode(), TEXTS, {}),
    "table, packed": ("a.csv.gz", gzip.compress(b"\xef\xbb\xbftext\nThe cat sat.\n"), TEXTS[:1], {}),
    "parquet": ("a.parquet", parquet(EMPTY), TEXTS, {}),
    "bytes": ("a.parquet", parquet(pa.array([text.encode() for text in TEXTS], pa.binary())), TEXTS, {}),
    "large": ("a.parquet", parquet(pa.array(EMPTY, pa.large_string())), TEXTS, {}),
    "dictionary": ("a.parquet", parquet(pa.array(EMPTY).dictionary_encode()), TEXTS, {}),
    "structure": ("a.parquet", parquet([1], meta=[{"text": "The cat"}]), ["The cat"], {"text_key": "meta.text"}),
    "list": ("a.parquet", parquet([1], messages=[CHAT]), RENDERED, {"text_key": "messages"}),
    "text": ("a.txt", "\ufeffOne\r\nfile.\0\n".encode(), ["One\r\nfile.\0\n"], {}),
    "text, wide": ("a.txt", "One\nfile.\n".encode("utf-16"), ["One\nfile.\n"], {}),
    "text, packed": ("a.txt.xz", lzma.compress("\ufeffOne\r\nfile.\n".encode()), ["One\r\nfile.\n"], {}),
    "paragraphs": (
        "a.txt", b"\n\none\r\ntwo\r\n \r\n\r\nthree\n\nfour", ["one\ntwo", "three", "four"],
        {"text_documents": "paragraph"},
    ),
    "lines": ("a.txt", b"one\r\n\r\ntwo\rthree\n", ["one", "two", "three"], {"text_documents": "line"}),
}  # fmt: skip


def write(folder: Path, name: str, content: Content) -> str:
    path = folder / name
    if isinstance(content, bytes):
        put(path, content)
    else:
        content(path)
    return str(path)


@pytest.mark.parametrize("case", CASES)
def test_every_reader_has_the_same_documents(tmp_path: Path, case: str) -> None:
    name, content, expected, given = CASES[case]
    spec, tokenizer = (
        write(tmp_path / "a", name, content) if (tmp_path / "a").mkdir() is None else "",
        bytes_tokenizer(),
    )
    config = DataConfig(cache_dir=str(tmp_path / "cache"), **given)  # type: ignore[arg-type]
    trained = open_documents(spec, config, tokenizer, split="train", seed=0)
    assert [tokenizer.decode(trained[i].tolist()) for i in range(len(trained))] == expected
    manifest = prepare([spec], tokenizer, "", tmp_path / "tokens", config, shards=2, workers=1)
    prepared = open_documents(str(tmp_path / "tokens"), config, tokenizer, split="train", seed=0)
    assert [tokenizer.decode(prepared[i].tolist()) for i in range(len(prepared))] == expected
    assert manifest["documents"] == len(expected)
    evaluated = open_source(spec, config, split="validation", seed=0, render=tokenizer.render_conversation)
    assert [evaluated[i] for i in range(len(evaluated))] == expected
    if "text_documents" not in given:  # of questions and prompts
        text = TextOf(config.text_key, tokenizer.render_conversation)
        assert [found for record in read_all(spec, "prompts") if (found := text(record))] == expected


def test_questions_and_prompts_of_any_source(tmp_path: Path) -> None:
    rows = [{"question": "q?", "answer": "#### 3"}, {"question": "r?", "answer": "4"}]
    array = write(tmp_path, "a.json", json.dumps(rows).encode("utf-16"))
    table = write(tmp_path, "b.csv.gz", gzip.compress(b"answer,question\n3,q?\n4,r?\n"))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for spec in (array, table, str(tmp_path / "c.parquet"), f"file://{tmp_path}/*.parquet"):
        found = read_questions(spec, [Layout("question", "answer")])
        assert [(one.text, one.answer, one.line) for one in found] == [("q?", "3", 1), ("r?", "4", 2)]
    broken = write(tmp_path, "d.csv", b"question,answer\nq?,3\nr?,many\n")
    with pytest.raises(DataError, match=r"d\.csv, row 2: the answer is \"many\""):
        read_questions(broken, [Layout("question", "answer")])


def test_a_conversation_needs_a_template(tmp_path: Path) -> None:
    spec = write(tmp_path, "a.jsonl", json.dumps({"messages": CHAT}).encode())
    config = DataConfig(text_key="messages", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="'bytes' has no chat template"):
        open_documents(spec, config, bytes_tokenizer(None), split="train", seed=0)[0]
    refusing = bytes_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: the chat template .*roles must alternate"):
        open_documents(spec, config, refusing, split="train", seed=0)[0]
    with pytest.raises(DataError, match="no field 'text'; it has messages"):
        open_documents(spec, DataConfig(), bytes_tokenizer(), split="train", seed=0)


FOLDERS: dict[str, tuple[dict[str, list[str]], list[str] | str]] = {
    "as downloaded": (
        {"README.md": [], ".gitattributes": [], ".cache/x.jsonl": ["n"], "data/train-0.jsonl": ["a"]},
        ["a"],
    ),
    "described": ({"train.jsonl": ["a"], "dataset_infos.json": [], "LICENSE.txt": []}, ["a"]),
    "two shards": ({"data/train-00000-of-00002.jsonl": ["a"], "data/train-00001-of-00002.jsonl": ["b"]}, ["a", "b"]),
    "no split": ({"1.jsonl": ["a"], "deep/2.jsonl": ["b"]}, ["a", "b"]),
    "test only": ({"test.jsonl": ["a"]}, ["a"]),
    "two splits": ({"data/train-0.jsonl": ["a"], "data/test-0.jsonl": ["b"]}, "several splits .*data/train-0.jsonl"),
    "folders": ({"train/0.jsonl": ["a"], "validation/0.jsonl": ["b"]}, "several splits .*validation/0.jsonl"),
    "ends in its split": ({"gsm8k_train.jsonl": ["a"], "gsm8k_test.jsonl": ["b"]}, "several splits .*gsm8k_test.jsonl"),
    "text is no split": ({"test of time.txt": [], "train spotting.txt": []}, ["", ""]),
    "two kinds": ({"a.jsonl": ["a"], "b.txt": []}, r"several kinds .*/\*\*/\*\.jsonl"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_its_data(tmp_path: Path, case: str) -> None:
    files, expected = FOLDERS[case]
    for name, texts in files.items():
        put(tmp_path / name, lines(texts) if texts else b"A text about the files.")
    for spec in (str(tmp_path), f"file://{tmp_path}"):
        if isinstance(expected, str):
            with pytest.raises(DataError, match=expected):
                open_source(spec, DataConfig(), split="train", seed=0)
            continue
        source = open_source(spec, DataConfig(), split="train", seed=0)
        assert [source[i] for i in range(len(source))] == [text or "A text about the files." for text in expected]
        assert len(read_all(spec, "questions")) == len(expected)


def test_a_text_without_a_token_is_left_out_in_both_ways(tmp_path: Path) -> None:
    """A tokenizer without bytes knows nothing of some texts."""
    backend = Backend(models.BPE({"<eos>": 0, "a": 1, "b": 2}, []))
    tokenizer = Tokenizer("few", PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))
    spec = write(tmp_path, "a.jsonl", lines(["a", "ж", "", "ab"]))
    few = DataConfig(max_unknown_fraction=1.0)
    prepare([spec], tokenizer, "", tmp_path / "tokens", few, shards=1, workers=1)
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    for source in (spec, str(tmp_path / "tokens")):
        documents = open_documents(source, config, tokenizer, split="train", seed=0)
        assert [documents[i].tolist() for i in range(len(documents))] == [[1], [1, 2]]
        assert documents.counts().tolist() == [1, 2]


def test_places_are_those_of_the_file(tmp_path: Path) -> None:
    for name, content, place in (
        ("a.jsonl", b'\n{"text": "a"}\n\n{"text": 1}\n', "line 4"),
        ("a.jsonl.bz2", bz2.compress(b'\n{"text": "a"}\n\n{"text": 1}\n'), "line 4"),
        ("a.json", b'[{"text": "a"},\n\n{"text": 1}]', "element 2"),
        ("a.parquet", parquet([1, 2]), "row 1"),
    ):
        spec = write(tmp_path, name, content)
        with pytest.raises(DataError, match=rf"{name}, {place}: 'text' contains int, not text"):
            open_source(spec, DataConfig(), split="train", seed=0)
    assert TextOf("text")(Record("here", {"text": b"a"})) == "a"

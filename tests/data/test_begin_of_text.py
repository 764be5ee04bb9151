"""Which token begins a text: one answer for every layout of tokenizer files, before and after saving."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.errors import ConfigError
from tests.data.layouts import layouts

LAYOUTS = layouts()
NAMES = pytest.mark.parametrize("name", LAYOUTS)
TEXTS = ["The cat sat.", " 12 cats", "naïve ສະບາຍ", "mat </s> and <|im_end|>"]

TRANSFORMERS_4 = """
import json, sys
from transformers import AutoTokenizer
folders, texts = json.load(sys.stdin)
print("FOUND " + json.dumps([[AutoTokenizer.from_pretrained(f)(text)["input_ids"] for text in texts] for f in folders]))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout as published, and under `saved/` as it is saved here."""
    path = tmp_path_factory.mktemp("layouts")
    for name, layout in LAYOUTS.items():
        load_tokenizer(str(layout.write(path / name))).save(path / "saved" / name)
    return path


def ours(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode_text(text, tokenizer.begins()) for text in TEXTS]


@NAMES
def test_the_token_that_begins_a_text(root: Path, name: str) -> None:
    tokenizer, begin = load_tokenizer(str(root / name)), LAYOUTS[name].begin
    expected = () if begin is None else (LAYOUTS[name].tokenizer.token_to_id(begin),)
    assert tokenizer.begins() == tokenizer.begins("document_start") == tokenizer.begin_ids == expected
    assert tokenizer.begins("never") == ()
    if begin is not None or tokenizer.bos_id is not None:
        assert tokenizer.begins("always") == (expected or (tokenizer.bos_id,))
    else:
        with pytest.raises(ConfigError, match=r"prepend_bos is 'always'.* has no begin-of-text token"):
            tokenizer.begins("always")
    assert ours(tokenizer) == [[*expected, *tokenizer.encode(text)] for text in TEXTS]
    if begin is not None:  # a text that spells it out has one all the same
        found = [tokenizer.encode_text(begin + text, expected) for text in TEXTS]
        assert [(ids[0], ids.count(expected[0])) for ids in found] == [
            (expected[0], 1 + text.count(begin)) for text in TEXTS
        ]


@NAMES
def test_saved_tokenizers_give_the_same_ids(root: Path, name: str) -> None:
    before, after = load_tokenizer(str(root / name)), load_tokenizer(str(root / "saved" / name))
    assert ours(after) == ours(before)
    assert after.fingerprint() == before.fingerprint()
    assert (after.bos_id, after.eos_id, after.pad_id, after.unk_id) == (
        before.bos_id, before.eos_id, before.pad_id, before.unk_id,
    )  # fmt: skip


@NAMES
def test_transformers_5_agrees(root: Path, name: str) -> None:
    expected = ours(load_tokenizer(str(root / name)))
    stock = AutoTokenizer.from_pretrained(str(root / "saved" / name))
    assert [stock(text)["input_ids"] for text in TEXTS] == expected
    published = AutoTokenizer.from_pretrained(str(root / name))  # some of its classes split text anew
    begin = load_tokenizer(str(root / name)).begins()
    begun = [[*begin, *published(text, add_special_tokens=False)["input_ids"]] for text in TEXTS]
    assert ([published(text)["input_ids"] for text in TEXTS] == begun) is LAYOUTS[name].same_in_5


@pytest.mark.transformers4
def test_transformers_4_agrees(root: Path) -> None:
    python = os.environ["QUIETSTAR_TRANSFORMERS4"]
    folders = [str(root / where / name) for where in ("saved", "") for name in LAYOUTS]
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [python, "-c", TRANSFORMERS_4], input=json.dumps([folders, TEXTS]), env=environment, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(ended.stdout.rpartition("FOUND ")[2])
    expected = [ours(load_tokenizer(str(root / name))) for name in LAYOUTS]
    saved, published = found[: len(LAYOUTS)], found[len(LAYOUTS) :]
    assert dict(zip(LAYOUTS, saved, strict=True)) == dict(zip(LAYOUTS, expected, strict=True))
    same = {name: left == right for name, left, right in zip(LAYOUTS, published, expected, strict=True)}
    assert same == {name: layout.same_in_4 for name, layout in LAYOUTS.items()}


@NAMES
@pytest.mark.parametrize("prepend_bos", ["always", "never"])
def test_an_export_begins_texts_as_its_run_did(root: Path, tmp_path: Path, name: str, prepend_bos: str) -> None:
    tokenizer = load_tokenizer(str(root / name))
    if prepend_bos == "always" and not tokenizer.usual_begin:
        return
    begin = tokenizer.begins(prepend_bos)
    expected = [tokenizer.encode_text(text, begin) for text in TEXTS]
    tokenizer.begin_with(begin)
    tokenizer.save(tmp_path)
    assert ours(load_tokenizer(str(tmp_path))) == expected
    stock = AutoTokenizer.from_pretrained(str(tmp_path))
    assert [stock(text)["input_ids"] for text in TEXTS] == expected

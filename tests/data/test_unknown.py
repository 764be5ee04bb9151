"""A tokenizer that was made for other text is noticed before anything is trained or prepared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar_jax.data import prepare
from quietstar_jax.data.pipeline import training_sequences
from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.data.unknown import check_known, unknown_in_text
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import ConfigError, DataError
from tests.data.layouts import byte_fallback, byte_level

OWN = "Gradient descent converges whenever curvature stays bounded."


def wrap(backend: Backend, **special: str) -> Tokenizer:
    return Tokenizer("mine", PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **special))


def words(*, unk: bool) -> Tokenizer:
    """Six words; without a token for others, these are dropped."""
    vocabulary = {word: number for number, word in enumerate(["</s>", "<unk>", "the", "cat", "sat", "on"])}
    if unk:
        backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    else:
        backend = Backend(models.BPE({letter: number for number, letter in enumerate("abcdehnost")} | {"</s>": 10}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrap(backend, **({"unk_token": "<unk>"} if unk else {}))


@pytest.mark.parametrize(
    ("tokenizer", "text", "fraction"),
    [
        (words(unk=True), "the cat sat on the cat", 0.0),
        (words(unk=True), "the cat sat on the mat", 3 / 17),
        (words(unk=True), "the cat sat <unk>", 0.0),  # spelled out
        (words(unk=True), "the extraordinarily cat", 15 / 21),  # of the characters
        (words(unk=True), OWN, 1.0),
        (words(unk=True), "", 0.0),
        (words(unk=True), " \n", 0.0),
        (words(unk=False), "the cat", 0.0),
        (words(unk=False), "the ZZZ", 0.5),  # dropped without a trace
        (words(unk=False), "ZZZ", 1.0),
        (wrap(byte_fallback()), "ສະບາຍດີ cat", 0.0),
        (wrap(byte_level(("</s>",))), "ສະບາຍດີ\tcat  ", 0.0),
        (load_tokenizer("synthetic"), OWN, 1.0),
    ],
)
def test_how_much_is_unknown(tokenizer: Tokenizer, text: str, fraction: float) -> None:
    assert unknown_in_text(tokenizer, text).fraction == pytest.approx(fraction)


def corpus(path: Path, foreign: int) -> str:
    lines = ["the cat sat on the cat sat on the cat"] * (200 - foreign) + [OWN] * foreign
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("foreign", "lines", "said"), [(0, 0, "^$"), (8, 1, "warning: The tokenizer 'mine' has no tokens for .*as 'Gra")]
)
def test_a_little_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], foreign: int, lines: int, said: str
) -> None:
    tokenizer = words(unk=True)
    config = DataConfig(train=(corpus(tmp_path / "a.jsonl", foreign),), sequence_length=8)
    unknown = training_sequences(config, tokenizer, seed=0).unknown()
    check_known(unknown, 0.2, tokenizer, "setting", log_above=0.2)
    assert capsys.readouterr().err == ""
    check_known(unknown, 0.2, tokenizer, "setting")
    error = capsys.readouterr().err
    assert error.count("\n") == lines
    assert re.search(said, error)


def test_much_is_refused_unless_asked_for(tmp_path: Path) -> None:
    config = DataConfig(train=(corpus(tmp_path / "a.jsonl", 150),), sequence_length=8)
    unknown = training_sequences(config, words(unk=True), seed=0).unknown()
    with pytest.raises(
        DataError, match=r"has no tokens for \d\d\.\d% of .*a\.jsonl .*'Gradient'.*set setting to at least 0\.\d"
    ):
        check_known(unknown, 0.2, words(unk=True), "setting")
    check_known(unknown, 1.0, words(unk=True), "setting")


def test_prepare_refuses_before_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words(unk=True).save(tmp_path / "words")
    arguments = [
        "--data",
        corpus(tmp_path / "a.jsonl", 200),
        "--tokenizer",
        str(tmp_path / "words"),
        "--workers",
        "1",
    ]
    output = tmp_path / "out"
    with pytest.raises(DataError, match=r"has no tokens for 100\.0% of .*--max-unknown-fraction"):
        prepare.main([*arguments, "--output", str(output)])
    assert not output.exists()
    with pytest.raises(ConfigError, match="--max-unknown-fraction is 2"):
        prepare.main([*arguments, "--output", str(output), "--max-unknown-fraction", "2"])
    prepare.main([*arguments, "--output", str(output), "--max-unknown-fraction", "1"])
    assert "warning: " in capsys.readouterr().err
    tokenizer = load_tokenizer(str(tmp_path / "words"))
    unknown = training_sequences(DataConfig(train=(str(output),), sequence_length=8), tokenizer, seed=0).unknown()
    assert unknown[0][1].fraction == 1.0

"""The begin-of-text token of sequences and validation batches."""

import json
from pathlib import Path

import numpy as np
import pytest

from quietstar_jax.data.pipeline import Batch, training_sequences, validation_batches
from quietstar_jax.data.pretokenized import write as preparation
from quietstar_jax.errors import ConfigError
from tests.data.words import EOS, LENGTH, LENGTHS, TOKENIZER, config, documents, same, words_with_bos, write


@pytest.mark.parametrize(
    ("prepend_bos", "by_itself", "begins"),
    [("auto", True, True), ("auto", False, False), ("always", False, True), ("never", True, False)],
)
def test_begin_of_text(corpus: str, prepend_bos: str, by_itself: bool, begins: bool) -> None:
    """Before every span, before every packed document, and before every document of the validation text."""
    tokenizer, texts = words_with_bos(by_itself=by_itself), documents(LENGTHS)
    settings_ = config(corpus, prepend_bos=prepend_bos)
    batch = training_sequences(settings_, tokenizer, seed=0).next_batch(len(LENGTHS))
    assert set(batch["tokens"][:, 0] == 999) == {begins}
    assert not np.any(batch["tokens"][:, 1:] == 999)
    for row, mask in zip(batch["tokens"], batch["mask"], strict=True):
        words = row[mask].tolist()[begins:]
        assert any(words == [*text, EOS][i : i + len(words)] for text in texts for i in range(len(text) + 1))

    spelled = Path(corpus).with_name("spelled.jsonl")  # the same text, which begins with the token itself
    spelled.write_text(Path(corpus).read_text().replace('"text": "', '"text": "<bos> '))
    if begins:
        own = config(str(spelled), prepend_bos=prepend_bos)
        same(training_sequences(own, tokenizer, seed=0).next_batch(len(LENGTHS)), batch)

    packed = config(corpus, prepend_bos=prepend_bos, packing="packed")
    stream = training_sequences(packed, tokenizer, seed=0).next_batch(20)["tokens"].ravel().tolist()
    after_end = [stream[i + 1] for i, token in enumerate(stream[:-1]) if token == EOS]
    assert {token == 999 for token in [stream[0], *after_end]} == {begins}

    first = next(validation_batches(settings_, tokenizer, batch_size=len(LENGTHS)))["tokens"]
    assert (first[0].tolist() == [999, *texts[0]][:LENGTH]) is begins


def test_begin_of_text_needs_a_token(corpus: str) -> None:
    with pytest.raises(ConfigError, match="has no begin-of-text token"):
        training_sequences(config(corpus, prepend_bos="always"), TOKENIZER, seed=0)


@pytest.mark.parametrize("packing", ["random_span", "consecutive_spans"])
def test_a_span_from_within_a_document_begins_without_the_token(corpus: str, packing: str) -> None:
    tokenizer = words_with_bos(by_itself=True)
    starts = {text[0] for text in documents(LENGTHS)}
    settings_ = config(corpus, prepend_bos="document_start", packing=packing)
    rows = training_sequences(settings_, tokenizer, seed=0).next_batch(200)["tokens"]
    begun = rows[:, 0] == 999
    assert 0 < begun.sum() < len(rows)
    assert set(rows[begun, 1].tolist()) <= starts
    if packing == "consecutive_spans":
        assert not set(rows[~begun, 0].tolist()) & starts
    assert not np.any(rows[:, 1:] == 999)
    held_out = next(validation_batches(settings_, tokenizer, batch_size=60))
    assert held_out["tokens"][0].tolist() == [999, 2, 3, 4, 5]
    assert np.sum(held_out["tokens"] == 999) == len(LENGTHS)


@pytest.mark.some(2)
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("packing", ["random_span", "consecutive_spans", "packed"])
def test_documents_that_begin_with_the_token_themselves(tmp_path: Path, packing: str, kept: bool) -> None:
    """The same sequences read directly and prepared, with the token that a text spells out once, or as it is."""
    tokenizer = words_with_bos(by_itself=True)
    plain, mixed = tmp_path / "plain.jsonl", tmp_path / "mixed.jsonl"
    write(plain, documents(LENGTHS))
    lines = plain.read_text().splitlines()
    mixed.write_text("".join(
        line.replace(': "', ': "<bos> ') + "\n" if number % 2 else line + "\n" for number, line in enumerate(lines)
    ))  # fmt: skip
    folder = tmp_path / "prepared"
    preparation.prepare([str(mixed)], tokenizer, "", folder, config(str(mixed)), shards=2, workers=1)
    if not kept:  # prepared before it was kept which documents begin so
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "begin"}))
        (folder / "begun.npy").unlink()

    def batch(source: Path, prepend_bos: str) -> Batch:
        given = config(str(source), packing=packing, prepend_bos=prepend_bos, cache_dir=str(tmp_path / "cache"))
        return training_sequences(given, tokenizer, seed=0).next_batch(60)

    for prepend_bos in ("auto", "always", "document_start"):
        expected = batch(plain, prepend_bos)
        same(batch(mixed, prepend_bos), expected)
        same(batch(folder, prepend_bos), expected)
    same(batch(folder, "never"), batch(mixed, "never"))
    assert np.any(batch(mixed, "never")["tokens"] == 999)

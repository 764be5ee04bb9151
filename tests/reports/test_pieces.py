"""Tokens as text: nothing lost, nothing broken, parts of characters shown as bytes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.reports.page import visible
from quietstar_jax.reports.pieces import BROKEN, Pieces
from tests.reports.cases import byte_fallback, byte_level

BYTES, FALLBACK = byte_level(), byte_fallback()


def test_a_character_of_three_tokens_stands_with_the_last() -> None:
    pieces = Pieces(BYTES)
    assert pieces(BYTES.encode("b€é")) == ["b", "⟨E2⟩", "⟨82⟩", "€", "⟨C3⟩", "é"]
    assert pieces(BYTES.encode("a—")) == ["a⟨E2⟩", "⟨80⟩", "—"]
    assert pieces.alone(BYTES.encode("€")[0]) == "⟨E2⟩"


def test_byte_fallback_and_leading_spaces() -> None:
    pieces = Pieces(FALLBACK)
    ids = FALLBACK.encode("a €")
    assert [FALLBACK.fast.convert_ids_to_tokens(i) for i in ids] == ["▁a", "▁", "<0xE2>", "<0x82>", "<0xAC>"]
    assert pieces(ids) == [" a", " ", "⟨E2⟩", "⟨82⟩", "€"]


def test_bytes_that_never_become_a_character() -> None:
    first, second, _ = BYTES.encode("€")
    letter = BYTES.encode("b")[0]
    assert Pieces(BYTES)([first, letter, first, second]) == ["⟨E2⟩", "b", "⟨E2⟩", "⟨82⟩"]
    assert Pieces(BYTES)([second, *BYTES.encode("é")]) == ["⟨82⟩", "⟨C3⟩", "é"]


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=lambda tokenizer: tokenizer.name)
@given(text=st.text(alphabet=st.characters(exclude_characters=f"⟨⟩{BROKEN}▁", exclude_categories=("Cs",)), max_size=20))
def test_together_the_pieces_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    whole = "".join(Pieces(tokenizer)(tokenizer.encode(text)))
    shown = re.sub("⟨[0-9A-F ]+⟩", "", whole)
    assert shown == (text if tokenizer is BYTES or not text else " " + text)


def test_words_of_the_embedded_corpus() -> None:
    tokenizer = load_tokenizer("synthetic")
    pieces = Pieces(tokenizer)
    assert pieces.words
    assert pieces(tokenizer.encode("sum 3 +1")) == [" sum", " 3", " +1"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n\tb", "a↵→b"),
        ("\x00\x7f", "␀⟨U+007F⟩"),
        ("\u202ex\u2028", "⟨U+202E⟩x⟨U+2028⟩"),
        ("é 😀", "é 😀"),
    ],
)
def test_what_cannot_be_seen_has_a_sign(text: str, shown: str) -> None:
    assert visible(text) == shown

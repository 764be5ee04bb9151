"""Pieces of text: whole characters, spaces where they belong, nothing past a stop string, nothing taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.generation.text import TextStream


def wrap(backend: Backend) -> Tokenizer:
    return Tokenizer("test", PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """Every byte a token, as in GPT-2 and Qwen."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate([*alphabet, "</s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrap(backend)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Words with their space before them and bytes for the rest; the space of a beginning is dropped, as in Llama."""
    words = ["<unk>", "</s>", "▁the", "▁cat", "s", "▁", *(f"<0x{i:02X}>" for i in range(256))]
    backend = Backend(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(backend)


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.add(i) for i in ids), stream.finish()]


def test_characters_of_many_bytes_come_whole(byte_level):
    text = "naïve 🎈→ 日本"
    ids = byte_level.encode(text)
    assert len(ids) > len(text)
    found = pieces(TextStream(byte_level, byte_level.encode("a")), ids)
    assert "".join(found) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)
    assert found[2:4] == ["", "ï"], "nothing at the first of two bytes, the character at the second"


def test_an_unfinished_character_comes_at_the_end_as_it_is(byte_level):
    ids = byte_level.encode("a🎈")[:-1]
    assert pieces(TextStream(byte_level, []), ids) == ["a", "", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_broken_bytes_do_not_hold_up_what_follows(byte_level):
    ids = [byte_level.encode("🎈")[0], *byte_level.encode("ok")]
    assert "".join(pieces(TextStream(byte_level, []), ids)) == "\N{REPLACEMENT CHARACTER}ok"


def test_the_space_after_the_prompt_is_kept(sentencepiece):
    the, cat, s = (sentencepiece.token_id(word) for word in ("▁the", "▁cat", "s"))
    assert pieces(TextStream(sentencepiece, [the]), [cat, s, the]) == [" cat", "s", " the", ""]
    assert pieces(TextStream(sentencepiece, [the] * 30), [cat]) == [" cat", ""]
    balloon = [sentencepiece.token_id(f"<0x{byte:02X}>") for byte in "🎈".encode()]
    assert pieces(TextStream(sentencepiece, [the]), [*balloon, s]) == ["", "", "", "🎈", "s", ""]


@given(st.text("abé🎈 ", max_size=20), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_at_their_first_appearance(byte_level, text, stop):
    stream = TextStream(byte_level, byte_level.encode("b"), stop)
    found = "".join(pieces(stream, byte_level.encode(text)))
    places = [text.find(one) for one in stop if one in text]
    assert found == (text[: min(places)] if places else text)
    assert stream.stopped == bool(places)


def test_what_may_begin_a_stop_string_is_held_back_and_no_more(byte_level):
    stream = TextStream(byte_level, [], ["abc"])
    assert [stream.add(i) for i in byte_level.encode("xabab")] == ["x", "", "", "ab", ""]
    assert stream.finish() == "ab"
    stream = TextStream(byte_level, [], ["abc"])
    assert [stream.add(i) for i in byte_level.encode("aabcz")] == ["", "a", "", "", ""]
    assert (stream.stopped, stream.finish()) == (True, "")

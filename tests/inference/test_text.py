"""Pieces of text: whole characters, spaces where they belong, nothing past a stop string, nothing taken back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar_jax.data.tokenization import Tokenizer, load_tokenizer
from quietstar_jax.inference.detokenize import TextStream
from tests.data.layouts import byte_fallback
from tests.data.layouts import byte_level as byte_level_bpe
from tests.material import material


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


TINY = {"byte fallback": byte_fallback(), "byte level": byte_level_bpe(("</s>",))}
TINY = {name: wrap(backend) for name, backend in TINY.items()}
SCRIPTS = ["ສະບາຍດີ ໂລກ", "ሰላም ለዓለም", "ᚠᛇᚻ᛫ᛒᛦᚦ", "龘靐齉 麤 cat", "👩‍👩‍👧‍👦 ok 🏳️‍🌈", "naïve  cats\n\nThe � mat"]


def follows(tokenizer: Tokenizer, ids: list[int], cut: int) -> str:
    """What the whole text has behind the whole characters of its first `cut` tokens."""
    before, text = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    whole = before.rstrip("�")
    broken = len(text[len(whole) :]) - len(text[len(whole) :].lstrip("�"))
    return text[len(whole) + min(broken, len(before) - len(whole)) :]


def assert_every_cut(tokenizer: Tokenizer, ids: list[int]) -> None:
    for cut in range(len(ids) + 1):
        assert "".join(pieces(TextStream(tokenizer, ids[:cut]), ids[cut:])) == follows(tokenizer, ids, cut), cut


@pytest.mark.parametrize("name", TINY)
@given(text=st.text(max_size=12) | st.sampled_from(SCRIPTS))
def test_every_cut_of_every_text(name: str, text: str) -> None:
    ids = TINY[name].encode(text)
    assert TINY[name].decode(ids) == text or "</s>" in text or "�" in TINY[name].decode(ids) or name != "byte level"
    assert_every_cut(TINY[name], ids)


@pytest.mark.parametrize("name", TINY)
@given(data=st.data())
def test_every_cut_of_any_ids(name: str, data: st.DataObject) -> None:
    """Also of bytes that are no text."""
    ids = data.draw(st.lists(st.integers(0, TINY[name].vocab_size - 1), max_size=12))
    assert_every_cut(TINY[name], ids)


def test_every_cut_with_the_tokenizer_of_mistral() -> None:
    tokenizer = load_tokenizer(str(material("tokenizers/mistral-7b-v0.1")))
    for text in SCRIPTS:
        ids = [1, *tokenizer.encode(text)]
        assert tokenizer.decode(ids) == tokenizer.fast.backend_tokenizer.decode(ids, skip_special_tokens=False)
        assert_every_cut(tokenizer, ids)


@given(text=st.text("aéສ👩", min_size=1, max_size=6), broken=st.binary(max_size=4), after=st.text("bກ", max_size=3))
def test_a_broken_byte_leaves_the_characters_beside_it(text: str, broken: bytes, after: str) -> None:
    tokenizer = TINY["byte fallback"]
    spelled = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in text.encode() + broken + after.encode()]
    assert tokenizer.decode(spelled).startswith(text)
    assert tokenizer.decode(spelled).endswith(after)
    assert "".join(pieces(TextStream(tokenizer, []), spelled)) == tokenizer.decode(spelled)


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

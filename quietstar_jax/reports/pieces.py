"""Readable texts of single tokens, even where a token is only part of a character."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from transformers.convert_slow_tokenizer import bytes_to_unicode

from quietstar_jax.data.tokenization import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"  # the decoded text of bytes that are not a whole character
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level BPE


class Pieces:
    """Converts token ids to one readable text per token."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.words = tokenizer.splits_words
        self._single = functools.lru_cache(maxsize=None)(self._decode_one)

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Returns one text per token; joined, they are the whole text. A character that several tokens make up is shown
        with the last of them; the others are shown as their bytes: `⟨E2⟩`."""
        texts: list[str] = []
        run: list[int] = []  # tokens since the last whole one
        shown = ""  # whole characters that they have made
        for token in map(int, ids):
            text = self._single(token)
            if BROKEN not in text:
                texts.append(text)
                run, shown = [], ""
                continue
            run.append(token)
            whole = (text := self._tokenizer.decode_within(run)).rstrip(BROKEN)
            new = whole.removeprefix(shown).replace(BROKEN, "")
            texts.append(new if text == whole else new + self._bytes(token))
            run, shown = ([], "") if text == whole else (run, whole)
        return texts

    def alone(self, token: int) -> str:
        """Returns the text of one token without its context."""
        text = self._single(int(token))
        return self._bytes(int(token)) if BROKEN in text else text

    def _decode_one(self, token: int) -> str:
        return self._tokenizer.decode_within([token])

    def _bytes(self, token: int) -> str:
        """The bytes of a character that a token begins or continues but does not complete."""
        spelled = self._tokenizer.fast.backend_tokenizer.id_to_token(token) or ""
        fallback = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", spelled)
        if fallback:
            return f"⟨{fallback[1].upper()}⟩"
        if not spelled or not all(character in _BYTES for character in spelled):
            return BROKEN
        raw = bytes(_BYTES[character] for character in spelled)
        begun = max((place for place, byte in enumerate(raw) if byte >= 0xC0), default=0)
        return "⟨" + raw[begun:].hex(" ").upper() + "⟩"

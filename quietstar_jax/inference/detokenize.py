"""Converts a stream of token ids to text: whole characters only, and no text that may become a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from quietstar_jax.data.tokenization import BROKEN, Tokenizer


class TextStream:
    """The text that follows a prompt, in pieces that are never revised.

    A character that begins in the prompt counts as text that follows it. Decoding starts at the end of a whole
    character, because a part of a character cannot be decoded alone; it starts at the last end but one, because
    tokenizers drop a space at the beginning.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt)
        self._begin, self._read = 0, len(self._ids)  # text up to `_read` is returned; decoding starts at `_begin`
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """Adds a token; returns the text that is now certain, which is empty once a stop string has been found."""
        if self.stopped:
            return ""
        self._ids.append(token)
        piece, whole = self._piece()
        if not whole:
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._release(piece, last=False)

    def finish(self) -> str:
        """Returns the text that was held back; call it where the text ends."""
        if self.stopped:
            return ""
        piece, _ = self._piece()
        self._begin, self._read = self._read, len(self._ids)
        return self._release(piece, last=True)

    def _piece(self) -> tuple[str, bool]:
        """Text of the tokens that are not returned yet, and whether it ends with a whole character."""
        before = self._tokenizer.decode(self._ids[self._begin : self._read])
        text = self._tokenizer.decode(self._ids[self._begin :])
        if before.endswith(BROKEN):  # an incomplete character of the prompt, which may be complete by now
            before = before[: _shared(before, text)]
        return text[len(before) :], not text.endswith(BROKEN)

    def _release(self, piece: str, *, last: bool) -> str:
        text = self._held + piece
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        kept = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _shared(left: str, right: str) -> int:
    """Length of the longest common prefix."""
    return next((at for at, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), len(left))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

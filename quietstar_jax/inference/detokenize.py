"""Token ids to text as they come: whole characters only, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from quietstar_jax.data.tokenization import BROKEN, Tokenizer


class TextStream:
    """The text that follows a prompt, in pieces that are never taken back.

    A character that begins in the prompt is text that follows. Tokens are decoded from the end of a whole character on,
    as a part of one cannot be decoded alone; the end before the last, as tokenizers drop the space of a beginning.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt)
        self._begin, self._read = 0, len(self._ids)  # text up to `_read` is out; it is decoded from `_begin` on
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """What is certain now that this token is there. Nothing more comes once a stop string has been found."""
        if self.stopped:
            return ""
        self._ids.append(token)
        piece, whole = self._piece()
        if not whole:
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._release(piece, last=False)

    def finish(self) -> str:
        """What was held back, if the text ends here."""
        if self.stopped:
            return ""
        piece, _ = self._piece()
        self._begin, self._read = self._read, len(self._ids)
        return self._release(piece, last=True)

    def _piece(self) -> tuple[str, bool]:
        """Text of the tokens that are not out yet, and whether it ends with a whole character."""
        before = self._tokenizer.decode(self._ids[self._begin : self._read])
        text = self._tokenizer.decode(self._ids[self._begin :])
        if before.endswith(BROKEN):  # of a prompt, and it may be a character by now
            before = before[: _shared(before, text)]
        return text[len(before) :], not text.endswith(BROKEN)

    def _release(self, piece: str, *, last: bool) -> str:
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _shared(left: str, right: str) -> int:
    """Length of the longest beginning of both."""
    return next((at for at, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), len(left))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which the stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

"""Token ids to text as they come: whole characters only, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from quietstar_jax.data.tokenization import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes of an unfinished character decode to
CONTEXT = 8  # tokens of the prompt that the first new ones are decoded behind: tokenizers drop the space of a beginning


class TextStream:
    """The text that follows a prompt, in pieces that are never taken back."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt[-CONTEXT:])
        self._begin, self._read = 0, len(self._ids)  # text up to `_read` is out; it is decoded from `_begin` on
        self._held = ""  # decoded, but it may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """What is certain now that this token is there. Nothing more comes once a stop string has been found."""
        if self.stopped:
            return ""
        self._ids.append(token)
        piece = self._piece()
        if piece.endswith(BROKEN):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._release(piece, last=False)

    def finish(self) -> str:
        """What was held back, if the text ends here."""
        if self.stopped:
            return ""
        piece = self._piece()
        self._begin, self._read = self._read, len(self._ids)
        return self._release(piece, last=True)

    def _piece(self) -> str:
        """Text of the tokens that are not out yet."""
        before = self._tokenizer.decode(self._ids[self._begin : self._read])
        return self._tokenizer.decode(self._ids[self._begin :])[len(before) :]

    def _release(self, piece: str, *, last: bool) -> str:
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which the stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

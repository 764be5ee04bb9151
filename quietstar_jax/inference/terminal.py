"""Prints generated tokens on a terminal: text as it is generated and, on request, dimmed thoughts before the tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from quietstar_jax.inference.batch import Token

DIM, RESET = "\x1b[2m", "\x1b[0m"


def print_tokens(tokens: Iterable[Token], out: TextIO, *, show_thoughts: bool, colour: bool) -> None:
    """Writes each token as soon as it is generated.

    Args:
      colour: whether `out` supports escape sequences; without them thoughts are only in brackets.
    """
    dim, reset = (DIM, RESET) if colour else ("", "")
    for token in tokens:
        if show_thoughts and token.has_thought:
            out.write(f"{dim}[{_one_line(token.thought)} | {token.mixing_weight:.3f}]{reset}")
        out.write(token.text)
        out.flush()


def _one_line(thought: str) -> str:
    """Escapes characters of a thought that would break the line or control the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in thought).strip()

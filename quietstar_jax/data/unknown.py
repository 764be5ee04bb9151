"""Measures how much of a text the tokenizer does not know. A large fraction means it was made for other text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.errors import DataError

SETTING = "config.data.max_unknown_fraction"
WARNED, SHOWN = 0.01, 0.0005  # a smaller fraction would print as 0.0%
SAMPLED_DOCUMENTS = 64  # of each source, evenly spaced
SAMPLED_CHARACTERS = 20_000  # of each document
EXAMPLES = 3


class Unknown(NamedTuple):
    """Counts over some text, and examples of unknown text."""

    tokens: int = 0
    unknown_tokens: int = 0
    characters: int = 0  # without spaces; 0 if only token ids are available
    unknown_characters: int = 0  # without a token, or with the unknown token
    examples: tuple[str, ...] = ()

    def __add__(self, other: Unknown) -> Unknown:  # type: ignore[override]  # a sum of counts, not a longer tuple
        return Unknown(
            self.tokens + other.tokens,
            self.unknown_tokens + other.unknown_tokens,
            self.characters + other.characters,
            self.unknown_characters + other.unknown_characters,
            tuple(dict.fromkeys((*self.examples, *other.examples)))[:EXAMPLES],
        )

    @property
    def fraction(self) -> float:
        """The unknown fraction of tokens or of characters, whichever is larger: one token may replace a whole line."""
        return max(self.unknown_tokens / max(self.tokens, 1), self.unknown_characters / max(self.characters, 1))


def unknown_in_text(tokenizer: Tokenizer, text: str) -> Unknown:
    """Returns the counts for one text."""
    encoding = tokenizer.fast.backend_tokenizer.encode(text[:SAMPLED_CHARACTERS], add_special_tokens=False)
    written = np.array([not letter.isspace() for letter in text[:SAMPLED_CHARACTERS]], np.bool_)
    missing, count = written.copy(), 0
    examples: list[str] = []
    for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if token in tokenizer.unknown_ids and tokenizer.decode([token]).strip() != text[start:end].strip():
            count += 1
            examples += [text[start:end].strip()] * (len(examples) < EXAMPLES)
        else:
            missing[start:end] = False
    return Unknown(len(encoding.ids), count, int(written.sum()), int(missing.sum()), tuple(examples))


def unknown_in_ids(tokenizer: Tokenizer, ids: np.ndarray) -> Unknown:
    """Returns the counts for one tokenized document [tokens]."""
    return Unknown(len(ids), int(np.isin(ids, tokenizer.unknown_ids).sum()))


def sampled(count: int) -> Sequence[int]:
    """Returns the numbers of the documents to sample out of `count`."""
    return sorted({int(at) for at in np.linspace(0, count - 1, min(count, SAMPLED_DOCUMENTS))})


def check_known(
    sources: Iterable[tuple[str, Unknown]], most: float, tokenizer: Tokenizer, setting: str, *, log_above: float = -1.0
) -> None:
    """Prints the unknown fraction of each source that has one to stderr, and checks it.

    Args:
      most: the maximum fraction.
      setting: the name of the setting for `most`, for messages.
      log_above: fractions up to this one are not printed; infinite on all processes but one.

    Raises:
      DataError: the unknown fraction of a source is larger than `most`.
    """
    for spec, unknown in sources:
        _check(spec, unknown, most, tokenizer, setting, log_above)


def _check(spec: str, unknown: Unknown, most: float, tokenizer: Tokenizer, setting: str, log_above: float) -> None:
    """Checks one source; raises DataError if its unknown fraction is too large."""
    examples = f" (such as {', '.join(f'{one[:20]!r}' for one in unknown.examples)})" if unknown.examples else ""
    share = f"The tokenizer {tokenizer.name!r} has no tokens for {unknown.fraction:.1%} of {spec}{examples}"
    if unknown.fraction > most:
        raise DataError(
            f"{share}: it was trained on other text, and a model cannot learn unknown text. Use a tokenizer for this "
            f"text, or set {setting} to at least {unknown.fraction:.2g} to train with this one."
        )
    if unknown.fraction > log_above and unknown.fraction >= SHOWN:
        warning = "warning: " if unknown.fraction > WARNED else ""
        print(f"{warning}{share}.", file=sys.stderr)


def total(parts: Iterable[Unknown]) -> Unknown:
    """Returns the sum of counts."""
    return sum(parts, Unknown())

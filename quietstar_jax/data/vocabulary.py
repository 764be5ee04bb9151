"""Determines which ids of a model are tokens, and which tokens match a pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.errors import CheckpointError

UNUSED = "unused_token_ids"  # field in config.json of an export; the exported tokenizer has names for these ids


def unused_ids(tokenizer: Tokenizer, rows: int, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the ids of a model with `rows` embeddings that are not tokens: they pad the vocabulary and have no text.

    Args:
      config: config.json of the checkpoint that the tokenizer is from, or an empty mapping.

    Raises:
      CheckpointError: `unused_token_ids` in the config is not a list of ids.
    """
    named = config.get(UNUSED, [])
    if not isinstance(named, list | tuple) or not all(type(i) is int for i in named):
        raise CheckpointError(f"config.json: {UNUSED} is {named!r}; it must be a list of token ids.")
    known = set(tokenizer.fast.get_vocab().values()).difference(named)
    return tuple(i for i in range(rows) if i not in known)


def matching_ids(tokenizer: Tokenizer, pattern: str, rows: int) -> tuple[int, ...]:
    """Returns the ids below `rows` of the tokens whose text, leading space included, matches a regular expression."""
    space = " " if tokenizer.splits_words else ""  # between words; not part of any
    ids = range(min(tokenizer.vocab_size, rows))
    return tuple(i for i in ids if re.search(pattern, tokenizer.decode_within([i]).removeprefix(space)))

"""Which ids of a model are tokens, and the start and end tokens of a thought in the vocabulary of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken

from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.errors import CheckpointError, DataError

UNUSED = "unused_token_ids"  # in config.json of an export, whose tokenizer has names for them


def unused_ids(tokenizer: Tokenizer, rows: int, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of a model with `rows` embeddings that are no token: they pad its vocabulary and decode to nothing.

    Args:
      config: config.json of the checkpoint that the tokenizer is from, or nothing.

    Raises:
      CheckpointError: it has something else than ids under `unused_token_ids`.
    """
    named = config.get(UNUSED, [])
    if not isinstance(named, list | tuple) or not all(type(i) is int for i in named):
        raise CheckpointError(f"config.json: {UNUSED} is {named!r}; it takes a list of token ids.")
    known = set(tokenizer.fast.get_vocab().values()).difference(named)
    return tuple(i for i in range(rows) if i not in known)


def add_tokens(tokenizer: Tokenizer, vocab_size: int, names: Sequence[str]) -> tuple[int, ...]:
    """Gives tokens that the tokenizer lacks the ids behind all others, and returns the ids of all of them.

    Embeddings with more rows than the tokenizer has tokens (padded vocabularies) get names for the spare rows first,
    `<|unused_ID|>`: so no row of the model changes its meaning. Changes the tokenizer.

    Args:
      vocab_size: V, rows of the model's embedding.
      names: distinct tokens.

    Raises:
      DataError: the tokenizer's ids do not follow one another.
    """
    missing = [name for name in names if tokenizer.token_id(name) is None]
    used = max(tokenizer.fast.get_vocab().values()) + 1
    if missing:
        spare = [f"<|unused_{i}|>" for i in range(used, vocab_size)]
        added = [AddedToken(name, special=True, normalized=False) for name in [*spare, *missing]]
        tokenizer.fast.add_tokens(added, special_tokens=True)
    ids = [tokenizer.token_id(name) for name in names]
    first = max(used, vocab_size)
    expected = iter(range(first, first + len(missing)))
    wrong = [name for name, i in zip(names, ids, strict=True) if i is None or (name in missing and i != next(expected))]
    if wrong:
        raise DataError(
            f"The tokenizer {tokenizer.name!r} cannot take the new tokens {', '.join(wrong)} behind its {used} ids: "
            "they do not follow one another without a gap. Add these tokens to it before training."
        )
    return tuple(i for i in ids if i is not None)


def pad_as_trained(tokenizer: Tokenizer) -> None:
    """Lets a tokenizer without a padding token pad batches: with the end of text as training does, on the left."""
    if tokenizer.fast.pad_token is None or tokenizer.token_id(tokenizer.fast.pad_token) != tokenizer.pad_id:
        tokenizer.fast.pad_token, tokenizer.fast.padding_side = tokenizer.fast.eos_token, "left"

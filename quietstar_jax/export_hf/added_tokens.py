"""Adds the start and end tokens of thoughts to the tokenizer of an export."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken

from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.errors import DataError


def add_tokens(tokenizer: Tokenizer, vocab_size: int, names: Sequence[str]) -> tuple[int, ...]:
    """Adds the tokens that the tokenizer lacks, after all existing ids, and returns the ids of all `names`.

    If the embedding has more rows than the tokenizer has tokens (padded vocabularies), the spare rows are first named
    `<|unused_ID|>`, so that no row of the model changes its meaning. Modifies the tokenizer.

    Args:
      vocab_size: V, the number of rows of the model's embedding.
      names: distinct tokens.

    Raises:
      DataError: the new ids would not be consecutive.
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
            f"The tokenizer {tokenizer.name!r} cannot be given the new tokens {', '.join(wrong)} after its {used} ids: "
            "the ids have a gap. Add these tokens to it before training."
        )
    return tuple(i for i in ids if i is not None)


def pad_as_trained(tokenizer: Tokenizer) -> None:
    """Makes the tokenizer pad as in training if it has no usable padding token: with the end of text, on the left."""
    if tokenizer.fast.pad_token is None or tokenizer.token_id(tokenizer.fast.pad_token) != tokenizer.pad_id:
        tokenizer.fast.pad_token, tokenizer.fast.padding_side = tokenizer.fast.eos_token, "left"

"""The base pass over the text, run once for sampling, scoring and the loss without thoughts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.models.decoder import Decoder, KeyValues, LayerWeights, base_pass
from quietstar_jax.models.linear import cross_entropy
from quietstar_jax.parallel.axes import constrain, merge_microbatches, num_shards, split_microbatches

LOGITS_BYTES = 64 * 2**20  # limit for float32 logits of the text in memory, per device


class Text(NamedTuple):
    """Results of one base pass over B sequences of L tokens.

    Attributes:
      tokens: [B, L] int32; mask: [B, L] bool, True where real.
      hidden: [B, L, D] final-norm hidden states.
      prefix: keys and values [layers, B, L, G, H].
      nll: [B, L] float32, cross-entropy of x[j+1] given x[0..j]; 0 where x[j+1] is not real text, or starts another
        document.
      entropy: [B, L] float32 nats of the prediction of x[j+1], without gradient; None unless requested.
      start_log_prob: [B, L] float32, log-probability of the token that would start a thought in the text, without
        gradient; None unless requested.
      layers: the weights of the decoder's layers, as from `run_layers`.
      starts: [B, L] int32, for each token the first token of its document; None where each row is one document.
    """

    tokens: jax.Array
    mask: jax.Array
    hidden: jax.Array
    prefix: KeyValues
    nll: jax.Array
    entropy: jax.Array | None = None
    start_log_prob: jax.Array | None = None
    layers: LayerWeights | None = None
    starts: jax.Array | None = None


def read_text(
    decoder: Decoder, tokens: jax.Array, mask: jax.Array, starts: jax.Array | None = None, *, dtype: jnp.dtype,
    rematerialize: bool = False, with_entropy: bool = False, start_token: int | None = None,
) -> Text:  # fmt: skip
    """Runs the base pass and scores every next token without thoughts; arguments as in `Text` and `ModelConfig`.

    `with_entropy` and `start_token` request the fields `entropy` and `start_log_prob`.

    If all logits need more than `LOGITS_BYTES`, rows are scored in groups that fit, and recomputed in the backward
    pass.
    """
    tokens, mask, starts = jax.tree.map(lambda x: constrain(x, "batch", "keys"), (tokens, mask, starts))
    hidden, prefix, layers = base_pass(decoder, tokens, mask, starts, dtype=dtype, rematerialize=rematerialize)
    batch, length = tokens.shape
    targets = gather_next_tokens(tokens, jnp.arange(length), 1, fill=0)[..., 0]

    def predict(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        logits = decoder.logits(hidden)
        fixed = jax.lax.stop_gradient(logits)
        spread = entropy(fixed) if with_entropy else None
        return cross_entropy(logits, targets), spread, log_prob_of(fixed, start_token)

    row_bytes = 4 * length * decoder.architecture.vocab_size // (num_shards("text") * num_shards("vocab"))
    rows, local_batch = max(1, LOGITS_BYTES // row_bytes), batch // num_shards("batch")
    if rows >= local_batch:
        nll, spread, begins = predict(hidden, targets)
    else:
        score = jax.checkpoint(predict)
        by_row = jax.tree.map(lambda x: split_microbatches(x, local_batch), (hidden, targets))
        scored = jax.lax.map(lambda row: score(*row), by_row, batch_size=rows)
        nll, spread, begins = jax.tree.map(merge_microbatches, scored)
    nll = jnp.where(real_ahead(mask, jnp.arange(length), 1, starts)[..., 0], nll, 0.0)
    nll, spread, begins = jax.tree.map(lambda x: constrain(x, "batch", "keys"), (nll, spread, begins))
    hidden = constrain(hidden, "batch", "keys", "hidden")
    return Text(tokens, mask, hidden, prefix, nll, spread, begins, layers, starts)


def entropy(logits: jax.Array) -> jax.Array:
    """Returns the entropy, nats [...], of the distributions with logits [..., V]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    mass = jnp.exp(shifted)  # the same expression as in `sample.draw_tokens`, so XLA computes it once
    total = mass.sum(axis=-1)
    return jnp.log(total) - (mass * shifted).sum(axis=-1) / total


def log_prob_of(logits: jax.Array, token: int | None) -> jax.Array | None:
    """Returns the log-probability of a token, nats [...], from logits [..., V]; None if `token` is None."""
    return None if token is None else logits[..., token] - jax.nn.logsumexp(logits, axis=-1)


def gather_next_tokens(tokens: jax.Array, positions: jax.Array, count: int, *, fill: int) -> jax.Array:
    """x[j+1+k] for k < count: tokens [B, L], positions [J] or [B, J] -> [B, J, count]; `fill` past the text's end."""
    return _at(tokens, positions[..., None] + 1 + jnp.arange(count), fill)


def real_ahead(mask: jax.Array, positions: jax.Array, count: int, starts: jax.Array | None = None) -> jax.Array:
    """Returns whether x[j+1+k] exists, is not padding, and is in the same document as x[j].

    Args:
      mask: [B, L]; positions: [J] or [B, J]; starts: [B, L] as in `Text`.

    Returns:
      [B, J, count] bool.
    """
    ahead = positions[..., None] + 1 + jnp.arange(count)
    real = _at(mask, ahead, False)
    return real if starts is None else real & (_at(starts, ahead, 0) <= positions[..., None])


def here_and_ahead(values: jax.Array, positions: jax.Array, count: int) -> jax.Array:
    """values[j+k] for k < count: [B, L, ...], positions [J] or [B, J] -> [B, J, count, ...]; 0 past the text's end."""
    return _at(values, positions[..., None] + jnp.arange(count), 0)


def _at(values: jax.Array, index: jax.Array, fill: int) -> jax.Array:
    """values [B, L, ...] at index [J, K], the same for every sequence, or [B, J, K]; `fill` past the end."""
    if index.ndim == 2:
        return values.at[:, index].get(mode="fill", fill_value=fill)
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=fill))(values, index)

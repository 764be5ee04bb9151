"""Thoughts that the model ends itself: before each token it decides whether to end.

A decision and the token after it are one action. At step i = 0 .. T - 1, with the hidden state h_i that predicts the
next token (at `start` for i = 0) and the logits of that token,

    s_i,    P(end) = sigmoid(s_i),    P(token) = sigmoid(-s_i) softmax(logits_i)

`thought.end` says what computes s_i:

- `sampled`: a head, whose weights u and b are new. This is a softmax over V + 1 actions, in which the logit of the end
  is s_i + logsumexp(logits_i). The initial probability of the end is therefore the same for any vocabulary, soft cap or
  scale of logits, and the LM head needs no further row.
- `token`: the LM head. The end is the token of `thought.initial_end_token`, s_i its logit minus the logsumexp of the
  others: a pretrained model that writes such marks ends its thoughts where it would write the mark. No thought contains
  this token. At temperature 1, this is exactly the distribution of the next token.

A temperature divides s_i and the logits. A thought of T tokens ends without a decision. Actions for T = 4:

    thought       a         b         ENDED     ENDED      n = 2 tokens
    action        a         b         end       -
    log-prob      log P(a)  log P(b)  log P(end)  0

Its chain is that of a thought of n tokens: `start, a, b, end, x[j+1] ..`, without gaps. Chains are causal and the
unused slots are the last ones, so no token attends to them.

Axis letters: B batch, R thoughts, J positions, T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from quietstar_jax.models.parameters import parameter, zeros
from quietstar_jax.thoughts.diagnostics import QUANTILES
from quietstar_jax.thoughts.settings import ThoughtSettings

ENDED = -2  # fills a thought after its end; -1 means that there is no thought
FIRST_PROBABILITY = 0.1  # of the end at every step, before training
BIAS = -math.log(1 / FIRST_PROBABILITY - 1)


class EndHead(nnx.Module):
    """The weights u [D] and b [1], float32; P(end) is `FIRST_PROBABILITY` at first."""

    def __init__(self, hidden_size: int, rngs: nnx.Rngs):
        self.weight = parameter(rngs, (hidden_size,), ("embed",), zeros)
        self.bias = parameter(rngs, (1,), (None,), lambda key, shape: jnp.full(shape, BIAS, jnp.float32))


def end_logits(
    head: EndHead | None, hidden: jax.Array, logits: jax.Array, allowed: jax.Array, end_token: int | None
) -> jax.Array:
    """Returns s, the log-odds of the end, float32 [...].

    Args:
      hidden: [..., D]; logits: [..., V] of the next token at temperature 1; allowed: the same, with the lowest number
        for tokens that no thought contains; end_token: the token that ends a thought, None = the head decides.
    """
    if end_token is not None:
        return logits[..., end_token] - jax.nn.logsumexp(allowed, axis=-1)
    assert head is not None, "ends are sampled, but the model has no end head: ThoughtConfig.heads lists it"
    return hidden.astype(jnp.float32) @ head.weight[...] + head.bias[...]


def draw_end(logits: jax.Array, uniforms: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Decides whether thoughts end, and returns the numbers that then draw the tokens of the others.

    One number draws both: below P(end) it is the end; above, it is uniform again after rescaling.

    Args:
      logits: s [...], divided by the temperature; uniforms: [...] in [0, 1); None = greedy, the end if s > 0.

    Returns:
      (bool [...], uniform numbers [...] in [0, 1)).
    """
    if uniforms is None:
        return logits > 0, None
    ends = uniforms < jax.nn.sigmoid(logits)
    rest = (uniforms - jax.nn.sigmoid(logits)) / jnp.maximum(jax.nn.sigmoid(-logits), 1e-30)
    return ends, jnp.clip(rest, 0.0, 1.0 - 2.0**-24)


def thought_lengths(tokens: jax.Array) -> jax.Array:
    """Returns n, the number of tokens of each thought, int32 [...]; tokens: [..., T], `ENDED` after the end."""
    return (tokens >= 0).sum(axis=-1, dtype=jnp.int32)


def thought_ids(tokens: Sequence[int]) -> tuple[int, ...]:
    """Returns the ids of one thought [T], without the padding after its end."""
    return tuple(int(token) for token in tokens if token >= 0)


def actions(tokens: jax.Array, settings: ThoughtSettings) -> jax.Array | None:
    """Returns which of the T steps of each thought have an action, bool [..., T]: its n tokens and its sampled end.

    Returns:
      None if all have one, because all thoughts have T tokens.
    """
    if not settings.samples_end:
        return None
    return jnp.arange(tokens.shape[-1]) <= thought_lengths(tokens)[..., None]


def mean_over_actions(values: jax.Array, acts: jax.Array | None) -> jax.Array:
    """Returns the means of values [..., T] over the actions of each thought, [...], 0 if T = 0; acts: see `actions`."""
    if acts is None:
        return values.sum(axis=-1) / max(1, values.shape[-1])
    return jnp.where(acts, values, 0.0).sum(axis=-1) / jnp.maximum(acts.sum(axis=-1, dtype=jnp.float32), 1)


def action_log_probs(token_log_probs: jax.Array, logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the log-probability of each action, [..., T]; 0 where there is none.

    Args:
      token_log_probs: [..., T] of the tokens if the thought does not end, any value after its end; logits: s [..., T].
    """
    step, length = jnp.arange(tokens.shape[-1]), thought_lengths(tokens)[..., None]
    ended = jnp.where(step == length, jax.nn.log_sigmoid(logits), 0.0)
    return jnp.where(step < length, token_log_probs + jax.nn.log_sigmoid(-logits), ended)


def action_entropy(token_entropy: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns the entropy of the distributions of actions, nats [...]: of the decision, then of the token.

    Args:
      token_entropy: [...] of the tokens if the thought does not end; logits: s [...].
    """
    continues = jax.nn.sigmoid(-logits)
    decision = -continues * jax.nn.log_sigmoid(-logits) - jax.nn.sigmoid(logits) * jax.nn.log_sigmoid(logits)
    return decision + continues * token_entropy


def chain_ids(tokens: jax.Array, forced: jax.Array) -> jax.Array:
    """Returns the ids in the slots of chains: tokens after slot 0, `start`; forced ones after slot n + 1, `end`.

    Args:
      tokens: [B, R, J, T]; forced: [B, R, J, K - 1], the true tokens.

    Returns:
      [B, R, J, C] int32, C = T + 1 + K; any id in the slots of start and end, and in those after the last true token.
    """
    length, slots = tokens.shape[-1], jnp.arange(tokens.shape[-1] + forced.shape[-1] + 2)
    n = thought_lengths(tokens)[..., None]
    ids = jnp.concatenate([tokens, forced], axis=-1)
    source = jnp.where(slots <= n, slots - 1, length + slots - n - 2)
    return jnp.maximum(jnp.take_along_axis(ids, jnp.clip(source, 0, ids.shape[-1] - 1), axis=-1), 0)


def length_metrics(tokens: jax.Array, counted: jax.Array) -> dict[str, jax.Array]:
    """Returns the histogram of lengths over the counted positions, `length_histogram`, float32 [T + 1].

    Args:
      tokens: [B, R, J, T]; counted: [B, J] bool.
    """
    lengths = thought_lengths(tokens)
    weights = jnp.broadcast_to(counted[:, None], lengths.shape).astype(jnp.float32)
    return {"length_histogram": jnp.zeros(tokens.shape[-1] + 1, jnp.float32).at[lengths].add(weights)}


def length_figures(histogram: jax.Array) -> dict[str, jax.Array]:
    """Returns mean, quantiles and the share of empty thoughts from a histogram [T + 1] of lengths; 0 if it is empty."""
    cumulative, total = jnp.cumsum(histogram), jnp.maximum(histogram.sum(), 1)
    quantiles = {
        f"thought_length_p{round(100 * q):02}": jnp.argmax(cumulative >= q * cumulative[-1]).astype(jnp.float32)
        for q in QUANTILES
    }
    mean = (histogram * jnp.arange(histogram.size, dtype=jnp.float32)).sum() / total
    return {"thought_length": mean, "empty_thought_rate": histogram[0] / total, **quantiles}

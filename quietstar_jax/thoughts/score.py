"""Talk: scores given thoughts in one parallel pass over their chains.

The chain of position j with T = 3 thought tokens and K = 2 tokens ahead has C = T + 1 + K tokens:

    chain token c         0      1      2      3      4       5
    input                 start  t_1    t_2    t_3    end     x[j+1]
    predicts              t_1    t_2    t_3    -      x[j+1]  x[j+2]
    thought_hidden        ■      ■      ■                             c < T
    talk_hidden                                       ■       ■       c > T
    base_hidden, at                                   x[j]    x[j+1]  text.hidden[j+k], k = 0 .. K - 1

The output at t_T is not used: a thought has T tokens at most, and `end` follows. Where the model samples the end (see
`ending`), the outputs at start, t_1 .. t_n also give its log-probability, and a chain of n < T tokens has its `end` and
true tokens in the slots n + 1 .. n + K; the slots after them are not used.

Axis letters: B batch, R thoughts per position, J positions, K tokens ahead, T thought tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.models.decoder import LayerWeights
from quietstar_jax.models.linear import cross_entropy, pick
from quietstar_jax.thoughts.chains import chain_pass
from quietstar_jax.thoughts.chunks import TOKEN_BLOCK
from quietstar_jax.thoughts.ending import action_entropy, action_log_probs, chain_ids, end_logits, thought_lengths
from quietstar_jax.thoughts.mixing import mixing_weight
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.sample import mask_meta_tokens
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text, entropy, gather_next_tokens, here_and_ahead, real_ahead


class Scores(NamedTuple):
    """Scores of the thoughts at J positions.

    Attributes:
      nll: [B, R, J, K] cross-entropy of x[j+1+k] with the thought; 0 where `real_ahead` is False; exactly the
        cross-entropy without the thought where the mixing weight is exactly 0.
      log_probs: [B, R, J, T] log-probability of each thought token at the score temperature; with sampled ends, of each
        action, see `ending.action_log_probs`.
      weight: [B, R, J, K] mixing weight.
      log_scores: [B, R, J, K, V] scores of every token at x[j+1+k], as from `mix`.
      layers: the weights of the decoder's layers, as from `run_layers`.
      talk_hidden: [B, R, J, K, D], from `chain_hidden_states`.
      entropy: [B, R, J, T] nats of the distributions that predict the thought tokens, at temperature 1; None unless
        requested.
    """

    nll: jax.Array
    log_probs: jax.Array
    weight: jax.Array
    log_scores: jax.Array
    layers: LayerWeights
    talk_hidden: jax.Array
    entropy: jax.Array | None = None


def score_thoughts(
    model: QuietStar, text: Text, positions: jax.Array, thoughts: jax.Array, settings: ThoughtSettings,
    base_nll: jax.Array | None = None, *, with_entropy: bool = False, hide_text: bool = False,
) -> Scores:  # fmt: skip
    """Scores thoughts [B, R, J, T] at positions [J] or [B, J] of the text. All results are float32.

    Args:
      base_nll: [B, J, K] cross-entropy of x[j+1+k] without thoughts; None = that of the text.
      hide_text: see `chain_hidden_states`. The prediction without the thought, with which the talk head mixes, still
        depends on the text.
    """
    chains = chain_hidden_states(model, text, positions, thoughts, settings, hide_text=hide_text)
    thought_hidden, talk_hidden, layers = chains
    log_probs, spread = score_actions(model, thought_hidden, thoughts, settings, with_entropy=with_entropy)

    # nll: log_scores [B, R, J, K, V] at the targets x[j+1+k], [B, J, K] in the text, the same for all R thoughts.
    ahead = settings.tokens_ahead
    base_hidden = here_and_ahead(text.hidden, positions, ahead)
    log_scores, weight = mix(model, base_hidden, talk_hidden, settings.config.mixing)
    targets = jnp.broadcast_to(gather_next_tokens(text.tokens, positions, ahead, fill=0)[:, None], weight.shape)
    if MIXINGS[settings.config.mixing].traits["log_probs"]:
        nll = -pick(log_scores, targets)
    else:
        nll = cross_entropy(log_scores, targets)
    # With weight 0 the prediction is that of the text, so a different cross-entropy is a rounding error, which
    # REINFORCE would multiply by policy_weight (1e6 by default). Inside stop_gradient only the value is replaced: the
    # mixing head, whose last layer starts at 0, still learns from the gradient of the computed nll.
    if base_nll is None:
        base_nll = here_and_ahead(text.nll, positions, ahead)
    nll += jax.lax.stop_gradient(jnp.where(weight == 0, base_nll[:, None] - nll, 0.0))
    real = real_ahead(text.mask, positions, ahead, text.starts)[:, None]
    return Scores(jnp.where(real, nll, 0.0), log_probs, weight, log_scores, layers, talk_hidden, spread)


def score_actions(
    model: QuietStar, hidden: jax.Array, thoughts: jax.Array, settings: ThoughtSettings, *, with_entropy: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Returns log-probabilities of thought tokens at the score temperature, and entropies at temperature 1 or None.

    Thoughts of more than `TOKEN_BLOCK` tokens are scored block by block, so that the logits of only one block exist;
    the backward pass computes them again.

    Args:
      hidden: [B, R, J, T, D] at the tokens before; thoughts: [B, R, J, T].

    Returns:
      [B, R, J, T] float32 each.
    """
    temperature = settings.config.score_temperature

    def score(hidden: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        # The logits [B, R, J, T, V] have the same mask as in sampling, but the temperature of scoring.
        unmasked = model.decoder.logits(hidden)
        logits = mask_meta_tokens(unmasked, settings.meta_tokens)
        log_probs = -cross_entropy(logits / temperature, tokens)
        end = None
        if settings.samples_end:
            end = end_logits(model.end_head, hidden, unmasked, logits, settings.end_token)
        return log_probs, entropy(logits) if with_entropy else None, end

    tokens, length = jnp.maximum(thoughts, 0), thoughts.shape[3]
    scored = score(hidden, tokens) if length <= TOKEN_BLOCK else _in_blocks(score, hidden, tokens)
    log_probs, spread, end = scored
    if end is not None:
        log_probs = action_log_probs(log_probs, end / temperature, thoughts)
        spread = None if spread is None else action_entropy(spread, end)
    return log_probs, spread


def _in_blocks(score: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Returns `score(*arrays)`, [B, R, J, T], from arrays [B, R, J, T, ...], one block of tokens at a time."""
    length = arrays[0].shape[3]
    count = -(-length // TOKEN_BLOCK)
    width = -(-length // count)

    def blocks(x: jax.Array) -> jax.Array:  # [B, R, J, T, ...] -> [count, B, R, J, width, ...], filled up with zeros
        x = jnp.pad(x, [(0, count * width - length if axis == 3 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:3], count, width, *x.shape[4:]), 3, 0)

    scored = jax.lax.map(lambda block: jax.checkpoint(score)(*block), tuple(map(blocks, arrays)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1)[..., :length], scored)


def mix(model: QuietStar, base_hidden: jax.Array, talk_hidden: jax.Array, mixing: str) -> tuple[jax.Array, jax.Array]:
    """Mixes the predictions without and with thoughts.

    Args:
      base_hidden: [B, J, K, D] hidden states of the text; talk_hidden: [B, R, J, K, D], from `chain_hidden_states`.
      mixing: an entry of `MIXINGS`.

    Returns:
      ([B, R, J, K, V] float32: logits, or log-probabilities that need not be normalized if the entry has `log_probs`;
       mixing weights [B, R, J, K]).
    """
    entry = MIXINGS[mixing]
    weight = mixing_weight(model.mixing_head, base_hidden, talk_hidden) if entry.traits["head"] else None
    if not entry.traits["linear"]:
        return entry.fn(model.decoder.logits, base_hidden, talk_hidden, weight)
    # A soft cap of the two parts of a sum is not that of the sum.
    scores, weight = entry.fn(model.decoder.head, base_hidden, talk_hidden, weight)
    return model.decoder.cap_logits(scores), weight


def chain_hidden_states(
    model: QuietStar, text: Text, positions: jax.Array, thoughts: jax.Array, settings: ThoughtSettings, *,
    hide_text: bool = False,
) -> tuple[jax.Array, jax.Array, LayerWeights]:  # fmt: skip
    """Runs the chains of given thoughts and returns their hidden states; see the drawing at the top of this file.

    Args:
      positions: [J] or [B, J]; thoughts: [B, R, J, T] ids.
      hide_text: no chain token, those of the thought included, attends to keys of the text. Hiding the text from the
        tokens after the thought only would not suffice: the keys of the thought's tokens would still contain it.

    Returns:
      (hidden states [B, R, J, T, D] at `start, t_1 .. t_{T-1}`, which predict the thought tokens t_1 .. t_T,
       hidden states [B, R, J, K, D] at `end, x[j+1] .. x[j+K-1]`, which predict x[j+1] .. x[j+K],
       layers as from `run_layers`).
    """
    batch, count, chunk, length = thoughts.shape
    dtype = settings.dtype
    start, end = (jnp.broadcast_to(x, (batch, count, chunk, 1, x.size)) for x in model.start_and_end(settings))

    # Teacher forcing: the K - 1 true tokens x[j+1] .. x[j+K-1], [B, J, K - 1] -> [B, R, J, K - 1].
    forced = gather_next_tokens(text.tokens, positions, settings.tokens_ahead - 1, fill=settings.pad_id)
    forced = jnp.broadcast_to(forced[:, None], (batch, count, *forced.shape[1:]))
    if settings.samples_end:
        slots, ends = jnp.arange(settings.chain_length), thought_lengths(thoughts)[..., None] + 1
        embeddings = model.decoder.embed(chain_ids(thoughts, forced), dtype)
        embeddings = jnp.where((slots == 0)[:, None], start, jnp.where((slots == ends)[..., None], end, embeddings))
    else:
        embeddings = jnp.concatenate(  # [B, R, J, C, D], C = 1 + T + 1 + (K - 1)
            [start, model.decoder.embed(thoughts, dtype), end, model.decoder.embed(forced, dtype)], axis=3
        )
    mask = jnp.zeros_like(text.mask) if hide_text else text.mask
    hidden, layers = chain_pass(
        model.decoder, embeddings, positions, text.prefix, mask, text.starts, rematerialize=settings.rematerialize,
        prefix_attention=settings.prefix_attention,
    )  # fmt: skip
    if settings.samples_end:
        talk = jnp.take_along_axis(hidden, (ends + jnp.arange(settings.tokens_ahead))[..., None], axis=3)
    else:
        talk = hidden[..., length + 1 :, :]
    return hidden[..., :length, :], talk, layers

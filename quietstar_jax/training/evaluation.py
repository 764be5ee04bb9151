"""Held-out evaluation: scores every token without thoughts and with greedy thoughts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.config import Config
from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.methods.thinking import ALWAYS, ThinkPolicy
from quietstar_jax.models.parameters import GraphDef, merge
from quietstar_jax.parallel.sharding import row_ways, shard_batch
from quietstar_jax.thoughts.controls import draw_uniforms
from quietstar_jax.thoughts.score_predictions import Thinking
from quietstar_jax.thoughts.score_tokens import score_tokens
from quietstar_jax.thoughts.settings import ThoughtSettings, Vocabulary, thought_settings
from quietstar_jax.thoughts.token_scores import TokenScores
from quietstar_jax.training.batch import Batch, to_device

Scorer = Callable[..., TokenScores]  # see `make_token_scorer`
AMONG = "among"  # name of the positions that may think, in the batches of `score_batches`


def evaluation_settings(config: Config, vocabulary: Vocabulary) -> ThoughtSettings:
    """Returns the settings of evaluation, with one thought per position."""
    length, chosen = config.evaluation_thought_length, config.evaluation
    shape = dict(thought_length=length, tokens_ahead=chosen.scored_ahead, reach=chosen.reach)
    return thought_settings(config, vocabulary, **shape)


def without_thoughts(settings: ThoughtSettings) -> ThoughtSettings | None:
    """Returns settings that give the same predictions without thoughts while the mixing head has its initial weights.

    None if predictions would differ, because a head whose last layer is zero has a mixing weight other than 0.
    """
    entry, zeros = MIXINGS[settings.config.mixing], jnp.zeros((1, 1, 1, 1, 1))
    if not entry.traits["head"] or entry.fn(lambda hidden: hidden, zeros[0], zeros, zeros[..., 0])[1].any():
        return None
    return dataclasses.replace(settings, thought_length=0)


def make_token_scorer(graphdef: GraphDef, settings: ThoughtSettings, think: ThinkPolicy = ALWAYS) -> Scorer:
    """Returns a compiled `(params, batch, key = None, rank_key = None, among = None) -> TokenScores` of all positions.

    There is one thought at each position that the policy chooses among `among` [B, L] (None = all): greedy, or sampled
    with `key`. With `rank_key`, which draws the random ranking, the scores have `rankings`; all positions must think.
    """

    def score(
        params: Mapping[str, jax.Array], batch: Batch, key: jax.Array | None = None,
        rank_key: jax.Array | None = None, among: jax.Array | None = None,
    ) -> TokenScores:  # fmt: skip
        rows, length = batch.tokens.shape
        draws = jax.random.key(0) if key is None else key
        uniforms = draw_uniforms(draws, (rows, 1, length, settings.thought_length))
        thinking = None
        if rank_key is not None or think.constant is None or among is not None:
            ranks = jax.random.key(1) if rank_key is None else rank_key
            thinking = Thinking.of_rows(think, (rows, length), ranks, among)
        return score_tokens(
            merge(graphdef, params), *batch, jnp.arange(length), uniforms, settings, greedy=int(key is None),
            thinking=thinking,
        )  # fmt: skip

    return jax.jit(score)


def score_batches(
    scorer: Scorer, params: Any, batches: Iterable[Mapping[str, np.ndarray]], key: jax.Array | None = None,
    between: Callable[[], None] = lambda: None, *, rank_key: jax.Array | None = None,
) -> TokenScores:  # fmt: skip
    """Returns the scores of all batches with the first thought, as numpy arrays [B, L] on every process.

    Args:
      batches: the fields of `Batch`, and under `AMONG`, optionally, the positions that may think.
      key, rank_key: as of `make_token_scorer`; every batch folds its number into them.
      between: called before each batch.
    """
    ways, parts = row_ways(jax.sharding.get_mesh()), []
    for i, batch in enumerate(batches):
        between()
        keys = [None if one is None else jax.random.fold_in(one, i) for one in (key, rank_key)]
        rows = len(batch["tokens"])
        missing = -rows % ways  # pad with empty rows, so that the batch divides evenly over the devices
        full = {name: np.pad(value, ((0, missing), (0, 0))) for name, value in batch.items()}
        among = shard_batch(full.pop(AMONG)) if AMONG in full else None
        scores = jax.device_get(scorer(params, to_device(full), *keys, among)).first_thought()
        parts.append(jax.tree.map(lambda x, rows=rows: x[:rows], scores))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)

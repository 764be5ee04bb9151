"""Held-out evaluation: scores every token without thoughts and with greedy thoughts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.architecture import Architecture
from quietstar_jax.config import Config
from quietstar_jax.models.parameters import GraphDef, merge
from quietstar_jax.parallel.axes import constrain
from quietstar_jax.parallel.sharding import row_ways
from quietstar_jax.thoughts.chunks import map_chunks, max_positions_per_chunk, max_sampled_positions_per_chunk
from quietstar_jax.thoughts.controls import draw_uniforms, sample_or_control
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings, Vocabulary
from quietstar_jax.thoughts.text import Text, entropy, gather_next_tokens, here_and_ahead, read_text, real_ahead
from quietstar_jax.training.step import Batch, thought_settings, to_device

DECILES = 10
Scorer = Callable[..., "TokenScores"]  # (params, batch, key = None); see `make_token_scorer`


class TokenScores(NamedTuple):
    """Scores of the next token x[j+1] at every position j; all are [B, L] except the thoughts.

    Attributes:
      real: x[j+1] exists, is not padding, and belongs to the same document as x[j].
      base_nll, talk_nll: cross-entropy in nats without and with the thought.
      base_correct, talk_correct: whether the argmax is the true token.
      base_entropy: entropy in nats of the prediction without the thought; independent of the true token.
      reward: increase, in nats, of the log-likelihood of the next K tokens due to the thought.
      weight: mixing weight of the first token.
      entropy: mean entropy in nats per thought token.
      thoughts: [B, L, T] thought tokens.
    """

    real: Any
    base_nll: Any
    base_entropy: Any
    talk_nll: Any
    base_correct: Any
    talk_correct: Any
    reward: Any
    weight: Any
    entropy: Any
    thoughts: Any


def evaluation_settings(config: Config, vocabulary: Vocabulary) -> ThoughtSettings:
    """Returns settings with one thought at every position.

    Evaluation has no backward pass, so a chunk needs memory for one layer only, as with rematerialisation.
    """
    length, ahead = config.evaluation_thought_length, config.evaluation.tokens_ahead
    everywhere = dataclasses.replace(config.thought, positions="all", position_fraction=1.0)
    config = dataclasses.replace(config, thought=everywhere)
    return thought_settings(config, vocabulary, thought_length=length, tokens_ahead=ahead, rematerialize=True)


def make_token_scorer(graphdef: GraphDef, architecture: Architecture, settings: ThoughtSettings) -> Scorer:
    """Returns a compiled `(params, batch, key = None) -> TokenScores`; thoughts are greedy, or sampled with a key.

    With thought length 0, the talk fields equal the base fields.
    """

    def score(params: Mapping[str, jax.Array], batch: Batch, key: jax.Array | None = None) -> TokenScores:
        model = merge(graphdef, params)
        text = read_text(model.decoder, *batch, dtype=settings.dtype)
        rows, length = batch.tokens.shape
        chunk = max_positions_per_chunk(architecture, settings, rows, length)
        sampled = max_sampled_positions_per_chunk(architecture, settings, rows, length)
        ahead = settings.tokens_ahead
        draws = jax.random.key(0) if key is None else key  # greedy thoughts use no randomness, but some controls do
        uniforms = draw_uniforms(draws, (rows, 1, length, settings.thought_length))
        everywhere = jnp.arange(length)
        thoughts = None
        if settings.thought_length:
            thoughts = sample_or_control(model, text, everywhere, uniforms, settings, sampled, greedy=key is None)

        def of_chunk(model: QuietStar, text: Text, positions: jax.Array, thoughts: Any) -> TokenScores:
            scored = real_ahead(text.mask, positions, ahead, text.starts)
            real, base_nll = scored[..., 0], jnp.where(scored, here_and_ahead(text.nll, positions, ahead), 0.0)
            logits = model.decoder.logits(here_and_ahead(text.hidden, positions, 1)[..., 0, :])
            uncertainty = entropy(logits)
            correct = (logits.argmax(axis=-1) == gather_next_tokens(text.tokens, positions, 1, fill=0)[..., 0]) & real
            zero = jnp.zeros_like(base_nll[..., 0])
            if thoughts is None:
                nothing = jnp.zeros((*zero.shape, 0), jnp.int32)
                first = base_nll[..., 0]
                return TokenScores(real, first, uncertainty, first, correct, correct, zero, zero, zero, nothing)
            scores = score_thoughts(model, text, positions, thoughts.tokens, settings)
            return TokenScores(
                real=real,
                base_nll=base_nll[..., 0],
                base_entropy=uncertainty,
                talk_nll=scores.nll[:, 0, :, 0],
                base_correct=correct,
                talk_correct=scores.correct[:, 0, :, 0],
                reward=(base_nll - scores.nll[:, 0]).sum(axis=-1),
                weight=scores.weight[:, 0, :, 0],
                entropy=thoughts.entropy[:, 0].mean(axis=-1),
                thoughts=thoughts.tokens[:, 0],
            )

        def with_thought_axis(read: tuple[QuietStar, Text], positions: jax.Array, thoughts: Any) -> TokenScores:
            scores = of_chunk(*read, positions, thoughts)
            return jax.tree.map(lambda x: x[:, None], scores)  # map_chunks joins along axis 2

        joined = map_chunks(with_thought_axis, (model, text), everywhere, chunk, thoughts, axis=2)
        return jax.tree.map(lambda x: constrain(x[:, 0], *(None,) * (x.ndim - 1)), joined)  # replicated on every device

    return jax.jit(score)


def score_batches(
    scorer: Scorer, params: Any, batches: Iterable[Mapping[str, np.ndarray]], key: jax.Array | None = None,
    between: Callable[[], None] = lambda: None,
) -> TokenScores:  # fmt: skip
    """Returns the scores of all batches, concatenated along the batch axis, as numpy arrays on every process.

    Args:
      between: called before each batch.
    """
    ways, parts = row_ways(jax.sharding.get_mesh()), []
    for i, batch in enumerate(batches):
        between()
        own_key = None if key is None else jax.random.fold_in(key, i)
        rows = len(batch["tokens"])
        missing = -rows % ways  # pad with empty rows, so that the batch divides evenly over the devices
        full = {name: np.pad(value, ((0, missing), (0, 0))) for name, value in batch.items()}
        scores = jax.device_get(scorer(params, to_device(full), own_key))
        parts.append(jax.tree.map(lambda x, rows=rows: x[:rows], scores))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def summarize(scores: TokenScores) -> dict[str, Any]:
    """Returns means over all real tokens: losses in nats per token, rewards in nats, and rates.

    `deciles` has one row per tenth of the tokens, from the lowest to the highest entropy of the prediction without
    thoughts. Sorting by the loss without thoughts instead would select tokens by the quantity that is compared: any
    change that only makes predictions less certain, such as a higher temperature, would seem to help the hard tokens.
    """
    real = scores.real
    base, talk = scores.base_nll[real], scores.talk_nll[real]
    if not base.size:
        return {"tokens": 0}
    thoughts = scores.thoughts[real]
    uncertainty = scores.base_entropy[real]
    order = np.argsort(uncertainty, kind="stable")
    rows = [
        {
            "entropy_without_thoughts": float(uncertainty[part].mean()),
            "loss_without_thoughts": float(base[part].mean()),
            "loss_with_thoughts": float(talk[part].mean()),
            "mixing_weight": float(scores.weight[real][part].mean()),
        }
        for part in np.array_split(order, DECILES)
        if part.size
    ]
    return {
        "tokens": int(base.size),
        "loss_without_thoughts": float(base.mean(dtype=np.float64)),
        "loss_with_thoughts": float(talk.mean(dtype=np.float64)),
        "accuracy_without_thoughts": float(scores.base_correct[real].mean()),
        "accuracy_with_thoughts": float(scores.talk_correct[real].mean()),
        "mixing_weight": float(scores.weight[real].mean()),
        "reward": float(scores.reward[real].mean()),
        "thought_entropy": float(scores.entropy[real].mean()),
        "unique_thought_rate": len(np.unique(thoughts, axis=0)) / len(thoughts) if thoughts.shape[1] else 0.0,
        "deciles": rows,
    }

"""Samples several thoughts at every position of given texts, and scores each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.data.documents import Documents
from quietstar_jax.data.tokenization import without_begin
from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.inference.load_model import LoadedModel
from quietstar_jax.models.parameters import merge
from quietstar_jax.thoughts.chunks import map_chunks, max_positions_per_chunk
from quietstar_jax.thoughts.controls import draw_uniforms, sample_or_control
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.score import score_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text, entropy, here_and_ahead, read_text
from quietstar_jax.training.step import Batch, to_device

LIKELIEST = 5  # number of next tokens that are kept
ROWS = 8  # windows per batch


@dataclasses.dataclass(frozen=True)
class Window:
    """A span of a document, which the model reads without the text before it."""

    document: int
    tokens: np.ndarray  # int32 [tokens], at least two


class Observation(NamedTuple):
    """One window of n tokens. Entry j of an axis n-1 describes token j + 1, before which the model thought.

    There are R thoughts of T tokens, the first greedy, the others sampled.

    Attributes:
      base_nll, base_entropy: [n-1] loss and entropy of the prediction without thoughts.
      nll: [n-1, R] loss of the same token with each thought.
      reward: [n-1, R] nats by which the thought made the next K tokens more likely.
      weight: [n-1, R] mixing weight; thoughts: [n-1, R, T] ids.
      base_ids, base_probabilities, ids, probabilities: [n-1, LIKELIEST] the likeliest next tokens without a thought,
        and with the greedy one.
    """

    base_nll: Any
    base_entropy: Any
    nll: Any
    reward: Any
    weight: Any
    thoughts: Any
    base_ids: Any
    base_probabilities: Any
    ids: Any
    probabilities: Any


def cut_windows(model: LoadedModel, source: Documents, *, documents: int, max_tokens: int, length: int) -> list[Window]:
    """Cuts the first documents into windows of at most `length` tokens, up to `max_tokens` in all.

    Every document begins and ends as in training.

    Raises:
      DataError: there is no token to predict.
    """
    found, left = [], max_tokens
    for number in range(min(documents, len(source))):
        text = without_begin(source[number], model.bos)
        ids = np.asarray([*model.bos, *text, model.tokenizer.eos_id], np.int32)
        for start in range(0, min(len(ids), left), length):
            tokens = ids[start : min(start + length, left)]
            if len(tokens) >= 2:  # a single token has nothing before it
                found.append(Window(number, tokens))
        left -= len(ids)
    if not found:
        raise DataError("The documents have no two tokens in a row, so there is nothing to predict. Give other text.")
    return found


def longest_window(model: LoadedModel, settings: ThoughtSettings, wanted: int) -> int:
    """Returns the tokens of a window: `wanted`, or fewer if the model has too few positions for them and a thought.

    Raises:
      ConfigError: the thoughts leave no positions for text.
    """
    room = model.architecture.max_positions - settings.thought_length - settings.tokens_ahead - 1
    if room < 2:
        raise ConfigError(
            f"Thoughts of {settings.thought_length} tokens leave no room for text: the model has "
            f"{model.architecture.max_positions} positions. Decrease `thought_length`."
        )
    return min(wanted, room)


def observe(
    model: LoadedModel, settings: ThoughtSettings, windows: Sequence[Window], *, samples: int, seed: int
) -> list[Observation]:
    """Thinks at every position of every window: once greedily, and `samples` times at random."""
    everywhere = dataclasses.replace(settings.config, positions="all", position_fraction=1.0)
    settings = dataclasses.replace(settings, config=everywhere)
    length = -(-max(len(window.tokens) for window in windows) // 8) * 8
    look = jax.jit(lambda params, batch, key: _look(model, params, batch, key, settings, samples))
    found = []
    for start in range(0, len(windows), ROWS):
        part = windows[start : start + ROWS]
        rows = {"tokens": np.full((ROWS, length), settings.pad_id, np.int32), "mask": np.zeros((ROWS, length), bool)}
        for row, window in enumerate(part):
            rows["tokens"][row, : len(window.tokens)] = window.tokens
            rows["mask"][row, : len(window.tokens)] = True
        key = jax.random.fold_in(jax.random.key(seed), start)
        everything = jax.device_get(look(model.params, to_device(rows), key))
        for row, window in enumerate(part):
            found.append(jax.tree.map(lambda x: x[row, : len(window.tokens) - 1], everything))  # noqa: B023
    return found


def _look(
    model: LoadedModel, params: Any, batch: Batch, key: jax.Array, settings: ThoughtSettings, samples: int
) -> Observation:
    """Returns arrays [B, L, ..] for a batch of windows."""
    weights = merge(model.graphdef, params)
    text = read_text(weights.decoder, *batch, dtype=settings.dtype)
    rows, length = batch.tokens.shape
    chunk = max_positions_per_chunk(
        model.architecture, dataclasses.replace(settings, num_thoughts=1 + samples), rows, length
    )
    everywhere = jnp.arange(length)
    uniforms = draw_uniforms(key, (rows, 1 + samples, length, settings.thought_length))
    first, others = (jax.tree.map(lambda x: x[:, part], uniforms) for part in (slice(1), slice(1, None)))  # noqa: B023
    parts = [sample_or_control(weights, text, everywhere, first, settings, chunk, greedy=True)]
    if samples:
        several = dataclasses.replace(settings, num_thoughts=samples)
        parts.append(sample_or_control(weights, text, everywhere, others, several, chunk))
    thoughts = jnp.concatenate([part.tokens for part in parts], axis=1)

    def of_chunk(weights: QuietStar, text: Text, positions: jax.Array, thoughts: jax.Array) -> Observation:
        scores = score_thoughts(weights, text, positions, thoughts, settings)
        base = here_and_ahead(text.nll, positions, settings.tokens_ahead)
        logits = weights.decoder.logits(here_and_ahead(text.hidden, positions, 1)[..., 0, :])
        base_probabilities, base_ids = jax.lax.top_k(jax.nn.softmax(logits), LIKELIEST)
        first = scores.log_scores[:, 0, :, 0]
        mixed = jnp.exp(first) if settings.config.mixing == "log_probabilities" else jax.nn.softmax(first)
        probabilities, ids = jax.lax.top_k(mixed, LIKELIEST)
        return Observation(
            base_nll=base[..., 0],
            base_entropy=entropy(logits),
            nll=scores.nll[..., 0].swapaxes(1, 2),
            reward=(base[:, None] - scores.nll).sum(axis=-1).swapaxes(1, 2),
            weight=scores.weight[..., 0].swapaxes(1, 2),
            thoughts=thoughts.swapaxes(1, 2),
            base_ids=base_ids,
            base_probabilities=base_probabilities,
            ids=ids,
            probabilities=probabilities,
        )

    def by_position(read: tuple[QuietStar, Text], positions: jax.Array, thoughts: jax.Array) -> Observation:
        return of_chunk(*read, positions, thoughts.swapaxes(1, 2))

    return map_chunks(by_position, (weights, text), everywhere, chunk, thoughts.swapaxes(1, 2), axis=1)

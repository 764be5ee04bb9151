"""Scores the last tokens of texts, without thoughts and with greedy ones; used by all measurements but voting.

Texts are padded on the left, so that all texts of a batch end at the same position and only the scored positions think.
An answer of four tokens after a prompt of a thousand needs four thoughts. Lengths are rounded up to a coarse grid, so
that a set of questions compiles a few programs, not one per question.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from quietstar_jax.architecture import Architecture
from quietstar_jax.config import MeshConfig
from quietstar_jax.errors import ConfigError
from quietstar_jax.inference.load_model import LoadedModel
from quietstar_jax.models.linear import cross_entropy
from quietstar_jax.models.parameters import GraphDef, merge
from quietstar_jax.parallel.mesh import make_mesh
from quietstar_jax.parallel.sharding import row_ways, shard_batch
from quietstar_jax.thoughts import controls
from quietstar_jax.thoughts.chunks import map_chunks, max_positions_per_chunk
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.sample import Thoughts, mask_meta_tokens
from quietstar_jax.thoughts.score import chain_hidden_states, talk
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import Text, entropy, gather_next_tokens, here_and_ahead, read_text

SHORTEST = 16  # shortest text length of the grid


class Continuation(NamedTuple):
    """A text whose last tokens are scored.

    Attributes:
      tokens: ids, at least one more than are scored.
      last: how many tokens at the end are scored.
      candidates: ids whose log-probability is returned at every scored position.
    """

    tokens: Sequence[int]
    last: int
    candidates: Sequence[int] = ()


class View(NamedTuple):
    """Predictions of P tokens; arrays are [P], except for the candidates.

    Attributes:
      nll: cross-entropy of the true token.
      best: likeliest of the tokens that may be generated.
      candidates: [P, A] log-probabilities of the candidates.
    """

    nll: Any
    best: Any
    candidates: Any


class TailScores(NamedTuple):
    """Predictions of the last P tokens of a text.

    Attributes:
      without: without thoughts; with_thoughts: after one greedy thought each, None if T is 0.
      base_entropy: [P] nats, entropy of the predictions without thoughts.
      weight: [P] mixing weight; entropy: [P] mean entropy of the thought tokens, nats; thoughts: [P, T] token ids.
    """

    without: View
    with_thoughts: View | None
    base_entropy: Any
    weight: Any
    entropy: Any
    thoughts: Any


def grid_length(length: int, shortest: int = SHORTEST) -> int:
    """Rounds a length up to the grid 16, 24, 32, 48, 64, 96 ..., whose steps are at most a factor of 1.5."""
    size = shortest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def grid_count(count: int) -> int:
    """Rounds up to a power of two: how many positions are scored if `count` are requested."""
    return 1 << (count - 1).bit_length()


def make_tail_scorer(
    graphdef: GraphDef, architecture: Architecture, settings: ThoughtSettings, forbidden: tuple[int, ...]
) -> Callable[..., TailScores]:
    """Compiled `(params, tokens [B, L], mask [B, L], candidates [B, A], count=P) -> TailScores`, each [B, P, ...].

    Args:
      forbidden: ids that are never generated.
    """

    def view(scores: jax.Array, targets: jax.Array, candidates: jax.Array, normalized: bool) -> View:
        """Scores [B, J, V], targets [B, J], candidates [B, A]."""
        log_probs = scores if normalized else scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        nll = -jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return View(
            nll=nll if normalized else cross_entropy(scores, targets),
            best=mask_meta_tokens(scores, forbidden).argmax(axis=-1),
            candidates=jnp.take_along_axis(log_probs, candidates[:, None], axis=-1),
        )

    @functools.partial(jax.jit, static_argnames="count")
    def score(
        params: Mapping[str, jax.Array], tokens: jax.Array, mask: jax.Array, candidates: jax.Array, *, count: int
    ) -> TailScores:
        model = merge(graphdef, params)
        text = read_text(model.decoder, tokens, mask, dtype=settings.dtype)
        rows, length = tokens.shape
        chunk = min(count, max_positions_per_chunk(architecture, settings, rows, length))
        positions = length - 1 - count + jnp.arange(count)  # those that predict the scored tokens

        def at(read: tuple[QuietStar, Text, jax.Array], positions: jax.Array, thoughts: Thoughts | None) -> TailScores:
            model, text, candidates = read
            hidden = here_and_ahead(text.hidden, positions, 1)[..., 0, :]
            targets = gather_next_tokens(text.tokens, positions, 1, fill=0)[..., 0]
            logits = model.decoder.logits(hidden)
            without, uncertainty = view(logits, targets, candidates, normalized=False), entropy(logits)
            if thoughts is None:
                nothing = jnp.zeros(targets.shape, jnp.float32)
                return TailScores(
                    without, None, uncertainty, nothing, nothing, jnp.zeros((*targets.shape, 0), jnp.int32)
                )
            talk_hidden = chain_hidden_states(model, text, positions, thoughts.tokens[:, None], settings)[1]
            scores, weight = talk(model, text, positions, talk_hidden, settings)
            normalized = settings.config.mixing == "log_probabilities"
            after, weight = view(scores[:, 0, :, 0], targets, candidates, normalized), weight[:, 0, :, 0]
            # A weight of 0 leaves the prediction unchanged: any difference is rounding.
            unmoved = (weight == 0, weight == 0, (weight == 0)[..., None])
            after = jax.tree.map(jnp.where, View(*unmoved), without, after)
            return TailScores(without, after, uncertainty, weight, thoughts.entropy.mean(axis=-1), thoughts.tokens)

        thoughts = _greedy_thoughts(model, text, positions, settings, chunk)
        return map_chunks(at, (model, text, candidates), positions, chunk, thoughts, axis=1)

    return score


def _greedy_thoughts(
    model: QuietStar, text: Text, positions: jax.Array, settings: ThoughtSettings, chunk: int
) -> Thoughts | None:
    """Greedy thoughts [B, P, T] at P positions, or what a control replaces them with; None if T is 0."""
    if not settings.thought_length:
        return None
    length = text.tokens.shape[1]
    shuffled = settings.config.control == "shuffled"  # needs thoughts of all earlier positions
    chosen = jnp.arange(length) if shuffled else positions
    # Controls draw by the index of a token in its own text, so that draws do not depend on the batch or the padding.
    number = jnp.maximum(chosen - jnp.argmax(text.mask, axis=1)[:, None], 0)
    drawn = controls.draw_uniforms(jax.random.key(0), (1, 1, length, settings.thought_length))
    uniforms = jax.tree.map(lambda x: x[0, 0][number][:, None], drawn)
    thoughts = controls.sample_or_control(model, text, chosen, uniforms, settings, chunk, greedy=True)
    return jax.tree.map(lambda x: jnp.take(x[:, 0], positions, axis=1) if shuffled else x[:, 0], thoughts)


class ContinuationScorer:
    """Scores the tails of texts with a model, on all local devices.

    Apart from rounding, each row of the result depends only on its own text, not on the batch or the devices.
    """

    def __init__(self, model: LoadedModel, settings: ThoughtSettings, batch_size: int):
        """Args: settings: from `model.settings`, length 0 = no thoughts; batch_size: texts over all devices."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more.")
        self._mesh = make_mesh(MeshConfig(), model.architecture, jax.local_devices())
        ways = row_ways(self._mesh)
        self.batch_size = -(-batch_size // ways) * ways
        self._params = jax.device_put(model.params, NamedSharding(self._mesh, PartitionSpec()))
        self._score = make_tail_scorer(model.graphdef, model.architecture, settings, model.forbidden_ids)
        self._pad_id = model.vocabulary.pad_id
        self.longest = longest_text(model.architecture, settings.thought_length)

    @property
    def programs(self) -> int:
        """How many programs have been compiled so far."""
        size: int = self._score._cache_size()  # type: ignore[attr-defined]
        return size

    def __call__(
        self, tails: Sequence[Continuation], done: Callable[[int], object] = lambda count: None
    ) -> list[TailScores]:
        """Returns the scores of each tail, in the order given, as numpy arrays.

        Args:
          done: called with the number of tails just finished.
        """
        found: list[Any] = [None] * len(tails)
        for rows, scores in self._batches(tails):
            for row, number in enumerate(rows):
                last, known = tails[number].last, len(tails[number].candidates)

                def own(view: View, row: int = row, last: int = last, known: int = known) -> View:
                    return View(view.nll[row, -last:], view.best[row, -last:], view.candidates[row, -last:, :known])

                after = scores.with_thoughts
                rest = (x[row, -last:] for x in (scores.base_entropy, scores.weight, scores.entropy, scores.thoughts))
                found[number] = TailScores(own(scores.without), None if after is None else own(after), *rest)
            done(len(rows))
        return found

    def _batches(self, tails: Sequence[Continuation]) -> Iterator[tuple[list[int], TailScores]]:
        """Yields the numbers of the tails of a batch, and its scores; the next batch runs while one is transferred."""
        shapes: dict[tuple[int, int], list[int]] = {}
        for number, tail in enumerate(tails):
            count = grid_count(tail.last)
            shapes.setdefault((grid_length(max(len(tail.tokens), count + 1)), count), []).append(number)
        width = max((len(tail.candidates) for tail in tails), default=0)
        width = grid_count(width) if width else 0
        waiting: tuple[list[int], Any] | None = None
        for (length, count), numbers in sorted(shapes.items(), reverse=True):  # the largest first
            for start in range(0, len(numbers), self.batch_size):
                rows = numbers[start : start + self.batch_size]
                running = rows, self._run([tails[number] for number in rows], length, count, width)
                if waiting:
                    yield waiting[0], jax.device_get(waiting[1])
                waiting = running
        if waiting:
            yield waiting[0], jax.device_get(waiting[1])

    def _run(self, tails: Sequence[Continuation], length: int, count: int, width: int) -> TailScores:
        """Starts to score a batch; returns arrays on the devices without waiting for them."""
        tokens = np.full((self.batch_size, length), self._pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        candidates = np.zeros((self.batch_size, width), np.int32)
        for row, tail in enumerate(tails):
            tokens[row, length - len(tail.tokens) :] = tail.tokens
            mask[row, length - len(tail.tokens) :] = True
            candidates[row, : len(tail.candidates)] = tail.candidates
        with jax.set_mesh(self._mesh):
            return self._score(self._params, *map(shard_batch, (tokens, mask, candidates)), count=count)


def longest_text(architecture: Architecture, thought_length: int) -> int:
    """Tokens of the longest text that can be scored; a thought needs its own positions after the text."""
    return architecture.max_positions + 1 if not thought_length else architecture.max_positions - thought_length - 2

"""Scores the last tokens of texts, without thoughts and with them; used by all measurements but voting.

Texts are padded on the left, so that all texts of a batch end at the same position and only the scored positions think.
An answer of four tokens after a prompt of a thousand needs four thoughts. Lengths are rounded up to a coarse grid, so
that a set of questions compiles a few programs, not one per question.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from quietstar_jax.architecture import Architecture
from quietstar_jax.config import MeshConfig
from quietstar_jax.errors import ConfigError
from quietstar_jax.inference.load_model import LoadedModel
from quietstar_jax.methods.thinking import ALWAYS, ThinkPolicy
from quietstar_jax.models.parameters import GraphDef, merge
from quietstar_jax.parallel.mesh import make_mesh
from quietstar_jax.parallel.sharding import row_ways, shard_batch
from quietstar_jax.thoughts.controls import Uniforms, draw_uniforms
from quietstar_jax.thoughts.perturbations import PerturbationDraws, draw_perturbations
from quietstar_jax.thoughts.score_predictions import Thinking
from quietstar_jax.thoughts.score_tokens import score_tokens
from quietstar_jax.thoughts.score_use import UseWanted
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.token_scores import TokenScores

Drawn = TypeVar("Drawn", Uniforms, PerturbationDraws, jax.Array)
SHORTEST = 16  # shortest text length of the grid


class Continuation(NamedTuple):
    """A text whose last tokens are scored.

    Attributes:
      tokens: ids, at least one more than are scored.
      last: how many tokens at the end are scored.
      candidates: ids whose log-probability is returned at every scored position.
      number: of the text among all that are measured, 0 .. 2**31 - 1; its random numbers depend on the seed and on it.
    """

    tokens: Sequence[int]
    last: int
    candidates: Sequence[int] = ()
    number: int = 0


class UseOptions(NamedTuple):
    """What else a scorer measures, see `thoughts.token_scores.ThoughtUse`.

    Attributes:
      kinds: of perturbations.
      samples: R, random thoughts per position; 0 = the greedy thought only, which is what all other measurements use.
      seed: of sampled thoughts and of perturbations.
    """

    kinds: tuple[str, ...] = ()
    samples: int = 0
    seed: int = 0


def grid_length(length: int, shortest: int = SHORTEST) -> int:
    """Rounds a length up to the grid 16, 24, 32, 48, 64, 96 ..., whose steps are at most a factor of 1.5."""
    size = shortest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def grid_count(count: int) -> int:
    """Returns how many positions are scored if `count` are requested: 1, 2, 4, .. 64, 72, .. 128, 144 ...

    Each number is a program and a batch of its own. Up to 64 there are few of them; above, where a position more costs
    more than another program, steps are an eighth of the power of two below.
    """
    power = 1 << (count - 1).bit_length()
    step = power if power <= 64 else power // 16
    return -(-count // step) * step


class ContinuationScorer:
    """Scores the tails of texts with a model, on all local devices.

    Apart from rounding, each row of the result depends only on its own text, not on the batch or the devices.
    """

    def __init__(
        self, model: LoadedModel, settings: ThoughtSettings, batch_size: int, use: UseOptions | None = None, *,
        think: ThinkPolicy = ALWAYS, seed: int = 0, ranked: bool = False, excluded: Sequence[int] = (),
    ):  # fmt: skip
        """Initializes the scorer; nothing is compiled yet.

        Args:
          settings: from `model.settings`, length 0 = no thoughts.
          batch_size: texts over all devices.
          use: None = one greedy thought, and no `TokenScores.use`.
          think: any policy but `NEVER`; where it does not think, the prediction is the one without thoughts; seed: of
            its draws.
          ranked: all positions think, and the scores have `rankings`.
          excluded: ids left out of all predictions, which are then renormalized.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more.")
        self._mesh = make_mesh(MeshConfig(), model.architecture, jax.local_devices())
        ways = row_ways(self._mesh)
        self.batch_size = -(-batch_size // ways) * ways
        self._params = jax.device_put(model.params, NamedSharding(self._mesh, PartitionSpec()))
        chosen = (None if ranked else think, seed) if ranked or think.constant is None else None
        ids = model.forbidden_ids, tuple(excluded)
        score = functools.partial(_score_tails, model.graphdef, settings, ids, use, chosen)
        self._score = jax.jit(score, static_argnames="count")
        self._use = use
        self._pad_id = model.vocabulary.pad_id
        self.longest = longest_text(model.architecture, settings)

    @property
    def samples(self) -> int:
        """R, how many random thoughts each position has; 0 = one greedy thought."""
        return self._use.samples if self._use else 0

    @property
    def programs(self) -> int:
        """How many programs have been compiled so far."""
        size: int = self._score._cache_size()  # type: ignore[attr-defined]
        return size

    def __call__(
        self, tails: Sequence[Continuation], done: Callable[[int], object] = lambda count: None
    ) -> list[TokenScores]:
        """Returns the scores of each tail, means over its thoughts, in the order given, as numpy arrays [P].

        Args:
          done: called with the number of tails just finished.
        """
        found: list[Any] = [None] * len(tails)
        for rows, scores in self._batches(tails):
            for row, number in enumerate(rows):
                last, known = tails[number].last, len(tails[number].candidates)
                own = jax.tree.map(lambda x: x[row, -last:], scores)  # noqa: B023
                base, talk = (x._replace(candidates=x.candidates[:, :known]) for x in (own.base, own.talk))
                found[number] = own._replace(base=base, talk=talk)
            done(len(rows))
        return found

    def _batches(self, tails: Sequence[Continuation]) -> Iterator[tuple[list[int], TokenScores]]:
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
                    yield waiting[0], self._fetch(waiting[1])
                waiting = running
        if waiting:
            yield waiting[0], self._fetch(waiting[1])

    def _fetch(self, scores: TokenScores) -> TokenScores:
        """Waits for the scores of a batch; returns means over its thoughts, [B, P], as numpy arrays."""
        found: TokenScores = jax.device_get(scores)
        return found.first_thought() if self._use is None else found.average_thought()

    def _run(self, tails: Sequence[Continuation], length: int, count: int, width: int) -> TokenScores:
        """Starts to score a batch; returns arrays on the devices without waiting for them."""
        tokens = np.full((self.batch_size, length), self._pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        candidates = np.zeros((self.batch_size, width), np.int32)
        numbers = np.zeros(self.batch_size, np.int32)
        for row, tail in enumerate(tails):
            tokens[row, length - len(tail.tokens) :] = tail.tokens
            mask[row, length - len(tail.tokens) :] = True
            candidates[row, : len(tail.candidates)] = tail.candidates
            numbers[row] = tail.number
        with jax.set_mesh(self._mesh):
            return self._score(self._params, *map(shard_batch, (tokens, mask, candidates, numbers)), count=count)


def longest_text(architecture: Architecture, settings: ThoughtSettings) -> int:
    """Tokens of the longest text that can be scored; a thought needs its own positions after the text."""
    return architecture.max_positions - (settings.chain_length if settings.thought_length else -1)


def _score_tails(
    graphdef: GraphDef, settings: ThoughtSettings, ids: tuple[tuple[int, ...], ...], use: UseOptions | None,
    think: tuple[ThinkPolicy | None, int] | None, params: Mapping[str, jax.Array], tokens: jax.Array, mask: jax.Array,
    candidates: jax.Array, numbers: jax.Array, *, count: int,
) -> TokenScores:  # fmt: skip
    """Scores the last P = `count` tokens of texts [B, L], with candidates [B, A]; numbers [B] as in `Continuation`.

    Args:
      ids: forbidden ones and excluded ones, see `Wanted`.
      think: a policy of thinking that chooses, and the seed of its draws, see `Thinking`; None = all positions think.
    """
    length = tokens.shape[1]
    positions = length - 1 - count + jnp.arange(count)  # those that predict the scored tokens
    # All draws are by the index of a token in its own text, so that they do not depend on the batch or the padding.
    index = jnp.maximum(jnp.arange(length) - jnp.argmax(mask, axis=1)[:, None], 0)
    wanted, samples = None, 0
    if use and use.samples:
        samples = use.samples
        uniforms = _by_text(draw_uniforms, use.seed, 0, numbers, index, samples, settings.thought_length)
    else:  # only controls draw
        drawn = draw_uniforms(jax.random.key(0), (1, 1, length, settings.thought_length))
        uniforms = jax.tree.map(lambda x: x[0, 0][index][:, None], drawn)
    if use:
        size = max(1, samples), settings.thought_length
        draws = _by_text(draw_perturbations, use.seed, 1, numbers, index, *size) if use.kinds else None
        wanted = UseWanted(use.kinds, draws)
    thinking = None
    if think:
        policy, seed = think
        uniform: jax.Array = _by_text(lambda key, shape: jax.random.uniform(key, shape), seed, 2, numbers, index, 1, 1)
        thinking = Thinking(policy, index, uniform[:, 0, :, 0])
    return score_tokens(
        merge(graphdef, params), tokens, mask, None, positions, uniforms, settings, greedy=0 if samples else 1,
        use=wanted, forbidden=ids[0], excluded=ids[1], candidates=candidates, thinking=thinking,
    )  # fmt: skip


def _by_text(
    draw: Callable[..., Drawn], seed: int, purpose: int, numbers: jax.Array, index: jax.Array, count: int, tokens: int
) -> Drawn:
    """Draws uniform numbers for R = `count` thoughts of T = `tokens` tokens at all L positions.

    Args:
      draw: function of a key and a shape; purpose: different numbers are independent.
      numbers: [B], of each text; index: [B, L], of each token in its text.

    Returns:
      what `draw` returns, arrays [B, R, L, T] (or [B, R, L]).
    """
    key = jax.random.fold_in(jax.random.key(seed), purpose)

    def of_text(number: jax.Array, index: jax.Array) -> Drawn:
        # [1, L, R, T]: a longer padded length only adds numbers at the end.
        drawn = draw(jax.random.fold_in(key, number), (1, index.size, count, tokens))
        return jax.tree.map(lambda x: jnp.moveaxis(x[0][index], 1, 0), drawn)

    return jax.vmap(of_text)(numbers, index)

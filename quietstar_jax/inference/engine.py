"""Runs batches of token sequences: compiles once, keeps the device busy, and returns tokens one call late."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.architecture import Architecture
from quietstar_jax.inference.decode import generate_tokens, read_prompt
from quietstar_jax.inference.decode_state import DecodeConfig, DecodeOutput, SamplingParams, State, with_thoughts
from quietstar_jax.inference.kv_cache import empty_cache
from quietstar_jax.inference.older_thoughts import NONE
from quietstar_jax.inference.sampling import Sampling
from quietstar_jax.models.decoder import STACKED, KeyValues, separate_layers
from quietstar_jax.models.parameters import GraphDef, merge

PROMPT_CHUNK = 64  # tokens of each prompt in one pass; divides every block of keys
UNROLLED_LAYERS, UNROLLED_BYTES = 8, 1 << 28  # decoders of at most this size run on the CPU without a loop over layers
SHORTEST_CACHE = 512  # tokens; longer caches double this: few lengths, all multiples of a block

# A compiled function: (params, state, wanted, knobs) -> (state, emitted).
Step = Any


@dataclass(frozen=True)
class Request:
    """A prompt. tokens: one or more; limit: maximum number of tokens to generate; key: [2] uint32, key data."""

    tokens: tuple[int, ...]
    limit: int
    key: np.ndarray

    @property
    def length(self) -> int:
        """Number of tokens that the cache must hold; the last generated token is never stored."""
        return len(self.tokens) + self.limit - 1


class Engine:
    """Generates with a model, in batches of one size.

    A batch of fewer requests is padded with sequences that have ended. The result for a prompt therefore depends
    neither on the other prompts nor on their number.
    """

    def __init__(
        self, params: dict[str, jax.Array], graphdef: GraphDef, architecture: Architecture, dtype: str,
        batch_size: int,
    ):  # fmt: skip
        self.batch_size = batch_size
        self.params = separate_layers(params) if _is_small(params, architecture) else params
        self.graphdef, self._architecture = graphdef, architecture
        self._dtype = jnp.dtype(dtype)
        self._place = _beside(params["decoder.embedding"].sharding)
        self._steps: dict[DecodeConfig, Step] = {}

        def read(params: Any, cache: KeyValues, tokens: jax.Array, start: jax.Array) -> KeyValues:
            return read_prompt(merge(graphdef, params).decoder, cache, tokens, start, self._dtype)

        self._read = jax.jit(read, donate_argnums=1, out_shardings=self._place)

    @property
    def compilations(self) -> int:
        """How many programs have been compiled so far."""
        return sum(compiled._cache_size() for compiled in (self._read, *self._steps.values()))

    def cache_length(self, needed: int) -> int:
        """Returns the length of a cache for at least `needed` tokens."""
        length = SHORTEST_CACHE
        while length < needed:
            length *= 2
        return length

    def run(
        self, requests: Sequence[Request], plan: DecodeConfig, sampling: Sampling, alive: np.ndarray, cache_length: int
    ) -> Iterator[DecodeOutput]:
        """Generates until every text has ended; yields numpy arrays while the device computes the next tokens.

        Args:
          requests: up to `batch_size`; row b of the output belongs to request b.
          alive: [batch_size] bool, which the caller may change: a row set to False gets no more tokens.
          cache_length: from `cache_length()`, for the longest of the requests.
        """
        state = self.start(requests, cache_length, plan.thought.reach)
        yield from self.decode(state, self.knobs(requests, sampling), plan, alive)

    def decode(
        self, state: State, knobs: SamplingParams, plan: DecodeConfig, alive: np.ndarray
    ) -> Iterator[DecodeOutput]:
        """As `run`, from the state that `start` returns; the state is donated."""
        step, left = self.step(plan), np.asarray(state.left)
        state = self.with_thought(state, plan)
        pending: DecodeOutput | None = None
        while (alive & (left > 0)).any():
            state, emitted = step(self.params, state, alive.copy(), knobs)
            if pending is not None:
                tokens = jax.device_get(pending)
                left = self._left_after(left, tokens.tokens, plan)
                yield tokens
            pending = emitted

    def start(self, requests: Sequence[Request], cache_length: int, reach: int = 1) -> State:
        """Reads all prompts except their last tokens into a cache; returns the state.

        With a reach of N above 1, the last N tokens are not read: thoughts between them serve the tokens after them.
        """
        newest = [max(0, len(request.tokens) - reach) for request in requests]
        chunks = -(-max(newest) // PROMPT_CHUNK)
        prompts = np.zeros((self.batch_size, chunks * PROMPT_CHUNK), np.int32)
        unread = np.full((self.batch_size, reach - 1), NONE, np.int32)
        for row, (request, at) in enumerate(zip(requests, newest, strict=True)):
            prompts[row, :at] = request.tokens[:at]
            unread[row, : len(request.tokens) - 1 - at] = request.tokens[at + 1 :]
        cache = empty_cache(self._architecture, self.batch_size, cache_length, self._dtype, self._place)
        for start in range(0, chunks * PROMPT_CHUNK, PROMPT_CHUNK):
            cache = self._read(self.params, cache, prompts[:, start : start + PROMPT_CHUNK], np.int32(start))
        token = self._rows([request.tokens[at] for request, at in zip(requests, newest, strict=True)], np.int32)
        position = self._rows(newest, np.int32)
        left = self._rows([request.limit for request in requests], np.int32)
        token, position, left, unread = jax.device_put((token, position, left, unread), self._place)
        return State(cache, token, position, left, unread if reach > 1 else None)

    def with_thought(self, state: State, plan: DecodeConfig) -> State:
        """Returns the state that the compiled function of a plan accepts, from the one that `start` returns."""
        return with_thoughts(state, self._architecture, plan, self._place)

    def knobs(self, requests: Sequence[Request], sampling: Sampling) -> SamplingParams:
        """Returns the sampling parameters of a call, with the keys of the requests."""
        keys = np.zeros((self.batch_size, 2), np.uint32)
        for row, request in enumerate(requests):
            keys[row] = request.key
        return SamplingParams(
            jnp.float32(sampling.temperature),
            jnp.float32(sampling.top_p),
            jnp.float32(sampling.thought_temperature),
            jax.random.wrap_key_data(jnp.asarray(keys), impl="threefry2x32"),
            jnp.asarray(sampling.think.numbers, jnp.float32),
        )

    def step(self, plan: DecodeConfig) -> Step:
        """Returns the compiled `generate_tokens` of a plan; the state is donated."""
        if plan not in self._steps:

            def step(params: Any, state: State, alive: jax.Array, knobs: SamplingParams) -> tuple[State, DecodeOutput]:
                return generate_tokens(merge(self.graphdef, params), state, alive, knobs, plan)

            self._steps[plan] = jax.jit(step, donate_argnums=1, out_shardings=self._place)
        return self._steps[plan]

    def _rows(self, values: Sequence[int], dtype: Any) -> np.ndarray:
        """Returns the values as [batch_size], zero where there is no request."""
        rows = np.zeros(self.batch_size, dtype)
        rows[: len(values)] = values
        return rows

    def _left_after(self, left: np.ndarray, tokens: np.ndarray, plan: DecodeConfig) -> np.ndarray:
        """How many tokens may still be generated for each row, after tokens [N, B]."""
        return np.where(np.isin(tokens, plan.eos_ids).any(axis=0), 0, left - (tokens >= 0).sum(axis=0))


def _is_small(params: dict[str, jax.Array], architecture: Architecture) -> bool:
    """Whether to run the layers one by one: the weights exist, on one CPU, and a second copy of the layers is cheap."""
    stacked = [value for name, value in params.items() if name.startswith(STACKED)]
    on_one_cpu = all(
        isinstance(value, jax.Array) and [device.platform for device in value.devices()] == ["cpu"] for value in stacked
    )
    few = architecture.num_layers <= UNROLLED_LAYERS
    return on_one_cpu and few and sum(value.nbytes for value in stacked) <= UNROLLED_BYTES


def _beside(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Sharding of caches: on the device of the parameters, or replicated over their mesh."""
    if isinstance(sharding, jax.NamedSharding):
        return jax.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding

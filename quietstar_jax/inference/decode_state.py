"""What the compiled functions of generation take and return: static settings, and the state of B sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.architecture import Architecture
from quietstar_jax.methods.thinking import THINKING
from quietstar_jax.models.decoder import KeyValues
from quietstar_jax.thoughts.chains import empty_chains
from quietstar_jax.thoughts.ending import ENDED
from quietstar_jax.thoughts.settings import ThoughtSettings


@dataclass(frozen=True)
class DecodeConfig:
    """Static settings of the compiled functions.

    Attributes:
      thought: length (0 = none), meta tokens, mixing, compute dtype.
      think: name of the policy of thinking, if there are thoughts.
      sampled: whether tokens are sampled; nucleus: only from the nucleus; thoughts_sampled: in thoughts too.
      forbidden: ids that are never generated; eos_ids: ids that end a text.
      tokens_per_call: number of tokens of each sequence that one call generates; if the policy chooses, a call ends
        when any sequence has that many.
    """

    thought: ThoughtSettings
    think: str = "always"
    sampled: bool = False
    nucleus: bool = False
    thoughts_sampled: bool = False
    forbidden: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    tokens_per_call: int = 1

    @property
    def chooses(self) -> bool:
        """Whether sequences advance independently: only some tokens have a thought, or thoughts differ in length."""
        some = THINKING[self.think].traits["constant"] is None
        return self.thought.thought_length > 0 and (some or self.thought.samples_end)


class SamplingParams(NamedTuple):
    """Settings that may change between calls without recompilation: scalars of `Sampling`, and keys [B].

    `think` are the numbers of the policy, [N] float32.
    """

    temperature: jax.Array
    top_p: jax.Array
    thought_temperature: jax.Array
    keys: jax.Array
    think: jax.Array


class OpenThought(NamedTuple):
    """The unfinished chains `x_j, start, t_1 .. t_T, end` of B sequences, one of each.

    Attributes:
      computed: [B] int32, c, how many tokens of the chain have been computed; 0 = none, not even x_j.
      chain_kv: keys and values of these tokens; base: [B, D] hidden state at x_j.
      tokens: [B, T] int32, the thought, of which max(0, c - 1) tokens are known; `ENDED` after its end.
    """

    computed: jax.Array
    chain_kv: KeyValues
    base: jax.Array
    tokens: jax.Array

    @property
    def at_end(self) -> jax.Array:
        """Whether the next token of each chain is `end`, [B] bool."""
        ended = (self.computed >= 2) & (at(self.tokens, self.computed - 2) == ENDED)
        return ended | (self.computed == self.tokens.shape[1] + 2)


class State(NamedTuple):
    """State of B sequences between two generated tokens.

    Attributes:
      cache: keys and values of all tokens but the newest.
      token, position: [B] int32, the newest token and its position in the text; left: [B] int32, how many tokens may
        still be generated, 0 = the text has ended.
      thought: None unless the policy chooses.
    """

    cache: KeyValues
    token: jax.Array
    position: jax.Array
    left: jax.Array
    thought: OpenThought | None = None


class DecodeOutput(NamedTuple):
    """N tokens of B sequences.

    Attributes:
      tokens: [N, B] int32; -1 = none: the text has ended, or other sequences have more tokens in this call.
      thoughts: [N, B, T] int32, the thought before each token, -1 where the policy made none, `ENDED` after its end;
        weight: [N, B] float32, its mixing weight, 0 where there is none.
    """

    tokens: jax.Array
    thoughts: jax.Array
    weight: jax.Array


def open_thought(a: Architecture, batch: int, plan: DecodeConfig, place: jax.sharding.Sharding) -> OpenThought:
    """Returns the state of B sequences before the first token."""
    length, dtype = plan.thought.thought_length, plan.thought.dtype
    return OpenThought(
        jnp.zeros(batch, jnp.int32, device=place),
        empty_chains(a, batch, 1, 1, length + 3, dtype, place),
        jnp.zeros((batch, a.hidden_size), dtype, device=place),
        jnp.zeros((batch, length), jnp.int32, device=place),
    )


def at(values: jax.Array, index: jax.Array) -> jax.Array:
    """Returns values [B, N] at an index [B] of each row; any value where the index is outside."""
    return jnp.take_along_axis(values, index[:, None], axis=1, mode="clip")[:, 0]

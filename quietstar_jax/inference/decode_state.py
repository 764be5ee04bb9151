"""What the compiled functions of generation take and return: static settings, and the state of B sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from quietstar_jax.architecture import Architecture
from quietstar_jax.inference.older_thoughts import OlderThoughts, no_older_thoughts
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
        """Whether sequences advance independently: only some tokens have a thought, thoughts differ in length, or a
        thought serves several tokens.
        """
        some = THINKING[self.think].traits["constant"] is None
        return self.thought.thought_length > 0 and (some or self.thought.samples_end or self.thought.reach > 1)


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
      unread: [B, N - 1] int32, the tokens of the prompt after the newest token, then `NONE`; None for a reach N of 1.
      thought: None unless sequences advance independently; older: None for a reach of 1.
    """

    cache: KeyValues
    token: jax.Array
    position: jax.Array
    left: jax.Array
    unread: jax.Array | None = None
    thought: OpenThought | None = None
    older: OlderThoughts | None = None


class DecodeOutput(NamedTuple):
    """N tokens of B sequences.

    Attributes:
      tokens: [N, B] int32; -1 = none: the text has ended, or other sequences have more tokens in this call.
      thoughts: [N, B, T] int32, the thought before each token, -1 where the policy made none, `ENDED` after its end;
        weight: [N, B] float32, its mixing weight, 0 where there is none; with a reach above 1, of all its thoughts.
    """

    tokens: jax.Array
    thoughts: jax.Array
    weight: jax.Array


def with_thoughts(state: State, a: Architecture, plan: DecodeConfig, place: jax.sharding.Sharding) -> State:
    """Returns the state before the first token with the thoughts that a plan needs, all empty."""
    if not plan.chooses:
        return state
    batch, length, dtype = state.token.size, plan.thought.thought_length, plan.thought.dtype
    thought = OpenThought(
        jnp.zeros(batch, jnp.int32, device=place),
        empty_chains(a, batch, 1, 1, length + 3, dtype, place),
        jnp.zeros((batch, a.hidden_size), dtype, device=place),
        jnp.zeros((batch, length), jnp.int32, device=place),
    )
    if plan.thought.reach == 1:
        return state._replace(thought=thought)
    return state._replace(thought=thought, older=no_older_thoughts(a, batch, plan.thought, place))


def at(values: jax.Array, index: jax.Array) -> jax.Array:
    """Returns values [B, N] at an index [B] of each row; any value where the index is outside."""
    return jnp.take_along_axis(values, index[:, None], axis=1, mode="clip")[:, 0]

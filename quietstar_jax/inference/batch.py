"""Generates text for one batch of requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.inference.decode_state import DecodeConfig
from quietstar_jax.inference.detokenize import TextStream
from quietstar_jax.inference.engine import Engine, Request
from quietstar_jax.inference.sampling import Sampling
from quietstar_jax.thoughts.ending import thought_ids


@dataclass(frozen=True)
class Token:
    """One generated token.

    Attributes:
      id: of the token.
      text: the text that is certain once the token is known, whole characters only. Usually the token's own text; empty
        while a character is incomplete or a stop string may have begun. A token that ends the text adds none.
      thought, thought_ids: the thought before the token; empty where none was made, or where its end was sampled first.
      mixing_weight: how much the thought contributed; 0 where none was made. With a reach above 1, of all thoughts that
        were used for the token.
      has_thought: whether a thought was made, which may be empty.
    """

    id: int
    text: str
    thought: str = ""
    thought_ids: tuple[int, ...] = ()
    mixing_weight: float = 0.0
    has_thought: bool = False


@dataclass(frozen=True)
class Generation:
    """The text generated for a prompt.

    Attributes:
      text: without the stop string or the token that ended it.
      tokens: all generated tokens, including those that ended the text.
      finish_reason: `eos`, `stop` (a stop string appeared) or `length`.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of all tokens."""
        return tuple(token.id for token in self.tokens)

    @property
    def thoughts(self) -> tuple[str, ...]:
        """The thought before each token."""
        return tuple(token.thought for token in self.tokens)

    @property
    def mixing_weights(self) -> tuple[float, ...]:
        """The mixing weight of each token."""
        return tuple(token.mixing_weight for token in self.tokens)


@dataclass(frozen=True)
class GenerationConfig:
    """The settings of one call; max_tokens, stop: see `Generator.generate`."""

    plan: DecodeConfig
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...]


def thinking_rate(generations: Sequence[Generation]) -> float:
    """Returns the share of the tokens that have a thought."""
    made = [token.has_thought for one in generations for token in one.tokens]
    return sum(made) / max(1, len(made))


class Batch:
    """One batch of requests. Iterating generates, and yields (number of the request, token) as tokens are generated."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        job: GenerationConfig,
        cache_length: int,
    ):
        self._engine, self._tokenizer, self._requests, self._job = engine, tokenizer, requests, job
        self._cache_length = cache_length
        self._alive = np.arange(engine.batch_size) < len(requests)
        self._texts = [TextStream(tokenizer, request.tokens, job.stop) for request in requests]
        self._tokens: list[list[Token]] = [[] for _ in requests]
        self._reasons = [""] * len(requests)

    def __iter__(self) -> Iterator[tuple[int, Token]]:
        job = self._job
        for emitted in self._engine.run(self._requests, job.plan, job.sampling, self._alive, self._cache_length):
            for ids, thoughts, weights in zip(*emitted, strict=True):
                for row in np.flatnonzero(self._alive & (ids >= 0)).tolist():
                    yield row, self._take(row, int(ids[row]), thoughts[row].tolist(), float(weights[row]))

    def finish(self) -> list[Generation]:
        """Generates all remaining tokens; returns the results in the order of the requests."""
        for _ in self:
            pass
        return [
            Generation("".join(token.text for token in tokens), tuple(tokens), reason)
            for tokens, reason in zip(self._tokens, self._reasons, strict=True)
        ]

    def _take(self, row: int, token_id: int, thought: list[int], weight: float) -> Token:
        """Adds one token to a text that has not ended; ends the text if necessary."""
        text = self._texts[row]
        if token_id in self._job.plan.eos_ids:
            piece, reason = text.finish(), "eos"
        else:
            piece, reason = text.add(token_id), ""
            if len(self._tokens[row]) + 1 == self._requests[row].limit:
                piece, reason = piece + text.finish(), "length"
        reason = "stop" if text.stopped else reason
        self._reasons[row], self._alive[row] = reason, not reason
        made, ids = bool(thought) and -1 not in thought, thought_ids(thought)
        token = Token(token_id, piece, self._tokenizer.decode(ids) if ids else "", ids, weight, made)
        self._tokens[row].append(token)
        return token

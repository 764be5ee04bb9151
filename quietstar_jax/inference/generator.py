"""The Python API of generation: text in, text out, with a thought before every token where the model can think."""

from __future__ import annotations

import operator
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from quietstar_jax.config import ComputeDtype
from quietstar_jax.errors import ConfigError, DataError, UserError
from quietstar_jax.inference.batch import Batch, Generation, GenerationConfig, Token
from quietstar_jax.inference.decode_state import DecodeConfig
from quietstar_jax.inference.engine import Engine, Request
from quietstar_jax.inference.load_model import LoadedModel, load_model
from quietstar_jax.inference.sampling import Sampling
from quietstar_jax.methods.thinking import NEVER, choose_policy

Prompt = str | Sequence[int] | np.ndarray
TOKENS_PER_CALL = 8  # tokens between two transfers to the host; a stream uses 1


class Generator:
    """Generates text.

    The text for a prompt depends only on the prompt, the settings and the seed, not on the other prompts of the call,
    their order or their number.
    """

    def __init__(self, model: LoadedModel, *, batch_size: int = 8, max_length: int | None = None):
        """Prepares a generator; compilation happens at the first use.

        Args:
          batch_size: number of prompts per batch; fewer prompts cost as much as this many.
          max_length: maximum tokens of prompt and text; memory is allocated and one program compiled for this length.
            None = as long as the prompts need, in doublings.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more.")
        if max_length is not None and max_length < 2:
            raise ConfigError(f"max_length is {max_length}; it must be 2 or more.")
        self.model, self.max_length = model, max_length
        self._engine = Engine(model.params, model.graphdef, model.architecture, model.dtype, batch_size)

    @classmethod
    def open(
        cls, path: str | Path, *, step: int | None = None, revision: str = "", dtype: ComputeDtype = "float32",
        batch_size: int = 8, max_length: int | None = None,
    ) -> Self:  # fmt: skip
        """Opens a run, an exported or published Quiet-STaR, or a plain Hugging Face model; see `load_model`.

        Raises:
          UserError: the model cannot be opened.
        """
        model = load_model(path, step=step, revision=revision, dtype=dtype)
        return cls(model, batch_size=batch_size, max_length=max_length)

    def generate(
        self, prompts: Sequence[Prompt], *, max_tokens: int = 128, thoughts: bool | None = None,
        thought_length: int | None = None, temperature: float = 0.0, top_p: float = 1.0,
        thought_temperature: float = 0.0, seed: int | Sequence[int] = 0, stop: Sequence[str] = (),
        think: str | None = None, reach: int | None = None,
    ) -> list[Generation]:  # fmt: skip
        """Generates text for each prompt.

        Args:
          prompts: texts, which begin as the training texts did (with the begin-of-text token if there is one), or token
            ids, which are used unchanged.
          max_tokens: maximum per text; fewer where the model has no further positions.
          thoughts: whether to think; None = if the model can.
          thought_length: T; None = as trained.
          temperature, top_p, thought_temperature: see `Sampling`; a temperature of 0 is greedy.
          seed: of sampling, one for all prompts or one for each. Repetitions of a prompt get different draws.
          stop: strings that end a text where they appear.
          think: policy that chooses the tokens that get a thought, see `methods/thinking.py`; None = that of the model.
          reach: for how many next tokens a thought is used, see `thoughts/reach.py`; above 1 only with the mixing
            `probabilities`; None = that of the model. The last N tokens of the prompt get thoughts too.

        Raises:
          UserError: a prompt is empty, too long or has unknown tokens, a setting is impossible, or thoughts are
            requested from a model that cannot think.
        """
        job = self.job(
            TOKENS_PER_CALL, max_tokens, thoughts, thought_length, temperature, top_p, thought_temperature, stop, think,
            reach,
        )  # fmt: skip
        requests = self.requests(prompts, job, seed)
        results: list[Generation] = []
        for first in range(0, len(requests), self.batch_size):
            results += self.run(requests[first : first + self.batch_size], job).finish()
        return results

    def stream(
        self, prompt: Prompt, *, max_tokens: int = 128, thoughts: bool | None = None,
        thought_length: int | None = None, temperature: float = 0.0, top_p: float = 1.0,
        thought_temperature: float = 0.0, seed: int = 0, stop: Sequence[str] = (), think: str | None = None,
        reach: int | None = None,
    ) -> Iterator[Token]:  # fmt: skip
        """Iterates over the tokens of one text as they are generated; arguments and errors as in `generate`."""
        job = self.job(
            1, max_tokens, thoughts, thought_length, temperature, top_p, thought_temperature, stop, think, reach
        )
        batch = self.run(self.requests([prompt], job, seed), job)
        return (token for _, token in batch)

    @property
    def batch_size(self) -> int:
        """Number of prompts per batch."""
        return self._engine.batch_size

    @property
    def compilations(self) -> int:
        """How many programs have been compiled so far."""
        return self._engine.compilations

    def requests(
        self, prompts: Sequence[Prompt], job: GenerationConfig, seed: int | Sequence[int] = 0
    ) -> list[Request]:
        """Converts prompts to requests: token ids, each with a key and a limit.

        Raises:
          UserError: see `generate`; names the prompt by its number, from 1.
        """
        if isinstance(prompts, str):
            raise ConfigError("prompts is one text; it must be a list of texts.")
        seeds = [int(seed)] * len(prompts) if isinstance(seed, int | np.integer) else [int(s) for s in seed]
        if len(seeds) != len(prompts) or not all(0 <= s < 2**63 for s in seeds):
            raise ConfigError(
                f"seed is {seed!r}; it must be 0 or more, or a list with one such number for each prompt."
            )
        requests, seen = [], Counter[tuple[int, tuple[int, ...]]]()
        for number, (prompt, prompt_seed) in enumerate(zip(prompts, seeds, strict=True), start=1):
            try:
                tokens = self.encode(prompt)
                limit = self.limit(len(tokens), job)
            except UserError as error:
                raise DataError(f"Prompt {number}: {error}" if len(prompts) > 1 else str(error)) from error
            requests.append(Request(tokens, limit, _key(prompt_seed, tokens, seen[prompt_seed, tokens])))
            seen[prompt_seed, tokens] += 1
        return requests

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Converts a prompt to token ids; a text begins as the training texts did, ids are used unchanged.

        Args:
          prompt: a text, or integers in a list, a tuple or an array [tokens] of numpy or JAX.

        Raises:
          DataError: the prompt is empty or neither of these, or the model has no embedding for one of its tokens.
        """
        model = self.model
        tokens = _ids(prompt) if not isinstance(prompt, str) else ()
        if isinstance(prompt, str) and prompt:
            tokens = tuple(model.tokenizer.encode_text(prompt, model.bos))
        if not tokens:
            raise DataError("The prompt is empty. Give some text to continue.")
        rows = model.architecture.vocab_size
        unknown = [token for token in tokens if not 0 <= token < rows]
        if unknown:
            names = ", ".join(model.tokenizer.shown(token) for token in unknown[:3])
            raise DataError(
                f"The prompt contains tokens that have no embedding in the model: {names}. The model has 0 .. "
                f"{rows - 1}. Remove them."
            )
        return tokens

    def limit(self, tokens: int, job: GenerationConfig) -> int:
        """Returns how many tokens to generate after a prompt of this many tokens.

        Raises:
          DataError: no token fits after the prompt.
        """
        thought = job.plan.thought.thought_length
        positions = self.model.architecture.max_positions - tokens - (thought + 1 if thought else -1)
        room = positions if self.max_length is None else min(positions, self.max_length - tokens)
        if room < 1:
            bound = "the model's positions" if room == positions else "max_length"
            raise DataError(
                f"The prompt is too long: it has {tokens} tokens, {1 - room} more than {bound} allow"
                f"{' with thoughts' if thought else ''}. Shorten it."
            )
        return min(job.max_tokens, room)

    def job(
        self, tokens_per_call: int, max_tokens: int, thoughts: bool | None, thought_length: int | None,
        temperature: float, top_p: float, thought_temperature: float, stop: Sequence[str], think: str | None = None,
        reach: int | None = None,
    ) -> GenerationConfig:  # fmt: skip
        """Checks the settings of a call, see `generate`, and returns them."""
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; it must be 1 or more.")
        if isinstance(stop, str) or not all(stop):
            raise ConfigError(f"stop is {stop!r}; it must be a list of non-empty texts.")
        if thought_length is not None and thought_length < 1:
            raise ConfigError(
                f"thought_length is {thought_length}; it must be 1 or more. `thoughts` off generates without them."
            )
        if thoughts is None and think is None and thought_length:
            thoughts = True
        policy = self.model.check_policy(choose_policy(thoughts, think, self.model.think))
        sampling = Sampling(temperature, top_p, thought_temperature, policy)
        return GenerationConfig(
            self._plan(sampling, thought_length, reach, tokens_per_call), sampling, max_tokens, tuple(stop)
        )

    def run(self, requests: Sequence[Request], job: GenerationConfig) -> Batch:
        """Returns a batch of up to `batch_size` requests, ready to be iterated."""
        needed = max(request.length for request in requests) if self.max_length is None else self.max_length
        return Batch(self._engine, self.model.tokenizer, requests, job, self._engine.cache_length(needed))

    def _plan(
        self, sampling: Sampling, thought_length: int | None, reach: int | None, tokens_per_call: int
    ) -> DecodeConfig:
        model, thinks = self.model, sampling.think != NEVER
        length = (thought_length or model.thought_length or 1) if thinks else 0  # 1: rejected, the model cannot think
        if reach not in (None, 1) and not thinks:
            raise ConfigError(f"reach is {reach}, but there are no thoughts. Omit `reach`, or let the model think.")
        settings = model.settings(length, reach=(model.own_reach() if reach is None else reach) if thinks else 1)
        if length and model.thought.control != "none":
            raise ConfigError(
                f"{model.path} was trained with the control {model.thought.control!r} instead of thoughts, so it has "
                "none. Set `thoughts` to off."
            )
        return DecodeConfig(
            thought=settings,
            think=sampling.think.name,
            sampled=sampling.temperature > 0,
            nucleus=sampling.temperature > 0 and sampling.top_p < 1,
            thoughts_sampled=bool(length) and sampling.thought_temperature > 0,
            forbidden=model.forbidden_ids,
            eos_ids=model.eos_ids,
            tokens_per_call=tokens_per_call,
        )


def _ids(prompt: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    """Token ids of a prompt that is not text.

    Raises:
      DataError: the prompt is not a one-dimensional sequence of integers.
    """
    wrong = DataError(f"A prompt is a text or a sequence of token ids, not {type(prompt).__name__}.")
    if not isinstance(prompt, Sequence) and np.ndim(prompt) != 1:
        raise wrong if np.ndim(prompt) == 0 else DataError(f"A prompt is [tokens], not of shape {np.shape(prompt)}.")
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise wrong
    ids = []
    for value in prompt:
        if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == np.bool_:
            raise DataError(f"A prompt of token ids contains {value!r}, which is not an integer.")
        try:
            ids.append(operator.index(value))
        except TypeError as error:
            raise DataError(f"A prompt of token ids contains {value!r:.80}, which is not an integer.") from error
    return tuple(ids)


def _key(seed: int, tokens: tuple[int, ...], occurrence: int) -> np.ndarray:
    """Key data [2] uint32 that depends only on the arguments."""
    words = [seed, zlib.crc32(np.asarray(tokens, np.int64).tobytes()), occurrence]
    return np.random.SeedSequence(words).generate_state(2)

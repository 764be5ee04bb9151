"""Samples several thoughts at the positions of given texts, and scores each of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.data.begin_of_text import without_begin
from quietstar_jax.data.documents import Documents
from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.inference.load_model import LoadedModel
from quietstar_jax.methods.thinking import ALWAYS, ThinkPolicy
from quietstar_jax.models.parameters import GraphDef, merge
from quietstar_jax.thoughts.controls import draw_uniforms
from quietstar_jax.thoughts.perturbations import draw_perturbations
from quietstar_jax.thoughts.score_predictions import Thinking
from quietstar_jax.thoughts.score_tokens import score_tokens
from quietstar_jax.thoughts.score_use import UseWanted
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.token_scores import TokenScores

LIKELIEST = 5  # number of next tokens that are kept
ROWS = 8  # windows per batch at most


@dataclasses.dataclass(frozen=True)
class Window:
    """A span of a document, which the model reads without the text before it."""

    document: int
    tokens: np.ndarray  # int32 [tokens], at least two


@dataclasses.dataclass(frozen=True)
class Observed:
    """The content of the page: windows in the order of the text, with the thoughts of one model."""

    model: LoadedModel
    settings: ThoughtSettings
    windows: Sequence[Window]
    observations: Sequence[TokenScores]  # of each window, as from `observe`
    about: str = ""  # the kind of text, if the reader may not know it
    notes: Sequence[str] = ()  # how the page was made, and what was left out
    use: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as from `measure_use`; empty: not measured
    selective: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as from `measure_selective`, or empty


def thinking_rate(observations: Sequence[TokenScores]) -> float:
    """Returns the share of the tokens that have thoughts, within 0 .. 1."""
    return float(np.concatenate([scores.made_thoughts[0] for scores in observations]).mean())


def cut_windows(
    model: LoadedModel, source: Documents | Sequence[np.ndarray], *, documents: int, max_tokens: int, length: int
) -> list[Window]:
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
    model: LoadedModel, settings: ThoughtSettings, windows: Sequence[Window], *, samples: int, seed: int,
    kinds: Sequence[str] | None = None, think: ThinkPolicy = ALWAYS, among: np.ndarray | None = None,
) -> list[TokenScores]:  # fmt: skip
    """Thinks at the positions of every window that the policy chooses: once greedily, and `samples` times at random.

    Args:
      kinds: of perturbations; given, the scores have `use`.
      think: policy; where it does not think, the predictions after thoughts are those without.
      among: [windows, tokens of the longest] bool, the policy chooses among these positions; None = among all. With
        `ALWAYS` among all, the scores have `rankings`.

    Returns:
      For each window of n tokens the scores of its n - 1 predictions, [n-1] without and [R, n-1] with thoughts, with
      the `LIKELIEST` tokens; the first of the R thoughts is the greedy one. Position j is that before token j + 1.
    """
    length = -(-max(len(window.tokens) for window in windows) // 8) * 8
    fixed = model.graphdef, settings, samples, None if kinds is None else tuple(kinds), think
    found = []
    rows = min(ROWS, len(windows))
    for start in range(0, len(windows), rows):
        part = windows[start : start + rows]
        tokens, mask = np.full((rows, length), settings.pad_id, np.int32), np.zeros((rows, length), bool)
        chosen = None
        if among is not None:
            chosen = np.zeros(mask.shape, bool)
            chosen[: len(part), : among.shape[1]] = among[start : start + rows]
        for row, window in enumerate(part):
            tokens[row, : len(window.tokens)], mask[row, : len(window.tokens)] = window.tokens, True
        key = jax.random.fold_in(jax.random.key(seed), start)
        scores = jax.device_get(_score(*fixed, model.params, tokens, mask, key, chosen))
        found += [scores.of_text(row, slice(len(window.tokens) - 1)) for row, window in enumerate(part)]
    return found


@functools.partial(jax.jit, static_argnums=range(5))
def _score(
    graphdef: GraphDef, settings: ThoughtSettings, samples: int, kinds: tuple[str, ...] | None,
    think: ThinkPolicy, params: Any, tokens: jax.Array, mask: jax.Array, key: jax.Array, among: jax.Array | None,
) -> TokenScores:  # fmt: skip
    """Scores a batch of windows, tokens [B, L], with `among` [B, L] or None; arguments as in `observe`.

    Not a closure, so that a later call with equal settings and shapes uses the compiled program.
    """
    rows, length = tokens.shape
    shape = (rows, 1 + samples, length, settings.thought_length)
    uniforms, use = draw_uniforms(key, shape), None
    if kinds is not None:
        use = UseWanted(kinds, draw_perturbations(jax.random.fold_in(key, 2), shape))
    thinking = Thinking.of_rows(think, tokens.shape, jax.random.fold_in(key, 3), among)
    return score_tokens(
        merge(graphdef, params), tokens, mask, None, jnp.arange(length), uniforms, settings, use=use,
        likeliest=LIKELIEST, thinking=thinking,
    )  # fmt: skip

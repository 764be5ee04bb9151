"""Nats per token and bits per byte of texts of any length, with and without thoughts, and where thoughts matter.

A long text is read in overlapping windows: only the last tokens of each window are scored, and the tokens before them
are context. Every token of every text is scored exactly once.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from quietstar_jax.data.sources import RandomAccessSource
from quietstar_jax.data.tokenization import Tokenizer
from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.evals.statistics import compare_paired, interval_of_ratio
from quietstar_jax.evals.tails import Continuation, ContinuationScorer
from quietstar_jax.evals.thought_use import summarize_use
from quietstar_jax.thoughts.ending import thought_ids
from quietstar_jax.thoughts.front import of_scores, summarize_front
from quietstar_jax.thoughts.score_figures import summarize
from quietstar_jax.thoughts.token_scores import TokenScores

BATCHES_AT_ONCE = 4  # of windows, per update of the progress bar
SHOWN_CONTEXT = 24  # tokens shown before a token


@dataclass(frozen=True)
class Windows:
    """How texts are cut into windows.

    Attributes:
      length: tokens of a window; context: minimum number of tokens before each scored token, except near the beginning
        of a text.
    """

    length: int
    context: int

    def __post_init__(self) -> None:
        if not 0 < self.context < self.length:
            raise ConfigError(
                f"context is {self.context}; it must be 1 .. {self.length - 1}, less than `window` ({self.length})."
            )

    def tails(self, tokens: Sequence[int]) -> Iterator[Continuation]:
        """Yields windows of a text; every token but the first is in the tail of exactly one window."""
        step = self.length - self.context
        for start in range(1, len(tokens), step):
            end = min(start + step, len(tokens))
            yield Continuation(tokens[max(0, end - self.length) : end], end - start)


class Moment(NamedTuple):
    """One token that a thought helped or harmed; `gain` is the size of the change in nats."""

    gain: float
    order: int
    tail: Continuation
    place: int  # index in the tail's tokens
    thought: tuple[int, ...]  # the first of several
    nll: tuple[float, float]  # without and with the thought
    weight: float


def measure_text(
    source: RandomAccessSource, texts: int, tokenizer: Tokenizer, begin: Sequence[int], scorer: ContinuationScorer,
    windows: Windows, top: int, seed: int, done: Callable[[float], object],
) -> dict[str, Any]:  # fmt: skip
    """Measures the first `texts` texts of a source.

    Args:
      begin: ids before every text, so that its first token is scored too.
      top: how many of the most helped and the most harmed tokens are returned.
      seed: of the bootstrap; done: called with the bytes of text just finished.

    Returns:
      `texts`, `tokens`, `bytes`; under `without_thoughts` and `with_thoughts` `nats_per_token` with its interval,
      `bits_per_byte`, and `accuracy` of the likeliest token; `comparison` over windows; `deciles` (see
      `score_figures.summarize`); `helped` and `harmed`; with a scorer that measures it, the use of thoughts (see
      `thought_use.summarize_use`); with a scorer that ranks positions, `front` (see `front.summarize_front`). With
      several random thoughts per position, figures are means over them.

    Raises:
      DataError: there is nothing to score.
    """
    columns: list[TokenScores] = []
    moments = _Extremes(top)
    size = text_bytes(source, texts)
    windowed = _windowed(source, texts, tokenizer, begin, windows)
    while group := list(itertools.islice(windowed, BATCHES_AT_ONCE * scorer.batch_size)):
        for (tail, share), score in zip(group, scorer([tail for tail, _ in group]), strict=True):
            columns.append(score)
            if score.thinks:
                moments.add(tail, score)
            done(share)
    if not columns:
        raise DataError(f"The {texts} texts contain no token to score. Give other text.")
    found: dict[str, Any] = {"texts": texts, "bytes": size, "window": windows.length, "context": windows.context}
    found |= summarize_windows(columns, size, seed)
    if columns[0].use is not None:
        found |= summarize_use(columns, seed, scorer.samples)
    if columns[0].rankings:
        found["front"] = summarize_front(of_scores(columns, one_answer=False))
    return found | (moments.shown(tokenizer) if "with_thoughts" in found else {})


def summarize_windows(columns: Sequence[TokenScores], size: int, seed: int) -> dict[str, Any]:
    """Computes the figures of `measure_text`.

    Args:
      columns: the scored tokens of each window, [tokens]; size: bytes of all texts.
    """
    summary = summarize(jax.tree.map(lambda *x: np.concatenate(x), *columns))
    thinks = columns[0].thinks
    counts = np.array([column.base.nll.size for column in columns])
    nll = {"without_thoughts": np.array([column.base.nll.sum(dtype=np.float64) for column in columns])}
    if thinks:
        nll["with_thoughts"] = np.array([column.talk.nll.sum(dtype=np.float64) for column in columns])
    found: dict[str, Any] = {"tokens": int(counts.sum())}
    for mode, per_window in nll.items():
        found[mode] = {
            "nats_per_token": float(per_window.sum() / counts.sum()),
            "nats_per_token_interval": interval_of_ratio(per_window, counts, seed),
            "bits_per_byte": float(per_window.sum() / math.log(2) / size),
            "accuracy": summary[f"accuracy_{mode}"],
        }
    if "thinking_rate" in summary:
        found["with_thoughts"]["thinking_rate"] = summary["thinking_rate"]
    dropped = () if thinks else ("loss_with_thoughts", "mixing_weight")
    found["deciles"] = [{name: row[name] for name in row if name not in dropped} for row in summary["deciles"]]
    if thinks:
        # Divided by the mean count, not each window's own, so that the difference is that of the two figures above.
        shares = nll["with_thoughts"] / counts.mean(), nll["without_thoughts"] / counts.mean()
        found["comparison"] = {"nats_per_token": compare_paired(*shares, seed)}
        found |= {name: summary[name] for name in ("mixing_weight", "thought_entropy", "unique_thought_rate")}
    return found


def text_bytes(source: RandomAccessSource, texts: int) -> int:
    """Number of bytes of the first `texts` texts of a source, in UTF-8."""
    return sum(len(source[number].encode()) for number in range(texts))


def _windowed(
    source: RandomAccessSource, texts: int, tokenizer: Tokenizer, begin: Sequence[int], windows: Windows
) -> Iterator[tuple[Continuation, float]]:
    """Yields the windows of all texts, numbered, each with its share of the bytes; one text is in memory at a time."""
    windows_before = itertools.count()
    for number in range(texts):
        text = source[number]
        tokens = tokenizer.encode_text(text, begin)
        per_token = len(text.encode()) / max(1, len(tokens) - 1)
        for tail in windows.tails(tokens):
            yield tail._replace(number=next(windows_before)), tail.last * per_token


class _Extremes:
    """Keeps the tokens that thoughts helped and harmed most, of all that are added."""

    def __init__(self, top: int):
        self._top = top
        self._helped: list[Moment] = []  # heaps
        self._harmed: list[Moment] = []
        self._order = itertools.count()  # breaks ties, earlier tokens first

    def add(self, tail: Continuation, score: TokenScores) -> None:
        """Adds the most helped and most harmed tokens of one window."""
        gain = score.base.nll - score.talk.nll
        order, shown = np.argsort(gain, kind="stable"), score.thought_places()
        for heap, sign, places in ((self._helped, 1, order[::-1]), (self._harmed, -1, order)):
            for place in places[: self._top]:
                if sign * gain[place] <= 0:
                    break
                moment = Moment(
                    sign * float(gain[place]), -next(self._order), tail, len(tail.tokens) - tail.last + int(place),
                    thought_ids(score.thoughts[shown[place]]) if shown[place] >= 0 else (),
                    (float(score.base.nll[place]), float(score.talk.nll[place])),
                    float(score.weight[place]),
                )  # fmt: skip
                if len(heap) < self._top:
                    heapq.heappush(heap, moment)
                elif moment > heap[0]:
                    heapq.heapreplace(heap, moment)
                else:
                    break

    def shown(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Returns `helped` and `harmed`, the largest change first."""

        def line(moment: Moment) -> dict[str, Any]:
            before = moment.tail.tokens[max(0, moment.place - SHOWN_CONTEXT) : moment.place]
            return {
                "context": tokenizer.decode(before),
                "token": tokenizer.decode([moment.tail.tokens[moment.place]]),
                "thought": tokenizer.decode(moment.thought),
                "nats_without_thoughts": moment.nll[0],
                "nats_with_thoughts": moment.nll[1],
                "mixing_weight": moment.weight,
            }

        pairs = (("helped", self._helped), ("harmed", self._harmed))
        return {name: [line(moment) for moment in sorted(heap, reverse=True)] for name, heap in pairs}

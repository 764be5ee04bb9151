"""Loss and answers at each thinking rate of a policy, over all of its thresholds, from one pass.

The pass gives the predictions without and with a thought at every position, and the quantity that a policy compares
with its threshold (`methods.thinking.Ranking`). A policy at one threshold uses the predictions with thoughts at the
first k positions of a sort by this quantity, so running sums over the sort are the figures of all thresholds:

    4 positions, by entropy    3.1    2.0    2.0    0.4
    loss without               2      1      1      1
    loss with                  1      .5     .5     2

    k                   0      1      3      4
    mean loss           5/4    4/4    3/4    4/4

Positions with equal quantities think together: there is no k = 2.

A band of the entropy has two thresholds: positions i to k of the sort think. `best_bands` finds the band with the
lowest loss for each number of positions. It is chosen on the same positions on which it is measured, so its
loss is optimistic for other text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from quietstar_jax.methods.thinking import ALWAYS, NEVER, THINKING, ThinkPolicy
from quietstar_jax.thoughts.token_scores import TokenScores

BANDS = "entropy_band"  # name of the best bands among the policies
POINTS = 200  # of a policy, at about equal steps of the share
SHARE, KEPT = 0.15, 0.97  # bounds of the two points that summarize a policy, see `summarize_front`


class Positions(NamedTuple):
    """N positions with both predictions of the next token, and M answers whose tokens are among these.

    Attributes:
      base_nll, talk_nll: [N] nats, without and with a thought.
      base_correct, talk_correct: [N] bool, whether the true token is the most likely one.
      answer: [N] int, number of the answer that the next token belongs to, 0 .. M - 1; -1 = none. An answer is right
        if all of its tokens are.
      rankings: [N] each, by name of the policy.
    """

    base_nll: np.ndarray
    talk_nll: np.ndarray
    base_correct: np.ndarray
    talk_correct: np.ndarray
    answer: np.ndarray
    rankings: Mapping[str, np.ndarray]


class Front(NamedTuple):
    """A policy at its P different thresholds, from `never` to `always`; float64 [P] each.

    Attributes:
      share: share of the positions that think; loss: nats per token; right: share of the answers that are right.
      kept: share of the answers that are right with all thoughts and remain right; NaN if there are none. With one
        threshold, it never falls with the share: each token of these answers is right with its thought.
      threshold: -inf or inf where the policy is `never` or `always`.
      most: the upper bound of a band; None for policies with one threshold.
    """

    share: np.ndarray
    loss: np.ndarray
    right: np.ndarray
    kept: np.ndarray
    threshold: np.ndarray
    most: np.ndarray | None = None


def of_scores(columns: Sequence[TokenScores], *, one_answer: bool) -> Positions:
    """Returns the positions of texts or answers.

    Args:
      columns: one for each text or answer, [tokens], with `rankings`, as from `ContinuationScorer` with `ranked`.
      one_answer: whether each of `columns` is one answer; otherwise each token counts as an answer.
    """
    base, talk = ([getattr(column, name) for column in columns] for name in ("base", "talk"))
    counts = [len(column.base.nll) for column in columns]
    return Positions(
        np.concatenate([one.nll for one in base]),
        np.concatenate([one.nll for one in talk]),
        np.concatenate([one.correct for one in base]).astype(bool),
        np.concatenate([one.correct for one in talk]).astype(bool),
        np.repeat(np.arange(len(columns)), counts) if one_answer else np.arange(sum(counts)),
        {name: np.concatenate([column.rankings[name] for column in columns]) for name in columns[0].rankings},
    )


def trace(positions: Positions, name: str) -> Front:
    """Returns the figures of the policy with this name at every threshold."""
    order, gain, ks, threshold = _sort(positions, name)
    loss = positions.base_nll.mean(dtype=np.float64) - gain / len(order)
    right, kept = _answers(positions, order)
    return Front(ks / len(order), loss[ks], right[ks], kept[ks], threshold)


def best_bands(positions: Positions, shares: np.ndarray) -> Front:
    """Returns the bands of the entropy with the lowest loss, one for each share at most; shares: ascending [P]."""
    order, gain, ks, threshold = _sort(positions, "entropy")
    total, gain = len(order), gain[ks]
    bands = set()
    for size in np.floor(shares * total + 1e-6):
        # The longest band from every start, and to every end: equal entropies can make it smaller.
        starts, ends = np.flatnonzero(ks + size <= total), np.flatnonzero(ks >= size)
        firsts = np.r_[starts, np.searchsorted(ks, ks[ends] - size)]
        ends = np.r_[np.searchsorted(ks, ks[starts] + size, side="right") - 1, ends]
        best = int(np.argmax(gain[ends] - gain[firsts]))
        bands.add((int(firsts[best]), int(ends[best])))
    first, end = np.array(sorted(bands, key=lambda band: ks[band[1]] - ks[band[0]])).T
    numbers = np.unique(positions.answer, return_inverse=True)
    answers = [_answers_of(positions, numbers, order[ks[i] : ks[j]]) for i, j in zip(first, end, strict=True)]
    right, kept = np.array(answers).T
    loss = positions.base_nll.mean(dtype=np.float64) - (gain[end] - gain[first]) / total
    return Front((ks[end] - ks[first]) / total, loss, right, kept, threshold[end], threshold[first])


def _sort(positions: Positions, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sorts the positions by the quantity of a policy.

    Returns:
      order: [N]; gain: [N + 1], sum of the gains of the first 0 .. N positions, in nats; ks: [P], the k at which a
      threshold can be; threshold: [P].
    """
    value = np.asarray(positions.rankings[name], np.float64)
    ranking = THINKING[name].traits["ranking"]
    order = ranking.order(value)
    value = value[order]
    gain = (positions.base_nll.astype(np.float64) - positions.talk_nll)[order]
    # A threshold is halfway between two different values; the first and the last k (`never`, `always`) need none.
    ks = np.flatnonzero(np.r_[True, value[1:] != value[:-1], True])
    between = (value[ks[1:-1] - 1] + value[ks[1:-1]]) / 2
    ends = (math.inf, -math.inf) if ranking.largest_first else (-math.inf, math.inf)
    return order, np.r_[0, np.cumsum(gain)], ks, np.r_[ends[0], between, ends[1]]


def _answers_of(
    positions: Positions, numbered: tuple[np.ndarray, np.ndarray], thinking: np.ndarray
) -> tuple[float, float]:
    """Returns (share of the answers that are right, share that is kept) if these positions think.

    Args:
      numbered: (numbers that occur in `positions.answer`, index of each position's); thinking: indices.
    """
    numbers, answer = numbered
    made = np.zeros(len(positions.answer), bool)
    made[thinking] = True

    def right(correct: np.ndarray) -> np.ndarray:
        return (np.bincount(answer, weights=~correct, minlength=len(numbers)) == 0)[numbers >= 0]

    here, always = right(np.where(made, positions.talk_correct, positions.base_correct)), right(positions.talk_correct)
    with np.errstate(invalid="ignore"):  # 0 / 0 where there is no answer
        return here.sum() / np.int64(len(here)), (here & always).sum() / always.sum()


def _answers(positions: Positions, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (share of the answers that are right, share that is kept), [N + 1], after 0 .. N positions of the order.

    An answer is right from the k at which the last of its tokens that is wrong without a thought thinks, until the
    first of those that are wrong with one thinks.
    """
    total, of_answer = len(order), positions.answer >= 0
    rank = np.empty(total, int)
    rank[order] = np.arange(total)
    rank = rank[of_answer]
    numbers, answer = np.unique(positions.answer[of_answer], return_inverse=True)
    first, last = np.zeros(len(numbers), int), np.full(len(numbers), total)
    wrong_without, wrong_with = (~x[of_answer] for x in (positions.base_correct, positions.talk_correct))
    np.maximum.at(first, answer[wrong_without], rank[wrong_without] + 1)
    np.minimum.at(last, answer[wrong_with], rank[wrong_with])

    def share(counted: np.ndarray) -> np.ndarray:
        """Share of the counted answers that are right; counted: bool, per answer."""
        ever = counted & (first <= last)
        changes = np.zeros(total + 2)
        np.add.at(changes, first[ever], 1)
        np.add.at(changes, last[ever] + 1, -1)
        with np.errstate(invalid="ignore"):  # 0 / 0 where no answer is counted
            return np.cumsum(changes)[:-1] / counted.sum()

    return share(np.ones(len(numbers), bool)), share(last == total)


def summarize_front(positions: Positions, points: int = POINTS) -> dict[str, Any]:
    """Returns the figures of all policies as JSON values, at no more than about this many thinking rates of each.

    Keys: `positions` (N), `answers` (M), and `policies`, by name, with the best bands of the entropy as `BANDS`:

      points: one for each thinking rate, from `never` to `always`: `think` (the policy as text), `thinking_rate`,
        `nats_per_token`, `right` and `kept` as in `Front` (None instead of NaN);
      at_most_15_percent: the point with the largest thinking rate up to `SHARE`;
      keeps_97_percent: the point with the smallest thinking rate of those that keep at least `KEPT`; None if `kept`
        is NaN.
    """
    fronts = {name: trace(positions, name) for name in THINKING if name in positions.rankings}
    shares = np.linspace(0, 1, points)
    if "entropy" in fronts:
        fronts[BANDS] = best_bands(positions, np.unique([*shares, SHARE]))
    policies = {}
    for name, front in fronts.items():
        wanted = np.searchsorted(front.share, shares) if name != BANDS else np.arange(len(front.share))
        up_to = int(np.searchsorted(front.share, SHARE, side="right")) - 1
        enough = np.flatnonzero(front.kept >= KEPT)
        policies[name] = {
            "points": [_point(front, name, i) for i in np.unique(wanted)],
            "at_most_15_percent": _point(front, name, up_to),
            "keeps_97_percent": _point(front, name, int(enough[0])) if len(enough) else None,
        }
    answers = len(np.unique(positions.answer[positions.answer >= 0]))
    return {"positions": len(positions.answer), "answers": answers, "policies": policies}


def _point(front: Front, name: str, i: int) -> dict[str, Any]:
    policy = NEVER if front.share[i] == 0 else ALWAYS if front.share[i] == 1 else None
    if policy is None and front.most is not None:
        policy = ThinkPolicy("entropy", (max(float(front.threshold[i]), 0.0), float(front.most[i])))
    policy = policy or ThinkPolicy(name, (float(front.threshold[i]), *(n.default for n in _others(name))))
    return {
        "think": str(policy),
        "thinking_rate": float(front.share[i]),
        "nats_per_token": float(front.loss[i]),
        "right": None if math.isnan(front.right[i]) else float(front.right[i]),
        "kept": None if math.isnan(front.kept[i]) else float(front.kept[i]),
    }


def _others(name: str) -> Sequence[Any]:
    return THINKING[name].traits["numbers"][1:]

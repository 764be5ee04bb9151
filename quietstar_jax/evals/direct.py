"""Direct answers: the probability of the right answer after a question and `A:`, without written-out steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from quietstar_jax.errors import DataError
from quietstar_jax.evals.answers import AnswerWriter, WrittenAnswer
from quietstar_jax.evals.questions import Question
from quietstar_jax.evals.statistics import compare_paired, confidence_interval
from quietstar_jax.evals.tails import Continuation, ContinuationScorer
from quietstar_jax.thoughts.front import of_scores, summarize_front
from quietstar_jax.thoughts.token_scores import Prediction

METRICS = {
    "official_probability": "official metric (probability)",
    "accuracy": "accuracy",
    "exact_match": "exact match (greedy)",
}


class AnswerScores(NamedTuple):
    """Scores of one question; see `score_answer`."""

    official_probability: float
    accuracy: float
    exact_match: float


def score_answer(written: WrittenAnswer, prediction: Prediction) -> AnswerScores:
    """Computes the three scores of one question.

    `official_probability` is that of the published code: the product over the answer's tokens, line end included, of
    the probability of the right token among the allowed ones; tokens of the answer that are not allowed (a space, a
    point) are skipped. `accuracy` is 1 if the most likely label is right; for numbers, if the likeliest allowed token
    is right at every token, line end included. `exact_match` is 1 if greedy decoding over the whole vocabulary produces
    this answer and ends it.

    Args:
      prediction: [P] of the answer's tokens, with the allowed ones as candidates.
    """
    answer = np.array(written.tokens[-written.last :])
    allowed = np.array(written.allowed)
    looked_at = np.flatnonzero(np.isin(answer, allowed))
    log_probs = prediction.candidates[looked_at].astype(np.float64)
    right = np.array([int(np.flatnonzero(allowed == token)[0]) for token in answer[looked_at]])
    rows = np.arange(len(right))
    log_share = log_probs[rows, right] - np.logaddexp.reduce(log_probs, axis=1)
    if written.is_choice:
        choosing = ~np.isin(answer[looked_at], written.end)
        choices = np.where(np.isin(allowed, written.end), -np.inf, log_probs)
        correct = (choices.argmax(axis=1) == right)[choosing].all()
    else:
        correct = (log_probs.argmax(axis=1) == right).all()
    return AnswerScores(float(np.exp(log_share.sum())), float(correct), float(prediction.correct.all()))


def measure_answers(
    questions: Sequence[Question], writer: AnswerWriter, scorer: ContinuationScorer, longest: int, seed: int,
    done: Callable[[int], object],
) -> dict[str, Any]:  # fmt: skip
    """Measures all questions without thoughts and, if the scorer thinks, with thoughts.

    Args:
      longest: maximum tokens of a question with its answer; longer ones are counted and left out, never cropped.
      seed: of the bootstrap; done: called with the number of questions just finished.

    Returns:
      the number of `questions` measured and `too_long`; under `without_thoughts` and `with_thoughts` the mean of each
      of `METRICS` with its confidence interval (`..._interval`), and `thinking_rate` if a policy chooses the positions
      that think; `comparison` by metric if both were measured; with a scorer that ranks positions, `front` (see
      `front.summarize_front`) over the tokens of the answers.

    Raises:
      DataError: no question is short enough.
    """
    written = [writer.write(question) for question in questions]
    fitting = [answer for answer in written if len(answer.tokens) <= longest]
    done(len(written) - len(fitting))
    if not fitting:
        shortest = min(len(answer.tokens) for answer in written)
        raise DataError(
            f"All {len(written)} questions are longer than {longest} tokens (the shortest has {shortest}). Increase "
            "`max_length` if the model allows it, or measure a model with more positions."
        )
    tails = [Continuation(one.tokens, one.last, one.allowed, number) for number, one in enumerate(fitting)]
    scores = scorer(tails, done)
    predictions = {"without_thoughts": [score.base for score in scores]}
    if scores[0].thinks:
        predictions["with_thoughts"] = [score.talk for score in scores]
    values = {
        mode: AnswerScores(*np.array(list(map(score_answer, fitting, found))).T)._asdict()
        for mode, found in predictions.items()
    }
    found = summarize_answers(values, seed)
    if scores[0].made is not None:
        found["with_thoughts"]["thinking_rate"] = float(np.concatenate([score.made for score in scores]).mean())
    if scores[0].rankings:
        found["front"] = summarize_front(of_scores(scores, one_answer=True))
    return {
        "questions": len(fitting),
        "too_long": len(written) - len(fitting),
        "longest_tokens": longest,
        **found,
    }


def summarize_answers(values: Mapping[str, Mapping[str, np.ndarray]], seed: int) -> dict[str, Any]:
    """Means, intervals and the paired comparison of values by mode, metric and question."""
    found: dict[str, Any] = {}
    for mode, by_metric in values.items():
        found[mode] = {}
        for metric, per_question in by_metric.items():
            found[mode][metric] = float(per_question.mean())
            found[mode][f"{metric}_interval"] = confidence_interval(per_question, seed)
    if len(values) == 2:
        pairs = (values["with_thoughts"], values["without_thoughts"])
        found["comparison"] = {
            metric: compare_paired(pairs[0][metric], pairs[1][metric], seed) for metric in pairs[0]
        }  # fmt: skip
    return found

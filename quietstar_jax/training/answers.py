"""Measures whether thinking helps to answer multi-step questions, on held-out questions of the embedded corpus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from quietstar_jax.data.synthetic import Document, answer_questions, is_useful
from quietstar_jax.thoughts.ending import thought_ids, thought_lengths
from quietstar_jax.thoughts.front import Positions, summarize_front
from quietstar_jax.thoughts.token_scores import TokenScores
from quietstar_jax.training.evaluation import AMONG, Scorer, score_batches
from quietstar_jax.training.setup import Run

QUESTIONS = 400
FRONT_POINTS = 20  # of each policy of thinking, in every record of an evaluation


def answer_batches(run: Run, documents: Sequence[Document]) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """Returns questions with answers as batches of evaluation size, and the position before each answer [documents]."""
    tokenizer, size = run.tokenizer, run.config.evaluation.batch_size
    begin = tokenizer.begins(run.config.data.prepend_bos)
    rows = [tokenizer.encode_text(f"{document.prompt} {document.answer}", begin) for document in documents]
    length = max(map(len, rows))
    tokens = np.full((-(-len(rows) // size) * size, length), run.vocabulary.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    batches = [{"tokens": tokens[i : i + size], "mask": mask[i : i + size]} for i in range(0, len(tokens), size)]
    return batches, np.array([len(ids) - 2 for ids in rows])


def think_before_answers(
    batches: list[dict[str, np.ndarray]], positions: np.ndarray, reach: int
) -> list[dict[str, np.ndarray]]:
    """Returns the batches of `answer_batches` with only those thoughts that are used for the answers."""
    size, length = batches[0]["tokens"].shape
    among = np.zeros((len(batches) * size, length), bool)
    among[np.arange(len(positions))[:, None], np.maximum(positions[:, None] - np.arange(reach), 0)] = True
    return [batch | {AMONG: among[i * size : (i + 1) * size]} for i, batch in enumerate(batches)]


def measure_answers(
    run: Run, scorer: Scorer, params: Any, between: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Returns answer accuracies without and with thoughts, and the rate of useful thoughts.

    An answer is correct if it is the most likely token; the thought before it is greedy. A thought is useful if it
    contains the correct steps; this rate is measured for greedy and for sampled thoughts. Rates are within 0 .. 1.
    Accuracies, and the rate of useful greedy thoughts, are also given by kind of question. If the model has a thinking
    gate, the figures of `answer_front` are included.

    Args:
      between: called before each batch.
    """
    documents = answer_questions(seed=run.config.seed, count=QUESTIONS)
    batches, positions = answer_batches(run, documents)
    needed = think_before_answers(batches, positions, run.config.evaluation.reach)
    rank_key = jax.random.fold_in(run.key, QUESTIONS + 1) if run.config.thought.gate else None
    # Rankings need thoughts at all positions.
    scores = score_batches(scorer, params, needed if rank_key is None else batches, between=between, rank_key=rank_key)
    at = (np.arange(len(documents)), positions)
    without, with_thoughts = scores.base.correct[at], scores.talk.correct[at]
    sampled = scores
    if scores.thinks:
        sampled = score_batches(scorer, params, needed, jax.random.fold_in(run.key, QUESTIONS), between)

    def useful_thoughts(thoughts: np.ndarray) -> np.ndarray:
        words = [run.tokenizer.decode(thought_ids(thought)).split() for thought in thoughts]
        return np.array([is_useful(*pair) for pair in zip(documents, words, strict=True)])

    useful = useful_thoughts(scores.thoughts[at])
    front = answer_front(scores, at) if scores.rankings else {}
    kinds = np.array([document.kind for document in documents])
    return {
        "answer_accuracy_without_thoughts": float(without.mean()),
        "answer_accuracy_with_thoughts": float(with_thoughts.mean()),
        "useful_thought_rate": float(useful.mean()),
        "useful_sampled_thought_rate": float(useful_thoughts(sampled.thoughts[at]).mean()),
        "answer_thought_length": float(thought_lengths(scores.thoughts[at]).mean()),
        "answer_sampled_thought_length": float(thought_lengths(sampled.thoughts[at]).mean()),
        "answer_mixing_weight": float(scores.weight[at].mean()),
        "answer_loss_without_thoughts": float(scores.base.nll[at].mean()),
        "answer_loss_with_thoughts": float(scores.talk.nll[at].mean()),
        "answers_by_kind": {
            kind: {
                "without_thoughts": float(without[kinds == kind].mean()),
                "with_thoughts": float(with_thoughts[kinds == kind].mean()),
                "useful_thoughts": float(useful[kinds == kind].mean()),
            }
            for kind in dict.fromkeys(kinds.tolist())
        },
        **front,
    }


def answer_front(scores: TokenScores, at: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """Returns what each policy of thinking keeps of the answers if only some positions of the questions think.

    A position predicts one token of a question or its answer.

    Args:
      scores: [rows, L], with `rankings`; at: (row, position) of each answer.

    Returns:
      `answers_kept_POLICY`: of the answers that are right with all thoughts, the share that remains right if at most
      15 % of the positions think, 1 if there are none; `thinking_rate_POLICY`: the smallest share of positions that
      keeps 97 %, 0 if there are none. `answer_front`: as from `summarize_front`.
    """
    answer = np.full(scores.real.shape, -1)
    answer[at] = np.arange(len(at[0]))
    found = jax.tree.map(lambda x: x[scores.real], (scores.base, scores.talk, answer, scores.rankings))
    base, talk, answer, rankings = found
    front = summarize_front(Positions(base.nll, talk.nll, base.correct, talk.correct, answer, rankings), FRONT_POINTS)
    figures: dict[str, Any] = {"answer_front": front}
    for name, policy in front["policies"].items():
        kept, enough = policy["at_most_15_percent"]["kept"], policy["keeps_97_percent"]
        figures[f"answers_kept_{name}"] = 1.0 if kept is None else kept
        figures[f"thinking_rate_{name}"] = enough["thinking_rate"] if enough else 0.0
    return figures

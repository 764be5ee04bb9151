"""Chains of thought with a majority vote (the paper's appendix): steps written out, then a number; the samples vote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from quietstar_jax.errors import DataError
from quietstar_jax.evals.answers import QUESTION
from quietstar_jax.evals.numbers import find_number, parse_number
from quietstar_jax.evals.questions import Question
from quietstar_jax.evals.records import Records
from quietstar_jax.evals.statistics import compare_paired, confidence_interval, majority_accuracy
from quietstar_jax.inference.batch import thinking_rate
from quietstar_jax.inference.generator import Generator
from quietstar_jax.methods.thinking import parse_policy

STEPS = "\nA: Let's think step by step."
CONCLUSION = "\nTherefore, the answer (arabic numerals) is"
STOPS = ("Q:", "\n\n\n")  # the steps end where another question begins
ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Sampling:
    """How chains of thought are drawn.

    Attributes:
      samples: per question; temperature: of tokens, 0 = greedy; max_tokens: of the steps.
      thought_length: T where thoughts are on; think: at which positions; reach: for how many tokens each is used.
    """

    samples: int
    temperature: float
    max_tokens: int
    thought_length: int
    seed: int
    think: str = "always"
    reach: int = 1


class Vote(NamedTuple):
    """The answers of the samples of one question.

    Attributes:
      numbers: exact; None if the answer of a sample has no number.
      texts: steps, `CONCLUSION` and answer of each sample.
      thinking_rate: share of the generated tokens that have a thought; None unless a policy chooses them.
    """

    numbers: list[Fraction | None]
    texts: list[str]
    thinking_rate: float | None = None


def measure_votes(
    questions: Sequence[Question], generator: Generator, sampling: Sampling, modes: Sequence[str], longest: int,
    records: Records, done: Callable[[int], object],
) -> dict[str, Any]:  # fmt: skip
    """Measures all questions in all modes; questions that are already on record are not asked again.

    Args:
      modes: of `without_thoughts` and `with_thoughts`; longest: maximum tokens of question, steps and answer; a
        question that leaves no space for `max_tokens` of steps is counted and left out.
      done: called with the number of questions just finished, in each mode.

    Returns:
      `questions`, `too_long`; by mode `majority_accuracy` for k = 1 .. samples (the exact mean over all subsets of that
      size), `accuracy` of all samples' vote with its interval, `answered` (samples with a number); `comparison`.

    Raises:
      DataError: no question is short enough.
    """
    fitting = [question for question in questions if _tokens(generator, question) + sampling.max_tokens <= longest]
    if not fitting:
        shortest = min(_tokens(generator, question) for question in questions)
        raise DataError(
            f"No question leaves room for {sampling.max_tokens} tokens of steps: {longest} tokens are allowed, and the "
            f"shortest question needs {shortest} with its answer. Decrease `max_tokens`."
        )
    known = {
        (record["mode"], record["line"]): vote_of(record["texts"], record.get("thinking_rate"))
        for record in records.found
    }
    at_once = max(1, generator.batch_size // sampling.samples)
    for mode in modes:
        done(len(questions) - len(fitting))
        open_questions = [question for question in fitting if (mode, question.line) not in known]
        done(len(fitting) - len(open_questions))
        for start in range(0, len(open_questions), at_once):
            group = open_questions[start : start + at_once]
            votes_of = ask(group, generator, sampling, mode == "with_thoughts", longest)
            for question, vote in zip(group, votes_of, strict=True):
                numbers = [None if number is None else str(number) for number in vote.numbers]
                rate = {} if vote.thinking_rate is None else {"thinking_rate": vote.thinking_rate}
                records.append({"mode": mode, "line": question.line, "numbers": numbers, "texts": vote.texts, **rate})
                known[mode, question.line] = vote
            done(len(group))
    votes = {mode: [known[mode, question.line] for question in fitting] for mode in modes}
    found = {"questions": len(fitting), "too_long": len(questions) - len(fitting), "longest_tokens": longest}
    return found | summarize_votes(votes, [question.answer for question in fitting], sampling.seed)


def ask(
    group: Sequence[Question], generator: Generator, sampling: Sampling, thoughts: bool, longest: int
) -> list[Vote]:
    """Samples answers to a group of questions; no sample depends on the others."""
    prompts = [f"{QUESTION}{question.text}{STEPS}" for question in group for _ in range(sampling.samples)]
    settings: dict[str, Any] = {
        "temperature": sampling.temperature,
        "thoughts": thoughts,
        "think": sampling.think if thoughts else None,
        "thought_length": sampling.thought_length if thoughts else None,
        "reach": sampling.reach if thoughts else None,
        "seed": [_seed(sampling.seed, question.line, i) for question in group for i in range(sampling.samples)],
    }
    begin = generator.model.tokenizer.fast.bos_token  # some models begin another text where they should end one
    stop = STOPS if begin is None else (*STOPS, begin)
    steps = generator.generate(prompts, max_tokens=sampling.max_tokens, stop=stop, **settings)
    written = [
        _steps_that_fit(generator, prompt, one.text, longest) for prompt, one in zip(prompts, steps, strict=True)
    ]
    texts = [(prompt + text).rstrip() + CONCLUSION for prompt, text in zip(prompts, written, strict=True)]
    answers = generator.generate(texts, max_tokens=ANSWER_TOKENS, stop=("\n",), **settings)
    votes, chooses = [], thoughts and parse_policy(sampling.think).constant is None
    for start in range(0, len(texts), sampling.samples):
        own = range(start, start + sampling.samples)
        whole = [written[i].rstrip() + CONCLUSION + answers[i].text for i in own]
        made = [one for i in own for one in (steps[i], answers[i])]
        votes.append(vote_of(whole, thinking_rate(made) if chooses else None))
    return votes


def vote_of(texts: list[str], rate: float | None = None) -> Vote:
    """Returns the vote of samples with these texts; numbers are parsed again, also from records of older versions."""
    return Vote([find_number(text.rpartition(CONCLUSION)[2]) for text in texts], texts, rate)


def summarize_votes(votes: dict[str, list[Vote]], answers: Sequence[str], seed: int) -> dict[str, Any]:
    """Computes the figures of `measure_votes`, by mode and in comparison."""
    found: dict[str, Any] = {}
    values: dict[str, np.ndarray] = {}
    for mode, per_question in votes.items():
        pairs = list(zip(per_question, map(parse_number, answers), strict=True))
        samples = len(per_question[0].numbers)
        accuracy = np.array(
            [[majority_accuracy(vote.numbers, right, k + 1) for k in range(samples)] for vote, right in pairs]
        )
        values[mode] = accuracy[:, -1]
        found[mode] = {
            "majority_accuracy": {str(k + 1): float(rate) for k, rate in enumerate(accuracy.mean(axis=0))},
            "accuracy": float(values[mode].mean()),
            "accuracy_interval": confidence_interval(values[mode], seed),
            "answered": float(np.mean([number is not None for vote in per_question for number in vote.numbers])),
        }
        rates = [vote.thinking_rate for vote in per_question if vote.thinking_rate is not None]
        if rates:
            found[mode]["thinking_rate"] = float(np.mean(rates))
    if len(values) == 2:
        found["comparison"] = {"accuracy": compare_paired(values["with_thoughts"], values["without_thoughts"], seed)}
    return found


def _tokens(generator: Generator, question: Question) -> int:
    """Number of tokens of everything but the steps."""
    return len(generator.encode(f"{QUESTION}{question.text}{STEPS}{CONCLUSION}")) + ANSWER_TOKENS


def _steps_that_fit(generator: Generator, prompt: str, steps: str, longest: int) -> str:
    """Cuts off the end of steps that leave no space for the answer: encoded again, a text can have more tokens."""
    while steps:
        asked = generator.encode((prompt + steps).rstrip() + CONCLUSION)
        excess = len(asked) + ANSWER_TOKENS - longest
        if excess <= 0:
            break
        steps = steps[: -max(1, excess // 4)]  # a character is at most four tokens
    return steps


def _seed(seed: int, line: int, sample: int) -> int:
    """Seed of one sample, independent of the questions asked before and of restarts."""
    return int(np.random.SeedSequence([seed, line, sample]).generate_state(1, np.uint64)[0] >> 1)

"""The official metric: which tokens it looks at, and its numbers worked by hand."""

import json

import numpy as np
import pytest

from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.errors import DataError
from quietstar_jax.evals.answers import AnswerWriter, WrittenAnswer
from quietstar_jax.evals.direct import score_answer
from quietstar_jax.evals.questions import Question
from quietstar_jax.thoughts.token_scores import Prediction
from tests.evals.models import bytes_tokenizer
from tests.material import material

# What the published evaluation lists for Mistral-7B: the digits 1 .. 9, 0, then A .. E, and the line end.
PUBLISHED_DIGITS = {28740, 28750, 28770, 28781, 28782, 28784, 28787, 28783, 28774, 28734}
PUBLISHED_LETTERS = (330, 365, 334, 384, 413)
PUBLISHED_END = 13

NUMBER = Question("How many?", "18", (), 1)
CHOICE = Question("Which?\n(A) one\n(B) two\n(C) three", "B", ("A", "B", "C"), 1)


def test_mistral_gets_the_published_tokens():
    tokenizer = load_tokenizer(str(material("tokenizers/mistral-7b-v0.1")))
    writer = AnswerWriter(tokenizer, [1])
    number = writer.write(NUMBER)
    assert set(number.allowed) == PUBLISHED_DIGITS | {PUBLISHED_END}
    assert number.tokens[-number.last :] == (28705, 28740, 28783, PUBLISHED_END)  # space, 1, 8, line end
    assert number.tokens[0] == 1
    letters = tuple("ABCDE")
    choice = writer.write(Question("Which?" + "".join(f"\n({x}) x" for x in letters), "C", letters, 1))
    assert choice.allowed == (*PUBLISHED_LETTERS, PUBLISHED_END)
    assert choice.tokens[-choice.last :] == (334, PUBLISHED_END)


def test_any_tokenizer_gets_its_own():
    plain = bytes_tokenizer()
    writer = AnswerWriter(plain, [])
    digits = [plain.encode(str(i))[0] for i in range(10)]
    end = plain.encode("\n")[0]
    assert writer.digit_tokens == tuple(sorted(digits))
    assert writer.end_tokens == (end,)
    assert writer.write(NUMBER).last == 4  # space, 1, 8, line end
    letters = tuple(plain.encode(x)[0] for x in "ABC")
    assert writer.write(CHOICE).allowed == (*letters, end)  # the space before them is shared


def test_where_only_some_spellings_hold_the_space_it_is_looked_at_too():
    """Else ` B` would meet no rival at its place: the tokenization alone would give the answer away."""
    merged = bytes_tokenizer("18", "Ġ1", "ĠB")
    writer = AnswerWriter(merged, [])
    space, end = merged.token_id("Ġ"), merged.encode("\n")[0]
    assert len(writer.digit_tokens) == 13  # the ten, `18`, ` 1` and the space
    assert space in writer.digit_tokens
    a, b, c = merged.encode("A")[0], merged.token_id("ĠB"), merged.encode("C")[0]
    choice = writer.write(CHOICE)
    assert choice.allowed == (a, b, c, space, end)
    assert choice.last == 2
    # ` B` against the space, behind which A or C would come: 0.3 of 0.3 + 0.5 + 2 * 0.05 + 0.1.
    shares = [[0.05, 0.3, 0.05, 0.5, 0.1], [0.0001, 0.0001, 0.0001, 0.0001, 0.9996]]
    found = scored(choice, shares, [space, end])
    assert found.official_probability == pytest.approx(0.3, rel=1e-3)
    assert found.accuracy == 0.0
    shares[0][1], shares[0][3] = 0.5, 0.3
    assert scored(choice, shares, [space, end]).accuracy == 1.0


def test_a_tokenizer_that_does_not_know_the_answer_is_refused():
    with pytest.raises(DataError, match="cannot represent the answer 'B'"):
        AnswerWriter(load_tokenizer("synthetic"), []).write(CHOICE)


def scored(written, probabilities, best):
    """The score of an answer from the probabilities of the allowed tokens, and the best tokens."""
    best, answer = np.array(best), np.array(written.tokens[-written.last :])
    return score_answer(written, Prediction(np.zeros(len(best)), best, best == answer, np.log(np.array(probabilities))))


def test_number_by_hand():
    # Answer ` 18\n` as (space, 1, 8, line end) = (50, 11, 18, 3); allowed: 11 ("1"), 18 ("8"), 3 (line end).
    written = WrittenAnswer((7, 7, 50, 11, 18, 3), 4, (11, 18, 3), (3,), False)
    shares = [
        [0.1, 0.1, 0.1],  # at the space: not an allowed token, passed over
        [0.30, 0.10, 0.20],  # 0.30 / 0.60
        [0.05, 0.15, 0.05],  # 0.15 / 0.25
        [0.02, 0.02, 0.06],  # 0.06 / 0.10
    ]
    found = scored(written, shares, [50, 11, 18, 3])
    assert found.official_probability == pytest.approx(0.5 * 0.6 * 0.6)
    assert found == (pytest.approx(0.18), 1.0, 1.0)
    # Over the whole vocabulary something else is likelier at the space: the answer is not written as it should be.
    assert scored(written, shares, [9, 11, 18, 3]).exact_match == 0.0
    # Going on to write digits after the answer is wrong, however likely its own digits are.
    shares[3] = [0.5, 0.1, 0.4]
    found = scored(written, shares, [50, 11, 18, 11])
    assert found == (pytest.approx(0.5 * 0.6 * 0.4), 0.0, 0.0)


def test_choice_by_hand():
    # Answer ` B\n` as (B, line end) = (31, 3); allowed: A, B, C and the line end.
    written = WrittenAnswer((7, 7, 31, 3), 2, (30, 31, 32, 3), (3,), True)
    shares = [[0.2, 0.4, 0.2, 0.2], [0.1, 0.1, 0.1, 0.7]]
    found = scored(written, shares, [31, 3])
    assert found == (pytest.approx(0.4 * 0.7), 1.0, 1.0)
    # The line end is likelier than every letter, but of the letters B leads: right as a choice, wrong as a text.
    shares[0] = [0.1, 0.2, 0.1, 0.6]
    assert scored(written, shares, [3, 3]) == (pytest.approx(0.2 * 0.7), 1.0, 0.0)
    shares[0] = [0.5, 0.2, 0.1, 0.2]
    assert scored(written, shares, [30, 3]).accuracy == 0.0


def test_all_of_gsm8k_and_commonsense_qa_can_be_written():
    from quietstar_jax.evals.questions import read_questions
    from quietstar_jax.evals.tasks import TASKS

    tokenizer = load_tokenizer(str(material("tokenizers/mistral-7b-v0.1")))
    writer = AnswerWriter(tokenizer, [1])
    files = {"gsm8k": "data/gsm8k/test.jsonl", "commonsense_qa": "data/commonsenseqa/dev_rand_split.jsonl"}
    for task, file in files.items():
        path = material(file)
        questions = read_questions(path, TASKS[task].layouts)
        with path.open() as lines:
            first = json.loads(next(lines))
        assert len(questions) == {"gsm8k": 1319, "commonsense_qa": 1221}[task]
        stem = first["question"] if task == "gsm8k" else first["question"]["stem"]
        assert tokenizer.decode(writer.write(questions[0]).tokens[1:]).startswith(f"Q: {stem}")
        for question in questions[::20]:
            text = tokenizer.decode(writer.write(question).tokens[1:])
            assert text.endswith(f"\nA: {question.answer}\n")
            assert text == f"Q: {question.text}\nA: {question.answer}\n"

import json

import pytest

from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.evals.questions import Layout, read_questions
from quietstar_jax.evals.tasks import TASKS, find_task, with_fields


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def questions_of(path, rows, layout):
    return read_questions(write_lines(path / "set.jsonl", rows), [layout])


def refusal(path, rows, layout):
    with pytest.raises(DataError) as error:
        questions_of(path, rows, layout)
    return str(error.value)


def test_numeric_answers_in_every_spelling(tmp_path):
    rows = [
        {"question": "a", "answer": "First 2.\nThen 3.\n#### 5"},
        {"question": "b", "answer": "1,000"},
        {"question": "c", "answer": 7},
        {"question": "d", "answer": 2.5},
        {"question": "e", "answer": 3.0},
        {"question": "f", "answer": "$18 "},
        {"question": "g", "answer": 1e-7},
        {"question": "h", "answer": 1.5e22},
        {"question": "i", "answer": 10**400},
    ]
    found = questions_of(tmp_path, rows, Layout("question", "answer"))
    large_and_small = ["0.0000001", "15000000000000000000000", "1" + 400 * "0"]
    assert [question.answer for question in found] == ["5", "1,000", "7", "2.5", "3", "$18", *large_and_small]
    assert found[1].line == 2


CHOICES = ["red", "green", "blue"]


@pytest.mark.parametrize(
    "choices",
    [
        CHOICES,
        {"label": ["A", "B", "C"], "text": CHOICES},
        {"label": ["(A)", "(B)", "(C)"], "text": CHOICES},
        {"A.": "red", "B.": "green", "C.": "blue"},
        [{"label": label, "text": text} for label, text in zip("ABC", CHOICES, strict=True)],
        dict(zip("ABC", CHOICES, strict=True)),
    ],
)
@pytest.mark.parametrize("answers", [["B", "C"], ["b", "(C)"], [1, 2], ["1", "2"], ["green", "blue"]])
def test_choices_and_keys_in_every_spelling(tmp_path, choices, answers):
    rows = [{"prompt": f"q{i}", "meta": {"key": key}, "options": choices} for i, key in enumerate(answers)]
    found = questions_of(tmp_path, rows, Layout("prompt", "meta.key", "options"))
    assert [question.answer for question in found] == ["B", "C"]
    assert found[0].text == "q0\n(A) red\n(B) green\n(C) blue"
    assert found[0].labels == ("A", "B", "C")


def test_the_whole_file_decides_what_a_key_means(tmp_path):
    numbers = [{"q": "?", "c": ["0", "1", "2"], "a": key} for key in ("2", "0")]
    layout = Layout("q", "a", "c")
    assert [question.answer for question in questions_of(tmp_path, numbers, layout)] == ["C", "A"]  # texts
    from_one = [{"q": "?", "c": CHOICES, "a": key} for key in (1, 3)]
    assert "read as index" in refusal(tmp_path, from_one, layout)
    said = Layout("q", "a", "c", "index-from-1")
    assert [question.answer for question in questions_of(tmp_path, from_one, said)] == ["A", "C"]
    mixed = [{"q": "?", "c": CHOICES, "a": key} for key in ("A", "B", "violet")]
    assert "line 3" in refusal(tmp_path, mixed, layout)
    twice = [{"q": "?", "c": ["red", "red"], "a": "red"}]
    assert "names none of the choices" in refusal(tmp_path, twice, layout)


def test_a_limit_does_not_change_what_a_key_means(tmp_path):
    named = {"label": ["1", "2", "3", "4"], "text": ["red", "green", "blue", "grey"]}
    path = write_lines(tmp_path / "set.jsonl", [{"q": "?", "c": named, "a": key} for key in (2, 1, 4)])
    layout = Layout("q", "a", "c")
    assert [question.answer for question in read_questions(path, [layout])] == ["2", "1", "4"]
    assert [question.answer for question in read_questions(path, [layout], limit=2)] == ["2", "1"]


def test_two_keys_that_name_different_choices_are_refused(tmp_path):
    rows = [{"q": "?", "c": [1, 2, 3, 4], "a": key} for key in (2, 3)]
    said = refusal(tmp_path, rows, Layout("q", "a", "c"))
    assert 'line 1: the answer 2 is "2" read as text and "3" read as index' in said
    assert "`answer_key`" in said
    for key, answers in (("text", ["B", "C"]), ("index", ["C", "D"])):
        assert [one.answer for one in questions_of(tmp_path, rows, Layout("q", "a", "c", key))] == answers
    named = [{"q": "?", "c": {"1": "red", "2": "green", "3": "blue"}, "a": 1}]
    assert '"red" read as label and "green" read as index' in refusal(tmp_path, named, Layout("q", "a", "c"))


def test_both_spellings_of_commonsense_qa(tmp_path):
    published = {"answerKey": "A", "question": {"stem": "s", "choices": [{"label": x, "text": x} for x in "ABC"]}}
    on_the_hub = {"answerKey": "A", "question": "s", "choices": {"label": list("ABC"), "text": list("ABC")}}
    found = [
        read_questions(write_lines(tmp_path / "set.jsonl", [row]), TASKS["commonsense_qa"].layouts)
        for row in (published, on_the_hub)
    ]
    assert found[0] == found[1]


def test_refusals_say_where_and_what_to_do(tmp_path):
    layout, choice = Layout("question", "answer"), Layout("question", "answer", "choices")
    good = {"question": "a", "answer": "1"}
    assert "line 2: there is no field 'question'" in refusal(tmp_path, [good, {"q": "b", "answer": "1"}], layout)
    assert "`field` question=NAME" in refusal(tmp_path, [{"q": "b"}], layout)
    assert "is not one number" in refusal(tmp_path, [{"question": "a", "answer": "five"}], layout)
    assert "is not one number" in refusal(tmp_path, [{"question": "a", "answer": True}], layout)
    assert "must be a text" in refusal(tmp_path, [{"question": " ", "answer": "1"}], layout)
    assert "there is no field 'choices'" in refusal(tmp_path, [good], choice)
    assert "the choices are" in refusal(tmp_path, [{**good, "choices": ["one"]}], choice)
    assert "must all differ" in refusal(
        tmp_path, [{**good, "choices": {"label": ["A", "A"], "text": ["x", "y"]}}], choice
    )
    assert "is empty" in refusal(tmp_path, [], layout)
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "1"}\n{"question": \n')
    with pytest.raises(DataError, match="line 2: broken JSON"):
        read_questions(tmp_path / "broken.jsonl", [layout])
    (tmp_path / "array.jsonl").write_text('[{"question": "a"}]\n')
    with pytest.raises(DataError, match="element 1: there is no field 'answer'"):
        read_questions(tmp_path / "array.jsonl", [layout])
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        read_questions(tmp_path / "latin.jsonl", [layout])
    for row in ('"question": "half \\ud83d"', '"question": "a", "more": [{"\\udE00": 1}]'):
        (tmp_path / "half.jsonl").write_text(f'{{"question": "\\ud83d\\ude00", "answer": 1}}\n{{"answer": 1, {row}}}\n')
        with pytest.raises(DataError, match=r"half.jsonl, line 2: .*\\ud"):
            read_questions(tmp_path / "half.jsonl", [layout])
    with pytest.raises(DataError, match="There is no file or folder"):
        read_questions(tmp_path / "none.jsonl", [layout])


@pytest.mark.parametrize(
    "answer", [r"3\sqrt{2}", "(2, 5)", "x^2+1", "10:30", "12,5", "A-5", "1/0", "1e999", "18 apples"]
)
def test_an_answer_that_is_more_than_a_number_is_refused(tmp_path, answer):
    said = refusal(
        tmp_path,
        [{"question": "a", "answer": "1/2"}, {"question": "a", "answer": answer}],
        Layout("question", "answer"),
    )
    assert "line 2: the answer is" in said
    assert "`task` to multiple_choice" in said


def test_limit_counts_questions(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(
        '{"question": "a", "answer": 1}\n\n{"question": "b", "answer": 2}\n{"question": "c", "answer": 3}\n'
    )
    found = read_questions(path, [Layout("question", "answer")], limit=2)
    assert [(question.text, question.line) for question in found] == [("a", 1), ("b", 2)]


def test_tasks_and_fields_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="Did you mean gsm8k"):
        find_task("gsm8")
    own = TASKS["multiple_choice"]
    (layout,) = with_fields(own, ["question=prompt", "choices=options", "answer=key"], "label")
    assert layout == Layout("prompt", "key", "options", "label")
    for wrong in (["prompt=question"], ["question"], ["question="], ["question=a", "question=b"]):
        with pytest.raises(ConfigError, match="`field` is"):
            with_fields(own, wrong, "auto")
    with pytest.raises(ConfigError, match="`field` is"):
        with_fields(TASKS["numeric"], ["choices=options"], "auto")
    with pytest.raises(ConfigError, match="answer_key is"):
        with_fields(own, [], "letters")
    with pytest.raises(ConfigError, match="question sets"):
        with_fields(TASKS["language_modeling"], ["question=a"], "auto")

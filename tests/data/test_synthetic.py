"""The embedded corpus: what it holds, how often, and the floors of its losses."""

from __future__ import annotations

import collections
import itertools
import math
import pickle
import subprocess
import sys

import pytest

from quietstar_jax.data import synthetic
from quietstar_jax.data.synthetic import (
    ADDENDS,
    ASK,
    CHATTER,
    CLOSE,
    EVENTS,
    KINDS,
    NAMES,
    NODES,
    OPEN,
    SHOW,
    STEPS,
    STOP,
    UNITS,
    Document,
    SyntheticSource,
    answer_questions,
    build_tokenizer,
    is_useful,
    split_of,
)
from quietstar_jax.data_config import SyntheticConfig
from quietstar_jax.errors import DataError
from tests.data.synthetic_floors import floors

CONFIG = SyntheticConfig(
    documents=40_000, validation_documents=2_000, steps_fraction=0.375, chatter_fraction=0.125, stray_mark_rate=0.12
)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    source = SyntheticSource(CONFIG, split="train", seed=3)
    return [source.document(i) for i in range(len(source))]


@pytest.fixture(scope="module")
def held_out() -> list[Document]:
    source = SyntheticSource(CONFIG, split="validation", seed=3)
    return [source.document(i) for i in range(len(source))]


def entropy(items) -> float:
    """Of the empirical distribution, nats."""
    counts = collections.Counter(items)
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values())


def solve(question: tuple[str, ...]) -> list[str]:
    """The chain of a question, from its words alone and in another way than the generator's."""
    if "from" in question:
        pointers = dict(word.split(">") for word in question[: question.index("from")])
        chain = [question[-1]]
        for _ in range(STEPS - 1):
            chain.append(pointers[chain[-1]])
        return chain
    if question[0] == "sum":
        return [str(total % 10) for total in itertools.accumulate(map(int, question[1:]))]
    if question[0] == "convert":
        maps = [lambda x, u=unit: UNITS[u][0] * x + UNITS[u][1] for unit in question[2:]]
    else:
        assert question[0] in NAMES
        assert question[1] == "has"
        maps = [lambda x, e=event: x + EVENTS[e] for event in question[3:]]
        question = question[1:]
    return [str(x % 10) for x in itertools.accumulate(maps, lambda x, f: f(x), initial=int(question[1]))]


def test_a_document_depends_on_seed_split_and_index_only():
    source = SyntheticSource(CONFIG, split="train", seed=3)
    backwards = [source[i] for i in reversed(range(50))][::-1]
    assert backwards == [SyntheticSource(CONFIG, split="train", seed=3)[i] for i in range(50)]
    assert backwards != [SyntheticSource(CONFIG, split="train", seed=4)[i] for i in range(50)]
    assert len(set(backwards)) == 50
    forms = [
        [
            (document.kind, document.style)
            for document in map(SyntheticSource(CONFIG, split=split, seed=3).document, range(50))
        ]
        for split in ("train", "validation")
    ]
    assert forms[0] != forms[1]


def test_documents_are_the_same_in_another_process_and_after_pickling():
    source = SyntheticSource(CONFIG, split="train", seed=3)
    script = (
        "import sys, pickle; source = pickle.load(sys.stdin.buffer);"
        "print('\\n'.join(source[i] for i in range(20)), end='')"
    )
    result = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(source), capture_output=True, check=True)
    assert result.stdout.decode() == "\n".join(source[i] for i in range(20))


def test_length_bounds_and_unknown_split():
    source = SyntheticSource(CONFIG, split="validation", seed=0)
    assert len(source) == 2_000
    assert len(list(source)) == 2_000
    for index in (-1, 2_000):
        with pytest.raises(IndexError):
            source[index]
    with pytest.raises(DataError, match=r"'test'.*train and validation"):
        SyntheticSource(CONFIG, split="test", seed=0)


def test_splits_share_no_problem_under_any_seeds(documents):
    def essence(question: tuple[str, ...]) -> frozenset | tuple:
        if "from" in question:
            return frozenset(question[:-2]), question[-1]
        return question[1:] if question[0] in NAMES else question

    train = {essence(document.question) for document in documents}
    for seed in (3, 11):
        source = SyntheticSource(CONFIG, split="validation", seed=seed)
        assert not train & {essence(source.document(i).question) for i in range(2_000)}
    questions = answer_questions(seed=3, count=400)
    assert not train & {essence(document.question) for document in questions}
    assert len({essence(document.question) for document in questions}) >= 390  # the space is large


def test_split_ignores_the_name():
    stories = [synthetic._story(synthetic.Draw(i)) for i in range(20)]
    assert all(story.identity == " ".join(story.question[1:]) for story in stories)
    chases = [synthetic._chase(synthetic.Draw(i)) for i in range(20)]
    assert all(chase.identity.split() == [*chase.question[:-2], chase.question[-1]] for chase in chases)
    assert all(list(chase.question[:-2]) == sorted(chase.question[:-2]) for chase in chases)


def test_the_answer_is_the_hardest_token_of_a_document_that_answers_at_once():
    result = floors(CONFIG)
    for kind in KINDS[:-1]:
        assert (
            result[f"after_ask/guess/{kind}"] > max(map(math.log, (len(ADDENDS), len(UNITS), len(CHATTER), 10))) - 1e-9
        )


def test_one_problem_in_eight_is_held_out():
    splits = [split_of("sum", synthetic._sum(synthetic.Draw("share", i))) for i in range(8_000)]
    assert splits.count("validation") / 8_000 == pytest.approx(1 / 8, abs=0.015)


def test_steps_and_answers_are_right(documents, held_out):
    for document in (*documents[:4_000], *held_out):
        assert list(document.steps) == solve(document.question)
        assert document.answer == document.steps[-1]
        assert len(document.steps) == STEPS


def test_steps_by_hand():
    chains = {
        "sum 3 +1 +4 +1 +5 +9": "3 4 8 9 4 3",
        "kim has 4 wage fig gift lamp coat": "4 1 9 2 6 8",
        "convert 9 rod inch foot cup yard": "9 5 6 4 1 4",
        "a>c b>d c>f d>f e>c f>b from c": "c f b d f b",
    }
    for question, chain in chains.items():
        assert solve(tuple(question.split())) == chain.split()


def test_text_has_one_of_the_announced_forms(documents):
    for document in documents[:4_000]:
        words = document.text.split(" ")
        sign = ASK if document.style == "at_once" else SHOW
        assert document.prompt.split(" ") == [*document.question, sign]
        rest = words[len(document.question) + 1 :]
        passage = [OPEN, *document.passage, CLOSE] if document.passage else []
        assert rest == [*passage, document.answer, STOP]
        assert len(document.passage) in (0, STEPS)
        assert (document.style != "at_once") <= bool(document.passage)
        if document.style == "steps":
            assert document.passage == document.steps
        if document.style == "chatter":
            assert set(document.passage) <= set(CHATTER)
        assert len(document.question) <= 16
        assert len(words) <= 32


def test_styles_and_stray_marks_occur_as_often_as_configured(documents):
    total = len(documents)
    styles = collections.Counter(document.style for document in documents)
    assert styles["steps"] / total == pytest.approx(0.375, abs=0.01)
    assert styles["chatter"] / total == pytest.approx(0.125, abs=0.01)
    at_once = [document for document in documents if document.style == "at_once"]
    stray = [document for document in at_once if document.passage]
    assert len(stray) / len(at_once) == pytest.approx(0.12, abs=0.01)
    assert sum(document.passage == document.steps for document in stray) / len(stray) == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize(
    ("steps", "chatter", "stray", "expected"),
    [
        (1.0, 0.0, 0.5, {"steps"}),
        (0.0, 1.0, 0.5, {"chatter"}),
        (0.0, 0.0, 0.0, {"at_once"}),
        (0.5, 0.5, 1.0, {"steps", "chatter"}),
    ],
)
def test_extreme_mixtures(steps, chatter, stray, expected):
    config = SyntheticConfig(steps_fraction=steps, chatter_fraction=chatter, stray_mark_rate=stray)
    source = SyntheticSource(config, split="train", seed=0)
    documents = [source.document(i) for i in range(100)]
    assert {document.style for document in documents} == expected
    assert all(bool(document.passage) == (document.style != "at_once") for document in documents)
    assert all(math.isfinite(value) and value >= 0 for value in floors(config).values())


def test_kinds_and_answers_are_balanced(documents):
    for kind in KINDS:
        answers = collections.Counter(document.answer for document in documents if document.kind == kind)
        assert answers.total() / len(documents) == pytest.approx(0.25, abs=0.01)
        expected = 1 / (len(NODES) if kind == "chase" else 10)
        assert len(answers) == round(1 / expected)
        for count in answers.values():
            assert count / answers.total() == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("kind", ["sum", "story", "convert"])
@pytest.mark.parametrize("piece", [-1, -2, -5, -6])
def test_no_single_piece_tells_the_answer(documents, kind, piece):
    pairs = [(document.question[piece], document.answer) for document in documents if document.kind == kind]
    information = entropy(a for a, _ in pairs) + entropy(b for _, b in pairs) - entropy(pairs)
    assert information < 0.01  # nats; an estimate from 10,000 samples is biased up by about 0.004


def test_no_number_of_hops_is_the_answer_more_than_once_in_five(documents):
    chases = [document for document in documents if document.kind == "chase"]
    for hops in range(STEPS - 1):
        share = sum(document.steps[hops] == document.answer for document in chases) / len(chases)
        assert share == pytest.approx(0.0 if hops == 4 else 0.2, abs=0.015)


def test_every_word_is_one_known_token(documents, held_out):
    tokenizer = build_tokenizer()
    seen: set[int] = set()
    for document in (*documents[:5_000], *held_out):
        ids = tokenizer(document.text)["input_ids"]
        assert len(ids) == len(document.text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == document.text
        seen.update(ids)
    special = {tokenizer.convert_tokens_to_ids(word) for word in (*synthetic.SPECIAL.values(), *synthetic.META)}
    assert seen | special == set(range(len(tokenizer)))  # nothing unused, nothing twice
    assert len(set(synthetic.vocabulary())) == len(synthetic.vocabulary())
    assert 60 <= len(tokenizer) <= 150


def test_tokenizer_knows_its_special_tokens(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert (one.pad_token, one.unk_token, one.bos_token, one.eos_token) == ("<pad>", "<unk>", "<bos>", "<eos>")
        assert one("<|startthought|> 3 <|endthought|> nonsense")["input_ids"] == [
            one.convert_tokens_to_ids("<|startthought|>"), one.convert_tokens_to_ids("3"),
            one.convert_tokens_to_ids("<|endthought|>"), one.unk_token_id,
        ]  # fmt: skip
        assert one.decode(one("sum 3 <|endthought|>")["input_ids"], skip_special_tokens=True).strip() == "sum 3"


def test_answer_questions_are_held_out_at_once_and_balanced_over_kinds():
    questions = answer_questions(seed=5, count=42)
    assert questions == answer_questions(seed=5, count=42)
    assert questions != answer_questions(seed=6, count=42)
    assert [document.kind for document in questions[:5]] == [*KINDS, KINDS[0]]
    for document in questions:
        assert document.style == "at_once"
        assert document.passage == ()
        assert document.text == f"{document.prompt} {document.answer} ."
        assert document.prompt.endswith(" ask")


@pytest.mark.parametrize(
    ("thought", "useful"),
    [
        ("3 4 8 9 4 3", True),
        ("3 4 8 9 4 5", False),  # the last step is wrong
        ("3 4 8 0 4 3", False),  # one in the middle is wrong, the answer right
        ("4 8 9 4 3", False),  # the first is missing
        ("3 4 8 so 9 4 3", False),  # a gap
        ("well 3 4 8 9 4 3 )", True),  # longer, the steps in one piece
        ("3 3 4 8 9 4 3", True),
        ("", False),
    ],
)
def test_useful_thoughts_by_hand(thought, useful):
    question = ("sum", "3", "+1", "+4", "+1", "+5", "+9")
    document = Document("sum", "at_once", question, tuple("348943"), (), "3")
    assert is_useful(document, thought.split()) is useful


def test_floors_by_hand():
    result = floors(SyntheticConfig(steps_fraction=0.375, chatter_fraction=0.125, stray_mark_rate=0.0))
    assert result["sign"] == pytest.approx(math.log(2))
    assert result["chatter"] == pytest.approx(math.log(8))
    # A quarter of the passages is chatter: ln 4 - 3/4 ln 3 for which it is, a quarter of the time ln 8 for the word.
    assert result["passage_first"] == pytest.approx(math.log(4) - 0.75 * math.log(3) + 0.25 * math.log(8))
    assert result["answer/guess/sum"] == result["after_ask/guess/sum"] == pytest.approx(math.log(10))
    assert result["question/sum"] == pytest.approx((math.log(4) + math.log(10) + 5 * math.log(7)) / 7)
    assert result["after_ask/computed"] == result["step"] == result["answer_after_steps"] == 0.0
    # 4 kinds; question 7 + 8 + 7 + 8 tokens, sign, answer, stop, end; half of the documents add 8 for a passage.
    length = 30 / 4 + 4 + 8 / 2
    unguessable = (1 - 0.375) * (3 * math.log(10) + result["answer/guess/chase"]) / 4
    assert (result["document/guess"] - result["document/computed"]) * length == pytest.approx(unguessable)


def test_floors_by_monte_carlo(documents):
    """Plug-in entropies of what follows each context, from the documents alone."""
    result = floors(CONFIG)
    marked = [document for document in documents if document.passage]
    chatter = [document.passage for document in marked if set(document.passage) <= set(CHATTER)]
    estimates = {
        "sign": entropy(document.style == "at_once" for document in documents),
        "chatter": entropy(word for passage in chatter for word in passage[1:]),
        "passage_first": entropy(p[0] if (p := document.passage)[0] in CHATTER else "step" for document in marked),
    }
    for kind in KINDS:
        mine = [document for document in documents if document.kind == kind]
        estimates[f"answer/guess/{kind}"] = entropy(relative_answer(document) for document in mine)
        estimates[f"after_ask/guess/{kind}"] = entropy(
            OPEN if document.passage else relative_answer(document) for document in mine if document.style == "at_once"
        )
        estimates[f"question/{kind}"] = question_nats(mine) / len(mine[0].question)
    for name, value in estimates.items():
        assert result[name] == pytest.approx(value, abs=0.02), name

    answers = [document for document in documents if document.passage != document.steps]
    lost = sum(result[f"answer/guess/{document.kind}"] for document in answers) / len(documents)
    mean_length = sum(len(document.text.split()) + 1 for document in documents) / len(documents)
    assert result["document/guess"] - result["document/computed"] == pytest.approx(lost / mean_length, rel=0.02)
    pieces = sum(result[f"question/{document.kind}"] * len(document.question) for document in documents)
    pieces += len(documents) * estimates["sign"]
    pieces += len(marked) * estimates["passage_first"] + len(chatter) * (STEPS - 1) * estimates["chatter"]
    pieces += sum(document.style == "at_once" for document in documents) * result["after_ask/computed"]
    assert result["document/computed"] == pytest.approx(pieces / len(documents) / mean_length, rel=0.01)


def relative_answer(document: Document) -> str | int:
    """The answer; of a `chase`, its place after the start in alphabetical order (who knows the start guesses that)."""
    if document.kind != "chase":
        return document.answer
    return (NODES.index(document.answer) - NODES.index(document.steps[0])) % len(NODES)


def question_nats(documents: list[Document]) -> float:
    """Entropy of a question, nats: independent parts are estimated one by one."""
    if documents[0].kind != "chase":
        return math.log(len(KINDS)) + sum(
            entropy(document.question[i] for document in documents) for i in range(len(documents[0].question))
        )
    # Start and where it leads are estimated; given these, the targets of the nodes on the path are an ordered choice of
    # the others, and every node off it points to any of the five others.
    start = entropy(document.steps[0] for document in documents)
    shapes = [shape_of(document) for document in documents]
    path = [sum(math.log(len(NODES) - 1 - i) for i in range(sum(shape) - 1)) for shape in shapes]
    off = [(len(NODES) - sum(shape)) * math.log(len(NODES) - 1) for shape in shapes]
    return math.log(len(KINDS)) + start + entropy(shapes) + (sum(path) + sum(off)) / len(documents)


def shape_of(document: Document) -> tuple[int, int]:
    """Hops from the start to its cycle, and the cycle's length, found by walking."""
    pointers = dict(word.split(">") for word in document.question[:-2])
    seen: list[str] = [document.question[-1]]
    while (node := pointers[seen[-1]]) not in seen:
        seen.append(node)
    return seen.index(node), len(seen) - seen.index(node)

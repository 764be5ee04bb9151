"""Marked spans of texts: which tokens are in them, figures by hand, comparisons, and resuming."""

import json
import re

import numpy as np
import pytest

from quietstar_jax.errors import ConfigError, DataError
from quietstar_jax.evals.spans import MarkedText, compare_runs, read_marked_texts, summarize_spans, sums_of
from quietstar_jax.evals.statistics import compare_paired
from quietstar_jax.evals.tails import Continuation, ContinuationScorer
from quietstar_jax.evaluate import main
from quietstar_jax.inference.load_model import load_model
from tests.evals.models import bytes_tokenizer, write_plain, write_run
from tests.evals.test_language_modeling import column
from tests.evals.test_questions import write_lines

ROWS = [
    {"text": "Q: 1 and 2?\nA: 3 cats", "spans": [[15, 16]], "scored_from": 12},
    {"text": "naïve 24 and 130,000 €", "spans": [[6, 8], [13, 20]]},
    {"text": "no result", "spans": [], "scored_from": 3},
    {"text": "Q: one and one?\nA: 2", "spans": [[19, 20]], "scored_from": 16},
]
REST = [{"text": "made 24 of a 3", "spans": [[5, 7], [13, 14]]}, {"text": "A: 130", "spans": [[3, 6]]}]


def marked(tmp_path, rows, tokenizer=None, begin=(0,)):
    return read_marked_texts(str(write_lines(tmp_path / "t.jsonl", rows)), 0, tokenizer or bytes_tokenizer(), begin)


@pytest.mark.parametrize("begin", [(), (0,)])
@pytest.mark.parametrize("merged", [(), ("24", "30", ",0", "Ġc")])
def test_which_tokens_are_in_a_span(tmp_path, merged, begin):
    tokenizer = bytes_tokenizer(*merged)
    for row, text in zip(ROWS, marked(tmp_path, ROWS, tokenizer, begin), strict=True):
        assert text.tail.tokens == [*begin, *tokenizer.encode(row["text"])]
        scored = text.tail.tokens[-text.tail.last :]
        assert len(scored) == len(text.marked)
        first = max(row.get("scored_from", 0), 0 if begin else 1)
        assert tokenizer.decode(scored) == row["text"][first:]
        inside = [tokenizer.decode([token]) for token, is_in in zip(scored, text.marked, strict=True) if is_in]
        assert "".join(inside) == "".join(row["text"][start:stop] for start, stop in row["spans"])


def test_a_token_that_shares_a_character_is_in_the_span(tmp_path):
    (text,) = marked(tmp_path, [{"text": "a 24", "spans": [[3, 4]]}], bytes_tokenizer("24"))
    assert text.marked.tolist() == [False, False, True]


def test_a_span_is_whole_if_all_its_tokens_are_scored(tmp_path):
    rows = [
        {"text": "a 130 b 24", "spans": [[2, 5], [8, 10]]},
        {"text": "a 130 b 24", "spans": [[2, 5], [8, 10]], "scored_from": 3},
        {"text": "2430", "spans": [[0, 2], [2, 3], [3, 4]]},  # the first token of all is not scored without a begin
    ]
    texts = marked(tmp_path, rows, bytes_tokenizer("30", "24"), begin=())
    pieces = [[text.tail.tokens[-text.tail.last :][first:stop] for first, stop in text.whole] for text in texts]
    decode = bytes_tokenizer("30", "24").decode
    assert [[decode(tokens) for tokens in spans] for spans in pieces] == [["130", "24"], ["24"], ["30", "30"]]


def test_a_whole_span_is_right_if_all_its_tokens_are(tmp_path):
    texts = marked(tmp_path, [{"text": "a 130 24 7", "spans": [[2, 5], [6, 8], [9, 10]]}] * 2)
    rows = []
    for text, wrong in zip(texts, ("", "0 2"), strict=True):
        right = np.array([token not in wrong.split() for token in "a 130 24 7"])
        scores = column(np.ones(right.size), np.ones(right.size))
        scores = scores._replace(base=scores.base._replace(correct=right), talk=scores.talk._replace(correct=~right))
        rows.append(sums_of(text, scores))
    found = summarize_spans(rows, seed=0)
    assert found["whole_spans"] == 6
    assert found["without_thoughts"]["spans"]["whole_span_accuracy"] == pytest.approx(4 / 6)  # not 130, not 24
    assert found["with_thoughts"]["spans"]["whole_span_accuracy"] == 0
    assert found["comparison"]["spans"]["whole_span_accuracy"]["difference"] == pytest.approx(-4 / 6)
    assert "whole_span_accuracy" not in found["without_thoughts"]["others"]
    for row in rows:  # as records of an earlier version
        del row["spans"]["without_thoughts"]["whole_span_accuracy"]
    shared = compare_runs(rows, {row["text"]: row for row in rows}, seed=0)
    assert "whole_span_accuracy" not in shared["without_thoughts"]["spans"]
    assert "whole_span_accuracy" in shared["with_thoughts"]["spans"]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"text": "ab"}, "line 1 has no `text` with `spans`; it has text"),
        ({"text": "ab", "spans": [[0, 3]]}, "within the 2 characters"),
        ({"text": "ab", "spans": [[1, 1]]}, "must be pairs"),
        ({"text": "ab", "spans": [[0]]}, "must be pairs"),
        ({"text": "ab", "spans": [1]}, "must be pairs"),
        ({"text": "ab", "spans": [[0, 1]], "scored_from": "1"}, "must be pairs"),
        ({"text": "ab", "spans": [[0, 1]], "scored_from": 1}, "no scored token in a span"),
    ],
)
def test_malformed_records_are_refused(tmp_path, row, match):
    with pytest.raises(DataError, match=match):
        marked(tmp_path, [row])


def record(number, spans, base, talk):
    """The record of a text whose tokens, in `spans` or not, have these losses."""
    tail = Continuation([0] * (len(spans) + 1), len(spans))
    ends = np.flatnonzero(np.diff([0, *np.array(spans, bool), 0])).reshape(-1, 2)
    whole = [(int(first), int(stop)) for first, stop in ends]
    return sums_of(MarkedText(number, tail, np.array(spans, bool), whole), column(base, talk))


def test_figures_by_hand():
    # In spans 1 + 2 and 6 nats without, 1 + 1 and 3 with thoughts; elsewhere 3 nats, and 2.
    rows = [record(0, [1, 0, 1], [1, 3, 2], [1, 2, 1]), record(1, [1], [6], [3])]
    found = summarize_spans(rows, seed=0)
    assert found["tokens"] == {"spans": 3, "others": 1}
    assert found["without_thoughts"]["spans"]["nats_per_token"] == pytest.approx(3.0)
    assert found["with_thoughts"]["spans"]["nats_per_token"] == pytest.approx(5 / 3)
    assert found["without_thoughts"]["others"]["nats_per_token"] == pytest.approx(3.0)
    assert found["with_thoughts"]["others"]["nats_per_token"] == pytest.approx(2.0)
    assert found["comparison"]["spans"]["nats_per_token"]["difference"] == pytest.approx(5 / 3 - 3)
    assert found["comparison"]["others"]["nats_per_token"]["difference"] == pytest.approx(-1.0)
    low, high = found["with_thoughts"]["spans"]["nats_per_token_interval"]
    assert low < 5 / 3 < high


def test_another_model_is_compared_on_the_texts_that_both_have():
    rows = [record(number, [1, 0], [2, 1], [1, 1]) for number in range(4)]
    others = {number: record(number, [1, 0], [number, 3], [9, 9]) for number in range(1, 6)}
    for other in others.values():
        for group in ("spans", "others"):
            del other[group]["with_thoughts"]  # a plain model
    found = compare_runs(rows, others, seed=0)
    assert (found["texts"], found["mode"]) == (3, "with_thoughts")
    assert "with_thoughts" not in found
    expected = compare_paired([1, 1, 1], [1, 2, 3], 0)
    assert found["without_thoughts"]["spans"]["nats_per_token"] == expected
    assert found["without_thoughts"]["others"]["nats_per_token"]["difference"] == pytest.approx(-2.0)
    with pytest.raises(DataError, match="none of these texts"):
        compare_runs(rows, {9: others[5]}, seed=0)
    with pytest.raises(DataError, match="text 2 has 2 tokens in spans and 1 others, here it has 1 and 1"):
        compare_runs(rows, others | {2: record(2, [1, 1, 0], [1, 1, 1], [1, 1, 1])}, seed=0)


def test_the_mixing_weight_is_a_mean_over_the_tokens_for_which_a_thought_is_used():
    tokens = column([1, 1, 1], [1, 1, 1])
    made = np.array([True, True, False])
    scores = tokens._replace(weight=np.array([0.2, 0.4, 0.0], np.float32), made=made)
    text = MarkedText(0, Continuation([0] * 4, 3), np.array([True, False, False]), [(0, 1)])
    found = summarize_spans([sums_of(text, scores), sums_of(text, scores)], seed=0)["with_thoughts"]
    assert (found["others"]["mixing_weight"], found["others"]["thinking_rate"]) == (pytest.approx(0.4), 0.5)
    assert (found["spans"]["mixing_weight"], found["spans"]["thinking_rate"]) == (pytest.approx(0.2), 1.0)
    every = scores._replace(made=None)
    found = summarize_spans([sums_of(text, every), sums_of(text, every)], seed=0)["with_thoughts"]
    assert found["others"]["mixing_weight"] == pytest.approx(0.2)
    never = scores._replace(weight=np.zeros(3, np.float32), made=~made & made)
    found = summarize_spans([sums_of(text, never), sums_of(text, never)], seed=0)["with_thoughts"]
    assert (found["others"]["mixing_weight"], found["others"]["thinking_rate"]) == (0.0, 0.0)
    older = scores._replace(weight=np.array([0.2, 0.4, 0.6], np.float32))  # of an older thought at the last token
    found = summarize_spans([sums_of(text, older), sums_of(text, older)], seed=0)["with_thoughts"]["others"]
    assert (found["mixing_weight"], found["thinking_rate"], found["thought_used_rate"]) == (pytest.approx(0.5), 0.5, 1)


def test_texts_that_are_all_right_or_all_wrong_are_not_certain():
    rows = [record(number, [1, 1], [1, 1], [1, 1]) for number in range(20)]  # all wrong
    for row in rows:
        row["spans"]["with_thoughts"]["accuracy"] = 2.0
    found = summarize_spans(rows, seed=0)
    high = pytest.approx(1 - 0.025**0.05)
    assert found["without_thoughts"]["spans"]["accuracy_interval"] == (0.0, high)
    assert found["with_thoughts"]["spans"]["accuracy_interval"] == (pytest.approx(0.025**0.05), 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spans")
    write_run(folder / "run", write_plain(folder / "plain"))
    write_plain(folder / "other", scale=0.5)
    write_lines(folder / "texts.jsonl", ROWS)
    write_lines(folder / "rest.jsonl", REST)
    return folder


def evaluate(folder, capsys, monkeypatch, *more, checkpoint="run", data="texts.jsonl", as_json=True):
    monkeypatch.chdir(folder)
    length = ["--thought-length", "2"] if checkpoint == "run" else []
    main(["--checkpoint", checkpoint, "--task", "spans", "--data", data, "--batch-size", "2", "--quiet", *length,
          *(["--json"] if as_json else []), *more])  # fmt: skip
    printed = capsys.readouterr().out
    return json.loads(printed.splitlines()[-1]) if as_json else printed


def test_the_command_gives_the_scores_of_each_token(folder, capsys, monkeypatch, tmp_path):
    found = evaluate(folder, capsys, monkeypatch, "--records", str(tmp_path / "mine"))
    model = load_model(folder / "run")
    texts = marked(tmp_path, ROWS)
    scores = ContinuationScorer(model, model.settings(2), batch_size=1)([text.tail for text in texts])
    for mode, predictions in (
        ("without_thoughts", [s.base for s in scores]),
        ("with_thoughts", [s.talk for s in scores]),
    ):
        for group, inside in (("spans", True), ("others", False)):
            chosen = [text.marked == inside for text in texts]
            nll = np.concatenate([p.nll[one] for p, one in zip(predictions, chosen, strict=True)])
            right = np.concatenate([p.correct[one] for p, one in zip(predictions, chosen, strict=True)])
            assert found["tokens"][group] == nll.size
            assert found[mode][group]["nats_per_token"] == pytest.approx(nll.mean(), rel=1e-4)
            assert found[mode][group]["accuracy"] == pytest.approx(right.mean())
    assert found["with_thoughts"]["spans"]["nats_per_token"] != found["without_thoughts"]["spans"]["nats_per_token"]
    some = evaluate(folder, capsys, monkeypatch, "--think", "every:2", "--records", str(tmp_path / "some"))
    assert 0 < some["with_thoughts"]["others"]["thinking_rate"] < 1


def test_excluded_tokens_do_not_count(folder, capsys, monkeypatch, tmp_path):
    """Against whole distributions: those that match have no probability, and are never the most likely token."""
    found = evaluate(folder, capsys, monkeypatch, "--records", str(tmp_path / "mine"), "--exclude", "[S-Zs-z]",
                     data="rest.jsonl")  # fmt: skip
    model = load_model(folder / "run")
    texts = marked(tmp_path, REST)
    everything = range(model.architecture.vocab_size)
    scorer = ContinuationScorer(model, model.settings(2), batch_size=1)
    scores = scorer([text.tail._replace(candidates=everything) for text in texts])
    excluded = [i for i in range(model.tokenizer.vocab_size) if re.search("[S-Zs-z]", model.tokenizer.decode([i]))]
    assert len(excluded) >= 16
    for mode in ("without_thoughts", "with_thoughts"):
        nll, right = [], []
        for text, score in zip(texts, scores, strict=True):
            kept = np.array((score.base if mode == "without_thoughts" else score.talk).candidates, np.float64)
            kept[:, excluded] = -np.inf
            kept -= np.logaddexp.reduce(kept, axis=-1, keepdims=True)
            kept[:, [i for i in model.forbidden_ids if i not in excluded]] -= 1e6  # never the most likely
            target = np.array(text.tail.tokens[-text.tail.last :])
            rows = np.arange(len(target))
            nll += list(-kept[rows, target][text.marked])
            right += list((kept.argmax(-1) == target)[text.marked])
        assert found[mode]["spans"]["nats_per_token"] == pytest.approx(np.mean(nll), rel=1e-4)
        assert found[mode]["spans"]["accuracy"] == pytest.approx(np.mean(right))
    plain = evaluate(folder, capsys, monkeypatch, "--records", str(tmp_path / "all"), data="rest.jsonl")
    assert plain["without_thoughts"]["spans"]["nats_per_token"] > found["without_thoughts"]["spans"]["nats_per_token"]
    for more, said in (
        (["--exclude", "3"], "contains '3', which matches --exclude"), (["--exclude", "("], "--exclude is '\\('"),
        (["--exclude", "zzz"], "but no token of this model"), (["--exclude", "z", "--task", "gsm8k"], "must be spans"),
        (["--exclude", "z", "--against", str(tmp_path / "all")], "other"),
    ):  # fmt: skip
        with pytest.raises((ConfigError, DataError), match=said):
            evaluate(folder, capsys, monkeypatch, "--records", str(tmp_path / "no"), *more, data="rest.jsonl")


def test_a_killed_measurement_resumes_from_its_records(folder, capsys, monkeypatch, tmp_path):
    records = tmp_path / "records"
    whole = evaluate(folder, capsys, monkeypatch, "--records", str(records))
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:3]) + lines[3][:20])
    again = evaluate(folder, capsys, monkeypatch, "--records", str(records))
    assert sorted(records.read_text().splitlines()[1:]) == sorted(line.strip() for line in lines[1:])
    for mode in ("without_thoughts", "with_thoughts"):
        assert again[mode] == whole[mode]
    # A record is used, not measured again.
    changed = json.loads(lines[1])
    changed["spans"]["without_thoughts"]["nats_per_token"] += 100
    records.write_text(lines[0] + json.dumps(changed) + "\n" + "".join(lines[2:]))
    again = evaluate(folder, capsys, monkeypatch, "--records", str(records))
    more = again["without_thoughts"]["spans"]["nats_per_token"] - whole["without_thoughts"]["spans"]["nats_per_token"]
    assert more == pytest.approx(100 / whole["tokens"]["spans"])


def test_against_another_model(folder, capsys, monkeypatch, tmp_path):
    other = evaluate(folder, capsys, monkeypatch, "--records", str(tmp_path / "other"), checkpoint="other")
    assert other["thoughts"] == "off"
    against = ["--against", str(tmp_path / "other"), "--records", str(tmp_path / "mine")]
    found = evaluate(folder, capsys, monkeypatch, *against)
    for group in ("spans", "others"):
        change = found["with_thoughts"][group]["nats_per_token"] - other["without_thoughts"][group]["nats_per_token"]
        compared = found["against"]["without_thoughts"][group]["nats_per_token"]
        assert compared["difference"] == pytest.approx(change)
        assert 0 < compared["p_value"] <= 1
    printed = evaluate(folder, capsys, monkeypatch, *against, as_json=False)
    for part in ("4 texts", "11 tokens in spans, 4 whole spans:", "tokens in spans, nats per token: ",
                 "tokens in spans, whole spans right, %: ",
                 "this model with thoughts, minus the other without thoughts, 4 texts"):  # fmt: skip
        assert part in printed
    assert max(map(len, printed.splitlines())) <= 200


def test_refusals_of_other_records(folder, capsys, monkeypatch, tmp_path):
    write_lines(folder / "others.jsonl", ROWS[:2])
    evaluate(
        folder, capsys, monkeypatch, "--records", str(tmp_path / "theirs"), data="others.jsonl", checkpoint="plain"
    )
    mine = ["--records", str(tmp_path / "mine")]
    evaluate(folder, capsys, monkeypatch, "--records", str(tmp_path / "unbegun"), checkpoint="plain")
    first, *others = (tmp_path / "unbegun").read_text().splitlines(keepends=True)
    (tmp_path / "unbegun").write_text(first.replace('"begin": [0]', '"begin": []') + "".join(others))
    with pytest.raises(DataError, match=r"unbegun was .*: its begin is \[\], here \[0\]"):
        evaluate(folder, capsys, monkeypatch, *mine, "--against", str(tmp_path / "unbegun"))
    with pytest.raises(DataError, match="theirs was measured on other texts or with other settings: its data_hash is"):
        evaluate(folder, capsys, monkeypatch, *mine, "--against", str(tmp_path / "theirs"))
    with pytest.raises(DataError, match=r"texts\.jsonl is not a file of records"):
        evaluate(folder, capsys, monkeypatch, *mine, "--against", str(folder / "texts.jsonl"))
    with pytest.raises(DataError, match="nothing cannot be read"):
        evaluate(folder, capsys, monkeypatch, *mine, "--against", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"--against is .*, but --task is gsm8k"):
        main(["--checkpoint", "run", "--task", "gsm8k", "--data", "texts.jsonl", "--against", "x"])

"""The evaluation harness: equal to its own `hf` model where nothing thinks, and able to think."""

import dataclasses
import importlib
import inspect
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from quietstar_jax.errors import CheckpointError, ConfigError, DataError
from quietstar_jax.evals.harness import QuietStarLM
from quietstar_jax.evals.harness_arguments import read_arguments
from quietstar_jax.evals.tails import Continuation, ContinuationScorer
from tests.evals.models import GEMMA3, write_plain, write_run
from tests.material import material

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["quietstar_letters", "quietstar_endings", "quietstar_texts", "quietstar_sums"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    write_run(folder / "run", write_plain(folder / "plain", scale=3.0))
    write_plain(folder / "gemma3", GEMMA3)
    return folder


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the task files name their data from there


def evaluate(model, **arguments):
    found = simple_evaluate(
        model=model, model_args=arguments, tasks=TASKS, batch_size=4, device="cpu", bootstrap_iters=0,
        task_manager=TaskManager(include_path="tests/evals/harness", include_defaults=False),
    )  # fmt: skip
    answers = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in found["samples"].items()
    }
    return found, answers


def assert_equal_answers(ours, theirs):
    for task in TASKS:
        for own, other in zip(ours[task], theirs[task], strict=True):
            if task == "quietstar_sums":
                assert own == other
            elif task == "quietstar_texts":
                np.testing.assert_allclose(np.ravel(own), np.ravel(other), rtol=1e-4)
            else:
                for ((log_prob, greedy),), ((expected, as_greedy),) in zip(own, other, strict=True):
                    assert float(log_prob) == pytest.approx(float(expected), rel=1e-4, abs=1e-3)
                    assert greedy == as_greedy


@pytest.mark.some(1)
@pytest.mark.parametrize("checkpoint", ["plain", "gemma3", "models/stories260k"])
def test_scores_equal_those_of_the_harness_on_transformers(folder, checkpoint):
    place = str(material(checkpoint) if "/" in checkpoint else folder / checkpoint)
    theirs, expected = evaluate("hf", pretrained=place, dtype="float32")
    ours, answers = evaluate("quietstar", checkpoint=place)
    assert_equal_answers(answers, expected)
    for task in TASKS:
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-4, abs=1e-5), (task, metric)
    assert len(ours["config"]["checkpoint_hash"]) == 64


def test_too_long_a_text_loses_its_beginning_as_there(folder):
    place, length = str(folder / "plain"), 40
    _, expected = evaluate("hf", pretrained=place, dtype="float32", max_length=length)
    _, answers = evaluate("quietstar", checkpoint=place, max_length=length)
    assert_equal_answers(answers, expected)


def test_thoughts_change_the_scores_and_are_those_of_the_evaluation(folder):
    thinking = QuietStarLM(str(folder / "run"), thoughts="on", thought_length=2, batch_size=2)
    plain = QuietStarLM(str(folder / "run"), thoughts=False, batch_size=2)
    pairs = [("one two", " three"), ("one two", " four"), ("one", "\nA: 1"), ("one", "\nA: 2"), ("x", "y")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    ours, without = thinking.loglikelihood(requests), plain.loglikelihood(requests)
    for (context, continuation), (log_prob, _), (other, _) in zip(pairs, ours, without, strict=True):
        tokens = thinking.tok_encode(context + continuation)
        (score,) = thinking._scorer([Continuation(tokens, len(continuation))])
        assert log_prob == pytest.approx(-float(score.talk.nll.sum()), abs=1e-3)
        assert other == pytest.approx(-float(score.base.nll.sum()), abs=1e-3)
        assert abs(log_prob - other) > 1e-2


def test_generated_texts_are_those_of_the_generator(folder):
    model = QuietStarLM(str(folder / "run"), thoughts="on", thought_length=2, batch_size=2)
    settings = {"until": ["\n"], "max_gen_toks": 6}
    contexts = ["one two", "three", "four five six"]
    texts = model.generate_until([Instance("generate_until", {}, (context, settings), 0) for context in contexts])
    for context, text in zip(contexts, texts, strict=True):
        alone = model._generator.generate([context], max_tokens=6, thoughts=True, thought_length=2, stop=["\n"])
        assert text == alone[0].text
    wrong = Instance("generate_until", {}, ("one", {"until": [], "top_k": 5}), 0)
    with pytest.raises(ConfigError, match="top_k"):
        model.generate_until([wrong])
    with pytest.raises(ConfigError, match="max_gen_toks is 9999"):
        model.generate_until([Instance("generate_until", {}, ("one", {"max_gen_toks": 9999}), 0)])


@pytest.mark.slow
def test_policies_of_thinking(folder):
    """Texts and scores do not depend on the other requests; `never` and `always` are exactly thoughts off and on."""
    settings, contexts = {"until": ["\n"], "max_gen_toks": 6}, ["one two", "three", "four five six seven", "e"]

    def answers(contexts, **arguments):
        model = QuietStarLM(str(folder / "run"), batch_size=3, **arguments)
        texts = [Instance("generate_until", {}, (context, settings), 0) for context in contexts]
        scored = [Instance("loglikelihood", {}, (context, " is near"), 0) for context in contexts]
        return model.generate_until(texts), model.loglikelihood(scored)

    never, always = answers(contexts, think="never"), answers(contexts, think="always", thought_length=2)
    assert never == answers(contexts, thoughts="off")
    assert always == answers(contexts, thoughts="on", thought_length=2)
    for think in ("every:3", "random:0.5"):
        texts, scores = answers(contexts, think=think, thought_length=2)
        assert (texts, scores) not in (never, always), "a policy that changes nothing proves nothing"
        if think == "every:3":
            alone = [answers([context], think=think, thought_length=2) for context in contexts]
            assert texts == [text for (text,), _ in alone]
            np.testing.assert_allclose([one[0] for one in scores], [one[0][0] for _, one in alone], atol=1e-4)
        else:  # the draws depend on the number of the request
            few, few_scores = answers(contexts[:2], think=think, thought_length=2)
            assert few == texts[:2]
            np.testing.assert_allclose([one[0] for one in few_scores], [one[0] for one in scores[:2]], atol=1e-4)


def test_a_thought_for_several_tokens(folder, tmp_path):
    write_run(tmp_path / "run", folder / "plain", mixing="probabilities")
    requests = [Instance("loglikelihood", {}, ("four five", " is near"), 0)]
    texts = [Instance("generate_until", {}, ("four five", {"until": ["\n"], "max_gen_toks": 6}), 0)]
    found = {}
    for reach in (1, 3):
        model = QuietStarLM(str(tmp_path / "run"), thought_length=2, batch_size=2, reach=reach)
        tokens = model.tok_encode("four five is near")
        scorer = ContinuationScorer(model.model, model.model.settings(2, reach=reach), 2)
        (score,) = scorer([Continuation(tokens, len(" is near"))])
        ((log_prob, _),) = model.loglikelihood(requests)
        assert log_prob == pytest.approx(-score.talk.nll.sum(), abs=1e-4)
        alone = model._generator.generate(["four five"], max_tokens=6, thought_length=2, reach=reach, stop=["\n"])
        assert model.generate_until(texts) == [alone[0].text]
        assert model.get_model_info()["reach"] == reach
        found[reach] = log_prob
    assert abs(found[1] - found[3]) > 1e-3


def test_refusals(folder):
    plain = str(folder / "plain")
    with pytest.raises(CheckpointError, match="no trained mixing head"):
        QuietStarLM(plain, thoughts="on")
    for wrong in ({"thoughts": "maybe"}, {"batch_size": 0}, {"max_length": 0}, {"max_length": 9999}):
        with pytest.raises(ConfigError):
            QuietStarLM(plain, **wrong)
    with pytest.raises(DataError, match="at least one of each"):
        QuietStarLM(plain)._loglikelihood_tokens([(None, [], [1])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"model is missing.* --model_args checkpoint=FOLDER"),
        ({"pretrained": "x", "thought": "on"}, r"thought='on' is unknown\. Did you mean thoughts\?"),
        ({"pretrained": "x", "max_lenght": 5}, r"max_lenght=5 is unknown\. Did you mean max_length\?"),
        ({"pretrained": "x", "zzz": 5}, r"zzz=5 is unknown\. Arguments are add_bos_token, .*pretrained"),
        ({"pretrained": "x", "checkpoint": "y"}, "checkpoint='y' contradicts checkpoint='x'"),
        ({"pretrained": "x", "add_bos_token": "maybe"}, "add_bos_token is 'maybe'; it must be True or False"),
        ({"pretrained": "x", "peft": "adapter"}, "peft='adapter' is not supported"),
        ({"pretrained": "x", "load_in_4bit": True}, "load_in_4bit=True is not supported"),
        ({"pretrained": "x", "backend": "seq2seq"}, "backend='seq2seq' is not supported"),
        ({"pretrained": "x", "batch_size": "many"}, "batch_size is 'many'"),
        ({"pretrained": "x", "max_gen_toks": True}, "max_gen_toks is True"),
        ({"pretrained": "x", "seed": -1}, "seed is -1"),
        ({"pretrained": "x", "chat_template_args": "a"}, "chat_template_args is 'a'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        QuietStarLM(**arguments)
    assert "\n" not in str(error.value)


def test_the_names_of_the_harness_are_known():
    """The defaults of its own `hf` model ask for what is done here."""
    hf = importlib.import_module("lm_eval.models.huggingface").HFLM
    for name, parameter in inspect.signature(hf.__init__).parameters.items():
        if name not in ("self", "kwargs", "pretrained"):
            assert read_arguments({"pretrained": "x", name: parameter.default}).checkpoint == "x", name
    found = read_arguments(
        {"pretrained": "x", "dtype": "auto", "revision": "main", "batch_size": "auto:4", "max_batch_size": 8,
         "device": "cuda:0", "trust_remote_code": True, "truncation": True, "think_end_token": "12", "max_gen_toks": 9}
    )  # fmt: skip
    assert (found.dtype, found.revision, found.batch_size, found.think_end_token) == ("float32", "", 8, 12)
    assert read_arguments({"pretrained": "x", "dtype": "bfloat16", "revision": "v1"}).dtype == "bfloat16"


def test_arguments_are_honoured(folder):
    plain = str(folder / "plain")
    model = QuietStarLM(pretrained=plain, tokenizer=plain, max_gen_toks=3, enable_thinking=False)
    (text,) = model.generate_until([Instance("generate_until", {}, ("one", {"until": []}), 0)])
    assert text == model._generator.generate(["one"], max_tokens=3)[0].text
    model.tokenizer.chat_template = "{% for m in messages %}{{m.content}}{% endfor %}{{enable_thinking}}"
    assert model.apply_chat_template([{"role": "user", "content": "hi "}]) == "hi False"
    with pytest.raises(ConfigError, match="tokenizer='synthetic' produces other ids"):
        QuietStarLM(pretrained=plain, tokenizer="synthetic")


@pytest.mark.parametrize("end", ["B", 33])
def test_an_answer_follows_the_end_of_the_reasoning(folder, end):
    model = QuietStarLM(pretrained=str(folder / "plain"))
    ids = model.tok_encode("aB bB c")
    end = end if isinstance(end, str) else model.tok_encode("B")[-1]
    model._given = dataclasses.replace(model._given, think_end_token=end)
    assert model._answer(ids, []) == "c"


@pytest.mark.slow
def test_the_command_line(folder, tmp_path):
    command = [
        sys.executable, "-m", "quietstar_jax.lm_eval", "--model", "quietstar", "--model_args",
        f"checkpoint={folder / 'run'},thoughts=on,thought_length=1", "--tasks", "quietstar_letters", "--include_path",
        "tests/evals/harness", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quietstar_letters" in done.stdout
    (result,) = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(result.read_text())
    assert written["config"]["thoughts"] is True
    assert "acc,none" in written["results"]["quietstar_letters"]


def test_the_harness_can_find_the_model_by_its_entry_point():
    found = [point for point in metadata.entry_points(group="lm_eval.models") if point.name == "quietstar"]
    if not found:
        pytest.skip("the package was installed before it had this entry point; install it again")
    assert found[0].load() is QuietStarLM

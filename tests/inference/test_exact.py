"""Token by token with caches, in ragged batches: the same numbers as the parallel pass over the whole text."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.evals.tails import Continuation, ContinuationScorer
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.inference.decode import generate_tokens, think_and_talk
from quietstar_jax.inference.engine import Engine
from quietstar_jax.inference.generator import Generator
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.models.parameters import merge
from quietstar_jax.thoughts.chains import empty_chains
from tests.hf.runs import our_predictions
from tests.inference.models import PROMPT_LENGTHS, Thinker, prompts, thinker

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

NEW, T = 5, 6
VARIANTS = [
    "llama tied",
    "mistral",
    "qwen2 mixed windows",
    "qwen3 windows yarn",
    "gemma2",
    "gemma3_text two bases",
    "olmo2 tied",
]


@pytest.fixture(scope="module", params=VARIANTS)
def case(request, tmp_path_factory) -> dict:
    made = thinker(tmp_path_factory.mktemp("model"), request.param)
    generator = Generator(made.model, batch_size=len(PROMPT_LENGTHS))
    found = generator.generate(prompts(), max_tokens=NEW)
    parallel = our_predictions(made.run, made.state, whole_texts(found))
    return {"made": made, "generator": generator, "found": found, "parallel": parallel}


def whole_texts(found) -> np.ndarray:
    """Prompts with what followed, right-padded: [B, L]."""
    rows = [[*prompt, *one.token_ids] for prompt, one in zip(prompts(), found, strict=True)]
    return np.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])


@pytest.mark.some(2)
def test_greedy_thoughts_weights_and_tokens_are_those_of_the_parallel_pass(case):
    thoughts, mixed, _ = case["parallel"]
    for row, (length, one) in enumerate(zip(PROMPT_LENGTHS, case["found"], strict=True)):
        at = slice(length - 1, length - 1 + NEW)
        assert [token.thought_ids for token in one.tokens] == [tuple(t) for t in thoughts[row, at].tolist()]
        assert list(one.token_ids) == mixed[row, at].argmax(-1).tolist()
    assert len({weight for one in case["found"] for weight in one.mixing_weights}) > NEW


def mixed_scores(made: Thinker) -> np.ndarray:
    """Mixed logits [B, NEW, V] of cached generation, step by step."""
    model = made.model
    generator = Generator(model, batch_size=len(PROMPT_LENGTHS))
    job = generator.job(1, NEW, True, None, 0.0, 1.0, 0.0, ())
    engine = Engine(model.params, model.graphdef, model.architecture, model.dtype, len(PROMPT_LENGTHS))
    requests = generator.requests(prompts(), job)
    state, knobs = engine.start(requests, 64), engine.knobs(requests, job.sampling)

    @jax.jit
    def look(params, state):
        decoded = merge(model.graphdef, params)
        own = empty_chains(decoded.decoder.architecture, len(requests), 1, 1, T + 3, job.plan.thought.dtype)
        scores, *_ = think_and_talk(decoded, state, own, jnp.zeros((len(requests), T)), knobs, job.plan)
        wanted = jnp.ones(len(requests), bool)
        return scores, generate_tokens(decoded, state, wanted, knobs, job.plan)[0]

    scores = []
    for _ in range(NEW):
        now, state = look(model.params, state)
        scores.append(np.asarray(now))
    return np.stack(scores, axis=1)


@pytest.mark.some(2)
def test_mixed_logits_are_those_of_the_parallel_pass(case):
    scores = mixed_scores(case["made"])
    _, mixed, base = case["parallel"]
    for row, length in enumerate(PROMPT_LENGTHS):
        at = slice(length - 1, length - 1 + NEW)
        assert np.abs(scores[row] - mixed[row, at]).max() < 1e-4
        assert np.abs(scores[row] - base[row, at]).max() > 0.3, "thoughts that change nothing prove nothing"


def test_each_prompt_alone_gives_what_the_batch_gave(case):
    for prompt, together in zip(prompts(), case["found"], strict=True):
        (alone,) = case["generator"].generate([prompt], max_tokens=NEW)
        assert alone == together


@pytest.mark.some(3)
def test_without_thoughts_it_is_the_greedy_text_of_transformers(case):
    found = case["generator"].generate(prompts(), max_tokens=NEW, thoughts=False)
    for prompt, one in zip(prompts(), found, strict=True):
        theirs = case["made"].original.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, use_cache=False
        )
        assert list(one.token_ids) == theirs[0, len(prompt) :].tolist()
        assert not any(one.thoughts)


@pytest.mark.some(1)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_an_export_writes_here_what_it_writes_in_torch(mixing, tmp_path):
    """Every mixing, through a folder that transformers loads, prompts padded left there."""
    made = thinker(tmp_path, "qwen2 mixed windows", mixing=mixing, embedding_scale=7.0)
    export(tmp_path / "run", tmp_path / "out", ExportOptions())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    opened = dataclasses.replace(load_model(tmp_path / "out"), eos_ids=())
    found = Generator(opened, batch_size=len(PROMPT_LENGTHS)).generate(prompts(), max_tokens=NEW)
    longest = max(PROMPT_LENGTHS)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts()])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in PROMPT_LENGTHS])
    texts = theirs.generate(padded, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert [list(one.token_ids) for one in found] == texts[:, longest:].tolist()
    run = Generator(made.model, batch_size=len(PROMPT_LENGTHS)).generate(prompts(), max_tokens=NEW)
    assert [one.token_ids for one in run] == [one.token_ids for one in found]


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("thoughtful", "policy"),
    [*((VARIANTS[2], policy) for policy in ("every:2", "entropy", "margin", "never", "always")), ("gemma2", "entropy")],
    indirect=["thoughtful"],
)
def test_a_policy_thinks_in_an_export_where_it_thinks_here(policy, tmp_path, thoughtful):
    """Ragged batches, the policy once as an argument and once as the default that the export recommends."""
    model, folder = thoughtful
    ours = Generator(dataclasses.replace(model, eos_ids=()), batch_size=len(PROMPT_LENGTHS))
    if policy == "entropy":  # a bound in the middle
        made = ours.generate(prompts(), max_tokens=NEW)
        texts = [[*prompt, *one.token_ids] for prompt, one in zip(prompts(), made, strict=True)]
        scores = ContinuationScorer(model, model.settings(0), batch_size=4)([Continuation(t, NEW) for t in texts])
        policy = f"entropy:{np.median(np.concatenate([score.base_entropy for score in scores])):.4f},9"
    policy = {"margin": "margin:0.02"}.get(policy, policy)
    found = ours.generate(prompts(), max_tokens=NEW, think=policy)
    flags = [bool(token.thought_ids) for one in found for token in one.tokens]
    assert policy in ("never", "always") or len({*flags}) == 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    longest = max(PROMPT_LENGTHS)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts()])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in PROMPT_LENGTHS])
    options = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert theirs.generate(padded, think=policy, **options)[:, longest:].tolist() == [list(f.token_ids) for f in found]
    theirs.generation_config.thinking = policy
    assert theirs.generate(padded, **options)[:, longest:].tolist() == [list(f.token_ids) for f in found]


@pytest.fixture(scope="module")
def thoughtful(tmp_path_factory, request):
    """Of a variant; that with caps decides by entropies of capped logits."""
    folder = tmp_path_factory.mktemp("export")
    made = thinker(folder, getattr(request, "param", VARIANTS[2]), embedding_scale=7.0)
    export(folder / "run", folder / "out", ExportOptions(think="every:3"))
    assert load_model(folder / "out").think == "every:3"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True)
    assert model.generation_config.thinking == "every:3"
    for think in ("sometimes", "every:0", "entropy", "random:0.1,0.2"):
        with pytest.raises(ValueError, match="think is "):
            model.generate(torch.tensor([[3, 4]]), think=think)
    return made.model, folder / "out"


def test_where_no_sequence_thinks_no_chain_runs(thoughtful):
    model = transformers.AutoModelForCausalLM.from_pretrained(thoughtful[1], trust_remote_code=True).eval()
    tokens = torch.tensor([[3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        everywhere, some, nowhere = (model(tokens, think=think) for think in (None, "every:3", "never"))
        assert nowhere.thoughts is None
        assert (some.thoughts[0, :, 0] >= 0).tolist() == [False, False, True] * 2
        for j in range(6):
            expected = everywhere if j % 3 == 2 else nowhere
            torch.testing.assert_close(some.logits[0, j], expected.logits[0, j])
        torch.testing.assert_close(some.mixing_weight[0, 2::3], everywhere.mixing_weight[0, 2::3])
        assert not some.mixing_weight[0, [0, 1, 3, 4]].any()
        model._think = None  # would fail if it were called
        model(tokens, think="every:7")

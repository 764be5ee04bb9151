"""A reach above 1 in generation: each token is the one that the parallel scorer predicts with the same reach."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.evals.tails import Continuation, ContinuationScorer
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.hf.generation import generation_config, thinking_reach
from quietstar_jax.inference.generator import Generator
from quietstar_jax.inference.load_model import LoadedModel, load_model
from quietstar_jax.methods.thinking import parse_policy
from quietstar_jax.thoughts.ending import thought_ids
from tests.inference.models import PROMPT_LENGTHS, prompts, thinker

NEW, T = 8, 6


@pytest.fixture(scope="module", params=["fixed", "token"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Thoughts of T tokens, or of those before the token 9; windows shorter than the texts."""
    found = thinker(tmp_path_factory.mktemp("model"), "mistral", mixing="probabilities").model
    ends = request.param == "token"
    head = found.params["decoder.lm_head"]  # [D, V]
    return dataclasses.replace(
        found,
        # The token is then sometimes certain, and sometimes impossible.
        params=found.params | {"decoder.lm_head": head.at[:, 9].multiply(11.0) if ends else head},
        thought=dataclasses.replace(found.thought, end=request.param),
        vocabulary=found.vocabulary._replace(start_token=12, end_token=9 if ends else None),
    )


@pytest.mark.parametrize(("reach", "policy"), [(3, "always"), (3, "every:2"), (2, "start:0.003"), (9, "every:3")])
def test_tokens_thoughts_and_weights_are_those_of_the_scorer(model, reach, policy):
    generator = Generator(model, batch_size=len(PROMPT_LENGTHS))
    found = generator.generate(prompts(), max_tokens=NEW, think=policy, reach=reach)
    texts = [[*prompt, *one.token_ids] for prompt, one in zip(prompts(), found, strict=True)]
    scorer = ContinuationScorer(model, model.settings(T, reach=reach), 4, think=parse_policy(policy))
    lengths, shares = set(), set()
    for one, scores in zip(found, scorer([Continuation(text, NEW) for text in texts]), strict=True):
        assert one.token_ids == tuple(scores.talk.best.tolist())
        np.testing.assert_allclose(one.mixing_weights, scores.weight, atol=1e-5)
        for token, thought, made in zip(one.tokens, scores.thoughts, scores.made_thoughts, strict=True):
            assert token.has_thought == made
            assert token.thought_ids == (thought_ids(thought.tolist()) if made else ())
            lengths.add(len(token.thought_ids))
            shares.add(token.has_thought)
    assert len(shares) == 1 + (policy != "always")
    assert len(lengths) > 1 or model.thought.end == "fixed"


def test_older_thoughts_change_the_text(model):
    """Otherwise the tests of this file prove nothing."""
    generator = Generator(model, batch_size=len(PROMPT_LENGTHS))
    usual, longer = (generator.generate(prompts(), max_tokens=NEW, think="every:2", reach=n) for n in (1, 3))
    assert [one.token_ids for one in usual] != [one.token_ids for one in longer]
    assert any(token.mixing_weight and not token.has_thought for one in longer for token in one.tokens)
    assert usual == generator.generate(prompts(), max_tokens=NEW, think="every:2")


@pytest.mark.parametrize("sampled", [False, True])
def test_a_text_does_not_depend_on_its_neighbours_and_can_be_continued(model, sampled):
    settings = dict(think="every:2", reach=3, seed=5)
    if sampled:
        settings |= dict(temperature=1.5, top_p=0.9, thought_temperature=0.7)
    generator = Generator(model, batch_size=len(PROMPT_LENGTHS))
    found = generator.generate(prompts(), max_tokens=NEW, **settings)
    for prompt, together in zip(prompts(), found, strict=True):
        (alone,) = generator.generate([prompt], max_tokens=NEW, **settings)
        for one in (alone.tokens, tuple(generator.stream(prompt, max_tokens=NEW, **settings))):
            assert [(token.id, token.thought_ids) for token in one] == [
                (token.id, token.thought_ids) for token in together.tokens
            ]
        np.testing.assert_allclose(alone.mixing_weights, together.mixing_weights, atol=1e-6)
    if not sampled:  # the draws depend on the prompt
        rest = generator.generate(
            [[*prompt, *one.token_ids[:3]] for prompt, one in zip(prompts(), found, strict=True)],
            max_tokens=NEW - 3, **settings,
        )  # fmt: skip
        for whole, part in zip(found, rest, strict=True):
            assert part.token_ids == whole.token_ids[3:]
            np.testing.assert_allclose(part.mixing_weights, whole.mixing_weights[3:], atol=1e-5)


def test_one_sequence_alone_and_texts_that_end_early(model):
    one = Generator(model, batch_size=1)
    expected = Generator(model, batch_size=4).generate(prompts(), max_tokens=NEW, think="every:2", reach=3)
    for prompt, whole in zip(prompts(), expected, strict=True):
        assert one.generate([prompt], max_tokens=NEW, think="every:2", reach=3)[0].token_ids == whole.token_ids
    ends = dataclasses.replace(model, eos_ids=(expected[0].token_ids[2],))
    found = Generator(ends, batch_size=4).generate(prompts(), max_tokens=NEW, think="every:2", reach=3)
    for before, after in zip(expected, found, strict=True):
        stop = next((i + 1 for i, token in enumerate(before.token_ids) if token in ends.eos_ids), NEW)
        assert after.token_ids == before.token_ids[:stop]


def test_an_export_writes_in_torch_what_it_writes_here(tmp_path):
    """With the reach and the policy that it recommends, prompts padded left there."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    thinker(tmp_path, "qwen2 mixed windows", mixing="probabilities")
    export(tmp_path / "run", tmp_path / "out", ExportOptions(think="every:2", reach=3))
    opened = dataclasses.replace(load_model(tmp_path / "out"), eos_ids=())
    assert (opened.think, opened.reach) == ("every:2", 3)
    generator = Generator(opened, batch_size=len(PROMPT_LENGTHS))
    found, usual = (generator.generate(prompts(), max_tokens=NEW, **one) for one in ({}, {"reach": 1}))
    longest = max(PROMPT_LENGTHS)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts()])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in PROMPT_LENGTHS])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    options = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    for ours, one in ((found, {}), (usual, {"reach": 1})):
        assert theirs.generate(padded, **options, **one)[:, longest:].tolist() == [list(x.token_ids) for x in ours]
    assert [one.token_ids for one in found] != [one.token_ids for one in usual]


def test_what_is_refused_and_what_a_model_recommends(model):
    generator = Generator(model, batch_size=1)
    for reach in (0, 17, -1):
        with pytest.raises(ConfigError, match=f"reach is {reach}; it must be within 1 .. 16"):
            generator.generate(prompts()[:1], reach=reach)
    with pytest.raises(ConfigError, match="reach is 2, but there are no thoughts"):
        generator.generate(prompts()[:1], reach=2, thoughts=False)
    other = dataclasses.replace(model, thought=dataclasses.replace(model.thought, mixing="log_probabilities"))
    with pytest.raises(ConfigError, match="trained with the mixing 'log_probabilities'"):
        Generator(other, batch_size=1).generate(prompts()[:1], reach=2)
    assert [dataclasses.replace(model, reach=3).own_reach(ahead) for ahead in (None, 2, 4)] == [3, 2, 3]
    assert dataclasses.replace(other, reach=3).own_reach() == 1
    recommends = Generator(dataclasses.replace(model, reach=3), batch_size=1)
    for ours, theirs in (({}, dict(reach=3)), (dict(reach=1), {}), (dict(thoughts=False), dict(thoughts=False))):
        found = recommends.generate(prompts()[:1], max_tokens=4, **ours)
        assert found == generator.generate(prompts()[:1], max_tokens=4, **theirs)


def test_the_field_of_generation_config():
    ids = dict(bos_id=None, eos_id=1, pad_id=0, suppressed=())
    assert thinking_reach(generation_config({}, **ids, reach=4), Path("here")) == 4
    assert thinking_reach(generation_config({"thinking_reach": 4}, **ids), Path("here")) == 4
    assert "thinking_reach" not in generation_config({"thinking_reach": 4}, **ids, thinks=False)
    assert thinking_reach({}, Path("here")) == 1
    assert thinking_reach({"thinking_reach": None}, Path("here")) == 1
    for wrong in (0, 17, "4", 2.0, True):
        with pytest.raises(CheckpointError, match=r"here: thinking_reach of generation_config\.json is"):
            thinking_reach({"thinking_reach": wrong}, Path("here"))

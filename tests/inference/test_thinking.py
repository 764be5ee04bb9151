"""Policies of thinking: what they choose, and that generation thinks only there, whatever else is in the batch."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.evals.tails import Continuation, ContinuationScorer
from quietstar_jax.generate import Generator
from quietstar_jax.hf.generation import thinking
from quietstar_jax.inference.batch import thinking_rate
from quietstar_jax.methods.thinking import (
    ALWAYS,
    NEVER,
    THINKING,
    Position,
    choose_policy,
    parse_policy,
    rankings,
    thinks,
)
from quietstar_jax.thoughts.text import entropy, log_prob_of

PROMPTS = ["w3 w4 w5", "w9", "w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13", "w20 w21"]
NEW = 12
SAMPLED = dict(temperature=1.5, top_p=0.9, thought_temperature=0.7)


def chosen(policy: str, logits: np.ndarray) -> list[bool]:
    parsed, logits = parse_policy(policy), jnp.array(logits, jnp.float32)
    count = len(logits)
    at = Position(logits, entropy(logits), jnp.arange(count), jnp.arange(count) / count, jnp.arange(count) / 10,
                  log_prob_of(logits, 2))  # fmt: skip
    return thinks(parsed.name, jnp.array(parsed.numbers, jnp.float32), at).tolist()


def test_what_policies_choose():
    probabilities = [[0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01], [0.5, 0.4, 0.05, 0.05], [0.7, 0.3, 0, 0]]
    logits = np.log(np.maximum(probabilities, 1e-30))
    assert chosen("always", logits) == [True] * 4
    assert chosen("never", logits) == [False] * 4
    assert chosen("every:1", logits) == [True] * 4
    assert chosen("every:2", logits) == [False, True, False, True]
    assert chosen("every:3", logits) == [False, False, True, False]
    assert chosen("random:0.5", logits) == [True, True, False, False]
    assert chosen("random:0", logits) == [False] * 4
    assert chosen("random:1", logits) == [True] * 4
    assert chosen("entropy:0", logits) == [True] * 4  # 1.386, 0.168, 1.013, 0.611
    assert chosen("entropy:0.6", logits) == [True, False, True, True]
    assert chosen("entropy:0.6,1.2", logits) == [False, False, True, True]
    assert chosen("entropy:1.4", logits) == [False] * 4
    assert chosen("margin:0.15", logits) == [True, False, True, False]  # 0, 0.96, 0.1, 0.4
    assert chosen("margin:0.41", logits) == [True, False, True, True]
    assert chosen("margin:0", logits) == [False] * 4
    assert chosen("gate:0.1", logits) == [False, False, True, True]  # 0, 0.1, 0.2, 0.3
    assert chosen("gate:-0.05", logits) == [True] * 4
    assert chosen("start:0.03", logits) == [True, False, True, False]  # 0.25, 0.01, 0.05, 0
    assert chosen("start:0", logits) == [True] * 4


def test_a_ranking_is_the_quantity_that_its_policy_compares_with_its_number():
    """So that a threshold of the ranking, as `--think-front` prints it, is a number of the policy."""
    logits = jax.random.normal(jax.random.key(0), (9, 5))
    at = Position(logits, entropy(logits), jnp.arange(9), jnp.arange(9) / 9, jnp.arange(9) / 10, log_prob_of(logits, 2))
    found = rankings(at)
    assert found.keys() == {name for name, entry in THINKING.items() if entry.traits["ranking"]}
    for name, value in found.items():
        threshold = np.sort(value)[3:5].mean()
        policy = parse_policy(f"{name}:{threshold:.6f}")
        chosen = thinks(name, jnp.array(policy.numbers, jnp.float32), at)
        largest = THINKING[name].traits["ranking"].largest_first
        np.testing.assert_array_equal(chosen, value > threshold if largest else value < threshold)


def test_a_policy_is_written_as_it_is_read():
    for text in ("always", "never", "every:3", "random:0.1", "entropy:1.5", "entropy:0.5,4", "margin:1", "gate:-0.1",
                 "start:0.01"):  # fmt: skip
        assert str(parse_policy(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "one of always, never, every:N, random:P, entropy:MIN\\[,MAX\\], margin:BOUND, gate:PRICE, start:P"),
        ("entropi:1", "Did you mean entropy"),
        ("Always", "Did you mean always"),
        ("always:1", "with 1 numbers; it is written always"),
        ("every", "with 0 numbers; it is written every:N"),
        ("every:", "its n must be a whole number"),
        ("every:0", "its n must be a whole number, 1 .."),
        ("every:1.5", "its n must be a whole number"),
        ("random:1.01", r"its p must be a number, 0 \.\. 1"),
        ("random:-0.1", "its p"),
        ("random:nan", "its p"),
        ("random:0.1,0.2", "with 2 numbers"),
        ("entropy:inf", "its min must be a number, 0 or more"),
        ("entropy:1,inf", "its max"),
        ("entropy:1,", "its max"),
        ("entropy:2,1", "must ascend: entropy:MIN"),
        ("entropy:1,2,3", "with 3 numbers"),
        ("margin:x", "its bound"),
        ("gates:0.5", "it must be one of"),
        ("gate", "with 0 numbers; it is written gate:PRICE"),
        ("gate:inf", r"its price must be a number\."),
        ("start:1.5", r"its p must be a number, 0 \.\. 1"),
    ],
)
def test_policies_that_cannot_be(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_policy(text)
    with pytest.raises(CheckpointError, match="folder: thinking"):
        thinking({"thinking": text}, "folder")


def test_whether_and_where_to_think_go_together():
    assert choose_policy(None, None) == choose_policy(True, None) == choose_policy(True, None, "never") == ALWAYS
    assert choose_policy(False, None, "every:2") == choose_policy(None, "never") == NEVER
    assert choose_policy(False, "never") == NEVER
    assert choose_policy(True, None, "every:2") == choose_policy(None, "every:2") == parse_policy("every:2")
    for thoughts, think in ((False, "every:2"), (False, "always"), (True, "never")):
        with pytest.raises(ConfigError, match=f"think is '{think}', but `thoughts`"):
            choose_policy(thoughts, think)


@pytest.fixture(scope="module")
def endless(generator) -> Generator:
    return Generator(dataclasses.replace(generator.model, eos_ids=()), batch_size=3)


def made(one) -> list[bool]:
    return [bool(token.thought_ids) for token in one.tokens]


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_policy_that_always_chooses_to_think_gives_what_always_gives(endless, options):
    found, everywhere = (endless.generate(PROMPTS, max_tokens=NEW, think=t, **options) for t in ("entropy:0", "always"))
    for one, other in zip(found, everywhere, strict=True):
        assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
        assert [token.thought_ids for token in one.tokens] == [token.thought_ids for token in other.tokens]
        np.testing.assert_allclose(one.mixing_weights, other.mixing_weights, atol=1e-5)
        assert thinking_rate([one]) == 1


def test_a_policy_that_never_chooses_to_think_gives_what_never_gives(endless):
    nowhere = endless.generate(PROMPTS, max_tokens=NEW, think="never")
    assert endless.generate(PROMPTS, max_tokens=NEW, think="entropy:1000") == nowhere
    assert endless.generate(PROMPTS, max_tokens=NEW, thoughts=False) == nowhere
    assert nowhere != endless.generate(PROMPTS, max_tokens=NEW)


def median_entropy(generator: Generator, texts: list[list[int]]) -> float:
    """Of the plain predictions that generation meets."""
    model = generator.model
    scorer = ContinuationScorer(model, model.settings(0), batch_size=1)
    return float(np.median(np.concatenate([one.base_entropy for one in scorer([Continuation(t, NEW) for t in texts])])))


@pytest.mark.parametrize("policy", ["every:3", "entropy"])
def test_tokens_are_those_with_and_without_a_thought_and_the_policy_says_which(endless, policy):
    """Against single tokens after the same text, and against the positions that evaluation chooses."""
    prompts = [list(endless.encode(prompt)) for prompt in PROMPTS]
    if policy == "entropy":
        texts = endless.generate(prompts, max_tokens=NEW, think="every:2")
        whole = [[*prompt, *one.token_ids] for prompt, one in zip(prompts, texts, strict=True)]
        policy = f"entropy:{median_entropy(endless, whole):.5f}"
    found = endless.generate(prompts, max_tokens=NEW, think=policy)
    texts = [[*prompt, *one.token_ids] for prompt, one in zip(prompts, found, strict=True)]
    model = endless.model
    scorer = ContinuationScorer(model, model.settings(), batch_size=4, think=parse_policy(policy))
    scores = scorer([Continuation(text, NEW) for text in texts])
    assert [made(one) for one in found] == [score.made.tolist() for score in scores]
    assert 0 < thinking_rate(found) < 1
    for one, score in zip(found, scores, strict=True):
        np.testing.assert_allclose(one.mixing_weights, score.weight, atol=1e-4)
        where = score.made
        np.testing.assert_array_equal(score.talk.nll[~where], score.base.nll[~where])
        assert not score.reward[~where].any()
        assert score.reward[where].any()
    prefixes = [text[: len(prompt) + k] for text, prompt in zip(texts, prompts, strict=True) for k in range(NEW)]
    single = {think: endless.generate(prefixes, max_tokens=1, think=think) for think in ("always", "never")}
    flags = [flag for one in found for flag in made(one)]
    expected = [single["always" if flag else "never"][i] for i, flag in enumerate(flags)]
    assert [token.id for one in found for token in one.tokens] == [one.token_ids[0] for one in expected]
    assert [token.thought_ids for one in found for token in one.tokens] == [
        one.tokens[0].thought_ids for one in expected
    ]


@pytest.mark.parametrize("options", [dict(think="random:0.4"), dict(think="random:0.4", **SAMPLED)])
def test_a_text_depends_neither_on_its_neighbours_nor_on_calls(endless, options):
    together = endless.generate(PROMPTS, max_tokens=NEW, **options)
    assert endless.generate(PROMPTS[::-1], max_tokens=NEW, **options) == together[::-1]
    assert [endless.generate([prompt], max_tokens=NEW, **options)[0] for prompt in PROMPTS] == together
    streamed = list(endless.stream(PROMPTS[0], max_tokens=NEW, **options))
    assert [(token.id, token.thought_ids) for token in streamed] == [
        (token.id, token.thought_ids) for token in together[0].tokens
    ]
    assert 0.25 < thinking_rate(endless.generate(PROMPTS, max_tokens=60, **options)) < 0.55
    assert len({tuple(made(one)) for one in together}) > 1
    (other,) = endless.generate(PROMPTS[:1], max_tokens=NEW, seed=1, **options)
    assert made(other) != made(together[0])


def test_other_numbers_compile_nothing(endless):
    used = Generator(endless.model, batch_size=3)
    used.generate(PROMPTS, max_tokens=NEW, think="entropy:1")
    compiled = used.compilations
    used.generate(["w5 " * 40], max_tokens=4, think="entropy:0.5,3")
    assert used.compilations == compiled == 2


def test_ends_of_texts_whose_rows_are_at_different_passes(endless):
    """A row that ends early, one that ends during a thought of its neighbour, and limits."""
    free = endless.generate(PROMPTS, max_tokens=NEW, think="every:2")
    ends = free[0].token_ids[4]
    ending = Generator(dataclasses.replace(endless.model, eos_ids=(ends,)), batch_size=3)
    for one, whole in zip(ending.generate(PROMPTS, max_tokens=NEW, think="every:2"), free, strict=True):
        kept = whole.token_ids.index(ends) + 1 if ends in whole.token_ids else NEW
        assert one.token_ids == whole.token_ids[:kept]
        assert one.finish_reason == ("eos" if ends in whole.token_ids else "length")
    stop = free[1].text[4:9]
    for one, whole in zip(endless.generate(PROMPTS, max_tokens=NEW, think="every:2", stop=[stop]), free, strict=True):
        assert one.text == whole.text.split(stop)[0]


def test_keys_of_thoughts_do_not_stay_in_the_cache(endless):
    """The cache after a text with thoughts is the cache after reading the same text."""
    job = endless.job(4, 5, None, None, 0.0, 1.0, 0.0, (), "every:2")
    engine, alive = endless._engine, np.ones(3, bool)
    requests = endless.requests(PROMPTS[:3], job)
    state, tokens = engine.start(requests, 512), []
    lengths = [len(request.tokens) for request in requests]
    step, knobs = engine.step(job.plan), engine.knobs(requests, job.sampling)
    state = engine.with_thought(state, job.plan)
    while (np.asarray(state.left) > 0).any():
        state, emitted = step(engine.params, state, alive, knobs)
        tokens.append(np.asarray(emitted.tokens))
    columns = np.concatenate(tokens).T
    texts = [(*one.tokens, *column[column >= 0].tolist()) for one, column in zip(requests, columns, strict=True)]
    assert [len(text) - length for text, length in zip(texts, lengths, strict=True)] == [5] * 3
    again = [dataclasses.replace(request, tokens=text) for request, text in zip(requests, texts, strict=True)]
    read = engine.start(again, 512).cache
    for row, text in enumerate(texts):
        for ours, theirs in zip(state.cache, read, strict=True):
            np.testing.assert_allclose(ours[:, row, :, : len(text) - 1], theirs[:, row, :, : len(text) - 1], atol=1e-5)


def test_the_model_recommends_a_policy(endless):
    sparing = Generator(dataclasses.replace(endless.model, think="every:2"), batch_size=3)
    same = (({}, dict(think="every:2")), (dict(think="always"), {}), (dict(thoughts=False), dict(think="never")))
    for ours, theirs in same:
        found = sparing.generate(PROMPTS[:1], max_tokens=4, **ours)
        assert found == endless.generate(PROMPTS[:1], max_tokens=4, **theirs)
    with pytest.raises(ConfigError, match="think is 'every:2'"):
        endless.generate(PROMPTS[:1], thoughts=False, think="every:2")
    assert thinking({}, "here") == "always"

"""The Python API: settings, seeds, ends of texts, what is refused; and what it may not depend on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.errors import CheckpointError, ConfigError, DataError, UserError
from quietstar_jax.generate import Generator
from quietstar_jax.hf.files import open_checkpoint
from quietstar_jax.inference.engine import PROMPT_CHUNK
from quietstar_jax.inference.load_model import load_model
from tests.hf.checkpoints import random_tensors, write
from tests.hf.runs import write_tokenizer
from tests.inference.conftest import ARCHITECTURE, WORDS

NEW = 6
SAMPLED = dict(max_tokens=NEW, temperature=1.5, top_p=0.9, thought_temperature=0.7)
PROMPTS = ["w3 w4 w5", "w9", "w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13", "w20 w21"]


def with_model(generator: Generator, **changes) -> Generator:
    return Generator(dataclasses.replace(generator.model, **changes), batch_size=3)


@pytest.mark.parametrize("options", [dict(max_tokens=NEW), SAMPLED, dict(max_tokens=NEW, thoughts=False)])
def test_a_prompt_gives_the_same_whatever_stands_beside_it(generator, options):
    together = generator.generate(PROMPTS, **options)
    assert generator.generate(PROMPTS[::-1], **options) == together[::-1]
    assert [generator.generate([prompt], **options)[0] for prompt in PROMPTS] == together
    assert len({one.token_ids for one in together}) > 1


def test_streaming_gives_what_a_batch_gives(generator):
    (whole,) = generator.generate(PROMPTS[:1], **SAMPLED)
    streamed = list(generator.stream(PROMPTS[0], **SAMPLED))
    assert [(token.id, token.thought_ids) for token in streamed] == [(t.id, t.thought_ids) for t in whole.tokens]
    assert "".join(token.text for token in streamed) == whole.text
    np.testing.assert_allclose([token.mixing_weight for token in streamed], whole.mixing_weights, atol=1e-5)


def test_seeds(generator):
    first, again, other = (generator.generate(PROMPTS[:1], **SAMPLED, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first.token_ids != other.token_ids
    same = generator.generate([PROMPTS[0]] * 4, **SAMPLED, seed=1)
    assert same[0] == first
    assert len({one.token_ids for one in same}) == 4, "a prompt given four times is drawn four times"
    one_each = generator.generate([PROMPTS[0]] * 2, **SAMPLED, seed=[2, 1])
    assert one_each == [other, first]


def test_nothing_is_compiled_again_for_other_prompts_and_settings(generator):
    used = Generator(generator.model, batch_size=3)
    used.generate(PROMPTS, **SAMPLED)
    compiled = used.compilations
    used.generate(["w5 " * n for n in (1, 70, 30)], max_tokens=9, temperature=0.3, top_p=0.5, thought_temperature=2.0)
    used.generate(["w7"], **SAMPLED, seed=5, stop=["w4"])
    assert used.compilations == compiled == 2, "one program for prompts, one for tokens"


def test_long_prompts_are_read_in_pieces(generator):
    """The text goes on as if its first tokens had been generated and not given."""
    wide = with_model(generator, architecture=dataclasses.replace(ARCHITECTURE, max_positions=400), eos_ids=())
    for length in (PROMPT_CHUNK, PROMPT_CHUNK + 1, 2 * PROMPT_CHUNK + 7):
        prompt = np.random.default_rng(length).integers(2, WORDS, length).tolist()
        (one,) = wide.generate([prompt], max_tokens=4)
        (rest,) = wide.generate([[*prompt, *one.token_ids[:2]]], max_tokens=2)
        assert rest.token_ids == one.token_ids[2:]


def test_ends_of_texts(generator):
    (free,) = with_model(generator, eos_ids=()).generate(PROMPTS[:1], max_tokens=NEW)
    assert (free.finish_reason, len(free.tokens)) == ("length", NEW)
    ending = free.token_ids[3]
    before = free.token_ids.index(ending)
    (ended,) = with_model(generator, eos_ids=(ending,)).generate(PROMPTS[:1], max_tokens=NEW)
    assert ended.finish_reason == "eos"
    assert ended.token_ids == free.token_ids[: before + 1]
    assert ended.text == "".join(token.text for token in free.tokens[:before])


def test_stop_strings(generator):
    endless = with_model(generator, eos_ids=())
    free = endless.generate(PROMPTS, max_tokens=20)
    stop = free[1].text[4:9]  # across tokens
    found = endless.generate(PROMPTS, max_tokens=20, stop=["never", stop])
    for one, cut in zip(free, found, strict=True):
        assert cut.text == one.text.split(stop)[0]
        assert cut.finish_reason == ("stop" if stop in one.text else "length")
        assert cut.token_ids == one.token_ids[: len(cut.tokens)]
    assert found[1].text == free[1].text[:4]
    streamed = endless.stream(PROMPTS[1], max_tokens=20, stop=[stop])
    assert "".join(token.text for token in streamed) == free[1].text[:4]


@pytest.mark.parametrize("options", [dict(max_tokens=40), dict(SAMPLED, max_tokens=40, top_p=1.0)])
@pytest.mark.parametrize("thoughts", [True, False])
def test_forbidden_ids_are_never_generated_even_when_they_are_likeliest(generator, options, thoughts):
    forbidden = [*generator.model.vocabulary.meta_tokens, WORDS + 2, WORDS + 3, 5]
    head = generator.model.params["decoder.lm_head"]
    likely = head.at[:, jnp.array(forbidden)].set(30 * head[:, 7:12])
    made = with_model(
        generator, params={**generator.model.params, "decoder.lm_head": likely}, suppressed_ids=(5,), eos_ids=()
    )
    for one in made.generate(PROMPTS, **options, thoughts=thoughts):
        assert len(one.tokens) == 40
        assert not {*one.token_ids} & {*forbidden}
        assert not {i for token in one.tokens for i in token.thought_ids} & {*forbidden[:2]}


def test_the_longest_that_the_model_knows(generator):
    """The last chain ends on the last position; without thoughts the last token needs none after it."""
    endless, thought = with_model(generator, eos_ids=()), generator.model.thought_length
    prompt = [3] * 80
    assert len(endless.generate([prompt], max_tokens=50)[0].tokens) == 96 - 80 - thought - 1
    assert len(endless.generate([prompt], max_tokens=50, thoughts=False)[0].tokens) == 17
    with pytest.raises(DataError, match="too long: it has 90 tokens, 2 more"):
        endless.generate([[3] * 90])
    short = Generator(endless.model, batch_size=1, max_length=20)
    assert len(short.generate([[3] * 15])[0].tokens) == 5
    with pytest.raises(DataError, match=r"Prompt 2: .*max_length"):
        short.generate(["w3", [3] * 20])


def test_thought_lengths(generator):
    (two,) = generator.generate(["w3"], max_tokens=2, thought_length=2)
    assert {len(token.thought_ids) for token in two.tokens} == {2}
    (none,) = generator.generate(["w3"], max_tokens=2, thoughts=False)
    assert none.thoughts == ("", "")
    (six,) = generator.generate(["w3"], max_tokens=2)
    assert six.thoughts == tuple(generator.model.tokenizer.decode(token.thought_ids) for token in six.tokens)


def test_texts_begin_as_in_training(generator):
    assert generator.model.bos == (0,)
    assert generator.encode("w3 w4") == (0, 3, 4)
    assert generator.encode([3, 4]) == (3, 4)
    spelled = generator.model.tokenizer.decode([0])
    assert generator.encode(f"{spelled} w3 w4") == (0, 3, 4)


def test_bfloat16(generator):
    half = with_model(
        generator,
        dtype="bfloat16",
        params=jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, generator.model.params),
    )
    assert [one.finish_reason for one in half.generate(PROMPTS, **SAMPLED)]
    full = generator.generate(PROMPTS, max_tokens=NEW)
    agreed = [
        a.token_ids[0] == b.token_ids[0] for a, b in zip(half.generate(PROMPTS, max_tokens=NEW), full, strict=True)
    ]
    assert sum(agreed) >= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_tokens=0), "max_tokens is 0"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=1e-7), "temperature is 1e-07"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(thought_temperature=-0.1), "thought_temperature"),
        (dict(thought_length=0), "thought_length is 0"),
        (dict(stop="w3"), "stop is 'w3'"),
        (dict(stop=[""]), r"stop is \[''\]"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=[1, 2]), "for each prompt"),
    ],
)
def test_settings_that_cannot_be(generator, options, message):
    with pytest.raises(ConfigError, match=message):
        generator.generate(["w3"], **options)


@pytest.mark.parametrize("prompt", ["", [], [40], [-1], "w3 " * 100])
def test_prompts_that_cannot_be(generator, prompt):
    with pytest.raises(DataError, match="Prompt 2: "):
        generator.generate(["w3", prompt])


@pytest.mark.parametrize(
    "prompt", [[3, 4], (3, 4), np.array([3, 4]), np.array([3, 4], np.uint8), jnp.array([3, 4]), [np.int64(3), 4]]
)
def test_kinds_of_token_ids(generator, prompt):
    assert generator.encode(prompt) == (3, 4)
    assert all(type(token) is int for token in generator.encode(prompt))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.array([], np.int32), "The prompt is empty"),
        (np.array([[3, 4]]), r"not of shape \(1, 2\)"),
        (np.array(3), "not ndarray"),
        (3, "not int"),
        (None, "not NoneType"),
        ({3, 4}, "not set"),
        (b"w3", "not bytes"),
        ([3.0], "3.0, which is not an integer"),
        (np.array([3.5]), "not an integer"),
        ([True, 3], "contains True"),
        (np.array([True]), "contains np.True_"),
        (["w3"], "contains 'w3'"),
        ([[3]], r"contains \[3\]"),
        ([-1, 3], "no embedding .*: -1"),
        ([10**30], "no embedding .*: 1000"),
    ],
)
def test_what_is_no_prompt(generator, prompt, message):
    with pytest.raises(DataError, match=message):
        generator.encode(prompt)


def test_one_text_is_no_list_of_prompts(generator):
    with pytest.raises(ConfigError, match="list"):
        generator.generate("w3 w4")
    with pytest.raises(ConfigError, match="batch_size"):
        Generator(generator.model, batch_size=0)


def test_a_model_that_cannot_think(tmp_path):
    write(tmp_path / "hf", random_tensors(ARCHITECTURE), ARCHITECTURE)
    write_tokenizer(tmp_path / "hf", WORDS)
    assert open_checkpoint(str(tmp_path / "hf")).tensors
    plain = Generator(load_model(tmp_path / "hf"), batch_size=1)
    assert plain.generate(["w3"], max_tokens=2)[0].thoughts == ("", "")
    for options in (dict(thoughts=True), dict(thought_length=3)):
        with pytest.raises(CheckpointError, match="no trained mixing head"):
            plain.generate(["w3"], **options)


def test_a_run_that_had_something_else_in_the_place_of_thoughts(generator):
    paused = with_model(generator, thought=dataclasses.replace(generator.model.thought, control="pause"))
    with pytest.raises(UserError, match="'pause'"):
        paused.generate(["w3"])
    assert paused.generate(["w3"], max_tokens=1, thoughts=False)

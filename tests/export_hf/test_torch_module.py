"""The torch module that ships with an export thinks what JAX thinks."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions, thinking_class
from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.models.families import FAMILIES
from tests.hf.runs import END, START, our_predictions, start_run, write_tokenizer
from tests.models.test_parity import LENGTH, VOCAB, random_model, their_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch_module = importlib.import_module("quietstar_jax.export_hf.torch_module")
torch.set_num_threads(1)  # tiny matrices: threads that wait for each other cost more than they save

META = [VOCAB, VOCAB + 1]
NEW = 5  # tokens generated
LOWEST = torch.finfo(torch.float32).min


def thinking(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def exported(folder: Path, variant: str, known: tuple[str, ...] = (), **thought: Any) -> tuple[Any, ...]:
    """(run, state, original torch model, exported folder); `known` tokens are in the tokenizer from the start."""
    original = random_model(variant)
    original.save_pretrained(folder / "hf")
    write_tokenizer(folder / "hf", UNUSED[0], *known)
    run, state = start_run(folder / "run", folder / "hf", **thought)
    export(folder / "run", folder / "out", ExportOptions())
    return run, state, original, folder / "out"


UNUSED = [*range(VOCAB - 4, VOCAB)]  # rows without a token


def text(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).integers(2, VOCAB, (3, length))


def test_there_is_a_class_for_every_family():
    assert {f"{name}ForCausalLM" for name in torch_module.DECODERS} == {one.class_name for one in FAMILIES.values()}
    for family in FAMILIES:
        made = getattr(torch_module, thinking_class(family))
        assert issubclass(made, (torch_module.Thinking, getattr(transformers, FAMILIES[family].class_name)))


def test_a_class_that_this_version_lacks_is_named():
    with pytest.raises(AttributeError, match=r"QuietStarNewForCausalLM.*newer version"):
        torch_module.QuietStarNewForCausalLM  # noqa: B018


@pytest.fixture(
    scope="module",
    params=[
        "llama",
        "llama tied",
        "mistral",
        "phi3 partial rotary",
        "qwen2 mixed windows",
        "qwen3 windows yarn",
        "qwen3 attention bias",
        "gemma2",
        "gemma3_text two bases",
        "olmo2 tied",
    ],
)
def case(request, tmp_path_factory):
    run, state, original, folder = exported(tmp_path_factory.mktemp("export"), request.param)
    model = thinking(folder)
    prompts = text(LENGTH - NEW)
    generated = model.generate(torch.tensor(prompts), max_new_tokens=NEW, do_sample=False, eos_token_id=None).numpy()
    # One compiled call for the text and for what was generated.
    ours = our_predictions(run, state, np.concatenate([text(), generated]))
    return {"model": model, "original": original, "generated": generated, "ours": ours}


@pytest.mark.some(4)
def test_thoughts_and_mixed_logits_equal_ours_at_every_position(case):
    with torch.no_grad():
        theirs = case["model"](torch.tensor(text()))
    thoughts, mixed, base = (x[:3] for x in case["ours"])
    np.testing.assert_array_equal(theirs.thoughts, thoughts)
    assert np.abs(theirs.logits[..., :VOCAB].numpy() - mixed).max() < 1e-4
    assert np.abs(mixed - base).max() > 0.3, "thoughts that change nothing prove nothing"
    assert (theirs.logits[..., META] == LOWEST).all()


def test_generated_text_is_what_we_would_have_predicted(case):
    # Of the ids that are tokens: no text has another.
    predicted = case["ours"][1][3:, :, : -len(UNUSED)].argmax(-1)[:, LENGTH - NEW - 1 : -1]
    np.testing.assert_array_equal(case["generated"][:, -NEW:], predicted)


def test_without_thoughts_it_is_the_original_model(case):
    tokens = torch.tensor(text())
    with torch.no_grad():
        plain = case["model"](tokens, thought_length=0).logits[..., :VOCAB].numpy()
    np.testing.assert_allclose(plain, their_logits(case["original"], text(), np.ones((3, LENGTH))), atol=1e-5)
    ours = case["model"].generate(tokens, max_new_tokens=NEW, do_sample=False, thought_length=0, eos_token_id=None)
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, suppress_tokens=UNUSED)
    theirs = case["original"].generate(tokens, **options)
    assert (ours == theirs).all()


@pytest.mark.parametrize("thought_length", [None, 0])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(case, side, thought_length):
    tokens, valid = torch.tensor(text()), (LENGTH, 15, 9)
    mask, padded = torch.zeros_like(tokens), torch.ones_like(tokens)
    for row, n in enumerate(valid):
        place = slice(LENGTH - n, None) if side == "left" else slice(n)
        mask[row, place], padded[row, place] = 1, tokens[row, :n]
    with torch.no_grad():
        together = case["model"](padded, attention_mask=mask, thought_length=thought_length).logits
        for row, n in enumerate(valid):
            alone = case["model"](tokens[row : row + 1, :n], thought_length=thought_length).logits[0]
            assert (together[row][mask[row].bool()] - alone).abs().max() < 1e-4


def test_a_left_padded_batch_generates_what_each_text_alone_does(case):
    tokens, valid = torch.tensor(text(12)), (12, 9, 4)
    mask = (torch.arange(12) >= 12 - torch.tensor(valid)[:, None]).long()
    padded = torch.where(mask.bool(), tokens, 1)
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    cached = case["model"].generate(padded, attention_mask=mask, **options)
    assert (cached == case["model"].generate(padded, attention_mask=mask, use_cache=False, **options)).all()
    for row, n in enumerate(valid):
        assert (cached[row, 12 - n :] == case["model"].generate(tokens[row : row + 1, -n:], **options)[0]).all()


def test_a_generation_configuration_without_a_cache_is_followed(case):
    tokens, options = torch.tensor(text(12)), dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    expected = case["model"].generate(tokens, **options)
    generation = case["model"].generation_config
    generation.use_cache, before = False, generation.use_cache
    try:
        assert case["model"].generate(tokens, **options).equal(expected)
    finally:
        generation.use_cache = before


def test_the_cache_is_left_as_it_was(case):
    tokens = torch.tensor(text())
    with torch.no_grad():
        whole = case["model"](tokens, use_cache=True)
        first = case["model"](tokens[:, :10], use_cache=True)
        assert first.past_key_values.get_seq_length() == 10
        rest = case["model"](tokens[:, 10:], past_key_values=first.past_key_values, logits_to_keep=3)
    assert (rest.logits - whole.logits[:, -3:]).abs().max() < 1e-4
    assert rest.thoughts.equal(whole.thoughts[:, -3:])


def test_meta_tokens_are_never_generated_even_when_they_are_likeliest(case):
    model = case["model"]
    if model.config.tie_word_embeddings:
        pytest.skip("the rows of the head are the embeddings")
    with torch.no_grad():
        saved = model.lm_head.weight[META].clone()
        model.lm_head.weight[META] = 1e3 * model.lm_head.weight[[7, 8]]
        try:
            made = model.generate(torch.tensor(text()), max_new_tokens=NEW, do_sample=True, num_beams=2)
            thoughts = model(torch.tensor(text())).thoughts
        finally:
            model.lm_head.weight[META] = saved
    assert not np.isin(made, META).any()
    assert not np.isin(thoughts, META).any()


def test_more_positions_than_think_at_once(case):
    tokens = torch.tensor(np.tile(text(), 2))  # 48 positions, within the 64 that the tiny models know
    module = __import__(type(case["model"]).__module__, fromlist=["x"])
    with torch.no_grad():
        whole = case["model"](tokens).logits
        module.POSITIONS_AT_ONCE, kept = 7, module.POSITIONS_AT_ONCE
        try:
            pieces = case["model"](tokens).logits
        finally:
            module.POSITIONS_AT_ONCE = kept
    assert (whole - pieces).abs().max() < 1e-4


@pytest.mark.parametrize(("known", "mixing"), [((START, END), "log_probabilities"), *(((), name) for name in MIXINGS)])
def test_every_mixing(known, mixing, tmp_path):
    run, state, _, folder = exported(tmp_path, "llama", known, mixing=mixing, embedding_scale=7.0)
    ids = [run.tokenizer.token_id(token) for token in known]
    assert run.vocabulary.meta_tokens == tuple(ids)
    thoughts, mixed, _ = our_predictions(run, state, text())
    model = thinking(folder)
    with torch.no_grad():
        theirs = model(torch.tensor(text()))
    np.testing.assert_array_equal(theirs.thoughts, thoughts)
    others = np.setdiff1d(np.arange(VOCAB), ids)
    assert np.abs(theirs.logits[..., :VOCAB].numpy() - mixed)[..., others].max() < 1e-4
    assert (theirs.logits[..., ids or META] == LOWEST).all()

    with torch.no_grad():  # start and end become by far the likeliest tokens
        model.lm_head.weight[ids or META] = 1e3 * model.lm_head.weight[[7, 8]]
        found = model(torch.tensor(text()))
    assert not np.isin(found.thoughts, ids or META).any()
    assert not np.isin(found.logits.argmax(-1), ids or META).any()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_what_it_cannot_think_with_is_refused(case):
    tokens = torch.tensor(text())
    with pytest.raises(ValueError, match=r"must be \[3, 24\]"):
        case["model"](tokens, attention_mask=torch.ones(3, 5))
    with pytest.raises(ValueError, match="DynamicCache"):
        case["model"].generate(tokens, max_new_tokens=2, cache_implementation="static")
    try:
        case["model"].train().gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="Gradient checkpointing"):
            case["model"](tokens)
        assert case["model"](tokens, labels=tokens, thought_length=0).loss > 0
    finally:
        case["model"].gradient_checkpointing_disable()
        case["model"].eval()
    plain = dict(max_new_tokens=2, do_sample=False, eos_token_id=None, thought_length=0)
    fixed = case["model"].generate(tokens, cache_implementation="static", **plain)
    assert (fixed == case["model"].generate(tokens, **plain)).all()
    static = transformers.StaticCache(config=case["model"].config, max_cache_len=40)
    with pytest.raises(ValueError, match="DynamicCache"):
        case["model"](tokens, past_key_values=static)


def test_loss_eager_attention_and_bfloat16(tmp_path):
    *_, folder = exported(tmp_path, "mistral")
    tokens = torch.tensor(text())
    with torch.no_grad():
        sdpa, eager = thinking(folder), thinking(folder, attn_implementation="eager")
        found = eager(tokens, labels=tokens)
        assert (found.logits - sdpa(tokens).logits).abs().max() < 1e-4
        targets = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert found.loss == pytest.approx(targets.item(), rel=1e-5)
        half = thinking(folder, dtype=torch.bfloat16)(tokens)
        assert half.logits.dtype == torch.float32
        same = (half.thoughts == sdpa(tokens).thoughts).all(-1)
        assert same.float().mean() > 0.5
        assert (half.logits - sdpa(tokens).logits)[same][:, :VOCAB].abs().max() < 0.3


ALONE = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "orbax", "tensorstore", "quietstar_jax"):
            raise ImportError(name)


sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

torch.set_num_threads(1)
folder, copy = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
text = tokenizer(["w5 w6 w7 w8", "w9"], return_tensors="pt", padding=True)
assert text.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
made = model.generate(**text, **options)
alone = model.generate(**tokenizer("w9", return_tensors="pt"), **options)
assert made[1, 3:].equal(alone[0])
beams = model.generate(**text, num_beams=3, **options)
assert beams.equal(model.generate(**text, num_beams=3, use_cache=False, **options))
drawn = model.generate(**text, max_new_tokens=5, do_sample=True, num_return_sequences=3)
assert not set(model.config.thought_token_ids) & set(drawn.flatten().tolist())
embedded = model.get_input_embeddings()(text.input_ids)
assert model.generate(inputs_embeds=embedded, attention_mask=text.attention_mask, **options).equal(made[:, 5:])
one = tokenizer("w5 w6 w5 w6", return_tensors="pt")
assert model.generate(**one, prompt_lookup_num_tokens=2, **options).equal(model.generate(**one, **options))
written = pipeline("text-generation", model=model, tokenizer=tokenizer)(["w5 w6", "w7"], batch_size=2, max_new_tokens=3)
assert len(written) == 2
model.save_pretrained(copy)
tokenizer.save_pretrained(copy)
again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True).eval()
assert again.generate(**AutoTokenizer.from_pretrained(copy)(["w5 w6 w7 w8", "w9"], return_tensors="pt", padding=True),
                      **options).equal(made)
"""


def test_who_has_only_transformers_can_use_it(tmp_path):
    *_, folder = exported(tmp_path, "mistral")
    command = [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "copy")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_can_be_saved_and_loaded_again(case, tmp_path):
    case["model"].save_pretrained(tmp_path)
    again = thinking(tmp_path)
    with torch.no_grad():
        assert again(torch.tensor(text())).logits.equal(case["model"](torch.tensor(text())).logits)

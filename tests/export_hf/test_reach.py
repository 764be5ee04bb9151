"""Exports that use a thought for several tokens: the numbers of evaluation, and those of the definition, one by one."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quietstar_jax.evals.tails import Continuation, ContinuationScorer
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.methods.thinking import parse_policy
from tests.export_hf.exports import exported_run, tensors, write_checkpoint
from tests.hf.runs import start_run
from tests.models.test_parity import VOCAB

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # tiny matrices

PROMPTS = [[0, 5, 6, 7, 8, 21, 9], [0, 9, 33], [0, 11, 4, 12]]
POLICIES = ("always", "every:2", "entropy:2.5")
NEW, REACH = 6, 3
GREEDY = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True)
# Name -> variant of `test_parity`, how thoughts end.
CASES = {
    "plain": ("llama", "fixed"),
    "windows": ("qwen2 mixed windows", "fixed"),
    "gemma": ("gemma3_text two bases", "fixed"),
    "sampled": ("llama", "sampled"),
    "token": ("llama", "token"),
}


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run` and its export `out`; thoughts of some end by a head or at the token 2 (`---`)."""
    folder = tmp_path_factory.mktemp(request.param)
    variant, end = CASES[request.param]
    write_checkpoint(folder / "hf", variant)
    if end == "token":
        weights = tensors(folder / "hf")
        weights["lm_head.weight"][2] *= 11  # so that the token is sometimes certain, and sometimes impossible
        save_file(weights, folder / "hf" / "model.safetensors", {"format": "pt"})
    start_run(folder / "run", folder / "hf", mixing="probabilities", end=end)
    export(folder / "run", folder / "out", ExportOptions())
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True).eval()


def padded(texts: list[list[int]], side: str = "left") -> dict[str, Any]:
    """Inputs of a call, [B, L]."""
    width = max(map(len, texts))
    tokens, mask = torch.ones(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(width - len(text), None) if side == "left" else slice(len(text))
        tokens[row, place], mask[row, place] = torch.tensor(text), 1
    return {"input_ids": tokens, "attention_mask": mask}


def thinks(model: Any, policy: str, text: list[int]) -> bool:
    """Whether a policy thinks after the last token of a text."""
    if policy == "every:2":
        return len(text) % 2 == 0
    return bool(model(torch.tensor([text]), think=policy, logits_to_keep=1).thoughts[0, 0, 0] != -1)


def first(prompt: list[int]) -> int:
    """The first position that thinks when a prompt is continued."""
    return max(0, len(prompt) - REACH)


@torch.no_grad()
def defined(
    model: Any, text: list[int], first: int, policy: str = "always", reach: int = REACH,
    lengths: Sequence[int] = (6,) * 16,
) -> tuple[Any, float]:  # fmt: skip
    """Log-probabilities of the next token and the mixing weight, by the definition; positions from `first` on think.

    Each chain is a plain text of its own: the text, start, thought, end, and the tokens since. The thought k positions
    ago has at most lengths[k] tokens.
    """
    embed, last = model.get_input_embeddings(), len(text) - 1
    here = model.model(torch.tensor([text])).last_hidden_state[0, -1]
    mixed, rest = model._text_logits(here).softmax(-1), 1.0
    for k in reversed(range(reach)):
        before = text[: last - k + 1]
        if last - k < first or not thinks(model, policy, before):
            continue
        thought = model(torch.tensor([before]), thought_length=lengths[k], logits_to_keep=1).thoughts[0, 0]
        start, end = model._meta(model.start_embedding, 1, 1), model._meta(model.end_embedding, 1, 1)
        parts = [embed(torch.tensor([before])), start, embed(thought[thought >= 0])[None], end]
        parts += [embed(torch.tensor([text[last - k + 1 :]]))] if k else []
        after = model.model(inputs_embeds=torch.cat(parts, 1)).last_hidden_state[0, -1]
        weight = (model.talk_head[0](torch.cat([here, after])) - 1).sigmoid()
        mixed = (1 - weight) * mixed + weight * model._text_logits(after).softmax(-1)
        rest = rest * (1 - weight.item())
    return mixed.log(), 1 - rest


@pytest.mark.some(6)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_whole_text_has_the_scores_of_evaluation(folder, model, policy):
    draw = np.random.default_rng(1)
    tails = [Continuation(draw.integers(3, VOCAB - 4, n).tolist(), last) for n, last in ((20, 16), (18, 14), (22, 15))]
    opened, think = load_model(folder / "run"), parse_policy(policy)
    scores = ContinuationScorer(opened, opened.settings(6, reach=REACH), batch_size=3, think=think)(tails)
    lengths: set[int] = set()
    for side in ("left", "right"):
        inputs = padded([list(tail.tokens) for tail in tails], side)
        with torch.no_grad():
            found, near = model(**inputs, think=policy, reach=REACH), model(**inputs, think=policy)
        for row, (tail, ours) in enumerate(zip(tails, scores, strict=True)):
            own, truth = inputs["attention_mask"][row].bool(), torch.tensor(tail.tokens)[1:, None]
            theirs, usual = (
                -x.logits[row][own].log_softmax(-1)[:-1].gather(1, truth)[-tail.last :, 0] for x in (found, near)
            )
            np.testing.assert_allclose(theirs, ours.talk.nll, atol=1e-4)
            np.testing.assert_allclose(found.mixing_weight[row][own][:-1][-tail.last :], ours.weight, atol=1e-4)
            assert (theirs - usual).abs().max() > 1e-2, "thoughts that change nothing prove nothing"
            assert (found.thoughts[row][~own] == -1).all()
            made = found.thoughts[row][own]
            lengths |= set((made >= 0).sum(-1)[made[:, 0] != -1].tolist())
    if policy == "always":
        assert (lengths > {0, 6}) == (CASES[folder.name[:-1]][1] != "fixed"), lengths


@pytest.mark.some(6)
@pytest.mark.parametrize("policy", POLICIES)
def test_generated_tokens_use_the_thoughts_from_the_end_of_the_prompt_on(model, policy):
    inputs = padded(PROMPTS)
    made = model.generate(**inputs, think=policy, reach=REACH, **GREEDY)
    unused, changes = torch.tensor(model.config.unused_token_ids), []
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for step in range(NEW):
            expected, _ = defined(model, text, first(prompt), policy)
            found = made.logits[step][row, :VOCAB].log_softmax(-1)
            np.testing.assert_allclose(found, expected, atol=2e-4)
            changes.append((expected - defined(model, text, first(prompt), policy, 1)[0]).abs().max())
            text.append(int(expected.index_fill(0, unused, -torch.inf).argmax()))
        assert text[len(prompt) :] == made.sequences[row, -NEW:].tolist()
    assert sum(change > 1e-2 for change in changes) > 3


@pytest.mark.some(3)
def test_beams_keep_their_own_thoughts(model):
    inputs = padded(PROMPTS)
    options = {**GREEDY, "num_beams": 2, "num_return_sequences": 2, "output_scores": True, "length_penalty": 0.0}
    made = model.generate(**inputs, reach=REACH, **options)
    kept = made.beam_indices[:, :NEW]
    assert (kept[:, 1:] != kept[:, :-1]).any(), "beams that never change places show nothing"
    changes = []
    for row, sequence in enumerate(made.sequences):
        prompt = PROMPTS[row // 2]
        text, score, near = [*prompt, *sequence[-NEW:].tolist()], 0.0, 0.0
        for place in range(len(prompt), len(text)):
            score += float(defined(model, text[:place], first(prompt))[0][text[place]])
            near += float(defined(model, text[:place], first(prompt), reach=1)[0][text[place]])
        assert float(made.sequences_scores[row]) == pytest.approx(score, abs=1e-3)
        changes.append(abs(score - near))
    assert max(changes) > 1e-2


@torch.no_grad()
def test_earlier_calls_and_changes_of_the_cache(model):
    """Pieces of a text are the whole text; so they are after tokens are cut off, and in another order of the batch."""
    tokens = torch.tensor(np.random.default_rng(2).integers(3, VOCAB - 4, (2, 16)))
    options = dict(reach=REACH, use_cache=True)
    whole = model(tokens, **options).logits
    first = model(tokens[:, :7], **options)
    cache = first.past_key_values
    model(tokens[:, [9, 10, 3, 4]], past_key_values=cache, **options)
    cache.crop(-4)
    one = model(tokens[:, 7:8], past_key_values=cache, **options)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 1]))
    cache.reorder_cache(torch.tensor([1, 0]))
    rest = model(tokens[:, 8:], past_key_values=cache, **options)
    assert (torch.cat([first.logits, one.logits, rest.logits], 1) - whole)[..., :VOCAB].abs().max() < 1e-4
    assert cache.get_seq_length() == 16
    again = model(tokens[:, :4], thought_length=2, **options)  # of another length
    for reach, next_token in ((1, 4), (REACH, 5)):
        again = model(tokens[:, [next_token]], past_key_values=again.past_key_values, use_cache=True, reach=reach)
    for row in range(2):  # what was thought before the call with a reach of 1 is forgotten
        expected, weight = defined(model, tokens[row, :6].tolist(), 5)
        np.testing.assert_allclose(again.logits[row, 0, :VOCAB], expected, atol=2e-4)
        assert float(again.mixing_weight[row, 0]) == pytest.approx(weight, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(2, 6), (6, 2)])
def test_thoughts_of_other_lengths_are_continued(model, lengths):
    tokens, cache = torch.tensor([[0, 9, 33, 7], [0, 11, 4, 12]]), None
    for length, part in zip(lengths, (tokens[:, :3], tokens[:, 3:]), strict=True):
        found = model(part, past_key_values=cache, use_cache=True, thought_length=length, reach=2)
        cache = found.past_key_values
        assert found.thoughts.shape[-1] == length
    for row in range(2):
        expected, _ = defined(model, tokens[row].tolist(), 0, reach=2, lengths=lengths[::-1])
        np.testing.assert_allclose(found.logits[row, 0, :VOCAB], expected, atol=2e-4)


def test_guessed_tokens_that_are_cut_off_change_nothing(model):
    text = torch.tensor([[0, 5, 6, 5, 6, 5, 6, 5]])
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=VOCAB - 1, reach=REACH)
    assert model.generate(text, prompt_lookup_num_tokens=4, **options).equal(model.generate(text, **options))


@torch.no_grad()
def test_a_whole_text_follows_the_definition_also_in_pieces_embedded_and_padded(model, monkeypatch):
    inputs = padded(PROMPTS)
    options = dict(reach=4)
    whole = model(**inputs, **options)
    for last in range(len(PROMPTS[0])):
        expected, weight = defined(model, PROMPTS[0][: last + 1], 0, reach=4)
        np.testing.assert_allclose(whole.logits[0, last, :VOCAB], expected, atol=2e-4)
        assert float(whole.mixing_weight[0, last]) == pytest.approx(weight, abs=1e-4)
    monkeypatch.setattr(importlib.import_module(type(model).__module__), "POSITIONS_AT_ONCE", 2)
    assert (model(**inputs, **options).logits - whole.logits)[..., :VOCAB].abs().max() < 1e-4
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    embedded = model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], **options)
    assert (embedded.logits - whole.logits)[..., :VOCAB].abs().max() < 1e-4
    for row, prompt in enumerate(PROMPTS):
        alone = model(torch.tensor([prompt]), **options)
        assert (alone.logits[0] - whole.logits[row, -len(prompt) :])[:, :VOCAB].abs().max() < 1e-4
        assert alone.thoughts[0].equal(whole.thoughts[row, -len(prompt) :])


def test_a_reach_of_1_is_none_and_the_default_is_that_of_the_generation_configuration(model):
    inputs = padded(PROMPTS)
    with torch.no_grad():
        one, none = model(**inputs, reach=1, use_cache=True), model(**inputs, use_cache=True)
    assert one.logits.equal(none.logits)
    assert type(one.past_key_values) is transformers.DynamicCache
    found = [model.generate(**inputs, **GREEDY, **reach).logits for reach in ({"reach": 1}, {}, {"reach": REACH})]
    model.generation_config.thinking_reach = REACH
    try:
        found += [model.generate(**inputs, **GREEDY, **reach).logits for reach in ({"reach": 1}, {})]
    finally:
        del model.generation_config.thinking_reach
    near, default, far, again, configured = map(torch.stack, found)
    assert near.equal(default)
    assert near.equal(again)
    assert far.equal(configured)
    assert (near.softmax(-1) - far.softmax(-1)).abs().max() > 1e-3


def test_no_thought_in_reach_is_no_thought(model):
    inputs = padded(PROMPTS)
    with torch.no_grad():
        found = model(**inputs, think="entropy:1000", reach=REACH)
        plain = model(**inputs, thought_length=0)
    assert (found.logits - plain.logits.log_softmax(-1))[..., :VOCAB].abs().max() < 1e-4
    assert (found.mixing_weight == 0).all()
    assert (found.thoughts == -1).all()


def test_what_has_no_reach_is_refused(model):
    tokens = torch.tensor([PROMPTS[0]])
    for reach in (0, -1, 17, 2.0, "3", True):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"reach is .*; it must be a whole number of tokens, 1 \.\. 16"):
                call(tokens, reach=reach)
    with pytest.raises(ValueError, match="ThoughtCache"):
        model(tokens, past_key_values=transformers.DynamicCache(), reach=2)
    with pytest.raises(ValueError, match="ThoughtCache"):
        model.generate(tokens, past_key_values=transformers.DynamicCache(), reach=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="use_cache"):
        model.generate(tokens, use_cache=False, reach=2, max_new_tokens=2)


@pytest.mark.parametrize("mixing", ["hidden_states", "log_probabilities", "none"])
def test_other_mixings_are_refused(tmp_path, mixing):
    folder = exported_run(tmp_path, mixing=mixing)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True).eval()
    tokens = torch.tensor([PROMPTS[0]])
    with pytest.raises(ValueError, match=rf"reach is 2, but the mixing of this model is '{mixing}'.*'probabilities'"):
        model.generate(tokens, reach=2, max_new_tokens=2)
    assert model(tokens, reach=2, thought_length=0).logits.equal(model(tokens, thought_length=0).logits)

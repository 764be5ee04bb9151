"""Numbers of the published code: loss, logged terms, last logits and every gradient.

QUIETSTAR_GOLDEN names a folder with more such files.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.architecture import Architecture
from quietstar_jax.hf.names import Entry, parameter_shapes, quietstar_entries, to_ours
from quietstar_jax.models.parameters import merge, split
from quietstar_jax.thought_config import ThoughtConfig
from quietstar_jax.thoughts.loss import quiet_star_loss
from quietstar_jax.thoughts.model import QuietStar, init_quiet_star
from quietstar_jax.thoughts.objective import count_targets
from quietstar_jax.thoughts.sample import Thoughts
from quietstar_jax.thoughts.score import chain_hidden_states, mix
from quietstar_jax.thoughts.settings import ThoughtSettings
from quietstar_jax.thoughts.text import here_and_ahead, read_text, real_ahead
from tests.thoughts.cases import relative_error, worst_errors

FOLDER = Path(os.environ.get("QUIETSTAR_GOLDEN") or Path(__file__).parents[1] / "golden")
FILES = sorted(FOLDER.glob("*.npz"))
ROUNDING = 1e-6  # of a sum, relative to the sizes of its terms


@dataclass(frozen=True)
class Golden:
    """One file, in our terms."""

    arrays: Mapping[str, np.ndarray]
    architecture: Architecture
    settings: ThoughtSettings
    tokens: jax.Array
    mask: jax.Array
    thoughts: jax.Array

    def ours(self, kind: str) -> dict[str, np.ndarray]:
        """`param` or `grad` under our names. Every tensor of the file is used, and none is missing."""
        entries = quietstar_entries(self.architecture)
        theirs = {name.removeprefix(f"{kind}/") for name in self.arrays if name.startswith(f"{kind}/")}
        if self.architecture.tie_embeddings:
            theirs.discard("lm_head.weight")  # the embedding once more
        assert theirs == {entry.name for entry in entries}
        return stack(entries, {name: self.arrays[f"{kind}/{name}"] for name in theirs})


def stack(entries: list[Entry], theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under their names -> arrays under ours."""
    ours = {path: np.zeros(shape, np.float32) for path, shape in parameter_shapes(entries).items()}
    for entry in entries:
        for target, array in zip(entry.targets, to_ours(entry, theirs[entry.name]), strict=True):
            ours[target.path][target.index] = array
    return ours


def architecture(meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Architecture:
    """The decoder; options that a file may leave out are read off its tensors."""
    heads, layer = meta["num_attention_heads"], "param/model.layers.0."
    return Architecture(
        family="mistral",
        vocab_size=meta["vocab_size"],
        hidden_size=meta["hidden_size"],
        intermediate_size=meta["intermediate_size"],
        num_layers=meta["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=meta["num_key_value_heads"],
        head_dim=meta.get("head_dim") or meta["hidden_size"] // heads,
        rope_theta=meta["rope_theta"],
        rms_norm_eps=meta["rms_norm_eps"],
        sliding_window=meta.get("sliding_window") or 0,
        activation=meta.get("hidden_act", "silu"),
        qkv_bias=f"{layer}self_attn.q_proj.bias" in arrays,
        output_bias=f"{layer}self_attn.o_proj.bias" in arrays,
        mlp_bias=f"{layer}mlp.gate_proj.bias" in arrays,
        qk_norm=f"{layer}self_attn.q_norm.weight" in arrays,
        tie_embeddings=bool(meta.get("tie_word_embeddings", "param/lm_head.weight" not in arrays)),
    )


def read(path: Path) -> Golden:
    arrays = dict(np.load(path))
    meta = json.loads(str(arrays["meta_json"]))
    settings = ThoughtSettings(
        thought_length=meta["thought_length"],
        num_thoughts=meta["n_passes"],
        tokens_ahead=meta["n_ahead_talk"],
        policy_weight=meta["policy_loss_beta"],
        meta_tokens=(meta["start_token_id"], meta["end_token_id"]),
        pad_id=meta["pad_token_id"],
        config=ThoughtConfig(
            embedding_scale=meta["embedding_scale"],
            score_temperature=meta["reinforce_temperature"],
            base_loss_weight=meta["original_loss_weight"],
        ),
    )
    integers = [jnp.asarray(arrays[name], jnp.int32) for name in ("input_ids", "attention_mask", "thought_tokens")]
    return Golden(arrays, architecture(meta, arrays), settings, integers[0], integers[1] != 0, integers[2])


def build(golden: Golden) -> QuietStar:
    model = init_quiet_star(golden.architecture, [0], [0], golden.settings.config.embedding_scale, jax.random.key(0))
    shapes = {name: value.shape for name, value in split(model)[0].items()}
    params = golden.ours("param")
    assert {name: value.shape for name, value in params.items()} == shapes
    return merge(split(model)[1], {name: jnp.asarray(value) for name, value in params.items()})


def head_inputs(model: QuietStar, golden: Golden) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By the bias of a layer of the mixing head: what ReLU gets [N, units], and the sum of the sizes of its terms."""
    s, head, positions = golden.settings, model.mixing_head, jnp.arange(golden.tokens.shape[1])
    text = read_text(model.decoder, golden.tokens, golden.mask, dtype=s.dtype)
    after = chain_hidden_states(model, text, positions, golden.thoughts, s)[1]
    base = jnp.broadcast_to(here_and_ahead(text.hidden, positions, s.tokens_ahead)[:, None], after.shape)
    counts = np.asarray(jnp.broadcast_to(real_ahead(golden.mask, positions, s.tokens_ahead)[:, None], after.shape[:-1]))
    x, found = np.asarray(jnp.concatenate([base, after], axis=-1), np.float64)[counts], {}
    first = np.concatenate([np.asarray(w[...], np.float64) for w in (head.base_in, head.thought_in)])
    for name, weight, bias in (("in_bias", first, head.in_bias), ("hidden_bias", head.hidden, head.hidden_bias)):
        weight, bias = np.asarray(weight[...], np.float64), np.asarray(bias[...], np.float64)
        found[f"mixing_head.{name}"] = x @ weight + bias, abs(x) @ abs(weight) + abs(bias)
        x = np.maximum(x @ weight + bias, 0)
    return found


def kinks(model: QuietStar, golden: Golden) -> dict[tuple[str, int], float]:
    """Units of the mixing head whose input to ReLU is 0 to rounding somewhere: (bias, number) to the size of its terms.

    The gradient is not defined there, and rounding, which differs between machines, decides which side is taken.
    """
    return {
        (name, int(unit)): float(sizes[:, unit].max())
        for name, (inputs, sizes) in head_inputs(model, golden).items()
        for unit in np.flatnonzero((abs(inputs) <= ROUNDING * sizes).any(axis=0))
    }


def either_side(model: QuietStar, golden: Golden) -> list[QuietStar]:
    """The model; or where units are at the kink of ReLU, models with each of these clearly on one side or the other.

    One unit has a share in all gradients, so that none of them can be compared with a single number then.
    """
    units = kinks(model, golden)
    if units:
        warnings.warn(f"gradients hold on one side of {sorted(units)}, whose input is 0 to rounding", stacklevel=2)
    params, graphdef = split(model)
    models = []
    for signs in itertools.product((1, -1), repeat=len(units)):
        moved = dict(params)
        for sign, ((name, unit), size) in zip(signs, units.items(), strict=True):
            moved[name] = moved[name].at[unit].add(2 * sign * ROUNDING * size)
        models.append(merge(graphdef, moved))
    return models


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return read(request.param)


def test_golden_files_exist() -> None:
    assert FILES, f"no *.npz in {FOLDER}"


def test_golden_second_rows_of_the_thought_embeddings_are_unused(golden: Golden) -> None:
    for name in ("start_embedding", "end_embedding"):
        assert golden.arrays[f"grad/{name}"].shape == (2, golden.architecture.hidden_size)
        assert not golden.arrays[f"grad/{name}"][1].any()


@pytest.mark.parametrize("way", ["whole_text", "uneven_chunks", "rematerialized"])
def test_golden_loss_terms_and_gradients(golden: Golden, way: str) -> None:
    length, s = golden.tokens.shape[1], dataclasses.replace(golden.settings, rematerialize=way == "rematerialized")
    # The smallest chunk that leaves a remainder, a few positions wide.
    chunk = length if way == "whole_text" else next((n for n in range(4, length) if length % n), length - 1)

    @jax.jit
    def objective(model: QuietStar, tokens: jax.Array, mask: jax.Array, thoughts: jax.Array) -> Any:
        given = Thoughts(thoughts, jnp.zeros(thoughts.shape, jnp.float32))
        counts = count_targets(mask, s.tokens_ahead)
        return jax.value_and_grad(
            lambda model: quiet_star_loss(model, tokens, mask, lambda *_: given, counts, s, chunk), has_aux=True
        )(model)

    (loss, metrics), gradient = objective(build(golden), golden.tokens, golden.mask, golden.thoughts)
    assert relative_error(loss, golden.arrays["loss"]) <= 1e-5
    arrays = golden.tokens, golden.mask, golden.thoughts
    models = either_side(build(golden), golden)
    gradients = [objective(model, *arrays)[1] for model in models] if len(models) > 1 else [gradient]
    wrong = [worst_errors(split(gradient)[0], golden.ours("grad"), 1e-4) for gradient in gradients]
    assert {} in wrong, wrong

    first = s.thought_length + 2  # n_ahead - 1: where the published code logs the first token ahead
    terms = {"log/policy_loss": "policy_loss", "log/policy_reward": "reward", "log/loss_0": "base_loss"}
    terms |= {f"log/loss_{first + k}": f"talk_loss_{k + 1}" for k in range(s.tokens_ahead)}
    for theirs, ours in terms.items():
        np.testing.assert_allclose(metrics[ours], golden.arrays[theirs], rtol=1e-5, atol=1e-5, err_msg=theirs)


def test_golden_last_logits(golden: Golden) -> None:
    s, (_, length) = golden.settings, golden.tokens.shape

    @jax.jit
    def logits(model: QuietStar, tokens: jax.Array, mask: jax.Array, thoughts: jax.Array) -> jax.Array:
        text, positions = read_text(model.decoder, tokens, mask, dtype=s.dtype), jnp.arange(length)
        hidden = chain_hidden_states(model, text, positions, thoughts, s)[1]
        base_hidden = here_and_ahead(text.hidden, positions, s.tokens_ahead)
        return mix(model, base_hidden, hidden, s.config.mixing)[0][..., -1, :]

    actual = np.asarray(logits(build(golden), golden.tokens, golden.mask, golden.thoughts))
    expected = golden.arrays["talk_logits_last"]
    valid = np.zeros(golden.tokens.shape, bool)
    valid[:, : length - s.tokens_ahead] = np.asarray(golden.mask)[:, s.tokens_ahead :]
    for b, j in np.argwhere(valid):
        assert relative_error(actual[b, :, j], expected[b, :, j]) <= 1e-4, (b, j)


@pytest.mark.parametrize("name", ["mixing_head.in_bias", "mixing_head.hidden_bias"])
def test_a_unit_at_the_kink_of_relu_may_be_on_either_side(name: str) -> None:
    """One unit's bias is moved until an input of it is 0."""
    golden = read(Path(__file__).parents[1] / "golden" / "r2_t2_k2.npz")
    s, length = golden.settings, golden.tokens.shape[1]
    counts = count_targets(golden.mask, s.tokens_ahead)
    given = Thoughts(golden.thoughts, jnp.zeros(golden.thoughts.shape, jnp.float32))
    model = build(golden)
    assert kinks(model, golden) == {}
    params, graphdef = split(model)
    inputs, sizes = head_inputs(model, golden)[name]
    place, unit = np.unravel_index(np.argmin(abs(inputs) / sizes), inputs.shape)

    @jax.jit
    @jax.grad
    def gradients(params: Any) -> Any:
        model = merge(graphdef, params)
        return quiet_star_loss(model, golden.tokens, golden.mask, lambda *_: given, counts, s, length)[0]

    def moved(by: float) -> dict[str, jax.Array]:
        return params | {name: params[name].at[unit].add(by * sizes[place, unit] - inputs[place, unit])}

    with pytest.warns(UserWarning, match=f"{name}.*{unit}"):
        models = either_side(merge(graphdef, moved(0.0)), golden)
    sides = [gradients(split(model)[0]) for model in models]
    assert len(sides) == 2
    assert worst_errors(*sides, 1e-4)
    for found in (gradients(moved(by)) for by in (0.0, 5 * ROUNDING, -5 * ROUNDING)):
        assert {} in [worst_errors(found, side, 1e-4) for side in sides]

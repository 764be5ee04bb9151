"""The stacked, scanned decoder against a plain one, and its parameters as described."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quietstar_jax.models.decoder import Decoder, attention_windows, base_pass, rms_norm
from quietstar_jax.models.parameters import merge, named_parameters, normal, parameter, split
from quietstar_jax.thoughts.chains import chain_pass
from tests.thoughts import oracle
from tests.thoughts.cases import TINY, random_model

pytestmark = pytest.mark.usefixtures("strict_promotion")

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 9)), jnp.int32)
MASK = jnp.array([[1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1, 1, 1]], bool)
VARIANTS: dict[str, dict] = {
    "plain": {},
    "grouped_heads_of_other_width": {"num_heads": 6, "num_kv_heads": 3, "head_dim": 2},
    "windowed_but_for_one_layer": {"num_layers": 3, "sliding_window": 2, "full_attention_layers": (1,)},
    "every_bias_and_norm": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": True},
    "gelu_tanh_tied": {"activation": "gelu_tanh", "tie_embeddings": True},
    "gemma2": {
        "norm_adds_one": True, "norm_placement": "around", "sliding_window": 3, "full_attention_layers": (1,),
        "score_cap": 1.0, "logit_cap": 2.0, "query_scale": 0.9, "embedding_multiplier": 3.0,
    },
    "gemma3": {
        "norm_adds_one": True, "norm_placement": "around", "sliding_window": 3, "full_attention_layers": (0,),
        "rope_local_theta": 7.0, "qk_norm": True,
    },
    "olmo2": {"norm_placement": "after", "qk_norm": True, "qk_norm_all_heads": True, "num_heads": 4, "qkv_bias": True},
    "relu": {"activation": "relu", "rms_norm_eps": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_base_pass_and_logits_equal_a_plain_decoder(changes: dict) -> None:
    a = dataclasses.replace(TINY, **changes)
    model = random_model(a, 100.0)
    hidden, cache, _ = base_pass(model.decoder, TOKENS, MASK, dtype=jnp.dtype("float32"))
    logits = model.decoder.logits(hidden)
    params = split(model)[0]
    decode = jax.jit(oracle.decode, static_argnums=0)
    for b in range(2):
        expected = decode(a, params, params["decoder.embedding"][TOKENS[b]], MASK[b])
        np.testing.assert_allclose(hidden[b], expected, atol=2e-5)
        np.testing.assert_allclose(logits[b], oracle.head(a, params, expected), atol=5e-5)
    assert cache.keys.shape == cache.values.shape == (a.num_layers, 2, 9, a.num_kv_heads, a.head_dim)


def test_rematerializing_changes_neither_values_nor_gradients() -> None:
    decoder = random_model(TINY, 100.0).decoder

    def loss(decoder: Decoder, rematerialize: bool) -> jax.Array:
        dtype = jnp.dtype("float32")
        return (base_pass(decoder, TOKENS, MASK, dtype=dtype, rematerialize=rematerialize)[0] ** 3).sum()

    plain, lean = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(decoder, remat) for remat in (False, True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-3), plain, lean)


@pytest.mark.parametrize("chains", [False, True], ids=["base_pass", "chain_pass"])
def test_a_layer_keeps_the_results_of_its_weights(chains: bool) -> None:
    """Of query, key, value, output, gate and up; that of down is needed for nothing."""
    decoder = random_model(TINY, 100.0).decoder
    dtype = jnp.dtype("float32")

    def loss(decoder: Decoder, rematerialize: bool) -> jax.Array:
        if not chains:
            return base_pass(decoder, TOKENS, MASK, dtype=dtype, rematerialize=rematerialize)[0].sum()
        prefix = base_pass(decoder, TOKENS, MASK, dtype=dtype)[1]
        embeddings = decoder.embed(TOKENS, dtype)[:, None, :3, None] * jnp.ones((1, 2, 1, 4, 1))
        chain, _ = chain_pass(decoder, embeddings, jnp.arange(3), prefix, MASK, rematerialize=rematerialize)
        return chain.sum()

    def products(rematerialize: bool) -> int:
        jaxpr = jax.make_jaxpr(jax.grad(lambda decoder: loss(decoder, rematerialize)))(decoder)
        return str(jaxpr).count("dot_general[")

    assert products(True) - products(False) >= 6


def test_bfloat16_keeps_activations_narrow_and_logits_wide() -> None:
    model = random_model(TINY, 100.0)
    hidden, cache, _ = base_pass(model.decoder, TOKENS, MASK, dtype=jnp.dtype("bfloat16"))
    logits = model.decoder.logits(hidden)
    assert hidden.dtype == cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    exact = model.decoder.logits(base_pass(model.decoder, TOKENS, MASK, dtype=jnp.dtype("float32"))[0])
    assert 0 < np.abs(np.asarray(logits - exact)).max() < 0.2 * np.abs(np.asarray(exact)).max()
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert (rounded != logits).any(), "logits were rounded to bfloat16"


def test_the_multiplier_of_embeddings_is_rounded_as_they_are() -> None:
    """sqrt(3072) = 55.4256 is 55.5 in bfloat16, as in transformers."""
    a = dataclasses.replace(TINY, embedding_multiplier=3072**0.5)
    decoder = random_model(a, 100.0).decoder
    rows = decoder.embedding[...][TOKENS]
    np.testing.assert_allclose(decoder.embed(TOKENS, jnp.dtype("float32")), rows * np.float32(3072**0.5), rtol=1e-6)
    narrow = decoder.embed(TOKENS, jnp.dtype("bfloat16"))
    np.testing.assert_array_equal(narrow, rows.astype(jnp.bfloat16) * jnp.bfloat16(55.5))


def test_windows_of_layers() -> None:
    a = dataclasses.replace(TINY, num_layers=3, sliding_window=4, full_attention_layers=(0, 2))
    unlimited = 2**31 - 1
    assert attention_windows(a).tolist() == [unlimited, 4, unlimited]
    assert attention_windows(TINY).tolist() == [unlimited] * 2


def test_rms_norm_by_hand() -> None:
    x = jnp.array([[3.0, 4.0]])  # mean square 12.5
    np.testing.assert_allclose(rms_norm(x, jnp.array([1.0, 2.0]), 0.0), [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6)
    np.testing.assert_allclose(rms_norm(x, jnp.ones(2), 12.5), x / 5, rtol=1e-6)
    assert rms_norm(x.astype(jnp.bfloat16), jnp.ones(2), 0.0).dtype == jnp.bfloat16


def test_parameters_are_described_once() -> None:
    """Abstract construction gives the shapes and logical axes of the real one, and allocates nothing."""
    a = dataclasses.replace(TINY, **VARIANTS["every_bias_and_norm"])
    real = named_parameters(Decoder(a, nnx.Rngs(0)))
    abstract = named_parameters(nnx.eval_shape(lambda: Decoder(a, nnx.Rngs(0))))
    assert list(real) == list(abstract)
    for name, value in real.items():
        assert abstract[name].shape == value.shape
        assert abstract[name].get_metadata()["axes"] == value.get_metadata()["axes"], name
        assert len(value.get_metadata()["axes"]) == value.ndim
        assert value.dtype == jnp.float32
    assert "lm_head" not in named_parameters(Decoder(dataclasses.replace(a, tie_embeddings=True), nnx.Rngs(0)))


def test_taking_apart_and_putting_together() -> None:
    decoder = Decoder(TINY, nnx.Rngs(0))
    params, graphdef = split(decoder)
    # The names belong to the right arrays: they come from another walk over the module than the arrays do.
    for name, value in named_parameters(decoder).items():
        np.testing.assert_array_equal(params[name], value[...])
    doubled = merge(graphdef, {name: 2 * value for name, value in params.items()})
    np.testing.assert_array_equal(doubled.layers.query[...], 2 * decoder.layers.query[...])
    assert doubled.architecture == decoder.architecture


@pytest.mark.parametrize(
    ("axes", "reason"), [(("embed",), "got the axes"), (("embed", "unheard_of"), "No rule names the axis 'unheard_of'")]
)
def test_axes_that_do_not_describe_the_shape_are_refused(axes: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parameter(nnx.Rngs(0), (2, 3), axes, normal(1.0))

"""The GPU kernels: interpreted, against one softmax written out; and lowered to Triton, which needs no GPU."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from quietstar_jax.errors import ConfigError
from quietstar_jax.models.attention import MASKED
from quietstar_jax.thoughts.attention import kernel_common, prefix_triton
from quietstar_jax.thoughts.attention.chain_attention import attend_chains
from quietstar_jax.thoughts.attention.kernel_common import Range
from quietstar_jax.thoughts.attention.mask import ChainMask, prefix_visible
from quietstar_jax.thoughts.attention.prefix_triton import BACKWARD, FORWARD, STAGES, Blocks
from quietstar_jax.thoughts.attention.prefix_xla import SoftmaxState

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
TRITON, MOSAIC = "__gpu$xla.gpu.triton", "tpu_custom_call"
UNLIMITED = 2**31 - 1
A100_BYTES = 163 * 1024  # of shared memory for one program; H100 has more


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def one_softmax(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: ChainMask, chain: SoftmaxState
) -> tuple[jax.Array, jax.Array]:
    """(context, log-sum-exp) over the prefix and the keys that `chain` has visited, in one softmax."""
    visible = prefix_visible(seen, jnp.arange(keys.shape[2]))[:, None, None]
    scores = jnp.where(visible, jnp.einsum("bgrjxh,bgph->bgrjxp", q, keys), MASKED)
    peak = jnp.maximum(chain.m, scores.max(axis=-1, keepdims=True))
    weights, kept = jnp.where(visible, jnp.exp(scores - peak), 0), jnp.exp(chain.m - peak)
    total = chain.l * kept + weights.sum(axis=-1, keepdims=True)
    context = chain.acc * kept + jnp.einsum("bgrjxp,bgph->bgrjxh", weights, values)
    return context / total, peak + jnp.log(total)


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("width", "dtype", "tolerance"),
    [(24, jnp.float32, 2e-5), (64, jnp.float32, 2e-5), (64, jnp.bfloat16, 2e-2)],
    ids=["24_float32", "64_float32", "64_bfloat16"],
)
@pytest.mark.parametrize("window", [UNLIMITED, 9], ids=["all", "window"])
def test_values_and_gradients_equal_one_softmax(monkeypatch, width, dtype, tolerance, window) -> None:
    """Padded text, positions in no order and past its end, three query heads, two tokens, blocks not whole."""
    monkeypatch.setattr(prefix_triton, "FORWARD", {1024: Blocks(32, 16, 4)})
    monkeypatch.setattr(prefix_triton, "BACKWARD", {1024: Blocks(16, 16, 4)})
    mask = jnp.arange(37)[None] >= jnp.array([[0], [11]])
    positions = jnp.array([[30, 3, 36, 0, 17], [12, 2, 50, 20, 11]])
    seen = ChainMask(mask, positions, jnp.tile(jnp.arange(2), 3), jnp.int32(window))
    shape = (2, 2, 1, 5, 6, width)
    narrow = [width**-0.5 * normal(0, *shape, dtype=dtype), *(normal(i, 2, 2, 37, width, dtype=dtype) for i in (1, 2))]
    chain = SoftmaxState(normal(3, *shape)[..., :1], jnp.ones((*shape[:-1], 1)), normal(4, *shape))
    gradient = normal(5, *shape, dtype=dtype)
    wide = [x.astype(jnp.float32) for x in narrow]
    (context, lse), back = jax.vjp(lambda *x: one_softmax(*x, seen, chain), *wide)
    wanted = back((gradient.astype(jnp.float32), jnp.zeros_like(lse)))

    sums = kernel_common.prefix_fwd(prefix_triton.forward, *narrow, seen, chain, interpret=True)
    mean = (gradient.astype(jnp.float32) * context).sum(axis=-1, keepdims=True)
    found = kernel_common.prefix_bwd(prefix_triton.backward, *narrow, seen, lse, mean, gradient, interpret=True)
    pairs = {"context": (sums.acc / sums.l, context), "lse": (sums.m + jnp.log(sums.l), lse)}
    pairs |= dict(zip(("q", "keys", "values"), zip(found, wanted, strict=True), strict=True))
    for name, (x, y) in pairs.items():
        assert (x.dtype, x.shape) == (jnp.float32, y.shape), name
        np.testing.assert_allclose(x, y, atol=tolerance * max(1.0, float(jnp.abs(y).max())), err_msg=name)


def chains(width: int, dtype: Any, prefix_attention: str, cap: float = 0.0) -> tuple[Callable[..., Any], list[Any]]:
    """Value and gradients of the attention of one layer, and its abstract arguments: the heads of Mistral 7B, chains of
    14 tokens at 32 positions of a text of 1,024."""
    batch, groups, heads, length, positions, tokens = 2, 8, 32, 1024, 32, 14
    of_text, of_chains = (batch, length, groups, width), (batch, groups, 2, positions, tokens, width)
    shapes = [(batch, 2, positions, tokens, heads, width), of_text, of_text, of_chains, of_chains]
    arguments: list[Any] = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    seen = ChainMask(
        jax.ShapeDtypeStruct((batch, length), bool),
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((positions,), (tokens,), ())),
    )

    def loss(arguments: list[jax.Array], seen: ChainMask) -> jax.Array:
        return attend_chains(*arguments, seen, prefix_attention, cap).astype(jnp.float32).sum()

    return jax.value_and_grad(loss), [arguments, seen]


def lowered(fn: Callable[..., Any], arguments: list[Any], platform: str) -> str:
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=H100)
    with use_abstract_mesh(mesh) if platform == "cuda" else contextlib.nullcontext():
        return jax.jit(fn).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_attention_of_mistral_lowers_to_three_kernels(dtype) -> None:
    """Forward, gradient of queries, gradients of keys and values."""
    assert lowered(*chains(128, dtype, "triton"), "cuda").count(TRITON) == 3


@pytest.mark.parametrize(
    ("prefix_attention", "platform", "kernels", "cap"),
    [("auto", "cuda", {}, 0.0), ("auto", "tpu", {MOSAIC: 3}, 0.0), ("blocks", "tpu", {}, 0.0),
     ("auto", "cpu", {}, 0.0), ("auto", "tpu", {MOSAIC: 3}, 50.0), ("triton", "cuda", {TRITON: 3}, 50.0)],
)  # fmt: skip
def test_what_is_chosen(prefix_attention, platform, kernels, cap) -> None:
    """Soft caps of scores are computed inside the kernels."""
    text = lowered(*chains(128, jnp.bfloat16, prefix_attention, cap), platform)
    assert {name: text.count(f"@{name}") for name in (TRITON, MOSAIC) if f"@{name}" in text} == kernels


@pytest.mark.parametrize("width", [24, 64, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_heads_of_other_widths_lower(width, dtype) -> None:
    rows, text = jax.ShapeDtypeStruct((1, 2, 100, width), dtype), jax.ShapeDtypeStruct((1, 2, 70, width), dtype)
    column, numbers = jax.ShapeDtypeStruct((1, 2, 100, 1), jnp.float32), jax.ShapeDtypeStruct((1, 100), jnp.int32)
    seen = Range(numbers, numbers, jax.ShapeDtypeStruct((1, 70), bool))
    assert lowered(prefix_triton.forward, [rows, text, text, seen], "cuda").count(TRITON) == 1
    assert lowered(prefix_triton.backward, [rows, text, text, seen, column, column, rows], "cuda").count(TRITON) == 2


def test_blocks_fit_the_shared_memory() -> None:
    """What a program keeps, what it fetches ahead, and weights (of float32, at most) on their way into a product."""
    for size, blocks in FORWARD.items():
        assert size * (blocks.rows + STAGES * 2 * blocks.keys) + 4 * blocks.rows * blocks.keys <= A100_BYTES
    for size, blocks in BACKWARD.items():
        weights = 2 * 4 * blocks.rows * blocks.keys
        assert size * (2 * blocks.rows + STAGES * 2 * blocks.keys) + weights <= A100_BYTES
        assert size * (2 * blocks.keys + STAGES * 2 * blocks.rows) + weights <= A100_BYTES


def test_what_the_kernels_cannot_do_is_named(monkeypatch) -> None:
    def attend(width: int) -> Any:
        seen = Range(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 3), bool))
        return prefix_triton.forward(*(jnp.zeros((1, 1, size, width)) for size in (2, 3, 3)), seen, interpret=True)

    with pytest.raises(ConfigError, match=r"heads of 300 numbers in float32 are wider.*'blocks'"):
        attend(300)
    monkeypatch.delattr(pallas, "triton", raising=False)
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    with pytest.raises(ConfigError, match=r"no longer has Triton.*'blocks'"):
        attend(4)

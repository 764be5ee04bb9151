"""Attention of chains against one softmax over all keys at once, and masks one can read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.models.attention import MASKED, split_heads
from quietstar_jax.thoughts.attention import prefix_xla
from quietstar_jax.thoughts.attention.chain_attention import attend_chains, to_chain_layout
from quietstar_jax.thoughts.attention.mask import ChainMask, chain_mask, prefix_visible

UNLIMITED = jnp.int32(2**31 - 1)


def drawing(visible: jax.Array) -> list[str]:
    return ["".join(".#"[int(x)] for x in row) for row in np.asarray(visible)]


def chain_visible(seen: ChainMask, length: int) -> jax.Array:
    """Which tokens of its own chain each chain token sees: [C, length]."""
    return prefix_visible(chain_mask(seen, length), jnp.arange(length))[0, :, 0]


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_what_chain_tokens_see() -> None:
    """Rows: tokens c = 0, 1, 2 of the chain of position 3, at rotary positions 4, 5, 6."""
    everything = ChainMask(jnp.array([[1, 0, 1, 1, 1, 1]], bool), jnp.array([3]), jnp.arange(3), UNLIMITED)
    keys = jnp.arange(6)
    assert drawing(prefix_visible(everything, keys)[0, 0]) == ["#.##.."] * 3
    assert drawing(prefix_visible(everything, keys[2:5])[0, 0]) == ["##."] * 3
    second = everything._replace(first=jnp.array([[2]]))
    assert drawing(prefix_visible(second, keys)[0, 0]) == ["..##.."] * 3
    windowed = everything._replace(window=jnp.int32(3))
    assert drawing(prefix_visible(windowed, keys)[0, 0]) == ["..##..", "...#..", "......"]
    assert drawing(chain_visible(everything, 4)) == ["#...", "##..", "###."]
    assert drawing(chain_visible(windowed._replace(window=jnp.int32(2)), 4)) == ["#...", "##..", ".##."]


def all_at_once(
    queries, prefix_keys, prefix_values, chain_keys, chain_values, seen: ChainMask, cap: float = 0.0
) -> jax.Array:
    """The same attention by one softmax over every key, own keys and values [B, R, J, E, G, H]."""
    q = split_heads(queries, prefix_keys.shape[-2])
    prefix = jnp.einsum("brjcgmh,bpgh->bgmrjcp", q, prefix_keys)
    chain = jnp.einsum("brjcgmh,brjegh->bgmrjce", q, chain_keys)
    visible = prefix_visible(seen, jnp.arange(prefix_keys.shape[1]))[:, None, None, None]
    chain_seen = jnp.broadcast_to(chain_visible(seen, chain_keys.shape[3]), chain.shape)
    if cap:
        prefix, chain = cap * jnp.tanh(prefix / cap), cap * jnp.tanh(chain / cap)
    both = jnp.concatenate([jnp.where(visible, prefix, MASKED), jnp.where(chain_seen, chain, MASKED)], axis=-1)
    weights = jax.nn.softmax(both, axis=-1)
    split = prefix_keys.shape[1]
    context = jnp.einsum("bgmrjcp,bpgh->brjcgmh", weights[..., :split], prefix_values)
    context += jnp.einsum("bgmrjce,brjegh->brjcgmh", weights[..., split:], chain_values)
    return context.reshape(queries.shape)


def equal_one_softmax(
    scale: float, window: int, positions: tuple[int, ...], first: jax.Array | None = None, cap: float = 0.0,
    tokens: int = 3,
) -> None:  # fmt: skip
    """Values and gradients of blocks, for two sequences and two groups."""
    batch, count, prefix, heads, groups, width = 2, 2, 7, 4, 2, 6
    queries = scale * normal(0, batch, count, 3, tokens, heads, width)
    base = [normal(seed, batch, prefix, groups, width) for seed in (1, 2)]
    chain = [normal(seed, batch, count, 3, tokens, groups, width) for seed in (3, 4)]
    mask = jnp.array([[1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0]], bool)
    seen = ChainMask(mask, jnp.array(positions), jnp.arange(tokens), jnp.int32(window), first)
    cotangent = normal(5, *queries.shape)

    def blocks(queries, keys, values, chain_keys, chain_values):
        chain = to_chain_layout(chain_keys), to_chain_layout(chain_values)
        return attend_chains(queries, keys, values, *chain, seen, cap=cap)

    found, back = jax.vjp(blocks, queries, *base, *chain)
    wanted, wanted_back = jax.vjp(lambda *x: all_at_once(*x, seen, cap), queries, *base, *chain)
    tolerance = 1e-3 if scale > 1 else 2e-5
    np.testing.assert_allclose(found, wanted, atol=tolerance)
    for name, x, y in zip(("q", "k", "v", "own k", "own v"), back(cotangent), wanted_back(cotangent), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * max(1.0, float(jnp.abs(y).max())), err_msg=name)


@pytest.mark.some(14)
@pytest.mark.parametrize("scale", [1.0, 60.0], ids=["small_scores", "large_scores"])
@pytest.mark.parametrize("window", [2, 4, 2**31 - 1])
@pytest.mark.parametrize("positions", [(0, 1, 2), (3, 4, 5), (6, 7, 8)], ids=["first", "middle", "past_the_end"])
@pytest.mark.parametrize("block", [2, 3, 64])
def test_blocks_equal_one_softmax_with_gradients(monkeypatch, scale, window, positions, block) -> None:
    """Also where the largest score is in the hundreds, in either group, or the prefix is invisible."""
    monkeypatch.setattr(prefix_xla, "KEY_BLOCK", block)
    equal_one_softmax(scale, window, positions)


@pytest.mark.parametrize(("scale", "window"), [(1.0, 4), (60.0, 4), (1.0, 2**31 - 1)])
def test_capped_scores_equal_one_softmax_with_gradients(monkeypatch, scale, window) -> None:
    """Of capped scores, the large ones have no gradient left and masked ones stay masked."""
    monkeypatch.setattr(prefix_xla, "KEY_BLOCK", 3)
    equal_one_softmax(scale, window, (3, 4, 5), cap=1.5)


@pytest.mark.parametrize("window", [2, 2**31 - 1])
@pytest.mark.parametrize("block", [2, 64])
def test_documents_equal_one_softmax_with_gradients(monkeypatch, window, block) -> None:
    monkeypatch.setattr(prefix_xla, "KEY_BLOCK", block)
    equal_one_softmax(1.0, window, (3, 4, 5), jnp.array([[3, 3, 5], [0, 4, 4]]))


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("block", "window", "cap"), [(4, 2**31 - 1, 0.0), (4, 3, 1.5), (5, 7, 0.0), (11, 2**31 - 1, 0.0)]
)
def test_long_chains_equal_one_softmax_with_gradients(monkeypatch, block: int, window: int, cap: float) -> None:
    """Chains of 11 tokens, whose last block of 4 begins earlier, with windows that end inside a chain."""
    monkeypatch.setattr(prefix_xla, "KEY_BLOCK", block)
    equal_one_softmax(1.0, window, (3, 4, 5), jnp.array([[3, 3, 5], [0, 4, 4]]), cap, tokens=11)


def test_later_blocks_of_a_chain_are_not_computed(monkeypatch) -> None:
    """Rubbish in the keys and values of tokens 8 .. 10 reaches no token of the blocks 0 .. 3 and 4 .. 7."""
    monkeypatch.setattr(prefix_xla, "KEY_BLOCK", 4)
    prefix, chain, queries = normal(0, 1, 6, 1, 4), normal(1, 1, 1, 1, 1, 11, 4), normal(2, 1, 1, 1, 11, 2, 4)
    seen = ChainMask(jnp.ones((1, 6), bool), jnp.array([4]), jnp.arange(11), UNLIMITED)
    dirty = jnp.where(jnp.arange(11)[:, None] >= 8, jnp.nan, chain)
    found, wanted = (attend_chains(queries, prefix, prefix, x, x, seen)[:, :, :, :8] for x in (dirty, chain))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("window", [40, 2**31 - 1])
def test_blocks_out_of_sight_are_not_computed_in_either_pass(window: int) -> None:
    """Chains of positions 150 .. 159 see keys 111 .. 159 through a window of 40, so of the blocks of 64 the second and
    third only; rubbish in the others must reach neither the result nor a gradient."""
    keys, values = normal(0, 1, 256, 1, 4), normal(1, 1, 256, 1, 4)
    number = jnp.arange(256)[None, :, None, None]
    rubbish = (number >= 192) | ((number < 64) & (window < 256))
    seen = ChainMask(jnp.ones((1, 256), bool), jnp.arange(150, 160), jnp.arange(1), jnp.int32(window))
    queries, chain = normal(2, 1, 1, 10, 1, 2, 4), normal(3, 1, 1, 1, 10, 1, 4)

    def loss(queries, keys, values, chain):
        return (attend_chains(queries, keys, values, chain, chain, seen) ** 2).sum()

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    dirty = [jnp.where(rubbish, jnp.nan, x) for x in (keys, values)]
    jax.tree.map(
        np.testing.assert_array_equal, gradient(queries, *dirty, chain), gradient(queries, keys, values, chain)
    )


def test_bfloat16_gradients_are_those_of_float32_to_rounding() -> None:
    """With grouped heads, a window and a last block that is not whole."""
    inputs = [normal(0, 2, 2, 5, 3, 4, 8), normal(1, 2, 150, 2, 8), normal(2, 2, 150, 2, 8),
              normal(3, 2, 2, 2, 5, 3, 8), normal(4, 2, 2, 2, 5, 3, 8)]  # fmt: skip
    seen = ChainMask(jnp.ones((2, 150), bool), jnp.arange(145, 150), jnp.arange(3), jnp.int32(90))
    cotangent = normal(5, *inputs[0].shape)

    def gradients(dtype):
        context, back = jax.vjp(lambda *x: attend_chains(*x, seen), *(x.astype(dtype) for x in inputs))
        return back(cotangent.astype(context.dtype))

    for narrow, wide in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert narrow.dtype == jnp.bfloat16
        assert float(jnp.abs(narrow.astype(jnp.float32) - wide).max() / jnp.abs(wide).max()) < 0.02


def test_bfloat16_scores_and_sums_are_float32() -> None:
    """A thousand equal keys: weights summed in bfloat16 would be off by percents."""
    size, dtype = 1000, jnp.bfloat16
    values = jnp.where(jnp.arange(size)[None, :, None, None] < size // 2, 1, 0) * jnp.ones((1, 1, 1, 2))
    keys = jnp.zeros_like(values)
    seen = ChainMask(jnp.ones((1, size), bool), jnp.array([size - 1]), jnp.arange(1), UNLIMITED)
    chain = jnp.zeros((1, 1, 1, 1, 1, 2), dtype)
    context = attend_chains(
        jnp.ones((1, 1, 1, 1, 1, 2), dtype), keys.astype(dtype), values.astype(dtype), chain, chain, seen
    )
    assert context.dtype == dtype
    np.testing.assert_allclose(context.astype(jnp.float32), 0.5, atol=3e-3)

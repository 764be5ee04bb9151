"""The decoder: its weights and its forward pass, with attention as a parameter.

Weights of all layers are stacked along a leading axis and the layers run in one `lax.scan`. `run_layers` accepts the
function that attends, so that the base pass, thoughts and generation differ only in what a token sees and share all
other arithmetic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from quietstar_jax.architecture import NO_ADAPTERS, Adapters, Architecture
from quietstar_jax.models import rope
from quietstar_jax.models.adapters import add_adapters, learns
from quietstar_jax.models.attention import ATTENTION, attend, causal_mask, soft_cap
from quietstar_jax.models.layer_scan import scan_layers
from quietstar_jax.models.linear import MAPPED, linear, look_up, mapped
from quietstar_jax.models.parameters import Initializer, normal, ones, parameter, zeros
from quietstar_jax.parallel.axes import constrain, num_shards

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class KeyValues(NamedTuple):
    """Keys and values [layers, ..., G, H] of earlier tokens, with rotary positions applied to the keys."""

    keys: jax.Array
    values: jax.Array


# The arrays of a layer that are saved for the backward pass: outputs of products with weights, and of attention. The
# rest (norms, rotations, activations, softmax) is cheaper to recompute than to write to memory and read back.
REMAT_POLICY = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(ATTENTION),
)
# With adapters, the result of a map and its scaled x A are saved, not the products x W and (x A) B.
ADAPTED_REMAT_POLICY = jax.checkpoint_policies.save_only_these_names(ATTENTION, MAPPED)

# (queries, keys, values, window, state of this layer) -> (context, further output of this layer)
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


LayerWeights = dict[str, jax.Array]  # by name, e.g. `query`
STACKED = "decoder.layers."  # dotted paths of the weights that are stacked
KEY_VALUE_AXES = ("layers", "batch", "keys", "kv_heads", "head_dim")  # of the text, which all thoughts attend to


class Layers(nnx.Module):
    """The weights of all layers, stacked: N layers, D hidden, Q and G heads of width H, F feed-forward."""

    def __init__(self, a: Architecture, rngs: nnx.Rngs):
        n, d, f, q, g, h = (
            a.num_layers, a.hidden_size, a.intermediate_size, a.num_heads, a.num_kv_heads, a.head_dim,
        )  # fmt: skip
        dense, identity = normal(a.initializer_range), norm_initializer(a)
        if a.norm_placement != "after":
            self.attention_norm = parameter(rngs, (n, d), ("layers", "embed"), identity)
        self.query = parameter(rngs, (n, d, q, h), ("layers", "embed", "heads", "head_dim"), dense)
        self.key = parameter(rngs, (n, d, g, h), ("layers", "embed", "kv_heads", "head_dim"), dense)
        self.value = parameter(rngs, (n, d, g, h), ("layers", "embed", "kv_heads", "head_dim"), dense)
        self.output = parameter(rngs, (n, q, h, d), ("layers", "heads", "head_dim", "embed"), dense)
        if a.qkv_bias:
            self.query_bias = parameter(rngs, (n, q, h), ("layers", "heads", "head_dim"), zeros)
            self.key_bias = parameter(rngs, (n, g, h), ("layers", "kv_heads", "head_dim"), zeros)
            self.value_bias = parameter(rngs, (n, g, h), ("layers", "kv_heads", "head_dim"), zeros)
        if a.output_bias:
            self.output_bias = parameter(rngs, (n, d), ("layers", "embed"), zeros)
        if a.qk_norm:
            for name, heads, axis in (("query_norm", q, "heads"), ("key_norm", g, "kv_heads")):
                shape, axes = ((heads, h), (axis, "head_dim")) if a.qk_norm_all_heads else ((h,), ("head_dim",))
                setattr(self, name, parameter(rngs, (n, *shape), ("layers", *axes), identity))
        if a.norm_placement != "after":
            self.mlp_norm = parameter(rngs, (n, d), ("layers", "embed"), identity)
        self.gate = parameter(rngs, (n, d, f), ("layers", "embed", "mlp"), dense)
        self.up = parameter(rngs, (n, d, f), ("layers", "embed", "mlp"), dense)
        self.down = parameter(rngs, (n, f, d), ("layers", "mlp", "embed"), dense)
        if a.mlp_bias:
            self.gate_bias = parameter(rngs, (n, f), ("layers", "mlp"), zeros)
            self.up_bias = parameter(rngs, (n, f), ("layers", "mlp"), zeros)
            self.down_bias = parameter(rngs, (n, d), ("layers", "embed"), zeros)
        if a.norm_placement != "before":
            self.attention_post_norm = parameter(rngs, (n, d), ("layers", "embed"), identity)
            self.mlp_post_norm = parameter(rngs, (n, d), ("layers", "embed"), identity)


class Decoder(nnx.Module):
    """A decoder-only transformer: its weights, its architecture and its adapters."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs, adapters: Adapters = NO_ADAPTERS):
        a = architecture
        self.architecture, self.adapters = a, adapters
        dense = normal(a.initializer_range)
        self.embedding = parameter(rngs, (a.vocab_size, a.hidden_size), ("vocab", "embed"), dense)
        self.layers = Layers(a, rngs)
        self.final_norm = parameter(rngs, (a.hidden_size,), ("embed",), norm_initializer(a))
        if not a.tie_embeddings:
            self.lm_head = parameter(rngs, (a.hidden_size, a.vocab_size), ("embed", "vocab"), dense)
        add_adapters(self.layers, adapters, rngs)

    def embed(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Token ids [...] -> embeddings [..., D] in the compute dtype, as input of the layers."""
        return self.scale_embeddings(look_up(self.embedding[...], tokens, dtype))

    def scale_embeddings(self, rows: jax.Array) -> jax.Array:
        """Rows [..., D] of the embedding, or others like them -> input of the layers, in the same dtype.

        The multiplier is rounded to this dtype too, as in transformers.
        """
        multiplier = self.architecture.embedding_multiplier
        return rows if multiplier == 1 else rows * jnp.asarray(multiplier, rows.dtype)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Final-norm hidden states [..., D] -> float32 logits [..., V] before their soft cap: a linear function."""
        tied = self.architecture.tie_embeddings
        weight = self.embedding[...] if tied else self.lm_head[...]
        return constrain(linear(hidden, weight, 1, jnp.float32, tied), ..., "vocab")

    def cap_logits(self, logits: jax.Array) -> jax.Array:
        """The output of `head` -> logits."""
        return soft_cap(logits, self.architecture.logit_cap)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final-norm hidden states [..., D] -> float32 logits [..., V]."""
        return self.cap_logits(self.head(hidden))


def norm_initializer(a: Architecture) -> Initializer:
    """Returns the initializer of the weights of a norm that multiplies by 1."""
    return zeros if a.norm_adds_one else ones


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the axes of `weight`, the last ones, computed in float32, returned in x's dtype."""
    wide, axes = x.astype(jnp.float32), tuple(range(-weight.ndim, 0))
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + eps)
    return (wide * scale * weight).astype(x.dtype)


def normalize(a: Architecture, x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Applies a norm of the decoder; returns x where the decoder has none (weight None)."""
    if weight is None:
        return x
    return rms_norm(x, weight + 1.0 if a.norm_adds_one else weight, a.rms_norm_eps)


def run_layers(
    decoder: Decoder, x: jax.Array, positions: jax.Array, attend_fn: Attend, state: Any, *, rematerialize: bool = False
) -> tuple[jax.Array, Any, LayerWeights]:
    """Runs all layers and the final norm.

    Args:
      x: [..., D] embedded tokens in the compute dtype.
      positions: [...] rotary positions, broadcastable to x without its last axis.
      attend_fn: attends in one layer; see `Attend`.
      state: pytree with leading axis `layers`, passed to `attend_fn` layer by layer.
      rematerialize: recompute each layer in the backward pass instead of saving its activations.

    Returns:
      (hidden [..., D], further outputs of `attend_fn`, stacked along `layers`, the weights of the layers that are not
      frozen by adapters, unchanged). A second use of the weights should use the returned ones: with `rematerialize`,
      the gradients of both uses are then summed in one array (see `layer_scan`). Frozen weights have no gradient.
    """
    a, adapters = decoder.architecture, decoder.adapters
    rotations = rope.rotations(a, positions)
    weights = dict(nnx.to_pure_dict(nnx.state(decoder.layers, nnx.Param)))
    learned = {name: value for name, value in weights.items() if learns(f"decoder.layers.{name}", adapters)}
    frozen = {name: value for name, value in weights.items() if name not in learned}

    def layer(x: jax.Array, inputs: tuple[LayerWeights, Any, Any]) -> tuple[jax.Array, Any]:
        learned, (frozen, window, base), layer_state = inputs
        w: dict[str, Any] = {**learned, **frozen, "lora_scale": adapters.scale}
        cos, sin = (jax.lax.dynamic_index_in_dim(table, base, keepdims=False) for table in rotations)
        q, k, v = project(a, w, normalize(a, x, w.get("attention_norm")), cos, sin)
        context, ys = attend_fn(q, k, v, window, layer_state)
        attended = mapped(context, w, "output", inputs=2)
        x = x + normalize(a, attended, w.get("attention_post_norm"))
        fed = feed_forward(a, w, normalize(a, x, w.get("mlp_norm")))
        x = x + normalize(a, fed, w.get("mlp_post_norm"))
        return constrain(x, "batch", ..., "hidden"), ys

    fixed = (frozen, attention_windows(a), jnp.asarray(rope.bases(a)))
    if isinstance(weights["query"], tuple):  # of `separate_layers`
        outputs = []
        for i in range(a.num_layers):
            own = {name: value[i] for name, value in weights.items()}
            window, base, layer_state = jax.tree.map(operator.itemgetter(i), (*fixed[1:], state))
            x, ys = layer(x, (own, ({}, window, base), layer_state))
            outputs.append(ys)
        ys = jax.tree.map(lambda *layers: jnp.stack(layers), *outputs)
    elif rematerialize:
        x, ys, learned = scan_layers(layer, x, learned, fixed, state)
    else:
        policy = ADAPTED_REMAT_POLICY if frozen else REMAT_POLICY
        body = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        x, ys = jax.lax.scan(body, x, (learned, fixed, state))
    return normalize(a, x, decoder.final_norm[...]), ys, learned


def separate_layers(params: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Returns parameters in which each stacked weight [layers, ...] is a tuple of one array for each layer.

    A decoder with such weights runs without a loop over its layers. On the CPU, a loop copies the weights of each layer
    out of the stack before their products, which costs more than the products where there are few tokens.
    """
    return {name: tuple(value) if name.startswith(STACKED) else value for name, value in params.items()}


def attention_windows(a: Architecture) -> jax.Array:
    """Returns the number of keys that a query sees in each layer, itself included: [layers] int32."""
    unlimited = jnp.iinfo(jnp.int32).max
    return jnp.array([a.sliding_window if a.has_window(i) else unlimited for i in range(a.num_layers)], jnp.int32)


def project(
    a: Architecture, w: dict[str, Any], x: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [..., D] -> queries [..., Q, H], keys and values [..., G, H].

    Queries and keys have rotary positions. Queries are scaled: their products with keys are the scores of attention.
    """
    q, k, v = (mapped(x, w, name) for name in ("query", "key", "value"))
    if a.qk_norm:
        q, k = normalize(a, q, w["query_norm"]), normalize(a, k, w["key_norm"])
    scale = a.query_scale or a.head_dim**-0.5
    return rope.rotate(q, cos, sin) * scale, rope.rotate(k, cos, sin), v


def feed_forward(a: Architecture, w: dict[str, Any], x: jax.Array) -> jax.Array:
    """Gated feed-forward [..., D] -> [..., D]."""
    gate = ACTIVATIONS[a.activation](mapped(x, w, "gate"))
    return mapped(gate * mapped(x, w, "up"), w, "down")


def base_pass(
    decoder: Decoder, tokens: jax.Array, mask: jax.Array, starts: jax.Array | None = None, *, dtype: jnp.dtype,
    rematerialize: bool = False,
) -> tuple[jax.Array, KeyValues, LayerWeights]:  # fmt: skip
    """Runs the causal pass over the text itself.

    Rotary positions count from the start of the row, even where a row has several documents: attention depends only on
    differences of positions.

    Args:
      tokens: [B, L] int32.
      mask: [B, L] bool, True where the text is real; padding is never a key.
      starts: as in `causal_mask`.

    Returns:
      (final-norm hidden states [B, L, D], keys and values [layers, B, L, G, H], layers as from `run_layers`).
    """
    # The devices that split the positions of thoughts split the queries of the text here, if its length is a multiple.
    # Each of these devices has the keys of the whole text.
    text = "text" if tokens.shape[1] % num_shards("text") == 0 else "keys"
    cap = decoder.architecture.score_cap

    def attend_text(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array, _: Any) -> tuple[jax.Array, Any]:
        q = constrain(q, "batch", text, "heads", "head_dim")
        k, v = (constrain(x, *KEY_VALUE_AXES[1:]) for x in (k, v))
        return attend(q, k, v, causal_mask(mask, window, starts), cap), KeyValues(k, v)

    x = constrain(decoder.embed(tokens, dtype), "batch", text, "hidden")
    return run_layers(decoder, x, jnp.arange(tokens.shape[1]), attend_text, None, rematerialize=rematerialize)

"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) beside the linear maps of a decoder.

The adapter of a map with the weight W [I, O] has two weights, A [I, r] and B [r, O]; I and O may be several axes, and
each array has a leading axis of layers. The map becomes y = x W + scale * (x A) B. B begins with zeros, so training
begins exactly at the base. One predicate, `learns`, separates the weights that change from those that never do;
gradients, optimizer state, storage and checkpoints all derive from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from quietstar_jax.architecture import Adapters
from quietstar_jax.models.parameters import parameter, uniform, zeros

A, B = "_lora_a", "_lora_b"  # follow the name of the map, e.g. `decoder.layers.query_lora_a`
_ATTENTION, _MLP = ("query", "key", "value", "output"), ("gate", "up", "down")
MAPS: dict[str, tuple[str, ...]] = {"none": (), "attention": _ATTENTION, "mlp": _MLP, "all": (*_ATTENTION, *_MLP)}


def input_axes(name: str) -> int:
    """Returns how many axes of the weight of a map, after that of the layers, are contracted with its input."""
    return 2 if name == "output" else 1


def add_adapters(layers: nnx.Module, adapters: Adapters, rngs: nnx.Rngs) -> None:
    """Adds the weights of all adapters to those of the layers.

    A is uniform within 1 / sqrt(size of I), as in the code published with LoRA and in peft; B is zero.
    """
    for name in MAPS[adapters.maps]:
        weight, end = getattr(layers, name), 1 + input_axes(name)
        shape, axes = weight.shape, weight.get_metadata("axes")
        initial = uniform(1 / math.sqrt(math.prod(shape[1:end])))
        setattr(layers, name + A, parameter(rngs, (*shape[:end], adapters.rank), (*axes[:end], None), initial))
        b_shape, b_axes = (shape[0], adapters.rank, *shape[end:]), (axes[0], None, *axes[end:])
        setattr(layers, name + B, parameter(rngs, b_shape, b_axes, zeros))


def is_adapter(name: str) -> bool:
    """Whether the parameter with this name or dotted path belongs to an adapter."""
    return name.endswith((A, B))


def learns(name: str, adapters: Adapters) -> bool:
    """Whether the parameter with this dotted path may ever change.

    Without adapters every parameter may. With adapters, those of the decoder are frozen except for the adapters and,
    with `Adapters.norms`, the norms.
    """
    if not name.startswith("decoder.") or not MAPS[adapters.maps]:
        return True
    return is_adapter(name) or (adapters.norms and name.endswith("norm"))


def merge_adapters(params: Mapping[str, jax.Array], adapters: Adapters) -> dict[str, jax.Array]:
    """Returns the parameters of the model without adapters: W + scale * A B, summed in float32, in W's dtype."""
    merged = {name: value for name, value in params.items() if not is_adapter(name)}
    for name in merged:
        if name + A in params:
            merged[name] = merged_weight(merged[name], params[name + A], params[name + B], adapters.scale)
    return merged


def merged_weight(weight: Any, a: Any, b: Any, scale: float) -> jax.Array:
    """W [layers, I, O], A [layers, I, r], B [layers, r, O] -> W + scale * A B, summed in float32, in W's dtype."""
    product = jax.lax.dot_general(
        a, b, (((a.ndim - 1,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)

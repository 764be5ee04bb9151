"""Defines each parameter in one place: shape, logical axes, initializer.

Abstract state (`jax.eval_shape` of a constructor), initialisation, sharding and checkpoint names are all derived from
the constructors of the modules. Modules contain only parameters and frozen configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from quietstar_jax.parallel.axes import Axes, partition_spec

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def normal(stddev: float) -> Initializer:
    """Initializer with float32 draws from a normal distribution."""
    return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def uniform(bound: float) -> Initializer:
    """Initializer with float32 draws from a uniform distribution within -bound .. bound."""
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initializer with zeros."""
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initializer with ones."""
    return jnp.ones(shape, jnp.float32)


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, initializer: Initializer) -> nnx.Param:
    """Returns a float32 master weight.

    Args:
      axes: for each dimension a name of `parallel.axes.RULES`, or None if it is never sharded; determines the sharding
        over a mesh.

    Raises:
      ValueError: the axes do not match the shape, no rule names one, or two map to the same mesh axis.
    """
    partition_spec(axes)
    if len(axes) != len(shape):
        raise ValueError(f"A parameter of shape {shape} got the axes {axes}.")
    return nnx.Param(initializer(rngs.params(), shape), axes=axes)


def named_parameters(module: nnx.Module) -> dict[str, nnx.Param]:
    """Returns all parameters with metadata by dotted path, e.g. `decoder.layers.query`, in a fixed order."""
    flat: Any = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(str(part) for part in path): value for path, value in flat}


def is_gate(name: str) -> bool:
    """Whether the parameter with this dotted path belongs to the thinking gate."""
    return name.startswith("gate.")


def is_end_head(name: str) -> bool:
    """Whether the parameter with this dotted path belongs to the head that decides when a thought ends."""
    return name.startswith("end_head.")


def stored_dtype(name: str, dtype: str) -> str:
    """Returns the dtype in which a parameter that is only read is stored when the model computes in `dtype`.

    Norms, the start and end embeddings, the thinking gate and the end head are used in float32; all other parameters
    are cast before use.
    """
    exact = name.endswith("norm") or name in ("start_embedding", "end_embedding") or is_gate(name) or is_end_head(name)
    return "float32" if exact else dtype


class GraphDef(NamedTuple):
    """A module without its arrays: static, so that compiled functions can close over it.

    Attributes:
      names: dotted paths; axes: logical axes of each, in the same order; treedef: of the module.
    """

    names: tuple[str, ...]
    axes: tuple[Axes, ...]
    treedef: Any

    @property
    def axes_by_name(self) -> dict[str, Axes]:
        """The logical axes of every parameter, by dotted path."""
        return dict(zip(self.names, self.axes, strict=True))


def split(module: nnx.Module) -> tuple[dict[str, jax.Array], GraphDef]:
    """Returns a module's arrays by dotted path, and the `GraphDef` from which `merge` rebuilds the module."""
    leaves, treedef = jax.tree.flatten(module)
    named = named_parameters(module)
    axes = tuple(value.get_metadata("axes") for value in named.values())
    return dict(zip(named, leaves, strict=True)), GraphDef(tuple(named), axes, treedef)


def merge(graphdef: GraphDef, params: Mapping[str, Any]) -> Any:
    """Returns the module of a `GraphDef` with these arrays, the inverse of `split`; other names are ignored."""
    return jax.tree.unflatten(graphdef.treedef, [params[name] for name in graphdef.names])

"""One description per parameter: shape, logical axes, initialiser.

Abstract state (`jax.eval_shape` of a constructor), initialisation, sharding and checkpoint names all derive
from what stands in the modules' constructors. Modules hold nothing but parameters and frozen configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]

LOGICAL_AXES = ("layers", "vocab", "embed", "mlp", "heads", "kv_heads", "head_dim", "mixing")


def normal(stddev: float) -> Initializer:
    """Float32 draws from a normal distribution."""
    return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """All zero."""
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """All one."""
    return jnp.ones(shape, jnp.float32)


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], initializer: Initializer
) -> nnx.Param:
    """A float32 master weight.

    Args:
      axes: one name of `LOGICAL_AXES` per dimension, None for one never split; the layout over a mesh derives from it.

    Raises:
      ValueError: if the axes do not describe the shape.
    """
    unknown = set(axes) - {None, *LOGICAL_AXES}
    if unknown or len(axes) != len(shape):
        raise ValueError(f"A parameter of shape {shape} got the axes {axes}; known axes are {LOGICAL_AXES}.")
    return nnx.Param(initializer(rngs.params(), shape), axes=axes)


def named_parameters(module: nnx.Module) -> dict[str, nnx.Param]:
    """Every parameter with its metadata under its dotted path, e.g. `decoder.layers.query`, in a fixed order."""
    flat: Any = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(str(part) for part in path): value for path, value in flat}


class Structure(NamedTuple):
    """A module without its arrays: static, so that compiled functions may close over it."""

    names: tuple[str, ...]
    treedef: Any


def disassemble(module: nnx.Module) -> tuple[dict[str, jax.Array], Structure]:
    """A module's arrays under their dotted paths, and what is needed to put it together again."""
    leaves, treedef = jax.tree.flatten(module)
    names = tuple(named_parameters(module))
    return dict(zip(names, leaves, strict=True)), Structure(names, treedef)


def assemble(structure: Structure, params: Mapping[str, Any]) -> Any:
    """The inverse of `disassemble`."""
    return jax.tree.unflatten(structure.treedef, [params[name] for name in structure.names])

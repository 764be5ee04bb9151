"""`jax` and `jax.numpy`, imported at their first use.

The modules that a command needs to parse its arguments import them from here: help and errors appear without delay.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import jax as jax
    import jax.numpy as jnp
else:
    jax, jnp = _Lazy("jax"), _Lazy("jax.numpy")

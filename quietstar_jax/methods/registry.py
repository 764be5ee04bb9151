"""Named functions that a setting selects: rewards, advantages, mixings. A new one is a function with a decorator.

The choices of the settings and the tables in docs/objectives.md come from these registries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry(Generic[F]):
    """A registered function.

    Attributes:
      fn: the function.
      formula: TeX.
      assumes: the conditions under which the function is meaningful, in a sentence.
      source: the papers or libraries that use it.
      traits: properties of the function that other code needs, by name; every entry of a registry has the same names.
    """

    fn: F
    formula: str
    assumes: str
    source: str
    traits: dict[str, Any]


class Registry(dict[str, Entry[F]]):
    """Entries by name, in the order of registration.

    Args:
      traits: the traits of this registry, with their default values.
    """

    def __init__(self, **traits: Any):
        super().__init__()
        self._traits = traits

    def register(self, *, formula: str = "", assumes: str = "", source: str = "", **traits: Any) -> Callable[[F], F]:
        """Returns a decorator that registers a function under its own name, which a setting then accepts.

        A function of a user's module is replaced by a new one of the same name and module: a notebook cell or a
        configuration file may run again.

        Args:
          formula, assumes, source: see `Entry`; documentation only.
          traits: see the module of the registry.

        Raises:
          ValueError: the name is registered already, by this function, by another module or in this package; or the
            registry has no such trait.
        """
        if unknown := sorted(traits.keys() - self._traits.keys()):
            raise ValueError(f"Unknown traits {unknown}; known are {sorted(self._traits)}.")

        def add(fn: F) -> F:
            known, own = self.get(fn.__name__), fn.__module__.startswith("quietstar_jax.")
            if known and (own or known.fn is fn or known.fn.__module__ != fn.__module__):
                raise ValueError(f"{fn.__name__} is registered twice. Rename one of the functions.")
            self[fn.__name__] = Entry(fn, formula, assumes, source, self._traits | traits)
            return fn

        return add

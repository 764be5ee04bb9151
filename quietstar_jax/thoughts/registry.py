"""Named functions that a setting selects: rewards, advantages, mixings. A new one is a function with a decorator.

The settings, the table in docs/objectives.md, the export and the report page all read these registries.
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
      assumes: what must hold for it to make sense, in a sentence.
      source: who uses it.
      traits: further facts of this registry, by name.
    """

    fn: F
    formula: str
    assumes: str
    source: str
    traits: dict[str, Any]


class Registry(dict[str, Entry[F]]):
    """Entries by name, in the order of registration."""

    def register(self, *, formula: str, assumes: str, source: str, **traits: Any) -> Callable[[F], F]:
        """Returns a decorator that registers a function under its own name.

        Raises:
          ValueError: the name is taken.
        """

        def add(fn: F) -> F:
            if fn.__name__ in self:
                raise ValueError(f"{fn.__name__} is registered twice. Rename one of the functions.")
            self[fn.__name__] = Entry(fn, formula, assumes, source, traits)
            return fn

        return add

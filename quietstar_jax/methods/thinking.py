"""Policies of thinking: at which positions a thought is made. To add one, write a function here and decorate it.

Every policy is a function `(at, *numbers) -> bool [...]` of a `Position` and of its numbers, float32 scalars, which
are arguments of the compiled function: other numbers need no compilation. A policy is written as text, its name and
numbers: `every:4`, `entropy:1.5,4`. A policy that needs another quantity adds a field to `Position`.

Traits:

  numbers: the numbers of the policy, `Number`s; if there are several, their values must ascend.
  constant: True or False if the policy gives this answer at every position, None if it chooses. Constant policies are
    never called: callers then run the function with thoughts at all positions, or the one without thoughts.
  draws: whether the policy uses `Position.uniform`; gate, start: whether it uses `Position.gain` or `Position.start`,
    respectively.
  ranking: a `Ranking`, if the first number is a threshold of one quantity; otherwise None. Sorting the positions by
    this quantity gives the choices of the policy at every threshold.

An export also needs the same function in torch: add it to `THINKING` in export_hf/torch_module.py.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from quietstar_jax.errors import ConfigError
from quietstar_jax.lazy import jax, jnp
from quietstar_jax.methods.registry import Registry

LARGEST = 10**6  # bound of whole numbers; float32 represents all of these exactly


class Position(NamedTuple):
    """What a policy sees of positions [...]: those whose prediction of the next token may be preceded by a thought.

    Attributes:
      logits: [..., V] float32, of the prediction without a thought; entropy: [...] of this prediction, nats.
      place: [...] int32, of the newest token x[j] in its text, from 0.
      uniform: [...] float32 in [0, 1), random numbers that depend on the text and its position only.
      gain: [...] nats, the gain of a thought that the thinking gate predicts; None if the model has no gate.
      start: [...] log-probability that the next token of the text is the one that starts thoughts
        (`thought.initial_start_token`); None if that is not one token.
    """

    logits: jax.Array
    entropy: jax.Array
    place: jax.Array
    uniform: jax.Array
    gain: jax.Array | None = None
    start: jax.Array | None = None


class Number(NamedTuple):
    """A number of a policy: from `least` to `most`, whole or not; may be omitted if it has a default."""

    name: str
    least: float
    most: float
    whole: bool = False
    default: float | None = None


class Ranking(NamedTuple):
    """The quantity that a policy compares with its threshold.

    Attributes:
      value: function of a `Position` that returns float32 [...], or None if the model lacks the quantity.
      largest_first: whether the policy thinks where the quantity is large; otherwise where it is small.
    """

    value: Callable[[Position], jax.Array | None]
    largest_first: bool

    def order(self, value: np.ndarray) -> np.ndarray:
        """Returns positions [N] in the order in which they begin to think as the threshold moves; value: [N]."""
        return np.argsort(-value if self.largest_first else value, kind="stable")


PolicyFn: TypeAlias = "Callable[..., jax.Array]"
THINKING: Registry[PolicyFn] = Registry(numbers=(), constant=None, draws=False, gate=False, start=False, ranking=None)


@THINKING.register(
    formula=r"\text{true}", assumes="Thoughts help everywhere, or their cost does not matter.",
    source="Quiet-STaR", constant=True,
)  # fmt: skip
def always(at: Position) -> jax.Array:
    """Thinks at every position."""
    return jnp.ones(at.place.shape, bool)


@THINKING.register(
    formula=r"\text{false}", assumes="Nothing: the model without thoughts.", source="the baseline", constant=False
)
def never(at: Position) -> jax.Array:
    """Thinks nowhere."""
    return jnp.zeros(at.place.shape, bool)


@THINKING.register(
    formula=r"(j + 1) \bmod n = 0", assumes="Nothing about the text. The cost is known beforehand.",
    source="as `thought.positions` = stride", numbers=(Number("n", 1, LARGEST, whole=True),),
)  # fmt: skip
def every(at: Position, n: jax.Array) -> jax.Array:
    """Thinks after every n-th token of the text."""
    return (at.place + 1) % n.astype(jnp.int32) == 0


@THINKING.register(
    formula=r"u_j < p", assumes="Nothing about the text: the control for policies that choose by the prediction.",
    source="as `thought.positions` = random", numbers=(Number("p", 0, 1),), draws=True,
    ranking=Ranking(lambda at: at.uniform, largest_first=False),
)  # fmt: skip
def random(at: Position, p: jax.Array) -> jax.Array:
    """Thinks at each position with probability p."""
    return at.uniform < p


@THINKING.register(
    formula=r"\text{min} \le H(p_j) \le \text{max}",
    assumes="Thoughts help where the next token is uncertain. The most uncertain positions may be noise: hence a band.",
    source="Quiet-STaR section 5: thoughts help at few, difficult tokens",
    numbers=(Number("min", 0, math.inf), Number("max", 0, math.inf, default=math.inf)),
    ranking=Ranking(lambda at: at.entropy, largest_first=True),
)
def entropy(at: Position, least: jax.Array, most: jax.Array) -> jax.Array:
    """Thinks where the entropy of the prediction without a thought is within a band, in nats."""
    return (at.entropy >= least) & (at.entropy <= most)


def gap(at: Position) -> jax.Array:
    """Returns the difference of the two largest probabilities of the prediction without a thought, [...]."""
    likeliest = jnp.exp(jax.lax.top_k(at.logits, 2)[0] - jax.nn.logsumexp(at.logits, axis=-1, keepdims=True))
    return likeliest[..., 0] - likeliest[..., 1]


@THINKING.register(
    formula=r"p_j^{(1)} - p_j^{(2)} < \text{bound}",
    assumes="A thought can change the likeliest token only where a second one is nearly as likely.",
    source="margin sampling in active learning",
    numbers=(Number("bound", 0, 1),), ranking=Ranking(gap, largest_first=False),
)  # fmt: skip
def margin(at: Position, bound: jax.Array) -> jax.Array:
    """Thinks where the two largest probabilities of the prediction without a thought differ by less than a bound."""
    return gap(at) < bound


@THINKING.register(
    formula=r"m_j > \text{price}", assumes="The gate was trained on similar text, with similar thoughts.",
    source="a learned gate, see docs/objectives.md", numbers=(Number("price", -math.inf, math.inf),), gate=True,
    ranking=Ranking(lambda at: at.gain, largest_first=True),
)  # fmt: skip
def gate(at: Position, price: jax.Array) -> jax.Array:
    """Thinks where the gate predicts that a thought gains more than its price, in nats."""
    assert at.gain is not None  # checked by `LoadedModel.check_policy`
    return at.gain > price


@THINKING.register(
    formula=r"p_j(\text{start}) \ge p",
    assumes="Some text in training has thoughts written out, which begin with the token that starts thoughts.",
    source="as `thought.positions` = start", numbers=(Number("p", 0, 1),), start=True,
    ranking=Ranking(lambda at: None if at.start is None else jnp.exp(at.start), largest_first=True),
)  # fmt: skip
def start(at: Position, p: jax.Array) -> jax.Array:
    """Thinks where the text itself would begin a thought with at least probability p."""
    assert at.start is not None  # checked by `LoadedModel.check_policy`
    return jnp.exp(at.start) >= p


@dataclass(frozen=True)
class ThinkPolicy:
    """A policy with its numbers, one for each of `THINKING[name].traits["numbers"]`; made by `parse_policy`."""

    name: str
    numbers: tuple[float, ...] = ()

    @property
    def constant(self) -> bool | None:
        """The answer at every position, None if the policy chooses."""
        answer: bool | None = THINKING[self.name].traits["constant"]
        return answer

    @property
    def needs_gate(self) -> bool:
        """Whether only a model with a thinking gate can follow the policy."""
        return bool(THINKING[self.name].traits["gate"])

    @property
    def needs_start(self) -> bool:
        """Whether only a model with one token that starts thoughts can follow the policy."""
        return bool(THINKING[self.name].traits["start"])

    def __str__(self) -> str:
        """The policy as `parse_policy` reads it."""
        numbers = ",".join(f"{number:.10g}" for number in self.numbers if math.isfinite(number))
        return f"{self.name}:{numbers}" if numbers else self.name


ALWAYS, NEVER = ThinkPolicy("always"), ThinkPolicy("never")


def rankings(at: Position) -> dict[str, jax.Array]:
    """Returns the quantity of every policy that has a `Ranking`, by name of the policy, float32 [...] each."""
    ranked = {name: entry.traits["ranking"] for name, entry in THINKING.items()}
    values = {name: ranking.value(at) for name, ranking in ranked.items() if ranking}
    return {name: value for name, value in values.items() if value is not None}


def thinks(name: str, numbers: jax.Array, at: Position) -> jax.Array:
    """Returns whether to think at positions, bool [...]; numbers: [N] float32, of the policy with this name."""
    return THINKING[name].fn(at, *numbers)


def parse_policy(text: str) -> ThinkPolicy:
    """Reads a policy: its name, and after a colon its numbers, separated by commas.

    Raises:
      ConfigError: there is no such policy, or its numbers are missing, too many, or out of bounds.
    """
    name, colon, rest = text.partition(":")
    if name not in THINKING:
        near = difflib.get_close_matches(name, THINKING, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"think is {text!r}; it must be one of {', '.join(map(usage, THINKING))}.{hint}")
    numbers: tuple[Number, ...] = THINKING[name].traits["numbers"]
    words = rest.split(",") if colon else []
    if not sum(number.default is None for number in numbers) <= len(words) <= len(numbers):
        raise ConfigError(f"think is {text!r}, with {len(words)} numbers; it is written {usage(name)}.")
    found = [_number(text, number, word) for number, word in zip(numbers, words, strict=False)]
    found += [number.default for number in numbers[len(words) :] if number.default is not None]
    if found != sorted(found):
        raise ConfigError(f"think is {text!r}; its numbers must ascend: {usage(name)}.")
    return ThinkPolicy(name, tuple(found))


def usage(name: str) -> str:
    """Returns how a policy is written, as in `entropy:MIN[,MAX]`."""
    parts = [
        f"{',' * bool(i)}{number.name.upper()}" if number.default is None else f"[,{number.name.upper()}]"
        for i, number in enumerate(THINKING[name].traits["numbers"])
    ]
    return f"{name}:{''.join(parts)}" if parts else name


def choose_policy(thoughts: bool | None, think: str | None, default: str = "always") -> ThinkPolicy:
    """Returns the policy that two settings select together: whether to think at all, and at which positions.

    Args:
      thoughts: None = as `think` says; think: None = as the model says, see `default`.

    Raises:
      ConfigError: the settings contradict each other.
    """
    if think is None:
        policy = NEVER if thoughts is False else parse_policy(default)
        return ALWAYS if thoughts and policy == NEVER else policy
    policy = parse_policy(think)
    if thoughts is not None and thoughts == (policy == NEVER):
        raise ConfigError(f"think is {think!r}, but `thoughts` is {'on' if thoughts else 'off'}. Omit one of them.")
    return policy


def _number(text: str, number: Number, word: str) -> float:
    """Reads one number of the policy that is written `text`."""
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and number.least <= value <= number.most and (not number.whole or value % 1 == 0)):
        kind = "a whole number" if number.whole else "a number"
        bounds = f", {number.least:g} .. {number.most:g}"
        if number.most == math.inf:
            bounds = f", {number.least:g} or more" if number.least > -math.inf else ""
        raise ConfigError(f"think is {text!r}; its {number.name} must be {kind}{bounds}.")
    return value

"""Prints docs/api.md: the names of the Python API with their docstrings."""

from __future__ import annotations

import inspect
import textwrap
import typing

import quietstar_jax as qs
from quietstar_jax.methods import advantages, rewards
from quietstar_jax.methods.registry import Registry

INTRODUCTION = """\
# Python API

`make docs` generates this page from docstrings. The names on this page stay; nothing else in the package is promised.
Errors that a user can fix are `qs.UserError`, and their messages say what to do.

## Use a model

```python
import quietstar_jax as qs

model = qs.Model.open("runs/quickstart")  # or an export, a Hugging Face folder, a hub id
(text,) = model.generate(["sum 1 +7 +3 +4 +2 +5 ask"], max_tokens=9)
print(text.text, text.thoughts, text.mixing_weights)

for at in model.think("sum 1 +7 +3 +4 ask 5 .", positions=[-3], samples=2):
    print(repr(at.token), "->", repr(at.next_token), list(zip(at.texts, at.rewards)))

score = model.score("sum 1 +7 +3 +4 ask 5 .")
print(score.nll.mean(), score.nll_with_thoughts.mean())  # nats per token
```

## Train with an advantage of your own

```python
import quietstar_jax as qs
from quietstar_jax.configs import quickstart


@qs.ADVANTAGES.register()
def best_only(rewards, batch_std):
    # rewards: [B, R, J]; 1 for the best thought of a position, 0 for the others
    return (rewards == rewards.max(axis=1, keepdims=True)).astype(rewards.dtype)


config = quickstart.get_config()
config.workdir = "runs/best_only"
config.thought.advantage = "best_only"
for phase in config.phases:
    phase.steps = 2  # a trial
print(qs.train_model(config)["loss_with_thoughts"])
```

In a file with `get_config()`, the same function serves `quietstar train --config FILE`. A run stores the name of the
function, not its code: register it before the run resumes. Evaluation, generation and export do not need it. A reward
is registered with `qs.REWARDS`; [`qs.ADVANTAGES`](#qsadvantages) and [`qs.REWARDS`](#qsrewards)
list their arguments and shapes."""


METHODS = {"Model": ("open", "generate", "stream", "think", "score")}
REGISTRIES = {"ADVANTAGES": advantages, "REWARDS": rewards}


class Bare(str):
    """A text that is its own `repr`: annotations as they are written."""

    __repr__ = str.__str__


def signature(thing: typing.Any) -> str:
    """Returns the arguments of a function, without quotes around their types."""
    found = inspect.signature(thing)
    arguments = [one.replace(annotation=Bare(one.annotation)) for one in found.parameters.values()]
    found = found.replace(
        parameters=[one for one in arguments if one.name != "self"], return_annotation=Bare(found.return_annotation)
    )
    return str(found)


def entry(title: str, thing: typing.Any) -> str:
    """Returns the heading, the docstring and, of a function, the signature."""
    head = title if inspect.isclass(thing) else f"{title}{signature(thing)}"
    head = textwrap.fill(head, 110, subsequent_indent="    ", break_long_words=False)
    return f"### `qs.{title}`\n\n```text\n{head}\n\n{inspect.getdoc(thing)}\n```"


def document() -> str:
    """Returns the content of docs/api.md."""
    parts = [INTRODUCTION, "## Reference"]
    for name in qs.API:
        thing = getattr(qs, name)
        if isinstance(thing, Registry):
            about = inspect.getdoc(REGISTRIES[name])
            names = ", ".join(f"`{key}`" for key in thing)
            parts.append(f"### `qs.{name}`\n\nNames: {names}.\n\n```text\n{about}\n```")
        else:
            parts.append(entry(name, thing))
        parts += [entry(f"{name}.{method}", getattr(thing, method)) for method in METHODS.get(name, ())]
    parts.append(entry("ADVANTAGES.register", qs.ADVANTAGES.register))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(document(), end="")

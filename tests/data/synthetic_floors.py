"""The lowest losses that are possible on the embedded corpus, from its generator (docs/results.md has them)."""

from __future__ import annotations

import math

from quietstar_jax.data.synthetic import (
    ADDENDS,
    CHATTER,
    EVENTS,
    KINDS,
    NAMES,
    NODES,
    SHAPES,
    STEPS,
    UNITS,
    _useful_share,
)
from quietstar_jax.data_config import SyntheticConfig


def floors(config: SyntheticConfig) -> dict[str, float]:
    """The lowest possible mean cross-entropy of each kind of token, in nats per token, from the generator itself.

    * `question/KIND`: mean over the tokens of a question of that kind (its first one also tells the kind);
    * `sign`: `show` or `ask`, after the question; `mark_after_show` and `close`, `stop`: certain;
    * `passage_first`, `step`, `chatter`: the first word after an opening mark, later words of steps, of chatter;
    * `answer_after_steps`: certain; `answer/computed`: also certain for who does the whole chain at once;
    * `answer/guess/KIND`: after chatter or at once, for who cannot (of `chase` knowing only the start);
    * `after_ask/computed`, `after_ask/guess/KIND`: the token after `ask`, where a mark may open, in either case;
    * `document/computed`, `document/guess`: mean over all tokens of a document, end-of-text token included.

    The floors ignore that the splits contain different problems: no model can know it before it has seen them all.
    """
    shown = config.steps_fraction + config.chatter_fraction
    useful, stray = _useful_share(config), config.stray_mark_rate
    question = _question_nats()
    guess = {kind: math.log(10) for kind in KINDS}
    start_share = sum(tail == 0 and (STEPS - 1) % cycle == 0 for tail, cycle in SHAPES) / len(SHAPES)
    guess["chase"] = _binary_entropy(start_share) + (1 - start_share) * math.log(len(NODES) - 1)
    result = {f"question/{kind}": nll / _question_length(kind) for kind, nll in question.items()}
    result |= dict.fromkeys(("mark_after_show", "step", "close", "stop", "answer_after_steps", "answer/computed"), 0.0)
    result["sign"] = _binary_entropy(shown)
    result["chatter"] = math.log(len(CHATTER))
    result["passage_first"] = _binary_entropy(useful) + (1 - useful) * result["chatter"]
    result["after_ask/computed"] = _binary_entropy(stray)
    for kind in KINDS:
        result[f"answer/guess/{kind}"] = guess[kind]
        result[f"after_ask/guess/{kind}"] = _binary_entropy(stray) + (1 - stray) * guess[kind]

    passages = shown + (1 - shown) * stray  # of documents
    computed = sum(question.values()) / len(KINDS) + result["sign"] + (1 - shown) * _binary_entropy(stray)
    computed += passages * (result["passage_first"] + (STEPS - 1) * (1 - useful) * result["chatter"])
    guessed = computed + (1 - passages * useful) * sum(guess.values()) / len(KINDS)
    length = sum(map(_question_length, KINDS)) / len(KINDS) + 4 + passages * (STEPS + 2)  # sign, answer, stop, end
    return result | {"document/computed": computed / length, "document/guess": guessed / length}


def _question_length(kind: str) -> int:
    """Tokens of a question."""
    return {"sum": 1 + STEPS, "story": 2 + STEPS, "convert": 1 + STEPS, "chase": len(NODES) + 2}[kind]


def _question_nats() -> dict[str, float]:
    """Entropy of a whole question of each kind, the choice of the kind included; nats."""
    pointers = [  # how many, with their start, have the shape: the path in order, and the targets of all other nodes
        math.perm(len(NODES), tail + cycle) * (len(NODES) - 1) ** (len(NODES) - tail - cycle) for tail, cycle in SHAPES
    ]
    nats = {
        "sum": math.log(10) + (STEPS - 1) * math.log(len(ADDENDS)),
        "story": math.log(len(NAMES) * 10) + (STEPS - 1) * math.log(len(EVENTS)),
        "convert": math.log(10) + (STEPS - 1) * math.log(len(UNITS)),
        "chase": math.log(len(SHAPES)) + sum(map(math.log, pointers)) / len(SHAPES),
    }
    return {kind: value + math.log(len(KINDS)) for kind, value in nats.items()}


def _binary_entropy(probability: float) -> float:
    """Of an event and its opposite, in nats."""
    return -sum(p * math.log(p) for p in (probability, 1 - probability) if p > 0)

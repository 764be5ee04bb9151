"""Reads, preserves and writes generation_config.json: how to sample from a model, and where to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quietstar_jax.errors import CheckpointError, ConfigError, short
from quietstar_jax.methods.thinking import parse_policy
from quietstar_jax.thought_config import MOST_REACH

# Fields with a policy of thinking, see `methods/thinking.py`, and for how many tokens a thought is used.
THINKING, REACH = "thinking", "thinking_reach"

# Fields that transformers reads from config.json if there is no generation_config.json.
LEGACY_GENERATION = {
    "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "max_length",
}  # fmt: skip
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# How one process computes, or who wrote the file. Thoughts need a cache that keeps all tokens.
NOT_KEPT = {"transformers_version", "_from_model_config", "use_cache", "cache_implementation", "cache_config"}


def stops_and_suppressed(
    generation: Mapping[str, Any], trained_eos: int | None, where: object
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (ids that end a text, ids that must not be generated).

    Args:
      generation: field of `CheckpointFiles` or of a run.
      trained_eos: the id that ended texts in training, placed first; None = only the ids in `generation`.
      where: source of `generation`, for messages.

    Raises:
      CheckpointError: a field does not contain token ids.
    """
    stops = _ids(generation, "eos_token_id", where)
    first = () if trained_eos is None else (trained_eos,)
    return (*first, *(i for i in stops if i not in first)), _ids(generation, "suppress_tokens", where)


def thinking(generation: Mapping[str, Any], where: object) -> str:
    """Returns the policy of thinking that a model recommends, `always` if it has none.

    Raises:
      CheckpointError: there is no such policy.
    """
    value = generation.get(THINKING, "always")
    try:
        return str(parse_policy(value if isinstance(value, str) else short(value)))
    except ConfigError as error:
        raise CheckpointError(f"{where}: {THINKING} of generation_config.json: {error}") from error


def thinking_reach(generation: Mapping[str, Any], where: object) -> int:
    """Returns for how many tokens a model recommends to use a thought, 1 if it recommends nothing.

    Raises:
      CheckpointError: it is not such a number.
    """
    value = generation.get(REACH)
    if value is None:
        return 1
    if type(value) is not int or not 1 <= value <= MOST_REACH:
        found = f"{where}: {REACH} of generation_config.json is {short(value)}"
        raise CheckpointError(f"{found}; it must be an integer within 1 .. {MOST_REACH}.")
    return value


def generation_config(
    before: Mapping[str, Any],
    *,
    bos_id: int | None,
    eos_id: int,
    pad_id: int,
    suppressed: Sequence[int],
    think: str = "",
    reach: int = 0,
    thinks: bool = True,
) -> dict[str, Any]:
    """Returns the generation_config.json of a trained model, based on that of the model that training began from.

    All fields are kept except those in `NOT_KEPT`, and sampling settings without `do_sample`: these have no effect, and
    transformers would warn about them.

    Args:
      before: generation_config.json of the model that training began from.
      eos_id: the id that ended texts in training.
      suppressed: ids that must not be generated, in addition to those in `before`.
      think: policy of thinking that the model recommends; empty = as in `before`; reach: for how many tokens it
        recommends to use a thought; 0 = as in `before`; thinks: whether the model can think.
    """
    kept = {
        key: value
        for key, value in before.items()
        if value is not None
        and key not in NOT_KEPT
        and (thinks or key not in (THINKING, REACH))
        and (before.get("do_sample") is True or key not in SAMPLING)
    }
    stops, forbidden = stops_and_suppressed(before, eos_id, "The run's generation settings")
    forbidden = tuple(dict.fromkeys((*suppressed, *forbidden)))
    return {
        **kept,
        "bos_token_id": bos_id,
        "eos_token_id": list(stops) if len(stops) > 1 else eos_id,
        "pad_token_id": pad_id,
        **({"suppress_tokens": list(forbidden)} if forbidden else {}),
        **({THINKING: think} if think else {}),
        **({REACH: reach} if reach else {}),
    }


def _ids(generation: Mapping[str, Any], name: str, where: object) -> tuple[int, ...]:
    value = generation.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"{where}: {name} is {short(value)}; it must be a token id or a list of token ids.")
    return tuple(ids)

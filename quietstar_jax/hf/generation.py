"""generation_config.json: what a model says of how it wants to be sampled and stopped; read, kept and written here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quietstar_jax.errors import CheckpointError, short

# Fields that config.json may have where there is no generation_config.json: transformers reads them there.
LEGACY_GENERATION = {
    "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "max_length",
}  # fmt: skip
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# How one process computes, or who wrote the file; a cache of a kind that forgets cannot hold thoughts.
NOT_KEPT = {"transformers_version", "_from_model_config", "use_cache", "cache_implementation", "cache_config"}


def stops_and_suppressed(
    generation: Mapping[str, Any], trained_eos: int | None, where: object
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids that end a text, ids that must not be generated).

    Args:
      generation: of `CheckpointFiles` or of a run.
      trained_eos: what training ended texts with, which then comes first; None = nothing beyond what the model says.

    Raises:
      CheckpointError: a field holds no token ids.
    """
    stops = _ids(generation, "eos_token_id", where)
    first = () if trained_eos is None else (trained_eos,)
    return (*first, *(i for i in stops if i not in first)), _ids(generation, "suppress_tokens", where)


def generation_config(
    before: Mapping[str, Any], *, bos_id: int | None, eos_id: int, pad_id: int, suppressed: Sequence[int]
) -> dict[str, Any]:
    """The generation_config.json of a model that training began from, for the model that came of it.

    Everything is kept but what `NOT_KEPT` names, and sampling settings without `do_sample`, of which transformers
    warns because they have no effect.

    Args:
      eos_id: what training ended texts with.
      suppressed: ids that must not be generated, besides those of before.
    """
    kept = {
        key: value
        for key, value in before.items()
        if value is not None and key not in NOT_KEPT and (before.get("do_sample") is True or key not in SAMPLING)
    }
    stops, forbidden = stops_and_suppressed(before, eos_id, "The run's generation settings")
    forbidden = tuple(dict.fromkeys((*suppressed, *forbidden)))
    return {
        **kept,
        "bos_token_id": bos_id,
        "eos_token_id": list(stops) if len(stops) > 1 else eos_id,
        "pad_token_id": pad_id,
        **({"suppress_tokens": list(forbidden)} if forbidden else {}),
    }


def _ids(generation: Mapping[str, Any], name: str, where: object) -> tuple[int, ...]:
    given = generation.get(name)
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise CheckpointError(f"{where}: {name} is {short(given)}; it takes token ids.")
    return tuple(ids)

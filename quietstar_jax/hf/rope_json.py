"""Converts the rotary parameters of a Hugging Face `config.json` to fields of `Architecture`, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from quietstar_jax.architecture import Architecture
from quietstar_jax.errors import ConfigError, short
from quietstar_jax.hf.json_file import value_or
from quietstar_jax.models.families import Family

# Per kind of rotary scaling: field of `RopeScaling` -> its name in `rope_parameters`.
ROPE_FIELDS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_max_positions": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "original_max_positions": "original_max_position_embeddings",
        "attention_factor": "attention_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    },
}
ROPE_REQUIRED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


def rope_from_hf(config: Mapping[str, Any], family: Family, windows: Any) -> dict[str, Any]:
    """Returns the fields of `Architecture` about rotary embeddings; `windows`: whether any layer has a window."""
    if not family.local_theta:
        parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
        return _one_rope(config, family, parameters, "one flat group for all layers")
    groups = value_or(config, "rope_parameters", {})
    if not isinstance(groups, Mapping) or set(groups) - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"config.json: rope_parameters is {short(groups)}; supported for {family.class_name} is one group for "
            "full_attention and one for sliding_attention."
        )
    full, local = value_or(groups, "full_attention", {}), value_or(groups, "sliding_attention", {})
    scaling = value_or(config, "rope_scaling", {})
    both = {**full, **scaling} if isinstance(full, Mapping) and isinstance(scaling, Mapping) else [full, scaling]
    if isinstance(scaling, Mapping) and scaling.get("type") and not scaling.get("rope_type"):
        raise ConfigError(
            f"config.json: rope_scaling is {short(scaling)}. For {family.class_name} transformers 4 reads its `type`, "
            "and transformers 5 ignores it: write `rope_type` instead."
        )
    fields = _one_rope(config, family, both, "one flat group for each of the two")
    beside = {"rope_theta": value_or(config, family.local_theta_field, family.local_theta)}
    near = _one_rope(beside, family, local, "one flat group for each of the two")
    if near["rope_scaling"] != {"kind": "default"}:
        raise ConfigError(
            f"config.json: the rotary parameters of sliding_attention are {short(local)}. Supported is rope_type "
            "default, without scaling."
        )
    same = {**fields, **near} == fields
    return {**fields, "rope_local_theta": 0.0 if same or not windows else near["rope_theta"]}


def _one_rope(config: Mapping[str, Any], family: Family, parameters: Any, supported: str) -> dict[str, Any]:
    """As `rope_from_hf`, for one group of rotary parameters."""
    if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
        raise ConfigError(f"config.json: the rotary parameters are {short(parameters)}; supported is {supported}.")
    kind = value_or(parameters, "rope_type", value_or(parameters, "type", "default"))
    if not isinstance(kind, str) or kind not in family.rope_kinds:
        raise ConfigError(
            f"config.json: rope_type is {short(kind)}. Supported for {family.class_name} are: "
            f"{', '.join(family.rope_kinds)}."
        )
    fraction = value_or(parameters, "partial_rotary_factor", value_or(config, "partial_rotary_factor", 1.0))
    if not family.partial_rotary and fraction != 1:
        raise ConfigError(
            f"config.json: partial_rotary_factor is {short(fraction)}. Supported for {family.class_name} is 1.0: every "
            "dimension of a head rotates."
        )
    max_positions = value_or(config, "max_position_embeddings", family.max_positions)
    parameters = _fill_in(dict(parameters), kind, config, max_positions)
    absent = [key for key in ROPE_REQUIRED.get(kind, ()) if parameters.get(key) is None]
    if absent:
        raise ConfigError(f"config.json: rope_type {kind} also needs {', '.join(absent)}.")
    used = {ours: parameters[theirs] for ours, theirs in ROPE_FIELDS[kind].items() if parameters.get(theirs)}
    theta = value_or(parameters, "rope_theta", value_or(config, "rope_theta", family.theta))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < math.inf:
        raise ConfigError(f"config.json: rope_theta is {short(theta)}; it must be a number above 1.")
    return {"rope_theta": theta, "rope_scaling": {"kind": kind, **used}, "rotary_fraction": fraction}


def _fill_in(parameters: dict[str, Any], kind: str, config: Mapping[str, Any], max_positions: Any) -> dict[str, Any]:
    """Adds the rotary parameters that transformers derives if they are missing."""
    if kind in ("llama3", "yarn"):
        original = value_or(parameters, "original_max_position_embeddings", max_positions)
        parameters["original_max_position_embeddings"] = value_or(config, "original_max_position_embeddings", original)
    if kind != "yarn":
        return parameters
    if parameters.get("truncate") is False:
        raise ConfigError("config.json: yarn with truncate false is not supported; supported is true, its default.")
    try:
        if parameters.get("factor") is None:
            parameters["factor"] = max_positions / parameters["original_max_position_embeddings"]
        factor, scales = parameters["factor"], (parameters.get("mscale"), parameters.get("mscale_all_dim"))
        if parameters.get("attention_factor") is None and all(scales) and factor > 1:
            upper, lower = (0.1 * scale * math.log(factor) + 1.0 for scale in scales if scale)
            parameters["attention_factor"] = upper / lower
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"config.json: the rotary parameters {short(parameters)} must be numbers ({error})."
        ) from error
    return parameters


def rope_to_hf(a: Architecture, family: Family) -> dict[str, Any]:
    scaling = a.rope_scaling
    fields = {theirs: getattr(scaling, ours) for ours, theirs in ROPE_FIELDS[scaling.kind].items()}
    if scaling.kind == "yarn" and not scaling.attention_factor:
        del fields["attention_factor"]  # derived from the factor
    if a.rotary_fraction != 1:
        fields["partial_rotary_factor"] = a.rotary_fraction
    parameters = {"rope_type": scaling.kind, "rope_theta": a.rope_theta, **fields}
    if not family.local_theta:
        return parameters
    local = a.rope_local_theta or a.rope_theta
    return {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": local}}

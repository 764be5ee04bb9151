"""Converts Hugging Face `config.json` files of the supported families to `Architecture`, and back.

Old and new field names are accepted (`rope_theta` and `rope_scaling`, or `rope_parameters`); missing fields get the
defaults of transformers. A configuration that the decoder cannot represent is an error, never approximated.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quietstar_jax.architecture import Architecture, RopeScaling
from quietstar_jax.errors import ConfigError, short
from quietstar_jax.hf.json_file import value_or
from quietstar_jax.hf.rope_json import ROPE_FIELDS, rope_from_hf, rope_to_hf
from quietstar_jax.models.families import FAMILIES, TEXT_PARTS, Family
from quietstar_jax.settings import differences, from_mapping, to_mapping

QUANTIZATION = ("quantization_config", "quantization", "compression_config")
MAX_LAYERS = 10_000

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}

# Fields of `Architecture` and `RopeScaling` -> those of config.json, for messages.
THEIR_FIELDS = {
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings", "rotary_fraction": "partial_rotary_factor", "activation": "hidden_act",
    "qkv_bias": "attention_bias", "output_bias": "attention_bias", "tie_embeddings": "tie_word_embeddings",
    "full_attention_layers": "layer_types", "kind": "rope_type", "query_scale": "query_pre_attn_scalar",
    "score_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping",
    **{ours: theirs for fields in ROPE_FIELDS.values() for ours, theirs in fields.items()},
}  # fmt: skip


def architecture_from_hf(config: Mapping[str, Any], folder: str | Path = "") -> Architecture:
    """Returns the architecture that a config.json describes, as transformers reads it.

    Args:
      folder: folder of the config.json, for messages.

    Raises:
      ConfigError: a field has an impossible value, or one that the decoder does not support.
    """
    try:
        return _architecture(text_config(config))
    except ConfigError as error:
        file = str(Path(folder) / "config.json")
        ours = re.compile(rf"\b({'|'.join(THEIR_FIELDS)})\b")
        text = re.sub(r"config\.json\.(rope_scaling\.)?", "", str(error))
        lines = [ours.sub(lambda field: THEIR_FIELDS[field[0]], line) for line in text.split("\n")]
        if lines[0].startswith("The configuration"):
            lines[0] = f"{file} cannot be used:"
        else:
            lines[0] = lines[0].replace("config.json", file, 1)
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _architecture(config: Mapping[str, Any]) -> Architecture:
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type is {short(name)}. Supported are: {', '.join(FAMILIES)}. "
            "Choose a checkpoint of one of these families."
        )
    _refuse_quantized(config)
    if config.get("use_bidirectional_attention"):
        raise ConfigError(
            "config.json: use_bidirectional_attention is set: the model does not predict the next token. Use a causal "
            "language model."
        )
    family = FAMILIES[name]
    vocab_size, hidden_size, intermediate_size = family.sizes
    layers = _size(config, "num_hidden_layers", family.depth[0], MAX_LAYERS)
    heads = _size(config, "num_attention_heads", family.depth[1])
    hidden_size = _size(config, "hidden_size", hidden_size)
    head_dim = _head_dim(config, family, hidden_size, heads)
    window, full_layers = _windows(config, family, layers)
    bias = family.optional_bias and value_or(config, "attention_bias", False)
    fields = {
        "family": name,
        "vocab_size": _size(config, "vocab_size", vocab_size),
        "hidden_size": hidden_size,
        "intermediate_size": _size(config, "intermediate_size", intermediate_size),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": _kv_heads(config, family, heads),
        "head_dim": head_dim,
        "max_positions": value_or(config, "max_position_embeddings", family.max_positions),
        **rope_from_hf(config, family, len(full_layers) < layers and window),
        "rms_norm_eps": value_or(config, "rms_norm_eps", family.rms_norm_eps),
        "activation": _activation(config, family),
        "sliding_window": window,
        "full_attention_layers": full_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": family.optional_mlp_bias and value_or(config, "mlp_bias", False),
        "query_scale": _query_scale(config, family, head_dim),
        "score_cap": _cap(config, "attn_logit_softcapping", family.score_cap),
        "logit_cap": _cap(config, "final_logit_softcapping", family.logit_cap),
        "embedding_multiplier": hidden_size**0.5 if family.scaled_embeddings else 1.0,
        "tie_embeddings": tied(config),
        "initializer_range": value_or(config, "initializer_range", 0.02),
        **family.fixed,
    }
    return from_mapping(Architecture, fields, root="config.json")


def architecture_to_hf(architecture: Architecture) -> dict[str, Any]:
    """Returns the config.json of an architecture, with the field names of transformers 5, without token ids and dtype.

    Raises:
      ConfigError: the family of the architecture cannot express it.
    """
    a = canonical(architecture)
    if a.family not in FAMILIES:
        raise ConfigError(f"family is {a.family!r}; it must be one of {', '.join(FAMILIES)}.")
    family = FAMILIES[a.family]
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": a.family,
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "max_position_embeddings": a.max_positions,
        "rope_parameters": rope_to_hf(a, family),
        "rms_norm_eps": a.rms_norm_eps,
        family.activation[0]: ACTIVATION_NAMES[a.activation],
        "tie_word_embeddings": a.tie_embeddings,
        "initializer_range": a.initializer_range,
    }
    if family.optional_bias:
        config["attention_bias"] = a.qkv_bias
    if family.optional_mlp_bias:
        config["mlp_bias"] = a.mlp_bias
    if family.query_scalar:
        config["query_pre_attn_scalar"] = _query_scalar(a)
    if family.score_cap is not None:
        config["attn_logit_softcapping"] = a.score_cap or None
    if family.logit_cap is not None:
        config["final_logit_softcapping"] = a.logit_cap or None
    if family.partial_rotary:
        config["original_max_position_embeddings"] = a.max_positions  # beyond this length transformers resets its cache
    config.update(_windows_to_hf(a, family))
    lost = differences(to_mapping(a), to_mapping(architecture_from_hf(config)), "architecture")
    if lost:
        raise ConfigError(
            f"A {a.family} config.json cannot express this architecture (wanted -> as it would be read):\n"
            + "\n".join(f"  - {line}" for line in lost)
            + f"\nChange these fields, or `family` to another of {', '.join(FAMILIES)}."
        )
    return config


def canonical(architecture: Architecture) -> Architecture:
    """Returns the same architecture with the fields that have no effect set to their defaults."""
    a = architecture
    full = tuple(sorted(set(a.full_attention_layers))) if a.sliding_window else ()
    if len(full) == a.num_layers:
        full, a = (), dataclasses.replace(a, sliding_window=0)
    used = {field: getattr(a.rope_scaling, field) for field in ROPE_FIELDS[a.rope_scaling.kind]}
    scaling = RopeScaling(kind=a.rope_scaling.kind, **used)
    same_rope = a.rope_local_theta == a.rope_theta and scaling.kind == "default"
    return dataclasses.replace(
        a,
        full_attention_layers=full,
        rope_scaling=scaling,
        rope_local_theta=0.0 if same_rope or not a.sliding_window else a.rope_local_theta,
        query_scale=0.0 if a.query_scale == a.head_dim**-0.5 else a.query_scale,
    )


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of the language model in a model of text and images; any other config.json unchanged."""
    inner = config.get("text_config")
    name = config.get("model_type")
    if not isinstance(name, str) or name not in TEXT_PARTS or not isinstance(inner, Mapping):
        return dict(config)
    outer = {key: config[key] for key in ("tie_word_embeddings", *QUANTIZATION) if config.get(key) is not None}
    return {"model_type": TEXT_PARTS[name], **inner, **outer}


def tied(config: Mapping[str, Any]) -> Any:
    """Returns whether the output projection is the transposed embedding, as the config.json of a family says."""
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None  # type: ignore[call-overload]
    return value_or(config, "tie_word_embeddings", family is not None and family.tied)


def _size(config: Mapping[str, Any], key: str, default: int, most: int = 2**31 - 1) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"config.json: {key} is {short(value)}; it must be an integer within 1 .. {most}.")
    return value


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    keys = [key for key in QUANTIZATION if config.get(key)]
    if keys:
        raise ConfigError(
            f"config.json has a {keys[0]}: the weights are quantized. Only float weights (float16, "
            "bfloat16, float32, float64) are supported: use the unquantized checkpoint of this model."
        )


def _activation(config: Mapping[str, Any], family: Family) -> str:
    field, default = family.activation
    name = value_or(config, field, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(f"config.json: {field} is {short(name)}. Supported are: {', '.join(ACTIVATIONS)}.")
    return "gelu_tanh" if name == "gelu" and not family.exact_gelu else ACTIVATIONS[name]


def _query_scale(config: Mapping[str, Any], family: Family, head_dim: Any) -> float:
    if not family.query_scalar:
        return 0.0
    scalar = value_or(config, "query_pre_attn_scalar", family.query_scalar)
    if isinstance(scalar, bool) or not isinstance(scalar, int | float) or not 0 < scalar < 2**31:
        raise ConfigError(f"config.json: query_pre_attn_scalar is {short(scalar)}; it must be a number above 0.")
    return 0.0 if scalar == head_dim else scalar**-0.5


def _query_scalar(a: Architecture) -> int | float:
    """The inverse of `_query_scale`: an integer if possible, as transformers 5 requires."""
    scalar = a.query_scale**-2 if a.query_scale else a.head_dim
    return round(scalar) if round(scalar) and round(scalar) ** -0.5 == a.query_scale else scalar


def _cap(config: Mapping[str, Any], key: str, default: float | None) -> Any:
    """Returns a soft cap; 0 = none, also where the family does not have the field."""
    return 0.0 if default is None else config.get(key, default) or 0.0


def _kv_heads(config: Mapping[str, Any], family: Family, heads: int) -> int:
    if "num_key_value_heads" not in config and family.num_kv_heads:
        return family.num_kv_heads
    return value_or(config, "num_key_value_heads", heads)


def _head_dim(config: Mapping[str, Any], family: Family, width: int, heads: int) -> Any:
    if config.get("head_dim") is not None:
        return config["head_dim"]
    if not family.head_dim and width % heads:
        raise ConfigError(
            f"config.json: hidden_size {width} is not a multiple of num_attention_heads {heads} and no head_dim is "
            "given; give one."
        )
    return family.head_dim or width // heads


def _windows(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int, tuple[int, ...]]:
    """Returns (number of keys that a query sees, itself included, or 0 for all; layers with full attention)."""
    if family.window_everywhere:
        return (config["sliding_window"] or 0 if "sliding_window" in config else family.window), ()
    if not family.window_by_layer and not family.window_pattern:
        return 0, ()
    used = bool(family.window_pattern) or value_or(config, "use_sliding_window", False)
    window = (config["sliding_window"] or 0 if "sliding_window" in config else family.window) if used else 0
    kinds = config.get("layer_types")
    if kinds is None and family.window_pattern:
        pattern = _size(config, family.window_pattern_field, family.window_pattern)
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    if kinds is None:
        first = value_or(config, "max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise ConfigError(f"config.json: max_window_layers is {short(first)}; it must be an integer.")
        kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    known = ("full_attention", "attention", "sliding_attention")
    if not isinstance(kinds, list | tuple) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise ConfigError(
            f"config.json: layer_types is {short(kinds)}; it must have {layers} entries (num_hidden_layers), each "
            "full_attention or sliding_attention."
        )
    full = tuple(i for i, kind in enumerate(kinds) if kind != "sliding_attention")
    if len(full) == layers:
        return 0, ()
    if not window:
        raise ConfigError(
            "config.json: layer_types has sliding_attention, but use_sliding_window and sliding_window set no "
            "window; set both, or make every layer full_attention."
            if family.window_by_layer
            else "config.json: layers have sliding_attention, but sliding_window sets no window; set it, or make every "
            "layer full_attention in layer_types."
        )
    return window, full


def _windows_to_hf(a: Architecture, family: Family) -> dict[str, Any]:
    if family.window_everywhere:
        return {"sliding_window": a.sliding_window or None}
    sliding = [i for i in range(a.num_layers) if a.has_window(i)]
    types = {"layer_types": ["sliding_attention" if i in sliding else "full_attention" for i in range(a.num_layers)]}
    if family.window_pattern:  # transformers builds the mask of windows even if no layer has one
        return {"sliding_window": a.sliding_window or family.window, **types}
    if not family.window_by_layer:
        return {}
    return {
        "use_sliding_window": bool(sliding),
        "sliding_window": a.sliding_window or None,
        "max_window_layers": min(sliding, default=a.num_layers),  # read by transformers before `layer_types`
        **types,
    }

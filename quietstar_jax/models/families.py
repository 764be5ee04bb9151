"""Converts Hugging Face `config.json` files of the supported families to `Architecture`, and back.

Old and new field names are accepted (`rope_theta` and `rope_scaling`, or `rope_parameters`); missing fields get the
defaults of transformers. A configuration that the decoder cannot represent is an error, never approximated.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from quietstar_jax.architecture import Architecture, FamilyName, RopeKind, RopeScaling
from quietstar_jax.errors import ConfigError, short
from quietstar_jax.settings import differences, from_mapping, to_mapping


class Family(NamedTuple):
    """Defaults of transformers for fields that the config.json of a model type does not set."""

    class_name: str
    sizes: tuple[int, int, int] = (32_000, 4096, 11_008)  # vocabulary, hidden, feed-forward; always 32 layers and heads
    num_kv_heads: int = 0  # 0 = as many as query heads
    head_dim: int = 0  # 0 = hidden_size / num_attention_heads
    max_positions: int = 32_768
    optional_bias: bool = False  # `attention_bias`: on q, k, v and o
    qkv_bias: bool = False  # always on q, k and v, never on o
    optional_mlp_bias: bool = False  # `mlp_bias`
    qk_norm: bool = False
    rms_norm_eps: float = 1e-6
    window: int = 4096  # `sliding_window`
    window_everywhere: bool = False  # the window applies to all layers
    window_by_layer: bool = False  # `use_sliding_window`, `layer_types` or `max_window_layers`
    fused: bool = False  # one tensor for queries, keys and values, one for gate and up
    partial_rotary: bool = False  # `partial_rotary_factor`
    rope_kinds: tuple[str, ...] = get_args(RopeKind)


FAMILIES: dict[FamilyName, Family] = {
    "llama": Family("LlamaForCausalLM", max_positions=2048, optional_bias=True, optional_mlp_bias=True),
    "mistral": Family(
        "MistralForCausalLM", (32_000, 4096, 14_336), num_kv_heads=8, max_positions=131_072, window_everywhere=True
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        (32_064, 3072, 8192),
        max_positions=4096,
        rms_norm_eps=1e-5,
        window=0,
        window_everywhere=True,
        fused=True,
        partial_rotary=True,
        rope_kinds=("default",),
    ),
    "qwen2": Family("Qwen2ForCausalLM", (151_936, 4096, 22_016), num_kv_heads=32, qkv_bias=True, window_by_layer=True),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        (151_936, 4096, 22_016),
        num_kv_heads=32,
        head_dim=128,
        optional_bias=True,
        qk_norm=True,
        window_by_layer=True,
    ),
}
MAX_LAYERS = 10_000
DEPTH = 32  # default number of layers and of heads, in every family

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}

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


# Fields of `Architecture` and `RopeScaling` -> those of config.json, for messages.
THEIR_FIELDS = {
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings", "rotary_fraction": "partial_rotary_factor", "activation": "hidden_act",
    "qkv_bias": "attention_bias", "output_bias": "attention_bias", "tie_embeddings": "tie_word_embeddings",
    "full_attention_layers": "layer_types", "kind": "rope_type",
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
        return _architecture(config)
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
    family = FAMILIES[name]
    vocab_size, hidden_size, intermediate_size = family.sizes
    heads = _size(config, "num_attention_heads", DEPTH)
    layers = _size(config, "num_hidden_layers", DEPTH, MAX_LAYERS)
    window, full_layers = _windows(config, family, layers)
    theta, scaling, fraction = _rope(config, family)
    bias = family.optional_bias and _get(config, "attention_bias", False)
    fields = {
        "family": name,
        "vocab_size": _size(config, "vocab_size", vocab_size),
        "hidden_size": _size(config, "hidden_size", hidden_size),
        "intermediate_size": _size(config, "intermediate_size", intermediate_size),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": _kv_heads(config, family, heads),
        "head_dim": _head_dim(config, family, heads),
        "max_positions": _get(config, "max_position_embeddings", family.max_positions),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_fraction": fraction,
        "rms_norm_eps": _get(config, "rms_norm_eps", family.rms_norm_eps),
        "activation": _activation(_get(config, "hidden_act", "silu")),
        "sliding_window": window,
        "full_attention_layers": full_layers,
        "qkv_bias": bias or family.qkv_bias,
        "output_bias": bias,
        "mlp_bias": family.optional_mlp_bias and _get(config, "mlp_bias", False),
        "qk_norm": family.qk_norm,
        "tie_embeddings": _get(config, "tie_word_embeddings", False),
        "initializer_range": _get(config, "initializer_range", 0.02),
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
        "rope_parameters": _rope_to_hf(a),
        "rms_norm_eps": a.rms_norm_eps,
        "hidden_act": ACTIVATION_NAMES[a.activation],
        "tie_word_embeddings": a.tie_embeddings,
        "initializer_range": a.initializer_range,
    }
    if family.optional_bias:
        config["attention_bias"] = a.qkv_bias
    if family.optional_mlp_bias:
        config["mlp_bias"] = a.mlp_bias
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
    return dataclasses.replace(a, full_attention_layers=full, rope_scaling=scaling)


def _get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Returns the value, or the default if it is missing or null."""
    value = config.get(key)
    return default if value is None else value


def _size(config: Mapping[str, Any], key: str, default: int, most: int = 2**31 - 1) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"config.json: {key} is {short(value)}; it must be an integer within 1 .. {most}.")
    return value


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    keys = [key for key in ("quantization_config", "quantization", "compression_config") if config.get(key)]
    if keys:
        raise ConfigError(
            f"config.json has a {keys[0]}: the weights are quantized. Only float weights (float16, "
            "bfloat16, float32, float64) are supported: use the unquantized checkpoint of this model."
        )


def _activation(name: Any) -> str:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(f"config.json: hidden_act is {short(name)}. Supported are: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _kv_heads(config: Mapping[str, Any], family: Family, heads: int) -> int:
    if "num_key_value_heads" not in config and family.num_kv_heads:
        return family.num_kv_heads
    return _get(config, "num_key_value_heads", heads)


def _head_dim(config: Mapping[str, Any], family: Family, heads: int) -> int:
    if config.get("head_dim") is not None:
        return config["head_dim"]
    width = _size(config, "hidden_size", family.sizes[1])
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
    if not family.window_by_layer:
        return 0, ()
    used = _get(config, "use_sliding_window", False)
    window = (config["sliding_window"] or 0 if "sliding_window" in config else family.window) if used else 0
    kinds = config.get("layer_types")
    if kinds is None:
        first = _get(config, "max_window_layers", 28)
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
        )
    return window, full


def _windows_to_hf(a: Architecture, family: Family) -> dict[str, Any]:
    if family.window_everywhere:
        return {"sliding_window": a.sliding_window or None}
    if not family.window_by_layer:
        return {}
    sliding = [i for i in range(a.num_layers) if a.sliding_window and i not in a.full_attention_layers]
    return {
        "use_sliding_window": bool(sliding),
        "sliding_window": a.sliding_window or None,
        "max_window_layers": min(sliding, default=a.num_layers),  # read by transformers before `layer_types`
        "layer_types": ["sliding_attention" if i in sliding else "full_attention" for i in range(a.num_layers)],
    }


def _rope(config: Mapping[str, Any], family: Family) -> tuple[Any, dict[str, Any], Any]:
    """Returns (theta, mapping for `RopeScaling`, fraction of the dimensions that rotate)."""
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
        raise ConfigError(
            f"config.json: the rotary parameters are {short(parameters)}; supported is one flat group for all layers."
        )
    kind = _get(parameters, "rope_type", _get(parameters, "type", "default"))
    if not isinstance(kind, str) or kind not in family.rope_kinds:
        raise ConfigError(
            f"config.json: rope_type is {short(kind)}. Supported for {family.class_name} are: "
            f"{', '.join(family.rope_kinds)}."
        )
    fraction = _get(parameters, "partial_rotary_factor", _get(config, "partial_rotary_factor", 1.0))
    if not family.partial_rotary and fraction != 1:
        raise ConfigError(
            f"config.json: partial_rotary_factor is {short(fraction)}. Supported for {family.class_name} is 1.0: every "
            "dimension of a head rotates."
        )
    max_positions = _get(config, "max_position_embeddings", family.max_positions)
    parameters = _fill_in(dict(parameters), kind, config, max_positions)
    absent = [key for key in ROPE_REQUIRED.get(kind, ()) if parameters.get(key) is None]
    if absent:
        raise ConfigError(f"config.json: rope_type {kind} also needs {', '.join(absent)}.")
    used = {ours: parameters[theirs] for ours, theirs in ROPE_FIELDS[kind].items() if parameters.get(theirs)}
    theta = _get(parameters, "rope_theta", _get(config, "rope_theta", 10_000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < math.inf:
        raise ConfigError(f"config.json: rope_theta is {short(theta)}; it must be a number above 1.")
    return theta, {"kind": kind, **used}, fraction


def _fill_in(parameters: dict[str, Any], kind: str, config: Mapping[str, Any], max_positions: Any) -> dict[str, Any]:
    """Adds the rotary parameters that transformers derives if they are missing."""
    if kind in ("llama3", "yarn"):
        original = _get(parameters, "original_max_position_embeddings", max_positions)
        parameters["original_max_position_embeddings"] = _get(config, "original_max_position_embeddings", original)
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


def _rope_to_hf(a: Architecture) -> dict[str, Any]:
    scaling = a.rope_scaling
    fields = {theirs: getattr(scaling, ours) for ours, theirs in ROPE_FIELDS[scaling.kind].items()}
    if scaling.kind == "yarn" and not scaling.attention_factor:
        del fields["attention_factor"]  # derived from the factor
    if a.rotary_fraction != 1:
        fields["partial_rotary_factor"] = a.rotary_fraction
    return {"rope_type": scaling.kind, "rope_theta": a.rope_theta, **fields}

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
    """What a model type is: the fields of `Architecture` that it fixes, the optional ones that its config.json may set,
    and the defaults of transformers for fields that are missing there."""

    class_name: str
    sizes: tuple[int, ...] = (32_000, 4096, 11_008)  # vocabulary, hidden, feed-forward
    depth: tuple[int, int] = (32, 32)  # layers, query heads
    num_kv_heads: int = 0  # 0 = as many as query heads
    head_dim: int = 0  # 0 = hidden_size / num_attention_heads
    max_positions: int = 32_768
    fixed: Mapping[str, Any] = {}  # fields of `Architecture` of every model of the family
    optional_bias: bool = False  # `attention_bias`: on q, k, v and o
    optional_mlp_bias: bool = False  # `mlp_bias`
    scaled_embeddings: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    tied: bool = False  # `tie_word_embeddings`
    activation: tuple[str, str] = ("hidden_act", "silu")  # name of the field, default
    exact_gelu: bool = True  # an activation `gelu` is exact; else it is the approximation by tanh
    query_scalar: int = 0  # `query_pre_attn_scalar`: 1 / sqrt of it is the scale of scores; 0 = it is head_dim
    score_cap: float | None = None  # `attn_logit_softcapping`; None = the family has no such field
    logit_cap: float | None = None  # `final_logit_softcapping`
    rms_norm_eps: float = 1e-6
    window: int = 4096  # `sliding_window`
    window_everywhere: bool = False  # the window applies to all layers
    window_by_layer: bool = False  # `use_sliding_window`, `layer_types` or `max_window_layers`
    window_pattern: int = 0  # `layer_types`; by default every n-th layer has full attention, the others have windows
    window_pattern_field: str = ""  # older field, with this n instead of `layer_types`
    theta: float = 10_000.0  # rotary base
    local_theta: float = 0.0  # rotary base of layers with a window; 0 = one base for all layers
    local_theta_field: str = ""  # older field for this base, next to `rope_theta`
    fused: bool = False  # one tensor for queries, keys and values, one for gate and up
    partial_rotary: bool = False  # `partial_rotary_factor`
    rope_kinds: tuple[str, ...] = get_args(RopeKind)


QWEN = Family("", (151_936, 4096, 22_016), num_kv_heads=32, window_by_layer=True)
GEMMA = Family(
    "",
    (256_000, 2304, 9216),
    (26, 8),
    num_kv_heads=4,
    head_dim=256,
    max_positions=8192,
    optional_bias=True,
    scaled_embeddings=True,
    tied=True,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    query_scalar=256,
)
OLMO = Family(
    "",
    (50_304, 4096, 11_008),
    max_positions=2048,
    fixed={"norm_placement": "after", "qk_norm": True, "qk_norm_all_heads": True},
    optional_bias=True,
    rms_norm_eps=1e-5,
)
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
    "qwen2": QWEN._replace(class_name="Qwen2ForCausalLM", fixed={"qkv_bias": True}),
    "qwen3": QWEN._replace(class_name="Qwen3ForCausalLM", head_dim=128, fixed={"qk_norm": True}, optional_bias=True),
    "gemma": GEMMA._replace(
        class_name="GemmaForCausalLM",
        sizes=(256_000, 3072, 24_576),
        depth=(28, 16),
        num_kv_heads=16,
        fixed={"norm_adds_one": True},
        activation=("hidden_act", "gelu_pytorch_tanh"),
        exact_gelu=False,
        query_scalar=0,
    ),
    "gemma2": GEMMA._replace(
        class_name="Gemma2ForCausalLM",
        fixed={"norm_adds_one": True, "norm_placement": "around"},
        score_cap=50.0,
        logit_cap=30.0,
        window_pattern=2,
    ),
    "gemma3_text": GEMMA._replace(
        class_name="Gemma3ForCausalLM",
        sizes=(262_208, 2304, 9216),
        max_positions=131_072,
        fixed={"norm_adds_one": True, "norm_placement": "around", "qk_norm": True},
        logit_cap=0.0,
        window_pattern=6,
        theta=1e6,
        local_theta=1e4,
        local_theta_field="rope_local_base_freq",
        window_pattern_field="sliding_window_pattern",
    ),
    "olmo2": OLMO._replace(class_name="Olmo2ForCausalLM"),
    "olmo3": OLMO._replace(class_name="Olmo3ForCausalLM", window_pattern=4, theta=5e5, local_theta=5e5),
}
TEXT_PARTS: dict[str, FamilyName] = {"gemma3": "gemma3_text"}  # models of text and images -> their language model
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
    bias = family.optional_bias and _get(config, "attention_bias", False)
    fields = {
        "family": name,
        "vocab_size": _size(config, "vocab_size", vocab_size),
        "hidden_size": hidden_size,
        "intermediate_size": _size(config, "intermediate_size", intermediate_size),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": _kv_heads(config, family, heads),
        "head_dim": head_dim,
        "max_positions": _get(config, "max_position_embeddings", family.max_positions),
        **_rope(config, family, len(full_layers) < layers and window),
        "rms_norm_eps": _get(config, "rms_norm_eps", family.rms_norm_eps),
        "activation": _activation(config, family),
        "sliding_window": window,
        "full_attention_layers": full_layers,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": family.optional_mlp_bias and _get(config, "mlp_bias", False),
        "query_scale": _query_scale(config, family, head_dim),
        "score_cap": _cap(config, "attn_logit_softcapping", family.score_cap),
        "logit_cap": _cap(config, "final_logit_softcapping", family.logit_cap),
        "embedding_multiplier": hidden_size**0.5 if family.scaled_embeddings else 1.0,
        "tie_embeddings": tied(config),
        "initializer_range": _get(config, "initializer_range", 0.02),
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
        "rope_parameters": _rope_to_hf(a, family),
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
    return _get(config, "tie_word_embeddings", family is not None and family.tied)


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
    keys = [key for key in QUANTIZATION if config.get(key)]
    if keys:
        raise ConfigError(
            f"config.json has a {keys[0]}: the weights are quantized. Only float weights (float16, "
            "bfloat16, float32, float64) are supported: use the unquantized checkpoint of this model."
        )


def _activation(config: Mapping[str, Any], family: Family) -> str:
    field, default = family.activation
    name = _get(config, field, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ConfigError(f"config.json: {field} is {short(name)}. Supported are: {', '.join(ACTIVATIONS)}.")
    return "gelu_tanh" if name == "gelu" and not family.exact_gelu else ACTIVATIONS[name]


def _query_scale(config: Mapping[str, Any], family: Family, head_dim: Any) -> float:
    if not family.query_scalar:
        return 0.0
    scalar = _get(config, "query_pre_attn_scalar", family.query_scalar)
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
    return _get(config, "num_key_value_heads", heads)


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
    used = bool(family.window_pattern) or _get(config, "use_sliding_window", False)
    window = (config["sliding_window"] or 0 if "sliding_window" in config else family.window) if used else 0
    kinds = config.get("layer_types")
    if kinds is None and family.window_pattern:
        pattern = _size(config, family.window_pattern_field, family.window_pattern)
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
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


def _rope(config: Mapping[str, Any], family: Family, windows: Any) -> dict[str, Any]:
    """Returns the fields of `Architecture` about rotary embeddings; `windows`: whether any layer has one."""
    if not family.local_theta:
        parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
        return _one_rope(config, family, parameters, "one flat group for all layers")
    groups = _get(config, "rope_parameters", {})
    if not isinstance(groups, Mapping) or set(groups) - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"config.json: rope_parameters is {short(groups)}; supported for {family.class_name} is one group for "
            "full_attention and one for sliding_attention."
        )
    full, local = _get(groups, "full_attention", {}), _get(groups, "sliding_attention", {})
    scaling = _get(config, "rope_scaling", {})
    both = {**full, **scaling} if isinstance(full, Mapping) and isinstance(scaling, Mapping) else [full, scaling]
    if isinstance(scaling, Mapping) and scaling.get("type") and not scaling.get("rope_type"):
        raise ConfigError(
            f"config.json: rope_scaling is {short(scaling)}. For {family.class_name} transformers 4 reads its `type`, "
            "and transformers 5 ignores it: write `rope_type` instead."
        )
    fields = _one_rope(config, family, both, "one flat group for each of the two")
    beside = {"rope_theta": _get(config, family.local_theta_field, family.local_theta)}
    near = _one_rope(beside, family, local, "one flat group for each of the two")
    if near["rope_scaling"] != {"kind": "default"}:
        raise ConfigError(
            f"config.json: the rotary parameters of sliding_attention are {short(local)}. Supported is rope_type "
            "default, without scaling."
        )
    same = {**fields, **near} == fields
    return {**fields, "rope_local_theta": 0.0 if same or not windows else near["rope_theta"]}


def _one_rope(config: Mapping[str, Any], family: Family, parameters: Any, supported: str) -> dict[str, Any]:
    """As `_rope`, for one group of rotary parameters."""
    if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
        raise ConfigError(f"config.json: the rotary parameters are {short(parameters)}; supported is {supported}.")
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
    theta = _get(parameters, "rope_theta", _get(config, "rope_theta", family.theta))
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < math.inf:
        raise ConfigError(f"config.json: rope_theta is {short(theta)}; it must be a number above 1.")
    return {"rope_theta": theta, "rope_scaling": {"kind": kind, **used}, "rotary_fraction": fraction}


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


def _rope_to_hf(a: Architecture, family: Family) -> dict[str, Any]:
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

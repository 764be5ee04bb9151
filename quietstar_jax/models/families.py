"""The supported model families, by Hugging Face `model_type`: what each fixes, what config.json may set, defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from quietstar_jax.architecture import FamilyName, RopeKind


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

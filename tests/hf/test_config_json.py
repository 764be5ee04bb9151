"""config.json of the supported families, in old and new spellings, there and back."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quietstar_jax.architecture import Architecture, RopeScaling
from quietstar_jax.errors import ConfigError
from quietstar_jax.hf.config_json import THEIR_FIELDS, architecture_from_hf, architecture_to_hf, canonical
from quietstar_jax.models.families import FAMILIES
from quietstar_jax.settings import from_mapping, to_mapping

OUR_NAMES = {ours for ours, theirs in THEIR_FIELDS.items() if ours != theirs} - {"activation", "kind"}
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SIZES, **changes}


def test_published_configs_in_their_old_spelling():
    mistral = architecture_from_hf(
        {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
        }
    )  # fmt: skip
    assert mistral == Architecture(
        "mistral", 32000, 4096, 14336, 32, 32, 8, 128, 32768, 10000.0, rms_norm_eps=1e-5, sliding_window=4096
    )
    llama = architecture_from_hf(
        {
            "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048, "head_dim": 64,
            "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "pretraining_tp": 1,
            "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
        }
    )  # fmt: skip
    assert llama.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert (llama.rope_theta, llama.tie_embeddings, llama.qkv_bias) == (500000.0, True, False)
    qwen2 = architecture_from_hf(
        {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
            "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
            "use_sliding_window": False, "vocab_size": 151936,
        }
    )  # fmt: skip
    assert (qwen2.sliding_window, qwen2.qkv_bias, qwen2.output_bias, qwen2.head_dim) == (0, True, False, 64)
    qwen3 = architecture_from_hf(config("qwen3", head_dim=128, attention_bias=False))
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.qkv_bias) == (True, 128, False)
    gemma2 = architecture_from_hf(
        {
            "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 128,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608,
            "initializer_range": 0.02, "intermediate_size": 36864, "max_position_embeddings": 8192,
            "model_type": "gemma2", "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
            "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
            "torch_dtype": "float32", "vocab_size": 256000,
        }
    )  # fmt: skip
    assert gemma2 == Architecture(
        "gemma2", 256000, 4608, 36864, 46, 32, 16, 128, 8192, rms_norm_eps=1e-6, activation="gelu_tanh",
        sliding_window=4096, full_attention_layers=tuple(range(1, 46, 2)), query_scale=1 / 12, score_cap=50.0,
        logit_cap=30.0, embedding_multiplier=4608**0.5, norm_adds_one=True, norm_placement="around",
        tie_embeddings=True,
    )  # fmt: skip


def test_the_text_part_of_a_model_of_text_and_images():
    wrapped = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {},
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    }  # fmt: skip
    gemma3 = architecture_from_hf(wrapped)
    assert gemma3 == Architecture(
        "gemma3_text", 262208, 2560, 10240, 34, 8, 4, 256, 131072, 1e6, RopeScaling("linear", 8.0), 1e4,
        rms_norm_eps=1e-6, activation="gelu_tanh", sliding_window=1024, full_attention_layers=(5, 11, 17, 23, 29),
        qk_norm=True, norm_adds_one=True, norm_placement="around", embedding_multiplier=2560**0.5, tie_embeddings=True,
    )  # fmt: skip
    untied = architecture_from_hf({**wrapped, "tie_word_embeddings": False})
    assert untied == dataclasses.replace(gemma3, tie_embeddings=False)
    with pytest.raises(ConfigError, match="quantization_config"):
        architecture_from_hf({**wrapped, "quantization_config": {"bits": 4}})


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({}, "head_dim", 8),
        ({"head_dim": None}, "head_dim", 8),
        ({"head_dim": 16}, "head_dim", 16),
        ({"model_type": "qwen3"}, "head_dim", 128),
        ({"num_key_value_heads": None}, "num_kv_heads", 8),
        ({}, "tie_embeddings", False),
        ({}, "rms_norm_eps", 1e-6),
        ({}, "rope_theta", 10000.0),
        ({"rope_theta": 5e5}, "rope_theta", 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_theta": 5e5}, "rope_theta", 7e4),
        ({"rope_scaling": None}, "rope_scaling", RopeScaling()),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling", RopeScaling("linear", 2.0)),
        ({"attention_bias": True}, "output_bias", True),
        ({"attention_bias": True}, "qkv_bias", True),
        ({"mlp_bias": True}, "mlp_bias", True),
        ({"model_type": "mistral", "attention_bias": True}, "qkv_bias", False),
        ({"model_type": "mistral"}, "sliding_window", 4096),
        ({"model_type": "mistral", "sliding_window": None}, "sliding_window", 0),
        ({"sliding_window": 16}, "sliding_window", 0),
        ({"hidden_act": "gelu_new"}, "activation", "gelu_tanh"),
        ({"hidden_act": "gelu"}, "activation", "gelu"),
        ({"model_type": "phi3"}, "sliding_window", 0),
        ({"model_type": "phi3"}, "rms_norm_eps", 1e-5),
        ({"model_type": "phi3", "sliding_window": 16}, "sliding_window", 16),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "rotary_fraction", 0.75),
        ({"model_type": "gemma", "hidden_act": "gelu"}, "activation", "gelu_tanh"),
        ({"model_type": "gemma2", "hidden_act": "relu"}, "activation", "gelu_tanh"),
        ({"model_type": "gemma2", "hidden_activation": "relu"}, "activation", "relu"),
        ({"model_type": "gemma2"}, "score_cap", 50.0),
        ({"model_type": "gemma2"}, "full_attention_layers", (1, 3)),
        ({"model_type": "gemma2", "final_logit_softcapping": None}, "logit_cap", 0.0),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 64}, "query_scale", 0.125),
        ({"model_type": "gemma2", "head_dim": 64, "query_pre_attn_scalar": 64}, "query_scale", 0.0),
        ({"model_type": "gemma2", "layer_types": ["full_attention"] * 4}, "sliding_window", 0),
        ({"model_type": "gemma3_text"}, "logit_cap", 0.0),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "score_cap", 0.0),  # as transformers does
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2}, "full_attention_layers", (1, 3)),
        ({"model_type": "gemma3_text", "rope_local_base_freq": 77.0}, "rope_local_theta", 77.0),
        ({"model_type": "gemma3_text", "rope_local_base_freq": 1e6}, "rope_local_theta", 0.0),
        ({"model_type": "olmo3"}, "full_attention_layers", (3,)),
        ({"model_type": "olmo3"}, "rope_local_theta", 0.0),
        ({"model_type": "olmo3", "rope_theta": 7.0}, "rope_local_theta", 5e5),
    ],
)
def test_one_field(changes, field, value):
    assert getattr(architecture_from_hf(config() | changes), field) == value


def test_missing_kv_heads_follow_the_family():
    without = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    assert architecture_from_hf({"model_type": "llama", **without}).num_kv_heads == 8
    assert architecture_from_hf({"model_type": "mistral", **without, "num_attention_heads": 16}).num_kv_heads == 8


@pytest.mark.parametrize(
    ("changes", "window", "full"),
    [
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, 0, ()),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, 8, (0,)),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8, ()),
        ({"use_sliding_window": True, "sliding_window": 8}, 0, ()),  # max_window_layers is 28 where it is missing
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, 0, ()),
        (
            {"use_sliding_window": True, "sliding_window": 8,
             "layer_types": ["sliding_attention", "full_attention", "attention", "sliding_attention"]}, 8, (1, 2),
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_windows_of_qwen(model_type, changes, window, full):
    architecture = architecture_from_hf(config(model_type, **changes))
    assert (architecture.sliding_window, architecture.full_attention_layers) == (window, full)


def test_yarn_derives_what_is_not_written_down():
    scaling = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    read = architecture_from_hf(config(rope_scaling=scaling, max_position_embeddings=128)).rope_scaling
    assert read.original_max_positions == 128
    assert read.attention_factor == pytest.approx(1.1386294 / 1.0693147)
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 32, "factor": None}
    read = architecture_from_hf(config(rope_parameters=scaling, max_position_embeddings=128)).rope_scaling
    assert (read.factor, read.attention_factor) == (4.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "falcon"}, ["falcon", "llama, mistral, phi3, qwen2, qwen3, gemma, gemma2"]),
        ({"model_type": "gemma3"}, ["gemma3", "gemma3_text"]),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ({"model_type": "gemma2", "sliding_window": None}, ["sliding_window", "layer_types"]),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, ["query_pre_attn_scalar", "above 0"]),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1.0}, ["attn_logit_softcapping", "-1"]),
        ({"model_type": "gemma2", "hidden_activation": "mish"}, ["hidden_activation", "mish"]),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, ["sliding_window_pattern", "0"]),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_type": "default"}}, ["sliding_attention"]),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 3}}, ["rotary", "each of the two"]),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}},
            },
            ["sliding_attention", "default"],
        ),
        ({"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 8.0}}, ["type", "rope_type"]),
        ({"model_type": "olmo2", "rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["flat"]),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, ["longrope", "Phi3"]),
        ({"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 2.0}}, ["yarn", "Phi3", "default"]),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, ["partial_rotary_factor", "0.4"]),
        ({"model_type": "phi3", "partial_rotary_factor": "all"}, ["partial_rotary_factor", "all"]),
        ({"model_type": None}, ["model_type", "llama"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic", "yarn"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["longrope", "llama3"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["flat"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["factor"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, ["factor", "0.5"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, ["truncate"]),
        ({"rope_theta": 0}, ["rope_theta"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"hidden_act": "quick_gelu"}, ["quick_gelu", "silu"]),
        ({"hidden_size": None}, ["hidden_size", "None"]),
        ({"max_position_embeddings": "many"}, ["max_position_embeddings", "many", "int"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "True or False"]),
        ({"attention_bias": "x"}, ["attention_bias"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "2.5"]),
        ({"hidden_size": 65}, ["head_dim"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
        ({"head_dim": 7}, ["head_dim", "7"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps", "small"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps", "finite"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "unquantized"]),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, ["layer_types", "4"]),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 4}, ["linear_attention"]),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, ["use_sliding_window"]),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ConfigError) as error:
        architecture_from_hf(config() | changes, "a/folder")
    assert all(word in str(error.value) for word in ["a/folder/config.json", *words]), str(error.value)
    assert not OUR_NAMES & set(re.findall(r"\w+", str(error.value))), str(error.value)
    assert len(str(error.value).splitlines()) <= 3


# Every field that a family reads, none at its default.
EVERY_FIELD = {
    **dict(vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8),
    **dict(num_key_value_heads=4, head_dim=16, max_position_embeddings=128, rms_norm_eps=1e-4, hidden_act="gelu"),
    **dict(tie_word_embeddings=True, initializer_range=0.01),
}
GEMMA3 = dict(sliding_window=8, query_pre_attn_scalar=20, final_logit_softcapping=7.0, hidden_activation="silu",
              tie_word_embeddings=False)  # fmt: skip
GEMMA2 = dict(GEMMA3, attn_logit_softcapping=9.0)
TWO_BASES = dict(full_attention=dict(rope_type="linear", rope_theta=5e4, factor=4.0),
                 sliding_attention=dict(rope_type="default", rope_theta=5e3))  # fmt: skip
QWEN = dict(use_sliding_window=True, sliding_window=8, max_window_layers=2)
FIELDS: dict[str, list[dict[str, Any]]] = {
    "llama": [dict(attention_bias=True, mlp_bias=True, rope_theta=5e4, rope_scaling=dict(type="linear", factor=2.0))],
    "mistral": [dict(sliding_window=8, rope_parameters=dict(rope_type="default", rope_theta=5e4))],
    "phi3": [dict(sliding_window=8, rope_theta=5e4, partial_rotary_factor=0.5, original_max_position_embeddings=128)],
    "qwen2": [dict(QWEN, rope_theta=5e4), dict(QWEN, layer_types=["full_attention", "sliding_attention"] * 2)],
    "qwen3": [dict(QWEN, rope_theta=5e4, attention_bias=True),
              dict(rope_parameters=dict(rope_type="yarn", rope_theta=5e4, factor=2.0))],
    "gemma": [dict(rope_theta=5e4, attention_bias=True, tie_word_embeddings=False)],
    "gemma2": [dict(GEMMA2, rope_theta=5e4, attention_bias=True),
               dict(GEMMA2, layer_types=["full_attention", "sliding_attention"] * 2)],
    "gemma3_text": [dict(GEMMA3, sliding_window_pattern=3, rope_theta=5e4, rope_local_base_freq=5e3,
                         rope_scaling=dict(rope_type="linear", factor=8.0)),
                    dict(GEMMA3, layer_types=["full_attention", "sliding_attention"] * 2, rope_parameters=TWO_BASES)],
    "olmo2": [dict(rope_theta=5e4, attention_bias=True)],
    "olmo3": [dict(sliding_window=8, rope_theta=5e4, attention_bias=True,
                   rope_scaling=dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=64)),
              dict(sliding_window=8, layer_types=["sliding_attention"] * 4, rope_parameters=TWO_BASES)],
}  # fmt: skip


def left_out() -> list[tuple[str, dict[str, Any], str]]:
    """(family, config.json, what it lacks): each field left out, and each at null."""
    cases = []
    for family, variants in FIELDS.items():
        for extra in variants:
            fields = {**EVERY_FIELD, **extra}
            for key in fields:
                without = {k: v for k, v in fields.items() if k != key}
                cases += [(family, without, key), (family, {**without, key: None}, f"{key}=null")]
            cases += [(family, {}, "everything"), (family, fields, "nothing")]
    return cases


@pytest.mark.parametrize(("family", "fields", "lacks"), left_out(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_field_that_is_left_out_is_what_transformers_makes_of_it(family, fields, lacks):
    transformers = pytest.importorskip("transformers")
    try:
        theirs = transformers.AutoConfig.for_model(family, **copy.deepcopy(fields), pad_token_id=None)
    except Exception:
        assert lacks.endswith("=null") or lacks in ("head_dim", "num_hidden_layers")  # transformers refuses it
        return
    assert read_or_refused({"model_type": family, **fields}) == read_or_refused(theirs.to_dict())


def read_or_refused(fields: dict[str, Any]) -> Architecture | None:
    try:
        return architecture_from_hf(fields)
    except ConfigError:
        return None


AROUND: dict[str, Any] = {"norm_adds_one": True, "norm_placement": "around", "embedding_multiplier": 128**0.5}
AFTER: dict[str, Any] = {"norm_placement": "after", "qk_norm": True, "qk_norm_all_heads": True}
EXPRESSIBLE = [
    Architecture("llama", tie_embeddings=True, qkv_bias=True, output_bias=True, mlp_bias=True),
    Architecture("llama", rope_scaling=RopeScaling("llama3", 8.0, 1.5, 5.0, 256), rope_theta=5e5, head_dim=16),
    Architecture("llama", rope_scaling=RopeScaling("linear", 2.0), activation="gelu_tanh"),
    Architecture("mistral", sliding_window=7, num_kv_heads=2),
    Architecture("mistral", rope_scaling=RopeScaling("yarn", 4.0, original_max_positions=512, attention_factor=1.3)),
    Architecture("phi3", sliding_window=7, rotary_fraction=0.75),
    Architecture("qwen2", qkv_bias=True, sliding_window=7, full_attention_layers=(0,)),
    Architecture("qwen2", qkv_bias=True, sliding_window=7, full_attention_layers=(1,), initializer_range=0.01),
    Architecture("qwen3", qk_norm=True, rope_scaling=RopeScaling("yarn", 4.0, original_max_positions=512)),
    Architecture("qwen3", qk_norm=True, qkv_bias=True, output_bias=True, sliding_window=5),
    Architecture("gemma", norm_adds_one=True, embedding_multiplier=128**0.5, tie_embeddings=True),
    Architecture("gemma2", sliding_window=5, full_attention_layers=(2,), query_scale=77**-0.5, score_cap=7.0, **AROUND),
    Architecture("gemma2", logit_cap=7.0, tie_embeddings=True, qkv_bias=True, output_bias=True, **AROUND),
    Architecture(
        "gemma3_text", sliding_window=5, full_attention_layers=(1,), rope_theta=1e6, rope_local_theta=1e4,
        rope_scaling=RopeScaling("linear", 8.0), qk_norm=True, **AROUND,
    ),
    Architecture("gemma3_text", sliding_window=5, rope_local_theta=300.0, qk_norm=True, logit_cap=3.0, **AROUND),
    Architecture("gemma3_text", sliding_window=5, full_attention_layers=(0,), qk_norm=True, **AROUND),
    Architecture("olmo2", qkv_bias=True, output_bias=True, **AFTER),
    Architecture("olmo2", rope_scaling=RopeScaling("yarn", 4.0, original_max_positions=512), **AFTER),
    Architecture("olmo3", **AFTER),
    Architecture(
        "olmo3", sliding_window=5, full_attention_layers=(1,), rope_theta=5e5, rope_local_theta=5e5,
        rope_scaling=RopeScaling("yarn", 4.0, original_max_positions=512), **AFTER,
    ),
]  # fmt: skip


@pytest.mark.parametrize("architecture", EXPRESSIBLE, ids=lambda a: a.family)
def test_round_trip(architecture):
    written = json.loads(json.dumps(architecture_to_hf(architecture)))
    assert architecture_from_hf(written) == architecture


@pytest.mark.parametrize("architecture", EXPRESSIBLE, ids=lambda a: a.family)
def test_transformers_reads_what_we_write(architecture, caplog):
    auto = pytest.importorskip("transformers").AutoConfig
    written = architecture_to_hf(architecture)
    theirs = auto.for_model(**written, eos_token_id=None, pad_token_id=None)  # Phi-3 has ids by default
    assert architecture_from_hf(theirs.to_dict()) == architecture
    assert theirs.to_dict()["head_dim"] == architecture.head_dim
    assert not caplog.records


def test_fields_without_effect_do_not_hinder_writing():
    idle = Architecture(
        "llama", full_attention_layers=(1,), rope_scaling=RopeScaling("linear", 2.0, low_frequency_factor=9.0)
    )
    assert architecture_from_hf(architecture_to_hf(idle)) == canonical(idle)
    all_full = dataclasses.replace(EXPRESSIBLE[6], full_attention_layers=(0, 1, 2))
    assert canonical(all_full).sliding_window == 0


@pytest.mark.parametrize(
    ("architecture", "field"),
    [
        (Architecture("mistral", qkv_bias=True), "qkv_bias"),
        (Architecture("llama", qkv_bias=True), "output_bias"),
        (Architecture("llama", sliding_window=4), "sliding_window"),
        (Architecture("mistral", sliding_window=4, full_attention_layers=(0,)), "full_attention_layers"),
        (Architecture("llama", rotary_fraction=0.5), "partial_rotary_factor"),
        (Architecture("phi3", qkv_bias=True), "qkv_bias"),
        (Architecture("qwen2"), "qkv_bias"),
        (Architecture("qwen3"), "qk_norm"),
        (Architecture("gemma", norm_adds_one=True), "embedding_multiplier"),
        (Architecture("gemma2", embedding_multiplier=128**0.5, norm_adds_one=True), "norm_placement"),
        (Architecture("gemma3_text", qk_norm=True, score_cap=3.0, **AROUND), "score_cap"),
        (Architecture("gemma2", sliding_window=5, rope_local_theta=7.0, **AROUND), "rope_local_theta"),
        (Architecture("olmo2", sliding_window=5, **AFTER), "sliding_window"),
        (Architecture("olmo3", sliding_window=5, rope_scaling=RopeScaling("linear", 2.0), **AFTER), "rope_local_theta"),
        (Architecture("llama", logit_cap=3.0), "logit_cap"),
        (Architecture("llama", rope_local_theta=7.0, norm_placement="after"), "norm_placement"),
    ],
)
def test_what_a_family_cannot_express_is_named(architecture, field):
    with pytest.raises(ConfigError, match=field):
        architecture_to_hf(architecture)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.just(10**400), st.floats(), st.text(max_size=3),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.sampled_from(["rope_type", "factor"]), st.integers()),
)  # fmt: skip
KEYS = [
    *SIZES, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings",
    "rms_norm_eps", "max_position_embeddings", "partial_rotary_factor", "original_max_position_embeddings",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "hidden_activation",
    "sliding_window_pattern", "rope_local_base_freq",
]  # fmt: skip
ROPE_KEYS = (
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "attention_factor",
    "beta_fast", "mscale", "mscale_all_dim", "rope_theta", "truncate",
)  # fmt: skip
ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "yarn"])}, optional=dict.fromkeys(ROPE_KEYS, JUNK)
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), JUNK, max_size=3), st.none() | ROPE)
def test_junk_is_read_or_refused_never_a_crash(model_type, junk, rope):
    for parameters in (rope, {"full_attention": rope}) if rope else ({},):
        read_or_refuse(config(model_type) | junk | ({"rope_parameters": parameters} if parameters else {}))


def read_or_refuse(mixed: dict[str, Any]) -> None:
    try:
        architecture = architecture_from_hf(mixed)
    except ConfigError:
        return
    assert from_mapping(Architecture, to_mapping(architecture)) == architecture

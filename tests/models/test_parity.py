"""The same checkpoint in transformers (torch) and here: the same logits, for every family and option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quietstar_jax.hf.config_json import architecture_from_hf, architecture_to_hf
from quietstar_jax.hf.files import open_checkpoint
from quietstar_jax.models.decoder import base_pass
from tests.hf.checkpoints import load_decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH, VOCAB = 24, 96
VALID = np.array([LENGTH, 15, 9])  # real tokens of each sequence, where padding is tested
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama attention bias": {"attention_bias": True},
    "llama mlp bias": {"mlp_bias": True, "hidden_act": "gelu"},
    "llama one kv head": {"num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh"},
    "llama no gqa": {"num_key_value_heads": 4, "hidden_act": "relu"},
    "llama own head_dim": {"head_dim": 12, "rms_norm_eps": 1e-2},
    "llama linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "llama llama3 rope": {"rope_parameters": LLAMA3},
    "llama yarn rope": {"rope_parameters": YARN, "head_dim": 16},
    "llama yarn mscale": {"rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.4, "beta_fast": 4.0}},
    "llama yarn short context": {
        "rope_parameters": {**YARN, "original_max_position_embeddings": 5, "beta_slow": 16.0},
    },
    "mistral": {"sliding_window": 7},
    "mistral no window": {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "mistral own head_dim": {"sliding_window": 1, "head_dim": 16, "tie_word_embeddings": True},
    "phi3": {},
    "phi3 partial rotary": {
        "sliding_window": 5, "num_key_value_heads": 1, "num_attention_heads": 2, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.75},
    },
    "qwen2": {},
    "qwen2 windows": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen2 mixed windows": {
        "use_sliding_window": True, "sliding_window": 6, "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3": {"head_dim": 20},
    "qwen3 attention bias": {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    "qwen3 windows yarn": {
        "head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2,
        "rope_parameters": {**YARN, "attention_factor": 1.25},
    },
    "gemma": {"head_dim": 12},
    "gemma untied": {
        "head_dim": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False,
        "attention_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.0},
    },
    "gemma2": {
        "head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma2 no caps": {
        "hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8, "sliding_window": 3,
        "query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "tie_word_embeddings": False,
    },
    "gemma2 score cap": {
        "head_dim": 20, "attention_bias": True, "attn_logit_softcapping": 1.0, "final_logit_softcapping": None,
        "layer_types": ["full_attention"] * 3, "hidden_activation": "silu",
    },
    "gemma3_text": {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20, "num_hidden_layers": 7},
    "gemma3_text two bases": {
        "hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "tie_word_embeddings": False,
        "final_logit_softcapping": 4.0, "attention_bias": True, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 2e3, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "gemma3_text all local": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention"] * 3},
    "olmo2": {},
    "olmo2 tied": {
        "hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True,
        "attention_bias": True, "hidden_act": "gelu", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "olmo2 own head_dim": {"head_dim": 12, "num_key_value_heads": 1, "rope_parameters": YARN},
    "olmo3": {"sliding_window": 5, "num_hidden_layers": 4},
    "olmo3 two bases": {
        "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}  # fmt: skip


def random_model(variant: str, seed: int = 0) -> Any:
    """A tiny torch model in which every weight, norm and bias matters."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(variant.split()[0], **(SIZES | VARIANTS[variant]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # of Gemma, weights to which 1 is added
                weight.copy_(weight.mean().round() + 0.3 * torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * (0.5 if name.endswith("bias") else weight.shape[-1] ** -0.5))
    return model


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens [3, L] and the mask of right-padded sequences."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (len(VALID), LENGTH))
    return tokens, np.arange(LENGTH) < VALID[:, None]


def their_logits(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits.float().numpy()


def our_logits(folder: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    files = open_checkpoint(str(folder))
    decoder = load_decoder(files, architecture_from_hf(files.config))

    @jax.jit
    def logits(decoder, tokens, mask):
        return decoder.logits(base_pass(decoder, tokens, mask, dtype=jnp.float32)[0])

    return np.asarray(logits(decoder, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant, tmp_path):
    model = random_model(variant)
    model.save_pretrained(tmp_path)
    tokens, padded = batch()
    everything = np.ones_like(padded)
    # One compiled call: whole sequences first, then the padded ones.
    ours = our_logits(tmp_path, np.concatenate([tokens, tokens]), np.concatenate([everything, padded]))
    whole, valid = np.split(ours, 2)
    theirs = their_logits(model, tokens, everything)
    error = np.abs(whole - theirs).max()
    assert np.abs(theirs).max() > 1.0
    assert error < 1e-4
    assert np.abs(valid - their_logits(model, tokens, padded))[padded].max() < 1e-4


@pytest.mark.parametrize("named", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_model_of_text_and_images(named, tmp_path, caplog):
    """As transformers 5 and 4 name its tensors; the image part is ignored with a warning."""
    text = {**SIZES, **VARIANTS["gemma3_text"], "tie_word_embeddings": True}
    sizes = dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    config = transformers.Gemma3Config(text_config=text, vision_config={**sizes, "model_type": "siglip_vision_model"})
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    root = next(name for name in tensors if name.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    save_file({name.replace(root, named): value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    tokens, mask = batch()
    assert np.abs(our_logits(tmp_path, tokens, mask) - their_logits(model, tokens, mask))[mask].max() < 1e-4
    assert "multi_modal_projector" in caplog.text
    assert "are ignored" in caplog.text


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("llama tied", "float32"),
        ("mistral", "bfloat16"),
        ("gemma2", "bfloat16"),
        ("qwen3 attention bias", "float16"),
        ("qwen2", "float64"),
    ],
)
def test_dtypes_and_shards(variant, dtype, tmp_path):
    model = random_model(variant).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens, mask = batch()
    assert np.abs(our_logits(tmp_path, tokens, mask) - their_logits(reference, tokens, mask))[mask].max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_config_builds_the_same_torch_model(variant):
    """`architecture_to_hf` loses nothing: a model of the config that we write gives the same logits."""
    model = random_model(variant)
    written = architecture_to_hf(architecture_from_hf(model.config.to_dict()))
    config = transformers.AutoConfig.for_model(**written, pad_token_id=None)
    again = transformers.AutoModelForCausalLM.from_config(config).eval()
    again.load_state_dict(model.state_dict())
    tokens, mask = batch()
    np.testing.assert_allclose(
        their_logits(again, tokens, mask)[mask], their_logits(model, tokens, mask)[mask], atol=1e-5
    )

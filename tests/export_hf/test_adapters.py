"""Adapters out and in: merged with their base, and as the folders of peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quietstar_jax.checkpoint.checkpoints import Checkpoints
from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import Config, default_config, from_config_dict, phase
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.hf.adapter import open_adapter
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.models.adapters import is_adapter, merge_adapters
from quietstar_jax.models.decoder import base_pass
from quietstar_jax.models.parameters import merge
from quietstar_jax.training.setup import Run, first_state, prepare
from tests.export_hf.exports import tensors, write_checkpoint
from tests.models.test_parity import batch, their_logits

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def config_of(folder: Path, name: str = "run", **model: Any) -> Config:
    config = default_config()
    config.workdir, config.model.checkpoint = str(folder / name), str(folder / "hf")
    config.model.adapters.update(maps="all", rank=3, alpha=5.0, rank_stabilized=True)
    config.model.frozen_dtype = "float32"
    config.update_from_flattened_dict({f"model.{path.replace('__', '.')}": value for path, value in model.items()})
    config.data.sequence_length = 24
    config.phases = [phase(steps=0, thought_length=6, tokens_ahead=2)]
    return from_config_dict(config)


def save_run(config: Config) -> tuple[Run, TrainState]:
    """Step 0 of a run, saved with random adapters."""
    run = prepare(config)
    state, draw = first_state(run), np.random.default_rng(0)
    adapters = {name: x for name, x in state.params.items() if is_adapter(name)}
    drawn = {name: jnp.asarray(0.15 * draw.normal(size=x.shape), jnp.float32) for name, x in adapters.items()}
    state = state._replace(params=state.params | drawn)
    with Checkpoints(Path(config.workdir) / "checkpoints", config.checkpoint) as checkpoints:
        checkpoints.save(state, {}, run.record)
    run.tokenizer.save(Path(config.workdir) / "tokenizer")
    return run, state


def our_logits(run: Run, weights: dict[str, jax.Array]) -> np.ndarray:
    tokens, mask = batch()

    @jax.jit
    def logits(weights: dict[str, jax.Array]) -> jax.Array:
        decoder = merge(run.graphdef, weights).decoder
        return decoder.logits(base_pass(decoder, jnp.asarray(tokens), jnp.asarray(mask), dtype=jnp.float32)[0])

    return np.asarray(logits(weights))


def differ(ours: np.ndarray, theirs: np.ndarray) -> float:
    _, mask = batch()
    return float(np.abs(ours - theirs)[mask].max())


def torch_base(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder with the base `hf` and the run `run`, the run, its state, its logits)."""
    folder = tmp_path_factory.mktemp("adapters")
    write_checkpoint(folder / "hf", "qwen2")
    run, state = save_run(config_of(folder))
    return folder, run, state, our_logits(run, state.weights)


def test_peft_loads_our_adapter(saved):
    folder, _, state, ours = saved
    export(folder / "run", folder / "adapter", ExportOptions("adapter"))
    base = torch_base(folder / "hf")
    assert differ(ours, their_logits(base, *batch())) > 0.1
    model = peft.PeftModel.from_pretrained(base, folder / "adapter")
    assert differ(ours, their_logits(model, *batch())) < 1e-4
    # In again, bit for bit.
    again = first_state(prepare(config_of(folder, "again", adapter=str(folder / "adapter"))))
    for name in filter(is_adapter, state.params):
        np.testing.assert_array_equal(again.params[name], state.params[name], err_msg=name)


@pytest.mark.parametrize("variant", ["gemma2", "gemma3_text", "olmo2"])
def test_every_kind_of_norm(tmp_path, variant):
    """Norms around or after the blocks, norms that add one, norms of queries and keys; scores and logits with caps."""
    write_checkpoint(tmp_path / "hf", variant)
    run, state = save_run(config_of(tmp_path))
    ours = our_logits(run, state.weights)
    for kind in ("base", "adapter"):
        export(tmp_path / "run", tmp_path / kind, ExportOptions(kind))
    base = torch_base(tmp_path / "hf")
    assert differ(ours, their_logits(base, *batch())) > 0.1
    assert differ(ours, their_logits(torch_base(tmp_path / "base"), *batch())) < 1e-4
    assert differ(ours, their_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), *batch())) < 1e-4


@pytest.mark.parametrize("frozen_dtype", ["float32", "bfloat16"])
def test_merged_exports(saved, tmp_path, frozen_dtype):
    """The sum is in float32, of the base as it was frozen."""
    folder, *_ = saved
    run, state = save_run(config_of(folder, f"run_{frozen_dtype}", frozen_dtype=frozen_dtype))
    for kind in ("base", "quietstar"):
        export(Path(run.config.workdir), tmp_path / kind, ExportOptions(kind))
    wide = {name: value.astype(jnp.float32) for name, value in state.weights.items()}
    merged = merge_adapters(wide, run.config.model.adapters)
    up = np.asarray(merged["decoder.layers.up"][1]).T
    np.testing.assert_allclose(
        tensors(tmp_path / "base")["model.layers.1.mlp.up_proj.weight"], up, rtol=1e-5, atol=1e-6
    )
    assert differ(our_logits(run, wide), their_logits(torch_base(tmp_path / "base"), *batch())) < 1e-4
    ours, exported = load_model(run.config.workdir), load_model(tmp_path / "quietstar")
    for name, value in merge_adapters(ours.params, run.config.model.adapters).items():
        np.testing.assert_allclose(exported.params[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], ["o_proj", "down_proj"]])
def test_what_peft_trained_comes_in(saved, tmp_path, modules):
    folder, *_ = saved
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=modules, lora_dropout=0.1, init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(torch_base(folder / "hf"), settings).eval()
    model.save_pretrained(tmp_path / "peft")
    run = prepare(config_of(folder, "peft", adapter=str(tmp_path / "peft")))
    ours, theirs = our_logits(run, first_state(run).weights), their_logits(model, *batch())
    assert differ(ours, theirs) < 1e-4
    assert differ(ours, their_logits(torch_base(folder / "hf"), *batch())) > 0.1


def test_adapters_that_do_not_fit(saved, tmp_path):
    folder, run, _, _ = saved
    export(folder / "run", tmp_path / "adapter", ExportOptions("adapter"))
    file = tmp_path / "adapter" / "adapter_config.json"
    right = json.loads(file.read_text())

    def refuse(error: type, match: str, **settings: Any) -> None:
        with pytest.raises(error, match=match):
            prepare(config_of(folder, "refused", adapter=str(tmp_path / "adapter"), **settings))

    refuse(
        ConfigError, r"(?s)adapters\.rank is 4, the adapter has 3.*alpha is 6\.0", adapters__rank=4, adapters__alpha=6.0
    )
    refuse(
        ConfigError,
        r"(?s)has tensors outside config\.model\.adapters\.maps=mlp:.*_proj",
        adapters__maps="mlp",
    )
    prepare(config_of(folder, "norms", adapter=str(tmp_path / "adapter"), adapters__norms=True))
    for wrong, match in (
        ({"use_dora": True}, "use_dora is True"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is"), ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', not LORA"), ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
    ):  # fmt: skip
        file.write_text(json.dumps(right | wrong))
        refuse(CheckpointError, match)
    file.write_text(json.dumps(right))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    more = {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 4), np.float32)}
    save_file(weights | more, tmp_path / "adapter" / "adapter_model.safetensors")
    refuse(ConfigError, r"(?s)maps=all:.*lm_head\.lora_A\.weight\nAdapters of embeddings")  # maps is all already
    del weights["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    refuse_at_load = open_adapter(tmp_path / "adapter", run.architecture, run.config.model.adapters)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.weight: missing"):
        refuse_at_load.load(dict.fromkeys(run.graphdef.names, jax.sharding.SingleDeviceSharding(jax.devices()[0])))


def test_formats_that_a_run_cannot_have(tmp_path):
    write_checkpoint(tmp_path / "hf", "phi3")
    for name, match, model in (
        ("plain", "the model has no adapters", {"adapters__maps": "none"}),
        ("norms", "the norms have learned too", {"adapters__norms": True}),
        ("fused", "phi3 stores several linear maps as one tensor", {}),
    ):
        run, state = save_run(config_of(tmp_path, name, **model))
        with pytest.raises(ConfigError, match=match):
            export(Path(run.config.workdir), tmp_path / "out", ExportOptions("adapter"))
    save_run(config_of(tmp_path, "of run", checkpoint=str(tmp_path / "plain")))
    with pytest.raises(ConfigError, match=r"the base plain is a run of this program.*base and quietstar"):
        export(tmp_path / "of run", tmp_path / "out", ExportOptions("adapter"))
    write_checkpoint(tmp_path / "images", "gemma3_text")
    save_run(config_of(tmp_path, "text", checkpoint=str(tmp_path / "images")))
    file = tmp_path / "images" / "config.json"
    file.write_text(json.dumps({"model_type": "gemma3", "text_config": json.loads(file.read_text())}))
    save_run(config_of(tmp_path, "of images", checkpoint=str(tmp_path / "images")))
    for name in ("of images", "text"):  # the second reads the same folder
        with pytest.raises(ConfigError, match="the base images is a model of text and images"):
            export(tmp_path / name, tmp_path / "out", ExportOptions("adapter"))
    export(tmp_path / "fused", tmp_path / "out", ExportOptions("base"))
    merged = their_logits(torch_base(tmp_path / "out"), *batch())
    assert differ(our_logits(run, state.weights), merged) < 1e-4
    assert differ(our_logits(run, first_state(run).weights), merged) > 0.1

"""Names of topologies, and shapes of models that are not here."""

from __future__ import annotations

import json

import pytest

from quietstar_jax.architecture import Architecture
from quietstar_jax.config import ModelConfig
from quietstar_jax.errors import ConfigError
from quietstar_jax.parallel.chips import GPUS, TPUS
from quietstar_jax.planning import targets
from quietstar_jax.planning.architectures import KNOWN, planned_architecture
from quietstar_jax.planning.plan import _memory_that_is_missing, suggestions
from quietstar_jax.planning.targets import find_target
from tests.training.tiny import tiny_config

UNKNOWN = ["", "v5e", "v5e:", "v9:2x2", "gpu:tx8", "tpu", "cpu:0x2", "gpu:h100", "v5e:4x4*", "v5e:3x3x3x3", "v5p:2x2"]


@pytest.mark.parametrize("compiler", ["installed or not", "absent"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_topology_lists_the_known_ones(monkeypatch, name, compiler):
    """The name is checked before libtpu is needed, so that the message is the same on every machine."""
    if compiler == "absent":
        monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"(?s)topology is .*v5e: .*16x16.*v5p: .*gpu: .*h100x8.*cpu"):
        find_target(name)


def test_without_libtpu_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'quietstar_jax\[tpu\]'"):
        find_target("v5e:4x4")


def test_more_cpu_devices_than_this_process_has_are_refused():
    with pytest.raises(ConfigError, match="4096"):
        find_target("cpu:1"), find_target("cpu:4096")


def test_rates_are_in_bytes_and_flops_per_second():
    for chip in (*TPUS.values(), *GPUS.values()):
        assert 1e14 < chip.flops < 1e16
        assert 1e10 < chip.hbm < 1e12
        assert 1e11 < chip.hbm_rate < 1e13
        assert 1e10 < chip.axis_rate <= chip.link_rate < chip.hbm_rate


def test_known_models_have_the_number_of_parameters_in_their_names():
    def billions(a: Architecture) -> float:
        attention = a.hidden_size * a.head_dim * 2 * (a.num_heads + a.num_kv_heads)
        heads = (1 if a.tie_embeddings else 2) * a.vocab_size * a.hidden_size
        return (a.num_layers * (attention + 3 * a.hidden_size * a.intermediate_size) + heads) / 1e9

    found = {name: billions(planned_architecture(ModelConfig(checkpoint=name))) for name in KNOWN}
    assert found["mistralai/Mistral-7B-v0.1"] == pytest.approx(7.24, abs=0.01)
    assert found["meta-llama/Llama-2-7b-hf"] == pytest.approx(6.74, abs=0.01)
    assert found["meta-llama/Llama-3.1-8B"] == pytest.approx(8.03, abs=0.01)
    assert found["meta-llama/Llama-3.2-1B"] == pytest.approx(1.24, abs=0.01)
    assert found["Qwen/Qwen2.5-7B"] == pytest.approx(7.61, abs=0.01)
    assert found["Qwen/Qwen3-8B"] == pytest.approx(8.19, abs=0.01)
    assert found["google/gemma-2-2b"] == pytest.approx(2.61, abs=0.01)
    assert found["google/gemma-2-9b"] == pytest.approx(9.24, abs=0.01)
    assert found["google/gemma-3-1b-pt"] == pytest.approx(1.00, abs=0.01)
    assert found["allenai/OLMo-2-1124-7B"] == pytest.approx(7.30, abs=0.01)


def test_a_shipped_config_names_the_shape_that_the_table_has():
    from quietstar_jax.configs.mistral_7b_openwebmath import get_config

    written = get_config().model.architecture
    known = planned_architecture(ModelConfig(checkpoint="mistralai/Mistral-7B-v0.1"))
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                 "head_dim", "max_positions", "sliding_window", "rope_theta", "rms_norm_eps"):  # fmt: skip
        assert getattr(known, name) == written[name], name


def test_a_folder_needs_only_its_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["Qwen/Qwen3-8B"]))
    assert planned_architecture(ModelConfig(checkpoint=str(tmp_path))).qk_norm


def test_an_unknown_hub_id_wants_an_architecture():
    with pytest.raises(ConfigError, match="some/model"):
        planned_architecture(ModelConfig(checkpoint="some/model"))
    given = Architecture(hidden_size=48)
    assert planned_architecture(ModelConfig(checkpoint="some/model", architecture=given)) == given


def test_what_does_not_fit_gets_suggestions_that_name_settings(tmp_path):
    result = {
        "program": "train", "mesh": {"data": 8, "fsdp": 2, "tensor": 1, "position": 1}, "devices": 16,
        "bytes_per_chip": {"parameters": 10e9, "optimizer": 20e9}, "hbm_bytes": 16e9, "positions_per_chunk": 8,
    }  # fmt: skip
    lines = suggestions(tiny_config(tmp_path, thought__chunk_megabytes=512), result)
    assert "fsdp x tensor = 16" in lines[0]
    assert any("--config.model.rematerialize=True" in line for line in lines)
    assert any("--config.thought.chunk_megabytes=256" in line for line in lines)
    small = suggestions(tiny_config(tmp_path, model__rematerialize=True), result | {
        "bytes_per_chip": {"parameters": 1e9, "optimizer": 2e9}, "positions_per_chunk": 1,
    })  # fmt: skip
    assert not any("fsdp" in line or "chunk" in line or "rematerialize" in line for line in small)


@pytest.mark.parametrize(
    ("message", "total", "usable"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 31.50G of "
         "15.75G hbm. Exceeded hbm capacity by 15.75G.", 31.5, 15.75),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (54.50G) exceeds "
         "available HBM (15.75G).", 55.5, 15.75),
    ],
)  # fmt: skip
def test_numbers_of_out_of_memory_messages_are_read(message, total, usable):
    found = _memory_that_is_missing(message, {"parameters": 2.0**30})
    assert found["total"] == total * 2**30
    assert found["usable"] == usable * 2**30

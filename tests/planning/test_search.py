"""Which meshes and chunks a search would try for a 7 B model; nothing is compiled."""

from __future__ import annotations

import dataclasses

import pytest

from configs.mistral_7b_openwebmath import get_config
from quietstar_jax.config import from_config_dict
from quietstar_jax.errors import ConfigError
from quietstar_jax.planning.programs import train_program
from quietstar_jax.planning.search import candidates, ranked
from quietstar_jax.planning.targets import find_target
from tests.training.tiny import tiny_config


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "devices"), [("v5e:4x4", 16), ("v5e:8x8", 64), ("v5p:2x2x4", 16)])
def test_meshes_share_the_batch_and_their_weights_fit(topology, devices):
    config = from_config_dict(get_config())
    found = candidates(config, find_target(topology))
    assert [item.guess for item in found] == sorted(item.guess for item in found)
    for item in found:
        mesh = item.configs[0].mesh
        assert mesh.data * mesh.fsdp * mesh.tensor * mesh.position == devices
        assert 8 % (mesh.data * mesh.fsdp) == 0  # texts
        if topology.startswith("v5e"):
            assert mesh.fsdp * mesh.tensor >= 16  # 87 GB of weights and moments on chips of 16
        chunks = [attempt.thought.chunk_megabytes for attempt in item.configs]
        assert chunks == sorted(chunks, reverse=True)
        assert chunks[0] < 8 * 1024 or topology.startswith("v5p")


@pytest.mark.tpu
@pytest.mark.parametrize("sizes", [(1, 2, 2, 1), (4, 1, 1, 1), (1, 4, 1, 1), (1, 1, 1, 4), (1, 1, 2, 2)])
def test_kernels_stand_on_every_mesh(tmp_path, sizes):
    """A kernel under an axis that is left to the compiler is refused when the step is lowered."""
    changes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor", "mesh__position"), sizes, strict=True))
    heads = {"model__architecture__num_heads": 4, "model__architecture__num_kv_heads": 2}
    config = tiny_config(tmp_path, **changes, **heads)
    assert "tpu_custom_call" in train_program(config, find_target("v5e:2x2"), "thoughts").lowered.as_text()


@pytest.mark.tpu
def test_no_mesh_at_all_is_said():
    config = from_config_dict(get_config())
    with pytest.raises(ConfigError, match="No mesh of 4 devices"):
        candidates(config, find_target("v5e:2x2"))  # the weights alone are too large
    odd = dataclasses.replace(config, phases=(dataclasses.replace(config.phases[0], batch_size=7),))
    assert all(item.configs[0].mesh.fsdp == 1 for item in candidates(odd, find_target("v5p:2x2x4")))


def test_what_fits_comes_first_and_of_that_the_fastest():
    def plan(name: str, fits: bool, seconds: float, total: float) -> dict:
        return {"name": name, "fits": fits, "seconds": {"summed": seconds}, "bytes_per_chip": {"total": total}}

    plans = [plan("too large", False, 1.0, 9e9), plan("slow", True, 3.0, 1e9), plan("fast", True, 2.0, 2e9)]
    plans.append({"name": "failed", "fits": False, "bytes_per_chip": {}})
    assert [item["name"] for item in ranked(plans)] == ["fast", "slow", "too large", "failed"]


@pytest.mark.tpu
def test_slices_are_crossed_by_data_where_it_can_be_and_else_by_fsdp():
    meshes = [item.configs[0].mesh for item in candidates(from_config_dict(get_config()), find_target("v5p:2x2x2*2"))]
    assert {(mesh.dcn_data, mesh.dcn_fsdp) for mesh in meshes} == {(2, 1), (1, 2)}
    assert all(mesh.dcn_data == 2 for mesh in meshes if mesh.data > 1)

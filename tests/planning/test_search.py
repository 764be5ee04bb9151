"""Which meshes and chunks a search would try for a 7 B model; nothing is compiled."""

from __future__ import annotations

import dataclasses

import pytest

from quietstar_jax.config import from_config_dict
from quietstar_jax.configs import mistral_7b_lora
from quietstar_jax.configs.mistral_7b_openwebmath import get_config
from quietstar_jax.errors import ConfigError
from quietstar_jax.parallel.chips import Chip
from quietstar_jax.planning.programs import plan_mesh, planned_state, train_program, with_mesh
from quietstar_jax.planning.search import _guess, candidates, ranked
from quietstar_jax.planning.targets import find_target
from tests.training.tiny import tiny_config


@pytest.mark.tpu
@pytest.mark.parametrize(("topology", "devices"), [("v5e:4x4", 16), ("v5e:8x8", 64), ("v5p:2x2x4", 16)])
def test_meshes_share_the_batch_and_their_weights_fit(topology, devices):
    config = from_config_dict(get_config())
    found = candidates(config, find_target(topology))
    assert [item[:2] for item in found] == sorted(item[:2] for item in found)
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


def test_frozen_weights_need_neither_gradients_nor_moments():
    """16.7 GB for Mistral-7B frozen in bfloat16 and all that its adapters need, 174 GB for training it."""
    config, target = from_config_dict(mistral_7b_lora.get_config()), find_target("gpu:h100x1")
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, frozen_dtype="float32"))
    frozen, learned = 14_483_996_672, 369_213_440

    def tight(config, hbm: float) -> list[bool]:
        chip = dataclasses.replace(target.chip, hbm=hbm)
        return [item.tight for item in candidates(config, dataclasses.replace(target, chip=chip))]

    assert tight(config, 80e9) == [False]
    assert tight(config, frozen + 6.1 * learned) == [True]  # no room for chunks, but what learns fits
    assert tight(wide, 2 * frozen + 6.1 * learned) == [True]
    for changed, hbm in ((config, frozen + 5.9 * learned), (wide, 1.9 * frozen + 6.1 * learned)):
        with pytest.raises(ConfigError, match="No mesh of 1 devices"):
            tight(changed, hbm)
    with pytest.raises(ConfigError, match="No mesh of 1 devices"):
        tight(from_config_dict(get_config()), 170e9)


def test_chunks_matter_only_to_phases_with_thoughts(tmp_path):
    """Without thoughts, the chunk size that is set decides nothing: neither what is tried, nor in which order."""
    config = tiny_config(tmp_path, thought__chunk_megabytes=2048)
    target = dataclasses.replace(find_target("cpu:1"), chip=Chip("small", 0.0, 2**27, 0.0, 0.0))
    tried = {
        phase: [(item.tight, [attempt.thought.chunk_megabytes for attempt in item.configs]) for item in found]
        for phase in ("plain", "thoughts")
        for found in [candidates(config, target, phase)]
    }
    assert tried == {"plain": [(False, [2048])], "thoughts": [(True, [128])]}


def test_a_mesh_that_copies_the_text_costs_more():
    """Over data, a device has its own texts; over position, it gathers the keys and values of all texts or has the
    whole texts, if their length is not a multiple."""
    config, target = from_config_dict(get_config()), find_target("cpu:1")
    phase = dataclasses.replace(config.phases[0], batch_size=512)
    config = dataclasses.replace(config, phases=(phase,))
    architecture, mesh = plan_mesh(config, target)
    state = planned_state(config, architecture, mesh, phase)
    chunks = {"positions_per_chunk": 256, "sampled_positions_per_chunk": 256}

    def sent(**sizes: int) -> float:
        changed = with_mesh(config, {"tensor": 2, **sizes})
        return _guess(changed, architecture, phase, target, chunks, state)  # bytes: rates of CPUs are unknown

    over_data, over_position, whole = sent(data=512), sent(data=2, position=256), sent(data=1, position=512)
    keys_and_values = 32 * (256 * 256) * (2 * 1024 / 2) * 2  # layers, tokens, width on a device, bytes
    passes = 3  # forward, again for the gradient, and the gradient itself
    assert over_position - over_data == pytest.approx(passes * keys_and_values * 255 / 256)
    assert whole > 4 * over_position


@pytest.mark.tpu
def test_only_gradients_of_what_learns_are_sent():
    config, target = from_config_dict(mistral_7b_lora.get_config()), find_target("gpu:h100x2")
    found = {
        dataclasses.replace(mesh, dcn_data=1): item.guess * target.chip.axis_rate
        for item in candidates(config, target)
        for mesh in [item.configs[0].mesh]
    }
    learned = 369_213_440 / 4
    over = {mesh.position: sent for mesh, sent in found.items() if mesh.fsdp == mesh.tensor == 1}
    one_sum = 8 * learned / 2  # over data or position
    keys_and_values = 3 * 32 * (8 * 256) * (2 * 1024) * 2 / 2  # passes, layers, tokens, width, bytes; half of them
    assert over == {1: pytest.approx(one_sum), 2: pytest.approx(one_sum + keys_and_values)}
    whole = 7.28e9 * 2 / 2  # bytes of one gather of all weights in bfloat16 over fsdp 2
    (gathers,) = [sent / whole for mesh, sent in found.items() if mesh.fsdp == 2]
    # 4 microbatches: 9 tokens are sampled in one chunk, the text and the chunks are scored three times each
    assert gathers == pytest.approx(4 * (9 + 3 * (1 + 1)), rel=0.1)


@pytest.mark.tpu
def test_meshes_without_room_for_a_chunk_are_tried_last():
    config, target = from_config_dict(mistral_7b_lora.get_config()), find_target("gpu:h100x2")
    chip = dataclasses.replace(target.chip, hbm=17e9)
    found = [(item.tight, item.configs[0].mesh.fsdp * item.configs[0].mesh.tensor) for item in candidates(
        config, dataclasses.replace(target, chip=chip)
    )]  # fmt: skip
    assert found == [(False, 2), (False, 2), (True, 1), (True, 1)]


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

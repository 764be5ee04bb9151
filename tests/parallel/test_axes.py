"""The table of logical axes, the sizes of the mesh, and which process reads what."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from quietstar_jax.architecture import Architecture
from quietstar_jax.config import Config, MeshConfig
from quietstar_jax.errors import ConfigError
from quietstar_jax.parallel.axes import constrain, partition_spec
from quietstar_jax.parallel.mesh import check_batches, check_weights, make_mesh, resolve, split_tensor
from quietstar_jax.parallel.sharding import ProcessBatchShard, specs_like_parameters
from quietstar_jax.settings import from_mapping
from quietstar_jax.thought_config import Phase
from quietstar_jax.thoughts.model import abstract_params
from quietstar_jax.training.step import initial_state, state_specs


def test_one_table():
    assert partition_spec(("layers", "embed", "mlp")) == PartitionSpec(None, "fsdp", ("tensor", "group"))
    with pytest.raises(ValueError, match=r"No rule names the axis 'colour'"):
        partition_spec(("embed", "colour"))
    with pytest.raises(ValueError, match="mesh axis fsdp"):
        partition_spec(("batch", "embed"))


def test_without_a_mesh_nothing_changes():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "hidden") is x


def test_every_array_of_the_state_has_a_layout():
    params, graphdef = abstract_params(Architecture(qkv_bias=True, qk_norm=True, mlp_bias=True, output_bias=True))
    state = jax.eval_shape(lambda params: initial_state(params, Config()), params)
    specs = state_specs(state, graphdef)
    assert specs.opt_state[1].mu == specs.params == specs.opt_state[1].nu
    assert specs.params["decoder.layers.query"] == PartitionSpec(None, "fsdp", ("tensor", "group"), None)
    with pytest.raises(ValueError, match="No rule for"):
        specs_like_parameters({"unknown": jnp.ones(3)}, graphdef.axes_by_name)


@pytest.mark.parametrize(
    ("sizes", "devices", "found"),
    [
        ({}, 8, (8, 1, 1, 1)),
        ({"fsdp": 4}, 8, (2, 4, 1, 1)),
        ({"data": 1, "tensor": 2, "position": -1}, 8, (1, 1, 2, 4)),
        ({"data": 2, "fsdp": 3}, 6, (2, 3, 1, 1)),
    ],
)
def test_sizes_with_a_free_one(sizes, devices, found):
    resolved = resolve(MeshConfig(**sizes), devices)
    assert tuple(resolved[name] for name in ("data", "fsdp", "tensor", "position")) == found


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"data": 2}, {"data": 16}])
def test_sizes_that_are_not_the_devices_are_named(sizes):
    with pytest.raises(ConfigError, match="the product of the sizes must be 8"):
        resolve(MeshConfig(**sizes), 8)


def test_settings_of_the_mesh_are_checked():
    for changes, message in (
        ({"data": -1, "fsdp": -1}, "-1 in only one place"),
        ({"data": 0}, r"mesh\.data is 0"),
        ({"dcn_data": 0}, r"mesh\.dcn_data is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_mapping(Config, {"mesh": changes})


def test_heads_over_the_tensor_axis():
    architecture = Architecture(num_heads=32, num_kv_heads=8)
    assert [split_tensor(n, architecture) for n in (1, 4, 8, 16, 32)] == [(1, 1), (4, 1), (8, 1), (8, 2), (8, 4)]
    with pytest.raises(ConfigError, match="one of 1, 2, 4, 8, 16, 32"):
        split_tensor(64, architecture)
    with pytest.raises(ConfigError, match="one of 1, 2, 3, 6, 12"):  # 4 would split the heads of a shared one unevenly
        split_tensor(4, Architecture(num_heads=12, num_kv_heads=6))


def test_weights_that_cannot_be_split_say_what_would_do():
    with pytest.raises(ConfigError, match=r"does not divide the model's vocab_size 500\. Below it, 1, 2, 4"):
        check_weights(Architecture(vocab_size=500), 1, 8)
    with pytest.raises(ConfigError, match=r"mesh\.fsdp is 3"):
        check_weights(Architecture(), 3, 1)


def test_batches_that_cannot_be_shared_are_named():
    mesh = jax.sharding.AbstractMesh((4, 1, 2, 1, 1), ("data", "position", "fsdp", "tensor", "group"))
    check_batches(Config(phases=(Phase(batch_size=16, microbatches=2),)), mesh)
    with pytest.raises(ConfigError, match=r"phases\[0\]: batch_size 8 in 2 microbatches .* a multiple of 16"):
        check_batches(Config(phases=(Phase(batch_size=8, microbatches=2),)), mesh)


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as arranging a mesh asks for."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "other"


def test_slices_of_a_pod_lie_along_the_outer_axes():
    devices = [Device(i, i // 2, i // 4) for i in range(8)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, dcn_data=2), Architecture(), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices[0] == 0).all()
    assert (slices[1] == 1).all()
    with pytest.raises(ConfigError, match=r"are 2 slices .* the product of the two must be 2"):
        make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), Architecture(), devices)


def test_rows_of_readers_are_numbered_in_the_global_order():
    reader = ProcessBatchShard(0, 2, ((0, 2), (1, 3)))  # parts of two rows: reader 0 holds rows 0, 1, 4, 5
    numbers = reader.numbers(8)
    assert numbers.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert ProcessBatchShard(0, 1, ((0, 1),)).numbers(8) is None

"""The command line, on programs that compilers need seconds for: for CPUs, and where libtpu is installed for TPUs."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quietstar_jax.errors import EXIT_USER_ERROR, ConfigError
from quietstar_jax.planning.programs import find_phase, passes, plan_mesh, train_program
from quietstar_jax.planning.targets import find_target
from quietstar_jax.thought_config import ThoughtConfig
from quietstar_jax.thoughts.model import abstract_params
from quietstar_jax.thoughts.settings import ThoughtSettings
from tests.support.commands import Ended, run_command
from tests.training.tiny import tiny_config


@pytest.fixture(scope="module")
def aot(tmp_path_factory) -> Callable[..., Ended]:
    """Runs the command line with a tiny configuration."""
    folder = tmp_path_factory.mktemp("aot")
    config = folder / "tiny.py"
    config.write_text(
        "from pathlib import Path\n"
        "from tests.training.tiny import tiny_config_dict\n"
        f"def get_config():\n    return tiny_config_dict(Path({str(folder / 'run')!r}))\n"
    )
    # The least effort of the compiler: what it finds is checked, not how good the program is.
    effort = {"JAX_OPTIMIZATION_LEVEL": "O0", "JAX_MEMORY_FITTING_LEVEL": "O0"}
    return functools.partial(run_command, "aot", "--config", config, JAX_PLATFORMS="", **effort)


def planned(aot: Callable[..., Ended], *arguments: str, status: int = 0) -> dict[str, Any]:
    ended = aot("--json", *arguments)
    assert ended.returncode == status, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def parameters(tmp_path: Path) -> int:
    params, _ = abstract_params(tiny_config(tmp_path).model.architecture)
    return sum(value.size for value in params.values())


def test_weights_and_moments_are_counted_as_they_are_split(aot, tmp_path):
    plan = planned(aot, "--topology", "cpu:4", "--phase", "plain", "--config.mesh.fsdp=4")
    sizes = plan["bytes_per_chip"]
    # All but norms of 16 values and the like are split in four; moments are twice the weights, and a count of updates.
    assert parameters(tmp_path) <= sizes["parameters"] < 1.4 * parameters(tmp_path)
    assert sizes["optimizer"] == 2 * sizes["parameters"] + 4
    assert sizes["total"] >= sizes["arguments"] + sizes["temporaries"]
    assert plan["mesh"] == {"data": 1, "position": 1, "fsdp": 4, "tensor": 1}
    assert plan["collectives"]["all-gather"]["sent"] > 0
    assert plan["tokens"] == 4 * 24
    assert "seconds" not in plan  # rates of CPUs are not known


def test_frozen_weights_are_counted_apart(tmp_path):
    """2 bytes for each weight that adapters freeze, but 4 for norms; moments only of what learns."""
    config = tiny_config(tmp_path, model__checkpoint="the base", model__adapters__maps="mlp", model__adapters__rank=2)
    sizes = train_program(config, find_target("cpu:1"), "plain").bytes_per_device
    params, _ = abstract_params(config.model.architecture)
    decoder = {name: value.size for name, value in params.items() if name.startswith("decoder.")}
    norms = sum(size for name, size in decoder.items() if name.endswith("norm"))
    assert sizes["frozen"] == 2 * sum(decoder.values()) + 2 * norms
    adapters = 2 * 2 * 3 * (16 + 24)  # layers, rank, maps, inputs and outputs
    assert sizes["parameters"] == 4 * (parameters(tmp_path) - sum(decoder.values()) + adapters)
    assert sizes["optimizer"] == 2 * sizes["parameters"] + 4


def test_a_search_ranks_mesh_shapes(aot):
    plans = planned(aot, "--topology", "cpu:2", "--phase", "plain", "--search", "--tries", "2")["plans"]
    assert len(plans) == 2
    shapes = [tuple(plan["mesh"].values()) for plan in plans]
    assert len(set(shapes)) == 2
    totals = [plan["bytes_per_chip"]["total"] for plan in plans]
    assert totals == sorted(totals)  # without rates, the smallest first


def test_bad_input_is_one_clear_error(aot):
    ended = aot("--topology", "v5e:3x3x3x3")
    assert ended.returncode == EXIT_USER_ERROR, ended.stderr
    assert "--topology is" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_phases_and_meshes_that_do_not_exist_are_refused(tmp_path):
    config, target = tiny_config(tmp_path, mesh__fsdp=2), find_target("cpu:1")
    with pytest.raises(ConfigError, match="plain, thoughts"):
        find_phase(config, config.model.architecture, "third")
    assert find_phase(config, config.model.architecture).name == "thoughts"  # costs most
    plain, thoughts = config.phases
    fewer = dataclasses.replace(config, phases=(plain, dataclasses.replace(thoughts, steps=0)))
    assert find_phase(fewer, config.model.architecture).name == "plain"
    with pytest.raises(ConfigError, match="that have steps: plain"):
        find_phase(fewer, config.model.architecture, "thoughts")
    with pytest.raises(ConfigError, match="the product of the sizes must be 1"):
        plan_mesh(config, target)


def test_the_reference_is_an_argument_from_the_first_phase_that_trains_thoughts_on(tmp_path):
    """A plain phase compiles fastest; here it follows that phase."""
    config = tiny_config(tmp_path, thought__kl_weight=0.1, model__architecture__num_layers=1)
    later = dataclasses.replace(config, phases=config.phases[::-1])
    first, plan = (train_program(c, find_target("cpu:1"), "plain") for c in (config, later))
    assert "reference" not in first.bytes_per_device
    shapes, _ = abstract_params(config.model.architecture)
    head = sum(4 * x.size for name, x in shapes.items() if name.startswith("mixing_head."))  # thoughts do not need it
    assert plan.bytes_per_device["reference"] == plan.bytes_per_device["parameters"] - head > 0
    memory = plan.lowered.compile({"xla_backend_optimization_level": 0}).memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(sum(plan.bytes_per_device.values()), abs=100)


def test_further_passes_of_an_objective_read_the_weights_again():
    chunks = {"sampled_positions_per_chunk": 8, "positions_per_chunk": 2}

    def counted(**thought: Any) -> tuple[int, int]:
        shape = {"thought_length": 3, "num_thoughts": 2, "policy_weight": 1.0}
        return passes(ThoughtSettings(**shape, config=ThoughtConfig(**thought)), 2, chunks, local_positions=8)

    assert counted() == (2 * 3, 2 * (1 + 4))
    assert counted(advantage="batch_std") == counted(kl_in_reward=0.1) == (2 * (3 + 1 + 4), 2 * (1 + 4))
    assert counted(advantage="batch_std", kl_weight=0.1)[0] == 2 * (3 + 2 * (1 + 4))


def test_the_decoder_is_planned_for_too(aot, tmp_path):
    ended = aot("--topology", "cpu:2", "--program", "generate")
    assert ended.returncode == 0, ended.stderr
    assert "one token for 50 texts" in ended.stdout  # evaluation.batch_size
    assert "rates unknown" in ended.stdout
    rows = {line.split()[0]: float(line.split()[1]) for line in ended.stdout.splitlines() if line.startswith("  ")}
    a = tiny_config(tmp_path).model.architecture
    cache = 2 * a.num_layers * 50 * a.num_kv_heads * 512 * a.head_dim * 4  # room for 512 tokens is the least
    assert rows["cache"] == pytest.approx(cache / 2**30, abs=0.005)
    assert rows["total"] >= rows["arguments"] >= rows["cache"]


@pytest.mark.tpu
def test_a_step_with_thoughts_is_compiled_for_a_tpu(aot, tmp_path):
    plan = planned(aot, "--topology", "v5e:2x2", "--config.mesh.fsdp=2", "--config.mesh.position=2")
    assert plan["fits"]
    assert plan["chip"] == "TPU v5e"
    assert plan["devices"] == 4
    assert plan["work"].startswith("step of phase 'thoughts'")
    sizes = plan["bytes_per_chip"]
    assert sizes["arguments"] >= sizes["parameters"] + sizes["optimizer"] + sizes["batch"]
    assert sizes["total"] >= sizes["arguments"] + sizes["temporaries"]
    assert sizes["parameters"] < 4 * parameters(tmp_path) < sizes["arguments"] * 4
    assert plan["collectives"]["all-gather"]["times"] > 10  # in loops over layers and over tokens of a thought
    assert 0 < plan["seconds"]["best"] <= plan["seconds"]["summed"]
    assert plan["compile_seconds"] > 0


@pytest.mark.tpu
def test_too_large_a_model_gets_the_message_of_the_compiler_and_what_may_help(aot):
    large = ("--config.model.architecture.hidden_size=8192", "--config.model.architecture.intermediate_size=65536",
             "--config.model.architecture.num_layers=4")  # fmt: skip
    arguments = ("--topology", "v5e:2x2", "--phase", "plain", "--config.mesh.fsdp=2", *large)
    plan = planned(aot, *arguments, status=1)
    assert not plan["fits"]
    assert "RESOURCE_EXHAUSTED" in plan["out_of_memory"]
    assert plan["bytes_per_chip"]["total"] > plan["bytes_per_chip"]["usable"] > 15 * 2**30
    assert "more fsdp or tensor" in plan["suggestions"][0]

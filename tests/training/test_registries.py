"""Every registered reward, advantage and mixing trains; a new one is tested by being registered."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from quietstar_jax.config_file import read_config
from quietstar_jax.methods.advantages import ADVANTAGES
from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.methods.registry import Registry
from quietstar_jax.methods.rewards import REWARDS
from quietstar_jax.training.setup import prepare
from tests.training.test_step import step_of
from tests.training.tiny import tiny_config

CONFIGURATION = """
from quietstar_jax.configs import quickstart
from quietstar_jax.methods.advantages import ADVANTAGES

@ADVANTAGES.register()
def only_here(rewards, batch_std):
    return rewards

def get_config():
    config = quickstart.get_config()
    config.thought.advantage = "only_here"
    return config
"""


def every_entry() -> list[tuple[str, ...]]:
    """(reward, advantage, mixing) such that every entry of the three registries occurs, in as few steps as possible."""
    registries = (REWARDS, ADVANTAGES, MIXINGS)
    return list(itertools.islice(zip(*map(itertools.cycle, registries), strict=False), max(map(len, registries))))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registries")


@pytest.mark.some(2)
@pytest.mark.parametrize(("reward", "advantage", "mixing"), every_entry())
def test_a_training_step(workdir: Path, reward: str, advantage: str, mixing: str) -> None:
    run = prepare(tiny_config(workdir, thought__reward=reward, thought__advantage=advantage, thought__mixing=mixing))
    phase = dataclasses.replace(run.config.phases[1], num_thoughts=3)
    state, metrics = step_of(run, phase)
    assert not {name: value for name, value in metrics.items() if not np.isfinite(value).all()}
    assert {"loss", "base_loss", "talk_loss", "policy_loss", "reward", "reward_std", "mixing_weight"} <= metrics.keys()
    head = any(np.any(value) for name, value in state.opt_state[1].mu.items() if name.startswith("mixing_head."))
    assert head == MIXINGS[mixing].traits["head"], "the trait says whether the mixing head has a gradient"


def test_a_registry_refuses_a_name_twice_and_an_unknown_trait() -> None:
    registry: Registry = Registry(head=True)

    @registry.register(formula="x", assumes="nothing", source="this test")
    def mine() -> None:
        """Does nothing."""

    assert registry["mine"].traits == {"head": True}
    with pytest.raises(ValueError, match="mine is registered twice"):
        registry.register(formula="x", assumes="nothing", source="this test")(mine)
    with pytest.raises(ValueError, match=r"\['haed'\]; known are \['head'\]"):
        registry.register(formula="x", assumes="nothing", source="this test", haed=False)


def test_a_configuration_file_that_registers_a_function_may_be_read_again(tmp_path: Path) -> None:
    """A study reads its configuration file once per variant."""
    file = tmp_path / "mine.py"
    file.write_text(CONFIGURATION)
    for _ in range(2):
        config = read_config(str(file))
        assert config.thought.advantage == "only_here"
    ADVANTAGES.pop("only_here")

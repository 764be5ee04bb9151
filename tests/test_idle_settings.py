"""Settings of the objective without an effect: named when a run starts, not refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from quietstar_jax.config import Config
from quietstar_jax.idle_settings import idle_settings
from quietstar_jax.settings import from_mapping
from quietstar_jax.studies.study import configuration, load_study
from tests.test_shipped_configs import CONFIGS, FOLDER, load

PLAIN, UNTRAINED, ONE = {"thought_length": 0}, {"policy_weight": 0.0}, {"num_thoughts": 1, "tokens_ahead": 1}
FROZEN = {"rates": {"decoder": 0.0, "thought_embeddings": 0.0}}


@pytest.mark.parametrize(
    ("thought", "phase", "expected"),
    [
        ({}, {}, []),
        ({"kl_weight": 0.1, "advantage": "batch_std", "discount": 0.5, "entropy_bonus": 0.1}, {}, []),
        ({"kl_weight": 0.1}, UNTRAINED, ["thought.kl_weight is 0.1, which has no effect: no phase trains thoughts"]),
        ({"advantage": "posterior", "reward": "probability"}, UNTRAINED, ["thought.advantage"]),  # reward is a metric
        ({"entropy_bonus": 0.1, "reward": "probability"}, PLAIN, ["thought.reward", "thought.entropy_bonus"]),
        ({"kl_in_reward": 0.1}, {"steps": 0}, ["thought.kl_in_reward"]),
        ({"kl_in_reward": 0.1, "advantage": "posterior", "discount": 0.5}, ONE, ["thought.discount", "thought.adv"]),
        ({"entropy_bonus": 0.1, "entropy_bonus_max": 2.0}, {}, ["thought.entropy_bonus_max.*`entropy_target` is 0"]),
        ({"clip_epsilon": 0.2}, {}, []),
        ({"clip_epsilon": 0.2, "score_temperature": 1.0}, {}, ["thought.clip_epsilon.*are equal"]),
        ({"importance_cap": 0.5, "score_temperature": 1.0}, {}, []),
        ({"importance_cap": 2.0, "score_temperature": 1.0}, {}, ["thought.importance_cap.*no ratio exceeds 1"]),
        ({"kl_weight": 0.1}, FROZEN, ["thought.kl_weight", r"phases\[0\].policy_weight.*frozen"]),
        ({"gate": True, "gate_prices": [0.3]}, {"rates": {"gate": 2.0}}, []),
        ({"gate": True}, PLAIN, ["thought.gate is True.*no phase with thoughts trains the gate"]),
        ({"gate": True}, {"rates": {"gate": 0.0}}, ["thought.gate"]),
        ({"gate_prices": [0.3], "gate_tokens_ahead": 2}, {}, ["thought.gate_prices.*is off", "thought.gate_tokens"]),
        ({}, {"rates": {"gate": 2.0}}, [r"phases\[0\].rates.gate is 2.0.*`thought.gate` is off"]),
        ({"control": "pause"}, {}, [r"phases\[0\].policy_weight.*`pause`"]),
    ],
)
def test_what_has_no_effect_is_named(thought: dict[str, Any], phase: dict[str, Any], expected: list[str]) -> None:
    found = idle_settings(from_mapping(Config, {"thought": thought, "phases": [phase]}))
    assert len(found) == len(expected)
    for line, pattern in zip(found, expected, strict=True):
        assert re.match(f"config.{pattern}", line), line


ADAPTED = {"checkpoint": "base", "adapters": {"maps": "mlp", "rank": 4}, "frozen_dtype": "float32"}


@pytest.mark.parametrize(
    ("model", "rates", "expected"),
    [
        (ADAPTED, {"adapters": 0.5}, []),
        (ADAPTED, {"decoder": 0.0}, [r"phases\[0\].rates.decoder is 0.0, .*: adapters freeze .*`rates.adapters`"]),
        (ADAPTED | {"adapters": {"maps": "mlp", "norms": True}}, {"decoder": 0.0}, []),
        (ADAPTED, {"adapters": 0.0, "thought_embeddings": 0.0}, [r"phases\[0\].policy_weight.*adapters and .* frozen"]),
        ({}, {"adapters": 0.0}, [r"phases\[0\].rates.adapters is 0.0, .*maps` is 'none'"]),
        (ADAPTED | {"adapters": {"rank": 4, "alpha": 8.0}}, {},
         ["model.frozen_dtype is 'float32'", "model.adapters.rank is 4", "model.adapters.alpha is 8.0"]),
    ],
)  # fmt: skip
def test_settings_of_adapters_without_an_effect(
    model: dict[str, Any], rates: dict[str, float], expected: list[str]
) -> None:
    found = idle_settings(from_mapping(Config, {"model": model, "phases": [{"rates": rates}]}))
    assert len(found) == len(expected), found
    for line, pattern in zip(found, expected, strict=True):
        assert re.match(f"config.{pattern}", line), line


def test_every_shipped_configuration_has_settings_with_an_effect() -> None:
    assert not {path.stem: lines for path in CONFIGS if (lines := idle_settings(load(path)))}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("studies/[!_]*.py")), ids=lambda path: path.stem)
def test_of_shipped_studies_only_controls_have_settings_without_an_effect(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(FOLDER.parent)
    study = load_study(str(path))
    for variant in study.variants:
        config = configuration(study, variant, 0, tmp_path)
        assert not idle_settings(config) or config.policy_start is None, variant

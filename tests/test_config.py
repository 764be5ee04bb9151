"""The door: unknown keys, wrong types and impossible values are named, all at once, before anything is loaded."""

from __future__ import annotations

import dataclasses
import inspect
import io
import runpy
import tokenize
from pathlib import Path

import pytest

from quietstar_jax import config as settings_module
from quietstar_jax import data_config, thought_config
from quietstar_jax.config import Config, default_config, from_config_dict, phase, to_config_dict
from quietstar_jax.errors import ConfigError
from quietstar_jax.setting_help import meanings
from quietstar_jax.settings import differences, from_mapping
from quietstar_jax.thought_config import Phase


def test_defaults_survive_the_round_trip():
    assert from_config_dict(default_config()) == Config()
    assert from_config_dict(to_config_dict(Config(phases=(Phase(name="a"), Phase(name="b"))))).phases[1].name == "b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed": 1}, r"config\.sed is not a setting; did you mean seed\?"),
        ({"thought": {"mixng": "x"}}, r"config\.thought\.mixng is not a setting; did you mean mixing\?"),
        ({"seed": "one"}, r"config\.seed is 'one' \(str\); it must be an integer, at least 0"),
        ({"seed": True}, r"config\.seed is True \(bool\); it must be an integer"),
        ({"seed": -1}, r"config\.seed is -1; it must be at least 0"),
        ({"thought": {"advantage": "leave_on_out"}}, r"advantage is 'leave_on_out'.*did you mean leave_one_out\?"),
        ({"thought": {"advantage": "leave_one_out"}, "phases": [{"num_thoughts": 1}]},
         r"config\.phases\[0\]\.num_thoughts is 1; it must be at least 2 with the advantage leave_one_out"),
        ({"thought": {"reward": "probability", "discount": 0.5}},
         r"config\.thought\.discount is 0\.5; it must be 1\.0 for the reward probability"),
        ({"thought": {"gate": True, "gate_tokens_ahead": 4}, "phases": [{"tokens_ahead": 2}]},
         r"config\.thought\.gate_tokens_ahead is 4; it must be at most phases\[0\]\.tokens_ahead = 2"),
        ({"thought": {"clip_epsilon": 0.2, "importance_cap": 3.0}}, r"importance_cap is 3\.0; it must be 0 where"),
        ({"thought": {"entropy_target": 1.0, "entropy_bonus": 2.0}}, r"entropy_bonus is 2\.0; it must be at most"),
        ({"thought": {"talk_loss_weight": -0.5}}, r"talk_loss_weight is -0\.5; it must be at least 0, or -1"),
        ({"phases": [{"thought_length": 0, "distill_weight": 1.0}]},
         r"config\.phases\[0\]\.distill_weight is 1\.0; it must be 0 where thought_length or rates"),
        ({"model": 3}, r"config\.model is 3; it must be a group of settings"),
        ({"phases": "x"}, r"config\.phases is 'x'; it must be a list"),
        ({"phases": []}, r"config\.phases is \(\); it must be non-empty"),
        ({"phases": [{"thought_length": -1}]}, r"config\.phases\[0\]\.thought_length is -1; it must be at least 0"),
        ({"phases": [{"batch_size": 8, "microbatches": 3}]}, r"microbatches is 3; .* a divisor of batch_size \(8\)"),
        ({"phases": [{"learning_rate": float("nan")}]}, r"learning_rate is nan; it must be a finite number"),
        ({"phases": [{"learning_rate": 10**400}]}, r"learning_rate is inf; it must be a finite number"),
        ({"phases": [{"name": "a"}, {"name": "a"}]}, r"phases is \['a', 'a'\]; .* different names"),
        ({"data": {"sequence_length": 5}}, r"data\.sequence_length is 5; .* phases\[0\]\.tokens_ahead \+ 2 = 6"),
        ({"thought": {"mixing": "logits"}}, r"it must be one of hidden_states, log_probabilities"),
        ({"model": {"architecture": {"num_heads": 4, "num_kv_heads": 3}}}, r"a divisor of num_heads \(4\)"),
        ({"model": {"architecture": {"rope_scaling": {"kind": "llama3"}}}}, r"a positive length for llama3 scaling"),
        ({"model": {"prefix_attention": "kernel"}}, r"model\.prefix_attention is 'kernel'; it must be one of auto"),
        ({"data": {"packing": "loose"}}, r"one of random_span, consecutive_spans, packed"),
        ({"data": {"weights": (1.0, 2.0)}}, r"data\.weights is \(1\.0, 2\.0\); .* for each of the 1 train"),
        ({"data": {"weights": (0.0,)}}, r"config\.data\.weights\[0\] is 0\.0; it must be above 0"),
        ({"optimizer": {"b1": 1.0}}, r"config\.optimizer\.b1 is 1\.0"),
        ({"data": {"packing": "paked"}}, r"packing is 'paked'; .*did you mean packed\?"),
        ({"data": {"packing": ["packed"]}}, r"packing is \['packed'\]; it must be one of"),
        ({"mesh": {"data": 0}}, r"config\.mesh\.data is 0; it must be above 0, or -1"),
        ({"mesh": {"data": -1, "fsdp": -1}}, r"config\.mesh\.data and fsdp is -1; it must be -1 in only one place"),
        ({"data": {"workers": 1025}}, r"config\.data\.workers is 1025; it must be within 0 \.\. 1024"),
        ({"evaluation": {"batch_size": 2**22, "thought_length": 19}}, r"evaluation has thoughts of 21474836480 tokens"),
    ],
)  # fmt: skip
def test_a_bad_setting_names_itself(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Config, changes)


def test_every_problem_is_listed_at_once():
    with pytest.raises(ConfigError) as error:
        from_mapping(Config, {"seed": -1, "workdir": "", "thought": {"mixing": "x"}, "checkpoint": {"every_steps": 0}})
    for name in ("config.seed", "config.workdir", "thought.mixing", "checkpoint.every_steps"):
        assert name in str(error.value)


def test_a_problem_in_a_phase_leaves_its_other_settings():
    plain = {"thought_length": 0, "tokens_ahead": 9, "steps": -1}
    with pytest.raises(ConfigError) as error:
        from_mapping(Config, {"data": {"sequence_length": 5}, "phases": [plain]})
    assert str(error.value).count("\n") == 1  # phases[0].steps: a plain phase has no conflict with the length


def test_phase_spans_count_steps():
    phases = tuple(Phase(name=str(steps), steps=steps) for steps in (3, 0, 2))
    spans = Config(phases=phases).phase_spans()
    assert [(span.phase, *span[1:]) for span in spans] == [(phases[0], 0, 3), (phases[1], 3, 3), (phases[2], 3, 5)]


def test_configuration_page_is_fresh():
    docs = Path(__file__).resolve().parents[1] / "docs"
    document = runpy.run_path(str(docs / "configuration.py"))["document"]
    assert (docs / "configuration.md").read_text("utf-8") == document(), "run `make docs`"


def test_phase_helper_refuses_unknown_fields():
    with pytest.raises(ConfigError, match="lenght"):
        phase(lenght=3)


def test_differences_name_their_path():
    old = {"a": 1, "b": {"c": [1, 2]}, "d": [1]}
    new = {"a": 1, "b": {"c": [1, 3]}, "d": [1, 2], "e": 5}
    assert differences(old, new) == [
        "config.b.c[1]: 2 -> 3",
        "config.d: 1 entries -> 2 entries",
        "config.e: '(absent)' -> 5",
    ]


@pytest.mark.parametrize(
    "cls",
    [cls for module in (settings_module, data_config, thought_config) for cls in vars(module).values()
     if dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__],
    ids=lambda cls: cls.__name__,
)  # fmt: skip
def test_no_part_of_the_meaning_of_a_setting_is_lost(cls) -> None:
    """Every comment in a class of settings is shown by `--help-settings`, wherever a formatter put it."""
    tokens = tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    shown = " ".join(meanings(cls).values())
    assert not [text for text in comments if text not in shown and not text.startswith("fmt:")]

"""Every shipped configuration loads, and its whole train step fits together, shape by shape, without any weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from quietstar_jax.config import default_config, from_config_dict
from quietstar_jax.thoughts.model import abstract_params
from quietstar_jax.thoughts.settings import Vocabulary
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.evaluation import evaluation_settings, make_token_scorer
from quietstar_jax.training.setup import check_length
from quietstar_jax.training.step import initial_state, make_train_step

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(
    path for path in (*FOLDER.glob("*.py"), *FOLDER.glob("objectives/*.py")) if path.stem not in ("__init__", "common")
)


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_fits_together(path):
    config = load(path)
    architecture = config.model.architecture
    check_length(config, architecture)
    params, graphdef = abstract_params(architecture, config.model.adapters, config.thought.heads)
    states = {
        objective: jax.eval_shape(lambda p, objective=objective: initial_state(p, config, objective=objective), params)
        for objective in (False, True)
    }
    vocabulary = Vocabulary(
        pad_id=0, meta_tokens=(1, 2), start_tokens=(3,), end_tokens=(3,), end_token=3, start_token=3
    )
    length = config.data.sequence_length

    def batch(rows):
        return Batch(jax.ShapeDtypeStruct((rows, length), jnp.int32), jax.ShapeDtypeStruct((rows, length), bool))

    for phase, start, _ in config.phase_spans():
        state = states[config.policy_start is not None and start >= config.policy_start]
        step = make_train_step(config, phase, graphdef, vocabulary)
        after, metrics = jax.eval_shape(
            step, state, batch(phase.batch_size), jax.random.key(0), jax.ShapeDtypeStruct((), jnp.int32)
        )
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())

    scorer = make_token_scorer(graphdef, evaluation_settings(config, vocabulary))
    scores = jax.eval_shape(scorer, params, batch(config.evaluation.batch_size))
    assert scores.base.nll.shape == (config.evaluation.batch_size, length)
    assert scores.thinks == (config.evaluation_thought_length > 0)
    if scores.thinks:
        assert scores.thoughts.shape == (config.evaluation.batch_size, 1, length, config.evaluation_thought_length)


@pytest.mark.parametrize("name", ["mistral_7b_openwebmath", "mistral_7b_c4"])
def test_the_published_recipe_begins_documents_only_and_ends_none(name):
    data = load(next(path for path in CONFIGS if path.stem == name)).data
    assert (data.prepend_bos, data.append_eos) == ("document_start", False)


def test_mistral_7b_has_its_published_size():
    config = load(next(path for path in CONFIGS if path.stem == "mistral_7b_openwebmath"))
    params, _ = abstract_params(config.model.architecture)
    decoder = sum(value.size for name, value in params.items() if name.startswith("decoder."))
    assert decoder == 7_241_732_096
    assert (
        sum(value.size for name, value in params.items() if name.startswith("mixing_head.")) == 3 * 4096**2 + 3 * 4096
    )
    phase = config.phases[0]
    assert (phase.thought_length, phase.tokens_ahead, phase.num_thoughts, phase.batch_size) == (9, 4, 2, 8)


def test_every_decision_in_the_config_to_copy_is_valid(tmp_path):
    """Each commented line, when uncommented, gives another valid configuration."""
    lines = (FOLDER / "my_model.py").read_text().split("\n")
    decisions = [i for i, line in enumerate(lines) if line.startswith("    # config.")]
    assert len(decisions) >= 6
    before = load(FOLDER / "my_model.py")
    assert not before.phases[0].rates.move_decoder(before.model.adapters)
    for i in decisions:
        edited = tmp_path / "edited.py"
        edited.write_text("\n".join([*lines[:i], lines[i].replace("# ", "", 1), *lines[i + 1 :]]))
        after = load(edited)
        assert after != before, lines[i]
        assert not after.phases[0].rates.move_decoder(after.model.adapters)  # the opening leaves the decoder as it is


@pytest.mark.parametrize("path", sorted(FOLDER.glob("objectives/[!_c]*.py")), ids=lambda path: path.stem)
def test_a_preset_sets_the_whole_objective(path):
    """Whatever objective a configuration had before, also in phases that do not train thoughts."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    changed = default_config()
    changed.thought.update(
        reward="probability", advantage="batch_std", advantage_clip=0.5, importance_cap=2.0, entropy_target=1.0,
        kl_weight=0.3, kl_in_reward=0.2, talk_reduction="log_mean_exp", sampling_temperature=0.5, mixing="none",
    )  # fmt: skip
    assert module.objective(changed).thought == module.objective(default_config()).thought
    from_config_dict(changed)

"""Runs that train adapters on a frozen base: where they begin, what changes, what is saved, how they resume."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from quietstar_jax.checkpoint.checkpoints import Checkpoints
from quietstar_jax.checkpoint.run_checkpoint import open_run
from quietstar_jax.config import from_config_dict, to_config_dict
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.inference.load_model import load_model
from quietstar_jax.models.adapters import is_adapter, learns
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.evaluation import evaluation_settings, make_token_scorer
from quietstar_jax.training.loop import train
from quietstar_jax.training.setup import abstract_state, begin_objective, first_state, prepare
from quietstar_jax.training.step import make_train_step
from tests.training.adapted import adapted_config, write_base
from tests.training.test_resume import records
from tests.training.tiny import repeatable, tiny_config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """(workdir of an adapted run, its summary)."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(adapted_config(workdir, base))


def batch_of(config):
    length = config.data.sequence_length
    tokens = jax.random.randint(jax.random.key(1), (4, length), 6, 90)
    return Batch(tokens.astype(jnp.int32), jnp.arange(length) < jnp.array([length, 7, 19, 4])[:, None])


def test_training_begins_exactly_at_the_base(base, tmp_path):
    """Bit for bit in float32, without thoughts and with them."""
    plain = prepare(tiny_config(tmp_path / "plain", model__checkpoint=str(base)))
    ours = prepare(adapted_config(tmp_path / "ours", base, model__frozen_dtype="float32"))
    scores = []
    for run in (plain, ours):
        scorer = make_token_scorer(run.graphdef, evaluation_settings(run.config, run.vocabulary))
        scores.append(jax.device_get(scorer(first_state(run).weights, batch_of(run.config))))
    jax.tree.map(np.testing.assert_array_equal, *scores)


@pytest.fixture(scope="module")
def steps(base, tmp_path_factory):
    """(run, the step of its thoughts, states and metrics before the first such step and after it)."""
    workdir = tmp_path_factory.mktemp("steps")
    run = prepare(adapted_config(workdir, base, model__adapters__norms=True, thought__kl_weight=0.5))
    step = jax.jit(make_train_step(run.config, run.config.phases[1], run.graphdef, run.vocabulary))
    before = begin_objective(run, first_state(run))
    return run, step, before, step(before, batch_of(run.config), run.key, jnp.int32(0))[0]


def test_what_a_step_changes(steps):
    run, _, before, state = steps
    assert set(state.frozen) == {name for name in run.graphdef.names if not learns(name, run.config.model.adapters)}
    assert {x.dtype for x in state.frozen.values()} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in state.params.values()} == {jnp.dtype("float32")}
    assert set(state.opt_state[1].mu) == set(state.params) == set(run.graphdef.names) - set(state.frozen)
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before.frozen)
    moments = state.opt_state[1].mu
    for name in state.params:
        if name.endswith(("_lora_b", "norm")) or name == "mixing_head.out":
            assert np.any(moments[name]), name
            assert not np.array_equal(state.params[name], before.params[name]), name
        elif name.endswith("_lora_a"):
            assert not np.any(moments[name]), name  # B is 0


def test_the_reference_of_the_divergence_is_the_policy_at_its_start(steps):
    """Also if adapters and norms have learned before: the divergence is exactly 0 before the first update."""
    run, step, first, _ = steps
    plain = jax.jit(make_train_step(run.config, run.config.phases[0], run.graphdef, run.vocabulary))
    state = first_state(run)
    for _ in range(2):
        state, _ = plain(state, batch_of(run.config), run.key, jnp.int32(0))
    for name in ("decoder.layers.up_lora_b", "decoder.final_norm"):
        assert not np.array_equal(state.params[name], first.params[name]), name
    state, divergence = begin_objective(run, state), []
    assert set(state.reference) == {name for name in state.params if not name.startswith("mixing_head.")}
    for name, value in state.reference.items():
        np.testing.assert_array_equal(value, state.params[name], err_msg=name)
    for _ in range(2):
        state, metrics = step(state, batch_of(run.config), run.key, jnp.int32(0))
        divergence.append(float(metrics["kl"]))
    assert divergence[0] == 0.0
    assert divergence[1] > 1e-6


def save_as_earlier_versions(folder, state, record):
    """Writes a step as versions did whose orbax handler of the objective, as of all arrays, was the standard one."""
    arrays = {"params": state.params, "opt_state": state.opt_state, "objective": state.objective}
    records = {"data": {"position": 7}, "config": record, "progress": {"step": int(state.step)}}
    handlers = dict.fromkeys(arrays, ocp.StandardCheckpointHandler) | dict.fromkeys(records, ocp.JsonCheckpointHandler)
    items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
    items |= {name: ocp.args.JsonSave(dict(mapping)) for name, mapping in records.items()}
    made = {name: handler() for name, handler in handlers.items()}
    with ocp.CheckpointManager(folder, item_handlers=made) as manager:
        manager.save(int(state.step), args=ocp.args.Composite(**items))


@pytest.mark.some(1)
@pytest.mark.parametrize("adapted", [True, False])
def test_references_of_earlier_versions(base, tmp_path, adapted):
    """They were all weights, mixing head included; of adapted runs neither adapters nor head: another reference."""
    maps = "all" if adapted else "none"
    thought = dict(thought__kl_weight=0.5, thought__entropy_target=0.5, thought__entropy_bonus=0.25)
    config = adapted_config(tmp_path, base, model__adapters__maps=maps, model__adapters__norms=adapted, **thought)
    run = prepare(config)
    state = begin_objective(run, first_state(run))._replace(step=jnp.int32(4))
    earlier = {
        name: x
        for name, x in state.params.items()
        if not (adapted and (is_adapter(name) or name.startswith("mixing_head.")))
    }
    assert set(earlier) - set(state.reference) == {name for name in earlier if name.startswith("mixing_head.")}
    save_as_earlier_versions(tmp_path / "checkpoints", state._replace(reference=earlier), run.record)
    with Checkpoints(tmp_path / "checkpoints", config.checkpoint) as checkpoints:
        abstract = abstract_state(config, run.architecture, run.mesh, 4)
        if adapted:
            with pytest.raises(CheckpointError, match=r"no decoder\.layers\.\w+_lora_a in the reference"):
                checkpoints.restore(4, abstract)
        else:
            restored = checkpoints.restore(4, abstract)
            assert restored.data == {"position": 7}
            jax.tree.map(np.testing.assert_array_equal, restored.state, state)


@pytest.mark.slow
def test_a_phase_in_which_adapters_rest(base, tmp_path):
    """Their rate 0 leaves A and B unchanged bit for bit, also after steps in which they learned.

    Nothing of the decoder gets a gradient: the moments of A and B only decay.
    """
    run = prepare(adapted_config(tmp_path, base))
    before, (plain, phase) = first_state(run), run.config.phases
    learn = jax.jit(make_train_step(run.config, plain, run.graphdef, run.vocabulary))
    for _ in range(2):
        before, _ = learn(before, batch_of(run.config), run.key, jnp.int32(0))
    phase = dataclasses.replace(phase, rates=dataclasses.replace(phase.rates, adapters=0.0))
    step = jax.jit(make_train_step(run.config, phase, run.graphdef, run.vocabulary))
    state, _ = step(before, batch_of(run.config), run.key, jnp.int32(0))
    adapters = [name for name in state.params if is_adapter(name)]
    assert len(adapters) == 14
    for name in adapters:
        np.testing.assert_array_equal(state.params[name], before.params[name])
        moments = [one.opt_state[1].mu[name] for one in (before, state)]
        assert np.any(moments[0])
        np.testing.assert_allclose(moments[1], run.config.optimizer.b1 * moments[0], rtol=1e-6)
    assert np.any(state.params["mixing_head.out"])


def test_checkpoints_contain_only_what_learns(whole, base):
    workdir, summary = whole
    run = open_run(workdir)
    names = set(run.parameters.shapes)
    assert names == {name for name in names if learns(name, run.config.model.adapters)}
    assert sum(is_adapter(name) for name in names) == 14
    assert run.base["bytes"] == (base / "model.safetensors").stat().st_size
    assert len(run.base["content"]) == 64
    unknown = {"decoder.other": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(CheckpointError, match=r"has no parameter decoder\.other"):
        run.parameters.restore(unknown)
    assert summary["parameters"] > sum(np.prod(shape) for shape in run.parameters.shapes.values())


def test_interrupted_and_resumed_is_bit_identical(whole, base, tmp_path):
    workdir, summary = whole
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "7")
    (tmp_path / "summary.json").unlink()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 6))
    again = train(adapted_config(tmp_path, base))
    assert {**again, "paths": None} == {**summary, "paths": None}
    assert repeatable(records(tmp_path)) == repeatable(records(workdir))


def test_another_base_is_refused(whole, base, tmp_path):
    workdir, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(whole[0], workdir)
    shutil.copytree(base, moved)
    train(adapted_config(workdir, moved))  # the same bytes elsewhere
    write_base(moved, seed=1)
    with pytest.raises(CheckpointError, match=r"moved is not the one that the adapters of .* were trained on: .*hash"):
        train(adapted_config(workdir, moved))
    shutil.rmtree(moved)
    with pytest.raises(CheckpointError, match=r"only the weights that learn; .*moved, which cannot be opened"):
        train(adapted_config(workdir, moved))
    with pytest.raises(CheckpointError, match=r"model\.adapters\.rank: 2 -> 3"):
        train(adapted_config(workdir, base, model__adapters__rank=3))


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_run_has_the_weights_of_training(whole, base, dtype):
    """Also if the base is loaded in float32, its weights are those that were frozen in bfloat16."""
    workdir, _ = whole
    model = load_model(workdir, dtype=dtype)
    run = prepare(adapted_config(workdir, base), json.loads((workdir / "config.json").read_text()))
    up = first_state(run).frozen["decoder.layers.up"]
    assert model.params["decoder.layers.up"].dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(model.params["decoder.layers.up"].astype(jnp.bfloat16), up)
    np.testing.assert_array_equal(model.params["decoder.layers.up"].astype(jnp.float32), up.astype(jnp.float32))
    assert np.any(model.params["decoder.layers.up_lora_b"])


def test_loading_needs_the_base(whole, base):
    away = base.rename(base.with_name("away"))
    try:
        with pytest.raises(CheckpointError, match=r"only the weights that learn; .*base, which cannot be opened"):
            load_model(whole[0])
        write_base(base, seed=1)
        with pytest.raises(CheckpointError, match="base is not the one that the adapters"):
            load_model(whole[0])
    finally:
        shutil.rmtree(base, ignore_errors=True)
        away.rename(base)


@pytest.mark.slow
def test_a_run_from_the_weights_of_an_adapted_run(whole, tmp_path):
    """Its base is the sum of base and adapters; with adapters of its own, it begins exactly there."""
    workdir, _ = whole
    model = load_model(workdir)
    tokens = batch_of(tiny_config(tmp_path))
    wanted = make_token_scorer(model.graphdef, model.settings())(model.params, tokens)
    for config in (
        tiny_config(tmp_path / "full", model__checkpoint=str(workdir)),
        adapted_config(tmp_path / "again", workdir, model__frozen_dtype="float32"),
    ):
        run = prepare(config)
        found = make_token_scorer(run.graphdef, model.settings())(first_state(run).weights, tokens)
        np.testing.assert_allclose(found.base.nll, wanted.base.nll, rtol=2e-5, atol=2e-6)
        np.testing.assert_array_equal(found.thoughts, wanted.thoughts)


def test_impossible_combinations(base, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.checkpoint is ''; it must be a model where adapters"):
        tiny_config(tmp_path, model__adapters__maps="mlp")
    with pytest.raises(ConfigError, match=r"model\.adapter is 'x'; it must be empty where adapters\.maps is 'none'"):
        tiny_config(tmp_path, model__adapter="x")
    config = to_config_dict(adapted_config(tmp_path, base))
    config.phases[1].update(distill_weight=1.0)
    from_config_dict(config)
    config.phases[1].rates.adapters = 0.0
    with pytest.raises(ConfigError, match=r"distill_weight is 1\.0; it must be 0 where .* rates\.adapters is 0"):
        from_config_dict(config)

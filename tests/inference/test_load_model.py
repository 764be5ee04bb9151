"""Every kind of trained model is opened by one function, with the same weights wherever they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.architecture import Architecture
from quietstar_jax.errors import CheckpointError, ConfigError, UserError
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.inference.load_model import LoadedModel, load_model, stored_dtype
from quietstar_jax.models.parameters import merge
from quietstar_jax.thoughts.sample import sample_thoughts
from quietstar_jax.thoughts.text import read_text
from tests.hf.checkpoints import TINY, random_tensors, write
from tests.hf.runs import END, START, start_run, write_tokenizer
from tests.hf.test_published_layout import write_published
from tests.thoughts.test_golden import FILES, read

ARCHITECTURE = Architecture(**{**vars(TINY), "qkv_bias": True, "output_bias": True, "max_positions": 64})
UNUSED = (18, 19)  # the model has rows for them, its tokenizer no token


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run, its state, and where it, its exports and the plain model that it began from lie."""
    folder = tmp_path_factory.mktemp("models")
    write(folder / "plain", random_tensors(ARCHITECTURE), ARCHITECTURE)
    write_tokenizer(folder / "plain", ARCHITECTURE.vocab_size - len(UNUSED))
    run, state = start_run(folder / "run", folder / "plain", mixing="log_probabilities", embedding_scale=7.0)
    for format in ("quietstar", "base"):
        export(folder / "run", folder / format, ExportOptions(format))
    return {"run": run, "state": state, "folder": folder}


def assert_same_params(model: LoadedModel, params: dict[str, jax.Array]) -> None:
    assert model.params.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(model.params[name], value, err_msg=name)


@pytest.mark.parametrize("inside", ["run", "run/checkpoints"])
def test_a_run(places, inside):
    model = load_model(places["folder"] / inside)
    assert_same_params(model, places["state"].params)
    run = places["run"]
    assert (model.architecture, model.vocabulary, model.thought) == (
        run.architecture, run.vocabulary, run.config.thought,
    )  # fmt: skip
    assert (model.thought_length, model.tokens_ahead, model.step) == (6, 2, 0)
    assert model.can_think
    assert (model.bos, model.eos_ids) == ((0,), (1,))
    assert merge(model.graphdef, model.params).decoder.architecture == run.architecture


def test_an_export_is_the_run_itself(places):
    """The rows that an export adds for start and end are gone again, and its scale is that of the run."""
    run, model = load_model(places["folder"] / "run"), load_model(places["folder"] / "quietstar")
    assert_same_params(model, places["state"].params)
    assert model.fingerprint == run.fingerprint
    assert model.architecture == run.architecture
    assert model.vocabulary.meta_tokens == (ARCHITECTURE.vocab_size, ARCHITECTURE.vocab_size + 1)
    assert (model.thought.mixing, model.thought.embedding_scale) == ("log_probabilities", 7.0)
    assert (model.thought.start_token, model.thought.end_token) == (START, END)
    assert (model.thought_length, model.step, model.eos_ids) == (6, None, (1,))
    assert model.vocabulary.unused == run.vocabulary.unused == UNUSED
    assert model.suppressed_ids == (*model.vocabulary.meta_tokens, *UNUSED)


def test_a_published_checkpoint(tmp_path):
    golden = read(FILES[0])
    write_published(tmp_path / "published", golden)
    model = load_model(tmp_path / "published")
    assert_same_params(model, golden.ours("param"))
    assert model.vocabulary.meta_tokens == golden.settings.meta_tokens
    assert (model.thought.mixing, model.thought.embedding_scale, model.thought_length) == ("hidden_states", 100.0, 9)


@pytest.mark.parametrize("name", ["plain", "base"])
def test_a_plain_model_has_a_decoder_and_cannot_think(places, name):
    model = load_model(places["folder"] / name)
    rows = ARCHITECTURE.vocab_size
    for path, value in places["state"].params.items():
        if path.startswith("decoder."):
            found = model.params[path]
            known = found[:rows] if path == "decoder.embedding" else found
            known = found[:, :rows] if path == "decoder.lm_head" else known
            np.testing.assert_array_equal(known, value, err_msg=path)
        else:
            assert not model.params[path].any()
    assert not model.can_think
    assert model.settings(0).thought_length == model.settings().thought_length == 0
    with pytest.raises(CheckpointError, match="no trained mixing head"):
        model.settings(3)


def test_settings(places):
    settings = load_model(places["folder"] / "run").settings(tokens_ahead=3)
    assert (settings.thought_length, settings.num_thoughts, settings.tokens_ahead, settings.compute_dtype) == (
        6,
        1,
        3,
        "float32",
    )
    assert settings.config.mixing == "log_probabilities"
    assert load_model(places["folder"] / "quietstar").settings(2).meta_tokens == (20, 21, *UNUSED)
    with pytest.raises(ConfigError, match="-1"):
        load_model(places["folder"] / "run").settings(-1)
    assert load_model(places["folder"] / "run", prefix_attention="blocks").settings().prefix_attention == "blocks"


@pytest.mark.parametrize("name", ["run", "quietstar"])
def test_bfloat16_weights_compute_what_float32_masters_do(places, name):
    model = load_model(places["folder"] / name, dtype="bfloat16")
    for path, value in model.params.items():
        assert value.dtype == stored_dtype(path, "bfloat16"), path
    assert model.params["decoder.layers.query"].dtype == jnp.bfloat16
    tokens = jnp.arange(12).reshape(2, 6)

    @jax.jit
    def predict(params: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        loaded = merge(model.graphdef, params)
        text = read_text(loaded.decoder, tokens, jnp.ones(tokens.shape, bool), dtype=jnp.bfloat16)
        thoughts = sample_thoughts(loaded, text, jnp.arange(6), None, model.settings(), 6)
        return *thoughts, loaded.decoder.logits(text.hidden)

    jax.tree.map(np.testing.assert_array_equal, predict(model.params), predict(places["state"].params))


@pytest.mark.parametrize("name", ["run", "quietstar", "plain"])
def test_parameters_lie_where_the_layout_says(places, name):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def layout(shapes):
        specs = {n: "x" if n == "decoder.embedding" else None for n in shapes}
        return {n: jax.NamedSharding(mesh, jax.sharding.PartitionSpec(spec)) for n, spec in specs.items()}

    params = load_model(places["folder"] / name, layout=layout).params
    assert params["decoder.embedding"].sharding.spec == jax.sharding.PartitionSpec("x")
    assert all(isinstance(value.sharding, jax.NamedSharding) for value in params.values())


def test_opening_a_run_leaves_it_alone(places, tmp_path):
    """A run may be training while it is opened: what looks left over may be a checkpoint being written."""
    shutil.copytree(places["folder"] / "run", tmp_path / "run")
    (tmp_path / "run/checkpoints/5.orbax-checkpoint-tmp").mkdir()
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert load_model(tmp_path / "run").step == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_the_record_names_the_weights(places):
    record = load_model(places["folder"] / "run").record
    assert json.loads(json.dumps(record))["checkpoint_hash"] == load_model(places["folder"] / "run").fingerprint
    assert record["checkpoint_hash"] != load_model(places["folder"] / "plain").fingerprint
    assert (record["step"], record["thought_length"]) == (0, 6)


def test_other_ids_that_end_a_text(places, tmp_path):
    shutil.copytree(places["folder"] / "plain", tmp_path / "model")
    said = {"eos_token_id": [5, 1], "suppress_tokens": [7]}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(said))
    model = load_model(tmp_path / "model")
    assert (model.eos_ids, model.suppressed_ids) == ((5, 1), (7,))
    # Training ends texts with </s>; a run from it and exports of the run stop at both, and suppress the same.
    start_run(tmp_path / "run", tmp_path / "model")
    export(tmp_path / "run", tmp_path / "base", ExportOptions("base"))
    run, base = load_model(tmp_path / "run"), load_model(tmp_path / "base")
    assert (run.eos_ids, run.suppressed_ids) == ((1, 5), (7,))
    assert (base.eos_ids, base.suppressed_ids) == ((1, 5), (*UNUSED, 7))
    export(tmp_path / "run", tmp_path / "thinking", ExportOptions())
    thinking = load_model(tmp_path / "thinking")
    assert thinking.eos_ids == (1, 5)
    assert set(thinking.suppressed_ids) == {7, *thinking.vocabulary.meta_tokens, *UNUSED}


def test_ids_that_end_a_text_where_only_config_json_names_them(places, tmp_path):
    shutil.copytree(places["folder"] / "plain", tmp_path / "model")
    (tmp_path / "model/generation_config.json").unlink(missing_ok=True)
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "eos_token_id": [5, 1]}))
    assert load_model(tmp_path / "model").eos_ids == (5, 1)
    start_run(tmp_path / "run", tmp_path / "model")
    assert load_model(tmp_path / "run").eos_ids == (1, 5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere/at/all", {}, "not a folder"),
        ("plain", {"step": 3}, "no step 3"),
        ("run", {"step": 3}, "no checkpoint of step 3"),
        ("run", {"revision": "main"}, "no revision"),
        ("run", {"dtype": "float16"}, "float16"),
        ("run", {"prefix_attention": "kernels"}, "one of auto, blocks, triton"),
        ("run", {"prefix_attention": "triton"}, "the platform is 'cpu'"),
        ("empty", {}, "it has nothing"),
        ("begun", {}, "contains no checkpoint"),
    ],
)
def test_what_cannot_be_opened(places, name, options, message):
    (places["folder"] / "empty").mkdir(exist_ok=True)
    (places["folder"] / "begun/checkpoints").mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=message):
        load_model(places["folder"] / name, **options)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_vocab_size", 17), ("text_vocab_size", 23), ("text_vocab_size", "20"), ("thought_token_ids", [1, "x"]),
        ("thought_length", -1), ("thought_mixing", "sum"), ("thought_embedding_scale", 0),
    ],
)  # fmt: skip
def test_an_export_that_contradicts_itself(places, tmp_path, field, value):
    shutil.copytree(places["folder"] / "quietstar", tmp_path / "model")
    file: Path = tmp_path / "model/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(tmp_path / "model")


def test_damaged_weights_of_a_run(places, tmp_path):
    shutil.copytree(places["folder"] / "run", tmp_path / "run")
    for file in (tmp_path / "run/checkpoints/0/params").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="step 0 is damaged"):
        load_model(tmp_path / "run")

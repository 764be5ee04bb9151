"""What a work directory resumes with: text, tokenizer and base by content, wherever they are; and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.architecture import Architecture
from quietstar_jax.checkpoint.checkpoints import Checkpoints
from quietstar_jax.checkpoint.run_checkpoint import open_run
from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import Config
from quietstar_jax.data.pipeline import training_sequences
from quietstar_jax.data.pretokenized.write import prepare as prepare_text
from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.planning.architectures import planned_architecture
from quietstar_jax.settings import from_mapping
from quietstar_jax.training.base import check_base
from quietstar_jax.training.loop import resume_or_start
from quietstar_jax.training.resume import MOST_LINES, saved_record
from quietstar_jax.training.setup import prepare
from tests.checkpoint.saved import edit
from tests.hf.runs import start_run, write_tokenizer
from tests.models.test_parity import VOCAB, random_model
from tests.training.tiny import tiny_config


def go(config: Config, steps: int = 0) -> TrainState:
    """Opens a work directory as training does, reads the text of `steps` steps without training on it, and saves.

    Returns the state that it began with.
    """
    workdir = Path(config.workdir)
    run = prepare(config, saved_record(workdir))
    sequences = training_sequences(config.data, run.tokenizer, seed=config.seed)
    with jax.set_mesh(run.mesh), Checkpoints(workdir / "checkpoints", config.checkpoint) as checkpoints:
        state = resume_or_start(run, checkpoints, sequences)
        if checkpoints.latest_step is None:
            run.tokenizer.save(workdir / "tokenizer")
        for _ in range(steps):
            sequences.next_batch(config.phases[0].batch_size)
        saved = state._replace(step=state.step + steps) if steps else state
        checkpoints.save(saved, sequences.get_state(), run.record)
    return state


def words(folder: Path, *order: int) -> Path:
    """A tokenizer folder; `order` names two ids whose words change places."""
    write_tokenizer(folder, VOCAB)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    for a, b in zip(order, reversed(order), strict=True):
        vocabulary[f"w{a}"] = b
    file.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hf"
    random_model("llama").save_pretrained(folder)
    return words(folder)


@pytest.fixture(scope="module")
def begun(base, tmp_path_factory) -> Path:
    """A folder with a base, a tokenizer, a text, and a run of two steps on them."""
    root = tmp_path_factory.mktemp("begun")
    shutil.copytree(base, root / "hf")
    words(root / "words")
    lines = [json.dumps({"text": f"w{i} w{i + 1} w{i + 2} w5 w7 w9"}) + "\n" for i in range(3, 40)]
    (root / "text.jsonl").write_text("".join(lines))
    prepare_text([str(root / "text.jsonl")], load_tokenizer(str(root / "words")), "", root / "tokens",
                 tiny_config(root).data, shards=1, workers=1)  # fmt: skip
    go(settings(root), steps=2)
    return root


def settings(root: Path, **changes: object) -> Config:
    """Of the run that `begun` makes, and what differs."""
    config = tiny_config(root / "run")
    names = {"train": (str(root / "text.jsonl"),), "validation": (), "tokenizer": str(root / "words")}
    data = {name: changes.pop(name, value) for name, value in names.items()}
    model = dataclasses.replace(config.model, checkpoint=str(changes.pop("checkpoint", root / "hf")))
    thought = dataclasses.replace(config.thought, initial_start_token="---", initial_end_token="---")
    config = dataclasses.replace(config, model=model, thought=thought, data=dataclasses.replace(config.data, **data))
    return dataclasses.replace(config, **changes)


@pytest.fixture
def root(begun, tmp_path) -> Path:
    """A copy of `begun` under another path, as on another machine: every path but the run's own has changed."""
    shutil.copytree(begun, tmp_path / "copy")
    return tmp_path / "copy"


def test_text_tokenizer_and_base_may_move(root, monkeypatch):
    assert go(settings(root)).step == 2
    for name in ("text.jsonl", "hf", "words"):
        (root / name).rename(root / f"moved {name}")
    moved = {"train": (str(root / "moved text.jsonl"),), "tokenizer": str(root / "moved words")}
    assert go(settings(root, checkpoint=root / "moved hf", **moved)).step == 2
    monkeypatch.chdir(root)
    relative = {"train": ("moved text.jsonl",), "tokenizer": "moved words", "validation": ("moved text.jsonl",)}
    assert go(settings(root, checkpoint="moved hf", **relative)).step == 2


def test_prepared_text_may_move(root):
    ours = {"train": (str(root / "tokens"),), "workdir": str(root / "second")}
    go(settings(root, **ours), steps=2)
    (root / "tokens").rename(root / "elsewhere")
    assert go(settings(root, **ours | {"train": (f"prepared:{root / 'elsewhere'}",)})).step == 2


def test_nothing_of_a_base_or_tokenizer_that_is_gone_is_needed(root):
    shutil.rmtree(root / "hf")
    shutil.rmtree(root / "words")
    begun = Path(saved_record(root / "run")["config"]["model"]["checkpoint"])
    gone = {"checkpoint": begun, "tokenizer": str(begun.parent / "words")}
    hidden = begun.parent.rename(root / "hidden")
    try:
        assert go(settings(root, **gone)).step == 2
    finally:
        hidden.rename(begun.parent)


@pytest.mark.parametrize("old_record", [False, True])
def test_a_tokenizer_that_changed_under_its_path_is_refused(root, old_record):
    if old_record:  # of a version that kept no fingerprint
        file = root / "run/checkpoints/2/config/metadata"
        record = {name: value for name, value in json.loads(file.read_text()).items() if name != "tokenizer"}
        edit(root / "run/checkpoints/2", "config", json.dumps(record))
    kept = (root / "run/tokenizer/tokenizer.json").read_bytes()
    words(root / "words", 11, 17)
    with pytest.raises(
        CheckpointError, match=r"'w11' 11 -> 17, 'w17' 17 -> 11.*config\.data\.tokenizer to .*run/token"
    ):
        go(settings(root))
    assert (root / "run/tokenizer/tokenizer.json").read_bytes() == kept
    assert go(settings(root, tokenizer=str(root / "run/tokenizer"))).step == 2


def test_other_text_or_another_base_is_refused(root):
    text = root / "text.jsonl"
    text.write_text(text.read_text().replace("w5", "w6"))
    with pytest.raises(CheckpointError, match="training data has changed"):
        go(settings(root))
    random_model("llama one kv head").save_pretrained(root / "other")
    words(root / "other")
    with pytest.raises(CheckpointError, match=r"config\.model\.checkpoint: .*hf.* -> .*other"):
        go(settings(root, checkpoint=root / "other"))
    with pytest.raises(CheckpointError, match="no/such/model"):
        go(settings(root, checkpoint="./no/such/model"))


def test_other_settings_are_refused_with_the_three_ways_on(tmp_path):
    config = tiny_config(tmp_path / "run")
    go(config, steps=2)
    wider = dataclasses.replace(config.model.architecture, num_heads=4, hidden_size=32, intermediate_size=48)
    longer = {"model": dataclasses.replace(config.model, architecture=wider), "seed": 5}
    with pytest.raises(CheckpointError) as error:
        go(dataclasses.replace(config, **longer))
    message = str(error.value)
    assert message.count("num_heads: 2 -> 4") == 1
    assert "config.model.architecture.num_heads: 2 -> 4" in message
    for fact in ("config.seed: 0 -> 5", "Phases appended to config.phases", "set config.workdir to a new folder",
                 f"config.model.checkpoint to {config.workdir}"):  # fmt: skip
        assert fact in message
    renamed = [dataclasses.replace(config.phases[0], name="n" * 9999, learning_rate=0.5, batch_size=8, num_thoughts=1,
                                   thought_length=1, tokens_ahead=3, policy_weight=7.0, warmup_steps=1)]  # fmt: skip
    other = {"phases": tuple(renamed), "optimizer": dataclasses.replace(config.optimizer, b1=0.5, b2=0.5, eps=9.0),
             "data": dataclasses.replace(config.data, sequence_length=20, append_eos=False)}  # fmt: skip
    with pytest.raises(CheckpointError, match=r"and [0-9]+ more") as error:
        go(dataclasses.replace(config, **other, **longer))
    assert len(str(error.value).splitlines()) == MOST_LINES + 6
    assert len(str(error.value)) < 4000


@pytest.mark.parametrize("thought", [False, True], ids=["plain", "has thought"])
def test_a_run_begins_from_another_run(tmp_path, thought):
    first = tiny_config(tmp_path / "first")
    phases = (dataclasses.replace(first.phases[int(thought)], steps=2, batch_size=4),)
    first = dataclasses.replace(first, phases=phases)
    go(first)
    head = np.random.default_rng(0).normal(size=(3,))
    _replace_parameter(first, "start_embedding", head)
    trained = go(first)
    second = tiny_config(tmp_path / "second", model__checkpoint=first.workdir, data__tokenizer="", seed=9,
                         model__architecture__num_heads=1, thought__embedding_scale=50.0)  # fmt: skip
    begun = go(second)
    assert begun.step == 0
    for name, value in trained.params.items():
        if name not in ("start_embedding", "end_embedding"):
            assert np.array_equal(value, begun.params[name]), name
    assert np.allclose(trained.params["start_embedding"] * 100, begun.params["start_embedding"] * 50) == thought
    record = saved_record(tmp_path / "second")
    trained_architecture = first.model.architecture
    assert from_mapping(Architecture, record["architecture"]) == trained_architecture
    assert (record["vocabulary"]["start_tokens"] == []) == thought
    assert planned_architecture(second.model) == trained_architecture
    shutil.rmtree(tmp_path / "first")
    assert go(second).step == 0  # nothing of it is needed any more


def test_a_base_run_is_used_with_its_own_tokenizer_and_mixing(root):
    second = {"checkpoint": root / "run", "workdir": str(root / "second")}
    with pytest.raises(ConfigError, match=r"is not the tokenizer of the run .*Leave it empty"):
        go(settings(root, tokenizer=str(words(root / "other", 11, 17)), **second))
    config = settings(root, **second)
    with pytest.raises(CheckpointError, match="revision"):
        go(dataclasses.replace(config, model=dataclasses.replace(config.model, revision="main")))
    (root / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        go(settings(root, **second | {"checkpoint": root / "empty"}))
    thinks, _ = start_run(root / "thinks", root / "hf")
    learned = dataclasses.replace(open_run(root / "thinks"), vocabulary=thinks.vocabulary._replace(start_tokens=()))
    other = dataclasses.replace(thinks.config, thought=dataclasses.replace(thinks.config.thought, mixing="none"))
    with pytest.raises(
        ConfigError, match=r"config\.thought\.mixing is 'none', but .*thinks was trained with 'hidden_states'"
    ):
        check_base(learned, other, thinks.tokenizer, (None, None))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("data", {"sequences": 9}, "has read 9 sequences of text, where 2 steps read 8"),
        ("data", {"sequences": 0}, "has read 0 sequences of text"),
        ("progress", {"step": 3}, "it is of step 3, not 2"),
        ("folder", 3, "it is of step 2, not 3"),
        ("folder", 12, "it is of step 2, not 12"),
    ],
)
def test_a_checkpoint_whose_parts_contradict_each_other_is_refused(root, part, change, message):
    folder = root / "run/checkpoints/2"
    if part == "folder":
        folder = folder.rename(folder.with_name(str(change)))
    else:
        file = folder / part / "metadata"
        edit(folder, part, json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        go(settings(root))


def _replace_parameter(config: Config, name: str, seed: np.ndarray) -> None:
    """Writes step 1 of a run, with another value of a parameter, as if it had been trained."""
    workdir = Path(config.workdir)
    run = prepare(config, saved_record(workdir))
    sequences = training_sequences(config.data, run.tokenizer, seed=config.seed)
    with jax.set_mesh(run.mesh), Checkpoints(workdir / "checkpoints", config.checkpoint) as checkpoints:
        state = resume_or_start(run, checkpoints, sequences)
        sequences.next_batch(config.phases[0].batch_size)
        value = jnp.asarray(np.resize(seed, state.params[name].shape), jnp.float32)
        state = TrainState(state.step + 1, state.params | {name: value}, state.opt_state)
        checkpoints.save(state, sequences.get_state(), run.record)

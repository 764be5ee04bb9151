"""Checkpoints out: what transformers and we read back, and what an interrupted or impossible export leaves."""

from __future__ import annotations

import ast
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quietstar_jax.architecture import Architecture
from quietstar_jax.checkpoint import checkpoints as checkpoints_module
from quietstar_jax.checkpoint.checkpoints import Checkpoints
from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import CheckpointConfig, Config
from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.errors import CheckpointError, ConfigError
from quietstar_jax.export_hf import save as hf_save
from quietstar_jax.export_hf.added_tokens import add_tokens
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions, Thoughts, save
from quietstar_jax.hf.files import open_checkpoint
from quietstar_jax.hf.names import parameter_shapes, quietstar_entries
from quietstar_jax.io import new_folder
from quietstar_jax.models.families import architecture_from_hf
from quietstar_jax.settings import to_mapping
from quietstar_jax.thoughts.settings import Vocabulary
from quietstar_jax.training.base import load_thinking
from tests.checkpoint.saved import edit
from tests.hf.checkpoints import TINY
from tests.hf.runs import END, START, start_run, write_tokenizer
from tests.models.test_parity import VARIANTS, VOCAB, batch, our_logits, random_model, their_logits
from tests.support.commands import run_command

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    opened = open_checkpoint(str(folder))
    return {name: opened.read(name) for name in opened.tensors}


def write_checkpoint(folder: Path, variant: str = "llama", dtype: Any = np.float32, known: tuple[str, ...] = (),
                     words: int = VOCAB - 4) -> Path:  # fmt: skip
    """A folder of transformers, with a tokenizer."""
    random_model(variant).save_pretrained(folder)
    save_file(
        {name: value.astype(dtype) for name, value in tensors(folder).items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    write_tokenizer(folder, words, *known)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    start_run(tmp_path / "run", write_checkpoint(tmp_path / "hf"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("llama tied", "float16"), ("mistral", "bfloat16"), ("qwen2", "float32"), ("qwen3 attention bias", "bfloat16"),
     ("llama mlp bias", "float32"), ("phi3 partial rotary", "bfloat16"),
     ("qwen3 windows yarn", "float32"), ("llama llama3 rope", "float32")],
)  # fmt: skip
def test_in_and_out_again_is_bit_identical(variant, dtype, tmp_path):
    source = write_checkpoint(tmp_path / "hf", variant, DTYPES[dtype])
    start_run(tmp_path / "run", source)
    export(tmp_path / "run", tmp_path / "base", ExportOptions("base", dtype))
    export(tmp_path / "run", tmp_path / "thinking", ExportOptions("quietstar", dtype))
    before, base, thinking = (tensors(tmp_path / name) for name in ("hf", "base", "thinking"))
    assert set(base) == set(before)
    for name, value in before.items():
        assert base[name].dtype == thinking[name].dtype == DTYPES[dtype]
        assert base[name].tobytes() == value.tobytes(), name
        assert thinking[name][: len(value)].tobytes() == value.tobytes(), name
    assert thinking["model.embed_tokens.weight"].shape[0] == VOCAB + 2
    # Out, in and out again, with the thoughts.
    start_run(tmp_path / "again", tmp_path / "thinking", keep_thoughts=True)
    export(tmp_path / "again", tmp_path / "twice", ExportOptions("quietstar", dtype))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("thinking", "twice")]
    assert configs[0] | {"text_vocab_size": VOCAB + 2} == configs[1]  # now the tokenizer has start and end
    for file in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / "thinking" / file).read_bytes()


@pytest.mark.parametrize(
    "variant",
    [v for v in VARIANTS if v.split()[0] == v or v.endswith(("tied", "partial rotary", "windows yarn", "llama3 rope"))],
)
def test_base_loads_without_a_word_and_gives_our_logits(variant, tmp_path, caplog, recwarn):
    start_run(tmp_path / "run", write_checkpoint(tmp_path / "hf", variant))
    export(tmp_path / "run", tmp_path / "out", ExportOptions("base"))
    logging.getLogger("transformers").propagate = True
    warnings.simplefilter("always")
    with caplog.at_level(logging.WARNING):
        recwarn.clear()
        caplog.clear()  # of what the random model of the test is warned about
        model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not [record.getMessage() for record in caplog.records]
    assert not [str(warning.message) for warning in recwarn]
    assert not any(report.values()), report
    assert type(model).__name__ == transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").__class__.__name__

    tokens, mask = batch()
    ours = our_logits(tmp_path / "hf", tokens, mask)
    theirs = their_logits(model, tokens, mask)
    assert theirs.shape == ours.shape  # no row for start or end: nothing that could be predicted in the place of text
    assert np.abs(theirs - ours)[mask].max() < 1e-4
    assert not {START, END} & set(tokenizer.get_vocab())
    assert len(tokenizer) == len(transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"))


def test_tokenizer_ids_follow_the_rows_of_the_model(run, tmp_path):
    export(run, tmp_path / "out", ExportOptions())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == VOCAB + 2
    assert tokenizer.convert_ids_to_tokens(VOCAB - 1) == f"<|unused_{VOCAB - 1}|>"
    assert tokenizer(f"w5 {START} w6 {END}").input_ids == [0, 5, VOCAB, 6, VOCAB + 1]
    assert tokenizer.decode([5, VOCAB, VOCAB - 1], skip_special_tokens=True) == "w5"
    again = load_tokenizer(str(tmp_path / "out"))
    assert add_tokens(again, VOCAB + 2, (START, END)) == (VOCAB, VOCAB + 1)
    assert again.token_id(f"<|unused_{VOCAB + 2}|>") is None


def test_tokens_that_the_tokenizer_has_keep_their_ids(tmp_path):
    source = write_checkpoint(tmp_path / "hf", known=(END, START))
    start_run(tmp_path / "run", source)
    for kind in ("base", "quietstar"):
        export(tmp_path / "run", tmp_path / kind, ExportOptions(kind))
    before, base, thinking = (tensors(tmp_path / name) for name in ("hf", "base", "quietstar"))
    end, start = VOCAB - 4, VOCAB - 3
    for name, value in before.items():
        assert base[name].tobytes() == thinking[name].tobytes() == value.tobytes(), name
    assert json.loads((tmp_path / "base/generation_config.json").read_text())["suppress_tokens"] == [
        start,
        end,
        VOCAB - 2,
        VOCAB - 1,
    ]
    assert json.loads((tmp_path / "quietstar/config.json").read_text())["thought_token_ids"] == [start, end]


def test_shards_hold_what_one_file_holds(run, tmp_path):
    export(run, tmp_path / "one", ExportOptions())
    export(run, tmp_path / "many", ExportOptions(max_shard_size="20KB"))
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 3
    joined: dict[str, np.ndarray] = {}
    for file in files:
        part = load_file(file)  # of the safetensors library
        assert sum(value.nbytes for value in part.values()) <= 20_000
        assert not set(joined) & set(part)
        joined |= part
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert set(whole) == set(joined)
    assert all(whole[name].tobytes() == joined[name].tobytes() for name in whole)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many", trust_remote_code=True)
    assert type(model).__name__ == "QuietStarLlamaForCausalLM"


def test_thoughts_are_read_back_as_they_were(run, tmp_path):
    export(run, tmp_path / "out", ExportOptions())
    _, state = start_run(tmp_path / "scaled", tmp_path / "out", keep_thoughts=True, embedding_scale=10.0)
    opened = open_checkpoint(str(tmp_path / "out"))
    same = load_thinking(opened, architecture_from_hf(opened.config), 100.0)
    stored = load_file(tmp_path / "out/model.safetensors")["start_embedding"]
    assert stored.shape == (2, 32)
    np.testing.assert_array_equal(same.start_embedding[...], stored[0])
    np.testing.assert_allclose(state.params["start_embedding"], 10 * stored[0], rtol=1e-6)
    np.testing.assert_array_equal(same.mixing_head.out[...], state.params["mixing_head.out"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thought_mixing": "log_probabilities"}, "config.thought.mixing"),
        ({"thought_token_ids": [3, 4]}, "config.thought.start_token"),
        ({"thought_embedding_scale": 0}, "thought_embedding_scale is 0"),
        ({"thought_embedding_scale": "100"}, "thought_embedding_scale is '100'"),
    ],
)
def test_thoughts_of_another_kind_are_refused(run, tmp_path, change, message):
    export(run, tmp_path / "out", ExportOptions())
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=message):
        start_run(tmp_path / "again", tmp_path / "out", keep_thoughts=True)


def test_a_thinking_checkpoint_that_lacks_a_tensor_is_refused(run, tmp_path):
    export(run, tmp_path / "out", ExportOptions())
    file = tmp_path / "out/model.safetensors"
    kept = load_file(file)
    del kept["talk_head.0.2.bias"]
    save_file(kept, file)
    with pytest.raises(CheckpointError, match=r"talk_head\.0\.2\.bias: missing"):
        start_run(tmp_path / "again", tmp_path / "out")


def test_the_model_card_says_how_it_was_trained(run, tmp_path):
    records = [{"kind": "evaluation", "step": 0, "phase": "thoughts", "loss_with_thoughts": 1.25, "tokens": 281}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"kind": "eva')
    export(run, tmp_path / "out", ExportOptions())
    card = (tmp_path / "out/README.md").read_text()
    for part in ("library_name: transformers", "trust_remote_code=True", "0 of 0 steps", "From `hf`",
                 "| loss with thoughts (nats per token) | 1.25 |", '"embedding_scale": 100.0'):  # fmt: skip
        assert part in card
    assert "workdir" not in card
    stated = json.loads(card.split("```json")[1].split("```")[0])["model"]["architecture"]
    exported = json.loads((tmp_path / "out/config.json").read_text())
    assert (stated["vocab_size"], stated["hidden_size"]) == (VOCAB, exported["hidden_size"]) == (VOCAB, 32)
    assert exported["dtype"] == exported["torch_dtype"] == "float32"


def test_the_model_card_names_no_folder_of_this_machine(run, tmp_path):
    record = run / "checkpoints/0/config/metadata"
    saved = json.loads(record.read_text())
    saved["config"]["data"] |= {"train": ["/home/me/text/*.jsonl", "tfds:c4/en:train"], "validation": ["../held_out"],
                                "data_dir": "~/tensorflow", "tokenizer": "someone/model"}  # fmt: skip
    edit(run / "checkpoints/0", "config", json.dumps(saved))
    export(run, tmp_path / "out", ExportOptions())
    card = (tmp_path / "out/README.md").read_text()
    assert not [part for part in (str(tmp_path), "/home", "../", "~") if part in card]
    for part in ("Text: `*.jsonl`, `tfds:c4/en:train`", '"held_out"', '"tensorflow"', '"tokenizer": "someone/model"'):
        assert part in card


def test_it_samples_and_stops_as_before_training(tmp_path):
    source = write_checkpoint(tmp_path / "hf")
    before = {"do_sample": True, "temperature": 0.5, "eos_token_id": [7, 1], "pad_token_id": 9, "max_length": 2048,
              "suppress_tokens": [4], "repetition_penalty": 1.1}  # fmt: skip
    (source / "generation_config.json").write_text(json.dumps(before | {"cache_implementation": "static"}))
    start_run(tmp_path / "run", source)
    export(tmp_path / "run", tmp_path / "out", ExportOptions("base"))
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    suppressed = [*range(VOCAB - 4, VOCAB), 4]  # rows without a token, then those of before
    stops = {"eos_token_id": [1, 7], "pad_token_id": 1, "bos_token_id": 0}
    assert written == before | stops | {"suppress_tokens": suppressed}
    export(tmp_path / "run", tmp_path / "thinking", ExportOptions())
    written = json.loads((tmp_path / "thinking/generation_config.json").read_text())
    assert written["suppress_tokens"] == [VOCAB, VOCAB + 1, *suppressed]
    (source / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        open_checkpoint(str(source))


def test_a_tokenizer_that_never_padded_pads_as_training_did(run, tmp_path):
    export(run, tmp_path / "out", ExportOptions("base"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(["w5", "w5 w6"], padding=True).input_ids == [[1, 0, 5], [0, 5, 6]]
    start_run(tmp_path / "again", tmp_path / "out", keep_thoughts=False)
    configured = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    configured.pad_token = "w9"
    configured.save_pretrained(tmp_path / "hf")
    start_run(tmp_path / "padded", tmp_path / "hf")
    export(tmp_path / "padded", tmp_path / "out2", ExportOptions("base"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out2")
    assert tokenizer(["w5", "w5 w6"], padding=True).input_ids == [[0, 5, 9], [0, 5, 6]]


def test_an_output_that_exists_is_refused(run, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        export(run, output, ExportOptions())
    assert [file.name for file in output.iterdir()] == ["mine.txt"]
    (output / "mine.txt").unlink()
    export(run, output, ExportOptions())
    assert (output / "config.json").exists()
    with pytest.raises(CheckpointError, match="exists already"):
        export(run, output / "config.json", ExportOptions())


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_save, "write_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*Free some"):
        export(run, tmp_path / "elsewhere/out", ExportOptions())
    assert not list((tmp_path / "elsewhere").iterdir())


KILLED = """
import sys, numpy as np
from pathlib import Path
from quietstar_jax.config import CheckpointConfig, Config
from quietstar_jax.architecture import Architecture
from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.export_hf.save import ExportOptions, Thoughts, save
from quietstar_jax.hf.names import parameter_shapes, quietstar_entries
from tests.export_hf.test_save import TINY, Constant

output = Path(sys.argv[1])
for i in range(10_000):
    tokenizer, options = load_tokenizer("synthetic"), ExportOptions(max_shard_size="1MB")
    save(output / f"out{i}", Constant(LARGE), LARGE, tokenizer, Thoughts(2, 100.0), options, "")
""".replace("LARGE", "TINY.__class__(**{**vars(TINY), 'vocab_size': 200, 'hidden_size': 512})")


class Constant:
    """Parameters that are all alike."""

    def __init__(self, architecture: Any, value: float = 1.0):
        self.shapes = parameter_shapes(quietstar_entries(architecture))
        self.value = value

    def read(self, target: Any) -> np.ndarray:
        return np.full(target.shape, self.value, np.float32)


def test_killed_at_any_moment_it_leaves_nothing_that_looks_complete(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 120

    def under_way() -> bool:
        try:
            return bool(list(tmp_path.glob("*.incomplete/model-*")) and list(tmp_path.glob("out0")))
        except FileNotFoundError:  # it was renamed in this moment
            return False

    while not under_way():
        assert process.poll() is None, "the exports ended before they could be killed"
        assert time.monotonic() < deadline, "no export was seen"
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = sorted(tmp_path.iterdir())
    complete = [folder for folder in left if "incomplete" not in folder.name]
    assert complete
    assert len(left) - len(complete) <= 1
    for folder in set(left) - set(complete):  # what was abandoned is removed by the next of its name
        with new_folder(tmp_path / folder.name.partition(".")[0]):
            assert not folder.exists()
    sizes = {sum(value.nbytes for value in tensors(folder).values()) for folder in complete}
    assert len(sizes) == 1
    for folder in left:
        if folder not in complete and not (folder / "config.json").exists():
            with pytest.raises(CheckpointError):
                open_checkpoint(str(folder))


def tiny_save(output: Path, parameters: Any = None, tokens: tuple[str, str] = (START, END), **options: Any) -> None:
    architecture = TINY.__class__(**{**vars(TINY), "vocab_size": 120})
    thoughts = Thoughts(2, 100.0, start_token=tokens[0], end_token=tokens[1])
    parameters = parameters or Constant(architecture)
    save(output, parameters, architecture, load_tokenizer("synthetic"), thoughts, ExportOptions(**options), "")


def test_values_that_do_not_fit_the_dtype_are_named(tmp_path):
    architecture = TINY.__class__(**{**vars(TINY), "vocab_size": 120})
    with pytest.raises(CheckpointError, match=r"embed_tokens.* float16: .*bfloat16"):
        tiny_save(tmp_path / "out", Constant(architecture, 7e4), dtype="float16")
    with pytest.raises(CheckpointError, match=r"embed_tokens.* not finite"):
        tiny_save(tmp_path / "out", Constant(architecture, np.nan))
    assert not list(tmp_path.iterdir())


def test_settings_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"max_shard_size is '5 GiBs'"):
        tiny_save(tmp_path / "out", max_shard_size="5 GiBs")
    with pytest.raises(ConfigError, match="'int8'; it must be one of float32"):
        ExportOptions(dtype="int8")
    with pytest.raises(ConfigError, match="'gguf'; it must be one of quietstar"):
        ExportOptions(format="gguf")
    with pytest.raises(ConfigError, match="two different texts"):
        tiny_save(tmp_path / "out", tokens=(START, START))
    with pytest.raises(CheckpointError, match=r"do not fit.*\n  - decoder.embedding: \(20, 8\), \(120, 8\)"):
        tiny_save(tmp_path / "out", Constant(TINY))
    assert not list(tmp_path.iterdir())


def test_the_command(run, tmp_path):
    out = tmp_path / "out"
    arguments = ("--output", out, "--format", "base", "--dtype", "bfloat16")
    done = run_command("export", "--checkpoint", run / "checkpoints", *arguments)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout
    assert tensors(out)["model.norm.weight"].dtype == ml_dtypes.bfloat16
    ended = run_command("export", "--checkpoint", run, "--output", tmp_path / "no", "--format", "base", "--step", 7)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert "has no checkpoint of step 7; it has 0" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_checkpoints_that_cannot_be_exported(run, tmp_path):
    def refusal(checkpoint: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            export(checkpoint, tmp_path / "out", ExportOptions())
        return str(error.value)

    assert "is not a folder" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "contains no checkpoint" in refusal(tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir()), "reading must not write"
    (run / "tokenizer").rename(run / "hidden")
    assert "tokenizer" in refusal(run)
    (run / "hidden").rename(run / "tokenizer")
    record = run / "checkpoints/0/config/metadata"
    kept = record.read_text()
    for text in ("{", "{}", json.dumps({**json.loads(kept), "architecture": {"vocab_size": "many"}})):
        edit(run / "checkpoints/0", "config", text)
        assert "config/metadata does not describe a run" in refusal(run)
    record.write_text(kept)
    for file in (run / "checkpoints/0/params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "is damaged" in refusal(run)
    assert not (tmp_path / "out").exists()


def test_a_run_of_other_settings_exports_what_it_was(tmp_path):
    """The record of the checkpoint decides, not the defaults of today."""
    start_run(tmp_path / "run", write_checkpoint(tmp_path / "hf"), embedding_scale=7.0, start_token="<think>")
    export(tmp_path / "run", tmp_path / "out", ExportOptions())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["thought_embedding_scale"] == 7.0
    assert config["thought_length"] == 6
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<think>") == VOCAB


MEASURE = """
import sys
from pathlib import Path
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.export_hf.export_run import export

def megabytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

before = megabytes()
export(Path(sys.argv[1]), Path(sys.argv[2]), ExportOptions(dtype="bfloat16", max_shard_size="60MB"))
print(megabytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_is_that_of_a_few_tensors_not_of_the_model(tmp_path):
    architecture = Architecture("llama", 4096, 1024, 3072, 8, 16, 8, 64)
    shapes = parameter_shapes(quietstar_entries(architecture))
    params = {name: jnp.asarray(np.resize(np.arange(4099, dtype=np.float32), s)) for name, s in shapes.items()}
    record = {"config": to_mapping(Config()), "architecture": to_mapping(architecture), "model_commit": ""}
    record["vocabulary"] = Vocabulary(0, (), (), ())._asdict()
    with Checkpoints(tmp_path / "run/checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(1), params, {"count": jnp.int32(1)}), {}, record)
    load_tokenizer("synthetic").save(tmp_path / "run/tokenizer")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "run"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    whole = sum(value.nbytes for value in params.values()) / 2**20
    grown = float(done.stdout)
    print(f"{grown:.0f} MB for {whole:.0f} MB of float32 masters")
    assert grown < whole / 2
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) / 2**20
    assert written == pytest.approx(whole / 2, rel=0.01)


ON_A_MESH = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 4)
from tests.export_hf.test_save import save_on_mesh
save_on_mesh(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def save_on_mesh(workdir: Path, checkpoint: Path) -> None:
    """As `start_run`, with every parameter split over four devices along its last even axis, layers stored apart."""
    checkpoints_module.LARGE_BYTES = 1000
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def split(value: jax.Array) -> jax.Array:
        axis = next((i for i in reversed(range(value.ndim)) if value.shape[i] % 4 == 0), None)
        spec = [("x" if i == axis else None) for i in range(value.ndim)]
        return jax.device_put(value, jax.NamedSharding(mesh, jax.P(*spec)))

    start_run(workdir, checkpoint, place=split)


def test_a_checkpoint_of_four_devices_exports_the_same_bytes(run, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_A_MESH, str(tmp_path / "mesh"), str(tmp_path / "hf")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    shardings = (tmp_path / "mesh/checkpoints/0/params/_sharding").read_text()
    assert "NamedSharding" in shardings
    for workdir in ("run", "mesh"):
        export(tmp_path / workdir, tmp_path / f"{workdir}_out", ExportOptions())
    one, four = (tmp_path / f"{workdir}_out" / "model.safetensors" for workdir in ("run", "mesh"))
    assert one.read_bytes() == four.read_bytes()


def test_the_torch_module_needs_nothing_of_ours():
    imported = set()
    for node in ast.walk(ast.parse(hf_save.MODULE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported <= {"__future__", "collections", "dataclasses", "typing", "torch", "transformers"}

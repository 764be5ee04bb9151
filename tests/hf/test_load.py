"""Checkpoints in: the table of names, streamed loading, and tensors that do not fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from quietstar_jax.architecture import Architecture
from quietstar_jax.hf.config_json import architecture_from_hf
from quietstar_jax.hf.files import open_checkpoint
from quietstar_jax.hf.load import build, load_parameters
from quietstar_jax.hf.names import Entry, decoder_entries, parameter_shapes, quietstar_entries, to_ours, to_theirs
from quietstar_jax.models.decoder import Decoder
from quietstar_jax.models.parameters import named_parameters
from quietstar_jax.thoughts.model import QuietStar
from tests.hf.checkpoints import ARCHITECTURES, TINY, load, load_decoder, random_tensors, refusal, write, write_sharded

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))


def collect(entry: Entry, parameters: dict[str, np.ndarray]) -> np.ndarray:
    """Their tensor of one entry, made from our stacked parameters."""
    return to_theirs(entry, [parameters[target.path][target.index] for target in entry.targets])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_table_names_every_parameter(architecture):
    decoder = nnx.eval_shape(lambda: Decoder(architecture, nnx.Rngs(0)))
    shapes = {path: value.shape for path, value in named_parameters(decoder).items()}
    assert parameter_shapes(decoder_entries(architecture)) == shapes


def test_the_table_names_every_parameter_of_a_thinking_model():
    def construct():
        zeros = jax.numpy.zeros(TINY.hidden_size)
        return QuietStar(Decoder(TINY, nnx.Rngs(0)), zeros, zeros, nnx.Rngs(0))

    shapes = {path: value.shape for path, value in named_parameters(nnx.eval_shape(construct)).items()}
    assert parameter_shapes(quietstar_entries(TINY)) == shapes


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_every_entry_goes_there_and_back_bit_for_bit(dtype):
    for architecture in ARCHITECTURES:
        for entry in quietstar_entries(architecture):
            theirs = np.random.default_rng(1).standard_normal(entry.shape).astype(dtype)
            back = to_theirs(entry, to_ours(entry, theirs))
            assert back.dtype == theirs.dtype
            assert back.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_weights_are_those_of_the_file(architecture, dtype, tmp_path):
    tensors = random_tensors(architecture, dtype)
    write(tmp_path, tensors, architecture)
    decoder = load(tmp_path)
    constructed = nnx.eval_shape(lambda: Decoder(architecture, nnx.Rngs(0)))
    assert jax.tree.structure(decoder) == jax.tree.structure(constructed)
    ours = {path: np.asarray(value[...]) for path, value in named_parameters(decoder).items()}
    assert all(value.dtype == np.float32 for value in ours.values())
    for entry in decoder_entries(architecture):
        np.testing.assert_array_equal(collect(entry, ours), tensors[entry.name].astype(np.float32))


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_published_names_of_a_thinking_checkpoint(file):
    golden = np.load(file)
    theirs = {name.removeprefix("param/"): golden[name] for name in golden.files if name.startswith("param/")}
    meta = json.loads(str(golden["meta_json"]))
    architecture = architecture_from_hf({"model_type": "mistral", **meta})
    infos = {name: SimpleNamespace(shape=value.shape, dtype="F32", file=file) for name, value in theirs.items()}
    source = SimpleNamespace(tensors=infos, read=theirs.__getitem__)
    ours = {path: np.asarray(value) for path, value in load_parameters(source, quietstar_entries(architecture)).items()}
    width = architecture.hidden_size
    np.testing.assert_array_equal(ours["mixing_head.base_in"], theirs["talk_head.0.0.weight"][:, :width].T)
    np.testing.assert_array_equal(ours["mixing_head.thought_in"], theirs["talk_head.0.0.weight"][:, width:].T)
    np.testing.assert_array_equal([ours["start_embedding"], ours["start_spare"]], theirs["start_embedding"])
    for entry in quietstar_entries(architecture):
        np.testing.assert_array_equal(collect(entry, ours), theirs[entry.name])


def test_shardings_are_respected(tmp_path):
    tensors = random_tensors(TINY)
    write(tmp_path, tensors)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    opened = open_checkpoint(str(tmp_path))
    decoder = load_decoder(opened, TINY, shardings=dict.fromkeys(parameter_shapes(decoder_entries(TINY)), sharding))
    assert all(value.sharding == sharding for value in jax.tree.leaves(decoder))
    np.testing.assert_array_equal(decoder.final_norm[...], tensors["model.norm.weight"])


def test_build_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"final_norm.*layers\.query"):
        build(lambda: Decoder(TINY, nnx.Rngs(0)), {"final_norm": jax.numpy.zeros(3)})


def test_shards_and_a_single_file_load_the_same(tmp_path):
    tensors = random_tensors(TINY)
    write(tmp_path / "single", tensors)
    write_sharded(tmp_path / "sharded", tensors)
    for one, other in zip(*(jax.tree.leaves(load(tmp_path / kind)) for kind in ("single", "sharded")), strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_tensor_that_does_not_fit_is_listed_at_once(tmp_path):
    tensors = random_tensors(TINY)
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["lm_head.weight"] = np.zeros((22, 8), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    tensors["model.layers.0.self_attn.o_proj.weight"] = np.zeros((8, 24), np.int8)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    message = refusal(write(tmp_path, tensors))
    for line in (
        "model.norm.weight: missing, expected [8]",
        "model.layers.1.mlp.up_proj.weight: missing",
        "lm_head.weight: shape [22, 8], expected [20, 8]",
        "model.layers.0.self_attn.q_proj.bias: unexpected, shape [24]",
        "model.layers.0.self_attn.o_proj.weight: dtype I8",
    ):
        assert line in message
    assert "inv_freq" not in message
    # Of what is there, the file; of what is not, none.
    problems = [line for line in message.splitlines() if line.startswith("  - ")]
    assert all(f"({tmp_path / 'model.safetensors'})" in line or "missing" in line for line in problems)


def test_values_that_are_not_finite_are_named(tmp_path):
    tensors = random_tensors(TINY, np.float64)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = np.inf
    tensors["model.norm.weight"][2] = 1e300  # beyond float32
    message = refusal(write(tmp_path, tensors))
    named = set(re.findall(rf"  - (\S+) \({re.escape(str(tmp_path))}/model\.safetensors\)", message))
    assert named == {f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)} | {"model.norm.weight"}


def test_tied_embeddings_with_a_head_in_the_file(tmp_path):
    architecture = ARCHITECTURES[1]
    tensors = random_tensors(architecture, ml_dtypes.bfloat16)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    assert not hasattr(load(write(tmp_path, tensors, architecture)), "lm_head")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:].copy()
    assert "lm_head.weight: shape [19, 8], expected [20, 8]" in refusal(write(tmp_path, tensors, architecture))


MEASURE = """
import sys, jax, numpy as np
from quietstar_jax.hf.files import open_checkpoint
from quietstar_jax.hf.load import load_parameters
from quietstar_jax.hf.names import decoder_entries, parameter_shapes
from quietstar_jax.hf.config_json import architecture_from_hf

def megabytes(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) / 1024

jax.config.update("jax_num_cpu_devices", 2)
sharded = sys.argv[2] == "sharded"
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
files = open_checkpoint(sys.argv[1])
architecture = architecture_from_hf(files.config)
shapes = parameter_shapes(decoder_entries(architecture))
half = lambda shape: jax.sharding.NamedSharding(mesh, jax.P(*[None] * (len(shape) - 1), "x"))
shardings = {path: half(shape) for path, shape in shapes.items()} if sharded else None
jax.block_until_ready(jax.device_put(np.zeros(8, np.float32)))
before = megabytes("VmHWM")
parameters = load_parameters(files, decoder_entries(architecture), shardings=shardings)
jax.block_until_ready(parameters)
total = sum(float(np.abs(shard.data).sum()) for x in parameters.values() for shard in x.addressable_shards)
print(megabytes("VmHWM") - before, total)
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    """200 MB in bfloat16, 400 MB as float32 masters: (folder, megabytes of masters, sum of their magnitudes)."""
    large = Architecture("llama", 8192, 1024, 3072, 8, 16, 8, 64, tie_embeddings=True)
    folder = write(tmp_path_factory.mktemp("large"), {}, large)
    pattern = (np.arange(2**22) % 64 / 64).astype(ml_dtypes.bfloat16)
    tensors = {e.name: np.resize(pattern, e.shape) for e in decoder_entries(large)}
    save_file(tensors, folder / "model.safetensors")
    total = sum(float(value.astype(np.float32).sum(dtype=np.float64)) for value in tensors.values())
    return folder, sum(value.size for value in tensors.values()) * 4 / 2**20, total


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("layout", ["one device", "sharded"])
def test_host_memory_never_holds_a_second_copy(layout, large_checkpoint):
    folder, masters, total = large_checkpoint
    run = subprocess.run([sys.executable, "-c", MEASURE, str(folder), layout], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    grown, found = map(float, run.stdout.split())
    print(f"{layout}: {grown:.0f} MB for {masters:.0f} MB of float32 masters")
    assert found == pytest.approx(total, rel=1e-3)
    assert masters * 0.9 < grown < masters * 1.4

"""Exports of large models: little memory, and parameters that several devices share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quietstar_jax.architecture import Architecture
from quietstar_jax.checkpoint import checkpoints as checkpoints_module
from quietstar_jax.checkpoint.checkpoints import Checkpoints
from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import CheckpointConfig, Config
from quietstar_jax.data.tokenization import load_tokenizer
from quietstar_jax.export_hf.export_run import export
from quietstar_jax.export_hf.save import ExportOptions
from quietstar_jax.hf.names import parameter_shapes, quietstar_entries
from quietstar_jax.settings import to_mapping
from quietstar_jax.thoughts.settings import Vocabulary
from tests.export_hf.exports import ROOT
from tests.hf.runs import start_run

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
from tests.export_hf.test_large import save_on_mesh
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

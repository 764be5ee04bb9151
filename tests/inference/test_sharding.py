"""A model that lies on two devices writes what it writes on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TWO_DEVICES = """
import dataclasses, sys
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 2)

from quietstar_jax.generate import Generator
from quietstar_jax.inference.load_model import load_model
from tests.hf.checkpoints import TINY, random_tensors, write
from tests.hf.runs import start_run, write_tokenizer

folder = Path(sys.argv[1])
architecture = dataclasses.replace(TINY, max_positions=64)
write(folder / "hf", random_tensors(architecture), architecture)
write_tokenizer(folder / "hf", architecture.vocab_size)
start_run(folder / "run", folder / "hf")
mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
split = {"query": (None, None, "tensor"), "gate": (None, None, "tensor"), "lm_head": (None, "tensor")}


def layout(shapes):
    return {name: NamedSharding(mesh, PartitionSpec(*split.get(name.split(".")[-1], ()))) for name in shapes}


one = Generator(load_model(folder / "run"), batch_size=2)
two = Generator(load_model(folder / "run", layout=layout), batch_size=2)
assert len(two.model.params["decoder.lm_head"].devices()) == 2
found = [[x.token_ids for x in generator.generate([[3], [4, 5, 6]], max_tokens=6)] for generator in (one, two)]
assert found[0] == found[1], found
assert two.compilations == 2, two.compilations
print("the same")
"""


@pytest.mark.slow
def test_two_devices_write_what_one_does(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TWO_DEVICES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.stdout.strip() == "the same", done.stderr

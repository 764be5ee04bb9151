"""The objective over a batch that is spread over devices, as `jax.jit` partitions it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TWO_DEVICES = """
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 2)

from quietstar_jax.models.parameters import merge, split
from quietstar_jax.thoughts.loss import quiet_star_loss
from quietstar_jax.thoughts.objective import count_targets
from tests.thoughts.cases import Case, random_model, relative_error, worst_errors

case = Case("sharded", mask=("1111111", "1111100"))
params, graphdef = split(random_model(case.decoder, case.thought.config.embedding_scale))
(tokens, mask), thoughts = case.text(), case.thoughts()


@jax.jit
def objective(params, tokens, mask, thoughts):
    counts = count_targets(mask, case.thought.tokens_ahead)
    return jax.value_and_grad(
        lambda params: quiet_star_loss(
            merge(graphdef, params), tokens, mask, lambda *_: thoughts, counts, case.thought, 3
        )[0]
    )(params)


def on(*axes):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


loss, gradient = objective(params, tokens, mask, thoughts)
spread = jax.device_put((tokens, mask, thoughts), on("data"))
assert len(spread[0].sharding.device_set) == 2
loss_2, gradient_2 = objective(jax.device_put(params, on()), *spread)
assert relative_error(loss_2, loss) < 1e-5
assert not worst_errors(gradient_2, gradient, 1e-4)
print("equal")
"""


def test_two_devices_give_the_loss_and_gradient_of_one() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.endswith("equal\n")

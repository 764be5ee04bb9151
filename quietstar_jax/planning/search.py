"""Searches for a mesh and a chunk size: tries the promising ones, best first."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from quietstar_jax.architecture import Architecture
from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import Config
from quietstar_jax.errors import ConfigError
from quietstar_jax.planning.plan import plan
from quietstar_jax.planning.programs import (
    VOCABULARY,
    bytes_per_device,
    chunk_sizes,
    find_phase,
    passes,
    plan_mesh,
    planned_state,
    with_mesh,
)
from quietstar_jax.planning.targets import Target
from quietstar_jax.thought_config import Phase
from quietstar_jax.thoughts.settings import phase_settings

SIZES = ("data", "fsdp", "tensor", "position")
GRADIENTS = 3  # arrays as large as the weights that learn, beside the training state: gradient of a chunk, sum, update
CHUNKS = (2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)  # multiples of the configured `chunk_megabytes`
CHUNK_COST = 2  # a chunk, with the gathered weights, may need this many times `chunk_megabytes`


class Candidate(NamedTuple):
    """A mesh to try.

    Attributes:
      tight: whether even the smallest chunks may need too much memory.
      guess: estimated seconds of communication per step.
      configs: its configurations, largest chunks first.
    """

    tight: bool
    guess: float
    configs: tuple[Config, ...]


def search(
    config: Config, target: Target, phase: str = "", *, tries: int, log: Callable[[str], object] = lambda line: None
) -> list[dict[str, Any]]:
    """Compiles up to `tries` configurations and returns their plans: those that fit first, fastest first.

    All shapes of the mesh over these devices are considered. Shapes whose weights cannot fit are left out; the others
    are tried in the order of their estimated communication, each with the largest chunks that may fit, and with smaller
    ones if these do not.

    Raises:
      ConfigError: no mesh shape suits model, batch and devices.
    """
    plans: list[dict[str, Any]] = []
    for candidate in candidates(config, target, phase):
        for attempt in candidate.configs:
            if len(plans) == tries:
                return ranked(plans)
            tried = plan(attempt, target, "train", phase)
            plans.append(tried)
            log(f"{len(plans)}/{tries}: mesh {tried['mesh']}, chunk {tried['chunk_megabytes']} MB: "
                f"{'fits' if tried['fits'] else 'does not fit'}")  # fmt: skip
            if tried["fits"]:
                break
    return ranked(plans)


def candidates(config: Config, target: Target, phase: str = "") -> list[Candidate]:
    """Returns the meshes that training would accept and whose weights may fit.

    They are sorted by communication, least first; tight ones are last.

    Raises:
      ConfigError: there is no such mesh.
    """
    meshes = sorted(_meshes(config, target, phase), key=lambda candidate: (candidate.tight, candidate.guess))
    if not meshes:
        raise ConfigError(
            f"No mesh of {len(target.devices)} devices suits the model and its batch, or each device would need too "
            "much memory. Use more devices, or a batch size that they can share evenly."
        )
    return meshes


def ranked(plans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorts plans: those that fit first, the fastest first; then the others, the smallest first."""

    def order(plan: dict[str, Any]) -> tuple[bool, float]:
        if plan["fits"]:
            return False, plan.get("seconds", {}).get("summed", plan["bytes_per_chip"]["total"])
        return True, plan["bytes_per_chip"].get("total", math.inf)

    return sorted(plans, key=order)


def _with_chunk(config: Config, share: float) -> Config:
    megabytes = max(1, int(config.thought.chunk_megabytes * share))
    return dataclasses.replace(config, thought=dataclasses.replace(config.thought, chunk_megabytes=megabytes))


def _meshes(config: Config, target: Target, phase_name: str) -> Iterator[Candidate]:
    """Yields all shapes of the mesh that training would accept and whose weights may fit."""
    count = len(target.devices)
    slices = len({getattr(device, "slice_index", 0) for device in target.devices})
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for sizes in itertools.product(divisors, repeat=len(SIZES)):
        if math.prod(sizes) != count:
            continue
        across = {"dcn_data": slices} if sizes[0] % slices == 0 else {"dcn_fsdp": slices}
        candidate = with_mesh(config, dict(zip(SIZES, sizes, strict=True)) | across)
        try:
            architecture, mesh = plan_mesh(candidate, target)
        except ConfigError:
            continue
        phase = find_phase(candidate, architecture, phase_name)
        state = planned_state(candidate, architecture, mesh, phase)
        needed = bytes_per_device(state) + GRADIENTS * bytes_per_device(state.params)
        left = (target.chip.hbm or math.inf) - needed
        if left < 0:
            continue
        chunk = CHUNK_COST * config.thought.chunk_megabytes * 2**20
        shares = [share for share in CHUNKS if chunk * share <= left] if phase.thought_length else [1.0]
        configs = tuple(_with_chunk(candidate, share) for share in shares or CHUNKS[-1:])
        with jax.set_mesh(mesh):
            chunks = chunk_sizes(configs[0], phase, architecture)
        yield Candidate(not shares, _guess(candidate, architecture, phase, target, chunks, state), configs)


def _guess(
    config: Config, a: Architecture, phase: Phase, target: Target, chunks: dict[str, int], state: TrainState
) -> float:
    """Estimated seconds of communication in a step; bytes if the rates are unknown.

    Weights are gathered over fsdp in every pass, and the gradients of those that learn scattered in every pass with a
    gradient. Each layer sums over tensor twice forward and twice backward, and gathers keys and values of the text over
    position. Gradients are summed over data and position once.
    """
    mesh, settings = config.mesh, phase_settings(config, phase, VOCABULARY)
    length = config.data.sequence_length
    without, with_gradient = passes(settings, phase.microbatches, chunks, math.ceil(length / mesh.position))
    weights, learned = (_parameters(part) / mesh.tensor for part in (state.weights, state.params))
    width, recompute = settings.dtype.itemsize, int(settings.rematerialize)
    read = weights * width * (without + (2 + recompute) * with_gradient)
    gathered = (1 - 1 / mesh.fsdp) * (read + 4 * learned * with_gradient)
    per_row = (
        settings.num_thoughts * (settings.thought_length + settings.chain_length * (2 + recompute))
        if settings.thought_length
        else 0
    )
    texts = phase.batch_size * length / (mesh.data * mesh.fsdp)
    split = 1 if length % mesh.position else mesh.position  # of the text in the base pass
    rows = texts * (per_row / mesh.position + 3 / split)
    summed = rows * a.hidden_size * a.num_layers * width * 4 * (1 - 1 / mesh.tensor)
    keys = 2 * a.num_kv_heads * a.head_dim / math.gcd(mesh.tensor, a.num_kv_heads)  # and values
    gathered += texts * keys * a.num_layers * width * (2 + recompute) * (1 - 1 / split)
    copies = mesh.data * mesh.position
    gradients = 8 * learned / mesh.fsdp * (1 - 1 / copies)
    return (gathered + summed + gradients) / (target.chip.axis_rate or 1.0)


def _parameters(weights: Mapping[str, Any]) -> int:
    return sum(math.prod(x.shape) for x in weights.values())

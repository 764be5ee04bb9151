"""Searches for a mesh and a chunk size: tries the promising ones, best first."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from quietstar_jax.architecture import Architecture
from quietstar_jax.config import Config
from quietstar_jax.errors import ConfigError
from quietstar_jax.planning.plan import plan
from quietstar_jax.planning.programs import VOCABULARY, chunk_sizes, find_phase, passes, plan_mesh, with_mesh
from quietstar_jax.planning.targets import Target
from quietstar_jax.thought_config import Phase
from quietstar_jax.thoughts.settings import phase_settings

SIZES = ("data", "fsdp", "tensor", "position")
STATE_BYTES = 24  # per parameter, all in float32: weight, two moments, gradient of a chunk, sum of gradients, update
REFERENCE_BYTES = 4  # per parameter, where thoughts are compared with a reference
CHUNKS = (2.0, 1.0, 0.5, 0.25, 0.125, 0.0625)  # multiples of the configured `chunk_megabytes`
CHUNK_COST = 2  # a chunk, with the gathered weights, may need this many times `chunk_megabytes`


class Candidate(NamedTuple):
    """A mesh to try: estimated seconds of communication per step, and its configurations, largest chunks first."""

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
    """Returns the meshes that training would accept and whose weights may fit, least communication first.

    Raises:
      ConfigError: there is no such mesh.
    """
    meshes = sorted(_meshes(config, target, phase), key=lambda candidate: candidate.guess)
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
        each = STATE_BYTES + (REFERENCE_BYTES if config.thought.needs_reference else 0)
        state = each * _parameters(architecture) / (sizes[1] * sizes[2])
        left = (target.chip.hbm or math.inf) - state
        if left < 0:
            continue
        chunk = CHUNK_COST * config.thought.chunk_megabytes * 2**20
        shares = [share for share in CHUNKS if chunk * share <= left] or CHUNKS[-1:]
        configs = tuple(_with_chunk(candidate, share) for share in shares)
        phase = find_phase(candidate, architecture, phase_name)
        with jax.set_mesh(mesh):
            chunks = chunk_sizes(configs[0], phase, architecture)
        yield Candidate(_guess(candidate, architecture, phase, target, chunks), configs)


def _parameters(a: Architecture) -> float:
    attention = a.hidden_size * a.head_dim * 2 * (a.num_heads + a.num_kv_heads)
    heads = (1 if a.tie_embeddings else 2) * a.vocab_size * a.hidden_size
    return a.num_layers * (attention + 3 * a.hidden_size * a.intermediate_size) + heads


def _guess(
    config: Config, a: Architecture, phase: Phase, target: Target, chunks: dict[str, int]
) -> float:  # fmt: skip
    """Estimated seconds of communication in a step; bytes if the rates are unknown.

    Weights are gathered over fsdp in every pass, and their gradients scattered in every pass with a gradient. Each
    layer sums over tensor twice forward and twice backward. Gradients are summed over data and position once.
    """
    mesh, settings = config.mesh, phase_settings(config, phase, VOCABULARY)
    length = config.data.sequence_length
    without, with_gradient = passes(settings, phase.microbatches, chunks, math.ceil(length / mesh.position))
    weights = _parameters(a) / mesh.tensor
    width, recompute = settings.dtype.itemsize, int(settings.rematerialize)
    gathered = weights * (1 - 1 / mesh.fsdp) * (width * (without + (2 + recompute) * with_gradient) + 4 * with_gradient)
    per_row = (
        settings.num_thoughts * (settings.thought_length + settings.chain_length * (2 + recompute))
        if settings.thought_length
        else 0
    )
    rows = phase.batch_size * length / (mesh.data * mesh.fsdp * mesh.position)
    summed = rows * (per_row + 3) * a.hidden_size * a.num_layers * width * 4 * (1 - 1 / mesh.tensor)
    copies = mesh.data * mesh.position
    gradients = 8 * weights / mesh.fsdp * (1 - 1 / copies)
    return (gathered + summed + gradients) / (target.chip.axis_rate or 1.0)

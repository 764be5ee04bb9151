"""The programs of training and generation, sharded over a mesh of devices that need not be attached."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from quietstar_jax.architecture import Architecture
from quietstar_jax.checkpoint.train_state import TrainState
from quietstar_jax.config import Config
from quietstar_jax.errors import ConfigError
from quietstar_jax.inference.decode_state import DecodeConfig, SamplingParams, State, with_thoughts
from quietstar_jax.inference.engine import Engine
from quietstar_jax.inference.kv_cache import empty_cache
from quietstar_jax.parallel.mesh import check_batches, check_kernels, make_mesh
from quietstar_jax.parallel.sharding import ROWS, find_process_shard
from quietstar_jax.planning.architectures import planned_architecture
from quietstar_jax.planning.targets import Target
from quietstar_jax.thought_config import Phase
from quietstar_jax.thoughts.chunks import max_positions_per_chunk, max_sampled_positions_per_chunk
from quietstar_jax.thoughts.flops import Flops, decoder_flops, step_flops
from quietstar_jax.thoughts.settings import ThoughtSettings, Vocabulary, phase_settings
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.evaluation import evaluation_settings
from quietstar_jax.training.setup import abstract_state, abstract_structure, check_length
from quietstar_jax.training.step import compile_train_step

# The values of these ids affect neither memory nor time.
VOCABULARY = Vocabulary(pad_id=0, meta_tokens=(1, 2), start_tokens=(1,), end_tokens=(2,), end_token=2, start_token=1)


@dataclass(frozen=True)
class Program:
    """A program before it is compiled.

    Attributes:
      what: one line about the work; sizes: facts about how it is split.
      lowered: the lowered program, ready to be compiled.
      bytes_per_device: of its arguments, by kind.
      flops: necessary FLOPs of all devices; recomputed: FLOPs that are computed a second time.
      tokens: number of text tokens that it processes.
      weight_reads: bytes of weights that each device reads from its memory, in all passes.
    """

    what: str
    sizes: dict[str, Any]
    lowered: Any
    bytes_per_device: dict[str, float]
    flops: float
    recomputed: float
    tokens: int
    weight_reads: float


def generate_program(config: Config, target: Target, phase_name: str = "") -> Program:
    """One call of the decoder: a token for each of `evaluation.batch_size` texts, after a thought as in evaluation.

    The cache is for `data.sequence_length` tokens, with the length and the sharding that `inference/engine.py` chooses.
    """
    architecture, mesh = plan_mesh(config, target)
    batch, settings = config.evaluation.batch_size, evaluation_settings(config, VOCABULARY)
    with jax.set_mesh(mesh):
        params = abstract_state(config, architecture, mesh).weights
        graphdef = abstract_structure(architecture, config.model.adapters, config.thought.heads)
        engine = Engine(params, graphdef, architecture, config.model.compute_dtype, batch)
        length = engine.cache_length(config.data.sequence_length)
        everywhere = NamedSharding(mesh, PartitionSpec())

        plan = DecodeConfig(thought=settings)

        def inputs() -> tuple[State, jax.Array, SamplingParams]:
            rows, scalar = jnp.zeros(batch, jnp.int32), jnp.float32(0)
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            cache = empty_cache(architecture, batch, length, settings.dtype, here)
            unread = jnp.zeros((batch, settings.reach - 1), jnp.int32) if settings.reach > 1 else None
            keys = jax.random.wrap_key_data(jnp.zeros((batch, 2), jnp.uint32), impl="threefry2x32")
            return (
                with_thoughts(State(cache, rows, rows, rows, unread), architecture, plan, here),
                rows > 0,
                SamplingParams(scalar, scalar, scalar, keys, jnp.zeros(0)),
            )

        state, alive, knobs = jax.tree.map(lambda x: _abstract(x, everywhere), jax.eval_shape(inputs))
        lowered = engine.step(plan).lower(params, state, alive, knobs)
    tokens = settings.reach + (settings.thought_length + 1 if settings.thought_length else 0)
    passes = settings.thought_length + (3 if plan.chooses else 1) + settings.reach - 1  # at most
    state_bytes = {"cache": bytes_per_device(state.cache)}
    if state.thought is not None:
        state_bytes["thoughts"] = bytes_per_device((state.thought, state.older))
    head = 2.0 * architecture.hidden_size * architecture.vocab_size
    gathered = sum(math.prod(x.shape) for x in params.values()) * settings.dtype.itemsize
    return Program(
        what=f"one token for {batch} texts of up to {length}, T {settings.thought_length}",
        sizes={},
        lowered=lowered,
        bytes_per_device={"parameters": bytes_per_device(params)} | state_bytes,
        flops=batch
        * (
            tokens * decoder_flops(architecture, length / 2, config.model.adapters)
            + (settings.thought_length + settings.reach) * head
        ),
        recomputed=0.0,
        tokens=batch,
        weight_reads=passes * gathered / (mesh.shape["tensor"] * mesh.shape["group"]),
    )


def find_phase(config: Config, architecture: Architecture, name: str = "") -> Phase:
    """Returns the phase with this name; without a name, the phase whose steps cost most.

    Raises:
      ConfigError: there is no phase with this name and with steps.
    """
    phases = {phase.name: phase for phase in config.phases if phase.steps}
    if not phases or name not in ("", *phases):
        names = ", ".join(phases) or "there are none"
        raise ConfigError(f"phase is {name!r}; it must be one of config.phases that have steps: {names}.")
    if name:
        return phases[name]
    return max(phases.values(), key=lambda phase: _flops(config, architecture, phase).necessary)


def planned_for(config: Config, target: Target) -> Config:
    """Returns the configuration to compile; a program for GPUs must not use the kernels of its substitute device."""
    if not target.name.startswith("gpu"):
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, prefix_attention="blocks"))


def plan_mesh(config: Config, target: Target) -> tuple[Architecture, Mesh]:
    """Returns the architecture and the mesh of a run on these devices.

    Raises:
      ConfigError: as when training starts.
    """
    architecture = planned_architecture(config.model)
    check_length(config, architecture)
    mesh = make_mesh(config.mesh, architecture, target.devices)
    check_batches(config, mesh)
    check_kernels(config.model.prefix_attention, mesh.devices.flat[0])
    return architecture, mesh


def train_program(config: Config, target: Target, phase_name: str = "") -> Program:
    """The step of a phase, as `training/loop.py` compiles it."""
    architecture, mesh = plan_mesh(config, target)
    phase = find_phase(config, architecture, phase_name)
    graphdef = abstract_structure(architecture, config.model.adapters, config.thought.heads)
    with jax.set_mesh(mesh):
        state = planned_state(config, architecture, mesh, phase)
        numbers = find_process_shard(mesh).numbers(phase.batch_size)
        step = compile_train_step(config, phase, graphdef, VOCABULARY, state, numbers)
        rows, everywhere = NamedSharding(mesh, ROWS), NamedSharding(mesh, PartitionSpec())
        shape = (phase.batch_size, config.data.sequence_length)
        starts = config.data.packing == "packed" and config.data.document_mask
        dtypes = (jnp.int32, bool, jnp.int32) if starts else (jnp.int32, bool)
        batch = Batch(*cast(Any, [jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in dtypes]))
        key, first = (_abstract(x, everywhere) for x in jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0))))
        lowered = step.lower(state, batch, key, first)
        chunks = chunk_sizes(config, phase, architecture)
    flops = _flops(config, architecture, phase)
    settings = phase_settings(config, phase, VOCABULARY)
    return Program(
        what=f"step of phase {phase.name!r}: batch {phase.batch_size} x {shape[1]}, R {phase.num_thoughts}, "
        f"T {phase.thought_length}, K {phase.tokens_ahead}, microbatches {phase.microbatches}",
        sizes=chunks,
        lowered=lowered,
        bytes_per_device={
            "parameters": bytes_per_device(state.params),
            **({"frozen": bytes_per_device(state.frozen)} if state.frozen else {}),
            "optimizer": bytes_per_device(state.opt_state),
            **({"reference": bytes_per_device(state.reference)} if state.reference else {}),
            "batch": bytes_per_device(batch),
        },
        flops=flops.necessary,
        recomputed=flops.recomputation,
        tokens=math.prod(shape),
        weight_reads=_weight_reads(state, settings, phase, mesh, chunks, shape[1]),
    )


def planned_state(config: Config, architecture: Architecture, mesh: Mesh, phase: Phase) -> TrainState:
    """Returns shapes, dtypes and shardings of the training state in a phase, with the reference if it has one."""
    start = next(span.start for span in config.phase_spans() if span.phase == phase)
    return abstract_state(config, architecture, mesh, step=start + 1)


def chunk_sizes(config: Config, phase: Phase, architecture: Architecture) -> dict[str, int]:
    """Positions per chunk on a device, for sampling and for scoring, under the mesh of the context."""
    if not phase.thought_length:
        return {}
    settings = phase_settings(config, phase, VOCABULARY)
    shape = (phase.batch_size // phase.microbatches, config.data.sequence_length)
    return {
        "positions_per_chunk": max_positions_per_chunk(architecture, settings, *shape),
        "sampled_positions_per_chunk": max_sampled_positions_per_chunk(architecture, settings, *shape),
    }


def passes(
    settings: ThoughtSettings, microbatches: int, chunks: dict[str, int], local_positions: int
) -> tuple[int, int]:
    """Number of forward passes through all layers in a step: (without a gradient, with a gradient).

    Those of the reference, which read its own weights, and of rewards of the whole batch are without a gradient.

    Args:
      local_positions: number of thinking positions on a device.
    """
    if not settings.thought_length:
        return 0, microbatches
    sampled = settings.thought_length * math.ceil(local_positions / chunks["sampled_positions_per_chunk"])
    scored = 1 + math.ceil(local_positions / chunks["positions_per_chunk"])  # the text, then the chains
    further = settings.needs_batch_rewards + settings.needs_reference
    return microbatches * (sampled + further * scored), microbatches * scored


def bytes_per_device(tree: Any) -> float:
    """Bytes of the shards of all arrays on one device; each array needs a sharding."""
    return float(
        sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    )  # fmt: skip


def _weight_reads(
    state: TrainState, settings: ThoughtSettings, phase: Phase, mesh: Mesh, chunks: dict[str, int], length: int
) -> float:
    """Bytes: every pass reads all gathered weights in the compute dtype; the update reads and writes the state."""
    local_positions = math.ceil(settings.thinking_positions(length) / mesh.shape["position"])
    without, with_gradient = passes(settings, phase.microbatches, chunks, local_positions)
    each = without + with_gradient * (4 if settings.rematerialize else 3)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.weights))
    gathered = count * settings.dtype.itemsize / (mesh.shape["tensor"] * mesh.shape["group"])
    return each * gathered + 2.5 * bytes_per_device((state.params, state.opt_state))


def _flops(config: Config, architecture: Architecture, phase: Phase) -> Flops:
    settings = phase_settings(config, phase, VOCABULARY)
    return step_flops(
        architecture, settings, phase.batch_size, config.data.sequence_length, phase.rates, config.model.adapters
    )


def _abstract(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def with_mesh(config: Config, sizes: dict[str, int]) -> Config:
    """Returns the configuration with other sizes of the mesh."""
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))

"""Time, memory and utilisation of the real training step: `python -m benchmarks.train_step --preset paper_cpu --json`.

With `--json`, prints one JSON object on the last line. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import matmul_rate, run
from quietstar_jax.architecture import Architecture
from quietstar_jax.config import Config, ModelConfig
from quietstar_jax.data_config import DataConfig
from quietstar_jax.models.parameters import GraphDef, merge, split
from quietstar_jax.thought_config import Phase, RateScales, ThoughtConfig
from quietstar_jax.thoughts.chunks import max_positions_per_chunk, max_sampled_positions_per_chunk
from quietstar_jax.thoughts.flops import step_flops
from quietstar_jax.thoughts.loss import quiet_star_loss
from quietstar_jax.thoughts.model import init_quiet_star
from quietstar_jax.thoughts.objective import count_targets
from quietstar_jax.thoughts.sample import Thoughts, sample_thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings, Vocabulary, phase_settings
from quietstar_jax.thoughts.text import read_text
from quietstar_jax.training.batch import Batch
from quietstar_jax.training.step import initial_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the decoder, the batch and the thoughts. Every field is a flag."""

    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    mlp: int = 768
    vocab: int = 4096
    tied: bool = False
    length: int = 256
    batch: int = 1
    microbatches: int = 1
    thoughts: int = 2
    thought_length: int = 9
    tokens_ahead: int = 4
    dtype: str = "float32"
    rematerialize: bool = False
    prefix_attention: str = ModelConfig.prefix_attention
    mixing_only: bool = False  # only the mixing head learns; necessary_flops still counts every gradient
    chunk_megabytes: int = ThoughtConfig.chunk_megabytes
    positions_per_chunk: int = 0
    positions: str = "all"
    position_fraction: float = 1.0
    positions_per_sequence: int = 0
    parts: bool = False  # measures the gradient of given thoughts and sampling apart, instead of the step
    profile: str = ""  # folder for a trace of the timed steps, to open in XProf or Perfetto


_QUICKSTART = Sizes(
    layers=3, hidden=128, heads=4, kv_heads=4, mlp=384, vocab=100, length=64, batch=16, thoughts=4, thought_length=6,
    tokens_ahead=2,
)  # fmt: skip
PRESETS = {
    "paper_cpu": Sizes(),  # the paper's (12, 4) on a model that two cores can train
    "quickstart": _QUICKSTART,
    "quickstart_plain": dataclasses.replace(_QUICKSTART, batch=64, thought_length=0),
    "long_thoughts": Sizes(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, mlp=128, vocab=1024, length=128,
                           thought_length=512, tokens_ahead=1, positions="random", positions_per_sequence=1),
    "half_billion": Sizes(layers=24, hidden=1024, heads=16, kv_heads=8, head_dim=64, mlp=4096, vocab=32000, length=1024,
                          batch=8, dtype="bfloat16", chunk_megabytes=8192),
    "mistral_7b": Sizes(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, vocab=32000, batch=8,
                        dtype="bfloat16", rematerialize=True, chunk_megabytes=4096),
}  # fmt: skip


VOCABULARY = Vocabulary(pad_id=0, meta_tokens=(), start_tokens=(1,), end_tokens=(2,), end_token=2, start_token=1)


def config_of(s: Sizes) -> Config:
    """The configuration of a run of these sizes."""
    architecture = Architecture(
        family="mistral", vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.mlp, num_layers=s.layers,
        num_heads=s.heads, num_kv_heads=s.kv_heads, head_dim=s.head_dim, tie_embeddings=s.tied, max_positions=1 << 16,
    )  # fmt: skip
    phase = Phase(
        batch_size=s.batch, microbatches=s.microbatches, thought_length=s.thought_length, num_thoughts=s.thoughts,
        tokens_ahead=s.tokens_ahead, policy_weight=1.0,
        rates=RateScales(decoder=0.0, thought_embeddings=0.0) if s.mixing_only else RateScales(),
    )  # fmt: skip
    model = ModelConfig(
        architecture=architecture, compute_dtype=s.dtype, rematerialize=s.rematerialize,
        prefix_attention=s.prefix_attention,
    )  # fmt: skip
    shared = ("chunk_megabytes", "positions_per_chunk", "positions", "position_fraction", "positions_per_sequence")
    thought = ThoughtConfig(**{name: getattr(s, name) for name in shared})
    return Config(model=model, thought=thought, phases=(phase,), data=DataConfig(sequence_length=s.length))


def measure(s: Sizes, steps: int) -> dict[str, Any]:
    """Compiles and times the train step of these sizes, or its parts."""
    config = config_of(s)
    architecture, phase = config.model.architecture, config.phases[0]
    settings = phase_settings(config, phase, VOCABULARY)

    model = jax.jit(
        lambda: init_quiet_star(architecture, [1], [2], config.thought.embedding_scale, jax.random.key(0))
    )()
    params, graphdef = split(model)
    tokens = np.random.default_rng(0).integers(3, s.vocab, (s.batch, s.length)).astype(np.int32)
    batch = Batch(jnp.asarray(tokens), jnp.ones(tokens.shape, bool))
    if s.parts:
        return measure_parts(batch, params, graphdef, settings, steps)
    state = initial_state(params, config)
    arguments = (batch, jax.random.key(1), jnp.int32(0))

    step = jax.jit(make_train_step(config, phase, graphdef, VOCABULARY), donate_argnums=0)
    start = time.perf_counter()
    compiled = step.lower(state, *arguments).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    state, metrics = jax.block_until_ready(compiled(state, *arguments))
    with jax.profiler.trace(s.profile) if s.profile else contextlib.nullcontext():
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, *arguments))
            seconds.append(time.perf_counter() - start)
    step_seconds = statistics.median(seconds)

    flops = step_flops(architecture, settings, s.batch, s.length, phase.rates)
    rate = matmul_rate(s.dtype)
    thought_tokens = s.batch * settings.thinking_positions(s.length) * s.thoughts * s.thought_length
    memory = compiled.memory_analysis()
    return {
        "step_seconds": step_seconds,
        "compile_seconds": compile_seconds,
        "necessary_flops": flops.necessary,
        "flops": flops._asdict(),
        "matmul_flops_per_second": rate,
        "utilisation": flops.necessary / (step_seconds * rate),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "thought_tokens_per_second": thought_tokens / step_seconds,
        "positions_per_chunk": max_positions_per_chunk(architecture, settings, s.batch // s.microbatches, s.length),
        "loss": float(metrics["loss"]),
        "device": jax.devices()[0].device_kind,
    }


def measure_parts(
    batch: Batch, params: dict[str, jax.Array], graphdef: GraphDef, settings: ThoughtSettings, steps: int
) -> dict[str, Any]:
    """Compiles and times the gradient of the loss with given thoughts, and sampling, each with its own base pass."""
    (tokens, mask, _), ahead = batch, settings.tokens_ahead
    (rows, length), architecture = tokens.shape, merge(graphdef, params).decoder.architecture
    count = settings.thinking_positions(length)
    positions = jnp.tile((jnp.arange(count) + 1) * (length - 2 - ahead) // (count + 1), (rows, 1))
    uniforms = jax.random.uniform(jax.random.key(1), (rows, settings.num_thoughts, count, settings.thought_length))
    given = Thoughts((uniforms * architecture.vocab_size).astype(jnp.int32), uniforms, -uniforms)
    counts, chunk = count_targets(mask, ahead, jnp.full(rows, count)), (architecture, settings, rows, length)

    @jax.grad
    def scoring(params: dict[str, jax.Array]) -> jax.Array:
        return quiet_star_loss(
            merge(graphdef, params), tokens, mask, lambda *_: given, counts, settings, max_positions_per_chunk(*chunk),
            choose=lambda _: positions,
        )[0]  # fmt: skip

    def sampling(params: dict[str, jax.Array]) -> Thoughts:
        model = merge(graphdef, params)
        text = read_text(model.decoder, tokens, mask, dtype=settings.dtype)
        return sample_thoughts(model, text, positions, uniforms, settings, max_sampled_positions_per_chunk(*chunk))

    measured = {}
    for name, part in (("scoring", scoring), ("sampling", sampling)):
        compiled, seconds = jax.jit(part).lower(params).compile(), []
        for _ in range(steps + 1):
            start = time.perf_counter()
            jax.block_until_ready(compiled(params))
            seconds.append(time.perf_counter() - start)
        measured[f"{name}_temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
        measured[f"{name}_seconds"] = statistics.median(seconds[1:])
    return measured


def main() -> None:
    """Parses the flags, measures, and prints."""
    run(__doc__, PRESETS, measure, steps=5, steps_help="timed steps after one of warm-up")


if __name__ == "__main__":
    main()

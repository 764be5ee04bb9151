"""Tokens per second, with and without thoughts: `python -m benchmarks.generate --preset paper_cpu --json`.

`--think POLICY` also measures a policy of thinking that chooses, and reports the passes that it needs for each token:
1 + rate * (T + 2), with the rate of the sequence that thinks most, which ends last. With random weights,
`every:10` and `random:0.1` have a known rate. In a batch, `every:10` is the best case: all sequences think at the same
tokens, and none waits for another. With `--stagger`, prompts differ in length, so that no two do.

`cpu_ratio` compares seconds of the processor, which other programs on the machine affect less than `ratio`.

With `--json`, prints one JSON object on the last line. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import run
from quietstar_jax.architecture import Architecture
from quietstar_jax.inference.decode_state import DecodeConfig, State
from quietstar_jax.inference.engine import Engine, Request
from quietstar_jax.inference.kv_cache import append, cached_pass
from quietstar_jax.inference.load_model import stored_dtype
from quietstar_jax.inference.sampling import Sampling
from quietstar_jax.methods.thinking import parse_policy
from quietstar_jax.models.parameters import merge, split
from quietstar_jax.thought_config import ThoughtConfig
from quietstar_jax.thoughts.chains import empty_chains
from quietstar_jax.thoughts.model import init_quiet_star
from quietstar_jax.thoughts.settings import ThoughtSettings


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the decoder, the prompts and the generated texts. Every field is a flag."""

    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    mlp: int = 768
    vocab: int = 4096
    tied: bool = False
    window: int = 0
    batch: int = 1
    prompt: int = 128  # tokens before the first generated one
    stagger: bool = False  # every prompt is a token shorter than the one before it
    tokens: int = 64  # generated for each prompt
    room: int = 0  # minimum length of the cache in tokens; 0 = as much as is needed
    thought_length: int = 9
    mixing: str = "hidden_states"
    think: str = ""  # policy of thinking that chooses; empty = none is measured
    temperature: float = 0.0
    top_p: float = 1.0
    tokens_per_call: int = 8
    dtype: str = "float32"


PRESETS = {
    "paper_cpu": Sizes(),  # the decoder of that name in `benchmarks.train_step`
    "quickstart": Sizes(layers=3, hidden=128, heads=4, kv_heads=4, mlp=384, vocab=100, prompt=24, tokens=32,
                        thought_length=6),
    "half_billion": Sizes(layers=24, hidden=1024, heads=16, kv_heads=8, head_dim=64, mlp=4096, vocab=32000, batch=8,
                          prompt=512, tokens=128, dtype="bfloat16"),
    "mistral_7b": Sizes(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336, vocab=32000, batch=8,
                        prompt=256, tokens=128, dtype="bfloat16"),
}  # fmt: skip


def make_engine(s: Sizes) -> Engine:
    """Returns an engine with random weights of these sizes, stored as in a loaded model."""
    architecture = Architecture(
        family="mistral", vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.mlp, num_layers=s.layers,
        num_heads=s.heads, num_kv_heads=s.kv_heads, head_dim=s.head_dim, tie_embeddings=s.tied,
        sliding_window=s.window, max_positions=1 << 16,
    )  # fmt: skip

    def weights() -> dict[str, jax.Array]:
        params, _ = split(init_quiet_star(architecture, [1], [2], ThoughtConfig.embedding_scale, jax.random.key(0)))
        return {name: value.astype(stored_dtype(name, s.dtype)) for name, value in params.items()}

    graphdef = split(
        jax.eval_shape(
            lambda: init_quiet_star(architecture, [1], [2], ThoughtConfig.embedding_scale, jax.random.key(0))
        )
    )[1]
    return Engine(jax.jit(weights)(), graphdef, architecture, s.dtype, s.batch)


def measure(s: Sizes, steps: int) -> dict[str, Any]:
    """Times the generation of whole texts, `steps` times, after the prompts have been read; the least time counts."""
    engine = make_engine(s)
    draw = np.random.default_rng(0)
    requests = [
        Request(
            tuple(draw.integers(3, s.vocab, s.prompt - row * s.stagger).tolist()), s.tokens,
            np.array([0, row], np.uint32),
        )
        for row in range(s.batch)
    ]  # fmt: skip
    length = engine.cache_length(max(s.room, requests[0].length))
    sampling = Sampling(s.temperature, s.top_p, think=parse_policy(s.think or "always"))
    wanted = np.ones(s.batch, bool)

    def start() -> State:
        return jax.block_until_ready(engine.start(requests, length))

    state = start()
    cache_bytes = sum(x.nbytes for x in state.cache)
    knobs = engine.knobs(requests, sampling)
    measured: dict[str, Any] = {}
    cases: dict[str, tuple[int, str]] = {
        "with_thoughts": (s.thought_length, "always"), "without_thoughts": (0, "always"),
    }  # fmt: skip
    if s.think:
        cases["with_policy"] = s.thought_length, sampling.think.name
    timed: dict[str, Callable[[State], Any]] = {}
    for name, (thought_length, think) in cases.items():
        plan = DecodeConfig(
            ThoughtSettings(thought_length, compute_dtype=s.dtype, config=ThoughtConfig(mixing=s.mixing)), think,
            sampled=s.temperature > 0, nucleus=s.temperature > 0 and s.top_p < 1, tokens_per_call=s.tokens_per_call,
        )  # fmt: skip
        begun = time.perf_counter()
        compiled = engine.step(plan).lower(engine.params, engine.with_thought(state, plan), wanted, knobs).compile()
        measured[f"compile_seconds_{name}"] = time.perf_counter() - begun
        measured[f"temp_bytes_{name}"] = compiled.memory_analysis().temp_size_in_bytes
        timed[name] = lambda state, plan=plan: list(engine.decode(state, knobs, plan, wanted))
    bare = bare_step(engine, s)
    timed |= {"bare": lambda state: bare(state, s.tokens)}
    seconds, cpu_seconds, prompt_seconds = least_seconds(timed, start, steps)
    for name in cases:
        measured[f"seconds_per_token_{name}"] = seconds[name] / s.tokens
        measured[f"tokens_per_second_{name}"] = s.batch * s.tokens / seconds[name]
        measured[f"cpu_seconds_per_token_{name}"] = cpu_seconds[name] / s.tokens
    plain, cpu_plain = seconds["without_thoughts"], cpu_seconds["without_thoughts"]
    if s.think:
        outputs = timed["with_policy"](start())
        made = sum(((one.tokens >= 0) & (one.thoughts[..., 0] >= 0)).sum(axis=0) for one in outputs)
        measured["thinking_rate"] = float(np.mean(made)) / s.tokens
        measured["ratio_with_policy"] = seconds["with_policy"] / plain
        measured["cpu_ratio_with_policy"] = cpu_seconds["with_policy"] / cpu_plain
        measured["passes_with_policy"] = 1 + float(np.max(made)) / s.tokens * (s.thought_length + 2)
    return measured | {
        "ratio": seconds["with_thoughts"] / plain,
        "cpu_ratio": cpu_seconds["with_thoughts"] / cpu_plain,
        "ratio_allowed": s.thought_length + 3,
        "seconds_per_bare_step": seconds["bare"] / s.tokens,
        "plain_to_bare": plain / seconds["bare"],
        "prompt_seconds": prompt_seconds,
        "cache_bytes": cache_bytes,
        "cache_length": length,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": jax.devices()[0].device_kind,
    }


def bare_step(engine: Engine, s: Sizes) -> Callable[[State, int], Any]:
    """The decoder alone, one token of every sequence per call: no sampling, no ends, no transfer to the host."""
    dtype = jnp.dtype(s.dtype)

    def step(params: Any, cache: Any, token: jax.Array, positions: jax.Array) -> tuple[Any, jax.Array]:
        decoder = merge(engine.graphdef, params).decoder
        own = empty_chains(decoder.architecture, s.batch, 1, 1, 1, dtype)
        hidden, own = cached_pass(decoder, decoder.embed(token, dtype)[:, None], jnp.int32(0), positions, cache, own)
        return append(cache, own, positions), decoder.logits(hidden[:, 0])

    compiled = jax.jit(step, donate_argnums=1)

    def run_steps(state: State, count: int) -> Any:
        cache, logits = state.cache, None
        token, last = np.asarray(state.token), np.asarray(state.position) - 1
        for n in range(count):
            cache, logits = compiled(engine.params, cache, token, last + np.int32(n))
        return jax.block_until_ready((cache, logits))

    return run_steps


def least_seconds(
    timed: Mapping[str, Callable[[State], Any]], start: Callable[[], State], rounds: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Times every case once in each round, after a round of warm-up, so that other load meets all cases alike.

    Returns:
      The least seconds of each case, the least seconds of the processor, and those of `start`.
    """
    seconds, cpu_seconds, starting = {name: [] for name in timed}, {name: [] for name in timed}, []
    for _ in range(rounds + 1):
        for name, fn in timed.items():
            begun = time.perf_counter()
            state = start()
            starting.append(time.perf_counter() - begun)
            begun, cpu_begun = time.perf_counter(), time.process_time()
            fn(state)
            seconds[name].append(time.perf_counter() - begun)
            cpu_seconds[name].append(time.process_time() - cpu_begun)
    least = [{name: min(values[1:]) for name, values in of.items()} for of in (seconds, cpu_seconds)]
    return least[0], least[1], min(starting[1:])


def main() -> None:
    """Parses the flags, measures, and prints."""
    run(__doc__, PRESETS, measure, steps=5, steps_help="timed rounds after one of warm-up")


if __name__ == "__main__":
    main()

"""All settings of a run: frozen dataclasses, validated once when they are built.

A file in `configs/` builds an `ml_collections.ConfigDict` with `default_config()` and changes some settings; the
command line may override any setting (`--config.data.sequence_length=512`). `from_config_dict` then converts it to a
`Config`; one error lists every unknown key, wrong type and impossible value. The settings of thoughts and phases are in
`thought_config.py`, those of text in `data_config.py`.

The type of a field determines which values it accepts and when a resumed run may change it (`OnResume`); the comment on
a field explains its meaning. `make docs` writes all of this to docs/configuration.md.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, get_args

import ml_collections

from quietstar_jax.architecture import Adapters, Architecture
from quietstar_jax.data_config import DataConfig
from quietstar_jax.errors import ConfigError
from quietstar_jax.methods.advantages import ADVANTAGES
from quietstar_jax.methods.mixings import REACHING
from quietstar_jax.methods.thinking import ALWAYS, NEVER, ThinkPolicy, parse_policy
from quietstar_jax.settings import (
    Below1,
    Check,
    Fraction,
    Int64,
    Measured,
    NonEmpty,
    NonNegative,
    OnResume,
    Positive,
    SameWeights,
    Unrelated,
    between,
    from_mapping,
    require,
    to_mapping,
    unknown,
)
from quietstar_jax.thought_config import Phase, Reach, ThoughtConfig

MOST_TOKENS = 2**31 - 1  # per batch
MOST_THOUGHT_TOKENS = 2**34  # per batch

ComputeDtype = Literal["float32", "bfloat16"]
PrefixAttention = Literal["auto", "blocks", "triton"]
PREFIX_ATTENTION = get_args(PrefixAttention)
Ways = Annotated[int, Check(lambda value: value > 0 or value == -1, "above 0, or -1")]


@dataclass(frozen=True)
class ModelConfig:
    """Where the decoder comes from and how it computes."""

    checkpoint: SameWeights[str] = ""  # Hugging Face folder or hub id (safetensors), or work directory of a run;
    # empty = random weights of `architecture`
    revision: SameWeights[str] = ""  # branch, tag or commit of a hub id
    architecture: Architecture = field(default_factory=Architecture)  # used only without `checkpoint`
    adapters: Adapters = field(default_factory=Adapters)
    adapter: SameWeights[str] = ""  # folder of a PEFT adapter (LoRA) from which `adapters` start; empty = new ones,
    # which have no effect at first
    frozen_dtype: ComputeDtype = "bfloat16"  # dtype in which weights that adapters freeze are stored; norms are float32
    compute_dtype: ComputeDtype = "float32"  # master weights, logits, losses and rewards are always float32
    rematerialize: Unrelated[bool] = False  # recompute layers in the backward pass, for the text and for the chains
    prefix_attention: Unrelated[PrefixAttention] = "auto"  # how thoughts attend to the text before them: `auto` is a
    # Pallas kernel on TPUs and XLA elsewhere, `blocks` is XLA, `triton` is a Pallas kernel for NVIDIA's A100, H100 and
    # other GPUs with 163 KiB of shared memory per program

    def conflicts(self) -> list[str]:
        adapted = self.adapters.maps != "none"
        return [
            *require(
                not adapted or bool(self.checkpoint), "checkpoint", self.checkpoint,
                "a model where adapters.maps is not 'none': checkpoints contain only what learns, and the rest is read "
                "from this model again",
            ),
            *require(
                adapted or not self.adapter, "adapter", self.adapter,
                "empty where adapters.maps is 'none'; set adapters to the maps, rank and alpha of this adapter",
            ),
        ]  # fmt: skip


class PhaseSpan(NamedTuple):
    """A phase and its part of a run."""

    phase: Phase
    start: int  # number of steps done when the phase begins
    end: int  # number of steps done when the phase ends


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and gradient clipping."""

    b1: Below1 = 0.9  # decay rate of the first Adam moment
    b2: Below1 = 0.999  # decay rate of the second Adam moment
    eps: Positive[float] = 1e-8  # added to the root of the second moment
    weight_decay: NonNegative[float] = 0.001  # decoupled weight decay, multiplied by the learning rate
    decay_mask: Literal["matrices", "all"] = "matrices"  # weights that decay; `matrices` = all but norms and biases
    clip_norm: NonNegative[float] = 1.0  # maximum norm of the whole gradient; 0 = no clipping


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation with greedy thoughts, for all tokens and for each tenth of the tokens."""

    every_steps: NonNegative[int] = 10  # 0 = only at the end of each phase
    batches: NonNegative[int] = 8  # 0 = the whole validation set
    batch_size: Positive[int] = 8  # sequences per batch, over all devices
    thought_length: NonNegative[int] = 0  # T in evaluation; 0 = the largest T of all phases
    tokens_ahead: Positive[int] = 1  # K in evaluation
    reach: Reach = 1  # number of tokens after a thought for which it is used, see docs/evaluation.md; above 1 only with
    # `thought.mixing='probabilities'`, and `tokens_ahead` is then at least this
    think: str = "always"  # policy that chooses which positions think, as for `evaluate --think`; not `never`, not
    # `gate`, and only `always` with `thought.gate`

    @property
    def policy(self) -> ThinkPolicy:
        """`think` as a policy."""
        return parse_policy(self.think)

    def conflicts(self) -> list[str]:
        try:
            thinks = self.policy != NEVER
        except ConfigError as error:
            return [str(error)]
        return require(thinks, "think", self.think, "a policy that makes thoughts")

    @property
    def scored_ahead(self) -> int:
        """K in evaluation: `tokens_ahead`, or as many tokens as a thought is used for."""
        return max(self.tokens_ahead, self.reach)


@dataclass(frozen=True)
class MeshConfig:
    """How many ways each kind of work is sharded; the product of the first four sizes is the number of devices."""

    data: Ways = -1  # the sequences of a batch; one of the four sizes may be -1, which means all remaining devices
    fsdp: Ways = 1  # also sequences; each weight is sharded as many ways, and gathered where it is used
    tensor: Ways = 1  # heads, feed-forward and vocabulary
    position: Ways = 1  # positions of the text whose thoughts are computed in parallel
    dcn_data: Positive[int] = 1  # how many ways of `data` span slices of a TPU pod (or nodes), over the slower
    # network
    dcn_fsdp: Positive[int] = 1  # the same for `fsdp`; the product of the two is the number of slices (or processes)

    def conflicts(self) -> list[str]:
        free = [name for name in ("data", "fsdp", "tensor", "position") if getattr(self, name) == -1]
        return require(len(free) < 2, " and ".join(free), -1, "-1 in only one place")


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of one run find each other."""

    processes: Literal["single", "cluster", "given"] = "single"  # `cluster` = from the environment of a TPU pod, SLURM,
    # Open MPI or Kubernetes; `given` = from the next three settings
    coordinator: str = ""  # given: host:port of process 0, the same on all
    num_processes: int = 0  # given: how many processes the run has
    process_id: int = -1  # given: 0 .. num_processes - 1
    start_seconds: Annotated[int, between(1, 10**7)] = 300  # how long to wait for the other processes at the start
    heartbeat_seconds: Annotated[int, between(10, 10**7)] = 100  # the other processes stop if one sends no heartbeat
    # for this long

    def conflicts(self) -> list[str]:
        if self.processes != "given":
            return []
        host, _, port = self.coordinator.rpartition(":")
        count = self.num_processes
        return [
            *require(bool(host) and port.isdigit(), "coordinator", self.coordinator, "host:port"),
            *require(count > 0, "num_processes", count, "at least 1"),
            *require(0 <= self.process_id < max(count, 1), "process_id", self.process_id, f"within 0 .. {count - 1}"),
        ]


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every_steps: Positive[int] = 50  # a checkpoint is always written at the end
    keep_latest: Positive[int] = 2  # how many of the newest checkpoints are kept
    keep_every_steps: NonNegative[int] = 0  # checkpoints at multiples of this are never deleted; 0 = none
    keep_phase_ends: bool = False  # write one at the end of each phase and never delete it; another run may start
    # from it
    asynchronous: bool = True  # write checkpoints while training continues


@dataclass(frozen=True)
class LoggingConfig:
    """Metrics are always written to `metrics.jsonl` in the work directory and to the terminal."""

    every_steps: Positive[int] = 1  # steps between two records of training metrics
    progress_bar: bool = True  # show a status line, on standard error
    tensorboard: bool = False  # also write metrics for TensorBoard, in the work directory
    wandb_project: str = ""  # also send metrics to this project of Weights & Biases; empty = no
    profile_steps: tuple[Positive[int], ...] = ()  # (first, last) step to record with the profiler of JAX, into the
    # folder `profile` of the work directory; () = none
    collapse_entropy: NonNegative[float] = 0.05  # nats per token: warn if the `entropy` of thoughts is below this and
    # `frac_reward_zero_std` above the next setting for 3 consecutive steps; 0 = never
    collapse_zero_std: Fraction = 0.9  # see `collapse_entropy`
    stop_on_collapse: bool = False  # save a checkpoint and stop with an error, instead of only warning

    def conflicts(self) -> list[str]:
        window = self.profile_steps
        return require(
            not window or (len(window) == 2 and window[0] <= window[1]), "profile_steps", window,
            "() or two steps, the first and the last that are recorded, such as (10, 12)",
        )  # fmt: skip


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: NonNegative[Int64] = 0  # of the weights, the order of the text and the samples
    workdir: Unrelated[NonEmpty[str]] = "runs/default"  # checkpoints, metrics and summary; a run with the same workdir
    # resumes
    model: ModelConfig = field(default_factory=ModelConfig)
    thought: ThoughtConfig = field(default_factory=ThoughtConfig)
    phases: Annotated[NonEmpty[tuple[Phase, ...]], OnResume.NOT_BEGUN] = (Phase(),)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: Measured[EvaluationConfig] = field(default_factory=EvaluationConfig)
    mesh: Unrelated[MeshConfig] = field(default_factory=MeshConfig)
    distributed: Unrelated[DistributedConfig] = field(default_factory=DistributedConfig)
    checkpoint: Unrelated[CheckpointConfig] = field(default_factory=CheckpointConfig)
    logging: Unrelated[LoggingConfig] = field(default_factory=LoggingConfig)

    def conflicts(self) -> list[str]:
        length, names = self.data.sequence_length, [phase.name for phase in self.phases]
        problems = require(len(set(names)) == len(names), "phases", names, "a list of phases with different names")
        problems += require(
            self.evaluation.reach == 1 or self.thought.mixing in REACHING, "evaluation.reach", self.evaluation.reach,
            f"1 unless thought.mixing is {' or '.join(REACHING)} (it is {self.thought.mixing!r})",
        )  # fmt: skip
        problems += require(
            self.evaluation.reach == 1 or not self.thought.gate, "evaluation.reach", self.evaluation.reach,
            "1 with thought.gate: its figures at each thinking rate need thoughts that are used for one token",
        )  # fmt: skip
        policy = self.evaluation.policy
        problems += require(
            policy == ALWAYS or not self.thought.gate, "evaluation.think", self.evaluation.think,
            "'always' with thought.gate: its figures at each thinking rate need all thoughts",
        )  # fmt: skip
        problems += require(
            not policy.needs_gate, "evaluation.think", self.evaluation.think, "a policy that needs no thinking gate"
        )
        problems += require(
            self.thought.positions != "start" or self.data.packing != "packed" or self.data.document_mask,
            "data.document_mask", self.data.document_mask,
            "True where thought.positions is 'start', which leaves out documents with written thoughts",
        )  # fmt: skip
        if self.total_steps >= 2**31:
            problems.append(f"phases has {self.total_steps} steps in total; it must have fewer than 2^31")
        groups: list[tuple[str, Phase | EvaluationConfig, int]] = [("evaluation", self.evaluation, 1)]
        groups += [(f"phases[{i}]", phase, phase.num_thoughts) for i, phase in enumerate(self.phases)]
        for i, phase in enumerate(self.phases):
            needs_others = ADVANTAGES[self.thought.advantage].traits["one_thought_is_zero"]
            problems += require(
                not (self.reinforces(phase) and needs_others) or phase.num_thoughts > 1, f"phases[{i}].num_thoughts",
                phase.num_thoughts,
                f"at least 2 with the advantage {self.thought.advantage}, which is 0 for a single thought",
            )  # fmt: skip
            gated, ahead = self.thought.gate and phase.thought_length, self.thought.gate_tokens_ahead
            problems += require(
                not gated or phase.tokens_ahead >= ahead, "thought.gate_tokens_ahead", ahead,
                f"at most phases[{i}].tokens_ahead = {phase.tokens_ahead}",
            )  # fmt: skip
            student = phase.thought_length and phase.rates.move_decoder(self.model.adapters)
            rate = "decoder" if self.model.adapters.maps == "none" else "adapters"
            problems += require(
                bool(student) or not phase.distill_weight, f"phases[{i}].distill_weight", phase.distill_weight,
                f"0 where thought_length or rates.{rate} is 0: there is no teacher, or nothing that learns from it",
            )  # fmt: skip
        for path, group, thoughts in groups:
            tokens, ahead = group.batch_size * length, group.tokens_ahead
            most = f"at most {MOST_TOKENS // length} with sequences of {length} tokens"
            problems += require(tokens <= MOST_TOKENS, f"{path}.batch_size", group.batch_size, most)
            if (sampled := tokens * thoughts * (group.thought_length + ahead)) > MOST_THOUGHT_TOKENS:
                problems.append(
                    f"{path} has thoughts of {sampled} tokens in a batch; they must be at most {MOST_THOUGHT_TOKENS}. "
                    "Reduce batch_size, num_thoughts, thought_length or tokens_ahead"
                )
            if group is self.evaluation or group.thought_length:
                least = f"at least {path}.tokens_ahead + 2 = {ahead + 2}"
                problems += require(length >= ahead + 2, "data.sequence_length", length, least)
        return problems

    def phase_spans(self) -> list[PhaseSpan]:
        """Returns the phases in order, each with the number of steps done when it begins and ends."""
        ends = [0, *itertools.accumulate(phase.steps for phase in self.phases)]
        return list(map(PhaseSpan, self.phases, ends, ends[1:]))

    @property
    def thinking_start(self) -> int | None:
        """Number of steps done when the first phase with thoughts begins; None if there is no such phase."""
        return next((span.start for span in self.phase_spans() if span.phase.steps and span.phase.thought_length), None)

    @property
    def policy_start(self) -> int | None:
        """Number of steps done when the first phase that trains thoughts begins; None if there is no such phase."""
        spans = self.phase_spans()
        return next((span.start for span in spans if span.phase.steps and self.reinforces(span.phase)), None)

    def reinforces(self, phase: Phase) -> bool:
        """Whether REINFORCE trains the thoughts of a phase, see `Phase.reinforces`."""
        return phase.reinforces(self.model.adapters, self.thought.control)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    @property
    def evaluation_thought_length(self) -> int:
        """T of the greedy thoughts in evaluation; 0 = the run never thinks."""
        return self.evaluation.thought_length or max(phase.thought_length for phase in self.phases)


def default_config() -> ml_collections.ConfigDict:
    """Returns every field with its default, to be changed by a file in `configs/`."""
    return to_config_dict(Config())


def phase(**changes: Any) -> ml_collections.ConfigDict:
    """Returns one phase for `config.phases`; fields that are not given keep their defaults."""
    known = to_mapping(Phase())
    if problems := [unknown("phase", name, list(known)) for name in changes if name not in known]:
        raise ConfigError("; ".join(problems))
    return ml_collections.ConfigDict({**known, **changes}, sort_keys=False)


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The inverse of `from_config_dict`."""
    mapping = to_mapping(config)
    mapping["phases"] = [ml_collections.ConfigDict(item, sort_keys=False) for item in mapping["phases"]]
    return ml_collections.ConfigDict(mapping, sort_keys=False)


def from_config_dict(config: ml_collections.ConfigDict | dict) -> Config:
    """Checks and freezes a configuration.

    Raises:
      ConfigError: lists every unknown key, wrong type and impossible value.
    """
    return from_mapping(Config, config)

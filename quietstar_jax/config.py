"""All settings of a run: frozen dataclasses, validated once when they are built.

A file in `configs/` builds an `ml_collections.ConfigDict` with `default_config()` and changes what it
needs; the command line may override any field (`--config.data.sequence_length=512`). `from_config_dict`
then converts it to a `Config`; one error lists every unknown key, wrong type and impossible value.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import ml_collections

from quietstar_jax.architecture import Architecture
from quietstar_jax.errors import ConfigError
from quietstar_jax.settings import from_mapping, one_of, require, to_mapping
from quietstar_jax.thoughts.advantages import ADVANTAGES

INT64 = {"bits": 64}  # field metadata
MOST_TOKENS = 2**31 - 1  # per batch
MOST_THOUGHT_TOKENS = 2**34  # per batch
MOST_WORKERS = 1024
MOST_SECONDS = 10**7


PREFIX_ATTENTION = ("auto", "blocks", "triton")
CONTROLS = ("none", "pause", "random", "shuffled")


@dataclass(frozen=True)
class ModelConfig:
    """Where the decoder comes from and how it computes."""

    checkpoint: str = ""  # Hugging Face folder or hub id, or work directory of a run; empty = random weights of
    # `architecture`
    revision: str = ""  # branch, tag or commit of a hub id
    architecture: Architecture = field(default_factory=Architecture)  # used only without `checkpoint`
    compute_dtype: str = "float32"  # float32 | bfloat16; master weights, logits and losses are always float32
    rematerialize: bool = False  # recompute whole layers in the backward pass, for the text and for the chains
    prefix_attention: str = "auto"  # how thoughts attend to the text before them: auto (a Pallas kernel on TPUs, XLA
    # elsewhere) | blocks (XLA) | triton (a Pallas kernel for NVIDIA's A100, H100 and other GPUs with 163 KiB
    # of shared memory per program)

    def problems(self) -> list[str]:
        return [
            *one_of("compute_dtype", self.compute_dtype, ("float32", "bfloat16")),
            *one_of("prefix_attention", self.prefix_attention, PREFIX_ATTENTION),
        ]


@dataclass(frozen=True)
class ThoughtConfig:
    """How thoughts are sampled, mixed and rewarded (paper section 4; lengths and counts are set per phase)."""

    start_token: str = "<|startthought|>"  # masked out of every thought if the tokenizer has it
    end_token: str = "<|endthought|>"
    initial_start_token: str = "---"  # text whose mean embedding initializes the start embedding
    initial_end_token: str = "---"
    embedding_scale: float = 100.0  # both embeddings are stored divided by this: Adam moves them that much faster
    sampling_temperature: float = 1.0
    score_temperature: float = 3.0  # of the log-probabilities that REINFORCE raises
    reward: str = "information_gain"  # of a thought, see docs/objectives.md
    discount: float = 1.0  # the token k = 0 .. K - 1 after a thought counts discount^k in its reward
    advantage: str = "mean"  # of a thought over the others of its position, see docs/objectives.md
    advantage_scale: str = "none"  # none | batch: divide advantages by their standard deviation over the batch
    advantage_clip: float = 0.0  # bound of the absolute value of an advantage, after the scale; 0 = none
    positive_only: bool = True  # drop negative advantages
    policy_reduction: str = "mean"  # over the tokens of a thought: mean (published code) | sum (paper) | sum_over_max,
    # the sum divided by the longest thought length of the run
    importance_cap: float = 0.0  # weight each thought token by min(ratio, cap) of its probability in scoring to that in
    # sampling, which corrects for different temperatures; 0 = off
    clip_epsilon: float = 0.0  # clip this ratio to 1 +- epsilon in PPO's surrogate; 0 = off
    entropy_bonus: float = 0.0  # weight of the entropy of thought tokens at temperature 1, in nats, which is maximized
    entropy_target: float = 0.0  # nats; entropy_bonus changes by entropy_bonus_step per step to hold it; 0 = constant
    entropy_bonus_step: float = 0.001
    entropy_bonus_max: float = 1.0  # largest adapted entropy_bonus
    kl_weight: float = 0.0  # weight of the KL divergence of thought tokens to the initial weights, which are then kept
    kl_in_reward: float = 0.0  # the reward falls by this for each nat by which the thought is likelier than under the
    # initial weights (LaTRO)
    talk_reduction: str = "mean"  # mean (published) over the thoughts of a position | log_mean_exp, their ensemble
    mixing: str = "hidden_states"  # hidden_states (published code) | log_probabilities (paper) | none (thought alone)
    control: str = "none"  # none | pause | random | shuffled: what replaces the thoughts, to measure their effect
    base_loss_weight: float = 0.5  # weight of the loss without thoughts in the total
    talk_loss_weight: float = -1.0  # weight of the loss with thoughts; -1 = 1 - base_loss_weight
    positions: str = "all"  # all | stride | random | entropy (least certain predictions): which positions think in
    # training; in evaluation every position thinks
    position_fraction: float = 1.0  # fraction of positions that think; the cost falls with it
    positions_per_chunk: int = 0  # positions whose chains are in memory together; 0 = from `chunk_megabytes`
    chunk_megabytes: int = 256  # memory budget for the activations of one chunk, per device

    @property
    def talk_weight(self) -> float:
        """Weight of the loss with thoughts."""
        return 1.0 - self.base_loss_weight if self.talk_loss_weight == -1 else self.talk_loss_weight

    @property
    def needs_batch_rewards(self) -> bool:
        """Whether advantages depend on all rewards of the batch, which costs one more forward pass."""
        return self.advantage_scale == "batch" or bool(ADVANTAGES[self.advantage].traits.get("needs_batch_std"))

    @property
    def needs_reference(self) -> bool:
        """Whether the initial weights are kept, as a reference."""
        return self.kl_weight > 0 or self.kl_in_reward > 0

    def problems(self) -> list[str]:
        return [
            *one_of("policy_reduction", self.policy_reduction, ("mean", "sum")),
            *one_of("mixing", self.mixing, ("hidden_states", "log_probabilities", "none")),
            *one_of("control", self.control, CONTROLS),
            *require(self.embedding_scale > 0, "embedding_scale", self.embedding_scale, "a positive number"),
            *require(self.sampling_temperature > 0, "sampling_temperature", self.sampling_temperature, "above 0"),
            *require(self.score_temperature > 0, "score_temperature", self.score_temperature, "above 0"),
            *require(0 <= self.base_loss_weight <= 1, "base_loss_weight", self.base_loss_weight, "within 0 .. 1"),
            *one_of("positions", self.positions, ("all", "stride", "random", "entropy")),
            *require(0 < self.position_fraction <= 1, "position_fraction", self.position_fraction, "above 0, up to 1"),
            *require(
                self.positions != "all" or self.position_fraction == 1.0,
                "position_fraction", self.position_fraction, "1.0 where positions is 'all'; choose how: stride, random "
                "or entropy",
            ),
            *require(
                self.positions != "stride" or _is_reciprocal(self.position_fraction),
                "position_fraction", self.position_fraction, "1/n for positions='stride', every n-th position",
            ),
            *require(self.positions_per_chunk >= 0, "positions_per_chunk", self.positions_per_chunk, "0 or more"),
            *require(self.chunk_megabytes > 0, "chunk_megabytes", self.chunk_megabytes, "at least 1"),
        ]  # fmt: skip


def _is_reciprocal(x: float) -> bool:
    """Whether x is 1/n for an integer n, up to a relative error of 1e-3."""
    return x > 1e-9 and math.isclose(1 / x, round(1 / x), rel_tol=1e-3)


@dataclass(frozen=True)
class RateScales:
    """Learning rates of the three groups of weights, as multiples of the phase's; 0 freezes a group."""

    decoder: float = 1.0
    mixing_head: float = 1.0
    thought_embeddings: float = 1.0

    def problems(self) -> list[str]:
        return [
            p
            for f in dataclasses.fields(self)
            for p in require(getattr(self, f.name) >= 0, f.name, getattr(self, f.name), "0 or more")
        ]


@dataclass(frozen=True)
class Phase:
    """One phase of training, with constant settings. Phases run in order; a curriculum is a list of phases."""

    name: str = "thoughts"
    steps: int = 100
    batch_size: int = 8  # sequences per optimizer step, over all devices
    microbatches: int = 1  # gradient accumulation: the batch is split into this many pieces
    thought_length: int = 9  # T, sampled tokens of a thought; 0 = plain language modelling
    num_thoughts: int = 2  # R, thoughts per position
    tokens_ahead: int = 4  # K, true tokens scored after a thought
    policy_weight: float = 1e6  # weight of the REINFORCE term; 0 = thoughts are not trained
    distill_weight: float = 0.0  # weight of KL(with thoughts || without), which teaches the prediction without thoughts
    learning_rate: float = 1e-6
    warmup_steps: int = 20
    decay: str = "constant"  # constant | linear | cosine, after the warm-up
    final_rate_fraction: float = 0.0  # the decay ends at this fraction of learning_rate
    rates: RateScales = field(default_factory=RateScales)
    fresh_optimizer: bool = False  # reset the Adam moments, so that weights frozen until now get no outsized updates

    def problems(self) -> list[str]:
        return [
            *require(self.name != "", "name", self.name, "a name"),
            *require(self.steps >= 0, "steps", self.steps, "0 or more"),
            *require(self.batch_size > 0, "batch_size", self.batch_size, "at least 1"),
            *require(
                self.microbatches > 0 and self.batch_size % self.microbatches == 0,
                "microbatches", self.microbatches, f"a divisor of batch_size ({self.batch_size})",
            ),
            *require(self.thought_length >= 0, "thought_length", self.thought_length, "0 (no thoughts) or more"),
            *require(self.num_thoughts > 0, "num_thoughts", self.num_thoughts, "at least 1"),
            *require(self.tokens_ahead > 0, "tokens_ahead", self.tokens_ahead, "at least 1"),
            *require(self.policy_weight >= 0, "policy_weight", self.policy_weight, "0 or more"),
            *require(self.learning_rate >= 0, "learning_rate", self.learning_rate, "0 or more"),
            *require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more"),
            *one_of("decay", self.decay, ("constant", "linear", "cosine")),
            *require(0 <= self.final_rate_fraction <= 1, "final_rate_fraction", self.final_rate_fraction, "0 .. 1"),
        ]  # fmt: skip


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and gradient clipping."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.001
    decay_mask: str = "matrices"  # matrices (all but norms and biases) | all
    clip_norm: float = 1.0  # maximum norm of the whole gradient; 0 = no clipping

    def problems(self) -> list[str]:
        return [
            *require(0 <= self.b1 < 1, "b1", self.b1, "within [0, 1)"),
            *require(0 <= self.b2 < 1, "b2", self.b2, "within [0, 1)"),
            *require(self.eps > 0, "eps", self.eps, "a positive number"),
            *require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more"),
            *one_of("decay_mask", self.decay_mask, ("matrices", "all")),
            *require(self.clip_norm >= 0, "clip_norm", self.clip_norm, "0 (off) or a norm"),
        ]


@dataclass(frozen=True)
class SyntheticConfig:
    """The embedded corpus (`data/synthetic.py`), used for sources named `synthetic`."""

    documents: int = field(default=1_000_000, metadata=INT64)  # size of the training split
    validation_documents: int = field(default=2_000, metadata=INT64)
    steps_fraction: float = 0.375  # fraction of documents that write out their steps between marks
    chatter_fraction: float = 0.125  # fraction of documents with useless chatter between the same marks
    stray_mark_rate: float = 0.06  # fraction of the immediate answers in which a mark opens; below 1/11

    def problems(self) -> list[str]:
        return [
            *require(self.documents > 0, "documents", self.documents, "at least 1"),
            *require(self.validation_documents > 0, "validation_documents", self.validation_documents, "at least 1"),
            *require(
                min(self.steps_fraction, self.chatter_fraction) >= 0
                and self.steps_fraction + self.chatter_fraction <= 1,
                "steps_fraction", self.steps_fraction, "fractions that add up to at most 1 with chatter_fraction",
            ),
            *require(0 <= self.stray_mark_rate <= 1, "stray_mark_rate", self.stray_mark_rate, "within 0 .. 1"),
        ]  # fmt: skip


TEXT_DOCUMENTS = ("file", "paragraph", "line")


@dataclass(frozen=True)
class DataConfig:
    """Input text: sources, tokenizer, and how documents become sequences of L tokens."""

    train: tuple[str, ...] = ("synthetic",)  # files, folders, globs, URLs, `prepared:FOLDER`,
    # `tfds:NAME[/CONFIG]:SPLIT`, `hf:NAME[/CONFIG]:SPLIT`, or `synthetic`
    weights: tuple[float, ...] = ()  # share of the sequences from each train source; () = one corpus
    validation: tuple[str, ...] = ("synthetic",)
    data_dir: str = ""  # where tensorflow-datasets stores prepared data; empty = its default
    cache_dir: str = ""  # for indices and token counts of sources; empty = ~/.cache/quietstar_jax
    text_key: str = "text"  # field of a JSON line, a parquet row or a tfds example
    text_documents: str = "file"  # one document of a text file is: file | paragraph (up to a blank line) | line
    tokenizer: str = ""  # folder or hub id; empty = that of the model's checkpoint; `synthetic` = the embedded one
    sequence_length: int = 256  # L
    packing: str = "random_span"  # random_span (paper: a span of each document, padded) | consecutive_spans (all of
    # its spans) | packed (documents end to end)
    document_mask: bool = True  # packed: no document attends to another, and no first token is predicted
    prepend_bos: str = "auto"  # begin documents and spans with the begin-of-text token: auto (where the tokenizer
    # itself does) | document_start (as auto, but spans from within a document begin without it) | always | never
    append_eos: bool = True  # end every document with the end-of-text token
    max_unknown_fraction: float = 0.2  # refuse training text with a larger fraction that the tokenizer does not know
    workers: int = 0  # processes that tokenize ahead; 0 = in this process
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def problems(self) -> list[str]:
        return [
            *require(bool(self.train), "train", self.train, "at least one source"),
            *require(
                not self.weights or (len(self.weights) == len(self.train) and min(self.weights) > 0),
                "weights", self.weights, f"() or a positive number for each of the {len(self.train)} train sources",
            ),
            *require(self.sequence_length >= 3, "sequence_length", self.sequence_length, "at least 3"),
            *one_of("text_documents", self.text_documents, TEXT_DOCUMENTS),
            *one_of("packing", self.packing, ("random_span", "consecutive_spans", "packed")),
            *require(
                0 <= self.max_unknown_fraction <= 1, "max_unknown_fraction", self.max_unknown_fraction, "within 0 .. 1"
            ),
            *one_of("prepend_bos", self.prepend_bos, ("auto", "document_start", "always", "never")),
            *require(0 <= self.workers <= MOST_WORKERS, "workers", self.workers, f"0 .. {MOST_WORKERS}"),
        ]  # fmt: skip


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation with greedy thoughts."""

    every_steps: int = 10  # 0 = only at the end of each phase
    batches: int = 8  # 0 = the whole validation set
    batch_size: int = 8
    thought_length: int = 0  # T in evaluation; 0 = the largest T of all phases
    tokens_ahead: int = 1  # K in evaluation

    def problems(self) -> list[str]:
        return [
            *require(self.every_steps >= 0, "every_steps", self.every_steps, "0 or more"),
            *require(self.batches >= 0, "batches", self.batches, "0 (all) or more"),
            *require(self.batch_size > 0, "batch_size", self.batch_size, "at least 1"),
            *require(self.thought_length >= 0, "thought_length", self.thought_length, "0 or more"),
            *require(self.tokens_ahead > 0, "tokens_ahead", self.tokens_ahead, "at least 1"),
        ]


@dataclass(frozen=True)
class MeshConfig:
    """How many ways each kind of work is sharded; the product of the first four sizes is the number of devices."""

    data: int = -1  # the sequences of a batch; one of the four sizes may be -1, which means all remaining devices
    fsdp: int = 1  # also sequences; each weight is sharded as many ways, and gathered where it is used
    tensor: int = 1  # heads, feed-forward and vocabulary
    position: int = 1  # positions of the text whose thoughts are computed in parallel
    dcn_data: int = 1  # how many ways of `data` are across slices of a TPU pod (or nodes), on the slower network
    dcn_fsdp: int = 1  # the same for `fsdp`; the product of the two is the number of slices (or processes)

    def problems(self) -> list[str]:
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor", "position")}
        free = [name for name, size in sizes.items() if size == -1]
        return [
            *(p for n, s in sizes.items() for p in require(s > 0 or s == -1, n, s, "a number of devices, or -1")),
            *require(len(free) < 2, " and ".join(free), -1, "-1 in only one place"),
            *require(self.dcn_data > 0, "dcn_data", self.dcn_data, "at least 1"),
            *require(self.dcn_fsdp > 0, "dcn_fsdp", self.dcn_fsdp, "at least 1"),
        ]


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of one run find each other."""

    processes: str = "single"  # single | cluster (TPU pod, SLURM, Open MPI, Kubernetes: from its environment) | given
    coordinator: str = ""  # given: host:port of process 0, the same on all
    num_processes: int = 0  # given
    process_id: int = -1  # given: 0 .. num_processes - 1
    start_seconds: int = 300  # how long to wait for the other processes at the start
    heartbeat_seconds: int = 100  # the other processes stop after this long without a heartbeat from one

    def problems(self) -> list[str]:
        problems = [
            *one_of("processes", self.processes, ("single", "cluster", "given")),
            *require(
                0 < self.start_seconds <= MOST_SECONDS, "start_seconds", self.start_seconds, f"1 .. {MOST_SECONDS}"
            ),
            *require(
                10 <= self.heartbeat_seconds <= MOST_SECONDS,
                "heartbeat_seconds",
                self.heartbeat_seconds,
                f"10 .. {MOST_SECONDS}",
            ),
        ]
        if self.processes != "given":
            return problems
        host, _, port = self.coordinator.rpartition(":")
        return [
            *problems,
            *require(bool(host) and port.isdigit(), "coordinator", self.coordinator, "host:port"),
            *require(self.num_processes > 0, "num_processes", self.num_processes, "at least 1"),
            *require(
                0 <= self.process_id < max(self.num_processes, 1),
                "process_id", self.process_id, f"0 .. {self.num_processes - 1}",
            ),
        ]  # fmt: skip


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every_steps: int = 50  # a checkpoint is always written at the end
    keep_latest: int = 2
    keep_every_steps: int = 0  # checkpoints at multiples of this are never deleted; 0 = none
    keep_phase_ends: bool = False  # one at the end of each phase, never deleted; another run may start from it
    asynchronous: bool = True

    def problems(self) -> list[str]:
        return [
            *require(self.every_steps > 0, "every_steps", self.every_steps, "at least 1"),
            *require(self.keep_latest > 0, "keep_latest", self.keep_latest, "at least 1"),
            *require(self.keep_every_steps >= 0, "keep_every_steps", self.keep_every_steps, "0 or more"),
        ]


@dataclass(frozen=True)
class LoggingConfig:
    """Metrics are always written to `metrics.jsonl` in the work directory and to the terminal."""

    every_steps: int = 1
    progress_bar: bool = True
    tensorboard: bool = False
    wandb_project: str = ""

    def problems(self) -> list[str]:
        return require(self.every_steps > 0, "every_steps", self.every_steps, "at least 1")


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: int = field(default=0, metadata=INT64)
    workdir: str = "runs/default"  # checkpoints, metrics and summary; a run with the same workdir resumes
    model: ModelConfig = field(default_factory=ModelConfig)
    thought: ThoughtConfig = field(default_factory=ThoughtConfig)
    phases: tuple[Phase, ...] = (Phase(),)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def problems(self) -> list[str]:
        length = self.data.sequence_length
        found = [
            *require(self.seed >= 0, "seed", self.seed, "0 or more"),
            *require(self.workdir != "", "workdir", self.workdir, "a directory"),
            *require(bool(self.phases), "phases", self.phases, "at least one phase"),
            *require(
                len({phase.name for phase in self.phases}) == len(self.phases),
                "phases", [phase.name for phase in self.phases], "phases whose names all differ",
            ),
        ]  # fmt: skip
        for i, phase in enumerate(self.phases):
            tokens = phase.batch_size * length
            found += require(
                tokens <= MOST_TOKENS, f"phases[{i}].batch_size", phase.batch_size,
                f"at most {MOST_TOKENS // max(length, 1)} sequences of {length} tokens",
            )  # fmt: skip
            found += require(
                tokens * phase.num_thoughts * (phase.thought_length + phase.tokens_ahead) <= MOST_THOUGHT_TOKENS,
                f"phases[{i}].num_thoughts", phase.num_thoughts,
                f"fewer or shorter thoughts: at most {MOST_THOUGHT_TOKENS} of their tokens in a batch",
            )  # fmt: skip
            found += require(
                not phase.thought_length or length >= phase.tokens_ahead + 2,
                "data.sequence_length", length, f"at least tokens_ahead + 2 = {phase.tokens_ahead + 2} of phases[{i}]",
            )  # fmt: skip
        found += require(
            length >= self.evaluation.tokens_ahead + 2,
            "data.sequence_length", length, f"at least {self.evaluation.tokens_ahead + 2}, evaluation.tokens_ahead + 2",
        )  # fmt: skip
        rows = self.evaluation.batch_size
        found += require(
            rows * length * (self.evaluation.thought_length + self.evaluation.tokens_ahead) <= MOST_THOUGHT_TOKENS
            and rows * length <= MOST_TOKENS,
            "evaluation.batch_size", rows, f"fewer sequences: at most {MOST_TOKENS} tokens in a batch",
        )  # fmt: skip
        found += require(self.total_steps < 2**31, "phases", self.total_steps, "fewer than 2^31 steps in all")
        return found

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
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ConfigError(f"phase() got unknown fields {unknown}. It takes: {', '.join(known)}.")
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

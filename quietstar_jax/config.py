"""All settings of a run: frozen dataclasses, validated once when they are built.

A file in `configs/` builds an `ml_collections.ConfigDict` with `default_config()` and changes some settings; the
command line may override any setting (`--config.data.sequence_length=512`). `from_config_dict` then converts it to a
`Config`; one error lists every unknown key, wrong type and impossible value.

The type of a field determines which values it accepts and when a resumed run may change it (`OnResume`); the comment on
a field explains its meaning. `make docs` writes all of this to docs/configuration.md.
"""

from __future__ import annotations

import enum
import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import ml_collections

from quietstar_jax.architecture import Adapters, Architecture
from quietstar_jax.errors import ConfigError
from quietstar_jax.methods.advantages import ADVANTAGES
from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.methods.rewards import REWARDS
from quietstar_jax.settings import (
    Check,
    Fraction,
    Int64,
    NonEmpty,
    NonNegative,
    Portion,
    Positive,
    at_least,
    between,
    from_mapping,
    require,
    to_mapping,
    unknown,
)

MOST_TOKENS = 2**31 - 1  # per batch
MOST_THOUGHT_TOKENS = 2**34  # per batch

T = TypeVar("T")


class OnResume(enum.Enum):
    """When a resumed run may change a setting; without a mark, never."""

    UNRELATED = "yes"  # no effect on the results of a run, or only on rounding
    MEASURED = "yes; evaluations differ"  # affects metrics, not the weights
    THINKING = "until the first phase with thoughts begins"  # no effect before
    REINFORCE = "until the first phase that trains thoughts begins"  # no effect on weights before
    SAME_TEXT = "to a source of the same content"  # compared by fingerprint: the same bytes may have moved
    SAME_WEIGHTS = "to a source of the same weights"  # as above
    NOT_BEGUN = "until the phase begins"
    OPEN_END = "until the next phase begins, if `decay` is constant"  # no effect on the learning rate before


Unrelated = Annotated[T, OnResume.UNRELATED]
Measured = Annotated[T, OnResume.MEASURED]
Thinking = Annotated[T, OnResume.THINKING]
Reinforce = Annotated[T, OnResume.REINFORCE]
SameText = Annotated[T, OnResume.SAME_TEXT]
SameWeights = Annotated[T, OnResume.SAME_WEIGHTS]

if TYPE_CHECKING:
    Reward: TypeAlias = str
    Advantage: TypeAlias = str
    Mixing: TypeAlias = str
else:  # the names in these registries
    Reward, Advantage, Mixing = (Literal[tuple(registry)] for registry in (REWARDS, ADVANTAGES, MIXINGS))
ComputeDtype = Literal["float32", "bfloat16"]
PrefixAttention = Literal["auto", "blocks", "triton"]
Control = Literal["none", "pause", "random", "shuffled"]
TextDocuments = Literal["file", "paragraph", "line"]
Packing = Literal["random_span", "consecutive_spans", "packed"]
PREFIX_ATTENTION, CONTROLS, TEXT_DOCUMENTS, PACKINGS = map(get_args, (PrefixAttention, Control, TextDocuments, Packing))
Below1 = Annotated[float, Check(lambda value: 0 <= value < 1, "at least 0 and below 1")]
TalkWeight = Annotated[float, Check(lambda value: value >= 0 or value == -1, "at least 0, or -1")]
Ways = Annotated[int, Check(lambda value: value > 0 or value == -1, "above 0, or -1")]


@dataclass(frozen=True)
class ModelConfig:
    """Where the decoder comes from and how it computes."""

    checkpoint: SameWeights[str] = ""  # Hugging Face folder or hub id (safetensors), or work directory of a run;
    # empty = random weights of `architecture`
    revision: SameWeights[str] = ""  # branch, tag or commit of a hub id
    architecture: Architecture = field(default_factory=Architecture)  # used only without `checkpoint`
    adapters: Adapters = field(default_factory=Adapters)
    adapter: str = ""  # folder of a PEFT adapter (LoRA) with which `adapters` begin, instead of at the base
    frozen_dtype: ComputeDtype = "bfloat16"  # in which weights that adapters freeze are stored; norms are float32
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


@dataclass(frozen=True)
class ThoughtConfig:
    """How thoughts are sampled, mixed and rewarded (paper section 4; lengths and counts are set per phase)."""

    start_token: str = "<|startthought|>"  # masked out of every thought if the tokenizer has it
    end_token: str = "<|endthought|>"  # the same for the end of a thought
    initial_start_token: str = "---"  # text whose mean embedding initializes the start embedding
    initial_end_token: str = "---"  # text whose mean embedding initializes the end embedding
    embedding_scale: Positive[float] = 100.0  # both embeddings are stored divided by this number: Adam changes them
    # faster by this factor
    sampling_temperature: Thinking[Positive[float]] = 1.0  # at which thought tokens are sampled in training
    score_temperature: Reinforce[Positive[float]] = 3.0  # of the log-probabilities that REINFORCE increases
    reward: Reinforce[Reward] = "information_gain"  # reward of a thought, see docs/objectives.md
    discount: Reinforce[Portion] = 1.0  # the k-th token after a thought has the weight discount^k in its reward,
    # k = 0 .. K - 1
    advantage: Reinforce[Advantage] = "mean"  # how rewards of a position are compared, see docs/objectives.md
    advantage_scale: Reinforce[Literal["none", "batch"]] = "none"  # `batch` divides advantages by their standard
    # deviation over the batch, at the cost of one more forward pass
    advantage_clip: Reinforce[NonNegative[float]] = 0.0  # bound of the absolute value of an advantage, after the scale;
    # 0 = none
    positive_only: Reinforce[bool] = True  # drop negative advantages
    policy_reduction: Reinforce[Literal["mean", "sum", "sum_over_max"]] = "mean"  # over the tokens of a thought:
    # `mean` as in the published code, `sum` as in the paper, `sum_over_max` = the sum divided by the longest thought
    # length of this phase and those before
    importance_cap: Reinforce[NonNegative[float]] = 0.0  # weigh each thought token by min(ratio, cap), the ratio of its
    # probability in scoring to that in sampling, which corrects for different temperatures; 0 = off
    clip_epsilon: Reinforce[Below1] = 0.0  # clip this ratio to 1 - epsilon .. 1 + epsilon in PPO's surrogate; 0 = off
    entropy_bonus: Reinforce[NonNegative[float]] = 0.0  # weight of the entropy of thought tokens at temperature 1, in
    # nats, which is maximized
    entropy_target: Reinforce[NonNegative[float]] = 0.0  # nats; `entropy_bonus` is adapted after each step to reach
    # this; 0 = `entropy_bonus` is constant
    entropy_bonus_step: Reinforce[Positive[float]] = 0.001  # amount by which `entropy_bonus` changes in a step
    entropy_bonus_max: Reinforce[Positive[float]] = 1.0  # largest adapted `entropy_bonus`
    kl_weight: Reinforce[NonNegative[float]] = (
        0.0  # weight of the KL divergence of thought tokens to the reference: the
    )
    # weights when the first phase that trains thoughts begins, which are then kept in memory and in checkpoints
    kl_in_reward: Reinforce[NonNegative[float]] = 0.0  # the reward decreases by this for each nat by which a thought is
    # more likely than under the reference (LaTRO)
    talk_reduction: Thinking[Literal["mean", "log_mean_exp"]] = "mean"  # how the losses with the thoughts of a
    # position are combined: their mean, as published, or the loss of their ensemble
    mixing: Thinking[Mixing] = "hidden_states"  # how predictions with and without a thought are combined:
    # `hidden_states` as in the published code, `log_probabilities` as in the paper (the weight passes through a
    # sigmoid), `none` = only the prediction after the thought, see docs/objectives.md
    control: Thinking[Control] = "none"  # what replaces the thoughts, to measure their effect
    base_loss_weight: Thinking[Fraction] = 0.5  # weight of the loss without thoughts in the total
    talk_loss_weight: Thinking[TalkWeight] = -1.0  # weight of the loss with thoughts; -1 = 1 - `base_loss_weight`
    positions: Thinking[Literal["all", "stride", "random", "entropy"]] = "all"  # which positions think in training:
    # every n-th (`stride`), random ones, or those with the least certain predictions (`entropy`); in evaluation all
    # positions think
    position_fraction: Thinking[Portion] = 1.0  # fraction of positions that think; the cost decreases with it
    positions_per_chunk: Unrelated[NonNegative[int]] = 0  # positions whose chains are in memory together; 0 = derived
    # from `chunk_megabytes`
    chunk_megabytes: Unrelated[Positive[int]] = 256  # memory budget for the activations of one chunk, per device

    @property
    def talk_weight(self) -> float:
        """Weight of the loss with thoughts."""
        return 1.0 - self.base_loss_weight if self.talk_loss_weight == -1 else self.talk_loss_weight

    @property
    def needs_batch_rewards(self) -> bool:
        """Whether advantages depend on all rewards of the batch, which costs one more forward pass."""
        return self.advantage_scale == "batch" or bool(ADVANTAGES[self.advantage].traits["needs_batch_std"])

    @property
    def needs_reference(self) -> bool:
        """Whether the weights at the beginning of REINFORCE are kept, as a reference."""
        return self.kl_weight > 0 or self.kl_in_reward > 0

    def conflicts(self) -> list[str]:
        fraction = self.position_fraction
        is_reciprocal = fraction > 1e-9 and math.isclose(1 / fraction, round(1 / fraction), rel_tol=1e-3)
        return [
            *require(
                self.positions != "all" or fraction == 1.0, "position_fraction", fraction,
                "1.0 where positions is 'all'; to choose positions, set it to stride, random or entropy",
            ),
            *require(
                self.positions != "stride" or is_reciprocal, "position_fraction", fraction,
                "1/n for positions='stride', every n-th position",
            ),
            *require(
                self.discount == 1.0 or bool(REWARDS[self.reward].traits["discounted"]), "discount", self.discount,
                f"1.0 for the reward {self.reward}, which has no discount",
            ),
            *require(
                not (self.clip_epsilon and self.importance_cap), "importance_cap", self.importance_cap,
                "0 where clip_epsilon is set: the clipped surrogate already contains the ratio",
            ),
            *require(
                self.entropy_target == 0 or self.entropy_bonus <= self.entropy_bonus_max, "entropy_bonus",
                self.entropy_bonus, f"at most entropy_bonus_max ({self.entropy_bonus_max})",
            ),
        ]  # fmt: skip


@dataclass(frozen=True)
class RateScales:
    """Learning rates of the groups of weights, as multiples of the phase's `learning_rate`; 0 freezes a group."""

    decoder: NonNegative[float] = 1.0  # all weights of the decoder; if frozen, phases with thoughts do not compute its
    # gradient. With `model.adapters`, the norms if they learn
    mixing_head: NonNegative[float] = 1.0  # the head that weighs predictions with and without thoughts
    thought_embeddings: NonNegative[float] = 1.0  # the embeddings of the start and end of a thought
    adapters: NonNegative[float] = 1.0  # the adapters of the decoder, if `model.adapters` gives it any

    def move_decoder(self, adapters: Adapters) -> bool:
        """Whether any weight of a decoder with these adapters learns."""
        if adapters.maps == "none":
            return self.decoder > 0
        return self.adapters > 0 or (adapters.norms and self.decoder > 0)


@dataclass(frozen=True)
class Phase:
    """One phase of training, with constant settings. Phases run in order; a curriculum is a list of phases."""

    name: NonEmpty[str] = "thoughts"  # name in logs and metrics; different for every phase
    steps: Annotated[NonNegative[int], OnResume.OPEN_END] = 100  # optimizer steps
    batch_size: Positive[int] = 8  # sequences per optimizer step, over all devices
    microbatches: Unrelated[Positive[int]] = 1  # the batch is split into this many parts, whose
    # gradients are accumulated
    thought_length: NonNegative[int] = 9  # T, sampled tokens of a thought; 0 = plain language modelling
    num_thoughts: Positive[int] = 2  # R, thoughts per position
    tokens_ahead: Positive[int] = 4  # K, true tokens scored after a thought
    policy_weight: NonNegative[float] = 1e6  # weight of the REINFORCE term; 0 = thoughts are not trained
    distill_weight: NonNegative[float] = 0.0  # weight of the KL divergence from the prediction with thoughts to that
    # without, which trains the latter to match the former
    learning_rate: NonNegative[float] = 1e-6  # of Adam, after the warm-up
    warmup_steps: NonNegative[int] = 20  # the learning rate rises linearly over these steps
    decay: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate, after the warm-up
    final_rate_fraction: Fraction = 0.0  # the decay ends at this fraction of `learning_rate`
    rates: RateScales = field(default_factory=RateScales)
    fresh_optimizer: bool = False  # reset the Adam moments, so that weights frozen until now get no outsized updates

    @property
    def trains_thoughts(self) -> bool:
        """Whether the phase has thoughts and REINFORCE a weight."""
        return self.thought_length > 0 and self.policy_weight > 0

    def conflicts(self) -> list[str]:
        return require(
            self.batch_size % self.microbatches == 0,
            "microbatches", self.microbatches, f"a divisor of batch_size ({self.batch_size})",
        )  # fmt: skip


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
class SyntheticConfig:
    """The embedded corpus (`data/synthetic.py`), used for sources named `synthetic`."""

    documents: Positive[Int64] = 1_000_000  # size of the training split
    validation_documents: Positive[Int64] = 2_000  # size of the validation split
    steps_fraction: Fraction = 0.375  # fraction of documents that write out their steps between marks
    chatter_fraction: Fraction = 0.125  # fraction of documents with useless chatter between the same marks
    stray_mark_rate: Fraction = 0.06  # fraction of the immediate answers in which a mark opens; below 1/11

    def conflicts(self) -> list[str]:
        total = self.steps_fraction + self.chatter_fraction
        return require(total <= 1, "steps_fraction + chatter_fraction", total, "at most 1")


@dataclass(frozen=True)
class DataConfig:
    """Input text: sources, tokenizer, and how documents become sequences of L tokens."""

    train: SameText[NonEmpty[tuple[str, ...]]] = ("synthetic",)  # files, folders, globs, URLs, `prepared:FOLDER`,
    # `tfds:NAME[/CONFIG]:SPLIT`, `hf:NAME[/CONFIG]:SPLIT`, or `synthetic`
    weights: tuple[Positive[float], ...] = ()  # share of the sequences from each train source; () = one corpus
    validation: Measured[tuple[str, ...]] = ("synthetic",)  # sources of held-out text, as in `train`
    data_dir: Unrelated[str] = ""  # where tensorflow-datasets stores prepared data; empty = its default
    cache_dir: Unrelated[str] = ""  # for indices and token counts of sources; empty = ~/.cache/quietstar_jax
    text_key: str = "text"  # field of a JSON line, a parquet row or a tfds example
    text_documents: TextDocuments = "file"  # what is one document of a text file; paragraphs end at a blank line
    tokenizer: SameText[str] = ""  # folder or hub id; empty = that of the model's checkpoint; `synthetic` = the
    # embedded one
    sequence_length: Annotated[int, at_least(3)] = 256  # L
    packing: Packing = "random_span"  # `random_span` = a span of each document, padded, as in the paper;
    # `consecutive_spans` = all of its spans; `packed` = documents end to end
    document_mask: bool = True  # for `packed`: no document attends to another, and no first token is predicted
    prepend_bos: Literal["auto", "document_start", "always", "never"] = "auto"  # begin documents and spans with the
    # begin-of-text token; `auto` = if the tokenizer itself does, `document_start` = as auto, but spans from within a
    # document begin without it
    append_eos: bool = True  # end every document with the end-of-text token
    max_unknown_fraction: Unrelated[Fraction] = 0.2  # refuse training text of which a larger fraction is unknown to
    # the tokenizer
    workers: Unrelated[Annotated[int, between(0, 1024)]] = 0  # processes that tokenize in advance; 0 = in this process
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def conflicts(self) -> list[str]:
        return require(
            len(self.weights) in (0, len(self.train)), "weights", self.weights,
            f"() or one number for each of the {len(self.train)} train sources",
        )  # fmt: skip


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation with greedy thoughts, for all tokens and for each tenth of the tokens."""

    every_steps: NonNegative[int] = 10  # 0 = only at the end of each phase
    batches: NonNegative[int] = 8  # 0 = the whole validation set
    batch_size: Positive[int] = 8  # sequences per batch, over all devices
    thought_length: NonNegative[int] = 0  # T in evaluation; 0 = the largest T of all phases
    tokens_ahead: Positive[int] = 1  # K in evaluation


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
    progress_bar: bool = True  # show a progress bar on a terminal
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
        if self.total_steps >= 2**31:
            problems.append(f"phases has {self.total_steps} steps in total; it must have fewer than 2^31")
        groups: list[tuple[str, Phase | EvaluationConfig, int]] = [("evaluation", self.evaluation, 1)]
        groups += [(f"phases[{i}]", phase, phase.num_thoughts) for i, phase in enumerate(self.phases)]
        for i, phase in enumerate(self.phases):
            needs_others = ADVANTAGES[self.thought.advantage].traits["one_thought_is_zero"]
            problems += require(
                not (phase.trains_thoughts and needs_others) or phase.num_thoughts > 1, f"phases[{i}].num_thoughts",
                phase.num_thoughts,
                f"at least 2 with the advantage {self.thought.advantage}, which is 0 for a single thought",
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
    def policy_start(self) -> int | None:
        """Number of steps done when the first phase that trains thoughts begins; None if there is no such phase."""
        spans = self.phase_spans()
        return next((span.start for span in spans if span.phase.steps and self.reinforces(span.phase)), None)

    def reinforces(self, phase: Phase) -> bool:
        """Whether REINFORCE trains the thoughts of a phase; pauses are all equal, so nothing can be compared."""
        return phase.trains_thoughts and self.thought.control != "pause"

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

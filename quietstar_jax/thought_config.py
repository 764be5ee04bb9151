"""Settings of thoughts, of the objective that trains them, and of the phases of training.

A field is declared as in `config.py`, whose `Config` contains these groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from quietstar_jax.architecture import Adapters
from quietstar_jax.methods.advantages import ADVANTAGES
from quietstar_jax.methods.mixings import MIXINGS
from quietstar_jax.methods.rewards import REWARDS
from quietstar_jax.settings import (
    Below1,
    Check,
    Choices,
    Fraction,
    NonEmpty,
    NonNegative,
    OnResume,
    Portion,
    Positive,
    Reinforce,
    Thinking,
    Unrelated,
    at_least,
    between,
    is_pattern,
    require,
)

Reward = Annotated[str, Choices(REWARDS)]
Advantage = Annotated[str, Choices(ADVANTAGES)]
Mixing = Annotated[str, Choices(MIXINGS)]
Control = Literal["none", "pause", "random", "shuffled"]
Perturbation = Literal["delete", "replace", "truncate", "shuffle"]
CONTROLS, PERTURBATIONS = map(get_args, (Control, Perturbation))
Pattern = Annotated[str, Check(is_pattern, "a regular expression")]
AtLeast1 = Annotated[float, at_least(1)]
CHOSEN = ("random", "entropy", "start")  # `positions` of which each sequence has the same number
MOST_REACH = 16
Reach = Annotated[int, between(1, MOST_REACH)]
TalkWeight = Annotated[float, Check(lambda value: value >= 0 or value == -1, "at least 0, or -1")]


@dataclass(frozen=True)
class ThoughtConfig:
    """How thoughts are sampled, mixed and rewarded (paper section 4; lengths and counts are set per phase)."""

    start_token: str = "<|startthought|>"  # begins a thought in an export; if the tokenizer
    # has this token, no thought contains it
    end_token: str = "<|endthought|>"  # the same for the token that ends a thought
    initial_start_token: str = "---"  # text whose mean embedding initializes the start embedding; also what
    # `positions='start'` and `--think start:P` look for in texts
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
    end: Literal["fixed", "sampled", "token"] = "fixed"  # when a thought ends: after T tokens, or, up to T, when the
    # model samples its end, which a head learns (`sampled`) or which is the token `initial_end_token` (`token`), see
    # docs/objectives.md
    length_penalty: Reinforce[NonNegative[float]] = 0.0  # the reward of a thought decreases by this for each of its
    # tokens, in the unit of the reward; needs an `end` that is not `fixed`
    policy_reduction: Reinforce[Literal["mean", "sum", "sum_over_max"]] = "mean"  # over the tokens of a thought:
    # `mean` as in the published code, `sum` as in the paper, `sum_over_max` = the sum divided by the longest thought
    # length of this phase and those before; a sampled end counts as a token
    importance_cap: Reinforce[NonNegative[float]] = 0.0  # weigh each thought token by min(ratio, cap), the ratio of its
    # probability in scoring to that in sampling, which corrects for different temperatures; 0 = off
    clip_epsilon: Reinforce[Below1] = 0.0  # clip this ratio to 1 - epsilon .. 1 + epsilon in PPO's surrogate; 0 = off
    entropy_bonus: Reinforce[NonNegative[float]] = 0.0  # weight of the entropy of thought tokens at temperature 1, in
    # nats, which is maximized
    entropy_target: Reinforce[NonNegative[float]] = 0.0  # nats; `entropy_bonus` is adapted after each step to reach
    # this; 0 = `entropy_bonus` is constant
    entropy_bonus_step: Reinforce[Positive[float]] = 0.001  # amount by which `entropy_bonus` changes in a step
    entropy_bonus_max: Reinforce[Positive[float]] = 1.0  # largest adapted `entropy_bonus`
    kl_weight: Reinforce[NonNegative[float]] = 0.0  # weight of the KL divergence of thought tokens to the reference:
    # the weights when the first phase that trains thoughts begins; those that learn are then kept in memory and in
    # checkpoints
    kl_in_reward: Reinforce[NonNegative[float]] = 0.0  # the reward decreases by this for each nat by which a thought is
    # more likely than under the reference (LaTRO)
    talk_reduction: Thinking[Literal["mean", "log_mean_exp"]] = "mean"  # how the losses with the thoughts of a
    # position are combined: their mean, as published, or the loss of their ensemble
    mixing: Thinking[Mixing] = "hidden_states"  # how predictions with and without a thought are combined:
    # `hidden_states` as in the published code, `log_probabilities` as in the paper (the weight passes through a
    # sigmoid), `probabilities` = a mixture of the two distributions, `none` = only the prediction after the thought,
    # see docs/objectives.md
    center_mixing_head: Thinking[bool] = False  # when the first phase with thoughts begins, subtract the mean hidden
    # state of its first batch from the inputs of a mixing head that has not learned yet, by changing the bias of its
    # first layer, see docs/objectives.md
    gate: bool = False  # also train a thinking gate, which predicts where a thought gains more than a price
    # (`--think gate:PRICE`), see docs/objectives.md; it changes no other weight
    gate_prices: Thinking[tuple[NonNegative[float], ...]] = (0.05, 0.1, 0.2, 0.5)  # nats; the gate is trained to
    # predict for each of these prices whether a thought gains more
    gate_tokens_ahead: Thinking[Positive[int]] = 1  # how many tokens after a thought count in the gain that the
    # gate predicts, at most `tokens_ahead` of each phase with thoughts; generation uses a thought for one token
    control: Thinking[Control] = "none"  # what replaces the thoughts, to measure their effect
    base_loss_weight: Thinking[Fraction] = 0.5  # weight of the loss without thoughts in the total
    talk_loss_weight: Thinking[TalkWeight] = -1.0  # weight of the loss with thoughts; -1 = 1 - `base_loss_weight`
    positions: Thinking[Literal["all", "stride", "random", "entropy", "start"]] = "all"  # which positions think in
    # training: every n-th (`stride`), random ones, those with the least certain predictions (`entropy`), or random ones
    # weighted by the probability that the next token is `initial_start_token`, which must be one token (`start`; not in
    # documents that contain it); in evaluation, `evaluation.think` chooses them
    position_fraction: Thinking[Portion] = 1.0  # fraction of positions that think; the cost decreases with it
    positions_per_sequence: Thinking[NonNegative[int]] = 0  # number of positions that think in each sequence, for long
    # thoughts at few positions, where positions is random, entropy or start; 0 = `position_fraction` of them
    position_pattern: Thinking[Pattern] = ""  # where positions is `random`, those before a token whose text matches
    # this are `position_weight` times as likely to think; empty = all are equally likely
    position_weight: Thinking[AtLeast1] = 10.0  # how much likelier positions of `position_pattern` are to think
    positions_per_chunk: Unrelated[NonNegative[int]] = 0  # positions whose chains are in memory together; 0 = derived
    # from `chunk_megabytes`
    chunk_megabytes: Unrelated[Positive[int]] = 256  # memory budget for the activations of one chunk, per device;
    # a chunk has at least one position, even if that exceeds the budget

    @property
    def talk_weight(self) -> float:
        """Weight of the loss with thoughts."""
        return 1.0 - self.base_loss_weight if self.talk_loss_weight == -1 else self.talk_loss_weight

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that a model has only with these settings, as `QuietStar` names them."""
        there = {"gate": self.gate, "end_head": self.end == "sampled"}
        return tuple(name for name, is_there in there.items() if is_there)

    @property
    def needs_reference(self) -> bool:
        """Whether the weights at the beginning of REINFORCE are kept, as a reference."""
        return self.kl_weight > 0 or self.kl_in_reward > 0

    def conflicts(self) -> list[str]:
        fraction = self.position_fraction
        is_reciprocal = fraction > 1e-9 and math.isclose(1 / fraction, round(1 / fraction), rel_tol=1e-3)
        return [
            *require(bool(self.gate_prices), "gate_prices", self.gate_prices, "a list of at least one price"),
            *require(
                self.positions != "all" or fraction == 1.0, "position_fraction", fraction,
                f"1.0 where positions is 'all'; to choose positions, set it to stride or {' or '.join(CHOSEN)}",
            ),
            *require(
                self.positions != "stride" or is_reciprocal, "position_fraction", fraction,
                "1/n for positions='stride', every n-th position",
            ),
            *require(
                self.positions_per_sequence == 0 or self.positions in CHOSEN, "positions_per_sequence",
                self.positions_per_sequence,
                f"0 where positions is {self.positions!r}; set it to {' or '.join(CHOSEN)}",
            ),
            *require(
                self.positions_per_sequence == 0 or fraction == 1.0, "position_fraction", fraction,
                "1.0 where positions_per_sequence sets the number of positions",
            ),
            *require(
                not self.position_pattern or self.positions == "random", "position_pattern", self.position_pattern,
                f"empty where positions is {self.positions!r}; set that to random",
            ),
            *require(
                self.discount == 1.0 or bool(REWARDS[self.reward].traits["discounted"]), "discount", self.discount,
                f"1.0 for the reward {self.reward}, which has no discount",
            ),
            *require(
                self.length_penalty == 0 or self.end != "fixed", "length_penalty", self.length_penalty,
                "0 where end is 'fixed': all thoughts then have the same length, so the penalty cancels",
            ),
            *require(
                self.control != "pause" or self.end != "sampled", "end", self.end,
                "'fixed' or 'token' with the control pause: thoughts are not trained, so no head for their ends is",
            ),
            *require(
                not (self.control == "random" and self.end != "fixed" and (self.clip_epsilon or self.importance_cap)),
                "control", self.control,
                "none where importance_cap or clip_epsilon is set and ends are sampled: the ratio of an end that was "
                "sampled after other tokens means nothing",
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
    # gradient. With `model.adapters`, only the norms, if `model.adapters.norms` is set
    mixing_head: NonNegative[float] = 1.0  # the head that weighs predictions with and without thoughts
    thought_embeddings: NonNegative[float] = 1.0  # the embeddings of the start and end of a thought
    gate: NonNegative[float] = 1.0  # the thinking gate, if there is one (`thought.gate`)
    end_head: NonNegative[float] = 1.0  # the head that decides when a thought ends, if there is one (`thought.end`)
    adapters: NonNegative[float] = 1.0  # the adapters of the decoder, if it has any (`model.adapters`)

    def move_decoder(self, adapters: Adapters) -> bool:
        """Whether any weight of a decoder with these adapters learns."""
        if adapters.maps == "none":
            return self.decoder > 0
        return self.adapters > 0 or (adapters.norms and self.decoder > 0)

    def move_thoughts(self, adapters: Adapters) -> bool:
        """Whether any of the weights on which thought tokens depend learns.

        The decoder predicts them after the start embedding; the mixing head does not affect them.
        """
        return self.thought_embeddings > 0 or self.move_decoder(adapters)


@dataclass(frozen=True)
class Phase:
    """One phase of training, with constant settings. Phases run in order; a curriculum is a list of phases."""

    name: NonEmpty[str] = "thoughts"  # name in logs and metrics; different for every phase
    steps: Annotated[NonNegative[int], OnResume.OPEN_END] = 100  # optimizer steps
    batch_size: Positive[int] = 8  # sequences per optimizer step, over all devices
    microbatches: Unrelated[Positive[int]] = 1  # the batch is split into this many parts, whose
    # gradients are accumulated
    thought_length: NonNegative[int] = 9  # T, sampled tokens of a thought, the maximum unless `thought.end` is `fixed`;
    # 0 = plain language modelling
    num_thoughts: Positive[int] = 2  # R, thoughts per position
    tokens_ahead: Positive[int] = 4  # K, true tokens scored after a thought
    policy_weight: NonNegative[float] = 1e6  # weight of the REINFORCE term; 0 = thoughts are not trained; nor
    # are they while the decoder and the thought embeddings are frozen
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
        """Whether the phase has thoughts and a `policy_weight` above 0; see `reinforces`."""
        return self.thought_length > 0 and self.policy_weight > 0

    def reinforces(self, adapters: Adapters, control: Control) -> bool:
        """Whether REINFORCE trains the thoughts of the phase, in a run with these adapters and this control.

        A weight on which thoughts depend must learn. Pauses are all equal, so nothing can be compared.
        """
        return self.trains_thoughts and self.rates.move_thoughts(adapters) and control != "pause"

    def conflicts(self) -> list[str]:
        return require(
            self.batch_size % self.microbatches == 0,
            "microbatches", self.microbatches, f"a divisor of batch_size ({self.batch_size})",
        )  # fmt: skip

"""The fast objective against the slow, obvious one: loss, every metric, every gradient."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from quietstar_jax.models.parameters import merge, split
from quietstar_jax.thoughts.loss import quiet_star_loss, reward_thoughts
from quietstar_jax.thoughts.model import QuietStar
from quietstar_jax.thoughts.objective import count_targets, with_batch_std
from quietstar_jax.thoughts.reference import reference_log_probs
from quietstar_jax.thoughts.sample import Thoughts
from quietstar_jax.thoughts.text import Text
from tests.thoughts import oracle
from tests.thoughts.cases import Case, random_model, relative_error, worst_errors

CASES = (
    Case("plain"),
    Case("gqa_right_padded", mask=("1111100", "1110000"), architecture={"num_heads": 4, "num_kv_heads": 2}),
    Case("left_padded_and_holes", mask=("0011111", "1101011"), positions_per_chunk=4),
    Case(
        "one_of_each", length=3, settings={"thought_length": 1, "num_thoughts": 1, "tokens_ahead": 1},
        positions_per_chunk=2,
    ),
    Case("one_thought_negative_rewards", settings={"num_thoughts": 1}, config={"positive_only": False}),
    Case("window_shorter_than_text", architecture={"sliding_window": 3}, settings={"thought_length": 3}),
    Case("window_of_some_layers", length=8, architecture={"sliding_window": 2, "full_attention_layers": (1,)},
         mask=("11111111", "11111100"), positions_per_chunk=5),
    Case("qkv_bias_tied", architecture={"qkv_bias": True, "tie_embeddings": True}, settings={"tokens_ahead": 3}),
    Case("qk_norm_other_width_gelu", architecture={"qk_norm": True, "head_dim": 6, "activation": "gelu"}),
    Case("gemma2", batch=1, mask=("1111110",), settings={"thought_length": 3},
         architecture={"norm_adds_one": True, "norm_placement": "around", "sliding_window": 3, "query_scale": 0.9,
                       "full_attention_layers": (1,), "score_cap": 1.5, "logit_cap": 2.0, "tie_embeddings": True,
                       "embedding_multiplier": 8**0.5, "activation": "gelu_tanh"}),
    Case("gemma3_capped_log_probabilities", batch=1, config={"mixing": "log_probabilities"},
         settings={"distill_weight": 1.0}, positions_per_chunk=4,
         architecture={"norm_adds_one": True, "norm_placement": "around", "sliding_window": 2, "qk_norm": True,
                       "full_attention_layers": (0,), "rope_local_theta": 7.0, "embedding_multiplier": 8**0.5,
                       "logit_cap": 1.5}),
    Case("olmo2", batch=1, architecture={"norm_placement": "after", "qk_norm": True, "qk_norm_all_heads": True,
                                         "num_heads": 4, "num_kv_heads": 2}, settings={"rematerialize": True}),
    Case("every_bias", batch=1, architecture={"qkv_bias": True, "output_bias": True, "mlp_bias": True},
         positions_per_chunk=7),
    Case("log_probabilities", mask=("1111111", "1111000"), config={"mixing": "log_probabilities"}),
    Case("probabilities", mask=("1111111", "1111000"), config={"mixing": "probabilities", "positive_only": False},
         settings={"distill_weight": 0.5}),
    Case(
        "sum_over_thought_tokens", settings={"thought_length": 3, "num_thoughts": 3},
        config={"policy_reduction": "sum"},
    ),
    Case("rematerialize_chunk_of_one", settings={"rematerialize": True}, positions_per_chunk=1),
    Case("longest_ahead", batch=1, length=6, settings={"tokens_ahead": 4}, positions_per_chunk=4),
    Case("nothing_real_in_one_row", mask=("0000000", "1111100"), config={"positive_only": False}),
    Case("ahead_beyond_every_target", length=5, mask=("11000", "11000"), settings={"tokens_ahead": 3}),
    # The family of objectives: every reward, advantage, reduction and option at least once, in different company.
    Case("rlp", config={"advantage": "leave_one_out", "positive_only": False, "mixing": "none", "base_loss_weight": 0.0,
                        "talk_loss_weight": 0.0, "sampling_temperature": 2.0}, settings={"num_thoughts": 3}),
    Case("jepo", mask=("1111111", "1111000"), settings={"num_thoughts": 3},
         config={"advantage": "log_mean_exp", "advantage_scale": "batch", "advantage_clip": 0.7, "positive_only": False,
                 "policy_reduction": "sum", "talk_reduction": "log_mean_exp", "talk_loss_weight": 0.2}),
    Case("latro", config={"advantage": "leave_one_out", "positive_only": False, "kl_in_reward": 0.3, "kl_weight": 0.1,
                          "policy_reduction": "sum"}, mask=("1111111", "0111110"), settings={"num_thoughts": 3}),
    Case("probability_group_std_clipped", config={"reward": "probability", "advantage": "group_std",
         "positive_only": False, "clip_epsilon": 0.2, "entropy_bonus": 0.3}, settings={"num_thoughts": 3}),
    # Token 0, which fills incomplete chunks, is forbidden here: its log-probability is -1e10.
    Case("mean_probability_batch_std_corrected", mask=("1111111", "1111000"),
         settings={"num_thoughts": 3, "meta_tokens": (0, 12)},
         config={"reward": "mean_probability", "advantage": "batch_std", "positive_only": False, "importance_cap": 1.1,
                 "kl_weight": 0.5}),
    Case("discounted_posterior_longer_phase", config={"discount": 0.7, "advantage": "posterior", "entropy_bonus": 0.1,
         "policy_reduction": "sum_over_max"}, settings={"longest_thought": 5}, positions_per_chunk=4),
    Case("centered_posterior_distilled", config={"advantage": "posterior_centered", "mixing": "log_probabilities",
         "positive_only": False, "talk_reduction": "log_mean_exp"}, settings={"distill_weight": 2.0}),
    Case("everything_with_one_thought", config={"reward": "mean_probability", "advantage": "group_std",
         "kl_weight": 1.0, "advantage_scale": "batch", "importance_cap": 2.0, "entropy_bonus": 0.2,
         "talk_reduction": "log_mean_exp"},
         settings={"num_thoughts": 1, "distill_weight": 0.5}),
    # The model samples the end of each thought; the given thoughts have every length 0 .. T.
    Case("ends", mask=("1111111", "1111100"), config={"end": "sampled", "length_penalty": 0.1, "positive_only": False}),
    Case("ends_capped_tied_in_a_window", batch=1, mask=("1111110",), config={"end": "sampled", "entropy_bonus": 0.3,
         "policy_reduction": "sum"}, settings={"thought_length": 3, "tokens_ahead": 1},
         architecture={"norm_adds_one": True, "norm_placement": "around", "sliding_window": 3, "query_scale": 0.9,
                       "full_attention_layers": (1,), "score_cap": 1.5, "logit_cap": 2.0, "tie_embeddings": True,
                       "embedding_multiplier": 8**0.5, "activation": "gelu_tanh"}),
    Case("ends_and_reference", mask=("1111111", "0111110"), positions_per_chunk=4,
         config={"end": "sampled", "length_penalty": 0.2, "advantage": "leave_one_out", "positive_only": False,
                 "kl_in_reward": 0.3, "kl_weight": 0.1, "importance_cap": 1.1, "policy_reduction": "sum_over_max"},
         settings={"num_thoughts": 3, "meta_tokens": (0, 12), "longest_thought": 5}),
    Case("ends_at_a_token", mask=("1111111", "1111100"), settings={"meta_tokens": (0, 12), "end_token": 12},
         config={"end": "token", "length_penalty": 0.1, "advantage": "leave_one_out", "positive_only": False,
                 "entropy_bonus": 0.2}, architecture={"logit_cap": 3.0}),
    Case("ends_clipped_with_one_thought", batch=1, config={"end": "sampled", "clip_epsilon": 0.2,
         "mixing": "log_probabilities"}, settings={"num_thoughts": 1, "rematerialize": True}),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_metrics_and_gradients_equal_the_oracle(case: Case) -> None:
    a, s = case.decoder, case.thought
    model = random_model(a, s.config.embedding_scale, heads=s.config.heads)
    (tokens, mask), thoughts = case.text(), case.thoughts()
    params, graphdef = split(model)

    reference, given = None, thoughts
    if s.config.needs_reference:
        reference = split(random_model(a, s.config.embedding_scale, seed=5, heads=s.config.heads))[0]

    def think(model: QuietStar, text: Text, positions: jax.Array) -> Thoughts:
        if reference is None:
            return given
        old, chunk = merge(graphdef, reference), case.positions_per_chunk
        log_probs = reference_log_probs(old, text, positions, given.tokens, s, chunk)
        return given._replace(reference_log_probs=log_probs)

    def fast(params: oracle.Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        counts = count_targets(mask, s.tokens_ahead)
        model = merge(graphdef, params)
        if s.needs_batch_rewards:
            rewarded = reward_thoughts(model, tokens, mask, think, s, case.positions_per_chunk)
            counts = with_batch_std(counts, rewarded.rewards, rewarded.scored, s.config.advantage)
        return quiet_star_loss(model, tokens, mask, think, counts, s, case.positions_per_chunk)

    def slow(params: oracle.Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        return oracle.loss(a, s, params, tokens, mask, thoughts, reference)

    (value, metrics), gradient = jax.jit(jax.value_and_grad(fast, has_aux=True))(params)
    (expected, expected_metrics), expected_gradient = jax.value_and_grad(slow, has_aux=True)(params)

    assert relative_error(value, expected) < 1e-5
    acts = (np.asarray(thoughts.entropy) > 0).sum(-1)  # positive for every action
    entropy = (np.asarray(thoughts.entropy).sum(-1) / acts)[:, :, :-1]
    real = np.asarray(mask)[:, None, 1:]
    expected_metrics["entropy"] = (entropy * real).sum() / (s.num_thoughts * max(real.sum(), 1))
    if s.samples_end:
        lengths = (np.asarray(thoughts.tokens) >= 0).sum(-1)[:, :, :-1][np.broadcast_to(real, entropy.shape)]
        assert metrics.pop("length_histogram").tolist() == np.bincount(lengths, minlength=s.thought_length + 1).tolist()
    histogram = metrics.pop("entropy_histogram")
    assert float(histogram.sum()) == np.asarray(mask)[:, 1:].sum()
    assert not worst_errors(metrics, expected_metrics, 2e-5)
    assert not worst_errors(gradient, expected_gradient, 1e-4)
    idle = {name for name, g in expected_gradient.items() if not np.any(g)}
    unused = {"start_spare", "end_spare"}
    if s.config.mixing == "none":
        unused |= {name for name in params if name.startswith("mixing_head.")}
    unused |= set() if s.config.talk_weight else {"end_embedding"}
    assert idle == unused, "a term of this case does not matter"

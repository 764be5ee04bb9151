"""The objective once more, slow and obvious: one position and one thought at a time.

For thought r of position j the token sequence `x[0..j] start t_1 .. t_T end x[j+1] .. x[j+K-1]` is written out and read
by a plain causal decoder. Shares no arithmetic with the package: it takes bare arrays under their dotted names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.architecture import Architecture
from quietstar_jax.thought_config import ThoughtConfig
from quietstar_jax.thoughts.sample import Thoughts
from quietstar_jax.thoughts.settings import ThoughtSettings

Params = Mapping[str, jax.Array]
ACTIVATIONS = {
    "silu": lambda x: x / (1 + jnp.exp(-x)),
    "gelu": lambda x: x * (1 + jax.scipy.special.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: jnp.where(x > 0, x, 0.0),
}


def norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def layer_norm(a: Architecture, x: jax.Array, w: Params, name: str) -> jax.Array:
    """The norm of this name, if the decoder has it."""
    return norm(x, w[name] + (1 if a.norm_adds_one else 0), a.rms_norm_eps) if name in w else x


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    return x if cap == 0 else cap * jnp.tanh(x / cap)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary positions 0, 1, ... of x [N, H], pair by pair."""
    width = x.shape[1]
    columns: list[Any] = [None] * width
    for i in range(width // 2):
        angle = jnp.arange(x.shape[0], dtype=jnp.float32) / theta ** (2 * i / width)
        a, b = x[:, i], x[:, i + width // 2]
        columns[i] = a * jnp.cos(angle) - b * jnp.sin(angle)
        columns[i + width // 2] = b * jnp.cos(angle) + a * jnp.sin(angle)
    return jnp.stack(columns, axis=1)


def attention(a: Architecture, w: Params, x: jax.Array, real: jax.Array, layer: int) -> jax.Array:
    """x [N, D] -> [N, D], head by head; padding is never a key."""
    heads = []
    local = a.sliding_window > 0 and layer not in a.full_attention_layers
    theta = a.rope_local_theta if local and a.rope_local_theta else a.rope_theta
    scale = a.query_scale or 1 / math.sqrt(a.head_dim)
    for q in range(a.num_heads):
        g = q * a.num_kv_heads // a.num_heads
        parts = []
        for name, head in (("query", q), ("key", g), ("value", g)):
            part = x @ w[name][:, head] + (w[f"{name}_bias"][head] if a.qkv_bias else 0.0)
            if a.qk_norm_all_heads and name != "value":
                count = w[name].shape[1]
                whole = [x @ w[name][:, i] + (w[f"{name}_bias"][i] if a.qkv_bias else 0.0) for i in range(count)]
                mean = sum((one * one).sum(-1, keepdims=True) for one in whole) / (count * a.head_dim)
                weight = w[f"{name}_norm"][head] + (1 if a.norm_adds_one else 0)
                part = part / jnp.sqrt(mean + a.rms_norm_eps) * weight
            elif a.qk_norm and name != "value":
                part = layer_norm(a, part, w, f"{name}_norm")
            parts.append(part if name == "value" else rotate(part, theta))
        query, key, value = parts
        place = jnp.arange(x.shape[0])
        window = a.sliding_window if local else x.shape[0]
        back = place[:, None] - place[None, :]
        seen = (back >= 0) & (back < window) & real[None, :]
        scores = jnp.where(seen, soft_cap(query @ key.T * scale, a.score_cap), -1e30)
        heads.append(jax.nn.softmax(scores, axis=-1) @ value @ w["output"][q])
    return sum(heads[1:], heads[0]) + (w["output_bias"] if a.output_bias else 0.0)


def decode(a: Architecture, p: Params, x: jax.Array, real: jax.Array) -> jax.Array:
    """Rows of the embedding [N, D], which are real [N] -> final-norm hidden states [N, D] of a plain causal decoder."""
    x = x * a.embedding_multiplier
    for layer in range(a.num_layers):
        w = {name.split(".")[-1]: v[layer] for name, v in p.items() if name.startswith("decoder.layers.")}
        attended = attention(a, w, layer_norm(a, x, w, "attention_norm"), real, layer)
        x = x + layer_norm(a, attended, w, "attention_post_norm")
        y = layer_norm(a, x, w, "mlp_norm")
        gate = y @ w["gate"] + (w["gate_bias"] if a.mlp_bias else 0.0)
        up = y @ w["up"] + (w["up_bias"] if a.mlp_bias else 0.0)
        fed = (ACTIVATIONS[a.activation](gate) * up) @ w["down"] + (w["down_bias"] if a.mlp_bias else 0.0)
        x = x + layer_norm(a, fed, w, "mlp_post_norm")
    return layer_norm(a, x, p, "decoder.final_norm")


def head(a: Architecture, p: Params, hidden: jax.Array) -> jax.Array:
    return soft_cap(hidden @ (p["decoder.embedding"].T if a.tie_embeddings else p["decoder.lm_head"]), a.logit_cap)


def nll(logits: jax.Array, target: jax.Array) -> jax.Array:
    return -jax.nn.log_softmax(logits)[target]


def chain(
    a: Architecture, s: ThoughtSettings, p: Params, row: jax.Array, mask: jax.Array, j: jax.Array, thought: jax.Array
) -> jax.Array:
    """Final-norm hidden states [C, D] of the chain of one thought [T] at position j of one text [L]."""
    length, table, scale = row.shape[0], p["decoder.embedding"], s.config.embedding_scale
    padded = jnp.concatenate([row, jnp.full(s.tokens_ahead, s.pad_id)])
    ahead = jax.lax.dynamic_slice(padded, (j + 1,), (s.tokens_ahead - 1,))
    start, end = p["start_embedding"][None] * scale, p["end_embedding"][None] * scale
    tokens = jnp.concatenate([start, table[thought], end, table[ahead]])
    # Written at j + 1; what stands behind the chain is invisible to it, for the decoder is causal.
    room = jnp.zeros((s.chain_length, table.shape[1]))
    sequence = jax.lax.dynamic_update_slice(jnp.concatenate([table[row], room]), tokens, (j + 1, 0))
    real = jnp.concatenate([mask, jnp.ones(s.chain_length, bool)]) | (jnp.arange(length + s.chain_length) > j)
    return jax.lax.dynamic_slice(decode(a, p, sequence, real), (j + 1, 0), tokens.shape)


def masked_logits(a: Architecture, s: ThoughtSettings, p: Params, hidden: jax.Array) -> jax.Array:
    logits = head(a, p, hidden)
    for token in s.meta_tokens:
        logits = logits.at[token].set(-1e10)
    return logits


def mixing_weight(p: Params, base: jax.Array, thought: jax.Array) -> jax.Array:
    first = jnp.concatenate([p["mixing_head.base_in"], p["mixing_head.thought_in"]])
    x = jnp.maximum(jnp.concatenate([base, thought]) @ first + p["mixing_head.in_bias"], 0.0)
    return (jnp.maximum(x @ p["mixing_head.hidden"] + p["mixing_head.hidden_bias"], 0.0) @ p["mixing_head.out"])[0]


@partial(jax.jit, static_argnums=(0, 1, 8))
def position(
    a: Architecture, s: ThoughtSettings, p: Params, row: jax.Array, mask: jax.Array, base: jax.Array, j: jax.Array,
    thought: jax.Array, most: int,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """What the thought [`s.thought_length`] does: base [L+K, D] are the hidden states of the text.

    If ends are sampled, a thought of fewer than `most` tokens has one more action, its end.

    Returns (nll [K] of the tokens ahead, log-probability [T] of each thought token, mixing weight [K], entropy [T] of
    the distributions of thought tokens, KL divergence from the prediction of x[j+1] with the thought to that without).
    """
    hidden = chain(a, s, p, row, mask, j, thought)
    samples_end = s.config.end != "fixed"
    acts = min(s.thought_length + 1, most) if samples_end else s.thought_length
    thought_logits = [masked_logits(a, s, p, hidden[i]) for i in range(acts)]
    log_probs = [-nll(thought_logits[i] / s.config.score_temperature, thought[i]) for i in range(s.thought_length)]
    spread = [-(jax.nn.softmax(x) * jax.nn.log_softmax(x)).sum() for x in thought_logits]
    if samples_end:
        if s.config.end == "token":
            ends = [jnp.exp(head(a, p, hidden[i])[s.end_token]) for i in range(acts)]
            odds = [jnp.log(ends[i] / jnp.exp(thought_logits[i]).sum()) for i in range(acts)]
        else:
            odds = [jnp.dot(hidden[i], p["end_head.weight"]) + p["end_head.bias"][0] for i in range(acts)]
        goes_on = [1 / (1 + jnp.exp(x / s.config.score_temperature)) for x in odds]
        log_probs = [log_probs[i] + jnp.log(goes_on[i]) for i in range(s.thought_length)]
        log_probs += [jnp.log(1 - x) for x in goes_on[s.thought_length : acts]]
        spread = [
            -q * jnp.log(q) - (1 - q) * jnp.log(1 - q) + q * tokens
            for q, tokens in zip([1 / (1 + jnp.exp(x)) for x in odds], spread, strict=True)
        ]
    talk, weights = [], []
    targets = jnp.concatenate([row, jnp.zeros(s.tokens_ahead, row.dtype)])
    for k in range(s.tokens_ahead):
        h_base, h_thought = base[j + k], hidden[s.thought_length + 1 + k]
        w = mixing_weight(p, h_base, h_thought)
        if s.config.mixing == "none":
            w = jnp.ones(())
        target = targets[j + 1 + k]
        if s.config.mixing == "log_probabilities":
            w = 1 / (1 + jnp.exp(-w))
            parts = jax.nn.log_softmax(head(a, p, h_base)), jax.nn.log_softmax(head(a, p, h_thought))
            scores = (1 - w) * parts[0] + w * parts[1]
            talk.append(-scores[target])
        elif s.config.mixing == "probabilities":
            w = 1 / (1 + jnp.exp(1 - w))
            parts = jax.nn.softmax(head(a, p, h_base)), jax.nn.softmax(head(a, p, h_thought))
            scores = jnp.log((1 - w) * parts[0] + w * parts[1])
            talk.append(-scores[target])
        else:
            scores = head(a, p, (1 - w) * h_base + w * h_thought)
            talk.append(nll(scores, target))
        if k == 0:
            teacher, student = jax.lax.stop_gradient(jax.nn.log_softmax(scores)), jax.nn.log_softmax(head(a, p, h_base))
            kl = (jnp.exp(teacher) * (teacher - student)).sum()
        weights.append(w)
    return jnp.stack(talk), jnp.stack(log_probs), jnp.stack(weights), jnp.stack(spread), kl


@partial(jax.jit, static_argnums=0)
def text(a: Architecture, p: Params, row: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden states [L, D] of the text alone, and nll [L] of each next token (the last one means nothing)."""
    hidden = decode(a, p, p["decoder.embedding"][row], mask)
    log_probs = jax.nn.log_softmax(head(a, p, hidden), axis=-1)
    return hidden, -log_probs[jnp.arange(row.size), jnp.roll(row, -1)]


def reward_of(config: ThoughtConfig, base: jax.Array, talk: jax.Array, real: list[int]) -> jax.Array:
    """The reward of one thought: base [K], talk [K], and which of the K tokens ahead are real."""
    if config.reward == "information_gain":
        return sum((config.discount**k * (base[k] - talk[k]) for k in real), jnp.zeros(()))
    likely = [jnp.exp(-talk[k]) for k in real]
    if not real:
        return jnp.zeros(())
    return jnp.prod(jnp.stack(likely)) if config.reward == "probability" else sum(likely) / len(likely)


def advantage_of(name: str, r: int, s: list[jax.Array], batch_std: jax.Array) -> jax.Array:
    """The advantage of thought r among rewards s, by its formula."""
    count, others = len(s), [x for q, x in enumerate(s) if q != r]
    if count == 1:
        return jnp.zeros(()) if name == "leave_one_out" else s[r]
    mean = sum(s) / count
    equal = jnp.all(jnp.stack(s) == s[0])
    likelihood = sum(jnp.exp(x) for x in s) / count
    value = {
        "mean": lambda: s[r] - mean,
        "leave_one_out": lambda: s[r] - sum(others) / (count - 1),
        "group_std": lambda: (s[r] - mean) / (jnp.sqrt(sum((x - mean) ** 2 for x in s) / (count - 1)) + 1e-6),
        "batch_std": lambda: (s[r] - mean) / (batch_std + 1e-6),
        "log_mean_exp": lambda: jnp.log(likelihood) - jnp.log(sum(jnp.exp(x) for x in others) / (count - 1)),
        "posterior": lambda: jnp.exp(s[r]) / (likelihood * count),
        "posterior_centered": lambda: jnp.exp(s[r]) / (likelihood * count) - 1 / count,
    }[name]()
    return jnp.where(equal, 0.0, value)


def loss(
    a: Architecture, s: ThoughtSettings, p: Params, tokens: jax.Array, mask: jax.Array, thoughts: Thoughts,
    reference: Params | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """Loss and metrics of given thoughts, arrays [B, R, L, T], in the words of the paper's code."""
    c, (batch, length), count, ahead = s.config, tokens.shape, s.num_thoughts, s.tokens_ahead
    ok = np.zeros((batch, length, ahead), bool)
    for b, j, k in np.ndindex(ok.shape):
        ok[b, j, k] = j + 1 + k < length and bool(mask[b, j + 1 + k])
    targets = [max(int(n), 1) for n in ok.sum((0, 1))]
    last = length - 2 - ahead  # position with a reward
    rewarded, scored = max(last + 1, 1), max(int(ok[:, : max(last + 1, 0), 0].sum()), 1)

    # First everything of every thought: (base [K], talk [K], log-probabilities [T], entropy [T], weight [K], KL [T]).
    seen: dict[tuple[int, int, int], Any] = {}
    base_sum = jnp.zeros(())
    for b in range(batch):
        hidden, base = text(a, p, tokens[b], mask[b])
        base_sum += sum((base[j] for j in range(length) if ok[b, j, 0]), jnp.zeros(()))
        hidden, base = (jnp.concatenate([x, jnp.zeros((ahead, *x.shape[1:]))]) for x in (hidden, base))
        old = jnp.concatenate([text(a, reference, tokens[b], mask[b])[0], jnp.zeros((ahead, hidden.shape[1]))]) \
            if reference is not None else None  # fmt: skip
        for j in range(length):
            for r in range(count):
                given = (tokens[b], mask[b])
                thought = [token for token in thoughts.tokens[b, r, j].tolist() if token >= 0]
                own, thought = dataclasses.replace(s, thought_length=len(thought)), jnp.array(thought, jnp.int32)
                talk, log_probs, weight, entropy, kl = position(
                    a, own, p, *given, hidden, jnp.int32(j), thought, s.thought_length
                )
                ref = None
                if reference is not None:
                    ref = position(a, own, reference, *given, old, jnp.int32(j), thought, s.thought_length)[1]
                seen[b, r, j] = base[j : j + ahead], talk, log_probs, weight, entropy, kl, ref

    def real(b: int, j: int) -> list[int]:
        return [k for k in range(ahead) if ok[b, j, k]]

    rewards = {}
    for (b, r, j), (base, talk, log_probs, _, _, _, ref) in seen.items():
        reward = reward_of(c, base, talk, real(b, j))
        if c.kl_in_reward and ok[b, j, 0]:
            reward -= c.kl_in_reward * (log_probs - ref).sum()
        if ok[b, j, 0]:
            reward -= c.length_penalty * int((thoughts.tokens[b, r, j] >= 0).sum())
        rewards[b, r, j] = jax.lax.stop_gradient(reward) if j <= last else jnp.zeros(())
    counted = [key for key in rewards if key[2] <= last and ok[key[0], key[2], 0]]

    def std(values: list[jax.Array]) -> jax.Array:
        mean = sum(values) / max(len(values), 1)
        return jnp.sqrt(sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1))

    batch_std = std([rewards[key] for key in counted])
    groups = {(b, j): [rewards[b, r, j] for r in range(count)] for b, _, j in rewards}
    advantage = {(b, r, j): advantage_of(c.advantage, r, groups[b, j], batch_std) for b, r, j in rewards}
    if c.advantage_scale == "batch":
        divisor = std([advantage[key] for key in counted]) + 1e-6
        advantage = {key: value / divisor for key, value in advantage.items()}
    if c.advantage_clip:
        advantage = {key: jnp.clip(value, -c.advantage_clip, c.advantage_clip) for key, value in advantage.items()}
    if c.positive_only:
        advantage = {key: jnp.maximum(value, 0.0) for key, value in advantage.items()}

    policy, distill, totals = (
        jnp.zeros(()),
        jnp.zeros(()),
        dict.fromkeys(("kl", "policy_entropy", "ratio", "clip"), 0.0),
    )
    for (b, r, j), (_, _, log_probs, _, entropy, kl, ref) in seen.items():
        distill += kl if ok[b, j, 0] else 0.0
        acts = len(log_probs)
        divide = {"mean": acts, "sum": 1, "sum_over_max": s.longest_thought or s.thought_length}
        for i in range(acts):
            term, value = log_probs[i], advantage[b, r, j]
            if thoughts.log_probs is not None:
                ratio = jnp.exp(log_probs[i] - thoughts.log_probs[b, r, j, i])
                if c.clip_epsilon:
                    bounded = jnp.clip(ratio, 1 - c.clip_epsilon, 1 + c.clip_epsilon)
                    policy -= jnp.minimum(ratio * value, bounded * value) / divide[c.policy_reduction]
                    term, clipped = 0.0, (bounded * value < ratio * value)
                elif c.importance_cap:
                    term *= jax.lax.stop_gradient(jnp.minimum(ratio, c.importance_cap))
                    clipped = ratio > c.importance_cap
                if (b, r, j) in counted:
                    totals["ratio"] += ratio / acts
                    totals["clip"] += jnp.where(clipped, 1.0, 0.0) / acts if c.clip_epsilon or c.importance_cap else 0.0
            policy -= value * term / divide[c.policy_reduction]
            if (b, r, j) in counted:
                totals["policy_entropy"] += entropy[i] / acts
                d = ref[i] - log_probs[i] if ref is not None else 0.0
                totals["kl"] += (jnp.exp(d) - d - 1) / acts
    policy /= batch * count * rewarded
    totals = {name: x / (scored * count) for name, x in totals.items()}

    base_loss = base_sum / targets[0]
    talk_losses = [
        sum((talk[k] for (b, _, j), (_, talk, *_) in seen.items() if ok[b, j, k]), jnp.zeros(())) / (count * targets[k])
        for k in range(ahead)
    ]
    talk_loss = sum(talk_losses) / ahead
    if c.talk_reduction == "log_mean_exp":
        nlls = {(b, r, j): sum(seen[b, r, j][1][k] for k in real(b, j)) for b, r, j in seen if real(b, j)}
        places = {(b, j) for b, _, j in nlls}
        talk_loss = -sum(
            jnp.log(sum(jnp.exp(-nlls[b, r, j]) for r in range(count)) / count) for b, j in sorted(places)
        ) / sum(targets)
    total = c.base_loss_weight * base_loss + c.talk_weight * talk_loss + s.policy_weight * policy
    total += c.kl_weight * totals["kl"] - c.entropy_bonus * totals["policy_entropy"]
    distill /= count * targets[0]
    total += s.distill_weight * distill
    metrics = {
        "loss": total,
        "base_loss": base_loss,
        "talk_loss": talk_loss,
        "policy_loss": policy,
        "reward": sum(rewards.values()) / (batch * count * rewarded),
        "reward_std": sum(
            (std(groups[b, j]) if count > 1 else 0.0 for b, j in {(b, j) for b, _, j in counted}), jnp.zeros(())
        ) / scored,
        "mixing_weight": sum((seen[b, r, j][3][0] for b, r, j in seen if ok[b, j, 0]), jnp.zeros(()))
        / (count * targets[0]),
        "unique_thought_rate": sum(
            len({tuple(np.asarray(thoughts.tokens[b, r, j]).tolist()) for b, r, j in seen if b == row and ok[b, j, 0]})
            for row in range(batch)
        ) / (count * targets[0]),
        **{f"talk_loss_{k + 1}": x for k, x in enumerate(talk_losses)},
    }  # fmt: skip
    if count > 1:
        unit = (lambda s: 1.0) if c.reward == "information_gain" else (lambda s: max(map(abs, s)))
        scored_groups = [groups[b, j] for b, j in {(b, j) for b, _, j in counted}]
        same = [max(s) - min(s) <= 1e-6 * unit(s) for s in scored_groups]
        metrics["frac_reward_zero_std"] = sum(jnp.where(x, 1.0, 0.0) for x in same) / scored
    metrics |= {"distillation_loss": distill} if s.distill_weight else {}
    metrics |= {"kl": totals["kl"]} if reference is not None else {}
    metrics |= {"policy_entropy": totals["policy_entropy"]} if c.entropy_bonus else {}
    if thoughts.log_probs is not None:
        metrics["importance_ratio"] = totals["ratio"]
        metrics |= {"clip_ratio": totals["clip"]} if c.clip_epsilon or c.importance_cap else {}
    return total, metrics


def greedy_thought(
    a: Architecture, s: ThoughtSettings, p: Params, row: jax.Array, mask: jax.Array, j: int
) -> tuple[list[int], list[np.ndarray]]:
    """The thought of position j token by token, each the most likely, and the logits it was chosen from."""
    thought, logits = np.zeros(s.thought_length, np.int32), []
    for i in range(s.thought_length):
        hidden = jitted_chain(a, s, p, row, mask, jnp.int32(j), jnp.asarray(thought))
        logits.append(np.asarray(masked_logits(a, s, p, hidden[i])))
        thought[i] = logits[-1].argmax()
    return thought.tolist(), logits


jitted_chain = jax.jit(chain, static_argnums=(0, 1))

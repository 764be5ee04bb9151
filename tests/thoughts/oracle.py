"""The objective once more, slow and obvious: one position and one thought at a time.

For thought r of position j the token sequence `x[0..j] start t_1 .. t_T end x[j+1] .. x[j+K-1]` is written out and read
by a plain causal decoder. Shares no arithmetic with the package: it takes bare arrays under their dotted names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quietstar_jax.architecture import Architecture
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
    for q in range(a.num_heads):
        g = q * a.num_kv_heads // a.num_heads
        parts = []
        for name, head in (("query", q), ("key", g), ("value", g)):
            part = x @ w[name][:, head] + (w[f"{name}_bias"][head] if a.qkv_bias else 0.0)
            if a.qk_norm and name != "value":
                part = norm(part, w[f"{name}_norm"], a.rms_norm_eps)
            parts.append(part if name == "value" else rotate(part, a.rope_theta))
        query, key, value = parts
        place = jnp.arange(x.shape[0])
        window = a.sliding_window if a.sliding_window and layer not in a.full_attention_layers else x.shape[0]
        back = place[:, None] - place[None, :]
        seen = (back >= 0) & (back < window) & real[None, :]
        scores = jnp.where(seen, query @ key.T / math.sqrt(a.head_dim), -1e30)
        heads.append(jax.nn.softmax(scores, axis=-1) @ value @ w["output"][q])
    return sum(heads[1:], heads[0]) + (w["output_bias"] if a.output_bias else 0.0)


def decode(a: Architecture, p: Params, x: jax.Array, real: jax.Array) -> jax.Array:
    """Embeddings [N, D], which are real [N] -> final-norm hidden states [N, D] of a plain causal decoder."""
    for layer in range(a.num_layers):
        w = {name.split(".")[-1]: v[layer] for name, v in p.items() if name.startswith("decoder.layers.")}
        x = x + attention(a, w, norm(x, w["attention_norm"], a.rms_norm_eps), real, layer)
        y = norm(x, w["mlp_norm"], a.rms_norm_eps)
        gate = y @ w["gate"] + (w["gate_bias"] if a.mlp_bias else 0.0)
        up = y @ w["up"] + (w["up_bias"] if a.mlp_bias else 0.0)
        x = x + (ACTIVATIONS[a.activation](gate) * up) @ w["down"] + (w["down_bias"] if a.mlp_bias else 0.0)
    return norm(x, p["decoder.final_norm"], a.rms_norm_eps)


def head(a: Architecture, p: Params, hidden: jax.Array) -> jax.Array:
    return hidden @ (p["decoder.embedding"].T if a.tie_embeddings else p["decoder.lm_head"])


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


@partial(jax.jit, static_argnums=(0, 1))
def position(
    a: Architecture, s: ThoughtSettings, p: Params, row: jax.Array, mask: jax.Array, base: jax.Array, j: jax.Array,
    thought: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(nll [K] of the tokens ahead, log-probability [T] of each thought token, mixing weight [K]); base [L+K, D]."""
    hidden = chain(a, s, p, row, mask, j, thought)
    log_probs = [
        -nll(masked_logits(a, s, p, hidden[i]) / s.config.score_temperature, thought[i])
        for i in range(s.thought_length)
    ]
    talk, weights = [], []
    targets = jnp.concatenate([row, jnp.zeros(s.tokens_ahead, row.dtype)])
    for k in range(s.tokens_ahead):
        h_base, h_thought = base[j + k], hidden[s.thought_length + 1 + k]
        w = mixing_weight(p, h_base, h_thought)
        target = targets[j + 1 + k]
        if s.config.mixing == "log_probabilities":
            w = 1 / (1 + jnp.exp(-w))
            talk.append((1 - w) * nll(head(a, p, h_base), target) + w * nll(head(a, p, h_thought), target))
        else:
            talk.append(nll(head(a, p, (1 - w) * h_base + w * h_thought), target))
        weights.append(w)
    return jnp.stack(talk), jnp.stack(log_probs), jnp.stack(weights)


@partial(jax.jit, static_argnums=0)
def text(a: Architecture, p: Params, row: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hidden states [L, D] of the text alone, and nll [L] of each next token (the last one means nothing)."""
    hidden = decode(a, p, p["decoder.embedding"][row], mask)
    log_probs = jax.nn.log_softmax(head(a, p, hidden), axis=-1)
    return hidden, -log_probs[jnp.arange(row.size), jnp.roll(row, -1)]


def loss(
    a: Architecture, s: ThoughtSettings, p: Params, tokens: jax.Array, mask: jax.Array, thoughts: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of given thoughts [B, R, L, T], in the words of the paper's code."""
    batch, length = tokens.shape
    count, ahead = s.num_thoughts, s.tokens_ahead
    ok = np.zeros((batch, length, ahead), bool)
    for b, j, k in np.ndindex(ok.shape):
        ok[b, j, k] = j + 1 + k < length and bool(mask[b, j + 1 + k])
    targets = [max(int(n), 1) for n in ok.sum((0, 1))]
    rewarded = max(length - 1 - ahead, 1)

    base_sum, policy, reward_sum, spread, weight_sum = (jnp.zeros(()) for _ in range(5))
    talk_sums = [jnp.zeros(()) for _ in range(ahead)]
    for b in range(batch):
        hidden, base = text(a, p, tokens[b], mask[b])
        hidden = jnp.concatenate([hidden, jnp.zeros((ahead, hidden.shape[1]))])
        for j in range(length):
            base_sum += base[j] if ok[b, j, 0] else 0.0
            scores = [
                position(a, s, p, tokens[b], mask[b], hidden, jnp.int32(j), thoughts[b, r, j]) for r in range(count)
            ]
            for talk, _, weight in scores:
                for k in range(ahead):
                    talk_sums[k] += talk[k] if ok[b, j, k] else 0.0
                weight_sum += weight[0] if ok[b, j, 0] else 0.0
            if j > length - 2 - ahead:
                continue
            rewards = [
                jax.lax.stop_gradient(sum(base[j + k] - talk[k] for k in range(ahead) if ok[b, j, k]) + jnp.zeros(()))
                for talk, _, _ in scores
            ]
            mean = sum(rewards) / count
            spread += jnp.sqrt(sum((x - mean) ** 2 for x in rewards) / count)
            for reward, (_, log_probs, _) in zip(rewards, scores, strict=True):
                advantage = reward - mean if count > 1 else reward
                if s.config.positive_only:
                    advantage = jnp.maximum(advantage, 0.0)
                each = log_probs.sum() / (s.thought_length if s.config.policy_reduction == "mean" else 1)
                policy -= advantage * each / (batch * count * rewarded)
                reward_sum += reward

    base_loss = base_sum / targets[0]
    talk_losses = [talk_sums[k] / (count * targets[k]) for k in range(ahead)]
    talk_loss = sum(talk_losses) / ahead
    weight = s.config.base_loss_weight
    total = weight * base_loss + (1 - weight) * talk_loss + s.policy_weight * policy
    return total, {
        "loss": total,
        "base_loss": base_loss,
        "talk_loss": talk_loss,
        "policy_loss": policy,
        "reward": reward_sum / (batch * count * rewarded),
        "reward_std_within_position": spread / (batch * rewarded),
        "mixing_weight": weight_sum / (count * targets[0]),
        **{f"talk_loss_{k + 1}": x for k, x in enumerate(talk_losses)},
    }


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

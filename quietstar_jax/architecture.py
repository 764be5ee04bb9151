"""The architecture of a decoder and of its adapters, shared by settings, checkpoints and plans."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from quietstar_jax.settings import Check, NonNegative, Portion, Positive, at_least, require

MOST_PARAMETERS = 10**13

FamilyName = Literal["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3"]
AdaptedMaps = Literal["none", "attention", "mlp", "all"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]
Even = Annotated[int, Check(lambda value: value > 0 and value % 2 == 0, "an even number above 0 (rotary pairs)")]


@dataclass(frozen=True)
class RopeScaling:
    """Rotary-embedding scaling, as in Hugging Face `rope_parameters`."""

    kind: RopeKind = "default"  # the formula; `default` = no scaling
    factor: Annotated[float, at_least(1.0)] = 1.0  # linear, llama3, yarn: frequencies are divided by this
    low_frequency_factor: float = 1.0  # llama3: frequencies with fewer turns in the original context are scaled fully
    high_frequency_factor: float = 4.0  # llama3: frequencies with more turns in the original context are not scaled
    original_max_positions: NonNegative[int] = 0  # llama3, yarn: context length of the original pre-training
    attention_factor: float = 0.0  # yarn: multiplies cos and sin; 0 = derived from factor
    beta_fast: float = 32.0  # yarn: frequencies with more turns in the original context are not scaled
    beta_slow: float = 1.0  # yarn: frequencies with fewer turns in the original context are scaled fully

    def conflicts(self) -> list[str]:
        return [
            *require(
                self.high_frequency_factor > self.low_frequency_factor,
                "high_frequency_factor", self.high_frequency_factor, "more than low_frequency_factor",
            ),
            *require(
                self.kind not in ("llama3", "yarn") or self.original_max_positions > 0,
                "original_max_positions", self.original_max_positions, f"a positive length for {self.kind} scaling",
            ),
        ]  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder-only transformer of one of the supported families."""

    family: FamilyName = "llama"  # affects only how checkpoints are written
    vocab_size: Positive[int] = 512  # rows of the embedding
    hidden_size: Positive[int] = 128  # width of the residual stream
    intermediate_size: Positive[int] = 384  # width of the feed-forward layers
    num_layers: Positive[int] = 3  # transformer layers
    num_heads: Positive[int] = 4  # query heads
    num_kv_heads: Positive[int] = 4  # key and value heads, each shared by as many query heads
    head_dim: Even = 32  # dimensions of a head
    max_positions: Positive[int] = 2048  # longest text, thoughts included
    rope_theta: Positive[float] = 10_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rope_local_theta: NonNegative[float] = 0.0  # rotary base of layers with a window, unscaled; 0 = as in all layers
    rotary_fraction: Portion = 1.0  # fraction of the dimensions of a head that rotate, the first ones
    rms_norm_eps: NonNegative[float] = 1e-5  # added to the mean square
    norm_adds_one: bool = False  # norms multiply by 1 + their weight (Gemma)
    norm_placement: Literal["before", "after", "around"] = "before"  # norms before, after or around each block
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"  # of the gate of the feed-forward layers
    sliding_window: NonNegative[int] = 0  # keys that a query attends to, its own included; 0 = all
    full_attention_layers: tuple[NonNegative[int], ...] = ()  # layers that ignore `sliding_window`
    qkv_bias: bool = False  # biases of the query, key and value projections
    output_bias: bool = False  # bias of the output projection of attention
    mlp_bias: bool = False  # biases of the feed-forward layers
    qk_norm: bool = False  # normalize queries and keys (Qwen3)
    qk_norm_all_heads: bool = False  # with `qk_norm`: one norm over all heads instead of one for each (OLMo 2)
    query_scale: NonNegative[float] = 0.0  # factor of the products of queries and keys; 0 = 1 / sqrt(head_dim)
    score_cap: NonNegative[float] = 0.0  # attention scores s become cap * tanh(s / cap); 0 = no cap (Gemma 2)
    logit_cap: NonNegative[float] = 0.0  # the same for logits; 0 = no cap (Gemma 2)
    embedding_multiplier: Positive[float] = 1.0  # factor of input embeddings (Gemma: sqrt(hidden_size))
    tie_embeddings: bool = False  # the output projection is the transposed embedding
    initializer_range: Positive[float] = 0.02  # standard deviation of random weights

    def has_window(self, layer: int) -> bool:
        """Whether queries of this layer attend only to the last `sliding_window` keys."""
        return bool(self.sliding_window) and layer not in self.full_attention_layers

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of a head that rotate."""
        return int(self.head_dim * self.rotary_fraction)

    def _parameters(self) -> int:
        """Approximate number of parameters in the matrices."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size)
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size

    def conflicts(self) -> list[str]:
        return [
            *require(
                self.num_heads % self.num_kv_heads == 0,
                "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads ({self.num_heads})",
            ),
            *require(
                self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
                "rotary_fraction", self.rotary_fraction, f"an even part of head_dim ({self.head_dim})",
            ),
            *require(
                self.qk_norm or not self.qk_norm_all_heads,
                "qk_norm_all_heads", self.qk_norm_all_heads, "false without qk_norm",
            ),
            *require(
                self.rope_local_theta == 0 or self.rope_local_theta > 1,
                "rope_local_theta", self.rope_local_theta, "0 or more than 1",
            ),
            *require(
                all(layer < self.num_layers for layer in self.full_attention_layers),
                "full_attention_layers", self.full_attention_layers, f"layers below num_layers ({self.num_layers})",
            ),
            *require(
                self._parameters() <= MOST_PARAMETERS, "hidden_size", self.hidden_size,
                f"smaller, or other sizes: {self._parameters():.1e} parameters are more than {MOST_PARAMETERS:.0e}",
            ),
        ]  # fmt: skip


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters (LoRA) beside linear maps of the decoder: y = x W + scale * (x A) B, where W is frozen."""

    maps: AdaptedMaps = "none"  # which maps have an adapter: the four of attention, the three of the feed-forward
    # layers (`mlp`), or all seven; unless `none`, all other weights of the decoder are frozen
    rank: Positive[int] = 16  # columns of A and rows of B
    alpha: Positive[float] = 32.0  # the scale is alpha / rank
    rank_stabilized: bool = False  # the scale is alpha / sqrt(rank) instead (rsLoRA)
    norms: bool = False  # the norms of the decoder learn too

    @property
    def scale(self) -> float:
        """The factor of the adapters' outputs."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


NO_ADAPTERS = Adapters()

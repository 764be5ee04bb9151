"""The architecture of a decoder: its sizes and variants, shared by settings, checkpoints and plans."""

from __future__ import annotations

from dataclasses import dataclass, field

from quietstar_jax.settings import one_of, require

MOST_PARAMETERS = 10**13


@dataclass(frozen=True)
class RopeScaling:
    """Rotary-embedding scaling, as in Hugging Face `rope_parameters`."""

    kind: str = "default"  # default | linear | llama3 | yarn
    factor: float = 1.0
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    original_max_positions: int = 0  # llama3, yarn: context length of the original pre-training
    attention_factor: float = 0.0  # yarn; 0 = derived from factor
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn

    def problems(self) -> list[str]:
        return [
            *one_of("kind", self.kind, ("default", "linear", "llama3", "yarn")),
            *require(
                self.high_frequency_factor > self.low_frequency_factor,
                "high_frequency_factor", self.high_frequency_factor, "more than low_frequency_factor",
            ),
            *require(self.factor >= 1.0, "factor", self.factor, "a number of at least 1"),
            *require(
                self.kind not in ("llama3", "yarn") or self.original_max_positions > 0,
                "original_max_positions", self.original_max_positions, f"a positive length for {self.kind} scaling",
            ),
        ]  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder-only transformer (Llama, Mistral, Phi-3, Qwen2, Qwen3 families)."""

    family: str = "llama"  # llama | mistral | phi3 | qwen2 | qwen3: affects only how checkpoints are written
    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rotary_fraction: float = 1.0  # fraction of the dimensions of a head that rotate, the first ones
    rms_norm_eps: float = 1e-5
    activation: str = "silu"  # silu | gelu | gelu_tanh | relu
    sliding_window: int = 0  # keys that a query attends to, its own included; 0 = all
    full_attention_layers: tuple[int, ...] = ()  # layers that ignore `sliding_window`
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of a head that rotate."""
        return int(self.head_dim * self.rotary_fraction)

    def _parameters(self) -> int:
        """Approximate number of parameters in the matrices."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size)
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size

    def problems(self) -> list[str]:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                 "head_dim", "max_positions")  # fmt: skip
        return [
            *one_of("family", self.family, ("llama", "mistral", "phi3", "qwen2", "qwen3")),
            *one_of("activation", self.activation, ("silu", "gelu", "gelu_tanh", "relu")),
            *(p for name in sizes for p in require(getattr(self, name) > 0, name, getattr(self, name), "at least 1")),
            *require(
                self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
                "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads ({self.num_heads})",
            ),
            *require(self.rope_theta > 0, "rope_theta", self.rope_theta, "a positive number"),
            *require(self.rms_norm_eps >= 0, "rms_norm_eps", self.rms_norm_eps, "0 or more"),
            *require(self.initializer_range > 0, "initializer_range", self.initializer_range, "a positive number"),
            *require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number (rotary pairs)"),
            *require(
                0 < self.rotary_fraction <= 1 and self.rotary_dim > 0 and self.rotary_dim % 2 == 0,
                "rotary_fraction", self.rotary_fraction, f"an even part of head_dim ({self.head_dim})",
            ),
            *require(self.sliding_window >= 0, "sliding_window", self.sliding_window, "0 (none) or a width"),
            *require(
                all(0 <= layer < self.num_layers for layer in self.full_attention_layers),
                "full_attention_layers", self.full_attention_layers, f"layers 0 .. {self.num_layers - 1}",
            ),
            *require(
                self._parameters() <= MOST_PARAMETERS,
                "hidden_size", self.hidden_size,
                f"sizes with at most {MOST_PARAMETERS:.0e} parameters in all, and these have {self._parameters():.1e}",
            ),
        ]  # fmt: skip

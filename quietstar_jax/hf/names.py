"""Maps names and layouts of Hugging Face tensors to ours: one table, used in both directions.

A torch linear layer stores [out, in]; we store [in, out] with separate head axes, and all layers stacked. Every tensor
of a checkpoint is split along one axis into pieces, usually one, that fill our parameters, transposed or not. Two short
numpy functions, `to_ours` and `to_theirs`, implement this for all entries.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from quietstar_jax.architecture import Architecture
from quietstar_jax.models.families import FAMILIES

Shape = tuple[int, ...]
HEADS = {
    "gate": "thought_gate.weight",
    "end_head": "thought_end.weight",
}  # a checkpoint has a head if it has this tensor
# By placement of norms: their name -> ours. Their `post_attention_layernorm` is the norm after attention, except in
# `before`: there it is the one before the feed-forward layers.
NORMS = {
    "before": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "after": {"post_attention_layernorm": "attention_post_norm", "post_feedforward_layernorm": "mlp_post_norm"},
    "around": {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
}


@dataclass(frozen=True)
class Target:
    """One of our parameters, or one layer of it."""

    path: str  # as in `named_parameters`, e.g. `layers.query`
    shape: Shape  # of the filled part, without the layer axis
    layer: int | None = None  # index along the stacked layer axis

    @property
    def index(self) -> int | tuple[()]:
        """The index into our parameter that selects this target."""
        return () if self.layer is None else self.layer


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint."""

    name: str  # e.g. `model.layers.3.self_attn.q_proj.weight`
    shape: Shape  # of their tensor
    targets: tuple[Target, ...]  # filled in order along `axis`; usually one
    transpose: bool = False  # their tensor is [out, in]
    axis: int = 0  # of their tensor


def to_ours(entry: Entry, tensor: np.ndarray) -> list[np.ndarray]:
    """Converts their tensor [entry.shape] to one array [target.shape] per target; views where possible."""
    arrays, begin = [], 0
    for target in entry.targets:
        end = begin + _piece_shape(entry, target)[entry.axis]
        piece = tensor[begin:end] if entry.axis == 0 else tensor[:, begin:end]
        arrays.append((piece.T if entry.transpose else piece).reshape(target.shape))
        begin = end
    return arrays


def to_theirs(entry: Entry, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `to_ours`."""
    pieces = []
    for target, array in zip(entry.targets, arrays, strict=True):
        shape = _piece_shape(entry, target)
        pieces.append(array.reshape(shape[::-1]).T if entry.transpose else array.reshape(shape))
    return np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, entry.axis))


def _piece_shape(entry: Entry, target: Target) -> Shape:
    """Returns the shape of the piece of their tensor that fills a target."""
    others = math.prod(entry.shape) // entry.shape[entry.axis]
    shape = list(entry.shape)
    shape[entry.axis] = math.prod(target.shape) // others
    return tuple(shape)


def decoder_entries(architecture: Architecture, root: str = "") -> list[Entry]:
    """Returns the entries for a checkpoint of one of the `FAMILIES`.

    Args:
      root: prefix of our paths, e.g. `decoder.` inside a larger model.

    Returns:
      Entries, ordered such that the layers of each parameter are consecutive.
    """
    a = architecture
    d, v = a.hidden_size, a.vocab_size
    entries = [_single("model.embed_tokens.weight", (v, d), f"{root}embedding")]
    for name, shape, ours in _layer_rules(a):
        for i in range(a.num_layers):
            targets = tuple(Target(f"{root}layers.{path}", target, i) for path, target in ours.items())
            entries.append(Entry(f"model.layers.{i}.{name}", shape, targets, transpose=len(shape) == 2))
    entries.append(_single("model.norm.weight", (d,), f"{root}final_norm"))
    if not a.tie_embeddings:
        entries.append(Entry("lm_head.weight", (v, d), (Target(f"{root}lm_head", (d, v)),), transpose=True))
    return entries


def head_entries(hidden_size: int, heads: Collection[str]) -> list[Entry]:
    """Returns the entries for those of the `HEADS` that a model has; published checkpoints lack them."""
    entries: list[Entry] = []
    for head in (head for head in HEADS if head in heads):
        weight = Entry(HEADS[head], (1, hidden_size), (Target(f"{head}.weight", (hidden_size,)),))
        entries += [weight, _single(HEADS[head].replace("weight", "bias"), (1,), f"{head}.bias")]
    return entries + ([_single("thought_gate_log_slope", (1,), "gate.log_slope")] if "gate" in heads else [])


def thought_entries(hidden_size: int) -> list[Entry]:
    """Returns the entries for the tensors that the published Quiet-STaR checkpoints add to their decoder.

    The first linear layer of the talk head reads [text, thought]; we store its two halves as separate parameters. Only
    the first row of each thought embedding [2, D] is used; the second row is preserved.
    """
    d = hidden_size
    halves = (Target("mixing_head.base_in", (d, d)), Target("mixing_head.thought_in", (d, d)))
    return [
        Entry("talk_head.0.0.weight", (d, 2 * d), halves, transpose=True, axis=1),
        _single("talk_head.0.0.bias", (d,), "mixing_head.in_bias"),
        _single("talk_head.0.2.weight", (d, d), "mixing_head.hidden", transpose=True),
        _single("talk_head.0.2.bias", (d,), "mixing_head.hidden_bias"),
        Entry("talk_head.0.4.weight", (1, d), (Target("mixing_head.out", (d, 1)),), transpose=True),
        *(
            Entry(f"{which}_embedding", (2, d), (Target(f"{which}_embedding", (d,)), Target(f"{which}_spare", (d,))))
            for which in ("start", "end")
        ),
    ]


def quietstar_entries(architecture: Architecture, heads: Collection[str] = ()) -> list[Entry]:
    """Returns all entries of a Quiet-STaR checkpoint: decoder (`decoder.`), thoughts and those of the `HEADS`."""
    thoughts = thought_entries(architecture.hidden_size) + head_entries(architecture.hidden_size, heads)
    return [*decoder_entries(architecture, "decoder."), *thoughts]


def parameter_shapes(entries: Sequence[Entry]) -> dict[str, Shape]:
    """Returns the stacked shapes of the parameters that the entries fill, by path, in order of their first entry."""
    layers: dict[str, int] = {}
    shapes: dict[str, Shape] = {}
    for target in (target for entry in entries for target in entry.targets):
        shapes[target.path] = target.shape
        if target.layer is not None:
            layers[target.path] = max(layers.get(target.path, 0), target.layer + 1)
    return {path: (layers[path], *shape) if path in layers else shape for path, shape in shapes.items()}


def _single(name: str, shape: Shape, path: str, transpose: bool = False) -> Entry:
    return Entry(name, shape, (Target(path, shape[::-1] if transpose else shape),), transpose)


def _layer_rules(a: Architecture) -> Iterator[tuple[str, Shape, dict[str, Shape]]]:
    """Yields (their name, their shape, shapes of our parameters by name) for one layer; matrices are transposed."""
    d, f, q, g, h = a.hidden_size, a.intermediate_size, a.num_heads, a.num_kv_heads, a.head_dim
    fused = FAMILIES[a.family].fused
    heads = {"query": q, "key": g, "value": g}
    for theirs, ours in NORMS[a.norm_placement].items():
        yield f"{theirs}.weight", (d,), {ours: (d,)}
    if fused:
        yield "self_attn.qkv_proj.weight", ((q + 2 * g) * h, d), {ours: (d, n, h) for ours, n in heads.items()}
    for ours, n in {} if fused else heads.items():
        yield f"self_attn.{ours[0]}_proj.weight", (n * h, d), {ours: (d, n, h)}
        if a.qkv_bias:
            yield f"self_attn.{ours[0]}_proj.bias", (n * h,), {f"{ours}_bias": (n, h)}
    yield "self_attn.o_proj.weight", (d, q * h), {"output": (q, h, d)}
    if a.output_bias:
        yield "self_attn.o_proj.bias", (d,), {"output_bias": (d,)}
    if a.qk_norm:
        for ours, n in (("query", q), ("key", g)):
            shape = (n, h) if a.qk_norm_all_heads else (h,)
            yield f"self_attn.{ours[0]}_norm.weight", (math.prod(shape),), {f"{ours}_norm": shape}
    if fused:
        yield "mlp.gate_up_proj.weight", (2 * f, d), {"gate": (d, f), "up": (d, f)}
    for ours, fan_in, fan_out in (("gate", d, f), ("up", d, f), ("down", f, d)):
        if not fused or ours == "down":
            yield f"mlp.{ours}_proj.weight", (fan_out, fan_in), {ours: (fan_in, fan_out)}
        if a.mlp_bias:
            yield f"mlp.{ours}_proj.bias", (fan_out,), {f"{ours}_bias": (fan_out,)}

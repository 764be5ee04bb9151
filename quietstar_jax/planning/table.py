"""Plans as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ROWS = (
    ("parameters", "float32"),
    ("frozen", "of the base, in model.frozen_dtype"),
    ("optimizer", "Adam moments"),
    ("reference", "a copy of the weights that learn, for the KL divergence"),
    ("cache", "keys and values of the text"),
    ("batch", ""),
    ("arguments", "all of the above, as the compiler pads them"),
    ("temporaries", "activations, gathered weights, gradients"),
    ("results", "that reuse no argument"),
    ("code", ""),
    ("total", ""),
)
MESSAGE_LINES = 40


def format_plan(plan: dict[str, Any]) -> str:
    """Formats the table that the command line prints."""
    mesh = ", ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    lines = [f"{plan['model']}, {plan['work']}", f"{plan['topology']}: {plan['devices']} x {plan['chip']}; mesh {mesh}"]
    if "positions_per_chunk" in plan:
        lines.append(
            f"simultaneously per chip: {plan['sampled_positions_per_chunk']} positions sampled, "
            f"{plan['positions_per_chunk']} scored (chunk_megabytes {plan['chunk_megabytes']})"
        )
    if plan["note"]:
        lines.append(plan["note"])
    lines += ["", "GiB per chip", *_memory_rows(plan), "", f"compiled in {plan['compile_seconds']:.0f} s"]
    if "out_of_memory" in plan:
        message = plan["out_of_memory"].splitlines()
        lines += ["", "It does not fit:", *(f"  {line}" for line in message[:MESSAGE_LINES])]
        if len(message) > MESSAGE_LINES:
            lines.append(f"  ... {len(message) - MESSAGE_LINES} more lines with --json")
        lines += ["", "Possible changes:", *(f"  - {line}" for line in plan["suggestions"])]
    if "collectives" in plan:
        lines += ["", *_collective_rows(plan)]
    if "seconds" in plan:
        lines += ["", *_time_rows(plan)]
    return "\n".join(lines)


def format_search(plans: Sequence[dict[str, Any]]) -> str:
    """Formats the plans of a search, one per row."""
    head = ("data", "fsdp", "tensor", "position", "chunk MB", "GiB", "fits", "best s", "summed s", "bound by")
    rows = []
    for plan in plans:
        total, times = plan["bytes_per_chip"].get("total"), plan.get("seconds")
        rows.append((
            *(str(plan["mesh"][name]) for name in head[:4]), str(plan["chunk_megabytes"]),
            f"{total / 2**30:.1f}" if total else "?", "yes" if plan["fits"] else "no",
            f"{times['best']:.2f}" if times else "-", f"{times['summed']:.2f}" if times else "-",
            plan.get("bound_by", "-"),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    )


def _memory_rows(plan: dict[str, Any]) -> list[str]:
    lines = []
    for name, remark in ROWS:
        if name not in plan["bytes_per_chip"]:
            continue
        line = f"  {name:<14}{plan['bytes_per_chip'][name] / 2**30:9.2f}"
        if name == "total" and plan["hbm_bytes"]:
            line += f"  of {plan['hbm_bytes'] / 2**30:.1f}: {'fits' if plan['fits'] else 'does not fit'}"
        elif remark:
            line += f"  {remark}"
        lines.append(line)
    return lines


def _collective_rows(plan: dict[str, Any]) -> list[str]:
    lines = ["sent per chip             times        GB"]
    for kind, totals in plan["collectives"].items():
        remark = f"  {totals['unknown']} of them in loops of unknown length" if totals["unknown"] else ""
        lines.append(f"  {kind:<20}{totals['times']:>9,}{totals['sent'] / 1e9:10.2f}{remark}")
    return lines if len(lines) > 1 else ["nothing is sent between chips"]


def _time_rows(plan: dict[str, Any]) -> list[str]:
    times, rate = plan["seconds"], plan["tokens_per_second_per_chip"]
    return [
        f"{plan['necessary_flops']:.3g} FLOP necessary, {plan['recomputed_flops']:.3g} recomputed",
        f"estimated at published rates, s: compute {times['compute']:.3g}, weights from memory {times['weights']:.3g}, "
        f"communication {times['communication']:.3g}",
        f"  {times['best']:.3g} s where all overlap (bound by {plan['bound_by']}), {times['summed']:.3g} s one after "
        "the other",
        f"  {rate['summed']:.3g} .. {rate['best']:.3g} tokens of text per second and chip",
    ]

"""Compiles a program and reports what it needs: memory, communication, and time at published rates."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import jax

from quietstar_jax.config import Config
from quietstar_jax.parallel.chips import Chip
from quietstar_jax.parallel.mesh import resolve
from quietstar_jax.planning import PROGRAMS
from quietstar_jax.planning.hlo import collectives
from quietstar_jax.planning.programs import Program, generate_program, train_program
from quietstar_jax.planning.targets import Target

MAKERS: dict[str, Callable[[Config, Target, str], Program]] = dict(
    zip(PROGRAMS, (train_program, generate_program), strict=True)
)
# The two out-of-memory messages of the TPU compiler, before and after it has allocated the temporaries.
_TEMPORARIES = re.compile(r"for HLO temporaries \(([\d.]+)([KMG]?)\) exceeds available HBM \(([\d.]+)([KMG]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def plan(config: Config, target: Target, program: str = "train", phase: str = "") -> dict[str, Any]:
    """Returns what the program needs on each device, as JSON values.

    If it does not fit, `fits` is False, `out_of_memory` is the compiler's message (or, for a target whose memory the
    compiler does not check, that the total is too large), and `suggestions` lists what to change.

    Raises:
      ConfigError: the configuration does not fit the devices.
    """
    built = MAKERS[program](config, target, phase)
    chip = target.chip
    result: dict[str, Any] = {
        "topology": target.name,
        "devices": len(target.devices),
        "chip": chip.name,
        "compiler": target.compiler,
        "note": target.note,
        "program": program,
        "work": built.what,
        "model": config.model.checkpoint or "random weights",
        "mesh": mesh_sizes(config, len(target.devices)),
        "chunk_megabytes": config.thought.chunk_megabytes,
        **built.sizes,
        "bytes_per_chip": dict(built.bytes_per_device),
        "hbm_bytes": chip.hbm or None,
        "necessary_flops": built.flops,
        "recomputed_flops": built.recomputed,
        "tokens": built.tokens,
    }
    begun = time.perf_counter()
    try:
        compiled = built.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        result |= {"compile_seconds": time.perf_counter() - begun, "fits": False, "out_of_memory": str(error)}
        result["bytes_per_chip"] |= _memory_that_is_missing(str(error), result["bytes_per_chip"])
        return result | {"suggestions": suggestions(config, result)}
    result |= {"compile_seconds": time.perf_counter() - begun}
    result["bytes_per_chip"] |= _memory(compiled.memory_analysis())
    total = result["bytes_per_chip"]["total"]
    result["fits"] = not chip.hbm or total <= chip.hbm
    if not result["fits"]:
        result["out_of_memory"] = f"{total / 1e9:.1f} GB are needed, {chip.name} has {chip.hbm / 1e9:.1f} GB."
        result["suggestions"] = suggestions(config, result)
    sent = collectives(compiled.as_text(), len(target.devices))
    result["collectives"] = {kind: totals._asdict() for kind, totals in sent.items()}
    if chip.flops:
        result |= seconds(built, chip, len(target.devices), sum(totals.sent for totals in sent.values()))
    return result


def _memory(memory: Any) -> dict[str, float]:
    """Bytes per device according to the compiler. Donated buffers are counted once."""
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    return {
        "arguments": float(arguments),
        "temporaries": float(temporaries),
        "results": float(results),
        "code": float(code),
        "total": float(arguments + temporaries + results + code),
    }


def _memory_that_is_missing(message: str, arguments: dict[str, float]) -> dict[str, float]:
    """The numbers in an out-of-memory message."""
    used, temporaries = _USED.search(message), _TEMPORARIES.search(message)
    if used:
        return {"total": _bytes(used[1], used[2]), "usable": _bytes(used[3], used[4])}
    if temporaries:
        meanwhile = _bytes(temporaries[1], temporaries[2])
        return {
            "temporaries": meanwhile,
            "total": meanwhile + sum(arguments.values()),
            "usable": _bytes(temporaries[3], temporaries[4]),
        }
    return {}


def _bytes(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]


def seconds(program: Program, chip: Chip, devices: int, sent: float) -> dict[str, Any]:
    """Estimates the times of compute, weights and communication in one run of the program, at the published rates.

    `best` overlaps all three, `summed` runs one after the other. Weights are the only memory traffic that is counted,
    and each byte is sent along one dimension of the torus.
    """
    compute = (program.flops + program.recomputed) / (devices * chip.flops)
    memory, network = program.weight_reads / chip.hbm_rate, sent / chip.axis_rate
    best, worst = max(compute, memory, network), compute + memory + network
    return {
        "seconds": {"compute": compute, "weights": memory, "communication": network, "best": best, "summed": worst},
        "tokens_per_second_per_chip": {
            "best": program.tokens / best / devices,
            "summed": program.tokens / worst / devices,
        },
        "bound_by": max(("compute", compute), ("weights", memory), ("communication", network), key=lambda x: x[1])[0],
    }


def mesh_sizes(config: Config, devices: int) -> dict[str, int]:
    """Returns the sizes of the mesh, with -1 replaced by its value."""
    return resolve(config.mesh, devices)


def suggestions(config: Config, result: dict[str, Any]) -> list[str]:
    """Returns changes that may make a program fit, likeliest first."""
    mesh, bytes_per_chip = result["mesh"], result["bytes_per_chip"]
    hbm = bytes_per_chip.get("usable", result["hbm_bytes"])
    parts = ("parameters", "frozen", "optimizer", "reference")
    state = sum(bytes_per_chip.get(part, 0.0) for part in parts)
    ways = mesh["fsdp"] * mesh["tensor"]
    lines = []
    if state > 0.4 * hbm:
        needed = max(2 * ways, 1 << int(ways * state / (0.3 * hbm)).bit_length())
        others = "" if needed <= result["devices"] else f", which needs more than these {result['devices']} chips"
        lines.append(
            f"more fsdp or tensor: weights, Adam moments and a reference are split in {ways} (fsdp {mesh['fsdp']} x "
            f"tensor {mesh['tensor']}) and need {state / 2**30:.1f} GiB of {hbm / 2**30:.1f}; try fsdp x tensor = "
            f"{needed}{others}"
        )
    if result["program"] == "generate":
        return [*lines, "fewer texts in a batch (evaluation.batch_size), or shorter ones (data.sequence_length)"]
    if lines and config.model.adapters.maps == "none":
        lines.append("adapters on a frozen bfloat16 base: --config.model.adapters.maps=all (needs model.checkpoint)")
    if not config.model.rematerialize:
        lines.append("recompute layers in the backward pass: --config.model.rematerialize=True")
    if result.get("positions_per_chunk", 1) > 1:
        lines.append(
            f"a smaller chunk: --config.thought.chunk_megabytes={max(1, config.thought.chunk_megabytes // 2)} (now "
            f"{config.thought.chunk_megabytes}, {result['positions_per_chunk']} positions simultaneously)"
        )
    lines.append("fewer sequences simultaneously: more phases[i].microbatches, if a device has more than one sequence")
    lines.append("shorter or fewer thoughts: phases[i].thought_length, num_thoughts, tokens_ahead")
    return lines

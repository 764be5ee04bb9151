"""Communication between the devices of a compiled program, read from its HLO text; loops count once per iteration."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[subf]\d+|bf16|f8\w*|c64|c128)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ORIGIN = re.compile(r"metadata=\{([^}]*)\}")
JAX_CHANNEL = "1"  # of collectives that the program calls (`psum` in a `shard_map`), not of the partitioner's
_IN_PROGRESS = ("fused_computation", "async_collective_fusion")  # names of the parts of an asynchronous collective
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


class Collective(NamedTuple):
    """One kind of collective, summed over a program.

    Attributes:
      times: number of collectives in which each device participates.
      sent: bytes that each device sends in all of them, with the algorithm that sends the fewest (rings).
      unknown: how many of them are in a loop with an unknown trip count; such a loop counts as one iteration.
    """

    times: int = 0
    sent: float = 0.0
    unknown: int = 0


def collectives(text: str, devices: int) -> dict[str, Collective]:
    """Returns the communication of a compiled program (`compiled.as_text()`) by kind.

    Args:
      devices: number of devices of the program; the size of groups that the text does not give.
    """
    bodies, entry = _computations(text)
    turns, unknown = _turns(bodies, entry)
    totals: dict[str, Collective] = defaultdict(Collective)
    for kind, sent, at in _instances(bodies, turns, devices):
        times = turns[at]
        before = totals[kind]
        totals[kind] = Collective(
            before.times + times, before.sent + sent * times, before.unknown + (times if at in unknown else 0)
        )
    return {kind: totals[kind] for kind in KINDS if kind in totals}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Instructions by computation, and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = head.group(2)
            bodies[current] = []
            entry = current if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            bodies[current].append(line)
    return bodies, entry


def _turns(bodies: Mapping[str, list[str]], entry: str) -> tuple[dict[str, int], set[str]]:
    """How often each computation runs, and the computations inside loops with an unknown trip count."""
    turns: dict[str, int] = defaultdict(int)
    unknown: set[str] = set()

    def visit(name: str, times: int, uncertain: bool) -> None:
        turns[name] += times
        if uncertain:
            unknown.add(name)
        for line in bodies.get(name, ()):
            loop = _LOOP.search(line)
            if loop:
                trips = _trips(line, bodies.get(loop.group(1), []))
                visit(loop.group(2), times * (trips or 1), uncertain or trips is None)
                continue
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().removeprefix("%") for branch in branches.split(",")]
            for callee in called:
                visit(callee, times, uncertain)

    visit(entry, 1, False)
    return turns, unknown


def _trips(loop: str, condition: list[str]) -> int | None:
    """Trip count of a loop: from the compiler, or the only constant that its counter (from 0) is compared with."""
    known = _KNOWN_TRIPS.search(loop)
    if known:
        return int(known.group(1))
    constants = {int(number) for line in condition for number in _CONSTANT.findall(line)}
    return constants.pop() if len(constants) == 1 else None


def _instances(
    bodies: Mapping[str, list[str]], turns: Mapping[str, int], devices: int
) -> Iterator[tuple[str, float, str]]:
    """Yields (kind, bytes sent by a device, computation) of every collective.

    A TPU program lists an asynchronous collective several times, in the computations between which it is in progress;
    they are one if their channel is the same. All collectives on `JAX_CHANNEL` have the same channel: two of them
    are one if both are in such computations, have the same shape and origin, and are called from the same computation.
    """
    callers = {callee: name for name, lines in bodies.items() for line in lines for callee in _CALLED.findall(line)}
    seen: set[tuple[str, ...]] = set()
    for name, lines in bodies.items():
        if not turns.get(name):
            continue
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None:
                continue
            kind, channel = match.group(1), _CHANNEL.search(line)
            part: tuple[str, ...] = ()
            if channel and channel.group(1) != JAX_CHANNEL:
                part = (kind, channel.group(1))
            elif channel and name.startswith(_IN_PROGRESS):
                result, origin = _ARRAY.findall(line[: match.start()]), _ORIGIN.search(line)
                part = (kind, str(result), callers.get(name, ""), origin.group(1) if origin else "")
            if part and part in seen:
                continue
            seen.add(part)
            # A TPU program expresses a reduce-scatter as the all-reduce inside a fusion with that name.
            if kind == "all-reduce" and "reduce-scatter" in name:
                kind = "reduce-scatter"
            size = _result_bytes(line, match)
            yield kind, sent_bytes(kind, size, _group_size(line, devices), scattered=kind != match.group(1)), name


def sent_bytes(kind: str, size: float, group: int, *, scattered: bool = False) -> float:
    """Bytes that a device sends for one collective.

    Args:
      size: bytes of its result on a device; with `scattered`, bytes of the array that a reduce-scatter reduces.
      group: number of participating devices.
    """
    if group <= 1:
        return 0.0
    rest = (group - 1) / group
    if kind == "all-reduce":
        return 2 * size * rest
    if kind == "reduce-scatter":
        return size * rest if scattered else size * (group - 1)
    return size if kind == "collective-permute" else size * rest


def _result_bytes(line: str, match: re.Match) -> float:
    result = line[line.index("=") + 1 : match.start()].strip()
    arrays = [_bytes(*array) for array in _ARRAY.findall(result)]
    if match.group(2) and match.group(1) != "all-reduce":
        return max(arrays)  # the start of an asynchronous one also returns its operands
    return sum(arrays)


def _bytes(dtype: str, dimensions: str) -> float:
    digits = re.search(r"\d+", dtype)
    bits = 8 if dtype == "pred" or dtype.startswith("f8") else int(digits.group()) if digits else 8
    return bits / 8 * math.prod(int(size) for size in dimensions.split(",") if size)


def _group_size(line: str, devices: int) -> int:
    """Number of devices that participate in a collective, from any of the three notations of HLO."""
    listed = _LISTED_GROUPS.search(line)
    if listed:
        return listed.group(1).count(",") + 1
    iota = _IOTA_GROUPS.search(line)
    if iota:
        return int(iota.group(1))
    mesh = _MESH_GROUPS.search(line)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh.group(2)))
    return 2 if "source_target_pairs" in line else devices

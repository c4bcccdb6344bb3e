"""What a compiled program sends between devices, read from its HLO text.

A collective inside a loop counts as often as the loop runs, where XLA knows how often that is.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}  # others have them in their name: s32, u8

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|calls|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      size: bytes of the whole array: what each device ends with (all-gather) or starts with (the others).
      times: how often it runs.
    """

    kind: str
    size: int
    times: int


def moved(compiled: Any) -> dict[str, int]:
    """Bytes that each kind of collective of a compiled program handles on one device, all of `KINDS`.

    The whole array counts: n devices in a ring send (n - 1)/n of it, and twice that in an all-reduce.
    """
    total = dict.fromkeys(KINDS, 0)
    for each in collectives(compiled.as_text()):
        total[each.kind] += each.size * each.times
    return total


def collectives(text: str) -> list[Collective]:
    """The collectives of an HLO module."""
    times = _times(text)
    found = []
    for name, line in _lines(text):
        if match := _INSTRUCTION.match(line):
            kind = match[3].removesuffix("-start")
            if kind in KINDS:
                found.append(Collective(kind, _size(match[2], match[3], line), times[name]))
    return found


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Each line with the computation it belongs to."""
    name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
        yield name, line


def _times(text: str) -> Counter[str]:
    """How often each computation runs: once for the entry, `n` times its caller for the body of a loop of `n` rounds."""
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    entry = ""
    for name, line in _lines(text):
        if line.startswith("ENTRY"):
            entry = name
        rounds = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
        for match in _CALLED.finditer(line):
            calls[name] += [(called, int(rounds[1]) if rounds else 1) for called in re.findall(r"%([\w.\-]+)", match[1])]
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for called, rounds in calls[name]:
            visit(called, count * rounds)

    visit(entry, 1)
    return times


def _size(result: str, operation: str, line: str) -> int:
    """Bytes of the whole array of a collective, from the type of its result."""
    sizes = [_bytes(kind, shape) for kind, shape in _SHAPE.findall(result)]
    if operation == "all-gather-start":  # (operands, results)
        return sum(sizes[len(sizes) // 2 :])
    if operation == "collective-permute-start":  # (operand, result, ...)
        return sizes[1]
    return sum(sizes) * (_group(line) if operation.startswith("reduce-scatter") else 1)


def _bytes(kind: str, shape: str) -> int:
    bits = BITS.get(kind) or int(re.sub(r"\D", "", kind[:4]) or 0)
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8


def _group(line: str) -> int:
    """Devices that take part together in the collective of `line`."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
    raise ValueError(f"no group of devices in {line.strip()[:200]}")

"""What instructions cost on an H100 or H200, by what NVIDIA publishes and some assumptions.

An SM has four schedulers, each of which starts one instruction of a warp of 32 threads a cycle, if
the unit that does it is free. Nothing here was measured.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from counting.sass import Instruction

PROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.98e9
# Bytes per second of the memory, by the data sheets; and of the cache before it, assumed.
MEMORY = {"H100 SXM": 3.35e12, "H200": 4.8e12}
CACHE = 5.5e12
# Of an SM: registers, shared memory, warps, programs.
_REGISTERS, _SHARED, _WARPS, _PROGRAMS = 65536, 227 * 1024, 64, 32
# Products of TF32 a cycle, of an SM's four units together.
_PRODUCTS = 1024
# Cycles from an instruction to what waits for its result, where the compiler doesn't say them.
# Assumed, near what others have measured on Hopper.
LATENCY = {
    "special": 24,
    "shared": 30,
    "shuffle": 24,
    "memory": 500,
    "matrix": 33,
    "double": 16,
}
# Of a load, where each turn reads what the one before has read.
AGAIN = 40
_BARRIER, _CONSTANT = 20, 30

_KINDS = {
    "float": r"F(FMA|ADD|MUL)|HFMA2|HADD2|HMUL2",
    "double": r"D(FMA|ADD|MUL|SETP|MNMX)",
    "special": r"MUFU|F2I|I2F|F2F|FRND|FCHK",
    "matrix": r"[HIQD]G?MMA|UTC\w*MMA",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS",
    "shuffle": r"SHFL|REDUX|VOTE|MATCH",
    "memory": r"LDG|STG|LD|ST|LDGSTS|ATOMG|RED|ATOM",
    "spilled": r"LDL|STL",
    "waiting": r"BAR|WARPGROUP|WARPSYNC|MEMBAR|FENCE|DEPBAR|LDGDEPBAR|ERRBAR|NOP|NANOSLEEP",
}
KINDS = (*_KINDS, "integer")


def kind_of(instruction: Instruction) -> str:
    """One of KINDS: which unit does it. What moves, chooses, compares and branches is "integer"."""
    for kind, names in _KINDS.items():
        if re.fullmatch(names, instruction.name):
            return kind
    return "integer"


def occupied(instruction: Instruction) -> int:
    """Cycles for which its unit, of one scheduler, begins nothing else.

    By the table of throughputs in NVIDIA's CUDA C++ Programming Guide, for 9.0: 32 floats, 16
    integers, doubles, or moves, and 4 special functions a cycle, a scheduler. Shared memory gives
    128 bytes a cycle to the SM.
    """
    kind = kind_of(instruction)
    if kind == "matrix":
        return max(1, math.ceil(_multiplied(instruction)))
    if kind == "shared":
        return SCHEDULERS * _words(instruction)
    return {"integer": 2, "double": 2, "special": 8, "shuffle": SCHEDULERS}.get(kind, 1)


def _multiplied(instruction: Instruction) -> float:
    if shape := re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.modifiers):
        return math.prod(map(int, shape.groups())) / _PRODUCTS  # four warps together
    rows, columns, inner = {"1688": (16, 8, 8), "1684": (16, 8, 4), "16816": (16, 8, 16)}[
        re.search(r"\.(\d+)", instruction.modifiers)[1]
    ]
    return rows * columns * inner / (_PRODUCTS / SCHEDULERS)


def _words(instruction: Instruction) -> int:
    wide = re.search(r"\.(64|128)\b", instruction.modifiers)
    if instruction.name in ("LDSM", "STSM"):
        wide_of = re.search(r"\.([124])\b", instruction.modifiers)
        return int(wide_of[1]) if wide_of else 1
    return int(wide[1]) // 32 if wide else 1


def alone(path: Iterable[Instruction], again: bool = False) -> int:
    """Cycles of a warp that has a scheduler to itself, from the first to the last of these.

    The compiler writes into each instruction how long the next one has to wait, and which results
    it waits for; those come after LATENCY, or when a unit is free.

    Args:
        again: all loads are of what the turn before has read, too, and so near.
    """
    latency = LATENCY | ({"memory": AGAIN} if again else {})
    now, lifted, free = 0, [0] * 6, Counter()
    for each in path:
        kind, busy = kind_of(each), occupied(each)
        now = max([now, free[kind], *(lifted[bar] for bar in each.waits)])
        if each.name == "WARPGROUP" and ".DEPBAR" in each.modifiers:
            now = max(now, free["matrix"] + latency["matrix"])
        if each.name == "BAR":
            now += _BARRIER
        free[kind] = max(now, free[kind]) + busy
        if each.sets is not None:
            lifted[each.sets] = free[kind] + latency.get(kind, _CONSTANT)
        if each.frees is not None:
            lifted[each.frees] = free[kind] + _BARRIER
        # The products of a group of warps go on while these do something else.
        now += max(1, each.stall)
    return now


class Kernel(NamedTuple):
    """What a turn of a kernel's loop takes.

    rows:   of one environment each, of a turn.
    path:   instructions of a warp.
    warps, registers (of a thread), shared (bytes): of a program.
    moved:  bytes of a row in memory.
    asked:  bytes of a row that loads and stores move, wherever they are.
    again:  as in `alone`.
    """

    rows: int
    path: tuple[Instruction, ...]
    warps: int
    registers: int
    shared: int
    moved: float
    asked: float
    again: bool = False

    @property
    def alone(self) -> int:
        """Cycles of a turn of a program that is alone on its processor."""
        return alone(self.path, self.again)

    @property
    def counts(self) -> dict[str, float]:
        """Instructions of warps a row, by kind."""
        found = Counter(map(kind_of, self.path))
        return {kind: found[kind] * self.warps / self.rows for kind in KINDS}

    @property
    def busy(self) -> dict[str, float]:
        """Cycles a row for which units of a scheduler are occupied; "issue": its own."""
        found = Counter()
        for each in self.path:
            found[kind_of(each)] += occupied(each)
        found["issue"] = len(self.path)
        return {kind: cycles * self.warps / self.rows for kind, cycles in found.items()}

    @property
    def at_once(self) -> int:
        """Programs that one SM holds."""
        of_warp = 256 * math.ceil(32 * self.registers / 256)
        return min(
            _REGISTERS // (of_warp * self.warps),
            _SHARED // (self.shared + 1024),
            _WARPS // self.warps,
            _PROGRAMS,
        )

    def bounds(self, programs: int) -> dict[str, float]:
        """Rows a second that each thing allows, of so many programs with equally many turns."""
        processors = min(programs, PROCESSORS)
        unit, cycles = max(self.busy.items(), key=lambda one: one[1])
        rounds = math.ceil(programs / (PROCESSORS * self.at_once))
        found = {
            unit: processors * SCHEDULERS * CLOCK / cycles,
            "latency": programs * self.rows * CLOCK / (rounds * self.alone),
            "cache": CACHE / self.asked,
        }
        return found | {f"memory, {name}": speed / self.moved for name, speed in MEMORY.items()}

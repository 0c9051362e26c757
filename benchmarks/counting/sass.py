"""A kernel's machine code, as `cuobjdump -sass` prints it: its instructions, loops and paths."""

import graphlib
import re
from typing import NamedTuple

# An address, perhaps a guard, an instruction, and its lower and upper 64 bits.
_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)((?:\.\w+)*)\s*([^;]*);\s+/\* 0x\w{16} \*/"
    r"\s*/\* 0x(\w{16}) \*/"
)
# What a scheduler is told of an instruction lies from here on in the upper bits.
_CONTROL = 41


class Instruction(NamedTuple):
    """One instruction of a warp.

    guard:     whether it depends on a predicate if it is done.
    name:      as "BAR".
    modifiers: as ".SYNC.DEFER_BLOCKING".
    operands:  as "R2, [R4.64]".
    stall:     cycles until the next one of its warp.
    sets:      which of six barriers is lifted when its result is there; None.
    frees:     which is lifted when its operands were read; None.
    waits:     barriers that it waits for.
    """

    address: int
    guard: bool
    name: str
    modifiers: str
    operands: str
    stall: int
    sets: int | None
    frees: int | None
    waits: tuple[int, ...]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        if self.name != "BRA":
            return None
        return int(self.operands.split(",")[-1].strip().strip("`()"), 16)

    @property
    def is_conditional(self) -> bool:
        """Whether the next instruction may follow a branch or an exit."""
        return self.guard or "," in self.operands


def instructions(text: str) -> list[Instruction]:
    """Those of one function, in order.

    Raises:
        ValueError: there is none, or a branch that goes wherever a register says.
    """
    found = []
    for each in _LINE.finditer(text):
        address, guard, name, modifiers, operands, upper = each.groups()
        if name in ("BRX", "JMX", "BRXU", "JMXU"):
            raise ValueError(f"expected branches with a target, got {name}")
        control = int(upper, 16) >> _CONTROL
        sets, frees = (control >> 5) & 7, (control >> 8) & 7
        waits = tuple(bar for bar in range(6) if control >> (11 + bar) & 1)
        found.append(
            Instruction(
                int(address, 16),
                guard is not None,
                name,
                modifiers,
                operands.strip(),
                control & 15,
                None if sets == 7 else sets,
                None if frees == 7 else frees,
                waits,
            )
        )
    if not found:
        raise ValueError("expected the output of `cuobjdump -sass`, got no instruction")
    return found


def following(code: list[Instruction]) -> list[list[int]]:
    """The places of what may follow each instruction. A call comes back."""
    place = {each.address: i for i, each in enumerate(code)}
    found = []
    for i, each in enumerate(code):
        goes_on = i + 1 < len(code)
        if each.name in ("EXIT", "RET") or each.target is not None:
            goes_on &= each.is_conditional
        after = [i + 1] * goes_on
        if each.target is not None:
            after.append(place[each.target])
        found.append(after)
    return found


class Loop(NamedTuple):
    """Places of instructions: where it begins, and all that belong to it."""

    first: int
    body: frozenset[int]


def loops(code: list[Instruction]) -> list[Loop]:
    """Those that turn more than one instruction, by where they begin.

    A loop begins where a branch goes back to, if nothing reaches that branch otherwise. Of several
    that begin at one place one is made.
    """
    after = following(code)
    before: list[list[int]] = [[] for _ in code]
    for i, each in enumerate(after):
        for place in each:
            before[place].append(i)
    bodies: dict[int, set[int]] = {}
    for last in _reached(after, 0, without=-1):  # what is only called is left out
        for first in after[last]:
            if first < last and last not in _reached(after, 0, without=first):
                body = bodies.setdefault(first, {first})
                body |= _reached(before, last, without=first)
    return [Loop(first, frozenset(body)) for first, body in sorted(bodies.items())]


def _reached(edges: list[list[int]], start: int, without: int) -> set[int]:
    found, left = set(), [start]
    while left:
        place = left.pop()
        if place != without and place not in found:
            found.add(place)
            left += edges[place]
    return found


def longest(code: list[Instruction], loop: Loop) -> list[Instruction]:
    """One turn of a loop in which everything happens that can happen in one, in order.

    But for calls, where there is a way without: they are the slow way of a division, of numbers
    that nearly are none. A loop within is turned once; of what is called, only the call is there.
    """
    after = following(code)
    within = {each.first: each.body for each in loops(code)}

    def goes_on(place: int, to: int) -> bool:
        return to in loop.body and not (to in within and place in within[to])

    onward = {p: [to for to in after[p] if goes_on(p, to)] for p in loop.body}
    # From here on: calls, by less than none; instructions; and the next one.
    best: dict[int, tuple[int, int, int]] = {}
    # From the last to the first: each place after all that may follow it.
    for place in graphlib.TopologicalSorter(onward).static_order():
        ways = [(*best[to][:2], to) for to in onward[place] if to in best]
        if loop.first in after[place]:
            ways.append((0, 0, -1))
        if ways:
            calls, count, to = max(ways)
            best[place] = calls - (code[place].name == "CALL"), count + 1, to
    path, place = [], loop.first
    while place != -1:
        path.append(code[place])
        place = best[place][2]
    return path

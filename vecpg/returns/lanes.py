"""Eight environments step together while time lies contiguous: built instruction by instruction.

Of a batch whose time is contiguous, eight steps of eight environments are turned in registers, and
then step like rows.
"""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from vecpg.returns.halves import narrowed, widened
from vecpg.returns.vectors import pick, spread, turned_halves


@intrinsic
def eight_steps(context, bases, offset, carries, gamma, like):
    """Eight steps back in eight lanes at once, from step `offset` + 7 to `offset`.

    `bases` is the address of eight addresses of rewards, eight of dones and eight of results,
    `carries` that of eight float64. Eight steps of eight lanes are loaded, turned so that a vector
    holds one step of four lanes, stepped back one by one, turned again and stored.
    """

    def build(target, builder, signature, args):
        halves = [_Lanes(target, builder, args, like, first) for first in (0, 4)]
        for step in reversed(range(8)):
            for lanes in halves:
                lanes.results[step] = lanes.carry = lanes.back(step)
        for lanes in halves:
            lanes.store()
        return target.get_dummy_value()

    return types.none(types.intp, types.intp, types.intp, types.float64, like), build


@intrinsic
def eight_masked_steps(context, bases, offset, carries, gamma, passing, open, like):
    """As `eight_steps`, with eight addresses of a mask behind the others.

    A masked step multiplies the carry by `passing`, and clears it where `open` is 0, not -1.
    """

    def build(target, builder, signature, args):
        halves = [_Lanes(target, builder, args, like, first) for first in (0, 4)]
        passing, kept = spread(builder, args[4], 4), spread(builder, args[5], 4)
        reals = [lanes.zero_flags(3) for lanes in halves]
        for step in reversed(range(8)):
            for lanes, real in zip(halves, reals, strict=True):
                here = lanes.back(step)
                passed = lanes.cleared(builder.fmul(passing, lanes.carry), kept)
                masked = lanes.of_step(real, step)
                lanes.results[step] = lanes.cleared(here, builder.not_(masked))
                is_masked = builder.icmp_signed("<", masked, lanes.none)
                lanes.carry = builder.select(is_masked, passed, here)
        for lanes in halves:
            lanes.store()
        return target.get_dummy_value()

    given = types.intp, types.intp, types.intp, types.float64, types.float64, types.intp, like
    return types.none(*given), build


class _Lanes:
    """Builds eight steps of four lanes, of which the first has the number `first`.

    AVX moves elements within halves of a vector in one instruction, and across them in more. So a
    vector holds step k of four lanes in one half and step k + 4 in the other, and the flags, eight
    bytes a lane, are spread to the width of the carries in one move for each step.
    """

    def __init__(self, target, builder, args, like, first) -> None:
        self.target, self.builder, self.like, self.first = target, builder, like, first
        self.bases, self.offset = args[0:2]
        wide = ir.VectorType(ir.DoubleType(), 4)
        self.bits = ir.VectorType(ir.IntType(64), 4)
        self.none = ir.Constant(self.bits, [0] * 4)
        place = builder.add(args[2], self.offset.type(8 * first))
        self.carries = builder.inttoptr(place, wide.as_pointer())
        self.carry = builder.load(self.carries, align=8)
        self.gamma = spread(builder, args[3], 4)
        self.paid = turned_halves(self.builder, [self.load(each) for each in self.places(0, like)])
        self.open = self.zero_flags(1)
        self.results = [None] * 8

    def load(self, place):
        """Eight elements, of which those of 16 bits become float32."""
        row = self.builder.load(place, align=1)
        if isinstance(self.like, types.Float):
            return row
        return widened(self.target, self.builder, row, self.like)

    def places(self, array, kind):
        """Where the lanes' next eight elements of the array with that number lie."""
        element = self.target.get_value_type(kind)
        vector = ir.VectorType(element, 8).as_pointer()
        table = self.builder.inttoptr(self.bases, self.offset.type.as_pointer())
        skipped = self.builder.mul(
            self.offset, self.offset.type(self.target.get_abi_sizeof(element))
        )
        for lane in range(self.first, self.first + 4):
            place = self.builder.gep(table, [self.offset.type(8 * array + lane)])
            address = self.builder.add(self.builder.load(place), skipped)
            yield self.builder.inttoptr(address, vector)

    def zero_flags(self, array):
        """The lanes' next flags: eight bits for each, all set where it is 0."""
        rows = [self.builder.load(each, align=1) for each in self.places(array, types.uint8)]
        pairs = [pick(self.builder, rows[i], rows[i + 1], range(16)) for i in (0, 2)]
        flags = pick(self.builder, *pairs, range(32))
        zero = self.builder.icmp_unsigned("==", flags, ir.Constant(flags.type, [0] * 32))
        zero = self.builder.sext(zero, flags.type)
        return zero

    def of_step(self, zero, step):
        """Of what `zero_flags` returns, that of one step."""
        places = [8 * lane + step for lane in range(4) for _ in range(8)]
        return self.builder.bitcast(pick(self.builder, zero, zero, places), self.bits)

    def cleared(self, values, kept):
        """The values where all bits of `kept` are set, 0 where none is, whatever the value is."""
        bits = self.builder.and_(self.builder.bitcast(values, self.bits), kept)
        return self.builder.bitcast(bits, self.carry.type)

    def back(self, step):
        both = self.paid[step % 4]
        paid = pick(self.builder, both, both, range(4) if step < 4 else range(4, 8))
        if self.like != types.float64:
            paid = self.builder.fpext(paid, self.carry.type)
        # Cleared before it is multiplied: 0 times infinity is NaN.
        following = self.cleared(self.carry, self.of_step(self.open, step))
        discounted = self.builder.fmul(self.gamma, following, flags=("contract",))
        return self.builder.fadd(paid, discounted, flags=("contract",))

    def store(self):
        self.builder.store(self.carry, self.carries, align=8)
        rows = [
            pick(self.builder, self.results[k], self.results[k + 4], range(8)) for k in range(4)
        ]
        if self.like != types.float64:
            narrow = ir.VectorType(ir.FloatType(), 8)
            rows = [self.builder.fptrunc(row, narrow) for row in rows]
        places = self.places(2, self.like)
        for place, row in zip(places, turned_halves(self.builder, rows), strict=True):
            if not isinstance(self.like, types.Float):
                row = narrowed(self.target, self.builder, row, self.like)
            self.builder.store(row, place, align=1)

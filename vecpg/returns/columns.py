"""Columns of a narrow batch step together, their carries in registers: built instruction by
instruction.

Where a row has few elements, walking from row to row costs as much as its elements: the carries are
read and written for each, and a loop over elements begins anew.
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from vecpg.returns.halves import narrowed, widened
from vecpg.returns.vectors import spread


def _steps(width, masked):
    @intrinsic
    def steps(
        context,
        paid,
        paid_row,
        ends,
        ends_row,
        out,
        out_row,
        real,
        real_row,
        carries,
        length,
        gamma,
        passing,
        is_open,
        like,
    ):
        """`length` rows back in `width` columns that lie side by side, to the first row.

        Addresses are those of the first reward, done, result and mark of the columns, each with the
        elements from row to row; `carries` is that of float64. A masked row multiplies a carry by
        `passing`, and clears it where not `is_open`.
        """

        def build(target, builder, signature, args):
            columns = _Columns(target, builder, like, width, args)
            rows = args[9]
            with cgutils.for_range(builder, rows) as loop:
                last = builder.sub(rows, rows.type(1))
                columns.back(builder.sub(last, loop.index), masked)
            builder.store(builder.load(columns.carry), columns.carries, align=8)
            return target.get_dummy_value()

        given = [types.intp] * 10 + [types.float64, types.float64, types.boolean, like]
        return types.none(*given), build

    return steps


steps_of_32, masked_steps_of_32 = _steps(32, False), _steps(32, True)
steps_of_8, masked_steps_of_8 = _steps(8, False), _steps(8, True)


class _Columns:
    """Builds one step back in all columns, from a carry in registers."""

    def __init__(self, target, builder, like, width, args) -> None:
        self.target, self.builder, self.like, self.width = target, builder, like, width
        self.places, carries, (gamma, passing, self.is_open) = args[:8], args[8], args[10:13]
        self.wide = ir.VectorType(ir.DoubleType(), width)
        self.zero = ir.Constant(self.wide, [0.0] * width)
        self.gamma, self.passing = (spread(builder, each, width) for each in (gamma, passing))
        self.carries = builder.inttoptr(carries, self.wide.as_pointer())
        self.carry = cgutils.alloca_once(builder, self.wide)  # which becomes registers
        builder.store(builder.load(self.carries, align=8), self.carry)

    def place(self, array, t, kind):
        """Where the columns' elements of row `t` of the array with that number lie."""
        element = self.target.get_value_type(kind)
        size = t.type(self.target.get_abi_sizeof(element))
        first, row = self.places[2 * array : 2 * array + 2]
        address = self.builder.add(first, self.builder.mul(self.builder.mul(t, row), size))
        return self.builder.inttoptr(address, ir.VectorType(element, self.width).as_pointer())

    def is_zero(self, array, t):
        flags = self.builder.load(self.place(array, t, types.uint8), align=1)
        return self.builder.icmp_unsigned("==", flags, ir.Constant(flags.type, [0] * self.width))

    def back(self, t, masked):
        builder = self.builder
        carry = builder.load(self.carry)
        paid = builder.load(self.place(0, t, self.like), align=1)
        if not isinstance(self.like, types.Float):
            paid = widened(self.target, builder, paid, self.like)
        if self.like != types.float64:
            paid = builder.fpext(paid, self.wide)
        # Selected before it is multiplied: 0 times infinity is NaN.
        following = builder.select(self.is_zero(1, t), carry, self.zero)
        discounted = builder.fmul(self.gamma, following, flags=("contract",))
        here = builder.fadd(paid, discounted, flags=("contract",))
        result = following = here
        if masked:
            passed = builder.fmul(self.passing, carry)
            passed = builder.select(self.is_open, passed, self.zero)
            is_masked = self.is_zero(3, t)
            following = builder.select(is_masked, passed, here)
            result = builder.select(is_masked, self.zero, here)
        builder.store(following, self.carry)
        if self.like != types.float64:
            result = builder.fptrunc(result, ir.VectorType(ir.FloatType(), self.width))
        if not isinstance(self.like, types.Float):
            result = narrowed(self.target, builder, result, self.like)
        builder.store(result, self.place(2, t, self.like), align=1)

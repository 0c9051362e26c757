"""Steps of advantages and of their adjoint, in neighbouring environments: built one by one.

A loop over so many arrays would not vectorize: they might overlap, and there are too many to ask.
Between the rows that are done together what is carried stays in registers. Everything is selected
before it is multiplied: 0 times infinity is NaN.

A step is given the addresses of its arrays' first rows, the bytes from row to row of each, and the
row `t` and environment `j` to begin with. Gammas and lambdas are float64, flags and masks are
bytes, all others of the type of `like`. `factors` are the addresses of what is not given by
element: of a gamma, and of gamma * lambda, for each environment. `modes` are whether a masked row
cuts, skips, or counts zero (if none, it decays), and whether a row ends an episode though it is
masked. A kind is

    PLAIN    without mask and final values; gamma and lambda are the same in all rows
    MASKED   with a mask
    GENERAL  with all of them

Those of V-trace are always general. For `factors` they have the two bounds.
"""

import math
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from vecpg.returns.halves import fuses, narrowed, widened
from vecpg.returns.vectors import spread

PLAIN, MASKED, GENERAL = range(3)
# Environments that step together: enough for two chains of additions in the widest registers.
WIDTH = 16

_FLOATS = ir.VectorType(ir.DoubleType(), WIDTH)
_BYTES = ir.VectorType(ir.IntType(8), WIDTH)
_ZERO = ir.Constant(_FLOATS, [0.0] * WIDTH)
_ONE = ir.Constant(_FLOATS, [1.0] * WIDTH)
_ALL = ir.Constant(ir.VectorType(ir.IntType(1), WIDTH), [1] * WIDTH)
_UNSET = ir.Constant(_BYTES, [0] * WIDTH)
_WORDS = ir.VectorType(ir.IntType(64), WIDTH)
# Its last bits count units: an integer that is added to it stands in them.
_UNITS = 1.5 * 2.0**52
# Below its smallest argument exp is 0; above the other it is infinite.
_EXP_RANGE = -708.0, 710.0


def back(rows: int, kind: int) -> Any:
    """`rows` steps back in time, from row `t + rows - 1` to row `t`.

        x = r + gamma * (final if done else value) + gamma * lambda * (0 if done else advantage)

    `advantage` becomes x - v and `value` v; what is written is that advantage, or with `plus` x.
    Arrays: rewards, values, flags, results, mask, final values, gammas, lambdas.
    """

    @intrinsic
    def step(context, places, steps, t, j, advantage, value, factors, modes, plus, like):
        def build(machine, builder, signature, args):
            row = _Row(machine, builder, args, like)
            r, v, d, o, m, f, g, k = range(8)
            plus = args[8]
            gamma, through = row.factors()
            advantage, value = row.carried(4), row.carried(5)
            for t in reversed(range(rows)):
                if kind == GENERAL:
                    gamma = row.wide(g, t)
                    through = builder.fmul(gamma, row.wide(k, t))
                ends, here = row.flags(d, t), row.floats(v, t)
                final = row.floats(f, t) if kind == GENERAL else _ZERO
                if kind != PLAIN:
                    real = row.flags(m, t)
                    ends = row.ending(ends, real)
                shown = builder.select(ends, final, value)
                following = builder.select(ends, _ZERO, advantage)
                # The values take part before what was carried: the chain of additions is shorter.
                x = row.sum(row.floats(r, t), gamma, shown)
                error = row.sum(builder.fsub(x, here), through, following)
                written = builder.select(plus, row.sum(x, through, following), error)
                if kind != PLAIN:
                    written = builder.select(real, written, _ZERO)
                    passed, seen = row.passed_back(following, shown, gamma, through)
                    error = builder.select(real, error, passed)
                    here = builder.select(real, here, seen)
                row.write(written, o, t)
                advantage, value = error, here
            row.keep(advantage, 4)
            row.keep(value, 5)
            return machine.get_dummy_value()

        return _signature(like), build

    return step


def forth(rows: int, kind: int) -> Any:
    """`rows` steps of the adjoint, forward in time from row `t`.

        x = gradient + advantage

    is the gradient of the row's reward, that of its value `value` - x (with `plus` - `advantage`),
    and that of its final value gamma * x if done. `advantage` becomes gamma * lambda * x and
    `value` gamma * x, or both 0 if done: what flows to the next row's.
    Arrays: gradients; those of values; flags; gradients of rewards; mask; gradients of final
    values; gammas; lambdas.
    """

    @intrinsic
    def step(context, places, steps, t, j, advantage, value, factors, modes, plus, like):
        def build(machine, builder, signature, args):
            row = _Row(machine, builder, args, like)
            x, v, d, r, m, f, g, k = range(8)
            plus = args[8]
            gamma, through = row.factors()
            advantage, value = row.carried(4), row.carried(5)
            for t in range(rows):
                if kind == GENERAL:
                    gamma = row.wide(g, t)
                    through = builder.fmul(gamma, row.wide(k, t))
                ends = row.flags(d, t)
                reached = builder.fadd(row.floats(x, t), advantage)
                of_value = builder.fsub(value, builder.select(plus, advantage, reached))
                following = builder.fmul(through, reached)
                shown = builder.fmul(gamma, reached)
                if kind != PLAIN:
                    real = row.flags(m, t)
                    ends = row.ending(ends, real)
                    reached = builder.select(real, reached, _ZERO)
                    of_value = builder.select(real, of_value, _ZERO)
                    passed, seen = row.passed_forth(advantage, value, gamma, through)
                    following = builder.select(real, following, passed)
                    shown = builder.select(real, shown, seen)
                row.write(reached, r, t)
                row.write(of_value, v, t)
                if kind == GENERAL:
                    row.write(builder.select(ends, shown, _ZERO), f, t)
                advantage = builder.select(ends, _ZERO, following)
                value = builder.select(ends, _ZERO, shown)
            row.keep(advantage, 4)
            row.keep(value, 5)
            return machine.get_dummy_value()

        return _signature(like), build

    return step


def trace_back(rows: int) -> Any:
    """`rows` steps of V-trace, back in time from row `t + rows - 1` to row `t`.

        e = rho * (r + gamma * (final if done else value) - v)
        w = gamma * lambda * c * (0 if done else error)

    with rho and c the ratio within its two bounds. `error` becomes e + w and `value` v. Written are
    the target v + e + w, the advantage e + rho * gamma * (0 if done else error), e and w.
    Arrays: rewards, values, log-ratios, final values, two that are not read; flags, mask; gammas,
    lambdas; targets, advantages, e, w.
    """

    @intrinsic
    def step(context, places, steps, t, j, error, value, bounds, modes, like):
        def build(machine, builder, signature, args):
            row = _Row(machine, builder, args, like)
            error, value = row.carried(4), row.carried(5)
            for t in reversed(range(rows)):
                real, ends = row.flags(7, t), row.flags(6, t)
                ends = row.ending(ends, real)
                # Rows that are masked are 0, which is what they are in mode "zero".
                r, v, logs = (builder.select(real, row.floats(i, t), _ZERO) for i in range(3))
                rho, c, _ = row.ratios(logs)
                gamma = row.wide(8, t)
                through = builder.fmul(builder.fmul(gamma, row.wide(9, t)), c)
                shown = builder.select(ends, row.floats(3, t), value)
                following = builder.select(ends, _ZERO, error)
                delta = builder.fsub(row.sum(r, gamma, shown), v)
                own = builder.fmul(rho, delta)
                traced = builder.fmul(through, following)
                x = builder.fadd(own, traced)
                behind = builder.fmul(gamma, following)
                for number, written in (
                    (10, builder.fadd(v, x)),
                    (11, row.sum(own, rho, behind)),
                    (12, own),
                    (13, traced),
                ):
                    row.write(builder.select(real, written, _ZERO), number, t)
                stands = builder.or_(real, row.counts_zero())
                passed, seen = row.passed_back(following, shown, gamma, through)
                error = builder.select(stands, x, passed)
                value = builder.select(stands, v, seen)
            row.keep(error, 4)
            row.keep(value, 5)
            return machine.get_dummy_value()

        return _trace_signature(like), build

    return step


def trace_forth(rows: int) -> Any:
    """`rows` steps of the adjoint, forward in time from row `t`.

        x = gradient of the target + error
        g = rho * (x + gradient of the advantage)

    g is the gradient of the row's reward, that of its value x + `value` - `error` - g, and that of
    its final value gamma * g if done. That of its log-ratio is e * x + advantage * gradient of the
    advantage, unless rho is its bound, and w * x, unless c is its bound. `error` becomes
    gamma * (lambda * c * x + rho * gradient of the advantage) and `value` gamma * g, or both 0 if
    done: what flows to the next row's.
    Arrays: gradients of targets and advantages; log-ratios; advantages, e, w; flags, mask; gammas,
    lambdas; gradients of rewards, values, log-ratios, final values.
    """

    @intrinsic
    def step(context, places, steps, t, j, error, value, bounds, modes, like):
        def build(machine, builder, signature, args):
            row = _Row(machine, builder, args, like)
            error, value = row.carried(4), row.carried(5)
            for t in range(rows):
                real, ends = row.flags(7, t), row.flags(6, t)
                ends = row.ending(ends, real)
                of_target, of_advantage, logs = (
                    builder.select(real, row.floats(i, t), _ZERO) for i in range(3)
                )
                rho, c, is_within = row.ratios(logs)
                gamma = row.wide(8, t)
                through = builder.fmul(builder.fmul(gamma, row.wide(9, t)), c)
                x = builder.fadd(of_target, error)
                g = builder.fmul(rho, builder.fadd(x, of_advantage))
                of_value = builder.fsub(builder.fadd(of_target, value), g)
                by_rho = row.sum(builder.fmul(row.floats(4, t), x), row.floats(3, t), of_advantage)
                by_c = builder.fmul(row.floats(5, t), x)
                of_logs = builder.fadd(
                    builder.select(is_within[0], by_rho, _ZERO),
                    builder.select(is_within[1], by_c, _ZERO),
                )
                weighed = builder.fmul(gamma, builder.fmul(rho, of_advantage))
                following, shown = row.sum(weighed, through, x), builder.fmul(gamma, g)
                for number, written in ((10, g), (11, of_value), (12, of_logs)):
                    row.write(builder.select(real, written, _ZERO), number, t)
                row.write(builder.select(ends, shown, _ZERO), 13, t)
                stands = builder.or_(real, row.counts_zero())
                passed, seen = row.passed_forth(error, value, gamma, through)
                following = builder.select(stands, following, passed)
                shown = builder.select(stands, shown, seen)
                error = builder.select(ends, _ZERO, following)
                value = builder.select(ends, _ZERO, shown)
            row.keep(error, 4)
            row.keep(value, 5)
            return machine.get_dummy_value()

        return _trace_signature(like), build

    return step


def _trace_signature(like):
    places, carried = types.UniTuple(types.intp, 14), types.intp
    bounds, modes = types.UniTuple(types.float64, 2), types.UniTuple(types.boolean, 4)
    given = places, places, types.intp, types.intp, carried, carried, bounds, modes
    return types.none(*given, like)


def _exp(builder, x):
    """Exp of float64, to the last digits that its argument tells; NaN of NaN.

    With x = n log(2) + r and r near 0, it is 2^n times the series of exp at r.
    """

    def all_of(number):
        return ir.Constant(_FLOATS, [number] * WIDTH)

    def sum_of(addend, factor, value):
        product = builder.fmul(factor, value, flags=("contract",))
        return builder.fadd(addend, product, flags=("contract",))

    low, high = (all_of(each) for each in _EXP_RANGE)
    is_low = builder.fcmp_ordered("<", x, low)
    x = builder.select(is_low, low, x)
    x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
    kind = ir.FunctionType(_FLOATS, [_FLOATS])
    rint = builder.module.declare_intrinsic(f"llvm.rint.v{WIDTH}f64", (), kind)
    n = builder.call(rint, [builder.fmul(x, all_of(1.0 / math.log(2.0)))])
    r = sum_of(x, n, all_of(-math.log(2.0)))
    series = all_of(1.0 / math.factorial(13))
    for degree in range(12, 1, -1):
        series = sum_of(all_of(1.0 / math.factorial(degree)), series, r)
    series = builder.fadd(all_of(1.0), sum_of(r, builder.fmul(r, r), series))
    # Half of 2^n, since there is no exponent of 2^1024.
    units = builder.bitcast(builder.fadd(n, all_of(_UNITS)), _WORDS)
    exponent = builder.add(units, ir.Constant(_WORDS, [1022] * WIDTH))
    exponent = builder.shl(exponent, ir.Constant(_WORDS, [52] * WIDTH))
    half = builder.fmul(series, builder.bitcast(exponent, _FLOATS))
    return builder.select(is_low, _ZERO, builder.fadd(half, half))


def _signature(like):
    places, carried = types.UniTuple(types.intp, 8), types.intp
    factors, modes = types.UniTuple(types.intp, 2), types.UniTuple(types.boolean, 4)
    given = places, places, types.intp, types.intp, carried, carried, factors, modes
    return types.none(*given, types.boolean, like)


class _Row:
    """Builds what is done with some neighbours of the row `t` steps on, of arrays by number."""

    def __init__(self, machine, builder, args, like) -> None:
        self.machine, self.builder, self.args, self.like = machine, builder, args, like
        self.element = machine.get_value_type(like)

    def _at(self, number, t, element):
        builder, word = self.builder, self.args[2].type
        at, step = (builder.extract_value(self.args[i], number) for i in range(2))
        size = self.machine.get_abi_sizeof(element)
        row = builder.add(self.args[2], word(t))
        place = builder.add(at, builder.mul(row, step))
        place = builder.add(place, builder.mul(self.args[3], word(size)))
        return builder.inttoptr(place, ir.VectorType(element, WIDTH).as_pointer())

    def floats(self, number, t):
        """Of an array of floats, as float64."""
        loaded = self.builder.load(self._at(number, t, self.element), align=1)
        if self.like == types.float64:
            return loaded
        if self.like != types.float32:
            loaded = widened(self.machine, self.builder, loaded, self.like)
        return self.builder.fpext(loaded, _FLOATS)

    def write(self, values, number, t):
        """To an array of floats, rounded."""
        if self.like != types.float64:
            values = self.builder.fptrunc(values, ir.VectorType(ir.FloatType(), WIDTH))
        if self.like not in (types.float64, types.float32):
            values = narrowed(self.machine, self.builder, values, self.like)
        self.builder.store(values, self._at(number, t, self.element), align=1)

    def wide(self, number, t):
        """Of an array of float64."""
        return self.builder.load(self._at(number, t, ir.DoubleType()), align=8)

    def flags(self, number, t):
        """Whether each of an array's bytes is not 0."""
        loaded = self.builder.load(self._at(number, t, ir.IntType(8)), align=1)
        return self.builder.icmp_unsigned("!=", loaded, _UNSET)

    def _kept(self, address):
        place = self.builder.add(address, self.builder.mul(self.args[3], self.args[3].type(8)))
        return self.builder.inttoptr(place, _FLOATS.as_pointer())

    def carried(self, number):
        """What the argument with that number is the address of: float64 of all environments."""
        return self.builder.load(self._kept(self.args[number]), align=8)

    def keep(self, values, number):
        """The opposite."""
        self.builder.store(values, self._kept(self.args[number]), align=8)

    def factors(self):
        """Gamma, and gamma * lambda, of each environment."""
        for number in range(2):
            address = self.builder.extract_value(self.args[6], number)
            yield self.builder.load(self._kept(address), align=8)

    def bounds(self):
        """The two bounds of ratios, for each environment."""
        for number in range(2):
            yield spread(self.builder, self.builder.extract_value(self.args[6], number), WIDTH)

    def ratios(self, logs):
        """The ratio within each of the two bounds, and where the bound is not less than it."""
        ratio = _exp(self.builder, logs)
        bounds = list(self.bounds())
        is_within = [self.builder.fcmp_ordered("<=", ratio, bound) for bound in bounds]
        # One that is NaN stays it.
        rho, c = (
            self.builder.select(self.builder.fcmp_ordered(">", ratio, bound), bound, ratio)
            for bound in bounds
        )
        return rho, c, is_within

    def sum(self, addend, factor, value):
        """`addend + factor * value`, rounded once where the processor can.

        Said in so many words: what a compiler fuses as it likes has other bits in other kinds of
        steps, and which steps a row is done in depends on how threads share the environments.
        """
        if fuses(self.machine):
            kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
            name = f"llvm.fma.v{WIDTH}f64"  # llvmlite's own takes no vectors
            fused = cgutils.get_or_insert_function(self.builder.module, kind, name)
            return self.builder.call(fused, [factor, value, addend])
        return self.builder.fadd(addend, self.builder.fmul(factor, value))

    def _mode(self, number):
        mode = self.builder.extract_value(self.args[7], number)
        return self.builder.trunc(mode, ir.IntType(1))

    def ending(self, ends, real):
        """Where an episode ends."""
        always = self.builder.select(self._mode(3), _ALL, real)
        return self.builder.and_(ends, always)

    def counts_zero(self):
        """Whether a masked row counts as one that is 0, for each environment."""
        nowhere = ir.Constant(_ALL.type, [0] * WIDTH)
        return self.builder.select(self._mode(2), _ALL, nowhere)

    def passed_back(self, advantage, value, gamma, through):
        """What a masked row shows to the row before it, of the advantage and value after it."""
        builder = self.builder
        cut, skip, zero = (self._mode(number) for number in range(3))
        passed = builder.fmul(builder.select(skip, _ONE, through), advantage)
        # Without reward and value, the row's own error is the discounted value after it.
        error = builder.select(zero, builder.fmul(gamma, value), _ZERO)
        passed = builder.select(cut, _ZERO, builder.fadd(passed, error))
        seen = builder.fmul(builder.select(skip, _ONE, gamma), value)
        return passed, builder.select(builder.or_(cut, zero), _ZERO, seen)

    def passed_forth(self, advantage, value, gamma, through):
        """The adjoint: what of their gradients flows through a masked row to the row after it."""
        builder = self.builder
        cut, skip, zero = (self._mode(number) for number in range(3))
        passed = builder.fmul(builder.select(skip, _ONE, through), advantage)
        seen = builder.select(zero, advantage, value)
        seen = builder.fmul(builder.select(skip, _ONE, gamma), seen)
        return builder.select(cut, _ZERO, passed), builder.select(cut, _ZERO, seen)

"""A policy's network in machine code, forwards and backwards.

For 64 rows a call of torch costs more than its arithmetic.

Activations are (rows, features). A row's bits depend on that row alone, whichever rows are beside
it. Rows have room for whole tiles of a product: what is beyond their width is 0.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor, nn

from vecpg.distributions import Categorical
from vecpg.policy import Policy
from vecpg.returns.jit import jit

# Rows that go through the network together: their activations stay in the fastest cache.
BLOCK = 64
# Rows whose gradients are summed in float32 before they are added in float64.
_SUM_ROWS = 16 * BLOCK

_MOST_UNITS = 1024

# A tile of a product: its sums fill eight of the sixteen vector registers of AVX2, which is what
# two multiply-adds a cycle, four cycles long each, need.
_VECTOR = 8
_TILE_ROWS = 4
_TILE = 2 * _VECTOR
# 0 in a type that is no constant: else what it is passed to would be compiled for each constant.
_NONE: Any = np.int64(0)
# Rows so many features long compete for the same places of the cache.
_FAR = 128


class Network(NamedTuple):
    """A policy's parameters as the kernels read them.

    forwards:  float32 vector: for each hidden layer its weights (inputs, outputs), a tile of
               outputs after the other, and its biases; for the last layer its weights (actions,
               inputs) and its biases.
    backwards: the weights of all layers but the first as (outputs, inputs), in tiles of inputs.
    widths:    int64, features of the input, of every hidden layer, and the number of actions.
    relu:      True = ReLU, False = tanh.
    """

    forwards: NDArray[np.float32]
    backwards: NDArray[np.float32]
    widths: NDArray[np.int64]
    relu: bool


def why_not(policy: Policy) -> str | None:
    """Why these kernels do not serve a policy; None if they do."""
    if not isinstance(policy.distribution, Categorical):
        return "its actions are not Discrete"
    return why_not_network(policy)


def why_not_network(policy: Policy) -> str | None:
    """Why `forward` does not serve a policy, whatever its actions are; None if it does."""
    if type(policy) is not Policy:
        return f"{type(policy).__name__} may compute something else"
    if policy.device.type != "cpu":
        return f"the policy is on {policy.device}"
    if policy.obs_dtype != torch.float32:
        return "its observations are not a Box"
    if policy.encoder.normalizer is not None:
        return "it normalizes observations"
    if policy.dropout > 0:
        return "it has dropout"
    kinds = [type(module) for module in policy.network]
    activation = nn.ReLU if policy.activation == "relu" else nn.Tanh
    layers = [module for module in policy.network if isinstance(module, nn.Linear)]
    changed = kinds != [nn.Linear, *([activation, nn.Linear] * len(policy.hidden_sizes))]
    if changed or len(set(layers)) < len(layers) or any(layer.bias is None for layer in layers):
        return "the network was changed"
    if "forward" in vars(policy) or any(map(_has_hooks, policy.modules())):
        return "a module has hooks"
    for parameter in policy.parameters():
        if parameter.dtype != torch.float32:
            return "the parameters are not float32"
        if not parameter.requires_grad:
            return "a parameter is frozen"
    if max(policy.hidden_sizes, default=0) > _MOST_UNITS:
        return f"a hidden layer has more than {_MOST_UNITS} units"
    return None


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks
    of_parameters = [parameter._backward_hooks for parameter in module.parameters(recurse=False)]
    return any(hooks) or bool(module._backward_pre_hooks) or any(of_parameters)


def first_action_of(policy: Policy) -> int:
    """The number of the first action of a policy that these kernels serve."""
    assert isinstance(policy.distribution, Categorical)
    return policy.distribution.first_action


def network_of(policy: Policy) -> Network:
    """A copy of the parameters in the kernels' order."""
    *hidden, last = _linear_layers(policy)
    forwards, backwards = [], []
    with torch.no_grad():
        for layer in hidden:
            forwards += [_in_tiles(layer.weight.t()), _padded(layer.bias)]
        forwards += [_padded(last.weight).reshape(-1) if hidden else last.weight.reshape(-1)]
        forwards += [last.bias]
        for layer in [*hidden, last][1:]:
            backwards += [_in_tiles(layer.weight)]
        every = [torch.cat(parts).numpy() for parts in (forwards, backwards or [last.bias[:0]])]
    widths = [layer.in_features for layer in [*hidden, last]] + [last.out_features]
    return Network(every[0], every[1], np.array(widths, np.int64), policy.activation == "relu")


def prepare(policy: Policy) -> None:
    """Compile, or load, what the gradient of a policy will need."""
    if why_not(policy) is not None:
        return
    network, one = network_of(policy), np.ones(1, np.float32)
    sum_gradient(
        np.zeros((1, *policy.obs_shape), np.float32).reshape(1, -1),
        np.full(1, first_action_of(policy)),
        one,
        one > 0,
        first_action_of(policy),
        1.0,
        0.0,
        network,
        np.zeros(len(network.forwards)),
    )


def set_gradients(policy: Policy, gradient: NDArray[np.float64]) -> None:
    """Write what `sum_gradient` has added up to the policy's `.grad`."""
    rest = torch.from_numpy(gradient).to(torch.float32)
    *hidden, last = _linear_layers(policy)
    for layer in hidden:
        rows = rest[: layer.in_features * _wide(layer.out_features)]
        layer.weight.grad = rows.reshape(layer.in_features, -1)[:, : layer.out_features].t().clone()
        rest = rest[len(rows) :]
        layer.bias.grad = rest[: layer.out_features].clone()
        rest = rest[_wide(layer.out_features) :]
    rows, last.bias.grad = rest[: -last.out_features], rest[-last.out_features :].clone()
    last.weight.grad = rows.reshape(last.out_features, -1)[:, : last.in_features].clone()


def _linear_layers(policy: Policy) -> list[nn.Linear]:
    return [layer for layer in policy.network if isinstance(layer, nn.Linear)]


def _wide(width: int) -> int:
    return -(-width // _TILE) * _TILE


def _padded(weights: Tensor) -> Tensor:
    width = weights.shape[-1]
    return nn.functional.pad(weights, (0, _wide(width) - width))


def _in_tiles(weights: Tensor) -> Tensor:
    """(rows, columns) as one vector, `_TILE` columns after the other."""
    rows = len(weights)
    return _padded(weights).reshape(rows, -1, _TILE).transpose(0, 1).reshape(-1)


@jit
def sum_gradient(
    obs: NDArray[np.float32],
    actions: NDArray[np.int64],
    weights: NDArray[np.float32],
    mask: NDArray[np.bool_],
    first_action: int,
    scale: float,
    ent_coef: float,
    network: Network,
    gradient: NDArray[np.float64],
) -> tuple[float, float, bool]:
    """Add to `gradient` that of a sum over counted rows, and return two sums over them.

        sum of -log pi(a|s) * weight * scale - ent_coef * entropy(s)

    Args:
        obs: (R, features).
        actions: (R,).
        weights: (R,).
        mask: (R,), True = counted. Other rows are not read.
        first_action: the number of the first action.
        scale: of every weight.
        ent_coef: how much entropy is worth.
        network: the policy's.
        gradient: float64, one number for each of `network.forwards`.

    Returns:
        the sum of -log pi(a|s) * weight * scale, that of the entropy in nats, and whether every
        action is one of the policy's. Where one is not, the rest is not to be used.
    """
    units = activations(network)
    slopes, spare = np.zeros_like(units), np.zeros_like(units)
    partial = np.zeros(len(gradient), np.float32)
    picked, taken = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    scaled = np.empty(BLOCK, np.float32)
    features = network.widths[0]
    loss = 0.0
    entropy = 0.0
    known = True
    row = 0
    summed = 0
    while row < len(mask):
        rows = _NONE
        while row < len(mask) and rows < BLOCK:
            if mask[row]:
                picked[rows] = row
                for i in range(features):
                    units[rows * features + i] = obs[row, i]
                rows += 1
            row += 1
        if rows > 0:
            for n in range(rows):
                action = actions[picked[n]] - first_action
                known = known and 0 <= action < network.widths[-1]
                taken[n] = action if known else 0
                scaled[n] = weights[picked[n]] * scale
            block_loss, block_entropy = _slopes(
                forward(network, units, rows), taken, scaled, np.float32(ent_coef), rows
            )
            loss += block_loss
            entropy += block_entropy
            _backward(network, units, rows, slopes, spare, partial)
            summed += rows
        if summed >= _SUM_ROWS or row == len(mask):
            for i in range(len(partial)):
                gradient[i] += partial[i]
                partial[i] = 0.0
            summed = 0
    return loss, entropy, known


@jit
def activations(network):
    """Zeros with room for the activations of `BLOCK` rows, the observations first."""
    widths = network.widths
    total = widths[0] + widths[-1]
    for layer in range(1, len(widths) - 1):
        total += _stride(widths[layer])
    return np.zeros(BLOCK * total, np.float32)


@jit
def _tiles(width):
    """The width rounded up to whole tiles."""
    return (width + (_TILE - 1)) // _TILE * _TILE


@jit
def _stride(width):
    """From a row of a hidden layer's activations to the next."""
    wide = _tiles(width)
    return wide + _TILE if wide >= _FAR else wide


@jit
def forward(network, units, rows):
    """Fill in the activations of `rows` observations, layer after layer, and return the logits.

    The observations stand in `units`, (rows, features); the logits are (actions, BLOCK).
    """
    parameters, _, widths, relu = network
    at, begin = 0, BLOCK * widths[0]
    below, below_row = units[: rows * widths[0]], widths[0]
    for layer in range(1, len(widths) - 1):
        fan_in, wide, stride = widths[layer - 1], _tiles(widths[layer]), _stride(widths[layer])
        weight = parameters[at : at + fan_in * wide]
        at += fan_in * wide
        bias = parameters[at : at + wide]
        at += wide
        here = units[begin : begin + rows * stride]
        for n in range(rows):
            row = here[n * stride : n * stride + wide]
            for o in range(wide):
                row[o] = bias[o]
        tile, one = np.int64(_TILE), np.int64(1)
        _add_product(
            below, below_row, one, weight, fan_in * tile, tile, here, stride, rows, fan_in, wide
        )
        for n in range(rows):
            row = here[n * stride : n * stride + wide]
            if relu:
                for o in range(wide):
                    row[o] = max(row[o], np.float32(0.0))
            else:
                for o in range(wide):
                    row[o] = tanh(row[o])
        below, below_row = here, stride
        begin += BLOCK * stride
    fan_out = widths[-1]
    biases = len(parameters) - fan_out
    wide = (biases - at) // fan_out
    logits = units[begin : begin + BLOCK * fan_out].reshape(fan_out, BLOCK)
    for n in range(rows):
        row = below[n * below_row : n * below_row + wide]
        for a in range(fan_out):
            column = parameters[at + a * wide : at + (a + 1) * wide]
            total = np.float32(0.0)
            for i in range(wide):
                total += row[i] * column[i]
            logits[a, n] = total + parameters[biases + a]
    return logits


@jit
def exponentials(logits, largest, total, rows):
    """Replace logits (actions, BLOCK) by exp(logit - largest); fill in both (BLOCK,) vectors."""
    _largest(logits, largest, rows)
    total[:rows] = np.float32(0.0)
    for a in range(len(logits)):
        row = logits[a]
        for n in range(rows):
            row[n] = exp(row[n] - largest[n])
            total[n] += row[n]


@jit
def _largest(logits, largest, rows):
    """Fill in the largest logit of each row."""
    for n in range(rows):
        largest[n] = logits[0, n]
    for a in range(1, len(logits)):
        row = logits[a]
        for n in range(rows):
            largest[n] = max(largest[n], row[n])


@jit
def _backward(network, units, rows, slopes, spare, gradient):
    """Add to `gradient`, from the loss's slopes in the logits' place, those in the parameters."""
    _, backwards, widths, relu = network
    last = len(widths) - 1
    tile, one = np.int64(_TILE), np.int64(1)
    fan_out = widths[last]
    at, begin, turned = len(gradient) - fan_out, len(units) - BLOCK * fan_out, len(backwards)
    above, above_row, above_column = units[begin:], one, BLOCK * one
    for a in range(fan_out):
        total = np.float32(0.0)
        for slope in above[a * BLOCK : a * BLOCK + rows]:
            total += slope
        gradient[at + a] += total
    if last == 1:
        fan_in = widths[0]
        for a in range(fan_out):
            for n in range(rows):
                for i in range(fan_in):
                    gradient[a * fan_in + i] += above[a * BLOCK + n] * units[n * fan_in + i]
        return
    wide, stride = _tiles(widths[last - 1]), _stride(widths[last - 1])
    at -= fan_out * wide
    begin -= BLOCK * stride
    below = units[begin : begin + rows * stride]
    to_weight = gradient[at : at + fan_out * wide]
    _add_product(
        above, above_column, above_row, below, tile, stride, to_weight, wide, fan_out, rows, wide
    )
    for layer in range(last - 1, 0, -1):
        # `above`, (rows, next_out), belongs to the layer above this one.
        next_out, fan_in = widths[layer + 1], widths[layer - 1]
        wide, stride = _tiles(widths[layer]), _stride(widths[layer])
        slope, active = slopes[: rows * stride], units[begin : begin + rows * stride]
        slope[:] = np.float32(0.0)
        turned -= next_out * wide
        weight, to_tile = backwards[turned : turned + next_out * wide], next_out * tile
        _add_product(
            above,
            above_row,
            above_column,
            weight,
            to_tile,
            tile,
            slope,
            stride,
            rows,
            next_out,
            wide,
        )
        if relu:
            for i in range(len(slope)):
                kept = slope[i]
                slope[i] = kept if active[i] > np.float32(0.0) else np.float32(0.0)
        else:
            for i in range(len(slope)):
                slope[i] *= np.float32(1.0) - active[i] * active[i]
        at -= wide
        _add_rows(slope, stride, rows, gradient[at : at + wide])
        at -= fan_in * wide
        below_row = fan_in if layer == 1 else _stride(fan_in)
        begin -= BLOCK * below_row
        below = units[begin : begin + rows * below_row]
        to_weight = gradient[at : at + fan_in * wide]
        _add_product(
            below, one, below_row, slope, tile, stride, to_weight, wide, fan_in, rows, wide
        )
        above, above_row, above_column = slope, stride, one
        slopes, spare = spare, slopes


@jit
def _add_rows(matrix, stride, rows, total):
    """Add every row of a matrix to `total`."""
    for n in range(rows):
        row = matrix[n * stride : n * stride + len(total)]
        for i in range(len(total)):
            total[i] += row[i]


@jit
def _add_product(a, a_row, a_column, b, b_tile, b_row, c, c_row, rows, inner, columns):
    """C += A B on vectors that hold matrices; the columns of B and C make whole tiles.

    A has any strides; B goes on by `b_tile` from tile to tile and by `b_row` from row to row. An
    element of C is summed in the order of the inner index, wherever its row stands. About 64 of
    the 71 GFLOP/s of a large product, at 64 x 64 x 64 on one core.
    """
    for j in range(columns // _TILE):
        b_at, c_at = j * b_tile, j * _TILE
        n = np.int64(0)
        while n + _TILE_ROWS <= rows:
            to = c_at + n * c_row
            _add_tile(a, n * a_row, a_row, a_column, b, b_at, b_row, c, to, c_row, inner)
            n += _TILE_ROWS
        while n < rows:
            to = c_at + n * c_row
            _add_tile_row(a, n * a_row, a_row, a_column, b, b_at, b_row, c, to, c_row, inner)
            n += 1


def _tile_intrinsic(rows: int) -> Any:
    """Adds to a tile of C, whose sums stay in registers, `rows` rows of A times columns of B.

    Matrices are given as vectors, each with the place of the tile's first element and the strides
    of its rows, A with that of its columns too.
    """

    @intrinsic
    def _tile(context, a, a_at, a_row, a_column, b, b_at, b_row, c, c_at, c_row, inner):
        place, stride = types.intp, types.intp
        given = a, place, stride, stride, b, place, stride, c, place, stride, types.intp

        def build(target, builder, signature, args):
            a_at, a_row, a_column, b_at, b_row, c_at, c_row, inner = (
                args[number] for number in (1, 2, 3, 5, 6, 8, 9, 10)
            )
            index = inner.type
            vector = ir.VectorType(ir.FloatType(), _VECTOR)
            steps = range(0, _TILE, _VECTOR)

            def first(number, at):
                array = target.make_array(given[number])(target, builder, args[number])
                return builder.gep(array.data, [at])

            def vectors(pointer):
                places = (builder.gep(pointer, [index(step)]) for step in steps)
                return [builder.bitcast(place, vector.as_pointer()) for place in places]

            def row_of(pointer, stride, row):
                return builder.gep(pointer, [builder.mul(stride, index(row))])

            a_rows = [row_of(first(0, a_at), a_row, row) for row in range(rows)]
            b_first, c_first = first(4, b_at), first(7, c_at)
            places = [
                place for row in range(rows) for place in vectors(row_of(c_first, c_row, row))
            ]
            before = [builder.load(place, align=4) for place in places]
            entry, loop = builder.block, builder.append_basic_block("tile")
            end = builder.append_basic_block("tile.end")
            builder.cbranch(builder.icmp_signed(">", inner, index(0)), loop, end)

            builder.position_at_end(loop)
            k = builder.phi(index)
            sums = [builder.phi(vector) for _ in places]
            b_here = builder.gep(b_first, [builder.mul(k, b_row)])
            factors = [builder.load(place, align=4) for place in vectors(b_here)]
            empty = ir.Constant(vector, ir.Undefined)
            same = ir.Constant(ir.VectorType(ir.IntType(32), _VECTOR), [0] * _VECTOR)
            after: list[Any] = []
            for row in range(rows):
                here = builder.gep(a_rows[row], [builder.mul(k, a_column)])
                one = builder.insert_element(empty, builder.load(here), ir.IntType(32)(0))
                spread = builder.shuffle_vector(one, empty, same)
                for factor in factors:
                    product = builder.fmul(spread, factor, flags=("contract",))
                    total = sums[len(after)]
                    after.append(builder.fadd(total, product, flags=("contract",)))
            following = builder.add(k, index(1))
            builder.cbranch(builder.icmp_signed("<", following, inner), loop, end)
            for phi, start, step in zip(
                [k, *sums], [index(0), *before], [following, *after], strict=True
            ):
                phi.add_incoming(start, entry)
                phi.add_incoming(step, loop)

            builder.position_at_end(end)
            results = [builder.phi(vector) for _ in places]
            for result, start, total in zip(results, before, after, strict=True):
                result.add_incoming(start, entry)
                result.add_incoming(total, loop)
            for result, place in zip(results, places, strict=True):
                builder.store(result, place, align=4)
            return target.get_dummy_value()

        return types.none(*given), build

    return _tile


_add_tile = _tile_intrinsic(_TILE_ROWS)
_add_tile_row = _tile_intrinsic(1)


@jit
def _slopes(logits, actions, weights, ent_coef, rows):
    """Replace logits (actions, BLOCK) by the slopes of the loss in them.

    Returns the sums over rows of -log pi * weight and of the entropy.
    """
    largest, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    shift, entropy = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    _largest(logits, largest, rows)
    total[:rows] = np.float32(0.0)
    for a in range(len(logits)):
        row = logits[a]
        for n in range(rows):
            total[n] += exp(row[n] - largest[n])
    for n in range(rows):
        shift[n] = largest[n] + np.float32(math.log(total[n]))
    entropy[:rows] = np.float32(0.0)
    for a in range(len(logits)):
        row = logits[a]
        for n in range(rows):
            row[n] -= shift[n]
            entropy[n] -= exp(row[n]) * row[n]
    loss = 0.0
    sum_entropy = 0.0
    for n in range(rows):
        loss -= weights[n] * logits[actions[n], n]
        sum_entropy += entropy[n]
    for a in range(len(logits)):
        row = logits[a]
        for n in range(rows):
            bonus = ent_coef * (row[n] + entropy[n])
            row[n] = exp(row[n]) * (weights[n] + bonus)
    for n in range(rows):
        logits[actions[n], n] -= weights[n]
    return loss, sum_entropy


@jit
def tanh(x):
    """Tanh within 1e-7, also of itself, and exactly 1 far out. It vectorizes.

    With e = exp(2|x|) - 1, it is e / (e + 2), and errors of a large e do not show.
    """
    doubled = min(abs(x) * np.float32(2.0), np.float32(20.0))
    power, grown = _scaled_growth(doubled)
    e = power * grown + (power - np.float32(1.0))
    return math.copysign(e / (e + np.float32(2.0)), x)


@jit
def exp(x):
    """Exp of a number of at most 0, within 1e-6 of itself and never below 1e-38. It vectorizes."""
    power, grown = _scaled_growth(max(x, np.float32(-86.0)))
    return power * grown + power


@jit
def _scaled_growth(x):
    """2^n and exp(r) - 1 with x = n log(2) + r and r near 0; x is no more than 88 from 0.

    Coefficients: Cephes, `expf`.
    """
    n = np.int32(x * np.float32(1.0 / math.log(2.0)) + math.copysign(np.float32(0.5), x))
    r = x - np.float32(n) * np.float32(math.log(2.0))
    grown = np.float32(1.9875691500e-4)
    grown = grown * r + np.float32(1.3981999507e-3)
    grown = grown * r + np.float32(8.3334519073e-3)
    grown = grown * r + np.float32(4.1665795894e-2)
    grown = grown * r + np.float32(1.6666665459e-1)
    grown = grown * r + np.float32(5.0000001201e-1)
    return _power_of_two(n), grown * (r * r) + r


@intrinsic
def _power_of_two(context, n):
    """2^n as float32, made of its bits; n is from -126 to 127."""

    def build(target, builder, signature, args):
        word = args[0].type
        exponent = builder.shl(builder.add(args[0], word(127)), word(23))
        return builder.bitcast(exponent, ir.FloatType())

    return types.float32(types.int32), build

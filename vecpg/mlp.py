"""The policy's arithmetic in machine code: drawing actions for a few rows, and the gradient.

For 64 rows a call of torch costs more than its arithmetic. Everything that calls one another is in
this one file, because Numba's cache looks at the file of the outermost function only.

Parameters are one float32 vector (`pack`): for each hidden layer the weights as (inputs, outputs)
and the biases, for the last layer the weights as (actions, inputs) and the biases. Activations are
(rows, features): every inner loop then runs over contiguous features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vecpg.distributions import Categorical
from vecpg.noise import MULTIPLIERS, WEYL, WORD
from vecpg.policy import Policy
from vecpg.returns.jit import jit

# Rows that go through the network together: their activations stay in the fastest cache.
_BLOCK = 64
# Rows whose gradients are summed in float32 before they are added in float64.
_SUM_ROWS = 16 * _BLOCK

_MOST_UNITS = 1024
# A stride, in a type that is no constant: else functions would be compiled for each stride of 1.
_ONE = np.int64(1)


@dataclass(frozen=True, slots=True)
class Packed:
    """A policy's parameters as the kernels read them.

    parameters: float32 vector, as described above.
    widths:     int64, features of the input, of every hidden layer, and the number of actions.
    relu:       True = ReLU, False = tanh.
    """

    parameters: NDArray[np.float32]
    widths: NDArray[np.int64]
    relu: bool


def why_not(policy: Policy) -> str | None:
    """Why these kernels do not serve a policy; None if they do."""
    if type(policy) is not Policy:
        return f"{type(policy).__name__} may compute something else"
    if policy.device.type != "cpu":
        return f"the policy is on {policy.device}"
    if not isinstance(policy.distribution, Categorical):
        return "its actions are not Discrete"
    if policy.obs_dtype != torch.float32:
        return "its observations are not a Box"
    if policy.encoder.normalizer is not None:
        return "it normalizes observations"
    if policy.dropout > 0:
        return "it has dropout"
    kinds = [type(module) for module in policy.network]
    activation = nn.ReLU if policy.activation == "relu" else nn.Tanh
    if kinds != [nn.Linear, *([activation, nn.Linear] * len(policy.hidden_sizes))]:
        return "the network was changed"
    if any(module._forward_hooks or module._forward_pre_hooks for module in policy.modules()):
        return "a module has hooks"
    for parameter in policy.parameters():
        if parameter.dtype != torch.float32:
            return "the parameters are not float32"
        if not parameter.requires_grad:
            return "a parameter is frozen"
    if max(policy.hidden_sizes, default=0) > _MOST_UNITS:
        return f"a hidden layer has more than {_MOST_UNITS} units"
    return None


def first_action_of(policy: Policy) -> int:
    """The number of the first action of a policy that these kernels serve."""
    assert isinstance(policy.distribution, Categorical)
    return policy.distribution.first_action


def pack(policy: Policy) -> Packed:
    """A copy of the parameters in the kernels' order."""
    layers = _linear_layers(policy)
    parts = []
    for layer in layers:
        weight = layer.weight if layer is layers[-1] else layer.weight.t()
        parts += [weight.reshape(-1), layer.bias]
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    with torch.no_grad():
        parameters = torch.cat(parts).numpy()
    return Packed(parameters, np.array(widths, np.int64), policy.activation == "relu")


def sampler(
    policy: Policy, seed: int, iteration: int, purpose: int
) -> Callable[[int, NDArray[np.float32], NDArray[np.int64]], None]:
    """What draws, at step t, actions (N,) for observations (N, *obs_shape), as `Policy.sample`.

    The policy's parameters are read once, here.
    """
    packed = pack(policy)
    words = (np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32))
    first_action = first_action_of(policy)
    stream = np.uint64(iteration), np.uint64(purpose)

    def draw(t: int, obs: NDArray[np.float32], actions: NDArray[np.int64]) -> None:
        draw_actions(
            obs.reshape(len(obs), -1),
            words,
            stream[0],
            np.uint64(t),
            stream[1],
            first_action,
            packed.parameters,
            packed.widths,
            packed.relu,
            actions,
        )

    return draw


def prepare(policy: Policy) -> None:
    """Compile, or load, the kernels that a policy will need."""
    if why_not(policy) is not None:
        return
    packed, obs = pack(policy), np.zeros((1, *policy.obs_shape), np.float32)
    actions, one = np.full(1, first_action_of(policy)), np.ones(1, np.float32)
    sampler(policy, 0, 0, 0)(0, obs, actions)
    sum_gradient(
        obs.reshape(1, -1),
        actions,
        one,
        one > 0,
        first_action_of(policy),
        1.0,
        0.0,
        packed.parameters,
        packed.widths,
        packed.relu,
        np.zeros(len(packed.parameters)),
    )


def set_gradients(policy: Policy, gradient: NDArray[np.float64]) -> None:
    """Write a gradient in the order of `Packed.parameters` to the policy's `.grad`."""
    rest = torch.from_numpy(gradient).to(torch.float32)
    layers = _linear_layers(policy)
    for layer in layers:
        weight, rest = rest[: layer.weight.numel()], rest[layer.weight.numel() :]
        if layer is layers[-1]:
            layer.weight.grad = weight.reshape(layer.weight.shape).clone()
        else:
            layer.weight.grad = weight.reshape(layer.weight.t().shape).t().contiguous()
        layer.bias.grad = rest[: layer.bias.numel()].clone()
        rest = rest[layer.bias.numel() :]


def _linear_layers(policy: Policy) -> list[nn.Linear]:
    return [layer for layer in policy.network if isinstance(layer, nn.Linear)]


@jit
def draw_actions(
    obs: NDArray[np.float32],
    seed: tuple[np.uint64, np.uint64],
    iteration: np.uint64,
    step: np.uint64,
    purpose: np.uint64,
    first_action: int,
    parameters: NDArray[np.float32],
    widths: NDArray[np.int64],
    relu: bool,
    actions: NDArray[np.int64],
) -> None:
    """Write to `actions` (B,) what `Policy.sample` draws on obs (B, features) and `uniforms`.

    The seed is its low and its high 32-bit word. Probabilities differ from torch's in the last
    bits.
    """
    features = widths[0]
    units = np.empty(_units(widths), np.float32)
    for start in range(0, len(actions), _BLOCK):
        rows = min(_BLOCK, len(actions) - start)
        for n in range(rows):
            for i in range(features):
                units[n * features + i] = obs[start + n, i]
        logits = _forward(parameters, widths, relu, units, rows)
        for n in range(rows):
            total = _exponentials(logits[n])
            env = np.uint64(start + n)
            threshold = total * uniform(seed[0], seed[1], iteration, step, env, purpose)
            # As the reference: the number of actions whose cumulative probability is reached.
            below = np.float32(0.0)
            chosen = 0
            for probability in logits[n, :-1]:
                below += probability
                chosen += below <= threshold
            actions[start + n] = first_action + chosen


@jit
def sum_gradient(
    obs: NDArray[np.float32],
    actions: NDArray[np.int64],
    weights: NDArray[np.float32],
    mask: NDArray[np.bool_],
    first_action: int,
    scale: float,
    ent_coef: float,
    parameters: NDArray[np.float32],
    widths: NDArray[np.int64],
    relu: bool,
    gradient: NDArray[np.float64],
) -> tuple[float, float]:
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
        parameters: as in `Packed`.
        widths: as in `Packed`.
        relu: as in `Packed`.
        gradient: like `parameters`.

    Returns:
        the sum of -log pi(a|s) * weight * scale, and of the entropy in nats.
    """
    backwards = _turned(parameters, widths)
    units = np.empty(_units(widths), np.float32)
    slopes = np.empty(_units(widths), np.float32)
    spare = np.empty(_units(widths), np.float32)
    partial = np.zeros(len(parameters), np.float32)
    picked = np.empty(_BLOCK, np.int64)
    features = widths[0]
    loss = 0.0
    entropy = 0.0
    row = 0
    summed = 0
    while row < len(mask):
        rows = 0
        while row < len(mask) and rows < _BLOCK:
            if mask[row]:
                picked[rows] = row
                for i in range(features):
                    units[rows * features + i] = obs[row, i]
                rows += 1
            row += 1
        if rows > 0:
            logits = _forward(parameters, widths, relu, units, rows)
            for n in range(rows):
                block_loss, block_entropy = _to_logits(
                    logits[n],
                    actions[picked[n]] - first_action,
                    np.float32(weights[picked[n]] * scale),
                    np.float32(ent_coef),
                )
                loss += block_loss
                entropy += block_entropy
            _backward(parameters, backwards, widths, relu, units, rows, slopes, spare, partial)
            summed += rows
        if summed >= _SUM_ROWS or row == len(mask):
            for i in range(len(partial)):
                gradient[i] += partial[i]
                partial[i] = 0.0
            summed = 0
    return loss, entropy


@jit
def _forward(parameters, widths, relu, units, rows):
    """Fill in the activations of `rows` rows, layer after layer, and return the logits.

    A layer's activations begin `_BLOCK` times the widths before it into `units`.
    """
    at = 0
    below = units[: rows * widths[0]]
    begin = _BLOCK * widths[0]
    for layer in range(1, len(widths) - 1):
        fan_in, fan_out = widths[layer - 1], widths[layer]
        weight = parameters[at : at + fan_in * fan_out]
        at += fan_in * fan_out
        bias = parameters[at : at + fan_out]
        at += fan_out
        here = units[begin : begin + rows * fan_out]
        for n in range(rows):
            row = _row(here, n, fan_out)
            for o in range(fan_out):
                row[o] = bias[o]
        _add_product(below, fan_in, _ONE, weight, here, rows, fan_in, fan_out)
        if relu:
            for i in range(len(here)):
                here[i] = max(here[i], np.float32(0.0))
        else:
            for i in range(len(here)):
                here[i] = _tanh(here[i])
        below = here
        begin += _BLOCK * fan_out
    fan_in, fan_out = widths[-2], widths[-1]
    weight = parameters[at : at + fan_in * fan_out]
    bias = parameters[at + fan_in * fan_out :]
    logits = units[begin : begin + rows * fan_out].reshape(rows, fan_out)
    for n in range(rows):
        row = _row(below, n, fan_in)
        for a in range(fan_out):
            column = _row(weight, a, fan_in)
            total = np.float32(0.0)
            for i in range(fan_in):
                total += row[i] * column[i]
            logits[n, a] = total + bias[a]
    return logits


@jit
def _backward(parameters, backwards, widths, relu, units, rows, slopes, spare, gradient):
    """Add to `gradient`, from the loss's slopes in the logits' place, those in the parameters."""
    last = len(widths) - 1
    fan_in, fan_out = widths[last - 1], widths[last]
    at = len(parameters) - fan_out
    begin = _units(widths) - _BLOCK * fan_out
    above = units[begin : begin + rows * fan_out]
    _add_rows(above, rows, gradient[at:])
    at -= fan_in * fan_out
    begin -= _BLOCK * fan_in
    below = units[begin : begin + rows * fan_in]
    to_weight = gradient[at : at + fan_in * fan_out]
    _add_product(above, _ONE, fan_out, below, to_weight, fan_out, rows, fan_in)
    weight = parameters[at : at + fan_in * fan_out]
    for layer in range(last - 1, 0, -1):
        # `above`, of which there are `next_out`, and `weight` belong to the layer above this one.
        next_out, fan_out, fan_in = widths[layer + 1], widths[layer], widths[layer - 1]
        slope, active = slopes[: rows * fan_out], units[begin : begin + rows * fan_out]
        for i in range(len(slope)):
            slope[i] = np.float32(0.0)
        _add_product(above, next_out, _ONE, weight, slope, rows, next_out, fan_out)
        if relu:
            for i in range(len(slope)):
                kept = slope[i]
                slope[i] = kept if active[i] > np.float32(0.0) else np.float32(0.0)
        else:
            for i in range(len(slope)):
                slope[i] *= np.float32(1.0) - active[i] * active[i]
        at -= fan_out
        _add_rows(slope, rows, gradient[at : at + fan_out])
        at -= fan_in * fan_out
        begin -= _BLOCK * fan_in
        below = units[begin : begin + rows * fan_in]
        to_weight = gradient[at : at + fan_in * fan_out]
        _add_product(below, _ONE, fan_in, slope, to_weight, fan_in, rows, fan_out)
        weight = backwards[at : at + fan_in * fan_out]
        above = slope
        slopes, spare = spare, slopes


@jit
def _add_rows(matrix, rows, total):
    """Add every row of a matrix to `total`."""
    for n in range(rows):
        row = _row(matrix, n, len(total))
        for i in range(len(total)):
            total[i] += row[i]


@jit
def _units(widths):
    """How many activations a block has."""
    total = 0
    for width in widths:
        total += width
    return _BLOCK * total


@jit
def _turned(parameters, widths):
    """Like `parameters`, with the weights of the hidden layers as (outputs, inputs)."""
    turned = parameters.copy()
    at = 0
    for layer in range(1, len(widths) - 1):
        fan_in, fan_out = widths[layer - 1], widths[layer]
        for i in range(fan_in):
            for o in range(fan_out):
                turned[at + o * fan_in + i] = parameters[at + i * fan_out + o]
        at += (fan_in + 1) * fan_out
    return turned


@jit
def _add_product(a, a_row, a_column, b, c, rows, inner, columns):
    """C += A B on vectors that hold matrices, four rows of A by four of B at a time.

    A has any strides, so that it may be a transposed one; B and C are contiguous. About 40 of the
    60 GFLOP/s of a large product, at 64 x 64 x 64 on one core.
    """
    whole_rows, whole_inner = rows - rows % 4, inner - inner % 4
    b, c = b.reshape(inner, columns), c.reshape(rows, columns)
    for n in range(0, whole_rows, 4):
        c0, c1 = c[n], c[n + 1]
        c2, c3 = c[n + 2], c[n + 3]
        i0 = n * a_row
        i1, i2, i3 = i0 + a_row, i0 + 2 * a_row, i0 + 3 * a_row
        for k in range(0, whole_inner, 4):
            b0, b1 = b[k], b[k + 1]
            b2, b3 = b[k + 2], b[k + 3]
            j0 = k * a_column
            j1, j2, j3 = j0 + a_column, j0 + 2 * a_column, j0 + 3 * a_column
            a00, a01, a02, a03 = a[i0 + j0], a[i0 + j1], a[i0 + j2], a[i0 + j3]
            a10, a11, a12, a13 = a[i1 + j0], a[i1 + j1], a[i1 + j2], a[i1 + j3]
            a20, a21, a22, a23 = a[i2 + j0], a[i2 + j1], a[i2 + j2], a[i2 + j3]
            a30, a31, a32, a33 = a[i3 + j0], a[i3 + j1], a[i3 + j2], a[i3 + j3]
            for j in range(columns):
                v0, v1, v2, v3 = b0[j], b1[j], b2[j], b3[j]
                c0[j] += a00 * v0 + a01 * v1 + a02 * v2 + a03 * v3
                c1[j] += a10 * v0 + a11 * v1 + a12 * v2 + a13 * v3
                c2[j] += a20 * v0 + a21 * v1 + a22 * v2 + a23 * v3
                c3[j] += a30 * v0 + a31 * v1 + a32 * v2 + a33 * v3
        for k in range(whole_inner, inner):
            b0, at = b[k], k * a_column
            a00, a10, a20, a30 = a[i0 + at], a[i1 + at], a[i2 + at], a[i3 + at]
            for j in range(columns):
                v0 = b0[j]
                c0[j] += a00 * v0
                c1[j] += a10 * v0
                c2[j] += a20 * v0
                c3[j] += a30 * v0
    for n in range(whole_rows, rows):
        c0 = c[n]
        for k in range(inner):
            b0, a00 = b[k], a[n * a_row + k * a_column]
            for j in range(columns):
                c0[j] += a00 * b0[j]


@jit
def _row(flat, index, columns):
    return flat[index * columns : (index + 1) * columns]


@jit
def uniform(seed_low, seed_high, iteration, step, env, purpose):
    """The number that `vecpg.noise.uniforms` has for one step and environment.

    All arguments are uint64; `seed_low` and `seed_high` are the words of the seed.
    """
    word, shift = np.uint64(WORD), np.uint64(32)
    c0, c1, c2, c3, k0, k1 = step, env, iteration, purpose, seed_low, seed_high
    for _ in range(10):
        p0, p1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & word, (p0 >> shift) ^ c3 ^ k1, p0 & word
        k0, k1 = (k0 + np.uint64(WEYL[0])) & word, (k1 + np.uint64(WEYL[1])) & word
    return np.float32(c0 >> np.uint64(8)) * np.float32(2.0**-24)


@jit
def _exponentials(logits):
    """Replace logits by exp(logit - largest), and return the sum."""
    largest = logits[0]
    for logit in logits:
        largest = max(largest, logit)
    total = np.float32(0.0)
    for a in range(len(logits)):
        logits[a] = math.exp(logits[a] - largest)
        total += logits[a]
    return total


@jit
def _to_logits(logits, action, weight, ent_coef):
    """Replace a row's logits by the slopes of its loss in them; return its loss and entropy."""
    largest = logits[0]
    for logit in logits:
        largest = max(largest, logit)
    total = np.float32(0.0)
    for logit in logits:
        total += math.exp(logit - largest)
    shift = largest + math.log(total)
    loss = -weight * (logits[action] - shift)
    entropy = np.float32(0.0)
    for logit in logits:
        entropy -= math.exp(logit - shift) * (logit - shift)
    for a in range(len(logits)):
        log_probability = logits[a] - shift
        probability = math.exp(log_probability)
        slope = weight * probability + ent_coef * probability * (log_probability + entropy)
        logits[a] = slope - weight if a == action else slope
    return loss, entropy


@jit
def _tanh(x):
    """A quotient of polynomials, which vectorizes, within 3e-7 of tanh.

    Coefficients: Eigen, `generic_fast_tanh_float`, a minimax fit on [-9, 9].
    """
    x = min(max(x, np.float32(-7.90531110763549805)), np.float32(7.90531110763549805))
    square = x * x
    above = np.float32(-2.76076847742355e-16)
    above = above * square + np.float32(2.00018790482477e-13)
    above = above * square + np.float32(-8.60467152213735e-11)
    above = above * square + np.float32(5.12229709037114e-08)
    above = above * square + np.float32(1.48572235717979e-05)
    above = above * square + np.float32(6.37261928875436e-04)
    above = above * square + np.float32(4.89352455891786e-03)
    below = np.float32(1.19825839466702e-06)
    below = below * square + np.float32(1.18534705686654e-04)
    below = below * square + np.float32(2.26843463243900e-03)
    below = below * square + np.float32(4.89352518554385e-03)
    return x * above / below

"""A policy's network in machine code, forwards and backwards.

For 64 rows a call of torch costs more than its arithmetic.

Activations are (rows, features). A row's bits depend on that row alone, whichever rows are beside
it. Rows have room for whole tiles of a product: what is beyond their width is 0.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vecpg.kernels.jit import jit
from vecpg.kernels.matrix import (
    NONE,
    add_product,
    dots,
    exp,
    log,
    row_stride,
    sum_of,
    tanh,
    turn_slopes,
    whole_tiles,
)
from vecpg.kernels.vectors import TILE
from vecpg.policy import Policy
from vecpg.policy.distributions import Categorical, DiagonalGaussian

# Rows that go through the network together: their activations stay in the fastest cache.
BLOCK = 64
# Rows whose gradients are summed in float32 before they are added in float64.
_SUM_ROWS = 16 * BLOCK

_MOST_UNITS = 1024
# A hidden layer of at least so many inputs is worth keeping, measured where products are fastest:
# with 64 it is as fast to compute it again, with 128 a tenth slower, with 256 a fifth.
_KEPT_INPUTS = 64


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


class Actions(NamedTuple):
    """A policy's distribution over actions as `sum_gradient` reads it.

    first_action: the number of the first action, where they are Discrete.
    log_std:      float32, the logarithm of the standard deviation of each component of a Box; of
                  none where actions are Discrete.
    """

    first_action: int
    log_std: NDArray[np.float32]


def why_not(policy: Policy) -> str | None:
    """Why these kernels do not serve a policy; None if they do."""
    distribution = policy.distribution
    if not isinstance(distribution, Categorical | DiagonalGaussian):
        return "its actions are neither Discrete nor a Box"
    if isinstance(distribution, DiagonalGaussian) and distribution.raw_log_std is None:
        return "its standard deviation comes from the network"
    return why_not_network(policy)


def why_not_network(policy: Policy) -> str | None:
    """Why `forward` does not serve a policy, whatever its actions are; None if it does."""
    if type(policy) is not Policy:
        return f"{type(policy).__name__} may compute something else"
    if policy.device.type != "cpu":
        return f"the policy is on {policy.device}"
    if policy.encoder.network != "mlp":
        return f"its network is {policy.encoder.network}"
    if policy.obs_dtype == torch.uint8:
        return "its observations are uint8"
    if policy.obs_dtype != torch.float32:
        return "its observations are looked up"
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
    modules = list(policy.modules())
    # Not by `parameters()`, which walks through all modules again.
    parameters = [
        each for module in modules for each in module._parameters.values() if each is not None
    ]
    if (
        "forward" in vars(policy)
        or any(map(_has_hooks, modules))
        or any(parameter._backward_hooks for parameter in parameters)
    ):
        return "a module has hooks"
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            return "the parameters are not float32"
        if not parameter.requires_grad:
            return "a parameter is frozen"
    if max(policy.hidden_sizes, default=0) > _MOST_UNITS:
        return f"a hidden layer has more than {_MOST_UNITS} units"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def first_action_of(policy: Policy) -> int:
    """The number of the first action of a policy whose actions are Discrete."""
    assert isinstance(policy.distribution, Categorical)
    return policy.distribution.first_action


def actions_of(policy: Policy) -> Actions:
    """What `sum_gradient` takes of a policy's distribution."""
    distribution = policy.distribution
    if isinstance(distribution, Categorical):
        return Actions(distribution.first_action, np.empty(0, np.float32))
    assert isinstance(distribution, DiagonalGaussian)
    with torch.no_grad():
        _, log_std = distribution.mean_and_log_std(torch.empty(0, 1))
    return Actions(0, log_std[:, 0].numpy())


def network_of(policy: Policy) -> Network:
    """A copy of the parameters in the kernels' order."""
    # NumPy's calls take half as long as torch's, and there are two dozen.
    layers = [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in _linear_layers(policy)
    ]
    *hidden, (last_weight, last_bias) = layers
    forwards = [part for weight, bias in hidden for part in (_in_tiles(weight.T), _padded(bias))]
    forwards += [_padded(last_weight).reshape(-1), last_bias]
    backwards = [_in_tiles(weight) for weight, _ in layers[1:]] or [last_bias[:0]]
    widths = [weight.shape[1] for weight, _ in layers] + [len(last_bias)]
    return Network(
        np.concatenate(forwards),
        np.concatenate(backwards),
        np.array(widths, np.int64),
        policy.activation == "relu",
    )


def prepare(policy: Policy) -> None:
    """Compile, or load, what the gradient of a policy that these kernels serve will need."""
    network, actions, one = network_of(policy), actions_of(policy), np.ones(1, np.float32)
    sum_gradient(
        np.zeros((1, *policy.obs_shape), np.float32).reshape(1, -1),
        np.full(1, actions.first_action),
        np.zeros((1, len(actions.log_std)), np.float32),
        one,
        one > 0,
        np.empty((0, 0), np.float32),
        actions,
        1.0,
        0.0,
        network,
        np.zeros(len(network.forwards) + len(actions.log_std)),
    )


def set_gradients(policy: Policy, gradient: NDArray[np.float64]) -> None:
    """Write what `sum_gradient` has added up to the policy's `.grad`."""
    if isinstance(policy.distribution, DiagonalGaussian):
        own = policy.distribution.raw_log_std
        assert own is not None
        slopes = torch.from_numpy(gradient[-len(own) :]) * policy.distribution.log_std_slope()
        own.grad, gradient = slopes.to(torch.float32), gradient[: -len(own)]
    rest = gradient.astype(np.float32)
    *hidden, last = _linear_layers(policy)
    for layer in hidden:
        inputs, outputs, wide = layer.in_features, layer.out_features, _wide(layer.out_features)
        rows, bias, rest = np.split(rest, [inputs * wide, (inputs + 1) * wide])
        layer.weight.grad = _copy(rows.reshape(inputs, wide)[:, :outputs].T)
        layer.bias.grad = _copy(bias[:outputs])
    rows, bias = np.split(rest, [len(rest) - last.out_features])
    last.weight.grad = _copy(rows.reshape(last.out_features, -1)[:, : last.in_features])
    last.bias.grad = _copy(bias)


def _copy(array: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(array.copy())


def _linear_layers(policy: Policy) -> list[nn.Linear]:
    return [layer for layer in policy.network if isinstance(layer, nn.Linear)]


def _wide(width: int) -> int:
    return -(-width // TILE) * TILE


def _padded(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    *rows, width = weights.shape
    padded = np.zeros((*rows, _wide(width)), np.float32)
    padded[..., :width] = weights
    return padded


def _in_tiles(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """(rows, columns) as one vector, `TILE` columns after the other."""
    rows = len(weights)
    return _padded(weights).reshape(rows, -1, TILE).transpose(1, 0, 2).reshape(-1)


@jit
def sum_gradient(
    obs: NDArray[np.float32],
    numbers: NDArray[np.int64],
    components: NDArray[np.float32],
    weights: NDArray[np.float32],
    mask: NDArray[np.bool_],
    kept: NDArray[np.float32],
    actions: Actions,
    scale: float,
    ent_coef: float,
    network: Network,
    gradient: NDArray[np.float64],
) -> tuple[float, float, bool]:
    """Add to `gradient` that of a sum over counted rows, and return two sums over them.

        sum of -log pi(a|s) * weight * scale - ent_coef * entropy(s)

    Args:
        obs: (R, features).
        numbers: (R,), actions where they are Discrete; else not read.
        components: (R, A), actions where they are a Box; else not read.
        weights: (R,).
        mask: (R,), True = counted. Other rows are not read.
        kept: (K, units), of the first K rows what `keep` wrote, of this network.
        actions: the policy's.
        scale: of every weight.
        ent_coef: how much entropy is worth.
        network: the policy's.
        gradient: float64, one number for each of `network.forwards` and then of `actions.log_std`.

    Returns:
        the sum of -log pi(a|s) * weight * scale, that of the entropy in nats, and whether every
        action is one of the policy's: a number in its range, or finite. Where one is not, the rest
        is not to be used.
    """
    first_action, log_std = actions
    size, box = len(network.forwards), len(log_std) > 0
    units = activations(network)
    slopes, spare = np.zeros_like(units), np.zeros_like(units)
    nothing, partial = np.zeros(len(units), np.float32), np.zeros(size, np.float32)
    picked, taken = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    values = np.empty((len(log_std), BLOCK), np.float32)
    scaled = np.empty(BLOCK, np.float32)
    features, stride = network.widths[0], row_stride(network.widths[0])
    loss = 0.0
    entropy = 0.0
    known = True
    row = NONE
    summed = 0
    while row < len(mask):
        rows = NONE
        while row < len(mask) and rows < BLOCK:
            picked[rows] = row
            rows += mask[row]
            row += 1
        if rows > 0:
            for i in range(features):
                for n in range(rows):
                    units[n * stride + i] = obs[picked[n], i]
            for n in range(rows):
                scaled[n] = weights[picked[n]] * scale
            if picked[rows - 1] < len(kept):
                outputs = forward_from(network, units, rows, kept, picked)
            else:
                outputs = forward(network, units, rows)
            if box:
                for a in range(len(log_std)):
                    for n in range(rows):
                        values[a, n] = components[picked[n], a]
                        known = known and math.isfinite(values[a, n])
                block_loss, block_entropy = _normal_slopes(
                    outputs, values, scaled, log_std, ent_coef, rows, gradient[size:]
                )
            else:
                for n in range(rows):
                    action = numbers[picked[n]] - first_action
                    known = known and 0 <= action < network.widths[-1]
                    taken[n] = action if known else 0
                block_loss, block_entropy = _slopes(
                    outputs, taken, scaled, np.float32(ent_coef), rows
                )
            loss += block_loss
            entropy += block_entropy
            _backward(network, units, rows, slopes, spare, nothing, partial)
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
    total = widths[-1]
    for layer in range(len(widths) - 1):
        total += row_stride(widths[layer])
    return np.zeros(BLOCK * total, np.float32)


@jit
def forward(network, units, rows):
    """Fill in the activations of `rows` observations, layer after layer, and return the logits.

    The observations stand in `units`, `row_stride` apart; the logits are (actions, BLOCK). Whole
    eights of rows are computed: others than the given ones hold anything.
    """
    for layer in range(1, len(network.widths) - 1):
        _activate(network, units, rows, layer)
    return _last_layer(network, units, rows)


@jit
def forward_from(network, units, rows, kept, places):
    """As `forward`, but that the layers that `keep` has kept are taken from their places."""
    column = NONE
    for layer in range(1, len(network.widths) - 1):
        if not _is_kept(network.widths, layer):
            _activate(network, units, rows, layer)
            continue
        begin, stride, wide = _layer(network.widths, layer)
        for n in range(rows):
            at = begin + n * stride
            here, there = units[at : at + wide], kept[places[n], column : column + wide]
            for o in range(wide):
                here[o] = there[o]
        column += wide
    return _last_layer(network, units, rows)


@jit
def keep(network, units, rows, kept, places):
    """Write each row's activations to its place among those that are kept, (places, units).

    Of a layer that takes few inputs there are none: computing it again costs less than memory does.
    """
    column = NONE
    for layer in range(1, len(network.widths) - 1):
        if not _is_kept(network.widths, layer):
            continue
        begin, stride, wide = _layer(network.widths, layer)
        for n in range(rows):
            at = begin + n * stride
            here, there = units[at : at + wide], kept[places[n], column : column + wide]
            for o in range(wide):
                there[o] = here[o]
        column += wide


@jit
def kept_units(widths: NDArray[np.int64]) -> int:
    """How many numbers `keep` writes for a row."""
    units: int = NONE
    for layer in range(1, len(widths) - 1):
        if _is_kept(widths, layer):
            units += whole_tiles(widths[layer])
    return units


@jit
def _is_kept(widths, layer):
    return widths[layer - 1] >= _KEPT_INPUTS


@jit
def _layer(widths, layer):
    """Where a layer begins among the activations, from a row to the next, and how wide a row is."""
    begin = NONE
    for below in range(layer):
        begin += BLOCK * row_stride(widths[below])
    return begin, row_stride(widths[layer]), whole_tiles(widths[layer])


@jit
def _activate(network, units, rows, layer):
    """Fill in a hidden layer's activations from those of the layer below."""
    parameters, _, widths, relu = network
    whole = (rows + 7) // 8 * 8
    at = NONE
    for before in range(1, layer):
        at += (widths[before - 1] + 1) * whole_tiles(widths[before])
    fan_in = widths[layer - 1]
    begin, stride, wide = _layer(widths, layer)
    weight = parameters[at : at + fan_in * wide]
    bias = parameters[at + fan_in * wide : at + (fan_in + 1) * wide]
    below_row = row_stride(fan_in)
    below, here = units[begin - BLOCK * below_row : begin], units[begin : begin + BLOCK * stride]
    tile, one = np.int64(TILE), np.int64(1)
    to_tile = fan_in * tile
    add_product(
        below, below_row, one, weight, to_tile, tile, bias, NONE, here, stride, whole, fan_in, wide
    )
    for n in range(rows):
        row = here[n * stride : n * stride + wide]
        if relu:
            for o in range(wide):
                row[o] = max(row[o], np.float32(0.0))
        else:
            for o in range(wide):
                row[o] = tanh(row[o])


@jit
def _last_layer(network, units, rows):
    """The logits, (actions, BLOCK), from the activations of the layer below."""
    parameters, _, widths, _ = network
    fan_out = widths[-1]
    begin, stride, wide = _layer(widths, len(widths) - 2)
    below, above = units[begin : begin + BLOCK * stride], begin + BLOCK * stride
    logits = units[above : above + BLOCK * fan_out]
    bias = parameters[len(parameters) - fan_out :]
    weight = parameters[len(parameters) - fan_out * (wide + 1) : len(parameters) - fan_out]
    dots(below, stride, weight, wide, bias, logits, np.int64(BLOCK), rows, wide, fan_out)
    return logits.reshape(fan_out, BLOCK)


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
def _backward(network, units, rows, slopes, spare, nothing, gradient):
    """Add to `gradient`, from the loss's slopes in the logits' place, those in the parameters.

    `slopes` and `spare` are as large as `units`; `nothing` is a row of zeros.
    """
    _, backwards, widths, relu = network
    whole = (rows + 7) // 8 * 8
    last = len(widths) - 1
    tile, one = np.int64(TILE), np.int64(1)
    fan_out = widths[last]
    at, begin, turned = len(gradient) - fan_out, len(units) - BLOCK * fan_out, len(backwards)
    above, above_row, above_column = units[begin:], one, BLOCK * one
    for a in range(fan_out):
        column = above[a * BLOCK : (a + 1) * BLOCK]
        for n in range(rows, BLOCK):
            column[n] = np.float32(0.0)
        gradient[at + a] += np.float32(sum_of(column, rows))
    wide, stride = whole_tiles(widths[last - 1]), row_stride(widths[last - 1])
    at -= fan_out * wide
    begin -= BLOCK * stride
    active = units[begin : begin + BLOCK * stride]
    to_weight = gradient[at : at + fan_out * wide]
    add_product(
        above,
        above_column,
        above_row,
        active,
        tile,
        stride,
        to_weight,
        wide,
        to_weight,
        wide,
        fan_out,
        rows,
        wide,
    )
    for layer in range(last - 1, 0, -1):
        # `above`, (rows, next_out), belongs to the layer above this one.
        next_out, fan_in = widths[layer + 1], widths[layer - 1]
        slope = slopes[: BLOCK * stride]
        turned -= next_out * wide
        weight, to_tile = backwards[turned : turned + next_out * wide], next_out * tile
        add_product(
            above,
            above_row,
            above_column,
            weight,
            to_tile,
            tile,
            nothing,
            NONE,
            slope,
            stride,
            whole,
            next_out,
            wide,
        )
        at -= wide
        turn_slopes(slope, active, stride, rows, wide, relu, gradient[at : at + wide])
        below_row = row_stride(fan_in)
        at -= fan_in * wide
        begin -= BLOCK * below_row
        below = units[begin : begin + BLOCK * below_row]
        to_weight = gradient[at : at + fan_in * wide]
        add_product(
            below,
            one,
            below_row,
            slope,
            tile,
            stride,
            to_weight,
            wide,
            to_weight,
            wide,
            fan_in,
            rows,
            wide,
        )
        above, above_row, above_column = slope, stride, one
        slopes, spare = spare, slopes
        active, wide, stride = below, whole_tiles(fan_in), below_row


@jit
def _slopes(logits, actions, weights, ent_coef, rows):
    """Replace logits (actions, BLOCK) by the slopes of the loss in them.

    Returns the sums over rows of -log pi * weight and of the entropy.
    """
    largest, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    taken, mean = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    loss, entropy = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    _largest(logits, largest, rows)
    total[:rows] = np.float32(0.0)
    mean[:rows] = np.float32(0.0)
    for a in range(len(logits)):
        row = logits[a]
        for n in range(rows):
            row[n] -= largest[n]
            power = exp(row[n])
            total[n] += power
            mean[n] += power * row[n]
    for n in range(rows):
        taken[n] = logits[actions[n], n]
    # A few vectors at a time: of many the compiler does not ask whether they overlap.
    for n in range(rows):
        entropy[n] = log(total[n])
        total[n] = np.float32(1.0) / total[n]
    for n in range(rows):
        loss[n] = weights[n] * (entropy[n] - taken[n])
    for n in range(rows):
        mean[n] *= total[n]
        entropy[n] -= mean[n]
    for a in range(len(logits)):
        row = logits[a]
        for n in range(rows):
            # That is log pi + entropy: the logarithm of the sum is in both.
            bonus = ent_coef * (row[n] - mean[n])
            row[n] = exp(row[n]) * total[n] * (weights[n] + bonus)
    for n in range(rows):
        logits[actions[n], n] -= weights[n]
    return sum_of(loss, rows), sum_of(entropy, rows)


@jit
def _normal_slopes(means, actions, weights, log_std, ent_coef, rows, slopes):
    """Replace means (components, BLOCK) by the slopes of the loss in them.

    Those in the logarithms of the standard deviations are added to `slopes`. Returns the sums over
    rows of -log pi * weight and of the entropy.
    """
    loss = 0.0
    entropy = 0.0
    for a in range(len(means)):
        row, taken = means[a], actions[a]
        inverse = np.float32(math.exp(-log_std[a]))
        rest = log_std[a] + np.float32(0.5 * math.log(2 * math.pi))
        slope = 0.0
        for n in range(rows):
            distance = (taken[n] - row[n]) * inverse
            square = distance * distance
            loss += weights[n] * (np.float32(0.5) * square + rest)
            slope += weights[n] * (np.float32(1.0) - square)
            row[n] = -weights[n] * distance * inverse
        slopes[a] += slope - ent_coef * rows
        entropy += rows * (rest + 0.5)
    return loss, entropy

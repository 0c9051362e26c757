"""A network of the user's own, called by name, and tried before it is used."""

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from vecpg import named

# What a checkpoint can hold, and float32 alone can be trained.
_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
}
# How far the features of an observation may be from those that it has beside another: products of
# other shapes are rounded otherwise.
_ROUNDING = 1e-3

_NEW = "new parameters at each call"
_UNCHANGED = (
    "parameters and buffers that no call changes, since the log-probabilities of the update are"
    " those that acted (BatchNorm changes its buffers; use GroupNorm or LayerNorm)"
)

# The parameters of networks that are in use, by their identity.
_in_use: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


class Own(NamedTuple):
    """A user's module, and what was found out about it.

    features: F, how many features it makes of an observation.
    kept:     how many numbers of one observation are kept until the gradient is formed.
    """

    module: nn.Module
    features: int
    kept: int


def make(name: str, space: spaces.Space[Any], door: Callable[[Tensor], Tensor]) -> Own:
    """Call "module:function" with a space, and try the module that it returns.

    It makes features (B, F) float32 of observations (B, *obs_shape), float32 or, where the space is
    `Discrete` or `MultiDiscrete`, int64. What would make a training wrong is refused: features of
    an observation that depend on those beside it, on chance, or on what went through before, as
    those of BatchNorm and Dropout do; an input that is changed; parameters that another network
    has, or that are not float32; and what a checkpoint cannot hold.

    Args:
        name: the user's; it is imported.
        space: of one environment's observations.
        door: what is done to observations before they enter.

    Raises:
        ValueError: in one line, which begins with --network and the name.
    """
    # What its module draws while it is imported, the first time, does not change what comes next.
    with torch.random.fork_rng(devices=[]):
        function = named.load(name, "--network")
    with _in_float32(), torch.enable_grad():
        module = _called(name, lambda: function(space), f"on the space of shape {space.shape}")
        _check(
            name,
            isinstance(module, nn.Module),
            "function(observation_space) to return a torch.nn.Module",
            type(module).__name__,
        )
        obs = door(_some(space, rows=2))
        features, kept = _tried(name, module, obs)
        _check_kept(name, module)
        _check_made_again(name, module, lambda: function(space), obs)
    return Own(module, features, kept)


@contextmanager
def _in_float32() -> Iterator[None]:
    """Parameters are made in float32, whatever torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tried(name: str, module: nn.Module, obs: Tensor) -> tuple[int, int]:
    """How many features there are, and how many numbers an observation takes."""
    given = obs.clone()
    # What is made at the first call is there after it.
    first = _features(name, module, obs)
    before = _copies(module)
    kept: dict[int, int] = {}

    theirs = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in theirs:
            kept[place] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        second = _features(name, module, obs)
    _check(name, torch.equal(obs, given), "a module that leaves its input as it is", "another")
    _check(
        name,
        torch.equal(first, second),
        "the same features of the same observations at each call (Dropout's are not; --dropout"
        " drops hidden units)",
        "others",
    )
    after = _copies(module)
    same = before.keys() == after.keys() and all(
        torch.equal(tensor, after[key]) for key, tensor in before.items()
    )
    _check(
        name,
        same,
        _UNCHANGED,
        "some that one changed",
    )
    alone = _features(name, module, obs[:1])
    right = alone.shape[1] == first.shape[1]
    _check(name, right, f"(1, {first.shape[1]}) features", tuple(alone.shape))
    size = max(1.0, first.detach().abs().max().item())
    near = torch.allclose(alone, first[:1], rtol=_ROUNDING, atol=_ROUNDING * size)
    _check(
        name,
        near,
        "features of an observation that do not depend on the others beside it (BatchNorm's do)",
        "others beside another",
    )
    known = {id(parameter) for parameter in module.parameters()}
    others = [tuple(leaf.shape) for leaf in _leaves(first) if id(leaf) not in known]
    _check(
        name,
        not others,
        "all its parameters among module.parameters() (lists of modules are nn.ModuleList)",
        f"one of shape {others[0] if others else ()} that is not",
    )
    trained = any(parameter.requires_grad for parameter in module.parameters())
    differentiated = first.requires_grad or not trained
    _check(name, differentiated, "features that can be differentiated", "some without a gradient")
    twin = _called(name, lambda: copy.deepcopy(module), "in copy.deepcopy, after a call")
    same = torch.equal(_features(name, twin, obs), first)
    _check(name, same, "a copy to make the same features", "others")
    return first.shape[1], obs[0].numel() + sum(kept.values()) // 2


def _check_made_again(
    name: str, module: nn.Module, make: Callable[[], nn.Module], obs: Tensor
) -> None:
    """Whoever loads it calls the function again; and it stays what it is when it has learnt."""
    # What that draws does not change what comes next.
    with torch.random.fork_rng(devices=[]):
        again = _called(name, make, "a second time")
        right = isinstance(again, nn.Module) and again is not module
        _check(name, right, "another module at each call", "the same one")
        _features(name, again, obs)  # what is made at the first call is there after it
        own = {id(parameter) for parameter in module.parameters()}
        shared = [key for key, value in again.named_parameters() if id(value) in own]
        _check(name, not shared, _NEW, f"{shared[0] if shared else ''} of the call before")
        _called(name, lambda: again.load_state_dict(module.state_dict()), "in load_state_dict")
        same = torch.equal(_features(name, again, obs), _features(name, module, obs))
        _check(
            name,
            same,
            "what a second call returns to make the same features with the same state_dict (what is"
            " drawn or computed once, and is no parameter, is a buffer)",
            "others",
        )
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        before = _copies(again)
        _features(name, again, obs)
        after = _copies(again)
    same = all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    _check(name, same, f"{_UNCHANGED}, once parameters have moved either", "some that one changed")


def _leaves(features: Tensor) -> list[Tensor]:
    """What the features can be differentiated by."""
    found: list[Tensor] = []
    waiting, seen = [features.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


def _features(name: str, module: nn.Module, obs: Tensor) -> Tensor:
    rows = len(obs)
    given = f"on observations {tuple(obs.shape)} {_plain(obs.dtype)}"
    features: Tensor = _called(name, lambda: module(obs), given)
    expected = f"({rows}, F) features in float32 {given}"
    _check(name, isinstance(features, Tensor), expected, type(features).__name__)
    shape = tuple(features.shape)
    right = len(shape) == 2 and shape[0] == rows and shape[1] > 0
    _check(name, right, expected, f"shape {shape}")
    found = f"{_plain(features.dtype)} on {features.device}"
    right = features.dtype == torch.float32 and features.device.type == "cpu"
    _check(name, right, f"{expected} on cpu", found)
    _check(name, bool(features.isfinite().all()), f"finite features {given}", "NaN or infinity")
    return features


def _copies(module: nn.Module) -> dict[str, Tensor]:
    """Of all that is registered, whether a checkpoint keeps it or not."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


def _check_kept(name: str, module: nn.Module) -> None:
    """Parameters of its own that can be trained, and a state that a checkpoint can hold."""
    parameters = dict(module.named_parameters())
    for key, parameter in parameters.items():
        found = f"{_plain(parameter.dtype)} on {parameter.device}"
        right = parameter.dtype == torch.float32 and parameter.device.type == "cpu"
        _check(name, right, f"parameters in float32 on cpu, as they are made, {key} too", found)
    for key, tensor in module.state_dict().items():
        held = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        right = held and tensor.dtype in _DTYPES and is_dense(tensor.shape, tensor.stride())
        expected = f"a state_dict of dense tensors of real numbers, which a checkpoint holds, {key}"
        found = _plain(tensor.dtype) if held else type(tensor).__name__
        _check(name, right, f"{expected} too", found)
        right = bool(tensor.isfinite().all())
        _check(name, right, f"finite numbers in its state_dict, {key} too", "NaN or infinity")
    for key, parameter in parameters.items():
        known = _in_use.get(id(parameter)) is parameter
        _check(name, not known, _NEW, f"{key} of an earlier one's module")
    _in_use.update({id(parameter): parameter for parameter in parameters.values()})


def is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether every number between the first and the last is used once, in whatever order.

    Example:
        >>> is_dense([2, 3], [1, 2]), is_dense([2, 3], [3, 0])
        (True, False)
    """
    needed = 1
    for step, length in sorted(zip(stride, size, strict=True)):
        if length == 1:
            continue
        if step != needed:
            return math.prod(size) == 0
        needed *= length
    return True


def _some(space: Any, rows: int) -> Tensor:
    """Observations of a space as a rollout holds them, the same at each call.

    Not from the space itself, which may be the environment's: what it draws would be others'.
    """
    rng = np.random.default_rng(0)
    shape = rows, *(space.shape or ())
    if isinstance(space, spaces.Box) and np.dtype(space.dtype).kind in "biu":
        low, high = (bound.astype(np.float64) for bound in (space.low, space.high))
        drawn = np.floor(low + rng.random(shape) * (high - low + 1)).clip(low, high)
        kind = np.uint8 if space.dtype == np.uint8 else np.float32
        return torch.from_numpy(drawn.astype(kind))
    if isinstance(space, spaces.Box):
        # As far as they may be, they need not be finite.
        drawn = rng.standard_normal(shape)
        return torch.from_numpy(drawn.clip(space.low, space.high).astype(np.float32))
    if isinstance(space, spaces.MultiBinary):
        return torch.from_numpy(rng.integers(0, 2, shape).astype(np.float32))
    sizes = np.asarray(space.nvec if isinstance(space, spaces.MultiDiscrete) else space.n)
    first = np.asarray(space.start).astype(np.int64)
    return torch.from_numpy(first + rng.integers(0, sizes.astype(np.int64), shape))


def _called(name: str, call: Callable[[], Any], where: str) -> Any:
    try:
        return call()
    # It is the user's own, and may raise anything.
    except (Exception, SystemExit) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"--network {name}: expected it to work {where}, got {words[:300]}"
        ) from error


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(name: str, holds: bool, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"--network {name}: expected {expected}, got {got}")

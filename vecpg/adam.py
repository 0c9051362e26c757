"""Adam, in plain operations. Torch's own loads torch's compiler first, which takes a second."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# What torch's Adam offers besides, in the words in which its state says that it is not used.
_UNUSED = {
    "weight_decay": 0,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": False,
}
# Those of them that change what a step does, and not only how it is computed.
_CHANGES = ("weight_decay", "amsgrad", "maximize")


class Adam:
    """Adam. On the CPU, parameters and state are bit for bit those of `torch.optim.Adam`.

        m = m + (1 - beta1) (g - m)        v = beta2 v + (1 - beta2) g^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Every parameter counts its own steps t: one without a gradient is left as it is. The host does
    not wait for the device.

    Args:
        parameters: tensors of real numbers, on any device. They are changed in place.
        lr: the step size.
        betas: how much of m and of v a step keeps. In [0, 1).
        eps: added to the square root. At least 0.

    Source: Kingma & Ba (2015), algorithm 1.

    Example:
        >>> weights = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> adam = Adam([weights], lr=0.5)
        >>> weights.square().sum().backward()
        >>> adam.step()
        >>> weights.detach()
        tensor([0.5000, 1.5000])
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = list(parameters)
        self.lr, self.betas, self.eps = lr, betas, eps
        # Of each parameter that has made a step, by its place: t, m and v.
        self._steps: dict[int, int] = {}
        self._means: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}
        # What a step size must stay below: torch refuses it, or goes on with infinity.
        limits = [torch.finfo(each.dtype).max for each in self.parameters]
        self._largest = min(limits, default=math.inf)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or fill them with 0."""
        for parameter in self.parameters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients.

        Raises:
            FloatingPointError: lr / (1 - beta1^t) is beyond what a parameter can hold. Nothing was
                changed.
        """
        gradients = {
            place: parameter.grad
            for place, parameter in enumerate(self.parameters)
            if parameter.grad is not None
        }
        if not gradients:
            return
        (beta1, beta2), grads = self.betas, list(gradients.values())
        steps = [self._steps.get(place, 0) + 1 for place in gradients]
        sizes = [self.lr / (1 - beta1**t) for t in steps]
        if max(sizes) > self._largest:
            raise FloatingPointError(f"Adam's step size overflows to {max(sizes):.3g}")
        for place, t in zip(gradients, steps, strict=True):
            if place not in self._steps:
                self._means[place] = torch.zeros_like(self.parameters[place])
                self._squares[place] = torch.zeros_like(self.parameters[place])
            self._steps[place] = t
        means = [self._means[place] for place in gradients]
        squares = [self._squares[place] for place in gradients]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(divisors, self.eps)
        torch._foreach_addcdiv_(
            [self.parameters[place] for place in gradients],
            means,
            divisors,
            [-size for size in sizes],
        )

    def averages(self) -> list[Tensor]:
        """Of every parameter that has made a step m and v, no copies."""
        return [*self._means.values(), *self._squares.values()]

    def copy_from(self, other: "Adam") -> None:
        """Come to where another one is, of parameters of the same shapes; they are not copied.

        If it is interrupted, it can be done again.
        """
        self._take(other._steps, other._means, other._squares)

    def resume(self, steps: int, means: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        """Come to where every parameter has made so many steps, and has these m and v.

        They are copied. If it is interrupted, it can be done again.
        """
        after = range(len(means) if steps else 0)
        self._take(
            dict.fromkeys(after, steps),
            {place: means[place] for place in after},
            {place: squares[place] for place in after},
        )

    def _take(
        self, steps: dict[int, int], means: dict[int, Tensor], squares: dict[int, Tensor]
    ) -> None:
        for own, theirs in ((self._means, means), (self._squares, squares)):
            for place, average in theirs.items():
                if place not in own:
                    own[place] = torch.empty_like(average)
            if theirs:
                torch._foreach_copy_([own[place] for place in theirs], list(theirs.values()))
        self._steps = dict(steps)

    def state_dict(self) -> dict[str, Any]:
        """What `torch.optim.Adam.state_dict` gives, and its `load_state_dict` takes.

        The tensors are those that the next step changes, no copies.
        """
        state = {
            place: {
                "step": torch.tensor(float(self._steps[place])),
                "exp_avg": self._means[place],
                "exp_avg_sq": self._squares[place],
            }
            for place in self._steps
        }
        settings = {"lr": self.lr, "betas": self.betas, "eps": self.eps, **_UNUSED}
        return {
            "state": state,
            "param_groups": [{**settings, "params": list(range(len(self.parameters)))}],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, here or in `torch.optim.Adam`; it is copied.

        Raises:
            ValueError: it is of other parameters, or of an Adam that steps differently. Nothing
                was changed.
        """
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        if sizes != [len(self.parameters)]:
            raise ValueError(
                f"state_dict: expected one group of {len(self.parameters)} parameters, got groups"
                f" of {sizes}; pass the state that was saved with these parameters"
            )
        (group,) = state_dict["param_groups"]
        for name in _CHANGES:
            if group[name] != _UNUSED[name]:
                raise ValueError(
                    f"state_dict: expected {name} {_UNUSED[name]}, got {group[name]}; pass the"
                    " state of a plain Adam"
                )
        steps: dict[int, int] = {}
        means: dict[int, Tensor] = {}
        squares: dict[int, Tensor] = {}
        for place, number in enumerate(group["params"]):
            if number not in state_dict["state"]:
                continue
            one, parameter = state_dict["state"][number], self.parameters[place]
            for averages, name in ((means, "exp_avg"), (squares, "exp_avg_sq")):
                if one[name].shape != parameter.shape:
                    raise ValueError(
                        f"state_dict: expected {name} {number} of shape {tuple(parameter.shape)},"
                        f" got {tuple(one[name].shape)}; pass the state that was saved with these"
                        " parameters"
                    )
                averages[place] = one[name].detach().to(parameter, copy=True)
            steps[place] = int(one["step"])
        self.lr, self.betas, self.eps = group["lr"], tuple(group["betas"]), group["eps"]
        self._steps, self._means, self._squares = steps, means, squares

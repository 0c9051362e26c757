"""Adam, one step at a time. Torch's own loads its compiler first, which takes about a second."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# What torch's Adam can do besides, as it writes down that it does not.
_NOT_DONE = {
    "weight_decay": 0,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": False,
}
# Those of the above that change what a step is, and not only how it is computed.
_OTHER_STEPS = ("weight_decay", "amsgrad", "maximize")


class Adam:
    """Adam with torch's defaults; `torch.optim.Adam` gives the same bits.

        m = m + (1 - beta1) (g - m)         v = beta2 v + (1 - beta2) g^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Each parameter counts its own steps t: one without a gradient is left as it is. Nothing waits
    for the device.

    Args:
        parameters: real tensors of floats, on any device.
        lr: the step size.
        betas: how much of each average is kept, in [0, 1).
        eps: added to the square root. At least 0.

    Source: Kingma & Ba (2015), algorithm 1.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> adam = Adam([weight], lr=0.5)
        >>> weight.square().sum().backward()
        >>> adam.step()
        >>> weight.detach()
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
        # By the parameter's place: the steps it has made, and its averages m and v.
        self._steps: dict[int, int] = {}
        self._averages: dict[int, tuple[Tensor, Tensor]] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or fill them with 0."""
        for parameter in self.parameters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad = torch.zeros_like(parameter.grad)

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients that the parameters have."""
        (beta1, beta2), lr = self.betas, self.lr
        places = [i for i, each in enumerate(self.parameters) if each.grad is not None]
        if not places:
            return
        for i in places:
            if i not in self._averages:
                zeros = torch.zeros_like(self.parameters[i])
                self._averages[i] = zeros, zeros.clone()
            self._steps[i] = self._steps.get(i, 0) + 1
        parameters = [self.parameters[i] for i in places]
        gradients = [each.grad for each in parameters]
        means = [self._averages[i][0] for i in places]
        squares = [self._averages[i][1] for i in places]
        steps = [self._steps[i] for i in places]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(divisors, self.eps)
        sizes = [-(lr / (1 - beta1**t)) for t in steps]
        torch._foreach_addcdiv_(parameters, means, divisors, sizes)

    def copy_from(self, other: "Adam") -> None:
        """Take the steps and averages of the optimizer of an equal set of parameters."""
        for i, averages in other._averages.items():
            if i not in self._averages:
                self._averages[i] = tuple(torch.empty_like(each) for each in averages)
        own, theirs = (
            [each for averages in adam._averages.values() for each in averages]
            for adam in (self, other)
        )
        if own:
            torch._foreach_copy_(own, theirs)
        self._steps = dict(other._steps)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Adam.state_dict`, which loads it. The averages are not copied."""
        state = {
            i: {"step": torch.tensor(float(self._steps[i])), "exp_avg": mean, "exp_avg_sq": square}
            for i, (mean, square) in sorted(self._averages.items())
        }
        settings = {"lr": self.lr, "betas": self.betas, "eps": self.eps, **_NOT_DONE}
        numbers = list(range(len(self.parameters)))
        return {"state": state, "param_groups": [{**settings, "params": numbers}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that this class or `torch.optim.Adam` gave; its tensors are copied.

        Raises:
            ValueError: it is that of other parameters, or of an optimizer that steps differently;
                nothing was changed.
        """
        groups, states = state_dict["param_groups"], state_dict["state"]
        numbers = [number for group in groups for number in group["params"]]
        if len(groups) != 1 or len(numbers) != len(self.parameters):
            raise ValueError(
                f"state_dict: expected one group of {len(self.parameters)} parameters, got"
                f" {[len(group['params']) for group in groups]}; load the one saved with them"
            )
        group = groups[0]
        for name in _OTHER_STEPS:
            if group[name]:
                raise ValueError(
                    f"state_dict: expected {name}={_NOT_DONE[name]}, got {group[name]}; load it"
                    " into torch.optim.Adam"
                )
        steps: dict[int, int] = {}
        averages: dict[int, tuple[Tensor, Tensor]] = {}
        for i, (number, parameter) in enumerate(zip(numbers, self.parameters, strict=True)):
            if number not in states:
                continue
            steps[i] = int(states[number]["step"])
            mean, square = (states[number][name] for name in ("exp_avg", "exp_avg_sq"))
            for each in (mean, square):
                if each.shape != parameter.shape:
                    raise ValueError(
                        f"state_dict: expected shape {tuple(parameter.shape)} for parameter {i},"
                        f" got {tuple(each.shape)}; load the one saved with these parameters"
                    )
            averages[i] = (
                torch.zeros_like(parameter, requires_grad=False).copy_(mean),
                torch.zeros_like(parameter, requires_grad=False).copy_(square),
            )
        self.lr, self.betas, self.eps = group["lr"], tuple(group["betas"]), group["eps"]
        self._steps, self._averages = steps, averages

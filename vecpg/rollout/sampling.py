"""Drawing a row's actions, in machine code where that serves the policy, else in torch."""

import logging
from collections.abc import Callable

from torch import Tensor

from vecpg import mlp
from vecpg.noise import Purpose, StepNoise
from vecpg.policy import Policy

_log = logging.getLogger(__name__)
_announced: set[str] = set()


def sampler(
    policy: Policy, seed: int, iteration: int, num_envs: int
) -> Callable[[int, Tensor, Tensor], None]:
    """What draws, at step t, actions (N, *action_shape) for observations (N, *obs_shape).

    It writes them to the tensor it is given. The policy is read when this is called.
    """
    reason = mlp.why_not(policy)
    if (how := reason or "") not in _announced:
        _announced.add(how)
        _log.debug("actions are drawn %s", f"in torch: {reason}" if reason else "in machine code")
    if reason is None:
        on_host = mlp.sampler(policy, seed, iteration, Purpose.ACTION)
        return lambda t, obs, actions: on_host(t, obs.numpy(), actions.numpy())
    stream = seed, iteration, num_envs
    noise = StepNoise(*stream, Purpose.ACTION, policy.device, policy.num_uniforms)
    dropout = StepNoise(*stream, Purpose.DROPOUT, policy.device, policy.dropout_units)

    def draw(t: int, obs: Tensor, actions: Tensor) -> None:
        seen = obs.to(policy.device, non_blocking=True)
        dropped = dropout(t) if policy.dropout_units else None
        actions.copy_(policy.sample(seen, noise(t), dropped))

    return draw

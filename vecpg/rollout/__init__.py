"""Collecting whole episodes from N environments at once."""

import logging
from typing import Any

from gymnasium.vector import VectorEnv

from vecpg.envs import check_autoreset
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.policy import Policy, sampling
from vecpg.rollout import cpu, stepping
from vecpg.rollout.cpu import collect_in_blocks
from vecpg.rollout.data import Rollout
from vecpg.rollout.stepping import collect_by_stepping, play
from vecpg.rollout.tensor import collect_on_device

__all__ = ["Rollout", "collect", "play", "prepare"]

_log = logging.getLogger(__name__)
_announced: set[str] = set()

BACKENDS = ("auto", "reference", "cpu")


def collect(
    envs: VectorEnv,
    policy: Policy,
    *,
    num_steps: int,
    seed: int,
    iteration: int,
    backend: str = "auto",
) -> Rollout:
    """Whole episodes from a fresh reset, with the start window.

    An environment starts another episode if and only if it has made fewer than `num_steps` real
    steps in this iteration, and collecting goes on until every started episode has ended. Whether
    an episode starts depends on the past alone, so no outcome is favoured.

    Args:
        envs: N environments in NEXT_STEP mode.
        policy: on any device; environments on tensors must be on the same one.
        num_steps: the start window in real steps. 1 = exactly one episode for each environment.
        seed: of the run.
        iteration: which collection this is; (seed, iteration) fixes every random number in it.
        backend: "reference" steps the environments in Python; "cpu" plays whole rollouts in
            machine code, of vecpg's CartPole and Pendulum on the CPU under a plain network; "auto"
            takes "cpu" where it serves, and logs what it takes and why.

    Returns:
        a `Rollout` on the policy's device.

    Raises:
        ValueError: environments in another autoreset mode, or on another device than the policy;
            an unknown backend; "cpu" where it does not serve.
        EnvironmentFailure: an environment raised or returned a number that is not finite; the
            message has its index, the step and the seed.

    Example:
        >>> from vecpg.envs import make_envs
        >>> envs = make_envs("CartPole-v1", 4)
        >>> policy = Policy(envs.single_observation_space, envs.single_action_space)
        >>> rollout = collect(envs, policy, num_steps=1, seed=1, iteration=0)
        >>> rollout.dones.sum().item()
        4
    """
    check_autoreset(envs)
    settings = {"num_steps": num_steps, "seed": seed, "iteration": iteration}
    if _backend(envs, policy, backend) == "cpu":
        return collect_in_blocks(envs, policy, **settings)  # type: ignore[arg-type]
    if isinstance(envs, TensorVectorEnv):  # a wrapper around them is stepped like any other
        return collect_on_device(envs, policy, **settings)
    return collect_by_stepping(envs, policy, **settings)


def prepare(envs: VectorEnv, policy: Policy) -> None:
    """Compile, or load, the kernels that collecting and evaluating will need."""
    if _backend(envs, policy, "auto") == "cpu":
        cpu.prepare(envs, policy)
    else:
        sampling.prepare(policy)
    stepping.prepare()  # evaluation steps


def _backend(envs: Any, policy: Policy, backend: str) -> str:
    """What "auto" stands for, and a refusal of what does not serve."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = None if backend == "reference" else cpu.why_not(envs, policy)
    if backend == "cpu" and reason is not None:
        raise ValueError(
            f'backend="cpu": {reason}; it serves {cpu.SERVED}. Use backend="reference" or "auto"'
        )
    if backend == "auto" and isinstance(envs.unwrapped, TensorVectorEnv):
        how = "in machine code" if reason is None else f"by stepping it in torch: {reason}"
        _announce(f"{type(envs).__name__} is collected {how}")
    return "cpu" if backend != "reference" and reason is None else "reference"


def _announce(message: str) -> None:
    if message not in _announced:
        _announced.add(message)
        _log.info(message)

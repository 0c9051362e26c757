"""Whole collections by Triton's kernels, interpreted, against those in machine code."""

import pytest
import torch
from on_tensors import Fading, Panel

pytest.importorskip("triton", reason="needs triton, which is for Linux")

import gpu_kernels

from vecpg.envs import make_envs
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.noise import Stream
from vecpg.policy import Policy
from vecpg.rollout import collect, tensor


@pytest.mark.slow
def test_interpreted():
    gpu_kernels.interpret("test_rollout_kernels")


def interpret():
    torch.set_num_threads(1)
    tensor._ROWS_BETWEEN_LOOKS, tensor._BLOCKS_AHEAD = {"cpu": 4}, {"cpu": 1}
    check(make_envs("CartPole-v1", 5, max_episode_steps=12), num_steps=9)
    check(make_envs("Pendulum-v1", 3, max_episode_steps=5), num_steps=6)
    check(TensorVectorEnv(Fading, 5, max_episode_steps=5), num_steps=7, dropout=0.3)
    check(TensorVectorEnv(Panel, 5, max_episode_steps=5), num_steps=7)


def check(envs, num_steps, **settings):
    """Parameters are such that no draw lies where rounding decides."""
    torch.manual_seed(0)
    policy = Policy(
        envs.single_observation_space, envs.single_action_space, hidden_sizes=[8], **settings
    )
    kernels = tensor.find_kernels(envs, policy)
    kept = tensor.TensorCollector(envs, policy, num_steps=num_steps, kernels=kernels, static=True)
    for iteration in range(2):
        found = kept.collect(Stream(3, iteration, 2, envs.num_envs), wait=False)
        wanted = collect(
            envs, policy, num_steps=num_steps, seed=3, iteration=iteration, first_env=2
        )
        length = len(wanted.mask)
        assert not found.mask[length:].any()
        for name in ("mask", "terminations", "truncations"):
            assert torch.equal(getattr(found, name)[:length], getattr(wanted, name)), name
        for name in ("obs", "actions", "rewards"):
            one, other = getattr(found, name)[:length], getattr(wanted, name)
            torch.testing.assert_close(one[wanted.mask], other[wanted.mask], rtol=0, atol=1e-5)
        assert torch.equal(found.final_rows, wanted.final_rows)
        assert torch.equal(found.places(), wanted.places())
        assert found.num_episodes == wanted.dones.sum()
        assert found.finite

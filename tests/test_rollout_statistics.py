import math

import gymnasium
import pytest
import torch

from vecpg.envs import make_envs
from vecpg.policy import Policy
from vecpg.rollout import Rollout, collect, statistics
from vecpg.rollout.statistics import episode_statistics


def test_episode_statistics_agree_with_gymnasiums_own_wrapper():
    envs = make_envs("environments:Counting-v0", 6)
    torch.manual_seed(0)
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    recorded = gymnasium.wrappers.vector.RecordEpisodeStatistics(envs, buffer_length=10_000)
    seen = []

    real = recorded.step

    def step(actions):
        result = real(actions)
        if "episode" in result[4]:
            episode = result[4]["episode"]
            ended = result[4]["_episode"].nonzero()[0]
            seen.extend((n, episode["r"][n], episode["l"][n]) for n in ended)
        return result

    recorded.step = step
    rollout = collect(recorded, policy, num_steps=1, seed=1, iteration=0)
    episodes = episode_statistics(rollout)
    first = {}
    for n, episode_return, length in seen:
        first.setdefault(n, (episode_return, length))
    assert list(zip(episodes.returns.tolist(), episodes.lengths.tolist(), strict=True)) == [
        first[n] for n in range(6)
    ]


def test_episode_statistics_are_in_order_of_environment_and_start():
    envs = make_envs("environments:Counting-v0", 6)
    torch.manual_seed(0)
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    rollout = collect(envs, policy, num_steps=25, seed=1, iteration=0)
    rollout.rewards[~rollout.mask] = math.nan
    expected = []
    for n in range(6):
        total = length = 0
        for t in range(len(rollout.mask)):
            if rollout.mask[t, n]:
                total, length = total + rollout.rewards[t, n].item(), length + 1
                if rollout.dones[t, n]:
                    expected.append((total, length))
                    total = length = 0
    episodes = episode_statistics(rollout)
    assert list(zip(episodes.returns.tolist(), episodes.lengths.tolist(), strict=True)) == expected


@pytest.mark.parametrize(("length", "num_envs"), [(1, 1), (63, 3), (40, 65)])
def test_episode_statistics_are_the_same_in_torch_and_on_the_host(length, num_envs):
    g = torch.Generator().manual_seed(length)
    mask = torch.rand(length, num_envs, generator=g) < 0.9
    ends = torch.rand(length, num_envs, generator=g) < 0.2  # some where nothing counts
    rewards = torch.randn(length, num_envs, generator=g).masked_fill(~mask, torch.nan)
    rollout = Rollout(
        obs=torch.zeros(length, num_envs, 1),
        actions=torch.zeros(length, num_envs, dtype=torch.int64),
        rewards=rewards,
        terminations=ends,
        truncations=torch.zeros_like(ends),
        mask=mask,
        final_obs=torch.zeros(0, 1),
        final_rows=torch.zeros(0, 2, dtype=torch.int64),
    )
    ours, expected = (
        statistics._statistics_on_host(rollout),
        statistics._statistics_in_torch(rollout),
    )
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(ours[1], expected[1])

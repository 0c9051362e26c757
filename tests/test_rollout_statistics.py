import math
from dataclasses import replace

import gymnasium
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vecpg.envs import make_envs
from vecpg.policy import Policy
from vecpg.rollout import Rollout, collect, statistics
from vecpg.rollout.statistics import episode_statistics, tally


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


def random_rollout(length, num_envs, after=0):
    """Rows of which some count, and `after` of them nothing does; NaN where nothing counts."""
    g = torch.Generator().manual_seed(length)
    mask = torch.rand(length + after, num_envs, generator=g) < 0.9
    mask[length:] = False
    ends = torch.rand(length + after, num_envs, generator=g) < 0.2  # some where nothing counts
    rewards = torch.randn(mask.shape, generator=g).masked_fill(~mask, torch.nan)
    return Rollout(
        obs=torch.zeros(*mask.shape, 1),
        actions=torch.zeros(mask.shape, dtype=torch.int64),
        rewards=rewards,
        terminations=ends,
        truncations=torch.zeros_like(ends),
        mask=mask,
        final_obs=torch.zeros(0, 1),
        final_rows=torch.zeros(0, 2, dtype=torch.int64),
    )


def by_loop(rollout):
    """The returns and lengths, in order of (environment, start)."""
    found = []
    for n in range(rollout.mask.shape[1]):
        rewards = []
        for t in range(len(rollout.mask)):
            if rollout.mask[t, n]:
                rewards.append(rollout.rewards[t, n].item())
                if rollout.dones[t, n]:
                    found.append((math.fsum(rewards), len(rewards)))
                    rewards = []
    returns, lengths = zip(*found, strict=True) if found else ((), ())
    return torch.tensor(returns, dtype=torch.float64), torch.tensor(lengths, dtype=torch.int64)


@pytest.mark.parametrize("way", ["on the host", "in torch", "in torch, known"])
@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize(("length", "num_envs"), [(1, 1), (9, 1), (63, 3), (40, 65)])
def test_episode_statistics_are_their_definition(monkeypatch, length, num_envs, after, way):
    rollout = random_rollout(length, num_envs, after)
    returns, lengths = by_loop(rollout)
    if way != "on the host":
        monkeypatch.setattr(statistics, "_statistics", statistics._statistics_in_torch)
    if way == "in torch, known":
        rollout = replace(rollout, num_episodes=len(returns))
    episodes = episode_statistics(rollout)
    torch.testing.assert_close(episodes.returns, returns, rtol=1e-12, atol=1e-12)
    assert torch.equal(episodes.lengths, lengths)
    torch.testing.assert_close(episodes.return_sum, returns.sum(), rtol=1e-12, atol=1e-12)


class Noted(TorchDispatchMode):
    """Keeps the names of operations, and the shape of what each is given first."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        shape = tuple(args[0].shape) if args and isinstance(args[0], torch.Tensor) else ()
        self.calls.append((function.overloadpacket.__name__, shape))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_envs", [1, 65_536])
def test_on_a_gpu_nothing_waits_if_the_number_of_episodes_is_known(num_envs):
    """Of tensors without numbers whoever asks for one is refused; and there are no blocks."""
    flags = torch.empty(500, num_envs, dtype=torch.bool, device="meta")
    numbers = torch.empty(500, num_envs, device="meta")
    none = torch.empty(0, 2, dtype=torch.int64, device="meta")
    rollout = Rollout(
        numbers[:, :, None], flags, numbers, flags, flags, flags, none, none, num_episodes=70_000
    )
    with Noted() as noted:
        episodes = episode_statistics(rollout)
    assert episodes.returns.shape == episodes.lengths.shape == (70_000,)
    assert len(noted.calls) <= 50  # views among them
    # What CUDA adds up in an order that differs between calls: one column alone.
    scanned = [shape for name, shape in noted.calls if name == "cumsum"]
    assert sum(shape == (500, 1) for shape in scanned) <= 2  # of whole numbers
    assert not {"scatter_add", "scatter_add_", "index_put_"} & {name for name, _ in noted.calls}
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        episode_statistics(replace(rollout, num_episodes=None))


def test_a_tally_is_of_all_rows_and_episodes():
    rollout = random_rollout(50, 4, after=3)
    episodes = episode_statistics(rollout)
    sums = torch.ones(2, 53, dtype=torch.float64)
    for known in (None, rollout.mask.reshape(-1).nonzero()[:, 0]):
        found = tally(replace(rollout, counted=known), episodes, sums)
        ended = int((rollout.dones & rollout.mask).sum())
        assert (found.counted, found.rows, found.episodes) == (int(rollout.mask.sum()), 53, ended)
        numbers = episodes.returns.tolist()
        assert found.return_sum.item() == pytest.approx(math.fsum(numbers))
        assert (found.return_low.item(), found.return_high.item()) == (min(numbers), max(numbers))
        assert found.length.item() == pytest.approx(sum(episodes.lengths.tolist()) / ended)
        assert found.length.dtype == found.return_sum.dtype == torch.float64
        assert found.sums is sums

import math

import pytest
import torch
from pairs import pairwise

from vecpg.kernels import threads
from vecpg.returns import packed_reward_to_go, ranges, reward_to_go, spans

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}


def sums(rewards, gamma, ends):
    """G[t] as sums over all that follows in its episode, in float64: a matrix, no recurrence."""
    episodes = ends.long().cumsum(0) - ends.long()
    places = torch.arange(len(rewards), dtype=torch.float64)
    apart = places[None] - places[:, None]
    follows = (apart >= 0) & (episodes[None] == episodes[:, None])
    weights = torch.where(follows, torch.tensor(gamma, dtype=torch.float64) ** apart, 0.0)
    return weights @ rewards.double()


def masked_sums(rewards, gamma, ends, mask, mode):
    """The same with masked rows left out, paid nothing or taken for ends."""
    paid = torch.where(mask, rewards, 0.0)
    if mode == "skip":
        result = torch.zeros(len(rewards), dtype=torch.float64)
        result[mask] = sums(paid[mask], gamma, ends[mask])
        return result
    ends = torch.where(mask, ends, mode == "cut")
    return torch.where(mask, sums(paid, gamma, ends), 0.0)


def assert_close(result, expected):
    scale = max(1.0, expected.abs().max().item())
    assert (result.double() - expected).abs().max().item() <= TOLERANCE[result.dtype] * scale


def made(seed, length, dtype, done):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(length, generator=g).to(dtype)
    return rewards, torch.rand(length, generator=g) < done, torch.rand(length, generator=g) < 0.7


@pairwise(
    length=[1, 127, 128, 129, 200, 643, 2000],
    done=[0.0, 0.002, 0.3],
    gamma=[0.0, 0.3, 0.99, 1.0],
    dtype=[torch.float64, torch.float32, torch.bfloat16],
    mode=[None, "cut", "skip", "decay", "zero"],
)
def test_a_long_sequence_is_the_sum_of_what_follows(length, done, gamma, dtype, mode):
    rewards, ends, mask = made(length, length, dtype, done)
    if mode is None:
        assert_close(reward_to_go(rewards, ends, gamma), sums(rewards, gamma, ends))
        return
    rewards = rewards.masked_fill(~mask, math.nan)
    result = reward_to_go(rewards, ends, gamma, mask=mask, mask_mode=mode)
    assert_close(result, masked_sums(rewards, gamma, ends, mask, mode))


@pairwise(
    num_envs=[1, 3, 7, 8, 9, 15, 20],
    length=[100, 300],
    mode=[None, "cut", "skip"],
    dtype=[torch.float32, torch.bfloat16],
)
def test_columns_that_are_not_eight_are_the_sums_of_what_follows(num_envs, length, mode, dtype):
    columns = [made(seed, length, dtype, 0.01) for seed in range(num_envs)]
    rewards, ends, mask = (torch.stack(each).t() for each in zip(*columns, strict=True))
    last = torch.randn(num_envs).to(dtype)
    options = {} if mode is None else {"mask": mask, "mask_mode": mode}
    result = reward_to_go(rewards, ends, 0.9, last_values=last, **options)
    for n, column in enumerate(columns):
        # The value behind the last row is the reward of one row more.
        paid, closed, real = (
            torch.cat([each, more])
            for each, more in zip(
                column, (last[n : n + 1], torch.ones(1).bool(), torch.ones(1).bool()), strict=True
            )
        )
        if mode is None:
            expected = sums(paid, 0.9, closed)
        else:
            expected = masked_sums(paid, 0.9, closed, real, mode)
        assert_close(result[:, n], expected[:-1])


@pairwise(
    lengths=[[2000], [1500, 2, 0, 600], [0, 700, 0, 0, 900, 1], [40] * 30],
    dtype=[torch.float64, torch.float32, torch.bfloat16],
    final=[False, True],
    stride=[1, 2],
    gamma=[0.3, 0.99, 1.0],
)
def test_packed_sequences_are_the_sums_of_what_follows(lengths, dtype, final, stride, gamma):
    rewards, _, _ = made(len(lengths), sum(lengths) * stride, dtype, 0.0)
    rewards = rewards[::stride]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.randn(len(lengths)).to(dtype)
    values[torch.tensor(lengths) == 0] = math.nan
    result = packed_reward_to_go(rewards, offsets, gamma, final_values=values if final else None)
    for i, length in enumerate(lengths):
        if length > 0:
            own = slice(int(offsets[i]), int(offsets[i + 1]))
            value = values[i : i + 1] if final else torch.zeros(1, dtype=dtype)
            paid = torch.cat([rewards[own], value])
            expected = sums(paid, gamma, torch.zeros(length + 1, dtype=torch.bool))
            assert_close(result[own], expected[:-1])


@pairwise(
    gamma=[1e-11, 0.51, 0.99, 1.0],  # 0.51 ** 1240 cannot be held either
    mode=[None, "skip", "decay"],
    special=[math.inf, -math.inf, math.nan],
    place=[3_719, 7_003, 9_990],  # a span's last row; in a span; behind all
)
def test_infinity_and_nan_come_through_all_spans_to_the_end_before(gamma, mode, special, place):
    rewards = torch.ones(10_000)
    rewards[place] = special
    ends = torch.zeros(10_000, dtype=torch.bool)
    ends[1_000] = True
    options = {} if mode is None else {"mask": torch.ones(10_000).bool(), "mask_mode": mode}
    result = reward_to_go(rewards, ends, gamma, **options)
    assert result[:1_001].isfinite().all()
    reached = torch.full((place - 1_000,), special)
    torch.testing.assert_close(result[1_001 : place + 1], reached, equal_nan=True)
    assert result[place + 1 :].isfinite().all()
    offsets = torch.tensor([0, 1_001, 10_000])
    packed = packed_reward_to_go(rewards, offsets, gamma)
    torch.testing.assert_close(packed, result, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("num_envs", [9, 12, 20])
def test_no_bit_of_some_columns_depends_on_the_number_of_threads(num_envs, monkeypatch):
    monkeypatch.setattr(ranges, "THREAD_ELEMENTS", 100)
    columns = [made(seed, 1000, torch.float64, 0.001) for seed in range(num_envs)]
    rewards, ends, _ = (torch.stack(each).t() for each in zip(*columns, strict=True))
    results = []
    for number in (1, 2, 3):
        with threads.using(number):
            results.append(reward_to_go(rewards, ends, 0.999))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_bit_depends_on_the_number_of_threads():
    length = 2 * spans.BLOCK + 77
    rewards, ends, mask = made(0, length, torch.float64, 1e-5)
    offsets = torch.tensor([0, 5, length - 1000, length])
    values = torch.randn(3, dtype=torch.float64)

    def results():
        return [
            reward_to_go(rewards, ends, 0.999),
            reward_to_go(rewards, ends, 0.999, mask=mask, mask_mode="skip"),
            packed_reward_to_go(rewards, offsets, 0.999),
            packed_reward_to_go(rewards, offsets, 0.999, final_values=values),
        ]

    with threads.using(1):
        alone = results()
    for number in (2, 3):
        with threads.using(number):
            for one, other in zip(results(), alone, strict=True):
                assert torch.equal(one, other)
    # And they are right, at some places.
    for t in (4, 5, 300_000, length - 1001, length - 1000):
        end = next(int(each) for each in offsets if each > t)
        powers = torch.tensor(0.999, dtype=torch.float64) ** torch.arange(end - t)
        exact = (powers * rewards[t:end]).sum()
        assert alone[2][t].item() == pytest.approx(exact.item(), rel=1e-12)

"""What trainers of language models compute, from their formulas, and the call that computes it.

Batches are (B, T) tokens: padded on the right, on the left, with tool tokens between, with a row of
one token and one of none. Trainers multiply by a mask, so they get finite numbers where it is 0;
our calls get NaN there.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from vecpg.returns import generalized_advantage, group_advantage, masked_whiten, reward_to_go
from vecpg.returns.checks import _MASK_MODES as MODES

GAMMA, LAMBDA, BETA = 0.97, 0.9, 0.05
PADDINGS = ("right", "left", "holes")


class Batch(NamedTuple):
    """Tokens of completions: scores are (B,), all else (B, T)."""

    mask: Tensor
    scores: Tensor
    kl: Tensor
    values: Tensor


def make_batch(padding, seed=0, size=12, length=33):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (size, 1), generator=g)
    lengths[:4, 0] = torch.tensor([length, 1, 0, length])
    places = torch.arange(length)
    mask = places < lengths if padding != "left" else places >= length - lengths
    if padding == "holes":
        mask &= torch.rand(size, length, generator=g) < 0.6
    kl, values = torch.randn(2, size, length, generator=g)
    return Batch(mask, torch.randn(size, generator=g), kl, values)


def last_real(mask):
    """The place of each row's last real token; any, where there is none."""
    return mask.shape[1] - 1 - mask.int().flip(1).argmax(1)


def shaped(batch):
    """The rewards that our calls are given: the score at the last token, less beta times KL."""
    rewards = -BETA * batch.kl
    rewards[torch.arange(len(rewards)), last_real(batch.mask)] += batch.scores
    return rewards


def unread(batch, *tensors):
    """As our calls are given them: (T, B) views that hold NaN where nothing may be read."""
    return [tensor.masked_fill(~batch.mask, math.nan).mT for tensor in tensors]


def ours_gae(batch, mode):
    rewards, values = unread(batch, shaped(batch), batch.values)
    none = torch.zeros_like(batch.mask).mT
    return generalized_advantage(
        rewards, values, none, GAMMA, LAMBDA, mask=batch.mask.mT, mask_mode=mode
    ).mT


def ours_returns(batch, mode, gamma=GAMMA):
    (rewards,) = unread(batch, shaped(batch))
    none = torch.zeros_like(batch.mask).mT
    return reward_to_go(rewards, none, gamma, mask=batch.mask.mT, mask_mode=mode).mT


def assert_same(ours, theirs, where=None):
    where = torch.ones_like(ours, dtype=torch.bool) if where is None else where
    torch.testing.assert_close(ours[where], theirs[where], rtol=2e-5, atol=2e-5)
    assert torch.equal(ours[~where], torch.zeros_like(ours[~where]))


# verl


def verl_rewards(batch):
    """Scores at the last token, less beta times the masked KL."""
    scores = torch.zeros_like(batch.kl)
    scores[torch.arange(len(scores)), last_real(batch.mask)] = batch.scores
    return scores - BETA * (batch.kl * batch.mask)


def verl_masked_mean(values, mask):
    return (values * mask).sum() / (mask.sum() + 1e-8)


def verl_masked_whiten(values, mask):
    mean = verl_masked_mean(values, mask)
    variance = verl_masked_mean((values - mean) ** 2, mask)
    variance = variance * mask.sum() / (mask.sum() - 1)
    return (values - mean) * torch.rsqrt(variance + 1e-8)


def verl_gae(rewards, values, mask):
    """The carried advantage and value pass masked tokens unchanged."""
    value, advantage, advantages = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * value - values[:, t]
        here = delta + GAMMA * LAMBDA * advantage
        real = mask[:, t].float()
        value = values[:, t] * real + value * (1 - real)
        advantage = here * real + advantage * (1 - real)
        advantages.insert(0, advantage)
    advantages = torch.stack(advantages, dim=1)
    return verl_masked_whiten(advantages, mask), advantages + values


@pytest.mark.parametrize("padding", PADDINGS)
def test_verl_gae_is_skip(padding):
    batch = make_batch(padding)
    advantages, returns = verl_gae(verl_rewards(batch), batch.values, batch.mask)
    ours = ours_gae(batch, "skip")
    assert_same(masked_whiten(ours, batch.mask), advantages, batch.mask)
    assert_same(torch.where(batch.mask, ours + batch.values, 0.0), returns, batch.mask)


def verl_reinforce_plus_plus(rewards, mask):
    """What is carried is set to 0 by a masked token."""
    carried, returns = 0.0, torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        carried = rewards[:, t] + GAMMA * carried
        returns[:, t] = carried
        carried = carried * mask[:, t]
    return verl_masked_whiten(returns, mask) * mask, returns


@pytest.mark.parametrize("padding", PADDINGS)
def test_verl_reinforce_plus_plus_is_cut(padding):
    batch = make_batch(padding)
    advantages, returns = verl_reinforce_plus_plus(verl_rewards(batch), batch.mask)
    ours = ours_returns(batch, "cut")
    assert_same(ours, returns, batch.mask)
    assert_same(masked_whiten(ours, batch.mask), advantages)


@pytest.mark.parametrize("padding", PADDINGS)
def test_verl_remax_is_the_sum_to_go(padding):
    batch = make_batch(padding)
    baselines = torch.randn(len(batch.scores))
    returns = (verl_rewards(batch) * batch.mask).flip(1).cumsum(1).flip(1)
    ours = ours_returns(batch, "skip", 1.0)
    assert_same(ours, returns, batch.mask)
    advantages = returns - baselines[:, None] * batch.mask
    assert_same(torch.where(batch.mask, ours - baselines[:, None], 0.0), advantages, batch.mask)


def verl_groups(scores, index):
    """The mean and standard deviation of each group; 0 and 1 of one completion alone."""
    means, stds = {}, {}
    for name in set(index):
        group = torch.stack(
            [score for score, each in zip(scores, index, strict=True) if each == name]
        )
        alone = len(group) == 1
        means[name] = torch.tensor(0.0) if alone else group.mean()
        stds[name] = torch.tensor(1.0) if alone else group.std()
    return torch.stack([means[name] for name in index]), torch.stack([stds[name] for name in index])


def test_verl_rloo_and_grpo_over_groups():
    batch = make_batch("holes")
    scores = verl_rewards(batch).sum(-1)
    index = [7, 7, 1, 7, 3, 3, 1, 1, 7, 3, 9, 3]  # 9 is alone
    counts = torch.tensor([index.count(name) for name in index])
    means, stds = verl_groups(scores, index)
    groups = torch.tensor(index)

    rloo = torch.where(counts > 1, (scores - means) * counts / (counts - 1).clamp(min=1), scores)
    ours = group_advantage(scores, groups)
    assert_same(ours, rloo)
    assert_same(ours[:, None] * batch.mask, rloo[:, None] * batch.mask)

    grpo = (scores - means) / (stds + 1e-6)
    ours = group_advantage(scores, groups, kind="grpo")
    assert_same(ours[counts > 1], grpo[counts > 1])
    # One alone: verl leaves its score, we have nothing to compare it with.
    torch.testing.assert_close(grpo[10], scores[10], rtol=1e-5, atol=0)
    assert ours[10] == 0


@pytest.mark.parametrize("padding", PADDINGS)
def test_verl_masked_whiten(padding):
    batch = make_batch(padding)
    theirs = verl_masked_whiten(batch.values, batch.mask) * batch.mask
    assert_same(masked_whiten(batch.values.masked_fill(~batch.mask, math.nan), batch.mask), theirs)
    # Of one token theirs is 0/0, or its ten thousandfold; ours is 0.
    one = torch.zeros_like(batch.mask).index_fill(1, torch.tensor([4]), True)[:1]
    assert verl_masked_whiten(batch.values[:1], one).isnan().all()
    assert torch.equal(masked_whiten(batch.values[:1], one), torch.zeros(1, 33))


# OpenRLHF


def openrlhf_rewards(batch):
    """The score at the last token, less beta times KL; not masked yet."""
    last = last_real(batch.mask)[:, None]
    return torch.zeros_like(batch.kl).scatter(1, last, batch.scores[:, None]) - BETA * batch.kl


def openrlhf_cumulative_returns(rewards, mask, gamma):
    rewards, carried, returns = mask * rewards, 0.0, torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        carried = rewards[:, t] + gamma * carried
        returns[:, t] = carried
    return returns


@pytest.mark.parametrize("padding", PADDINGS)
def test_openrlhf_cumulative_returns_are_decay(padding):
    batch = make_batch(padding)
    returns = openrlhf_cumulative_returns(openrlhf_rewards(batch), batch.mask, GAMMA)
    assert_same(ours_returns(batch, "decay"), returns, batch.mask)


def plain_gae(rewards, values):
    """Of every position; the value after the last is 0. OpenRLHF, TRL, torchtune and slime."""
    advantage, advantages = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        advantage = rewards[:, t] + GAMMA * value - values[:, t] + GAMMA * LAMBDA * advantage
        advantages.insert(0, advantage)
    return torch.stack(advantages, dim=1)


def openrlhf_normalized(advantages, mask):
    number = mask.sum()
    mean = (advantages * mask).sum() / number
    variance = ((advantages - mean).pow(2) * mask).sum() / number
    return (advantages - mean) * variance.clamp(min=1e-8).rsqrt()


@pytest.mark.parametrize("padding", PADDINGS)
def test_openrlhf_advantages_are_zero(padding):
    batch = make_batch(padding)
    values = batch.mask * batch.values
    advantages = plain_gae(batch.mask * openrlhf_rewards(batch), values)
    ours = ours_gae(batch, "zero")
    assert_same(ours, advantages, batch.mask)
    assert_same(torch.where(batch.mask, ours + batch.values, 0.0), advantages + values, batch.mask)
    whitened = masked_whiten(ours, batch.mask, ddof=0)
    assert_same(whitened, openrlhf_normalized(advantages, batch.mask), batch.mask)


def test_openrlhf_groups_of_one_size():
    """Outcome scores are centred in their groups, and then go to the last token."""
    batch = make_batch("holes")
    grouped = batch.scores.reshape(-1, 4)
    groups = torch.arange(12) // 4
    rloo = grouped - (grouped.sum(-1, keepdim=True) - grouped) / 3
    assert_same(group_advantage(batch.scores, groups), rloo.reshape(-1))
    apart = grouped - grouped.mean(-1, keepdim=True)
    norm = apart / (grouped.std(-1, keepdim=True) + 1e-9)
    assert_same(group_advantage(batch.scores, groups, kind="grpo"), norm.reshape(-1))
    assert_same(0.75 * group_advantage(batch.scores, groups), apart.reshape(-1))

    own = batch._replace(scores=group_advantage(batch.scores, groups))
    theirs = batch._replace(scores=rloo.reshape(-1))
    returns = openrlhf_cumulative_returns(openrlhf_rewards(theirs), batch.mask, 1.0)
    assert_same(ours_returns(own, "skip", 1.0), returns, batch.mask)


# TRL


def test_trl_ppo_counts_one_position_more():
    """The score is paid behind the last token, on a row whose value counts; KL is 0 from there."""
    batch = make_batch("right", length=32)
    batch.mask[2, 0] = True  # no response is empty there
    size, length = batch.mask.shape
    last, places = last_real(batch.mask), torch.arange(length)
    padding, padding_p1 = places > last[:, None], places > last[:, None] + 1
    end = torch.where(last + 1 < length, last + 1, last)
    rewards = -BETA * batch.kl.masked_fill(padding, 0.0)
    rewards[torch.arange(size), end] += batch.scores
    values = batch.values.masked_fill(padding_p1, 0.0)
    advantages = plain_gae(rewards, values)
    returns = advantages + values
    advantages = verl_masked_whiten(advantages, ~padding).masked_fill(padding, 0.0)

    longer = batch._replace(mask=~padding_p1)
    given = unread(longer, rewards, batch.values)
    none = torch.zeros_like(batch.mask).mT
    for mode in MODES:
        ours = generalized_advantage(
            *given, none, GAMMA, LAMBDA, mask=longer.mask.mT, mask_mode=mode
        ).mT
        assert_same(torch.where(longer.mask, ours + batch.values, 0.0), returns, longer.mask)
        assert_same(masked_whiten(ours, ~padding), advantages)


def test_trl_rloo_and_grpo():
    """KL is summed over tokens and taken from the score; groups are of one size."""
    batch = make_batch("right")
    kl = (batch.kl * batch.mask).sum(-1)
    scores = batch.scores - BETA * kl
    groups = torch.arange(12) // 4
    grouped = scores.view(-1, 4)
    baselines = (grouped.sum(1, keepdim=True) - grouped) / 3
    rloo = scores - baselines.view(-1)
    ours = group_advantage(scores, groups)
    assert_same(ours, rloo)
    whitened = (rloo - rloo.mean()) / (rloo.std() + 1e-4)
    torch.testing.assert_close(masked_whiten(ours, None), whitened, rtol=2e-4, atol=1e-5)

    stds = grouped.std(1).repeat_interleave(4)
    grpo = (scores - grouped.mean(1).repeat_interleave(4)) / (stds + 1e-4)
    ours = group_advantage(scores, groups, kind="grpo")
    torch.testing.assert_close(ours, grpo, rtol=1e-3, atol=0)
    assert_same(ours * stds / (stds + 1e-4), grpo)


# NeMo-RL


def test_nemo_rl_baseline_without_invalid_samples():
    batch = make_batch("right")
    valid = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 0, 1])
    prompts = torch.tensor([0, 0, 0, 0, 5, 5, 5, 5, 2, 2, 2, 2])
    baseline = batch.scores.clone()
    for prompt in prompts.unique():
        of_it = (prompts == prompt).nonzero()[:, 0]
        if valid[of_it].sum() > 1:
            others = 1 - torch.eye(len(of_it))
            number = valid[of_it].sum() - 1
            baseline[of_it] = others @ (batch.scores[of_it] * valid[of_it]) / number
    ours = group_advantage(batch.scores.masked_fill(valid == 0, math.nan), prompts, mask=valid)
    assert_same(ours, (batch.scores - baseline) * valid, valid == 1)


# The modes


def test_modes_agree_on_padding_and_differ_on_holes():
    for padding in PADDINGS:
        batch = make_batch(padding)
        for ours in (ours_gae, ours_returns):
            results = [ours(batch, mode) for mode in MODES if mode != "zero" or ours is ours_gae]
            for i, one in enumerate(results):
                for other in results[:i]:
                    assert torch.allclose(one, other) == (padding != "holes")

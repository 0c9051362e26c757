"""The model of scaling: its bytes, its lines and its efficiencies, each by hand."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling
from gymnasium import spaces

from vecpg.adam import Adam
from vecpg.advantage import weigh
from vecpg.config import Config
from vecpg.distributed import Ranks
from vecpg.envs import make_envs
from vecpg.policy import Policy
from vecpg.rollout import collect
from vecpg.torchrun import Place
from vecpg.update import update


@pytest.mark.parametrize("net", scaling.NETS)
def test_parameters_are_those_of_the_policy(net):
    policy = Policy(spaces.Box(-1, 1, (4,)), spaces.Discrete(2), hidden_sizes=net.hidden)
    assert net.parameters == sum(each.numel() for each in policy.parameters())


def test_every_rank_receives_all_shards_but_its_own():
    # Twelve shards of 10 numbers on 4 ranks: three are its own.
    assert scaling.Numbers(7, 3).gathered(4, 12) == 9 * 10 * 8
    # Three messages of a quarter of the sum, and three of a quarter of the total.
    assert scaling.Numbers(100).reduced(4) == 6 * 25 * 8
    assert scaling.Numbers(80, 5).reduced(4) == 6 * 25 * 8
    assert scaling.Numbers(10, 1).gathered(1, 12) == scaling.Numbers(10, 1).reduced(1) == 0


def test_the_numbers_are_those_that_two_ranks_exchange():
    """Those of the statistics of one shard, and of its gradient."""
    found = []

    class OfOne(Ranks):
        def combine(self, added, kept=()):
            (own,), *others = list(added), *kept
            found.append(scaling.Numbers(len(own), sum(len(each) for each in others)))
            assert own.dtype == torch.float64
            return own, [*others, *others]

    config = Config(num_envs=8, shards=2, max_episode_steps=scaling.LIMIT)
    ranks = OfOne(Place(0, 2, 0, 2, 0, 0, "a", "localhost", 1))
    own = ranks.part_of(config, None)
    ranks.sums_on(torch.device("cpu"), config.baseline, scaling.LIMIT)
    envs = make_envs(config.env_id, own.num_envs, vectorization="tensor")
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    rollout = collect(envs, policy, num_steps=1, seed=1, iteration=0)
    weighed = weigh(rollout, own, None, None)
    _, whole = ranks.tally(rollout, weighed.sums)
    update(policy, Adam(policy.parameters(), 0.1), rollout, rollout.rewards, own, whole=whole)
    assert found == [scaling.statistics_numbers(500), scaling.gradient_numbers(4610)]


def test_messages_around_a_ring():
    link = scaling.Link(latency=5.0, byte=0.5)
    assert link.gather(4, 80) == 3 * 5 + 40
    assert link.reduce(4, 80) == 6 * 5 + 40
    assert scaling.exchanges(1, 4610, link, link) == 0
    # One message of 1009 numbers and one of 4612; two halves of 1014 and two of 4612.
    assert scaling.exchanges(2, 4610, link, None) == 2 * 5 + 8 * (1009 + 4612) / 2
    assert scaling.exchanges(2, 4610, None, link) == 4 * 5 + 8 * (1014 + 4612) / 2


def test_a_line_is_found_and_errors_count_by_what_they_are_relative_to():
    amounts = [1.0, 10.0, 1000.0]
    assert scaling.fitted(amounts, [3 + 2 * each for each in amounts]) == pytest.approx((3, 2))
    # Of two lines that miss one point, the one that misses a tenth of it is nearer.
    fixed, each = scaling.fitted([1.0, 1000.0, 1000.0], [5.0, 2003.0, 2203.0])
    assert fixed + each == pytest.approx(5, rel=1e-3)
    assert 2003 < fixed + 1000 * each < 2203


def test_both_ways_have_their_latency_from_what_two_ranks_do():
    seconds = {
        "gather": {size: 7e-5 + 1e-9 * size for size in scaling.SIZES},
        "reduce": {size: 8e-5 + 2e-9 * size for size in scaling.SIZES},
    }
    gather, reduce, _ = scaling.modelled(seconds, {})
    # Of a message of so many bytes two ranks receive as many, in one message or in two.
    assert gather == pytest.approx((7e-5, 1e-9))
    assert reduce == pytest.approx((4e-5, 2e-9))
    assert scaling.Numbers(100).gathered(2, 2) == scaling.Numbers(100).reduced(2) == 800


def test_efficiency_by_hand():
    iteration = scaling.Line(fixed=1.0, each=0.5)
    assert scaling.efficiency(1, 64, iteration, 0.0) == 1
    # 33 seconds alone; 1 + 8 and 2 of exchanges with four.
    assert scaling.efficiency(4, 64, iteration, 2.0) == pytest.approx(33 / (4 * 11))


def test_the_table_has_every_number_of_ranks_and_says_what_was_measured():
    seconds = {
        how: {size: 1e-4 + 1e-9 * size for size in scaling.SIZES} for how in ("gather", "reduce")
    }
    spent = {net: {each: 1e-3 + 1e-4 * each for each in net.timed} for net in scaling.NETS}
    model = scaling.modelled(seconds, spent)
    text = scaling.whole(model)
    assert "gathers: 100 us a message and 1.00 GB/s; reductions: 50 us a message" in text
    assert text.count("1.00 ms an iteration and 0.100 ms for each environment") == 2
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    for ranks in scaling.RANKS:
        assert sum(row[0].strip() == str(ranks) for row in rows) == len(scaling.NETS)
    (one, *_) = (row for row in rows if row[0].strip() == "1")
    assert [cell.strip() for cell in one[1:]] == ["0 kB"] * 4 + ["100% / 100%"] * 3
    every = [cell.strip() for row in rows for cell in row if "% /" in cell]
    short = [cell.strip() for cell in scaling.in_short(model).split("|") if "% /" in cell]
    assert sorted(short) == sorted(every)

"""Ranks: what they tell each other."""

import signal
import weakref

import pytest
import torch
from test_shards import Meeting
from torch.distributed import HashStore

from vecpg import distributed as distributed_module
from vecpg import signals
from vecpg.advantage import add_by_age, weigh
from vecpg.begin import begin
from vecpg.config import Config, ConfigError
from vecpg.distributed import Ranks, RanksLost, joined
from vecpg.envs import EnvironmentFailure, make_envs
from vecpg.kernels.sums import in_order
from vecpg.policy import Policy
from vecpg.rollout import collect
from vecpg.rollout.statistics import episode_statistics
from vecpg.run.interrupts import Interrupted, Interrupts
from vecpg.torchrun import Place


def of_one_store(store, seconds=0.5):
    """Two ranks."""
    for rank in (0, 1):
        place = Place(rank, 2, rank, 2, 0, 0, "of a test", "localhost", 0)
        yield Ranks(place, seconds, store, None)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (Interrupted(signal.SIGTERM), Interrupted, "SIGTERM"),
        (ConfigError("--so and so"), ConfigError, "--so and so"),
        (OSError("no room"), RanksLost, "rank 0 failed: OSError: no room"),
    ],
    ids=["stopped", "refused", "failed"],
)
def test_who_waits_for_rank_0_learns_why_it_has_ended(error, kind, words, inside):
    """Whether that was in what it makes for all, or before."""
    first, second = of_one_store(HashStore())

    def fail():
        raise error

    if inside:
        with pytest.raises(type(error)):
            first.told(fail)
    else:
        first.leave(error)
    with pytest.raises((Interrupted, RuntimeError, ValueError)) as found:
        second.told(fail)
    assert type(found.value) is kind
    assert str(found.value) == words


def test_what_rank_0_made_before_it_ended_is_told():
    first, second = of_one_store(HashStore())
    assert first.told(lambda: [1, 2]) == [1, 2]
    first.leave(OSError("no room"))
    assert second.told(lambda: None) == [1, 2]
    with pytest.raises(RanksLost, match="no room"):
        second.told(lambda: None)


@pytest.mark.parametrize("told", [False, True])
def test_a_signal_to_rank_0_as_it_answers_leaves_nobody_without_an_answer(told):
    """And not with two."""

    class Stopped(HashStore):
        def set(self, key, value):
            if told or not key.startswith("told"):
                super().set(key, value)
            if key.startswith("told"):
                raise Interrupted(signal.SIGTERM)

    store = Stopped()
    first, second = of_one_store(store)
    with pytest.raises(Interrupted) as stopped:
        first.told(lambda: "made")
    if told:
        assert second.told(lambda: None) == "made"
    else:
        with pytest.raises(Interrupted, match="SIGTERM"):
            second.told(lambda: None)
    # Who was told what was made has still to hear that rank 0 leaves.
    first.leave(stopped.value)
    assert store.check(["left/0"]) == told


def test_where_torchrun_has_ended_no_answer_comes():
    class Gone(HashStore):
        def set(self, *_):
            raise RuntimeError("Broken pipe")

        check = compare_set = set

    first, second = of_one_store(Gone())
    for rank in (first, second):
        with pytest.raises(RanksLost, match="torchrun's store is gone: Broken pipe"):
            rank.told(lambda: None)


def test_that_a_rank_is_lost_is_said_alike_by_all_and_is_no_matter_of_settings():
    first, second = of_one_store(HashStore())
    first.leave(RanksLost("rank 7 failed: the pole fell off"))
    with pytest.raises(RanksLost, match="^rank 7 failed: the pole fell off$"):
        begin(Config(), second)


@pytest.fixture
def torchruns(monkeypatch):
    """The environment variables of a rank, of as many as are said, and a store."""
    server = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(signals, "together", False)

    def be_one_of(ranks):
        variables = {
            "TORCHELASTIC_RUN_ID": "of a test",
            "RANK": "0",
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": str(ranks),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "3",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(server.port),
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return be_one_of


def test_what_fails_on_a_single_rank_is_what_it_is(torchruns):
    torchruns(1)
    with pytest.raises(EnvironmentFailure, match="^the pole fell off$"), joined(Config()):
        raise EnvironmentFailure("the pole fell off")


def test_a_single_rank_that_is_stopped_is_not_started_again(torchruns):
    torchruns(1)
    with joined(Config()):
        assert signals.exit_status(signal.SIGTERM) == 0


def test_a_process_group_of_the_callers_is_refused(torchruns, monkeypatch):
    torchruns(2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="destroy_process_group"), joined(Config()):
        pass


def test_a_signal_while_ranks_connect_is_told(torchruns, monkeypatch):
    torchruns(2)
    store = HashStore()
    monkeypatch.setattr(distributed_module, "meet", lambda *_: store)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda *_, **__: signal.raise_signal(signal.SIGTERM),
    )
    with pytest.raises(Interrupted), Interrupts(), joined(Config()):
        pass
    assert store.check(["run/left/0"])


def test_what_failed_keeps_no_connection_open(monkeypatch):
    """Others wait at it."""

    class Group:
        pass

    groups = []

    def all_gather(*_):
        group = Group()
        groups.append(weakref.ref(group))
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    first, second = of_one_store(HashStore())
    first.part_of(Config(shards=2, num_envs=2), None)
    second.leave(Interrupted(signal.SIGTERM))
    with pytest.raises(Interrupted) as stopped:
        first.combine([torch.zeros(1)])
    assert stopped.value.__cause__ is not None
    assert groups[0]() is None


@pytest.mark.parametrize("baseline", ["none", "mean", "leave_one_out"])
def test_what_ranks_come_to_is_what_their_environments_do_together(baseline):
    """The smallest return is one rank's, the largest and the longest collection another's."""
    config = Config(num_envs=12, shards=6, baseline=baseline)
    envs = make_envs("CartPole-v1", 12)
    torch.manual_seed(0)
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    with torch.no_grad():
        policy.network[-1].weight.mul_(20)
    collected = {"num_steps": 30, "seed": 2, "iteration": 0}
    whole = collect(envs, policy, **collected)
    episodes = [episode_statistics(shard) for shard in whole.shards(6)]
    lows, highs = ([ends(each.returns).item() for each in episodes] for ends in (min, max))
    assert lows.index(min(lows)) // 2 != highs.index(max(highs)) // 2
    assert 0 not in (lows.index(min(lows)), highs.index(max(highs)))
    meeting = Meeting(3)

    def of_rank(rank, combine):
        ranks = Ranks(Place(rank, 3, rank, 3, 0, 0, "of a test", "localhost", 0), 60.0)
        own = ranks.part_of(config, None)
        ranks.combine = combine
        ranks.sums_on(torch.device("cpu"), baseline, 2)  # that is too short: they find out
        part = collect(
            make_envs("CartPole-v1", 4), policy, first_env=ranks.first_env, shards=2, **collected
        )
        return len(part.mask), ranks.tally(part, weigh(part, own).sums)

    lengths, found = zip(*meeting.of_each(of_rank), strict=True)
    assert len(set(lengths)) > 1
    expected = add_by_age(weigh(whole, config).sums)
    for length, (tally, whole_of) in zip(lengths, found, strict=True):
        assert baseline != "leave_one_out" or tally.sums.shape[1] >= length
        assert (whole_of.num_envs, whole_of.counted) == (12, whole.mask.sum())
        assert tally.counted == whole.mask.sum()
        assert tally.rows == max(lengths) == len(whole.mask)
        assert tally.episodes == whole.dones.sum()
        assert tally.return_sum == in_order([each.returns.sum() for each in episodes])
        assert (tally.return_low, tally.return_high) == (min(lows), max(highs))
        assert tally.length == whole.mask.sum().double() / whole.dones.sum()
        # Columns of 0 may follow, on either side.
        wide = max(tally.sums.shape[1], expected.shape[1])
        found_sums, sums = (
            torch.nn.functional.pad(each, (0, wide - each.shape[1]))
            for each in (tally.sums, expected)
        )
        assert torch.equal(found_sums, sums)

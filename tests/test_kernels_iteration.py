import torch

from vecpg.kernels.iteration import Memory, Shape, Tally, make_memory


def memory_of(**changes):
    settings = dict(
        runs=2,
        num_envs=6,
        shards=2,
        num_steps=5,
        max_episode_steps=7,
        slots=3,
        parts=4,
        device=torch.device("cpu"),
    )
    return make_memory(Shape(4, (8, 8), 2, True, False, 0), **settings | changes)


def test_a_shard_has_blocks_of_its_own():
    memory = memory_of()
    assert isinstance(memory, Memory)
    assert memory.tallies.shape == (2, 2, len(Tally))  # 3 environments of a shard are one block
    assert memory_of(num_envs=66, shards=2).last.shape == (2, 6)  # 33 of a shard are 3 of 16
    assert memory.flags.shape == (2, 2 * 5 - 2 + 7, 6)
    assert all(each.is_contiguous() for each in memory)


def test_blocks_are_small_where_there_would_be_few():
    assert memory_of(num_envs=4096, shards=1, num_steps=1).block == 16
    assert memory_of(num_envs=8192, shards=1, num_steps=1, max_episode_steps=2).block == 64
    assert memory_of(num_envs=8192, shards=2, num_steps=1, max_episode_steps=2).block == 16

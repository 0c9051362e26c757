import copy
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

triton = pytest.importorskip("triton", reason="needs triton, which is for Linux")

import gpu_kernels  # noqa: E402

from vecpg.fused.memory import Setting, Tally, make_memory  # noqa: E402
from vecpg.policy import Policy  # noqa: E402
from vecpg.policy.cuda import gradient  # noqa: E402
from vecpg.policy.shape import in_a_row, shape_of  # noqa: E402

ACTIONS = {
    "two": spaces.Discrete(2),
    "sixteen": spaces.Discrete(16, start=-3),
    "box": spaces.Box(-2, 2, (1,)),
    "boxes": spaces.Box(-2, 2, (3,)),
}


def policy_of(actions, features=4, seed=1, **settings):
    """Whose outputs are far from 0, and standard deviations from 1."""
    policy = Policy(spaces.Box(-1, 1, (features,)), ACTIONS[actions], **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in policy.parameters():
            each += 0.3 * torch.randn(each.shape, generator=generator)
    return policy


def memory_of(policies, *, num_envs, shards=1, num_steps=1, limit=7, divisor=0.0, ent_coef=0.1):
    """Rows of as many runs as there are policies; NaN and worse is wherever nobody may look."""
    shape = shape_of(policies[0])
    memory = make_memory(
        shape,
        runs=len(policies),
        num_envs=num_envs,
        shards=shards,
        num_steps=num_steps,
        max_episode_steps=limit,
        slots=3,
        parts=2,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(num_envs)
    runs, capacity, _ = memory.flags.shape
    for each in (memory.states, memory.obs, memory.weights, memory.rewards, memory.parts):
        each.fill_(math.nan)
    memory.at[0] = 5
    memory.settings[:, Setting.DIVISOR] = divisor
    memory.settings[:, Setting.ENT_COEF] = torch.linspace(ent_coef, 0.0, runs)
    for run, policy in enumerate(policies):
        memory.states[5 % 3, run, 0, : shape.size] = torch.cat(
            [each.detach().flatten() for each in in_a_row(policy)]
        )
    memory.last[:] = torch.randint(1, capacity + 1, memory.last.shape, generator=generator)
    memory.flags[:] = torch.randint(-128, 128, memory.flags.shape, generator=generator)
    mask = counted(memory)
    rows = int(mask.sum())
    memory.obs[:, :-1][mask] = torch.randn(rows, shape.features, generator=generator)
    memory.weights[mask] = 10 * torch.randn(rows, generator=generator)
    if shape.gaussian:
        memory.actions.fill_(math.nan)
        memory.actions[mask] = 2 * torch.randn(rows, shape.outputs, generator=generator)
    else:
        memory.actions.fill_(99)
        drawn = torch.randint(shape.outputs, (rows,), generator=generator)
        memory.actions[mask] = drawn.to(torch.int8)
    memory.tallies.fill_(math.nan)
    blocks = mask.sum(1).reshape(runs, shards, -1).split(memory.block, dim=2)
    memory.tallies[..., Tally.COUNTED] = torch.stack([each.sum(2) for each in blocks], 2).flatten(1)
    return memory


def counted(memory):
    """(R, C, N) bool."""
    runs, capacity, num_envs = memory.flags.shape
    shards = memory.parts.shape[1]
    block = torch.arange(num_envs // shards) // memory.block
    last = memory.last.reshape(runs, shards, -1)[:, :, block].flatten(1)
    return (memory.flags & 1).bool() & (torch.arange(capacity)[:, None] < last[:, None])


def by_autograd(memory, run, policy, shard=None):
    """A row of float64, with both sums behind it, of all rows of a run or those of a shard."""
    wide = copy.deepcopy(policy).double()
    mask = counted(memory)[run]
    divisor, ent_coef = memory.settings[run, [Setting.DIVISOR, Setting.ENT_COEF]].tolist()
    count = int(mask.sum())
    if shard is not None:
        envs = memory.flags.shape[2] // memory.parts.shape[1]
        mask[:, : shard * envs] = mask[:, (shard + 1) * envs :] = False
    actions = memory.actions[run][mask]
    if not shape_of(policy).gaussian:
        actions = actions.long() + policy.distribution.first_action
    parameters = wide.network(memory.obs[run, :-1][mask].double()).mT
    log_probs, entropies = wide.distribution.log_probs_and_entropy(parameters, actions)
    loss = -(log_probs * memory.weights[run][mask]).sum() / (divisor or count)
    (loss - ent_coef / count * entropies.sum()).backward()
    row = torch.cat([each.grad.flatten() for each in in_a_row(wide)])
    return torch.cat([row, torch.stack([loss.detach(), entropies.sum().detach()])])


def assert_near(row, wanted):
    assert (row[:-2] - wanted[:-2]).norm() <= 1e-6 * wanted[:-2].norm()
    torch.testing.assert_close(row[-2:], wanted[-2:], rtol=1e-6, atol=1e-6)


def check(policies, **settings):
    memory = memory_of(policies, **settings)
    gradient.sum_gradient(memory, shape_of(policies[0]))
    size = shape_of(policies[0]).size + 2
    assert memory.parts[..., :size].isfinite().all()
    for run, policy in enumerate(policies):
        row = memory.parts[run, ..., :size].sum((0, 1))
        wanted = by_autograd(memory, run, policy)
        assert_near(row, wanted)


@pytest.mark.slow
def test_interpreted():
    gpu_kernels.interpret("test_policy_cuda_gradient")


def interpret():
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    check([policy_of("two")], num_envs=17)
    check([policy_of("boxes", features=3, activation="relu", hidden_sizes=(20, 33))], num_envs=40)
    check([policy_of("sixteen", hidden_sizes=(8, 64), features=17)], num_envs=20)

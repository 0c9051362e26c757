import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
from gymnasium import spaces

triton = pytest.importorskip("triton", reason="needs triton, which is for Linux")

import gpu_kernels  # noqa: E402

from vecpg.kernels import iteration as memories  # noqa: E402
from vecpg.kernels.iteration import Memory, Setting, Tally, make_memory  # noqa: E402
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


def memory_of(policies, *, num_envs, shards=1, limit=7, parts=2, divisor=0.0, ent_coef=0.1):
    """Rows of as many runs as there are policies; NaN and worse is wherever nobody may look."""
    shape = shape_of(policies[0])
    memory = make_memory(
        shape,
        runs=len(policies),
        num_envs=num_envs,
        shards=shards,
        num_steps=1,
        max_episode_steps=limit,
        slots=3,
        parts=parts,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(num_envs)
    runs, capacity, _ = memory.flags.shape
    for each in (memory.states, memory.obs, memory.weights, memory.rewards, memory.parts):
        each.fill_(math.nan)
    memory.at[0] = 5
    memory.settings[:, Setting.DIVISOR] = torch.linspace(divisor, 2 * divisor, runs)
    memory.settings[:, Setting.ENT_COEF] = torch.linspace(ent_coef, 2 * ent_coef, runs)
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


def assert_near(row, wanted, most=1e-6):
    assert (row[:-2] - wanted[:-2]).norm() <= most * wanted[:-2].norm()
    torch.testing.assert_close(row[-2:], wanted[-2:], rtol=most, atol=most * len(row))


def check(policies, precision="tf32x3", **settings):
    memory = memory_of(policies, **settings)
    shape = shape_of(policies[0])
    gradient.sum_gradient(memory, shape, precision=precision)
    rows = memory.parts[..., : shape.size + 2]
    assert rows.isfinite().all()
    for run, policy in enumerate(policies):
        for shard, parts in enumerate(rows[run]):
            assert_near(parts.sum(0), by_autograd(memory, run, policy, shard))
    return memory


@pytest.mark.slow
def test_interpreted():
    gpu_kernels.interpret("test_policy_cuda_gradient")


def interpret():
    np.seterr(all="ignore")
    torch.set_num_threads(1)
    # Blocks are more than are read at a time.
    gradient._MANY = gradient.tl.constexpr(1)
    check_policies()
    check_shards_and_runs()
    check_parts_without_rows()
    check_blocks_of_64()
    check_slices()
    check_it_is_the_twins()
    check_what_is_not_finite_shows()


def check_policies():
    check([policy_of("two")], num_envs=17)
    check([policy_of("two", hidden_sizes=(33, 16))], precision="ieee", num_envs=3)
    check([policy_of("box", activation="relu", hidden_sizes=(64, 5))], num_envs=1, limit=23)
    check([policy_of("boxes", features=3, hidden_sizes=(20, 33))], num_envs=40, divisor=7.0)
    wide = policy_of("sixteen", hidden_sizes=(8, 64), features=17, activation="relu")
    check([wide], num_envs=20, ent_coef=3.0)


def check_shards_and_runs():
    """A run beside another has the bits that it has alone."""
    for actions, divisor in (("two", 0.0), ("boxes", 3.0)):
        policies = [policy_of(actions, seed=seed, hidden_sizes=(8, 8)) for seed in (1, 2)]
        memory = check(policies, num_envs=42, shards=2, divisor=divisor)
        for run, policy in enumerate(policies):
            alone = memory_of([policy], num_envs=42, shards=2)
            runs = {"states": 1, "stamps": 1, "keys": 1, "scalars": 1, "entries": 1}
            for name in Memory._fields:
                if name not in ("at", "bounds"):
                    own = getattr(memory, name).narrow(runs.get(name, 0), run, 1)
                    getattr(alone, name).copy_(own)
            alone.parts.fill_(math.nan)
            gradient.sum_gradient(alone, shape_of(policy))
            size = shape_of(policy).size + 2
            assert torch.equal(alone.parts[0, ..., :size], memory.parts[run, ..., :size])


def check_parts_without_rows():
    """And a block of whose rows none counts."""
    policy = policy_of("two", hidden_sizes=(8, 8))
    memory = memory_of([policy], num_envs=17, limit=3, parts=5)
    gradient.sum_gradient(memory, shape_of(policy))
    rows = memory.parts[0, 0, :, : shape_of(policy).size + 2]
    assert rows[:2].any(1).all()
    assert not rows[2:].any()
    memory.flags[:] = 6
    memory.obs.fill_(math.nan)
    memory.tallies[..., Tally.COUNTED] = 0
    gradient.sum_gradient(memory, shape_of(policy))
    assert not rows.any()


def check_blocks_of_64():
    policy = policy_of("two", hidden_sizes=(8, 8))
    with mock.patch.object(memories, "_FEW_ENVS", 64):
        memory = check([policy], num_envs=131, limit=3, parts=2)
        assert memory.block == 64


def check_slices():
    """As on GPUs where a layer does not fit."""
    policies = [
        policy_of("two"),
        policy_of("box", hidden_sizes=(33, 16), activation="relu"),
        policy_of("sixteen", hidden_sizes=(17, 20), features=17),
    ]
    with mock.patch.object(gradient, "_slice", return_value=16):
        for policy in policies:
            check([policy], num_envs=17, limit=3)


def check_it_is_the_twins():
    """What tensor cores leave out is left out here too: the interpreter adds in another order."""
    policy = policy_of("two")
    memory = memory_of([policy], num_envs=17)
    gradient.sum_gradient(memory, shape_of(policy))
    row = memory.parts[0, 0, :, : shape_of(policy).size].sum(0)
    twin = by_twin(memory, policy)
    assert (row - twin).norm() <= 4e-7 * twin.norm()


def check_what_is_not_finite_shows():
    for settings in ({}, {"activation": "relu"}):
        for number in range(6):
            policy = policy_of("two", hidden_sizes=(8, 8), **settings)
            with torch.no_grad():
                in_a_row(policy)[number].view(-1)[0] = math.nan if number % 2 else math.inf
            memory = memory_of([policy], num_envs=3)
            gradient.sum_gradient(memory, shape_of(policy))
            assert not memory.parts[0, 0, :, shape_of(policy).size].sum().isfinite()


# -- In plain torch -------------------------------------------------------------------------------


def split(x):
    high = ((x.view(torch.int32) + 4096) & -8192).view(torch.float32)
    return high, x - high


def tf32(x):
    """The bits of it that a tensor core reads."""
    return (x.view(torch.int32) & -8192).view(torch.float32)


def product(x, y, products=3):
    """As by tensor cores, whose sums are float32: here each one is rounded once."""
    (high, low), (other_high, other_low) = split(x), split(y)
    pairs = [(high, other_high), (high, other_low), (low, other_high)][:products]
    return sum(tf32(one).double() @ tf32(other).double() for one, other in pairs).float()


def by_twin(memory, policy, products=3):
    """A row of float64, of a Categorical policy's tanh network: tile after tile, layer by layer."""
    w1, b1, w2, b2, w3, b3 = (each.detach() for each in in_a_row(policy))
    mask = counted(memory)[0]
    count = mask.sum()
    divisor, ent_coef = memory.settings[0, [Setting.DIVISOR, Setting.ENT_COEF]].tolist()
    scale, bonus = 1 / (divisor or count), ent_coef / count
    total = torch.zeros(shape_of(policy).size, dtype=torch.float64)
    times = lambda x, y: product(x, y, products)  # noqa: E731
    for rows in mask.nonzero().split(64):
        t, n = rows.T
        x = memory.obs[0, t, n]
        weight = (memory.weights[0, t, n] * scale)[:, None]
        taken = memory.actions[0, t, n].long()[:, None]
        y = torch.tanh(times(x, w1.T) + b1)
        z = torch.tanh(times(y, w2.T) + b2)
        log_pi = torch.log_softmax(times(z, w3.T) + b3, dim=1)
        entropy = -(log_pi.exp() * log_pi).sum(1, keepdim=True)
        d = log_pi.exp() * (weight + bonus * (log_pi + entropy))
        d = d.scatter_add(1, taken, -weight)
        below = times(d, w3) * (1 - z * z)
        lowest = times(below, w2) * (1 - y * y)
        pairs = (lowest, x), (below, y), (d, z)
        terms = [each for d, x in pairs for each in (times(d.T, x).flatten(), d.sum(0))]
        total += torch.cat(terms).double()
    return total


def test_the_twin_equals_autograd():
    """Three products are enough, and one or two are not."""
    policy = policy_of("two")
    memory = memory_of([policy], num_envs=200, limit=20)
    wanted = by_autograd(memory, 0, policy)[:-2]
    errors = [
        float((by_twin(memory, policy, products) - wanted).norm() / wanted.norm())
        for products in (3, 2, 1)
    ]
    assert errors[0] < 4e-7
    assert errors[1] > 1e-4
    assert errors[2] > 1e-4


# -- Compiled, as launched, without a GPU ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "actions", "activation"),
    [
        (80, "two", "tanh"),
        (80, "two", "relu"),
        (80, "box", "tanh"),
        (80, "sixteen", "tanh"),
        (90, "two", "tanh"),
        (90, "two", "relu"),
        (90, "box", "tanh"),
        (100, "two", "tanh"),
    ],
)
def test_compiled(capability, actions, activation, monkeypatch):
    policy = policy_of(actions, activation=activation)
    memory = memory_of([policy], num_envs=8192, limit=1)
    with gpu_kernels.compiling(monkeypatch, capability) as kernels:
        gradient.sum_gradient(memory, shape_of(policy))
    (kernel,) = kernels
    used = gpu_kernels.resources(kernel)
    assert used["LOCAL"] == used["STACK"] == 0
    # Two programs at a time have 113 KiB each on a processor.
    assert kernel.metadata.shared <= 113 * 1024
    assert "globaltimer" in kernel.asm["ptx"]


@pytest.mark.slow
def test_one_kernel_serves_all_sizes(monkeypatch):
    policy = policy_of("two", hidden_sizes=(8, 8))
    with gpu_kernels.compiling(monkeypatch) as kernels:
        for num_envs, shards, runs in ((1, 1, 1), (16, 1, 2), (66, 2, 1)):
            memory = memory_of([policy] * runs, num_envs=num_envs, shards=shards)
            gradient.sum_gradient(memory, shape_of(policy))
    assert len({*map(id, kernels)}) == 1


def test_parts_are_cut_by_shape():
    assert gradient.num_parts(1, 1) == 1
    assert gradient.num_parts(33, 1) == 2
    assert gradient.num_parts(500, 1024) == 256

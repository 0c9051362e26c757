"""(a), of the kernels of whole iterations: a rollout, means by age, the gradient, a step.

Rollouts are compared with the CPU's machine code from the same actions, bit for bit; the gradient
with autograd in float64; means by age and the step with those of the CPU.
"""

import copy
import functools
from dataclasses import replace

import torch

from hour.correctness import check_again, checked
from hour.filled import Filled, filled
from hour.job import Wrong
from hour.parity import ENVS
from vecpg.adam import Adam
from vecpg.advantage import cuda as by_age
from vecpg.advantage import reference
from vecpg.fused import cuda
from vecpg.kernels.iteration import Stamp
from vecpg.noise import Stream
from vecpg.policy import Policy
from vecpg.policy.cuda import gradient
from vecpg.policy.shape import in_a_row
from vecpg.returns import reward_to_go
from vecpg.rollout import collect
from vecpg.update import by_autograd

SEED, ITERATION, FIRST_ENV = 2**40 + 17, 5, 1000  # all words of a key are used
SEEDS = (3, 4)  # of runs at once
# Of a gradient, in parts of its norm.
_TOLERANCE = 1e-6


def cases(device, copies=(100, 4200), envs=ENVS, window=30, iterations=3, limit=None):
    """Pairs of a name and what checks it.

    Args:
        copies: of all environments, and of every second one; of more than 4096 64 are a block, and
            products are others.
        limit: of steps of an episode; None: the environment's own.
    """
    made = functools.partial(_filled, device, window=window, max_episode_steps=limit)
    found = []
    for number, own in zip(copies, (envs, envs[::2]), strict=False):
        for env_id in own:
            found += [(f"whole rollouts of given actions, {env_id}", number, _check_given, env_id)]
            found += [(f"gradient, {env_id}", number, _check_gradient, env_id)]
            if number == copies[0] and env_id in envs[::2]:
                check = functools.partial(_check_gradient, precision="ieee")
                found += [(f"gradient in float32, {env_id}", number, check, env_id)]
        found += [
            ("means by age of runs", number, _check_ages, envs[0]),
            ("steps of runs", number, _check_step, envs[0], iterations),
            ("runs at once and alone", number, _check_runs, envs[0], iterations),
        ]
    return [
        (f"{what}, {number} copies", functools.partial(check, made, env_id, number, *more))
        for what, number, check, env_id, *more in found
    ]


def iterate(one: Filled):
    """What a CUDA graph of a whole iteration holds."""
    one.play()
    _subtract(one)
    gradient.sum_gradient(one.memory, one.shape)
    adam = Adam([])
    cuda.step(one.memory, one.shape, adam.betas, adam.eps)


def _subtract(one):
    memory = one.memory
    by_age.subtract_mean_of_runs(
        memory.weights,
        by_age.Found(memory.starts, memory.stops, memory.numbers, memory.longest),
        one.envs.max_episode_steps,
        others=True,
        at=memory.at,
        stamps=memory.stamps[..., Stamp.RETURNS],
    )


def _filled(device, env_id, copies, *, window, seeds=(SEED,), **settings):
    streams = [Stream(seed, ITERATION, FIRST_ENV, copies) for seed in seeds]
    return filled(env_id, copies, window, device, streams, **settings)


def _row(kernel, error=0.0, tolerance=0.0, dtype="float32"):
    return {"kernel": kernel, "dtype": dtype, "error": error, "tolerance": tolerance}


def _check_given(made, env_id, copies):
    """What the CPU collects from the actions that it took, and what they earn: the same bits."""
    one = made(env_id, copies)
    theirs = collect(
        one.envs,
        one.policies[0],
        num_steps=one.config.num_steps,
        seed=SEED,
        iteration=ITERATION,
        first_env=FIRST_ENV,
        backend="cpu",
    )
    memory, rows = one.memory, len(theirs.mask)
    actions = theirs.actions - one.shape.first_action
    memory.actions[0, :rows] = actions.view(memory.actions[0, :rows].shape).to(memory.actions)
    one.play(given=True)
    ours = one.fields()
    if len(ours["mask"]) != rows:
        raise Wrong(f"expected {rows} rows, got {len(ours['mask'])}")
    for name in ("mask", "terminations", "truncations", "rewards"):
        if not torch.equal(ours[name], getattr(theirs, name)):
            raise Wrong(f"{name} differ")
    seen = theirs.mask
    if not torch.equal(ours["obs"][seen], theirs.obs[seen]):
        apart = (ours["obs"] - theirs.obs)[seen].abs().max()
        raise Wrong(f"observations differ, by up to {apart:.3g}")
    weights = reward_to_go(theirs.rewards, theirs.dones, one.config.gamma, mask=theirs.mask)
    if not torch.equal(ours["weights"], weights):
        raise Wrong("what is earned from a row on differs")
    return _row("whole rollouts")


def _check_gradient(made, env_id, copies, **options):
    one = made(env_id, copies, ent_coef=0.01)
    one.play()
    memory, rollout, size = one.memory, one.rollout(), one.shape.size
    # What a row weighs in place of what it earned; nothing else may be read.
    weights = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    memory.weights[0, : len(weights)] = weights.masked_fill(~rollout.mask, torch.nan).to(
        memory.weights
    )
    policy, count = one.policies[0], int(rollout.mask.sum())
    wide = copy.deepcopy(policy).double()
    narrow = rollout.actions.double() if one.shape.gaussian else rollout.actions
    rollout = replace(rollout, obs=rollout.obs.double(), actions=narrow)
    loss, entropy = by_autograd(wide, rollout, weights.double(), copies, 0.01 / count)
    slopes = torch.cat([each.grad.flatten() for each in in_a_row(wide)])

    def differentiate():
        gradient.sum_gradient(memory, one.shape, **options)
        return memory.parts[0].sum(dim=(0, 1))[: size + 2].cpu()

    found = differentiate()
    error = ((found[:size] - slopes).norm() / slopes.norm()).item()
    if not error <= _TOLERANCE:
        raise Wrong(f"the gradient is {error:.3g} of its norm apart")
    checked(found[size:] / count, torch.stack([loss, entropy]) / count, 1e-6)
    check_again(found, differentiate())
    return _row("gradient in float32" if options else "gradient", error, _TOLERANCE)


def _check_ages(made, env_id, copies):
    one = made(env_id, copies, seeds=SEEDS)
    one.play()
    before = [one.fields(run) for run in range(len(SEEDS))]
    _subtract(one)
    worst = {"error": 0.0, "tolerance": 5e-7}
    for run, fields in enumerate(before):
        weights, dones = fields["weights"].double(), fields["terminations"] | fields["truncations"]
        sums = reference.sums_by_age(weights, fields["mask"], dones)
        reference.subtract_mean_by_age(weights, fields["mask"], dones, sums, others=True)
        row = checked(one.fields(run)["weights"], weights, 5e-7)
        worst = max(worst, row, key=lambda one: one["error"])
    return {**worst, "kernel": "means by age of runs", "dtype": "float32"}


def _check_step(made, env_id, copies, iterations):
    """Some steps beside those of `vecpg.adam` on the CPU along the same gradients."""
    one = made(env_id, copies, seeds=SEEDS)
    memory, size, lr = one.memory, one.shape.size, one.config.learning_rate
    policies = [copy.deepcopy(each) for each in one.policies]
    optimizers = [Adam(in_a_row(policy), lr=lr) for policy in policies]
    (beta1, beta2), worst = optimizers[0].betas, 0.0
    for number in range(iterations):
        t = number + 1
        memory.scalars[number] = torch.tensor([lr / (1 - beta1**t), (1 - beta2**t) ** 0.5])
        iterate(one)
        sums = memory.sums.cpu()
        for run, (policy, optimizer) in enumerate(zip(policies, optimizers, strict=True)):
            _give(policy, sums[run, :size].float())
            optimizer.step()
            expected = torch.cat([each.detach().flatten() for each in in_a_row(policy)])
            found = memory.states[number + 1, run, 0, :size].cpu()
            worst = max(worst, ((found - expected).abs() / expected.abs().clamp(lr)).max().item())
    # A square root of the CPU's may be the number beside.
    if not worst <= 2.5e-7:
        raise Wrong(f"parameters are {worst:.3g} of their own size apart")
    if memory.at.item() != iterations:
        raise Wrong(f"expected {iterations} iterations, got {memory.at.item()}")
    return _row("steps of runs", worst, 2.5e-7)


def _give(policy: Policy, numbers: torch.Tensor):
    at = 0
    for each in in_a_row(policy):
        each.grad = numbers[at : at + each.numel()].view_as(each)
        at += each.numel()


def _check_runs(made, env_id, copies, iterations):
    """Iterations of each run beside others, and alone: the same states, bit for bit."""
    together = made(env_id, copies, seeds=SEEDS)
    before = together.memory.states[0].clone()
    for _ in range(iterations):
        iterate(together)
    for run, seed in enumerate(SEEDS):
        alone = made(env_id, copies, seeds=(seed,))
        alone.memory.states[0, 0] = before[run]
        for _ in range(iterations):
            iterate(alone)
        for name, count in (("states", iterations + 1), ("entries", iterations)):
            one, other = getattr(together.memory, name)[:, run], getattr(alone.memory, name)[:, 0]
            if not torch.equal(one[:count], other[:count]):
                raise Wrong(f"{name} of run {run} beside others are not those of it alone")
    return _row("runs at once")

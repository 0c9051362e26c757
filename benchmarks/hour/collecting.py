"""(a), of the kernels that collect and weigh, where Gymnasium and Numba are there too.

They are compared with the CPU's machine code and with plain torch: bit for bit, but sums, and
actions, whose exponentials and logarithms are others.
"""

import copy
import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import torch

from hour.correctness import check_again, checked
from hour.job import Wrong
from hour.parity import AT_A_BOUNDARY, ENVS
from vecpg.adam import Adam
from vecpg.advantage import cuda as ages_cuda
from vecpg.advantage import reference as ages_reference
from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.noise import WORD, Purpose, Stream
from vecpg.policy import Policy
from vecpg.policy import cuda as policy_cuda
from vecpg.rollout import Rollout, collect, cuda
from vecpg.update import by_autograd, choose_learner

# Of a rollout, what a learner reads.
_TENSORS = ("obs", "actions", "rewards", "terminations", "truncations", "mask", "final_obs")
_TENSORS += ("final_rows",)
_STREAM = 2**40 + 17, 5, 1000  # seed, iteration and first copy: all words of a key are used


def cases(device, copies=1000, envs=ENVS, window=30):
    """Pairs of a name and what checks it."""
    return [
        ("uniform numbers", functools.partial(_check_uniforms, device, copies)),
        *(
            (f"actions, {env_id}", functools.partial(_check_actions, device, env_id, copies))
            for env_id in ("CartPole-v1", "Acrobot-v1", "Pendulum-v1")
        ),
        *(
            (f"rows, {env_id}", functools.partial(_check_rows, device, env_id, copies, window))
            for env_id in envs
        ),
        *(
            (f"sums by age, {length} x {num_envs}", check)
            for length, num_envs in ((37, copies), (5, 1), (9, 3 * copies))
            for check in [functools.partial(_check_ages, device, length, num_envs)]
        ),
        *(
            (f"update, {env_id}", functools.partial(_check_update, device, env_id, copies, window))
            for env_id in envs
        ),
    ]


def _row(kernel, error, tolerance, dtype="float32"):
    return {"kernel": kernel, "dtype": dtype, "error": error, "tolerance": tolerance}


def _key(stream, device):
    starts = stream.common_seed(Purpose.TRAINING_RESET)
    words = [stream.seed & WORD, stream.seed >> 32, stream.iteration]
    words += [starts & WORD, starts >> 32, stream.first_env]
    return torch.tensor(words, device=device)


def _check_uniforms(device, copies):
    stream = Stream(*_STREAM, copies)
    out = torch.full((7, 3, copies), math.nan, device=device)
    at = SimpleNamespace(t=torch.tensor([40], device=device), key=_key(stream, device))
    policy_cuda.uniforms(out, at, Purpose.DROPOUT, 2)
    steps = torch.arange(42, 45)[:, None]
    expected = stream.uniforms_at(steps, torch.arange(copies), Purpose.DROPOUT, 7)
    if not torch.equal(out.cpu(), expected):
        raise Wrong("the bits differ from the host's")
    return _row("uniform numbers", 0.0, 0.0)


def _check_actions(device, env_id, copies):
    envs = make_envs(env_id, copies, vectorization="tensor")
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    distribution, there = (
        policy.distribution,
        Policy(envs.single_observation_space, envs.single_action_space).to(device),
    )
    stream, t = Stream(*_STREAM, copies), 9
    g = torch.Generator().manual_seed(0)
    parameters = 3 * torch.randn(distribution.num_parameters, copies, generator=g)
    shape = copies, math.prod(policy.action_shape)
    at = SimpleNamespace(
        acted=torch.full(shape, math.nan, device=device),
        t=torch.tensor([t - 3], device=device),
        key=_key(stream, device),
    )

    def draw():
        actions = torch.zeros(t + 1, copies, *policy.action_shape, dtype=policy.action_dtype)
        rows = SimpleNamespace(actions=actions.to(device))
        policy_cuda.make_draw(there)(parameters.to(device), at, rows, 3)
        return rows.actions[t]

    numbers = stream.uniforms_at(
        torch.full((copies,), t), torch.arange(copies), Purpose.ACTION, policy.num_uniforms
    )
    with torch.inference_mode():
        expected, drawn = distribution.sample(parameters, numbers), draw()
    if not torch.equal(at.acted.cpu(), distribution.clipped(drawn.cpu()).float().view(shape)):
        raise Wrong("the environment gets other actions than were drawn")
    if drawn.is_floating_point():
        row = checked(drawn, expected.double(), 2e-6)
        check_again(drawn, draw())
        return {**row, "kernel": "actions", "dtype": "float32"}
    below = parameters.double().softmax(dim=0).cumsum(dim=0)[:-1]
    decided = ((below - numbers).abs() > AT_A_BOUNDARY).all(dim=0)
    if not torch.equal(drawn.cpu()[decided], expected[decided]):
        raise Wrong("actions differ that were not drawn on a boundary")
    check_again(drawn, draw())
    return _row("actions", 0.0, 0.0, "int64")


def _check_rows(device, env_id, copies, window):
    """What the CPU collects, row by row, from the actions that it took: the same bits."""
    envs = make_envs(env_id, copies, vectorization="tensor")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(envs.single_observation_space, envs.single_action_space)
    seed, iteration, first_env = _STREAM
    theirs = collect(
        envs,
        policy,
        num_steps=window,
        seed=seed,
        iteration=iteration,
        first_env=first_env,
        backend="cpu",
    )
    length, of = len(theirs.mask), (envs.definition, envs.dynamics.num_variables)

    def zeros(*shape, of=torch.float32):
        return torch.zeros(shape, dtype=of, device=device)

    at = SimpleNamespace(
        state=zeros(of[1], copies),
        **{n: zeros(copies, of=torch.int32) for n in ("lengths", "steps", "episodes", "cut")},
        now=zeros(copies, of=torch.int8),
        bad=zeros(copies, of=torch.bool),
        seen=zeros(copies, math.prod(policy.obs_shape)),
        acted=zeros(copies, math.prod(policy.action_shape)),
        t=zeros(1, of=torch.int64),
        key=_key(Stream(*_STREAM, copies), device),
    )
    rows = SimpleNamespace(
        obs=torch.full((length + 1, copies, *policy.obs_shape), math.nan, device=device),
        actions=theirs.actions.to(device),
        rewards=zeros(length, copies) + math.nan,
        **{
            name: zeros(length, copies, of=torch.bool)
            for name in ("terminations", "truncations", "mask")
        },
    )
    cuda.make_start(*of)(at, rows)
    step = cuda.make_step(*of)
    for t in range(length):
        clipped = policy.distribution.clipped(theirs.actions[t])
        at.acted.copy_(clipped.view(copies, -1))
        step(at, rows, 0, num_steps=window, max_episode_steps=envs.max_episode_steps)
        at.t += 1
    mask = theirs.mask
    for name in ("mask", "terminations", "truncations", "rewards"):
        if not torch.equal(getattr(rows, name).cpu(), getattr(theirs, name)):
            raise Wrong(f"{name} differ")
    if not torch.equal(rows.obs[:-1].cpu()[mask], theirs.obs[mask]):
        apart = (rows.obs[:-1].cpu() - theirs.obs)[mask].abs().max()
        raise Wrong(f"observations differ, by up to {apart:.3g}")
    if at.now.any() or at.bad.any():
        raise Wrong("copies go on at the end, or numbers are not finite")
    return _row("rows", 0.0, 0.0)


def _check_ages(device, length, num_envs):
    g = torch.Generator().manual_seed(length)
    shape = length, num_envs
    weights = torch.randn(shape, generator=g)
    mask = torch.rand(shape, generator=g) < 0.7
    dones = mask & (torch.rand(shape, generator=g) < 0.2)
    weights = weights.masked_fill(~mask, math.nan)
    there = [each.to(device) for each in (weights, mask, dones)]
    expected = ages_reference.sums_by_age(weights, mask, dones)

    def add():
        return ages_cuda.sums_by_age(*there)

    row = checked(add(), expected, 1e-12)
    check_again(add(), add())
    for others in (False, True):
        ours, theirs = there[0].clone(), weights.clone()
        ages_cuda.subtract_mean_by_age(ours, *there[1:], add(), others)
        ages_reference.subtract_mean_by_age(theirs, mask, dones, expected, others)
        checked(ours, theirs.double(), 5e-7)
    return {**row, "kernel": "sums by age", "dtype": "float64"}


def _check_update(device, env_id, copies, window):
    """The gradient that a step follows, in CUDA graphs too: that of autograd in float64."""
    envs = make_envs(env_id, copies, vectorization="tensor")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Policy(envs.single_observation_space, envs.single_action_space)
        weights = torch.randn(copies)
    rollout = collect(envs, policy, num_steps=window, seed=1, iteration=0, backend="cpu")
    weights = weights.expand(rollout.mask.shape).masked_fill(~rollout.mask, math.nan)
    wide = copy.deepcopy(policy).double()
    by_autograd(wide, replace(rollout, obs=rollout.obs.double()), weights.double(), copies, 0.0)
    expected = torch.cat([each.grad.flatten() for each in wide.parameters()])
    there = Policy(envs.single_observation_space, envs.single_action_space).to(device)
    there.load_state_dict(policy.state_dict())
    tensors = {name: getattr(rollout, name) for name in _TENSORS}
    moved = Rollout(
        **{name: each.to(device) for name, each in tensors.items()},
        counted=rollout.places().to(device),
    )
    config, optimizer = Config(num_envs=copies), Adam(there.parameters(), lr=0.0)
    learner = choose_learner(there, "reference")
    learner.prepare(there)

    def gradient():
        learner.update(there, optimizer, moved, weights.to(device), config, wait=False)
        return torch.cat([each.grad.flatten() for each in there.parameters()])

    result = gradient().clone()
    row = checked(result, expected, 1e-5)
    check_again(result, gradient())
    return {**row, "kernel": "update", "dtype": "float32"}

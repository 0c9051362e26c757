"""(b) 50 steps of every environment on tensors beside the CPU's machine code, from the same keys.

Random numbers are the same on every device, bit for bit. What the network and the dynamics round
differs, so that an action may be another one where its draw lies on the boundary of two.
"""

import copy
import functools

import torch

from hour import filled
from hour.job import Wrong
from vecpg.envs import make_envs
from vecpg.noise import Purpose, Stream
from vecpg.rollout import choose_collector, collect

ENVS = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0")
# A draw so close to the boundary of two actions may give either.
AT_A_BOUNDARY = 1e-6
SEED, ITERATION = 7, 3
ROWS = 50
# How far apart observations may be, in torch, until an action differs.
_APART = 1e-4


# The backend of each way, and whether it has memory and CUDA graphs of its own.
WAYS = {
    "kernels in graphs": ("cuda", True),
    "torch, op by op": ("reference", False),
    "torch in graphs": ("reference", True),
}
ONE_KERNEL = "one kernel"


def measure(job):
    from hour import drift

    copies = 13 if job.miniature else 1000
    ways = ["torch, op by op"] if job.miniature else WAYS
    # Interpreted, a kernel takes its time; of many copies 64 are a block, and products are others.
    whole = [("CartPole-v1", copies)]
    if not job.miniature:
        whole = [(env_id, copies) for env_id in ENVS] + [(env_id, 4200) for env_id in ENVS[::2]]
    cases = [
        (f"{env_id}, {number} copies, {ONE_KERNEL}", functools.partial(whole_rollout, *case))
        for env_id, number in whole
        for case in [(env_id, number, job.device)]
    ]
    if not job.miniature:
        cases += drift.cases()
    cases += [
        (f"{env_id}, {way}", functools.partial(compared, env_id, way, copies, job.device))
        for way in ways
        for env_id in ENVS
    ]
    job.run(cases, limit=45)


def whole_rollout(env_id, copies, device):
    """One line: what the kernel of whole iterations plays beside the CPU's, to the end."""
    policy, theirs = _on_the_cpu(env_id, copies)
    stream = Stream(SEED, ITERATION, 0, copies)
    one = filled.filled(env_id, copies, ROWS, device, [stream], policies=[policy])
    one.play()
    exact = not one.shape.gaussian
    about = {"env_id": env_id, "way": ONE_KERNEL, "copies": copies}
    return about | _apart(policy, one.fields(), theirs, 0.0 if exact else _APART)


def compared(env_id, way, copies, device):
    """One line: a rollout on the device beside that of the CPU."""
    policy, theirs = _on_the_cpu(env_id, copies)
    envs = make_envs(env_id, copies, vectorization="tensor", device=device)
    there = copy.deepcopy(policy).to(device)
    backend, prepared = WAYS[way]
    collector = choose_collector(envs, there, backend)
    if prepared:
        collector = collector.prepare(envs, there, ROWS)
    ours = collect(envs, there, num_steps=ROWS, seed=SEED, iteration=ITERATION, backend=collector)
    ours = {name: getattr(ours, name)[:ROWS].cpu() for name in _FIELDS}
    about = {"env_id": env_id, "way": way, "how": str(collector), "copies": copies}
    # The kernels' arithmetic is that of the machine code: equal actions give equal bits.
    exact = backend == "cuda" and not ours["actions"].is_floating_point()
    return about | _apart(policy, ours, theirs, 0.0 if exact else _APART)


_FIELDS = ("obs", "actions", "rewards", "terminations", "truncations", "mask")


@functools.cache
def _on_the_cpu(env_id, copies):
    """A policy whose actions differ from one observation to the next, and what it does."""
    envs = make_envs(env_id, copies, vectorization="tensor")
    policy = filled.policy_of(envs)
    rollout = collect(envs, policy, num_steps=ROWS, seed=SEED, iteration=ITERATION, backend="cpu")
    return policy, {name: getattr(rollout, name)[:ROWS] for name in _FIELDS}


def _apart(policy, ours, theirs, most=_APART):
    """How two rollouts of the same keys differ, (T, N) each; T may be less than ROWS.

    Args:
        policy: that chose the actions.
        ours: its fields by their names.
        theirs: the CPU's.
        most: how far apart observations may be until an action differs, relative to the largest of
            each variable.

    Raises:
        Wrong: they differ by more than rounding.
    """
    rows = min(len(ours["mask"]), len(theirs["mask"]))
    ours, theirs = ({name: each[:rows] for name, each in one.items()} for one in (ours, theirs))
    real = theirs["mask"]
    near = torch.ones_like(real)
    if ours["actions"].is_floating_point():
        gap = (ours["actions"] - theirs["actions"]).abs().amax(dim=-1)
        parted = torch.zeros_like(real)
        actions_apart = gap.where(real, 0.0).max().item()
    else:
        parted = (ours["actions"] != theirs["actions"]) & real
        near = _near(policy, theirs) <= AT_A_BOUNDARY
        actions_apart = None
    # What differs besides, of copies that have taken the same actions so far.
    flags = [ours[name] != theirs[name] for name in ("terminations", "truncations", "mask")]
    ended_apart = torch.stack(flags).any(dim=0)
    before = (parted | ended_apart).int().cumsum(dim=0).int()
    same = before == 0
    first = (before == 1) & (parted | ended_apart)
    # An observation is of what was done until the row before.
    until = torch.cat([torch.ones_like(same[:1]), same[:-1]]) & real
    size = theirs["obs"].abs().amax(dim=(0, 1)).clamp(min=1e-6)
    obs_apart = ((ours["obs"] - theirs["obs"]).abs() / size).amax(dim=-1).where(until, 0.0)
    wrong = first & parted & ~near
    if wrong.any():
        raise Wrong(f"{int(wrong.sum())} actions differ that were not drawn on a boundary")
    ends = int((first & ~parted).sum())
    if ends > real.shape[1] / 200:
        raise Wrong(f"{ends} of {real.shape[1]} copies end at another row")
    if not obs_apart.max() <= most:
        raise Wrong(f"observations are {obs_apart.max():.2g} apart before any action differs")
    rewards = (ours["rewards"] - theirs["rewards"]).abs().where(same & real, 0.0)
    return {
        "rows": rows,
        "compared": int(until.sum()),
        "bit_equal": (obs_apart == 0)[until].float().mean().item(),
        "obs_apart": obs_apart.max().item(),
        "rewards_apart": rewards.max().item(),
        "actions_apart": actions_apart,
        "actions_on_a_boundary": int((first & parted).sum()),
        "ends_apart": ends,
    }


def _near(policy, rollout):
    return distances(policy, rollout, Stream(SEED, ITERATION, 0, rollout["mask"].shape[1]))


def distances(policy, rollout, stream):
    """(T, N): how far the draw of each categorical action lay from the boundary of two."""
    draws = stream.uniforms(range(len(rollout["mask"])), Purpose.ACTION)
    with torch.inference_mode():
        logits = torch.stack([policy(obs) for obs in rollout["obs"]])  # (T, actions, N)
    below = logits.double().softmax(dim=1).cumsum(dim=1)[:, :-1]
    return (below - draws[:, None]).abs().amin(dim=1)

"""Collecting from environments on tensors: nothing leaves the device until it is over."""

import torch

from vecpg.envs.tensor import TensorVectorEnv
from vecpg.noise import Purpose, Stream
from vecpg.policy import Policy
from vecpg.policy.sampling import Draw
from vecpg.rollout.data import FINISHED, NEXT, PLAYING, Rollout, Rows, check_finite

# Rows between two looks, from the host, at whether everything is over. On a GPU a look waits for
# the device; on a CPU it costs as little as a row that nobody needs.
_ROWS_BETWEEN_LOOKS = {"cpu": 1}
_ROWS_BETWEEN_LOOKS_ELSEWHERE = 16


def collect_on_device(
    envs: TensorVectorEnv, policy: Policy, draw: Draw, *, num_steps: int, stream: Stream
) -> Rollout:
    """As `collect`, from a `TensorVectorEnv` on the policy's device.

    Which rows count is itself a matter of tensors here, by the same rule (`data.NEXT`).

    Args:
        envs: N environments on tensors.
        policy: whose actions are drawn.
        draw: as `sampler` gives it.
        num_steps: the start window.
        stream: fixes start states.

    Raises:
        ValueError: environments on another device than the policy.
        EnvironmentFailure: an observation or a reward that is not finite.
    """
    device = policy.device
    if envs.device != device:
        raise ValueError(
            f"envs: expected them on {device} like the policy, got {envs.device}; make"
            f' them with device="{device}"'
        )
    num_envs = envs.num_envs
    between = _ROWS_BETWEEN_LOOKS.get(device.type, _ROWS_BETWEEN_LOOKS_ELSEWHERE)
    rows = Rows(
        min(num_steps, 1024) + 1,
        num_envs,
        (policy.obs_shape, policy.obs_dtype),
        (policy.action_shape, policy.action_dtype),
        device,
    )
    # The table flat, and what an environment does as the place where its four entries begin.
    following = torch.from_numpy(NEXT).reshape(-1).to(device, torch.int64) * 4
    now = torch.full((num_envs,), 4 * PLAYING, device=device)
    steps = torch.zeros(num_envs, dtype=torch.int64, device=device)
    with torch.inference_mode():
        seed = stream.common_seed(Purpose.TRAINING_RESET)
        obs, _ = envs.reset(seed=seed, options={"first_env": stream.first_env})
        t = 0
        while t % between or bool((now != 4 * FINISHED).any()):
            rows.make_room(t + 1)
            rows.obs[t] = obs
            draw(t, rows.obs[t], rows.actions[t])
            action = policy.distribution.clipped(rows.actions[t])
            obs, rewards, terminations, truncations, _ = envs.step(action)
            real = now == 4 * PLAYING
            rows.mask[t] = real
            rows.rewards[t] = torch.where(real, rewards, 0.0)
            rows.terminations[t] = real & terminations
            rows.truncations[t] = real & truncations
            steps += real
            ends = real & (terminations | truncations)
            more = steps < num_steps
            now = following.take(torch.add(now, ends, alpha=2).add_(more))
            t += 1
        rows.obs[t] = obs
    length = int(rows.mask.any(dim=1).nonzero().max()) + 1
    rollout = rows.rollout(length, device, stream)
    check_finite(rollout)
    return rollout

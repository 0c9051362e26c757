"""TorchRL's `reward2go`: discounted returns of ragged episodes in a batch.

Equal: the same float32 rewards and ends, gamma 0.99, one process. Both of its layouts are tried,
and one thread and all. Checked against the sum in float64. Not equal: it convolves padded episodes
with powers of gamma down to 1e-7, and has no mask, no value after the last step and no gamma of
0; vecpg's takes them.
"""

import functools

from harness import Entrant, returns
from ours import returns_case, returns_error

NEEDS = ("torchrl", "tensordict")
PACKAGES = ("torchrl", "tensordict")


def entrants():
    from vecpg.kernels.cores import cores

    return [
        Entrant(
            returns(n),
            "TorchRL, reward2go",
            {
                f"{layout}, {threads} threads": functools.partial(make, n, layout, threads)
                for layout in ("batch-major", "time-major")
                for threads in sorted({1, cores()})
            },
            "no mask, no values after the end",
        )
        for n in (64, 4096)
    ]


def make(num_envs, layout, threads):
    import torch
    from torchrl.objectives.value.functional import reward2go

    torch.set_num_threads(threads)
    rewards, dones = returns_case(num_envs)
    given, ends, time_dim = rewards, dones, -2
    if layout == "batch-major":
        given, ends, time_dim = rewards.mT.contiguous(), dones.mT.contiguous(), -1

    def compute():
        torch.set_num_threads(threads)
        reward2go(given, ends, 0.99, time_dim=time_dim)
        return given.numel()

    result = reward2go(given, ends, 0.99, time_dim=time_dim)
    result = result.reshape(given.shape)
    error = returns_error(result.mT if layout == "batch-major" else result, rewards, dones)
    assert error < 1e-5, f"wrong by {error}"
    return compute

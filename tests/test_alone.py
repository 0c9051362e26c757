"""The returns kernels as others' dependency: without vecpg's own, and on a torch to come."""

import importlib
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT

from vecpg.returns import (
    checks,
    generalized_advantage,
    operator,
    packed_reward_to_go,
    reward_to_go,
)

# Finds nothing but what torch, NumPy and Numba need themselves; then calls all there is.
ALONE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"gymnasium", "tensorboard", "tyro", "tqdm", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())

import torch
from vecpg.returns import generalized_advantage, packed_reward_to_go, reward_to_go

def ones(*shape):
    return torch.ones(shape, requires_grad=True)

def show(result, *inputs):
    gradients = torch.autograd.grad(result.sum(), inputs)
    print([each.tolist() for each in (result, *gradients)])

dones = torch.tensor([[False], [True], [False]])
print(reward_to_go(torch.ones(3, 1), dones, 0.5).tolist())
rewards, values = ones(3, 1), ones(3, 1)
show(reward_to_go(rewards, dones, 0.5), rewards)
show(generalized_advantage(rewards, values, dones, 0.5, 0.5), rewards, values)
rewards = ones(3)
show(packed_reward_to_go(rewards, torch.tensor([0, 2, 3]), 0.5), rewards)
print(sorted({"numba", "vecpg.returns.cpu"} & set(sys.modules)))
print(sys.modules["vecpg"].__path__[0])
"""
FOUND = """[[1.5], [1.0], [1.0]]
[[[1.5], [1.0], [1.0]], [[1.0], [1.5], [1.0]]]
[[[0.5], [0.0], [0.0]], [[1.0], [1.25], [1.0]], [[-1.0], [-0.75], [-1.0]]]
[[1.5, 1.0, 1.0], [1.0, 1.5, 1.0]]
['numba', 'vecpg.returns.cpu']
"""


def called_alone(cwd, site):
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(site)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def test_it_needs_nothing_but_torch_numpy_and_numba(tmp_path):
    assert called_alone(tmp_path, ROOT) == FOUND + f"{ROOT / 'vecpg'}\n"


@pytest.mark.slow
def test_the_wheel_has_all_of_the_package_and_its_kernels_stand_alone(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (about,) = site.glob("vecpg-*.dist-info")
    assert sorted(site.iterdir()) == sorted([site / "vecpg", about])
    assert (about / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    kept = {path.relative_to(site) for path in (site / "vecpg").rglob("*") if path.is_file()}
    assert kept == {
        path.relative_to(ROOT)
        for path in (ROOT / "vecpg").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert called_alone(tmp_path, site) == FOUND + f"{site / 'vecpg'}\n"


PRIVATE = {
    "_are_functorch_transforms_active": torch._C,
    "_len_torch_dispatch_stack": torch._C,
    "_get_tracing_state": torch._C,
    "_current_level": torch.autograd.forward_ad,
}


@pytest.fixture
def without(monkeypatch):
    """Import the checks anew where a name is missing: torch's own calls still find it."""

    def take(name):
        with monkeypatch.context() as patch:
            patch.delattr(PRIVATE[name], name)
            importlib.reload(checks)

    yield take
    importlib.reload(checks)
    assert checks.is_eager()


def results():
    """Of every way that a call can go: plain, with gradients, mapped."""
    g = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 5, 3, generator=g)
    mask, dones = torch.rand(2, 5, 3, generator=g) < torch.tensor([0.8, 0.3])[:, None, None]
    rewards = rewards.where(mask, torch.nan)
    offsets = torch.tensor([0, 2, 2, 5])
    packed = rewards[:, 0].nan_to_num()
    out = torch.full_like(rewards, torch.nan)

    def one(rewards, mask):
        return reward_to_go(rewards, dones[:, 0], 0.9, mask=mask)

    found = [
        reward_to_go(rewards, dones, 0.9, mask=mask),
        reward_to_go(rewards, dones, 0.9, mask=mask, out=out),
        packed_reward_to_go(packed, offsets, 0.9),
        packed_reward_to_go(packed, offsets, 0.9, final_values=torch.tensor([1.0, 2.0, 3.0])),
        generalized_advantage(rewards, values, dones, 0.9, 0.8, mask=mask),
        torch.vmap(one, in_dims=1, out_dims=1)(rewards, mask),
    ]
    _, tangents = torch.func.jvp(
        lambda r: reward_to_go(r, dones, 0.9, mask=mask), (rewards,), (values,)
    )
    found.append(tangents)
    rewards.requires_grad_()
    advantages = generalized_advantage(rewards, values, dones, 0.9, 0.8, mask=mask)
    return [*found, *torch.autograd.grad(advantages.square().sum(), rewards)]


# Torch's own, of what forward mode loads.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name", PRIVATE)
def test_without_a_private_name_of_torchs_it_goes_the_way_that_is_always_right(
    without, monkeypatch, caplog, name
):
    expected = results()
    without(name)
    assert f"has no attribute '{name}', which tells" in caplog.text
    assert not checks.is_eager()
    for direct in ("write_common", "write_packed"):
        monkeypatch.setattr(operator, direct, pytest.fail)
    for ours, before in zip(results(), expected, strict=True):
        torch.testing.assert_close(ours, before, rtol=0, atol=0)

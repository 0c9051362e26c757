import os
import zipfile

import numpy as np
import pytest
import torch
from gymnasium import spaces

from vecpg.policy import Policy
from vecpg.run import checkpoint

STATE = {"numbers": [1, 2.5, None, "x"], "tensor": torch.arange(6.0).reshape(2, 3), "a": {"b": 1}}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_what_was_saved_is_loaded(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    assert same(checkpoint.load(path), STATE)
    assert os.listdir(tmp_path) == ["last.pt"]
    assert isinstance(torch.load(path, weights_only=True), dict)


def test_every_damaged_file_is_noticed_and_named(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        tensor = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
    for cut in [0, 1, *range(2, len(whole), 64), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="last.pt"):
            checkpoint.load(path)
    flipped = 0
    for place in range(0, len(whole), 41):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        try:
            assert same(checkpoint.load(path), STATE)
        except ValueError as error:
            assert "last.pt" in str(error)  # noqa: PT017
            flipped += 1
    assert flipped > 0
    # One bit of a tensor's data, which torch itself does not notice.
    offset = whole.index(STATE["tensor"].numpy().tobytes(), tensor.header_offset)
    damaged = bytearray(whole)
    damaged[offset + 5] ^= 1
    path.write_bytes(damaged)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=r"last.pt .* is damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", os.urandom(500)])
def test_another_file_is_not_a_checkpoint(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.pt .* is not a vecpg checkpoint"):
        checkpoint.load(path)


def test_another_torch_file_is_not_a_checkpoint(tmp_path):
    torch.save({"model": 1}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt is not a vecpg checkpoint"):
        checkpoint.load(tmp_path / "x.pt")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"kind": "vecpg checkpoint", "state": Evil()}, "x.pt")
    with pytest.raises(ValueError, match="is not a vecpg checkpoint") as caught:
        checkpoint.load(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    checkpoint.save(tmp_path / "x.pt", STATE)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 99, .* use a newer vecpg"):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_checkpoint_and_no_rest(tmp_path, monkeypatch, step):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"other": 1})
    monkeypatch.undo()
    assert same(checkpoint.load(path), STATE)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_the_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1]
        )
    checkpoint.save(tmp_path / "last.pt", STATE)
    assert calls == ["fsync", "replace", "fsync"]


def test_load_policy_takes_a_run_directory_or_a_file(tmp_path):
    torch.manual_seed(0)
    policies = {
        name: Policy(spaces.Box(-1, 1, (4,)), spaces.Discrete(3), hidden_sizes=(5,))
        for name in ("best", "last")
    }
    (tmp_path / "checkpoints").mkdir()
    for name, policy in policies.items():
        state = {"policy": checkpoint.policy_state(policy)}
        checkpoint.save(tmp_path / "checkpoints" / f"{name}.pt", state)
    obs = np.random.default_rng(0).normal(size=(100, 4))
    expected = {name: policy.act(obs).tolist() for name, policy in policies.items()}
    assert expected["best"] != expected["last"]
    assert checkpoint.load_policy(tmp_path).act(obs).tolist() == expected["best"]
    last = checkpoint.load_policy(str(tmp_path / "checkpoints" / "last.pt"))
    assert last.act(obs).tolist() == expected["last"]
    assert not last.training


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing: expected a run directory or a checkpoint"):
        checkpoint.load_policy(tmp_path / "nothing")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: expected a run directory"):
        checkpoint.load_policy(tmp_path)

import json

import pytest
import torch

from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.evaluate import evaluate
from vecpg.policy import Policy
from vecpg.rollout import collect
from vecpg.train import train

PONG = "ale_py:ALE/Pong-v5"
# 100 steps, of four frames each.
SHORT = {"max_num_frames_per_episode": 400}

pytestmark = pytest.mark.slow


def trained(out_dir, vectorization):
    """Two iterations, and two episodes in which the policy is evaluated."""
    config = Config(
        env_id=PONG,
        env_kwargs=SHORT,
        vectorization=vectorization,
        num_envs=2,
        total_iterations=2,
        eval_episodes=2,
        learning_rate=1e-3,
        progress=False,
        out_dir=str(out_dir),
    )
    result = train(config)
    assert result.policy.encoder.network == "cnn"
    found = evaluate(
        result.policy, PONG, 2, env_kwargs=SHORT, vectorization=result.summary["vectorization"]
    )
    # The vectorized form begins after some frames in which nothing is done.
    assert all(90 <= length <= 100 for length in found.lengths)
    rows = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(row)["charts/episodic_return"] <= 0 for row in rows)
    return result


def test_pong_is_trained_and_judged_as_single_frames(tmp_path):
    one, other = (trained(tmp_path, vectorization) for vectorization in ("auto", "sync"))
    assert one.summary["vectorization"] == other.summary["vectorization"] == "sync"
    for ours, theirs in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_pong_is_trained_and_judged_in_its_own_vectorized_form(tmp_path):
    result = trained(tmp_path, "vector_entry_point")
    assert result.policy.obs_shape == (4, 84, 84)


@pytest.mark.parametrize(
    ("vectorization", "shape"), [("sync", (210, 160, 3)), ("vector_entry_point", (4, 84, 84))]
)
def test_frames_are_kept_as_bytes(vectorization, shape):
    envs = make_envs(PONG, 2, env_kwargs=SHORT, vectorization=vectorization)
    policy = Policy(envs.single_observation_space, envs.single_action_space)
    rollout = collect(envs, policy, num_steps=1, seed=1, iteration=0)
    envs.close()
    assert rollout.obs.dtype == torch.uint8
    assert rollout.obs.shape[2:] == shape
    assert rollout.obs.float().std() > 10
    assert rollout.dones.sum() == 2

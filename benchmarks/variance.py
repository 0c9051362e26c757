"""Variance and mean squared error of the policy gradient, by baseline, at one policy of CartPole.

    python benchmarks/variance.py

One policy is trained a little and then kept. Every estimator sees the same rollouts, each of 64
environments with one episode; the gradient is read from the parameters after vecpg's own update,
with a step size of 0. "value" uses a V(s) that was fitted to other rollouts of the same policy. The
truth is the mean of the leave-one-out gradient over a million steps of further rollouts. Writes
benchmarks/results/<machine>/variance.json and prints a table.
"""

import argparse
import dataclasses
import json
import math
import tempfile

import torch

from vecpg.advantage import advantages
from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.machine import commit, results_folder, system
from vecpg.rollout import collect
from vecpg.train import train
from vecpg.update import update
from vecpg.value import Critic, ValueFunction, fit, predict

BASELINES = ("none", "mean", "timestep_mean", "leave_one_out", "value")
SEED = 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=400, help="for each estimator")
    parser.add_argument("--steps", type=int, default=1_000_000, help="of the true gradient")
    parser.add_argument("--trained", type=int, default=5, help="iterations of training before")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = Config(num_envs=64)
    with tempfile.TemporaryDirectory() as out_dir:
        few = dataclasses.replace(
            config, total_iterations=args.trained, target_return=None, out_dir=out_dir
        )
        policy = train(few).policy
    envs = make_envs(config.env_id, config.num_envs)

    def rollouts(first):
        iteration = first
        while True:
            yield collect(envs, policy, num_steps=1, seed=SEED, iteration=iteration)
            iteration += 1

    critic = fitted_critic(envs, rollouts(10**6), config)
    kinds = {name: dataclasses.replace(config, baseline=name) for name in BASELINES}
    samples = {name: [] for name in BASELINES}
    lengths = []
    for _, rollout in zip(range(args.rollouts), rollouts(2 * 10**6), strict=False):
        lengths.append(rollout.mask.sum().item() / config.num_envs)
        for name, kind in kinds.items():
            samples[name].append(gradient(policy, rollout, kind, critic))
    truth, steps = [], 0
    for rollout in rollouts(3 * 10**6):
        truth.append(gradient(policy, rollout, kinds["leave_one_out"], critic))
        steps += rollout.mask.sum().item()
        if steps >= args.steps:
            break
    truth = torch.stack(truth)
    # The truth is a mean too: what its own error adds to every mean squared error is taken off.
    error = truth.var(dim=0).sum() / len(truth)
    machine = system()
    result = {
        "command": "python benchmarks/variance.py",
        "commit": commit()["commit"],
        "machine": machine,
        "rollouts": args.rollouts,
        "mean_length": sum(lengths) / len(lengths),
        "true_gradient_steps": steps,
        "true_gradient_norm": truth.mean(dim=0).norm().item(),
        "baselines": {
            name: errors(torch.stack(grads), truth.mean(dim=0), error)
            for name, grads in samples.items()
        },
    }
    path = results_folder(machine) / "variance.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def fitted_critic(envs, rollouts, config):
    torch.manual_seed(SEED)
    critic = Critic(ValueFunction(envs.single_observation_space), config.value_learning_rate)
    for _, rollout in zip(range(20), rollouts, strict=False):
        fit(critic, rollout, None, config)
    return critic


def gradient(policy, rollout, config, critic):
    """The estimate as one vector; `update` minimizes, so its sign is turned."""
    values, final_values = predict(critic, rollout)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    update(policy, optimizer, rollout, advantages(rollout, config, values, final_values), config)
    return -torch.cat([parameter.grad.reshape(-1) for parameter in policy.parameters()]).double()


def errors(samples, truth, truth_error):
    """Summed over parameters; standard errors are those of means over rollouts."""
    squares = (samples - truth).square().sum(dim=1)
    spread = (samples - samples.mean(dim=0)).square().sum(dim=1)
    many = len(samples)
    return {
        "variance": (spread.sum() / (many - 1)).item(),
        "variance_error": (spread.std() / math.sqrt(many)).item(),
        "mean_squared_error": (squares.mean() - truth_error).item(),
        "mean_squared_error_error": (squares.std() / math.sqrt(many)).item(),
    }


def table(result):
    """Markdown, relative to no baseline."""
    kinds = result["baselines"]
    none = kinds["none"]
    lines = ["| baseline | variance | mean squared error |", "|-|-|-|"]
    for name, found in kinds.items():
        cells = [
            f"{found[key] / none[key]:.3f} ± {found[f'{key}_error'] / none[key]:.3f}"
            for key in ("variance", "mean_squared_error")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

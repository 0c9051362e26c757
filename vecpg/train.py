"""The story: a run from its settings to its summary. Read this first, top to bottom."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import torch

from vecpg.advantage import advantages, prepare_advantages
from vecpg.config import Config, ConfigError, to_dict
from vecpg.device import resolve_device
from vecpg.envs import EnvironmentFailure, find_spec, make_envs, resolve_vectorization
from vecpg.evaluate import EvalResult, evaluate
from vecpg.kernels import threads
from vecpg.kernels.jit import Compilation
from vecpg.look import video
from vecpg.noise import Purpose
from vecpg.policy import Policy
from vecpg.policy import cpu as policy_cpu
from vecpg.rollout import choose_collector, collect
from vecpg.rollout.statistics import episode_statistics, prepare_statistics
from vecpg.run import checkpoint
from vecpg.run.checkpoint import load_policy
from vecpg.run.directory import make_run_directory, write_json
from vecpg.run.interrupts import Interrupted, Interrupts
from vecpg.run.metrics import Metrics
from vecpg.run.progress import Progress
from vecpg.run.stopping import Stopping
from vecpg.update import UpdateStats, update
from vecpg.value import Critic, ValueFunction, fit, predict

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves: its best policy, its directory, and the numbers of summary.json."""

    policy: Policy
    run_dir: Path
    summary: dict[str, Any]


@dataclass(slots=True)
class Counters:
    """How far a run is."""

    iteration: int = 0
    env_steps: int = 0
    vector_steps: int = 0
    episodes: int = 0


@dataclass(slots=True)
class Clock:
    """Seconds spent in each phase, in the iteration at hand and in total, without compiling."""

    device: torch.device
    compilation: Compilation
    started: float = field(default_factory=time.perf_counter)
    compiled_before: float = field(init=False)
    evaluating: float = 0.0
    last: dict[str, float] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.compiled_before = self.compilation.seconds

    def since_start(self) -> float:
        """Seconds since the clock was made."""
        compiled = self.compilation.seconds - self.compiled_before
        return time.perf_counter() - self.started - compiled

    def without_evaluations(self) -> float:
        """Seconds of whole iterations, without what evaluating took."""
        return self.since_start() - self.evaluating

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """What happens inside is no part of an iteration."""
        started = self.since_start()
        yield
        self.evaluating += self.since_start() - started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what happens inside to `name`."""
        started = self.since_start()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.last[name] = self.since_start() - started
        self.total[name] = self.total.get(name, 0.0) + self.last[name]


def train(config: Config) -> TrainResult:
    """Train a policy with REINFORCE, and leave a run directory behind.

    Args:
        config: every setting.

    Returns:
        the best policy, the run directory, and the summary.

    Raises:
        ConfigError: something that can be known before the first environment step.
        EnvironmentFailure: an environment raised or returned a number that is not finite.
        FloatingPointError: the gradient is not finite.
        Interrupted: SIGINT or SIGTERM; a checkpoint was written.

    Example:
        >>> import tempfile
        >>> out_dir = tempfile.mkdtemp()
        >>> result = train(Config(num_envs=8, total_iterations=2, out_dir=out_dir, progress=False))
        >>> result.summary["iterations"]
        2
    """
    with _before_the_first_step():
        spec = find_spec(config.env_id)
        vectorization = resolve_vectorization(spec, config.vectorization, config.env_kwargs)
        device, reason = resolve_device(config.device, vectorization, config.num_envs)
        envs = make_envs(
            config.env_id,
            config.num_envs,
            vectorization=vectorization,
            device=str(device),
            env_kwargs=config.env_kwargs,
            max_episode_steps=config.max_episode_steps,
            step_timeout=config.step_timeout,
        )
        try:
            if config.capture_video:
                video.check_filming(
                    config.env_id,
                    env_kwargs=config.env_kwargs,
                    max_episode_steps=config.max_episode_steps,
                )
            with _torch_threads(1):  # an initialization may depend on it in its last bits
                policy, critic = _make_networks(config, envs, device)
            run_dir = make_run_directory(config)
        except BaseException:
            envs.close()
            raise
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate)
    counters = Counters()

    def confirm(policy: Policy) -> EvalResult:
        return evaluate(
            policy,
            config.env_id,
            config.eval_episodes,
            env_kwargs=config.env_kwargs,
            max_episode_steps=config.max_episode_steps,
            seed=config.seed,
            purpose=Purpose.CONFIRMATION_RESET,
            draw=counters.iteration,
        )

    target = spec.reward_threshold if config.target_return == "auto" else config.target_return
    stopping = Stopping(target, config.return_window, confirm if config.confirm else None)
    _log.info("%s x %d, %s, on %s (%s)", spec.id, envs.num_envs, vectorization, device, reason)
    _log.info("run directory: %s", run_dir)
    unserved = policy_cpu.why_not(policy)
    if unserved is not None:
        _log.info("the gradient is torch's: %s", unserved)
    if config.baseline == "leave_one_out" and config.num_envs == 1:
        _log.info("baseline leave_one_out: with one environment it equals none")
    _save(run_dir, config, policy, optimizer, critic, counters, stopping)
    # Last: a directory with a config.json has a checkpoint to go on from.
    write_json(run_dir / "config.json", to_dict(config))

    with (
        _torch_threads(1 if critic is None and unserved is None else config.threads or 1),
        threads.using(config.threads or threads.cores()),
        Interrupts() as interrupts,
        Progress(config) as progress,
        Compilation() as compilation,
    ):
        metrics = Metrics(run_dir, to_dict(config))
        solved_seconds = None
        try:
            with _before_the_first_step():
                _prepare_kernels(envs, policy)
            clock = Clock(device, compilation)
            saved = clock.started
            while not (stopping.solved or _limit_reached(config, counters)):
                with clock.phase("collect"):  # N environments, whole episodes, (T, N)
                    rollout = collect(
                        envs,
                        policy,
                        num_steps=config.num_steps,
                        seed=config.seed,
                        iteration=counters.iteration,
                    )
                returns, lengths = episode_statistics(rollout)
                with clock.evaluation():
                    evaluation = stopping.consider(policy, returns)
                if stopping.solved:
                    solved_seconds = clock.since_start()
                with interrupts.held():
                    with clock.phase("returns"):  # weights minus baseline, (T, N)
                        values, final_values = predict(critic, rollout)
                        weights = advantages(rollout, config, values, final_values)
                    with clock.phase("update"):  # one batched gradient step
                        stats = update(policy, optimizer, rollout, weights, config)
                        value_loss = fit(critic, rollout, final_values, config)
                    counters.iteration += 1
                    counters.env_steps += int(rollout.mask.sum())
                    counters.vector_steps += rollout.mask.numel()
                    counters.episodes += returns.numel()
                    row = _row(
                        counters, clock, stopping, returns, lengths, stats, value_loss, evaluation
                    )
                    metrics.log(row)
                    ending = stopping.solved or _limit_reached(config, counters)
                    progress.show(row, last=ending)
                    del rollout, weights, values  # there is never more than one
                    if time.perf_counter() - saved >= config.save_every and not ending:
                        _save(run_dir, config, policy, optimizer, critic, counters, stopping)
                        saved = time.perf_counter()
            wall_seconds = clock.without_evaluations()
            if stopping.evaluation is None:
                final = confirm(policy)
                metrics.draw({"eval/episodic_return": final.return_mean}, counters.env_steps)
            else:
                final = stopping.evaluation
        except Interrupted:
            _log.info("iteration %d was the last; see %s", counters.iteration, run_dir)
            raise
        finally:
            metrics.close()
            envs.close()
            # What an interrupted or failed iteration did is dropped: it can be done again.
            _save(run_dir, config, policy, optimizer, critic, counters, stopping)

    summary = {
        "env_id": config.env_id,
        "num_envs": config.num_envs,
        "num_steps": config.num_steps,
        "seed": config.seed,
        "device": str(device),
        "vectorization": vectorization,
        "recipe": config.recipe,
        "iterations": counters.iteration,
        "env_steps": counters.env_steps,
        "vector_steps": counters.vector_steps,
        "episodes": counters.episodes,
        "wall_seconds": wall_seconds,
        "compile_seconds": compilation.seconds,
        "steps_per_second": counters.env_steps / wall_seconds,
        "collect_seconds": clock.total["collect"],
        "returns_seconds": clock.total["returns"],
        "update_seconds": clock.total["update"],
        "best_return": stopping.best_return,
        "eval_return_mean": final.return_mean,
        "eval_return_std": final.return_std,
        "eval_episodes": len(final.returns),
        "target_return": target,
        "solved": None if target is None else stopping.solved,
        "solved_env_steps": counters.env_steps if stopping.solved else None,
        "solved_seconds": solved_seconds,
        "run_dir": _relative(run_dir),
    }
    write_json(run_dir / "summary.json", summary)
    verdict = "" if target is None else "solved: " if stopping.solved else "not solved: "
    _log.info(
        "%sgreedy return %.1f over %d episodes", verdict, final.return_mean, len(final.returns)
    )
    best = load_policy(run_dir, device)
    if config.capture_video:
        _film(config, best, run_dir / "videos" / "best.mp4")
    return TrainResult(best, run_dir, summary)


@contextmanager
def _before_the_first_step() -> Iterator[None]:
    """Whatever is wrong by now is a matter of settings."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, MemoryError, gymnasium.error.Error) as error:
        raise ConfigError(str(error)) from error


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make_networks(
    config: Config, envs: gymnasium.vector.VectorEnv[Any, Any, Any], device: torch.device
) -> tuple[Policy, Critic | None]:
    """Parameters drawn from the seed, without touching torch's own generator."""
    shape: dict[str, Any] = {
        "hidden_sizes": config.hidden_sizes,
        "activation": config.activation,
        "embedding_size": config.embedding_size,
        "normalize_obs": config.normalize_obs,
    }
    observations, actions = envs.single_observation_space, envs.single_action_space
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        policy = Policy(
            observations, actions, dropout=config.dropout, log_std=config.log_std, **shape
        ).to(device)
        critic = None
        if config.baseline == "value":
            value_function = ValueFunction(observations, **shape).to(device)
            critic = Critic(value_function, config.value_learning_rate)
    return policy, critic


def _prepare_kernels(envs: gymnasium.vector.VectorEnv[Any, Any, Any], policy: Policy) -> None:
    """Compile, or load, what the first iteration would wait for: it is no part of its time."""
    choose_collector(envs, policy).prepare(envs, policy)
    policy_cpu.prepare(policy)
    prepare_advantages(policy.device)
    if policy.device.type == "cpu":
        prepare_statistics()


def _limit_reached(config: Config, counters: Counters) -> bool:
    limits = (
        (config.total_timesteps, counters.env_steps),
        (config.total_episodes, counters.episodes),
        (config.total_iterations, counters.iteration),
    )
    return any(limit is not None and reached >= limit for limit, reached in limits)


def _row(
    counters: Counters,
    clock: Clock,
    stopping: Stopping,
    returns: torch.Tensor,
    lengths: torch.Tensor,
    stats: UpdateStats,
    value_loss: torch.Tensor | None,
    evaluation: EvalResult | None,
) -> dict[str, float | None]:
    """One line of metrics.jsonl. Reading the statistics is where the host waits for the device."""
    return {
        "iteration": counters.iteration,
        "env_steps": counters.env_steps,
        "episodes": counters.episodes,
        "charts/episodic_return": returns.mean().item(),
        "charts/best_return": stopping.best_return,
        "charts/episodic_length": lengths.to(torch.float64).mean().item(),
        "charts/SPS": counters.env_steps / clock.without_evaluations(),
        "eval/episodic_return": None if evaluation is None else evaluation.return_mean,
        "losses/policy_loss": stats.policy_loss.item(),
        "losses/value_loss": None if value_loss is None else value_loss.item(),
        "losses/entropy": stats.entropy.item(),
        "losses/grad_norm": stats.grad_norm.item(),
        **{f"perf/{phase}_s": spent for phase, spent in clock.last.items()},
    }


def _save(
    run_dir: Path,
    config: Config,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    critic: Critic | None,
    counters: Counters,
    stopping: Stopping,
) -> None:
    """Write `last` and `best`. Until the return window is full, the newest policy is the best."""
    last = {
        "config": to_dict(config),
        "counters": asdict(counters),
        "policy": checkpoint.policy_state(policy),
        "optimizer": optimizer.state_dict(),
        "critic": None if critic is None else critic.state_dict(),
    }
    best = {
        "config": to_dict(config),
        "policy": checkpoint.policy_state(policy, stopping.best_parameters),
    }
    checkpoint.save(run_dir / "checkpoints" / "last.pt", last)
    checkpoint.save(run_dir / "checkpoints" / "best.pt", best)


def _film(config: Config, policy: Policy, path: Path) -> None:
    """Record an episode. A run that came to its end is not lost for want of a film."""
    path.parent.mkdir()
    try:
        video.record(
            policy,
            config.env_id,
            path,
            env_kwargs=config.env_kwargs,
            max_episode_steps=config.max_episode_steps,
            seed=config.seed,
        )
    except (ValueError, OSError, EnvironmentFailure) as error:
        _log.warning("no film: %s", error)


def _relative(run_dir: Path) -> str:
    """Relative to where the command ran, if below it."""
    resolved, here = run_dir.resolve(), Path.cwd()
    return str(resolved.relative_to(here) if resolved.is_relative_to(here) else resolved)

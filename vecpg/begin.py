"""What a run settles before its first step: what is wrong by then is a matter of settings."""

import contextlib
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from vecpg import fused, memory
from vecpg.adam import Adam
from vecpg.advantage import prepare_advantages
from vecpg.config import Config, ConfigError
from vecpg.device import resolve_device
from vecpg.distributed import Ranks, RanksLost
from vecpg.envs import find_spec, make_envs, resolve_vectorization
from vecpg.evaluate import make_judge, prepare_evaluation
from vecpg.kernels import threads
from vecpg.kernels.announce import once, whose
from vecpg.kernels.jit import Compilation
from vecpg.look import video
from vecpg.machine import hardware, versions
from vecpg.policy import Policy
from vecpg.policy.network import drawn_from
from vecpg.rollout import Collector, choose_collector, stepping
from vecpg.rollout.statistics import prepare_statistics
from vecpg.run import files
from vecpg.run.files import Files, Source
from vecpg.run.state import TrainState
from vecpg.run.stopping import Stopping
from vecpg.update import Learner, choose_learner
from vecpg.value import Critic, ValueFunction

_log = logging.getLogger(__name__)
# Of an image game of 10 x 10 pixels 5 of 5 seeds were solved at 1e-3, and 1 of 5 at 1.2e-2.
_MOST_OF_CONVOLUTIONS = 5e-3
# Before so many copies are made, one is, to see whether the spaces of all of them will fit.
_MANY_ENVS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What is settled of a run before it has a directory.

    own: the settings of this rank's part of it; without other ranks, of all of it.
    judge: what evaluation steps; None on all ranks but the first, which evaluates.
    why_step_by_step: why its iterations go by collector and learner, and not as a whole; None: they
        do.
    state: nothing of it has changed.
    """

    own: Config
    spec: EnvSpec
    vectorization: str
    device: torch.device
    envs: VectorEnv[Any, Any, Any]
    judge: VectorEnv[Any, Any, Any] | None
    collector: Collector
    learner: Learner
    why_step_by_step: str | None
    compilation: Compilation
    state: TrainState


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Settled):
    """What is settled before the first step, and the state, which is not.

    here:    the working directory; an environment may go elsewhere.
    ranks:   those of the run.
    closing: saves it, then closes what it has open; what fails keeps no other from being done.
    """

    here: Path
    ranks: Ranks
    files: Files
    closing: ExitStack


def begin(config: Config, ranks: Ranks | None = None) -> Run:
    """Settle, make and check everything; what is wrong by now is a matter of settings.

    Raises:
        ConfigError: whatever it is. What was made is closed, and nothing was written.
        RanksLost: another rank failed or did not answer.
    """
    ranks = ranks or Ranks()
    with _refusing(), ExitStack() as unless_all_is_well:
        here = Path.cwd()
        source: Source | None = None
        run_files: Files | None = None

        @_refusing()
        def look_up() -> dict[str, Any] | None:
            nonlocal source
            source = files.find_source(config)
            if source is None:
                return None
            unless_all_is_well.callback(source.lock.close)
            return dict(source.checkpoint.manifest["resolved"])

        before = ranks.told(look_up)
        own = ranks.part_of(config, before)
        found: dict[str, Any] = {}
        with ranks.alike(found), _refusing():
            settled = _settle(config, own, before, unless_all_is_well, ranks)
            environment = files.environment(settled.spec, settled.envs)
            found |= {
                "the environment": environment,
                "the vectorization": settled.vectorization,
                "the device": settled.device.type,
            }

        @_refusing()
        def open_files() -> Path:
            nonlocal run_files
            about = {
                "config": files.settings(config),
                "resolved": {
                    "vectorization": settled.vectorization,
                    "device": str(settled.device),
                    "shards": ranks.shards_of(config, before),
                    "target": settled.state.stopping.target,
                },
                "versions": versions(),
                "machine": hardware(),
                "environment": environment,
            }
            if source is None:
                run_files = files.begin(config, about, settled.state)
            else:
                run_files = files.go_on(config, about, settled.state, source)
            ranks.remember(str(run_files.run_dir))
            return run_files.run_dir

        run_dir = ranks.told(open_files)
        ranks.share(settled.state)
        run_files = run_files or files.elsewhere(run_dir, settled.state.counters.iteration)
        unless_all_is_well.pop_all()
    closing = ExitStack()
    closing.callback(_close, settled.envs)
    if settled.judge is not None:
        closing.callback(_close, settled.judge)
    closing.callback(run_files.metrics.close)
    closing.callback(run_files.saver.save, settled.state)
    rest = {each.name: getattr(settled, each.name) for each in fields(settled)}
    return Run(here=here, ranks=ranks, files=run_files, closing=closing, **rest)


def check(config: Config) -> None:
    """Raise what `begin` would of a new run, as far as that can be seen without a directory."""
    with _refusing(), ExitStack() as made:
        _settle(config, config, None, made, Ranks())


def _close(envs: VectorEnv[Any, Any, Any]) -> None:
    """What an environment does when it is closed is no longer the run's."""
    try:
        envs.close()
    except (Exception, SystemExit, GeneratorExit) as error:
        words = f"closing the environments failed: {type(error).__name__}: {error}"
        _log.warning("%s%s", whose(), words)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Whatever goes wrong before the first step is a matter of settings; but not a lost rank."""
    try:
        yield
    except (ConfigError, RanksLost):
        raise
    except (ValueError, OSError, RuntimeError, MemoryError, gymnasium.error.Error) as error:
        words = memory.explained(error, "begin") if memory.ran_out(error) else str(error)
        raise ConfigError(words) from error


def _settle(
    config: Config,
    own: Config,
    before: dict[str, Any] | None,
    made: ExitStack,
    ranks: Ranks,
) -> Settled:
    """What is said of it is said once for runs of equal settings.

    Args:
        config: of the run.
        own: of this rank's part.
        before: what was resolved when the run began; None where it begins now.
        made: gets what closes what was made.
        ranks: of the run.
    """
    spec = find_spec(config.env_id)
    vectorization, device, reason = _resolve(config, spec, before, ranks.size)
    _check_room(own, vectorization, device)
    envs = make_envs(
        config.env_id,
        own.num_envs,
        vectorization=vectorization,
        device=str(device),
        **_copies(config),
    )
    made.callback(envs.close)
    _check_room(own, vectorization, device, envs)
    if config.capture_video:
        video.check_filming(
            config.env_id,
            env_kwargs=config.env_kwargs,
            max_episode_steps=config.max_episode_steps,
            wrappers=config.wrappers,
        )
    policy, critic = _make_networks(config, envs, device)
    once(_log, f"{spec.id} x {config.num_envs}, {vectorization}, on {device} ({reason})")
    if ranks.size > 1:
        once(_log, f"{config.num_envs} envs = {ranks.size} ranks x {own.num_envs}")
    collector = choose_collector(
        envs,
        policy,
        action_masks=config.action_masks,
        activation_memory=config.activation_memory * 1_000_000,
    )
    learner = choose_learner(policy, action_masks=config.action_masks)
    if threads.torch_has_one() and (wanted := torch_threads(config, learner)) > 1:
        raise ConfigError(
            "--threads: expected 1 in a process made by fork, whose parent keeps torch's"
            f' threads, got {wanted}; start it by multiprocessing.get_context("spawn")'
        )
    if device.type == "cpu":  # elsewhere it is said once it is known what graphs can hold
        once(_log, f"collecting: {collector}")
    why_step_by_step = fused.why_not(own, envs, policy)
    if ranks.size > 1:
        why_step_by_step = f"it is split over {ranks.size} ranks"
    if why_step_by_step is not None:
        once(_log, f"gradient: {learner}")
    if config.baseline == "leave_one_out" and config.num_envs == 1:
        once(_log, "baseline leave_one_out: with one environment it equals none")
    if policy.encoder.network == "cnn" and config.learning_rate > _MOST_OF_CONVOLUTIONS:
        once(
            _log,
            "network cnn: convolutions seldom learn at --learning-rate"
            f" {config.learning_rate:g}; try 1e-3",
        )
    compilation = Compilation()
    with compilation:
        # What the first iteration would wait for is no part of its time.
        if why_step_by_step is None:
            stepping.prepare()  # evaluation steps
        else:
            if device.type == "cpu":
                window = config.num_steps, own.resolved_shards
                collector = collector.prepare(envs, policy, *window)
            else:  # again once it is known who acts
                collector.prepare(envs, policy)
            learner.prepare(policy)
            limit = config.max_episode_steps or spec.max_episode_steps or 1
            ranks.sums_on(device, config.baseline, limit)
            prepare_advantages(device, own, 2 * config.num_steps + limit)
            prepare_statistics(device)
        if ranks.first and not config.action_masks:  # what masks them is in torch
            prepare_evaluation(policy)
    judge = None
    if ranks.first:
        judge = make_judge(
            policy,
            config.env_id,
            config.eval_episodes,
            vectorization=vectorization,
            num_envs=config.num_envs,
            **_copies(config),
        )
        made.callback(judge.close)
    target = config.target_return
    target = _threshold_of(spec) if target == "auto" else target
    stopping = Stopping(target, config.return_window)
    optimizer = Adam(policy.parameters(), config.learning_rate)
    return Settled(
        own=own,
        spec=spec,
        vectorization=vectorization,
        device=device,
        envs=envs,
        judge=judge,
        collector=collector,
        learner=learner,
        why_step_by_step=why_step_by_step,
        compilation=compilation,
        state=TrainState(policy, optimizer, critic, stopping),
    )


def _copies(config: Config) -> dict[str, Any]:
    """What every copy of the environment is made with, in training and in evaluation."""
    return {
        "env_kwargs": config.env_kwargs,
        "max_episode_steps": config.max_episode_steps,
        "wrappers": config.wrappers,
        "step_timeout": config.step_timeout,
        "action_masks": config.action_masks,
        "envs_per_worker": config.in_each_worker,
    }


def _resolve(
    config: Config, spec: EnvSpec, before: dict[str, Any] | None, ranks: int
) -> tuple[str, torch.device, str]:
    """How the copies are stepped, on which device, and why there."""
    # What may be split is stepped, also by one rank, as more of them could.
    parts = max(ranks, config.resolved_shards) if config.vectorization == "auto" else ranks
    # "auto" goes on to mean what it meant.
    vectorization = resolve_vectorization(
        spec,
        config.vectorization if before is None else before["vectorization"],
        config.env_kwargs,
        max_episode_steps=config.max_episode_steps,
        wrappers=config.wrappers,
        action_masks=config.action_masks,
        ranks=parts,
    )
    if before is None:
        return vectorization, *resolve_device(config.device, vectorization, config.num_envs)
    there = before["device"] == "cpu" or torch.cuda.is_available()
    if config.device == "auto" and there:
        # Each rank has its own; which one was rank 0's says nothing of the others.
        kind = before["device"] if ranks == 1 else before["device"].partition(":")[0]
        return vectorization, resolve_device(kind)[0], "as before"
    return vectorization, *resolve_device(config.device, vectorization, config.num_envs)


def _check_room(
    config: Config,
    vectorization: str,
    device: torch.device,
    envs: VectorEnv[Any, Any, Any] | None = None,
) -> None:
    """Refuse what needs more memory than there is, before it is made where that can be known."""
    have = memory.there_is()
    if device.type == "cuda":
        have += torch.cuda.mem_get_info(device)[1]
    known = [] if envs is None else [envs.single_observation_space, envs.single_action_space]
    memory.check_room(config, vectorization, *known, have=have)
    if envs is None and config.num_envs >= _MANY_ENVS:
        one = make_envs(
            config.env_id,
            1,
            vectorization=vectorization,
            **_copies(config),
        )
        with contextlib.closing(one):
            _check_room(config, vectorization, device, one)


def _make_networks(
    config: Config, envs: gymnasium.vector.VectorEnv[Any, Any, Any], device: torch.device
) -> tuple[Policy, Critic | None]:
    """Parameters drawn from the seed, without touching torch's own generator."""
    shape: dict[str, Any] = {
        "hidden_sizes": config.hidden_sizes,
        "activation": config.activation,
        "embedding_size": config.embedding_size,
        "normalize_obs": config.normalize_obs,
        "network": config.network,
    }
    observations, actions = envs.single_observation_space, envs.single_action_space
    with drawn_from(config.seed):
        policy = Policy(
            observations, actions, dropout=config.dropout, log_std=config.log_std, **shape
        ).to(device)
        critic = None
        if config.baseline == "value":
            value_function = ValueFunction(observations, **shape).to(device)
            critic = Critic(value_function, config.value_learning_rate)
    return policy, critic


def _threshold_of(spec: EnvSpec) -> float | None:
    """The mean return that solves an environment, as it is registered."""
    found: Any = spec.reward_threshold
    if found is None:
        return None
    try:
        if not isinstance(found, str | bytes) and math.isfinite(number := float(found)):
            return number
    except (TypeError, ValueError):  # it is no number, and named below
        pass
    raise ConfigError(
        f"--target-return auto: expected the reward_threshold of {spec.id} to be a finite number or"
        f" None, got {found!r}; register it as one, or give --target-return"
    )


def relative(run_dir: Path, here: Path) -> str:
    """Relative to where the command ran, if below it."""
    resolved = run_dir.resolve()
    return str(resolved.relative_to(here) if resolved.is_relative_to(here) else resolved)


def torch_threads(config: Config, learner: Learner) -> int:
    """On how many torch computes: only autograd gains by more than one."""
    if learner.backend == "cpu" and config.baseline != "value":
        return 1
    return config.threads or 1

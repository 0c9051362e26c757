"""The story: a run from its settings to its summary. Read this first, top to bottom."""

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from vecpg import memory
from vecpg.advantage import advantages_of, weigh
from vecpg.begin import Run, begin, relative, torch_threads
from vecpg.config import Config, ConfigError
from vecpg.distributed import Ranks, joined
from vecpg.envs import EnvironmentFailure
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.evaluate import EvalResult, evaluate_in
from vecpg.fused import Fused
from vecpg.fused.lanes import Lane
from vecpg.kernels import threads
from vecpg.kernels.announce import anew, once, whose
from vecpg.kernels.cores import cores
from vecpg.look import video
from vecpg.noise import Purpose
from vecpg.policy import Policy
from vecpg.rollout import Rollout, collect
from vecpg.rollout.statistics import Tally
from vecpg.run import files
from vecpg.run.checkpoint import load_policy
from vecpg.run.clock import Clock, per_second
from vecpg.run.directory import write_json
from vecpg.run.interrupts import Interrupts, Told
from vecpg.run.outcomes import Outcome, Outcomes, Row
from vecpg.run.progress import Progress, Share
from vecpg.run.resume import find_run, read_json, resume_command
from vecpg.run.ring import RingOutcomes
from vecpg.run.state import Counters, TrainState
from vecpg.run.stopping import parameters
from vecpg.update import UpdateStats, update
from vecpg.value import FitStats, fit, predict

OnIteration = Callable[[dict[str, float | None], Policy], bool | None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves: its best policy, its directory, and the numbers of summary.json."""

    policy: Policy
    run_dir: Path
    summary: dict[str, Any]


class Ending(NamedTuple):
    """What a run came to: the evaluation of its last policy, or the one that confirmed it."""

    evaluation: EvalResult
    wall_seconds: float
    compile_seconds: float


@anew()
@threads.torch_using(1)
@torch.inference_mode(False)
@torch.enable_grad()
def train(config: Config, on_iteration: OnIteration | None = None) -> TrainResult:
    """Train a policy with REINFORCE, and leave a run directory behind.

    Under torchrun the environments are split over its ranks, each of which calls this with the same
    settings. Rank 0 alone writes and evaluates; what is returned is the same on all. After a
    restart they go on where they were. See `docs/distributed.md`.

    An iteration computes what follows from the state in a draft of it, and commits it at its end:
    whatever fails or interrupts it before, what is saved is the state of the last commit. Nothing
    depends on torch's default dtype, or on whether gradients are on where this is called.

    Args:
        config: every setting.
        on_iteration: called as `on_iteration(row, policy)` after each commit: the line of
            metrics.jsonl and the policy that will act next, both copies of the caller's own. Where
            it returns False the run ends there, solved or not by its own rule; any other answer
            goes on. What it raises ends the run, saved. Its time counts as the run's.

    Returns:
        the best policy, the run directory, and the summary.

    Raises:
        ConfigError: something that can be known before the first environment step.
        EnvironmentFailure: an environment raised or returned a number that is not finite.
        FloatingPointError: loss, entropy, gradient, an action, or a parameter after a step are not
            finite; of environments on tensors on a GPU an observation or a reward.
        MemoryError: there was no more memory.
        RanksLost: under torchrun, another rank failed or did not answer.
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint was written.
        OSError: a file of the run could not be written.

    Example:
        >>> import tempfile
        >>> out_dir = tempfile.mkdtemp()
        >>> result = train(Config(num_envs=8, total_iterations=2, out_dir=out_dir, progress=False))
        >>> result.summary["iterations"]
        2
        >>> config = Config(num_envs=8, out_dir=out_dir, progress=False)
        >>> result = train(config, lambda row, policy: row["iteration"] < 3)
        >>> result.summary["iterations"], result.summary["solved"]
        (3, False)
    """
    with joined(config) as ranks:
        return _train(ranks.resumed(config), ranks, on_iteration)


def _train(config: Config, ranks: Ranks, on_iteration: OnIteration | None) -> TrainResult:
    if (finished := ranks.told(lambda: finished_run(config))) is not None:
        _log.info(
            "already at its end, after %s iterations, %s steps and %s episodes; to go on, raise %s",
            *(f"{finished.summary[name]:,}" for name in ("iterations", "env_steps", "episodes")),
            "--target-return, which it reached"
            if finished.summary["solved"]
            else "--total-timesteps, or what else ended it",
        )
        return finished
    run = begin(config, ranks)
    _log.info("run directory: %s", relative(run.files.run_dir, run.here))

    def save() -> None:
        _log.info("saved: %s", save_as_asked(run))

    try:
        with (
            threads.using(config.threads or cores()),
            Interrupts(save) as interrupts,
            Progress(config, shown=ranks.first) as progress,
        ):
            ending = advance(config, run, interrupts, progress, on_iteration)
    except BaseException:
        run.closing.close()  # what a signal just before has kept from being done
        run.files.lock.close()
        command = resume_command(relative(run.files.run_dir, run.here), config)
        _log.info("saved after iteration %d; resume: %s", run.files.saver.iteration, command)
        raise
    result = conclude(config, run, ending)
    verdict = {None: "", True: "solved: ", False: "not solved: "}[result.summary["solved"]]
    _log.info(
        "%sgreedy return %.1f over %d episodes",
        verdict,
        ending.evaluation.return_mean,
        len(ending.evaluation.returns),
    )
    if ranks.first:
        film_if_asked(config, result)
    return result


def save_as_asked(run: Run) -> Path:
    """Write a checkpoint of the last commit, and have the next one be saved where it is computed.

    A GPU may be iterations ahead of the state.
    """
    folder = run.files.saver.save(run.state)
    if run.device.type != "cpu":
        run.files.saver.save_again()
    return folder


def advance(
    config: Config,
    run: Run,
    interrupts: Interrupts | Told,
    progress: Progress | Share,
    on_iteration: OnIteration | None = None,
    ring: Fused | Lane | None = None,
) -> Ending:
    """Iterate until the run is at its end; however that comes, the run is saved and closed.

    Args:
        config: of the run.
        run: as `begin` left it.
        interrupts: what reaches it.
        progress: what it is shown by.
        on_iteration: as `train`.
        ring: what computes its iterations together with those of others; None: it goes alone.

    Raises:
        as `train`.
    """
    with _running(config, run, interrupts) as clock:
        ring = ring or _fused(config, run)
        with run.ranks.together():
            if ring is None:
                _step_by_step(config, run, clock, interrupts, progress, on_iteration)
            else:
                _as_a_whole(config, run, clock, interrupts, progress, on_iteration, ring)
        final, wall_seconds = run.state.stopping.evaluation, clock.without_evaluations()
        if final is None:
            with run.ranks.together(), clock.evaluation():
                final = _evaluation(config, run, run.state.policy, run.state.counters.iteration)
            points = {"eval/episodic_return": final.return_mean}
            run.files.metrics.draw(points, run.state.counters.env_steps)

    return Ending(final, wall_seconds, clock.compile_seconds)


def _step_by_step(
    config: Config,
    run: Run,
    clock: Clock,
    interrupts: Interrupts | Told,
    progress: Progress | Share,
    on_iteration: OnIteration | None,
) -> None:
    """Iterate until the run is at its end."""
    own, ranks, envs = run.own, run.ranks, run.envs
    state, draft = run.state, run.state.draft()
    judge = partial(_evaluation, config, run) if config.confirm else None
    outcomes = Outcomes(state, draft, clock, run.files.metrics, judge)
    run.closing.callback(outcomes.settle)
    on_host = run.device.type == "cpu"
    # Where nobody decides by what an iteration came to, the host need not wait for a GPU. Ranks are
    # told in each whether to go on.
    undecided = state.stopping.target is None and on_iteration is None
    ahead = not on_host and undecided and ranks.size == 1
    acting = draft.policy if ahead else state.policy
    collector = run.collector
    if not on_host:
        collector = collector.prepare(envs, acting, config.num_steps, own.resolved_shards)
        once(_log, f"collecting: {collector}")
        once(_log, f"iterations: step by step: {run.why_step_by_step}")
    ending = _is_over(config, state.counters, state.stopping.solved)
    while not ending:
        with clock.phase("collect"):  # N environments, whole episodes, (T, N)
            rollout = collect(
                envs,
                acting,
                num_steps=config.num_steps,
                seed=config.seed,
                iteration=draft.counters.iteration,
                first_env=ranks.first_env,
                shards=own.resolved_shards,
                backend=collector,
                wait=on_host,
            )
        acted = parameters(acting) if ahead else None
        with interrupts.held(), ranks.summing():
            with clock.phase("returns"):  # weights minus baseline, (T, N)
                values, final_values = predict(draft.critic, rollout, own.resolved_shards)
                weighed = weigh(rollout, own, values, final_values)
                tally, whole = ranks.tally(rollout, weighed.sums)
                weights = advantages_of(weighed, own, rollout, tally.sums, whole.combine)
            _count(config, draft, tally)
            with clock.phase("update"):  # one batched gradient step
                stats = update(
                    draft.policy,
                    draft.optimizer,
                    rollout,
                    weights,
                    own,
                    backend=run.learner,
                    whole=whole,
                    wait=on_host,
                )
                fitted = fit(
                    draft.critic,
                    rollout,
                    final_values,
                    own,
                    whole=whole,
                    observed=stats.observed,
                    wait=on_host,
                )
            outcomes.add(_outcome(draft, rollout, tally, stats, fitted, clock, acted))
        del rollout, weighed, weights, values  # there is never more than one
        ending = _is_over(config, draft.counters, False)
        due = progress.is_due() or run.files.saver.is_due() or outcomes.full
        if ahead and not ending and not due:
            continue
        row = outcomes.commit(interrupts)
        # Signals reach it: it may take its time, and the iteration is committed.
        stopped = on_iteration is not None and not _goes_on(on_iteration, state, row)
        ending = stopped or ending or state.stopping.solved
        with interrupts.held():
            progress.show(row, last=ending)
            if not ending:
                run.files.saver.save_if_due(state)


def _as_a_whole(
    config: Config,
    run: Run,
    clock: Clock,
    interrupts: Interrupts | Told,
    progress: Progress | Share,
    on_iteration: OnIteration | None,
    ring: Fused | Lane,
) -> None:
    """The same, where all that an iteration does is one CUDA graph, and is committed later."""
    state, most = run.state, config.total_iterations
    outcomes = RingOutcomes(
        state,
        clock,
        run.files,
        partial(_evaluation, config, run) if config.confirm else None,
        ring=ring,
        num_envs=config.num_envs,
        is_over=partial(_is_over, config),
        surely_more=partial(_surely_more, config, run),
        most=None if most is None else most - state.counters.iteration,
        goes_on=None if on_iteration is None else partial(_goes_on, on_iteration, state),
    )
    run.closing.callback(outcomes.settle)
    clock.start()
    while not outcomes.ended:
        ring.iterate()
        outcomes.catch_up(interrupts, progress, full=not ring.room)
        ring.release(outcomes.committed - 1)


def _surely_more(config: Config, run: Run, counters: Counters) -> int:
    """How many further iterations reach no limit of steps or episodes, however they go."""
    longest = config.num_steps - 1 + run.envs.max_episode_steps  # type: ignore[attr-defined]
    limits = (
        (config.total_timesteps, counters.env_steps, longest * config.num_envs),
        (config.total_episodes, counters.episodes, config.num_steps * config.num_envs),
    )
    left = [(limit - so_far - 1) // most for limit, so_far, most in limits if limit is not None]
    return min(left, default=sys.maxsize)


def _fused(config: Config, run: Run) -> Fused | None:
    """What makes whole iterations on a GPU, where the run is one that it can."""
    if run.why_step_by_step is not None:
        return None
    state = run.state
    ring = Fused([run.own], cast(TensorVectorEnv, run.envs), state.policy)
    ring.load(0, state.policy, state.optimizer, state.counters.iteration)
    once(_log, f"iterations: {ring}")
    return ring


def conclude(config: Config, run: Run, ending: Ending) -> TrainResult:
    """Write the summary, and with it the run is finished."""
    run_dir = run.files.run_dir

    def finish() -> dict[str, Any]:
        summary = _summary(config, run, ending)
        write_json(run_dir / "summary.json", summary)
        return summary

    with run.files.lock:  # until it is finished, nobody else goes on with it
        summary = run.ranks.told(finish)
    return TrainResult(run.state.best_policy(), run_dir, summary)


def film_if_asked(config: Config, result: TrainResult) -> None:
    """Record an episode. A run that came to its end is not lost for want of a film."""
    if not config.capture_video:
        return
    path = result.run_dir / "videos" / "best.mp4"
    path.parent.mkdir(exist_ok=True)
    try:
        video.record(
            result.policy,
            config.env_id,
            path,
            env_kwargs=config.env_kwargs,
            max_episode_steps=config.max_episode_steps,
            wrappers=config.wrappers,
            seed=config.seed,
            action_masks=config.action_masks,
        )
    except (ValueError, OSError, EnvironmentFailure, FloatingPointError) as error:
        _log.warning("%sno film: %s", whose(), error)


def finished_run(config: Config) -> TrainResult | None:
    """What a run left that is asked to go on, and has come to its end; else None."""
    run_dir = None if config.resume == "auto" else find_run(config)
    if run_dir is None or not (run_dir / "summary.json").exists():
        return None
    try:
        files.check_links(run_dir)
        found, stored = files.agreed(config, run_dir)
        counters = Counters(**found.manifest["counters"])
        solved = found.manifest["solved"]
        summary = read_json(run_dir / "summary.json") | {"run_dir": relative(run_dir, Path.cwd())}
        as_it_was = config.target_return == stored.target_return
        of_this = (counters.iteration, counters.env_steps, counters.episodes) == tuple(
            map(summary.get, ("iterations", "env_steps", "episodes"))
        )
        if not (as_it_was and of_this and _is_over(config, counters, solved)):
            return None
        best = load_policy(run_dir, network=config.network)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    return TrainResult(best, run_dir, summary)


@contextmanager
def _running(config: Config, run: Run, interrupts: Interrupts | Told) -> Iterator[Clock]:
    """The time and torch's threads of a run; at its end, however it ends, it is saved."""
    with (
        threads.torch_using(torch_threads(config, run.learner)),
        run.compilation as compilation,
    ):
        clock = Clock(run.device, compilation, run.state.seconds)
        try:
            with memory.named(lambda: clock.phase_now):
                yield clock
        finally:
            with interrupts.held():
                run.closing.close()


def _evaluation(config: Config, run: Run, policy: Policy, iteration: int) -> EvalResult:
    """The greedy evaluation of an iteration's policy; no two iterations play the same episodes."""
    return run.ranks.told(
        lambda: evaluate_in(
            cast(VectorEnv, run.judge),
            policy,
            config.eval_episodes,
            seed=config.seed,
            purpose=Purpose.CONFIRMATION_RESET,
            draw=iteration,
            action_masks=config.action_masks,
        )
    )


def _is_over(config: Config, counters: Counters, solved: bool) -> bool:
    limits = (
        (config.total_timesteps, counters.env_steps),
        (config.total_episodes, counters.episodes),
        (config.total_iterations, counters.iteration),
    )
    reached = any(limit is not None and so_far >= limit for limit, so_far in limits)
    return solved or reached


def _goes_on(on_iteration: OnIteration, state: TrainState, row: Row) -> bool:
    """Whether a run is to go on after an iteration that is committed, by who looks at each.

    It is not after False, also NumPy's; but after 0 or None, which many a function returns that
    means nothing by it.
    """
    answer: Any = on_iteration(dict(row), copy.deepcopy(state.policy))
    return not isinstance(answer, bool | np.bool_) or bool(answer)


def _count(config: Config, draft: TrainState, tally: Tally) -> None:
    draft.counters.iteration += 1
    draft.counters.env_steps += tally.counted
    draft.counters.vector_steps += tally.rows * config.num_envs
    draft.counters.episodes += tally.episodes


def _outcome(
    draft: TrainState,
    rollout: Rollout,
    tally: Tally,
    stats: UpdateStats,
    fitted: FitStats | None,
    clock: Clock,
    acted: dict[str, torch.Tensor] | None,
) -> Outcome:
    checks = {
        "observations, rewards and actions": rollout.finite,
        "the loss, its gradient and the parameters": stats.finite,
        "V and its parameters": None if fitted is None else fitted.finite,
    }
    return Outcome(
        replace(draft.counters),
        tally.episodes,
        (tally.return_sum, tally.return_low, tally.return_high),
        tally.length,
        (
            stats.policy_loss,
            None if fitted is None else fitted.value_loss,
            stats.entropy,
            stats.grad_norm,
        ),
        {name: finite for name, finite in checks.items() if finite is not None},
        clock.lap(),
        acted,
    )


def _summary(config: Config, run: Run, ending: Ending) -> dict[str, Any]:
    """The line that goes to stdout, and summary.json."""
    final, wall_seconds, compile_seconds = ending
    counters, stopping, seconds = run.state.counters, run.state.stopping, run.state.seconds
    return {
        "env_id": config.env_id,
        "num_envs": config.num_envs,
        "num_steps": config.num_steps,
        "seed": config.seed,
        "shards": run.ranks.shards,
        "device": str(run.device),
        "vectorization": run.vectorization,
        "recipe": config.recipe,
        "iterations": counters.iteration,
        "env_steps": counters.env_steps,
        "vector_steps": counters.vector_steps,
        "episodes": counters.episodes,
        "wall_seconds": wall_seconds,
        "compile_seconds": compile_seconds,
        "steps_per_second": per_second(counters.env_steps, wall_seconds),
        "collect_seconds": seconds.get("collect", 0.0),
        "returns_seconds": seconds.get("returns", 0.0),
        "update_seconds": seconds.get("update", 0.0),
        "best_return": stopping.best_return,
        "eval_return_mean": final.return_mean,
        "eval_return_std": final.return_std,
        "eval_episodes": len(final.returns),
        "target_return": stopping.target,
        "solved": None if stopping.target is None else stopping.solved,
        "solved_env_steps": counters.env_steps if stopping.solved else None,
        "solved_seconds": seconds.get("solved") if stopping.solved else None,
        "run_dir": relative(run.files.run_dir, run.here),
    }

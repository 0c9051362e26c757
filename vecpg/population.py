"""Many runs in one process: seeds, and settings. Each is, bit for bit, what it would be alone."""

import logging
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import cast

import torch

from vecpg import fused, memory
from vecpg.begin import Run, begin, check, relative, torch_threads
from vecpg.config import Config, ConfigError
from vecpg.envs import EnvironmentFailure, EnvironmentNotMade
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.fused import Fused, lanes
from vecpg.fused.lanes import Lane
from vecpg.kernels import threads
from vecpg.kernels.announce import anew, of_run, once
from vecpg.kernels.cores import cores
from vecpg.run.interrupts import Interrupted, Interrupts, Told
from vecpg.run.progress import PopulationProgress, Share
from vecpg.run.resume import check_settings, find_run, read_config, resume_command
from vecpg.signals import speaks
from vecpg.train import TrainResult, advance, conclude, film_if_asked, finished_run, save_as_asked

# Failures whose message says all that there is to say.
_NAMED = (EnvironmentFailure, EnvironmentNotMade, FloatingPointError, MemoryError, OSError)

OnResult = Callable[[int, TrainResult], None]
OnBegun = Callable[[], None]

_log = logging.getLogger(__name__)


class RunsFailed(RuntimeError):
    """Some of many runs failed; the others came to their end.

    results:  of every run, in the order of the configurations; None where it failed.
    failures: what it raised, by its place in that order.
    """

    def __init__(
        self,
        names: Sequence[str],
        results: list[TrainResult | None],
        failures: dict[int, Exception],
    ) -> None:
        which = ", ".join(names[place] for place in sorted(failures))
        super().__init__(f"{len(failures)} of {len(results)} runs failed: {which}")
        self.results, self.failures = results, failures


@anew()
@threads.torch_using(1)
@torch.inference_mode(False)
@torch.enable_grad()
def train_many(
    configs: Sequence[Config],
    on_result: OnResult | None = None,
    on_begun: OnBegun | None = None,
) -> list[TrainResult]:
    """Train every configuration, and leave a run directory of each behind, as `train` does.

    Parameters, optimizer, metrics.jsonl without the clock, and every count of a run are those of
    `train(config)`. Runs that are collected and learned in machine code go on side by side, one to
    a core, from the first to the last. On a GPU those that follow each other, whose iterations are
    made as a whole, and that have the same shape, have them made together, as many as there is
    memory for. The others take turns, one after the other. Under torchrun too, all of them are
    trained in this process: which rank has which runs is the caller's to say.

    Args:
        configs: one for each run. A run that is to go on has its `resume`; one that has come to
            its end is not trained again. `progress` and `log_every` of the first say how all of
            them are shown.
        on_result: called as `on_result(place, result)` as each run ends, in this thread.
        on_begun: called as the first has begun: what is raised later is about single runs. It is
            not called where none had to.

    Returns:
        the results, in the order of the configurations.

    Raises:
        ConfigError: something that can be known before the first step of any.
        RunsFailed: some runs failed; each was saved, and the others were not kept from their end.
        Interrupted: as `train`. Every run was saved.

    Example:
        >>> import tempfile
        >>> out_dir = tempfile.mkdtemp()
        >>> two = [
        ...     Config(num_envs=8, seed=seed, total_iterations=2, out_dir=out_dir, progress=False)
        ...     for seed in (1, 2)
        ... ]
        >>> [result.summary["seed"] for result in train_many(two)]
        [1, 2]
    """
    configs = list(configs)
    if not configs:
        return []
    _check(configs)
    population = _Population(configs, on_result, on_begun)
    first = configs[0]
    with (
        Interrupts(population.ask_to_save) as interrupts,
        PopulationProgress(
            len(configs), first.progress, first.log_every, shown=speaks()
        ) as progress,
    ):
        population.train(interrupts, progress)
    results = [population.results.get(place) for place in range(len(configs))]
    if population.failures:
        raise RunsFailed(population.names, results, population.failures)
    return [result for result in results if result is not None]


def _check(configs: Sequence[Config]) -> None:
    """Refuse what cannot be begun, before anything is: of runs of equal settings one is tried."""
    for config in configs:
        if not isinstance(config, Config):
            raise TypeError(f"configs: expected a Config for each run, got {config!r}")
    # The first is begun before any other makes a step.
    tried = {_settings(configs[0])}
    for config in configs:
        if (run_dir := find_run(config)) is not None:
            check_settings(config, read_config(run_dir))
        elif (settings := _settings(config)) not in tried:
            tried.add(settings)
            check(config)


def _settings(config: Config) -> str:
    return repr(replace(config, seed=0, out_dir=".", exp_name="reinforce"))


def _names(configs: Sequence[Config]) -> list[str]:
    """What each run is called in messages."""
    seeds = [config.seed for config in configs]
    if len(set(seeds)) == len(seeds):
        return [f"seed {seed}" for seed in seeds]
    named = [f"{config.exp_name}, seed {config.seed}" for config in configs]
    if len(set(named)) == len(named):
        return named
    return [f"run {number} (seed {seed})" for number, seed in enumerate(seeds, start=1)]


def _kernel_threads(config: Config) -> int:
    return config.threads or cores()


class _Population:
    """The runs that are at work, and what the others came to.

    Runs are begun in the main thread, and what they come to is taken in there; in between each is
    in a thread of its own, or, where the kernels do not serve it, in the main thread too.
    """

    def __init__(
        self,
        configs: Sequence[Config],
        on_result: OnResult | None = None,
        on_begun: OnBegun | None = None,
    ) -> None:
        self.names = _names(configs)
        self.results: dict[int, TrainResult] = {}
        self.failures: dict[int, Exception] = {}
        self._configs, self._on_result, self._on_begun = configs, on_result, on_begun
        self._at_once = max(map(_kernel_threads, configs))
        self._one_was_begun = False
        # Begun, on a GPU, and of equal shape: their iterations will be made together.
        self._waiting: list[tuple[int, Run, Share]] = []
        self._at_work: dict[int, tuple[Told, threading.Thread]] = {}
        self._ended: SimpleQueue[tuple[int, TrainResult | BaseException]] = SimpleQueue()

    def ask_to_save(self) -> None:
        """Have every run saved."""
        for told, _ in list(self._at_work.values()):
            told.ask_to_save()

    def train(self, interrupts: Interrupts, progress: PopulationProgress) -> None:
        """Bring every run to its end; if that cannot be, have every one saved."""
        try:
            for place in range(len(self._configs)):
                with of_run(self.names[place]):
                    self._begin(place, interrupts, progress)
            self._go_together(interrupts, progress)
            while self._at_work:
                self._wait(progress)
        except BaseException as error:
            signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
            for told, _ in self._at_work.values():
                told.stop(signum)
            with ExitStack() as closing:  # however one of them fails
                for _, thread in self._at_work.values():
                    closing.callback(thread.join)
                # First: those at work may wait for these.
                for _, run, _ in self._waiting:
                    closing.callback(run.files.lock.close)
                    closing.callback(run.closing.close)
            raise

    def _begin(self, place: int, interrupts: Interrupts, progress: PopulationProgress) -> None:
        config = self._configs[place]
        try:
            result = finished_run(config)
            run = begin(config) if result is None else None
        except ConfigError as error:
            if not self._one_was_begun:
                raise
            _log.error("%s failed: %s", self.names[place], error)
            self._take_in(place, error, progress)
            return
        if run is None:
            self._take_in(place, result, progress)
            return
        with _closed_on_error(run):
            if not self._one_was_begun and self._on_begun is not None:
                self._on_begun()
        self._one_was_begun = True
        share = progress.share(place, run.state.counters.env_steps)
        if self._joins(config, run, interrupts, progress):
            self._waiting.append((place, run, share))
            return

        def save_all() -> None:
            self.ask_to_save()
            save_as_asked(run)

        if not _is_served(config, run):
            with Interrupts(save_all) as own:
                outcome = self._outcome(place, run, own, share)
            if isinstance(outcome, TrainResult):
                film_if_asked(config, outcome)
            self._take_in(place, outcome, progress)
            return
        with _closed_on_error(run):
            while len(self._at_work) >= self._at_once:
                self._wait(progress)
        self._start(place, run, interrupts, share)

    def _start(
        self,
        place: int,
        run: Run,
        interrupts: Interrupts,
        share: Share,
        lane: Lane | None = None,
    ) -> None:
        """Have a run go on in a thread of its own."""
        told = Told(partial(save_as_asked, run))
        thread = threading.Thread(
            target=lambda: self._ended.put((place, self._outcome(place, run, told, share, lane))),
            name=f"vecpg-run-{place}",
        )
        with interrupts.held():
            thread.start()
            self._at_work[place] = told, thread
            self._waiting = [each for each in self._waiting if each[0] != place]

    def _joins(
        self, config: Config, run: Run, interrupts: Interrupts, progress: PopulationProgress
    ) -> bool:
        """Whether a run's iterations will be made with others'; first those that wait may go."""
        if run.why_step_by_step is not None:
            return False
        waiting = [self._configs[place] for place, _, _ in self._waiting]
        if waiting:
            runs = len(waiting) + 1
            given = config, run.envs, run.state.policy
            reason = fused.why_not_together([*waiting, config])
            reason = reason or fused.why_not(*given, runs=runs)
            if reason is not None:
                once(_log, f"iterations: not of all runs at once: {reason}")
                self._go_together(interrupts, progress)
        return True

    def _go_together(self, interrupts: Interrupts, progress: PopulationProgress) -> None:
        """Bring those that wait to their end, side by side."""
        if not self._waiting:
            return
        try:
            own = self._lanes()
        except Exception as error:
            while self._waiting:
                place, run, _ = self._waiting.pop(0)
                self._failed(place, run, error)
                self._take_in(place, error, progress)
            return
        together = {place for place, _, _ in self._waiting}
        for (place, run, share), lane in zip(self._waiting, own, strict=True):
            self._start(place, run, interrupts, share, lane)
        while together & self._at_work.keys():
            self._wait(progress)

    def _lanes(self) -> list[Lane]:
        """Of those that wait each one's part in the iterations of all, which it leaves at its end.

        All of them know it before the first begins: who is ahead waits for the others.
        """
        _, first, _ = self._waiting[0]
        configs = [self._configs[place] for place, _, _ in self._waiting]
        with first.compilation, memory.named(lambda: "begin"):
            envs = cast(TensorVectorEnv, first.envs)
            ring = Fused(configs, envs, first.state.policy)
            for number, (_, run, _) in enumerate(self._waiting):
                state = run.state
                ring.load(number, state.policy, state.optimizer, state.counters.iteration)
        once(_log, f"iterations: {ring}")
        own = lanes.share(ring, len(configs))
        for lane, (_, run, _) in zip(own, self._waiting, strict=True):
            run.closing.callback(lane.leave)
        return own

    def _wait(self, progress: PopulationProgress) -> None:
        """Take in what the next of the runs at work comes to."""
        place, outcome = self._ended.get()
        self._at_work.pop(place)[1].join()
        if isinstance(outcome, TrainResult):
            film_if_asked(self._configs[place], outcome)
        self._take_in(place, outcome, progress)

    @threads.torch_using(1)
    @torch.inference_mode(False)
    @torch.enable_grad()
    def _outcome(
        self,
        place: int,
        run: Run,
        interrupts: Interrupts | Told,
        share: Share,
        lane: Lane | None = None,
    ) -> TrainResult | BaseException:
        """What a run comes to: its result, or what it raised."""
        config = self._configs[place]
        try:
            with of_run(self.names[place]), threads.using(lambda: self._threads_of(config)):
                return conclude(config, run, advance(config, run, interrupts, share, None, lane))
        except BaseException as error:
            self._failed(place, run, error)
            return error

    def _failed(self, place: int, run: Run, error: BaseException) -> None:
        """Close a run, and say why, unless it was stopped."""
        run.closing.close()
        run.files.lock.close()
        if isinstance(error, Exception):
            _log.error(
                "%s%s failed: %s: %s; saved after iteration %d; resume: %s",
                getattr(error, "trace", ""),
                self.names[place],
                type(error).__name__,
                error,
                run.files.saver.iteration,
                resume_command(relative(run.files.run_dir, run.here), self._configs[place]),
                exc_info=None if isinstance(error, _NAMED) else error,
            )

    def _threads_of(self, config: Config) -> int:
        """How many threads the kernels of a run have: towards the end there are more for each."""
        left = len(self._configs) - len(self.results) - len(self.failures)
        return max(1, min(_kernel_threads(config), self._at_once // max(1, left)))

    def _take_in(
        self, place: int, outcome: TrainResult | BaseException | None, progress: PopulationProgress
    ) -> None:
        if isinstance(outcome, TrainResult):
            self.results[place] = outcome
        elif isinstance(outcome, Exception):
            _let_go(outcome)
            self.failures[place] = outcome
        elif outcome is not None:
            raise outcome
        solved = place in self.results and bool(self.results[place].summary["solved"])
        progress.ended(solved)
        if place in self.results and self._on_result is not None:
            self._on_result(place, self.results[place])


@contextmanager
def _closed_on_error(run: Run) -> Iterator[None]:
    """Save and close a run that is not at work yet, whatever is raised inside."""
    try:
        yield
    except BaseException:
        run.closing.close()
        run.files.lock.close()
        raise


def _let_go(error: BaseException) -> None:
    """Keep where an error came from, and not the variables there: a whole rollout is among them."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__


def _is_served(config: Config, run: Run) -> bool:
    """Whether a run spends its time in kernels, which let other threads go on."""
    in_kernels = run.collector.backend == "cpu" and run.learner.backend == "cpu"
    # Films are drawn by libraries that want the main thread, and torch's threads are one run's.
    return in_kernels and not config.capture_video and torch_threads(config, run.learner) == 1

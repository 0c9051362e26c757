"""The command `vecpg`: flags from a dataclass, one-line errors, exit codes.

Torch is imported only once the flags are right, so that `--help` and mistakes cost no time.
"""

import contextlib
import dataclasses
import difflib
import gc
import io
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vecpg import __version__, ending, signals, streams
from vecpg.config import Config, ConfigError, check_ranks, flag, to_dict
from vecpg.recipes import RECIPES
from vecpg.run.members import (
    Population,
    configs_of,
    find_population,
    is_population,
    make_population_directory,
    read_population,
    write_population,
)
from vecpg.run.resume import check_settings, find_run, read_config, resume_command
from vecpg.run.stored import NAMES, config_of, flags_to_type, trusted_names
from vecpg.shell import how_to_call
from vecpg.torchrun import Place, place

if TYPE_CHECKING:
    from vecpg.deal import Deal

EXIT_FAILED = 1
EXIT_USAGE = 2

# Every run has a directory of its own in one directory.
_MOST_SEEDS = 100_000

_T = TypeVar("_T")
_registry = ConstructorRegistry()


# What each command does, in words.
COMMANDS = {
    "train": "train a policy on many copies of an environment at once",
    "evaluate": "play whole episodes with a trained policy, or film one",
    "plot": "draw runs: learning curves over seeds with their bands, or a profile of scores",
    "tune": "search settings: many at once, each over seeds, and the better half goes on",
    "benchmark": "measure this machine: a table of speeds, each beside its limit",
}


def main(args: Sequence[str] | None = None) -> None:
    """`vecpg COMMAND ...`, which is also `python -m vecpg COMMAND ...`.

    Without a command it lists them.
    """
    command, *rest = (sys.argv[1:] if args is None else list(args)) or ["--help"]
    where = place()
    if where is not None and where.world_size > 1 and command in COMMANDS and command != "train":
        fail(
            f"vecpg {command}: expected one process, got {where.world_size} ranks; only training is"
            " split over ranks: start it without torchrun"
        )
    match command:
        case "train":
            train_main(rest)
        case "evaluate":
            evaluate_main(rest)
        case "plot":
            plot_main(rest)
        case "tune":
            from vecpg.tune.cli import tune_main

            tune_main(rest)
        case "benchmark":
            from vecpg.measure.cli import benchmark_main

            benchmark_main(rest)
        case "--help" | "-h":
            _print_all(
                "usage: vecpg COMMAND [OPTIONS]",
                "",
                *(f"  {name:10} {what}" for name, what in COMMANDS.items()),
                "",
                "vecpg COMMAND --help explains its options; vecpg --version prints the version.",
            )
        case "--version":
            _print_all(f"vecpg {__version__}")
        case _:
            known = [*COMMANDS, "--help", "--version"]
            near = difflib.get_close_matches(command, known, n=1)
            if command.startswith("-") and not near:
                near = [f"train {command}"]
            hint = f"did you mean vecpg {near[0]}?" if near else "see vecpg --help"
            fail(f"expected one of {', '.join(COMMANDS)} first, got {command}; {hint}")


def train_main(args: Sequence[str]) -> None:
    """`vecpg train`."""
    with exit_codes():
        config, num_seeds = parse_train(args)
        prepare_process()
        if num_seeds > 1:
            _train_many(Population(config, num_seeds))
        else:
            _train_one(config)


def _train_one(config: Config) -> None:
    with stdout_kept_clean():
        check_cheaply(config, place())
        with imports_kept():
            from vecpg.run.interrupts import Interrupts
            from vecpg.train import train

        with Interrupts():
            result = train(config)
    if not signals.speaks():
        return
    print(json.dumps(result.summary), flush=True)
    run_dir = result.summary["run_dir"]
    typed = flags_to_type(to_dict(config))
    _print_next(
        curves=f"{_tensorboard()} --logdir {shlex.quote(str(Path(run_dir).parent))}",
        evaluate=_vecpg("evaluate", shlex.quote(run_dir), typed),
    )


def _train_many(population: Population) -> None:
    """A line for each run on stdout as it ends, and a table of all of them on stderr.

    Under torchrun each rank trains its part of the runs, and rank 0 tells of all of them.
    """
    config = population.config
    with stdout_kept_clean() as stdout:
        found = find_population(population)
        if found is None:
            check_cheaply(dataclasses.replace(config, resume=None))
        with imports_kept():
            from tqdm import tqdm

            from vecpg.deal import Deal
            from vecpg.look.table import closing_table
            from vecpg.population import RunsFailed, train_many
            from vecpg.run.interrupts import Interrupted, Interrupts

        def say(number: int, result: Any) -> None:
            # In a terminal the live line makes room for it.
            with tqdm.external_write_mode(file=sys.stderr):
                print(json.dumps(result.summary), file=stdout, flush=True)
            deal.ended(result.summary)

        with (
            Interrupts(),
            Deal(population, place()) as deal,
            _directory(population, found, deal) as folder,
        ):
            shown = shlex.quote(os.path.relpath(folder))
            logging.getLogger("vecpg").info("population: %s%s", shown, deal.over_ranks)
            runs = deal.own(configs_of(population, folder))
            failed = []
            try:
                train_many(runs, say, deal.tell if deal.first else None)
            except RunsFailed as error:
                failed = [runs[number].seed for number in sorted(error.failures)]
            outcome = deal.outcome(failed)
    if deal.first:
        print(closing_table(outcome.summaries, len(outcome.failed)), file=sys.stderr)
        _print_next(
            curves=f"{_tensorboard()} --logdir {shown}",
            plot=_vecpg("plot", shown, "--out curves.png"),
        )
    if outcome.unfinished:
        resume = resume_command(shown, config)
        ending.say(f"error: {outcome.unfinished}; resume: {resume}", refusal=False)
    if outcome.signum is not None:
        raise Interrupted(outcome.signum)
    if outcome.unfinished:
        raise SystemExit(EXIT_FAILED)


@contextlib.contextmanager
def _directory(population: Population, found: Path | None, deal: "Deal") -> Iterator[Path]:
    """The directory of a population, which rank 0 makes, and leaves as it was if none can begin.

    Args:
        population: as it is to be.
        found: where it is to go on; None: in a new one.
        deal: where it goes on after a restart.
    """
    from vecpg.run.directory import discard

    if not deal.first:
        yield deal.told()
        return
    found = deal.remembered() or found
    before = None if found is None else read_population(found)
    if found is None:
        folder = make_population_directory(population)
    else:
        folder = found
        write_population(population, folder)
    deal.remember(folder)
    try:
        yield folder
    except BaseException as error:
        if before is None and not any(folder.glob("*/config.json")):
            discard(folder)
        elif before is not None and isinstance(error, ConfigError):
            write_population(before, folder)
        else:
            command = resume_command(shlex.quote(os.path.relpath(folder)), population.config)
            logging.getLogger("vecpg").info("every run was saved; resume: %s", command)
        raise


def _print_next(**commands: str) -> None:
    """What may be typed next, on stderr."""
    width = max(map(len, commands)) + 1
    for name, command in commands.items():
        print(f"{name + ':':{width}} {command}", file=sys.stderr)


def _tensorboard() -> str:
    return how_to_call("tensorboard", "tensorboard.main")


def _vecpg(*words: str) -> str:
    return " ".join(filter(None, (how_to_call("vecpg", "vecpg"), *words)))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Play whole episodes with a trained policy, greedily. One JSON line goes to stdout."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run directory (its best policy) or a checkpoint."""
    episodes: int = 100
    """How many whole episodes, exactly. At least 1."""
    seed: int = 1
    """Fixes start states and draws; they are never those of training or confirmation."""
    stochastic: bool = False
    """Draw actions; without it the most probable one is taken."""
    env_id: str | None = None
    """As stored in the run. Wanted where that is `module:Id`: no file has a module imported."""
    # Said here: of two types that it may be, tyro takes the dictionary for flags of its own.
    env_kwargs: Annotated[
        dict[str, Any] | None,
        PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda given: _json_object(given[0]),
            is_instance=lambda value: value is None or isinstance(value, dict),
            str_from_instance=lambda value: ["none" if value is None else json.dumps(value)],
        ),
    ] = None
    """As stored in the run. Wanted where a text in them may name a module or a path."""
    wrappers: tuple[str, ...] | None = None
    """As stored in the run. Wanted where there are any."""
    network: str | None = None
    """As stored in the run. Wanted where that is `module:function`."""
    vectorization: Literal["auto", "sync", "async", "vector_entry_point", "tensor"] | None = None
    """How copies are stepped. Without it as in training; where that was tensor, the original is
    stepped by its vector entry point, if it has one, else sync."""
    step_timeout: float | None = None
    """Seconds after which an async environment that has not answered counts as hung. Without it as
    stored in the run."""
    video: str | None = None
    """Also record one further episode as this mp4 file. Needs the extra: vecpg[video]."""
    render: Literal["human"] | None = None
    """human: first play one episode on the screen. Needs the extra: vecpg[video]."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.episodes < 1:
            raise ConfigError(f"--episodes: expected at least 1, got {self.episodes}")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"--seed: expected a number from 0 to 2**64 - 1, got {self.seed}")
        given = self.step_timeout
        if given is not None and not 0 < given < math.inf:
            raise ConfigError(
                f"--step-timeout: expected a finite number greater than 0, got {given}"
            )


def evaluate_main(args: Sequence[str]) -> None:
    """`vecpg evaluate`."""
    with exit_codes():
        config = parse(EvaluateConfig, args, command="evaluate")
        prepare_process()
        with imports_kept():
            from vecpg.evaluate import evaluate
            from vecpg.look import video
            from vecpg.run import checkpoint
            from vecpg.run.content import policy_of
            from vecpg.run.interrupts import Interrupts

        if is_population(Path(config.path)):
            raise ConfigError(
                f"{config.path}: expected a run directory or a checkpoint, got a population; name"
                " one of the runs in it"
            )
        try:
            with stdout_kept_clean(), Interrupts():
                found, content = checkpoint.load(config.path)
                stored = found.manifest["config"]
                command = f"{how_to_call('vecpg', 'vecpg')} {shlex.join(['evaluate', *args])}"
                trusted_names(stored, {name: getattr(config, name) for name in NAMES}, command)
                policy = policy_of(content, found.folder, network=config.network)
                trained = config_of(stored, found.folder)
                env_id = trained.env_id
                settings: dict[str, Any] = {
                    "env_kwargs": trained.env_kwargs,
                    "max_episode_steps": trained.max_episode_steps,
                    "wrappers": trained.wrappers,
                    "greedy": not config.stochastic,
                    "seed": config.seed,
                    "action_masks": trained.action_masks,
                }
                # What cannot be shown or recorded is found out before anything is played.
                if config.video is not None:
                    video.check_recording(env_id, config.video)
                if config.render is not None:
                    video.show(policy, env_id, **settings)
                if config.video is not None:
                    video.record(policy, env_id, config.video, **settings)
                result = evaluate(
                    policy,
                    env_id,
                    config.episodes,
                    vectorization=config.vectorization
                    or found.manifest["resolved"]["vectorization"],
                    num_envs=trained.num_envs,
                    step_timeout=config.step_timeout or trained.step_timeout,
                    envs_per_worker=trained.in_each_worker,
                    **settings,
                )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(EXIT_FAILED) from None
        numbers = {
            "return_mean": result.return_mean,
            "return_std": result.return_std,
            "length_mean": result.length_mean,
            "episodes": len(result.returns),
        }
        shown = {} if config.video is None else {"video": config.video}
        print(json.dumps(numbers | shown), flush=True)


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw runs, those of equal settings as one line: a curve over seeds with its 95 % band, or a
    performance profile.

    A curve goes as far as all its seeds have data. One JSON line goes to stdout.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run directories, or directories that hold several runs: a population, or such as `runs`."""
    out: str
    """The image file. Its ending (.png, .pdf, .svg, ...) says the format."""
    kind: Literal["curve", "profile"] = "curve"
    """curve: over the environment steps. profile: the share of runs whose score is above tau, over
    tau. The score is the return of the greedy evaluation at a run's end."""
    statistic: Literal["mean", "iqm"] = "mean"
    """What a curve is of its seeds: mean, with Student's confidence interval; iqm, the
    interquartile mean with a bootstrap interval, which wants ten seeds or more."""
    tag: str | None = None
    """A key of metrics.jsonl. Without it a curve is of charts/episodic_return. With it the score in
    a profile is a run's last value of it: charts/best_return is its best."""

    def __post_init__(self) -> None:
        """Check that there is something to draw."""
        if not self.runs:
            raise ConfigError("RUN: expected at least one run directory, got none")
        if self.kind == "profile" and self.statistic != "mean":
            raise ConfigError(
                f"--statistic: expected none for a profile, which has all scores, got"
                f" {self.statistic}; leave it out"
            )


def plot_main(args: Sequence[str]) -> None:
    """`vecpg plot`."""
    with exit_codes():
        config = parse(PlotConfig, args, command="plot")
        prepare_process()
        from vecpg.look.plot import plot

        try:
            drawn = plot(
                config.runs, config.out, config.tag, kind=config.kind, statistic=config.statistic
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        print(json.dumps(drawn), flush=True)


@dataclass(frozen=True, kw_only=True)
class _TrainFlags(Config):
    # What `vecpg train` takes: the settings of a run, and how many of them there are.
    num_seeds: int = 1
    """So many runs in one process, with seeds from --seed on; each is what it would be alone. Under
    torchrun they are dealt to its ranks. A line for each goes to stdout as it ends, and their table
    to stderr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_seeds <= _MOST_SEEDS:
            raise ConfigError(f"--num-seeds: expected 1 to {_MOST_SEEDS:,}, got {self.num_seeds}")
        if self.seed + self.num_seeds > 2**64:
            raise ConfigError(
                f"--num-seeds: expected seeds below 2**64, got {self.num_seeds} from --seed"
                f" {self.seed} on"
            )


def parse_config(args: Sequence[str]) -> Config:
    """As `parse_train`, without the number of seeds."""
    return parse_train(args)[0]


def parse_train(args: Sequence[str]) -> tuple[Config, int]:
    """What the flags of `vecpg train` give, `--recipe` and `--resume` read first.

    Returns:
        the settings of the first run, and how many runs there are.
    """
    name = given(args, "recipe") or Config().recipe
    if name == "list":
        # All that any of them sets otherwise than another: who runs one wants to know all of these.
        settings = {recipe: to_dict(config) for recipe, (config, _) in RECIPES.items()}
        default = settings["default"]
        varied = [k for k in default if any(one[k] != default[k] for one in settings.values())]
        varied.remove("recipe")
        for recipe, (_, what) in RECIPES.items():
            flags = _flags({name: settings[recipe][name] for name in varied})
            _print_all("\n    ".join([f"{recipe}:", *textwrap.wrap(what, 92), *flags]))
        raise SystemExit(0)
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        fail(f"--recipe: expected {', '.join(RECIPES)} or list, got {name}{hint}")
    named = RECIPES[name][0]
    resume = given(args, "resume")
    if not resume:  # alone, it is refused there
        return _parse_flags(args, named, 1)
    num_seeds, wanted = 1, Config(resume=resume)
    if resume == "auto":  # which run that is depends on other flags
        wanted, num_seeds = _parse_flags(args, named, 1)
    folder = find_population(Population(wanted, num_seeds))
    if folder is not None:
        begun = read_population(folder)
        where, stored, num_seeds = folder, begun.config, begun.num_seeds
    elif num_seeds > 1 or (run_dir := find_run(wanted)) is None:
        return wanted, num_seeds
    else:
        where, stored = run_dir, read_config(run_dir)
    # Where runs are is said here and now, not by a file.
    stored = dataclasses.replace(stored, progress=named.progress, out_dir=wanted.out_dir)
    config, given_seeds = _parse_flags(args, stored, num_seeds)
    if given_seeds != num_seeds:
        fail(f"--num-seeds: expected {num_seeds}, with which {where} was begun, got {given_seeds}")
    if folder is not None:
        check_settings(config, stored)
    trusted_names(
        to_dict(stored),
        {name: getattr(config, name) for name in NAMES if given(args, name)},
        f"{how_to_call('vecpg', 'vecpg')} {shlex.join(['train', *args])}",
    )
    return config, num_seeds


def _parse_flags(args: Sequence[str], default: Config, num_seeds: int) -> tuple[Config, int]:
    flags = parse(
        _TrainFlags,
        args,
        command="train",
        default=_TrainFlags(**to_dict(default), num_seeds=num_seeds),
        description=_DESCRIPTION,
    )
    settings = {each.name: getattr(flags, each.name) for each in dataclasses.fields(Config)}
    return Config(**settings), flags.num_seeds


def _flags(settings: dict[str, Any]) -> list[str]:
    """Settings as the flags that would give them."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, list) else ["none" if value is None else value]
            flags.append(" ".join([flag(name), *map(str, values)]))
    return flags


_DESCRIPTION = (
    "Train a policy with REINFORCE on many copies of a Gymnasium environment at once. One JSON line"
    " for each run goes to stdout; everything else to stderr and to the run directory."
)


def parse(
    kind: Callable[..., _T],
    args: Sequence[str],
    *,
    command: str,
    default: _T | None = None,
    description: str | None = None,
) -> _T:
    """Tyro over a dataclass or function, with errors in one line and exit status 2."""
    options: dict[str, Any] = {} if default is None else {"default": default}
    box, helped = io.StringIO(), sys.stdout if signals.speaks() else io.StringIO()
    try:
        with contextlib.redirect_stderr(box), contextlib.redirect_stdout(helped):
            parsed: _T = tyro.cli(
                kind,
                prog=f"vecpg {command}",
                args=list(args),
                description=description,
                registry=_registry,
                **options,
            )
    except ConfigError as error:
        fail(str(error))
    except SystemExit as exit_:
        if exit_.code:
            fail(_one_line(box.getvalue()))
        raise
    return parsed


def prepare_process() -> None:
    """Log to stderr in plain lines, and find modules beside the user for `module:Id`.

    Of several ranks the first tells what goes on; the others only warn, and say who they are.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # it would greet on stdout
    where = place()
    rank = 0 if where is None else where.rank
    line = f"[rank {rank}] %(message)s" if rank else "%(message)s"
    logging.basicConfig(stream=sys.stderr, format=line, level=logging.WARNING)
    logging.getLogger("vecpg").setLevel(logging.WARNING if rank else logging.INFO)
    # What all ranks see of the run as a whole, rank 0 says.
    logging.getLogger("vecpg.run").setLevel(logging.ERROR if rank else logging.NOTSET)
    sys.path.append(os.getcwd())


@contextlib.contextmanager
def stdout_kept_clean() -> Iterator[TextIO]:
    """Send to stderr whatever an environment prints, from C too: stdout carries JSON lines.

    Yields:
        what writes to stdout meanwhile.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        # Python's own by name: if stderr has no reader, that is no fault of the environment.
        with streams.beside(sys.stdout, kept) as stdout, contextlib.redirect_stdout(sys.stderr):
            yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def imports_kept() -> Iterator[None]:
    """What is imported inside is there to stay, and no garbage is ever looked for in it.

    That would take half a second: meanwhile, when kernels are loaded, and at exit.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Exit statuses: 2 for what can be known before the first step, 1 after it, 128 + signal.

    The last is 0 under torchrun, where it may restart the ranks.
    """
    try:
        yield
    except ConfigError as error:
        # Of an environment that could not be made.
        fail(str(error), getattr(error.__cause__, "trace", ""))
    except KeyboardInterrupt as error:
        signum = getattr(error, "signum", signal.SIGINT)
        if signals.speaks():
            print(f"stopped by {signal.Signals(signum).name}{signals.remark}", file=sys.stderr)
        signals.said = True
        raise SystemExit(signals.exit_status(signum)) from None
    except (FloatingPointError, MemoryError, OSError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        ending.say(f"error: {words}", refusal=False)
        raise SystemExit(EXIT_FAILED) from None
    except Exception as error:
        from vecpg.distributed import RanksLost
        from vecpg.envs import EnvironmentFailure, EnvironmentNotMade

        if isinstance(error, EnvironmentFailure | EnvironmentNotMade | RanksLost):
            lines = f"{getattr(error, 'trace', '')}error: {error}"
            ending.say(lines, refusal=False, of_another=isinstance(error, RanksLost))
            raise SystemExit(EXIT_FAILED) from None
        raise


def _print_all(*lines: str) -> None:
    with exit_codes():
        if signals.speaks():
            print("\n".join(lines), flush=True)


def fail(message: str, trace: str = "") -> NoReturn:
    """One line on stderr, after lines of a trace, and exit status 2."""
    ending.say(f"{trace}error: {' '.join(message.split())}", refusal=True)
    raise SystemExit(EXIT_USAGE)


def check_cheaply(config: Config, where: Place | None = None) -> None:
    """What is wrong with the environment or the directory, before torch is loaded.

    Args:
        config: of a run.
        where: among the ranks over which it is split; None: it is not.
    """
    from vecpg.envs import check_time_limit, find_spec, load_wrappers, resolve_vectorization
    from vecpg.memory import check_room

    if (run_dir := find_run(config)) is not None:
        check_settings(config, read_config(run_dir))
    elif where is not None and not where.restarts:  # else it goes on, perhaps, as it was begun
        check_ranks(config, where.world_size)
    ranks = 1 if where is None else where.world_size
    try:
        spec = find_spec(config.env_id)
        check_time_limit(spec, config.max_episode_steps)
        if config.vectorization != "auto":  # what that is the run settles, and says
            resolve_vectorization(
                spec,
                config.vectorization,
                config.env_kwargs,
                max_episode_steps=config.max_episode_steps,
                wrappers=config.wrappers,
                action_masks=config.action_masks,
                ranks=ranks,
            )
        load_wrappers(config.wrappers)
        # Else on a GPU, perhaps.
        if config.device == "cpu" or config.vectorization in ("sync", "async"):
            own = dataclasses.replace(config, num_envs=-(-config.num_envs // ranks), shards=None)
            check_room(own, config.vectorization)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if run_dir is None:
        check_writable(config.out_dir)


def check_writable(name: str) -> None:
    """Refuse an --out-dir in which nothing can be written."""
    out_dir = Path(name)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        probe = out_dir / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink(missing_ok=True)  # a rank elsewhere may have the same number
    except OSError as error:
        raise ConfigError(
            f"--out-dir {out_dir} cannot be written: {error.strerror}; give another directory"
        ) from error


def given(args: Sequence[str], name: str) -> str | None:
    """The value of a flag on the command line, "" where it is alone; None if it is not there."""
    value = None
    for index, arg in enumerate(args):
        typed, equals, rest = arg.partition("=")
        if typed.replace("_", "-") in (flag(name), flag(f"no_{name}")):
            value = rest if equals else next(iter(args[index + 1 :]), "")
    return value


def _one_line(box: str) -> str:
    """Tyro's framed error without frame, help text and footer; flags it suggests are kept.

    The frame is of lines where stdout can show them, else a title, a rule and no sides.
    """
    rows = box.splitlines()
    sections: list[list[str]] = [[]]
    for row in rows[1:] if box.startswith("╭") else rows[2:]:
        inside = row.strip("│╰╯ ")
        if inside and set(inside) <= {"─", "-"}:
            sections.append([])
        elif inside:
            sections[-1].append(inside)
    message = re.sub(r"^Error parsing (?:\w+: )?", "", " ".join(sections[0]))
    union = re.match(r"(--[\w-]+): no type matching (\S+) could be .*? from \['(.*?)'\]", message)
    if union:
        choices = re.sub(r"[|,]", " or ", re.sub(r"[{}]", "", union[2])).lower()
        message = f"{union[1]}: expected {choices}, got {union[3]}"
    for section in sections[1:]:
        if section and section[0].startswith("Perhaps you meant"):
            flags = re.findall(r"(?<!\S)--[a-z][\w-]*", " ".join(section))
            message += f"; did you mean {' or '.join(dict.fromkeys(flags))}?"
    return message


@_registry.primitive_rule
def _integers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Whole numbers, also as 1e6 and 500_000."""
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda given: _integer(given[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


@_registry.primitive_rule
def _nothing(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[None] | None:
    """`none` for what is not set."""
    if info.type not in (None, types.NoneType):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="none",
        instance_from_str=lambda given: _none(given[0]),
        is_instance=lambda value: value is None,
        str_from_instance=lambda value: ["none"],
    )


@_registry.primitive_rule
def _json_objects(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
    """Keyword arguments as one JSON object."""
    if info.type is not dict and getattr(info.type, "__origin__", None) is not dict:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda given: _json_object(given[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    )


def _integer(text: str) -> int:
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError, OverflowError):
        if (number := float(text)) == int(number):
            return int(number)
    raise ValueError(f"expected a whole number, got {text}")


def _none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError(f"expected none, got {text}")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object, got {text} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {text}")
    return value

"""The command line of `vecpg benchmark`: measure, compare or show again; keep; print."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vecpg.cli import (
    EXIT_FAILED,
    check_writable,
    exit_codes,
    parse,
    prepare_process,
    stdout_kept_clean,
)
from vecpg.config import ConfigError, flag


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measure this machine: stepping, collecting, returns, update and training of CartPole-v1.

    Every figure is checked first, and stands beside the limit that was measured with it. A table
    goes to stdout; progress goes to stderr; a JSON file and a picture go to the directory.
    """

    devices: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda")
    """Where the policy is. One that is not there is left out, and a line says so."""
    num_envs: tuple[int, ...] = ()
    """Numbers of environments, at least 1 each. If none is given: 1 8 64 512 4096 32768, and with
    --quick 1 8 64 4096."""
    vectorizations: tuple[Literal["sync", "async", "vector_entry_point", "tensor"], ...] = (
        "sync",
        "async",
        "vector_entry_point",
        "tensor",
    )
    """How the environments are stepped."""
    quick: bool = False
    """Under two minutes on two cores: fewer rounds, and fewer numbers of environments. With
    --compare it takes two to four times as long."""
    out_dir: str = "benchmark-results"
    """Where the JSON file and the picture go; their names begin with date and time."""
    compare: str | None = None
    """Instead: a commit to run beside this working tree, round for round in turn. Exit status 1
    when something is slower here by more than 25 % with confidence."""
    results: str | None = None
    """Instead: show this results file again, and draw its picture in --out-dir."""
    record: bool = False
    """Also keep the figures in benchmarks/results, and make the tables of this repository anew."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("devices", "vectorizations"):
            if not getattr(self, name):
                raise ConfigError(f"{flag(name)}: expected at least one, got none")
        if min(self.numbers) < 1:
            raise ConfigError(f"--num-envs: expected at least 1, got {min(self.numbers)}")
        if self.compare is not None and (self.results is not None or self.record):
            other = "--record" if self.results is None else "--results"
            raise ConfigError(f"--compare: expected it without {other}; run them one by one")
        chosen = (self.devices, self.num_envs, self.vectorizations)
        every = (BenchmarkConfig.devices, BenchmarkConfig.num_envs, BenchmarkConfig.vectorizations)
        if self.record and self.results is None and chosen != every:
            raise ConfigError("--record: expected every figure; run it without a choice of them")

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of environments, as given or by default."""
        default = (1, 8, 64, 4096) if self.quick else (1, 8, 64, 512, 4096, 32768)
        return self.num_envs or default


def benchmark_main(args: Sequence[str]) -> None:
    """`vecpg benchmark`."""
    with exit_codes():
        config = parse(BenchmarkConfig, args, command="benchmark")
        prepare_process()
        # Which way was taken is in the table; the progress line has this place.
        logging.getLogger("vecpg").setLevel(logging.WARNING)
        check_writable(config.out_dir)
        try:
            _check_checkout(config)
            failed = _comparison(config) if config.compare is not None else _benchmark(config)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if failed:
            raise SystemExit(EXIT_FAILED)


def _check_checkout(config: BenchmarkConfig) -> None:
    """Refuse what needs the repository where vecpg was installed without it."""
    if config.record or config.compare is not None:
        from vecpg.machine import checkout

        try:
            checkout()
        except ValueError as error:
            raise ConfigError(f"{'--record' if config.record else '--compare'}: {error}") from error


def _benchmark(config: BenchmarkConfig) -> bool:
    """Measure, or read; keep; show. Returns whether a check found something wrong."""
    from vecpg.machine import checkout, commit
    from vecpg.measure import report, results

    root = checkout() if config.record else None
    if config.results is not None:
        found = results.read(Path(config.results))
        if root is not None:
            report.check_recordable(found)
    else:
        from vecpg.measure.timing import measure, progress_line
        from vecpg.run.interrupts import Interrupts

        if root is not None:
            report.check_recordable({"quick": config.quick, **commit()})
        with stdout_kept_clean(), Interrupts():
            found = measure(
                config.devices,
                config.vectorizations,
                config.numbers,
                quick=config.quick,
                progress=progress_line(),
            )
        if not found["cells"] and not any(one["failed"] for one in found["not_run"]):
            raise ValueError(f"nothing was measured: {'; '.join(report.left_out(found))}")
    found = results.rounded(found)  # the table of a file is that of its run
    # What was measured is safe before anybody looks at it, or does not.
    path = Path(config.out_dir) / results.run_name(found)
    written = [path.with_suffix(".png")]
    if config.results is None:
        written.append(path.with_suffix(".json"))
        results.write(written[-1], found)
    report.save_picture(found, written[0])
    if root is not None:
        written += report.record(found, root)
    print("written: " + ", ".join(map(str, written)), file=sys.stderr)
    print(report.table(found), flush=True)
    return any(one["failed"] for one in found["not_run"])


def _comparison(config: BenchmarkConfig) -> bool:
    """Run this tree and a commit in turn. Returns whether something is slower here."""
    from vecpg.machine import commit
    from vecpg.measure import comparison, report, results, timing
    from vecpg.run.interrupts import Interrupts

    assert config.compare is not None
    ref = comparison.resolve(config.compare)
    cases, left_out = timing.measurable(config.devices, config.vectorizations, config.numbers)
    devices = {device: timing.why_not_there(device) for device in config.devices}
    if not cases:
        why = "; ".join(report.left_out({"devices": devices, "not_run": left_out}))
        raise ValueError(f"nothing was compared: {why}")
    pace = timing.QUICK if config.quick else timing.FULL
    with Interrupts():
        found = comparison.compare(
            ref,
            [(case.thing, case.device, case.vectorization, case.num_envs) for case in cases],
            pace.enough,
            timing.ROUND_SECONDS,
            timing.progress_line(),
        )
    here = {**results.now(), **commit(), "quick": config.quick}
    path = Path(config.out_dir) / f"{results.run_name(here)}-compared-with-{ref[:7]}.json"
    content = {"schema": results.SCHEMA, **here, "compared_with": ref[:7]}
    results.write(path, content | {"machine": timing.machine(), "not_run": [], "cells": found})
    print(f"written: {path}", file=sys.stderr)
    print(comparison.table(found), flush=True)
    for line in report.left_out({"devices": devices, "not_run": left_out}):
        print(f"* {line}", flush=True)
    return any(one["verdict"] in ("slower", "failed here") for one in found)

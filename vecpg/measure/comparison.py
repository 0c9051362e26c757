"""One commit beside another on this machine, round for round in turn."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vecpg.machine import checkout, git

# Slower than this with confidence, and a comparison fails.
SLOWER = 1.25
# How often a case is given as many rounds again while its interval says nothing.
_MORE = 2
_RESAMPLES = 2000


class TooOld(ValueError):
    """A commit that cannot be measured."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Seconds here over seconds there, and the 95 % bootstrap interval of the ratio of medians."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """In words: "slower" only when the interval lies wholly above `SLOWER`.

        "no difference" when it lies within that on both sides, else "no difference found".
        """
        if self.low > SLOWER:
            return "slower"
        if self.high < 1 / SLOWER:
            return "faster"
        within = self.low >= 1 / SLOWER and self.high <= SLOWER
        return "no difference" if within else "no difference found"


def ratio_of_medians(here: Sequence[float], there: Sequence[float]) -> Ratio:
    """How much longer the rounds here took.

    Example:
        >>> ratio_of_medians([3.0, 3.0, 3.0], [2.0, 2.0, 2.0])
        Ratio(value=1.5, low=1.5, high=1.5)
    """
    rng = np.random.default_rng(0)
    one, other = np.array(here), np.array(there)
    above, below = (
        np.median(rng.choice(rounds, (_RESAMPLES, len(rounds))), axis=1) for rounds in (one, other)
    )
    drawn = above / below
    low, high = np.percentile(drawn, (2.5, 97.5)).tolist()
    return Ratio(float(np.median(one) / np.median(other)), low, high)


def resolve(ref: str) -> str:
    """The full name of a commit.

    Raises:
        ValueError: there is no such commit, or no repository.
    """
    name = git(
        checkout(), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"
    )
    if name is None:
        raise ValueError(f"--compare: expected a commit of this repository, got {ref}")
    return name


def compare(
    commit: str,
    cases: Sequence[tuple[str, str, str | None, int]],
    enough: Callable[[int, float], bool],
    round_seconds: float,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """Run every case in this tree and in a commit, and compare.

    What looks slower or faster is looked at once more with environments, policy and memory made
    anew, and counts only if it is so again: they can be unlucky for all of their rounds.

    Args:
        commit: as `resolve` gives it.
        cases: (thing, device, vectorization, num_envs) of each.
        enough: from the rounds of a case and the seconds they took here, whether to stop.
        round_seconds: what a round takes at least.
        progress: as `measure` takes it.

    Returns:
        for each case that both can run: its name, both lists of seconds, ratio and verdict; for
        others: the name, the problem, and as verdict "failed here" or "not compared".

    Raises:
        TooOld: the commit can run none of them.
    """
    found = []
    with _tree_of(commit) as there, _worker(checkout()) as ours, _worker(there) as theirs:
        for number, case in enumerate(cases, start=1):
            thing, device, kind, num_envs = case
            name: dict[str, Any] = {"thing": thing, "device": device}
            name |= {"vectorization": kind, "num_envs": num_envs}
            if progress is not None:
                progress(number, len(cases), f"{thing}, {kind or 'any'} x {num_envs}, {device}")
            failed, problem = ours.opened(case), theirs.opened(case)
            if failed is not None:
                found.append(name | {"problem": failed, "verdict": "failed here"})
                continue
            if problem is not None:
                found.append(name | {"problem": problem, "verdict": "not compared"})
                continue
            here, before = _rounds(ours, theirs, enough, round_seconds)
            ratio = ratio_of_medians(here, before)
            if ratio.verdict in ("slower", "faster"):
                theirs.opened(case)
                ours.opened(case)
                here, before = _rounds(ours, theirs, enough, round_seconds)
                ratio = ratio_of_medians(here, before)
            found.append(
                name
                | {"seconds_here": here, "seconds_there": before, "verdict": ratio.verdict}
                | {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
            )
    if found and all(one["verdict"] == "not compared" for one in found):
        raise TooOld(f"--compare: {commit[:7]} can run none of these: {found[0]['problem']}")
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """A line for each case: how much longer it takes here."""
    lines = ["| what | time here / there (95 % interval) | |", "|-|-|-|"]
    for one in found:
        name = (
            f"{one['thing']}, {one['vectorization'] or 'any'} x {one['num_envs']}, {one['device']}"
        )
        if "problem" in one:
            lines.append(f"| {name} | | {one['verdict']}: {one['problem']} |")
            continue
        interval = f"{one['ratio']:.2f} ({one['low']:.2f} to {one['high']:.2f})"
        lines.append(f"| {name} | {interval} | {one['verdict']} |")
    compared = [one for one in found if "problem" not in one]
    slower = sum(one["verdict"] == "slower" for one in compared)
    faster = sum(one["verdict"] == "faster" for one in compared)
    wide = sum(one["verdict"] == "no difference found" for one in compared)
    lines += [
        "",
        f"{len(compared)} compared: {slower} slower by more than {SLOWER - 1:.0%}, {faster} faster"
        f" by as much, {len(compared) - slower - faster} without such a difference"
        + (f", {wide} of them with an interval too wide to exclude one." if wide else "."),
    ]
    return "\n".join(lines)


def _rounds(
    ours: "_Worker",
    theirs: "_Worker",
    enough: Callable[[int, float], bool],
    round_seconds: float,
) -> tuple[list[float], list[float]]:
    # As many calls in either: what is compared is the same.
    calls = theirs.ask({"calibrate": round_seconds})["calls"]
    ours.ask({"calibrate": round_seconds})
    here: list[float] = []
    there: list[float] = []
    for _ in range(1 + _MORE):
        before = len(here)
        while not enough(len(here) - before, calls * sum(here[before:])):
            # Who is first changes: what one leaves in the caches would always help the other.
            pairs = [(ours, here), (theirs, there)]
            for worker, seconds in pairs if len(here) % 2 else reversed(pairs):
                seconds.append(worker.ask({"round": calls})["seconds"])
        if ratio_of_medians(here, there).verdict != "no difference found":
            break
    return here, there


@contextmanager
def _tree_of(commit: str) -> Iterator[Path]:
    """The package as it was at a commit, in a folder that is removed afterwards."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", commit, "vecpg"],
        cwd=checkout(),
        capture_output=True,
        check=False,
    )
    if archive.returncode:
        raise TooOld(f"--compare: {commit[:7]} has no vecpg")
    with TemporaryDirectory(prefix="vecpg-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder)


class _Worker:
    """The process that runs one tree."""

    def __init__(self, process: "subprocess.Popen[str]", root: Path) -> None:
        self._process = process
        hello = self._answer()
        if "problem" in hello:
            raise TooOld(f"--compare: it cannot be measured: {hello['problem']}")
        if Path(hello["vecpg"]).resolve() != (root / "vecpg").resolve():
            raise TooOld("--compare: another vecpg than that of the commit was imported")

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One line there, one line back."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def opened(self, case: tuple[str, str, str | None, int]) -> str | None:
        """Prepare a case; the problem if it cannot be."""
        problem = self.ask({"open": case}).get("problem")
        return None if problem is None else " ".join(str(problem).split())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a process that measures has ended; what it wrote is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def _worker(root: Path) -> Iterator[_Worker]:
    # -P: this folder's own files are no modules of the commit.
    command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        try:
            yield _Worker(process, root)
        finally:
            assert process.stdin is not None
            # It ends by itself, and its environments with it; or it has ended.
            with suppress(BrokenPipeError):
                process.stdin.close()

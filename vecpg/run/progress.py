"""What a person sees meanwhile, on stderr: one live line at a terminal, plain lines elsewhere.

Where stderr is closed, or nobody reads it any more, nothing is shown, and the run goes on.
"""

import statistics
import sys
import threading
import time
import warnings
from contextlib import suppress
from types import TracebackType
from typing import Self

from tqdm import TqdmWarning, tqdm

from vecpg.config import Config
from vecpg.run.clock import per_second

# In a notebook it would advise a package that is not used here.
with warnings.catch_warnings(action="ignore", category=TqdmWarning):
    from tqdm.contrib.logging import logging_redirect_tqdm

# Seconds between looks at all of many runs, and at one that is not waited for.
_LOOK = 0.1


class _Line:
    """One line that is written anew, or a plain one every few seconds.

    Args:
        live: whether it is written anew.
        every: seconds between plain lines.
        unit: of what there is a total.
        total: how much there is to be done.
        shown: False: by another rank.
    """

    def __init__(self, live: bool, every: float, unit: str, total: int, shown: bool = True) -> None:
        self._every = every
        self._next_line = 0.0
        self._seen = shown and sys.stderr is not None
        self._live = live and self._seen
        if self._live:
            self._redirect = logging_redirect_tqdm()
            try:
                self._bar = tqdm(
                    total=total,
                    unit=f" {unit}",
                    unit_scale=total >= 1000,
                    file=sys.stderr,
                    dynamic_ncols=True,
                    miniters=0,  # words may change where no number does
                    bar_format="{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt}{unit} {desc}",
                )
            except OSError:
                self._seen = self._live = False

    def __enter__(self) -> Self:
        if self._live:
            self._redirect.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            with suppress(OSError):
                self._bar.close()
            self._redirect.__exit__(kind, error, traceback)

    def _write(self, counts: str, words: str, nearest: tuple[str, int, int], last: bool) -> None:
        """Bring the line up to date.

        Args:
            counts: what a plain line begins with.
            words: what it says.
            nearest: unit, how far, and how far to the end, of what will be there first.
            last: whether this is the last time, which is always shown.
        """
        if not self._seen:
            return
        try:
            if self._live:
                self._next_line = time.monotonic() + _LOOK
                unit, done, total = nearest
                self._bar.unit, self._bar.total = f" {unit}", total
                self._bar.set_description_str(words, refresh=False)
                self._bar.update(min(done, total) - self._bar.n)
                if last:
                    self._bar.refresh()
                return
            now = time.monotonic()
            if last or now >= self._next_line:
                self._next_line = now + self._every
                print(counts + words, file=sys.stderr, flush=True)
        except OSError:
            self._seen = False


class Progress(_Line):
    """Shows how far a run is towards the nearest of its limits.

    Args:
        config: of the run.
        shown: False: another rank shows it.
    """

    def __init__(self, config: Config, *, shown: bool = True) -> None:
        limits = {
            ("steps", "env_steps"): config.total_timesteps,
            ("episodes", "episodes"): config.total_episodes,
            ("iterations", "iteration"): config.total_iterations,
        }
        self._limits = {names: limit for names, limit in limits.items() if limit is not None}
        (unit, _), total = next(iter(self._limits.items()))
        super().__init__(config.progress, config.log_every, unit, total, shown)

    def is_due(self) -> bool:
        """Whether what is shown now would be seen."""
        return self._seen and time.monotonic() >= self._next_line

    def show(self, row: dict[str, float | None], *, last: bool) -> None:
        """Bring the line up to date.

        Args:
            row: as `Metrics.log` takes it.
            last: whether this is the run's last iteration, which is always shown.
        """
        best, speed = row["charts/best_return"], row["charts/SPS"]
        words = f"return {row['charts/episodic_return']:.1f}"
        words += "" if best is None else f", best {best:.1f}"
        words += "" if speed is None else f", {speed:,.0f} steps/s"
        done = {names: (row[names[1]] or 0) / limit for names, limit in self._limits.items()}
        unit, name = nearest = max(done, key=lambda names: done[names])
        counts = f"iteration {row['iteration']}, {row['env_steps']:,} steps: "
        self._write(counts, words, (unit, int(row[name] or 0), self._limits[nearest]), last)


class PopulationProgress(_Line):
    """Shows how far many runs are: how many ended, solved, their median return, their speed.

    Args:
        total: how many there are.
        live: whether the line is written anew.
        every: seconds between plain lines.
        shown: False: by another rank, of its own.
    """

    def __init__(self, total: int, live: bool, every: float, *, shown: bool = True) -> None:
        super().__init__(live, every, "runs", total, shown)
        self._total = total
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._returns: dict[int, float] = {}
        self._steps: dict[int, float] = {}
        self._before: dict[int, float] = {}
        self._ended = self._solved = 0
        self._next_look = 0.0

    def share(self, place: int, env_steps: int) -> "Share":
        """What shows the run of this place in the list, which has made so many steps already."""
        self._before[place] = env_steps
        return Share(self, place)

    def is_due(self) -> bool:
        """Whether a row would be looked at."""
        return time.monotonic() >= self._next_look

    def show(self, place: int, row: dict[str, float | None]) -> None:
        """Take in a row of a run."""
        self._returns[place] = row["charts/episodic_return"] or 0.0
        self._steps[place] = (row["env_steps"] or 0) - self._before[place]
        now = time.monotonic()
        if now >= self._next_look:  # it costs more than an iteration may
            self._next_look = now + _LOOK
            self._bring_up_to_date()

    def ended(self, solved: bool) -> None:
        """One run more has ended."""
        self._ended += 1
        self._solved += solved
        self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        with self._lock:
            returns, steps = list(self._returns.values()), sum(list(self._steps.values()))
            words = f"{self._solved} solved"
            words += f", median return {statistics.median(returns):.1f}" if returns else ""
            speed = per_second(int(steps), time.monotonic() - self._started)
            words += "" if not speed else f", {speed:,.0f} steps/s"
            over = self._ended == self._total
            counts = f"{self._ended} of {self._total} runs ended, "
            self._write(counts, words, ("runs", self._ended, self._total), over)


class Share:
    """What one of many runs shows: its part of their common line."""

    def __init__(self, line: PopulationProgress, place: int) -> None:
        self._line, self._place = line, place

    def is_due(self) -> bool:
        """As `Progress.is_due`."""
        return self._line.is_due()

    def show(self, row: dict[str, float | None], *, last: bool) -> None:
        """As `Progress.show`."""
        self._line.show(self._place, row)

"""What a person sees meanwhile, on stderr: one live line at a terminal, plain lines elsewhere.

Where stderr is closed, or nobody reads it any more, nothing is shown, and the run goes on.
"""

import sys
import time
import warnings
from contextlib import suppress
from types import TracebackType
from typing import Self

from tqdm import TqdmWarning, tqdm

from vecpg.config import Config

# In a notebook it would advise a package that is not used here.
with warnings.catch_warnings(action="ignore", category=TqdmWarning):
    from tqdm.contrib.logging import logging_redirect_tqdm


class Progress:
    """Shows how far a run is towards the nearest of its limits."""

    def __init__(self, config: Config) -> None:
        limits = {
            ("steps", "env_steps"): config.total_timesteps,
            ("episodes", "episodes"): config.total_episodes,
            ("iterations", "iteration"): config.total_iterations,
        }
        self._limits = {names: limit for names, limit in limits.items() if limit is not None}
        self._every = config.log_every
        self._next_line = 0.0
        self._seen = sys.stderr is not None
        self._live = config.progress and self._seen
        if self._live:
            self._redirect = logging_redirect_tqdm()
            try:
                self._bar = tqdm(
                    unit_scale=True,
                    file=sys.stderr,
                    dynamic_ncols=True,
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

    def show(self, row: dict[str, float | None], *, last: bool) -> None:
        """Bring the line up to date.

        Args:
            row: as `Metrics.log` takes it.
            last: whether this is the run's last iteration, which is always shown.
        """
        try:
            if self._seen:
                self._show(row, last)
        except OSError:
            self._seen = False

    def _show(self, row: dict[str, float | None], last: bool) -> None:
        best, speed = row["charts/best_return"], row["charts/SPS"]
        words = f"return {row['charts/episodic_return']:.1f}"
        words += "" if best is None else f", best {best:.1f}"
        words += "" if speed is None else f", {speed:,.0f} steps/s"
        if self._live:
            done = {names: (row[names[1]] or 0) / limit for names, limit in self._limits.items()}
            nearest = max(done, key=lambda names: done[names])
            self._bar.unit = f" {nearest[0]}"
            self._bar.total = self._limits[nearest]
            self._bar.set_description_str(words, refresh=False)
            self._bar.update(min(int(row[nearest[1]] or 0), self._bar.total) - self._bar.n)
            if last:
                self._bar.refresh()
            return
        now = time.monotonic()
        if last or now >= self._next_line:
            self._next_line = now + self._every
            counts = f"iteration {row['iteration']}, {row['env_steps']:,} steps: "
            print(counts + words, file=sys.stderr, flush=True)

"""The search: settings times seeds as one population, in rounds; after each the lower half goes.

Optuna is asked for all trials first, and told of each when it ends. Its journal and the directories
of the runs are all there is to go on from: what a round has to do follows from them, and what was
done is not done again. So it does not matter where a search was cut.

Source: Karnin, Koren and Somekh (2013), successive halving; Jamieson and Talwalkar (2016), of
settings. Optuna's own pruners compare with trials that are complete; while all advance together
there are none.
"""

import dataclasses
import glob
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from vecpg.config import Config
from vecpg.envs import EnvironmentFailure
from vecpg.population import RunsFailed, train_many
from vecpg.run.resume import name_of
from vecpg.tune.settings import TuneConfig
from vecpg.tune.space import in_words, read_space, settle
from vecpg.tune.study import settings_of

if TYPE_CHECKING:
    from vecpg.train import TrainResult

# What a run may owe to its settings. Anything else stops the search.
_BY_SETTINGS = (FloatingPointError, EnvironmentFailure, MemoryError)

_log = logging.getLogger(__name__)


class Search:
    """What is left to do of a search, and what it has found.

    Args:
        study_dir: where its runs are.
        study: what Optuna knows.
        config: of the search.
    """

    def __init__(self, study_dir: Path, study: optuna.Study, config: TuneConfig) -> None:
        self.study_dir, self.study, self.config = study_dir, study, config
        self._fixed = config.fixed
        self._space = read_space(config.param, self._fixed)

    def has_begun(self) -> bool:
        """Whether there is a run."""
        return any(self.study_dir.glob("*/config.json"))

    def run(self) -> None:
        """Do all rounds, as far as they are not done.

        Raises:
            Exception: what ended a run, if settings are no reason for it.
            Interrupted: every run was saved.
        """
        for budget in self.config.budgets:
            self._train_to(budget)
            self._judge(budget)

    def finalists(self) -> list[FrozenTrial]:
        """Those that were left at the end, the best first; of equals, what took fewer steps."""
        left = self.study.get_trials(states=[TrialState.COMPLETE])
        return sorted(left, key=lambda trial: (-trial.values[0], trial.user_attrs["env_steps"]))

    def settings(self, trial: FrozenTrial) -> dict[str, Any]:
        """What a trial sets, as `Config` has it."""
        return settings_of(trial, self._space)

    def confirm(self, best: FrozenTrial) -> dict[str, list[float]]:
        """The scores of the best settings and of the default ones over fresh seeds.

        Returns:
            of each, in the order of the seeds, without those whose runs failed.
        """
        groups = {"best": self.settings(best), "default": {}}
        outcomes = self._train(groups, self.config.fresh_seeds, self.config.budgets[-1])
        return {name: _scores(of_group) for name, of_group in outcomes.items()}

    def _train_to(self, budget: int) -> None:
        """Train those that are left, and tell Optuna their scores, or that they failed."""
        left = {
            f"trial{trial.number}": trial
            for trial in self.study.get_trials(states=[TrialState.RUNNING])
            if budget not in trial.intermediate_values
        }
        if not left:
            return
        groups = {name: self.settings(trial) for name, trial in left.items()}
        outcomes = self._train(groups, self.config.seeds, budget)
        for name, trial in left.items():
            scores = _scores(outcomes[name])
            if len(scores) < len(self.config.seeds):
                _log.warning("%s failed: %s", name, in_words(groups[name]))
                self.study.tell(trial.number, state=TrialState.FAIL)
                continue
            steps = [one.summary["env_steps"] for one in _results(outcomes[name])]
            told = optuna.Trial(self.study, trial._trial_id)
            told.set_user_attr("scores", scores)
            told.set_user_attr("env_steps", statistics.median(steps))
            told.report(statistics.median(scores), budget)  # last: it says that this is done

    def _judge(self, budget: int) -> None:
        """Prune those below the median of all; after the last round, they are complete."""
        trained = [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if budget in trial.intermediate_values
        ]
        if not trained:
            return
        scores = {trial.number: trial.intermediate_values[budget] for trial in trained}
        middle = statistics.median(scores.values())
        budgets = self.config.budgets
        ends = budget == budgets[-1]
        for trial in trained:
            if trial.state != TrialState.RUNNING:
                continue  # told before a cut
            if ends:
                self.study.tell(trial.number, scores[trial.number])
            elif scores[trial.number] < middle:
                self.study.tell(trial.number, state=TrialState.PRUNED)
        pruned = 0 if ends else sum(score < middle for score in scores.values())
        best = max(trained, key=lambda trial: scores[trial.number])
        _log.info(
            "round %d of %d, %s steps: %d settings, median %.1f, %d pruned; best %.1f: %s",
            *(budgets.index(budget) + 1, len(budgets), f"{budget:,}", len(trained)),
            *(middle, pruned, scores[best.number], in_words(self.settings(best))),
        )

    def _train(
        self, groups: Mapping[str, dict[str, Any]], seeds: Sequence[int], budget: int
    ) -> "dict[str, list[TrainResult | Exception]]":
        """What the runs of each group came to, in the order of the seeds."""
        configs = [
            self._config(name, settings, seed, budget)
            for name, settings in groups.items()
            for seed in seeds
        ]
        outcomes: list[TrainResult | Exception]
        try:
            outcomes = list(train_many(configs))
        except RunsFailed as error:
            for failure in error.failures.values():
                if not isinstance(failure, _BY_SETTINGS):
                    raise failure from None
            outcomes = [
                error.failures[place] if result is None else result
                for place, result in enumerate(error.results)
            ]
        each = len(seeds)
        return {
            name: outcomes[place * each : (place + 1) * each] for place, name in enumerate(groups)
        }

    def _config(self, name: str, settings: dict[str, Any], seed: int, budget: int) -> Config:
        """A run, from its beginning or from where it is."""
        config = settle(
            self._fixed,
            settings,
            seed=seed,
            exp_name=name,
            out_dir=str(self.study_dir),
            total_timesteps=budget,
        )
        for begun in self.study_dir.glob(f"{glob.escape(name_of(config))}__*/config.json"):
            return dataclasses.replace(config, resume=str(begun.parent))
        return config


def _results(outcomes: "Sequence[TrainResult | Exception]") -> "list[TrainResult]":
    return [one for one in outcomes if not isinstance(one, Exception)]


def _scores(outcomes: "Sequence[TrainResult | Exception]") -> list[float]:
    """Greedy returns, as single runs report them when they end there."""
    return [one.summary["eval_return_mean"] for one in _results(outcomes)]

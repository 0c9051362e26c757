"""The directory of a population: what its runs have in common, and the run directory of each.

Torch is not imported here: a mistake costs no time.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from vecpg.config import Config, ConfigError, to_dict
from vecpg.run.directory import make_directory, write_json
from vecpg.run.resume import begun, name_of, read_json
from vecpg.run.stored import config_of

_FILE = "population.json"


class Population(NamedTuple):
    """Runs whose settings are equal, but for seeds that follow one another.

    config:    of the first.
    num_seeds: how many runs there are.
    """

    config: Config
    num_seeds: int

    @property
    def seeds(self) -> range:
        """Their seeds, in order."""
        return range(self.config.seed, self.config.seed + self.num_seeds)


def make_population_directory(population: Population) -> Path:
    """A new directory under `out_dir` of the settings, with population.json.

    Raises:
        OSError: it cannot be made.
    """
    folder = make_directory(population.config.out_dir, _name_of(population))
    write_population(population, folder)
    return folder


def write_population(population: Population, folder: Path) -> None:
    """Its population.json: what is given anew when it goes on holds from then on.

    Raises:
        OSError: it cannot be written.
    """
    stored = to_dict(dataclasses.replace(population.config, resume=None))
    write_json(folder / _FILE, {"num_seeds": population.num_seeds, "config": stored})


def is_population(folder: Path) -> bool:
    """Whether it is the directory of a population."""
    return (folder / _FILE).is_file()


def read_population(folder: Path) -> Population:
    """What a population goes on with.

    Raises:
        ConfigError: its population.json cannot be read, or is not what this version leaves.
    """
    path = folder / _FILE
    content = read_json(path)
    num_seeds = content.get("num_seeds")
    if type(num_seeds) is not int or num_seeds < 1:
        raise ConfigError(f"{path}: expected num_seeds of at least 1, got {num_seeds!r}")
    return Population(config_of(content.get("config"), path), num_seeds)


def find_population(population: Population) -> Path | None:
    """The directory in which a population goes on, by `resume` of its settings; None if in none.

    "auto" means, if there is more than one seed, the newest population under `out_dir` with the
    same env_id, exp_name and seeds that has a run which has not come to its end.

    Raises:
        ConfigError: a population.json of the same name cannot be read.
    """
    config, seeds = population.config, population.seeds
    if config.resume != "auto":
        folder = None if config.resume is None else Path(config.resume)
        return folder if folder is not None and is_population(folder) else None
    if len(seeds) == 1:
        return None
    folders = [path.parent for path in Path(config.out_dir).glob(f"*/{_FILE}")]
    for folder in sorted(folders, key=begun, reverse=True):
        try:
            found = read_population(folder)
        except ConfigError:
            if folder.name.startswith(f"{_name_of(population)}__"):
                raise
            continue
        same = (found.config.env_id, found.config.exp_name) == (config.env_id, config.exp_name)
        if same and found.seeds == seeds:
            finished = [run for run in _runs(folder).values() if (run / "summary.json").exists()]
            if len(finished) < len(seeds):
                return folder
    return None


def configs_of(population: Population, folder: Path) -> list[Config]:
    """Of every run: what goes on with it where it lies in the directory, else what begins it.

    Args:
        population: its settings as they are now.
        folder: its directory.
    """
    runs = _runs(folder)
    return [
        dataclasses.replace(
            population.config,
            seed=seed,
            out_dir=str(folder),
            resume=str(runs[seed]) if seed in runs else None,
        )
        for seed in population.seeds
    ]


def _name_of(population: Population) -> str:
    """What the name of its directory begins with: environment, experiment, seeds."""
    named, seeds = name_of(population.config).rpartition("__")[0], population.seeds
    return f"{named}__{seeds[0]}-{seeds[-1]}"


def _runs(folder: Path) -> dict[int, Path]:
    """The run directory of each seed that has one."""
    begun_runs = sorted((path.parent for path in folder.glob("*/config.json")), key=begun)
    return {read_json(run_dir / "config.json").get("seed", -1): run_dir for run_dir in begun_runs}

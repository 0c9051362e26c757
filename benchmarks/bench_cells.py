"""What `scripts/benchmark.py` measures, as a suite: each checked first, beside its limit.

A group for each operation; device, vectorization and number of environments are parameters, so that
`--benchmark-group-by=param:device` and `--benchmark-compare` work.
"""

import dataclasses
import statistics

import pytest

from vecpg.measure.cells import Case, prepared, seconds_of, wait_for
from vecpg.measure.timing import measurable

# Of devices that are not here, and of what would take too much, there are none.
CASES, _ = measurable(
    ("cpu", "cuda"), ("sync", "async", "vector_entry_point", "tensor"), (8, 64, 4096)
)


@pytest.mark.parametrize(
    ("thing", "device", "vectorization", "num_envs"),
    [
        pytest.param(*dataclasses.astuple(case), marks=pytest.mark.benchmark(group=case.thing))
        for case in CASES
    ],
)
def bench_cell(benchmark, record, thing, device, vectorization, num_envs):
    limit_seconds = []
    with prepared(Case(thing, device, vectorization, num_envs)) as cell:

        def run():
            cell.run()
            wait_for(device)

        def limit():
            if cell.limit is not None:
                limit_seconds.append(seconds_of(cell.limit.run, 1, device))
            wait_for(device)

        limit()
        benchmark.pedantic(run, setup=limit, rounds=20, warmup_rounds=2)
        if benchmark.stats:
            speed = cell.units / benchmark.stats.stats.median
            record(unit=cell.unit, num_steps=cell.num_steps, units_per_second=round(speed))
            if cell.limit is not None:
                best = cell.limit.units / statistics.median(limit_seconds)
                record(limit=cell.limit.what, of_limit=round(speed / best, 3))

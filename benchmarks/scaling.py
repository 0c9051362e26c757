"""Expected efficiency against ranks: a model, from what was measured on one machine.

    python benchmarks/scaling.py              # a table, in a minute
    python benchmarks/scaling.py --record     # and into benchmarks/README.md, docs/distributed.md

Measured are the exchanges of two processes over loopback, and iterations of one process with one
thread for several numbers of environments. All else is calculated: no more than two processes run.
Both measurements go to benchmarks/results/<machine>/scaling.json.
"""

import argparse
import itertools
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from hour.tables import aligned  # noqa: E402

BEGIN = "<!-- scaling: benchmarks/scaling.py --record writes it -->"
END = "<!-- scaling end -->"
RANKS = (1, 2, 4, 8, 16, 64)
# Bytes of a float64: all that is exchanged are.
NUMBER = 8
SIZES = tuple(NUMBER * 4**power for power in range(11))  # 8 bytes to 8 MiB
TURNS = 60
# CartPole-v1, its numbers of environments timed on one rank, and those that are calculated for.
LIMIT = 500
ITERATIONS = 7


class Net(NamedTuple):
    """A policy, and how many environments it is timed and calculated with."""

    hidden: tuple[int, ...]
    timed: tuple[int, ...]
    totals: tuple[int, ...]

    @property
    def parameters(self) -> int:
        sizes = (4, *self.hidden, 2)
        return sum((one + 1) * other for one, other in itertools.pairwise(sizes))


NETS = (
    Net((64, 64), (16, 64, 256, 1024), (64, 1024, 16384)),
    Net((1000, 1000), (1, 4, 16), (64, 1024)),
)


class Line(NamedTuple):
    """Seconds of something, as `fixed + each * amount`."""

    fixed: float
    each: float

    def at(self, amount: float) -> float:
        return self.fixed + self.each * amount


def fitted(amounts: list[float], seconds: list[float]) -> Line:
    """The line whose relative errors have the least sum of squares."""
    weights = 1 / np.asarray(seconds)
    columns = np.stack([weights, weights * np.asarray(amounts)], axis=1)
    fixed, each = np.linalg.lstsq(columns, np.ones(len(amounts)), rcond=None)[0]
    return Line(float(fixed), float(each))


class Numbers(NamedTuple):
    """What an exchange has of a shard: numbers that are added, and others that are kept apart."""

    added: int
    kept: int = 0

    def gathered(self, ranks: int, shards: int) -> float:
        """Bytes that each rank receives: the numbers of all shards that are not its own."""
        return NUMBER * (self.added + self.kept) * shards * (ranks - 1) / ranks

    def reduced(self, ranks: int) -> float:
        """Bytes that each rank receives: parts of sums, and then parts of the total.

        Every rank has a shard. What is kept of each stands in the sums beside zeros.
        """
        return 2 * NUMBER * (self.added + self.kept * ranks) * (ranks - 1) / ranks


def statistics_numbers(columns: int) -> Numbers:
    """4 sums, and 2 for each age; 3 that are kept apart, and 2 of the rank."""
    return Numbers(4 + 2 * columns, 5)


def gradient_numbers(parameters: int) -> Numbers:
    """Gradient, surrogate and entropy."""
    return Numbers(parameters + 2)


class Link(NamedTuple):
    """What a step of an exchange costs: gloo passes messages on around a ring of ranks.

    latency: seconds of a message.
    byte:    seconds of a byte.
    """

    latency: float
    byte: float

    def gather(self, ranks: int, received: float) -> float:
        return (ranks - 1) * self.latency + received * self.byte

    def reduce(self, ranks: int, received: float) -> float:
        return 2 * (ranks - 1) * self.latency + received * self.byte


def efficiency(ranks: int, total: int, iteration: Line, exchanges: float) -> float:
    """`t(N) / (W (t(N / W) + x))`: speed of W ranks, of W times that of one."""
    return iteration.at(total) / (ranks * (iteration.at(total / ranks) + exchanges))


def exchanges(ranks: int, parameters: int, gather: Link | None, reduce: Link | None) -> float:
    """Seconds of the two of an iteration, by gathers of a shard a rank, or by reductions."""
    seconds = 0.0
    for numbers in (statistics_numbers(LIMIT), gradient_numbers(parameters)):
        if gather is not None:
            seconds += gather.gather(ranks, numbers.gathered(ranks, ranks))
        if reduce is not None:
            seconds += reduce.reduce(ranks, numbers.reduced(ranks))
    return seconds


# -- Measuring -----------------------------------------------------------------------------------


def exchanged(rank: int, port: int, answers) -> None:
    """Time gathers and reductions of every size, in turn; the first three turns do not count."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    store = distributed.TCPStore("localhost", port, 2, rank == 0)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    seconds: dict[str, dict[int, list[float]]] = {"gather": {}, "reduce": {}}
    for turn in range(TURNS + 3):
        for size in SIZES:
            own = torch.ones(size // NUMBER, dtype=torch.float64)
            every = own.new_empty(2, len(own))
            for how, exchange in (
                ("gather", lambda own=own, every=every: distributed.all_gather([*every], own)),
                ("reduce", lambda own=own: distributed.all_reduce(own)),
            ):
                distributed.barrier()
                started = time.perf_counter()
                exchange()
                spent = time.perf_counter() - started
                if turn >= 3:
                    seconds[how].setdefault(size, []).append(spent)
    distributed.destroy_process_group()
    if rank == 0:
        answers.put(seconds)


def loopback() -> dict[str, dict[int, float]]:
    """Medians of seconds by way and bytes of the message, of two processes."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    processes = [context.Process(target=exchanged, args=(k, port, answers)) for k in range(2)]
    for process in processes:
        process.start()
    seconds = answers.get(timeout=300)
    for process in processes:
        process.join()
    return {
        how: {size: statistics.median(turns) for size, turns in sizes.items()}
        for how, sizes in seconds.items()
    }


def iterations(net: Net) -> dict[int, float]:
    """Medians of seconds of an iteration of 500 rows, by number of environments."""
    seconds: dict[int, list[float]] = {}
    for _ in range(3):
        for num_envs in net.timed:
            seconds.setdefault(num_envs, []).extend(timed(net, num_envs))
    return {num_envs: statistics.median(every) for num_envs, every in seconds.items()}


def timed(net: Net, num_envs: int) -> list[float]:
    """Seconds of iterations with one thread. Each environment makes 500 rows or some more."""
    from vecpg.config import Config
    from vecpg.train import train

    ends = []

    def on_iteration(row, policy) -> None:
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out_dir:
        train(
            Config(
                num_envs=num_envs,
                num_steps=LIMIT,
                hidden_sizes=net.hidden,
                threads=1,
                total_timesteps=None,
                total_iterations=ITERATIONS,
                target_return=None,
                eval_episodes=1,
                save_every=1e9,
                out_dir=out_dir,
                progress=False,
                log_every=1e9,
            ),
            on_iteration,
        )
    return [after - before for before, after in itertools.pairwise(ends)][1:]


# -- Showing -------------------------------------------------------------------------------------


class Model(NamedTuple):
    """Two processes, and one, as they were measured."""

    gather: Link
    reduce: Link
    iteration: dict[Net, Line]


def modelled(seconds: dict[str, dict[int, float]], spent: dict[Net, dict[int, float]]) -> Model:
    """With two ranks a gather is one message, and a reduction two, of as many bytes together."""
    gather, reduce = (
        fitted(list(seconds[how]), list(seconds[how].values())) for how in ("gather", "reduce")
    )
    return Model(
        Link(gather.fixed, gather.each),
        Link(reduce.fixed / 2, reduce.each),
        {net: fitted(list(by_envs), list(by_envs.values())) for net, by_envs in spent.items()},
    )


def efficiencies(ranks: int, net: Net, total: int, model: Model) -> str:
    """With as many shards as ranks, and without shards."""
    ways = (
        efficiency(ranks, total, model.iteration[net], exchanges(ranks, net.parameters, *way))
        for way in ((model.gather, None), (None, model.reduce))
    )
    return " / ".join(f"{each:.0%}" for each in ways)


def whole(model: Model) -> str:
    """What was measured, and a table for each net."""
    words = [
        f"{how}: {1e6 * link.latency:.0f} us a message and {1e-9 / link.byte:.2f} GB/s"
        for how, link in (("gathers", model.gather), ("reductions", model.reduce))
    ]
    parts = [f"Measured, two processes over loopback: {'; '.join(words)}."]
    for net, line in model.iteration.items():
        parts.append(
            f"{net.parameters:,} parameters. Measured, one process with one thread:"
            f" {1e3 * line.fixed:.2f} ms an iteration and {1e3 * line.each:.3f} ms for each"
            f" environment ({', '.join(map(str, net.timed))} of them)."
        )
        rows = [
            ["ranks", "statistics", "gradients", "reduced: statistics", "gradient"]
            + [f"{total:,} environments" for total in net.totals]
        ]
        for ranks in RANKS:
            numbers = statistics_numbers(LIMIT), gradient_numbers(net.parameters)
            rows.append(
                [
                    str(ranks),
                    *(kilobytes(each.gathered(ranks, ranks)) for each in numbers),
                    *(kilobytes(each.reduced(ranks)) for each in numbers),
                    *(efficiencies(ranks, net, total, model) for total in net.totals),
                ]
            )
        parts.append(aligned(rows))
    return "\n\n".join(parts)


def in_short(model: Model) -> str:
    """The efficiencies alone."""
    cells = [(net, total) for net in model.iteration for total in net.totals]
    heading = [f"{net.parameters:,} parameters, {total:,} environments" for net, total in cells]
    rows = [[str(ranks), *(efficiencies(ranks, *cell, model) for cell in cells)] for ranks in RANKS]
    return aligned([["ranks", *heading], *rows])


def kilobytes(size: float) -> str:
    return f"{size / 1000:,.0f} kB"


def main() -> None:
    from vecpg.machine import commit, results_folder, system
    from vecpg.measure.report import between_marks

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write the documents, too")
    args = parser.parse_args()
    seconds = loopback()
    spent = {net: iterations(net) for net in NETS}
    model = modelled(seconds, spent)
    print(whole(model))
    if args.record:
        machine = system()
        result = {
            "commit": commit()["commit"],
            "machine": machine,
            "exchange_seconds_by_bytes": seconds,
            "iteration_seconds_by_environments": {
                str(net.parameters): by_envs for net, by_envs in spent.items()
            },
        }
        path = results_folder(machine) / "scaling.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for name, text in (
            ("benchmarks/README.md", whole(model)),
            ("docs/distributed.md", in_short(model)),
        ):
            before = (ROOT / name).read_text(encoding="utf-8")
            (ROOT / name).write_text(between_marks(before, BEGIN, END, [text]), encoding="utf-8")


if __name__ == "__main__":
    main()

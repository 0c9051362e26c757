"""What the kernels of whole iterations cost, counted in their machine code. It needs no GPU.

    python benchmarks/counted.py                    # tables, in some minutes
    python benchmarks/counted.py --record           # and into benchmarks/README.md

Triton compiles them for GPUs that need not be there: for sm_80, 90 and 100 what a program takes,
and for sm_90 the instructions of one turn of their loops, the bytes of it, and what an H100 or
H200 could do at most. Everything is counted or calculated; nothing is measured.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from counting import model, sass, traffic  # noqa: E402
from gpu_kernels import compiling, resources  # noqa: E402
from hour.tables import aligned  # noqa: E402

from vecpg.envs import make_envs  # noqa: E402
from vecpg.fused.memory import Memory, make_memory  # noqa: E402
from vecpg.measure.report import between_marks, short  # noqa: E402
from vecpg.policy import Policy  # noqa: E402
from vecpg.policy.cuda import gradient  # noqa: E402
from vecpg.policy.shape import Shape, shape_of  # noqa: E402
from vecpg.rollout.cuda import persistent  # noqa: E402

BEGIN = "<!-- counted: benchmarks/counted.py --record writes it -->"
END = "<!-- counted end -->"
CAPABILITIES = (80, 90, 100)
COUNTED_FOR = 90
ENVS = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0")
# Copies of a run, and how many rows each may play on average in an iteration of the last table.
COPIES = (64, 4096, 65536)


class Case(NamedTuple):
    """A kernel as it is launched for an environment and a number of copies."""

    kernel: str
    env_id: str
    copies: int


class Found(NamedTuple):
    """What a kernel takes, and one turn of its longest loop."""

    takes: dict[str, int]
    turn: model.Kernel
    most: int  # instructions of a turn in which everything happens
    others: list[int]  # instructions of a turn of its other loops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write benchmarks/README.md, too")
    args = parser.parse_args()
    cases = [
        Case(kernel, env_id, copies)
        for kernel in ("play", "sum_gradient")
        for copies in (65536, 64)
        for env_id in ENVS
    ]
    found = {}
    for case in cases:
        for capability in CAPABILITIES:
            print(f"{case}, sm_{capability}", file=sys.stderr, flush=True)
            found[case, capability] = counted(case, capability)
    text = "\n\n".join(
        [
            f"torch {torch.__version__.partition('+')[0]}, triton {triton.__version__}, a policy"
            " with two hidden layers of 64",
            takes(cases, found),
            instructions(cases, found),
            ceilings(found),
        ]
    )
    print(text)
    if args.record:
        readme = ROOT / "benchmarks" / "README.md"
        whole = between_marks(readme.read_text(encoding="utf-8"), BEGIN, END, [text])
        readme.write_text(whole, encoding="utf-8")


def counted(case: Case, capability: int) -> Found:
    """Compile a kernel and look at it."""
    kernel, rows = compiled(case, capability)
    code = sass.instructions(disassembled(kernel.asm["cubin"]))
    turns = [(loop, *sass.paths(code, loop)) for loop in sass.loops(code)]
    # Where the work is: the innermost loop with most products.
    work = max(turns, key=lambda turn: (products(turn[1]), -len(turn[0].body)))
    moved = max(traffic.loops(kernel.asm["ttgir"]), key=lambda own: own["products"])
    takes = resources(kernel) | {
        "SHARED": kernel.metadata.shared,
        "WARPS": kernel.metadata.num_warps,
    }
    turn = model.Kernel(
        rows,
        tuple(work[1]),
        takes["WARPS"],
        takes["REG"],
        takes["SHARED"],
        (moved["load"] + moved["store"]) / rows,
    )
    others = [len(path) for loop, path, _ in turns if loop != work[0]]
    return Found(takes, turn, len(work[2]), others)


def products(path: list[sass.Instruction]) -> int:
    return sum(model.kind_of(each) in ("matrix", "float") for each in path)


def compiled(case: Case, capability: int) -> tuple[Any, int]:
    """A kernel, and how many rows one turn of its loop is."""
    memory, shape, envs = memory_of(case)
    with compiling(pytest.MonkeyPatch(), capability) as kept:
        if case.kernel == "play":
            persistent.play(
                memory,
                envs.definition,
                envs.dynamics.num_variables,
                shape,
                num_steps=1,
                max_episode_steps=4,
            )
        else:
            gradient.sum_gradient(memory, shape)
    (kernel,) = kept
    return kernel, memory.block if case.kernel == "play" else 64


def memory_of(case: Case) -> tuple[Memory, Shape, Any]:
    """As for so many copies, but no larger than it has to be: sizes are no part of a kernel."""
    envs = make_envs(case.env_id, 1, vectorization="tensor")
    shape = shape_of(Policy(envs.single_observation_space, envs.single_action_space))
    memory = make_memory(
        shape,
        runs=1,
        num_envs=min(case.copies, 8192),
        shards=1,
        num_steps=1,
        max_episode_steps=4,
        slots=4,
        parts=1,
        device=torch.device("cpu"),
    )
    return memory, shape, envs


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def takes(cases: list[Case], found: dict[tuple[Case, int], Found]) -> str:
    """What a program takes, on each GPU."""
    names = ("REG", "STACK", "LOCAL", "SHARED")
    lines = []
    for case in cases:
        own = [found[case, capability].takes for capability in CAPABILITIES]
        lines.append(
            [
                case.kernel,
                case.env_id,
                str(found[case, COUNTED_FOR].turn.rows),
                *(" / ".join(str(each[name]) for each in own) for name in names),
            ]
        )
    on = " / ".join(map(str, CAPABILITIES))
    heading = ["kernel", "environment", "rows a turn", f"registers, sm_{on}"]
    return aligned([[*heading, "stack", "local", "shared, bytes"], *lines])


def instructions(cases: list[Case], found: dict[tuple[Case, int], Found]) -> str:
    """Instructions of warps a row."""
    kinds = model.KINDS
    lines = []
    for case in cases:
        own = found[case, COUNTED_FOR]
        lines.append(
            [
                case.kernel,
                case.env_id,
                str(own.turn.rows),
                f"{sum(own.turn.counts.values()):.0f}",
                f"{own.most * own.turn.warps / own.turn.rows:.0f}",
                *(f"{own.turn.counts[kind]:.3g}" for kind in kinds),
                f"{own.turn.moved:.0f}",
                str(model.alone(own.turn.path)),
            ]
        )
    heading = ["kernel", "environment", "rows a turn", "a row", "at most", *kinds]
    return aligned([[*heading, "bytes", "cycles of a turn, alone"], *lines])


def ceilings(found: dict[tuple[Case, int], Found]) -> str:
    """Rows a second of CartPole-v1 that each thing allows, and what binds."""
    lines = []
    for kernel in ("play", "sum_gradient"):
        for copies in COPIES:
            case = Case(kernel, ENVS[0], 65536 if copies > 4096 else 64)
            turn = found[case, COUNTED_FOR].turn
            bounds = turn.bounds(programs_of(kernel, copies, turn.rows))
            binding = min(bounds, key=bounds.__getitem__)
            unit = next(iter(bounds))
            lines.append(
                [
                    kernel,
                    str(copies),
                    f"{short(bounds[unit])} ({unit})",
                    short(bounds["latency"]),
                    *(short(bounds[f"memory, {name}"]) for name in model.MEMORY),
                    f"{short(bounds[binding])}: {binding if binding != unit else unit}",
                ]
            )
    heading = ["kernel", "copies", "the busiest unit", "latency"]
    heading += [f"memory, {name}" for name in model.MEMORY]
    return aligned([[*heading, "at most"], *lines])


def programs_of(kernel: str, copies: int, rows: int) -> int:
    return -(-copies // rows)


if __name__ == "__main__":
    main()

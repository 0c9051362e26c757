"""What the kernels of whole iterations cost, counted in their machine code. It needs no GPU.

    python benchmarks/counted.py                    # tables, in some minutes
    python benchmarks/counted.py --record           # and into benchmarks/README.md

Triton compiles them for GPUs that need not be there: for sm_80, 90 and 100 what a program takes,
and for sm_90 the instructions of one turn of their loops, the bytes of it, and what an H100 or
H200 could do at most. Everything is counted or calculated; nothing is measured.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from hour.parts import pip_line  # noqa: E402

if lacking := [name for name in ("pytest", "triton") if importlib.util.find_spec(name) is None]:
    sys.exit(f"error: {' and '.join(lacking)} not installed; {pip_line(lacking)}")

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from counting import model, sass, traffic  # noqa: E402
from gpu_kernels import compiling, resources  # noqa: E402
from hour.tables import aligned  # noqa: E402

from vecpg.envs import make_envs  # noqa: E402
from vecpg.kernels.iteration import Memory, Shape, block_of, make_memory  # noqa: E402
from vecpg.measure.report import between_marks, short  # noqa: E402
from vecpg.policy import Policy  # noqa: E402
from vecpg.policy.cuda import gradient  # noqa: E402
from vecpg.policy.shape import shape_of  # noqa: E402
from vecpg.rollout.cuda import persistent  # noqa: E402

BEGIN = "<!-- counted: benchmarks/counted.py --record writes it -->"
END = "<!-- counted end -->"
CAPABILITIES = (80, 90, 100)
COUNTED_FOR = 90
ENVS = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0")
COPIES = (64, 4096, 65536)
LIMIT = 500  # steps of an episode of CartPole-v1
BACK = "back over the rows"


class Case(NamedTuple):
    """A kernel as it is launched for an environment and a number of copies."""

    kernel: str
    env_id: str
    copies: int


class Found(NamedTuple):
    """What a kernel takes, and one turn of each of its loops where most work is."""

    takes: dict[str, int]
    turns: dict[str, model.Kernel]


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
    kernel, shape, rows = compiled(case, capability)
    code = sass.instructions(disassembled(kernel.asm["cubin"]))
    turns = [(loop, sass.longest(code, loop)) for loop in sass.loops(code)]
    takes = resources(kernel) | {
        "SHARED": kernel.metadata.shared,
        "WARPS": kernel.metadata.num_warps,
    }

    asked = traffic.loops(kernel.asm["ttgir"])

    def turn(name: str, path: list[sass.Instruction], rows: int, own: dict[str, int]) -> None:
        found[name] = model.Kernel(
            rows,
            tuple(path),
            takes["WARPS"],
            takes["REG"],
            takes["SHARED"],
            bytes_of(name, shape),
            (own["load"] + own["store"]) / rows,
            again=name == "play",  # what its steps load are the policy's numbers
        )

    # The innermost of the loops that have the products.
    most = max(products(path) for _, path in turns)
    work, path = min(
        (each for each in turns if 2 * products(each[1]) > most), key=lambda one: len(one[0].body)
    )
    found: dict[str, model.Kernel] = {}
    turn(case.kernel, path, rows, max(asked, key=lambda own: own["products"]))
    if case.kernel == "play":
        # Back over the rows: the one that reads and writes most besides.
        others = [path for loop, path in turns if not loop.body & work.body]
        path = max(others, key=lambda one: sum(model.kind_of(each) == "memory" for each in one))
        own = max((one for one in asked if not one["products"]), key=lambda one: one["load"])
        turn(BACK, path, persistent._ROWS * rows, own)
    return Found(takes, found)


def bytes_of(kernel: str, shape: Shape) -> int:
    """Bytes of a row that a kernel reads and writes: what stands in `Memory`, once."""
    reward, weight, flag = 4, 4, 1
    obs = 4 * shape.features
    action = 4 * shape.outputs if shape.gaussian else 1
    return {
        "play": obs + action + reward + flag,
        BACK: reward + flag + weight,
        "sum_gradient": obs + action + weight + flag,
    }[kernel]


def products(path: list[sass.Instruction]) -> int:
    return sum(model.kind_of(each) in ("matrix", "float") for each in path)


def compiled(case: Case, capability: int) -> tuple[Any, Shape, int]:
    """A kernel, its policy's shape, and how many rows one turn of its loop is."""
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
    return kernel, shape, memory.block if case.kernel == "play" else 64


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
                str(case.copies),
                str(found[case, COUNTED_FOR].turns[case.kernel].rows),
                *(" / ".join(str(each[name]) for each in own) for name in names),
            ]
        )
    on = " / ".join(map(str, CAPABILITIES))
    heading = ["kernel", "environment", "copies", "rows a turn", f"registers, sm_{on}"]
    return aligned([[*heading, "stack", "local", "shared, bytes"], *lines])


def instructions(cases: list[Case], found: dict[tuple[Case, int], Found]) -> str:
    """Instructions of warps a row, of an environment with Discrete actions and one with a Box."""
    lines = []
    for case in cases:
        if case.env_id not in ENVS[::2]:
            continue
        own = found[case, COUNTED_FOR]
        for name, turn in own.turns.items():
            lines.append(
                [
                    name,
                    case.env_id,
                    str(case.copies),
                    str(turn.rows),
                    f"{sum(turn.counts.values()):.3g}",
                    *(f"{turn.counts[kind]:.3g}" for kind in model.KINDS),
                    f"{turn.moved:.0f}",
                    f"{turn.asked:.0f}",
                    str(turn.alone),
                ]
            )
    heading = ["loop", "environment", "copies", "rows a turn", "instructions a row", *model.KINDS]
    heading += ["bytes", "asked for", "cycles of a turn, alone"]
    return aligned([heading, *lines])


def ceilings(found: dict[tuple[Case, int], Found]) -> str:
    """Rows a second of CartPole-v1 that each thing allows, and what binds."""
    lines = []
    for copies in COPIES:
        seconds = 0.0
        for kernel in ("play", "sum_gradient"):
            case = Case(kernel, ENVS[0], 65536 if copies > 4096 else 64)
            for name, turn in found[case, COUNTED_FOR].turns.items():
                bounds = turn.bounds(programs(kernel, copies))
                unit, least = next(iter(bounds)), min(bounds, key=bounds.__getitem__)
                seconds += 1 / bounds[least]
                lines.append(
                    [
                        str(copies),
                        name,
                        f"{short(bounds[unit])} ({unit})",
                        *(short(speed) for speed in [*bounds.values()][1:]),
                        f"{short(bounds[least])}: {least}",
                    ]
                )
        lines.append([str(copies), "all of these", "", "", "", "", "", short(1 / seconds)])
    heading = ["copies", "loop", "the busiest unit", "latency", "cache"]
    heading += [f"memory, {name}" for name in model.MEMORY]
    return aligned([[*heading, "at most"], *lines])


def programs(kernel: str, copies: int) -> int:
    """How many a run of CartPole-v1 has, one episode of each copy at a time."""
    blocks = -(-copies // block_of(copies))
    return blocks if kernel == "play" else gradient.num_parts(LIMIT, blocks)


if __name__ == "__main__":
    main()

"""Two ranks on two cores beside one process with two threads and with one; and what shards cost.

    python benchmarks/ranks.py               # tables, in ten minutes
    python benchmarks/ranks.py --record      # and into benchmarks/README.md

Every run of a case has the same environments and two shards, so all must come to the same bits, and
each is compared before its time counts. Then one process trains with 1, 2, 4 and 12 shards. All
goes in turn, again and again. Every figure goes to benchmarks/results/<machine>/ranks.json, and to
tables: medians, and of each round the ratio to one process with one thread, or to one shard.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

BEGIN = "<!-- ranks: benchmarks/ranks.py --record writes it -->"
END = "<!-- ranks end -->"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Words before and after scripts/train.py.
WAYS = {
    "one thread": ((), ("--threads", "1")),
    "two threads": ((), ("--threads", "2")),
    "two ranks": (TORCHRUN, ()),
}
COMPUTES = ("--env-id", "slow:Slow-v0", "--env-kwargs", '{"seconds": 1e-4, "how": "compute"}')
# About two seconds of training each on one core.
CASES = {
    "tensor, 64": ("--num-envs", "64", "--total-iterations", "200"),
    "tensor, 1024": ("--num-envs", "1024", "--total-iterations", "16"),
    "sync, 64": ("--num-envs", "64", "--total-iterations", "8", "--vectorization", "sync"),
    "computes 0.1 ms, sync, 64": (*COMPUTES, "--num-envs", "64", "--total-iterations", "12"),
    "computes 0.1 ms, async, 64": (
        *(*COMPUTES, "--num-envs", "64", "--total-iterations", "12"),
        *("--vectorization", "async"),
    ),
}
FIXED = "--shards 2 --target-return none --total-timesteps none --eval-episodes 1 --save-every 1e9"
SHARDS = (1, 2, 4, 12)
SHARDED = {
    "tensor, 48": {"num_envs": 48, "total_iterations": 60},
    "tensor, 1008": {"num_envs": 1008, "total_iterations": 5},
    "sync, 48": {"num_envs": 48, "total_iterations": 5, "vectorization": "sync"},
}


def run(case, way):
    """Steps per second, seconds of the command, and what it left."""
    before, after = WAYS[way]
    with tempfile.TemporaryDirectory() as out_dir:
        command = [sys.executable, *before, str(ROOT / "scripts" / "train.py")]
        command += [*CASES[case], *FIXED.split(), *after, "--out-dir", out_dir]
        started = time.perf_counter()
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}"},
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(f"error: {case}, {way}: exit status {done.returncode}\n{done.stderr}")
        (run_dir,) = Path(out_dir).iterdir()
        summary = json.loads(done.stdout)
        return {
            "steps_per_second": summary["steps_per_second"],
            "compile_seconds": summary["compile_seconds"],
            "command_seconds": seconds,
            "left": left_by(run_dir),
        }


def left_by(run_dir):
    """A digest of the last parameters and of every row without its clock."""
    import torch

    from vecpg.run.checkpoint import STATE, newest_valid

    found = hashlib.sha256()
    parameters = newest_valid(run_dir).read(STATE)["policy"]["parameters"]
    for name, value in parameters.items():
        found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        kept = {k: v for k, v in row.items() if k != "charts/SPS" and not k.startswith("perf/")}
        found.update(json.dumps(kept).encode())
    return found.hexdigest()


def compared(rounds):
    """By case and way, what every round took."""
    found = {case: {way: [] for way in WAYS} for case in CASES}
    for case in CASES:
        expected = None
        for turn in range(rounds + 1):
            for way in WAYS if turn % 2 else reversed(WAYS):
                one = run(case, way)
                left = one.pop("left")
                expected = expected or left
                if left != expected:
                    sys.exit(f"error: {case}: {way} did not come to the same bits")
                if turn:  # the first compiles
                    found[case][way].append(one)
        print(f"{case}: {rounds} rounds", file=sys.stderr, flush=True)
    return found


def sharded(rounds):
    """Steps per second of one process with one thread, by case and number of shards."""
    found = {case: {shards: [] for shards in SHARDS} for case in SHARDED}
    for case in SHARDED:
        first = [speed_and_row(case, shards)[1] for shards in SHARDS]
        for row in first[1:]:
            if not all(near(row[name], first[0][name]) for name in row):
                sys.exit(f"error: {case}: shards change more than rounding: {first}")
        for turn in range(rounds):
            for shards in SHARDS if turn % 2 else reversed(SHARDS):
                found[case][shards].append(speed_and_row(case, shards)[0])
    return found


def near(one, other):
    return one == other or abs(one - other) < 1e-3 * abs(other) + 1e-6


def speed_and_row(case, shards):
    """Of a run, and its first row without the clock."""
    from vecpg.config import Config
    from vecpg.train import train

    with tempfile.TemporaryDirectory() as out_dir:
        result = train(
            Config(
                **SHARDED[case],
                num_steps=512,
                shards=shards,
                threads=1,
                total_timesteps=None,
                target_return=None,
                eval_episodes=1,
                save_every=1e9,
                out_dir=out_dir,
                progress=False,
                log_every=1e9,
            )
        )
        line = (result.run_dir / "metrics.jsonl").read_text().splitlines()[0]
    row = {
        name: value
        for name, value in json.loads(line).items()
        if name != "charts/SPS" and not name.startswith("perf/") and value is not None
    }
    return result.summary["steps_per_second"], row


def ratios(one, other):
    """Of every round; their median, and the least and largest."""
    each = [mine / theirs for mine, theirs in zip(one, other, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def speeds(runs):
    return [one["steps_per_second"] for one in runs]


def tables(result):
    """Markdown: ranks beside threads, and shards."""
    from hour.tables import aligned

    heading = ["", "one thread, steps/s", "two threads", "two ranks", "two ranks of two threads"]
    rows = [[*heading, "command: one thread", "two ranks"]]
    for case, found in result["ranks"].items():
        base, threads, ranks = (speeds(found[way]) for way in WAYS)
        walls = (
            statistics.median(one["command_seconds"] for one in found[way])
            for way in ("one thread", "two ranks")
        )
        rows.append(
            [
                case,
                f"{statistics.median(base):,.0f}",
                ratios(threads, base),
                ratios(ranks, base),
                ratios(ranks, threads),
                *(f"{wall:.1f} s" for wall in walls),
            ]
        )
    parts = [aligned(rows)]
    rows = [["", "1 shard, steps/s", *(f"{shards} shards" for shards in SHARDS[1:])]]
    for case, found in result["shards"].items():
        one, *others = (found[shards] for shards in SHARDS)
        rows.append(
            [case, f"{statistics.median(one):,.0f}", *(ratios(each, one) for each in others)]
        )
    return "\n\n".join([*parts, aligned(rows)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--record", action="store_true", help="write benchmarks/README.md, too")
    args = parser.parse_args()
    from vecpg.machine import commit, results_folder, system
    from vecpg.measure.report import between_marks

    machine = system()
    result = {
        "command": f"python benchmarks/ranks.py --rounds {args.rounds}",
        "commit": commit()["commit"],
        "machine": machine,
        # What else was running: of the minute before.
        "load_before": round(os.getloadavg()[0], 2),
        "shards": sharded(args.rounds),
        "ranks": compared(args.rounds),
    }
    result["load_after"] = round(os.getloadavg()[1], 2)
    path = results_folder(machine) / "ranks.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = (
        f"{machine['cpu']}, {machine['cores']} cores; medians of {args.rounds} rounds (least to"
        f" most); load {result['load_before']} before, {result['load_after']} in the last five"
        f" minutes.\n\n{tables(result)}"
    )
    print(text)
    if args.record:
        readme = ROOT / "benchmarks" / "README.md"
        whole = between_marks(readme.read_text(encoding="utf-8"), BEGIN, END, [text])
        readme.write_text(whole, encoding="utf-8")


if __name__ == "__main__":
    main()

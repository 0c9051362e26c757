"""The first hour on a GPU: is it right, how fast is it, and how far from the limit.

    python benchmarks/first_hour.py                       # every part, in under eight minutes
    python benchmarks/first_hour.py a d                   # these need torch, triton and NumPy alone
    python benchmarks/first_hour.py t                     # every tile of the returns kernel
    python benchmarks/first_hour.py --record              # its tables from what was measured

Before it starts it says which parts won't run, why, and the line that adds what they lack. Each
part is a process with a limit of time, and its JSON is whole after every measurement:
benchmarks/results/<machine>/first-hour-<part>.json. What fails costs only itself, and what is wrong
is no figure (benchmarks/README.md says what is checked). A table goes to stdout, progress to
stderr. Ctrl-C, SIGTERM or SIGHUP end it; what was measured is kept and shown. Exit status 1:
something was wrong, or nothing was measured.

Without a GPU the parts run in miniature, to see that they run; what they find is kept only where
--out-dir says.
"""

import argparse
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What is measured is the package that lies beside this file, whatever else is installed.
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from hour import parts, tables  # noqa: E402
from hour.job import BROKEN, read, write  # noqa: E402
from hour.parts import GRACE, OWN_SECONDS, PARTS, USUAL  # noqa: E402

# Less is not worth the start of a process.
_LEAST_SECONDS = 8


class Ended(BaseException):
    """By a signal: its argument is the exit status."""


def end(signum, frame):
    raise Ended(128 + signum)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(["parts:", *(f"  {key}  {one.title}" for key, one in PARTS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{' '.join(USUAL)} if none is given"
    )
    parser.add_argument("--out-dir", type=Path, help="instead of benchmarks/results/<machine>")
    parser.add_argument("--commit", help="of these files, where they lie in no repository")
    parser.add_argument(
        "--record",
        action="store_true",
        help="measure nothing; keep the JSON of --out-dir, if it is given, in benchmarks/results,"
        " and make benchmarks/README.md, vecpg/speeds.json and vecpg/returns/cuda.json anew",
    )
    args = parser.parse_args()
    if args.record:
        if args.parts or args.commit:
            parser.error("--record: expected no PART and no --commit; it measures nothing")
        record(parser, args.out_dir)
        return
    chosen = args.parts or list(USUAL)
    if unknown := [letter for letter in chosen if letter not in PARTS]:
        parser.error(f"PART: expected of {', '.join(PARTS)}, got {', '.join(unknown)}")
    chosen = [letter for letter in PARTS if letter in chosen]

    why = why_no_gpu()
    running = plan(chosen, why)
    if not running:
        print("nothing was measured", flush=True)
        sys.exit(1)
    about = described(args.commit)
    with contextlib.ExitStack() as stack:
        folder = args.out_dir
        if folder is None and why is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        elif folder is None:
            from vecpg.machine import results_folder

            folder = results_folder(about["machine"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out-dir {folder}: expected a folder, got {error.strerror}")
        if why is None:
            promise(running, folder, about)
        found, status = measured(running, folder, about, why is not None)
    print("\n\n".join(tables.table(content) for content in found), flush=True)
    if why is None:
        given = "" if args.out_dir is None else f" --out-dir {folder}"
        tell(f"kept in {folder}; `--record{given}` makes the tables of it")
    if status or any(content["problems"] for content in found):
        sys.exit(status or 1)


def record(parser, folder):
    from hour.record import record

    try:
        print("written: " + ", ".join(str(p.relative_to(ROOT)) for p in record(ROOT, folder)))
    except ValueError as error:
        parser.error(f"--record: {error}")


def measured(letters, folder, about, miniature):
    """The contents of the parts that were begun, and the exit status if a signal ended it."""
    begun, status = [], 0
    try:
        for letter in letters:
            begun.append(letter)
            part(letter, folder, about, miniature)
    except Ended as ended:
        (status,) = ended.args
    rest = "".join(f" ({letter})" for letter in letters[len(begun) :])
    if rest:
        tell(f"not begun:{rest}")
    return [read(file_of(folder, letter)) for letter in begun], status


def file_of(folder, letter):
    return folder / f"first-hour-{letter}.json"


def why_no_gpu():
    """Why everything is in miniature; None where a GPU is there."""
    if parts.missing(PARTS["a"]):  # what every part needs is not there
        return "there is no " + " and no ".join(parts.missing(PARTS["a"]))
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here"
    return None


def plan(chosen, why):
    """Say what will run and what will not. Returns the letters of the former."""
    running, lacking = [], {}
    if why is not None:
        tell(f"{why}: there will be no figures")
    for letter in chosen:
        part = PARTS[letter]
        missing = parts.missing(part)
        lacking |= dict.fromkeys(missing)
        if missing:
            words = f"WON'T RUN: {', '.join(missing)} not installed"
        elif why is not None and part.miniature is None:
            words = "WON'T RUN: needs a GPU"
        elif why is not None:
            words = f"in miniature: {part.miniature}"
        else:
            words = f"at most {part.seconds + GRACE:.0f} s"
        if not words.startswith("WON'T"):
            running.append(letter)
        tell(f"({letter}) {part.title}: {words}")
    if lacking:
        tell(f"what is missing is added by: {parts.pip_line(list(lacking))}")
    return running


def promise(letters, folder, about):
    """Say how long it takes, and what becomes of the figures, while it costs nothing yet."""
    seconds = OWN_SECONDS + sum(PARTS[letter].seconds + GRACE for letter in letters)
    tell(f"all of it takes at most {seconds:.0f} s and is kept in {folder}")
    if about["commit"] is None:
        tell("these files lie in no repository: without --commit `--record` won't take the figures")
    elif about["dirty"]:
        tell("files differ from their commit: `--record` won't take the figures; commit first")


def described(given):
    """What stands in every file. Never a host name, a user or a path."""
    from vecpg.machine import commit, system

    machine = system()
    at = commit() if given is None else {"commit": given, "dirty": None}
    now = datetime.datetime.now(datetime.UTC)
    return {
        "schema": 1,
        "date": now.date().isoformat(),
        "time": now.isoformat(timespec="seconds"),
        **at,
        "machine": machine | gpu(),
    }


def gpu():
    """What figures of a GPU depend on besides its name."""
    import torch

    from vecpg.machine import package_version

    found = {"triton": package_version("triton"), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{about.major}.{about.minor}",
            "processors": about.multi_processor_count,
            "gpu_memory_gib": round(about.total_memory / 2**30, 1),
        }
    return found


def part(letter, folder, about, miniature):
    """Run a part, and what is left of it anew where its process ended. Returns its content."""
    chosen = PARTS[letter]
    path = file_of(folder, letter)
    tell(f"({letter}) {chosen.title}")
    empty = {"now": None, "rows": [], "problems": [], "not_reached": []}
    write(path, {"part": letter, "title": chosen.title, **about, "miniature": miniature, **empty})
    started = time.monotonic()

    def left():
        return chosen.seconds - (time.monotonic() - started)

    while True:
        ended = None
        try:
            status = run(letter, path, left(), miniature)
        except Ended as error:
            status, ended = None, error
        content = read(path)
        if status == BROKEN:
            tell("    the device answers no more; what is left goes on in another process")
        elif status != 0:
            how = f"its process ended with status {status}"
            if ended is not None:
                how = "it was interrupted"
            elif status in (None, -signal.SIGALRM):
                how = "it took longer than it may, and was ended"
            what = content["now"] or "the start"
            content["problems"].append({"what": what, "problem": how})
        content["now"] = None
        content["seconds"] = time.monotonic() - started
        write(path, content)
        if status not in (0, BROKEN):
            tell(f"    FAILED: {what}: {how}")
        if ended is not None:
            raise ended
        # Each process that goes on has one case less before it.
        if status == 0 or what_stands(content) or left() < _LEAST_SECONDS:
            return content


def what_stands(content):
    """Whether nothing was begun: another process would end the same way."""
    return any(one["what"] == "the start" for one in content["problems"])


def run(letter, path, seconds, miniature):
    """The exit status of a part's process; None if it had to be ended."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if miniature:
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "hour", letter, str(path), str(seconds)]
    command += ["miniature"] * miniature
    process = subprocess.Popen(command, env=env, stdout=sys.stderr, start_new_session=True)
    try:
        return process.wait(timeout=seconds + GRACE)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:  # it, and what it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def tell(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is not signal.SIG_IGN:  # as nohup does
            signal.signal(each, end)
    try:
        main()
    except Ended as early:
        sys.exit(*early.args)

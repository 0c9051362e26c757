"""Two "hosts" on one machine: each has a name, a network and processes of its own.

    python tests/two_hosts.py FOLDER

Trains in one process; on both hosts, by the commands of docs/distributed.md; and once more, where
one of them is lost on the way. One JSON line on stdout: what each of the three left behind.

A host is a process in namespaces of its own. Nothing of it outlives this script, nothing outside of
it is changed, and where user namespaces are allowed it needs no root.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
NAMES = ("host-a", "host-b")
PROGRAMS = ("unshare", "nsenter", "ip", "mount", "hostname")
OWN = ("--net", "--uts", "--mount", "--pid", "--fork", "--kill-child")
# Saved after every iteration: there is always something to lose.
SETTINGS = (
    "--num-envs 16 --shards 4 --total-iterations 40 --target-return none --eval-episodes 4"
    " --save-every 1e-9"
)
# How soon torchrun notices that a host is lost, and how long it waits for one that may come.
SOON = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=6"


def how():
    """The flags with which `unshare` makes namespaces on this machine.

    Raises:
        OSError: there are none; why.
    """
    if lacking := [program for program in PROGRAMS if shutil.which(program) is None]:
        raise OSError(f"two hosts on one machine need {', '.join(lacking)}")
    tried = "hostname x && mount --bind /dev/null /etc/hosts && ip link add x type veth peer name y"
    for flags in (["--user", "--map-root-user"], []):
        command = ["unshare", *flags, *OWN, "sh", "-c", tried]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return flags
    raise OSError(f"this machine makes no namespaces: {done.stderr.strip()}")


class Host:
    """A machine, until it is lost."""

    def __init__(self, name, hosts):
        begin = f"hostname {name} && mount --bind '{hosts}' /etc/hosts && ip link set lo up"
        command = f"{begin} && echo ready && exec sleep infinity"
        self.first = subprocess.Popen(
            ["unshare", *OWN, "sh", "-c", command], stdout=subprocess.PIPE, text=True
        )
        if self.first.stdout.readline() != "ready\n":
            raise OSError(f"{name} did not begin")

    def command(self, *words):
        """What runs a command there, in this directory."""
        pid = self.first.pid
        spaces = ["--net", "--uts", "--mount", f"--pid=/proc/{pid}/ns/pid_for_children"]
        return ["nsenter", f"--target={pid}", *spaces, f"--wd={Path.cwd()}", *words]

    def lose(self):
        """As if its power failed: all its processes end, and nobody hears of it."""
        subprocess.run(self.command("ip", "link", "set", "eth0", "down"), check=True)
        self.end()

    def end(self):
        self.first.kill()
        self.first.wait()
        self.first.stdout.close()


@contextmanager
def two_hosts(folder):
    """Two, joined by a cable, that know each other by name; all of this process's file system."""
    hosts = folder / "hosts"
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(NAMES, 1)}
    lines = [f"{address} {name}\n" for name, address in addresses.items()]
    hosts.write_text("".join(["127.0.0.1 localhost\n", *lines]))
    with ExitStack() as stack:
        made = []
        for name in NAMES:
            made.append(Host(name, hosts))
            stack.callback(made[-1].end)
        one, other = (str(host.first.pid) for host in made)
        cable = f"ip link add eth0 netns {one} type veth peer name eth0 netns {other}"
        subprocess.run(cable.split(), check=True)
        for host, address in zip(made, addresses.values(), strict=True):
            plug = f"ip address add {address}/24 dev eth0 && ip link set eth0 up"
            subprocess.run(host.command("sh", "-c", plug), check=True)
        yield made


def train(out_dir):
    return [str(ROOT / "scripts" / "train.py"), *SETTINGS.split(), "--out-dir", str(out_dir)]


def torchrun(nnodes, *options):
    """The command that is typed on every host."""
    where = f"--rdzv-backend c10d --rdzv-endpoint {NAMES[0]}:29400 --rdzv-id vecpg"
    given = ["--nnodes", nnodes, "--nproc-per-node", "1", *where.split(), *options]
    return [sys.executable, "-m", "torch.distributed.run", *given]


@contextmanager
def started(command, log):
    """A command, until it has ended, or is no longer wanted."""
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process, log, seconds=120):
    if (code := process.wait(seconds)) != 0:
        sys.exit(f"error: expected exit status 0, got {code}:\n{log.read_text()}")


# -- The three runs ------------------------------------------------------------------------------


def in_one_process(folder):
    log = folder / "one.log"
    with started([sys.executable, *train(folder / "one")], log) as process:
        finish(process, log)


def on_two_hosts(folder):
    command = [*torchrun("2"), *train(folder / "both")]
    logs = [folder / f"both on {name}.log" for name in NAMES]
    with two_hosts(folder) as hosts, ExitStack() as stack:
        processes = [
            stack.enter_context(started(host.command(*command), log))
            for host, log in zip(hosts, logs, strict=True)
        ]
        for process, log in zip(processes, logs, strict=True):
            finish(process, log)


def on_one_that_is_left(folder):
    options = ["--max-restarts", "5", "--rdzv-conf", SOON]
    command = [*torchrun("1:2", *options), *train(folder / "left"), "--dist-timeout", "5"]
    logs = [folder / f"left on {name}.log" for name in NAMES]
    with two_hosts(folder) as hosts, ExitStack() as stack:
        stays, _ = (
            stack.enter_context(started(host.command(*command), log))
            for host, log in zip(hosts, logs, strict=True)
        )
        deadline = time.monotonic() + 60
        while not any((folder / "left").glob("*/checkpoints/*[1-9]")):
            if time.monotonic() > deadline:
                sys.exit(f"error: nothing was saved:\n{logs[0].read_text()}")
            time.sleep(0.01)
        hosts[1].lose()
        finish(stays, logs[0])
    if "going on after iteration" not in logs[0].read_text():
        sys.exit(f"error: it had come to its end before:\n{logs[0].read_text()}")


def main(folder, inside):
    if not inside:
        command = [
            "unshare",
            *how(),
            "--net",
            "--mount",
            sys.executable,
            __file__,
            folder,
            "inside",
        ]
        os.execvp(command[0], command)
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(HERE))
    os.environ["PYTHONPATH"] = str(ROOT)
    from test_run_files import left_behind

    left = {}
    for case in (in_one_process, on_two_hosts, on_one_that_is_left):
        started = time.monotonic()
        case(folder)
        print(f"{case.__name__}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    for name in ("one", "both", "left"):
        (run_dir,) = (folder / name).iterdir()
        left[name] = left_behind(run_dir)
    print(json.dumps(left))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["inside"])

import errno
import hashlib
import logging
import os
import pickle
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numba
import pytest
from conftest import ROOT
from numba.core.caching import NullCache

from vecpg.kernels import jit as module
from vecpg.kernels import threads
from vecpg.kernels.announce import anew
from vecpg.kernels.jit import Compilation, jit


def test_compilation_is_timed_and_announced_once(caplog, monkeypatch):
    monkeypatch.setattr(module, "_Cache", lambda function: NullCache())  # nothing from before

    def inner(x):
        return x + 1

    inner = jit(inner)

    def outer(x):
        return inner(x) * 2

    outer = jit(outer)
    with caplog.at_level(logging.INFO, "vecpg"), Compilation() as compilation:
        assert outer(3) == 8
        first = compilation.seconds
        assert outer(4) == 10
        assert compilation.seconds == first > 0
        assert outer(1.5) == 5.0
        assert compilation.seconds > first
    assert [record.message for record in caplog.records].count(
        "compiling kernels, once for runs of this kind; this takes up to twenty seconds"
    ) == 1
    seconds = compilation.seconds
    assert outer(1j) == 2 + 2j
    assert compilation.seconds == seconds


def test_what_another_thread_compiles_is_not_counted():
    one, other = numba.njit(lambda x: x + 1), numba.njit(lambda x: x + 2)
    with Compilation() as compilation:
        thread = threading.Thread(target=one, args=(1,))
        thread.start()
        thread.join()
        assert one.signatures
        assert compilation.seconds == 0
        other(1)
        assert compilation.seconds > 0


def test_what_threads_of_kernels_compile_is_counted():
    """Whichever of them comes first; the others wait for it."""
    one, main = numba.njit(lambda x: x + 3), threading.get_ident()
    came = threading.Barrier(2)

    def task(block):
        came.wait(timeout=60)
        if threading.get_ident() != main:
            one(1)

    with Compilation() as compilation, threads.using(2):
        threads.run(task, 2)
    assert one.signatures
    assert compilation.seconds > 0


def fake_triton(version):
    """Triton's hooks, as they were up to 3.3 and are since 3.4; `compile` calls them as it does."""
    jit = SimpleNamespace(JITFunction=SimpleNamespace(cache_hook=None, compiled_hook=None))
    fake = SimpleNamespace(runtime=SimpleNamespace(jit=jit))
    owner, names = jit.JITFunction, ("cache_hook", "compiled_hook")
    if version >= 3.4:
        owner = SimpleNamespace(jit_cache_hook=None, jit_post_compile_hook=None)
        fake.knobs, names = SimpleNamespace(runtime=owner), (*vars(owner),)

    def compile(seconds):
        if not getattr(owner, names[0])(key="k", is_manual_warmup=False):
            time.sleep(seconds)
            getattr(owner, names[1])(key="k", is_manual_warmup=False)

    return fake, owner, names, compile


@pytest.mark.parametrize("version", [3.2, 3.7])
def test_what_triton_compiles_is_counted_and_announced_once(version, caplog):
    fake, owner, names, compile = fake_triton(version)
    told = []
    setattr(owner, names[0], lambda **given: told.append(given["key"]) or len(told) == 4)
    module.hear_triton(fake)
    hooks = [getattr(owner, name) for name in names]
    module.hear_triton(fake)
    assert hooks == [getattr(owner, name) for name in names]
    with caplog.at_level(logging.INFO, "vecpg"), Compilation() as compilation:
        compile(0.01)
        first = compilation.seconds
        assert first >= 0.01
        compile(0.01)
        assert compilation.seconds >= first + 0.01
        seconds = compilation.seconds
        thread = threading.Thread(target=compile, args=(0.01,))  # another run's
        thread.start()
        thread.join()
        compile(0.01)  # the hook that was there says not to
        assert compilation.seconds == seconds
    compile(0.01)
    assert compilation.seconds == seconds
    assert told == ["k"] * 5
    assert [record.message for record in caplog.records] == [
        "compiling the GPU's kernels, or loading those of an earlier run"
    ]


@pytest.mark.slow
def test_without_a_writable_directory_it_still_compiles_and_says_so(tmp_path):
    """No cache beside the source, none in the user's directory."""
    (tmp_path / "kernel.py").write_text(
        "import logging\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "from vecpg.kernels.jit import Compilation, jit\n"
        "@jit\n"
        "def twice(x):\n"
        "    return 2 * x\n"
        "@jit\n"
        "def thrice(x):\n"
        "    return 3 * x\n"
        "with Compilation():\n"
        "    print(twice(2) + thrice(1))\n"
    )
    program = (
        "import runpy, numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "runpy.run_path('kernel.py')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "7\n"
    assert result.stderr.count("no directory for compiled code can be written to") == 1
    # Not "once".
    assert "compiling kernels; this takes up to twenty seconds\n" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["add", "inner.add"])
def test_machine_code_is_renewed_when_a_file_changes_that_it_calls_into(tmp_path, name):
    """Numba's own cache would go on with the old one."""
    outer = (
        f"{'import inner' if '.' in name else 'from inner import add'}\n"
        "from vecpg.kernels.jit import Compilation, jit\n"
        "@jit\n"
        "def twice(x):\n"
        f"    return {name}(x)\n"
        "with Compilation() as compilation:\n"
        "    print(twice(1), compilation.seconds > 0)\n"
    )
    (tmp_path / "outer.py").write_text(outer)

    def run(added):
        text = f"from vecpg.kernels.jit import jit\n@jit\ndef add(x):\n    return x + {added}\n"
        (tmp_path / "inner.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "outer.py"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert run(1) == ["2", "True"]
    assert run(1) == ["2", "False"]
    assert run(5) == ["6", "True"]


@pytest.mark.slow
def test_machine_code_is_renewed_when_what_its_instructions_are_built_with_changes(tmp_path):
    (tmp_path / "builder.py").write_text(
        "from numba.extending import intrinsic\n"
        "from inner import scaled\n"
        "class Building:\n"
        "    def build(self, builder, value):\n"
        "        return scaled(builder, value)\n"
        "@intrinsic\n"
        "def scale(context, value):\n"
        "    def build(target, builder, signature, args):\n"
        "        return Building().build(builder, args[0])\n"
        "    return value(value), build\n"
    )
    (tmp_path / "outer.py").write_text(
        "from builder import scale\n"
        "from vecpg.kernels.jit import Compilation, jit\n"
        "@jit\n"
        "def scaled(x):\n"
        "    return scale(x)\n"
        "with Compilation() as compilation:\n"
        "    print(scaled(2), compilation.seconds > 0)\n"
    )

    def run(factor):
        (tmp_path / "inner.py").write_text(
            f"def scaled(builder, value):\n    return builder.mul(value, value.type({factor}))\n"
        )
        done = subprocess.run(
            [sys.executable, "outer.py"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert run(3) == ["6", "True"]
    assert run(3) == ["6", "False"]
    assert run(5) == ["10", "True"]


@pytest.mark.slow
def test_a_number_or_a_function_it_was_made_with_is_part_of_the_key(tmp_path):
    (tmp_path / "made.py").write_text(
        "import sys\n"
        "from vecpg.kernels.jit import jit\n"
        "def make(number, function):\n"
        "    @jit\n"
        "    def made(x):\n"
        "        return function(x) + number\n"
        "    return made\n"
        "@jit\n"
        "def half(x):\n"
        "    return x / 2\n"
        "@jit\n"
        "def double(x):\n"
        "    return x * 2\n"
        "print(*(make(number, f)(4.0) for f in (half, double) for number in (1, 10)))\n"
        "print(make(1, make(5, half))(4.0), make(1, make(6, half))(4.0))\n"
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "made.py"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["3.0", "12.0", "9.0", "18.0", "8.0", "9.0"]


def load_twice(directory):
    """A compiled function of a file of its own, as a new process would have it."""
    path = directory / "kernel.py"
    path.write_text("from vecpg.kernels.jit import jit\n@jit\ndef twice(x):\n    return 2 * x\n")
    return runpy.run_path(str(path))["twice"]


def call(directory):
    """The result as a new process would have it, and whether it was compiled."""
    twice = load_twice(directory)
    with anew():
        result = twice(2)
    return result, sum(twice.stats.cache_misses.values())


def damage(path, how):
    content = path.read_bytes()
    if how == "directory":
        path.unlink()
        (path / "inside").mkdir(parents=True)
    elif how == "one bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "one byte more":
        path.write_bytes(content + b"0")
    elif how == "another's":
        # Whole, with its digest, but not for what the index says.
        kept = pickle.dumps(("another key", "its code"))
        path.write_bytes(hashlib.sha256(kept).digest() + kept)
    elif how == "another index":
        version = pickle.dumps(numba.__version__)
        path.write_bytes(version + pickle.dumps((load_twice.stamp, ["no", "dictionary"])))
    elif how == "another version":
        path.write_bytes(pickle.dumps("0.1") + b"whatever that wrote")
    else:
        path.write_bytes(how)


DAMAGES = [b"", bytes(64), b"not a pickle", pickle.dumps(5), pickle.dumps({}), "directory", "half"]


@pytest.mark.parametrize(
    ("ending", "how"),
    [(ending, how) for ending in ("nbi", "nbc") for how in DAMAGES]
    + [("nbc", "one bit"), ("nbc", "one byte more"), ("nbc", "another's")]
    + [("nbi", "another index"), ("nbi", "another version")],
)
def test_a_damaged_file_is_compiled_anew_and_replaced(tmp_path, caplog, ending, how):
    """As a machine that lost its power leaves them: Numba's own would raise at every start."""
    caplog.set_level(logging.INFO, "vecpg")
    assert call(tmp_path) == (4, 1)
    assert call(tmp_path) == (4, 0)
    (kept,) = (tmp_path / "__pycache__").glob(f"*.{ending}")
    load_twice.stamp = load_twice(tmp_path)._cache._cache_file._source_stamp
    damage(kept, how)
    caplog.clear()
    assert call(tmp_path) == (4, 1)
    said = [one.message for one in caplog.records]
    # Of another version, or for another call, it is no damage.
    silent = how in ("another version", "another's")
    silent = silent or (ending == "nbi" and how in (pickle.dumps(5), pickle.dumps({})))
    expected = f"what is kept in {kept.parent} cannot be read; compiling it anew"
    assert said == ([] if silent else [expected])
    assert kept.is_file()
    assert call(tmp_path) == (4, 0)


def test_what_cannot_be_linked_is_compiled_anew_and_replaced(tmp_path, caplog, monkeypatch):
    """Read and unpickled, but refused by the compiler's library."""
    caplog.set_level(logging.INFO, "vecpg")
    assert call(tmp_path) == (4, 1)
    real = module.FunctionCache._impl_class.rebuild

    def rebuild(self, *args):
        monkeypatch.setattr(module.FunctionCache._impl_class, "rebuild", real)
        real(self, *args)
        raise RuntimeError("LLVM ERROR: symbols not found")

    monkeypatch.setattr(module.FunctionCache._impl_class, "rebuild", rebuild)
    assert call(tmp_path) == (4, 1)
    assert "cannot be read; compiling it anew" in caplog.text
    assert call(tmp_path) == (4, 0)


def test_what_two_processes_kept_under_one_name_is_not_mixed_up(tmp_path):
    """Each begins an index, unaware of the other's, and the files come in the other order."""
    one, other = load_twice(tmp_path), load_twice(tmp_path)
    files = one._cache._cache_file, other._cache._cache_file
    saved = []
    for each in files:
        each._save_data = lambda *args, each=each: saved.append((each, args))
    assert one(2) == 4
    Path(files[0]._index_path).unlink()
    assert other(2.5) == 5.0
    names = [args[0] for _, args in saved]
    assert names[0] == names[1]
    for each, args in reversed(saved):  # for whole numbers lies where the index has real ones
        type(each)._save_data(each, *args)
    for _ in range(2):
        again = load_twice(tmp_path)
        assert (again(2.5), again(2)) == (5.0, 4)
    assert sum(again.stats.cache_misses.values()) == 0


def test_what_can_neither_be_read_nor_replaced_is_compiled_every_time(
    tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "vecpg")
    twice = load_twice(tmp_path)
    Path(twice._cache._cache_file._index_path).mkdir()

    def rename(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "rename", rename)
    assert twice(2) == 4
    assert twice(2.5) == 5.0
    directory = tmp_path / "__pycache__"
    assert [one.message for one in caplog.records] == [
        f"what is kept in {directory} cannot be read; compiling it anew",
        f"compiled code cannot be kept in {directory}: Permission denied",
    ]


def test_a_full_disk_is_no_failure(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "vecpg")
    twice = load_twice(tmp_path)

    def save(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(twice._cache._cache_file, "save", save)
    assert twice(2) == 4
    assert twice(2.5) == 5.0
    directory = tmp_path / "__pycache__"
    assert [one.message for one in caplog.records] == [
        f"compiled code cannot be kept in {directory}: No space left on device"
    ]

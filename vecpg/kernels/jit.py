"""Machine code from Python functions, with the settings that every kernel here shares.

It lies in this package because this package imports nothing else of vecpg.
"""

import functools
import hashlib
import logging
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType, TracebackType
from typing import Any, BinaryIO

import numba
import numpy as np
from numba.core import event
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic

from vecpg.kernels.announce import once

_log = logging.getLogger(__name__)
# What `intrinsic` makes; Numba has no public name for it.
_Intrinsic = type(intrinsic(lambda context: None))
_DIGEST_BYTES = hashlib.sha256().digest_size
# Whether there is a function for which no directory was found that machine code can be kept in.
_not_kept = False


def jit(
    function: Callable[..., Any] | None = None, *, as_written: bool = False, inlined: bool = False
) -> Any:
    """Compile `function` when it is first called, and keep the machine code on disk.

    The interpreter's lock is released while it runs. Sums may be taken in another order, so that
    they vectorize: the same order at every call of the same machine code. With `as_written` nothing
    is reordered or fused, and every operation rounds like torch's. NaN and infinity are kept. With
    `inlined` it becomes a part of compiled functions that call it, whatever its size, so that loops
    around it vectorize.

    It is kept beside the source; where that cannot be written to, in the user's cache directory.
    Where neither can, it is compiled anew in every process, and the log says so. It is compiled
    anew, too, when its file changed, or that of a compiled function it calls by its name, or a
    number it names, or that it reaches through a module that it names; and where it calls what
    builds instructions, when the file of that changed, or of a function that file names.
    """
    if function is None:
        return functools.partial(jit, as_written=as_written, inlined=inlined)
    settings: dict[str, Any] = {
        "nogil": True,
        "no_cfunc_wrapper": True,  # nobody calls these from C, and it takes time to compile
        "error_model": "numpy",  # no check for division by zero, which would not vectorize
        "forceinline": inlined,
        "fastmath": False if as_written else {"contract", "reassoc", "nsz", "arcp"},
    }
    compiled = numba.njit(**settings)(function)
    try:
        compiled._cache = _Cache(function)
    except (RuntimeError, OSError):
        global _not_kept
        _not_kept = True
        once(
            _log,
            "no directory for compiled code can be written to; compiling at every start;"
            " NUMBA_CACHE_DIR names another",
        )
    return compiled


class _Cache(FunctionCache):
    """Numba's own looks at the file of the function alone, not at what it calls.

    A function may also call compiled functions that it was made with: they stand in its closure,
    where Numba's own would take them for new ones in every process.

    Numba's own raises where a file is damaged, or cannot be read or written. This one compiles.
    """

    _cache_file: "_Files"

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        numbas = self._cache_file
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, numbas._source_stamp)  # type: ignore[no-untyped-call]

    def _load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super()._load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        # What was kept whole may still not go with this machine's libraries.
        except Exception:
            self._cache_file.announce()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep machine code for the next process, if its file can be written."""
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except OSError as error:
            once(_log, f"compiled code cannot be kept in {self.cache_path}: {error.strerror}")

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        made_of = repr((_contents(__file__), _parts(self._py_func, ())))
        return (sig, codegen.magic_tuple(), hashlib.sha256(made_of.encode()).hexdigest())


class _Files(IndexDataCacheFile):
    """Where machine code is kept: an index of keys, and beside it a file for each.

    A file holds, behind its digest, what it was kept for. So what is cut, damaged or another's is
    not run, and anything that cannot be read is as good as nothing: it is written anew.
    """

    def announce(self) -> None:
        """Say that something is compiled although there is a file of it."""
        once(_log, f"what is kept in {self._cache_path} cannot be read; compiling it anew")

    def load(self, key: Any) -> Any:
        """What was kept under a key; None where there is nothing that can be used."""
        name = self._load_index().get(key)
        if name is None:
            return None
        try:
            content = Path(self._data_path(name)).read_bytes()  # type: ignore[no-untyped-call]
            digest, kept = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if hashlib.sha256(kept).digest() != digest:
                raise ValueError("the file is damaged")
            owner, data = pickle.loads(kept)
        except FileNotFoundError:
            return None
        # Unpickling what another version kept raises a dozen different types.
        except Exception:
            self.announce()
            return None
        # Two processes that begin an index at the same time give the same name to two files.
        return data if owner == key else None

    def save(self, key: Any, data: Any) -> None:
        """Keep it."""
        super().save(key, (key, data))  # type: ignore[no-untyped-call]

    def _load_index(self) -> dict[Any, str]:
        try:
            index = super()._load_index()  # type: ignore[no-untyped-call]
            if isinstance(index, dict) and all(isinstance(name, str) for name in index.values()):
                return index
        # As in `load`.
        except Exception:
            pass
        self.announce()
        return {}

    def _save_data(self, name: str, data: Any) -> None:
        kept = self._dump(data)  # type: ignore[no-untyped-call]
        path = self._data_path(name)  # type: ignore[no-untyped-call]
        with self._open_for_write(path) as file:
            file.write(hashlib.sha256(kept).digest() + kept)

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[BinaryIO]:
        if Path(filepath).is_dir():  # which no file can take the place of
            Path(filepath).rename(f"{filepath}.{uuid.uuid4().hex[:16]}")
        with super()._open_for_write(filepath) as file:
            yield file


def _parts(function: Callable[..., Any], callers: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function is made of: its file, its code, and what it names: numbers, compiled
    functions and those that build instructions.

    What its callers are made of is known to them.
    """
    code = function.__code__
    used = [function.__globals__.get(name) for name in code.co_names]
    # What it reaches through a module, such as `ops.sin`.
    modules = [each for each in used if isinstance(each, ModuleType)]
    used += [getattr(module, name, None) for module in modules for name in code.co_names]
    used += [cell.cell_contents for cell in function.__closure__ or ()]
    used += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    parts: list[Any] = [function.__module__, function.__qualname__, _instructions(code)]
    parts.append(_contents(code.co_filename))
    for each in used:
        if isinstance(each, Dispatcher) and each.py_func not in (function, *callers):
            parts.append(_parts(each.py_func, (function, *callers)))
        elif isinstance(each, _Intrinsic):
            defined: Any = each
            builder = defined.__wrapped__
            parts.append(_parts(builder, (function, *callers)))
            # It is no compiled function that calls: it may build by any function its file names.
            named = [
                each for each in builder.__globals__.values() if isinstance(each, FunctionType)
            ]
            parts += sorted({_contents(each.__code__.co_filename) for each in named})
        elif isinstance(each, int | float | tuple | np.generic):
            parts.append(repr(each))
    return tuple(parts)


def _instructions(code: CodeType) -> tuple[Any, ...]:
    """Code with the names and constants that it uses, without addresses."""
    constants = [
        _instructions(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts
    ]
    return (code.co_code, code.co_names, *constants)


@functools.cache
def _contents(path: str) -> str:
    # There is no file of what was typed at a prompt.
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""


class Compilation(event.Listener):
    """Seconds spent compiling while it is entered; the first time it happens, the log says so.

    They are those of this thread, and of the threads that run kernels for others. What another one
    compiles meanwhile, for another run, keeps this one from nothing. What Triton compiles, or loads
    from its own cache, counts as soon as `hear_triton` was called.

    Example:
        >>> with Compilation() as compilation:
        ...     numba.njit(lambda x: x + 1)(1)
        2
        >>> compilation.seconds > 0
        True
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._said: set[str] = set()
        self._depth = 0
        self._started = 0.0
        self._thread = 0

    def __enter__(self) -> "Compilation":
        self._thread = threading.get_ident()
        event.register("numba:compile", self)  # type: ignore[no-untyped-call]
        _entered.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _entered.remove(self)
        event.unregister("numba:compile", self)  # type: ignore[no-untyped-call]

    def on_start(self, event: Any) -> None:
        """A function that calls others compiles them within its own compilation."""
        if not self._counts():
            return
        if self._depth == 0:
            self._started = time.perf_counter()
            again = "" if _not_kept else ", once for runs of this kind"
            self._say(f"compiling kernels{again}; this takes up to twenty seconds")
        self._depth += 1

    def on_end(self, event: Any) -> None:
        """Count the outermost ones."""
        if not self._counts():
            return
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._started

    def on_triton_start(self) -> None:
        """Triton does not tell whether it will find a kernel among those that it kept."""
        if self._counts():
            self._started = time.perf_counter()
            self._say("compiling the GPU's kernels, or loading those of an earlier run")

    def on_triton_end(self) -> None:
        """Kernels of Triton's are compiled one by one."""
        if self._counts():
            self.seconds += time.perf_counter() - self._started

    def _say(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            _log.info(words)

    def _counts(self) -> bool:
        thread = threading.current_thread()
        # As `vecpg.kernels.threads` calls its own.
        return thread.ident == self._thread or thread.name.startswith("vecpg_")


_entered: list[Compilation] = []


def hear_triton(triton: ModuleType) -> None:
    """Have Triton tell every `Compilation` what it compiles; who imports Triton calls this.

    It tells by two functions, one called before a kernel is compiled or loaded and one after:
    `knobs.runtime.jit_cache_hook` and `jit_post_compile_hook` since 3.4, and before that
    `JITFunction.cache_hook` and `compiled_hook`. Those that stood there are called too.
    """
    knobs = getattr(triton, "knobs", None)
    owner = triton.runtime.jit.JITFunction if knobs is None else knobs.runtime
    before, after = ("cache_hook", "compiled_hook")
    if knobs is not None:
        before, after = "jit_cache_hook", "jit_post_compile_hook"

    def hooked(hook: str, tell: Callable[[Compilation], None]) -> None:
        other = getattr(owner, hook)
        if getattr(other, "__module__", None) == __name__:
            return

        def told(**given: Any) -> Any:
            for each in [*_entered]:
                tell(each)
            # Of the first, something else than None or False says not to compile.
            return None if other is None else other(**given)

        setattr(owner, hook, told)

    hooked(before, Compilation.on_triton_start)
    hooked(after, Compilation.on_triton_end)

"""A recorder in place of a CUDA graph: what a function did, done again on the same memory.

A CUDA graph holds the device's operations and the addresses they were done on, and nothing of the
host: what Python decided while it was captured stays decided. A recorder holds the same, on any
device, and so shows without a GPU whether a function is fit to be captured.
"""

import functools
from collections.abc import Callable
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _pop_mode_temporarily,
)

# Of these the size of the result, or the result itself, is a matter of what tensors hold.
_WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_"}
_FLAGS = (torch.bool, torch.uint8)

_recorders: list["Recorder"] = []


@functools.cache
def name_of(operation) -> str:
    """An operation's name without its namespace and overload, as "add" of aten.add.Tensor."""
    return operation._schema.name.split("::")[1]


def why_it_waits(operation, args: tuple, kwargs: dict) -> str | None:
    """What an operation of CUDA tensors makes the host wait for, as a kind; None where nothing."""
    name = name_of(operation)
    if name in _WAITS:
        return "item" if name in ("_local_scalar_dense", "is_nonzero") else name
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return name
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [index for index in args[1] if index is not None]
        if not any(index.dtype in _FLAGS for index in indices):
            return None
        # One mask and a number from the host: torch fills where the mask is set.
        filled = name != "index" and len(indices) == 1 and args[2].numel() == 1
        if filled and not args[2].is_cuda and not (len(args) > 3 and args[3]):
            return None
        return "boolean index"
    return None


def tensors_in(nested) -> list[Tensor]:
    """The tensors in what an operation takes or gives."""
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = nested.values()
    elif not isinstance(nested, tuple | list):
        return []
    return [each for part in nested for each in tensors_in(part)]


@functools.cache
def does_nothing(operation) -> bool:
    """A view of memory, or memory in which nothing stands yet."""
    return operation.is_view or name_of(operation) in _ALLOCATIONS


@functools.cache
def _is_composite(operation) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), key)


def decomposed(mode: TorchDispatchMode, operation, args: tuple, kwargs: dict):
    """The result of an operation that is made of others, those seen by `mode`; NotImplemented.

    Where nothing is inferred, torch takes such an operation apart before a mode sees it.
    """
    if not _is_composite(operation):
        return NotImplemented
    with mode:
        return operation.decompose(*args, **kwargs)


class Mode(TorchDispatchMode):
    """A TorchDispatchMode that does without the compiler, which takes seconds to import."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Recorder(Mode):
    """Records every operation on tensors of a device while it is entered; `replay` does them again.

    Raises:
        RuntimeError: from within, where a captured graph would: the host reads what a tensor holds.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self._device_type = torch.device(device).type
        self._calls: list[tuple[Callable, tuple, dict, list[Tensor]]] = []
        # Memory that was there before, with what it held; and memory that was made.
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._made: dict[int, torch.UntypedStorage] = {}

    def __enter__(self):
        _recorders.append(self)
        return super().__enter__()

    def __exit__(self, *raised) -> None:
        _recorders.pop()
        super().__exit__(*raised)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = decomposed(self, operation, args, kwargs)
        if result is not NotImplemented:
            return result
        given = tensors_in((args, kwargs))
        if given and not self._own(given):
            return operation(*args, **kwargs)
        reason = why_it_waits(operation, args, kwargs)
        if reason is not None:
            raise _not_permitted(reason)
        return self._do(operation, args, kwargs, recorded=not does_nothing(operation))

    def whole(self, function: Callable, args: tuple, kwargs: dict):
        """Call a function, recorded as if it were one operation."""
        with _pop_mode_temporarily():
            return self._do(function, args, kwargs, recorded=True)

    def _own(self, tensors: list[Tensor]) -> list[Tensor]:
        return [each for each in tensors if each.device.type == self._device_type]

    def _do(self, function, args, kwargs, recorded):
        for each in self._storages((args, kwargs)):
            if each._cdata not in self._made and each._cdata not in self._before:
                with _disable_current_modes():
                    self._before[each._cdata] = each, each.clone()
        result = function(*args, **kwargs)
        for each in self._storages(result):
            if each._cdata not in self._before:
                self._made[each._cdata] = each
        if recorded:
            self._calls.append((function, args, kwargs, tensors_in(result)))
        return result

    def _storages(self, nested) -> list[torch.UntypedStorage]:
        return [each.untyped_storage() for each in self._own(tensors_in(nested))]

    def undo(self) -> None:
        """Memory as it was before; what was made holds nothing yet."""
        with _disable_current_modes():
            for storage, content in self._before.values():
                storage.copy_(content)
            for storage in self._made.values():
                storage.fill_(255)

    def replay(self) -> None:
        """Everything again, on the memory and with the arguments of the first time."""
        with torch.inference_mode():
            for function, args, kwargs, before in self._calls:
                result = function(*args, **kwargs)
                for old, new in zip(before, tensors_in(result), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    @contextmanager
    def unread(self):
        """Nothing hands a tensor's numbers to the host without an operation."""

        def refusing(name):
            original = getattr(Tensor, name)

            def read(tensor, *args, **kwargs):
                if self._own([tensor]):
                    raise _not_permitted(name)
                return original(tensor, *args, **kwargs)

            return mock.patch.object(Tensor, name, read)

        with refusing("tolist"), refusing("numpy"), refusing("__array__"):
            yield


def _not_permitted(reason: str) -> RuntimeError:
    return RuntimeError(f"operation not permitted when stream is capturing: {reason}")


def innermost() -> Recorder | None:
    """The recorder that records now."""
    return _recorders[-1] if _recorders else None


def record(function: Callable[[], None], device: torch.device | str = "cpu") -> Callable[[], None]:
    """Call a function, and return what does its operations on a device again.

    Raises:
        RuntimeError: as `Recorder`.
    """
    recorder = Recorder(device)
    with recorder.unread(), recorder:
        function()
    return recorder.replay

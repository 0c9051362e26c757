"""A device that is not there: tensors in the host's memory that say they are on `cuda:0`.

What a tensor lies on is noted at its storage, so that views, gradients, copies and optimizers
follow by themselves. Torch itself takes all of them for tensors on the CPU and computes as always.

What is counted, by phase, kind and place in the source:

- operations: each one that a CUDA device would be given, copies among them. Views, allocations and
  operations without a result to write are none; one that torch carries out by several launches
  (sort, nonzero, the gradient of a select) counts as one, and so do one of `torch._foreach_*` on a
  whole list, a launch of ours (`launch_as`) and the replay of a graph.
- waits: where the host stops until the device is done with everything before.
- looks: `Event.synchronize`, for which the host waits only as long as the event is not reached.
- unordered: additions of floating point numbers whose order changes from run to run on CUDA.

What reaches pinned memory by a copy that does not block is not there before the host has waited
for it; and pinned memory that such a copy reads must be left alone until then.
"""

import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import recorder
import torch
from recorder import (
    Mode,
    Recorder,
    decomposed,
    does_nothing,
    innermost,
    name_of,
    tensors_in,
    why_it_waits,
)
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes

CUDA, PINNED, _HOST = "cuda", "pinned", "host"
# Made by torch within an operation, and nothing says for which device.
_EITHER = "either"

_ROOT = f"{Path(__file__).parent.parent}/"
_NOT_A_PLACE = (str(Path(torch.__file__).parent), __file__, recorder.__file__, contextlib.__file__)
_ORIGINAL = torch._C.TensorBase
_TAKE_ANY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
_MIXED = "Expected all tensors to be on the same device, but found at least two devices, {} and {}!"


class Happened(NamedTuple):
    """What is counted: in which phase, of what kind, and where in the source."""

    phase: str
    kind: str
    place: str


class Tally(Counter[Happened]):
    """How often each happened."""

    def of(self, phase: str | None = None, kind: str | None = None, place: str = "") -> int:
        """How many there were of a phase, of a kind and in places that begin so."""
        return sum(
            count
            for each, count in self.items()
            if phase in (None, each.phase)
            and kind in (None, each.kind)
            and each.place.startswith(place)
        )


class Device:
    """The counts, and what is under way on the device."""

    def __init__(self) -> None:
        self.seeds: list[int] = []  # of all its generators
        self.capturing = False
        self.made_on: str | None = None  # where a function that was called makes tensors
        self._phases = [""]
        self._uncounted = 0
        self.given = 0  # transfers, so far
        self._transfers: list[tuple[int, Callable[[], None]]] = []
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        self.operations, self.waits, self.looks, self.unordered = (Tally() for _ in range(4))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens within is of this phase."""
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    @contextmanager
    def as_one(self, kind: str) -> Iterator[None]:
        """Whatever happens within is one operation."""
        self.note(self.operations, kind)
        self._uncounted += 1
        try:
            yield
        finally:
            self._uncounted -= 1

    def note(self, tally: Tally, kind: str) -> None:
        """Count what just happens."""
        if not self._uncounted and not self.capturing:
            tally[Happened(self._phases[-1], kind, _place())] += 1

    def wait(self, kind: str) -> None:
        """The host waits until everything is done."""
        if self.capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {kind}")
        self.note(self.waits, kind)
        self.finish(self.given)

    def transfer(self, finish: Callable[[], None]) -> None:
        """A copy is under way; `finish` is called once the host has waited for it."""
        if not self.capturing:
            self.given += 1
            self._transfers.append((self.given, finish))

    @contextmanager
    def making(self, place: str) -> Iterator[None]:
        """Tensors that are made within are of this place."""
        before, self.made_on = self.made_on, place
        try:
            yield
        finally:
            self.made_on = before

    def finish(self, number: int) -> None:
        """The host has waited for the transfers up to this one."""
        done = [finish for at, finish in self._transfers if at <= number]
        self._transfers = [each for each in self._transfers if each[0] > number]
        with _disable_current_modes():
            for finish in done:
                finish()

    def report(self) -> str:
        """Everything that was counted, most often first."""
        return "\n".join(
            f"{count:7} {tally} {each.phase} {each.kind} {each.place}"
            for tally in ("operations", "waits", "looks", "unordered")
            for each, count in getattr(self, tally).most_common()
        )


@contextmanager
def pretended() -> Iterator[Device]:
    """There is a CUDA device, until the end of the block."""
    device = Device()
    with ExitStack() as undone:
        for owner, name, new in _replacements(device):
            undone.enter_context(mock.patch.object(owner, name, new))
        undone.enter_context(_Operations(device))
        yield device


@contextmanager
def launch_as(module: ModuleType, name: str, twin: Callable[..., Any]) -> Iterator[None]:
    """The function `name` of a module, which launches a kernel, replaced by a twin in torch.

    The twin's operations count as one, on a pretended device, and are recorded as one, by a
    recorder.
    """

    def once(*args, **kwargs):
        with _one_operation(name):
            return twin(*args, **kwargs)

    @functools.wraps(twin)
    def launch(*args, **kwargs):
        recorder = innermost()
        return once(*args, **kwargs) if recorder is None else recorder.whole(once, args, kwargs)

    with mock.patch.object(module, name, launch):
        yield


def place_of(tensor: Tensor) -> str:
    """What a tensor lies on: CUDA, PINNED, or any other memory of the host."""
    return getattr(tensor.untyped_storage(), "place", _HOST)


def _one_operation(kind: str):
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    devices = [mode.on for mode in modes if isinstance(mode, _Operations)]
    return devices[-1].as_one(kind) if devices else nullcontext()


def _put(tensor: Tensor, place: str) -> Tensor:
    tensor.untyped_storage().place = place
    return tensor


def _put_new(result: Any, place: str) -> Any:
    """Put what an operation gave to a place, but for memory that was there before."""
    for each in tensors_in(result):
        if not hasattr(each.untyped_storage(), "place"):
            _put(each, place)
    return result


def _place() -> str:
    """The innermost line that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_A_PLACE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.removeprefix(_ROOT)}:{frame.f_lineno}"


class _Operations(Mode):
    """Places and counts every operation, and refuses those whose tensors lie on two devices."""

    def __init__(self, on: Device) -> None:
        super().__init__()
        self.on = on

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation.namespace == "vecpg":
            # An own operator is what its implementation does.
            with self:
                return operation._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        result = decomposed(self, operation, args, kwargs)
        if result is not NotImplemented:
            return result
        if name_of(operation) == "copy_":
            return self._copy(*args, **kwargs)
        if self.on.made_on is not None:
            return self._make(operation, args, kwargs)
        tensors = tensors_in((args, kwargs))
        if not any(place_of(each) == CUDA for each in tensors):
            result = operation(*args, **kwargs)
            return result if tensors else _put_new(result, _EITHER)
        for each in tensors:
            if place_of(each) == _EITHER:
                _put(each, CUDA)
                self.on.note(self.on.operations, "made within")
        self._check(operation, args, kwargs, tensors)
        reason = why_it_waits(operation, args, kwargs)
        if reason is not None:
            self.on.wait(reason)
        result = _put_new(operation(*args, **kwargs), CUDA)
        self._count(operation, args, kwargs, result)
        return result

    def _make(self, operation, args, kwargs):
        result = _put_new(operation(*args, **kwargs), self.on.made_on)
        if self.on.made_on == CUDA:
            self._count(operation, args, kwargs, result)
        return result

    def _count(self, operation, args, kwargs, result) -> None:
        outputs = tensors_in(result)
        if does_nothing(operation) or (outputs and not any(each.numel() for each in outputs)):
            return
        name = name_of(operation)
        self.on.note(self.on.operations, name)
        if any(each.is_floating_point() for each in outputs) and _adds_in_any_order(name, args):
            self.on.note(self.on.unordered, name)

    def _check(self, operation, args, kwargs, tensors) -> None:
        """Refuse tensors on two devices, but for what torch itself brings to the other."""
        name = name_of(operation)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != CUDA:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        host = [each for each in tensors if place_of(each) != CUDA]
        if not host:
            if operation._schema.overload_name == "Tensor" and name.startswith("masked_fill"):
                self.on.wait("item")
            return
        written = operation._schema.is_mutable and any(each is args[0] for each in host)
        if written or (name in _TAKE_ANY_INDEX and any(each is args[0] for each in host)):
            raise RuntimeError(_MIXED.format("cpu", "cuda:0"))
        if name in _TAKE_ANY_INDEX:
            self._bring_indices(name, args, host)
            return
        number = torch.Tag.pointwise in operation.tags or name.startswith("_foreach_")
        number = number or name in ("fill_", "fill", "lift_fresh", "where", "masked_fill_")
        if not number or any(each.ndim for each in host):
            raise RuntimeError(_MIXED.format("cuda:0", "cpu"))
        if name == "where":
            self.on.wait("copy to the device")

    def _bring_indices(self, name: str, args: tuple, host: list[Tensor]) -> None:
        values = args[2] if name != "index" else None
        if any(each is values for each in host):
            if values.ndim:
                raise RuntimeError(_MIXED.format("cuda:0", "cpu"))
            flags = [each.dtype == torch.bool for each in args[1] if each is not None]
            if flags != [True]:
                self.on.wait("copy to the device")
        if any(each is index for each in host for index in args[1]):
            self.on.wait("index from the host")

    def _copy(self, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        places = [place_of(to), place_of(source)]
        if CUDA in places and _EITHER in places:
            places = [CUDA, CUDA]
            _put(to, CUDA), _put(source, CUDA)
        if CUDA in places and to.numel():
            self.on.note(self.on.operations, "copy_")
        if places.count(CUDA) != 1 or not to.numel():
            return to.copy_(source)
        at_once = not (non_blocking and PINNED in places)
        if at_once:
            self.on.wait("copy to the device" if places[0] == CUDA else "copy to the host")
            return to.copy_(source)
        if places[0] == CUDA:
            to.copy_(source)
            self.on.transfer(functools.partial(_was_left_alone, source, source.clone()))
        else:
            arriving = torch.empty_like(to).copy_(source)
            to.copy_(_poison(arriving))
            self.on.transfer(functools.partial(to.copy_, arriving))
        return to


def _adds_in_any_order(name: str, args: tuple) -> bool:
    """Whether CUDA adds numbers up in an order that changes from run to run."""
    name = name.rstrip("_")
    if name in ("cumsum", "cumprod"):  # one long row is scanned by many programs at once
        return args[0].numel() == args[0].shape[args[1]]
    if name == "scatter_add":  # nothing is added to anything else where there is one row of it
        return args[2].shape[args[1]] > 1
    if name == "index_add":
        return len(args[2].unique()) < len(args[2])
    return name in ("put", "scatter_reduce", "histc")


def _poison(values: Tensor) -> Tensor:
    """What stands where a copy has not arrived yet."""
    if values.dtype == torch.bool:
        return ~values
    wrong = torch.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
    return torch.full_like(values, wrong)


def _was_left_alone(source: Tensor, before: Tensor) -> None:
    if not torch.equal(
        source.contiguous().view(-1).view(torch.uint8), before.view(-1).view(torch.uint8)
    ):
        raise RuntimeError("pinned memory was written to while a copy out of it was under way")


class _Move(torch.autograd.Function):
    """A copy on the other device, whose gradient comes back."""

    @staticmethod
    def forward(ctx, tensor, move, back):
        ctx.back = back
        return move(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient), None, None


class _Generator(torch.Generator):
    """A torch.Generator on either device."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, device="cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self):
        return _indexed(self.place)


def _indexed(device) -> torch.device:
    device = torch.device(device)
    return torch.device("cuda", 0) if device.type == CUDA else device


def _on(tensor: Tensor, place: str, non_blocking: bool = False) -> Tensor:
    """A copy of a tensor in memory of a place."""
    was = place_of(tensor)

    def move(source: Tensor, place: str = place) -> Tensor:
        made = _put(torch.empty_like(source, device="cpu"), place)
        return made.copy_(source.detach(), non_blocking=non_blocking)

    if torch.is_grad_enabled() and tensor.requires_grad:
        return _Move.apply(tensor, move, functools.partial(move, place=was))
    return move(tensor)


def _replacements(device: Device) -> Iterator[tuple[Any, str, Any]]:
    """What is put in place of torch's own: the owner, the name, and the new."""
    yield from _of_tensors(device)
    yield from _of_torch(device)
    yield from _of_cuda(device)


def _of_tensors(device: Device) -> Iterator[tuple[Any, str, Any]]:
    def to(self, *args, non_blocking=False, copy=False, **kwargs):
        where, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        names = ["non_blocking", "copy"]
        flags = {"non_blocking": non_blocking, "copy": copy}
        for each in args:
            if isinstance(each, Tensor):
                where, dtype = each.device, each.dtype
            elif isinstance(each, torch.dtype):
                dtype = each
            elif isinstance(each, bool):
                flags[names.pop(0)] = each
            elif each is not None:
                where = each
        place = CUDA if place_of(self) == CUDA else _HOST
        wanted = place if where is None else CUDA if torch.device(where).type == CUDA else _HOST
        if wanted != place:
            # Torch changes the type first where the copy goes up, and here too where it comes down.
            typed = self if dtype is None else _ORIGINAL.to(self, dtype)
            if flags["non_blocking"] and wanted == _HOST:
                wanted = PINNED  # so torch has it
            return _on(typed, wanted, flags["non_blocking"])
        return _ORIGINAL.to(self, dtype or self.dtype, copy=flags["copy"], **kwargs)

    def device_of(self):
        cuda = place_of(self) == CUDA
        return torch.device("cuda", 0) if cuda else _ORIGINAL.device.__get__(self)

    def numpy(self, *args, **kwargs):
        if place_of(self) == CUDA:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the"
                " tensor to host memory first."
            )
        return _ORIGINAL.numpy(self, *args, **kwargs)

    def tolist(self):
        if place_of(self) == CUDA:
            device.wait("tolist")
        return _ORIGINAL.tolist(self)

    def pin_memory(self, *args):
        if place_of(self) == CUDA:
            raise RuntimeError(
                "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
            )
        return self if place_of(self) == PINNED else _on(self, PINNED)

    reduce = torch.Tensor.__reduce_ex__

    def __reduce_ex__(self, protocol):
        if place_of(self) == CUDA:
            device.wait("pickle")
        return reduce(self, protocol)

    replaced = {
        "to": to,
        "cpu": lambda self, **kwargs: self.to("cpu"),
        "cuda": lambda self, device=None, non_blocking=False: self.to(
            "cuda", non_blocking=non_blocking
        ),
        "device": property(device_of),
        "is_cuda": property(lambda self: place_of(self) == CUDA),
        "is_cpu": property(lambda self: place_of(self) != CUDA),
        "get_device": lambda self: 0 if place_of(self) == CUDA else -1,
        "numpy": numpy,
        "tolist": tolist,
        "pin_memory": pin_memory,
        "is_pinned": lambda self, *args: place_of(self) == PINNED,
        "__reduce_ex__": __reduce_ex__,
    }
    for name, new in replaced.items():
        yield torch.Tensor, name, new
    for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
        yield torch.Tensor, name, _makes(device, getattr(torch.Tensor, name))


def _makes(device: Device, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of torch's that makes tensors on a device it is told."""
    name = function.__name__
    follows = name.endswith("_like") or name.startswith("new_")
    brings = name in ("tensor", "as_tensor", "asarray", "new_tensor")

    @functools.wraps(function)
    def make(*args, pin_memory=False, requires_grad=False, **kwargs):
        where = kwargs.pop("device", None)
        if where is None:
            first = args[0] if args else None
            where = first.device if isinstance(first, Tensor) and (follows or brings) else None
        cuda = where is not None and torch.device(where).type == CUDA
        here = "cpu" if cuda else where
        generator = kwargs.get("generator")
        if cuda and generator is not None and generator.device.type != CUDA:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if brings:
            made = function(*args, **kwargs, device=here)
            made = made if where is None else made.to(where)
        else:
            with device.making(CUDA if cuda else PINNED if pin_memory else _HOST):
                made = function(*args, **kwargs, device=here)
        return made.requires_grad_() if requires_grad else made

    return make


def _of_torch(device: Device) -> Iterator[tuple[Any, str, Any]]:
    constructors = _device_constructors()
    for name in dir(torch):
        function = getattr(torch, name)
        if callable(function) and name.islower():
            like = name.endswith("_like")
            if like or (function.__hash__ is not None and function in constructors):
                yield torch, name, _makes(device, function)
    yield torch, "Generator", _Generator


def _of_cuda(device: Device) -> Iterator[tuple[Any, str, Any]]:
    class Event:
        """Reached as soon as the host waits for it."""

        def __init__(self, enable_timing=False, **kwargs):
            self.timed, self.at = enable_timing, None

        def record(self, stream=None):
            self.reached, self.at = device.given, time.perf_counter()

        def synchronize(self):
            if device.capturing:
                raise RuntimeError("operation not permitted when stream is capturing: event")
            device.note(device.looks, "event")
            if self.at is not None:
                device.finish(self.reached)

        def query(self):
            if self.at is not None:
                device.finish(self.reached)
            return True

        def wait(self, stream=None):
            pass

        def elapsed_time(self, end):
            if not (self.timed and end.timed):
                raise RuntimeError(
                    "Both events must be created with argument 'enable_timing=True'."
                )
            return 1000 * (end.at - self.at)

    class Stream:
        """All streams are one: what is given first is done first."""

        def __init__(self, device=None, priority=0, **kwargs):
            self.device = torch.device("cuda", 0)

        def wait_stream(self, stream):
            pass

        def wait_event(self, event):
            pass

        def record_event(self, event=None):
            event = event or Event()
            event.record()
            return event

        def synchronize(self):
            device.wait("synchronize")

    class CUDAGraph:
        """What is captured has no effect before it is replayed, and made tensors hold nothing."""

        def __init__(self, **kwargs):
            self.recorder = None

        def capture_begin(self, pool=None, capture_error_mode="global"):
            device.capturing, self.recorder = True, Recorder(CUDA)
            self.recorder.__enter__()

        def capture_end(self):
            self.recorder.__exit__(None, None, None)
            device.capturing = False
            self.recorder.undo()

        def replay(self):
            with device.as_one("graph"):
                self.recorder.replay()

        def reset(self):
            self.recorder = None

        def pool(self):
            return (0, 0)

    @contextmanager
    def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
        device.wait("synchronize")
        cuda_graph.capture_begin(pool, capture_error_mode)
        try:
            yield
        finally:
            cuda_graph.capture_end()

    streams = [Stream()]

    @contextmanager
    def entered(stream):
        if stream is not None:
            streams.append(stream)
        try:
            yield
        finally:
            if stream is not None:
                streams.pop()

    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "Pretended",
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (70 * 2**30, 80 * 2**30),
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "synchronize": lambda where=None: device.wait("synchronize"),
        "manual_seed": device.seeds.append,
        "manual_seed_all": device.seeds.append,
        "set_device": lambda device: None,
        "device": lambda device: nullcontext(),
        "device_of": lambda tensor: nullcontext(),
        "Event": Event,
        "Stream": Stream,
        "stream": entered,
        "current_stream": lambda device=None: streams[-1],
        "default_stream": lambda device=None: streams[0],
        "is_current_stream_capturing": lambda: device.capturing,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 0),
    }
    for name, new in replaced.items():
        yield torch.cuda, name, new

"""A pretended GPU: tensors that say they are on cuda:0 while their numbers lie in the host's memory.

Whole scripts run on it as they would on a GPU, CUDA graph included, and what a GPU would refuse or wait for
is found without one:
- an operation on tensors of the device and of the host is a RuntimeError (0-dim ones of the host may mix in);
- in a capture, whatever makes the host wait, and copies between the two, is a RuntimeError as well; elsewhere
  `waits` counts them;
- a capture records each operation and leaves everything as it was; a replay carries the recorded operations
  out again, with the Python numbers that they had and with new random ones.

Not pretended: streams, memory that a graph takes again, bfloat16, torch.compile, rounding.
"""

import contextlib
import types
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
TO_THE_HOST = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
WAITS = {*TO_THE_HOST, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
         aten.unique_consecutive.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
BOTH = {aten.copy_.default, aten._to_copy.default, *INDEXING}  # the operations that may meet host and device


class OnGPU(torch.Tensor):
    """A tensor of the pretended GPU; `numbers`: the tensor of the host that it stands for."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu, is_meta = GPU, True, False, False

    @staticmethod
    def __new__(cls, numbers):
        # "meta" keeps the autograd engine from looking for a driver.
        t = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device="meta")
        t.numbers = numbers
        return t

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PRETENCE[0].carry_out(func, args, kwargs or {})

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def get_device(self):
        return 0

    def tolist(self):
        PRETENCE[0].wait("tolist")
        return self.numbers.tolist()

    def __format__(self, spec):
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def __repr__(self):
        return f"OnGPU({self.numbers})"

    def __deepcopy__(self, memo):
        memo[id(self)] = t = self.detach().clone().requires_grad_(self.requires_grad)
        t._is_param = getattr(self, "_is_param", False)
        return t


PRETENCE = []  # the one at work


def numbers(t):
    return t.numbers if isinstance(t, OnGPU) else t


def on_gpu(t):
    return OnGPU(t) if isinstance(t, torch.Tensor) else t


def is_device(name):
    return name is not None and torch.device(name).type in ("cuda", "meta")


class Pretence(TorchDispatchMode):
    """Carries operations out on the host's numbers; `waits`: how often the host has waited for the device."""

    def __init__(self):
        super().__init__()
        self.waits, self.capture = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.carry_out(func, args, kwargs or {})

    def wait(self, what):
        if self.capture:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        self.waits += 1

    def look(self, func, args, kwargs, device, host):
        """Raise or count what a GPU would not do, or only after the host has waited."""
        to = kwargs.get("device")
        if kwargs.get("non_blocking") and getattr(args[0], "pinned", False):
            return
        masks = [i for i in args[1] if i is not None] if func in INDEXING else []
        if device and host and func not in BOTH:
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                               f"devices, cuda:0 and cpu, in {func}")
        if masks and not isinstance(args[0], OnGPU) and device:
            raise RuntimeError(f"{func}: indices should be on the same device as the indexed tensor (cpu)")
        if (device and func in WAITS
                or func is aten._to_copy.default and to is not None and is_device(to) != bool(device)
                or func is aten.copy_.default and isinstance(args[0], OnGPU) != isinstance(args[1], OnGPU)
                or device and masks and (host or any(i.dtype in (torch.bool, torch.uint8) for i in masks))):
            self.wait(func)

    def carry_out(self, func, args, kwargs):
        leaves = tree_leaves((args, kwargs))
        device = [t for t in leaves if isinstance(t, OnGPU)]
        host = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, OnGPU) and t.dim()]
        self.look(func, args, kwargs, device, host)
        to = kwargs.get("device")
        stays = bool(device) if to is None else is_device(to)
        if func in (aten.copy_.default, aten.index_put_.default):
            stays = isinstance(args[0], OnGPU)
        ours, named = tree_map(numbers, args), tree_map(numbers, kwargs)
        if is_device(to):
            named["device"] = torch.device("cpu")
        if self.capture:
            self.capture.remember(func, ours)
        out = func(*ours, **named)
        if self.capture:
            self.capture.recorded.append((func, ours, named, out))
        if not stays or func in TO_THE_HOST:
            return out
        known = {id(t.numbers): t for t in device}
        wrapped = tree_map(lambda t: known[id(t)] if id(t) in known else on_gpu(t), out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if device else wrapped


class CUDAGraph:
    """What was carried out between capture_begin() and capture_end(), to be carried out again."""

    def capture_begin(self, *_, **__):
        self.recorded, self.before, self.random = [], {}, torch.get_rng_state()
        PRETENCE[0].capture = self

    def remember(self, func, args):
        """What `func` is about to write into, as it was before the capture."""
        for argument, value in zip(func._schema.arguments, args):
            written = argument.alias_info and argument.alias_info.is_write
            if written or argument.name.startswith("running_"):  # native_batch_norm does not say so
                for t in value if isinstance(value, (list, tuple)) else [value]:
                    key = t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride()
                    self.before.setdefault(key, (t, t.clone()))

    def capture_end(self):
        PRETENCE[0].capture = None
        for t, was in reversed(self.before.values()):
            t.copy_(was)
        torch.set_rng_state(self.random)

    def replay(self):
        for func, args, kwargs, outs in self.recorded:
            again = func(*args, **kwargs)
            for t, new in zip(tree_leaves(outs), tree_leaves(again)):
                if isinstance(t, torch.Tensor) and t.data_ptr() != new.data_ptr():
                    t.copy_(new)


@contextlib.contextmanager
def graph(captured, **_):
    captured.capture_begin()
    try:
        yield
    finally:
        captured.capture_end()


@contextlib.contextmanager
def gpu():
    """A machine with one GPU, pretended; yields the Pretence."""
    pretence = Pretence()
    stream = types.SimpleNamespace(wait_stream=lambda _: None,
                                   is_capturing=lambda: pretence.capture is not None)
    fakes = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "get_device_name": lambda *_: "pretended GPU", "get_device_capability": lambda *_: (9, 0),
        "set_device": lambda _: None, "mem_get_info": lambda *_: (2**36, 2**36),
        "manual_seed_all": lambda _: None, "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None, "is_current_stream_capturing": stream.is_capturing,
        "Stream": lambda: stream, "current_stream": lambda: stream,
        "stream": lambda _: contextlib.nullcontext(), "CUDAGraph": CUDAGraph, "graph": graph}
    tensor, empty, save, load = torch.tensor, torch.empty, torch.save, torch.load

    def pin_memory(t):
        t = t.clone()
        t.pinned = True
        return t

    def loaded(file, map_location=None, **more):
        found = load(file, map_location="cpu", **more)
        return tree_map(on_gpu, found) if is_device(map_location) else found

    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        for owner, name, fake in (
                (torch.accelerator, "current_stream", lambda *_: stream),
                (torch.Tensor, "pin_memory", pin_memory),
                (torch, "empty", lambda *size, pin_memory=False, **more: empty(*size, **more)),
                (torch, "tensor", lambda x, device=None, **more: tensor(x, **more).to(device or "cpu")),
                (torch, "save", lambda what, file: save(tree_map(numbers, what), file)),
                (torch, "load", loaded)):
            stack.enter_context(mock.patch.object(owner, name, fake))
        PRETENCE.append(pretence)
        stack.callback(PRETENCE.clear)
        stack.enter_context(pretence)
        yield pretence

"""A pretended GPU: tensors that say they are on cuda:0 while their numbers lie in the host's memory.  Or a
pretended accelerator of another make, on mps:0.

Whole scripts run on it as they would on a GPU, CUDA graph included, and what a GPU would refuse or wait for
is found without one:
- an operation on tensors of the device and of the host is a RuntimeError, with the exceptions in refused();
- in a capture, whatever makes the host wait, and copies between the two, is a RuntimeError as well; elsewhere
  `waits` counts them;
- a capture records each operation of the device and leaves everything as it was; a replay carries the
  recorded operations out again, with the numbers of Python and of the host that they had and with new random
  ones.

Not pretended: streams, memory that a graph takes again, bfloat16, torch.compile, rounding.
"""

import contextlib
import functools
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
COPIES = {"copy", "_to_copy", "_foreach_copy", "fill"}
INDEXING = {"index", "index_put"}
ON_THE_HOST = {  # arguments that may be 0-dim tensors of the host
    "where": ("condition", "self", "other"), "masked_fill": ("value",), "index_fill": ("value",),
    "index_put": ("values",), "_fused_adam": ("lr",), "_fused_adamw": ("lr",), "_fused_sgd": ("lr",)}
MASKS = {aten.masked_fill.Scalar, aten.masked_fill_.Scalar, aten.native_dropout_backward.default}


class OnGPU(torch.Tensor):
    """A tensor of the pretended GPU; `numbers`: the tensor of the host that it stands for."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: self.place)
    is_cuda = property(lambda self: self.place.type == "cuda")
    is_cpu, is_meta = False, False

    @staticmethod
    def __new__(cls, numbers):
        PRETENCE[0].look(numbers)
        # "meta" keeps the autograd engine from looking for a driver.
        t = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device="meta")
        t.numbers, t.place = numbers, PRETENCE[0].device
        return t

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PRETENCE[0].carry_out(func, args, kwargs or {})

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert {self.place} device type tensor to numpy")

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


def on_host(t):
    return isinstance(t, torch.Tensor) and not isinstance(t, OnGPU)


def is_device(name):
    return name is not None and torch.device(name).type != "cpu"


@functools.cache
def name_of(func):
    return func._schema.name.removeprefix("aten::").rstrip("_")  # in place or not


def given(func, args, kwargs):
    """Argument's name -> value."""
    return dict(zip((a.name for a in func._schema.arguments), args)) | kwargs


@functools.cache
def written(func):
    return {a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write}


def refused(func, args, kwargs):
    """Whether a GPU refuses `func` because of where its tensors are.

    PyTorch compares the devices of all tensors, 0-dim ones as well: in stack, cat, gather, matrix products.
    These are the exceptions, from its ATen/native; where versions differ (addcmul, lerp, one tensor in place
    of a list), the stricter rule:
    - TensorIterator.cpp, `allow_cpu_scalars`: an elementwise operation of two tensors takes one 0-dim input
      of the host, and never writes to the host.  Operations of three tensors (addcmul, clamp, lerp) do not.
    - _foreach_ operations on two lists go pair by pair when not all tensors are on one device.  One tensor in
      place of a list must be on the device ("scalar tensor expected to be on cuda:0").
    - TensorCompare.cpp: where() moves 0-dim tensors to the device.
    - TensorAdvancedIndexing.cpp: indices may be on the host, which then waits; a 0-dim value is moved.
    - masked_fill and index_fill read the number of a 0-dim value, fused optimizers that of their rate.
    """
    name, values = name_of(func), given(func, args, kwargs)
    leaves = tree_leaves((args, kwargs))
    if name in COPIES or not (any(map(on_host, leaves)) and any(isinstance(t, OnGPU) for t in leaves)):
        return False
    if name.startswith("_foreach_"):
        lists = [v for v in values.values() if isinstance(v, (list, tuple)) and v and torch.is_tensor(v[0])]
        single = [v for v in values.values() if torch.is_tensor(v)]
        pairs = len(lists) == 2 and not single
        return any(len({on_host(t) for t in row}) > 1
                   and not (pairs and on_host(row[1]) and not row[1].dim())
                   for row in ((*row, *single) for row in zip(*lists)))
    if name in INDEXING:
        indices = [i for i in values.pop("indices") if i is not None]
        if on_host(values["self"]) and not all(map(on_host, indices)):
            return True
    host = [(k, t) for k, v in values.items() for t in tree_leaves(v) if on_host(t)]
    if any(t.dim() or k in written(func) for k, t in host):
        return True
    if name in ON_THE_HOST and func not in MASKS:
        return any(k not in ON_THE_HOST[name] for k, _ in host)
    two = sum(str(a.type) == "Tensor" for a in func._schema.arguments) == 2
    return bool(host) and not (two and len(host) == 1 and torch.Tag.pointwise in func.tags
                               and func not in MASKS)


def waits(func, args, kwargs):
    """Whether the host waits for the GPU in `func`."""
    name, values = name_of(func), given(func, args, kwargs)
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    host, device = [t for t in leaves if on_host(t)], [t for t in leaves if not on_host(t)]
    if name == "_to_copy":
        to = kwargs.get("device")
        crossing = to is not None and is_device(to) != bool(device)
    else:
        crossing = bool(host and device) and name in {*COPIES, *INDEXING, "where"}
    if name == "fill":
        crossing = crossing and on_host(args[0])  # the other way it reads a number of the host
    if crossing:
        return not (kwargs.get("non_blocking") and any(getattr(t, "pinned", False) for t in host))
    if name in INDEXING and device:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in values["indices"])
    if name in ("masked_fill", "index_fill") and func not in MASKS:
        return isinstance(values["value"], OnGPU)  # .item()
    return bool(device) and func in WAITS


class Pretence(TorchDispatchMode):
    """Carries operations out on the host's numbers; `waits`: how often the host has waited for the device."""

    device = GPU

    def __init__(self):
        super().__init__()
        self.waits, self.capture = 0, None

    def look(self, numbers):
        """Raise where the device has no tensor like `numbers`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.carry_out(func, args, kwargs or {})

    def wait(self, what):
        if self.capture:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        self.waits += 1

    def carry_out(self, func, args, kwargs):
        if refused(func, args, kwargs):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                               f"devices, {self.device} and cpu, in {func}")
        if waits(func, args, kwargs):
            self.wait(func)
        device = [t for t in tree_leaves((args, kwargs)) if isinstance(t, OnGPU)]
        to = kwargs.get("device")
        stays = bool(device) if to is None else is_device(to)
        if name_of(func) in ("copy", "fill", "index_put"):
            stays = isinstance(args[0], OnGPU)
        capture = self.capture if device or stays else None  # what the host alone does is in no graph
        # A graph has the host's 0-dim tensors as numbers.
        known = (lambda t: t.clone() if on_host(t) and not t.dim() else numbers(t)) if capture else numbers
        ours, named = tree_map(known, args), tree_map(known, kwargs)
        if is_device(to):
            named["device"] = torch.device("cpu")
        if capture:
            capture.remember(func, ours)
        out = func(*ours, **named)
        if capture:
            capture.recorded.append((func, ours, named, out))
        if not stays or func in TO_THE_HOST:
            return out
        known = {id(t.numbers): t for t in device}
        wrapped = tree_map(lambda t: known[id(t)] if id(t) in known else on_gpu(t), out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if device else wrapped


class Other(Pretence):
    """An accelerator of another make, less able than Apple's: no float64, no channels_last, no border padding
    in grid_sample, no fused optimizers.  It has random numbers of its own."""

    def __init__(self, kind):
        super().__init__()
        self.device, self.random = torch.device(kind, 0), torch.Generator().get_state()

    def look(self, numbers):
        if numbers.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a {self.device.type} tensor to {numbers.dtype}")

    def carry_out(self, func, args, kwargs):
        to = kwargs.get("device")
        if is_device(to) or any(isinstance(t, OnGPU) for t in tree_leaves((args, kwargs))):
            if kwargs.get("dtype") is torch.float64:  # on its way to the host too
                raise TypeError(f"Cannot convert a {self.device.type} tensor to torch.float64")
            if kwargs.get("memory_format") is torch.channels_last:
                raise RuntimeError(f"{self.device.type}: no channels_last")
            if name_of(func).startswith("grid_sampler_2d") and 1 == given(func, args, kwargs)["padding_mode"]:
                raise NotImplementedError(f"{self.device.type}: Unsupported Border padding mode")
            if name_of(func).startswith("_fused_"):
                raise NotImplementedError(f"{func} is not implemented for {self.device.type}")
            if torch.Tag.nondeterministic_seeded in func.tags:
                host = torch.get_rng_state()
                torch.set_rng_state(self.random)
                out = super().carry_out(func, args, kwargs)
                self.random = torch.get_rng_state()
                torch.set_rng_state(host)
                return out
        return super().carry_out(func, args, kwargs)


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


def gpu():
    """A machine with one NVIDIA GPU, pretended; with gpu() as the Pretence."""
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
        "max_memory_allocated": lambda *_: 2**20,
        "stream": lambda _: contextlib.nullcontext(), "CUDAGraph": CUDAGraph, "graph": graph}
    here = {"current_stream": lambda *_: stream, "synchronize": lambda: None}
    return machine(pretence, (torch.cuda, fakes), (torch.accelerator, here))


def accelerator(kind):
    """A machine with an accelerator of another make, `kind` "mps", pretended; with accelerator() as the
    Pretence."""
    pretence = Other(kind)

    def set_rng_state(state, *_):
        pretence.random = state.clone()

    own = {"get_rng_state": lambda *_: pretence.random.clone(), "set_rng_state": set_rng_state,
           "manual_seed": lambda seed: set_rng_state(torch.Generator().manual_seed(seed + 1).get_state())}
    here = {"is_available": lambda: True, "device_count": lambda: 1, "synchronize": lambda: None,
            "current_accelerator": lambda *_, **__: torch.device(kind)}
    macos = torch.backends.mps, {"is_macos_or_newer": lambda *_: True}      # PyTorch 2.6 asks for bf16
    return machine(pretence, (getattr(torch, kind), own), (torch.accelerator, here), macos)


@contextlib.contextmanager
def machine(pretence, *fakes):
    """Pretend with `fakes`, each a module and what stands in for its functions."""
    tensor, empty, save, load = torch.tensor, torch.empty, torch.save, torch.load

    def pin_memory(t):
        t = t.clone()
        t.pinned = True
        return t

    def loaded(file, map_location=None, **more):
        found = load(file, map_location="cpu", **more)
        return tree_map(on_gpu, found) if is_device(map_location) else found

    with contextlib.ExitStack() as stack:
        for owner, name, fake in (
                *((owner, name, fake) for owner, named in fakes for name, fake in named.items()),
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

"""The training step as one unit: mixed precision, descent, torch.compile, CUDA graph, data parallelism.

A script writes its whole iteration (sampling, losses and all updates) as one plain function decorated with
`@fuse(args)`.  Device and flags choose one of three modes before the first step:

    plain       the function as it is: on a CPU, or with --no-graph
    cuda-graph  warmed up with real steps, captured once as a CUDA graph, then replayed: no Python, no kernel
                launches and no host synchronization in the loop
    compiled    --compile: the whole iteration as one torch.compile graph; on a GPU then captured as above

All modes use the same optimizer state, so --resume may change the mode.
"""

import contextlib
import copy
import ctypes
import functools
import importlib.util
import itertools
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

BACKEND = "inductor"  # of torch.compile
COUNT = itertools.count()


# ---- the step

def fuse(args):
    """Decorator: make a training iteration fast on `args.device` without changing what it computes.

    The iteration takes tensors and returns a dict of 0-dim tensors.  Inside it: no `.item()`, no print, no
    Python `if` on a tensor (use torch.where, or a second fused function).  Each call of a CUDA graph
    overwrites the outputs of the last one.
    """
    def decorate(step):
        step = compiled(step) if args.compile else step
        return Graph(step) if args.graph and torch.device(args.device).type == "cuda" else step
    return decorate


def compiled(step):
    """Compile `step` into one torch.compile graph without graph breaks.  Its outputs are detached."""
    from torch._dynamo import config  # not at the top: it takes seconds to import

    def detached(*inputs):
        return {name: value.detach() for name, value in step(*inputs).items()}

    # Dynamo caches compiled code by code object, so give each step its own.
    detached.__code__ = detached.__code__.replace(co_name=f"{step.__name__}_{next(COUNT)}")
    # On a GPU, loop reordering fails an assertion in Inductor (PyTorch 2.11; aae.py, vaegan.py).
    options = {"loop_ordering_after_fusion": False} if BACKEND == "inductor" else None
    whole = torch.compile(detached, fullgraph=True, dynamic=False, backend=BACKEND, options=options)

    def call(*inputs):
        with config.patch(trace_autograd_ops=True, error_on_recompile=True):
            return whole(*inputs)
    return call


def cannot_compile(device):
    """Why the iteration cannot be compiled for `device` (a torch.device), in one line; "" if it can."""
    from torch._dynamo import config

    if device.type not in ("cuda", "cpu"):
        return "--compile is for cuda and cpu"
    if not hasattr(config, "trace_autograd_ops"):
        return f"PyTorch {torch.__version__} found, 2.11 or newer needed"
    if dist.is_initialized() and dist.get_world_size() > 1:
        return "it runs on one rank only"
    names = [os.environ.get("CXX"), *(("cl",) if os.name == "nt" else ("g++", "clang++", "c++", "gcc"))]
    if not any(name and shutil.which(name) for name in names):
        return "no C++ compiler found"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "a GPU of capability 7.0 or newer is needed"
        if not importlib.util.find_spec("triton"):
            return "Triton is not installed"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h not found: install Python's development headers"
    return ""


class Graph:
    """`step` as a CUDA graph: `warmup` plain calls on a side stream, one capture, then replays.  Each call
    performs one step.

    Raises ValueError if the inputs' shapes or dtypes differ from the captured ones; the graph would otherwise
    silently reuse the old contents of its input buffers.
    """

    def __init__(self, step, warmup=3):
        self.step, self.warmup = step, warmup
        self.graph = self.stream = self.inputs = self.outputs = None

    def __call__(self, *inputs):
        if self.graph is None:
            self.stream = self.stream or torch.cuda.Stream()
            if self.warmup:
                # Allocations, cuDNN plans and optimizer state must exist before the capture, on its stream.
                self.warmup -= 1
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    outputs = self.step(*inputs)
                torch.cuda.current_stream().wait_stream(self.stream)
                return outputs
            self.inputs = [x.clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: the data thread may copy to the device while this thread captures.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.step(*self.inputs)
        got, want = ([(tuple(x.shape), x.dtype) for x in xs] for xs in (inputs, self.inputs))
        if got != want:
            raise ValueError(f"the captured step takes {want}, got {got}")
        for buffer, x in zip(self.inputs, inputs):
            buffer.copy_(x, non_blocking=True)
        self.graph.replay()  # also after the capture, which records but does not execute
        return self.outputs


# ---- descent

def descend(*losses_and_opts):
    """descend(loss, opt): one step of `opt` down the gradient of `loss` with respect to its parameters.

    descend(loss_1, opt_1, loss_2, opt_2, ...) computes all gradients before any optimizer steps, so the
    losses may share one forward pass.  Only these parameters receive gradients.  Gradients are averaged over
    ranks.  Raises RuntimeError inside an autocast block, whose cache would return the weights from before the
    step, and if a loss does not depend on one of its parameters.
    """
    losses, opts = losses_and_opts[::2], losses_and_opts[1::2]
    params = [[p for group in opt.param_groups for p in group["params"]] for opt in opts]
    if torch.is_autocast_enabled(params[0][0].device.type):
        raise RuntimeError("descend() inside an autocast block: close the block before the optimizer steps")
    grads = [torch.autograd.grad(loss, ps, retain_graph=i < len(losses)) for i, (loss, ps)
             in enumerate(zip(losses, params), 1)]
    for opt, ps, gs in zip(opts, params, grads):
        if torch.compiler.is_compiling():
            with torch.no_grad():
                opt.update(gs) if hasattr(opt, "update") else _adam(opt, gs)
        else:
            _step(opt, ps, _mean_over_ranks(gs))


def _step(opt, params, grads):
    # Fused Adam ignores strides: weights are channels_last, a mean over ranks is contiguous.
    grads = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p, g in zip(params, grads)]
    if params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        # The graph holds the addresses of the current state; a state loaded later would be ignored.
        opt.register_load_state_dict_pre_hook(_refuse_load)
    if hasattr(opt, "update"):
        with torch.no_grad():
            return opt.update(grads)
    if not can(params[0].device.type, "fused"):
        with torch.no_grad():
            return _adam(opt, grads)
    for p, g in zip(params, grads):
        p.grad = g
    for group in opt.param_groups:
        if "capturable" in group:
            group["capturable"] = params[0].is_cuda
    opt.step()
    for p in params:
        p.grad = None


def _mean_over_ranks(grads):
    """Average each gradient over ranks, in one all_reduce."""
    if not dist.is_initialized():
        return grads
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    return [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)]


def _refuse_load(opt, state):
    raise RuntimeError("this optimizer's step is in a CUDA graph: load checkpoints before the first step")


@contextlib.contextmanager
def frozen(*nets):
    """Within the block, gradients flow through `nets` to their inputs but not into their parameters."""
    if torch.compiler.is_compiling():  # the compiler removes unused gradients
        yield
        return
    params = [p for net in nets for p in net.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


# ---- optimizers: rates are 0-dim tensors in `param_groups`, so that set_rate() works on a captured step

def Adam(params, lr, betas=(0.5, 0.999), weight_decay=0.0):
    """torch.optim.Adam with fused kernels.

    `params`: parameters or parameter groups, as in torch.optim.  The state is created at once, as the
    compiled step needs it.
    """
    params = list(params)
    first = params[0]["params"][0] if isinstance(params[0], dict) else params[0]
    opt = torch.optim.Adam(params, torch.tensor(lr, device=first.device), betas=betas,
                           weight_decay=weight_decay, fused=True)
    for group in opt.param_groups:
        for p in group["params"]:
            opt.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                            "exp_avg_sq": torch.zeros_like(p)}
    return opt


def _adam(opt, grads):
    """One update of Adam for the compiled step, where torch.optim's step() would break the graph."""
    grads = iter(grads)
    for group in opt.param_groups:
        ps = group["params"]
        gs = [next(grads) for _ in ps]
        t, m, v = ([opt.state[p][key] for p in ps] for key in ("step", "exp_avg", "exp_avg_sq"))
        (b1, b2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        if decay:
            gs = torch._foreach_add(gs, ps, alpha=decay)
        torch._foreach_add_(t, 1)
        torch._foreach_lerp_(m, gs, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, gs, gs, 1 - b2)
        root = torch._foreach_sqrt(v)
        torch._foreach_div_(root, (1 - b2 ** t[0]).sqrt())
        torch._foreach_add_(root, group["eps"])
        change = torch._foreach_div(m, root)
        torch._foreach_mul_(change, -lr / (1 - b1 ** t[0]))
        torch._foreach_add_(ps, change)


class SGD(torch.optim.Optimizer):
    """Classical momentum, v <- momentum v - lr g and theta <- theta + v.

    Both `lr` and `momentum` are 0-dim tensors.  torch.optim.SGD's momentum is a Python number, which a
    captured step could not change.
    """

    def __init__(self, params, lr, momentum=0.0):
        params = list(params)
        tensor = [torch.tensor(float(v), device=params[0].device) for v in (lr, momentum)]
        super().__init__(params, {"lr": tensor[0], "momentum": tensor[1]})
        for p in params:
            self.state[p]["v"] = torch.zeros_like(p)

    def update(self, grads):
        group, = self.param_groups
        params, v = group["params"], [self.state[p]["v"] for p in group["params"]]
        torch._foreach_mul_(v, group["momentum"])
        if params[0].is_cuda:
            torch._foreach_sub_(v, torch._foreach_mul(grads, group["lr"]))
        else:
            torch._foreach_addcmul_(v, grads, [group["lr"]] * len(v), value=-1)  # no copy for lr * g
        torch._foreach_add_(params, v)


def set_rate(opt, lr, **others):
    """Set the learning rate of `opt`, and `others` such as momentum, in place, for captured steps too."""
    for group in opt.param_groups:
        for name, value in {"lr": lr, **others}.items():
            group[name].fill_(value)


# ---- exponential moving averages (EMA) of weights, BatchNorm statistics

def averaged(net):
    """A copy of `net` for the EMA of its parameters, see average(); its buffer `t` counts the updates."""
    ema = copy.deepcopy(net).requires_grad_(False)
    ema.register_buffer("t", torch.zeros(()))
    return ema


@torch.no_grad()
def average(ema, net, decay):
    """ema <- decay ema + (1 - decay) net for each parameter; buffers are copied.

    `ema`: made by averaged().  `decay`: in [0, 1]; 0 copies the parameters, up to rounding on a GPU or when
    compiled.  After t updates it is capped at (1 + t) / (10 + t), so that the EMA soon forgets the random
    initial parameters.
    """
    share = 1 - ((1 + ema.t) / (10 + ema.t)).clamp(max=decay)
    p_ema, p = list(ema.parameters()), list(net.parameters())
    if p[0].is_cuda or torch.compiler.is_compiling():  # few kernels
        change = torch._foreach_sub(p, p_ema)
        torch._foreach_mul_(change, share)
        torch._foreach_add_(p_ema, change)
    else:  # few passes over memory
        for a, b in zip(p_ema, p):
            a.lerp_(b, share)  # torch._foreach_lerp_ would convert it to a Python number
    for name, buffer in net.named_buffers():
        ema.get_buffer(name).copy_(buffer)
    ema.t.add_(1)


@torch.no_grad()
def calibrate(net, batches):
    """Set BatchNorm's running statistics in `net` to their plain mean over `batches`, a tuple of inputs each.

    EMA weights need this, because average() copies the statistics of the raw weights.  Returns `net` in eval
    mode.
    """
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the plain mean of all batches
    net.train()
    for inputs in batches:
        net(*inputs)
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum
    return net.eval()


# ---- precision, sampling mode, devices

def autocast(args):
    """A reusable context manager: bfloat16 autocast if `args.amp`, else nothing.

    bfloat16 has the range of float32, so no loss scaling is needed.  Compute losses and likelihoods outside
    it, or in float32.
    """
    if not args.amp:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16)


@contextlib.contextmanager
def sampling(*nets):
    """Within the block, `nets` are in eval mode and gradients are off, so BatchNorm buffers do not change."""
    training = [net.training for net in nets]
    for net in nets:
        net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for net, mode in zip(nets, training):
            net.train(mode)


def place(args, *nets):
    """Move `nets` to `args.device`, convolutions as channels_last, and return them.

    Under torchrun, all ranks receive the parameters and buffers of rank 0.
    """
    if torch.device(args.device).type == "cpu":
        _keep_freed_memory()
    layout = can(torch.device(args.device).type, "channels_last")
    for net in nets:
        # When compiled, a convolution with one channel gets gradients in a layout that Inductor does not
        # expect, so such networks stay contiguous (PyTorch issue 171622).
        one = args.compile and any(1 in m.weight.shape[:2] for m in net.modules()
                                   if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)))
        net.to(args.device, **({"memory_format": torch.channels_last} if layout and not one else {}))
        if dist.is_initialized():
            for t in net.state_dict().values():
                dist.broadcast(t, 0)
        if args.compile or not layout:  # a compiled step chooses layouts itself and does not support hooks
            continue
        for m in net.modules():
            if isinstance(m, nn.Flatten):
                m.register_forward_pre_hook(_one_layout)
    return nets if len(nets) > 1 else nets[0]


def _keep_freed_memory():
    """Let glibc keep the memory that a step frees; returning it to the system costs a sixth of a step."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, its maximum: larger blocks are always mapped
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _one_layout(flatten, inputs):
    """A pre-hook of nn.Flatten that gives the gradient the memory layout of the input.

    Otherwise it is contiguous, and an elementwise operation that mixes contiguous and channels_last tensors
    takes fifty times as long on a CPU.
    """
    x, = inputs
    if x.requires_grad and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.view_as(x)  # hook only this use of x, which may have others
        x.register_hook(lambda g: g.contiguous(memory_format=torch.channels_last))
    return x,


def describe(args):
    """The status line: mode, precision, ranks and device, which depend only on device and flags."""
    graph = args.graph and torch.device(args.device).type == "cuda"
    mode = " ".join(["compiled"] * args.compile + ["cuda-graph"] * graph) or "plain"
    world = dist.get_world_size() if dist.is_initialized() else 1
    return (f"step: {mode} | {'bf16' if args.amp else 'fp32'} | {world} rank{'s' * (world > 1)} | "
            f"{args.device}")


def has_bf16(device):
    """Whether `device` (a torch.device) multiplies bfloat16 matrices in hardware; emulation is slower than
    float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, ask, bool)() for ask in asks)
    return can(device.type, "bf16")


@functools.cache
def can(device, what):
    """Whether `device` ("mps" ...) supports `what`: "bf16", "channels_last", "float64", "fused" (Adam).

    True for "cuda" and "cpu".  On other devices a small probe must give the same values as on the CPU.
    """
    if device in ("cpu", "cuda"):
        return True
    try:
        found, expected = (_probe(torch.device(d, 0), what) for d in (device, "cpu"))
        return torch.allclose(found, expected, 0.02, 0.02 if what == "bf16" else 1e-5)
    except (AssertionError, RuntimeError, TypeError):  # PyTorch raises these if unsupported
        return False


def _probe(device, what):
    """The gradient of a small convolution and its weights after one update, as float32 on the CPU."""
    form = {"memory_format": torch.channels_last} if what == "channels_last" else {}
    t = torch.arange(288.0).sin().to(torch.float64 if what == "float64" else torch.float32)
    x, w = t.view(2, 4, 6, 6).to(device, **form), t.view(8, 4, 3, 3).to(device, **form).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=what == "bf16"):
        y = F.conv2d(x, w)
    w.grad, = torch.autograd.grad(y.to(w.dtype).square().mean(), w)
    if what == "fused":
        torch.optim.Adam([w], torch.tensor(0.1, device=device), fused=True).step()
    return torch.stack([w.grad, w.detach()]).float().cpu()


def precise(t):
    """`t`, moved to the CPU if its device has no float64."""
    return t if can(t.device.type, "float64") else t.cpu()

"""A whole training iteration as one unit: mixed precision, descent, torch.compile, CUDA graph, data
parallelism.

A script writes its iteration as one plain function, sampling, losses and every update, and puts `@fuse(args)`
on it. On a GPU that function is warmed up with real steps, captured once as a CUDA graph and then replayed:
no Python, no kernel launches and no host synchronisation in the loop.  On a CPU, or with --no-graph, it is
the plain function.
"""

import contextlib
import copy
import ctypes
import sys

import torch
from torch import distributed as dist
from torch import nn


def fuse(args):
    """Decorator: make a training iteration fast on `args.device` without changing what it computes.

    The iteration takes tensors and returns a dict of 0-dim tensors.  Inside it: no `.item()`, no print, no
    Python `if` on a tensor (a condition is a torch.where, or a second fused function).  A graph's outputs are
    overwritten by the next call.
    """
    def decorate(step):
        return Graph(step) if args.graph and torch.device(args.device).type == "cuda" else step
    return decorate


class Graph:
    """`step` as a CUDA graph: `warmup` plain calls on a side stream, one capture, then replays.  Each call is
    one update.

    Raises ValueError when the inputs' shapes or dtypes differ from the captured ones: the graph would
    silently work on what its input buffers held before.
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
        self.graph.replay()  # Capturing only records, so the captured call replays as well.
        return self.outputs


def descend(*losses_and_opts):
    """descend(loss, opt): one step of `opt` down the gradient of `loss` in that optimizer's own parameters.

    descend(loss_1, opt_1, loss_2, opt_2, ...): all gradients are worked out before any optimizer steps, so
    that the losses may share one forward pass.  Gradients are averaged over ranks.  No other parameter's
    gradient is worked out or touched.  Raises RuntimeError inside an autocast block, whose cache of cast
    weights would go on returning those from before the step, and for a parameter that its loss does not
    depend on.
    """
    losses, opts = losses_and_opts[::2], losses_and_opts[1::2]
    params = [[p for group in opt.param_groups for p in group["params"]] for opt in opts]
    device = params[0][0].device
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError("descend() inside an autocast block: close the block before the optimizer steps")
    grads = [torch.autograd.grad(loss, ps, retain_graph=i < len(losses)) for i, (loss, ps)
             in enumerate(zip(losses, params), 1)]
    for opt, ps, gs in zip(opts, params, map(_average, grads)):
        for p, g in zip(ps, gs):
            # Fused Adam goes by memory: a mean over ranks is in plain order, weights are channels_last.
            p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
        if device.type == "cuda":
            for group in opt.param_groups:
                if "capturable" in group:
                    group["capturable"] = True
            if torch.cuda.is_current_stream_capturing():
                # The graph holds today's state's addresses: one loaded later would be silently ignored.
                opt.register_load_state_dict_pre_hook(_refuse_load)
        opt.step()
        for p in ps:
            p.grad = None


def _average(grads):
    """The mean over ranks of each gradient, in one exchange."""
    if not dist.is_initialized():
        return grads
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    return [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)]


def _refuse_load(opt, state):
    raise RuntimeError("this optimizer's step is in a CUDA graph: load checkpoints before the first step")


def averaged(net):
    """A copy of `net` whose parameters average() keeps; its buffer `t` counts the updates."""
    bar = copy.deepcopy(net).requires_grad_(False)
    bar.register_buffer("t", torch.zeros(()))
    return bar


@torch.no_grad()
def average(bar, net, decay):
    """bar <- decay bar + (1 - decay) net for each parameter, early on over fewer steps; copies of buffers.

    `bar`: made by averaged().  `decay`: from 0, the last parameters, to 1; after t updates (1 + t) / (10 + t)
    at most, so that the first, random ones are soon forgotten.
    """
    share = 1 - ((1 + bar.t) / (10 + bar.t)).clamp(max=decay)
    for p_bar, p in zip(bar.parameters(), net.parameters()):
        p_bar.lerp_(p, share)  # torch._foreach_lerp_ would make a Python number of it
    for name, buffer in net.named_buffers():
        bar.get_buffer(name).copy_(buffer)
    bar.t.add_(1)


@torch.no_grad()
def calibrate(net, batches):
    """BatchNorm's statistics in `net` become the plain mean over `batches`, each the inputs of one pass.

    Those that average() copies belong to other weights.  Returns `net` in eval mode.
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


@contextlib.contextmanager
def frozen(*nets):
    """Within the block, gradients flow through `nets` to their inputs but not into their parameters."""
    params = [p for net in nets for p in net.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


def autocast(args):
    """A block, to be entered again and again, that runs matrix products in bfloat16 when `args.amp`.

    bfloat16 has float32's range, so no loss scaling.  Losses and likelihoods belong outside, or in float32.
    """
    if not args.amp:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16)


@contextlib.contextmanager
def sampling(*nets):
    """Within the block `nets` are in eval mode, uncompiled and without gradients: BatchNorm's buffers stay as
    they are."""
    state = [(net, net.training, net._compiled_call_impl) for net in nets]
    for net in nets:
        net.eval()
        net._compiled_call_impl = None
    try:
        with torch.no_grad():
            yield
    finally:
        for net, training, compiled in state:
            net.train(training)
            net._compiled_call_impl = compiled


def place(args, *nets):
    """Move `nets` to `args.device`, convolutions as channels_last, compiled in place when `args.compile`;
    return them.

    Under torchrun every rank gets rank 0's parameters and buffers.
    """
    if torch.device(args.device).type == "cpu":
        _keep_freed_memory()
    if args.compile:
        # Compiled code frees what its backward pass saved; descend() may go through one pass for two losses.
        from torch._functorch import config  # not at the top: seconds of imports

        config.donated_buffer = False
    for net in nets:
        net.to(args.device, memory_format=torch.channels_last)
        if dist.is_initialized():
            for t in net.state_dict().values():
                dist.broadcast(t, 0)
        if args.compile:
            net.compile()
            continue
        for m in net.modules():
            if isinstance(m, nn.Flatten):
                m.register_forward_pre_hook(_one_layout)
    return nets if len(nets) > 1 else nets[0]


def _keep_freed_memory():
    """glibc keeps what a step frees for the next one; given back each time, it costs a sixth of a step."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: larger blocks are mapped and unmapped; its maximum
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _one_layout(flatten, inputs):
    """Before an nn.Flatten: the gradient goes back through it in the layout that its input has.

    It would be in plain order, and an elementwise operation on plain and channels_last tensors takes fifty
    times as long as on either (CPU).
    """
    x, = inputs
    if x.requires_grad and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.view_as(x)  # x may have a gradient from elsewhere as well
        x.register_hook(lambda g: g.contiguous(memory_format=torch.channels_last))
    return x,


class SGD(torch.optim.Optimizer):
    """Classical momentum, v <- momentum v - lr g and theta <- theta + v, with lr and momentum that can
    change.

    Both are 0-dim tensors in `param_groups`: changed in place (`group["lr"].mul_(...)`) they take effect in a
    captured CUDA graph too, where a Python number, as torch.optim.SGD has for the momentum, would be baked
    in.
    """

    def __init__(self, params, lr, momentum=0.0):
        params = list(params)
        tensor = [torch.tensor(float(v), device=params[0].device) for v in (lr, momentum)]
        super().__init__(params, {"lr": tensor[0], "momentum": tensor[1]})
        for p in params:
            self.state[p]["v"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            v, g = [self.state[p]["v"] for p in params], [p.grad for p in params]
            torch._foreach_mul_(v, group["momentum"])
            torch._foreach_addcmul_(v, g, [group["lr"]] * len(v), value=-1)  # lr * g would be a copy
            torch._foreach_add_(params, v)


def describe(args):
    """The status line: what a step of this run is, decided by device and flags alone."""
    graph = "cuda-graph" if args.graph and torch.device(args.device).type == "cuda" else "eager"
    world = dist.get_world_size() if dist.is_initialized() else 1
    return (f"step: {graph} | compile {'on' if args.compile else 'off'} | {'bf16' if args.amp else 'fp32'} | "
            f"{world} rank{'s' * (world > 1)} | {args.device}")


def has_bf16(device):
    """Whether `device` (a torch.device) multiplies bfloat16 matrices in hardware; emulated, it is slower than
    float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, ask, bool)() for ask in asks)
    return False

"""The step kernel: who moves, what a frozen network lets through, optimizers, and the CUDA graph against the
plain step."""

import copy
import ctypes
import sys
from argparse import Namespace

import pytest
import torch
from conftest import cuda, script
from torch import distributed as dist
from torch import nn

from common import data
from common import fuse as fuse_module
from common.fuse import (
    SGD,
    Adam,
    Graph,
    autocast,
    average,
    averaged,
    calibrate,
    cannot_compile,
    descend,
    describe,
    frozen,
    fuse,
    place,
    sampling,
    set_rate,
)


def args(device="cpu", **flags):
    return Namespace(**{"device": device, "amp": False, "compile": False, "graph": False, **flags})


def pair(device="cpu"):
    torch.manual_seed(0)
    G = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6)).to(device)
    D = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1)).to(device)
    return G, D


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_descend_moves_its_own_parameters_only():
    G, D = pair()
    opt_D = torch.optim.Adam(D.parameters(), 1e-2, fused=True)
    before_G, before_D = weights(G), weights(D)
    descend(D(G(torch.randn(8, 4))).mean(), opt_D)
    assert same(before_G, weights(G)) and not same(before_D, weights(D))
    assert all(p.grad is None for net in (G, D) for p in net.parameters())


def test_descend_goes_down_the_gradient_exactly():
    p = nn.Parameter(torch.tensor([3.0, -2.0]))
    descend((p**2).sum(), torch.optim.SGD([p], lr=0.1))
    torch.testing.assert_close(p.detach(), torch.tensor([3.0 - 0.6, -2.0 + 0.4]))


def test_the_average_forgets_the_first_parameters_and_copies_buffers():
    G, _ = pair()
    bar, p = averaged(G), G[0].weight
    values, expected = [3.0, -1.0, 4.0, 1.0], p.detach().clone()
    for t, value in enumerate(values):
        p.data.fill_(value)
        G[1].running_mean.fill_(value)
        average(bar, G, 0.3)
        decay = min(0.3, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(bar[0].weight, expected)
    assert (bar[1].running_mean == 1).all() and bar.t == 4 and not bar[0].weight.requires_grad
    average(bar, G, 0.0)
    assert same(weights(bar), weights(G))


def test_calibrated_statistics_are_the_mean_over_minibatches():
    G, _ = pair()
    before, batches = weights(G), [(torch.randn(9, 4),) for _ in range(3)]
    h = [G[0](x) for x, in batches]
    assert calibrate(G, batches) is G and not G.training
    torch.testing.assert_close(G[1].running_mean, torch.stack([part.mean(0) for part in h]).mean(0))
    torch.testing.assert_close(G[1].running_var, torch.stack([part.var(0) for part in h]).mean(0))
    assert G[1].momentum == 0.1 and all(torch.equal(p, q) for p, q in zip(before, weights(G)))


def test_adam_of_a_rank_moves_channels_last_weights_as_alone(tmp_path):
    """Fused Adam goes by memory: the exchange between ranks must leave gradients in their order."""
    def moved():
        torch.manual_seed(0)
        net = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        opt = torch.optim.Adam(net.parameters(), 0.1, fused=True)
        for _ in range(2):
            descend(net(torch.rand(5, 3, 6, 6)).square().mean(), opt)
        return net.weight.detach()

    alone = moved()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.testing.assert_close(moved(), alone)
    finally:
        dist.destroy_process_group()


def test_descend_refuses_an_open_autocast_block():
    _G, D = pair()
    opt = torch.optim.Adam(D.parameters())
    with autocast(args(amp=True)), pytest.raises(RuntimeError, match="autocast"):
        descend(D(torch.randn(8, 6)).float().mean(), opt)


def test_descend_names_a_loss_that_does_not_depend_on_the_parameters():
    G, D = pair()
    with pytest.raises(RuntimeError):
        descend(D(torch.randn(2, 6)).mean(), torch.optim.Adam(G.parameters()))


def test_descend_together_takes_every_gradient_at_the_old_parameters():
    G, D = pair()
    z = torch.randn(8, 4)
    loss = D(G(z)).mean()
    expected = [
        torch.autograd.grad(sign * loss, net.parameters(), retain_graph=True)
        for sign, net in ((1, D), (-1, G))
    ]
    before = [weights(D), weights(G)]
    descend(loss, torch.optim.SGD(D.parameters(), 0.1), -loss, torch.optim.SGD(G.parameters(), 0.1))
    for net, old, grads in zip((D, G), before, expected):
        for p, q, g in zip(net.parameters(), old, grads):
            torch.testing.assert_close(p.detach(), q - 0.1 * g)


def test_frozen_lets_gradients_through_but_not_in():
    G, D = pair()
    with frozen(D):
        loss = D(G(torch.randn(8, 4))).mean()
        assert not any(p.requires_grad for p in D.parameters())
    assert all(p.requires_grad for p in D.parameters())
    loss.backward()
    assert all(p.grad is None for p in D.parameters())
    assert all(p.grad.abs().sum() > 0 for p in G[3].parameters())


def test_frozen_keeps_what_was_frozen_before():
    _, D = pair()
    D[0].weight.requires_grad_(False)
    with frozen(D):
        pass
    assert not D[0].weight.requires_grad and D[2].weight.requires_grad


def test_sampling_leaves_batchnorm_and_mode_alone():
    G, _ = pair()
    before = copy.deepcopy(G.state_dict())
    with sampling(G):
        assert not G.training
        x = G(torch.randn(8, 4))
    assert G.training and not x.requires_grad
    assert all(torch.equal(before[k], v) for k, v in G.state_dict().items())


def test_sampling_uses_the_running_statistics():
    G, _ = pair()
    z = torch.randn(8, 4)
    with sampling(G):
        torch.testing.assert_close(G(z)[:1], G(z[:1]))  # in train mode a picture would depend on its batch


def test_a_gradient_goes_through_a_flatten_in_the_layout_of_its_input():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(32, 1))
    plain, layouts = copy.deepcopy(net), []
    place(args(), net)
    x = torch.randn(5, 3, 4, 4)
    h = net[1](net[0](x))
    h.register_hook(lambda g: layouts.append(g.is_contiguous(memory_format=torch.channels_last)))
    (net[3](net[2](h)).sum() + 0.0 * h.contiguous().sum()).backward()
    plain(x).sum().backward()
    assert layouts == [True]
    for p, q in zip(net.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "mallopt"),
                    reason="needs glibc")
def test_what_a_step_frees_is_kept_for_the_next_one():
    code = """
import ctypes, resource, sys, torch
from argparse import Namespace
from common.fuse import place

libc, size = ctypes.CDLL(None), 2**24
libc.malloc.restype = ctypes.c_void_p

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        blocks = [ctypes.c_void_p(libc.malloc(size)) for _ in range(10)]
        for block in blocks:
            ctypes.memset(block, 1, size)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if "place" in sys.argv:
    place(Namespace(device="cpu", compile=False), torch.nn.Linear(1, 1))
faults()
print(faults())
"""
    given_back, kept = (int(script("-c", code, word).stdout) for word in ("", "place"))
    assert kept < 100 < given_back      # 200,000 pages of 4 kB, or 400 of 2 MB


def test_sgd_is_classical_momentum_with_rates_changed_in_place():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    theta, v, lr, m = p.detach().numpy().copy(), 0.0, 0.1, 0.5
    opt = SGD([p], lr, m)
    for _ in range(4):
        g = 2 * theta
        v = m * v - lr * g
        theta = theta + v
        descend((p**2).sum(), opt)
        lr, m = lr / 2, m + 0.1
        opt.param_groups[0]["lr"].div_(2)
        opt.param_groups[0]["momentum"].add_(0.1)
    torch.testing.assert_close(p.detach(), torch.from_numpy(theta), rtol=1e-6, atol=0)


def test_sgd_state_survives_saving():
    def optimizer():
        p = nn.Parameter(torch.ones(3))
        return p, SGD([p], 0.1, 0.5)

    p, opt = optimizer()
    descend((p**2).sum(), opt)
    opt.param_groups[0]["lr"].mul_(0.5)
    q, other = optimizer()
    q.data.copy_(p.data)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    descend((p**2).sum(), opt)
    descend((q**2).sum(), other)
    assert torch.equal(p, q)


def test_fuse_is_the_plain_function_on_a_cpu():
    def step(x):
        return {"x": x.sum()}

    assert fuse(args(graph=True))(step) is step


def test_describe_says_what_runs():
    assert describe(args(amp=True)) == "step: plain | bf16 | 1 rank | cpu"
    assert describe(args(compile=True, graph=True)) == "step: compiled | fp32 | 1 rank | cpu"
    assert describe(args("cuda", graph=True)).startswith("step: cuda-graph | fp32")
    assert describe(args("cuda", graph=True, compile=True)).startswith("step: compiled cuda-graph | fp32")


def gan_step(device, **flags):
    """A small adversarial iteration in every part of which a graph could go wrong: noise, two optimizers,
    BatchNorm."""
    a = args(device, **flags)
    G, D = place(a, *pair(device))
    opt_D, opt_G = Adam(D.parameters(), 1e-3), SGD(G.parameters(), 1e-2, 0.5)
    amp = autocast(a)
    count = torch.zeros((), device=device)

    @fuse(a)
    def step(x, z):
        with amp:
            x_fake = G(z)
            a_real, a_fake = D(x), D(x_fake.detach())
        descend(
            nn.functional.softplus(-a_real.float()).mean() + nn.functional.softplus(a_fake.float()).mean(),
            opt_D,
        )
        with amp, frozen(D):
            a_fake = D(x_fake)
        loss = nn.functional.softplus(-a_fake.float()).mean()
        descend(loss, opt_G)
        opt_G.param_groups[0]["lr"].mul_(0.9)
        count.add_(1)
        return {"loss": loss, "noise": torch.randn((), device=device)}

    return G, D, opt_D, opt_G, step, count


@cuda
def test_warp_and_average_in_a_graph():
    net = nn.Linear(3, 2).cuda()
    bar = averaged(net).cuda()

    def step(x):
        average(bar, net, 0.9)
        return {"sum": data.warp(x).sum()}

    step = Graph(step)
    sums = [step(torch.ones(8, 1, 9, 9, device="cuda"))["sum"].item() for _ in range(8)]
    assert bar.t.item() == 8 and sums == pytest.approx(8 * [8 * 81.0], rel=1e-4)


@cuda
def test_graph_equals_the_plain_step_and_counts_every_call():
    runs = {}
    torch.manual_seed(1)
    batches = [(torch.randn(8, 6, device="cuda"), torch.randn(8, 4, device="cuda")) for _ in range(8)]
    for graph in (False, True):
        G, D, _, _, step, count = gan_step("cuda", graph=graph)
        losses = [step(*b)["loss"].clone() for b in batches]
        assert count.item() == len(batches)
        runs[graph] = [*weights(G), *weights(D), *losses]
    for plain, fused in zip(runs[False], runs[True], strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-6)


@cuda
def test_graph_draws_fresh_noise_on_every_replay():
    *_, step, _ = gan_step("cuda", graph=True)
    x, z = torch.randn(8, 6, device="cuda"), torch.randn(8, 4, device="cuda")
    assert len({step(x, z)["noise"].item() for _ in range(8)}) == 8


@cuda
def test_graph_refuses_another_shape_and_a_late_load():
    _, _, opt_D, _, step, _ = gan_step("cuda", graph=True)
    x, z = torch.randn(8, 6, device="cuda"), torch.randn(8, 4, device="cuda")
    for _ in range(5):
        step(x, z)
    with pytest.raises(ValueError, match="captured"):
        step(x[:4], z[:4])
    with pytest.raises(ValueError, match="captured"):
        step(x.double(), z)
    with pytest.raises(RuntimeError, match="before the first step"):
        opt_D.load_state_dict(opt_D.state_dict())


@cuda
def test_replays_do_not_wait_for_the_device():
    *_, step, _ = gan_step("cuda", graph=True)
    x, z = torch.randn(8, 6, device="cuda"), torch.randn(8, 4, device="cuda")
    for _ in range(5):
        step(x, z)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, z)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def aot(monkeypatch):
    """Dynamo and AOTAutograd trace the whole step; its operations then run one by one, without a compiler."""
    if cannot_compile(torch.device("cpu")):
        pytest.skip(cannot_compile(torch.device("cpu")))
    monkeypatch.setattr(fuse_module, "BACKEND", "aot_eager")


def steps_of(n=6, **flags):
    """Losses and weights of gan_step() over `n` steps from one seed."""
    G, D, _, opt_G, step, count = gan_step("cpu", **flags)
    torch.manual_seed(1)
    losses = [step(torch.randn(8, 6), torch.randn(8, 4))["loss"] for _ in range(n)]
    return [count, opt_G.param_groups[0]["lr"], *losses, *weights(G), *weights(D), *G.state_dict().values()]


def test_the_compiled_step_equals_the_plain_one(aot):
    for plain, compiled in zip(steps_of(), steps_of(compile=True), strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-5, atol=1e-6)


def test_inductor_compiles_the_step(monkeypatch):
    if cannot_compile(torch.device("cpu")):
        pytest.skip(cannot_compile(torch.device("cpu")))
    from torch._inductor import config

    with config.patch(fallback_random=True):
        for plain, compiled in zip(steps_of(), steps_of(compile=True), strict=True):
            torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-5)


def test_outputs_of_the_compiled_step_are_detached(aot):
    net = nn.Linear(2, 1)
    step = fuse(args(compile=True))(lambda x: {"y": net(x).sum()})
    assert not step(torch.ones(3, 2))["y"].requires_grad


def test_another_shape_is_no_second_compilation(aot):
    step = fuse(args(compile=True))(lambda x: {"y": x.sum()})
    assert step(torch.ones(3))["y"] == 3
    with pytest.raises(Exception, match="[Rr]ecompil"):
        step(torch.ones(4))


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_compiled_adam_is_torchs_over_50_steps(decay):
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5)]
    mine, theirs = ([nn.Parameter(p.clone()) for p in start] for _ in "ab")
    opt = Adam(mine, 1e-2, weight_decay=decay)
    other = torch.optim.Adam(theirs, 1e-2, betas=(0.5, 0.999), weight_decay=decay)
    for i in range(50):
        for p, q in zip(mine, theirs):
            q.grad = torch.randn_like(p)
        with torch.no_grad():
            fuse_module._adam(opt, [q.grad for q in theirs])
        other.step()
        set_rate(opt, 1e-2 * 0.9 ** (i + 1))
        other.param_groups[0]["lr"] = 1e-2 * 0.9 ** (i + 1)
    for p, q in zip(mine, theirs):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_sgd_is_torchs_at_a_constant_rate():
    torch.manual_seed(0)
    mine, theirs = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    opt, other = SGD([mine], 0.1, 0.5), torch.optim.SGD([theirs], 0.1, momentum=0.5)
    for _ in range(50):
        a = torch.randn(4)
        descend((a * mine).sum() + mine.square().sum(), opt)
        descend((a * theirs).sum() + theirs.square().sum(), other)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_goes_from_one_mode_to_another(aot):
    """4 plain steps and 4 compiled ones equal 8 plain ones, through torch.optim's own state dict."""
    torch.manual_seed(1)
    batches = [(torch.randn(8, 6), torch.randn(8, 4)) for _ in range(8)]
    found = []
    for second in (False, True):
        G, D, opt_D, opt_G, step, _ = gan_step("cpu")
        for batch in batches[:4]:
            step(*batch)
        saved = copy.deepcopy([part.state_dict() for part in (G, D, opt_D, opt_G)])
        G, D, opt_D, opt_G, step, _ = gan_step("cpu", compile=second)
        for part, state in zip((G, D, opt_D, opt_G), saved):
            part.load_state_dict(state)
        for batch in batches[4:]:
            step(*batch)
        found.append([*weights(G), *weights(D)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-5, atol=1e-6)


def test_what_compiling_lacks_is_one_line(monkeypatch):
    monkeypatch.setattr(fuse_module.shutil, "which", lambda name: None)
    said = cannot_compile(torch.device("cpu"))
    assert "compiler found" in said or "2.11 or newer needed" in said
    monkeypatch.setattr(fuse_module.shutil, "which", lambda name: name)
    monkeypatch.setattr(fuse_module.sysconfig, "get_paths", lambda: {"include": "nowhere"})
    said = cannot_compile(torch.device("cpu"))
    assert "Python.h not found" in said or "2.11 or newer needed" in said


def test_rates_are_set_in_place():
    p = nn.Parameter(torch.ones(2))
    opt = SGD([p], 0.1, 0.5)
    lr, momentum = (opt.param_groups[0][key] for key in ("lr", "momentum"))
    set_rate(opt, 0.2, momentum=0.7)
    assert lr == pytest.approx(0.2) and momentum == pytest.approx(0.7)

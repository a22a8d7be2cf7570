"""gan.py: equations and theorems against closed forms, networks against the authors' settings, who moves,
figures."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image

import gan
from common.fuse import SGD, descend
from gan import PAPER, D_star, Maxout, V, contrast, density, networks, objective_G

NETS = ["mnist", "tfd", "cifar-fc", "cifar-conv"]


def args(*words):
    a = gan.parse_args(["--device", "cpu", *words])
    a.amp = a.compile = a.graph = False
    return a


def built(name, *words, mean=0.25):
    """(G, D) of `name` for pictures of one mean."""
    a = args("--net", name, *words)
    return networks(a, torch.full((a.channels, a.size, a.size), mean))


# ---------------------------------------------------------------------------------------------- equations


def test_V_is_minus_log_4_at_one_half():
    assert V(torch.zeros(5), torch.zeros(5)).item() == pytest.approx(-math.log(4))


def test_objectives_of_G_against_numpy():
    a = np.random.default_rng(0).normal(size=50) * 3
    D = 1 / (1 + np.exp(-a))
    assert objective_G(torch.tensor(a), "non-saturating").item() == pytest.approx(np.log(D).mean(), abs=1e-5)
    assert objective_G(torch.tensor(a), "minimax").item() == pytest.approx(-np.log(1 - D).mean(), abs=1e-5)


def test_minimax_saturates_where_the_other_does_not():
    slopes = {}
    for loss in ("minimax", "non-saturating"):
        a = torch.full((1,), -10.0, requires_grad=True)
        objective_G(a, loss).backward()
        slopes[loss] = a.grad.item()
    assert slopes["minimax"] < 1e-4 and slopes["non-saturating"] > 0.999


def test_C_is_minus_log_4_plus_twice_the_Jensen_Shannon_divergence():
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    dx = 24 / 4800
    p, q = density(x, 0, 1), density(x, 1.5, 0.7)
    m = (p + q) / 2
    kl = lambda a, b: (a * (a / b).log()).sum().item() * dx
    jsd = (kl(p, m) + kl(q, m)) / 2
    assert gan.C(p, q, dx) == pytest.approx(-math.log(4) + 2 * jsd, abs=1e-6)
    assert gan.C(p, p, dx) == pytest.approx(-math.log(4), abs=1e-6)
    assert gan.C(density(x, -8, 0.2), density(x, 8, 0.2), dx) == pytest.approx(0, abs=1e-6)


def test_D_learns_p_data_over_the_sum(tmp_path):
    """Prop. 1 by gradient ascent on V with both densities fixed: N(0, 1) against N(1, 1), where D* =
    sigmoid(1/2 - x)."""
    torch.manual_seed(0)
    D = torch.nn.Linear(1, 1)
    opt = torch.optim.Adam(D.parameters(), 2e-2)
    for _ in range(400):
        descend(-V(D(torch.randn(2048, 1)), D(torch.randn(2048, 1) + 1)), opt)
    x = torch.linspace(-2, 3, 51, dtype=torch.float64)
    learned = D(x.float()[:, None]).sigmoid().double()[:, 0]
    expected = D_star(density(x, 0, 1), density(x, 1, 1))
    torch.testing.assert_close(expected, (0.5 - x).sigmoid())
    assert (learned - expected).abs().max() < 0.05


# ----------------------------------------------------------------------------------------------- networks


def test_maxout_is_the_largest_of_its_pieces():
    layer = Maxout(3, 4, 5)
    x = torch.randn(7, 3)
    expected = layer.linear(x).view(7, 4, 5).max(2).values
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    "name, g, d",
    [
        (
            "mnist",
            100 * 1200 + 1200 + 1200 * 1200 + 1200 + 1200 * 784 + 784,
            784 * 1200 + 1200 + 240 * 1200 + 1200 + 240 + 1,
        ),
        (
            "tfd",
            100 * 8000 + 8000 + 8000 * 8000 + 8000 + 8000 * 2304 + 2304,
            2304 * 6000 + 6000 + 1200 * 6000 + 6000 + 1200 + 1,
        ),
    ],
)
def test_networks_have_the_papers_sizes(name, g, d):
    size = PAPER[name]["size"]
    G, D = built(name)
    assert [sum(p.numel() for p in net.parameters()) for net in (G, D)] == [g, d]
    with torch.no_grad():
        x = G(gan.sample_z(2, args("--net", name)))
        assert x.shape == (2, 1, size, size) and D(x).shape == (2,)
        assert 0 <= x.min() and x.max() <= 1


def test_G_starts_at_the_training_mean_and_weights_within_their_width():
    mean = torch.linspace(0, 1, 784).view(1, 28, 28)
    G, D = networks(args(), mean)
    torch.testing.assert_close(
        G[4].bias.sigmoid(), mean.flatten().clamp(1e-7, 1 - 1e-7), atol=1e-6, rtol=1e-4
    )
    assert 0.049 < G[0].weight.abs().max() <= 0.05 and 0.0049 < D[2].linear.weight.abs().max() <= 0.005


def test_narrow_nets_have_sums_as_spread_as_the_full_ones():
    G, D = built("tfd", "--width", ".25")
    x = torch.rand(500, 2000)
    full = torch.nn.Linear(8000, 500)
    gan.uniform(torch.nn.Sequential(torch.nn.Linear(1, 1), full), 0.05)
    narrow, wide = G[2](x).std(), full(torch.rand(500, 8000)).std()
    assert 0.8 < narrow / wide < 1.25
    assert 0.049 < G[0].weight.abs().max() <= 0.05 and 0.0049 < D[2].linear.weight.abs().max() <= 0.005


def test_the_convolutional_networks_fit_cifar():
    net = torch.nn.Sequential(
        torch.nn.ConvTranspose2d(80, 3, 5, stride=3, bias=False), gan.UntiedBias(3, 32, 32)
    )
    assert net(torch.randn(2, 80, 10, 10)).shape == (2, 3, 32, 32)
    assert gan.MaxoutConv(3, 32, 8, 4, 4, 2)(torch.randn(2, 3, 32, 32)).shape == (2, 32, 16, 16)
    assert gan.MaxoutConv(32, 32, 8, 3, 4, 2)(torch.randn(2, 32, 16, 16)).shape == (2, 32, 7, 7)
    assert gan.MaxoutConv(32, 192, 5, 3, 2, 2)(torch.randn(2, 32, 7, 7)).shape == (2, 192, 5, 5)


@pytest.mark.parametrize("name", NETS)
def test_narrow_networks_draw_the_same_pictures(name):
    shape = [PAPER[name][k] for k in ("channels", "size", "size")]
    G, D = built(name, "--width", ".013")
    x = G(gan.sample_z(2, args("--net", name)))
    assert list(x.shape) == [2, *shape] and D(x).shape == (2,)
    assert sum(p.numel() for p in G.parameters()) < 1e6


def test_z_has_unit_variance():
    torch.manual_seed(0)
    for name in ("mnist", "tfd"):
        z = gan.sample_z(5000, args("--net", name))
        assert z.shape == (5000, 100) and abs(z.var().item() - 1) < 0.02
    assert gan.sample_z(5000, args()).abs().max() <= math.sqrt(3)


def test_contrast_removes_the_mean_and_sets_the_norm():
    x = contrast(torch.rand(4, 3, 32, 32))
    torch.testing.assert_close(x.mean((1, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.flatten(1).norm(dim=1), torch.full((4,), 55.0))


# ---------------------------------------------------------------------------------------- who moves, where to


def test_a_step_moves_both_networks_k_times_for_D():
    torch.manual_seed(0)
    G, D, *_, step = gan.build(args("--k", "3"), torch.full((1, 28, 28), 0.1), 500)
    before = [p.detach().clone() for net in (G, D) for p in net.parameters() if p.ndim > 1]
    step(torch.rand(3 * 16, 1, 28, 28))
    after = [p for net in (G, D) for p in net.parameters() if p.ndim > 1]
    assert all(not torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_G_and_D_step_from_the_old_parameters_of_both():
    """As in the authors' code, G's step is the gradient through the D from before D's own step; --alternate
    goes through the new one."""
    moved = {}
    for flag in ((), ("--alternate",)):
        torch.manual_seed(0)
        G, D, _, opt_D, _, step = gan.build(args(*flag), torch.full((1, 28, 28), 0.1), 500)
        gan.uniform(D, 0.05)
        opt_D.param_groups[0]["lr"].fill_(0.0)
        still = [p.detach().clone() for p in G.parameters()]
        torch.manual_seed(1)
        step(torch.rand(16, 1, 28, 28))
        slow = [p - q for p, q in zip(G.parameters(), still)]
        G.load_state_dict(dict(zip(G.state_dict(), still)))
        torch.manual_seed(0)
        G2, D2, _, opt_D2, _, step2 = gan.build(args(*flag), torch.full((1, 28, 28), 0.1), 500)
        gan.uniform(D2, 0.05)
        opt_D2.param_groups[0]["lr"].fill_(0.5)
        torch.manual_seed(1)
        step2(torch.rand(16, 1, 28, 28))
        fast = [p - q for p, q in zip(G2.parameters(), still)]
        moved[flag] = all(torch.equal(p, q) for p, q in zip(slow, fast))
    assert moved[()] and not moved[("--alternate",)]


def test_one_step_of_G_raises_log_D():
    torch.manual_seed(0)
    G, D = built("mnist", mean=0.1)
    D.eval()
    gan.uniform(D, 0.05)
    z = gan.sample_z(64, args())
    before = objective_G(D(G(z)), "non-saturating")
    descend(-before, torch.optim.SGD(G.parameters(), lr=1e-2))
    assert objective_G(D(G(z)), "non-saturating") > before


def test_annealing_follows_the_papers_schedule():
    opt = SGD([torch.nn.Parameter(torch.zeros(1))], 0.1, 0.5)
    for _ in range(10):
        gan.anneal(opt, per_epoch=1)
    group = opt.param_groups[0]
    assert group["lr"].item() == pytest.approx(0.1 / 1.000004**10, rel=1e-6)
    assert group["momentum"].item() == pytest.approx(0.5 + 10 * 0.2 / 249, rel=1e-5)
    for _ in range(400):
        gan.anneal(opt, per_epoch=1)
    assert group["momentum"].item() == pytest.approx(0.7)


def test_bound_caps_each_units_weights():
    net = torch.nn.Linear(50, 20)
    torch.nn.init.normal_(net.weight)
    net.weight.data[0] *= 1e-3
    small = net.weight[0].detach().clone()
    gan.bound(net, 1.9365)
    assert net.weight.norm(dim=1).max() <= 1.9366 and torch.equal(net.weight[0], small)


def test_fig2_ends_each_row_with_the_nearest_training_image():
    train = torch.rand(40, 1, 8, 8)
    x = torch.rand(18, 1, 8, 8)
    x[8], x[17] = train[7] + 0.01, train[31] - 0.01
    shown = gan.fig2(x, train, 10).view(2, 10, 1, 8, 8)
    assert torch.equal(shown[0, 9], train[7]) and torch.equal(shown[1, 9], train[31])
    assert torch.equal(shown[:, :9].flatten(0, 1), x)


# ------------------------------------------------------------------------------------------------------- runs


def test_a_run_on_digits_draws_figures_and_writes_numbers(digits, tmp_path):
    result = script(
        "gan.py",
        "--dataset",
        digits,
        "--out",
        tmp_path,
        "--steps",
        12,
        "--batch-size",
        16,
        "--log-every",
        4,
        "--data-dir",
        tmp_path / "data",
        "--device",
        "cpu",
    )
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "gan-digits"
    for figure in ("fig2a", "fig3"):
        assert np.asarray(Image.open(folder / f"{figure}.png")).std() > 5, figure
    results = json.loads((folder / "results.json").read_text())["results"]
    assert math.isfinite(results["gan-mnist-ll"]["value"]) and "paper" not in results["gan-mnist-ll"]


def test_digits_under_the_network_for_faces(digits, tmp_path, monkeypatch):
    pictures = gan.data.load(digits, size=48)
    monkeypatch.setattr(gan.data, "load", lambda *_: pictures)
    gan.main(["--net", "tfd", "--width", ".01", "--steps", "1", "--check", "--out", str(tmp_path),
              "--data-dir", str(tmp_path / "data"), "--device", "cpu"])
    results = json.loads((tmp_path / "gan-mnist" / "results.json").read_text())["results"]
    assert "paper" not in results["gan-tfd-ll"]


@pytest.mark.parametrize("dataset, net, paper", [("mnist", "mnist", 225), ("faces", "tfd", 2057)])
def test_the_papers_value_stands_beside_ours_on_its_own_data(monkeypatch, dataset, net, paper):
    x = torch.rand(20, 1, 8, 8)
    monkeypatch.setattr(gan, "draw", lambda *_: x)
    pictures = SimpleNamespace(images=x, labels=None, test_images=x)
    found = gan.evaluate(args("--dataset", dataset), None, pictures, x)
    assert found[f"gan-{net}-ll"]["paper"] == paper


def test_the_toy_finds_the_data_and_C_goes_to_minus_log_4(tmp_path):
    result = script("gan.py", "--dataset", "toy", "--out", tmp_path, "--device", "cpu", "--check")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = tmp_path / "gan-toy"
    assert np.asarray(Image.open(folder / "fig1.png")).std() > 5
    found = json.loads((folder / "results.json").read_text())["results"]["gan-theory"]
    assert found["value"] < -math.log(4) + 0.01 and found["E|D - D*|"] < 0.02


def test_a_resumed_toy_draws_the_figure_of_a_whole_run(tmp_path, monkeypatch):
    words = ["--dataset", "toy", "--device", "cpu", "--out", str(tmp_path)]
    gan.main([*words, "--name", "whole", "--steps", "40"])
    gan.main([*words, "--name", "short", "--steps", "1"])
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(gan.run.Run, "_all_stop", lambda self, step: step == 20)
        gan.main([*words, "--name", "halves", "--steps", "40"])
    gan.main(["--resume", str(tmp_path / "gan-toy-halves"), "--device", "cpu"])
    whole, halves = (Image.open(tmp_path / f"gan-toy-{name}" / "fig1.png") for name in ("whole", "halves"))
    assert np.array_equal(whole, halves)
    with pytest.raises(gan.UserError, match="draws numbers"):
        gan.main(["--resume", str(tmp_path / "gan-toy-whole"), "--sample", "3", "--device", "cpu"])


def test_it_covers_the_modes_of_a_ring():
    """Algorithm 1 with this file's losses on eight Gaussians: every mode is found, and most samples lie on
    one."""
    torch.manual_seed(0)
    angle = torch.arange(8) * 2 * math.pi / 8
    centres, std = 2 * torch.stack([angle.cos(), angle.sin()], 1), 0.2
    layer = lambda i, o: [torch.nn.Linear(i, o), torch.nn.Tanh()]
    G = torch.nn.Sequential(*layer(16, 128), *layer(128, 128), torch.nn.Linear(128, 2))
    D = torch.nn.Sequential(*layer(2, 128), *layer(128, 128), torch.nn.Linear(128, 1))
    opt_G, opt_D = (
        torch.optim.Adam(net.parameters(), 1e-3, betas=(0.0, 0.999), fused=True) for net in (G, D)
    )
    for _ in range(1500):
        x = centres[torch.randint(8, (256,))] + std * torch.randn(256, 2)
        x_fake = G(torch.randn(256, 16))
        descend(-V(D(x), D(x_fake.detach())), opt_D)
        descend(-objective_G(D(x_fake), "non-saturating"), opt_G)
    with torch.no_grad():
        distance, mode = torch.cdist(G(torch.randn(4000, 16)), centres).min(1)
    counts = torch.bincount(mode[distance < 3 * std], minlength=8)
    assert counts.min() > 200 and counts.sum() > 3200, counts.tolist()

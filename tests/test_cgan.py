"""cgan.py: equations against closed forms, networks against both papers, who moves, labels, tags, figures."""

import contextlib
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, script, untrained
from PIL import Image

import cgan
from cgan import PAPER, TUNED, V, beside, log_D, networks, nn_error, one_hot
from common import data
from common.fuse import descend

MEAN = torch.full((1, 28, 28), 0.1)


def args(name="mlp", *words):
    """The settings of network `name`, narrow unless --width is among the flags `words`."""
    width = () if "--width" in words else ("--width", "0.1")
    a = cgan.parse_args(["--device", "cpu", "--net", name, *width, *words])
    a.amp = a.compile = a.graph = False
    return a


def nets(name, *words, K=10, **more):
    torch.manual_seed(0)
    return networks(args(name, *words), K, MEAN, **more)


def batch(name, K=10, n=16, d=200):
    """x and y of one minibatch, of random numbers."""
    a = PAPER[name]
    x = torch.randn(n, d) if name == "tags" else torch.rand(n, a["channels"], a["size"], a["size"])
    y = torch.randn(n, K) if name == "tags" else one_hot(torch.arange(n) % K, K)
    return x, y


def build(a, K=10, d=200, pair=None):
    """What cgan.build() returns, from seed 0; `pair`: networks in place of its own."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if pair:
            patch.setattr(cgan, "networks", lambda *_: pair)
        return cgan.build(a, K, MEAN, d)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


# ---------------------------------------------------------------------------------------------- equations


def test_V_and_the_objective_of_G_against_numpy():
    assert V(torch.zeros(5), torch.zeros(5)).item() == pytest.approx(-math.log(4))
    assert log_D(torch.zeros(5)).item() == pytest.approx(-math.log(2))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50) * 3, rng.normal(size=50) * 3
    expected = np.log(sigmoid(a)).mean() + np.log(1 - sigmoid(b)).mean()
    assert V(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(expected, abs=1e-5)
    assert log_D(torch.tensor(b)).item() == pytest.approx(np.log(sigmoid(b)).mean(), abs=1e-5)


@pytest.mark.parametrize("name, step, lr, momentum", [
    ("mlp", 1, 0.1, 0.5), ("mlp", 1001, 0.1 * math.exp(-1000 * math.log(1.00004)), 0.5 + 0.2 * 1000 / 1245),
    ("mlp", 1246, 0.1 / 1.00004 ** 1245, 0.7), ("tags", 10**6, 1e-6, 0.7),
    ("dcgan28", 1, 2e-4, None), ("dcgan28", 51, 2e-4, None), ("dcgan28", 76, 1e-4, None),
    ("dcgan32", 101, 0, None)])
def test_rate_and_momentum_follow_the_papers(name, step, lr, momentum):
    """Momentum reaches .7 in epoch 250; an epoch has 5 steps here."""
    a = args(name, "--steps", "100")
    opts = build(a)[3:5]
    cgan.anneal(a, opts, step, per_epoch=5)
    for opt in opts:
        group, = opt.param_groups
        assert group["lr"].item() == pytest.approx(lr, rel=1e-6)
        assert momentum is None or group["momentum"].item() == pytest.approx(momentum, rel=1e-6)
    assert opts[0].param_groups[0]["lr"] is not opts[1].param_groups[0]["lr"]


# ------------------------------------------------------------------------------------------------- settings

DCGAN_CODE = {                                      # Newmu/dcgan_code, mnist/train_cond_dcgan.py
    "batch_size": 128, "lr": 0.0002, "weight_decay": 2.5e-5, "z": (-1, 1), "init_G": "normal",
    "init_D": "normal",
    "steps": 200 * math.ceil(50000 / 128) / 2,      # niter + niter_decay epochs; a minibatch trains D or G
    "batch_stats": True,                            # _gen() has the batchnorm() of training
    "average": 0, "noise": 0, "drop_samples": False}
SEC_4 = {                                           # CGAN Sec. 4.1, and for tags Sec. 4.2
    "batch_size": 100, "lr": 0.1, "lr_factor": 1.00004, "lr_min": 1e-6, "momentum": (0.5, 0.7),
    "average": 0, "noise": 0, "drop_samples": False, "batch_stats": False,
    "momentum_epochs": 250, "init_G": 0.05, "init_D": 0.005, "alternate": False,   # GAN's mnist.yaml, sgd.py
    "steps": 288000}                                # not published
PUBLISHED = {
    "mlp": SEC_4 | {"net": "mlp", "size": 28, "channels": 1, "scale": (0, 1),
                    "z": (0, 1)},                   # Sec. 4.1: "uniform within the unit hypercube"
    "tags": SEC_4 | {"net": "tags", "size": 64, "channels": 3, "scale": (0, 1), "z": "normal",
                     "near": 20, "standardize": False},                                         # Sec. 4.2
    "dcgan28": DCGAN_CODE | {"net": "dcgan28", "size": 28, "channels": 1, "scale": (0, 1)},     # transform()
    "dcgan32": DCGAN_CODE | {"net": "dcgan32", "size": 32, "channels": 3, "scale": (-1, 1)}}    # no paper


@pytest.mark.parametrize("name", PAPER)
def test_every_value_of_PAPER(name):
    assert PAPER[name] == PUBLISHED[name]
    a, tuned = args(name, "--paper"), args(name)
    assert {k: getattr(a, k) for k in PAPER[name]} == PAPER[name] and a.settings == "paper"
    assert {k: getattr(tuned, k) for k in PAPER[name]} == PAPER[name] | TUNED[name]
    assert all(PAPER[name][k] != v for k, v in TUNED[name].items()), "an entry of TUNED is PAPER's own"


def test_a_rate_of_PAPERs_length_ends_at_its_least():
    assert 0.1 / 1.00004 ** 287828 > 1e-6 > 0.1 / 1.00004 ** 287829


def test_a_flag_wins_over_both_tables():
    a = args("mlp", "--paper", "--average", "0.5", "--drop-samples", "--lr", "0.3")
    assert (a.average, a.drop_samples, a.lr, a.z) == (0.5, True, 0.3, (0, 1))


@pytest.mark.parametrize("dataset, name", [("mnist", "mlp"), ("mnist --quick", "dcgan28"), ("kmnist", "mlp"),
                                           ("shapes", "tags"), ("cifar100", "dcgan32"), ("x.npz", "dcgan32")])
def test_a_data_set_chooses_its_network(dataset, name):
    assert cgan.parse_args(["--dataset", *dataset.split()]).net == name
    assert cgan.parse_args(["--dataset", *dataset.split(), "--net", "dcgan28"]).net == "dcgan28"


@pytest.mark.parametrize("name", ["dcgan28", "dcgan32"])
def test_an_order_of_updates_that_a_network_lacks_is_refused(name):
    for flag in ("--alternate", "--drop-samples"):
        with pytest.raises(cgan.UserError, match=f"{flag} found with --net {name}: it is for"):
            args(name, flag)


# ----------------------------------------------------------------------------------------------- networks


def test_parameter_counts_of_both_papers():
    count = lambda net: sum(p.numel() for p in net.parameters())
    full = lambda i, o: i * o + o
    G, D = nets("mlp", "--width", "1")
    assert count(G) == full(100, 200) + full(10, 1000) + full(1200, 1200) + full(1200, 784)
    assert count(D) == full(784, 240 * 5) + full(10, 50 * 5) + full(290, 240 * 4) + full(240, 1)
    G, D = nets("tags", "--width", "1", K=4096)
    assert count(G) == full(100, 500) + full(4096, 2000) + full(2500, 200)
    assert count(D) == full(200, 500) + full(4096, 1200) + full(1700, 3000) + full(1000, 1)
    G, D = nets("dcgan28", "--width", "1")    # no biases, BatchNorm without parameters, labels at every layer
    assert count(G) == 110 * 1024 + 1034 * 6272 + 138 * 64 * 25 + 74 * 25
    assert count(D) == 11 * 64 * 25 + 74 * 128 * 25 + 6282 * 1024 + 1034
    G, D = nets("dcgan32", "--width", "1", K=100)
    assert count(G) == 200 * 4096 + 356 * 128 * 25 + 228 * 64 * 25 + 164 * 3 * 25
    assert count(D) == 103 * 64 * 25 + 164 * 128 * 25 + 228 * 256 * 25 + 4196


@pytest.mark.parametrize("name", PAPER)
def test_shapes_and_ranges(name):
    G, D = nets(name, d=12)
    x, y = batch(name, d=12)
    with torch.no_grad():
        x_fake = G(cgan.sample_z(16, args(name)), y)
        assert x_fake.shape == x.shape and D(x, y).shape == D(x_fake, y).shape == (16,)
    low, high = PAPER[name]["scale"]
    assert name == "tags" or low <= x_fake.min() and x_fake.max() <= high


def test_labels_become_constant_maps_beside_the_layers_own():
    h, y = torch.randn(2, 3, 4, 5), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    got = beside(h, y)
    assert got.shape == (2, 5, 4, 5) and torch.equal(got[:, :3], h)
    assert (got[0, 3] == 0).all() and (got[0, 4] == 1).all() and (got[1, 3] == 1).all()
    assert torch.equal(beside(h[:, :, 0, 0], y), torch.cat([h[:, :, 0, 0], y], 1))


@pytest.mark.parametrize("name", ["dcgan28", "dcgan32"])
def test_every_layer_sees_the_label(name):
    """Where every other layer's label weights are 0, the label still changes what the network gives."""
    for net, u in zip(nets(name), (cgan.sample_z(16, args(name)), batch(name)[0])):
        net.eval()
        weights = [next(layer.parameters()) for layer in net]
        upward = [isinstance(m, torch.nn.ConvTranspose2d) for layer in net for m in layer.modules()
                  if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
        for k in range(len(weights)):
            torch.manual_seed(1)
            old = [w.detach().clone() for w in weights]
            for i, w in enumerate(weights):
                labels = w.data[-10:] if upward[i] else w.data[:, -10:]
                labels.mul_(10.0 if i == k else 0.0)
            y = one_hot(torch.arange(16) % 10, 10)
            with torch.no_grad():
                changed = (net(u, y) - net(u, y.roll(1, 0))).abs().max()
            for w, o in zip(weights, old):
                w.data.copy_(o)
            assert changed > 1e-6, (name, k)


@pytest.mark.parametrize("name, words, low, high, var", [
    ("mlp", ("--paper",), 0, 1, 1 / 12), ("mlp", (), -math.sqrt(3), math.sqrt(3), 1),
    ("dcgan28", ("--paper",), -1, 1, 1 / 3), ("tags", ("--paper",), -math.inf, math.inf, 1)])
def test_noise_is_as_the_papers_have_it(name, words, low, high, var):
    torch.manual_seed(0)
    z = cgan.sample_z(5000, args(name, *words))
    assert z.shape == (5000, 100) and z.var().item() == pytest.approx(var, rel=0.02)
    assert low <= z.min() < (max(low, -3) + 0.01) and min(high, 3) - 0.01 < z.max() <= high


def test_the_digits_G_starts_at_the_training_mean():
    mean = torch.linspace(0, 1, 784).view(1, 28, 28)
    G, _ = networks(args("mlp"), 10, mean)
    expected = mean.flatten().clamp(1e-7, 1 - 1e-7)
    torch.testing.assert_close(G.both[4].bias.sigmoid(), expected, atol=1e-6, rtol=1e-4)


def test_initial_weights():
    """GAN's mnist.yaml: Unif(-.05, .05), Unif(-.005, .005); He et al.: N(0, 2 / inputs); DCGAN: N(0, .02)."""
    G, D = nets("mlp", "--paper", "--width", "1")
    assert 0.0499 < G.both[1].weight.abs().max() <= 0.05 and 0.00499 < D.y.linear.weight.abs().max() <= 0.005
    assert (G.u[0].bias == 0).all() and (D.y.linear.bias == 0).all()
    G, _ = nets("mlp", "--width", "1")
    assert G.both[1].weight.std().item() == pytest.approx(math.sqrt(2 / 1200), rel=0.01)
    for net in nets("dcgan28", "--width", "1"):
        assert all(p.std().item() == pytest.approx(0.02, rel=0.1) for p in net.parameters())


def test_narrow_perceptrons_have_sums_as_spread_as_the_full_ones():
    """Before G's sigmoid and in D's logit; layers that read inputs keep their range."""
    x, y = batch("mlp", n=500)
    spread, z = {}, torch.rand(500, 100)
    for width in ("1", ".25"):
        G, D = nets("mlp", "--paper", "--width", width)
        assert 0.049 < G.u[0].weight.abs().max() <= 0.05
        assert 0.0049 < D.u[1].linear.weight.abs().max() <= 0.005
        G.eval(), D.eval()
        with torch.no_grad():
            a = G.both[:5](torch.cat([G.u(z), G.y(y)], 1)) - G.both[4].bias
            spread[width] = a.std(), D(x, y).std()
    assert all(0.7 < narrow / full < 1.4 for full, narrow in zip(*spread.values())), spread


# ---------------------------------------------------------------------------------------- who moves, where to


def moved(before, net):
    """Which weights of `net` differ from `before`."""
    return [not torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True) if p.ndim > 1]


def state(net):
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("name", PAPER)
def test_a_step_moves_both_networks(name):
    G, D, G_bar, _, _, step = build(args(name), d=12)
    before = state(G), state(D)
    scalars = step(*batch(name, d=12))
    assert all(moved(before[0], G)) and all(moved(before[1], D))
    assert set(scalars) == {"V", "D(x)", "D(G(z))"} and all(v.ndim == 0 for v in scalars.values())
    assert not any(p.requires_grad for p in G_bar.parameters())


def test_labels_and_label_vectors_are_one_condition():
    x, y = batch("dcgan28")
    after = []
    for condition in (y, y.argmax(1)):
        G, *_, step = build(args("dcgan28"))
        torch.manual_seed(1)
        step(x, condition)
        after.append(state(G))
    assert all(torch.equal(p, q) for p, q in zip(*after))


@pytest.mark.parametrize("name, flags, new", [("mlp", (), False), ("mlp", ("--alternate",), True),
                                              ("dcgan28", (), True)])
def test_which_D_teaches_G(name, flags, new):
    """G's step goes through the D from before D's own step (GAN's code), or through the new one."""
    after, pair = [], batch(name)
    for lr in (0.0, 0.5):
        G, _, _, opt_D, _, step = build(args(name, *flags))
        opt_D.param_groups[0]["lr"].fill_(lr)
        torch.manual_seed(1)
        step(*pair)
        after.append(state(G))
    assert new is not all(torch.equal(p, q) for p, q in zip(*after))


@pytest.mark.parametrize("name, lr", [("mlp", 0.1), ("dcgan28", 30.0)])
def test_one_step_of_G_raises_log_D(name, lr):
    G, D = nets(name)
    G.eval(), D.eval()
    y, z = batch(name, n=64)[1], cgan.sample_z(64, args(name))
    if name == "mlp":
        cgan.initialise(D, 0.2)
    before = log_D(D(G(z, y), y))
    still = [p.detach().clone() for p in D.parameters()]
    descend(-before, torch.optim.SGD(G.parameters(), lr=lr))
    assert log_D(D(G(z, y), y)) > before
    assert all(torch.equal(p, q) for p, q in zip(D.parameters(), still))


def test_weight_decay_and_rates_of_dcgan():
    for opt in build(args("dcgan28"))[3:5]:
        group = opt.param_groups[0]
        assert group["weight_decay"] == 2.5e-5 and group["betas"] == (0.5, 0.999)
        assert group["lr"].item() == pytest.approx(2e-4)


def test_it_learns_which_mode_a_label_asks_for():
    """Eq. 2 on two Gaussians: with label k, samples lie at the k-th mean."""
    torch.manual_seed(0)
    a, means = args("dcgan28", "--lr", "2e-3"), torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    layer = torch.nn.Linear
    G = cgan.Joint(layer(100, 16), layer(2, 16), torch.nn.Sequential(torch.nn.Tanh(), layer(32, 2)))
    D = cgan.Joint(layer(2, 32), layer(2, 32), torch.nn.Sequential(
        torch.nn.ReLU(), layer(64, 32), torch.nn.ReLU(), layer(32, 1), torch.nn.Flatten(0)))

    def minibatch():
        k = torch.randint(2, (128,))
        return means[k] + 0.3 * torch.randn(128, 2), k

    *_, step = build(a, 2, pair=(G, D))
    for _ in range(600):
        step(*minibatch())
    with torch.no_grad():
        for k in range(2):
            x = G(cgan.sample_z(500, a), one_hot(torch.full((500,), k), 2))
            assert (x.mean(0) - means[k]).norm() < 0.7, x.mean(0)


# --------------------------------------------------------------------------------- labels, pictures, numbers


class Echo(torch.nn.Module):
    """A G whose pictures tell what it was given: z's first number and the label vector's place."""

    def forward(self, z, y):
        x = torch.zeros(len(z), 1, 28, 28)
        x[:, 0, 0, 0], x[:, 0, 0, 1] = z[:, 0], y @ torch.arange(1.0, y.shape[1] + 1)
        return x


def test_rows_have_one_label_and_shared_columns_one_z():
    a = args("dcgan28")
    x = cgan.rows(Echo(), a, 10, 7, shared=True)[:, 0, 0].unflatten(0, (10, 7))
    assert (x[:, :, 1] == torch.arange(1.0, 11)[:, None]).all()
    assert (x[:, :, 0] == x[:1, :, 0]).all() and len(x[0, :, 0].unique()) == 7
    x = cgan.rows(Echo(), a, 10, 7)[:, 0, 0].unflatten(0, (10, 7))
    assert len(x[:, :, 0].unique()) == 70
    x = cgan.rows(Echo(), a, 100, 2)[:, 0, 0].unflatten(0, (10, 2))
    assert x[0, 0, 1] == 1 and x[-1, 0, 1] == 100 and len(x[:, 0, 1].unique()) == 10


def test_draw_maps_to_the_unit_interval():
    z = torch.zeros(3, 100)
    x = cgan.draw(Echo(), args("dcgan32"), one_hot(torch.tensor([0, 4, 9]), 10), z)
    assert x[:, 0, 0, 1].tolist() == [1.0, 3.0, 5.5] and (x[:, 0, 0, 0] == 0.5).all()
    assert (cgan.draw(Echo(), args("mlp"), torch.zeros(3, 10), z) == 0).all()


def test_dropout_stays_on_in_samples_unless_the_paper_draws():
    a, paper = args("mlp"), args("mlp", "--paper")
    y, z = one_hot(torch.arange(8), 10), cgan.sample_z(8, a)
    G, _ = nets("mlp")
    assert not torch.equal(cgan.draw(G, a, y, z), cgan.draw(G, a, y, z)) and G.training
    assert torch.equal(cgan.draw(G, paper, y, z), cgan.draw(G, paper, y, z))
    assert all(m.training for m in G.modules())


@pytest.mark.parametrize("name, layers", [("mlp", [2, 2]), ("tags", [1, 2]), ("dcgan28", [0, 0])])
def test_dropout_is_one_half_in_both_perceptrons(name, layers):
    found = [[m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)] for net in nets(name)]
    assert found == [[0.5] * n for n in layers]


@pytest.mark.parametrize("words", [(), ("--paper",)])
def test_samples_leave_batchnorm_alone(words):
    a = args("dcgan28", *words)
    G, _ = nets("dcgan28")
    before = [b.clone() for b in G.buffers()]
    cgan.draw(G, a, one_hot(torch.arange(8), 10))
    assert all(torch.equal(b, c) for b, c in zip(G.buffers(), before))
    assert all(m.training for m in G.modules())
    assert all(m.track_running_stats for m in G.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_an_ema_draws_with_batchnorm_statistics_of_its_own():
    """They are close to the mean and variance over many samples of these weights, not to those of others."""
    a, (G, _) = args("dcgan28", "--batch-size", "32"), nets("dcgan28")
    first, labels = G[0][0], torch.arange(100) % 10
    with torch.no_grad():
        first.weight.mul_(7)[:, -10:] = 1                   # the buffers, 0 and 1, belong to other weights
    assert cgan.calibrated(G, a, labels, 10) is G
    y = one_hot(labels.repeat(100), 10)
    with torch.no_grad():
        h = first(beside(cgan.sample_z(len(y), a), y))
    norm = G[0][1]
    torch.testing.assert_close(norm.running_var, h.var(0), rtol=0.15, atol=0)
    torch.testing.assert_close(norm.running_mean, h.mean(0), rtol=0.15, atol=0)
    assert h.var(0).max() < 0.85 and h.mean(0).min() > 0.85


@pytest.mark.parametrize("name, words", [("dcgan28", ("--average", "0")), ("dcgan28", ("--paper",)),
                                         ("mlp", ())])
def test_what_is_no_ema_or_has_no_statistics_stays_as_it_is(name, words):
    a, (G, _) = args(name, *words), nets(name)
    before = [b.clone() for b in G.buffers()]
    cgan.calibrated(G, a, torch.arange(10), 10)
    assert all(torch.equal(b, c) for b, c in zip(G.buffers(), before)) and G.training


def test_the_paper_draws_with_the_statistics_of_each_batch():
    """Authors' code: batches of 128 through the batchnorm() of training; none has a single picture."""
    a, (G, _) = args("dcgan28", "--paper", "--batch-size", "8"), nets("dcgan28")
    y, z = one_hot(torch.arange(17) % 10, 10), cgan.sample_z(17, a)
    with torch.no_grad():
        expected = torch.cat([G(*part) for part in zip(z.split(6), y.split(6))])    # in training mode
    torch.testing.assert_close(cgan.draw(G, a, y, z), expected)
    assert not torch.allclose(cgan.draw(G, args("dcgan28"), y, z), expected, atol=1e-3)
    for n, size in ((10, 9), (100, 11), (3, 2)):            # even parts would leave one alone
        a.batch_size = size
        assert len(cgan.draw(G, a, one_hot(torch.arange(n) % 10, 10))) == n


def test_one_label_is_drawn_beside_all_others(monkeypatch):
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, z, y):
            seen.append(y.argmax(1))
            return torch.zeros(len(z), 1, 28, 28)

    monkeypatch.setattr(cgan, "networks", lambda *_: (Recorder(), None))
    about = {"names": [*"0123456789"], "shape": [1, 28, 28]}
    draws = cgan.drawer(args("dcgan28", "--paper"), {"about": about})
    z, y = draws.draw(500)
    assert len(draws.pictures((z, torch.full_like(y, 3)))) == 500
    assert all((labels == 3).float().mean() < 0.25 for labels in seen)


def test_nn_error_against_numpy_and_the_real_digits_own():
    mnist = data.load("mnist", ROOT / "data")
    x, test = (t.float() / 255 for t in (mnist.images[:5000], mnist.test_images[:300]))
    y, labels = mnist.labels[:5000], mnist.test_labels[:300]
    found = nn_error(zip(x.split(700), y.split(700)), test, labels)
    a, b = x.flatten(1).double().numpy(), test.flatten(1).double().numpy()
    d2 = (b**2).sum(1)[:, None] - 2 * b @ a.T + (a**2).sum(1)
    assert found == pytest.approx(100 * (y.numpy()[d2.argmin(1)] != labels.numpy()).mean(), abs=1e-4)
    assert found < 10
    assert nn_error([(test, labels)], test, labels) == 0
    with pytest.raises(cgan.UserError, match="NaN or infinite"):
        nn_error([(x[:9] / 0, y[:9])], test, labels)
    far = zip((x + 1e4).split(700), y.split(700))
    assert nn_error(far, test + 1e4, labels) == pytest.approx(found, abs=1)


def test_labels_from_binary_attributes():
    a = torch.tensor([[0.0, 1.0, 0.3], [1.0, 1.0, 0.9], [1.0, 0.0, 0.1]])
    x = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    extra = {"attributes": a, "attribute_names": ["smile", "hat", "skin"]}
    pictures = data.Data("heads", x, extra=extra)
    assert cgan.attribute_labels(pictures, "hat,smile").tolist() == [1, 3, 2]
    assert cgan.attribute_labels(pictures, "hat,smile", "test_") is None
    with pytest.raises(cgan.UserError, match="out of smile, hat, skin: beard found"):
        cgan.attribute_labels(pictures, "beard")
    with pytest.raises(cgan.UserError, match="--attributes, each once, out of smile, hat, skin: hat found"):
        cgan.attribute_labels(pictures, "hat,hat")
    with pytest.raises(cgan.UserError, match="heads: hat has values above 1"):
        cgan.attribute_labels(data.Data("heads", x, extra=extra | {"attributes": 2 * a}), "hat")
    with pytest.raises(cgan.UserError, match="out of none: nothing found"):
        cgan.attribute_labels(data.Data("bare", x), "")


# ------------------------------------------------------------------------------------------------------- tags


def test_word_vectors_follow_from_co_occurrence():
    tags = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).float()
    v = cgan.word_vectors(tags)
    torch.testing.assert_close(v.norm(dim=1), torch.full((4,), 2.0))
    cosine = (v @ v.T / 4).abs()
    assert cosine[0, 1] == pytest.approx(1, abs=1e-5)    # always together
    assert cosine[0, 2:].max() < 1e-5 and cosine[2, 3] < 1e-5    # never, or by chance
    assert cgan.word_vectors(tags, d=2).shape == (4, 2)


def test_word_vectors_against_numpy():
    tags = (np.random.default_rng(0).random((50, 6)) < 0.4).astype(np.float64)
    p = np.array([[(tags[:, i] * tags[:, j]).mean() for j in range(6)] for i in range(6)])
    ppmi = np.array([[max(0, math.log(p[i, j] / (p[i, i] * p[j, j]))) if p[i, j] else 0.0
                      for j in range(6)] for i in range(6)])
    U, S, _ = np.linalg.svd(ppmi)
    v = U * np.sqrt(S)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    got = cgan.word_vectors(torch.tensor(tags)).numpy()
    np.testing.assert_allclose(got @ got.T / 6, v @ v.T, atol=1e-5)


def test_the_ten_words_most_often_among_the_nearest():
    """A G that draws word f, or its neighbour where z > 1: these two lead."""
    words = torch.eye(24)

    class Two(torch.nn.Module):
        def forward(self, z, f):
            k = f[:, 0].long()
            k = torch.where(z[:, 0] > 1.0, k + 1, k)
            return 3 * words[k] + 1e-3 * torch.arange(24.0) / 24

    torch.manual_seed(0)
    found = cgan.tag(Two(), args("tags"), torch.tensor([[3.0], [10.0]]), words)
    assert found.shape == (2, 10)
    assert found[:, :2].tolist() == [[3, 4], [10, 11]]


def test_neighbours_vote_for_their_tags():
    tags = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 1]]).float()
    f = torch.tensor([[0.0], [1.0], [9.0]])
    found = cgan.neighbours_tags(torch.tensor([[0.4], [8.0]]), f, tags, k=2, keep=1)
    assert found[0].tolist() == [0] and cgan.neighbours_tags(f[2:], f, tags, k=1, keep=1)[0].tolist() == [2]


def test_precision_and_recall():
    tags = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]]).float()
    precision, recall = cgan.precision_recall(torch.tensor([[0, 2], [3, 1]]), tags)
    assert precision == pytest.approx(0.5) and recall == pytest.approx(0.75)


def test_tags_of_values_of_attributes_and_of_arrays():
    x = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    extra = {"attributes": torch.tensor([[0, 1], [1, 2]]), "attribute_names": ["colour 1", "colour 2"],
             "attribute_values": [["red", "blue"], ["blue", "red", "none"]]}
    tags, words = cgan.tags_of(data.Data("a", x, extra=extra))
    assert words == ["red", "blue"] and tags.tolist() == [[1, 0], [0, 1]]
    assert cgan.tags_of(data.Data("a", x, extra=extra), "test_")[0] is None
    own = {"tags": torch.tensor([[0, 3], [1, 0]]), "words": ["a", "b"]}                 # counts
    tags, words = cgan.tags_of(data.Data("b", x, extra=own))
    assert words == ["a", "b"] and tags.tolist() == [[0, 1], [1, 0]]
    bare = {"tags": torch.zeros(9, 1), "words": ["a"]}
    with pytest.raises(cgan.UserError, match="has 0 training and 0 test pictures with a tag"):
        cgan.tagged(data.Data("d", x[:1].expand(9, -1, -1, -1), extra=bare))
    with pytest.raises(cgan.UserError, match="has no tags"):
        cgan.tags_of(data.Data("c", x))


def own_features(path, **more):
    """An .npz of 60 tagged pictures with features (60, 7) and vectors of 24 words (24, 5), and `more`."""
    rng = np.random.default_rng(0)
    tags = (rng.random((60, 24)) < 0.3).astype(np.uint8)
    tags[:, 3] = 0                                          # a word without a picture
    tags[5] = 0                                             # a picture without a tag
    arrays = {"images": rng.integers(0, 256, (60, 3, 16, 16), dtype=np.uint8), "tags": tags,
              "words": [f"w{i}" for i in range(24)], "features": rng.normal(size=(60, 7)),
              "vectors_of_words": rng.normal(size=(24, 5))}
    np.savez(path, **arrays | more)
    return arrays


@pytest.mark.parametrize("paper", [True, False])
def test_features_and_word_vectors_of_ones_own(tmp_path, paper):
    arrays = own_features(tmp_path / "own.npz")
    a = args("tags", *["--paper"] * paper)
    train, test, words, vectors = cgan.described(a, *cgan.tagged(data.load(tmp_path / "own.npz")))
    kept = np.arange(24) != 3
    assert words == [w for w, k in zip(arrays["words"], kept) if k] and len(train[2]) + len(test[2]) == 59
    torch.testing.assert_close(vectors, torch.tensor(arrays["vectors_of_words"][kept]).float())
    f = torch.cat([train[2], test[2]])
    if not paper:
        assert train[2].mean(0).abs().max() < 0.1 and f.abs().max() <= 3
        return
    for x, tags_x, f_x in zip(*(torch.cat([p, q]) for p, q in zip(train, test))):   # still of one picture
        row, = np.nonzero((arrays["images"] == x.numpy()).all((1, 2, 3)))[0]
        np.testing.assert_allclose(f_x, arrays["features"][row], rtol=1e-6)
        np.testing.assert_array_equal(tags_x, arrays["tags"][row][kept])


def test_test_features_are_used_and_checked(tmp_path):
    test = {"test_images": np.zeros((9, 3, 16, 16), np.uint8), "test_tags": np.ones((9, 24), np.uint8)}
    own_features(tmp_path / "a.npz", **test, test_features=np.full((9, 7), 2.0))
    train, part, _, _ = cgan.tagged(data.load(tmp_path / "a.npz"))
    assert len(train[0]) == 59 and (part[2] == 2).all() and len(part[0]) == len(part[2]) == 9
    own_features(tmp_path / "b.npz", **test)                # no test features: part of the others tests
    train, part, _, _ = cgan.tagged(data.load(tmp_path / "b.npz"))
    assert len(train[0]) + len(part[0]) == 59 and part[2].shape[1] == 7


@pytest.mark.parametrize("more, message", [
    ({"features": np.zeros((59, 7))}, r"features \(59, 7\) found, finite numbers \(60, d\) expected"),
    ({"features": np.full((60, 7), np.nan)}, r"features \(60, 7\) found, finite numbers"),
    ({"vectors_of_words": np.zeros((23, 5))}, r"vectors_of_words \(23, 5\) found, finite numbers \(24, d\)"),
    ({"test_images": np.zeros((9, 3, 16, 16), np.uint8), "test_tags": np.ones((9, 24), np.uint8),
      "test_features": np.zeros((9, 6))}, r"test_features \(9, 6\) found, finite numbers \(9, 7\)")])
def test_features_that_do_not_fit(tmp_path, more, message):
    own_features(tmp_path / "own.npz", **more)
    with pytest.raises(cgan.UserError, match=message):
        cgan.tagged(data.load(tmp_path / "own.npz"))


# ------------------------------------------------------------------------------------------------------- runs


def test_runs_on_digits_draw_write_numbers_and_resume_to_the_bit(digits, tmp_path):
    shared = ["--data-dir", str(digits.parent / "data"), "--device", "cpu"]
    words = ["--dataset", str(digits), "--out", str(tmp_path), "--batch-size", "16", "--nn-samples", "500",
             "--width", "0.1", "--net", "mlp"]
    cgan.main([*words, *shared, "--name", "whole", "--steps", "4"])
    cgan.main([*words, *shared, "--name", "half", "--steps", "2"])
    cgan.main(["--resume", str(tmp_path / "cgan-digits-half"), "--steps", "4", *shared])
    a, b = (torch.load(tmp_path / f"cgan-digits-{name}" / "checkpoint.pt", weights_only=True)["parts"]
            for name in ("whole", "half"))
    for net in ("G", "D"):
        assert all(torch.equal(a[net][k], b[net][k]) for k in a[net]), net
    folder = tmp_path / "cgan-digits-whole"
    for figure in ("fig2", "noise_and_label", "label_only", "noise_only", "samples"):
        assert np.asarray(Image.open(folder / f"{figure}.png")).std() > 5, figure
    results = json.loads((folder / "results.json").read_text())["results"]
    assert math.isfinite(results["cgan-digits-ll"]["value"]) and "paper" not in results["cgan-digits-ll"]
    assert 0 <= results["dcgan-digits-1nn-base"]["value"] <= 100
    assert set(results) == {"cgan-digits-ll", "dcgan-digits-1nn-base", "agreement", "frechet"}


def test_published_values_stand_beside_the_same_data_network_and_protocol():
    """CGAN Table 1: 132; DCGAN Table 3: 2.98 with 50,000 samples, 1.48 with ten million."""
    def beside_ours(*words):
        return cgan.published(cgan.parse_args(list(words)))

    assert beside_ours() == beside_ours("--paper") == {"cgan-mnist-ll": 132}
    assert beside_ours("--net", "dcgan28") == {"dcgan-mnist-1nn": 2.98}
    assert beside_ours("--net", "dcgan28", "--nn-samples", "10000000") == {"dcgan-mnist-1nn": 1.48}
    for words in (("--net", "dcgan28", "--nn-samples", "1000"), ("--width", "0.5"), ("--dataset", "kmnist"),
                  ("--net", "dcgan28", "--width", "0.5"), ("--dataset", "cifar100"), ("--net", "dcgan32")):
        assert beside_ours(*words) == {}, words


@pytest.mark.parametrize("width, passed", [("1", False), (".25", True)])
def test_check_asks_for_the_papers_width(monkeypatch, width, passed):
    ended = []
    monkeypatch.setattr(cgan, "evaluate", lambda *_: {"dcgan-mnist-1nn": {"value": 20.0}})
    monkeypatch.setattr(cgan, "figures", lambda *_: None)
    a = args("dcgan28", "--average", "0", "--width", width)
    r = SimpleNamespace(args=a, aside=contextlib.nullcontext, results=lambda _, passed: ended.append(passed))
    cgan.report(r, None, 10, (None, None), None, None)
    assert ended == [passed]


def test_published_values_enter_the_results(digits, tmp_path, monkeypatch):
    pictures = data.load(digits)
    monkeypatch.setattr(cgan.data, "load", lambda *_, **__: pictures)
    monkeypatch.setattr(cgan, "published", lambda args: {"cgan-mnist-ll": 132})
    cgan.main(["--out", str(tmp_path), "--data-dir", str(tmp_path / "data"), "--device", "cpu", "--width",
               "0.1", "--batch-size", "16", "--nn-samples", "500", "--steps", "2"])
    report = json.loads((tmp_path / "cgan-mnist" / "results.json").read_text())
    assert {k: v["paper"] for k, v in report["results"].items() if "paper" in v} == {"cgan-mnist-ll": 132}
    assert report["settings"] == "tuned"


@pytest.mark.parametrize("name", PAPER)
def test_a_run_with_the_papers_settings(name, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(cgan.metrics, "classifier", untrained)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (80, 3, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", images=images, labels=np.arange(80) % 3,
             tags=(rng.random((80, 24)) < 0.3).astype(np.uint8), words=[f"w{i}" for i in range(24)])
    dataset = digits if PAPER[name]["size"] == 28 else tmp_path / "colour.npz"
    cgan.main(["--paper", "--net", name, "--dataset", str(dataset), "--out", str(tmp_path), "--data-dir",
               str(tmp_path / "data"), "--device", "cpu", "--width", "0.05", "--steps", "4", "--batch-size",
               "16", "--nn-samples", "100"])
    folder = tmp_path / f"cgan-{dataset.stem}"
    report = json.loads((folder / "results.json").read_text())
    assert report["settings"] == "paper" and report["all settings"]["average"] == 0 and report["results"]
    if name != "tags":
        cgan.main(["--resume", str(folder), "--sample", "1"])   # BatchNorm needs more than one picture
        assert len(list((folder / "samples").glob("*.png"))) == 1


@pytest.mark.parametrize("net", ["mlp", "dcgan28"])
def test_what_draws_is_the_average(digits, tmp_path, monkeypatch, net):
    drawn, draw = [], cgan.draw
    monkeypatch.setattr(cgan, "draw", lambda G, *rest: drawn.append(G) or draw(G, *rest))
    monkeypatch.setattr(cgan, "evaluate", lambda args, best, *_: drawn.append(best) or {})
    cgan.main(["--dataset", str(digits), "--out", str(tmp_path), "--batch-size", "16", "--width", "0.1",
               "--net", net, "--steps", "3", "--data-dir", str(tmp_path / "data"), "--device", "cpu"])
    parts = torch.load(tmp_path / "cgan-digits" / "checkpoint.pt", weights_only=True)["parts"]
    name, p = next(drawn[0].named_parameters())
    assert len(drawn) > 4 and not torch.equal(parts["G"][name], p)
    assert all(torch.equal(dict(G.named_parameters())[name], parts["G_bar"][name]) for G in drawn)


def test_a_convolutional_run_on_attributes(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, (60, 3)).astype(np.float32)
    images = rng.integers(0, 256, (60, 3, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "heads.npz", images=images, attributes=a, attribute_names=["hat", "smile", "beard"])
    result = script("cgan.py", "--dataset", tmp_path / "heads.npz", "--attributes", "hat,smile", "--out",
                    tmp_path, "--data-dir", tmp_path / "data", "--device", "cpu", "--batch-size", 16,
                    "--steps", 3, "--width", 0.1)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "cgan-heads"
    for figure in ("fig2", "noise_and_label", "label_only"):    # without labels all is grey at first
        assert np.asarray(Image.open(folder / f"{figure}.png")).std() > 5, figure
    assert set(json.loads((folder / "results.json").read_text())["results"]) == {"agreement", "frechet"}


def test_one_label_alone_is_no_condition(tmp_path):
    np.savez(tmp_path / "ones.npz", images=np.zeros((40, 1, 28, 28), np.uint8), labels=np.zeros(40, np.int64))
    with pytest.raises(cgan.UserError, match="one label for all"):
        cgan.main(["--dataset", str(tmp_path / "ones.npz"), "--out", str(tmp_path), "--device", "cpu"])


def test_a_tagging_run(tmp_path, monkeypatch):
    monkeypatch.setattr(cgan.metrics, "classifier", untrained)
    rng = np.random.default_rng(0)
    tags = (rng.random((80, 24)) < 0.3).astype(np.uint8)
    images = rng.integers(0, 256, (80, 3, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "tagged.npz", images=images, tags=tags, words=[f"wört{i}" for i in range(24)])
    monkeypatch.setattr(io, "text_encoding", lambda encoding, _=2: encoding or "ascii")     # as in a C locale
    words = ["--net", "tags", "--dataset", str(tmp_path / "tagged.npz"), "--out", str(tmp_path), "--data-dir",
             str(tmp_path / "data"), "--device", "cpu", "--width", "0.1"]
    cgan.main([*words, "--steps", "4"])
    with pytest.raises(cgan.UserError, match="table2.md"):
        cgan.main(["--resume", str(tmp_path / "cgan-tagged"), "--sample", "3", *words])
    folder = tmp_path / "cgan-tagged"
    results = json.loads((folder / "results.json").read_text())["results"]
    for name in ("cgan-flickr", "cgan-flickr-neighbours", "cgan-flickr-frequent"):
        assert 0 <= results[name]["value"] <= 100 and 0 <= results[name]["recall"] <= 100
    assert (folder / "table2.md").read_text("utf-8").count("wört1") > 1

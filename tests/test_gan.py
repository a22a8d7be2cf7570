"""gan.py: equations and theorems against closed forms, networks against the authors' settings, who moves,
figures."""

import contextlib
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


# ----------------------------------------------------------------------------------------------- settings

# The authors' code, github.com/goodfeli/adversarial.  In all files: AdversaryCost2 with G and D in one step
# of SGD, "irange: .05" in G, "nvis: 100", no average; noise is "gaussian" unless said; "gcn: 55." for CIFAR.
SHARED = {"k": 1, "alternate": False, "loss": "non-saturating", "average": 0.0, "dz": 100}
PUBLISHED = {
    "mnist": {"net": "mnist", "size": 28, "channels": 1,            # mnist.yaml
              "lr_D": 0.1, "lr_G": 0.1,                             # learning_rate: .1
              "batch_size": 100, "latent": "uniform",               # noise: 'uniform'
              "valid": 10000,                                       # start: 50000, stop: 60000
              "norm": None, "gcn": None, "irange": 0.05,
              "steps": 175000},                                     # not published
    "tfd": {"net": "tfd", "size": 48, "channels": 1,                # tfd_pretrain/pretrain.yaml
            "lr_D": 0.05, "lr_G": 0.05,                             # learning_rate: .05
            "batch_size": 100, "latent": "normal",
            "valid": 2000,                                          # not published: TFD has folds of its own
            "norm": 1.9365, "gcn": None,                            # max_col_norm: 1.9365
            "irange": 0.05,                                         # of no effect: sparse_init: 100
            "steps": 50 * 980},                                     # max_epochs: 50, of 98,058 pictures
    "cifar-fc": {"net": "cifar-fc", "size": 32, "channels": 3,      # cifar10_fully_connected.yaml
                 "lr_D": 0.025, "lr_G": 0.025,                      # learning_rate: .025
                 "batch_size": 100, "latent": "normal",
                 "valid": 10000,                                    # start: 40000, stop: 50000
                 "norm": None, "gcn": 55.0,
                 "irange": 0.5,                                     # layer y: irange: .5
                 "steps": 50000},                                   # not published
    "cifar-conv": {"net": "cifar-conv", "size": 32, "channels": 3,  # cifar10_convolutional.yaml
                   "lr_D": 0.004, "lr_G": 0.004,                    # learning_rate: .004
                   "batch_size": 128, "latent": "normal",           # batch_size: 128
                   "valid": 10000, "norm": None, "gcn": 55.0, "irange": 0.05,
                   "steps": 50000},                                 # not published
    "toy": {"net": "toy", "dz": 1, "alternate": True,               # Alg. 1; all else is not published
            "lr_D": 0.2, "lr_G": 0.01, "batch_size": 512, "latent": "normal", "valid": 10000, "norm": None,
            "gcn": None, "irange": 0.05, "steps": 5000},
}
PUBLISHED["tfd-stage2"] = PUBLISHED["tfd"] | {"steps": 22 * 980}    # train.yaml, max_epochs: 22


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings_are_the_published_ones(name):
    assert PAPER[name] == SHARED | PUBLISHED[name]
    assert set(gan.TUNED.get(name, {})) <= set(PAPER[name])


@pytest.mark.parametrize("words, row", [
    ((), "mnist"), (("--dataset", "toy"), "toy"), (("--dataset", "faces"), "tfd"),
    (("--dataset", "faces", "--stage2", "RUN"), "tfd-stage2"), (("--dataset", "cifar10"), "cifar-fc"),
    (("--dataset", "cifar10", "--net", "cifar-conv"), "cifar-conv"), (("--dataset", "lfw"), "mnist")])
def test_a_data_set_takes_its_row_of_the_papers_settings(words, row):
    a, b = args(*words, "--paper"), args(*words)
    assert {k: getattr(a, k) for k in PAPER[row]} == PAPER[row]
    assert {k: getattr(b, k) for k in PAPER[row]} == PAPER[row] | gan.TUNED.get(row, {})


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


def test_the_last_layer_of_the_fully_connected_G_for_CIFAR_begins_with_the_published_range():
    for words, irange in ((("--paper",), 0.5), ((), 0.05)):
        G, _ = built("cifar-fc", "--width", ".04", *words)
        top = irange / 0.04 ** 0.5
        assert 0.99 * top < G[4].weight.abs().max() <= top * 1.000001
        assert G[2].weight.abs().max() <= 0.05 / 0.04 ** 0.5 and not G[4].bias.any()


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


@pytest.mark.parametrize("flags", [(), ("--alternate",)])
def test_a_step_moves_D_k_times_and_G_once(monkeypatch, flags):
    torch.manual_seed(0)
    G, D, _, opt_D, opt_G, step = gan.build(args("--k", "3", *flags), torch.full((1, 28, 28), 0.1))
    opts, before = [], [p.detach().clone() for net in (G, D) for p in net.parameters() if p.ndim > 1]
    monkeypatch.setattr(gan, "descend", lambda *pairs: opts.extend(pairs[1::2]) or descend(*pairs))
    step(torch.rand(3 * 16, 1, 28, 28))
    after = [p for net in (G, D) for p in net.parameters() if p.ndim > 1]
    assert all(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert [sum(o is opt for o in opts) for opt in (opt_D, opt_G)] == [3, 1]


@pytest.mark.parametrize("flags, new", [((), False), (("--alternate",), True)])
def test_which_D_teaches_G(flags, new):
    """G's step goes through the D from before D's own step (authors' code); with --alternate the new one."""
    after = []
    for lr in (0.0, 0.5):
        torch.manual_seed(0)
        G, D, _, opt_D, _, step = gan.build(args(*flags), torch.full((1, 28, 28), 0.1))
        gan.uniform(D, 0.05)
        opt_D.param_groups[0]["lr"].fill_(lr)
        torch.manual_seed(1)
        step(torch.rand(16, 1, 28, 28))
        after.append([p.detach().clone() for p in G.parameters()])
    assert new is not all(torch.equal(p, q) for p, q in zip(*after))


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
    a = args("--lr-D", ".1", "--lr-G", ".2")
    opts = [SGD([torch.nn.Parameter(torch.zeros(1))], lr, 0.5) for lr in (0.1, 0.2)]
    for step, per_epoch, momentum in ((1, 1, 0.5), (11, 1, 0.5 + 10 * 0.2 / 249), (175001, 500, 0.7)):
        gan.anneal(a, *opts, step, per_epoch)
        for opt, lr in zip(opts, (0.1, 0.2)):
            group, = opt.param_groups
            assert group["lr"].item() == pytest.approx(lr * math.exp((1 - step) * math.log1p(4e-6)), rel=1e-6)
            assert group["momentum"].item() == pytest.approx(momentum, rel=1e-6)
    gan.anneal(a, *opts, 10**7, 500)
    assert opts[0].param_groups[0]["lr"].item() == pytest.approx(1e-6)


def test_bound_caps_each_units_weights():
    net = torch.nn.Linear(50, 20)
    torch.nn.init.normal_(net.weight)
    net.weight.data[0] *= 1e-3
    small = net.weight[0].detach().clone()
    gan.bound(net, 1.9365)
    assert net.weight.norm(dim=1).max() <= 1.9366 and torch.equal(net.weight[0], small)


def test_fig2_ends_each_row_with_the_nearest_training_image():
    train = torch.randint(256, (1200, 1, 8, 8), dtype=torch.uint8)
    x = torch.rand(18, 1, 8, 8)
    x[8], x[17] = train[7] / 255 + 0.01, train[1031] / 255 - 0.01
    shown = gan.fig2(x, train, args(), 10).view(2, 10, 1, 8, 8)
    assert torch.equal(shown[0, 9], train[7] / 255) and torch.equal(shown[1, 9], train[1031] / 255)
    assert torch.equal(shown[:, :9].flatten(0, 1), x)


def test_fig2_holds_a_part_of_the_data_as_floats_at_a_time(monkeypatch):
    sizes, seen = [], gan.seen
    monkeypatch.setattr(gan, "seen", lambda x, a: sizes.append(len(x)) or seen(x, a))
    gan.fig2(torch.rand(9, 1, 8, 8), torch.zeros(1200, 1, 8, 8, dtype=torch.uint8), args(), 10)
    assert max(sizes) <= 500


# ------------------------------------------------------------------------------------------------------- runs


def small(digits, name, folder, *words):
    """A run of the networks of `name`, all but unitless, on small digits; its results."""
    gan.main(["--dataset", str(digits), "--net", name, "--width", ".01", "--steps", "2", "--batch-size", "8",
              "--out", str(folder), "--data-dir", str(digits.parent / "data"), "--device", "cpu", *words])
    return json.loads((folder / "gan-digits" / "results.json").read_text())


@pytest.fixture
def no_classifier(monkeypatch):
    monkeypatch.setattr(gan.metrics, "classifier", lambda *_: None)
    monkeypatch.setattr(gan.metrics, "frechet_distance", lambda *_: 1.0)


@pytest.mark.parametrize("name", NETS)
def test_the_papers_settings_run_for_each_data_set(digits, tmp_path, no_classifier, name):
    report = small(digits, name, tmp_path, "--paper", "--check")
    assert report["settings"] == "paper" and next(iter(report["results"])) == f"gan-{name}-on-digits-ll"
    assert "paper" not in report["results"][f"gan-{name}-on-digits-ll"]
    panel = {"mnist": "a", "tfd": "b", "cifar-fc": "c", "cifar-conv": "d"}[name]
    assert (tmp_path / "gan-digits" / f"fig2{panel}.png").exists()
    asked = report["all settings"]
    assert {k: asked[k] for k in PAPER[name] if k not in ("steps", "batch_size")} == {
        k: v for k, v in PAPER[name].items() if k not in ("steps", "batch_size")}


def test_stage_2_trains_two_layers_under_the_G_of_stage_1(digits, tmp_path, no_classifier):
    small(digits, "tfd", tmp_path / "1", "--paper")
    first = tmp_path / "1" / "gan-digits"
    a = args("--net", "tfd", "--width", ".01", "--stage2", str(first))
    assert (a.steps, a.experiment) == (21560, "tfd-stage2")
    G1 = torch.load(first / "checkpoint.pt", weights_only=True)["parts"]["G_bar"]
    G, D, *_, step = gan.build(a, torch.full((1, 48, 48), 0.5))
    assert [m.in_features for m in G if isinstance(m, torch.nn.Linear)] == [100, 80, 100, 80, 80]
    assert (G[2].bias == -2).all() and G[0].weight.abs().max() <= 0.05
    for i in (0, 2, 4):
        assert torch.equal(G[4 + i].weight, G1[f"{i}.weight"]) and torch.equal(G[4 + i].bias, G1[f"{i}.bias"])
    gan.uniform(D, 0.5)             # D's first weights give G gradients below float32's steps
    before = [p.detach().clone() for p in G.parameters()]
    step(torch.rand(8, 1, 48, 48))
    assert all(not torch.equal(p, q) for p, q in zip(before, G.parameters(), strict=True))
    report = small(digits, "tfd", tmp_path / "2", "--stage2", str(first))
    assert next(iter(report["results"])) == "gan-tfd-stage2-on-digits-ll"
    folder = tmp_path / "2" / "gan-digits"
    (first / "checkpoint.pt").unlink()                      # a resumed run needs its own alone
    gan.main(["--resume", str(folder), "--steps", "3", "--device", "cpu"])
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize("words, message", [
    (["--stage2", "nowhere"], "it is for --net tfd"),
    (["--net", "tfd", "--stage2", "nowhere"], "--net tfd --width 0.01 expected"),
    (["--dataset", "toy"], "leave --net and --width out")])
def test_what_does_not_go_together_is_refused(digits, tmp_path, words, message):
    with pytest.raises(gan.UserError, match=message):
        small(digits, "mnist", tmp_path, *words)
    assert not list(tmp_path.glob("*/metrics.jsonl"))


def test_too_few_pictures_are_refused_before_training(digits, tmp_path):
    images = np.load(digits)["images"]
    np.savez(tmp_path / "digits.npz", images=images[:5])
    with pytest.raises(gan.UserError, match="5 pictures to train on found: expected 6"):
        small(tmp_path / "digits.npz", "mnist", tmp_path)
    assert gan.split(gan.data.Data("", torch.zeros(10, 1, 28, 28)), args())[1].shape[0] == 2


@pytest.mark.parametrize("words, data, key, paper", [
    (["--dataset", "mnist"], "mnist", "gan-mnist-ll", 225),
    (["--dataset", "mnist", "--width", "0.5"], "mnist", "gan-mnist-ll", None),
    (["--dataset", "my/mnist.npz"], "mnist", "gan-mnist-on-mnist-ll", None),
    (["--dataset", "faces"], "faces", "gan-tfd-on-faces-ll", None),
    (["--dataset", "tfd.npz", "--net", "tfd"], "tfd", "gan-tfd-on-tfd-ll", None),
    (["--dataset", "tfd.npz", "--net", "tfd", "--stage2", "RUN"], "tfd", "gan-tfd-ll", None),
    (["--dataset", "faces", "--stage2", "RUN"], "faces", "gan-tfd-stage2-on-faces-ll", None),
    (["--dataset", "cifar10"], "cifar10", "gan-cifar-fc-ll", None),
    (["--dataset", "svhn", "--net", "cifar-conv"], "svhn", "gan-cifar-conv-on-svhn-ll", None)])
def test_the_papers_value_stands_beside_ours_on_its_own_data(monkeypatch, words, data, key, paper):
    x = torch.rand(20, 1, 8, 8)
    monkeypatch.setattr(gan, "draw", lambda *_: x)
    pictures = SimpleNamespace(name=data, images=x, labels=None, test_images=x)
    found = gan.evaluate(args(*words), None, pictures, x)
    assert list(found) == [key] and found[key].get("paper") == paper


@pytest.mark.parametrize("words, passed", [((), False), (("--width", ".43"), True)])
def test_check_asks_for_the_papers_width(monkeypatch, words, passed):
    ended = []
    monkeypatch.setattr(gan, "evaluate", lambda *_: {"gan-mnist-ll": {"value": 100.0}})
    for name in ("draw", "fig2", "fig3"):
        monkeypatch.setattr(gan, name, lambda *_: torch.zeros(70, 1, 8, 8))
    r = SimpleNamespace(args=args(*words), aside=contextlib.nullcontext, show=lambda *_: None,
                        results=lambda _, passed: ended.append(passed))
    gan.report(r, None, SimpleNamespace(images=None), None, (0.0, 1.0))
    assert ended == [passed]


@pytest.mark.parametrize("words", [["--k", "2", "--no-alternate"], ["--loss", "minimax"], ["--lr-G", ".02"]])
def test_the_toy_is_trained_as_the_flags_say(tmp_path, words):
    ways = []
    for flags in ([], words):
        a = args("--dataset", "toy", "--batch-size", "64", *flags)
        torch.manual_seed(0)
        G, *_, step = gan.build(a, None)
        torch.manual_seed(1)
        step(torch.randn(a.k * 64, 1))
        ways.append(G.weight.item())
    assert ways[0] != ways[1]


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

"""vaegan.py: equations against closed forms, networks against Table 1, which loss moves which network,
gating, protocols of Sec. 4, figures and numbers."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image

import vaegan
from common import UserError
from common.data import Data
from vaegan import L_GAN, L_llike, L_prior, RMSProp, gates, log_D, networks


def args(*words):
    a = vaegan.parse_args(["--device", "cpu", "--net", "28", "--width", ".125", "--z-dim", "5", *words])
    a.amp = a.compile = a.graph = False
    return a


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


# ----------------------------------------------------------------------------------------------- settings

CODE = {  # files: github.com/andersbll/autoencoding_beyond_pixels at 1906387 and deeppy at 2635737
    "batch_size": 64, "lr": 3e-4,  # Sec. 4
    "loss": "minimax",  # Eq. 9
    "steps": 150 * 250, "anneal": True,  # aegan.py: n_epochs, GammaAnnealer; celeba_aegan.py: epoch_size
    "gamma": 1e-5,  # recon_vs_gan_weight in celeba_aegan.py
    "terms": 256 * 8 * 8,  # Table 1: the third strided convolution, recon_depth in celeba_aegan.py
    "weigh_real": 1.0,  # Eq. 10; real_vs_gen_weight of celeba_aegan.py scales the gradient of Dis alone
    "weight_decay": 2 * 1e-5 / 64, "eps": 1e-8 / 64,  # architectures.py, deeppy/parameter.py, learn_rules.py
    "code_init": True,  # AutoFiller in deeppy/filler.py, gamma in deeppy/expr/nnet/batch_normalization.py
    "noise": 0.0, "average": 0.0, "gating": False}  # none of the three in the paper


def test_PAPER_against_paper_and_authors_code():
    expected = {
        "64": {**CODE, "net": 64, "channels": 3, "z_dim": 128},  # Table 1, n_hidden in celeba_aegan.py
        "32": {**CODE, "net": 32, "channels": 3, "z_dim": 128, "gamma": 5e-6,  # cifar_aegan.py
               "terms": 192 * 8 * 8},  # img32x32 in architectures.py
        "28": {**CODE, "net": 28, "channels": 1, "z_dim": 128}}  # n_hidden in mnist_gan.py
    assert {k: {n: pytest.approx(v) for n, v in row.items()} for k, row in expected.items()} == vaegan.PAPER
    assert all(set(vaegan.TUNED[k]) <= set(vaegan.PAPER[k]) for k in vaegan.PAPER)


def test_paper_is_PAPER_alone_and_a_flag_wins():
    for dataset, row in (("faces", "64"), ("cifar10", "32"), ("mnist", "28")):
        a = vaegan.parse_args(["--paper", "--dataset", dataset])
        assert a.settings == "paper" and {k: vars(a)[k] for k in vaegan.PAPER[row]} == vaegan.PAPER[row]
        a = vaegan.parse_args(["--dataset", dataset])
        found = {k: vars(a)[k] for k in vaegan.PAPER[row]}
        assert a.settings == "tuned" and found == vaegan.PAPER[row] | vaegan.TUNED[row]
    assert vaegan.parse_args(["--paper", "--noise", ".1"]).noise == 0.1
    assert vaegan.parse_args([]).weigh_real == 1 == vaegan.parse_args(["--paper"]).weigh_real
    assert all(vaegan.parse_args(["--gating", *words]).weigh_real == 2 for words in ([], ["--paper"]))


def test_gamma_is_for_a_likelihood_of_so_many_terms():
    f = torch.zeros(2, 4, 4, 4)
    assert vaegan.gamma(vaegan.parse_args([]), f) == pytest.approx(5e-3 * 16384 / 64)
    assert vaegan.gamma(vaegan.parse_args(["--paper"]), f) == pytest.approx(1e-5 * 16384 / 64)
    assert vaegan.gamma(vaegan.parse_args(["--gamma", ".3"]), f) == 0.3


def test_the_rate_falls_as_in_the_authors_code():
    a = args("--paper")
    for step, e in ((1, 0), (250, 0), (251, 1), (37500, 149)):
        expected = 3e-4 - (e / 150) ** 0.75 * (3e-4 - 1e-5 / 64)
        assert vaegan.rate(a, step) == pytest.approx(expected)
    assert vaegan.rate(args("--steps", "100", "--paper"), 100) == 3e-4 == vaegan.rate(args(), 20000)


def test_weight_decay_spares_biases_BatchNorm_and_the_code():
    a = args("--paper")
    Enc = networks(a)[0]
    on, off = vaegan.decayed(Enc, a)
    assert on["weight_decay"] == a.weight_decay and off["weight_decay"] == 0
    names = {id(p): name for name, p in Enc.named_parameters()}
    assert {names[id(p)] for p in on["params"]} == {"convs.0.weight", "convs.2.weight", "top.0.weight"}
    assert len(on["params"]) + len(off["params"]) == len(names)


# ---------------------------------------------------------------------------------------------- equations


def test_L_prior_is_the_KL_of_two_gaussians():
    assert L_prior(torch.ones(3, 4), torch.zeros(3, 4)).item() == pytest.approx(4 / 2)
    assert L_prior(torch.zeros(3, 4), torch.zeros(3, 4)).item() == 0
    rng = np.random.default_rng(0)
    mu, log_var = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    p = torch.distributions.Normal(torch.tensor(mu), torch.tensor(np.exp(log_var / 2)))
    kl = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    assert L_prior(torch.tensor(mu), torch.tensor(log_var)).item() == pytest.approx(kl.item())


def test_L_llike_is_summed_over_features_and_averaged_over_pictures():
    assert L_llike(torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)).item() == 12 / 2
    f, g = np.random.default_rng(0).normal(size=(2, 5, 3, 4, 4))
    log_N = -0.5 * (f - g) ** 2 - 0.5 * math.log(2 * math.pi)
    constant = 48 * 0.5 * math.log(2 * math.pi)
    expected = -log_N.sum((1, 2, 3)).mean() - constant
    assert L_llike(torch.tensor(f), torch.tensor(g)).item() == pytest.approx(expected, rel=1e-5)


def test_L_GAN_against_numpy():
    zero = torch.zeros(5)
    assert L_GAN(zero, zero).item() == pytest.approx(-math.log(4))
    assert L_GAN(zero, zero, zero).item() == pytest.approx(-math.log(8))
    a, b, c = np.random.default_rng(0).normal(size=(3, 50)) * 3
    expected = 2 * np.log(sigmoid(a)).mean() + np.log(1 - sigmoid(b)).mean() + np.log(1 - sigmoid(c)).mean()
    assert L_GAN(*map(torch.tensor, (a, b, c)), real=2.0).item() == pytest.approx(expected, abs=1e-5)
    assert math.isfinite(L_GAN(torch.tensor([-200.0]), torch.tensor([200.0])).item())


def test_log_D_against_numpy():
    assert log_D(torch.zeros(5), torch.zeros(5)).item() == pytest.approx(-2 * math.log(2))
    a, b = np.random.default_rng(0).normal(size=(2, 50)) * 3
    expected = np.log(sigmoid(a)).mean() + np.log(sigmoid(b)).mean()
    assert log_D(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(expected, abs=1e-5)
    assert math.isfinite(log_D(torch.tensor([-200.0])).item())


def test_z_is_drawn_from_the_posterior():
    torch.manual_seed(0)
    z = vaegan.sample_z(torch.full((20000, 2), 3.0), torch.tensor([[math.log(4.0), -100.0]]).expand(20000, 2))
    assert z[:, 0].mean().item() == pytest.approx(3, abs=0.05) and z[:, 0].std().item() == pytest.approx(
        2, abs=0.05
    )
    torch.testing.assert_close(z[:, 1], torch.full((20000,), 3.0))


@pytest.mark.parametrize(
    "p_real, p_fake, dis, dec",
    [
        (0.5, 0.5, 1, 1),
        (0.9, 0.5, 0, 1),
        (0.5, 0.1, 0, 1),
        (0.2, 0.5, 1, 0),
        (0.5, 0.8, 1, 0),
        (0.9, 0.9, 1, 1),
    ],
)
def test_gates_stop_whoever_is_far_ahead(p_real, p_fake, dis, dec):
    a, b = (torch.full((4,), p).logit() for p in (p_real, p_fake))
    assert [g.item() for g in gates(a, b)] == [dis, dec] == [g.item() for g in gates(a, b, b)]


# ----------------------------------------------------------------------------------------------- networks


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_parameter_counts_of_table_1():
    Enc, Dec, Dis = networks(args("--net", "64", "--z-dim", "128", "--width", "1", "--paper"))
    bn = lambda *n: 2 * sum(n)
    assert count(Enc) == (
        25 * (3 * 64 + 64 * 128 + 128 * 256)
        + bn(64, 128, 256)
        + 16384 * 2048
        + bn(2048)
        + 2 * (2048 * 128 + 128)
    )
    assert count(Dec) == (
        128 * 16384 + bn(16384) + 25 * (256 * 256 + 256 * 128 + 128 * 32) + bn(256, 128, 32) + 25 * 32 * 3 + 3
    )
    assert count(Dis) == (
        25 * 3 * 32
        + 32
        + 25 * (32 * 128 + 128 * 256 + 256 * 256)
        + bn(128, 256, 256)
        + 16384 * 512
        + bn(512)
        + 512
        + 1
    )


def test_parameter_counts_of_the_authors_32_x_32():
    Enc, Dec, Dis = networks(args("--net", "32", "--z-dim", "128", "--width", "1", "--paper"))
    bn = lambda *n: 2 * sum(n)
    assert count(Enc) == (25 * (3 * 64 + 64 * 128 + 128 * 256) + bn(64, 128, 256)
                          + 4096 * 1024 + bn(1024) + 2 * (1024 * 128 + 128))
    assert count(Dec) == (128 * 4096 + bn(4096) + 25 * (256 * 192 + 192 * 128 + 128 * 32) + bn(192, 128, 32)
                          + 25 * 32 * 3 + 3)
    assert count(Dis) == (25 * 3 * 32 + 32 + 25 * (32 * 128 + 128 * 192 + 192 * 256) + bn(128, 192, 256)
                          + 4096 * 512 + bn(512) + 512 + 1)


@pytest.mark.parametrize("size, side, maps", [(64, 8, 256), (32, 8, 192), (28, 7, 128)])
def test_shapes_and_Dis_l(size, side, maps):
    dy = 3
    settings = args("--net", str(size), "--z-dim", "6", "--width", ".0625")
    Enc, Dec, Dis = networks(settings, dy)
    x, y = torch.rand(2, settings.channels, size, size) * 2 - 1, torch.randn(2, dy)
    mu, log_var = Enc(x, y)
    assert mu.shape == log_var.shape == (2, 6) and mu.abs().sum() > 0
    x_tilde = Dec(mu, y)
    assert x_tilde.shape == x.shape and x_tilde.abs().max() <= 1
    a, f = Dis(x, y)
    assert a.shape == (2,) and f.shape == (2, max(8, maps // 16), side, side)
    assert (f < 0).any()  # a convolution's output, before BatchNorm and ReLU
    for net, inputs in ((Enc, (x, -y)), (Dec, (mu, -y)), (Dis, (x, -y))):  # all three look at y
        same = net(*inputs)
        same = same[0] if isinstance(same, tuple) else same
        assert not torch.equal(same, {Enc: mu, Dec: x_tilde, Dis: a}[net])


def test_weights_start_within_their_width():
    for net in networks(args("--width", ".25")):
        for m in net.modules():
            if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)):
                bound = (3 * m.weight[0].numel()) ** -0.5
                assert 0.8 * bound < m.weight.abs().max() <= bound


def test_the_authors_initialisation():
    _, Dec, _ = networks(args("--net", "64", "--width", ".25", "--paper"))
    up = Dec[2]
    bound = (3 * up.out_channels * 25) ** -0.5
    assert 0.95 * bound < up.weight.abs().max() <= bound
    scale = Dec[0][1].weight
    assert scale.min() >= 0 and scale.max() <= 1 and scale.mean().item() == pytest.approx(0.5, abs=0.05)
    _, Dec, _ = networks(args("--net", "64", "--width", ".25"))
    bound = (3 * up.in_channels * 25 / 4) ** -0.5
    assert 0.95 * bound < Dec[2].weight.abs().max() <= bound and Dec[0][1].weight.eq(1).all()


@torch.no_grad()
def test_RMSProp_is_that_of_torch_and_its_gate_leaves_everything_as_it_is():
    torch.manual_seed(0)
    mine, theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (6, 4)] for _ in range(2))
    groups = [[{"params": [p], "weight_decay": d} for p, d in zip(ps, (0.1, 0.0))] for ps in (mine, theirs)]
    opt = RMSProp(groups[0], 1e-2, eps=1e-3)
    other = torch.optim.RMSprop(groups[1], 1e-2, alpha=0.9, eps=1e-3)
    for _ in range(5):
        grads = [torch.randn(6), torch.randn(4)]
        for p, g in zip(theirs, grads):
            p.grad = g.clone()
        opt.update(grads), other.step()
    torch.testing.assert_close(mine, theirs)
    before, s = [p.clone() for p in mine], [opt.state[p]["s"].clone() for p in mine]
    for group in opt.param_groups:
        group["gate"].zero_()
    opt.update([torch.full((6,), 1e6), torch.full((4,), 1e6)])
    assert all(torch.equal(p, q) and torch.equal(opt.state[p]["s"], t) for p, q, t in zip(mine, before, s))


# ---------------------------------------------------------------------------------------- who moves, where to


def built(*words, dy=0, seed=0):
    torch.manual_seed(seed)
    return vaegan.build(args(*words), dy)


class Descent(torch.optim.SGD):
    """What a parameter moves by is minus its gradient."""

    def __init__(self, params, lr, eps):
        super().__init__([{**group, "weight_decay": 0.0} for group in params], lr=1.0)


def gradients(monkeypatch, *words, dy=0):
    """{network: [gradient of each parameter]} of one step, from how far plain descent at rate 1 moves it."""
    monkeypatch.setattr(vaegan, "RMSProp", Descent)
    parts, step = built(*words, dy=dy)
    nets = {name: parts[name] for name in ("Enc", "Dec", "Dis") if name in parts}
    before = {name: [p.detach().clone() for p in net.parameters()] for name, net in nets.items()}
    x = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    y = torch.randn(8, dy, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    step(x, y)
    moved = {n: [q - p for p, q in zip(net.parameters(), before[n])] for n, net in nets.items()}
    return moved, x, y


def backward(loss, net):
    grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, net.parameters())]


@pytest.mark.parametrize("model", ["vaegan", "vaegan_dis0"])
@pytest.mark.parametrize("dy", [0, 2])
def test_each_network_descends_its_own_part_of_the_loss_alone(monkeypatch, model, dy):
    """Algorithm 1 written with detached tensors, and every parameter's gradient compared."""
    moved, x, y = gradients(
        monkeypatch, "--model", model, "--gamma", ".01", "--loss", "minimax", "--noise", ".3", dy=dy
    )
    parts, _ = built("--model", model, dy=dy)
    Enc, Dec, Dis = (parts[n] for n in ("Enc", "Dec", "Dis"))
    torch.manual_seed(3)
    mu, log_var = Enc(x, y)
    z = mu + torch.randn_like(mu) * (log_var / 2).exp()
    z_p = torch.randn_like(z)
    noise = 0.3 * torch.randn_like(x)
    log = torch.nn.functional.logsigmoid

    def forward(z, x_fake=None):
        x_fake = Dec(torch.cat([z, z_p]), torch.cat([y, y])) if x_fake is None else x_fake
        a, f = Dis(torch.cat([x, x_fake]) + torch.cat([noise, noise, noise]), torch.cat([y, y, y]))
        gan = log(a[:8]).mean() + log(-a[8:16]).mean() + log(-a[16:]).mean()
        d = f[:8].detach() - f[8:16] if model == "vaegan" else x - x_fake[:8]
        return gan, 0.5 * d.pow(2).sum() / 8, x_fake

    prior = 0.5 * (mu**2 + log_var.exp() - log_var - 1).sum() / 8
    gan, llike, x_fake = forward(z)
    enc = backward(prior + llike, Enc)
    gan, llike, _ = forward(z.detach())
    dec = backward(0.01 * llike + gan, Dec)
    gan, _, _ = forward(None, x_fake.detach())
    dis = backward(-gan, Dis)
    for name, expected in (("Enc", enc), ("Dec", dec), ("Dis", dis)):
        for i, (m, g) in enumerate(zip(moved[name], expected, strict=True)):
            assert torch.allclose(m, g, rtol=1e-3, atol=1e-4 * g.abs().max().item() + 1e-6), (name, i)
    assert all(g.abs().sum() > 0 for part in (enc, dec, dis) for g in part if g.ndim > 1)


def test_gamma_is_the_weight_of_the_likelihood_in_Decs_step_alone(monkeypatch):
    at = {g: gradients(monkeypatch, "--gamma", g)[0] for g in ("0", "1", "3")}
    for p0, p1, p3 in zip(*(at[g]["Dec"] for g in ("0", "1", "3"))):
        torch.testing.assert_close(
            p3 - p0, 3 * (p1 - p0), rtol=1e-3, atol=1e-3 * (p1 - p0).abs().max().item()
        )
    assert all(torch.equal(p, q) for n in ("Enc", "Dis") for p, q in zip(at["0"][n], at["3"][n]))


def test_gamma_weighs_the_mean_over_features_alike_at_every_width(monkeypatch):
    features = 16 * 7 * 7  # of Dis_l at 28 x 28 and width .125
    default, _, _ = gradients(monkeypatch)
    same, _, _ = gradients(monkeypatch, "--gamma", str(5e-3 * 16384 / features))
    assert all(torch.equal(p, q) for p, q in zip(default["Dec"], same["Dec"]))


@pytest.mark.parametrize("settings", [(), ("--paper",)])
@pytest.mark.parametrize("model", vaegan.MODELS)
def test_a_step_moves_what_learns_and_nothing_else(model, settings):
    words = ("--model", model, *settings, *(("--dis", "somewhere") if model == "vae_dis" else ()))
    parts, step = built(*words)
    nets = [n for n in ("Enc", "Dec", "Dis") if n in parts]
    assert tuple(nets) == vaegan.MODELS[model]
    before = {n: {k: v.clone() for k, v in parts[n].state_dict().items()} for n in nets}
    scalars = step(torch.rand(8, 1, 28, 28), torch.zeros(8, 0))
    assert all(v.ndim == 0 and v.isfinite() for v in scalars.values())
    for n in nets:
        still = [torch.equal(v, before[n][k]) for k, v in parts[n].state_dict().items() if v.ndim > 1]
        assert not any(still) if f"opt_{n}" in parts else all(still), n
    if model == "vae_dis":  # not even its BatchNorm
        assert all(torch.equal(v, before["Dis"][k]) for k, v in parts["Dis"].state_dict().items())
        assert "opt_Dis" not in parts


def test_Dec_and_Dis_pull_L_GAN_in_opposite_directions(monkeypatch):
    """Along each one's step L_GAN falls for Dec and rises for Dis."""
    moved, x, y = gradients(monkeypatch, "--model", "gan")
    parts, _ = built("--model", "gan")
    torch.manual_seed(3)
    z = torch.randn(8, 5)

    def gan():
        a, b = parts["Dis"](torch.cat([x, parts["Dec"](z, y)]), torch.cat([y, y]))[0].chunk(2)
        return L_GAN(a, b).item()

    start = gan()
    for name, sign in (("Dec", -1), ("Dis", 1)):
        with torch.no_grad():
            for p, g in zip(parts[name].parameters(), moved[name]):
                p -= 1e-3 * g
            assert sign * (gan() - start) > 0
            for p, g in zip(parts[name].parameters(), moved[name]):
                p += 1e-3 * g


@pytest.mark.parametrize("stopped, goes", [("Dis", "Dec"), ("Dec", "Dis")])
def test_gating_leaves_out_a_step_and_the_next_one_counts(monkeypatch, stopped, goes):
    parts, step = built("--gating")
    x, y = torch.rand(8, 1, 28, 28), torch.zeros(8, 0)
    step(x, y)

    def state(name):
        opt = parts[f"opt_{name}"]
        return [t.clone() for p in parts[name].parameters() for t in (p.detach(), opt.state[p]["s"])]

    still, before = state(stopped), state(goes)
    shut = (torch.tensor(float(stopped != "Dis")), torch.tensor(float(stopped != "Dec")))
    monkeypatch.setattr(vaegan, "gates", lambda *a: shut)
    scalars = step(x, y)
    assert (scalars["Dis steps"].item(), scalars["Dec steps"].item()) == tuple(g.item() for g in shut)
    assert all(torch.equal(a, b) for a, b in zip(state(stopped), still))
    assert not any(torch.equal(a, b) for a, b in zip(state(goes), before))
    monkeypatch.setattr(vaegan, "gates", lambda *a: (torch.tensor(1.0), torch.tensor(1.0)))
    step(x, y)
    assert not any(torch.equal(a, b) for a, b in zip(state(stopped), still))


# ----------------------------------------------------------------------------------------- data and protocols


def test_a_set_without_a_test_part_gives_its_last_tenth():
    n = 50
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 64, 64)
    attributes, factors = (torch.arange(n) % 2).float()[:, None], torch.linspace(-1, 1, n)[:, None]
    extra = {"attributes": attributes, "attribute_names": ["odd"], "factors": factors, "factor_names": ["f"]}
    d = vaegan.prepare(args("--conditional"), Data("x", images, extra=extra))
    assert len(d.images) == 45 and d.test_images[0, 0, 0, 0] == 45 and d.extra["names"] == ["odd", "f"]
    assert d.extra["attributes"].min() == 0 and d.extra["attributes"].max() <= 1
    assert torch.equal(d.extra["test_attributes"][:, 0], attributes[45:, 0])
    torch.testing.assert_close(d.extra["y"].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(d.extra["y"].var(0, correction=0), torch.ones(2))
    assert d.extra["test_y"].shape == (5, 2)
    assert vaegan.prepare(args(), Data("x", images, extra=extra)).extra["y"].shape == (45, 0)


def test_labels_stand_in_for_attributes_and_published_test_parts_are_kept():
    images, y = torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.arange(20) % 4
    d = vaegan.prepare(args("--conditional"), Data("x", images, y, images[:6], y[:6], classes=list("abcd")))
    assert len(d.images) == 20 and len(d.test_images) == 6 and d.extra["names"] == list("abcd")
    assert torch.equal(d.extra["test_attributes"].argmax(1), y[:6])
    a = torch.rand(20, 2)
    d = vaegan.prepare(
        args(), Data("x", images, None, images[:6], extra={"attributes": a, "test_attributes": a[:6]})
    )
    assert len(d.images) == 20 and d.extra["test_attributes"].shape == (6, 2) and len(d.extra["names"]) == 2
    with pytest.raises(UserError, match="neither attributes nor labels"):
        vaegan.prepare(args("--conditional"), Data("x", images))
    for bad in (torch.rand(20), torch.rand(19, 2), ["a"] * 20):
        with pytest.raises(UserError, match="attributes are not numbers"):
            vaegan.prepare(args(), Data("x", images, extra={"attributes": bad}))
    assert vaegan.prepare(args(), Data("x", images, y, images[:6])).labels is None
    d = vaegan.prepare(args(), Data("x", images, y - 1))  # stl10's unlabelled pictures
    assert d.labels is None and d.extra["names"] == []
    for labels, test_labels in ((None, y[:6]), (y, y[:6] - 1)):                 # test labels that do not fit
        assert vaegan.prepare(args(), Data("x", images, labels, images[:6], test_labels)).labels is None


def test_attribute_vectors_are_differences_of_means():
    a = (torch.arange(40) % 2).float()[:, None]
    torch.testing.assert_close(vaegan.attribute_vectors(a, a), torch.ones(1, 1))
    mu, a = torch.randn(60, 7), torch.rand(60, 3)
    v = vaegan.attribute_vectors(mu, a)
    for j in range(3):
        on = a[:, j] > a[:, j].mean()
        torch.testing.assert_close(v[j], mu[on].mean(0) - mu[~on].mean(0))


def test_similarity_takes_the_best_of_the_samples():
    y = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    read = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]])
    assert vaegan.similarity(read, y) == (1.0, 0.0)
    read[1, 1] = torch.tensor([0.0, 3.0])  # the cosine does not see the length, the error does
    assert vaegan.similarity(read, y) == (1.0, 0.5)
    rng = np.random.default_rng(0)
    y, read = rng.normal(size=(9, 4)), rng.normal(size=(9, 5, 4))
    cosine = (
        np.einsum("nka,na->nk", read, y) / np.linalg.norm(read, axis=2) / np.linalg.norm(y, axis=1)[:, None]
    )
    best = read[np.arange(9), cosine.argmax(1)]
    found = vaegan.similarity(torch.tensor(read), torch.tensor(y))
    assert found == pytest.approx((cosine.max(1).mean(), ((best - y) ** 2).sum(1).mean()))


def test_knn_error_against_numpy():
    rng = np.random.default_rng(0)
    f, y = rng.normal(size=(200, 6)).astype(np.float32), rng.integers(0, 4, 200)
    q, t = rng.normal(size=(70, 6)).astype(np.float32), rng.integers(0, 4, 70)
    wrong = 0
    for x, label in zip(q, t):
        near = y[((f - x) ** 2).sum(1).argsort()[:5]]
        wrong += np.bincount(near).argmax() != label        # of a tie the smallest label, as in scikit-learn
    found = vaegan.knn_error(*map(torch.tensor, (f, y, q, t)))
    assert found == pytest.approx(100 * wrong / 70)
    line, labels = torch.arange(5.0)[:, None], torch.tensor([3, 1, 3, 1, 2])
    assert vaegan.knn_error(line, labels, torch.zeros(1, 1), torch.tensor([1])) == 0
    assert vaegan.knn_error(line, labels, torch.zeros(1, 1), torch.tensor([3])) == 100
    assert vaegan.knn_error(*map(torch.tensor, (f, y, f, y)), k=1) == 0
    for offset in (1e4, 1e5):   # numbers far from 0 with small differences
        moved = [torch.tensor(a).float() + offset for a in (f, q)]
        near, there = [a.double() - offset for a in moved], [torch.tensor(a) for a in (y, t)]
        assert vaegan.knn_error(moved[0], there[0], moved[1], there[1]) == \
            vaegan.knn_error(near[0], there[0], near[1], there[1])
    with pytest.raises(UserError, match="1 that are NaN or infinite"):
        vaegan.knn_error(torch.tensor([[0.0], [math.nan]]), labels[:2], torch.zeros(1, 1), labels[:1])


def test_sharpness_and_distance():
    ramp = torch.linspace(-1, 1, 16).expand(2, 3, 16, 16)
    assert vaegan.sharpness(ramp) == pytest.approx(0, abs=1e-9)
    x = torch.rand(2, 3, 16, 16)
    soft = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert vaegan.sharpness(x) > 10 * vaegan.sharpness(soft)
    assert vaegan.distance(x, x) == 0 and vaegan.distance(x, x.roll(1, 0)) == pytest.approx(1)


def test_the_plane_has_z1_to_the_right_and_z2_up():
    class Show(torch.nn.Module):
        def forward(self, z, y):
            return z[:, :, None, None]

    z = vaegan.plane(args(), Show(), 4)[..., 0, 0]
    assert z.shape == (4, 4, 2)
    assert (
        z[0, 0].tolist() == [-1.5, 1.5]
        and z[0, 3].tolist() == [1.5, 1.5]
        and z[3, 0].tolist() == [-1.5, -1.5]
    )


def test_samples_with_the_covariance_of_the_aggregated_posterior():
    torch.manual_seed(0)
    x, y = torch.randint(256, (4000, 3, 4, 4), dtype=torch.uint8), torch.zeros(4000, 0)

    class Enc(torch.nn.Module):             # mu = (2 a + 1, 2 a - 3), sigma = (1, 2); a is a pixel in [-1, 1]
        def forward(self, x, y):
            a = 2 * x[:, 0, 0, :1]
            return torch.cat([a + 1, a - 3], 1), math.log(4) * torch.tensor([0.0, 1.0]).expand(len(x), 2)

    pictures = SimpleNamespace(images=x, extra={"y": y})
    z, cov = vaegan.draw_q(args(), Enc(), lambda z, y: z, pictures, torch.zeros(20000, 0))
    expected = torch.tensor([[4 / 3 + 1, 4 / 3], [4 / 3, 4 / 3 + 4]])
    assert torch.allclose(cov.float(), expected, atol=0.1)
    assert torch.allclose(z.T.cov(), cov.float(), atol=0.15)
    assert torch.allclose(z.mean(0), torch.tensor([1.0, -3.0]), atol=0.1)


# ----------------------------------------------------------------------------------------------------- runs


def small(digits, tmp_path, *words):
    folders = "--dataset", digits, "--out", tmp_path, "--data-dir", digits.parent / "data"
    nets = "--net", 28, "--width", 0.125, "--batch-size", 16, "--device", "cpu", "--no-amp"
    return list(map(str, (*folders, *nets, *words)))


def numbers(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]


def test_a_run_on_digits_draws_figures_and_writes_numbers(digits, tmp_path):
    words = small(digits, tmp_path, "--steps", 40, "--z-dim", 2, "--lr", 3e-3)
    result = script("vaegan.py", *words)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "vaegan-digits"
    for figure in ("samples", "fig3", "fig4", "fig6", "plane"):
        assert len(np.unique(np.asarray(Image.open(folder / f"{figure}.png")))) > 8, figure
    found = numbers(folder)
    assert set(found) == {"vg-celeba-samples", "vg-celeba-recon", "vg-aggregated", "vg-attr", "vg-knn",
                          "deck-vae-gan"}
    assert all(math.isfinite(v["value"]) for v in found.values())
    assert found["vg-knn"]["pixels"] < 50 and "paper" not in found["vg-knn"]
    assert {"Dis_l", "regressor", "frechet", "sharpness"} <= set(found["vg-celeba-recon"])


def test_a_conditional_gan_and_the_vae_that_measures_with_its_Dis(digits, tmp_path):
    gan, vae = tmp_path / "vaegan-digits-gan", tmp_path / "vaegan-digits-vae"
    given = "--conditional", "--steps", 2
    vaegan.main(small(digits, tmp_path, *given, "--model", "gan", "--name", "gan", "--gating"))
    found = numbers(gan)["vg-lfw"]
    assert -1 <= found["value"] <= 1 and found["test set"] > 0.5 and "paper" not in found
    assert (gan / "queries.png").exists() and not (gan / "fig4.png").exists()
    vaegan.main(small(digits, tmp_path, *given, "--model", "vae_dis", "--dis", gan, "--name", "vae"))
    assert all(torch.equal(v, saved(vae)["Dis"][k]) for k, v in saved(gan)["Dis"].items())
    assert "Dis_l" in numbers(vae)["vg-celeba-recon"] and "paper" not in numbers(vae)["vg-lfw"]
    file = str(tmp_path / "dis.npz")
    vaegan.main(["--resume", str(vae), "--export", file])
    vaegan.main(["--resume", file, "--sample", "2", "--set", "attribute 3=1", "--out", str(tmp_path)])
    vaegan.main(["--resume", str(vae), "--sample", "9"])
    rows = (vae / "samples" / "labels.csv").read_text().splitlines()
    assert {value for row in rows[1:] for value in row.split(",")[1:]} == {"0", "1"}        # digits, one-hot
    for value in ("nan", "abc"):
        with pytest.raises(UserError, match=f"attribute 3 '{value}' found: expected a number"):
            vaegan.main(["--resume", file, "--sample", "2", "--set", f"attribute 3={value}"])
    with pytest.raises(UserError, match="holds no Dis of these sizes: a run with --model gan"):
        vaegan.main(small(digits, tmp_path, "--model", "vae_dis", "--dis", gan, "--name", "other"))
    with pytest.raises(UserError, match=r"cannot be read \(No such file.*: a run with --model gan"):
        vaegan.main(small(digits, tmp_path, "--model", "vae_dis", "--dis", tmp_path, "--name", "none"))


def test_the_tables_say_how_long_the_classifier_trains(digits, tmp_path, monkeypatch):
    steps, classifier = [], vaegan.metrics.classifier
    monkeypatch.setattr(vaegan.metrics, "classifier",
                        lambda *words: steps.append(words[4]) or classifier(*words))
    monkeypatch.setitem(vaegan.PAPER["28"], "clf_steps", 3)
    vaegan.main(small(digits, tmp_path, "--steps", 1, "--model", "vae"))
    assert steps == [3]


@pytest.mark.parametrize("model", ["vaegan", "vae", "gan"])
def test_what_draws_is_the_average(digits, tmp_path, monkeypatch, model):
    seen, batched = [], vaegan.metrics.batched
    monkeypatch.setattr(vaegan.metrics, "batched",
                        lambda net, *rest, **more: seen.append(net) or batched(net, *rest, **more))
    vaegan.main(small(digits, tmp_path, "--steps", 3, "--model", model))
    parts, drawn = saved(tmp_path / "vaegan-digits"), [net for net in seen if isinstance(net, vaegan.Decoder)]
    name, p = next(drawn[0].named_parameters())
    assert len(drawn) > 2 and not torch.equal(parts["Dec"][name], p)
    assert all(torch.equal(dict(Dec.named_parameters())[name], parts["Dec_bar"][name]) for Dec in drawn)


@pytest.mark.parametrize("net", [64, 32, 28])
def test_the_papers_settings_run(digits, tmp_path, net):
    vaegan.main(small(digits, tmp_path, "--steps", 2, "--paper", "--net", net))
    report = json.loads((tmp_path / "vaegan-digits" / "results.json").read_text())
    assert report["settings"] == "paper" and report["all settings"]["anneal"] is True
    assert all(math.isfinite(v["value"]) and "paper" not in v for v in report["results"].values())
    parts = saved(tmp_path / "vaegan-digits")
    assert all(torch.equal(p, parts["Dec"][k]) for k, p in parts["Dec_bar"].items()
               if k != "t" and "running" not in k and "num_batches" not in k)  # average 0
    assert parts["opt_Enc"]["param_groups"][0]["lr"].item() == pytest.approx(3e-4)


def test_published_values_stand_beside_their_own_data_and_network_alone():
    def found(n, n_test, *words):
        a, x = vaegan.parse_args([*words]), torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
        pictures = Data(a.dataset, x.expand(n, -1, -1, -1), None, x.expand(n_test, -1, -1, -1))
        return vaegan.published(a, pictures)

    assert found(9, 9, "--dataset", "lfw", "--conditional") == {}           # another judge than the paper's
    cifar = "--dataset", "cifar10", "--model", "gan"
    for words in ((), ("--paper",)):
        assert found(50000, 10000, *cifar, *words)["vg-knn"] == {"paper": 33.73, "paper pixels": 66.02}
    for words in ((*cifar, "--paper", "--width", ".5"), (*cifar, "--net", "64"),
                  ("--dataset", "cifar10", "--paper")):
        assert found(50000, 10000, *words)["vg-knn"] == {"paper pixels": 66.02}
    assert found(500, 100, *cifar, "--paper") == {}


def test_resumed_it_goes_on_to_the_bit(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(vaegan, "figures", lambda *a: None)
    monkeypatch.setattr(vaegan, "evaluate", lambda *a: {"vg-celeba-recon": {"value": 0, "sharpness": 1}})
    vaegan.main(small(digits, tmp_path, "--gating", "--steps", 4, "--name", "whole"))
    vaegan.main(small(digits, tmp_path, "--gating", "--steps", 2, "--name", "parts"))
    vaegan.main(["--resume", str(tmp_path / "vaegan-digits-parts"), "--steps", "4"])
    whole, parts = (saved(tmp_path / f"vaegan-digits-{n}") for n in ("whole", "parts"))
    for net in ("Enc", "Dec", "Dis"):
        assert all(torch.equal(v, parts[net][k]) for k, v in whole[net].items())
        for i, state in whole[f"opt_{net}"]["state"].items():
            assert torch.equal(state["s"], parts[f"opt_{net}"]["state"][i]["s"])


def test_runs_side_by_side(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vaegan, "figures", lambda *a: None)
    monkeypatch.setattr(vaegan, "evaluate", lambda *a: {"vg-celeba-recon": {"value": 0, "sharpness": 1}})
    runs = {"vaegan": ["--gamma", ".002"], "vae": [], "gan": ["--z-dim", "3", "--seed", "1"]}
    for model, words in runs.items():
        vaegan.main(small(digits, tmp_path, "--steps", 2, "--model", model, "--name", model, *words))
    here, vae, gan = (tmp_path / f"vaegan-digits-{model}" for model in runs)
    before, captions, stack = (here / "checkpoint.pt").read_bytes(), [], vaegan.log.with_captions
    monkeypatch.setattr(vaegan.log, "with_captions", lambda x, c: captions.append(c) or stack(x, c))

    def beside(*others):
        vaegan.main(["--resume", str(here), "--beside", *map(str, others)])

    beside(gan, here, vae)
    name = "vaegan, gamma 0.002"
    assert [list(c) for c in captions] == [[name, "gan", name, "vae"], ["data", name, name, "vae"]]
    assert f"{here}, {gan}, {here}, {vae}: {here}/beside_*.png" in capsys.readouterr().out
    for figure, rows, same in (("beside_fig3", 3, (0, 2)), ("beside_fig4", 1, (1, 2))):
        x = np.asarray(Image.open(here / f"{figure}.png"))
        assert x.shape == (4 * (18 + 2 + 30 * rows), 2 + 8 * 30, 3)
        blocks = [b[18:] for b in np.split(x, 4)]           # less the caption
        alike = {(i, j) for i in range(4) for j in range(i) if np.array_equal(blocks[i], blocks[j])}
        assert alike == {same[::-1]}, figure
    held_out = vaegan.data.load(digits).test_images[:8]
    assert np.array_equal(blocks[0], vaegan.log.grid(held_out / 255, 8).permute(1, 2, 0))
    assert (here / "checkpoint.pt").read_bytes() == before

    other = json.loads((vae / "args.json").read_text())
    with pytest.raises(UserError, match="args.json not found: the folder of an earlier run expected"):
        beside(gan, tmp_path)
    for found, said in (({"net": 32}, "was run with --net 32, 28 expected, as in"),
                        ({"dataset": "mnist"}, "was run with --dataset mnist, .* expected, as in"),
                        ({"script": "aae"}, "is a run of aae.py, a run of vaegan.py expected"),
                        ({}, "No such file .*: a vaegan run past its first checkpoint expected")):
        (tmp_path / "args.json").write_text(json.dumps(other | found))
        with pytest.raises(UserError, match=said):
            beside(gan, tmp_path)


@pytest.mark.parametrize(
    "words, line",
    [
        (["--model", "vae_dis"], "need each other"),
        (["--beside", "runs/gan"], "needs --resume"),
        (["--dis", "x"], "need each other"),
        (["--model", "vae", "--gating"], "trains none"),
        (["--model", "vae_dis", "--dis", "RUN", "--gating"], "trains none"),
        (["--gamma", "-1"], "at least 0"),
        (["--width", "0"], "above 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(words, line, capsys):
    with pytest.raises(SystemExit) as e:
        vaegan.parse_args(words)
    assert e.value.code == 2 and line in capsys.readouterr().err

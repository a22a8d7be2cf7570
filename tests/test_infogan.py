"""infogan.py: equations against closed forms, networks against Tables 1-6, who moves, figures and numbers."""

import contextlib
import itertools
import json
import math
import warnings
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image

import infogan
from common import UserError
from common.fuse import descend
from infogan import L_I, L_I_cat, L_I_cont, V, join, networks, sample_latent, split_q


def settings(*words, **changes):
    """The settings of a run with these flags on a CPU, and `changes` that no flag makes."""
    args = infogan.parse_args(["--device", "cpu", "--no-amp", "--no-compile", "--no-graph", *words])
    return Namespace(**{**vars(args), **changes})


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


# -------------------------------------------------------------------------------------------------- equations


def test_V_is_minus_log_4_at_one_half():
    assert V(torch.zeros(5), torch.zeros(5)).item() == pytest.approx(-math.log(4))


def test_V_against_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50) * 3, rng.normal(size=50) * 3
    expected = np.log(sigmoid(a)).mean() + np.log(1 - sigmoid(b)).mean()
    assert V(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(expected, abs=1e-5)


def test_V_is_finite_for_a_sure_discriminator():
    assert math.isfinite(V(torch.tensor([200.0]), torch.tensor([200.0])).item())


def test_L_I_cat_bounds():
    c = torch.arange(10)
    assert L_I_cat(torch.zeros(10, 10), c).item() == pytest.approx(0, abs=1e-6)
    assert L_I_cat(100 * torch.eye(10), c).item() == pytest.approx(math.log(10), abs=1e-5)


def test_L_I_cat_takes_logits_not_probabilities():
    logits, c = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    expected = math.log(math.exp(2) / (math.exp(2) + 1 + math.exp(-1))) + math.log(3)
    assert L_I_cat(logits, c).item() == pytest.approx(expected, abs=1e-6)


def test_L_I_cont_is_a_gaussian_likelihood_plus_the_entropy_of_the_uniform():
    rng = np.random.default_rng(1)
    mu, s, u = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) * 0.3, rng.uniform(-1, 1, (40, 3))
    density = np.exp(-0.5 * ((u - mu) / np.exp(s)) ** 2) / (np.exp(s) * math.sqrt(2 * math.pi))
    expected = (np.log(density) + math.log(2)).sum(1).mean()
    assert L_I_cont(*map(torch.tensor, (mu, s, u))).item() == pytest.approx(expected, abs=1e-6)
    assert L_I_cont(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)).item() == pytest.approx(
        -0.2258, abs=1e-4
    )


def test_Q_is_split_into_disjoint_slices():
    args = settings("--net", "svhn")
    dq = sum(args.cats) + 2 * args.m
    logits, mu, log_sigma = split_q(torch.arange(float(dq)).repeat(3, 1), args)
    assert torch.cat([*logits, mu, log_sigma], 1)[0].tolist() == list(range(dq))
    assert [a.shape[1] for a in logits] == [10] * 4 and mu.shape[1] == log_sigma.shape[1] == 4


# -------------------------------------------------------------------------------------------------- settings

CODE = {  # openai/InfoGAN: launchers/run_mnist_exp.py, infogan/algos/infogan_trainer.py
    "batch_size": 128,          # batch_size
    "fresh_z": True,            # generator_trainer runs in a session of its own, which draws z and c anew
    "lam_cont": 1.0,            # info_reg_coeff, for both kinds of codes
    "together": False,          # discriminate() is called twice
    "warm_up": 0, "warp": 0.0, "noise": 0.0, "decay_lr": False,     # none of these
}
APP_C = {"lr_D": 2e-4, "lr_G": 1e-3, "lam": 1.0,        # App. C, for what no table says otherwise
         "fix_sigma": False}                            # App. C: the standard deviation is exp of an output
NO_LENGTH = {"steps": 3000, "gan_steps": 0}             # not published
FACES = {"net": "faces", "size": 32, "channels": 1, "scale": (0.0, 1.0),        # Table 4: 32x32 grey, sigmoid
         "cats": (), "m": 5, "dz": 128}                 # App. C.4: five continuous codes, 128 noise variables
CHAIRS = {"net": "chairs", "size": 64, "channels": 1, "scale": (0.0, 1.0),      # Table 6: 64x64 grey, sigmoid
          "cats": (20, 20, 20), "m": 1, "dz": 128}      # App. C.5: 189 inputs
PUBLISHED = {
    "mnist": {"net": "mnist", "size": 28, "channels": 1, "scale": (0.0, 1.0),   # Table 1; MeanBernoulli
              "cats": (10,), "m": 2, "dz": 62,          # App. C.1: 74 inputs
              "steps": 5000, "gan_steps": 5000,         # run_mnist_exp.py: 50 epochs of 100 updates
              "fix_sigma": True},                       # run_mnist_exp.py: fix_std=True
    "svhn": {"net": "svhn", "size": 32, "channels": 3, "scale": (-1.0, 1.0),    # Table 2: 32x32 colour, tanh
             "cats": (10, 10, 10, 10), "m": 4, "dz": 124, **NO_LENGTH},         # App. C.2: 168 inputs
    "celeba": {"net": "celeba", "size": 32, "channels": 3, "scale": (-1.0, 1.0),        # Table 3
               "cats": (10,) * 10, "m": 0, "dz": 128, **NO_LENGTH},             # App. C.3: 228 inputs
    "faces": {**FACES, "lr_D": 2e-4, "lr_G": 5e-4, "lam_cont": 0.2, **NO_LENGTH},               # Table 5
    "faces-elevation": {**FACES, "lr_D": 4e-4, "lr_G": 3e-4, "lam_cont": 0.1, **NO_LENGTH},     # Table 5
    "faces-lighting": {**FACES, "lr_D": 8e-4, "lr_G": 3e-4, "lam_cont": 0.1, **NO_LENGTH},      # Table 5
    "faces-width": {**FACES, "lr_D": 8e-4, "lr_G": 3e-4, "lam_cont": 0.1, **NO_LENGTH},         # Table 5
    "chairs": {**CHAIRS, "lr_D": 2e-4, "lr_G": 1e-3,                            # Table 7: rotation
               "lam_cont": 10.0, "lam": 1.0, **NO_LENGTH},
    "chairs-width": {**CHAIRS, "lr_D": 2e-4, "lr_G": 1e-3,                      # Table 7: width
                     "lam_cont": 0.05, "lam": 2.0, **NO_LENGTH},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_PAPER_holds_the_published_values(name):
    published = {**CODE, **APP_C, **PUBLISHED[name]}
    assert infogan.PAPER[name] == published
    assert set(infogan.TUNED[name]) <= set(published) and PUBLISHED.keys() == infogan.PAPER.keys()
    net, _, factor = name.partition("-")
    words = ["--net", net] + (["--factor", factor] if factor else [])
    assert published.items() <= vars(settings("--paper", *words)).items()
    assert {**published, **infogan.TUNED[name]}.items() <= vars(settings(*words)).items()


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith("faces-")])
def test_the_papers_settings_run(name, digits, tmp_path):
    net, _, factor = name.partition("-")
    words = ["--net", net] + (["--factor", factor] if factor else [])
    infogan.main(["--paper", *words, "--dataset", str(digits), "--width", ".05", "--steps", "2",
                  "--gan-steps", "2", "--batch-size", "8", "--device", "cpu", "--no-amp", "--log-every", "1",
                  "--out", str(tmp_path), "--data-dir", str(digits.parent / "data")])
    found = json.loads((tmp_path / "infogan-digits" / "results.json").read_text())
    assert found["settings"] == "paper" and found["all settings"]["experiment"] == name
    assert (tmp_path / "infogan-digits" / f"{FIRST_FIGURE[name]}.png").exists()


FIRST_FIGURE = {"mnist": "fig2a", "svhn": "fig5_c1", "celeba": "fig6_c1", "chairs": "fig4a",
                "chairs-width": "fig4b", "faces": "fig3_c1"}


def test_a_row_that_its_table_lacks_and_chairs_that_are_not_there_are_one_line(tmp_path):
    for words in (["--net", "chairs", "--factor", "lighting"], ["--factor", "azimuth"]):
        with pytest.raises(UserError, match="rotation or width of chairs"):
            settings(*words)
    with pytest.raises(UserError, match="unpack rendered_chairs.tar.*seeing3Dchairs.*--net chairs"):
        infogan.where(settings("--dataset", "chairs", "--data-dir", str(tmp_path)))
    (tmp_path / "rendered_chairs").mkdir()
    args = settings("--dataset", "chairs", "--data-dir", str(tmp_path))
    assert infogan.where(args) == str(tmp_path / "rendered_chairs") and args.net == "chairs"


# ------------------------------------------------------------------------------------- latents and networks


def test_latents_are_as_the_paper_has_them():
    torch.manual_seed(0)
    args = settings()
    z, c, u = sample_latent(20000, args)
    assert z.shape == (20000, 62) and c.shape == (20000, 1) and u.shape == (20000, 2)
    assert -1 <= u.min() < -0.99 and 0.99 < u.max() <= 1 and abs(u.var().item() - 1 / 3) < 0.01
    assert torch.bincount(c[:, 0], minlength=10).sub(2000).abs().max() < 250
    g = join(z, c, u, args)
    assert g.shape == (20000, 74)
    assert torch.equal(g[:, 62:72].argmax(1), c[:, 0]) and torch.equal(g[:, 72:], u)
    assert g[:, 62:72].sum(1).eq(1).all()


@pytest.mark.parametrize(
    "name, dim", [("mnist", 74), ("svhn", 168), ("celeba", 228), ("faces", 133), ("chairs", 189)]
)
def test_networks_have_the_papers_sizes(name, dim):
    args = settings("--net", name, fix_sigma=False)
    assert args.dz + sum(args.cats) + args.m == dim
    dq = sum(args.cats) + 2 * args.m
    G, D = networks(args)
    x = G(join(*sample_latent(4, args), args))
    assert x.shape == (4, args.channels, args.size, args.size)
    assert x.min() >= args.scale[0] and x.max() <= args.scale[1]
    a, q = D(x)
    assert a.shape == (4,) and q.shape == (4, dq)
    narrow, _ = networks(settings("--net", name, "--width", ".25"))
    assert narrow(join(*sample_latent(4, args), args)).shape == x.shape
    assert sum(p.numel() for p in narrow.parameters()) < 0.3 * sum(p.numel() for p in G.parameters())


def test_parameter_counts_of_table_1():
    G, D = networks(settings())
    count = lambda net: sum(p.numel() for p in net.parameters())
    bn = lambda n: 2 * n
    assert count(G) == (74 * 1024 + bn(1024) + 1024 * 6272 + bn(6272) + 128 * 64 * 16 + bn(64) + 64 * 16 + 1)
    assert count(D) == (
        64 * 16
        + 64
        + 64 * 128 * 16
        + bn(128)
        + 6272 * 1024
        + bn(1024)
        + 1025
        + 1024 * 128
        + bn(128)
        + 128 * 14
        + 14
    )


def test_a_convolution_of_stride_1_keeps_the_size_and_warns_of_nothing():
    conv, x = infogan.conv_1(3, 5), torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = conv(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(y, torch.nn.functional.conv2d(x, conv[1].weight, padding="same"))


def test_batchnorm_keeps_the_default_epsilon():
    nets = networks(settings())
    eps = {
        m.eps
        for net in nets
        for m in net.modules()
        if isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d))
    }
    assert eps == {1e-5}


# ---------------------------------------------------------------------------------------- who moves, where to


def built(**changes):
    torch.manual_seed(0)
    return infogan.build(settings(**changes))


def test_a_step_moves_both_networks_and_Q():
    G, D, _, _, step = built()
    before = {k: v.clone() for net in (G, D) for k, v in net.named_parameters()}
    scalars = step(torch.rand(16, 1, 28, 28))
    assert all(
        not torch.equal(before[k], v) for net in (G, D) for k, v in net.named_parameters() if v.ndim > 1
    )
    assert set(scalars) == {"V", "D(G(z))", "L_I", "L_I cont"} and all(v.ndim == 0 for v in scalars.values())


def test_one_step_of_G_raises_what_it_ascends():
    G, D, _, _, _ = built()
    args = settings()
    z, c, u = sample_latent(64, args)

    def value():
        a, q = D(G(join(z, c, u, args)))
        cat, cont = L_I(q, c, u, args)
        return infogan.log_D(a) + args.lam * cat + args.lam_cont * cont

    before = value()
    descend(-before, torch.optim.SGD(G.parameters(), lr=1e-3))
    assert value() > before


def gradient_of_trunk(**changes):
    """Whether D's trunk learns from L_I: its movement in one step with Q's last layer at zero and at
    random."""
    moved = []
    for scale in (0.0, 1.0):
        _, D, _, _, step = built(**changes)
        last = D.Q[-1]
        last.weight.data.mul_(scale * 50)
        before = D.trunk[0].weight.detach().clone()
        torch.manual_seed(1)
        step(torch.rand(16, 1, 28, 28))
        moved.append(D.trunk[0].weight.detach() - before)
    return not torch.equal(*moved)


def test_the_regular_GAN_learns_nothing_from_Q_and_InfoGAN_does():
    assert gradient_of_trunk()
    assert not gradient_of_trunk(lam=0.0, lam_cont=0.0)


def test_together_shares_the_batch_statistics():
    """The samples' logits depend on the data only where both pass D as one batch."""
    torch.manual_seed(0)
    _, D = networks(settings("--net", "faces"))
    x_fake = torch.rand(8, 1, 32, 32)
    for together in (True, False):
        args = settings("--net", "faces", noise=0.0, together=together)
        a = [infogan.D_sees(D, x, x_fake, args)[1] for x in torch.rand(2, 8, 1, 32, 32)]
        assert torch.equal(*a) is not together


def test_noise_on_what_D_sees():
    """With noise D judges the same pictures differently each time, without it alike."""
    _, D = networks(settings("--net", "faces"))
    x = torch.rand(2, 8, 1, 32, 32)
    for noise in (0.1, 0.0):
        args = settings("--net", "faces", noise=noise)
        a = [infogan.D_sees(D, *x, args) for _ in range(2)]
        assert all(torch.equal(*pair) is (noise == 0) for pair in zip(*a))


def test_D_sees_data_and_samples_warped(monkeypatch):
    """Both, and both alike."""
    seen = []
    monkeypatch.setattr(infogan.data, "warp", lambda x, amount, share: seen.append((len(x), amount)) or x)
    D = lambda x, detach=False: (x, x)
    infogan.D_sees(D, torch.zeros(3, 1, 28, 28), torch.ones(4, 1, 28, 28), settings())
    assert sorted(seen) == [(3, 1.0), (4, 1.0)]


def test_rates_fall_over_the_second_half_on_digits_alone():
    p = torch.nn.Parameter(torch.zeros(1))
    for name, fractions in (("mnist", (1, 1, 0.5, 0)), ("faces", (1, 1, 1, 1))):
        opts = [torch.optim.Adam([p], torch.tensor(9.0)) for _ in "DG"]
        args = settings("--net", name)
        for done, expected in zip((0, 0.5, 0.75, 1), fractions):
            infogan.decay_rates(args, *opts, done)
            found = [opt.param_groups[0]["lr"].item() for opt in opts]
            assert found == pytest.approx([expected * args.lr_D, expected * args.lr_G])


def test_fixed_sigma_makes_Q_a_regression():
    """With sigma 1, L_I rises by half the squared error that Q loses."""
    args = settings("--net", "faces", "--width", ".1")
    u, mu = torch.rand(2, 40, 5) * 2 - 1
    assert networks(args)[1].Q.out_features == 5 and torch.equal(split_q(mu, args)[1], mu)
    gain = L_I_cont(u, torch.zeros_like(u), u) - L_I(mu, torch.zeros(40, 0).long(), u, args)[1]
    assert gain.item() == pytest.approx(((u - mu) ** 2).sum(1).mean().item() / 2, abs=1e-6)


def test_the_regular_GANs_Q_is_fitted_all_the_same():
    _, D, _, _, step = built(lam=0.0, lam_cont=0.0)
    before = D.Q[-1].weight.detach().clone()
    step(torch.rand(16, 1, 28, 28))
    assert not torch.equal(before, D.Q[-1].weight)


def test_vary_changes_one_code_along_a_row():
    args = settings()
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, g):
            seen.append(g)
            return g

    for code, columns in ((0, slice(62, 72)), (1, slice(72, 73)), (2, slice(73, 74))):
        g = infogan.vary(Recorder(), args, code, rows=3).view(3, 10, 74)
        varied = torch.zeros(74, dtype=torch.bool)
        varied[columns] = True
        assert (g[:, :, ~varied] == g[:, :1, ~varied]).all()
        assert (g[:, 1:, varied] != g[:, :-1, varied]).any(2).all()
    assert g[0, 0, 73] == -2 and g[0, -1, 73] == 2


def test_vary_takes_categories_in_the_order_asked_for():
    class Recorder(torch.nn.Module):
        def forward(self, g):
            return g

    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    g = infogan.vary(Recorder(), settings(), 0, rows=2, order=order)
    assert g[:, 62:72].argmax(1).tolist() == order * 2


def bar(width, turn=0.0):
    """A bar 60 pixels long, `width` wide, leaning to the right by `turn` degrees, (1, 1, 96, 96)."""
    y, x = torch.meshgrid(*[torch.arange(-47.5, 48)] * 2, indexing="ij")
    a = torch.tensor(turn).deg2rad()
    across, along = x * a.cos() + y * a.sin(), x * a.sin() - y * a.cos()
    soft = lambda d, size: (size / 2 - d.abs() + 0.5).clamp(0, 1)
    return (soft(across, width) * soft(along, 60))[None, None]


def test_slant_and_stroke_width_of_a_bar():
    upright, leaning = bar(3), bar(3, 30.0)
    assert infogan.slant(bar(1, 45.0)).item() == pytest.approx(45, abs=0.5)
    assert infogan.slant(upright).item() == pytest.approx(0, abs=1e-3)
    assert infogan.slant(leaning).item() == pytest.approx(30, abs=0.5)
    assert infogan.slant(leaning.flip(3)).item() == pytest.approx(-30, abs=0.5)
    for width in (3, 6):
        for turn in (0.0, 30.0):
            assert infogan.stroke_width(bar(width, turn)).item() == pytest.approx(width, rel=0.12)
    assert infogan.slant(0 * upright).isfinite() and infogan.stroke_width(0 * upright).isfinite()


@pytest.mark.parametrize("turns, swells", [(1, 0), (0, 1), (0, 0)])
def test_figs_2c_and_2d_show_the_codes_that_found_rotation_and_width(turns, swells):
    """Codes in an order that training chooses: also where one of them does both."""
    class Bars(torch.nn.Module):
        def forward(self, g):
            u = g[:, -2:]
            return torch.cat([bar(4 + row[swells].item(), 10 * row[turns].item()) for row in u])

    found = infogan.style_codes(Bars(), settings())
    assert [(name, part["code"], part["figure"]) for name, part in found.items()] == [
        ("rotation", f"c{turns + 2}", "fig2c"), ("width", f"c{swells + 2}", "fig2d")]
    assert found["rotation"]["value"] == pytest.approx(40, rel=0.05)         # -20 to 20 degrees
    assert found["width"]["value"] == pytest.approx(4, rel=0.15)             # 2 to 6 pixels


def test_the_figures_vary_the_codes_that_were_found(tmp_path, monkeypatch):
    drawn = {}

    def vary(G, args, code, order=None):
        drawn["now"] = G, code, order
        return torch.zeros(100, 1, 28, 28)

    monkeypatch.setattr(infogan, "vary", vary)
    monkeypatch.setattr(infogan, "draw_fig1", lambda *_: None)
    r = Namespace(args=settings(), folder=tmp_path, aside=contextlib.nullcontext,
                  show=lambda title, _: drawn.update({title: drawn.get("now")}))
    results = {"ig-cls": {"value": 5, "labels": [1, 0, 3, 2, 5, 4, 7, -1, 9, 8]},
               "ig-mnist": {"value": 1, "rotation": {"code": "c3", "figure": "fig2c"},
                            "width": {"code": "c3", "figure": "fig2d"}}}
    infogan.figures(r, "G", "GAN", results)
    assert drawn["fig2a"] == ("G", 0, [1, 0, 3, 2, 5, 4, 6, 9, 8, 7])         # by digit, unused ones last
    assert drawn["fig2b"] == ("GAN", 0, None)
    assert drawn["fig2c"] == drawn["fig2d"] == ("G", 2, None) and drawn["fig2_c2"] == ("G", 1, None)


# ---------------------------------------------------------------------------------------------------- a run


def test_a_run_on_digits_draws_figures_and_writes_numbers(digits, tmp_path):
    words = ["--net", "mnist", "--steps", "16", "--gan-steps", "16", "--batch-size", "16", "--device", "cpu"]
    folders = "--dataset", digits, "--out", tmp_path, "--data-dir", digits.parent / "data"
    result = script("infogan.py", *words, *folders)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "infogan-digits"
    for figure in ("fig1", "fig2a", "fig2b", "fig2c", "fig2d", "samples"):
        assert len(np.unique(np.asarray(Image.open(folder / f"{figure}.png")))) > 3, figure
    results = json.loads((folder / "results.json").read_text())["results"]
    assert {"ig-mi", "ig-cls", "ig-mnist", "agreement", "frechet"} <= set(results)
    assert "paper" not in results["ig-cls"]                                 # another data set's number
    assert 0 <= results["ig-cls"]["value"] <= 100 and results["ig-mi"]["value"] <= math.log(10) + 1e-6


def test_real_chairs_come_from_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(infogan, "report", lambda *_: None)
    folder = tmp_path / "data" / "rendered_chairs"
    folder.mkdir(parents=True)
    for i, x in enumerate(np.random.default_rng(0).integers(0, 256, (6, 64, 64), dtype=np.uint8)):
        Image.fromarray(x).save(folder / f"{i}.png")
    shared = ["--data-dir", str(tmp_path / "data"), "--device", "cpu"]
    infogan.main(["--dataset", "chairs", "--width", ".02", "--steps", "1", "--batch-size", "2", "--gan-steps",
                  "0", "--out", str(tmp_path), *shared])
    run = tmp_path / "infogan-chairs"
    infogan.main(["--resume", str(run), "--sample", "2", "--real", *shared])
    assert len(list((run / "real").glob("*.png"))) == 2


def test_known_factors_are_matched_with_codes(tmp_path):
    rng = np.random.default_rng(0)
    factors = rng.uniform(-1, 1, (64, 4)).astype(np.float32)
    images = rng.integers(0, 256, (64, 1, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "heads.npz", images=images, factors=factors, factor_names=["a", "b", "c", "d"])
    infogan.main(["--dataset", str(tmp_path / "heads.npz"), "--net", "faces", "--out", str(tmp_path),
                  "--steps", "2", "--batch-size", "16", "--gan-steps", "0", "--log-every", "1",
                  "--device", "cpu"])
    folder = tmp_path / "infogan-heads"
    assert all((folder / f"fig3{letter}.png").exists() for letter in "abcd")
    found = json.loads((folder / "results.json").read_text())["results"]["ig-faces"]
    assert len({found[n]["code"] for n in "abcd"}) == 4 and 0 <= found["value"] <= 1


@pytest.mark.parametrize("factors, codes", [(4, 5), (5, 5), (1, 2), (7, 2), (40, 5)])
def test_factors_are_matched_at_the_largest_sum(monkeypatch, factors, codes):
    """Against brute force, where that ends."""
    rho = np.random.default_rng(factors).random((factors, codes))
    at = iter(rho.flatten())
    monkeypatch.setattr(infogan.metrics, "rank_correlation", lambda *_: -next(at))
    monkeypatch.setattr(infogan, "Q_of", lambda *_: None)
    monkeypatch.setattr(infogan, "split_q", lambda *_: (None, torch.zeros(9, codes), None))
    pictures = Namespace(images=torch.zeros(9), extra={"factors": torch.zeros(9, factors)})
    found = infogan.match_factors(None, pictures, Namespace(m=codes))
    assert len({i for i, _ in found.values()}) == len(found) == min(factors, codes)
    assert list(found) == sorted(found) and all(v == pytest.approx(rho[j, i]) for j, (i, v) in found.items())
    if factors < 40:
        few = rho if factors <= codes else rho.T
        best = max(few[range(len(few)), list(p)].sum()
                   for p in itertools.permutations(range(few.shape[1]), len(few)))
        assert sum(v for _, v in found.values()) == pytest.approx(best)


def test_more_factors_than_codes_keep_their_names(monkeypatch):
    factors = torch.rand(50, 4)
    factors[:, 0] = 1.0                                                         # a constant one
    monkeypatch.setattr(infogan, "Q_of", lambda *_: None)
    monkeypatch.setattr(infogan, "split_q", lambda *_: (None, factors[:, [3, 2]], None))
    pictures = Namespace(images=factors, extra={"factors": factors})
    found = infogan.match_factors(None, pictures, Namespace(m=2))
    assert {j: i for j, (i, _) in found.items()} == {2: 1, 3: 0}
    assert [rho for _, rho in found.values()] == pytest.approx([1, 1])


def test_lam_0_is_the_regular_gan():
    regular = settings("--dataset", "faces", "--lam", "0")
    assert regular.lam == regular.lam_cont == 0
    assert settings("--dataset", "faces", "--lam", "0", "--lam-cont", "2").lam_cont == 2


def test_a_category_stands_for_its_most_frequent_label(monkeypatch):
    """The lowest label of a tie; -1, and so an error, if no training picture has the category."""
    k = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 1, 2, 3])
    answers = iter(torch.nn.functional.one_hot(part, 4).float() for part in k)
    monkeypatch.setattr(infogan, "Q_of", lambda *_: next(answers))
    y, y_test = torch.tensor([7, 7, 3, 3, 5, 2]), torch.tensor([7, 3, 2, 0])
    pictures = infogan.data.Data("fake", k[0], y, k[1], y_test)
    table, error = infogan.classify(None, pictures, Namespace(cats=(4,)))
    assert table.tolist() == [7, 3, 2, -1] and error == 25


def test_ig_cls_error_is_zero_for_a_perfect_code_whatever_its_order():
    class Perfect(torch.nn.Module):
        def forward(self, x):
            k = (x[:, 0, 0, 0] * 255).round().long()
            return None, torch.nn.functional.one_hot((k + 3) % 10, 14).float()

    images = torch.zeros(200, 1, 28, 28, dtype=torch.uint8)
    y = torch.arange(200) % 10
    images[:, 0, 0, 0] = y.to(torch.uint8)
    pictures = infogan.data.Data("fake", images, y, images, y)
    table, error = infogan.classify(Perfect(), pictures, settings())
    assert error == 0 and table.tolist() == [(k - 3) % 10 for k in range(10)]

"""Text2image.py: sentences, equations against closed forms, who moves in which phase, figures, numbers."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image
from sklearn.metrics import adjusted_rand_score
from torch import nn

import text2image
from common import UserError, render
from common.fuse import descend, set_rate
from text2image import ALPHABET, L_D, L_G, L_joint, L_style, V, encode, remark

NARROW = ["--width", ".03", "--device", "cpu", "--no-views"]


def networks(*words):
    """The networks by name, with these flags."""
    a = text2image.parse_args(["--image-features", "own", *words])
    return dict(zip(("phi_t", "phi_v", "G", "D", "S"), text2image.networks(a)))


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


# -------------------------------------------------------------------------------------------------- sentences


def test_alphabet_and_symbols():
    assert len(ALPHABET) == 70 and len(set(ALPHABET)) == 69
    t = encode(["Ab- z", "é", "a" * 300])
    assert t.shape == (3, 201) and t.dtype == torch.uint8
    assert t[0, :5].tolist() == [1, 2, ALPHABET.rindex("-") + 1, 70, 26] and not t[0, 5:].any()
    assert t[1].eq(0).all() and t[2].eq(1).all()


def test_what_is_not_kept_of_sentences_is_said():
    assert remark(["A red circle, 2 blue boxes!"]) == remark([]) == ""
    assert remark(["a café", "a bar"]) == "read without é (not in the alphabet)"
    assert remark(["a" * 201 + "bcd", "a"]) == "1 cut after 201 characters"
    assert remark(["é" * 202]).endswith(" (not in the alphabet) and 1 cut after 201 characters")


@pytest.mark.parametrize("make", [render.shapes, render.scenes])
def test_all_captions_of_shapes_can_be_read(make):
    d = make(500, size=16)
    said = [c for part in ("captions", "test_captions") for five in d[part] for c in five]
    assert not remark(said) and max(map(len, said)) <= 201


@pytest.mark.parametrize("one, other", [
    ("красный круг", "синий квадрат, большой"), ("红色的圆", "蓝色的方"), ("a box", "A box."),
    ("a" * 300, "a" * 201 + "b")])
def test_captions_that_read_alike_are_refused(one, other, tiny, tmp_path):
    d = np.load(tiny)
    np.savez(tmp_path / "alike.npz", images=d["images"][:30], captions=np.array([one, other] * 15))
    with pytest.raises(UserError, match="captions that differ expected"):
        text2image.main([*NARROW, "--dataset", str(tmp_path / "alike.npz"), "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*/checkpoint.pt"))


def test_texts_that_are_all_but_alike_are_not_blown_up():
    torch.manual_seed(0)
    train = part()
    train.t = encode(["a red box"]).repeat(12, 5, 1)
    train.t[::2, :, 200] = 1                                                    # all that differs
    nets, _, steps = built(train=train)
    steps.set_scale()
    h = text2image.texts_of(nets.phi_t, train.t)
    assert 0 < h.std((0, 1)).mean() < 0.02 and h.square().mean().sqrt() <= 5.001


def test_mismatching_texts_have_other_content():
    torch.manual_seed(0)
    content = torch.tensor([0, 0, 1, 2, 2, 2])
    drawn = torch.stack([text2image.mismatched(content) for _ in range(200)])
    assert (content[drawn] != content).all()
    for i in range(6):
        assert set(drawn[:, i].tolist()) == set((content != content[i]).nonzero()[:, 0].tolist())
    assert text2image.mismatched(torch.zeros(3)).shape == (3,)


def test_interpolants():
    h = torch.arange(10.0)[:, None].expand(-1, 4)
    assert text2image.interpolate(h)[:, 0].tolist() == [2.5, 3.5, 4.5, 5.5, 6.5]
    assert torch.equal(text2image.interpolate(h, 1.0), h[:5])
    assert torch.equal(text2image.interpolate(h, 0.0), h[5:])
    assert text2image.interpolate(h[:7]).shape == (3, 4)


def test_views_are_parts_or_their_mirror_images():
    torch.manual_seed(0)
    x = torch.rand(24, 3, 67, 67)
    v = text2image.view(x)
    parts = x.unfold(2, 64, 1).unfold(3, 64, 1).flatten(2, 3).transpose(1, 2)            # (24, 16, 3, 64, 64)
    straight, mirrored = ((parts == y[:, None]).flatten(2).all(2).sum(1) for y in (v, v.flip(3)))
    assert (straight + mirrored == 1).all() and 4 < straight.sum() < 20
    assert text2image.view(x[..., :64, :64]).shape == (24, 3, 64, 64)
    assert torch.equal(text2image.view(x[..., 1:65, 2:66]), x[..., 1:65, 2:66])
    images = torch.arange(76, dtype=torch.uint8).expand(1, 3, 76, 76)
    middle = text2image.middle(images)
    assert middle.shape == (1, 3, 64, 64) and middle[0, 0, 0, 0] == pytest.approx(6 / 127.5 - 1)


# -------------------------------------------------------------------------------------------------- equations


def test_L_joint_against_a_double_loop():
    rng = np.random.default_rng(0)
    v, h, y = rng.normal(size=(7, 5)), rng.normal(size=(7, 5)), np.array([0, 1, 1, 2, 3, 4, 0])
    terms = [max(0, 1 + v[i] @ h[j] - v[i] @ h[i]) + max(0, 1 + v[j] @ h[i] - v[i] @ h[i])
             for i in range(7) for j in range(7) if y[i] != y[j]]
    given = [*map(torch.tensor, (v, h, y))]
    assert L_joint(*given).item() == pytest.approx(np.mean(terms), abs=1e-5)
    assert L_joint(torch.zeros(4, 3), torch.randn(4, 3), torch.arange(4)).item() == 2
    assert L_joint(9 * torch.eye(4), torch.eye(4), torch.arange(4)).item() == 0
    assert L_joint(torch.randn(4, 3), torch.randn(4, 3), torch.zeros(4)).item() == 0    # nothing mismatches


def test_scores_at_one_half():
    a = torch.zeros(5)
    assert V(a, a).item() == L_D(a, a, a).item() == pytest.approx(-math.log(4))
    assert L_G(a).item() == pytest.approx(-math.log(2))


def test_algorithm_1_against_numpy():
    rng = np.random.default_rng(1)
    r, w, f = rng.normal(size=(3, 40)) * 3
    s_r, s_w, s_f = map(sigmoid, (r, w, f))
    expected = (np.log(s_r) + (np.log(1 - s_w) + np.log(1 - s_f)) / 2).mean()
    r, w, f = map(torch.tensor, (r, w, f))
    assert L_D(r, w, f).item() == pytest.approx(expected, abs=1e-5)
    assert V(r, f).item() == pytest.approx((np.log(s_r) + np.log(1 - s_f)).mean(), abs=1e-5)
    assert L_G(f).item() == pytest.approx(np.log(s_f).mean(), abs=1e-5)
    big = torch.full((2,), 200.0)
    assert math.isfinite(L_D(-big, big, big).item()) and math.isfinite(L_G(-big).item())


def test_L_style_is_the_squared_distance():
    torch.manual_seed(0)
    z = torch.randn(4000, 100)
    assert L_style(z, z).item() == 0
    assert L_style(z, torch.zeros(4000, 100)).item() == pytest.approx(100, abs=1)
    assert L_style(torch.zeros(2, 3), torch.ones(2, 3)).item() == 3


# --------------------------------------------------------------------------------------------------- networks


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_networks_have_the_sizes_of_the_authors_code():
    nets = networks()
    bn = lambda n: 2 * n
    residual = lambda o, i: o * i + 9 * i * i + 9 * i * o + 2 * bn(i) + bn(o)
    text = 1024 * 128 + 128
    assert count(nets["G"]) == (text + 228 * 1024 * 16 + bn(1024) + residual(1024, 256) + 1024 * 512 * 16
                                + bn(512) + residual(512, 128) + 512 * 256 * 16 + bn(256) + 256 * 128 * 16
                                + bn(128) + 128 * 3 * 16)
    trunk = (3 * 64 * 16 + 64 * 128 * 16 + bn(128) + 128 * 256 * 16 + bn(256) + 256 * 512 * 16 + bn(512)
             + residual(512, 128))
    assert count(nets["D"]) == trunk + text + bn(128) + 640 * 512 + bn(512) + 512 * 16
    assert count(nets["S"]) == trunk + 512 * 16 * 100 + 100
    assert count(nets["phi_v"]) == trunk + 512 * 16 * 1024 + 1024
    assert count(nets["phi_t"]) == (70 * 384 * 4 + 384 + 384 * 512 * 4 + 512 + 512 * 256 * 4 + 256
                                    + 2 * (256 * 256 + 256) + 256 * 1024 + 1024)
    gru = networks("--phi-t", "gru")["phi_t"]                                   # FixedGRU.lua, cnn_dim 512
    assert count(gru) == (70 * 384 * 4 + 384 + 384 * 512 * 4 + 512 + 512 * 512 * 4 + 512
                          + 6 * (512 * 512 + 512) + 512 * 1024 + 1024)
    G = networks("--dataset", "coco")["G"].net
    maps = [m.out_channels for m in G if isinstance(m, nn.ConvTranspose2d)]
    assert maps == [196 * 4, 196 * 2, 196, 3] and G[0].out_features == 16 * 196 * 8     # train_coco.sh


def test_networks_begin_as_in_the_authors_code():
    nets, bound = networks(), 1024 ** -0.5
    for weight in (nets["G"].net[0].weight, nets["G"].net[4].weight, nets["D"].head[-2].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert nets["D"].trunk[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    for linear in (nets["G"].text[0], nets["D"].text[0]):                       # Unif(+-1 / sqrt(1024))
        assert linear.weight.abs().max() <= bound < 1.01 * linear.weight.abs().max()
        assert linear.bias.abs().max() > bound / 2
    assert all(0.07 < p.abs().max() <= 0.08 for p in networks("--phi-t", "gru")["phi_t"].parameters())


def test_the_gru_is_the_authors():
    """FixedGRU.lua, step by step in NumPy: no gates at first, then a reset before the product."""
    torch.manual_seed(0)
    phi_t = networks("--width", ".01", "--phi-t", "gru")["phi_t"]
    x = torch.randn(3, 18, phi_t.units)
    W = {k: v.detach().numpy() for k, v in phi_t.named_parameters()}
    linear = lambda name, v: v @ W[f"{name}.weight"].T + W[f"{name}.bias"]
    h = np.tanh(linear("into", x[:, 0].numpy()))
    for step in x[:, 1:].unbind(1):
        step = step.numpy()
        u = sigmoid(linear("update_into", step) + linear("update_on", h))
        r = sigmoid(linear("reset_into", step) + linear("reset_on", h))
        h = u * np.tanh(linear("into", step) + linear("on", r * h)) + (1 - u) * h
    with torch.no_grad():
        states = phi_t.recur(x)
        assert len(states) == 18 and np.allclose(states[-1].numpy(), h, atol=1e-5)
        t = encode(["a red circle"])
        mean = torch.stack(phi_t.recur(phi_t.convs(nn.functional.one_hot(t.long(), 71)[..., 1:].float()
                                                   .transpose(1, 2)).transpose(1, 2))).mean(0)
        assert torch.allclose(phi_t(t), phi_t.out(mean), atol=1e-6)


def test_shapes_and_ranges():
    nets = networks("--width", ".03")
    t = encode(["a red circle", "a blue box"])
    h, z = nets["phi_t"](t), torch.randn(2, 100)
    assert h.shape == (2, 1024) and nets["phi_t"].convs(torch.zeros(2, 70, 201)).shape[2] == 8
    x = nets["G"](z, h)
    assert x.shape == (2, 3, 64, 64) and x.abs().max() <= 1
    assert nets["S"](x).shape == (2, 100) and nets["phi_v"](x).shape == (2, 1024)
    D = nets["D"].eval()
    a, b, c = D(x, h), D(x, h.flip(0)), D(x, h, h.flip(0)[:1])
    assert a.shape == (2,) and torch.allclose(c, torch.cat([a, b[:1]]), atol=1e-6)
    eps = {m.eps for net in nets.values() for m in net.modules() if isinstance(m, nn.BatchNorm2d)}
    assert eps == {1e-5}


def test_the_text_network_reads_letters_and_their_order():
    phi_t = networks("--width", ".1")["phi_t"]
    h = phi_t(encode(["red above blue", "blue above red", "red above blue."]))
    assert (h[0] - h[1]).abs().max() > 1e-4 and (h[0] - h[2]).abs().max() > 1e-5
    assert torch.allclose(h[:1], phi_t(encode(["Red above blue"])), atol=1e-6)


def test_googlenets_features_are_frozen(monkeypatch):
    from torchvision import models

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 1024, 1), nn.BatchNorm2d(1024), nn.Linear(1024, 9)

        def forward(self, x):
            assert x.shape[2:] == (224, 224)
            return self.fc(self.bn(self.conv(x.mean((2, 3), keepdim=True))).flatten(1))

    monkeypatch.setattr(models, "googlenet", lambda **_: Net())
    phi_v = networks("--width", ".03", "--image-features", "googlenet")["phi_v"]
    assert phi_v(torch.zeros(2, 3, 64, 64)).shape == (2, 1024)
    assert not phi_v.net.bn.training and not any(p.requires_grad for p in phi_v.parameters())

    def offline(**_):
        raise OSError("no network")

    monkeypatch.setattr(models, "googlenet", offline)
    with pytest.raises(UserError, match="no network.*leave out --image-features"):
        networks("--width", ".03", "--image-features", "googlenet")


def test_residual_adds_its_branch():
    block = text2image.Residual(4, 8, nn.ReLU())
    block.branch[-1].weight.data.zero_()
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x.relu())


# ---------------------------------------------------------------------------------------- who moves, where to


def part(n=12):
    d = render.shapes(n)
    t = torch.stack([encode(five) for five in d["captions"]])
    return text2image.Part(d["images"], d["captions"], t, torch.arange(n), d["attributes"], d["style"])


def built(*words, train=None):
    torch.manual_seed(0)
    a = text2image.parse_args([*NARROW, "--image-features", "own", *words])
    a.device, a.amp, a.compile, a.graph = "cpu", False, False, False
    return text2image.build(a, train or part())


def moved(step, nets):
    def state():
        return {f"{name}.{k}": v.clone() for name, net in vars(nets).items()
                for k, v in net.state_dict().items()}

    before = state()
    x = torch.rand(12, 3, 64, 64) * 2 - 1
    scalars = step(x, torch.arange(12))
    assert all(v.ndim == 0 and v.isfinite() for v in scalars.values())
    after = state()
    return {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}, scalars


def test_each_phase_moves_its_own_networks():
    nets, _, steps = built()
    assert moved(steps.encoder, nets)[0] == {"phi_t", "phi_v"}
    steps.set_scale()
    assert moved(steps.gan, nets)[0] == {"G", "D", "G_bar"}
    assert moved(steps.style, nets)[0] == {"S"}                                  # not G's averages either
    assert [int(getattr(nets, k).t) for k in ("phi_t", "G", "S")] == [1, 1, 1]


def test_texts_are_scaled_to_the_spread_that_G_begins_with():
    nets, _, steps = built()
    steps.set_scale()
    h = text2image.texts_of(nets.phi_t, part().t)
    assert h.std((0, 1)).mean().item() == pytest.approx(0.05, rel=1e-4)
    steps.set_scale()                                                                     # again: no further
    assert torch.allclose(text2image.texts_of(nets.phi_t, part().t), h)
    nets, _, steps = built("--paper", "--dataset", "shapes")
    steps.set_scale()
    assert nets.phi_t.scale == 1                                                # h as phi_t gives it


def test_G_bar_gets_batchnorm_statistics_of_its_own():
    nets, _, steps = built("--average", ".999")
    steps.set_scale()
    for _ in range(3):
        moved(steps.gan, nets)
    norm = nets.G_bar.net[2]
    assert torch.equal(norm.running_var, nets.G.net[2].running_var)
    steps.settle()
    z, h = torch.randn(600, 100), text2image.texts_of(nets.phi_t, part().t).flatten(0, 1)
    before = nets.G_bar.net[:2](torch.cat([z, nets.G_bar.text(h.repeat(10, 1))], 1))
    assert torch.allclose(norm.running_var, before.var((0, 2, 3)), rtol=0.2)
    assert not torch.equal(norm.running_var, nets.G.net[2].running_var)


def test_the_rate_of_the_encoders_falls_over_the_second_half_of_their_steps():
    _, opts, _ = built()
    tuned, paper = (text2image.parse_args(words) for words in ([], ["--paper", "--dataset", "birds"]))
    for left, share in ((1, 1), (0.5, 1), (0.25, 0.5), (0, 0)):
        assert text2image.phi_rate(tuned, left) == pytest.approx(3e-4 * share)
        assert text2image.phi_rate(paper, left) == pytest.approx(7e-4 * 0.98 ** (200 * (1 - left)))
        set_rate(opts.opt_phi, text2image.phi_rate(tuned, left))
        assert all(g["lr"].item() == pytest.approx(3e-4 * share) for g in opts.opt_phi.param_groups)


def test_rmsprop_is_torchs():
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(4, 3))
    b = nn.Parameter(a.detach().clone())
    mine, theirs = text2image.RMSprop([a], 7e-4), torch.optim.RMSprop([b], 7e-4, alpha=0.99, eps=1e-8)
    for _ in range(5):
        x = torch.randn(3)
        descend((a @ x).square().sum(), mine)
        theirs.zero_grad()
        (b @ x).square().sum().backward()
        theirs.step()
    assert torch.allclose(a, b, atol=1e-6)


def test_end_to_end_phi_t_learns_along_with_D():
    """GAN-E2E of the supplement: by D's objective alone, without an encoder's phase."""
    nets, opts, steps = built("--e2e", "--variant", "int-cls")
    assert moved(steps.gan, nets)[0] == {"G", "D", "G_bar", "phi_t"}
    learnt = {id(p) for group in opts.opt_D.param_groups for p in group["params"]}
    assert learnt == {id(p) for net in (nets.D, nets.phi_t) for p in net.parameters()}
    steps.set_scale()
    assert nets.phi_t.scale == 1


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_D_sees_pictures_under_noise(noise):
    """Data and samples alike, in both updates."""
    nets, _, steps = built("--noise", str(noise))
    steps.set_scale()
    x, seen = torch.zeros(12, 3, 64, 64), []
    nets.D.register_forward_pre_hook(lambda net, given: seen.append(given[0].detach()))
    drawn = []
    nets.G.register_forward_hook(lambda net, given, out: drawn.append(out.detach()))
    steps.gan(x, torch.arange(12))
    for both, fake in zip(seen, (drawn[0][:12], drawn[0])):
        added = both.float() - torch.cat([x, fake.float()])
        spread = [part.std().item() for part in (added[:12], added[12:])]
        assert spread == pytest.approx([noise] * 2, abs=4e-3)
    assert len(seen) == 2


@pytest.mark.parametrize("variant, texts, keys", [
    ("gan", 12, {"V", "L_G", "s_r", "s_f"}), ("cls", 12, {"L_D", "L_G", "s_r", "s_f", "s_w"}),
    ("int", 18, {"V", "L_G", "s_r", "s_f"}), ("int-cls", 18, {"L_D", "L_G", "s_r", "s_f", "s_w"})])
def test_variants(variant, texts, keys):
    nets, _, steps = built("--variant", variant)
    steps.set_scale()
    asked, judged, a = [], [], []
    nets.G.register_forward_pre_hook(lambda net, given: asked.append(len(given[1])))
    nets.D.register_forward_pre_hook(
        lambda net, given: judged.append([0 if h is None else len(h) for h in given]))
    nets.D.register_forward_hook(lambda net, given, out: a.append(out.detach()))
    scalars = moved(steps.gan, nets)[1]
    assert set(scalars) == keys
    wrong = 12 if "cls" in variant else 0           # D sees no samples of interpolated texts
    assert asked == [texts] and judged == [[24, 24, wrong], [12 + texts, 12 + texts, 0]]
    r, f, w = a[0].split([12, 12, wrong])
    assert torch.equal(scalars["L_D" if wrong else "V"], L_D(r, w, f) if wrong else V(r, f))


@pytest.mark.parametrize("cls", [True, False])
def test_D_sees_three_batches_in_the_papers_settings(cls):
    """Real pictures with their texts, with wrong ones, samples: each normalized by itself."""
    nets, _, steps = built("--paper", "--dataset", "shapes", "--variant", "int-cls" if cls else "int")
    steps.set_scale()
    judged, scalars = [], {}
    nets.D.register_forward_hook(lambda net, given, out: judged.append((*given, out.detach())))
    scalars = moved(steps.gan, nets)[1]
    sizes = [len(given[0]) for given in judged]
    assert sizes == ([12, 12, 12, 18] if cls else [12, 12, 18])                 # G's: 12 texts, 6 between
    (x, h, r), (_, h_wrong, w), (_, h_fake, f) = judged[0], judged[1 if cls else 0], judged[-2]
    assert torch.equal(h, h_fake) and torch.equal(judged[-1][1][:12], h)
    assert torch.equal(judged[-1][1][12:], (h[:6] + h[6:]) / 2)
    if cls:
        assert torch.equal(x, judged[1][0])                                     # the same views
        assert (torch.cdist(h_wrong, h).amin(1) < 1e-4).all() and not (h_wrong == h).all(1).any()
    assert torch.equal(scalars["L_D" if cls else "V"], L_D(r, w, f) if cls else V(r, f))


# P: the paper's section.  Else a file of the authors' code, github.com/reedscot/icml2016 and cvpr2016.
PUBLISHED = {
    "variant": {"birds": "int-cls", "flowers": "int-cls", "coco": "cls"},       # scripts/train_*.sh
    "beta": 0.5,                                                                # P Sec. 4.3
    "batch_size": 64, "lr_D": 2e-4, "lr_G": 2e-4,                                # P Sec. 5
    "views": True,                                                              # P Sec. 5
    "ngf": {"birds": 128, "flowers": 128, "coco": 196}, "ndf": {"birds": 64, "flowers": 64, "coco": 196},
    "together": False, "noise": 0.0, "h_std": 0.0, "average": 0.0,  # main_cls_int.lua has none
    "image_features": "googlenet",                                              # P Sec. 5
    # train_cub_hybrid.sh, train_flowers_hybrid.sh, train_sje_hybrid.lua; train_coco_txt.sh
    "opt_phi": {"birds": "rmsprop", "flowers": "rmsprop", "coco": "adam"},
    "lr_phi": {"birds": 7e-4, "flowers": 7e-4, "coco": 2e-4},
    "drops": {"birds": (0.98, 200), "flowers": (0.98, 200), "coco": (0.5, 4)},
    # CONFIG: ..._hybrid_gru18_a1_c512_..._iter30000, ..._hybrid_..._iter16400, coco_gru18_..._c512
    "phi_t": {"birds": "gru", "flowers": "rnn", "coco": "gru"},
    # 200 epochs of 150 and 82 classes; 600 (P Sec. 5) and 200 (train_coco.sh) of all pictures, batches of 64
    "encoder_steps": {"birds": 30000, "flowers": 16400, "coco": 200 * math.ceil(82783 / 64)},
    "steps": {"birds": 600 * math.ceil(8855 / 64), "flowers": 600 * math.ceil(7034 / 64),
              "coco": 200 * math.ceil(82783 / 64)},
}


def test_the_papers_settings():
    for name in ("birds", "flowers", "coco"):
        paper = dict(text2image.PAPER[name])
        assert paper.pop("style_steps") > 0                                     # S: nothing is published
        assert paper == {k: v[name] if isinstance(v, dict) else v for k, v in PUBLISHED.items()}
    assert text2image.PAPER["scenes"] == text2image.PAPER["shapes"]             # sets of ours
    shapes, birds = text2image.PAPER["shapes"], text2image.PAPER["birds"]
    assert {k for k in birds if shapes[k] != birds[k]} == {"phi_t", "image_features", "views"}
    for words, name in ((["--dataset", "data/birds"], "birds"), (["--dataset", "x/flowers.npz"], "flowers"),
                        (["--dataset", "coco"], "coco"), ([], "scenes"), (["--dataset", "shapes"], "shapes")):
        a = text2image.parse_args([*words, "--paper"])
        assert a.experiment == name and a.settings == "paper"
        assert {k: getattr(a, k) for k in text2image.PAPER[name]} == text2image.PAPER[name]
        a = text2image.parse_args([*words, "--lr-G", "1e-3"])
        assert a.settings == "tuned" and a.lr_G == 1e-3
        assert a.together and a.noise == 0.1 and a.image_features == "own" and a.variant == "cls"


def test_other_steps_shorten_the_other_phases_too(folder):
    def phases(*words):
        a = text2image.parse_args([*words])
        return a.encoder_steps, a.steps, a.style_steps

    assert phases() == (5000, 20000, 2000) and phases("--steps", "2") == (1, 2, 1)
    assert phases("--steps", "2000") == (500, 2000, 200)
    assert phases("--steps", "2000", "--style-steps", "0", "--encoder-steps", "7") == (7, 2000, 0)
    assert phases("--steps", "834", "--paper", "--dataset", "birds") == (300, 831 + 3, 20)
    quick = text2image.QUICK["scenes"]
    assert phases("--quick") == tuple(quick[k] for k in ("encoder_steps", "steps", "style_steps"))
    assert phases("--quick", "--steps", str(quick["steps"] // 2))[0] == quick["encoder_steps"] // 2
    assert phases("--resume", str(folder), "--steps", "40") == (2, 40, 2)        # those of the run


def test_one_step_of_G_raises_what_it_ascends():
    nets, *_ = built()
    G, D = nets.G, nets.D
    z, h = torch.randn(16, 100), torch.randn(16, 1024)
    before = L_G(D(G(z, h), h))
    descend(-before, torch.optim.SGD(G.parameters(), lr=1e-3))
    assert L_G(D(G(z, h), h)) > before


def test_the_encoders_learn_to_match():
    _, _, steps = built("--width", ".1")
    train = part()
    x = text2image.middle(train.images)
    loss = [steps.encoder(x, torch.arange(12))["L_joint"].item() for _ in range(40)]
    assert np.mean(loss[-5:]) < 0.7 * np.mean(loss[:5])


# ---------------------------------------------------------------------------------------------------- numbers


def test_classify_is_eq_3():
    y = torch.tensor([5, 5, 2, 2, 9])
    one_hot = nn.functional.one_hot(y).float()
    assert text2image.classify(one_hot, one_hot, y) == 1
    v = one_hot.clone()
    v[0] = v[2]                                                                 # one of five is taken for a 2
    assert text2image.classify(v, one_hot, y) == pytest.approx(0.8)
    h = torch.tensor([[1.0, 0], [0, 3], [1, 1], [1, 1], [-1, -1]])              # means (.5, 1.5), (1, 1) ...
    assert text2image.classify(torch.tensor([[0.0, 1]] * 5), h, y) == pytest.approx(0.4)


def test_agreement_of_each_kind():
    attributes, counts = torch.tensor([[0, 1, 2], [1, 0, 0]]), [2, 2, 3]
    a = torch.cat([nn.functional.one_hot(c, k) for c, k in zip(attributes.T, counts)], 1).float()
    names = ["size 1", "size 2", "shape 1"]
    perfect = text2image.agreement(a, attributes, counts, names)
    assert perfect == {"value": 100, "size": 100, "shape": 100, "least": 100, "all": 100}
    a[0, :2] = a[0, :2].flip(0)                                                 # one of four sizes wrong
    assert text2image.agreement(a, attributes, counts, names) == {
        "value": 87.5, "size": 75, "shape": 100, "least": 75, "all": 50}
    attributes[0, 0] = -1                                                       # which does not count
    assert text2image.agreement(a, attributes, counts, names) == perfect


def test_order_compares_two_objects_with_the_same_two_exchanged():
    names, counts = ["size 1", "shape 1", "size 2", "shape 2", "relation"], [2, 3, 3, 4, 3]
    attributes = torch.tensor([[0, 1, 1, 2, 1], [1, 0, 0, 0, 2], [1, 2, -1, -1, 0]])
    a = torch.cat([nn.functional.one_hot(c.clamp(min=0), k) for c, k in zip(attributes.T, counts)], 1).float()
    assert text2image.order(a, attributes, counts, names) == {"order": 100}
    exchanged = torch.tensor([[1, 2, 0, 1, 1]])
    a[0] = torch.cat([nn.functional.one_hot(c, k) for c, k in zip(exchanged.T, counts)], 1).float()
    assert text2image.order(a, attributes, counts, names) == {"order": 50}  # the third has one object
    assert text2image.order(a[2:], attributes[2:], counts, names) == {}
    assert text2image.order(a[:, :5], attributes[:, :2], counts[:2], ["size 1", "tint"]) == {}


def test_area_under_the_curve():
    area = lambda same, other: text2image.roc(torch.tensor(same), torch.tensor(other))[0]
    assert area([2.0, 3], [0.0, 1]) == 1 and area([0.0], [0.0, 1]) == 0.25
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=30).round(1), rng.normal(size=50).round(1)
    expected = np.mean((a[:, None] > b) + (a[:, None] == b) / 2)
    found, curve = text2image.roc(torch.tensor(a), torch.tensor(b))
    assert found == pytest.approx(expected)
    assert np.mean((curve[1:] + curve[:-1]) / 2) == pytest.approx(expected, abs=5e-3)
    assert text2image.roc(torch.tensor([2.0, 3]), torch.tensor([0.0, 1]))[1].tolist() == [1] * 201
    assert text2image.roc(torch.ones(2), torch.ones(3), 3)[1].tolist() == [0, 0.5, 1]


def test_style_verification():
    torch.manual_seed(0)
    angle = torch.rand(400) * 2 * math.pi
    style = torch.stack([angle.cos(), angle.sin()], 1)
    for f, low, high in ((style, 0.97, 1), (torch.randn(400, 9), 0.45, 0.55)):
        area, curve = text2image.verify(f, style)
        assert low < area <= high and np.mean((curve[1:] + curve[:-1]) / 2) == pytest.approx(area, abs=5e-3)
    assert text2image.verify(style[:4], style[:4])[0] == 0                      # no pair in any fold
    y = text2image.clusters(torch.tensor([[0.0], [0.1], [5], [5.1], [5.2]]), 2)
    assert y[0] == y[1] != y[2] == y[3] == y[4]
    assert len(text2image.clusters(torch.ones(6, 2), 3)) == 6                   # nothing to tell apart


def test_clusters_are_found_whatever_the_seed():
    for seed in range(20):
        torch.manual_seed(seed)
        y = torch.arange(3).repeat_interleave(40)
        x = torch.tensor([[0.0, 0], [9, 0], [0, 9]])[y] + torch.randn(120, 2) + 1e3
        assert adjusted_rand_score(y, text2image.clusters(x, 3)) == 1


def test_lines_between():
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    line = text2image.between(a, b, 5)
    assert line.shape == (2, 5, 3) and line[0, :, 0].tolist() == [0, 0.25, 0.5, 0.75, 1]


# ------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An .npz of captioned shapes with attributes and style."""
    d = render.shapes(200)
    path = tmp_path_factory.mktemp("tiny") / "tiny.npz"
    del d["attribute_values"]
    np.savez(path, **{k: v.numpy() if torch.is_tensor(v) else np.array(v) for k, v in d.items()})
    return path


def test_parts(tiny, tmp_path):
    a = text2image.parse_args([*NARROW, "--dataset", str(tiny)])
    _, train, test = text2image.parts_of(a)
    assert train.images.shape == (200, 3, 64, 64) and test.t.shape == (40, 5, 201) and test.t.max() <= 70
    same = (train.content[:, None] == train.content)
    assert torch.equal(same, (train.attributes[:, None] == train.attributes).all(2))
    d = np.load(tiny)
    np.savez(tmp_path / "plain.npz", images=d["images"][:30], captions=d["captions"][:30])
    a.dataset = str(tmp_path / "plain.npz")
    _, train, test = text2image.parts_of(a)                                     # the last tenth is held out
    assert len(train.images) == 27 and len(test.captions) == 3 and train.content.tolist() == list(range(27))
    np.savez(tmp_path / "partly.npz", images=d["images"][:30], captions=d["captions"][:30],
             labels=np.where(np.arange(30) < 20, -1, np.arange(30) % 2))
    a.dataset = str(tmp_path / "partly.npz")
    content = text2image.parts_of(a)[1].content             # a picture without a label is a class of its own
    assert len(content.unique()) == (content < 0).sum() + 2
    np.savez(tmp_path / "one.npz", images=d["images"][:30], captions=d["captions"][:30, 0])
    a.dataset = str(tmp_path / "one.npz")                                       # a sentence a picture
    train = text2image.parts_of(a)[1]
    i = next(i for i in range(30) if np.array_equal(d["images"][i], train.images[1]))
    assert train.captions[1] == [d["captions"][i, 0]]
    for extra, line in (({"attributes": d["attributes"][:20]}, "attributes has 20 rows for 30 pictures"),
                        ({"captions": [*d["captions"][:29, 0], " "]}, "a picture without a caption found")):
        np.savez(tmp_path / "wrong.npz", images=d["images"][:30], **{"captions": d["captions"][:30]} | extra)
        a.dataset = str(tmp_path / "wrong.npz")
        with pytest.raises(UserError, match=line):
            text2image.parts_of(a)
    np.savez(tmp_path / "bare.npz", images=d["images"][:30])
    a.dataset = str(tmp_path / "bare.npz")
    with pytest.raises(UserError, match="no captions: expected scenes, shapes, coco"):
        text2image.parts_of(a)


def test_no_held_out_class_is_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    for c in ("a", "b", "c", "d"):
        for i in range(3):
            for folder, end in (("images", "png"), ("text_c10", "txt")):
                (tmp_path / "birds" / folder / c).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(
                tmp_path / "birds" / "images" / c / f"{c}{i}.png")
            (tmp_path / "birds" / "text_c10" / c / f"{c}{i}.txt").write_text("a bird\n" * (i + 1))
    a = text2image.parse_args(["--dataset", str(tmp_path / "birds"), "--data-dir", str(tmp_path)])
    _, train, test = text2image.parts_of(a)
    assert set(train.content.tolist()) == {0, 1, 2} and set(test.content.tolist()) == {3}
    assert train.images.shape == (9, 3, 76, 76) and train.t.shape == (9, 3, 201)


def test_captions_that_differ_in_one_word():
    names = "colour 1", "shape 1", "colour 2"
    values = [["red", "blue"], ["box", "star"], ["red", "blue", "none"]]
    captions = [[f"a {c} {s} on {g}"] for c in values[0] for s in values[1] for g in ("sand", "grass")] * 5
    t = text2image.encode(c for c, in captions)
    images = torch.arange(len(t), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)
    test = text2image.Part(images, captions, t[:, None], None, None, None)

    class Reader(nn.Module):
        scale = 1.0

        def __init__(self, blind=""):
            super().__init__()
            self.unseen = text2image.encode([blind])[0, :len(blind)].long()

        def forward(self, t):                               # how often each letter occurs
            h = torch.nn.functional.one_hot(t.long(), 71).sum(1).float()
            h[:, self.unseen] = 0
            return torch.nn.functional.normalize(h, dim=1)

    def score(phi_t, sign=1):
        def phi_v(x):                                       # knows the caption of its picture
            return sign * phi_t(t)[((x[:, 0, 0, 0] + 1) * 127.5).round().long()]

        nets, v = SimpleNamespace(phi_t=phi_t), text2image.on_pictures(phi_v, images)
        return text2image.one_word(nets, test, v, names, values)

    assert score(Reader()) == {"value": 100.0, "colour": 100.0, "shape": 100.0}
    assert score(Reader(), -1)["value"] == 0
    assert score(Reader("redblu")) == {"value": 75.0, "colour": 50.0, "shape": 100.0}
    captions = [[f"{caption} above a tree"] for caption, in captions]
    t = text2image.encode(c for c, in captions)
    test = text2image.Part(images, captions, t[:, None], None, None, None)
    assert score(Reader()) == {"value": 100.0, "colour": 100.0, "shape": 100.0, "order": 100.0}
    assert score(Reader("abovelw"))["order"] == 50
    nets, v = SimpleNamespace(phi_t=Reader()), torch.zeros(len(t), 71)
    assert text2image.one_word(nets, test, v, (), ()) == {}


# ------------------------------------------------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def folder(tiny):
    """A run of a few steps: its folder."""
    words = [*NARROW, "--dataset", tiny, "--out", tiny.parent, "--data-dir", tiny.parent, "--batch-size", 8]
    steps = ["--encoder-steps", 2, "--steps", 4, "--style-steps", 2, "--log-every", 1]
    result = script("text2image.py", *words, *steps)
    assert result.returncode == 0, result.stderr
    return tiny.parent / "text2image-tiny"


def test_a_run_draws_figures_and_writes_numbers(folder):
    for figure in ("fig3", "fig5a", "fig5b", "fig6", "fig8a", "fig8b", "samples"):
        assert len(np.unique(np.asarray(Image.open(folder / f"{figure}.png")))) > 30, figure
    results = json.loads((folder / "results.json").read_text())["results"]
    assert {"retrieval", "t2i-agreement", "frechet", "t2i-pose-roc", "t2i-bg-roc"} == set(results)
    assert not any("paper" in entry for entry in results.values())              # shapes are not birds
    assert "half of the held-out pictures teach the judge" in results["t2i-agreement"]["unit"]
    agreement = results["t2i-agreement"]
    assert {"size", "colour", "shape", "texture", "relation", "background", "all"} < set(agreement)
    assert agreement["ceiling"]["background"] > agreement["background"]
    assert 0 <= results["t2i-bg-roc"]["value"] <= 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [next(k for k in line if k.startswith("L_")) for line in lines] == \
        ["L_joint"] * 2 + ["L_D"] * 4 + ["L_style"] * 2
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]
    fresh = networks("--width", ".03")
    assert all(not torch.equal(state[name]["out.weight" if name == "phi_t" else k], v)
               for name, k in (("G", "text.0.weight"), ("D", "text.0.weight"), ("S", "0.0.weight"))
               for v in [fresh[name].state_dict()[k]])


def test_prompts(folder, capsys):
    before = (folder / "checkpoint.pt").read_bytes()
    text2image.main(["--resume", str(folder), "--n", "3", "--prompt", "a red circle above a blue box",
                     "--prompt", "über"])
    out = capsys.readouterr().out
    assert "prompts: read without ü (not in the alphabet)" in out
    assert "2 rows of 3 pictures" in out
    assert Image.open(folder / "prompts.png").size[0] == 3 * 66 + 2
    assert (folder / "checkpoint.pt").read_bytes() == before
    for unread in ("", " !?", "красный круг"):
        with pytest.raises(UserError, match="has none of the letters and digits that phi_t reads"):
            text2image.main(["--resume", str(folder), "--prompt", unread])
    for words in ([], ["--resume", str(folder), "--export", str(folder / "g.pt2")]):
        with pytest.raises(SystemExit):
            text2image.main([*words, "--prompt", "a red circle"])


def test_another_runs_encoder_and_generator(folder, tiny, tmp_path, capsys):
    words = [*NARROW, "--dataset", str(tiny), "--out", str(tmp_path), "--data-dir", str(tiny.parent)]
    small = ["--batch-size", "8", "--steps", "1", "--style-steps", "0", "--variant", "gan", "--name", "gan"]
    text2image.main([*words, *small, "--encoder", str(folder)])
    run = tmp_path / "text2image-tiny-gan"
    a, b = (torch.load(f / "checkpoint.pt", weights_only=True)["parts"] for f in (folder, run))
    assert all(torch.equal(v, b["phi_t"][k]) for k, v in a["phi_t"].items())
    assert not (run / "fig6.png").exists() and (run / "fig3.png").exists()
    text2image.main(["--resume", str(folder), "--beside", str(run)])
    out = capsys.readouterr().out
    assert f"two samples each of {folder.name}, {run.name}" in out and f", {run.name} 0." in out
    assert f"t2i-bg-roc {folder.name} 0." in out
    assert Image.open(folder / "beside.png").size[0] == 5 * 66 + 2 and (folder / "beside_fig5b.png").exists()
    with pytest.raises(UserError, match="of these sizes: a text2image run with the --width"):
        text2image.main([*words[2:], "--width", ".1", "--name", "x", "--encoder", str(folder)])
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        text2image.main([*words, "--name", "y", "--encoder", str(tmp_path / "none")])


@pytest.mark.parametrize("experiment, more", [("shapes", ()), ("birds", ()), ("flowers", ("--e2e",)),
                                              ("coco", ())])
def test_the_papers_settings_run(experiment, more, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text2image, "experiment", lambda args: experiment)
    monkeypatch.setattr(text2image, "GoogLeNet", lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(16), nn.Flatten(), nn.Linear(768, 1024, bias=False)).requires_grad_(False))
    text2image.main([*NARROW, "--paper", "--dataset", str(tiny), "--out", str(tmp_path), "--data-dir",
                     str(tiny.parent), "--batch-size", "8", "--encoder-steps", "2", "--steps", "2",
                     "--style-steps", "1", *more])
    out = capsys.readouterr().out
    assert ("held-out pairs: " in out) == (not more)
    report = json.loads((tmp_path / "text2image-tiny" / "results.json").read_text())
    assert report["settings"] == "paper" and report["step"] == (3 if more else 5)
    assert ("retrieval" in report["results"]) == (not more)


def test_resumed_steps_equal_uninterrupted_ones(tiny, tmp_path):
    common = [*NARROW, "--dataset", str(tiny), "--out", str(tmp_path), "--data-dir", str(tiny.parent),
              "--batch-size", "8", "--encoder-steps", "2", "--style-steps", "0"]
    text2image.main([*common, "--name", "a", "--steps", "4"])
    text2image.main([*common, "--name", "b", "--steps", "2"])
    text2image.main(["--resume", str(tmp_path / "text2image-tiny-b"), "--steps", "4"])
    a, b = (torch.load(tmp_path / f"text2image-tiny-{k}" / "checkpoint.pt", weights_only=True) for k in "ab")
    assert a["step"] == b["step"] == 6 and int(b["parts"]["G"]["t"]) == 4
    for name in ("phi_t", "phi_v", "G", "D", "S", "G_bar"):
        assert all(torch.equal(v, b["parts"][name][k]) for k, v in a["parts"][name].items()), name

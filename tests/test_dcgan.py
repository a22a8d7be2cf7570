"""dcgan.py: equations against closed forms, networks against the paper's sizes, who moves, latent arithmetic,
features and their SVM, guided backpropagation, figures and numbers."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from conftest import script, untrained
from PIL import Image
from torch import nn

import dcgan
from common import UserError, render
from common.fuse import descend
from dcgan import PAPER, V, a_minus_b_plus_c, log_D, log_p, pick_exemplars, sample_z, turn, walk


def args(*words):
    a = dcgan.parse_args(["--device", "cpu", *map(str, words)])
    a.amp = a.compile = a.graph = False
    return a


def networks(name, channels, width=1.0):
    return dcgan.networks(args("--net", name, "--width", width), channels)


MAPS = {"64": (128, 256, 512, 1024), "imagenet": (128, 128, 256, 256, 512, 512), "svhn": (64, 128, 256)}


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


# ---------------------------------------------------------------------------------------------- equations


def test_V_and_log_D_at_one_half():
    assert V(torch.zeros(5), torch.zeros(5)).item() == pytest.approx(-math.log(4))
    assert log_D(torch.zeros(5)).item() == pytest.approx(-math.log(2))


def test_objectives_against_numpy():
    a, b = np.random.default_rng(0).normal(size=(2, 50)) * 3
    expected = np.log(sigmoid(a)).mean() + np.log(1 - sigmoid(b)).mean()
    assert V(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(expected, abs=1e-5)
    assert log_D(torch.tensor(b)).item() == pytest.approx(np.log(sigmoid(b)).mean(), abs=1e-5)
    assert math.isfinite(V(torch.tensor([200.0]), torch.tensor([200.0])).item())


def test_log_p_of_a_concept():
    names = ["smile", "beard", "hat"]
    assert log_p(torch.zeros(2, 3), "smile -beard", names).tolist() == pytest.approx([-2 * math.log(2)] * 2)
    a = np.random.default_rng(1).normal(size=(20, 3))
    expected = np.log(sigmoid(a[:, 2])) + np.log(1 - sigmoid(a[:, 0]))
    np.testing.assert_allclose(log_p(torch.tensor(a), "hat -smile", names).numpy(), expected, atol=1e-6)
    both = 100 * ((a[:, 2] > 0) & (a[:, 0] < 0)).mean()
    assert dcgan.percent(torch.tensor(a), "hat -smile", names) == pytest.approx(both)


def test_arithmetic_is_A_minus_B_plus_C_of_means():
    v = torch.randn(30, 4)
    picks = [torch.randint(30, (5, 3)) for _ in range(3)]
    expected = np.stack([v[a].numpy().mean(0) - v[b].numpy().mean(0) + v[c].numpy().mean(0)
                         for a, b, c in zip(*picks)])
    np.testing.assert_allclose(a_minus_b_plus_c(v, picks).numpy(), expected, atol=1e-6)
    torch.testing.assert_close(a_minus_b_plus_c(v, [picks[0], picks[1], picks[1]]), v[picks[0]].mean(1))
    assert a_minus_b_plus_c(torch.rand(30, 3, 8, 8), picks).shape == (5, 3, 8, 8)


def test_turn_goes_along_the_difference_of_means():
    z, left, right = torch.randn(2, 6), torch.randn(4, 6), torch.randn(4, 6)
    path = turn(z, left, right, columns=5)
    assert path.shape == (2, 5, 6) and torch.equal(path[:, 2], z)
    torch.testing.assert_close(path[:, 4] - path[:, 2], (right.mean(0) - left.mean(0)).expand(2, -1))


def test_walk_passes_through_every_z():
    z = torch.randn(4, 6)
    path = walk(z, columns=7).view(3, 7, 6)
    torch.testing.assert_close(path[:, 0], z[:-1])
    torch.testing.assert_close(path[:, -1], z[1:])
    torch.testing.assert_close(path[:, 3], (z[:-1] + z[1:]) / 2)


def test_exemplars_are_among_the_best():
    score = torch.randperm(500).float()
    picks = pick_exemplars(score, 40, 3)
    assert picks.shape == (40, 3) and score[picks[0]].tolist() == [499, 498, 497]
    assert score[picks].min() >= 470 and all(len(set(row)) == 3 for row in picks.tolist())
    assert len({tuple(sorted(row)) for row in picks.tolist()}) > 30


# ------------------------------------------------------------------------------------- latents and networks


def test_latents_are_as_the_paper_has_them():
    torch.manual_seed(0)
    z = {name: sample_z(2000, args("--net", name)) for name in ("64", "imagenet", "svhn")}
    assert [z[name].shape[1] for name in ("64", "imagenet", "svhn")] == [100, 256, 100]
    assert z["64"].abs().max() <= 1 and abs(z["imagenet"].var().item() - 1 / 3) < 0.01
    assert z["svhn"].abs().max() > 3 and abs(z["svhn"].var().item() - 1) < 0.02


def bn(*maps):
    return 2 * sum(maps)


@pytest.mark.parametrize("name, g, d", [
    ("64", 100 * 16384 + bn(16384) + 25 * (1024 * 512 + 512 * 256 + 256 * 128 + 128 * 3) + bn(512, 256, 128),
     25 * (3 * 128 + 128 * 256 + 256 * 512 + 512 * 1024) + bn(256, 512, 1024) + 16384),
    ("imagenet", 256 * 8192 + bn(8192) + bn(512, 256, 256, 128, 128)
     + 9 * (512 * 512 + 512 * 256 + 256 * 256 + 256 * 128 + 128 * 128 + 128 * 3),
     9 * (3 * 128 + 128 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512) + 8192
     + bn(128, 256, 256, 512, 512)),
    ("svhn", 100 * 4096 + bn(4096) + 25 * (256 * 128 + 128 * 64 + 64 * 3) + bn(128, 64),
     25 * (3 * 64 + 64 * 128 + 128 * 256) + bn(128, 256) + 4096),
])
def test_parameter_counts_of_the_papers_networks(name, g, d):
    assert [sum(p.numel() for p in net.parameters()) for net in networks(name, 3)] == [g, d]


@pytest.mark.parametrize("name, grids", [
    ("64", [32, 16, 8, 4]), ("imagenet", [32, 16, 16, 8, 8, 4]), ("svhn", [16, 8, 4])])
def test_shapes_of_every_convolution(name, grids):
    a = args("--net", name)
    for channels, width in ((3, 0.0625), (1, 0.125)):
        G, D = networks(name, channels, width)
        x = G(sample_z(2, a))
        assert x.shape == (2, channels, a.size, a.size) and -1 <= x.min() and x.max() <= 1
        assert D(x).shape == (2,)
        h, sides = x, []
        for convolution, maps in zip(D[0], MAPS[name]):
            h = convolution(h)
            sides.append(h.shape[-1])
            assert h.shape[1] == max(8, round(width * maps))
        assert sides == grids
        h, sides = G[0](sample_z(2, a)), []
        for row in G[1:]:
            sides.append(h.shape[-1])
            h = row(h)
        assert sides == grids[::-1]


@pytest.mark.parametrize("size, maps", [
    (32, (256, 512, 1024)), (128, (64, 128, 256, 512, 1024)), (256, (32, 64, 128, 256, 512, 1024))])
def test_other_sizes_have_a_row_for_each_doubling(size, maps):
    a = args("--size", size, "--width", 0.25)
    G, D = dcgan.networks(a, 3)
    with torch.no_grad():
        x = G(sample_z(2, a))
        assert x.shape == (2, 3, size, size) and D(x).shape == (2,) and D[0](x).shape == (2, 256, 4, 4)
    assert [row[0].out_channels for row in D[0]] == [n // 4 for n in maps]
    assert [row[0].in_channels for row in G[1:]] == [n // 4 for n in reversed(maps)]


def test_the_rows_of_64_are_those_of_its_size():
    """What is written out for the paper's size is what other sizes are made by."""
    torch.manual_seed(0)
    written = dcgan.net_64(100, 3, lambda n: n // 16)
    torch.manual_seed(0)
    made = dcgan.net_of_size(64, 100, 3, lambda n: n // 16)
    for one, two in zip(written, made):
        one, two = one.state_dict(), two.state_dict()
        assert list(one) == list(two) and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("net", ["imagenet", "svhn"])
def test_other_networks_have_one_size(net):
    assert args("--net", net, "--size", 32).size == 32
    with pytest.raises(SystemExit):
        args("--net", net, "--size", 64)


def test_where_batchnorm_is_and_how_weights_start():
    torch.manual_seed(0)
    G, D = networks("64", 3, 0.25)
    kinds = [[type(m) for m in row] for row in (*D[0], *G)]
    assert [nn.BatchNorm2d in k or nn.BatchNorm1d in k for k in kinds] == [False, *[True] * 7, False]
    assert not any(name.endswith("bias") and p.any() for net in (G, D) for name, p in net.named_parameters())
    weight = D[0][3][0].weight
    assert abs(weight.std().item() - 0.02) < 1e-3 and D[0][0][-1].negative_slope == 0.2
    assert {m.eps for net in (G, D) for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}


@pytest.mark.parametrize("row, values", [
    # Newmu/dcgan_code: faces/train_uncond_dcgan.py (k = 1 in turn, l2, b1, nbatch, lr, niter = 25, ntrain),
    # lib/ops.py (e = 1e-8, batch statistics)
    ("64", {"net": "64", "size": 64, "dz": 100, "normal": False, "batch_size": 128, "lr": 2e-4,
            "weight_decay": 1e-5, "eps": 1e-8, "batch_stats": True,
            "scale": (-1.0, 1.0), "steps": round(25 * 350_000 / 128 / 2, -3)}),
    # Sec. 4.1: five epochs of about 3 million less 275,000 duplicates (3,033,042 bedrooms in the data set)
    ("lsun", {"net": "64", "dz": 100, "batch_size": 128, "lr": 2e-4,
              "steps": round(5 * (3_033_042 - 275_000) / 128 / 2, -2)}),
    # imagenet/load_pretrained.py (nz, 30_gen_params of 30 epochs); 1,281,167 pictures
    ("imagenet", {"net": "imagenet", "size": 32, "dz": 256, "normal": False, "batch_size": 128, "lr": 2e-4,
                  "steps": round(30 * 1_281_167 / 128 / 2, -4)}),
    # the name of the released networks: 100z_gaussian_lr_0.0005_64mb/200_gen_params; 73,257 pictures
    ("svhn", {"net": "svhn", "size": 32, "dz": 100, "normal": True, "batch_size": 64, "lr": 5e-4,
              "weight_decay": 1e-5, "eps": 1e-8, "steps": round(200 * 73_257 / 64 / 2, -3)}),
])
def test_the_papers_settings(row, values):
    assert {k: PAPER[row][k] for k in values} == values


@pytest.mark.parametrize("dataset, name", [
    ("faces", "64"), ("lsun", "lsun"), ("some/folder", "64"), ("svhn", "svhn"), ("mnist", "svhn"),
    ("cifar10", "imagenet"), ("imagenet", "imagenet")])
def test_every_data_set_has_its_networks(dataset, name):
    a = args("--dataset", dataset)
    assert a.experiment == name
    assert all(getattr(a, k) == v for k, v in (PAPER[name] | dcgan.TUNED[name]).items())
    assert all(PAPER[name][k] != v for k, v in dcgan.TUNED[name].items()), "an entry of TUNED is PAPER's own"
    a = args("--dataset", dataset, "--paper")
    assert all(getattr(a, k) == v for k, v in PAPER[name].items())


def test_an_npz_file_gets_networks_by_its_pictures(tmp_path, digits):
    assert args("--dataset", digits).net == "svhn"
    for size, name in ((32, "imagenet"), (40, "64")):
        np.savez(tmp_path / "x.npz", images=np.zeros((2, 3, size, size), np.uint8))
        assert args("--dataset", tmp_path / "x.npz").net == name


# ---------------------------------------------------------------------------------------- who moves, where to


def built(*words):
    torch.manual_seed(0)
    return dcgan.build(args("--net", "svhn", "--width", 0.125, *words), 3)


def test_each_descent_moves_its_own_network(monkeypatch):
    G, D, _, _, step = built()
    moved = []

    def watched(loss, opt):
        before = [[p.detach().clone() for p in net.parameters()] for net in (D, G)]
        descend(loss, opt)
        moved.append([[not torch.equal(*pair) for pair in zip(b, net.parameters())]
                      for b, net in zip(before, (D, G))])

    monkeypatch.setattr(dcgan, "descend", watched)
    scalars = step(torch.rand(8, 3, 32, 32) * 2 - 1)
    (first_D, first_G), (second_D, second_G) = moved
    assert all(first_D) and not any(first_G) and all(second_G) and not any(second_D)
    assert set(scalars) == {"V", "D(x)", "D(G(z))"} and all(v.ndim == 0 for v in scalars.values())


def test_adam_is_the_papers():
    _, _, opt_D, opt_G, _ = built()
    for opt, lr in ((opt_D, 5e-4), (opt_G, 5e-4), (built("--lr", "1e-3")[2], 1e-3)):
        group = opt.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (lr, (0.5, 0.999), 1e-5)


def test_one_step_of_G_raises_log_D():
    G, D, _, _, _ = built()
    z = sample_z(32, args("--net", "svhn"))
    before = log_D(D(G(z)))
    descend(-before, torch.optim.SGD(G.parameters(), lr=1e-3))
    assert log_D(D(G(z))) > before


def test_one_step_of_D_raises_V():
    G, D, _, _, _ = built()
    x, x_fake = torch.rand(32, 3, 32, 32), G(sample_z(32, args("--net", "svhn"))).detach()
    before = V(D(x), D(x_fake))
    descend(-before, torch.optim.SGD(D.parameters(), lr=1e-3))
    assert V(D(x), D(x_fake)) > before


def test_a_picture_is_a_function_of_its_z_alone():
    """BatchNorm's running statistics, which drawing leaves as they are; of the batch's own, none is."""
    G, _, _, _, _ = built()
    for a in (args("--net", "svhn"), args("--net", "svhn", "--batch-stats")):
        z, buffers = sample_z(6, a), [b.clone() for b in G.buffers()]
        same = torch.allclose(dcgan.decode(G, z, a)[:2], dcgan.decode(G, z[:2], a), atol=1e-6)
        assert same is not a.batch_stats
        assert all(torch.equal(*pair) for pair in zip(buffers, G.buffers())) and G.training


def test_batch_statistics_are_those_of_the_batch():
    """Drawn with them, pictures are what G in training mode makes of the same batch, half of it fresh z."""
    G, _, _, _, _ = built()
    a = args("--net", "svhn", "--batch-stats", "--batch-size", 8)
    z = sample_z(6, a)
    torch.manual_seed(1)
    x = dcgan.decode(G, z, a)
    torch.manual_seed(1)
    parts = [(part, sample_z(4, a)) for part in (z[:4], z[4:])]
    with torch.no_grad():
        expected = torch.cat([G(torch.cat(pair))[:len(pair[0])] for pair in parts])
    torch.testing.assert_close(x, expected)


# ---------------------------------------------------------------------------- the authors' released networks


def released(folder):
    """Arrays of the shapes and in the order of Newmu/dcgan_code's SVHN networks, an eighth as wide."""
    rng = np.random.default_rng(0)
    shapes = {"discrim": [(8, 3, 5, 5), (16, 8, 5, 5), (16,), (16,), (32, 16, 5, 5), (32,), (32,), (512, 1)],
              "gen": [(100, 512), (512,), (512,), (32, 16, 5, 5), (16,), (16,), (16, 8, 5, 5), (8,), (8,),
                      (8, 3, 5, 5)]}
    arrays = {part: [rng.normal(size=s).astype(np.float32) for s in each] for part, each in shapes.items()}
    for part, each in arrays.items():
        for i, a in enumerate(each, 1):
            np.save(folder / f"200_{part}_params.jl_{i:02d}.npy", a)
    return arrays


def test_released_networks_convolve_as_theano_does(tmp_path):
    """Theano's convolution turns its kernels, and G's is the adjoint of such a one."""
    from scipy import signal
    arrays, (G, D) = released(tmp_path), networks("svhn", 3, 0.125)
    dcgan.read_released(tmp_path, "gen", G)
    dcgan.read_released(tmp_path, "discrim", D)

    def convolve(x, w):                                     # border 2, every second pixel
        x = np.pad(x, ((0, 0), (2, 2), (2, 2)))
        return np.stack([sum(signal.convolve2d(a, b, "valid") for a, b in zip(x, each)) for each in w])[
            :, ::2, ::2]

    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(3, 32, 32)), rng.normal(size=(8, 16, 16))
    with torch.no_grad():
        h = D[0][0][0](torch.tensor(x, dtype=torch.float32)[None])[0].numpy()
        g = G[-1][0](torch.tensor(y, dtype=torch.float32)[None])[0].numpy()
        np.testing.assert_allclose(h, convolve(x, arrays["discrim"][0]), rtol=1e-3, atol=1e-3)
        assert (g * x).sum() == pytest.approx((convolve(x, arrays["gen"][-1]) * y).sum(), rel=1e-3)
        z = torch.randn(2, 100)
        np.testing.assert_allclose(G[0][0](z).numpy(), z.numpy() @ arrays["gen"][0], rtol=1e-3, atol=1e-3)
        v = torch.randn(2, 512)
        np.testing.assert_allclose(D[2](v).numpy(), v.numpy() @ arrays["discrim"][-1], rtol=1e-3, atol=1e-3)


def test_released_networks_become_a_run(tmp_path, capsys):
    arrays = released(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (150, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    words = ["--dataset", tmp_path / "x.npz", "--net", "svhn", "--width", 0.125, "--weights", tmp_path,
             "--batch-size", 16, "--device", "cpu", "--out", tmp_path]
    dcgan.main([*map(str, words)])
    folder = tmp_path / "dcgan-x"
    parts = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]
    assert torch.equal(parts["D"]["0.1.1.weight"], torch.from_numpy(arrays["discrim"][2]))
    assert not torch.equal(parts["G"]["1.1.running_mean"], torch.zeros(16))
    dcgan.main(["--resume", str(folder), "--sample", "2"])
    assert len(list((folder / "samples").glob("*.png"))) == 2
    (tmp_path / "200_gen_params.jl_10.npy").unlink()
    with pytest.raises(UserError, match="10 files .*gen_params.* found 9"):
        dcgan.main([*map(str, words), "--name", "again"])
    np.save(tmp_path / "200_gen_params.jl_10.npy", np.zeros((8, 1, 5, 5)))
    with pytest.raises(UserError, match=r"shape \(8, 3, 5, 5\)"):
        dcgan.main([*map(str, words), "--name", "third"])


# --------------------------------------------------------------------------------- Sec. 4.1: near-duplicates


def heads_and_copies(n=400, copies=60):
    """n rendered heads, copies of the first, and the same with a pixel changed: uint8 (n + 2 copies, ...)."""
    images = render.faces(n=n, size=32)["images"]
    near = images[:copies].clone()
    near[:, :, 0, 0] ^= 8
    return torch.cat([images, images[:copies], near])


def test_near_duplicates_share_their_hash_and_others_do_not():
    torch.manual_seed(0)
    codes = dcgan.hashes(heads_and_copies(), "cpu", steps=60)
    kept = dcgan.first_of_each(codes)
    assert codes.shape == (520, 16) and (kept[1:] > kept[:-1]).all()
    assert not ((kept >= 400) & (kept < 460)).any()         # every copy goes
    assert (kept >= 460).sum() <= 12                        # four of five of those that are nearly one
    assert (kept < 400).sum() >= 396                        # and 1 % of the others at most
    codes = torch.tensor([[1] * 16, [2] * 16, [1] * 16], dtype=torch.uint8)
    assert dcgan.first_of_each(codes).tolist() == [0, 1]


@pytest.mark.parametrize("resident", [True, False])
def test_minibatches_of_a_subset_visit_it_alone_and_resume(resident):
    images = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    kept = torch.arange(0, 40, 3)                           # 14 of 40
    feed = dict(batch_size=7, scale=(0.0, 255.0), resident=resident)
    batches = dcgan.Subset(images, kept, **feed)
    seen = [next(batches)[:, 0, 0, 0] for _ in range(batches.per_epoch)]
    assert batches.per_epoch == 2 and torch.equal(torch.cat(seen).sort().values, kept.float())
    other = dcgan.Subset(images, torch.arange(40), **feed)
    other.load_state_dict(batches.state_dict())
    assert all(torch.equal(next(batches), next(other)) for _ in range(5)) and other.per_epoch == 2
    with pytest.raises(UserError, match="at least 7 pictures without near-duplicates, found 5"):
        dcgan.Subset(images, kept[:5], **feed)
    with pytest.raises(UserError, match="number of pictures is 40, that of this run 30"):
        dcgan.Subset(images[:30], torch.arange(30), **feed).load_state_dict(batches.state_dict())


def test_a_run_without_duplicates_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(dcgan, "report", lambda *_: None)
    np.savez(tmp_path / "twice.npz", images=heads_and_copies(60, 15).numpy())
    hashes = dcgan.hashes
    monkeypatch.setattr(dcgan, "hashes", lambda *words: hashes(*words, steps=20))
    words = ("--dataset", tmp_path / "twice.npz", "--net", "svhn", "--width", 0.05, "--steps", 3,
             "--batch-size", 8, "--deduplicate", "--device", "cpu", "--out", tmp_path)
    dcgan.main([*map(str, words)])
    path = tmp_path / "dcgan-twice" / "checkpoint.pt"
    before = torch.load(path, weights_only=True)["parts"]["batches"]
    assert before["n"] == 90 and 50 <= len(before["kept"]) < 75
    monkeypatch.setattr(dcgan, "hashes", lambda *_: pytest.fail("hashed again"))
    dcgan.main(["--resume", str(path.parent), "--steps", "5"])
    after = torch.load(path, weights_only=True)["parts"]["batches"]
    assert torch.equal(before["kept"], after["kept"]) and after["position"] == 5


# ------------------------------------------------------------------------------------ Sec. 5: features, SVM


@pytest.mark.parametrize("name, d", [("imagenet", 28672), ("svhn", 7168)])
def test_features_have_the_papers_size(name, d):
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    D = networks(name, 3)[1].eval()
    assert dcgan.features(D, images, "cpu").shape == (2, d)


def test_features_are_every_convolutions_largest_in_each_of_16_cells():
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    D = networks("svhn", 3, 0.125)[1].eval()
    f = dcgan.features(D, images, "cpu").float().numpy()
    h, start = dcgan.scaled(images, "cpu"), 0
    for convolution in D[0]:
        h = convolution(h).detach()
        n, maps, side, _ = h.shape
        cells = h.numpy().reshape(n, maps, 4, side // 4, 4, side // 4).max((3, 5)).reshape(n, -1)
        np.testing.assert_allclose(f[:, start:start + 16 * maps], cells, rtol=1e-3, atol=1e-4)
        start += 16 * maps
    assert start == f.shape[1]


def test_batchnorm_gets_the_mean_of_all_minibatches():
    images = torch.randint(256, (256, 3, 32, 32), dtype=torch.uint8)
    D = dcgan.data_statistics(networks("svhn", 3, 0.125)[1], images, "cpu")
    with torch.no_grad():
        h = [D[0][1][0](D[0][0](dcgan.scaled(x, "cpu"))) for x in images.split(128)]
    layer = D[0][1][1]
    assert not D.training
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in h]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([x.var((0, 2, 3)) for x in h]).mean(0))


def test_balanced_draws_as_many_of_each_label():
    y, rows = torch.arange(90) % 3, torch.arange(60)
    picked = dcgan.balanced(y, rows, 7)
    assert torch.bincount(y[picked]).tolist() == [7, 7, 7]
    assert picked.max() < 60 and len(picked.unique()) == 21
    assert torch.equal(dcgan.balanced(y, rows, None), rows)


def blobs(n=200, d=12, classes=4, seed=0):
    """Overlapping Gaussians, so that some slacks are active and some are not."""
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    x = rng.normal(size=(classes, d))[y] + 1.5 * rng.normal(size=(n, d))
    return torch.from_numpy(x), torch.from_numpy(y)


def numpy_objective(w, x, y, C):
    """Value (classes,) and gradient (d + 1, classes), from the definition."""
    X, w = np.hstack([x.double().numpy(), np.ones((len(x), 1))]), w.double().numpy()
    values, gradients = [], []
    for j in range(w.shape[1]):
        t = np.where(y.numpy() == j, 1.0, -1.0)
        slack = np.maximum(0, 1 - t * (X @ w[:, j]))
        values.append(0.5 * w[:, j] @ w[:, j] + C * (slack ** 2).sum())
        gradients.append(w[:, j] - 2 * C * X.T @ (t * slack))
    return np.array(values), np.stack(gradients, 1)


def test_svm_closed_form():
    x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    for C in (0.01, 1.0, 10.0):
        w_1 = 4 * C / (1 + 4 * C)
        expected = torch.tensor([[-w_1, w_1], [0, 0]], dtype=torch.float64)
        torch.testing.assert_close(dcgan.l2_svm(x, y, C, tol=1e-12), expected, rtol=1e-6, atol=1e-6)


PROBLEMS = pytest.mark.parametrize("problem", [{}, {"n": 60, "d": 300}, {"n": 40, "d": 40, "classes": 2}])


@PROBLEMS
@pytest.mark.parametrize("C", [1e-4, 1e-2, 1.0])
def test_svm_gradient_vanishes(problem, C):
    x, y = blobs(**problem)
    for tol in (1e-4, 1e-10):
        w = dcgan.l2_svm(x.float(), y, C, tol)
        value, gradient = numpy_objective(w, x.float(), y, C)
        assert ((gradient ** 2).sum(0) / 2 <= 1.01 * tol * value).all()
    for seed in range(5):  # the minimum, as no weights nearby are better
        nearby = w + 0.01 * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
        assert (numpy_objective(nearby, x.float(), y, C)[0] > value).all()


@PROBLEMS
@pytest.mark.parametrize("C", [1e-3, 1.0])
def test_svm_equals_scikit_learn(problem, C):
    from sklearn import svm
    x, y = blobs(**problem)
    theirs = svm.LinearSVC(C=C, dual=False, tol=1e-6, max_iter=10000).fit(x.numpy(), y.numpy())
    their_w = torch.from_numpy(np.vstack([theirs.coef_.T, theirs.intercept_]))
    if their_w.shape[1] == 1:  # of two classes it fits the second alone; the first is its mirror image
        their_w = torch.cat([-their_w, their_w], 1)
    their_value = numpy_objective(their_w, x, y, C)[0]
    for tol, atol, odd in ((1e-4, 2e-2, 0.01), (1e-10, 2e-3, 0.0)):
        w = dcgan.l2_svm(x, y, C, tol)
        np.testing.assert_allclose(numpy_objective(w, x, y, C)[0], their_value, rtol=max(tol, 1e-5))
        torch.testing.assert_close(w, their_w, rtol=0, atol=atol * their_w.abs().max().item())
        assert (dcgan.svm_predict(w, x).numpy() != theirs.predict(x.numpy())).mean() <= odd


def test_svm_predicts_the_largest_logit():
    x, y = blobs(classes=3)
    w = dcgan.l2_svm(x, y)
    a = np.hstack([x.numpy(), np.ones((len(x), 1))]) @ w.numpy()
    assert np.array_equal(dcgan.svm_predict(w, x).numpy(), a.argmax(1))
    assert (dcgan.svm_predict(w, x) == y).double().mean() > 0.6
    shifted = w.clone()
    shifted[-1, 2] += 1e6  # the last row is b
    assert (dcgan.svm_predict(shifted, x) == 2).all()


@pytest.mark.parametrize("problem", [{"n": 2100, "d": 20}, {"n": 60, "d": 300}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_svm_of_many_features_in_float32(problem, dtype, monkeypatch):
    x, y = blobs(**problem)
    x, exact = x.to(dtype), dcgan.l2_svm(x.to(dtype), y, 1e-2)
    monkeypatch.setattr(dcgan, "SINGLE", 1000)
    w = dcgan.l2_svm(x, y, 1e-2)
    assert w.dtype == torch.float64 and 0 < (w - exact).abs().max() < 1e-2 * exact.abs().max()
    value, gradient = numpy_objective(w, x, y, 1e-2)
    assert ((gradient ** 2).sum(0) / 2 <= 1.01e-4 * value).all()


def test_svm_says_when_it_did_not_converge():
    with pytest.warns(UserWarning, match="l2_svm: up to .* above the minimum"):
        dcgan.l2_svm(*blobs(), tol=0)


def test_svm_tells_clusters_apart_and_chooses_C_by_validation():
    torch.manual_seed(0)
    centres = torch.randn(3, 20) * 2
    y, y_test = torch.arange(240) % 3, torch.arange(60) % 3
    X, X_test = centres[y] + torch.randn(240, 20), centres[y_test] + torch.randn(60, 20)
    errors, C = dcgan.svm_errors(X, y, X_test, y_test)
    assert errors.shape == (1,) and errors.item() < 5 and C in dcgan.CS
    errors, _ = dcgan.svm_errors(X, y, X_test, y_test, per_class=4, draws=3, tries=2)
    assert errors.shape == (3,) and errors.mean() < 10
    y = (torch.arange(240) % 6).clamp(max=2)                # mostly 2, which is all that a tiny C predicts
    X = centres[y] + 3 + torch.randn(240, 20)
    _, C = dcgan.svm_errors(X, y, X_test, y_test, Cs=(1e-9, 1e-2))
    assert C == 1e-2


# ---------------------------------------------------------------------------------- Sec. 6: figures measured


def test_guided_keeps_positive_gradients_at_positive_inputs():
    x = torch.tensor([-2.0, -1.0, 1.0, 2.0], requires_grad=True)
    y = dcgan.Guided.apply(x)
    torch.testing.assert_close(y, nn.functional.leaky_relu(x, 0.2))
    y.backward(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert x.grad.tolist() == [0, 0, 1, 0]


def test_guided_backpropagation_stays_within_the_units_field_of_view():
    torch.manual_seed(0)
    D = networks("svhn", 3, 0.125)[1].eval()
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    g = dcgan.guided(D, x, 2)
    with torch.no_grad():
        at = divmod(D[0](x)[0, 2].argmax().item(), 4)
    assert g.abs().max() > 0
    for i, rows in zip(at, (g.abs().amax((0, 1, 3)), g.abs().amax((0, 1, 2)))):
        seen = rows.nonzero().flatten()
        assert seen.min() >= 8 * i - 14 and seen.max() <= 8 * i + 14


def test_forget_drops_the_maps_that_make_it(monkeypatch):
    """Pictures are bright where map 0 is on; a "predictor" calls the bright ones."""
    class Bright(nn.Module):
        def forward(self, h):
            return h[:, :1].repeat(1, 1, 4, 4)

    monkeypatch.setattr(dcgan.metrics, "logits", lambda clf, x: x.mean((1, 2, 3))[:, None] - 0.75)
    z, z_new = torch.rand(200, 48), torch.rand(100, 48)
    G = nn.Sequential(nn.Unflatten(1, (3, 4, 4)), nn.ReLU(), Bright(), nn.Identity())
    has, z_new = z[:, :16].mean(1) > 0.5, z_new[z_new[:, :16].mean(1) > 0.5]
    result, rows = dcgan.forget(G, args("--net", "svhn"), z, has, z_new, None, ["glasses"], "glasses")
    assert result["value"] == 0 and 1 <= result["maps"] <= 3 and rows.shape == (30, 1, 16, 16)
    assert torch.equal(rows[:10], G(z_new[:10]))            # judged on pictures the regression has not seen


@pytest.mark.parametrize("strength, low, high", [(1e-3, 0, 0.1), (30, 90, 100)])
def test_a_turn_counts_by_the_azimuths_that_it_covers(monkeypatch, strength, low, high):
    """A predictor that finds azimuth in the mean of z: the order is right however little it turns."""
    def logits(clf, x):
        return strength * (2 * x - 1).mean((1, 2, 3))[:, None]

    monkeypatch.setattr(dcgan.metrics, "logits", logits)
    G, z = nn.Unflatten(1, (1, 4, 4)), torch.rand(500, 16) * 2 - 1
    result, _ = dcgan.turning(G, args("--net", "svhn"), None, ["azimuth"], z, logits(None, (G(z) + 1) / 2))
    assert result["value"] == pytest.approx(1) and low <= result[dcgan.COVERED] <= high


@pytest.mark.parametrize("rho, covered, sums, width, passed", [
    (0.99, 3, 0, 0.1, False), (0.82, 60, 80, 1, True), (0.82, 60, 0, 1, False), (0.98, 78, 11, 0.125, True),
    (0.5, 60, 80, 1, False)])
def test_check_asks_for_turned_heads_and_sums(rho, covered, sums, width, passed):
    results = {"dcgan-turn": {"value": rho, dcgan.COVERED: covered}, "dcgan-arith-2": {"value": sums}}
    assert dcgan.passes(results, argparse.Namespace(width=width)) is passed


def test_exemplars_by_eye(tmp_path):
    path = tmp_path / "picks.json"
    path.write_text('{"left": [0, 1, 2, 3], "right": [4, 5, 6, 1999]}')
    picks = dcgan.read_exemplars(path)
    assert set(picks) == {"left", "right"} and picks["right"].tolist() == [[4, 5, 6, 1999]]
    for bad in ('{"left": [0, 1, 2, 3]}', '{"A": [1, 2, 3], "B": [1, 2, 3], "C": [1, 2]}', "[1]", "{", "{}",
                '{"left": [0, 1, 2, 2000], "right": [0, 1, 2, 3]}',
                '{"left": "0123", "right": [0, 1, 2, 3]}',
                '{"left": [null, 1, 2, 3], "right": [0, 1, 2, 3]}'):
        path.write_text(bad)
        with pytest.raises(UserError, match="picks.json"):
            dcgan.read_exemplars(path)


# ---------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A finished run of twenty steps on a few rendered heads: its folder, and the process's result."""
    path = tmp_path_factory.mktemp("dcgan")
    drawn = {k: v.numpy() if torch.is_tensor(v) else v for k, v in render.faces(n=160, size=32).items()}
    np.savez(path / "heads.npz", **drawn)
    (path / "picks.json").write_text('{"A": [0, 1, 2], "B": [3, 4, 5], "C": [6, 7, 8]}')
    result = script("dcgan.py", "--dataset", path / "heads.npz", "--net", "svhn", "--width", 0.125,
                    "--steps", 20, "--batch-size", 40, "--lr", 0.003,
                    "--exemplars", path / "picks.json", "--device", "cpu", "--no-amp",     # alike on any CPU
                    "--out", path, "--data-dir", path)
    return path / "dcgan-heads", result


def test_a_run_draws_figures_and_writes_numbers(heads):
    folder, result = heads
    assert result.returncode == 0, result.stderr
    for figure in ("samples", "fig2", "fig3", "fig4", "fig5", "fig7a", "fig7b", "fig8"):
        assert len(np.unique(np.asarray(Image.open(folder / f"{figure}.png")))) > 2, figure
    results = json.loads((folder / "results.json").read_text())["results"]
    assert {"predictor", "dcgan-arith", "dcgan-arith-2", "dcgan-turn", "frechet"} <= set(results)
    assert all(0 <= results["dcgan-arith"][k] <= 100 for k in ("value", "pixels", "samples"))
    assert -1 <= results["dcgan-turn"]["value"] <= 1 and abs(results["dcgan-turn"][dcgan.COVERED]) < 30


def test_the_tables_say_how_long_the_predictor_trains(monkeypatch):
    steps, faces = [], render.faces(n=20, size=32)
    classifier = dcgan.metrics.classifier
    monkeypatch.setattr(dcgan.metrics, "classifier",
                        lambda *words: steps.append(words[4]) or classifier(*words))
    pictures = dcgan.data.Data("faces", faces.pop("images"), extra=faces)
    settings = argparse.Namespace(device="cpu", data_dir=None, clf_steps=3)
    dcgan.predictor(settings, pictures, dcgan.attributes(pictures.extra))
    assert steps == [3]


def test_features_of_a_run_on_other_data(heads, tmp_path, monkeypatch):
    folder, _ = heads
    before = (folder / "results.json").read_text()
    rng = np.random.default_rng(0)
    y = rng.permutation(120) % 3                            # every sixth tests: all classes among them
    images = (rng.integers(0, 100, (120, 3, 20, 20)) + 50 * y[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "cifar10.npz", images=images, labels=y)
    dcgan.main(["--resume", str(folder), "--features", str(tmp_path / "cifar10.npz")])
    report = json.loads((folder / "features-cifar10" / "results.json").read_text())
    results = report["results"]
    assert {"dcgan-cifar", "dcgan-cifar-400"} == set(results)
    assert report["seconds"] == json.loads(before)["seconds"] > 0
    assert "paper" not in results["dcgan-cifar"] and results["dcgan-cifar"]["value"] > 80
    assert results["dcgan-cifar-400"]["draws"] == 5 and (folder / "results.json").read_text() == before
    dcgan.main(["--resume", str(folder), "--features", str(tmp_path / "cifar10.npz"), "--supervised", "1"])
    results = json.loads((folder / "supervised-cifar10" / "results.json").read_text())["results"]
    assert set(results) == {"dcgan-cifar10-base"} and "paper" not in results["dcgan-cifar10-base"]
    y[:40] = -1                                             # without a label: neither right nor wrong
    np.savez(tmp_path / "partly.npz", images=images, labels=y)
    dcgan.main(["--resume", str(folder), "--features", str(tmp_path / "partly.npz"), "--skip-bad"])
    results = json.loads((folder / "features-partly" / "results.json").read_text())["results"]
    assert results["features-partly"]["value"] > 80
    with pytest.raises(UserError, match="no labels"):
        dcgan.main(["--resume", str(folder), "--features", str(folder.parent / "heads.npz")])


def test_exemplars_by_eye_are_counted_as_sample_draws(heads):
    folder, _ = heads
    dcgan.main(["--resume", str(folder), "--sample", "9"])
    picture = np.asarray(Image.open(folder / "fig7.png")).astype(int)
    for i in range(9):    # the grid of Fig. 7 begins with the exemplars, 3 a row, 2 pixels between
        y, x = 2 + 34 * (i // 3), 2 + 34 * (i % 3)
        sample = np.asarray(Image.open(folder / "samples" / f"{i:05d}.png")).astype(int)
        assert np.abs(picture[y:y + 32, x:x + 32] - sample).max() <= 1
    dcgan.parse_args(["--resume", str(folder), "--exemplars", "others.json"])


def test_supervised_network_learns_and_keeps_the_best_trial(monkeypatch):
    """Bright and dark pictures are told apart; the best by validation is what is reported."""
    y, y_test = torch.arange(240) % 2, torch.arange(40) % 2
    X, X_test = ((torch.randint(100, (len(t), 3, 32, 32)) + 100 * t.view(-1, 1, 1, 1)).to(torch.uint8)
                 for t in (y, y_test))
    a = args("--net", "svhn", "--width", 0.05)
    a.supervised = 3
    torch.manual_seed(0)
    said = []
    monkeypatch.setattr(dcgan.log, "say", said.append)
    found = dcgan.supervised(a, 3, X, y, X_test, y_test, per_class=20, epochs=20)
    errors = [float(line.split(": ")[1].split(" %")[0]) for line in said]
    assert len(errors) == 3 and found["value"] == pytest.approx(min(errors), abs=0.01)
    assert found["value"] < 10 and found["test"] < 20 and found["trials"] == 3
    assert 1e-4 <= found["rate"] <= 1e-2 and 1e-6 <= found["weight decay"] <= 1e-2 and found["dropout"] <= .5


def test_published_values_stand_beside_the_papers_data_and_networks_alone():
    def at(**changes):
        paper = dict(features="cifar10", dataset="imagenet", net="imagenet", width=1.0)
        found = argparse.Namespace(**{**paper, **changes})
        return [dcgan.published(found, key) for key in ("dcgan-cifar", "dcgan-cifar-400", "dcgan-svhn")]

    assert at() == [{"paper": 82.8}, {"paper": 73.8}, {}]                               # Table 1
    assert at(features="svhn", dataset="svhn", net="svhn") == [{}, {}, {"paper": 22.48}]      # Table 2
    svhn = argparse.Namespace(features="svhn", dataset="svhn", net="svhn", width=1.0)
    assert dcgan.published(svhn, "dcgan-svhn-base") == {"paper": 28.87}
    for changes in ({"width": 0.5}, {"net": "svhn"}, {"dataset": "cifar10"}, {"features": "x/cifar10.npz"}):
        assert at(**changes) == [{}, {}, {}]


@pytest.mark.parametrize("words", [("--features", "cifar10"), ("--supervised",)])
def test_features_need_a_run(words):
    with pytest.raises(SystemExit) as stop:
        dcgan.parse_args(words)
    assert stop.value.code == 2


@pytest.mark.parametrize("net", ["svhn", "imagenet", "64"])
def test_paper_runs(net, digits, tmp_path, monkeypatch):
    """--paper to its figures: one minibatch a step, and Fig. 2 after 8, half of an epoch's 256 / 16."""
    monkeypatch.setattr(dcgan.metrics, "classifier", untrained)
    dcgan.main([*map(str, ("--dataset", digits, "--net", net, "--paper", "--width", 0.02, "--batch-size", 16,
                           "--steps", 9, "--save-every", 9, "--device", "cpu", "--out", tmp_path,
                           "--data-dir", tmp_path))])
    folder = tmp_path / "dcgan-digits"
    assert json.loads((folder / "results.json").read_text())["settings"] == "paper"
    assert all((folder / f"{figure}.png").exists() for figure in ("fig2", "fig3", "fig4", "fig5"))
    batches = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["batches"]
    assert (batches["epoch"], batches["position"]) == (0, 9)


def test_paper_runs_for_lsun(digits, tmp_path, monkeypatch):
    """Its row of PAPER: near-duplicates are left out, Fig. 2 is drawn after one epoch."""
    load, hashes = dcgan.data.load, dcgan.hashes
    monkeypatch.setattr(dcgan.data, "load", lambda name, *rest, **more: load(str(digits), *rest, **more))
    monkeypatch.setattr(dcgan, "hashes", lambda *words: hashes(*words, steps=20))
    monkeypatch.setattr(dcgan, "report", lambda *_: None)
    dcgan.main([*map(str, ("--dataset", "lsun", "--paper", "--width", 0.02, "--batch-size", 64, "--steps", 2,
                           "--device", "cpu", "--out", tmp_path, "--data-dir", tmp_path))])
    found = json.loads((tmp_path / "dcgan-lsun" / "args.json").read_text())
    assert found["deduplicate"] and found["net"] == "64"
    batches = torch.load(tmp_path / "dcgan-lsun" / "checkpoint.pt", weights_only=True)["parts"]["batches"]
    assert 192 <= len(batches["kept"]) <= batches["n"] and (tmp_path / "dcgan-lsun" / "fig2.png").exists()


def test_two_and_two_steps_are_four(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(dcgan, "figures", lambda *_: None)
    monkeypatch.setattr(dcgan, "evaluate", lambda *_: {})
    words = ["--dataset", digits, "--width", 0.125, "--batch-size", 16, "--device", "cpu", "--out", tmp_path]
    dcgan.main([*map(str, words), "--steps", "4", "--name", "four"])
    dcgan.main([*map(str, words), "--steps", "2", "--name", "two"])
    dcgan.main(["--resume", str(tmp_path / "dcgan-digits-two"), "--steps", "4"])
    one, two = (torch.load(tmp_path / f"dcgan-digits-{name}" / "checkpoint.pt", weights_only=True)["parts"]
                for name in ("four", "two"))
    assert all(torch.equal(one[net][k], two[net][k]) for net in ("G", "D") for k in one[net])

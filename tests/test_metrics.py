"""common/metrics.py against closed forms, brute force, and float64 NumPy written from the definitions."""

import io
import math
import re

import numpy as np
import pytest
import torch

from common import UserError
from common import metrics as M


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- A network on a whole data set ------------------------------------------------------------------------

class Pair(torch.nn.Module):
    """Returns (x w, None, (y, x + y)); BatchNorm and dropout show the mode."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(3)
        self.drop = torch.nn.Dropout(0.5)
        self.sizes = []

    def forward(self, x, y=None):
        self.sizes.append(len(x))
        x = self.drop(self.norm(x))
        return self.linear(x), None, (y, x if y is None else x + y)


@pytest.mark.parametrize("n, size, sizes", [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 500, [2]), (0, 3, [0])])
def test_batched_equals_one_pass_in_eval_mode(n, size, sizes):
    net, x, y = Pair(), normal(n, 3), normal(n, 3, seed=1)
    net.norm.running_mean.fill_(0.3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    a, none, (same, added) = M.batched(net, x, y, size=size)
    assert net.sizes == sizes and net.training and net.drop.training and none is None
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not a.requires_grad and torch.equal(same, y)
    with torch.no_grad():
        h = net.eval().norm(x)
    torch.testing.assert_close(added, h + y)
    torch.testing.assert_close(a, net.linear(h).detach())
    a, none, (nothing, _) = M.batched(net, x, None, size=size)
    assert none is nothing is None and len(a) == n and not net.training


def test_batched_scales_uint8_alone_and_like_batches():
    from common.data import Batches

    x = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    for scale in ((0.0, 1.0), (-1.0, 1.0), (0.1, 0.7)):
        found, floats, labels = M.batched(lambda *t: t, x, x.double(), x.long(), size=100, scale=scale)
        assert torch.equal(floats, x.double()) and torch.equal(labels, x.long())
        assert found[[0, 255]].flatten().tolist() == pytest.approx(scale)
        batches = Batches(x, torch.arange(256), batch_size=256, scale=scale)
        theirs, index = next(batches)
        assert torch.equal(found[index], theirs)
    # The two ways in which scripts write it, to the bit.
    x = x.float()
    assert torch.equal(M.batched(torch.nn.Identity(), x.to(torch.uint8), scale=(-1, 1)), x / 127.5 - 1)
    assert M.batched(torch.nn.Identity(), x.to(torch.uint8)).dtype == torch.uint8


def test_batched_runs_a_function_as_it_is_without_gradients():
    net, x = torch.nn.Dropout(0.5), torch.ones(1000, 1, requires_grad=True)
    y = M.batched(lambda x: net(x), x, size=300)
    assert 300 < (y == 0).sum() < 700 and net.training and not y.requires_grad


def test_batched_moves_rows_to_the_networks_device():
    net = torch.nn.Linear(3, 2, device="meta")
    y = M.batched(net, torch.zeros(5, 3), size=2)
    assert y.device.type == "meta" and y.shape == (5, 2)


# ---- Parzen window ----------------------------------------------------------------------------------------

def numpy_parzen(samples, x, sigma):
    """From the definition, float64, differences and not the expanded square."""
    samples, x = samples.flatten(1).double().numpy(), x.flatten(1).double().numpy()
    e = -0.5 * (((x[:, None] - samples[None]) / sigma) ** 2).sum(2)
    top = e.max(1)
    log_z = x.shape[1] * math.log(sigma * math.sqrt(2 * math.pi))
    return top + np.log(np.exp(e - top[:, None]).mean(1)) - log_z


def test_parzen_with_one_sample_is_the_gaussian_density():
    mu, x = normal(1, 784), normal(5, 784, seed=1)
    density = torch.distributions.Normal(mu.double(), 0.3).log_prob(x.double()).sum(1)
    torch.testing.assert_close(M.parzen_ll(mu, x, 0.3), density, rtol=1e-9, atol=0)
    one = torch.zeros(1, 1)
    assert M.parzen_ll(one, one, 1.0).item() == pytest.approx(-0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("offset", [0, 100])
def test_parzen_is_exact_far_from_the_origin_too(sigma, offset):
    samples, x = normal(40, 1, 28, 28).mul(0.05) + offset, normal(30, 1, 28, 28, seed=1).mul(0.05) + offset
    ll = M.parzen_ll(samples, x, sigma).numpy()
    assert np.abs(ll - numpy_parzen(samples, x, sigma)).max() < 1e-4
    assert ll.std() > 0.01


def test_parzen_is_a_density():
    """In one dimension it integrates to 1."""
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    ll = M.parzen_ll(normal(7, 1), grid, 0.3)
    assert torch.trapezoid(ll.exp(), grid[:, 0]).item() == pytest.approx(1, abs=1e-6)


def test_parzen_does_not_depend_on_the_chunk_and_takes_several_sigmas():
    samples, x = normal(53, 6), normal(31, 6, seed=1)
    whole = M.parzen_ll(samples, x, 0.2, chunk=100)
    assert torch.equal(M.parzen_lls(samples, x, [0.1, 0.2])[1], whole)
    for chunk in (1, 7, 31, 53):
        torch.testing.assert_close(M.parzen_ll(samples, x, 0.2, chunk), whole, rtol=0, atol=1e-5)


def test_parzen_ignores_the_precision_that_the_caller_chose_for_products():
    samples, x = normal(40, 300), normal(30, 300, seed=1)
    before = M.parzen_ll(samples, x, 0.1)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(M.parzen_ll(samples, x, 0.1), before)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_parzen_takes_sigma_from_valid_and_the_value_from_test():
    samples, valid, test = normal(300, 4).mul(0.5), normal(100, 4, seed=1).mul(0.5), normal(80, 4, seed=2)
    grid = np.logspace(-1, 0, 10)
    best = grid[np.argmax([numpy_parzen(samples, valid, s).mean() for s in grid])]
    assert best not in (grid[0], grid[-1])
    assert best != grid[np.argmax([numpy_parzen(samples, test, s).mean() for s in grid])]
    ll = numpy_parzen(samples, test, best)
    found = M.parzen(samples, valid, test)
    assert found["sigma"] == pytest.approx(best)
    assert found["ll"] == pytest.approx(ll.mean(), abs=1e-4)
    assert found["se"] == pytest.approx(ll.std() / math.sqrt(80), abs=1e-4)


def test_parzen_approaches_the_entropy():
    samples, valid, test = (normal(4000, 1, seed=s) for s in range(3))
    found = M.parzen(samples, valid, test)
    assert found["ll"] == pytest.approx(-0.5 * (1 + math.log(2 * math.pi)), abs=3 * found["se"])
    assert found["se"] == pytest.approx(math.sqrt(0.5 / 4000), rel=0.1)  # Var log p = 1/2


# ---- Ranks -----------------------------------------------------------------------------------------------

def test_rank_correlation():
    x, y = normal(50), normal(50, seed=1)
    assert M.rank_correlation(x, x.exp()) == pytest.approx(1)
    assert M.rank_correlation(x, -x ** 3) == pytest.approx(-1)
    # Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)), d the differences of ranks.
    d = (x.argsort().argsort() - y.argsort().argsort()).double()
    assert M.rank_correlation(x, y) == pytest.approx(1 - 6 * d.square().sum().item() / (50 * (50 ** 2 - 1)))
    # Ties: the ranks of 1 2 2 9 are 1, 2.5, 2.5, 4; with ranks 1 2 3 4 that is 4.5 / sqrt(4.5 * 5).
    assert M.rank_correlation([1, 2, 2, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(M.rank_correlation([1, 1, 1], [1, 2, 3]))


# ---- Classifier -------------------------------------------------------------------------------------------

def bars(n, seed=0, size=16, channels=1):
    """A tiny task: label 0 a lying bar, 1 a standing one, 2 none, at random places in noise."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 100, (n, channels, size, size)), rng.integers(3, size=n)
    for x_i, y_i, at in zip(x, y, rng.integers(3, size - 3, n)):
        if y_i == 0:
            x_i[:, at] += 120
        if y_i == 1:
            x_i[:, :, at] += 120
    return torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(y)


@pytest.fixture(scope="module")
def trained():
    return M.classifier(*bars(600), "cpu", None, steps=60)


def test_classifier_learns(trained):
    x, y = bars(300, seed=1)
    assert M.label_agreement(trained, x, y) > 0.97
    assert M.label_agreement(trained, x, (y + 1) % 3) < 0.03
    assert not trained.training and not any(p.requires_grad for p in trained.parameters())


def test_classifier_is_deterministic_and_leaves_the_random_state_alone():
    made = []
    for callers_seed, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(callers_seed)
        before = torch.get_rng_state()
        made.append(M.classifier(*bars(200), "cpu", None, steps=10, seed=seed).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    for name, value in made[0].items():
        assert torch.equal(value, made[1][name]), name
    assert not torch.equal(made[0]["head.weight"], made[2]["head.weight"])


def test_classifier_is_cached_and_another_data_set_is_not_taken_for_it(tmp_path, monkeypatch, capsys):
    trainings, train = [], M._train
    monkeypatch.setattr(M, "_train", lambda *args: (trainings.append(1), train(*args)))
    x, y = bars(200)
    first = M.classifier(x, y, "cpu", tmp_path, steps=5)
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch("training the classifier .*once: 5 steps on 200 images\n", said.err)
    second = M.classifier(x.clone(), y.int(), "cpu", str(tmp_path), steps=5)
    file, = (tmp_path / "cache").iterdir()
    assert len(trainings) == 1 and re.fullmatch(r"classifier-[0-9a-f]{16}\.pt", file.name)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(first(x.float()), second(x.float()))
    assert not second.training and not any(p.requires_grad for p in second.parameters())
    # Each differs from all others in one thing, and none has the sums of another to be told apart by.
    swapped, one_pixel, wide = y.clone(), x.clone(), torch.nn.functional.pad(x, (0, 8))
    swapped[[(y == 2).nonzero()[0].item(), (y == 1).nonzero()[0].item()]] = torch.tensor([1, 2])
    one_pixel[7, 0, 3, 3] ^= 1
    tags = torch.nn.functional.one_hot(y)
    others = [(wide, y, {}), (x, swapped, {}), (one_pixel, y, {}), (x, y + 1, {}), (x, tags, {}),
              (x, tags * 0.5, {}), (x, y, {"seed": 1}), (x, y, {"steps": 6})]
    for n, (images, labels, how) in enumerate(others, 2):
        clf = M.classifier(images, labels, "cpu", tmp_path, **{"steps": 5, **how})
        assert len(trainings) == n == len(list((tmp_path / "cache").iterdir()))
        assert len(clf(images.float())) == len(images)
    monkeypatch.setattr(M, "RECIPE", M.RECIPE + 1)
    M.classifier(x, y, "cpu", tmp_path, steps=5)
    assert len(trainings) == len(others) + 2


def test_classifier_of_pictures_in_a_mapped_file(tmp_path):
    x, y = bars(1500)
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    first, second = (M.classifier(images, y, "cpu", tmp_path, steps=5) for images in (x, mapped))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert torch.equal(M.logits(first, x), M.logits(second, mapped))


def test_a_cache_that_is_none_is_refused_and_kept(tmp_path):
    M.classifier(*bars(20), "cpu", tmp_path, steps=5)
    cache, = (tmp_path / "cache").iterdir()
    whole, another = cache.read_bytes(), io.BytesIO()
    torch.save({"step": 1}, another)
    for content in (b"", b"not a file of torch", whole[:-100], another.getvalue()):
        cache.write_bytes(content)
        with pytest.raises(UserError, match="classifier-.*pt, found an unreadable file: delete it"):
            M.classifier(*bars(20), "cpu", tmp_path, steps=5)
        assert cache.read_bytes() == content


def test_an_interrupted_save_leaves_no_cache(tmp_path, monkeypatch):
    def cut_off(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(torch, "save", cut_off)
        with pytest.raises(KeyboardInterrupt):
            M.classifier(*bars(20), "cpu", tmp_path, steps=5)
    assert not list((tmp_path / "cache").iterdir())
    first, second = (M.classifier(*bars(20), "cpu", tmp_path, steps=5) for _ in "ab")
    assert torch.equal(first.head.weight, second.head.weight)


def test_a_data_dir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written .* give another --data-dir"):
        M.classifier(*bars(20), "cpu", tmp_path / "file", steps=5)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 16), (3, 64, 64), (1, 17, 40), (3, 96, 80)])
def test_classifier_takes_any_size(shape):
    clf = M.Classifier(shape, 7)
    x = torch.rand(2, *shape)
    assert clf.trunk(x).shape == (2, 128) and clf(x).shape == (2, 7)


def test_classifier_layers_of_mnist():
    sizes, x = [], torch.rand(2, 1, 28, 28)
    for row in M.Classifier((1, 28, 28), 10).trunk:
        x = row(x)
        if isinstance(row, torch.nn.Conv2d):
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [(16, 14, 14), (32, 7, 7), (64, 4, 4)]


def test_label_agreement_of_equal_logits_and_of_both_kinds_of_pictures(trained):
    x, y = bars(700, seed=2)
    assert M.label_agreement(trained, x.float() / 255, y) == M.label_agreement(trained, x, y)
    flat = M.Classifier((1, 16, 16), 3)
    torch.nn.init.zeros_(flat.head.weight), torch.nn.init.zeros_(flat.head.bias)
    buffers = {name: b.clone() for name, b in flat.named_buffers()}
    assert M.label_agreement(flat, x, y) == pytest.approx((y == 0).double().mean().item())
    assert flat.training and all(torch.equal(b, buffers[name]) for name, b in flat.named_buffers())


def test_classifier_refuses_small_pictures():
    x, y = bars(20)
    with pytest.raises(UserError, match="at least 16 x 16, found 8 x 16"):
        M.classifier(x[:, :, :8], y, "cpu", None, steps=5)


def test_classifier_learns_independent_attributes():
    """Left half bright and top half bright, in all four combinations."""
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(2, (512, 2), generator=rng)
    x = torch.randint(60, (512, 1, 16, 16), generator=rng)
    x[:, :, :, :8] += 90 * y[:, 0, None, None, None]
    x[:, :, :8] += 90 * y[:, 1, None, None, None]
    clf = M.classifier(x[:400].to(torch.uint8), y[:400].float(), "cpu", None, steps=100)
    agree = (M.logits(clf, x[400:].to(torch.uint8)) > 0) == (y[400:] > 0)
    assert agree.float().mean(0).min() > 0.9


# ---- Frechet distance -------------------------------------------------------------------------------------

def exact(n, mean, cov, seed=0):
    """n points with exactly this mean and covariance."""
    z = normal(n, len(mean), seed=seed).double()
    z = z - z.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T.cov()), z.T, upper=False).T
    return torch.tensor(mean).double() + white @ torch.linalg.cholesky(cov.double()).T


def test_frechet_closed_forms():
    d = 5
    eye = torch.eye(d)
    a, b = exact(50, [0.0] * d, 0.5 ** 2 * eye), exact(60, [1.0] * d, 2.0 ** 2 * eye, seed=1)
    assert M.frechet(a, b) == pytest.approx(d * 1.0 + d * 1.5 ** 2, rel=1e-9)
    assert M.frechet(a, b) == pytest.approx(M.frechet(b, a), rel=1e-9)
    # Covariances that commute: sum of (sqrt(e1) - sqrt(e2))^2 over the shared eigenvectors.
    U = torch.linalg.qr(normal(d, d).double())[0]
    e1, e2 = torch.arange(1.0, 6).double(), torch.tensor([3.0, 0.5, 7, 2, 1]).double()
    a, b = exact(50, [0.0] * d, (U * e1) @ U.T), exact(50, [0.0] * d, (U * e2) @ U.T, seed=1)
    assert M.frechet(a, b) == pytest.approx((e1.sqrt() - e2.sqrt()).square().sum().item(), rel=1e-9)


def test_frechet_against_numpy_where_covariances_do_not_commute():
    a, b = normal(40, 6) @ normal(6, 6, seed=1), normal(50, 6, seed=2) @ normal(6, 6, seed=3) + 1
    A, B = a.double().numpy(), b.double().numpy()
    C1, C2 = np.cov(A.T), np.cov(B.T)
    trace = np.sqrt(np.linalg.eigvals(C1 @ C2).astype(complex)).real.sum()
    expected = ((A.mean(0) - B.mean(0)) ** 2).sum() + np.trace(C1) + np.trace(C2) - 2 * trace
    assert M.frechet(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_measure_of_what_is_not_finite(bad):
    x = normal(8, 3).float()
    odd = x.clone()
    odd[2, 1] = bad
    for measure in (lambda: M.frechet(odd, x), lambda: M.frechet(x, odd), lambda: M.parzen_ll(odd, x, 0.2),
                    lambda: M.parzen(x, odd, x)):
        with pytest.raises(UserError, match="finite"):
            measure()


def test_frechet_of_a_set_and_itself_is_zero_also_with_fewer_points_than_dimensions():
    for n in (200, 10):
        a = normal(n, 30) * 10
        assert 0 <= M.frechet(a, a[torch.randperm(n)]) < 1e-3
        assert M.frechet(a, a + 1) == pytest.approx(30, rel=1e-4)


def test_frechet_distance_orders_pictures(trained):
    (x, _), (same, _), (other, y) = (bars(300, seed=s) for s in (1, 2, 3))
    near, far = M.frechet_distance(trained, x, same), M.frechet_distance(trained, x, other[y == 0])
    assert M.frechet_distance(trained, x, x) < 1e-6 < near < far / 5
    features = [trained.trunk(t.float() / 255) for t in (x, same)]
    assert near == pytest.approx(M.frechet(*features), rel=1e-4)

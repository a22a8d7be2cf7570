"""common/metrics.py against closed forms, brute force, and float64 NumPy written from the definitions."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common import UserError
from common import metrics as M


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def test_parzen_does_not_depend_on_the_chunk():
    samples, x = normal(53, 6), normal(31, 6, seed=1)
    whole = M.parzen_ll(samples, x, 0.2, chunk=100)
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


@pytest.mark.parametrize("samples, x, sigma, words", [
    (torch.zeros(3, 4), torch.zeros(2, 5), 0.1, r"\(3, 4\) and float32 \(2, 5\)"),
    (torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(2, 4), 0.1, "found uint8"),
    (torch.zeros(0, 4), torch.zeros(2, 4), 0.1, "n, N > 0"),
    (torch.zeros(3, 4), torch.zeros(0, 4), 0.1, "n, N > 0"),
    (torch.zeros(3, 4), torch.zeros(2, 4), 0.0, "sigma > 0, found 0.0"),
])
def test_parzen_refuses(samples, x, sigma, words):
    with pytest.raises(UserError, match=words):
        M.parzen_ll(samples, x, sigma)


# ---- Clusters and ranks -----------------------------------------------------------------------------------

def test_majority():
    table = M.majority(torch.tensor([0, 0, 0, 1]), torch.tensor([7, 7, 3, 3]), 3)
    assert table.tolist() == [7, 3, -1]
    assert M.majority(torch.tensor([0, 0]), torch.tensor([5, 2]), 1).tolist() == [2]  # the lowest of equals


def test_assign_known_value():
    cluster, y = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 0, 0])
    assert M.assign(cluster, y, 2).tolist() == [1, 0]
    assert M.majority(cluster, y, 2).tolist() == [0, 0]
    assert M.assign(cluster, y, 4).tolist().count(-1) == 2
    assert M.assign(torch.tensor([0, 0]), torch.tensor([5, 2]), 1).tolist() in ([2], [5])


@pytest.mark.parametrize("k, labels", [(2, 2), (5, 5), (7, 4), (3, 6)])
@pytest.mark.parametrize("seed", range(5))
def test_assign_against_brute_force(k, labels, seed):
    rng = np.random.default_rng(seed)
    cluster, y = rng.integers(k, size=60), rng.integers(labels, size=60)
    y[0] = labels - 1
    counts = np.zeros((max(k, labels),) * 2, int)
    np.add.at(counts, (cluster, y), 1)
    best = max(counts[range(len(counts)), list(p)].sum() for p in itertools.permutations(range(len(counts))))
    table = M.assign(torch.from_numpy(cluster), torch.from_numpy(y), k).numpy()
    used = table[table >= 0]
    assert len(set(used)) == len(used) == min(k, labels) and table.max() < labels
    assert (table[cluster] == y).sum() == best


@pytest.mark.parametrize("rows, columns", [(4, 4), (3, 6), (6, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_matching_against_brute_force(rows, columns, seed):
    assert M.matching(np.array([[1, 2], [3, 9]])).tolist() == [1, 0]
    cost = np.random.default_rng(seed).normal(size=(rows, columns))
    found = M.matching(cost)
    assert len(found) == rows and len(set(found)) == rows and (found < columns).sum() == min(rows, columns)
    wide = cost if rows <= columns else cost.T
    n, m = wide.shape
    best = min(wide[range(n), list(p)].sum() for p in itertools.permutations(range(m), n))
    assert sum(cost[i, j] for i, j in enumerate(found) if j < columns) == pytest.approx(best)


def test_cluster_accuracy_matches_on_train_and_scores_on_test():
    y = torch.arange(10).repeat(20)
    shuffle = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    for match in (M.majority, M.assign):
        assert M.cluster_accuracy(shuffle[y], y, shuffle[y], y, 10, match) == 1
    # The table of the training part maps 0 -> 0 and 1 -> 1; a table of the test part would get 3 of 4 right.
    train, test = torch.tensor([0, 1]), torch.tensor([0, 0, 0, 1])
    assert M.cluster_accuracy(train, train, test, torch.tensor([1, 1, 1, 1]), 2) == 0.25
    assert M.cluster_accuracy(train[:1], train[:1], test, test, 2) == 0.75  # no label for an unseen cluster


@pytest.mark.parametrize("cluster, y, words", [
    ([0, 3], [0, 0], r"clusters in \[0, 3\).* found 0 to 3"),
    ([0, -1], [0, 0], "found -1 to 0"),
    ([0, 1], [0, -1], "found 0 to 1 and -1 to 0"),
    ([0, 1], [0], r"\(2,\) and int64 \(1,\)"),
    ([], [], "N > 0"),
])
def test_clusters_refuse(cluster, y, words):
    good = torch.tensor([0, 1])
    for match in (M.majority, M.assign):
        with pytest.raises(UserError, match=words):
            match(torch.tensor(cluster), torch.tensor(y), 3)
        with pytest.raises(UserError, match=words):
            M.cluster_accuracy(good, good, torch.tensor(cluster), torch.tensor(y), 3, match)


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
    for a, b in (([1, 2], [1, 2, 3]), ([[1, 2]], [[1, 2]]), ([1.0, math.nan], [1.0, 2.0])):
        with pytest.raises(UserError, match="two vectors"):
            M.rank_correlation(a, b)


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
    return M.classifier(*bars(600), "cpu", steps=60)


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
        made.append(M.classifier(*bars(200), "cpu", steps=10, seed=seed).state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    for name, value in made[0].items():
        assert torch.equal(value, made[1][name]), name
    assert not torch.equal(made[0]["head.weight"], made[2]["head.weight"])


def test_classifier_is_cached_and_another_data_set_is_not_taken_for_it(tmp_path, monkeypatch):
    trainings = []
    train = M._train
    monkeypatch.setattr(M, "_train", lambda *args: (trainings.append(1), train(*args)))
    x, y = bars(200)
    cache = tmp_path / "classifier.pt"
    first = M.classifier(x, y, "cpu", cache, "bars", steps=5)
    second = M.classifier(x, y, "cpu", cache, "bars", steps=5)
    assert len(trainings) == 1 and [p.name for p in tmp_path.iterdir()] == ["classifier.pt"]
    assert torch.equal(first(x.float()), second(x.float()))
    assert not second.training and not any(p.requires_grad for p in second.parameters())
    same_sum = y.clone()
    same_sum[(y == 2).nonzero()[0]], same_sum[(y == 1).nonzero()[0]] = 3, 0
    wide = torch.nn.functional.pad(x, (0, 8))
    # Each differs from the one before, which is in the cache, in one thing: shape, classes, pixels, labels.
    dim = wide.clamp(max=99)
    others = [(x, y), (wide, y), (wide, same_sum), (dim, same_sum), (dim, y + 1)]
    for n, (images, labels) in enumerate(others, 2):
        clf = M.classifier(images, labels, "cpu", cache, "dots", steps=5)
        assert len(trainings) == n
        assert clf(images.float()).shape == (len(images), int(labels.max()) + 1)


def test_a_cache_that_is_none_is_refused_and_kept(tmp_path):
    cache = tmp_path / "classifier.pt"
    for content in (b"", b"not a file of torch"):
        cache.write_bytes(content)
        with pytest.raises(UserError, match="classifier.pt, found an unreadable file"):
            M.classifier(*bars(20), "cpu", cache, steps=5)
        assert cache.read_bytes() == content
    torch.save({"step": 1}, cache)
    with pytest.raises(UserError, match="classifier.pt, found a file of something else"):
        M.classifier(*bars(20), "cpu", cache, steps=5)
    assert torch.load(cache, weights_only=True) == {"step": 1}


def test_an_interrupted_save_leaves_the_cache_whole(tmp_path, monkeypatch):
    cache = tmp_path / "classifier.pt"
    M.classifier(*bars(20), "cpu", cache, "a", steps=5)
    before = cache.read_bytes()

    def cut_off(state, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        M.classifier(*bars(20), "cpu", cache, "b", steps=5)
    assert cache.read_bytes() == before


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 16), (3, 64, 64), (1, 17, 40), (3, 96, 80)])
def test_classifier_takes_any_size(shape):
    clf = M.Classifier(shape, 7)
    x = torch.rand(2, *shape)
    assert clf.features(x).shape == (2, 128) and clf(x).shape == (2, 7)


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


@pytest.mark.parametrize("change, words", [
    (lambda x, y: (x.float(), y), "found float32"),
    (lambda x, y: (x, y[:5]), r"\(5,\)"),
    (lambda x, y: (x[0], y[:1]), r"found uint8 \(1, 16, 16\)"),
    (lambda x, y: (x[:0], y[:0]), "N > 0"),
    (lambda x, y: (x, y - 1), "labels >= 0, found -1"),
    (lambda x, y: (x[:, :, :8], y), "found 8 x 16"),
])
def test_classifier_refuses(change, words):
    with pytest.raises(UserError, match=words):
        M.classifier(*change(*bars(20)), "cpu", steps=5)


@pytest.mark.parametrize("change, words", [
    (lambda x, y: (x.repeat(1, 3, 1, 1), y), r"pictures \(N, \*\(1, 16, 16\)\), N > 0, found uint8 \(20, 3,"),
    (lambda x, y: (x.float() / 127.5 - 1, y), r"in \[0, 1\], found -1 to"),
    (lambda x, y: (x * math.nan, y), "nan"),
    (lambda x, y: (x, y[:3]), r"labels \(20,\)"),
])
def test_label_agreement_refuses(trained, change, words):
    with pytest.raises(UserError, match=words):
        M.label_agreement(trained, *change(*bars(20)))


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


def test_frechet_of_a_set_and_itself_is_zero_also_with_fewer_points_than_dimensions():
    for n in (200, 10):
        a = normal(n, 30) * 10
        assert 0 <= M.frechet(a, a[torch.randperm(n)]) < 1e-3
        assert M.frechet(a, a + 1) == pytest.approx(30, rel=1e-4)
    with pytest.raises(UserError, match=r"found float32 \(1, 4\) and float32 \(5, 4\)"):
        M.frechet(torch.zeros(1, 4), torch.zeros(5, 4))
    with pytest.raises(UserError, match=r"\(5, 3\)"):
        M.frechet(torch.zeros(5, 4), torch.zeros(5, 3))


def test_frechet_distance_orders_pictures(trained):
    (x, _), (same, _), (other, y) = (bars(300, seed=s) for s in (1, 2, 3))
    near, far = M.frechet_distance(trained, x, same), M.frechet_distance(trained, x, other[y == 0])
    assert M.frechet_distance(trained, x, x) < 1e-6 < near < far / 5
    features = [trained.features(t.float() / 255) for t in (x, same)]
    assert near == pytest.approx(M.frechet(*features), rel=1e-4)


# ---- L2-SVM -----------------------------------------------------------------------------------------------

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
        torch.testing.assert_close(M.l2_svm(x, y, C, tol=1e-12), expected, rtol=1e-6, atol=1e-6)


PROBLEMS = pytest.mark.parametrize("problem", [{}, {"n": 60, "d": 300}, {"n": 40, "d": 40, "classes": 2}])


@PROBLEMS
@pytest.mark.parametrize("C", [1e-4, 1e-2, 1.0, 100.0])
def test_svm_gradient_vanishes(problem, C):
    x, y = blobs(**problem)
    for tol in (1e-4, 1e-10):
        w = M.l2_svm(x.float(), y, C, tol)
        value, gradient = numpy_objective(w, x.float(), y, C)
        assert ((gradient ** 2).sum(0) / 2 <= 1.01 * tol * value).all()
    for seed in range(5):  # the minimum, as no weights nearby are better
        nearby = w + 0.01 * normal(*w.shape, seed=seed)
        assert (numpy_objective(nearby, x.float(), y, C)[0] > value).all()


@PROBLEMS
@pytest.mark.parametrize("C", [1e-3, 1.0])
def test_svm_equals_scikit_learn(problem, C):
    svm = pytest.importorskip("sklearn.svm")
    x, y = blobs(**problem)
    theirs = svm.LinearSVC(C=C, dual=False, tol=1e-6, max_iter=10000).fit(x.numpy(), y.numpy())
    their_w = torch.from_numpy(np.vstack([theirs.coef_.T, theirs.intercept_]))
    if their_w.shape[1] == 1:  # of two classes it fits the second alone; the first is its mirror image
        their_w = torch.cat([-their_w, their_w], 1)
    their_value = numpy_objective(their_w, x, y, C)[0]
    for tol, atol, odd in ((1e-4, 2e-2, 0.01), (1e-10, 2e-3, 0.0)):
        w = M.l2_svm(x, y, C, tol)
        np.testing.assert_allclose(numpy_objective(w, x, y, C)[0], their_value, rtol=max(tol, 1e-5))
        torch.testing.assert_close(w, their_w, rtol=0, atol=atol * their_w.abs().max().item())
        assert (M.svm_predict(w, x).numpy() != theirs.predict(x.numpy())).mean() <= odd


def test_classifier_learns_independent_attributes():
    """Left half bright and top half bright, in all four combinations."""
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(2, (512, 2), generator=rng)
    x = torch.randint(60, (512, 1, 16, 16), generator=rng)
    x[:, :, :, :8] += 90 * y[:, 0, None, None, None]
    x[:, :, :8] += 90 * y[:, 1, None, None, None]
    clf = M.classifier(x[:400].to(torch.uint8), y[:400].float(), "cpu", steps=100)
    agree = (M.logits(clf, x[400:].to(torch.uint8)) > 0) == (y[400:] > 0)
    assert agree.float().mean(0).min() > 0.9


def test_svm_predicts_the_largest_logit():
    x, y = blobs(classes=3)
    w = M.l2_svm(x, y)
    a = np.hstack([x.numpy(), np.ones((len(x), 1))]) @ w.numpy()
    assert np.array_equal(M.svm_predict(w, x).numpy(), a.argmax(1))
    assert (M.svm_predict(w, x) == y).double().mean() > 0.6
    shifted = w.clone()
    shifted[-1, 2] += 1e6  # the last row is b
    assert (M.svm_predict(shifted, x) == 2).all()


def test_svm_converges_on_separable_points_with_a_large_C():
    """Newton's method of full steps, or from w = 0, does not do it in 30 steps."""
    x, y = blobs(n=200, d=60)
    w = M.l2_svm(x, y, C=100.0, max_iter=30)
    value, gradient = numpy_objective(w, x, y, 100.0)
    assert ((gradient ** 2).sum(0) / 2 <= 1.01e-4 * value).all()
    assert (M.svm_predict(w, x) == y).all()


@pytest.mark.parametrize("problem", [{}, {"n": 60, "d": 300}])
@pytest.mark.parametrize("tol", [1e-4, 1e-10])
def test_svm_goes_on_from_start(problem, tol):
    """The minimum is where no step is needed, weights of another C are where some are."""
    x, y = blobs(**problem)
    w = M.l2_svm(x, y, 1e-2, tol)
    torch.testing.assert_close(M.l2_svm(x, y, 1e-2, 1.01 * tol, 0, start=w), w, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="after 0 steps"):
        M.l2_svm(x, y, 1.0, tol, 0, start=w)
    value, gradient = numpy_objective(M.l2_svm(x, y, 1.0, tol, start=w), x, y, 1.0)
    assert ((gradient ** 2).sum(0) / 2 <= 1.01 * tol * value).all()


@pytest.mark.parametrize("problem", [{"n": 2100, "d": 20}, {"n": 60, "d": 300}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_svm_of_many_features_in_float32(problem, dtype, monkeypatch):
    x, y = blobs(**problem)
    x, exact = x.to(dtype), M.l2_svm(x.to(dtype), y, 1e-2)
    monkeypatch.setattr(M, "SINGLE", 1000)
    w = M.l2_svm(x, y, 1e-2)
    assert w.dtype == torch.float64 and 0 < (w - exact).abs().max() < 1e-2 * exact.abs().max()
    value, gradient = numpy_objective(w, x, y, 1e-2)
    assert ((gradient ** 2).sum(0) / 2 <= 1.01e-4 * value).all()


def test_svm_says_when_it_did_not_converge():
    with pytest.warns(UserWarning, match="l2_svm: after 1 steps up to"):
        M.l2_svm(*blobs(), tol=1e-12, max_iter=1)


@pytest.mark.parametrize("change, words", [
    (lambda x, y: (x, y[:5]), r"\(20, 12\) and int64 \(5,\)"),
    (lambda x, y: (x[0], y), r"found float64 \(12,\)"),
    (lambda x, y: (x[:0], y[:0]), "N > 0"),
    (lambda x, y: (x, y, 0.0), "C > 0 and labels >= 0, found 0.0 and 0"),
    (lambda x, y: (x, y - 1), "found 1.0 and -1"),
    (lambda x, y: (x / 0, y), "finite"),
    (lambda x, y: (x, y, 1.0, 1e-4, 9, torch.zeros(12, 4)), r"start \(13, 4\), found float32 \(12, 4\)"),
])
def test_svm_refuses(change, words):
    with pytest.raises(UserError, match=words):
        M.l2_svm(*change(*blobs(20)))


def test_svm_predict_refuses():
    with pytest.raises(UserError, match=r"features \(N, 12\), found float64 \(20, 11\)"):
        M.svm_predict(torch.zeros(13, 4), blobs(20)[0][:, 1:])

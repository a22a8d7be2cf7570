"""Measures that several papers share.  All work offline: no Inception network, no scikit-learn, no SciPy."""

import contextlib
import math
import os
import warnings

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import UserError, intact


def _need(ok, expected, found):
    if not ok:
        raise UserError(f"expected {expected}, found {found}")


def _shapes(*tensors):
    return " and ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors)


# ---- Parzen window: GAN Table 1, CGAN Table 1, AAE Table 1 ------------------------------------------------

@torch.no_grad()
def _parzen_ll(samples, x, sigmas, chunk):
    """(S, N) l(x) at each of S sigmas; the squared distances are worked out once, a block at a time."""
    _need(samples.dim() > 1 and len(samples) and len(x) and samples.shape[1:] == x.shape[1:]
          and samples.is_floating_point() and x.is_floating_point(),
          "floating-point samples (n, ...) and x (N, ...) of one shape, n, N > 0", _shapes(samples, x))
    _need(min(sigmas) > 0, "sigma > 0", min(sigmas))
    samples, x = samples.flatten(1), x.flatten(1)
    n, d = samples.shape
    s = torch.tensor(sigmas, dtype=torch.float64, device=samples.device)[:, None]
    ll = []
    for x_i in x.split(chunk):
        # ||x||^2 - 2 x mu + ||mu||^2 cancels: harmless in float64, which is never run as TF32 either.
        x_i = x_i.to(samples.device, torch.float64)
        log_sum = x_i.new_full((len(s), len(x_i)), -math.inf)
        for mu in samples.split(chunk):
            mu = mu.double()
            d2 = torch.addmm(mu.square().sum(1), x_i, mu.T, alpha=-2) + x_i.square().sum(1, keepdim=True)
            near = d2.clamp_(min=0).min(1).values
            far = (near[:, None] - d2).float()  # the largest term is exp(0): from here on float32 is enough
            mass = torch.stack([far.div(2 * v * v).exp_().sum(1) for v in sigmas])
            log_sum = torch.logaddexp(log_sum, mass.double().log() - near / (2 * s * s))
        ll.append(log_sum - math.log(n) - d * (s * math.sqrt(2 * math.pi)).log())
    return torch.cat(ll, 1)


def parzen_ll(samples, x, sigma, chunk=1000):
    """l(x) = log mean_i exp(-||(x - mu_i) / sigma||^2 / 2) - d log(sigma sqrt(2 pi)), in nats.

    samples mu (n, ...), x (N, ...) floating point, of one shape and scale, d numbers each -> (N,) float64 on
    the samples' device; memory holds chunk x chunk distances.  One sample at x, d = 1, sigma = 1:
    -log(2 pi) / 2 = -0.9189.  UserError: other shapes or types, sigma <= 0.  Source: GAN's parzen_ll.py.
    """
    return _parzen_ll(samples, x, [float(sigma)], chunk)[0]


def parzen(samples, valid, test, chunk=1000):
    """Mean l(x) over `test` in nats, at the sigma of numpy.logspace(-1, 0, 10) that is best over `valid`.

    Shapes and errors as in parzen_ll -> dict(ll, se, sigma), se = std / sqrt(N_test).  All from N(0, 1): ll
    tends to -(1 + log(2 pi)) / 2 = -1.4189 with their number.  Protocol of GAN, CGAN and AAE on MNIST: 10,000
    samples, pixels in [0, 1], valid = train[50000:51000], test = all 10,000 test pictures.
    """
    sigmas = np.logspace(-1, 0, 10).tolist()
    sigma = sigmas[int(_parzen_ll(samples, valid, sigmas, chunk).mean(1).argmax())]
    ll = parzen_ll(samples, test, sigma, chunk)
    return {"ll": ll.mean().item(), "se": ll.std(correction=0).item() / math.sqrt(len(ll)), "sigma": sigma}


# ---- Clusters as a classifier: InfoGAN Sec. 7.2, AAE Sec. 6; a code against a known factor -----------------

def _counts(cluster, y, k):
    """(k, L) numbers of examples with cluster i and label j, L = the largest label + 1."""
    _need(cluster.dim() == 1 and cluster.shape == y.shape and len(y), "clusters (N,) and labels (N,), N > 0",
          _shapes(cluster, y))
    _need(cluster.min() >= 0 and cluster.max() < k and y.min() >= 0, f"clusters in [0, {k}) and labels >= 0",
          f"{int(cluster.min())} to {int(cluster.max())} and {int(y.min())} to {int(y.max())}")
    labels = int(y.max()) + 1
    return torch.bincount(cluster.long() * labels + y.long(), minlength=k * labels).view(k, labels)


def majority(cluster, y, k):
    """(k,) table cluster -> its most frequent label: the lowest of equals, and -1, no label, if it is empty.

    cluster (N,) integers in [0, k), y (N,) integers >= 0.  Clusters 0 0 0 1, labels 7 7 3 3, k = 3: 7, 3, -1.
    UserError: other shapes or values.
    """
    counts = _counts(cluster, y, k)
    return torch.where(counts.sum(1) > 0, counts.argmax(1), -1)


def assign(cluster, y, k):
    """(k,) table cluster -> label, the one-to-one matching with most examples right; -1 if none is left.

    Arguments and errors as in majority.  Clusters 0 0 0 1 1, labels 0 0 1 0 0: 1, 0 (majority: 0, 0).
    """
    counts = _counts(cluster, y, k)
    labels = counts.shape[1]
    table = torch.from_numpy(matching(-counts.cpu().numpy())).to(counts.device)
    return torch.where(table < labels, table, -1)


def matching(cost):
    """(r,) column of each row in the cheapest one-to-one matching of cost (r, c): shortest augmenting paths.

    Rows left over when r > c get columns from c on.  [[1, 2], [3, 9]]: 1, 0.  Source: the Hungarian method,
    O(n^3), n = max(r, c).
    """
    rows, columns = cost.shape
    n = max(rows, columns)
    cost = np.pad(np.asarray(cost, np.float64), ((0, n - rows), (0, n - columns)))
    u, v = np.zeros(n), np.zeros(n + 1)  # prices: cost - u - v >= 0, and = 0 where matched
    row = np.full(n + 1, -1)  # column -> its row; in column n waits the row that has none yet
    for i in range(n):
        row[n], j = i, n
        slack, back, done = np.full(n, np.inf), np.full(n, n), np.zeros(n + 1, bool)
        while row[j] >= 0:
            done[j] = True
            reduced = cost[row[j]] - u[row[j]] - v[:n]
            closer = ~done[:n] & (reduced < slack)
            slack[closer], back[closer] = reduced[closer], j
            j = np.where(done[:n], np.inf, slack).argmin()
            step = slack[j]
            u[row[done]] += step
            v[done] -= step
            slack[~done[:n]] -= step
        while j != n:
            row[j], j = row[back[j]], back[j]
    return row[:n].argsort()[:rows]


def cluster_accuracy(cluster_train, y_train, cluster_test, y_test, k, match=majority):
    """Share in [0, 1] of test examples whose cluster has their label in the table `match` makes on train.

    match: majority (clusters may share a label) or assign (one to one); arguments and errors as there.
    Clusters that are the labels in another order: 1.
    """
    table = match(cluster_train, y_train, k)
    _counts(cluster_test, y_test, k)  # for its errors
    return (table[cluster_test.long()] == y_test).double().mean().item()


def rank_correlation(a, b):
    """Spearman's rho in [-1, 1] of two vectors (N,): the correlation of ranks, equal values sharing one.

    x and exp(x): 1.  nan where a vector is constant.  UserError: other shapes, nan.
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    _need(a.dim() == 1 and a.shape == b.shape, "two vectors (N,)", _shapes(a, b))
    _need(not (a.isnan().any() or b.isnan().any()), "two vectors of numbers", "nan")
    a, b = _ranks(a), _ranks(b)
    return ((a @ b) / (a.norm() * b.norm())).clamp(-1, 1).item()


def _ranks(a):
    """(N,) float64 ranks less their mean; equal values get the mean of their ranks."""
    _, which, count = a.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2).double()[which]
    return rank - rank.mean()


# ---- A small classifier, its label agreement and its Frechet distance --------------------------------------

class Classifier(nn.Module):
    """Strided 3x3 convolutions of 16, 32, 64, ... channels down to about 4 x 4, `dim` features, logits.

    shape (C, H, W), H, W >= 16.  (1, 28, 28), 10 classes: 16 @ 14 x 14, 32 @ 7 x 7, 64 @ 4 x 4, 128, 10.
    """

    def __init__(self, shape, classes, dim=128):
        super().__init__()
        c, h, w = self.shape = tuple(shape)
        _need(min(h, w) >= 16, "pictures of at least 16 x 16", f"{h} x {w}")
        rows = []
        for i in range(max(3, round(math.log2(min(h, w) / 4)))):
            width = min(16 * 2 ** i, 128)
            rows += [nn.Conv2d(c, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            c, h, w = width, (h + 1) // 2, (w + 1) // 2
        self.trunk = nn.Sequential(*rows, nn.Flatten(), nn.Linear(c * h * w, dim), nn.ReLU())
        self.head = nn.Linear(dim, classes)

    def features(self, x):
        """x (N, C, H, W) in [0, 1] -> (N, dim), the layer below the logits."""
        return self.trunk(x)

    def forward(self, x):
        """x (N, C, H, W) in [0, 1] -> logits a (N, classes)."""
        return self.head(self.trunk(x))


def classifier(images, labels, device, cache=None, name="", steps=None, seed=0):
    """Classifier of a data set, in eval mode: from the file `cache` if made alike, else trained and saved.

    images uint8 (N, C, H, W); labels (N,) integers >= 0: softmax over classes; or labels (N, A) in [0, 1]:
    A independent attributes, each a logit of its own.  Cross-entropy, Adam, one cycle, batch 128, shifts up
    to 2 pixels; `steps` None: 12 epochs, 100 to 1,500 steps, 99.2 % on MNIST's test pictures.  Same
    arguments, same weights (to the bit on a CPU), and the caller's random state is left alone.  UserError:
    other shapes, types, labels; a cache that is not one.
    """
    fit = (images.dim() == 4 and images.dtype == torch.uint8 and labels.dim() in (1, 2)
           and len(labels) == len(images))
    _need(fit and len(labels), "images uint8 (N, C, H, W) and labels (N,) or (N, A), N > 0",
          _shapes(images, labels))
    _need(labels.min() >= 0, "labels >= 0", labels.min().item())
    _need(labels.dim() == 1 or labels.max() <= 1, "attributes in [0, 1]", labels.max().item())
    classes = int(labels.max()) + 1 if labels.dim() == 1 else labels.shape[1]
    steps = steps or min(1500, max(100, 12 * len(images) // 128))
    some = images[::-(-len(images) // 1000)]
    made_from = [name, *images.shape, classes, int(some.sum()), int(labels.sum()), steps, seed, labels.dim()]
    # The CPU's generator alone draws the weights; torch.manual_seed would reset those of the GPUs too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        clf = Classifier(images.shape[1:], classes)
    saved = _read_cache(cache)
    if saved is not None and saved["made_from"] == made_from:
        clf.load_state_dict(saved["weights"])
        return clf.to(device).eval().requires_grad_(False)
    _train(clf.to(device), images, labels, steps, seed)
    if cache is not None:
        os.makedirs(os.path.dirname(cache) or ".", exist_ok=True)
        partial = f"{cache}.{os.getpid()}"
        try:
            torch.save({"made_from": made_from, "weights": clf.state_dict()}, partial)
            os.replace(partial, cache)
        except (OSError, RuntimeError) as e:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)
            raise UserError(f"{cache} cannot be written ({e}): free some space, or give another "
                            "--data-dir") from e
    return clf.eval().requires_grad_(False)


def _read_cache(cache):
    if cache is None or not os.path.exists(cache):
        return None
    try:
        intact(cache)
        saved = torch.load(cache, map_location="cpu", weights_only=True)
    except Exception as e:
        raise UserError(f"expected a classifier in {cache}, found an unreadable file: delete it") from e
    _need(isinstance(saved, dict) and saved.keys() == {"made_from", "weights"}, f"a classifier in {cache}",
          "a file of something else: delete it or name another")
    return saved


def _train(clf, images, labels, steps, seed, batch=128, lr=5e-3, shift=2):
    device = next(clf.parameters()).device
    opt = torch.optim.Adam(clf.parameters(), lr)
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps)
    rng = torch.Generator().manual_seed(seed)
    n, _, h, w = images.shape
    order = torch.cat([torch.randperm(n, generator=rng) for _ in range(-(-steps * batch // n))])
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for i in order[:steps * batch].split(batch):
            dy, dx = torch.randint(2 * shift + 1, (2,), generator=rng).tolist()
            x, y = (t[i.to(t.device)].to(device) for t in (images, labels))
            a = clf(F.pad(_unit(x), (shift,) * 4)[..., dy:dy + h, dx:dx + w])
            loss = F.cross_entropy(a, y.long()) if y.dim() == 1 else \
                F.binary_cross_entropy_with_logits(a, y.float())
            opt.zero_grad()
            loss.backward()
            opt.step()
            cycle.step()


def _unit(x):
    """Pictures as float32 in [0, 1]: uint8 divided by 255; floats have to lie there."""
    if x.dtype == torch.uint8:
        return x.float() / 255
    low, high = x.aminmax()
    _need(low >= -1e-3 and high <= 1 + 1e-3, "pictures uint8 or in [0, 1]", f"{low:.3g} to {high:.3g}")
    return x.float()


@torch.no_grad()
def _each(f, clf, x, batch=500):
    """f of all pictures x (N, C, H, W), a batch at a time, with clf in eval mode, on its device."""
    _need(x.shape[1:] == clf.shape and len(x), f"pictures (N, *{clf.shape}), N > 0", _shapes(x))
    training, device = clf.training, next(clf.parameters()).device
    clf.eval()
    out = torch.cat([f(_unit(x_i.to(device))) for x_i in x.split(batch)])
    clf.train(training)
    return out


def logits(clf, x):
    """The classifier's logits (N, classes or A) of pictures x (N, C, H, W), uint8 or float in [0, 1]."""
    return _each(clf, clf, x)


def label_agreement(clf, x, y):
    """Share in [0, 1] of the pictures x whose largest logit is their label y's: the accuracy, if x is real.

    x (N, C, H, W) uint8 or float in [0, 1], y (N,) integers.  All logits equal: the share of label 0.
    UserError: other shapes or ranges.
    """
    _need(y.shape == x.shape[:1], f"labels ({len(x)},)", _shapes(y))
    label = logits(clf, x).argmax(1)
    return (label == y.to(label.device)).double().mean().item()


def frechet(feat_a, feat_b):
    """||m1 - m2||^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), m and C the mean and covariance of two sets of features.

    feat_a (N, d), feat_b (M, d), N, M > 1 -> a float >= 0; 0 for a set and itself; N(m1, s1^2 I) and
    N(m2, s2^2 I): ||m1 - m2||^2 + d (s1 - s2)^2.  Few samples bias it upwards: compare at one N.
    UserError: other shapes.  Source: FID, Heusel et al. 2017.
    """
    _need(feat_a.dim() == feat_b.dim() == 2 and feat_a.shape[1] == feat_b.shape[1]
          and min(len(feat_a), len(feat_b)) > 1,
          "features (N, d) and (M, d), N, M > 1", _shapes(feat_a, feat_b))
    a, b = feat_a.double(), feat_b.double().to(feat_a.device)
    C1, C2 = torch.atleast_2d(a.T.cov()), torch.atleast_2d(b.T.cov())
    # With R = C1^(1/2), R C2 R is symmetric and has the eigenvalues of C1 C2: no complex numbers.
    e, U = torch.linalg.eigh(C1)
    R = U * e.clamp(min=0).sqrt() @ U.T
    cross = torch.linalg.eigvalsh(R @ C2 @ R).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + C1.trace() + C2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def frechet_distance(clf, x_a, x_b):
    """Frechet distance of two sets of pictures in the classifier's features; 0 for a set and itself.

    x_a (N, C, H, W), x_b (M, C, H, W), uint8 or float in [0, 1]; errors as in label_agreement and frechet.
    The offline stand-in for FID, fit for grey digits too.  Its scale is this one classifier's: compare values
    of one classifier at one N, and never with FID.
    """
    return frechet(_each(clf.features, clf, x_a), _each(clf.features, clf, x_b))


# ---- L2-SVM: DCGAN Sec. 5 ---------------------------------------------------------------------------------

SINGLE = 2 ** 25  # l2_svm calculates with more features than this, in all, in float32


@torch.no_grad()
def l2_svm(features, labels, C=1.0, tol=1e-4, max_iter=100, start=None):
    """L2-SVM, one against rest: min (|w|^2 + b^2) / 2 + C sum_i max(0, 1 - y_i (w.x_i + b))^2, y_i = +-1.

    features (N, d), labels (N,) integers >= 0 -> (d + 1, classes) float64, the last row b: each class's value
    within a share tol of its minimum, by Newton steps with conjugate gradients; a warning if max_iter are too
    few.  start: weights to begin with, such as those of C / 10 (None: found here).  The features are copied
    once, more than SINGLE numbers as float32.  x = -1, 1 labelled 0, 1: label 1 has w = 4 C / (1 + 4 C),
    b = 0.  UserError: other shapes or labels, C <= 0.  Source: DCGAN Sec. 5; the objective is that of
    scikit-learn's LinearSVC(C=C, dual=False).
    """
    _need(features.dim() == 2 and labels.shape == features.shape[:1] and len(labels),
          "features (N, d) and labels (N,), N > 0", _shapes(features, labels))
    _need(C > 0 and labels.min() >= 0, "C > 0 and labels >= 0", f"{C} and {int(labels.min())}")
    n, d = features.shape
    # Half the memory and time, and rounding far below tol as long as C is not large.
    dtype = torch.float32 if features.numel() > SINGLE else torch.float64
    X = torch.ones(n, d + 1, dtype=dtype, device=features.device)
    X[:, :d] = features
    _need(torch.stack(X.aminmax()).isfinite().all(), "finite features", "nan or inf")
    Y = 2 * F.one_hot(labels.to(X.device).long()).T.double() - 1  # (classes, N)
    _need(start is None or start.shape == (d + 1, len(Y)), f"start ({d + 1}, {len(Y)})",
          start is not None and _shapes(start))
    # w is in the span of the points: with X^T = Q R, w = Q u, and u solves the n x n problem R^T.
    few = n <= min(d, 2000)  # of more points Q and R cost more than they save
    if few:
        Q, R = torch.linalg.qr(X.T)
        X, Q = R.T.contiguous(), Q.double()

    if start is None:
        w = Y.new_zeros(len(Y), X.shape[1])
        # A large C is hard from w = 0 and easy from the solution at C / 10: rise to it from about 1 / |x|^2.
        square = sum(x.double().square().sum().item() for x in X.split(1000)) / n
        for i in range(max(0, round(math.log10(C * square))), 0, -1):
            w, _ = _newton(X, Y, C / 10 ** i, w, max(tol, 0.1), max_iter)
    else:
        w = start.to(Y).T
        w = w @ Q if few else w
    w, gap = _newton(X, Y, C, w, tol, max_iter)
    if gap > tol:
        warnings.warn(f"l2_svm: after {max_iter} steps up to {gap:.1e} above the minimum", stacklevel=2)
    return Q @ w.T if few else w.T.contiguous()


def _newton(X, Y, C, w, tol, max_iter):
    """w (classes, d) of least f = |w|^2 / 2 + C |max(0, slack)|^2, slack = 1 - Y (w X^T); its gap."""
    def times(v, A):  # with the classes as rows: A v is many times slower on a CPU
        return (v.to(A) @ A).double()

    for i in range(max_iter + 1):
        slack = 1 - Y * times(w, X.T)
        f = w.square().sum(1) / 2 + C * slack.clamp(min=0).square().sum(1)
        g = w - 2 * C * times(Y * slack.clamp(min=0), X)
        # Curvature is 1 or more, so f is at most |g|^2 / 2 above its minimum.
        gap = g.square().sum(1) / 2 / f
        todo = gap > tol  # classes
        if i == max_iter or not todo.any():
            return w, gap.max().item()
        # Newton: (I + 2 C X^T diag(slack > 0) X) s = -g, to |r| = |g| / 10, or to tol / 10 by that bound on
        # the quadratic model.  Along go w X^T's changes a.
        active = (slack > 0).double()
        s, a, r = torch.zeros_like(w), torch.zeros_like(Y), -g
        p, rr = r, r.square().sum(1)
        enough = rr / 100
        for _ in range(500):
            go = todo & (rr > enough) & (rr / 2 > tol / 10 * (f + (s * (g - r)).sum(1) / 2))
            if not go.any():
                break
            Xp = times(p, X.T)
            Hp = p + 2 * C * times(active * Xp, X)
            alpha = torch.where(go, rr / (p * Hp).sum(1), 0)[:, None]
            s, a, r = s + alpha * p, a + alpha * Xp, r - alpha * Hp
            before, rr = rr, r.square().sum(1)
            p = r + torch.where(go, rr / before, 0)[:, None] * p
        # The step t in [0, 2] of least f: bisection on f's slope, which rises with t; slack is linear in t.
        change, ws, ss = -Y * a, (w * s).sum(1), s.square().sum(1)
        t, half = torch.ones_like(f), 1.0
        for _ in range(30):
            half /= 2
            slope = ws + t * ss + 2 * C * ((slack + t[:, None] * change).clamp(min=0) * change).sum(1)
            t = t - half * slope.sign()
        w = w + t[:, None] * s


def svm_predict(w, features):
    """(N,) labels argmax_k w_k.x + b_k, for weights w (d + 1, classes) of l2_svm and features (N, d)."""
    d = len(w) - 1
    _need(features.dim() == 2 and features.shape[1] == d, f"features (N, {d})", _shapes(features))
    return torch.cat([(x.to(w) @ w[:-1] + w[-1]).argmax(1) for x in features.split(1000)])

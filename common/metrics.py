"""Measures that several papers share.  All run offline, without Inception network, scikit-learn or SciPy."""

import hashlib
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import UserError, intact
from common.fuse import precise, sampling
from common.log import say, whole


def need(ok, expected, found):
    """Raise the UserError "expected ..., found ..." unless `ok`."""
    if not ok:
        raise UserError(f"expected {expected}, found {found}")


def finite(*tensors):
    """Raise a UserError if any number is NaN or infinite, as a measure of it would be meaningless."""
    bad = sum(int((~t.isfinite()).sum()) for t in tensors)
    need(not bad, "finite numbers to measure", f"{bad} that are NaN or infinite")


# ---- A network on a whole data set ------------------------------------------------------------------------

@torch.no_grad()
def batched(net, *tensors, size=500, scale=None):
    """net(*tensors) without gradients, evaluated `size` rows at a time and concatenated.

    net: a module, which runs in eval mode and receives rows on its own device; or a function, which runs as
    it is and receives rows on their device.  tensors (N, ...); None is passed on as None.
    scale (low, high): uint8 tensors become float32, 0 -> low and 255 -> high, as in Batches.
    Returns what net returns: a tensor, None, or a tuple of these.  The identity with scale (-1, 1) maps uint8
    0 and 255 to -1 and 1.
    """
    module = isinstance(net, nn.Module)
    weights = next(itertools.chain(net.parameters(), net.buffers()), None) if module else None

    def ready(rows):
        rows = rows if weights is None else rows.to(weights.device)
        if scale is None or rows.dtype != torch.uint8:
            return rows
        low, high = scale
        return rows.float().div_(255).mul_(high - low).add_(low)

    given = [t for t in tensors if t is not None]
    parts = []
    with sampling(*[net] if module else []):
        for start in range(0, max(len(given[0]), 1), size):  # no rows: call it once for the output's shape
            parts.append(net(*(t if t is None else ready(t[start:start + size]) for t in tensors)))
    return _concatenate(parts)


def _concatenate(parts):
    if parts[0] is None:
        return None
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return tuple(map(_concatenate, zip(*parts)))


# ---- Parzen window: GAN Table 1, CGAN Table 1, AAE Table 1 ------------------------------------------------

@torch.no_grad()
def parzen_lls(samples, x, sigmas, chunk=1000):
    """(S, N) parzen_ll() for S values of sigma, computed from the same squared distances."""
    samples, x = precise(samples.flatten(1)), precise(x.flatten(1))
    finite(samples, x)
    n, d = samples.shape
    s = torch.tensor(sigmas, dtype=torch.float64, device=samples.device)[:, None]
    ll = []
    for x_i in x.split(chunk):
        # ||x||^2 - 2 x mu + ||mu||^2 cancels digits, so use float64, which also never runs as TF32.
        x_i = x_i.to(samples.device, torch.float64)
        log_sum = x_i.new_full((len(s), len(x_i)), -math.inf)
        for mu in samples.split(chunk):
            mu = mu.double()
            d2 = torch.addmm(mu.square().sum(1), x_i, mu.T, alpha=-2) + x_i.square().sum(1, keepdim=True)
            near = d2.clamp_(min=0).min(1).values
            far = (near[:, None] - d2).float()  # the largest term is exp(0), so float32 suffices
            mass = torch.stack([far.div(2 * v * v).exp_().sum(1) for v in sigmas])
            log_sum = torch.logaddexp(log_sum, mass.double().log() - near / (2 * s * s))
        ll.append(log_sum - math.log(n) - d * (s * math.sqrt(2 * math.pi)).log())
    return torch.cat(ll, 1)


def parzen_ll(samples, x, sigma, chunk=1000):
    """l(x) = log mean_i exp(-||(x - mu_i) / sigma||^2 / 2) - d log(sigma sqrt(2 pi)), in nats.

    samples mu (n, ...), x (N, ...): floating point, same shape and scale, d numbers each.  Returns (N,)
    float64 on the samples' device.  Memory: chunk x chunk distances.
    A single sample equal to x, d = 1, sigma = 1: -log(2 pi) / 2 = -0.9189.
    UserError: numbers that are not finite.  Source: GAN's parzen_ll.py.
    """
    return parzen_lls(samples, x, [float(sigma)], chunk)[0]


def parzen(samples, valid, test, chunk=1000):
    """Mean l(x) over `test` in nats, at the sigma of numpy.logspace(-1, 0, 10) that is best on `valid`.

    Shapes: see parzen_ll.  Returns dict(ll, se, sigma), se = std / sqrt(N_test).
    All three sets from N(0, 1): ll tends to -(1 + log(2 pi)) / 2 = -1.4189 as they grow.
    Protocol of GAN, CGAN and AAE on MNIST: 10,000 samples, pixels in [0, 1], valid = train[50000:51000],
    test = all 10,000 test images.
    """
    sigmas = np.logspace(-1, 0, 10).tolist()
    sigma = sigmas[int(parzen_lls(samples, valid, sigmas, chunk).mean(1).argmax())]
    ll = parzen_ll(samples, test, sigma, chunk)
    return {"ll": ll.mean().item(), "se": ll.std(correction=0).item() / math.sqrt(len(ll)), "sigma": sigma}


# ---- Codes against factors: InfoGAN Sec. 7 ----------------------------------------------------------------

def rank_correlation(a, b):
    """Spearman's rho in [-1, 1] of two vectors (N,): the correlation of their ranks; ties share a rank.

    x and exp(x): 1.  A constant vector: nan.
    """
    a, b = (_ranks(precise(torch.as_tensor(t))) for t in (a, b))
    return ((a @ b) / (a.norm() * b.norm())).clamp(-1, 1).item()


def _ranks(a):
    """(N,) float64 ranks minus their mean; equal values get the mean of their ranks."""
    _, which, count = a.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2).double()[which]
    return rank - rank.mean()


# ---- A small classifier, label agreement and Frechet distance ---------------------------------------------

class Classifier(nn.Module):
    """Strided 3x3 convolutions with 16, 32, 64, ... channels down to about 4 x 4, `dim` features, logits.

    shape (C, H, W), H, W >= 16.  (1, 28, 28), 10 classes: 16 @ 14 x 14, 32 @ 7 x 7, 64 @ 4 x 4, 128, 10.
    """

    def __init__(self, shape, classes, dim=128):
        super().__init__()
        c, h, w = self.shape = tuple(shape)
        need(min(h, w) >= 16, "images of at least 16 x 16", f"{h} x {w}")
        rows = []
        for i in range(max(3, round(math.log2(min(h, w) / 4)))):
            width = min(16 * 2 ** i, 128)
            rows += [nn.Conv2d(c, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            c, h, w = width, (h + 1) // 2, (w + 1) // 2
        self.trunk = nn.Sequential(*rows, nn.Flatten(), nn.Linear(c * h * w, dim), nn.ReLU())
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        """x (N, C, H, W) in [0, 1] -> logits a (N, classes)."""
        return self.head(self.trunk(x))


RECIPE = 1  # increase it when Classifier or _train changes, so that old cache files are not used


def classifier(images, labels, device, data_dir, steps=None, seed=0):
    """A Classifier trained on these images, in eval mode; its weights are cached in DATA_DIR/cache.

    images uint8 (N, C, H, W).  labels (N,) integers >= 0: softmax over classes; or (N, A) in [0, 1]: A
    independent attributes, one logit each.  Cross-entropy, Adam, one cycle, batch 128, shifts up to 2 pixels.
    steps None: 12 epochs, at least 100 and at most 1,500 steps; 99.2 % on MNIST's test images.
    The file name is a hash of labels, 1,000 of the images, steps and seed.  The same arguments give the same
    weights (bit-identical on a CPU).  The caller's random state does not change.
    data_dir None: no cache.  UserError: images smaller than 16 x 16; a damaged file.
    """
    classes = int(labels.max()) + 1 if labels.dim() == 1 else labels.shape[1]
    steps = steps or min(1500, max(100, 12 * len(images) // 128))
    # Seed only the CPU generator, which draws the weights; torch.manual_seed would also reset the GPUs'.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        clf = Classifier(images.shape[1:], classes)
    cache = data_dir and Path(data_dir) / "cache" / f"classifier-{_digest(images, labels, steps, seed)}.pt"
    if cache and cache.exists():
        _read(cache, clf)
    else:
        say(f"training the classifier that judges samples, once: {steps:,} steps on {len(images):,} images",
            sys.stderr)
        _train(clf.to(device), images, labels, steps, seed)
        if cache:
            _write(cache, clf)
    return clf.to(device).eval().requires_grad_(False)


def _digest(images, labels, steps, seed):
    found = hashlib.sha256(repr((RECIPE, *images.shape, *labels.shape, steps, seed)).encode())
    for t in (labels.float(), images[::-(-len(images) // 1000)]):
        found.update(t.cpu().contiguous().numpy())
    return found.hexdigest()[:16]


def _read(cache, clf):
    try:
        intact(cache)
        clf.load_state_dict(torch.load(cache, map_location="cpu", weights_only=True))
    except Exception as e:
        raise UserError(f"expected a classifier in {cache}, found an unreadable file: delete it") from e


def _write(cache, clf):
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with whole(cache) as f:
            torch.save(clf.state_dict(), f)
    except (OSError, RuntimeError) as e:
        raise UserError(f"{cache} cannot be written ({e}): free some space, "
                        "or give another --data-dir") from e


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
            a = clf(F.pad(x.float() / 255, (shift,) * 4)[..., dy:dy + h, dx:dx + w])
            loss = F.cross_entropy(a, y.long()) if y.dim() == 1 else \
                F.binary_cross_entropy_with_logits(a, y.float())
            opt.zero_grad()
            loss.backward()
            opt.step()
            cycle.step()


def logits(clf, x):
    """The classifier's logits (N, classes or A) for images x (N, C, H, W), uint8 or float in [0, 1]."""
    return batched(clf, x if x.dtype == torch.uint8 else x.float(), scale=(0, 1))


def features(clf, x):
    """The classifier's features (N, dim) for images x (N, C, H, W), uint8 or float in [0, 1]."""
    return logits(clf.trunk, x)


def label_agreement(clf, x, y):
    """Fraction in [0, 1] of images x that clf assigns to their label y.  For real images: its accuracy.

    x (N, C, H, W) uint8 or float in [0, 1], y (N,) integers.  All logits equal: the fraction with label 0.
    """
    label = logits(clf, x).argmax(1)
    return (label == y.to(label.device)).cpu().double().mean().item()


def frechet(feat_a, feat_b):
    """||m1 - m2||^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), with mean m and covariance C of each set of features.

    feat_a (N, d), feat_b (M, d), N, M > 1.  Returns a float >= 0; 0 for a set and itself; N(m1, s1^2 I) and
    N(m2, s2^2 I): ||m1 - m2||^2 + d (s1 - s2)^2.  Small sets bias it upwards, so compare at equal N.
    UserError: numbers that are not finite.  Source: FID, Heusel et al. 2017.
    """
    a, b = precise(feat_a).double(), precise(feat_b).double()
    b = b.to(a.device)
    finite(a, b)
    C1, C2 = torch.atleast_2d(a.T.cov()), torch.atleast_2d(b.T.cov())
    # With R = C1^(1/2), R C2 R is symmetric and has the eigenvalues of C1 C2; no complex numbers arise.
    e, U = torch.linalg.eigh(C1)
    R = U * e.clamp(min=0).sqrt() @ U.T
    cross = torch.linalg.eigvalsh(R @ C2 @ R).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + C1.trace() + C2.trace() - 2 * cross
    return max(distance.item(), 0.0)


def frechet_distance(clf, x_a, x_b):
    """Frechet distance of two sets of images in the classifier's features; 0 for a set and itself.

    x_a (N, C, H, W), x_b (M, C, H, W), uint8 or float in [0, 1].
    An offline substitute for FID that also suits greyscale digits.  Its scale depends on the classifier, so
    compare only values of the same classifier at equal N, never with FID.
    """
    return frechet(features(clf, x_a), features(clf, x_b))

"""Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks
Alec Radford, Luke Metz, Soumith Chintala, 2015.  arXiv:1511.06434

Strided convolutions, BatchNorm, no pooling, no hidden fully connected layers: GANs that train, a latent space
in which one can calculate, and a discriminator whose features serve a classifier.

    GAN's Eq. 1  max_D V(D, G) = E_x[log D(x)] + E_z[log(1 - D(G(z)))]               -> V()
    Sec. 3       networks: 64x64, 32x32 of ImageNet, 32x32 of SVHN                   -> networks(), NETS
    Sec. 4       D's and G's updates in turn, Adam 2e-4, beta_1 .5                   -> train_step()
    Sec. 5       features: D's convolutions max-pooled to 4x4, and an L2-SVM         -> features(), svm()
    Sec. 6.1     Fig. 4: the walk between random z                                   -> walk()
    Sec. 6.2     Fig. 5: guided backpropagation from D's last convolution            -> guided()
    Sec. 6.3.1   Fig. 6: an object forgotten by dropping maps of G                   -> forget()
    Sec. 6.3.2   Fig. 7: z_A - z_B + z_C of mean exemplars                           -> arithmetic()
    Sec. 6.3.2   Fig. 8: the turn vector                                             -> turning()

Run
    python dcgan.py                                              (34,000 steps on the built-in faces)
    python dcgan.py --width .25 --batch-size 64 --steps 3000     (narrow networks, for a CPU)
    python dcgan.py --dataset imagenet                           (150,000 steps)
    python dcgan.py --resume runs/dcgan-imagenet --features cifar10
    python dcgan.py --dataset svhn                               (114,000 steps)
    python dcgan.py --resume runs/dcgan-svhn --features svhn

Expect
    python dcgan.py --net svhn --width .5 --steps 4000    (rendered heads: 42 minutes on one busy core of an
    AMD EPYC, torch 2.15.0, float32, seed 0 alone)
    dcgan-arith   17 and 23.5 % of sums have both attributes (pixel space 12.5 and 13.5, samples 2.7 and 9.4)
    dcgan-turn    .978 rank correlation of the place on the turn with the predicted azimuth
    dcgan-window  .8 % still wear glasses (with as many maps dropped at random 62)
    dcgan-cifar, dcgan-cifar-400  70.1 and 58.2 +- .3 % right (paper 82.8, 73.8) by the features of a narrow,
    short run on 100,000 ImageNet pictures of 200 classes: --net imagenet --width .5 --steps 2000
    dcgan-svhn (paper 22.48 % error): not run yet

Deviations
    [dev 1] Pictures are drawn with BatchNorm's running averages (authors' code: each batch's own statistics),
            so that a picture is a function of its z alone.
    [dev 2] An attribute predictor, trained on the data, picks the exemplars of Figs. 7 and 8 among 2,000
            samples and judges the results.  The paper picked by eye (--exemplars) and did not measure.
    [dev 3] Fig. 6 forgets glasses: the regression tells samples with them from samples without by each map's
            mean.  The paper's, for windows, has activations inside and outside boxes drawn by hand.
    [dev 4] With --together D sees data and samples as one batch (authors' code, and without: two).  With
            statistics of their own, BatchNorm hides from D how bright and how contrasty samples are.
    [dev 5] BatchNorm's epsilon is torch's 1e-5 (authors' code: 1e-8).
    [dev 6] Near-duplicates stay in the data.  The paper removed those of LSUN by an autoencoder's hash.
"""

import copy
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common import UserError, data, log, metrics, run
from common.fuse import Adam, autocast, calibrate, descend, frozen, fuse, place, precise, sampling
from common.metrics import need, shapes

# --------------------------------------------------------------------------------------------------- networks


@dataclass
class Net:
    """One experiment: pictures, the rows of D's convolutions, latent and training."""

    size: int
    kernel: int
    maps: tuple              # of each convolution of D, down to 4 x 4; G is its mirror
    strides: tuple
    dz: int
    steps: int               # D's updates in the paper's epochs: half of the minibatches, G's the other half
    normal: bool = False     # z ~ N(0, 1), else Unif(-1, 1)
    lr: float = 2e-4
    batch: int = 128


NETS = {
    "64": Net(64, 5, (128, 256, 512, 1024), (2, 2, 2, 2), 100,
              steps=34_000),                                        # faces: 25 epochs of 350,000
    "imagenet": Net(32, 3, (128, 128, 256, 256, 512, 512), (1, 2, 1, 2, 1, 2), 256,
                    steps=150_000),                                 # 30 epochs of 1,281,167
    "svhn": Net(32, 5, (64, 128, 256), (2, 2, 2), 100, normal=True, lr=5e-4, batch=64,
                steps=114_000),                                     # 200 epochs of 73,257
}
NET_OF = {"imagenet": "imagenet", "cifar10": "imagenet", "cifar100": "imagenet", "svhn": "svhn",
          "mnist": "svhn", "fashion-mnist": "svhn", "kmnist": "svhn"}      # all others: 64


def networks(net, channels, width=1.0):
    """(G, D) of Sec. 3 with `width` times the paper's feature maps.

    G: z (n, dz) -> (n, channels, size, size) in [-1, 1].  D: pictures -> logits a (n,); D[0] is its trunk,
    one row a convolution.  "64": G's rows give 1024 x 4 x 4, 512 x 8 x 8, 256 x 16 x 16, 128 x 32 x 32 and
    channels x 64 x 64.
    """
    maps = [channels, *(max(8, round(width * m)) for m in net.maps)]
    rows, last, k = list(zip(maps, maps[1:], net.strides)), maps[-1], net.kernel

    def down(i, o, stride):                                # no BatchNorm at D's input
        norm = [] if i == channels else [nn.BatchNorm2d(o)]                     # [dev 5]
        return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), *norm, nn.LeakyReLU(0.2))

    def up(o, i, stride):                                  # nor at G's output, which is a tanh
        then = [nn.Tanh()] if o == channels else [nn.BatchNorm2d(o), nn.ReLU()]
        return nn.Sequential(nn.ConvTranspose2d(i, o, k, stride, k // 2, stride - 1, bias=False), *then)

    G = nn.Sequential(
        nn.Sequential(nn.Linear(net.dz, 16 * last, bias=False), nn.BatchNorm1d(16 * last), nn.ReLU(),
                      nn.Unflatten(1, (last, 4, 4))),
        *(up(*row) for row in reversed(rows)))
    D = nn.Sequential(
        nn.Sequential(*(down(*row) for row in rows)),
        nn.Flatten(), nn.Linear(16 * last, 1, bias=False), nn.Flatten(0))
    return G.apply(init), D.apply(init)


def init(module):
    """Weights N(0, .02) (Sec. 4), BatchNorm's scale N(1, .02), its shift 0 (authors' code)."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------- latents

def sample_z(n, net, device="cpu"):
    """z (n, dz): Unif(-1, 1), of SVHN's networks N(0, 1)."""
    if net.normal:
        return torch.randn(n, net.dz, device=device)
    return torch.rand(n, net.dz, device=device) * 2 - 1


def walk(z, columns=10):
    """Sec. 6.1: z (n, dz) -> ((n - 1) * columns, dz), row by row the straight line from a z to the next."""
    t = torch.linspace(0, 1, columns, device=z.device).view(1, -1, 1)
    return ((1 - t) * z[:-1, None] + t * z[1:, None]).flatten(0, 1)


def combine(v, picks):
    """Sec. 6.3.2: mean A - mean B + mean C.  v (N, ...) latents, or pictures for the baseline; picks: three
    tensors (R, k) of exemplars' indices in v -> (R, ...).  The mean of A where B and C are the same."""
    A, B, C = (v[i].mean(1) for i in picks)
    return A - B + C


def turn(z, left, right, columns=9):
    """Fig. 8: z (n, dz) -> (n, columns, dz), z + t (mean right - mean left) with t from -1 to 1.  left, right
    (k, dz): exemplars.  The middle column is z."""
    t = torch.linspace(-1, 1, columns, device=z.device).view(1, -1, 1)
    return z[:, None] + t * (right.mean(0) - left.mean(0))


# -------------------------------------------------------------------------------------------------- objective

def V(a_real, a_fake):
    """GAN's Eq. 1: E_x[log D(x)] + E_z[log(1 - D(G(z)))], D = sigmoid(a), a (n,).  -log 4 where D = 1/2
    everywhere."""
    return F.logsigmoid(a_real.float()).mean() + F.logsigmoid(-a_fake.float()).mean()


def log_D(a_fake):
    """E_z[log D(G(z))], what G ascends: a (n,) logits.  -log 2 where D = 1/2 everywhere."""
    return F.logsigmoid(a_fake.float()).mean()


# ------------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="faces")
    add = p.add_argument_group("DCGAN").add_argument
    positive = run.number(float, 0, open_low=True)
    add("--net", choices=NETS, help="networks of Sec. 3 [those of the data set: imagenet for CIFAR too and "
        "colour .npz of 32x32, svhn for grey digits, else 64]")
    add("--width", type=positive, default=1.0, help="feature maps as a share of the paper's [%(default)s]")
    add("--lr", type=positive, help="Adam's rate, Sec. 4 [2e-4, svhn 5e-4]")
    add("--together", action="store_true", help="D sees data and samples as one batch, not two [dev 4]")
    add("--exemplars", metavar="FILE", help="samples picked by eye, numbered as --sample draws them, JSON: "
        '{"A": [3 numbers], "B": [3], "C": [3]} for Fig. 7, {"left": [4], "right": [4]} for Fig. 8')
    add("--features", metavar="DATASET", help="with --resume: Sec. 5, D's features on this labelled data set")
    args = run.parse(p, argv, free=("exemplars", "features"))
    if args.features and not args.resume:
        p.error("--features needs --resume RUN: the run whose D gives the features")
    return args


def settle(args):
    """The networks, and batch size and steps where no flag gives them."""
    name = args.net or NET_OF.get(args.dataset, "64")
    if not args.net and args.dataset.endswith(".npz"):
        _, channels, size, _ = data.load(args.dataset, args.data_dir).images.shape
        if size <= 32:
            name = "imagenet" if channels == 3 else "svhn"
    args.batch_size = args.batch_size or NETS[name].batch
    args.steps = args.steps or NETS[name].steps
    return NETS[name]


# --------------------------------------------------------------------------------------------------- training

def build(args, net, channels):
    """G, D, their optimizers and the fused iteration: one update of D, then one of G."""
    G, D = place(args, *networks(net, channels, args.width))
    lr = args.lr or net.lr
    # weight_decay: 1e-5 times a parameter is added to its gradient, as in the authors' code.
    opt_D, opt_G = (Adam(part.parameters(), lr, weight_decay=1e-5) for part in (D, G))
    amp = autocast(args)

    @fuse(args)
    def train_step(x_real):                                # x_real (n, C, H, W) in [-1, 1]
        n, device = len(x_real), x_real.device
        # D ascends V.
        with amp:
            with torch.no_grad():
                x_fake = G(sample_z(n, net, device))
            a_real, a_fake = judge(D, x_real, x_fake, args.together)
        v = V(a_real, a_fake)
        descend(-v, opt_D)
        # G ascends log D(G(z)) on fresh z, through the updated D.
        with amp, frozen(D):
            x_fake = G(sample_z(n, net, device))
            a_fake = judge(D, x_real if args.together else None, x_fake, args.together)[1]
        descend(-log_D(a_fake), opt_G)
        return {"V": v, "D(x)": a_real.float().sigmoid().mean(), "D(G(z))": a_fake.float().sigmoid().mean()}

    return G, D, opt_D, opt_G, train_step


def judge(D, x_real, x_fake, together):
    """Logits of data (None: left out) and of samples.  BatchNorm's statistics are each batch's own, or with
    `together` those of both as one batch [dev 4]."""
    if together:
        return D(torch.cat([x_real, x_fake])).split([len(x_real), len(x_fake)])
    return None if x_real is None else D(x_real), D(x_fake)


def decode(G, z):
    """Pictures (n, C, H, W) of z (n, dz), with BatchNorm's running averages [dev 1]."""
    with sampling(G):
        return torch.cat([G(part).float() for part in z.split(500)])


# ---------------------------------------------------------------------------------- Sec. 5: D as a classifier

CS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
PROTOCOLS = {    # Tables 1 and 2; any other data: all labels, one fit
    "cifar10": {"dcgan-cifar": {"paper": 82.8},
                "dcgan-cifar-400": {"paper": 73.8, "per_class": 400, "draws": 5}},
    "svhn": {"dcgan-svhn": {"paper": 22.48, "per_class": 100, "draws": 100, "tries": 10,
                            "Cs": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)}},
}


def scaled(images, device):
    """uint8 pictures as float32 in [-1, 1] on the device."""
    return images.to(device).float() / 127.5 - 1


def average(D, images, device):
    """D in eval mode, BatchNorm's statistics the means over minibatches of 128 `images` (authors' code)."""
    calibrate(D[0], ([scaled(x, device)] for x in images.split(128)))
    return D.eval()


@torch.no_grad()
def activations(D, images, device):
    """Sec. 5.1: every convolution of D max-pooled to 4x4, (N, 16 * maps) float16, as they are, not rescaled.

    28,672 numbers a picture for the ImageNet networks, 7,168 for SVHN's.
    """
    out = None
    for rows in torch.arange(len(images)).split(500):
        x, h = scaled(images[rows], device), []
        for convolution in D[0]:
            x = convolution(x)
            h.append(F.adaptive_max_pool2d(x, 4).flatten(1))
        h = torch.cat(h, 1)
        out = h.new_empty(len(images), h.shape[1], dtype=torch.float16) if out is None else out
        out[rows] = h.half()                                # half the memory: 50,000 x 28,672 is 2.9 GB
    return out


def balanced(y, rows, per_class):
    """`per_class` random ones of the `rows` of each label in y; all rows if it is None."""
    if per_class is None:
        return rows
    rows = rows[torch.randperm(len(rows), device=rows.device)]
    return torch.cat([rows[y[rows] == k][:per_class] for k in y.unique()])


SINGLE = 2 ** 25  # l2_svm works in float32 on more numbers than this


@torch.no_grad()
def l2_svm(features, labels, C=1.0, tol=1e-4, max_iter=100, start=None):
    """L2-SVM, one against the rest: min (|w|^2 + b^2) / 2 + C sum_i max(0, 1 - y_i (w.x_i + b))^2, y_i = +-1.

    features (N, d), labels (N,) integers >= 0.  Returns (d + 1, classes) float64, the last row b.  Newton's
    method with conjugate gradients, until each class is within a fraction tol of its minimum; a warning if
    max_iter steps do not suffice.  start: initial weights, such as those of C / 10.  The features are copied.
    x = -1, 1 with labels 0, 1: for label 1, w = 4 C / (1 + 4 C), b = 0.  UserError: other shapes or labels,
    C <= 0.  The objective is that of scikit-learn's LinearSVC(C=C, dual=False).
    """
    need(features.dim() == 2 and labels.shape == features.shape[:1] and len(labels),
         "features (N, d) and labels (N,), N > 0", shapes(features, labels))
    need(C > 0 and labels.min() >= 0, "C > 0 and labels >= 0", f"{C} and {int(labels.min())}")
    n, d = features.shape
    # Half the memory and time.  Rounding stays far below tol unless C is large.
    dtype = torch.float32 if features.numel() > SINGLE else torch.float64
    X = torch.ones(n, d + 1, dtype=dtype, device=features.device)
    X[:, :d] = features
    need(torch.stack(X.aminmax()).isfinite().all(), "finite features", "nan or inf")
    Y = 2 * F.one_hot(labels.to(X.device).long()).T.double() - 1  # (classes, N)
    need(start is None or start.shape == (d + 1, len(Y)), f"start ({d + 1}, {len(Y)})",
         start is not None and shapes(start))
    # w is in the span of the points: with X^T = Q R, w = Q u, and u solves the n x n problem R^T.
    few = n <= min(d, 2000)                                 # for more points Q and R cost more than they save
    if few:
        Q, R = torch.linalg.qr(X.T)
        X, Q = R.T.contiguous(), Q.double()

    if start is None:
        w = Y.new_zeros(len(Y), X.shape[1])
        # A large C is hard from w = 0 and easy from the solution at C / 10: start near 1 / |x|^2 and go up.
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
    """(w, gap): w (classes, d) minimizes f = |w|^2 / 2 + C |max(0, slack)|^2, slack = 1 - Y (w X^T)."""
    def times(v, A):                                        # v A^T: A v is many times slower on a CPU
        return (v.to(A) @ A).double()

    for i in range(max_iter + 1):
        slack = 1 - Y * times(w, X.T)
        f = w.square().sum(1) / 2 + C * slack.clamp(min=0).square().sum(1)
        g = w - 2 * C * times(Y * slack.clamp(min=0), X)
        # The curvature is at least 1, so f is at most |g|^2 / 2 above its minimum.
        gap = g.square().sum(1) / 2 / f
        todo = gap > tol                                    # (classes,)
        if i == max_iter or not todo.any():
            return w, gap.max().item()
        # Newton step s: (I + 2 C X^T diag(slack > 0) X) s = -g, solved to |r| = |g| / 10, or to tol / 10 by
        # that bound on the quadratic model.  a = s X^T is updated with s.
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
        # Line search in [0, 2]: bisection on the slope of f, which rises with t; slack is linear in t.
        change, ws, ss = -Y * a, (w * s).sum(1), s.square().sum(1)
        t, half = torch.ones_like(f), 1.0
        for _ in range(30):
            half /= 2
            slope = ws + t * ss + 2 * C * ((slack + t[:, None] * change).clamp(min=0) * change).sum(1)
            t = t - half * slope.sign()
        w = w + t[:, None] * s


def svm_predict(w, features):
    """(N,) labels argmax_k w_k.x + b_k of features (N, d), for weights w (d + 1, classes) from l2_svm."""
    d = len(w) - 1
    need(features.dim() == 2 and features.shape[1] == d, f"features (N, {d})", shapes(features))
    return torch.cat([(x.to(w) @ w[:-1] + w[-1]).argmax(1) for x in features.split(1000)])


def svm(X, y, X_test, y_test, per_class=None, draws=1, tries=1, Cs=CS):
    """Test errors in % of `draws` L2-SVMs, each on `per_class` labels a class (None: on all), and their C.

    C is the best on a sixth of the training pictures, 10,000 at most, held out from `tries` draws of labels,
    the same for each C.  There 1e-2 above the minimum is near enough, and the C before gives the start.
    """
    def error(w, X_eval, y_eval):
        return 100 * (svm_predict(w, X_eval) != y_eval).double().mean().item()

    order, n, valid = torch.randperm(len(y), device=y.device), min(10000, len(y) // 6), {}
    held, pool = order[:n], order[n:]
    trials, w = [balanced(y, pool, per_class) for _ in range(tries)], [None] * tries
    for C in Cs:
        w = [l2_svm(X[rows], y[rows], C, 1e-2, start=start) for rows, start in zip(trials, w)]
        valid[C] = sum(error(v, X[held], y[held]) for v in w) / tries
        if valid[C] > min(valid.values()) + 0.5:            # larger ones are worse still, and slow to solve
            break
    C = min(valid, key=valid.get)
    draws = [balanced(y, order if per_class is None else pool, per_class) for _ in range(draws)]
    return torch.tensor([error(l2_svm(X[rows], y[rows], C), X_test, y_test) for rows in draws]), C


def features(r, D, net, channels):
    """Tables 1 and 2: what D's features are worth on --features, into a results.json of its own."""
    args = r.args
    pictures = data.load(args.features, args.data_dir, net.size, channels)
    if pictures.labels is None:
        raise UserError(f"--features {args.features}: this data set has no labels, which the SVM needs")
    images, y, test, y_test = pictures.images, pictures.labels, pictures.test_images, pictures.test_labels
    if test is None or y_test is None:                      # every sixth picture is kept for the test
        kept = torch.arange(len(y)) % 6 == 0
        images, y, test, y_test = images[~kept], y[~kept], images[kept], y[kept]
    images, y = (images[y >= 0], y[y >= 0]) if y.min() < 0 else (images, y)
    average(D, images, args.device)
    X, X_test = (precise(activations(D, x, args.device)) for x in (images, test))
    y, y_test = y.to(X.device), y_test.to(X.device)
    results = {}
    for key, how in PROTOCOLS.get(pictures.name, {f"features-{pictures.name}": {}}).items():
        how = dict(how)
        paper = {"paper": how.pop("paper")} if "paper" in how else {}
        with r.aside():
            errors, C = svm(X, y, X_test, y_test, **how)
        value = errors if key == "dcgan-svhn" else 100 - errors
        spread = {"std": value.std().item(), "draws": len(value)} if len(value) > 1 else {}
        results[key] = {"value": value.mean().item(), **paper, **spread, "C": C, "features": X.shape[1],
                        "unit": "% error" if key == "dcgan-svhn" else "% right"}
    r.folder = r.folder / f"features-{pictures.name}"
    r.folder.mkdir(exist_ok=True)
    r.results(results)


# --------------------------------------------------------------------------------- Sec. 6.2: what D looks for

class Guided(torch.autograd.Function):
    """Leaky ReLU that takes back only positive gradients, and only to positive inputs."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.leaky_relu(x, 0.2)

    @staticmethod
    def backward(ctx, g):
        return g.clamp(min=0) * (ctx.saved_tensors[0] > 0)


def guided(D, x, feature):
    """Guided backpropagation to pictures x (n, C, H, W) from the largest response of the map `feature` of D's
    last convolution in each: the gradient, (n, C, H, W)."""
    x = h = x.detach().requires_grad_()
    for convolution in D[0]:
        h = Guided.apply(convolution[:-1](h))
    return torch.autograd.grad(h[:, feature].flatten(1).max(1).values.sum(), x)[0]


def draw_fig5(D, images, device, n=8):
    """Fig. 5: a row for each of the first 6 features of D's last convolution, the n pictures that excite it
    most, by guided backpropagation: (6 n, C, H, W), each scaled to fill [-1, 1]."""
    D, x = average(copy.deepcopy(D), images, device), scaled(images, device)
    with torch.no_grad():
        response = torch.cat([D[0](part)[:, :6].amax((2, 3)) for part in x.split(250)])
    best = response.topk(min(n, len(x)), 0).indices        # (n, 6)
    g = torch.cat([guided(D, x[best[:, k]], k) for k in range(6)])
    return g / g.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)


# ---------------------------------------------------------------- Sec. 6.3: calculating with known attributes

POOL = 2000       # samples among which exemplars are found
EQUATIONS = (     # Fig. 7: A - B + C = Y; "-beard": without one
    ("smile long_hair -beard", "-smile long_hair -beard", "-smile -long_hair beard", "smile beard"),
    ("glasses -long_hair beard", "-glasses -long_hair beard", "-glasses long_hair -beard",
     "glasses long_hair"),
    ("Smiling -Male", "-Smiling -Male", "-Smiling Male", "Smiling Male"),                       # CelebA
    ("Eyeglasses Male", "-Eyeglasses Male", "-Eyeglasses -Male", "Eyeglasses -Male"),
)


def signed(a, concept, names):
    """Logits (N, k) of each word of a concept such as "smile -beard", a negated one's turned round.

    a (N, A): logits of the attributes `names`.  All positive: the predictor calls the picture that.
    """
    words = [(1, w) if w[0] != "-" else (-1, w[1:]) for w in concept.split()]
    return torch.stack([sign * a[:, names.index(w)] for sign, w in words], 1)


def log_p(a, concept, names):
    """log of the probability that a picture is all that a concept says, (N,).  -k log 2 for k words where
    a = 0."""
    return F.logsigmoid(signed(a, concept, names)).sum(1)


def share(a, concept, names):
    """Share in % of the pictures that the predictor calls `concept`."""
    return 100 * (signed(a, concept, names) > 0).all(1).cpu().double().mean().item()


def exemplars(score, repeats, k):
    """Indices (repeats, k) of samples with high scores (N,): row 0 the k best, the others k at random out of
    the 10 k best."""
    best = score.topk(min(10 * k, len(score))).indices
    rows = torch.rand(repeats, len(best), device=best.device).argsort(1)[:, :k]
    rows[0] = torch.arange(k, device=best.device)
    return best[rows]


def by_eye(path):
    """The lists of --exemplars as index tensors (1, k), by name."""
    sizes = {"A": 3, "B": 3, "C": 3, "left": 4, "right": 4}
    try:
        picks = {k: torch.tensor([v]) for k, v in json.loads(Path(path).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f"--exemplars {path} cannot be read as lists of numbers: {e}") from None
    fit = all(v.dtype == torch.int64 and v.shape == (1, sizes.get(k)) and 0 <= v.min() and v.max() < POOL
              for k, v in picks.items())
    if not fit or sorted(picks) not in (["A", "B", "C"], ["left", "right"], sorted(sizes)):
        raise UserError(f"--exemplars {path}: expected A, B and C, lists of 3 numbers, or left and right, "
                        f"lists of 4, or all five; numbers from 0 to {POOL - 1}")
    return picks


def known(extra):
    """Name -> (N,) in [0, 1]: the data's attributes that are 0 or 1, and azimuth; empty for data without.

    UserError: attributes or factors that are not numbers (N, A).
    """
    for key in ("attributes", "factors"):
        if key in extra and not (torch.is_tensor(extra[key]) and extra[key].ndim == 2):
            raise UserError(f"{key} of another kind found, numbers (N, A), a row for each picture, expected")
    none = torch.empty(0, 0)
    attributes = zip(extra.get("attribute_names", ()), extra.get("attributes", none).float().T)
    columns = {name: y for name, y in attributes if ((y == 0) | (y == 1)).all()}
    for name, y in zip(extra.get("factor_names", ()), extra.get("factors", none).float().T):
        if name == "azimuth":
            columns[name] = (y - y.min()) / (y.max() - y.min())
    return columns


def predictor(args, pictures, columns):
    """[dev 2] A classifier of the columns of known(), and the share in % of the attributes that it gets right
    on the last tenth of the pictures, 2,000 at most, which it has not seen."""
    y, n = torch.stack([*columns.values()], 1), len(pictures.images) - min(2000, len(pictures.images) // 10)
    clf = metrics.classifier(pictures.images[:n], y[:n], args.device, args.data_dir)
    right = (metrics.logits(clf, pictures.images[n:]) > 0).cpu() == (y[n:] > 0.5)
    return clf, 100 * right[:, [name != "azimuth" for name in columns]].double().mean().item()


def arithmetic(G, clf, names, z, x, a, equation, repeats=200):
    """dcgan-arith: share in % of A - B + C that the predictor calls Y, over `repeats` sets of 3 exemplars.

    z (N, dz), their pictures x and logits a -> (dict with the share in latent and in pixel space, the picks).
    """
    *concepts, Y = equation
    picks = [exemplars(log_p(a, concept, names), repeats, 3) for concept in concepts]
    results = decode(G, combine(z, picks)), combine(x, picks).clamp(-1, 1)
    latent, pixels = (share(metrics.logits(clf, (y + 1) / 2), Y, names) for y in results)
    return {"value": latent, "pixels": pixels, "samples": share(a, Y, names), "unit": f"% called {Y}"}, picks


def draw_fig7(G, z, x, picks):
    """Fig. 7, 3 rows of 10: for A, B and C 3 exemplars and the picture of their mean z; Y with 8 neighbours
    Y + Unif(-.25, .25) around it; and the same sum of pixels."""
    picks = [i[:1] for i in picks]
    means = decode(G, torch.cat([z[i].mean(1) for i in picks]))
    near = combine(z, picks) + (torch.rand(9, z.shape[1], device=z.device) * 0.5 - 0.25)
    near[4] = combine(z, picks)[0]
    near, gap = decode(G, near), torch.ones_like(x[:1])
    pixels = [gap, combine(x, picks).clamp(-1, 1), gap]
    rows = [torch.cat([x[i[0]], means[k:k + 1], gap, near[3 * k:3 * k + 3], gap, pixels[k]])
            for k, i in enumerate(picks)]
    return torch.cat(rows)


def turning(G, clf, names, z, a, repeats=20, n=10):
    """dcgan-turn: rank correlation of the position along the turn with the predicted azimuth, the mean over
    `repeats` vectors of 4 + 4 exemplars and n samples each -> (dict, the picks)."""
    azimuth = a[:, names.index("azimuth")]
    left, right = exemplars(-azimuth, repeats, 4), exemplars(azimuth, repeats, 4)
    rho = []
    for i, j in zip(left, right):
        some = z[torch.randperm(len(z), device=z.device)[:n]]
        path = turn(some, z[i], z[j])
        found = metrics.logits(clf, (decode(G, path.flatten(0, 1)) + 1) / 2)[:, names.index("azimuth")].cpu()
        rho += [metrics.rank_correlation(torch.arange(len(f)), f) for f in found.view(path.shape[:2])]
    return {"value": sum(rho) / len(rho), "unit": "rank correlation with azimuth"}, (left, right)


def forget(G, z, clf, names, a, word):
    """dcgan-window [dev 3]: maps of G's second-highest hidden convolution with a positive weight in a
    logistic regression for `word` are dropped.  -> (dict with the share in % that still has it, 3 rows of
    pictures: 10 samples with it, the same without those maps, without as many random ones)."""
    k = len(G) - 2                                          # G[:k] ends with that convolution
    has = a[:, names.index(word)] > 0
    with sampling(G):
        h = torch.cat([G[:k](part).mean((2, 3)) for part in z.split(500)])
    h = (h - h.mean(0)) / h.std(0).clamp_min(1e-6)
    regression = nn.Linear(h.shape[1], 1).to(z.device)
    opt = torch.optim.Adam(regression.parameters(), 0.02)
    for _ in range(500):
        opt.zero_grad()                                     # no descend(): of several ranks one alone is here
        F.binary_cross_entropy_with_logits(regression(h)[:, 0], has.float()).backward()
        opt.step()
    drop = regression.weight.detach()[0] > 0
    chance = drop[torch.randperm(len(drop), device=drop.device)]
    rows, left = [decode(G, z[has][:10])], []
    for maps in (drop, chance):
        with sampling(G):
            x = torch.cat([G[k:](G[:k](part) * ~maps.view(-1, 1, 1)) for part in z[has].split(500)])
        rows.append(x[:10])
        left.append(share(metrics.logits(clf, (x + 1) / 2), word, names))
    return {"value": left[0], "as many maps at random": left[1], "maps": int(drop.sum()),
            "unit": f"% still with {word}"}, torch.cat(rows)


# ------------------------------------------------------------------------------------------------------- main

def figures(r, G, D, net, images):
    """Figs. 3, 4 and 5, an untrained D's features beside D's, into the run's folder."""
    args = r.args
    with r.aside():
        r.show("fig3", log.grid(decode(G, sample_z(100, net, args.device)), 10, (-1, 1)))
        r.show("fig4", log.grid(decode(G, walk(sample_z(9, net, args.device))), 10, (-1, 1)))
        untrained = networks(net, images.shape[1], args.width)[1].to(args.device)
        left, right = (log.grid(draw_fig5(net_D, images[:1000], args.device), 8, (-1, 1))
                       for net_D in (untrained, D))
        r.show("fig5", torch.cat([left, left.new_full((3, left.shape[1], 8), 255), right], 2))


def evaluate(r, G, net, pictures):
    """Figs. 6, 7 and 8 and the numbers that the data's attributes or labels allow, experiment id -> dict."""
    device, results, picks, clf = r.args.device, {}, {}, None
    z = torch.cat([sample_z(500, net, device) for _ in range(POOL // 500)])    # drawn as --sample draws
    x, columns = decode(G, z), known(pictures.extra)
    if columns:
        names = list(columns)
        clf, right = predictor(r.args, pictures, columns)
        a = metrics.logits(clf, (x + 1) / 2)
        results["predictor"] = {"value": right, "unit": "% of held-out attributes right"}
        able = [e for e in EQUATIONS if {w.lstrip("-") for w in " ".join(e).split()} <= set(names)]
        for ending, letter, equation in zip(("", "-2"), "ab", able):
            results[f"dcgan-arith{ending}"], abc = arithmetic(G, clf, names, z, x, a, equation)
            r.show(f"fig7{letter}", log.grid(draw_fig7(G, z, x, abc), 10, (-1, 1)))
        if "azimuth" in names:
            results["dcgan-turn"], (picks["left"], picks["right"]) = turning(G, clf, names, z, a)
        word = "Eyeglasses" if "Eyeglasses" in names else "glasses"
        if word in names and 0 < share(a, word, names) < 100:
            results["dcgan-window"], rows = forget(G, z, clf, names, a, word)
            r.show("fig6", log.grid(rows, 10, (-1, 1)))
    elif pictures.labels is not None and pictures.labels.min() >= 0:
        clf = metrics.classifier(pictures.images, pictures.labels, device, r.args.data_dir)
    if clf is not None:
        real = pictures.images if pictures.test_images is None else pictures.test_images
        real = real[::-(-len(real) // POOL)]                # strided: a test part may be sorted by class
        results["frechet"] = {"value": metrics.frechet_distance(clf, (x + 1) / 2, real)}
    if r.args.exemplars:
        picks |= by_eye(r.args.exemplars)
        if "A" in picks:
            r.show("fig7", log.grid(draw_fig7(G, z, x, [picks[k] for k in "ABC"]), 10, (-1, 1)))
    if "left" in picks:
        path = turn(sample_z(8, net, device), *(z[picks[k][0]] for k in ("left", "right")))
        r.show("fig8", log.grid(decode(G, path.flatten(0, 1)), 9, (-1, 1)))
    return results


def main(argv=None):
    args = parse_args(argv)
    net, r = settle(args), run.Run(args)
    if args.exemplars:
        by_eye(args.exemplars)
    pictures = data.load(args.dataset, args.data_dir, net.size)
    known(pictures.extra)                                   # refuses what it could not use after training
    images = pictures.images                                # with any near-duplicates [dev 6]
    batches = data.Batches(images, batch_size=args.batch_size, device=args.device, seed=args.seed,
                           scale=(-1.0, 1.0), rank=r.rank, world=r.world)
    G, D, opt_D, opt_G, train_step = build(args, net, images.shape[1])
    r.keep(G=G, D=D, opt_D=opt_D, opt_G=opt_G, batches=batches)
    if args.sample:
        with r.aside():
            return r.sample(lambda n: decode(G, sample_z(500, net, args.device)[:n]), (-1.0, 1.0))
    if args.features:
        return features(r, D, net, images.shape[1])

    for step in r.loop():
        r.log(train_step(next(batches)))
        if r.every(args.save_every):
            with r.aside():
                r.show("samples", log.grid(decode(G, sample_z(100, net, args.device)), 10, (-1, 1)))
        if step == batches.per_epoch:                       # Fig. 2: after D has seen the data once
            with r.aside():
                r.show("fig2", log.grid(decode(G, sample_z(100, net, args.device)), 10, (-1, 1)))

    if r.lead:
        figures(r, G, D, net, images)
        with r.aside():
            results = evaluate(r, G, net, pictures)
        r.results(results, passed=args.dataset != "faces" or results["dcgan-turn"]["value"] >= 0.8)


if __name__ == "__main__":
    main()

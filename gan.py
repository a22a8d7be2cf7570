"""Generative Adversarial Networks
Ian Goodfellow, Jean Pouget-Abadie, Mehdi Mirza, Bing Xu, David Warde-Farley, Sherjil Ozair, Aaron Courville,
Yoshua Bengio, 2014.  arXiv:1406.2661

A generator G turns noise z into pictures; a discriminator D tells them from data; G learns from D's mistakes.

    Eq. 1    min_G max_D  V(D, G) = E_x[log D(x)] + E_z[log(1 - D(G(z)))]                -> V()
    Alg. 1   k steps of D up V on fresh minibatches, then one of G                       -> train_step()
    Sec. 3   G ascends log D(G(z)) in place of descending log(1 - D(G(z)))               -> objective_G()
    Eq. 2    D*(x) = p_data(x) / (p_data(x) + p_g(x))                                    -> D_star()
    Eq. 4-6  C(G) = E_data[log D*] + E_g[log(1 - D*)] = -log 4 + 2 JSD(p_data, p_g)      -> C()
    Thm. 1   C(G) = -log 4 at p_g = p_data, and nowhere lower                            -> toy()
    Table 1  log-likelihood of the test images under a Parzen window of samples          -> evaluate()
    Fig. 1   D, p_data and p_g as training goes on, in one dimension                     -> toy()
    Fig. 2   samples, and beside them the nearest training image                         -> fig2()
    Fig. 3   linear interpolation in z                                                   -> fig3()

Run
    python gan.py                      (MNIST: Table 1, Figs. 2a and 3)
    python gan.py --dataset toy        (Fig. 1, Thm. 1)
    python gan.py --dataset faces      (48 x 48 grey faces in place of TFD: Fig. 2b)
    python gan.py --dataset cifar10    (Fig. 2c; with --net cifar-conv Fig. 2d)

Expect
    gan-mnist-ll  224.4 and 223.2 nats of seeds 0 and 1, +- 2.2 over test images (paper 225 +- 2), after
                  175,000 steps: 350 epochs, 66 minutes on one core of an AMD EPYC with AVX512-BF16, torch
                  2.14.1, bfloat16; of seed 0 215.2 after 50,000, 219.6 after 75,000, 223.6 after 125,000
    gan-theory    C(G) = -1.3857 (-log 4 = -1.3863), E|D - D*| = 0.012 (20 seconds, float32)

Deviations
    [dev 1] G steps together with the last of D's k steps, from the same draws and dropped-out D, both at the
            old parameters, as in the authors' code.  --alternate: Algorithm 1 as printed.
    [dev 2] Every five epochs and at the end the validation likelihood is measured, and the best G is kept:
            the paper does not say where it stopped.  G is then the running average of its weights, over the
            last ninth of the steps: 155 nats against 98 at sigma .2 after 5,000 steps; 215.2 on the test
            images after 50,000, over 1,000 steps 201.4.  --average 0: G as it is.
    [dev 3] The TFD networks train on other faces, the Toronto data being closed, and without the second
            stage, which puts two more layers under the trained G.
    [dev 4] On MNIST the rates are .15 for D and .3 for G (authors' code: .1 for both).  Of G as it is, at
            sigma .2, 98 nats after 5,000 steps; with .1 for both -39, and 90 after 10,000.
"""

import copy
import math

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from common import UserError, data, log, metrics, run
from common.fuse import SGD, Adam, autocast, average, averaged, descend, frozen, fuse, place, sampling

# --------------------------------------------------------------------------------------------------- networks


class Maxout(nn.Module):
    """The largest of `pieces` linear maps for each of `n` units: (b, i) -> (b, n)."""

    def __init__(self, i, n, pieces):
        super().__init__()
        self.n, self.linear = n, nn.Linear(i, n * pieces)

    def forward(self, x):
        return rearrange(self.linear(x), "b (n p) -> b n p", n=self.n).amax(2)


class MaxoutConv(nn.Module):
    """The larger of two convolutions for each of `o` channels, then max-pooling: (b, i, H, W) -> (b, o, H',
    W')."""

    def __init__(self, i, o, kernel, padding, pool, stride):
        super().__init__()
        self.o, self.conv = o, nn.Conv2d(i, 2 * o, kernel, padding=padding)
        self.pool = nn.MaxPool2d(pool, stride, ceil_mode=True)

    def forward(self, x):
        return self.pool(rearrange(self.conv(x), "b (o p) h w -> b o p h w", o=self.o).amax(2))


class UntiedBias(nn.Module):
    """A bias of its own for every pixel of every channel."""

    def __init__(self, *shape):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return x + self.bias


def networks(name, mean, width=1.0):
    """(G, D) of the authors' code for the data set `name`; `mean` (C, H, W): the training images' mean in [0,
    1].

    G: z (n, 100) -> x (n, C, H, W).  D: x -> a (n,), the logit of D(x); dropout on the inputs of its layers.
    `width`: hidden units and maps as a share of the code's, 8 at least.
    """
    def w(n):
        return max(8, round(n * width))

    if name == "mnist":
        G = nn.Sequential(
            nn.Linear(100, w(1200)), nn.ReLU(),
            nn.Linear(w(1200), w(1200)), nn.ReLU(),
            nn.Linear(w(1200), 784), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28)))
        D = maxout_D(784, w(240))
        uniform(G, 0.05, width)
        G[4].bias.data.copy_(mean.flatten().clamp(1e-7, 1 - 1e-7).logit())
    elif name == "tfd":                                     # [dev 3]
        G = nn.Sequential(
            nn.Linear(100, w(8000)), nn.ReLU(),
            nn.Linear(w(8000), w(8000)), nn.Sigmoid(),
            nn.Linear(w(8000), 2304), nn.Sigmoid(), nn.Unflatten(1, (1, 48, 48)))
        D = maxout_D(2304, w(1200))
        uniform(G, 0.05, width)
        nn.init.constant_(G[2].bias, -2.0)
        sparse(G[4].weight, 100)
        G[4].bias.data.copy_(mean.flatten().clamp(1e-7, 1 - 1e-7).logit())
    elif name == "cifar-fc":
        G = nn.Sequential(
            nn.Linear(100, w(8000)), nn.ReLU(),
            nn.Linear(w(8000), w(8000)), nn.Sigmoid(),
            nn.Linear(w(8000), 3072), nn.Unflatten(1, (3, 32, 32)))
        D = maxout_D(3072, w(1600))
        uniform(G, 0.05, width)
    else:
        G = nn.Sequential(
            nn.Linear(100, w(8000)), nn.ReLU(),
            nn.Linear(w(8000), w(80) * 100), nn.Sigmoid(),
            nn.Unflatten(1, (w(80), 10, 10)),                                       # 80 x 10 x 10
            nn.ConvTranspose2d(w(80), 3, 5, stride=3, bias=False), UntiedBias(3, 32, 32))   # 3 x 32 x 32
        D = nn.Sequential(
            nn.Dropout(0.2), MaxoutConv(3, w(32), 8, 4, 4, 2),                      # 32 x 16 x 16
            nn.Dropout(0.5), MaxoutConv(w(32), w(32), 8, 3, 4, 2),                  # 32 x 7 x 7
            nn.Dropout(0.5), MaxoutConv(w(32), w(192), 5, 3, 2, 2),                 # 192 x 5 x 5
            nn.Flatten(), nn.Dropout(0.5), Maxout(w(192) * 5 * 5, w(500), 5),
            nn.Dropout(0.5), nn.Linear(w(500), 1), nn.Flatten(0))
        uniform(G, 0.05, width)
    uniform(D, 0.005, width)
    return G, D


def maxout_D(dim, n):
    return nn.Sequential(
        nn.Flatten(), nn.Dropout(0.2), Maxout(dim, n, 5),       # keeps .8 of the pixels, scaled by 1.25
        nn.Dropout(0.5), Maxout(n, n, 5),                       # keeps .5 of the units, scaled by 2
        nn.Dropout(0.5), nn.Linear(n, 1), nn.Flatten(0))


def uniform(net, bound, width=1.0):
    """Weights Unif(-bound, bound), biases 0; behind the first layer of a net of another `width` the bound is
    such that sums over its units keep their spread."""
    for i, (name, p) in enumerate(net.named_parameters()):
        b = bound if i == 0 else bound / width ** 0.5
        nn.init.zeros_(p) if name.endswith("bias") else nn.init.uniform_(p, -b, b)


def sparse(weight, k):
    """Each unit (row) gets `k` inputs, or all if there are fewer, with weights N(0, 1), the rest 0."""
    nn.init.zeros_(weight)
    columns = torch.rand(weight.shape).topk(min(k, weight.shape[1]), 1).indices
    weight.data.scatter_(1, columns, torch.randn(columns.shape))


# ---------------------------------------------------------------------------------------- data sets' settings

# name: picture size, channels, rates of D and G, images kept for validation, bound on a unit's weights, batch
NETS = {
    "mnist": {"size": 28, "channels": 1, "lr": (0.15, 0.3), "batch": 100, "valid": 10000,
              "norm": None},                                                        # [dev 4]
    "tfd": {"size": 48, "channels": 1, "lr": (0.05, 0.05), "batch": 100, "valid": 2000, "norm": 1.9365},
    "cifar-fc": {"size": 32, "channels": 3, "lr": (0.025, 0.025), "batch": 100, "valid": 10000,
                 "norm": None},
    "cifar-conv": {"size": 32, "channels": 3, "lr": (0.004, 0.004), "batch": 128, "valid": 10000,
                   "norm": None},
}
PAPER = {"mnist": 225, "tfd": 2057}    # Table 1, nats


def sample_z(n, name, device="cpu"):
    """z (n, 100): Unif(-sqrt 3, sqrt 3) for MNIST, of unit variance, else N(0, 1)."""
    if name == "mnist":
        return (torch.rand(n, 100, device=device) * 2 - 1) * math.sqrt(3)
    return torch.randn(n, 100, device=device)


def contrast(x, norm=55.0):
    """Each picture less its mean, scaled to Euclidean norm 55 (CIFAR-10, authors' code): (n, C, H, W)."""
    x = x - x.mean((1, 2, 3), keepdim=True)
    return norm * x / x.flatten(1).norm(dim=1).clamp_min(1e-8).view(-1, 1, 1, 1)


# -------------------------------------------------------------------------------------------------- objective

def V(a_real, a_fake):
    """Eq. 1: E_x[log D(x)] + E_z[log(1 - D(G(z)))], D = sigmoid(a), a (n,).  -log 4 where D = 1/2
    everywhere."""
    return F.logsigmoid(a_real.float()).mean() + F.logsigmoid(-a_fake.float()).mean()


def objective_G(a_fake, loss):
    """What G ascends.  "non-saturating" (Sec. 3): E_z[log D(G(z))]; "minimax" (Eq. 1): -E_z[log(1 -
    D(G(z)))]."""
    a = a_fake.float()
    return F.logsigmoid(a).mean() if loss == "non-saturating" else -F.logsigmoid(-a).mean()


def D_star(p_data, p_g):
    """Eq. 2: the best discriminator for a fixed generator, p_data / (p_data + p_g).  1/2 where they agree."""
    return p_data / (p_data + p_g)


def C(p_data, p_g, dx):
    """Eq. 4 by the rectangle rule on a grid of spacing dx: E_data[log D*] + E_g[log(1 - D*)], a float in
    nats. -log 4 at p_g = p_data, 0 where the two never meet."""
    both = p_data + p_g
    return sum((torch.xlogy(p, p) - torch.xlogy(p, both)).sum().item() * dx for p in (p_data, p_g))


# ------------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="mnist", save_every=5000, log_every=500)
    add = p.add_argument_group("GAN").add_argument
    positive = run.number(float, 0, open_low=True)
    add("--net", choices=NETS, help="networks and settings of the authors' code [tfd for faces, cifar-fc for "
        "cifar10, else mnist]")
    add("--width", type=positive, default=1.0, help="units and feature maps as a share of the paper's [1]")
    add("--k", type=run.number(int, 1), default=1, help="steps of D for one of G, Alg. 1 [%(default)s]")
    add("--alternate", action="store_true", help="G steps after D on fresh z, Alg. 1 as printed [with D]")
    add("--loss", choices=("non-saturating", "minimax"), default="non-saturating",
        help="what G ascends: log D(G(z)) of Sec. 3, or -log(1 - D(G(z))) of Eq. 1 [%(default)s]")
    add("--lr-D", type=positive, help="D's first learning rate, divided by 1.000004 each step [MNIST .15]")
    add("--lr-G", type=positive, help="the same for G [MNIST .3]")
    add("--average", type=run.number(float, 0, 1), default=0.9999,
        help="decay of the running average of G that draws, 0: G as it is [%(default)s]")
    return run.parse(p, argv)


# --------------------------------------------------------------------------------------------------- training

def anneal(opt, steps_per_epoch):
    """After an update: the rate is divided by 1.000004 down to 1e-6; the momentum goes from .5 in epoch 1 to
    .7 in epoch 250 in a straight line.  In place, so that a captured step anneals too."""
    for group in opt.param_groups:
        group["lr"].div_(1.000004).clamp_(min=1e-6)
        group["momentum"].add_(0.2 / (249 * steps_per_epoch)).clamp_(max=0.7)


@torch.no_grad()
def bound(net, norm):
    """Scale each unit's incoming weights down to Euclidean norm `norm` (TFD, authors' code)."""
    for p in net.parameters():
        if p.ndim > 1:
            p.flatten(1).mul_((norm / p.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-8)).clamp(max=1))


def build(args, name, mean, steps_per_epoch):
    """G, D, the average of G, the optimizers and the fused iteration of Algorithm 1."""
    G, D = networks(name, mean, args.width)
    G, D, G_bar = place(args, G, D, averaged(G))
    (lr_D, lr_G), norm = NETS[name]["lr"], NETS[name]["norm"]
    opt_D, opt_G = SGD(D.parameters(), args.lr_D or lr_D, 0.5), SGD(G.parameters(), args.lr_G or lr_G, 0.5)
    amp = autocast(args)

    @fuse(args)
    def train_step(x):                                      # x (k n, C, H, W)
        n = len(x) // args.k
        x = contrast(x) if name.startswith("cifar") else x
        for i, x_real in enumerate(x.split(n), 1):          # Alg. 1: k steps of D
            with amp:
                x_fake = G(sample_z(n, name, x.device))
                a_real, a_fake = D(x_real), D(x_fake)
            v = V(a_real, a_fake)
            loss_D = -0.5 * v                               # the half, and rates to suit: authors' code
            if i == args.k and not args.alternate:          # with the last, G's on the same draws [dev 1]
                descend(loss_D, opt_D, -objective_G(a_fake, args.loss), opt_G)
            else:
                descend(loss_D, opt_D)
        if args.alternate:                                  # one step of G, on fresh z through the updated D
            with amp, frozen(D):
                a_fake = D(G(sample_z(n, name, x.device)))
            descend(-objective_G(a_fake, args.loss), opt_G)
        for opt in (opt_D, opt_G):
            anneal(opt, steps_per_epoch)
        if norm:
            bound(D, norm), bound(G, norm)
        average(G_bar, G, args.average)                     # [dev 2]
        return {"V": v, "D(x)": a_real.float().sigmoid().mean(), "D(G(z))": a_fake.float().sigmoid().mean()}

    return G, D, G_bar, opt_D, opt_G, train_step


def draw(G, name, n, device):
    """n fresh pictures (n, C, H, W)."""
    with sampling(G):
        return torch.cat([G(z).float() for z in sample_z(n, name, device).split(1000)])


def fig2(x, train, columns=10):
    """Fig. 2: rows of samples x (n, C, H, W), the last column the nearest of `train` (Euclidean) to the
    sample beside it."""
    x = x.unflatten(0, (-1, columns - 1))
    nearest = torch.cdist(x[:, -1].flatten(1), train.flatten(1)).argmin(1)
    return torch.cat([x, train[nearest][:, None]], 1).flatten(0, 1)


def fig3(G, name, rows, columns, device):
    """Fig. 3: each row decodes the straight line between two draws of z."""
    z0, z1 = sample_z(rows, name, device)[:, None], sample_z(rows, name, device)[:, None]
    t = torch.linspace(0, 1, columns, device=device).view(1, -1, 1)
    with sampling(G):
        return G(((1 - t) * z0 + t * z1).flatten(0, 1)).float()


def evaluate(args, best, name, train, valid, test, labels, unit):
    """Table 1 for `best`: sigma by the validation images, mean and standard error over the test images, in
    nats."""
    x = draw(best, name, 10000, args.device)
    window = metrics.parzen(x.flatten(1), unit(valid[:1000]).flatten(1), unit(test).flatten(1))
    ll = {"value": window["ll"], "se": window["se"], "sigma": window["sigma"], "unit": "nats"}
    results = {f"gan-{name}-ll": ll}
    if args.dataset == {"mnist": "mnist", "tfd": "faces"}.get(name):            # [dev 3]
        ll["paper"] = PAPER[name]
    if labels is not None and not name.startswith("cifar"):
        known = labels >= 0                                 # stl10 has pictures without a label
        train, labels = (t if known.all() else t[known] for t in (train, labels))
        clf = metrics.classifier(train, labels, args.device, args.data_dir)
        results["frechet"] = {"value": metrics.frechet_distance(clf, x[:len(test)], test)}
    return results


# ---------------------------------------------------------------------------- Fig. 1 and the theorems, in 1-D

def density(x, mean, std):
    """N(x; mean, std^2)."""
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def toy(args, r):
    """Fig. 1: G(z) = w z + b with z ~ N(0, 1), so that p_g = N(b, w^2) is known; data from N(0, 1).

    First D alone learns D* of Eq. 2 (Prop. 1), then Algorithm 1 brings C(G) to -log 4 (Thm. 1).
    """
    if args.sample:
        raise UserError("--sample draws pictures: a run on toy draws numbers, see its fig1.png")
    device, args.amp, args.graph = args.device, False, False      # float32, step by step
    G = place(args, nn.Linear(1, 1))
    D = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    D = place(args, D)
    G.weight.data.fill_(0.5), G.bias.data.fill_(2.0)
    opt_D, opt_G = Adam(D.parameters(), 5e-3), Adam(G.parameters(), 1e-3)
    x, n = torch.linspace(-5, 5, 2001).double(), args.batch_size
    alone = max(1, min(1000, args.steps // 5))              # steps of D alone
    when = [*dict.fromkeys((1, alone, 3 * alone // 2, args.steps))]
    seen = nn.Module()                                      # what a run that is resumed draws from before
    seen.register_buffer("curves", torch.zeros(4, 2, len(x)))       # D and p_g at the steps `when`
    seen.register_buffer("error", torch.tensor(math.nan))
    r.keep(G=G, D=D, opt_D=opt_D, opt_G=opt_G, seen=seen)

    def step_D():
        x_real, x_fake = torch.randn(n, 1, device=device), G(torch.randn(n, 1, device=device)).detach()
        v = V(D(x_real), D(x_fake))
        descend(-v, opt_D)
        return v

    def p_g():
        return density(x, G.bias.item(), abs(G.weight.item()))

    def D_x():
        with sampling(D):
            return D(x.float().to(device)[:, None]).sigmoid().cpu().double()[:, 0]

    for step in r.loop():
        r.log({"V": step_D()})
        if step > alone:
            with frozen(D):
                a_fake = D(G(torch.randn(n, 1, device=device)))
            descend(-objective_G(a_fake, args.loss), opt_G)
        if step == alone:                                   # Prop. 1: E|D - D*| over data and samples
            p, q = density(x, 0, 1), p_g()
            seen.error.fill_((0.5 * (p + q) * (D_x() - D_star(p, q)).abs()).sum() * 10 / 2000)
        r.log({"C(G)": C(density(x, 0, 1), p_g(), 10 / 2000)})
        if step in when:
            seen.curves[when.index(step)] = torch.stack([D_x(), p_g()])
    if not r.lead:
        return
    charts = []
    for letter, (y, q), _ in zip("abcd", seen.curves, when):
        chart = log.Axes((-4, 5), (0, 1.05), "x", f"{letter})  D, p_data, p_g")
        for curve, label in ((y, "D"), (density(x, 0, 1), "p_data"), (q, "p_g")):
            chart.line(x.tolist(), curve.tolist(), label=label)
        charts.append(chart.picture())
    k = 2 - len(charts) % 2
    r.show("fig1", torch.cat([torch.cat(charts[i:i + k], 2) for i in range(0, len(charts), k)], 1))
    c, error = C(density(x, 0, 1), p_g(), 10 / 2000), seen.error.item()
    r.results({"gan-theory": {"value": c, "paper": -math.log(4), "unit": "nats, C(G)", "E|D - D*|": error,
                              "p_g mean": G.bias.item(), "p_g std": abs(G.weight.item())}},
              passed=c < -math.log(4) + 0.01 and error < 0.02)


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    args = parse_args(argv)
    name = args.net or {"faces": "tfd", "cifar10": "cifar-fc"}.get(args.dataset, "mnist")
    args.batch_size = args.batch_size or (512 if args.dataset == "toy" else NETS[name]["batch"])
    args.steps = args.steps or {"toy": 5000, "mnist": 175000}.get(args.dataset, 50000)
    r = run.Run(args)
    if args.dataset == "toy":
        return toy(args, r)
    pictures = data.load(args.dataset, args.data_dir, NETS[name]["size"], NETS[name]["channels"])
    images, labels = pictures.images, pictures.labels
    split = len(images) - min(NETS[name]["valid"], len(images) // 5)
    train, valid = images[:split], images[split:]
    test = pictures.test_images
    if test is None:                                        # none of their own: half of those held out
        valid, test = valid[:len(valid) // 2], valid[len(valid) // 2:]
    labels = None if labels is None else labels[:split]

    def unit(images):                                       # uint8 -> what the networks see
        x = images.to(args.device).float() / 255
        return contrast(x) if name.startswith("cifar") else x

    batches = data.Batches(train, batch_size=args.k * args.batch_size, device=args.device, seed=args.seed,
                           rank=r.rank, world=r.world)
    epoch = max(1, split // (args.k * args.batch_size * r.world))
    G, D, G_bar, opt_D, opt_G, train_step = build(args, name, train.float().mean(0) / 255, epoch)
    best = copy.deepcopy(G_bar)                             # [dev 2]
    best.register_buffer("ll", torch.tensor(-math.inf, device=args.device))
    r.keep(G=G, D=D, G_bar=G_bar, opt_D=opt_D, opt_G=opt_G, best=best, batches=batches)
    scale = (0.0, 1.0)
    if name.startswith("cifar"):                            # to undo contrast() on average
        x = train[:1000].float() / 255
        norm = (x - x.mean((1, 2, 3), keepdim=True)).flatten(1).norm(dim=1).mean().item()
        scale = (-x.mean().item() * 55 / norm, (1 - x.mean().item()) * 55 / norm)
    if args.sample:
        G_s = best if best.ll > -math.inf else G_bar        # stopped before the first look at the likelihood
        return r.sample(lambda n: draw(G_s, name, n, args.device), scale)

    for step in r.loop():
        r.log(train_step(next(batches)))
        if r.every(min(5 * epoch, args.steps)):             # at sigma .2, as the authors' monitor
            with r.aside():
                x = draw(G_bar, name, 10000, args.device)
            ll = metrics.parzen_ll(x.flatten(1), unit(valid[:1000]).flatten(1), 0.2).mean()
            r.log({"ll": ll})
            r.show("samples", log.grid(x[:100], 10, scale))
            if ll > best.ll:
                best.load_state_dict({**G_bar.state_dict(), "ll": ll})

    if r.lead:
        with r.aside():
            panel = {"mnist": "a", "tfd": "b", "cifar-fc": "c", "cifar-conv": "d"}[name]
            r.show(f"fig2{panel}", log.grid(fig2(draw(best, name, 63, args.device), unit(train)), 10, scale))
            r.show("fig3", log.grid(fig3(best, name, 6, 12, args.device), 12, scale))
            results = evaluate(args, best, name, train, valid, test, labels, unit)
        r.results(results, passed=(args.dataset, name) != ("mnist", "mnist")
                  or results["gan-mnist-ll"]["value"] >= 205)


if __name__ == "__main__":
    main()

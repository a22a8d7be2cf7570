"""Generative Adversarial Networks
Ian Goodfellow, Jean Pouget-Abadie, Mehdi Mirza, Bing Xu, David Warde-Farley, Sherjil Ozair, Aaron Courville,
Yoshua Bengio, 2014.  arXiv:1406.2661

A generator G turns noise z into pictures.  A discriminator D tells samples from data; G learns to fool D.

    Eq. 1    min_G max_D  V(D, G) = E_x[log D(x)] + E_z[log(1 - D(G(z)))]                -> V()
    Alg. 1   k steps of D on V with fresh minibatches, then one step of G                -> train_step()
    Sec. 3   G ascends log D(G(z)) in place of descending log(1 - D(G(z)))               -> log_D()
    Eq. 2    D*(x) = p_data(x) / (p_data(x) + p_g(x))                                    -> D_star()
    Eq. 4-6  C(G) = E_data[log D*] + E_g[log(1 - D*)] = -log 4 + 2 JSD(p_data, p_g)      -> C()
    Thm. 1   C(G) = -log 4 at p_g = p_data, and nowhere lower                            -> toy()
    Table 1  log-likelihood of the test images under a Parzen window of samples          -> evaluate()
    Fig. 1   D, p_data and p_g during training, in one dimension                         -> toy()
    Fig. 2   samples, with the nearest training image in the last column                 -> fig2()
    Fig. 3   linear interpolation in z                                                   -> fig3()

    python gan.py                      (MNIST: Table 1, Figs. 2a and 3; --paper: the published settings)
    python gan.py --dataset toy        (Fig. 1, Thm. 1)
    python gan.py --dataset faces      (48 x 48 grey faces in place of TFD: Fig. 2b)
    python gan.py --dataset cifar10    (Fig. 2c; with --net cifar-conv Fig. 2d)
    python gan.py --resume runs/gan-mnist --sample 100

--check asks for 205 nats of a run on MNIST at full width; of the toy, for C(G) < -log 4 + .01 and
E|D - D*| < .02.
"""

import argparse
import copy
import math
from dataclasses import replace

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from common import UserError, data, export, log, metrics, run
from common.fuse import SGD, autocast, average, averaged, descend, frozen, fuse, place, sampling, set_rate

# --------------------------------------------------------------------------------------------------- settings
# The paper prints k = 1, momentum and the kinds of units, but no other values.  The rest is the authors'
# code, github.com/goodfeli/adversarial; the comments name its files.  latent: z (n, dz) is uniform or normal,
# with unit variance; valid: pictures held out; norm: maximum norm of a unit's weights; gcn: norm of a picture
# after contrast(); irange: bound on the initial weights of G's last layer.  Algorithm 1 lets G step after D
# on fresh z (--alternate): -269 nats after 15,000 steps on MNIST; the code updates both at once: 119.
# Training lengths are published only for TFD: 50 epochs of 98,058 unlabelled pictures, and 22 for stage 2.

CODE = dict(k=1, alternate=False, loss="non-saturating", average=0.0, batch_size=100, latent="normal", dz=100,
            valid=10000, norm=None, gcn=None, irange=0.05, steps=50000)
TFD = CODE | dict(net="tfd", size=48, channels=1, lr_D=0.05, lr_G=0.05, norm=1.9365, valid=2000)
CIFAR = CODE | dict(size=32, channels=3, gcn=55.0)
PAPER = {
    "mnist": CODE | dict(net="mnist", size=28, channels=1, lr_D=0.1, lr_G=0.1, latent="uniform",
                         steps=175000),                             # mnist.yaml
    "tfd": TFD | dict(steps=49000),                                 # tfd_pretrain/pretrain.yaml
    "tfd-stage2": TFD | dict(steps=21560),                          # tfd_pretrain/train.yaml
    "cifar-fc": CIFAR | dict(net="cifar-fc", lr_D=0.025, lr_G=0.025,
                             irange=0.5),                           # cifar10_fully_connected.yaml
    "cifar-conv": CIFAR | dict(net="cifar-conv", lr_D=0.004, lr_G=0.004,
                               batch_size=128),                     # cifar10_convolutional.yaml
    "toy": CODE | dict(net="toy", dz=1, lr_D=0.2, lr_G=0.01, alternate=True, batch_size=512,
                       steps=5000),                                 # Fig. 1: not published, nor its networks
}
EMA = dict(average=0.9999)                          # samples from the EMA of G; measured on MNIST alone
TUNED = {
    "mnist": EMA | dict(                            # EMA: 147 nats in place of 98 after 5,000 steps
        lr_D=0.15, lr_G=0.3),                       # 98 nats after 5,000 steps without EMA; .1 and .1: 6
    "tfd": EMA, "tfd-stage2": EMA,
    "cifar-fc": EMA | dict(irange=0.05),            # samples start with about the data's contrast; with .5 at
                                                    # 13 times that, and at width .1 diverge by step 1,500
    "cifar-conv": EMA,
}
QUICK = {"mnist": dict(width=0.43, steps=12000), "toy": {}}         # the toy takes 20 seconds as it is


# --------------------------------------------------------------------------------------------------- networks

class Maxout(nn.Module):
    """The largest of `pieces` linear maps for each of `n` units: (b, i) -> (b, n)."""

    def __init__(self, i, n, pieces):
        super().__init__()
        self.n, self.linear = n, nn.Linear(i, n * pieces)

    def forward(self, x):
        return rearrange(self.linear(x), "b (n p) -> b n p", n=self.n).amax(2)


def maxout_D(dim, n):
    """D: x -> a (n,), the logit of D(x).  Dropout keeps each pixel with probability .8, scaled by 1.25,
    and each hidden unit with probability .5, scaled by 2."""
    return nn.Sequential(
        nn.Flatten(), nn.Dropout(0.2), Maxout(dim, n, 5),
        nn.Dropout(0.5), Maxout(n, n, 5),
        nn.Dropout(0.5), nn.Linear(n, 1), nn.Flatten(0))


def mnist(ch):
    """ch(n): n units, scaled by --width."""
    G = nn.Sequential(
        nn.Linear(100, ch(1200)), nn.ReLU(),                                        # 1200
        nn.Linear(ch(1200), ch(1200)), nn.ReLU(),                                   # 1200
        nn.Linear(ch(1200), 784), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28)))       # 1 x 28 x 28
    return G, maxout_D(784, ch(240))                                                # 240, 240, 1


def networks(args, mean):
    """(G, D): G(z) -> x (n, C, H, W), D(x) -> a (n,), as in the authors' code.

    `mean` (C, H, W): mean training image in [0, 1]; sets the output bias of a G that ends in sigmoids.
    """
    def ch(n):
        return max(8, round(n * args.width))

    if args.net == "toy":
        return toy_networks()
    nets = {"mnist": mnist, "tfd": tfd, "cifar-fc": cifar_fc, "cifar-conv": cifar_conv}
    G, D = nets[args.net](ch)
    uniform(G, 0.05, args.width)
    last = [m for m in G if isinstance(m, (nn.Linear, nn.ConvTranspose2d))][-1]
    last.weight.data.mul_(args.irange / 0.05)
    if args.net == "tfd":
        start_tfd(G)
    if isinstance(G[-2], nn.Sigmoid):
        last.bias.data.copy_(mean.flatten().clamp(1e-7, 1 - 1e-7).logit())
    uniform(D, 0.005, args.width)
    return (under_trained(G, ch, args) if args.stage2 else G), D


def uniform(net, bound, width=1.0):
    """Weights Unif(-bound, bound), biases 0.  After the first layer, the bound is divided by sqrt(width) to
    keep the variance of sums over units."""
    for i, (name, p) in enumerate(net.named_parameters()):
        b = bound if i == 0 else bound / width ** 0.5
        nn.init.zeros_(p) if name.endswith("bias") else nn.init.uniform_(p, -b, b)


# ---------------------------------------------------------------------------------------------------- latents

def sample_z(n, args, device="cpu"):
    """z (n, dz) of unit variance: Unif(-sqrt 3, sqrt 3) for MNIST, else N(0, 1)."""
    if args.latent == "uniform":
        return (torch.rand(n, args.dz, device=device) * 2 - 1) * math.sqrt(3)
    return torch.randn(n, args.dz, device=device)


# -------------------------------------------------------------------------------------------------- objective

def V(a_real, a_fake):
    """Eq. 1: E_x[log D(x)] + E_z[log(1 - D(G(z)))], D = sigmoid(a), a (n,).  -log 4 if D = 1/2 everywhere."""
    return F.logsigmoid(a_real.float()).mean() + F.logsigmoid(-a_fake.float()).mean()


def log_D(a_fake):
    """What G ascends (Sec. 3): E_z[log D(G(z))], a (n,).  -log 2 if D = 1/2."""
    return F.logsigmoid(a_fake.float()).mean()


def objective_G(a_fake, loss):
    """What G ascends, a (n,).  "non-saturating": log_D(), -log 2 if D = 1/2.  "minimax" (Eq. 1):
    -E_z[log(1 - D(G(z)))], log 2 if D = 1/2."""
    return log_D(a_fake) if loss == "non-saturating" else -F.logsigmoid(-a_fake.float()).mean()


def D_star(p_data, p_g):
    """Eq. 2: the optimal discriminator for a fixed G, p_data / (p_data + p_g).  1/2 where they agree."""
    return p_data / (p_data + p_g)


def C(p_data, p_g, dx):
    """Eq. 4 by the rectangle rule on a grid of spacing dx: E_data[log D*] + E_g[log(1 - D*)], a float in
    nats.  -log 4 at p_g = p_data, 0 if they do not overlap."""
    both = p_data + p_g
    return sum((torch.xlogy(p, p) - torch.xlogy(p, both)).sum().item() * dx for p in (p_data, p_g))


# --------------------------------------------------------------------------------------------------- training

def build(args, mean):
    """G, D, the EMA of G, the optimizers and the fused step of Algorithm 1; `mean`: see networks()."""
    G, D = networks(args, mean)
    G, D, G_bar = place(args, G, D, averaged(G))
    opt_D, opt_G = SGD(D.parameters(), args.lr_D, 0.5), SGD(G.parameters(), args.lr_G, 0.5)
    amp = autocast(args)

    @fuse(args)
    def train_step(x):                                              # x (k n, C, H, W)
        n = len(x) // args.k
        for i, x_real in enumerate(x.split(n), 1):                  # Alg. 1: k steps of D
            with amp:
                x_fake = G(sample_z(n, args, x.device))
                a_real, a_fake = D(x_real), D(x_fake)
            v = V(a_real, a_fake)
            loss_D = -0.5 * v                                       # half of V, as the code's rates assume
            if i < args.k or args.alternate:
                descend(loss_D, opt_D)
            else:       # authors' code: G steps with D's last step; same z, both at the old parameters
                descend(loss_D, opt_D, -objective_G(a_fake, args.loss), opt_G)
        if args.alternate:                                          # Alg. 1 as printed: G on fresh z
            with amp, frozen(D):
                a_fake = D(G(sample_z(n, args, x.device)))
            descend(-objective_G(a_fake, args.loss), opt_G)
        if args.norm:
            bound(D, args.norm), bound(G, args.norm)
        average(G_bar, G, args.average)                             # not the paper's; 0: no EMA (--paper)
        return {"V": v, "D(x)": a_real.float().sigmoid().mean(), "D(G(z))": a_fake.float().sigmoid().mean()}

    return G, D, G_bar, opt_D, opt_G, train_step


def anneal(args, opt_D, opt_G, step, per_epoch):
    """Set rates and momentum for update `step`: each update divides the rates by 1.000004, down to 1e-6;
    momentum rises linearly from .5 in epoch 1 to .7 in epoch 250 (authors' code: once an epoch)."""
    t = step - 1
    momentum = min(0.7, 0.5 + 0.2 * t / (249 * per_epoch))
    for opt, lr in ((opt_D, args.lr_D), (opt_G, args.lr_G)):
        set_rate(opt, max(1e-6, lr / 1.000004 ** min(t, 10 ** 8)), momentum=momentum)


def main(argv=None):
    args = parse_args(argv)
    r = run.Run(args)
    if r.drawing:
        return export.main(r, drawer)
    if args.net == "toy":
        return toy(r)
    pictures = data.load(args.dataset, args.data_dir, args.size, args.channels, skip_bad=args.skip_bad)
    pictures, valid = split(pictures, args)
    batches = data.Batches(pictures.images, **r.feed | {"batch_size": args.k * args.batch_size})
    mean = sum(x.sum(0) for x in pictures.images.split(5000)) / (255 * len(pictures.images))
    G, D, G_bar, opt_D, opt_G, train_step = build(args, mean)
    best = copy.deepcopy(G_bar)                                     # highest likelihood of `valid` so far
    best.register_buffer("ll", torch.tensor(-math.inf, device=args.device))
    scale = values(pictures.images, args)
    r.keep(lambda: {"shape": list(mean.shape), "scale": list(scale)}, G=G, D=D, G_bar=G_bar, opt_D=opt_D,
           opt_G=opt_G, best=best, batches=batches)

    for step in r.loop():
        anneal(args, opt_D, opt_G, step, batches.per_epoch)
        r.log(train_step(seen(next(batches), args)))
        if r.every(max(500, 5 * batches.per_epoch)):                # not after every few steps of a small set
            with r.aside():
                keep_best(r, best, G_bar, valid, scale)
        elif r.draws():
            with r.aside():
                r.show("samples", log.grid(draw(G_bar, args, 100), 10, scale))

    if r.lead:
        report(r, best, pictures, valid, scale)


# =========================================================================== Figures and numbers of the paper

def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="mnist", save_every=5000, log_every=500)
    add = p.add_argument_group("GAN").add_argument
    positive = run.number(float, 0, open_low=True)
    add("--net", choices=("mnist", "tfd", "cifar-fc", "cifar-conv"),
        help="networks and settings of the authors' code [tfd for faces, cifar-fc for cifar10, else mnist]")
    add("--width", type=positive, default=1.0, help="units and feature maps, as a fraction of the paper's")
    add("--stage2", metavar="RUN", help="TFD's stage 2: add two layers below the G of this --net tfd run")
    add("--k", type=run.number(int, 1), help="steps of D for each step of G, Alg. 1 [1]")
    add("--alternate", action=argparse.BooleanOptionalAction,
        help="update G after D, on fresh z, as printed in Alg. 1 [both at once; toy: after D]")
    add("--loss", choices=("non-saturating", "minimax"),
        help="what G ascends: log D(G(z)) of Sec. 3, or -log(1 - D(G(z))) of Eq. 1 [non-saturating]")
    add("--lr-D", type=positive,
        help="D's initial learning rate, divided by 1.000004 each step [MNIST .15; --paper: .1]")
    add("--lr-G", type=positive, help="the same for G [MNIST .3; --paper: .1]")
    add("--average", type=run.number(float, 0, 1),
        help="decay of the EMA of G used for samples; 0: no EMA [.9999; toy and --paper: 0]")
    return run.parse(p, argv, experiment=experiment, paper=PAPER, tuned=TUNED, quick=QUICK)


def experiment(args):
    """The row of PAPER and TUNED."""
    net = args.net or {"faces": "tfd", "cifar10": "cifar-fc", "toy": "toy"}.get(args.dataset, "mnist")
    if args.dataset == "toy" and (net != "toy" or args.width != 1):
        raise UserError("--dataset toy has its own networks: leave --net and --width out")
    if args.stage2 and net != "tfd":
        raise UserError(f"--stage2 found with --net {net}: it is for --net tfd")
    return "tfd-stage2" if args.stage2 else net


# ------------------------------------------------------------------------------------------------------- data

def split(pictures, args):
    """(training pictures, validation images): hold out the last `args.valid` images, at most a fifth.

    If the data set has no test images, half of the held-out images become the test images.
    """
    images, labels = pictures.images, pictures.labels
    test = pictures.test_images
    n = data.cut(len(images), args.valid, 5, least=4 if test is None else 2)
    valid = images[n:]
    if test is None:
        valid, test = valid[:len(valid) // 2], valid[len(valid) // 2:]
    return replace(pictures, images=images[:n], labels=None if labels is None else labels[:n],
                   test_images=test), valid


def seen(images, args):
    """Network inputs on the device: pictures in [0, 1], or after contrast() for CIFAR-10's networks.

    images (n, C, H, W): uint8, or float in [0, 1].
    """
    x = images.to(args.device)
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    return contrast(x, args.gcn) if args.gcn else x


def contrast(x, norm=55.0):
    """Subtract each picture's mean, scale to Euclidean norm 55 (CIFAR-10, authors' code).  x (n, C, H, W)."""
    x = x - x.mean((1, 2, 3), keepdim=True)
    return norm * x / x.flatten(1).norm(dim=1).clamp_min(1e-8).view(-1, 1, 1, 1)


def values(train, args):
    """The values to draw as black and white: 0 and 1, or those that invert contrast() on average."""
    if not args.gcn:
        return 0.0, 1.0
    x = train[:1000].float() / 255
    norm = (x - x.mean((1, 2, 3), keepdim=True)).flatten(1).norm(dim=1).mean().item()
    norm = max(norm, 1e-8)                                          # if every picture is flat
    return -x.mean().item() * args.gcn / norm, (1 - x.mean().item()) * args.gcn / norm


# ---------------------------------------------------------------------------- networks of the other data sets

def tfd(ch):
    """Toronto Face Database.  It is not public; the built-in faces take its place."""
    G = nn.Sequential(
        nn.Linear(100, ch(8000)), nn.ReLU(),                                        # 8000
        nn.Linear(ch(8000), ch(8000)), nn.Sigmoid(),                                # 8000
        nn.Linear(ch(8000), 2304), nn.Sigmoid(), nn.Unflatten(1, (1, 48, 48)))      # 1 x 48 x 48
    return G, maxout_D(2304, ch(1200))                                              # 1200, 1200, 1


def start_tfd(G):
    """Biases -2 in the second layer; in the last, each unit has 100 inputs, or all if there are fewer, with
    weights N(0, 1)."""
    nn.init.constant_(G[2].bias, -2.0)
    w = nn.init.zeros_(G[4].weight)
    columns = torch.rand(w.shape).topk(min(100, w.shape[1]), 1).indices
    w.data.scatter_(1, columns, torch.randn(columns.shape))


def under_trained(G, ch, args):
    """TFD's stage 2: layers 100 -> 8000 -> 100 below the G of the run --stage2, all trained with a fresh D.

    G: a network of that G's shape.  The weights loaded are that run's G_bar: the EMA of G or, if it ran with
    --paper, its final G.
    """
    new = nn.Sequential(
        nn.Linear(100, ch(8000)), nn.ReLU(),                                        # 8000
        nn.Linear(ch(8000), 100), nn.Sigmoid())                                     # 100, in place of z
    uniform(new, 0.05, args.width)
    nn.init.constant_(new[2].bias, -2.0)
    trained = averaged(G).requires_grad_()          # with the buffer t, which the run saved with its EMA
    if not args.resume:
        run.fetch(args.stage2, f"a run of gan.py with --net tfd --width {args.width}", G_bar=trained)
    return nn.Sequential(*new, *trained)


@torch.no_grad()
def bound(net, norm):
    """Scale each unit's incoming weights down to Euclidean norm `norm` (TFD, authors' code)."""
    for p in net.parameters():
        if p.ndim > 1:
            p.flatten(1).mul_((norm / p.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-8)).clamp(max=1))


def cifar_fc(ch):
    """CIFAR-10, fully connected."""
    G = nn.Sequential(
        nn.Linear(100, ch(8000)), nn.ReLU(),                                        # 8000
        nn.Linear(ch(8000), ch(8000)), nn.Sigmoid(),                                # 8000
        nn.Linear(ch(8000), 3072), nn.Unflatten(1, (3, 32, 32)))                    # 3 x 32 x 32
    return G, maxout_D(3072, ch(1600))                                              # 1600, 1600, 1


def cifar_conv(ch):
    """CIFAR-10: a deconvolutional G and a convolutional D."""
    G = nn.Sequential(
        nn.Linear(100, ch(8000)), nn.ReLU(),                                        # 8000
        nn.Linear(ch(8000), ch(80) * 100), nn.Sigmoid(),                            # 8000
        nn.Unflatten(1, (ch(80), 10, 10)),                                          # 80 x 10 x 10
        nn.ConvTranspose2d(ch(80), 3, 5, stride=3, bias=False), UntiedBias(3, 32, 32))      # 3 x 32 x 32
    D = nn.Sequential(
        nn.Dropout(0.2), MaxoutConv(3, ch(32), 8, 4, 4, 2),                         # 32 x 16 x 16
        nn.Dropout(0.5), MaxoutConv(ch(32), ch(32), 8, 3, 4, 2),                    # 32 x 7 x 7
        nn.Dropout(0.5), MaxoutConv(ch(32), ch(192), 5, 3, 2, 2),                   # 192 x 5 x 5
        nn.Flatten(), nn.Dropout(0.5), Maxout(ch(192) * 5 * 5, ch(500), 5),         # 500
        nn.Dropout(0.5), nn.Linear(ch(500), 1), nn.Flatten(0))                      # 1
    return G, D


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
    """A separate bias for every pixel of every channel."""

    def __init__(self, *shape):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return x + self.bias


# ------------------------------------------------------------------------------------------------ the figures

def draw(G, args, n):
    """n fresh pictures (n, C, H, W)."""
    return metrics.batched(G, sample_z(n, args, args.device))


def drawer(args, saved):
    """Sampler of a trained run: z -> pictures, with the G of the highest likelihood."""
    if args.net == "toy":
        raise UserError("a toy run draws numbers, not pictures: see its fig1.png")
    G, _ = networks(args, torch.zeros(saved["about"]["shape"]))
    rated = saved.get("best", {"ll": -math.inf}).get("ll", 0) > -math.inf   # else stopped before keep_best()
    return export.Drawer(G, lambda n: (sample_z(n, args, args.device),), {"best" if rated else "G_bar": G},
                         {"z": []}, saved["about"]["scale"])


def fig2(x, train, args, columns=10):
    """Fig. 2: rows of samples x (n, C, H, W); the last column is the picture in `train`, as seen(), that is
    nearest (Euclidean) to the sample on its left."""
    x = x.unflatten(0, (-1, columns - 1))
    last = x[:, -1].flatten(1)
    distance = metrics.batched(lambda part: torch.cdist(seen(part, args).flatten(1), last), train)
    nearest = seen(train[distance.argmin(0).cpu()], args)
    return torch.cat([x, nearest[:, None]], 1).flatten(0, 1)


def fig3(G, args, rows, columns):
    """Fig. 3: each row decodes the straight line between two draws of z."""
    z0, z1 = (sample_z(rows, args, args.device)[:, None] for _ in range(2))
    t = torch.linspace(0, 1, columns, device=args.device).view(1, -1, 1)
    with sampling(G):
        return G(((1 - t) * z0 + t * z1).flatten(0, 1))


# ------------------------------------------------------------------------------------------------ the numbers

def keep_best(r, best, G_bar, valid, scale):
    """Copy G_bar to `best` if the likelihood of `valid` improves, at sigma .2 as in the authors' monitor.

    The paper does not say when training stopped.
    """
    args = r.args
    x = draw(G_bar, args, 10000)
    ll = metrics.parzen_ll(x.flatten(1), seen(valid[:1000], args).flatten(1), 0.2).mean()
    r.log({"ll": ll})
    r.show("samples", log.grid(x[:100], 10, scale))
    if ll > best.ll:
        best.load_state_dict({**G_bar.state_dict(), "ll": ll})


def evaluate(args, best, pictures, valid):
    """Table 1 for `best`: sigma chosen on the validation images; mean and standard error over the test
    images, in nats."""
    x, test = draw(best, args, 10000), pictures.test_images
    window = metrics.parzen(x.flatten(1), *(seen(t, args).flatten(1) for t in (valid[:1000], test)))
    key = result_id(args, pictures)
    results = {key: {"value": window["ll"], "se": window["se"], "sigma": window["sigma"], "unit": "nats"}}
    if key == "gan-mnist-ll" and args.width == 1:
        results[key]["paper"] = 225     # nats; TFD's 2057, a mean over five folds, is measured by no run here
    if data.tell(pictures.labels) and len(test) > 1 and not args.gcn:
        known = pictures.labels >= 0                        # stl10 has unlabelled pictures
        train, labels = (t if known.all() else t[known] for t in (pictures.images, pictures.labels))
        clf = metrics.classifier(train, labels, args.device, args.data_dir)
        results["frechet"] = {"value": metrics.frechet_distance(clf, x[:len(test)], test[:len(x)])}
    return results


def result_id(args, pictures):
    """gan-mnist-ll etc. if networks and data are the paper's, else gan-NETWORKS-on-DATA-ll.

    TFD cannot be downloaded: a folder or .npz file named tfd counts as TFD.  The paper's G is stage 2's.
    """
    name, row = pictures.name, args.experiment
    own = {"mnist": args.dataset == "mnist", "tfd-stage2": name == "tfd"}.get(row, args.dataset == "cifar10")
    return f"gan-{args.net}-ll" if own and row != "tfd" else f"gan-{row}-on-{name}-ll"


def report(r, best, pictures, valid, scale):
    """Figures and results.json."""
    args = r.args
    panel = {"mnist": "a", "tfd": "b", "cifar-fc": "c", "cifar-conv": "d"}[args.net]
    with r.aside():
        r.show(f"fig2{panel}", log.grid(fig2(draw(best, args, 63), pictures.images, args), 10, scale))
        r.show("fig3", log.grid(fig3(best, args, 6, 12), 12, scale))
        results = evaluate(args, best, pictures, valid)
    r.results(results, passed=args.width < 1 or results.get("gan-mnist-ll", {}).get("value", 205) >= 205)


# ---------------------------------------------------------------------------- Fig. 1 and the theorems, in 1-D

def density(x, mean, std):
    """N(x; mean, std^2)."""
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def toy_networks():
    """G(z) = w z + b with z ~ N(0, 1), so p_g = N(b, w^2) is known.  It starts far from the data."""
    G = nn.Linear(1, 1)
    D = nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1), nn.Flatten(0))
    G.weight.data.fill_(0.5), G.bias.data.fill_(2.0)
    return G, D


def toy(r):
    """Fig. 1 with data from N(0, 1).  First D alone learns D* of Eq. 2 (Prop. 1), then Algorithm 1 brings
    C(G) to -log 4 (Thm. 1)."""
    args = r.args
    args.amp = False
    G, D, G_bar, opt_D, opt_G, train_step = build(args, None)
    x = torch.linspace(-5, 5, 2001).double()
    p_data, dx = density(x, 0, 1), 10 / 2000
    alone = max(1, min(1000, args.steps // 5))              # steps of D alone
    when = [*dict.fromkeys((1, alone, 3 * alone // 2, args.steps))]
    past = nn.Module()                                      # what the figure needs after a resume
    past.register_buffer("curves", torch.zeros(4, 2, len(x)))       # D and p_g at the steps `when`
    past.register_buffer("error", torch.tensor(math.nan))
    r.keep(G=G, D=D, G_bar=G_bar, opt_D=opt_D, opt_G=opt_G, seen=past)

    def p_g():
        return density(x, G_bar.bias.item(), abs(G_bar.weight.item()))

    def D_x():
        return metrics.batched(D, x.float()[:, None]).sigmoid().cpu().double()

    for step in r.loop():
        anneal(args, opt_D, opt_G, step, per_epoch=1000)
        if step <= alone:
            set_rate(opt_G, 0.0)
        r.log(train_step(torch.randn(args.k * args.batch_size, 1, device=args.device)))
        r.log({"C(G)": C(p_data, p_g(), dx)})
        if step == alone:                                   # Prop. 1: E|D - D*| over data and samples
            past.error.fill_((0.5 * (p_data + p_g()) * (D_x() - D_star(p_data, p_g())).abs()).sum() * dx)
        if step in when:
            past.curves[when.index(step)] = torch.stack([D_x(), p_g()])
    if not r.lead:
        return
    charts = []
    for letter, (y, q), _ in zip("abcd", past.curves, when):
        chart = log.Axes((-4, 5), (0, 1.05), "x", f"{letter})  D, p_data, p_g")
        for curve, label in ((y, "D"), (p_data, "p_data"), (q, "p_g")):
            chart.line(x.tolist(), curve.tolist(), label=label)
        charts.append(chart.picture())
    k = 2 - len(charts) % 2
    r.show("fig1", torch.cat([torch.cat(charts[i:i + k], 2) for i in range(0, len(charts), k)], 1))
    c, error = C(p_data, p_g(), dx), past.error.item()
    r.results({"gan-theory": {"value": c, "paper": -math.log(4), "unit": "nats, C(G)", "E|D - D*|": error,
                              "p_g mean": G_bar.bias.item(), "p_g std": abs(G_bar.weight.item())}},
              passed=c < -math.log(4) + 0.01 and error < 0.02)


if __name__ == "__main__":
    main()

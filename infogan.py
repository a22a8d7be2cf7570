"""InfoGAN: Interpretable Representation Learning by Information Maximizing Generative Adversarial Nets
Xi Chen, Yan Duan, Rein Houthooft, John Schulman, Ilya Sutskever, Pieter Abbeel, 2016.  arXiv:1606.03657

Part of the input of G is a code c that its pictures must give away: a network Q reads it back from them.

    Eq. 1   V(D, G) = E_x[log D(x)] + E_z[log(1 - D(G(z)))]                          -> V()
    Eq. 3   min_G max_D  V(D, G) - lam I(c; G(z, c))
    Eq. 4   I(c; G(z, c)) >= E_{x ~ G(z, c)}[E_{c' ~ P(c|x)}[log Q(c'|x)]] + H(c)
    Eq. 5   L_I(G, Q) = E_{c ~ P(c), x ~ G(z, c)}[log Q(c|x)] + H(c)                 -> L_I_cat(), L_I_cont()
    Eq. 6   min_{G,Q} max_D  V(D, G) - lam L_I(G, Q)                                 -> train_step()
    Tables 1-6 (App. C)  networks and codes of each data set                         -> networks(), NETS
    Fig. 1  L_I over training, InfoGAN against a regular GAN                         -> draw_fig1()
    Figs. 2-6  one code varied, everything else fixed                                -> vary()
    Sec. 7.2  c1 as a classifier of digits                                           -> classify()

Run
    python infogan.py --dataset mnist
    python infogan.py --dataset faces --steps 1800

Expect
    ig-cls  median 3.41 % error of seeds 0 to 4 (4.57, 3.38, 3.60, 3.20, 3.41; paper about 5), Frechet
            distance 6.2 to 7.9, and
    ig-mi   2.300 to 2.302 nats (paper 2.30), after 3,000 steps: 15 to 18 minutes on one core of an AMD EPYC
            with AVX512-BF16, torch 2.14.1, bfloat16
    ig-faces  |rank correlation| with the code that found it: azimuth .91, lighting .91, elevation .73, width
            .53, mean .77 (paper: pictures only), 1,800 steps, 39 minutes on one core, seed 0 alone

Deviations
    [dev 1] The parameters of Q, and of the trunk that it shares with D, are in the optimizer of D: its step
            ascends V + lam L_I, as in the code of the authors.
    [dev 2] G ascends log D(G(z, c)) in place of descending log(1 - D(G(z, c))), as in the authors' code.
    [dev 3] lam of the continuous codes is 0.1 on MNIST (the authors' code: 1): App. C allows a smaller one.
    [dev 4] On MNIST lam rises from 0 over the first 1,500 steps and lam of the continuous codes over the next
            1,500: digits first, then the code that tells them apart, then their style.  Switched on at once,
            c1 settles on whatever the first blurred pictures differ in, and several digits share a category.
    [dev 5] For the regular GAN Q reads a detached trunk: neither G nor D learns from it.
    [dev 6] Stride-1 upconvolutions of Table 6 are convolutions padded to the same size: the same linear maps.
    [dev 7] On faces D sees data and samples as one batch (the authors' code: two).  With statistics of their
            own, BatchNorm hides from D how bright and how contrasty samples are, and G draws grey noise.
    [dev 8] On faces D's inputs carry Gaussian noise of std .1: without it D wins, and a tenth of the samples
            turns into one saturated pattern.
    [dev 9] On faces sigma of the codes is 1 (as in the authors' code for MNIST) and lam 1 (Table 5: .1 or
            .2): a learnt sigma lets codes hide in a texture that only Q sees.
    [dev 10] On MNIST D and Q see half of the pictures, data and samples alike, turned, stretched, sheared and
            moved at random: what c1 says has to survive that, and which digit it is does.  --warp 0: without.
    [dev 11] On MNIST both rates fall to 0 in a straight line over the second half of the run.
    [dev 12] On MNIST a run has 3,000 steps over 60,000 pictures, and G steps by the z and c that D has just
            seen (the authors' code: 5,000 over 55,000, and fresh ones).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from common import data, log, metrics, run
from common.fuse import Adam, autocast, descend, frozen, fuse, place, sampling

LOG_2PI = math.log(2 * math.pi)


# --------------------------------------------------------------------------------------------------- networks

@dataclass
class Net:
    """One experiment of App. C: picture, codes and rates."""

    size: int
    channels: int
    cats: tuple          # sizes of the categorical codes
    m: int               # number of continuous codes, each Unif(-1, 1)
    dz: int              # size of the noise z
    lr_D: float = 2e-4
    lr_G: float = 1e-3
    lam: float = 1.0
    lam_cont: float = 1.0
    warm_up: int = 0             # steps over which lam rises from 0, and after them lam_cont [dev 4]
    scale: tuple = (0.0, 1.0)    # values of the pictures: a sigmoid or a tanh ends G
    together: bool = False       # D sees data and samples as one batch [dev 7]
    noise: float = 0.0           # std of the noise on what D sees [dev 8]
    warp: float = 0.0            # how much what D sees is warped [dev 10]
    fall: bool = False           # rates fall to 0 over the second half [dev 11]
    fix_sigma: bool = False      # sigma of Q's Gaussians is 1, else learnt
    gan_steps: int = 0           # steps of the regular GAN of Figs. 1 and 2b, trained beside
    sweep: float = 1.0           # the figures vary a continuous code from -sweep to sweep

    @property
    def dq(self):
        """How many numbers Q gives: logits, means and, where they are learnt, log standard deviations."""
        return sum(self.cats) + self.m * (1 if self.fix_sigma else 2)


NETS = {
    "mnist": Net(28, 1, (10,), 2, 62, lam_cont=0.1,                            # Table 1, [dev 3]
                 warm_up=1500, warp=1.0, fall=True,                            # [dev 4], [dev 10], [dev 11]
                 gan_steps=1000, sweep=2.0),
    "svhn": Net(32, 3, (10,) * 4, 4, 124, scale=(-1.0, 1.0)),                  # Table 2
    "celeba": Net(32, 3, (10,) * 10, 0, 128, scale=(-1.0, 1.0)),               # Table 3
    "faces": Net(32, 1, (), 5, 128, lr_G=5e-4,                                 # Tables 4, 5 (azimuth)
                 together=True, noise=0.1, fix_sigma=True),                    # [dev 7], [dev 8], [dev 9]
    "chairs": Net(64, 1, (20,) * 3, 1, 128, lam_cont=10.0),                    # Tables 6 and 7 (rotation)
}
FIGURE = {"mnist": "fig2", "faces": "fig3", "chairs": "fig4", "svhn": "fig5", "celeba": "fig6"}


def conv(i, o, stride=2):
    return nn.Conv2d(i, o, 4, stride, padding=1 if stride == 2 else "same", bias=False)


def upconv(i, o, bias=False):
    return nn.ConvTranspose2d(i, o, 4, 2, 1, bias=bias)


def bn(n):
    return nn.Sequential(nn.BatchNorm2d(n), nn.LeakyReLU(0.1))


def bn_relu(n):
    return nn.Sequential(nn.BatchNorm2d(n), nn.ReLU())


def fc(i, o, slope):
    """Fully connected, BatchNorm, leaky ReLU; with slope 0 a ReLU."""
    return nn.Sequential(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), nn.LeakyReLU(slope))


def networks(name, dim, dq, width=1.0):
    """(G, D) of Tables 1-6, D(x) = (a (n,), q (n, dq)); in Tables 1-3 Q has a layer of its own on D's trunk.

    `dim`: size of G's input (z, c).  `dq`: numbers that Q gives.  `width`: feature maps and units as a share
    of the tables', 8 at least.
    """
    c64, c128, c256, c448, c1024 = (max(8, round(n * width)) for n in (64, 128, 256, 448, 1024))
    lrelu = nn.LeakyReLU(0.1)
    if name == "mnist":                                   # Table 1
        G = nn.Sequential(
            fc(dim, c1024, 0),                            # 1024
            fc(c1024, c128 * 7 * 7, 0), nn.Unflatten(1, (c128, 7, 7)),
            upconv(c128, c64), bn_relu(c64),              # 64 x 14 x 14
            upconv(c64, 1, bias=True), nn.Sigmoid())      # 1 x 28 x 28
        trunk = nn.Sequential(
            nn.Conv2d(1, c64, 4, 2, 1), lrelu,            # 64 x 14 x 14
            conv(c64, c128), bn(c128),                    # 128 x 7 x 7
            nn.Flatten(), fc(c128 * 7 * 7, c1024, 0.1))   # 1024
        D = Discriminator(trunk, c1024, c128, dq)
    elif name in ("svhn", "celeba"):                      # Tables 2 and 3
        G = nn.Sequential(
            fc(dim, c448 * 2 * 2, 0), nn.Unflatten(1, (c448, 2, 2)),
            upconv(c448, c256), bn_relu(c256),            # 256 x 4 x 4
            upconv(c256, c128, bias=True), nn.ReLU(),     # 128 x 8 x 8
            upconv(c128, c64, bias=True), nn.ReLU(),      # 64 x 16 x 16
            upconv(c64, 3, bias=True), nn.Tanh())         # 3 x 32 x 32
        trunk = nn.Sequential(
            nn.Conv2d(3, c64, 4, 2, 1), lrelu,            # 64 x 16 x 16
            conv(c64, c128), bn(c128),                    # 128 x 8 x 8
            conv(c128, c256), bn(c256),                   # 256 x 4 x 4
            nn.Flatten())
        D = Discriminator(trunk, c256 * 4 * 4, c128, dq)
    elif name == "faces":                                 # Table 4
        G = nn.Sequential(
            fc(dim, c1024, 0),                            # 1024
            fc(c1024, c128 * 8 * 8, 0), nn.Unflatten(1, (c128, 8, 8)),
            upconv(c128, c64), bn_relu(c64),              # 64 x 16 x 16
            upconv(c64, 1, bias=True), nn.Sigmoid())      # 1 x 32 x 32
        trunk = nn.Sequential(
            nn.Conv2d(1, c64, 4, 2, 1), lrelu,            # 64 x 16 x 16
            conv(c64, c128), bn(c128),                    # 128 x 8 x 8
            nn.Flatten(), fc(c128 * 8 * 8, c1024, 0.1))   # 1024
        D = Discriminator(trunk, c1024, 0, dq)
    else:                                                 # Table 6, chairs
        G = nn.Sequential(
            fc(dim, c1024, 0),                            # 1024
            fc(c1024, c256 * 8 * 8, 0), nn.Unflatten(1, (c256, 8, 8)),
            conv(c256, c256, 1), bn_relu(c256),           # 256 x 8 x 8 [dev 6]
            conv(c256, c256, 1), bn_relu(c256),           # 256 x 8 x 8 [dev 6]
            upconv(c256, c128), bn_relu(c128),            # 128 x 16 x 16
            upconv(c128, c64), bn_relu(c64),              # 64 x 32 x 32
            upconv(c64, 1, bias=True), nn.Sigmoid())      # 1 x 64 x 64
        trunk = nn.Sequential(
            nn.Conv2d(1, c64, 4, 2, 1), lrelu,            # 64 x 32 x 32
            conv(c64, c128), bn(c128),                    # 128 x 16 x 16
            conv(c128, c256), bn(c256),                   # 256 x 8 x 8
            conv(c256, c256, 1), bn(c256),                # 256 x 8 x 8
            conv(c256, c256, 1), bn(c256),                # 256 x 8 x 8
            nn.Flatten(), fc(c256 * 8 * 8, c1024, 0.1))   # 1024
        D = Discriminator(trunk, c1024, 0, dq)
    return G.apply(init), D.apply(init)


class Discriminator(nn.Module):
    """D and Q on one trunk (App. C): a (n,) is the logit of D, q (n, dq) the parameters of Q(c|x)."""

    def __init__(self, trunk, width, hidden, dq):
        super().__init__()
        self.register_buffer("t", torch.zeros(()))    # updates so far
        self.trunk = trunk
        self.head = nn.Linear(width, 1)
        self.Q = nn.Linear(width, dq)
        if hidden:
            self.Q = nn.Sequential(fc(width, hidden, 0.1), nn.Linear(hidden, dq))

    def forward(self, x, detach=False):
        h = self.trunk(x)
        return self.head(h).squeeze(1), self.Q(h.detach() if detach else h)


def init(module):
    """Weights N(0, .02), BatchNorm's scale N(1, .02), shifts and biases 0 (authors' code)."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------- latents and codes

def sample_latent(n, net, device="cpu"):
    """z ~ Unif(-1, 1) (n, dz), c ~ Cat(K) each (n, number of cats) int64, u ~ Unif(-1, 1) (n, m): Sec. 7."""
    z = torch.rand(n, net.dz, device=device) * 2 - 1
    c = torch.stack([torch.randint(k, (n,), device=device) for k in net.cats], 1) if net.cats \
        else torch.zeros(n, 0, dtype=torch.long, device=device)
    u = torch.rand(n, net.m, device=device) * 2 - 1
    return z, c, u


def join(z, c, u, net):
    """G's input: noise, one-hot categorical codes, continuous codes, (n, dz + sum of cats + m)."""
    return torch.cat([z, *(F.one_hot(c[:, i], k).to(z) for i, k in enumerate(net.cats)), u], 1)


def split_q(q, net):
    """Q's output (n, dq) -> list of logits (n, K), means (n, m) and log standard deviations (n, m)."""
    *logits, rest = q.float().split([*net.cats, net.dq - sum(net.cats)], 1)
    mu = rest[:, :net.m]
    return logits, mu, torch.zeros_like(mu) if net.fix_sigma else rest[:, net.m:]


# -------------------------------------------------------------------------------------------------- objective

def V(a_real, a_fake):
    """Eq. 1: E_x[log D(x)] + E_z[log(1 - D(G(z)))], D = sigmoid(a), a (n,).  -log 4 where D = 1/2
    everywhere."""
    return F.logsigmoid(a_real.float()).mean() + F.logsigmoid(-a_fake.float()).mean()


def L_I_cat(logits, c):
    """Eq. 5 for a categorical code in nats: E[log Q(c|x)] + log K.  logits (n, K), c (n,).  log K for a sure
    Q, 0 for a uniform one."""
    return math.log(logits.shape[1]) - F.cross_entropy(logits, c)


def L_I_cont(mu, log_sigma, u):
    """Eq. 5 for Unif(-1, 1) codes in nats: the sum over codes of E[log N(u; mu, sigma)] + log 2.  All (n, m).
    -log(2 pi)/2 + log 2 = -0.2258 for each at mu = u, sigma = 1."""
    log_q = -0.5 * LOG_2PI - log_sigma - 0.5 * ((u - mu) / log_sigma.exp()) ** 2
    return (log_q + math.log(2)).sum(1).mean()


def L_I(q, c, u, net):
    """Both terms of Eq. 5 for Q's output q (n, dq): summed over the categorical and over the continuous
    codes."""
    logits, mu, log_sigma = split_q(q, net)
    cat = sum((L_I_cat(a, c[:, i]) for i, a in enumerate(logits)), q.new_zeros((), dtype=torch.float32))
    return cat, L_I_cont(mu, log_sigma, u)


def lambdas(t, net):
    """lam and lam_cont of Eq. 6 after t updates (a 0-dim tensor): each rises from 0 in a straight line [dev
    4]."""
    w = max(1, net.warm_up)
    late = net.warm_up if net.cats else 0
    return net.lam * ((t + 1) / w).clamp(max=1), net.lam_cont * ((t + 1 - late) / w).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="mnist", steps=3000, batch_size=128)
    add = p.add_argument_group("InfoGAN").add_argument
    positive, weight = run.number(float, 0, open_low=True), run.number(float, 0)
    add("--net", choices=NETS, help="networks and codes of Tables 1-6 [the data set's own, else mnist]")
    add("--width", type=positive, default=1.0, help="units and feature maps as a share of the paper's [1]")
    add("--lam", type=weight,
        help="lambda of Eq. 6 for categorical codes; 0: a regular GAN, Q fitted too [1]")
    add("--lam-cont", type=weight,
        help="lambda of Eq. 6 for continuous codes (App. C) [MNIST .1, chairs 10, else 1, with --lam 0 0]")
    add("--warm-up", type=run.number(int, 0),
        help="steps in which lambda rises from 0, and as many after them for continuous codes [MNIST 1500]")
    add("--warp", type=weight, help="how much pictures that D sees are turned, stretched, sheared and moved "
        "[MNIST 1, else 0]")
    add("--lr-D", type=positive, help="Adam's rate for D and Q (App. C) [2e-4]")
    add("--lr-G", type=positive, help="Adam's rate for G (App. C) [1e-3, faces 5e-4]")
    add("--gan-steps", type=run.number(int, 0),
        help="steps of the regular GAN of Figs. 1 and 2b, trained beside [MNIST 1000, else 0]")
    return run.parse(p, argv)


def settle(args):
    """The name and the Net of the experiment, with the rates that flags give."""
    name = args.net or (args.dataset if args.dataset in NETS else "mnist")
    given = {k: getattr(args, k) for k in ("lam", "lam_cont", "warm_up", "warp", "gan_steps", "lr_D", "lr_G")}
    if args.lam == 0 and args.lam_cont is None:
        given["lam_cont"] = 0.0
    return name, replace(NETS[name], **{k: v for k, v in given.items() if v is not None})


# ------------------------------------------------------------------------------------------------------- main

def build(args, name, net):
    """G, D with Q, their optimizers and the fused iteration of Eq. 6; lam = lam_cont = 0: the regular GAN."""
    G, D = place(args, *networks(name, net.dz + sum(net.cats) + net.m, net.dq, args.width))
    opt_D, opt_G = Adam(D.parameters(), net.lr_D), Adam(G.parameters(), net.lr_G)
    amp = autocast(args)
    regular = net.lam == 0 == net.lam_cont

    @fuse(args)
    def train_step(x):                                      # x (n, C, H, W) in net.scale [dev 12]
        z, c, u = sample_latent(len(x), net, x.device)
        # D ascends V; Q, on D's trunk and in D's optimizer, ascends lam L_I [dev 1], [dev 5].
        with amp:
            x_fake = G(join(z, c, u, net))
            a_real, a_fake, q = judge(D, x, x_fake.detach(), net, regular)
        v = V(a_real, a_fake)
        mi, mi_cont = L_I(q, c, u, net)
        lam, lam_cont = (1.0, 1.0) if regular else lambdas(D.t, net)
        descend(-v - lam * mi - lam_cont * mi_cont, opt_D)
        # G ascends log D(G(z, c)) [dev 2] + lam L_I, through the updated D and Q.
        with amp, frozen(D):
            _, a_fake, q = judge(D, x if net.together else None, x_fake, net)
        mi, mi_cont = L_I(q, c, u, net)
        log_d = F.logsigmoid(a_fake.float()).mean()
        descend(-log_d - (0.0 if regular else lam * mi + lam_cont * mi_cont), opt_G)
        D.t.add_(1)
        return {"V": v, "D(G(z))": a_fake.float().sigmoid().mean(), "L_I": mi, "L_I cont": mi_cont}

    return G, D, opt_D, opt_G, train_step


def anneal(net, opt_D, opt_G, done):
    """Rates after the share `done` of a run, in place, so that a captured step follows: constant, or with
    net.fall over the second half in a straight line to 0 [dev 11]."""
    for opt, lr in ((opt_D, net.lr_D), (opt_G, net.lr_G)):
        for group in opt.param_groups:
            group["lr"].fill_(lr * (min(1.0, 2 * (1 - done)) if net.fall else 1.0))


def judge(D, x, x_fake, net, detach=False):
    """(a_real, a_fake, q of the samples).  BatchNorm's statistics are each batch's own, or with net.together
    those of data and samples as one, so that D sees how they differ in brightness and contrast [dev 7]."""
    x_fake, x = (None if t is None else data.warp(t, net.warp, share=0.5) for t in (x_fake, x))     # [dev 10]
    if net.noise:                                           # [dev 8]
        x_fake = x_fake + net.noise * torch.randn_like(x_fake)
        x = None if x is None else x + net.noise * torch.randn_like(x)
    if net.together:
        a, q = D(torch.cat([x, x_fake]), detach)
        return a[:len(x)], a[len(x):], q[len(x):]
    a_real = None if x is None else D(x)[0]
    return a_real, *D(x_fake, detach)


def vary(G, net, code, rows=10, columns=10, device="cpu"):
    """Pictures (rows * columns, C, H, W): a row is one draw of everything, its columns one code from low to
    high.

    `code`: i < number of categorical codes takes the categories of code i, the rest -sweep .. sweep of a
    continuous one.
    """
    if code < len(net.cats):
        columns = net.cats[code]
    z, c, u = (t.repeat_interleave(columns, 0) for t in sample_latent(rows, net, device))
    if code < len(net.cats):
        c[:, code] = torch.arange(columns, device=device).repeat(rows)
    else:
        sweep = torch.linspace(-net.sweep, net.sweep, columns, device=device)
        u[:, code - len(net.cats)] = sweep.repeat(rows)
    with sampling(G):
        return G(join(z, c, u, net))


def draw(G, net, n, device):
    """n fresh pictures (n, C, H, W) in net.scale and their codes c, u."""
    z, c, u = sample_latent(n, net, device)
    with sampling(G):
        return torch.cat([G(part) for part in join(z, c, u, net).split(500)]), c, u


def read(D, images, net, device):
    """Q's output (n, dq) for uint8 pictures or floats in net.scale."""
    low, high = net.scale
    with sampling(D):
        parts = []
        for x in images.split(500):
            x = x.to(device)
            parts.append(D(low + (high - low) * x.float() / 255 if x.dtype == torch.uint8 else x)[1])
        return torch.cat(parts)


def draw_fig1(folder, net):
    """Fig. 1: L_I over training in nats, InfoGAN against the regular GAN, from metrics.jsonl."""
    key = "L_I" if net.cats else "L_I cont"
    lines = log.history(folder)
    curves = {label: [(line["step"], line[k]) for line in lines if k in line]
              for label, k in (("InfoGAN", key), ("GAN", "GAN " + key))}
    values = [y for curve in curves.values() for _, y in curve]
    limits = (0, lines[-1]["step"]), (min(0, *values) - 0.1, max(values) + 0.3)
    chart = log.Axes(*limits, "iteration", "L_I (nats)")
    for label, curve in curves.items():
        if curve:
            chart.line(*zip(*curve), label=label)
    return chart.picture()


def classify(D, pictures, net, device):
    """ig-cls: (table category -> label by majority on 10,000 training images, error in % on the test
    images)."""
    k_train, k_test = (read(D, images, net, device)[:, :net.cats[0]].argmax(1).cpu()
                       for images in (pictures.images[:10000], pictures.test_images))
    table = metrics.majority(k_train, pictures.labels[:10000], net.cats[0])
    return table, 100 * (table[k_test] != pictures.test_labels).float().mean().item()


def match_factors(D, pictures, net, device):
    """|Spearman correlation| of Q's means with the true factors: for each factor its own code and the
    value."""
    images, factors = pictures.images[:10000], pictures.extra["factors"][:10000]
    mu = split_q(read(D, images, net, device), net)[1].cpu()
    rho = torch.tensor([[abs(metrics.rank_correlation(f, m)) for m in mu.T] for f in factors.T])
    rho = rho.nan_to_num(0.0)                               # a constant one
    return {j: (int(i), rho[j, i].item()) for j, i in enumerate(metrics.matching(-rho.numpy())) if i < net.m}


def figures(r, G, D, gan_G, net, name, pictures):
    """Draw the paper's figures of this data set into the run's folder; a row is one draw, its columns one
    code varied."""
    def show(title, net_G, code):
        with r.aside():
            x = vary(net_G, net, code, device=r.args.device)
        r.show(title, log.grid(x, len(x) // 10, net.scale))

    r.show("fig1", draw_fig1(r.folder, net))
    if name == "mnist":
        for title, code in (("fig2a", 0), ("fig2c", 1), ("fig2d", 2)):
            show(title, G, code)
        if gan_G is not None:
            show("fig2b", gan_G, 0)
    elif "factors" in pictures.extra and net.m:
        for j, (code, _) in match_factors(D, pictures, net, r.args.device).items():
            show(f"fig3{chr(ord('a') + j)}", G, len(net.cats) + code)
    else:
        for code in range(len(net.cats) + net.m):
            show(f"{FIGURE[name]}_c{code + 1}", G, code)


def evaluate(r, G, D, net, name, pictures):
    """The numbers of this data set, experiment id -> dict with "value" and where there is one the paper's."""
    device, results = r.args.device, {}
    real = pictures.images if pictures.test_images is None else pictures.test_images
    with r.aside():
        x, c, u = draw(G, net, min(10000, len(real)), device)
    mi, mi_cont = (t.item() for t in L_I(read(D, x, net, device), c, u, net))
    if net.cats:
        results["ig-mi"] = {"value": mi, "best": sum(map(math.log, net.cats)), "unit": "nats"}
    if net.m:
        results["ig-mi-cont"] = {"value": mi_cont, "unit": "nats"}
    if "factors" in pictures.extra and net.m:
        found = match_factors(D, pictures, net, device)
        names = pictures.extra.get("factor_names") or [f"factor {j + 1}" for j in range(max(found) + 1)]
        factors = {names[j]: {"code": f"c{len(net.cats) + code + 1}", "value": rho}
                   for j, (code, rho) in found.items()}
        mean = sum(rho for _, rho in found.values()) / len(found)
        results["ig-faces"] = {"value": mean, "unit": "mean |rank correlation|", **factors}
    if pictures.labels is None or pictures.test_labels is None or pictures.labels.min() < 0:
        return results
    clf = metrics.classifier(pictures.images, pictures.labels, device, r.args.data_dir)
    x = (x - net.scale[0]) / (net.scale[1] - net.scale[0])
    if len(net.cats) == 1:
        table, error = classify(D, pictures, net, device)
        results["ig-cls"] = {"value": error, "unit": "% error", "labels": table.tolist()}
        if name == pictures.name == "mnist":                # the paper's values are of its own data
            results["ig-mi"]["paper"], results["ig-cls"]["paper"] = 2.30, 5
        agreement = metrics.label_agreement(clf, x, table.to(device)[c[:, 0]])
        results["agreement"] = {"value": 100 * agreement, "unit": "% of samples with their code's label"}
    results["frechet"] = {"value": metrics.frechet_distance(clf, x, real[:10000])}
    return results


def main(argv=None):
    args = parse_args(argv)
    r = run.Run(args)
    name, net = settle(args)
    pictures = data.load(args.dataset, args.data_dir, net.size, net.channels)
    batches = data.Batches(pictures.images, batch_size=args.batch_size, device=args.device, seed=args.seed,
                           scale=net.scale, rank=r.rank, world=r.world)
    G, D, opt_D, opt_G, train_step = build(args, name, net)
    parts = {"G": G, "D": D, "opt_D": opt_D, "opt_G": opt_G, "batches": batches}
    gan_G = None
    if net.gan_steps:
        gan_G, gan_D, gan_opt_D, gan_opt_G, gan_step = build(args, name, replace(net, lam=0.0, lam_cont=0.0))
        parts |= {"gan_G": gan_G, "gan_D": gan_D, "gan_opt_D": gan_opt_D, "gan_opt_G": gan_opt_G}
    r.keep(**parts)
    if args.sample:
        return r.sample(lambda n: draw(G, net, n, args.device)[0], net.scale)

    for step in r.loop():
        x = next(batches)
        anneal(net, opt_D, opt_G, (step - 1) / args.steps)
        r.log(train_step(x))
        if step <= net.gan_steps:
            r.log({f"GAN {k}": v for k, v in gan_step(x).items()})
        if r.every(args.save_every):
            with r.aside():
                r.show("samples", log.grid(draw(G, net, 100, args.device)[0], 10, net.scale))

    if r.lead:
        figures(r, G, D, gan_G, net, name, pictures)
        results = evaluate(r, G, D, net, name, pictures)
        error = results.get("ig-cls", {}).get("value", 0)   # other networks than MNIST's have no such number
        r.results(results, passed=args.dataset != "mnist" or error <= 6)


if __name__ == "__main__":
    main()

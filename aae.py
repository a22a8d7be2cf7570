"""Adversarial Autoencoders
Alireza Makhzani, Jonathon Shlens, Navdeep Jaitly, Ian Goodfellow, Brendan Frey, 2015.  arXiv:1511.05644

An autoencoder, Q from x to a code z and P back, whose codes D and Q bring to a prior that one can draw from.

    Eq. 1      q(z) = E_{x~data}[q(z|x)], the aggregated posterior, is to be p(z)  -> Encoder()
    Sec. 2     min_Q max_D V = E_{z~p(z)}[log D(z)] + E_{z~q(z)}[log(1 - D(z))]    -> V()
    Sec. 2     a minibatch: reconstruction phase, then regularisation phase        -> train_step()
    Eq. 2      VAE: E_x[E_{q(z|x)}[-log p(x|z)] + KL(q(z|x) || p(z))], Fig. 2c, d  -> vae_step(), kl()
    Sec. 2.3   a label is a one-hot input of D; priors of Figs. 2 and 4            -> mixture(), swiss_roll()
    Sec. 3     Table 1: log-likelihood under a Parzen window of samples            -> likelihood()
    Sec. 4     P gets the label y, z is left with the style (Fig. 6)               -> style()
    Sec. 5     Q infers y and z; third, the semi-supervised phase (Table 2)        -> semi()
    Sec. 6     without labels categories are clusters (Table 3, Fig. 9)            -> cluster(), head_labels()
    Sec. 7     P gets W_C y + z, W_C the cluster heads (Fig. 10)                   -> reduce(), repulsion()

Run
    python aae.py                                   (Fig. 4a, b: a mixture of ten Gaussians, 10,000 labels)
    python aae.py --prior swiss-roll                (Fig. 4c, d)
    python aae.py --prior gaussian                  (Fig. 2a, e; with --model vae Fig. 2c)
    python aae.py --prior mixture --labels 0        (Fig. 2b; with --model vae Fig. 2d)
    python aae.py --task likelihood
    python aae.py --task style
    python aae.py --task semi --labels 100          (or 1000, or all)
    python aae.py --task cluster --clusters 16      (or 30)
    python aae.py --task reduce --labels 100        (or 1000, or 0; with --z-dim 10 in ten dimensions)

Expect
    aae-mnist100  2.20 % error on average of seeds 0 to 2 (1.70, 2.61, 2.29; paper 1.90), supervised alone
                  22.4, 25.3, 23.4 (paper 25.80): --steps 6000 --nn-steps 1000, 8 minutes
    aae-dim-2d-100  3.58 % error (paper 6.08): --steps 3000, 3.5 minutes
    aae-clu16     median 11.2 % error of seeds 0 to 3 (5.44, 10.5, 11.8, 19.0; paper 9.55): --task cluster
                  --width .33 --steps 9000, 6 minutes
    aae-mnist-ll  342.0 +- 1.6 nats (paper 340 +- 2): --task likelihood --steps 40000, 17 minutes
    aae-style     94.2 % of samples have the label that P was given: --steps 5000, 4 minutes.  These five on
                  one core of an AMD EPYC with AVX512-BF16, torch 2.14.1, bfloat16, seed 0 where none is named
    aae-prior-4   sliced Wasserstein distance of q(z) and p(z) .038, .035, .030 of seeds 0 to 2 (two draws of
                  p(z): .020, .012, .023), 93 % of the held-out digits on their own component: --steps 3600,
                  1.5 minutes on the same core (seed 0 with torch 2.15.0, float32, on another)

Deviations
    [dev 1] The paper divides its rates by 10 at epoch 50 and again at 1000 of 5000 (SVHN's and those of
            clusters once), here at one half and at four fifths of --steps: a hundred times shorter, a run
            learns little after 1 % of it.
    [dev 2] Q and P are judged, and draw, with running averages of their weights, which the adversary keeps
            from settling.  --average 0: with the last.
    [dev 3] The VAE's p(x|z) is Bernoulli: the paper does not say what it is.
    [dev 4] The cluster heads are held for the first tenth of the run (paper: 50 epochs), and heads repel each
            other if nearer than neighbours are at the start: the threshold is not printed.
    [dev 5] Adam and PyTorch's first weights, to learn in minutes what takes days with the published SGD from
            N(0, .01), whose D can tell nothing for epochs.  --optimizer sgd: as published.
    [dev 6] Where Q infers y, q(y|x) also keeps near that of the averaged Q for the same picture under other
            noise.  --consistency 0: without.
    [dev 7] Where Q infers y, BatchNorm in Q and P on MNIST too, where the paper found it of no help: without,
            Adam brings all of y to one category.  --no-bn: without.
    [dev 8] Where Q infers y, the last two phases show it pictures turned, stretched, sheared and moved a
            little, so that [dev 6] asks for the same y however the digit stands.  --warp 0: without.
    [dev 9] In style D sees the label beside z, as in Sec. 2.3, so that q(z|y), not only q(z), comes to p(z):
            else z goes on saying which digit it is, and P does not listen to y.
    [dev 10] Without labels the logits of y have mean 0 and variance 9 over a minibatch (BatchNorm): else six
            of 16 categories took all digits, and a sure softmax passes D's gradient on to no other.
    [dev 11] The validation picture that names a cluster has the largest mean of q(y_i|x) over 16 warps: as it
            is, several reach 1 in float32, and the surest is often an outlier.  --warp 0: without.
    [dev 12] SVHN is its 73,257 training pictures; the paper also trains on 531,131 extra ones.
    [dev 13] In likelihood Q sees MNIST under Gaussian noise of std .7, so that P draws smoother digits, and
            the regularisation phase has a third of the rate: 333.9 nats after 10,000 steps.  Without noise
            and at the full rate 318.0, with noise of .6 alone 324.5; noise of .5 and the lower rate 331.9,
            but after 17,000 steps at that rate V came away from -1.33, and 40,000 ended at 305.5.
"""

import argparse
import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from common import UserError, data, log, metrics, run
from common.fuse import SGD, Adam, autocast, average, averaged, descend, frozen, fuse, place, sampling

LOG_2PI = math.log(2 * math.pi)


# --------------------------------------------------------------------------------------------------- networks

@dataclass
class Net:
    """One experiment of the appendix: sizes, noise, rates."""

    k: int                              # numbers in z
    std: float = 1.0                    # of the Gaussian prior of z
    m: int = 0                          # categories of y, 0: none
    given: bool = False                 # y is the label; else Q infers it
    heads: bool = False                 # P gets W_C y + z; else (y, z)
    one_hot: int = 0                    # inputs of D for a label: ten, and one for none (Sec. 2.3)
    width: int = 1000                   # units in each of two hidden layers
    noise: float = 0.0                  # std of the Gaussian noise on Q's input
    dropout: float = 0.0                # of Q's input
    bn: bool = False                    # BatchNorm in Q and P
    standard: bool = False              # pixels standardised, P linear; else in [0, 1], P a sigmoid
    size: int = 28
    channels: int = 1
    held: int = 10000                   # training images held out for validation, the last ones
    consistency: float = 0.0            # weight of two q(y|x) of one picture being alike [dev 6]
    spread: float = 0.0                 # std of each logit of y over a minibatch, 0: free [dev 10]
    warp: float = 0.0                   # how much Q's pictures are warped [dev 8]
    adam: tuple = (1e-3, 1e-3, 1e-3)    # rates of the three phases [dev 5]
    sgd: tuple = (0.01, 0.1, 0.1)       # as published: reconstruction, regularisation, semi-supervised phase
    momenta: tuple = (0.9, 0.1, 0.9)    # of SGD


TASKS = {
    "prior": Net(k=2, std=5.0, adam=(1e-4, 1e-3, 1e-3)),
    "likelihood": Net(k=8, std=5.0, noise=0.7, adam=(1e-3, 3e-4, 1e-3)),                       # [dev 13]
    "style": Net(k=15, m=10, given=True, held=0),
    "semi": Net(k=10, m=10, noise=0.3, held=0,
                bn=True, consistency=20.0, warp=1.0),                            # [dev 6], [dev 7], [dev 8]
    "cluster": Net(k=5, m=16, width=3000, dropout=0.2, bn=True, consistency=5.0, warp=1.0,
                   spread=3.0),                                                 # [dev 10]
    "reduce": Net(k=2, m=10, heads=True, noise=0.3, held=0, bn=True, consistency=20.0, warp=1.0),
}
SVHN = {"bn": True, "standard": True, "size": 32, "channels": 3, "dropout": 0.2,               # [dev 12]
        "sgd": (1e-4, 0.01, 0.1)}
OTHERS = {                              # what another data set changes
    ("style", "svhn"): SVHN,
    ("semi", "svhn"): SVHN | {"k": 20, "noise": 0.0},
    ("likelihood", "faces"): {"k": 15, "std": 10.0, "standard": True, "size": 48, "noise": 0.0},
}
ETA = 100                               # numbers of noise that the universal approximator gets


def mlp(i, width, o, bn=False):
    """Two hidden layers of `width` ReLUs, with BatchNorm if `bn`, and a linear end: (n, i) -> (n, o)."""
    def hidden(i):
        return [nn.Linear(i, width), *[nn.BatchNorm1d(width)] * bn, nn.ReLU()]
    return nn.Sequential(*hidden(i), *hidden(width), nn.Linear(width, o))


class Encoder(nn.Module):
    """Q: x (n, C, H, W) in [0, 1] -> z (n, k) of q(z|x), logits a (n, m) of q(y|x), log q(z|x) (n,).

    Sec. 2: z is a function of x ("deterministic"), N(mu(x), sigma(x)^2) ("gaussian"), or a function of x and
    of noise eta ("universal").  a is None where Q infers no y, log q(z|x) unless z is Gaussian.
    """

    def __init__(self, net, kind, mean, std):
        super().__init__()
        self.kind, self.noise, self.dropout = kind, net.noise, net.dropout
        for name, t in (("mean", mean), ("std", std)):
            self.register_buffer(name, t.clone())
        self.trunk = mlp(mean.numel() + ETA * (kind == "universal"), net.width, 1, net.bn)[:-1]
        self.z = nn.Linear(net.width, net.k * (2 if kind == "gaussian" else 1))
        self.y = nn.Linear(net.width, net.m) if net.m and not net.given else None
        self.spread = nn.BatchNorm1d(net.m, affine=False) if net.spread else nn.Identity()       # [dev 10]
        self.scale = net.spread or 1.0

    def forward(self, x):
        x = ((x - self.mean) / self.std).flatten(1)
        if self.training and self.noise:
            x = x + self.noise * torch.randn_like(x)
        x = F.dropout(x, self.dropout, self.training)
        if self.kind == "universal":
            x = torch.cat([x, torch.randn(len(x), ETA, device=x.device)], 1)
        h = self.trunk(x)
        z, log_q = self.z(h).float(), None
        a = None if self.y is None else self.scale * self.spread(self.y(h).float())
        if self.kind == "gaussian":
            mu, log_sigma = z.chunk(2, 1)
            eps = torch.randn_like(mu)
            z, log_q = mu + log_sigma.exp() * eps, log_normal(eps) - log_sigma.sum(1)
        return z, a, log_q


class Decoder(nn.Module):
    """P: z (n, k) and, if there are categories, y (n, m) -> x (n, C, H, W)."""

    def __init__(self, net, mean, std):
        super().__init__()
        for name, t in (("mean", mean), ("std", std), ("fixed", torch.zeros(()))):
            self.register_buffer(name, t.clone())
        self.W_C = nn.Parameter(heads(net.m, net.k)) if net.heads else None
        self.net = mlp(net.k if net.heads else net.k + net.m, net.width, mean.numel(), net.bn)
        self.linear = net.standard

    def centres(self):
        """W_C (m, k), with no gradient to it while `fixed` is 1 [dev 4]."""
        return torch.lerp(self.W_C, self.W_C.detach(), self.fixed)

    def code(self, z, y):
        """What the layers get: z, (y, z), or W_C y + z (Sec. 7)."""
        if y is None:
            return z
        if self.W_C is None:
            return torch.cat([y, z], 1)
        return y @ self.centres() + z

    def forward(self, z, y=None):
        x = self.net(self.code(z, y)).float().unflatten(1, self.mean.shape)
        return self.mean + self.std * x if self.linear else x.sigmoid()


def spacing(m):
    """Distance of neighbours among m points evenly on a circle of radius 10: 20 sin(pi / m), 20 for two."""
    return 20 * math.sin(math.pi / m)


def heads(m, k):
    """W_C (m, k) at the start: evenly on a circle of radius 10 in 2-D, at random on the sphere in more."""
    if k > 2:
        return 10 * F.normalize(torch.randn(m, k), dim=1)
    t = 2 * math.pi * torch.arange(m) / m
    return 10 * torch.stack([t.cos(), t.sin()], 1)[:, :k]


def networks(net, args, mean, std):
    """Q, P and the discriminators, D_z and where Q infers y D_y; for SGD N(0, .01), biases 0 (App. A)."""
    kind = "gaussian" if args.model == "vae" else args.encoder
    Q, P = Encoder(net, kind, mean, std), Decoder(net, mean, std)
    D = [mlp(i, net.width, 1) for i in ([net.k + net.one_hot] if Q.y is None else [net.k, net.m])]
    for module in (m for part in (Q, P, *D) for m in part.modules() if isinstance(m, nn.Linear)):
        if args.optimizer == "sgd":                         # else PyTorch's own [dev 5]
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)
    return Q, P, D


# ------------------------------------------------------------------------------------------ priors and labels

def mixture(c, u=None, v=None):
    """z (n, 2) from component c (n,) of ten 2-D Gaussians, each along a ray at angle 2 pi c / 10.

    1.4 + .5 u along the ray and .1 v across it, u and v (n,) from N(0, 1), drawn if None.  c, u, v = 0:
    (1.4, 0).
    """
    u, v = (torch.randn(c.shape, device=c.device) if t is None else t for t in (u, v))
    t, along, across = 2 * math.pi * c / 10, 1.4 + 0.5 * u, 0.1 * v
    return torch.stack([along * t.cos() - across * t.sin(), along * t.sin() + across * t.cos()], 1)


def log_mixture(z):
    """log p(z) (n,) in nats of all ten components of mixture() together."""
    t = 2 * math.pi * torch.arange(10, device=z.device) / 10
    along, across = z @ torch.stack([t.cos(), t.sin()]), z @ torch.stack([-t.sin(), t.cos()])
    square = ((along - 1.4) / 0.5) ** 2 + (across / 0.1) ** 2
    return torch.logsumexp(-0.5 * square, 1) - math.log(10 * 0.5 * 0.1) - LOG_2PI


def swiss_roll(c, u=None):
    """z (n, 2) from the tenth c (n,) of a swiss roll: radius 3 sqrt(s), angle 4 pi sqrt(s), s = (c + u) / 10.

    u (n,) from Unif(0, 1), drawn if None.  c = u = 0: the origin.  c = 9, u = 1: (3, 0).
    """
    u = torch.rand(c.shape, device=c.device) if u is None else u
    r = ((c + u) / 10).sqrt()
    return 3 * torch.stack([r * (4 * math.pi * r).cos(), r * (4 * math.pi * r).sin()], 1)


def sample_z(c, args, net):
    """z (n, k) from the prior, given labels c (n,) in 0..9; 10 is no label: from all of it (Sec. 2.3)."""
    if args.task != "prior" or args.prior == "gaussian":
        return net.std * torch.randn(len(c), net.k, device=c.device)
    c = torch.where(c < 10, c, torch.randint(10, c.shape, device=c.device))
    return mixture(c) if args.prior == "mixture" else swiss_roll(c)


def one_hot(c, m):
    return F.one_hot(c, m).float()


def sample_y(n, net, device="cpu"):
    """y (n, m) from the uniform categorical prior of Sec. 5, one-hot; None without categories."""
    return one_hot(torch.randint(net.m, (n,), device=device), net.m) if net.m else None


def draw_labels(labels, n, seed):
    """Indices (n,) of the pictures whose labels a run sees, as many of each class; each seed draws others.

    Raises UserError if n is no multiple of the number of classes, or a class has too few pictures.
    """
    counts = torch.bincount(labels[labels >= 0])
    each = n // len(counts)
    if n % len(counts) or counts.min() < each:
        raise UserError(f"--labels {n} found: a multiple of {len(counts)} expected, as many of each class, "
                        f"the rarest of which has {counts.min()}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == k][:each] for k in range(len(counts))])


# -------------------------------------------------------------------------------------------------- objective

def V(a_real, a_fake):
    """Sec. 2: E_{z ~ p(z)}[log D(z)] + E_{z ~ q(z)}[log(1 - D(z))], D = sigmoid(a), a (n, 1).

    -log 4 where D = 1/2 everywhere.
    """
    return F.logsigmoid(a_real.float()).mean() + F.logsigmoid(-a_fake.float()).mean()


def reconstruction(x, x_hat, std=1.0):
    """Half the squared error |x - x_hat|^2 of a picture in units of std, mean over pictures (n, C, H, W).

    392 where 28 x 28 pixels are all off by one.
    """
    return 0.5 * ((x - x_hat) / std).square().flatten(1).sum(1).mean()


def log_normal(z):
    """log N(z; 0, 1) in nats, summed over z (n, k): (n,).  -0.9189 k at 0."""
    return -0.5 * (z.square() + LOG_2PI).sum(1)


def kl(log_q, log_p):
    """Eq. 2: KL(q(z|x) || p(z)) = E[log q(z|x) - log p(z)], one z ~ q(z|x) a picture.  0 for q = p."""
    return (log_q - log_p).mean()


def repulsion(W_C, eta):
    """Sec. 7: sum over pairs of cluster heads of max(0, eta - |c_i - c_j|), W_C (m, k).

    0 for heads on their first circle, whose neighbours are eta = spacing(m) apart.
    """
    i, j = torch.triu_indices(len(W_C), len(W_C), 1, device=W_C.device)
    return (eta - (W_C[i] - W_C[j]).norm(dim=1)).clamp(min=0).sum()


def head_labels(y, labels):
    """Sec. 6: cluster i has the label of the one validation picture with the largest q(y_i|x).

    y (N, m) are q(y|x), labels (N,) -> (m,).
    """
    return labels[y.argmax(0)]


def disagreement(a, a_bar):
    """Squared distance of q(y|x) from the averaged Q's for the same pictures under other noise [dev 6], no
    gradient to the latter: logits (n, m) -> ().  2 where both are sure of different categories."""
    return (a.softmax(1) - a_bar.detach().softmax(1)).square().sum(1).mean()


def sliced_wasserstein(a, b, directions=200):
    """1-D Wasserstein distance of two samples (n, k) in a random direction, mean over directions: a float.

    0 for a sample and itself; moved by a vector of length s in 2-D: 2 s / pi.
    """
    w = F.normalize(torch.randn(a.shape[1], directions, device=a.device), dim=0)
    return ((a @ w).sort(0).values - (b @ w).sort(0).values).abs().mean().item()


# ------------------------------------------------------------------------------------------------------ flags

def number_or_all(text):
    return text if text == "all" else run.number(int, 0)(text)


def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="mnist", batch_size=100, steps=30000)
    add = p.add_argument_group("adversarial autoencoder").add_argument
    positive = run.number(float, 0, open_low=True)
    add("--task", choices=TASKS, default="prior", help="the experiment, one of Sec. 2 to 7 [%(default)s]")
    add("--prior", choices=("gaussian", "mixture", "swiss-roll"), default="mixture",
        help="p(z) of --task prior [%(default)s]")
    add("--model", choices=("aae", "vae"), default="aae", help="of --task prior, Fig. 2 [%(default)s]")
    add("--encoder", choices=("deterministic", "gaussian", "universal"), default="deterministic",
        help="q(z|x), Sec. 2 [%(default)s; a VAE's is Gaussian]")
    add("--labels", type=number_or_all,
        help="labelled pictures, as many of each class, or all [semi and reduce 100, prior 10000 or 0]")
    add("--clusters", type=run.number(int, 2), help="categories of y without labels [cluster 16, reduce 20]")
    add("--z-dim", type=run.number(int, 1),
        help="numbers in z [prior and reduce 2, likelihood 8, style 15, semi 10, cluster 5]")
    add("--optimizer", choices=("adam", "sgd"), default="adam", help="of all phases [%(default)s]")
    add("--rates", type=positive, nargs=3, metavar=("R", "A", "S"),
        help="of the three phases, for example .01 .1 .1, SGD's [.001 each, prior .0001 .001, likelihood "
        ".001 .0003]")
    add("--bn", action=argparse.BooleanOptionalAction, help="BatchNorm in Q and P [where Q infers y, SVHN]")
    add("--consistency", type=run.number(float, 0),
        help="weight of q(y|x) being alike whatever the noise on x [with labels 20, clusters 5, else 0]")
    add("--warp", type=run.number(float, 0), help="how much pictures that Q sees after the reconstruction "
        "phase are turned, stretched, sheared and moved [where Q infers y 1, else 0]")
    add("--noise", type=run.number(float, 0),
        help="std of the Gaussian noise on Q's input in training [with labels .3, likelihood .7, else 0]")
    add("--average", type=run.number(float, 0, 1), default=0.999,
        help="decay of the averages of Q and P that are judged, 0: their last weights [%(default)s]")
    add("--nn-steps", type=run.number(int, 0), default=2000,
        help="steps of the supervised baseline of --task semi, trained beside [%(default)s]")
    add("--width", type=positive, default=1.0, help="hidden units as a share of the paper's [%(default)s]")
    args = run.parse(p, argv)
    drawn = args.task == "prior" and args.prior != "gaussian" and args.model == "aae"
    if args.labels is None:
        args.labels = 10000 if drawn else 100 if args.task in ("semi", "reduce") else 0
    if args.labels and not drawn and args.task not in ("semi", "reduce"):
        p.error("--labels is for --task semi and reduce, and for an aae with --prior mixture or swiss-roll")
    if args.task == "semi" and not args.labels:
        p.error("--task semi needs labels; --task cluster does without")
    if args.model == "vae" and (args.task != "prior" or args.prior == "swiss-roll"):
        p.error("--model vae is for --task prior, and a swiss roll has no density, which its KL needs")
    if args.clusters and args.task != "cluster" and (args.task != "reduce" or args.labels):
        p.error("--clusters is for --task cluster, and for reduce with --labels 0")
    if args.task == "prior" and args.z_dim not in (None, 2):
        p.error(f"--z-dim {args.z_dim} found, --task prior has 2")
    if args.task == "reduce" and args.z_dim == 1:
        p.error("--z-dim 1 found, --task reduce needs 2 or more: its heads are on a circle")
    if args.consistency and args.task not in ("semi", "cluster", "reduce"):
        p.error("--consistency is for --task semi, cluster and reduce, where Q infers y")
    return args


def settle(args):
    """The Net of the experiment, with what data set and flags change."""
    net = TASKS["cluster" if args.task == "reduce" and not args.labels else args.task]
    if args.task == "reduce":
        net = replace(net, k=2, m=10 if args.labels else 20, heads=True)
    net = replace(net, **OTHERS.get((args.task, args.dataset), {}))
    given = {"k": args.z_dim, "m": args.clusters, args.optimizer: args.rates, "bn": args.bn,
             "noise": args.noise, "consistency": args.consistency, "warp": args.warp}
    net = replace(net, **{k: v for k, v in given.items() if v is not None})
    return replace(net, width=max(8, round(net.width * args.width)))


# --------------------------------------------------------------------------------------------------- training

def seen(z, y, c, net):
    """What each discriminator sees: D_z z and D_y y, or the only one z and a one-hot label c (Sec. 2.3)."""
    if net.one_hot:
        return [torch.cat([z, one_hot(c, net.one_hot)], 1)]
    return [z] if y is None or net.given else [z, y]


def optimizer(args, net, phase, *nets):
    """Of the parameters of `nets`, with the rate of `phase` 0 to 2: Adam [dev 5], or SGD with momentum.

    """
    params = [p for part in nets for p in part.parameters()]
    if args.optimizer == "sgd":
        return SGD(params, net.sgd[phase], net.momenta[phase])
    return Adam(params, net.adam[phase])


def anneal(opts, rates, done):
    """Rates after the share `done` of a run: a tenth from one half, a hundredth from four fifths [dev 1]."""
    for opt, rate in zip(opts, rates):
        for group in opt.param_groups:
            group["lr"].fill_(rate * (0.01 if done >= 0.8 else 0.1 if done >= 0.5 else 1.0))


def build(args, net, mean, std, labelled):
    """All that a checkpoint holds by name, optimizers last, and the fused iteration of the three phases.

    `labelled`: whether there is the third one.
    """
    Q, P, D = networks(net, args, mean, std)
    Q, P, Q_bar, P_bar, *D = place(args, Q, P, averaged(Q), averaged(P), *D)
    opt_R, opt_D, opt_Q = (optimizer(args, net, *of) for of in ((0, Q, P), (1, *D), (1, Q)))
    parts = {"Q": Q, "P": P, "Q_bar": Q_bar, "P_bar": P_bar, **{f"D{i}": d for i, d in enumerate(D)},
             "opt_R": opt_R, "opt_D": opt_D, "opt_Q": opt_Q}
    if labelled:
        parts["opt_S"] = opt_S = optimizer(args, net, 2, Q.trunk, Q.y)
    amp = autocast(args)

    @fuse(args)
    def train_step(x, c, *pair):                    # x (n, C, H, W) in [0, 1], c (n,) labels, 10 for none
        # Reconstruction phase: Q and P descend the squared error.
        y = one_hot(c, net.m) if net.given else None
        with amp:
            z, a, _ = Q(x)
            x_hat = P(z, y if a is None else a.softmax(1))
        cost = reconstruction(x, x_hat, P.std)
        descend(cost + repulsion(P.centres(), spacing(net.m)) if net.heads else cost, opt_R)
        # Regularisation phase: each discriminator ascends V, draws of its prior against codes ...
        z_real, y_real = sample_z(c, args, net), sample_y(len(x), net, x.device)
        with amp:
            z, a, _ = Q(data.warp(x, net.warp))                # [dev 8]
            a_bar = Q_bar(x)[1] if net.consistency else None
            real, fake = seen(z_real, y_real, c, net), seen(z, None if a is None else a.softmax(1), c, net)
            v = [V(d(t), d(t_fake.detach())) for d, t, t_fake in zip(D, real, fake)]
        descend(-sum(v), opt_D)
        # ... and Q, their generator, ascends log D(Q(x)) through the updated ones.
        with amp, frozen(*D):
            log_D = [F.logsigmoid(d(t).float()).mean() for d, t in zip(D, fake)]
        loss_Q = -sum(log_D)
        if net.consistency:
            loss_Q = loss_Q + net.consistency * disagreement(a, a_bar)
        descend(loss_Q, opt_Q)
        scalars = {"reconstruction": cost, **dict(zip(("V", "V_y"), v))}
        # Semi-supervised phase: Q descends the cross-entropy of labelled pictures.
        if labelled:
            x_l, y_l = pair
            with amp:
                _, a, _ = Q(data.warp(x_l, net.warp))
            scalars["label"] = F.cross_entropy(a, y_l)
            descend(scalars["label"], opt_S)
        average(Q_bar, Q, args.average)                     # [dev 2]
        average(P_bar, P, args.average)
        return scalars

    return parts, train_step


def build_vae(args, net, mean, std):
    """The same for the variational autoencoder of Fig. 2."""
    Q, P, _ = networks(net, args, mean, std)
    Q, P, Q_bar, P_bar = place(args, Q, P, averaged(Q), averaged(P))
    opt_R = optimizer(args, net if args.rates else replace(net, adam=(1e-3,)), 0, Q, P)
    amp = autocast(args)

    @fuse(args)
    def vae_step(x, c):                             # x (n, C, H, W) in [0, 1]
        with amp:
            z, _, log_q = Q(x)
            x_hat = P(z)
        cost = F.binary_cross_entropy(x_hat, x, reduction="sum") / len(x)                        # [dev 3]
        log_p = log_mixture(z) if args.prior == "mixture" \
            else log_normal(z / net.std) - net.k * math.log(net.std)
        divergence = kl(log_q, log_p)
        descend(cost + divergence, opt_R)
        average(Q_bar, Q, args.average)                     # [dev 2]
        average(P_bar, P, args.average)
        return {"-log p(x|z)": cost, "KL": divergence}

    return {"Q": Q, "P": P, "Q_bar": Q_bar, "P_bar": P_bar, "opt_R": opt_R}, vae_step


def build_nn(args, net, mean, std):
    """Table 2's baseline: a network like Q that has the semi-supervised phase alone."""
    N = place(args, networks(net, args, mean, std)[0])
    opt_N = optimizer(args, net, 2, N.trunk, N.y)
    amp = autocast(args)

    @fuse(args)
    def nn_step(x, y):
        with amp:
            _, a, _ = N(x)
        cost = F.cross_entropy(a, y)
        descend(cost, opt_N)
        return {"NN": cost}

    return {"N": N, "opt_N": opt_N}, nn_step


# ---------------------------------------------------------------------------------------- figures and numbers

def encode(Q, images, device, warp=0.0):
    """z (N, k) and q(y|x) (N, m), None where Q infers no y, of uint8 pictures, all warped if `warp`, on the
    CPU."""
    batches = (x.to(device).float() / 255 for x in images.split(1000))
    with sampling(Q):
        z, a, _ = zip(*(Q(data.warp(x, warp, share=1.0)) for x in batches))
    return torch.cat(z).cpu(), None if a[0] is None else torch.cat(a).softmax(1).cpu()


def decode(P, z, y=None):
    """Pictures (n, C, H, W) of codes on any device."""
    pairs = zip(z.split(1000), [None] * len(z) if y is None else y.split(1000))
    with sampling(P):
        return torch.cat([P(*(t if t is None else t.to(P.mean.device) for t in pair)) for pair in pairs])


def draw(P, n, args, net):
    """n pictures (n, C, H, W) of codes from the priors."""
    z = sample_z(torch.full((n,), 10, device=args.device), args, net)
    return decode(P, z, sample_y(n, net, args.device))


def scatter(z, labels, heads=None):
    """Codes (N, 2) as dots in the colours of their labels, with cluster heads (m, 2) as large black ones."""
    limit = 1.1 * max(z.abs().quantile(0.999).item(), 0 if heads is None else heads.abs().max().item())
    chart = log.Axes((-limit, limit), (-limit, limit), "", "", size=(600, 600))
    for k in labels.unique().tolist():
        chart.points(*z[labels == k].T.tolist(), label=k)
    if heads is not None:
        chart.points(*heads.T.tolist(), colour="black", radius=12)
    return chart.picture()


def manifold(args, net, n=20):
    """Codes (rows * n, 2) all over the prior: Gaussian percentiles along both axes; for each component those
    along its main axis; even steps along each tenth of the swiss roll."""
    p = (torch.arange(n) + 0.5) / n
    u, c = torch.special.ndtri(p), torch.arange(10).repeat_interleave(n)
    if args.prior == "gaussian":
        return net.std * torch.stack(torch.meshgrid(u, -u, indexing="xy"), 2).flatten(0, 1)
    return mixture(c, u.repeat(10), 0.0 * c) if args.prior == "mixture" else swiss_roll(c, p.repeat(10))


FIGURES = {("aae", "gaussian", 0): ("fig2a", "fig2e"), ("aae", "mixture", 0): ("fig2b", "manifold"),
           ("vae", "gaussian", 0): ("fig2c", "manifold"), ("vae", "mixture", 0): ("fig2d", "manifold"),
           ("aae", "mixture", 11): ("fig4a", "fig4b"), ("aae", "swiss-roll", 11): ("fig4c", "fig4d")}
PAPER = {"aae-mnist-ll": 340, "aae-tfd-ll": 2252, "aae-mnist100": 1.90, "aae-mnist1000": 1.60,
         "aae-mnist-all": 0.85, "aae-svhn1000": 17.70, "aae-clu16": 9.55, "aae-clu30": 4.10,
         "aae-dim-2d-1000": 4.20, "aae-dim-2d-100": 6.08, "aae-dim-2d-0": 13.95, "aae-dim-10d-100": 3.90}
PAPER_NN = {"aae-mnist100": 25.80, "aae-mnist1000": 8.73, "aae-mnist-all": 1.25, "aae-svhn1000": 47.50}
CHECK = {"prior": (0, 0.2), "likelihood": (200, math.inf), "style": (90, 100), "semi": (0, 5),
         "cluster": (0, 20), "reduce": (0, 20)}     # --check: the first result lies in between


def prior(r, net, Q, P, sets):
    """Figs. 2 and 4; how far q(z) of held-out pictures is from p(z), and which share has its own place: the
    nearest of 10,000 draws of the prior has their label."""
    args, (images, labels) = r.args, sets["test"]
    with r.aside():
        z, _ = encode(Q, images, args.device)
        a, b = (sample_z(torch.full((len(z),), 10), args, net) for _ in "ab")
        more = {"of two draws of p(z)": sliced_wasserstein(a, b), "model": args.model}
        if net.one_hot:
            c = torch.arange(10000) % 10
            drawn = sample_z(c, args, net)
            nearest = torch.cat([torch.cdist(part, drawn).argmin(1) for part in z.split(1000)])
            more["% of digits in place"] = 100 * (c[nearest] == labels).float().mean().item()
        distance = sliced_wasserstein(z, a)
    codes, shown = FIGURES.get((args.model, args.prior, net.one_hot), ("codes", "manifold"))
    r.show(codes, scatter(z, labels))
    r.show(shown, log.grid(decode(P, manifold(args, net)), 20))
    name = f"aae-prior-{4 if net.one_hot else 2}"
    return {name: {"value": distance, "unit": "sliced Wasserstein distance of q(z) and p(z)", **more}}


def likelihood(r, net, Q, P, sets):
    """Table 1: a Parzen window of 10,000 samples, sigma by validation; nats, mean over the test pictures."""
    with r.aside():
        x = draw(P, 10000, r.args, net)
    valid, test = (sets[key][0].to(x.device).float().flatten(1) / 255 for key in ("valid", "test"))
    window = metrics.parzen(x.flatten(1), valid[:1000], test)
    r.show("samples", log.grid(x[:100], 10))
    name = "aae-tfd-ll" if r.args.dataset == "faces" else "aae-mnist-ll"
    return {name: {"value": window["ll"], "se": window["se"], "sigma": window["sigma"], "unit": "nats"}}


def styles(P, net, rows=10):
    """Pictures (rows * m, C, H, W): a row is one z ~ p(z), its columns the categories of y."""
    z = net.std * torch.randn(rows, net.k)
    return decode(P, z.repeat_interleave(net.m, 0), torch.eye(net.m).repeat(rows, 1))


def style(r, net, Q, P, sets):
    """Fig. 6, and the share of samples that a classifier takes for the label that P was given."""
    with r.aside():
        r.show("fig6", log.grid(styles(P, net), net.m))
        x = styles(P, net, 10000 // net.m).clamp(0, 1)
    clf = metrics.classifier(*sets["train"], r.args.device, r.args.data_dir)
    agreement = metrics.label_agreement(clf, x, torch.arange(len(x)) % net.m)
    return {"aae-style": {"value": 100 * agreement, "unit": "% of samples with the label given"}}


def error(Q, sets, device, table=None):
    """Test error in % of the likeliest category, taken for its label in `table` or for the label itself."""
    images, labels = sets["test"]
    k = encode(Q, images, device)[1].argmax(1)
    return 100 * ((k if table is None else table[k]) != labels).float().mean().item()


def semi(r, net, Q, P, sets):
    """Table 2: test error of argmax q(y|x); "styles": a row one style, its columns the categories."""
    args = r.args
    with r.aside():
        r.show("styles", log.grid(styles(P, net), net.m))
    name = f"aae-{'svhn' if args.dataset == 'svhn' else 'mnist'}{'-' * (args.labels == 'all')}{args.labels}"
    return {name: {"value": error(Q, sets, args.device), "unit": "% error"}}


def name_clusters(r, net, Q, sets):
    """head_labels() of the validation pictures, their q(y|x) a mean over 16 warps [dev 11]: (m,)."""
    images, labels = sets["valid"]
    with r.aside():
        views = (encode(Q, images, r.args.device, net.warp)[1] for _ in range(16 if net.warp else 1))
        return head_labels(sum(views), labels)


def cluster(r, net, Q, P, sets):
    """Table 3, and Fig. 9: a row is a cluster, first its head (z = 0), then test pictures that are in it."""
    device, images = r.args.device, sets["test"][0]
    k = encode(Q, images, device)[1].argmax(1)
    rows = decode(P, torch.zeros(net.m, net.k), torch.eye(net.m))[:, None].repeat(1, 16, 1, 1, 1).cpu()
    for i in range(net.m):
        members = images[k == i][:15]
        rows[i, 1:] = 0
        rows[i, 1:len(members) + 1] = members.float() / 255
    r.show("fig9", log.grid(rows.flatten(0, 1), 16))
    table = name_clusters(r, net, Q, sets)
    found = error(Q, sets, device, table)
    return {f"aae-clu{net.m}": {"value": found, "unit": "% error", "labels": table.tolist()}}


def reduce(r, net, Q, P, sets):
    """Fig. 10: W_C y + z of the test pictures with the cluster heads, and their error; more than two numbers
    are brought to two by the linear map that puts the heads nearest to a circle."""
    args, device = r.args, r.args.device
    z, y = encode(Q, sets["test"][0], device)
    W_C, table = P.W_C.detach().cpu(), None
    points = y @ W_C + z
    if net.k > 2:
        A = torch.linalg.lstsq(W_C, heads(net.m, 2), driver="gelsd").solution
        points, W_C = points @ A, W_C @ A
    r.show("fig10", scatter(points, sets["test"][1], W_C))
    if not args.labels:
        table = name_clusters(r, net, Q, sets)
    return {f"aae-dim-{net.k}d-{args.labels}": {"value": error(Q, sets, device, table), "unit": "% error"}}


JUDGES = {f.__name__: f for f in (prior, likelihood, style, semi, cluster, reduce)}


# ------------------------------------------------------------------------------------------------------- main

def split(pictures, held):
    """(images, labels) of "train", "valid" and "test"; without test pictures those held out serve twice."""
    images, n = pictures.images, len(pictures.images)
    labels = torch.full((n,), -1) if pictures.labels is None else pictures.labels
    cut = n - min(held if pictures.test_images is not None else 10000, n // 6)
    valid = images[cut:], labels[cut:]
    test = valid if pictures.test_images is None else (pictures.test_images, pictures.test_labels)
    if test[1] is None:
        test = test[0], torch.full((len(test[0]),), -1)
    return {"train": (images[:cut], labels[:cut]), "valid": valid, "test": test}


def known(args, labels):
    """Indices of the training pictures whose labels the run sees; --task prior: a fifth of them at most."""
    if args.labels == "all":
        return torch.nonzero(labels >= 0)[:, 0]
    n = min(args.labels, len(labels) // 50 * 10) if args.task == "prior" else args.labels
    return draw_labels(labels, n, args.seed) if n else torch.zeros(0, dtype=torch.long)


def main(argv=None):
    args = parse_args(argv)
    r = run.Run(args)
    net = settle(args)
    pictures = data.load(args.dataset, args.data_dir, net.size, net.channels)
    if pictures.labels is None and (args.labels or args.task not in ("prior", "likelihood")):
        raise UserError(f"{args.dataset} has no labels: --task likelihood, and prior with --labels 0, "
                        "do without them")
    sets = split(pictures, net.held)
    if (sets["test"][1] < 0).all() and args.task not in ("prior", "likelihood"):
        raise UserError(f"{args.dataset} has test_images without test_labels, by which {args.task} is judged")
    images, labels = sets["train"]
    if net.given and labels.min() < 0:
        raise UserError(f"{args.dataset} has pictures without a label: --task style needs all of them")
    if args.task == "prior" and args.labels and labels.max() > 9:
        raise UserError(f"{args.dataset} has {int(labels.max()) + 1} classes, the prior ten: give --labels 0")
    chosen, c = known(args, labels), torch.full_like(labels, 10)
    labelled = args.task != "prior" and len(chosen) > 0
    if labelled or net.given:
        net = replace(net, m=int(labels.max()) + 1)
    elif len(chosen):
        net, c[chosen] = replace(net, one_hot=11), labels[chosen]
    if net.given:
        net, c = replace(net, one_hot=net.m), labels                                             # [dev 9]
    mean, std = torch.zeros(images.shape[1:]), torch.ones(images.shape[1:])
    if net.standard:
        x = images[:10000].float() / 255
        mean, std = x.mean(0), x.std(0).clamp(min=0.01)
    where = {"device": args.device, "seed": args.seed, "rank": r.rank, "world": r.world}
    batches = data.Batches(images, c, batch_size=args.batch_size, **where)
    parts, train_step = build_vae(args, net, mean, std) if args.model == "vae" \
        else build(args, net, mean, std, labelled)
    opts = [parts[k] for k in ("opt_R", "opt_D", "opt_Q", "opt_S") if k in parts]
    rates = [opt.param_groups[0]["lr"].item() for opt in opts]
    if labelled:
        size = min(args.batch_size, len(chosen) // r.world)
        parts["pairs"] = pairs = data.Batches(images[chosen], labels[chosen], batch_size=size, **where)
    nn_steps = args.nn_steps if args.task == "semi" else 0
    if nn_steps:
        baseline, nn_step = build_nn(args, net, mean, std)
        parts |= baseline
    r.keep(**parts, batches=batches)
    Q, P = parts["Q_bar"], parts["P_bar"]
    if args.sample:
        return r.sample(lambda n: draw(P, n, args, net))

    for step in r.loop():
        anneal(opts, rates, (step - 1) / args.steps)
        parts["P"].fixed.fill_(float(step <= args.steps / 10))                                   # [dev 4]
        pair = next(pairs) if labelled else ()
        r.log(train_step(*next(batches), *pair))
        if step <= nn_steps:
            r.log(nn_step(*pair))
        if r.every(args.save_every):
            with r.aside():
                r.show("samples", log.grid(draw(P, 100, args, net), 10))
                if labelled:
                    r.log({"error": torch.tensor(error(Q, sets, args.device))})

    if r.lead:
        results = JUDGES[args.task](r, net, Q, P, sets)
        name, (low, high) = next(iter(results)), CHECK[args.task]
        if nn_steps:
            base = error(parts["N"], sets, args.device)
            results["aae-semi-base"] = {"value": base, "unit": "% error, supervised"}
        own = "svhn" if "svhn" in name else "faces" if "tfd" in name else "mnist"
        if args.dataset == own:                     # the paper's values are those of its own data
            for line, paper in ((name, PAPER), ("aae-semi-base", PAPER_NN)):
                if line in results and name in paper:
                    results[line]["paper"] = paper[name]
        r.results(results, passed=args.dataset != "mnist" or low <= results[name]["value"] <= high)


if __name__ == "__main__":
    main()

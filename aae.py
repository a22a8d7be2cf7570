"""Adversarial Autoencoders
Alireza Makhzani, Jonathon Shlens, Navdeep Jaitly, Ian Goodfellow, Brendan Frey, 2015.  arXiv:1511.05644

Q encodes x as a code z and P decodes it.  Q is trained against a discriminator D to match a prior p(z).

    Eq. 1      q(z) = E_{x~data}[q(z|x)], the aggregated posterior, to match p(z)  -> Encoder()
    Sec. 2     min_Q max_D V = E_{z~p(z)}[log D(z)] + E_{z~q(z)}[log(1 - D(z))]    -> V()
    Sec. 2     each minibatch: reconstruction phase, then regularisation phase     -> train_step()
    Eq. 2      VAE: E_x[E_{q(z|x)}[-log p(x|z)] + KL(q(z|x) || p(z))], Fig. 2c, d  -> build_vae(), kl()
    Sec. 2.3   a label is a one-hot input of D                                     -> D_sees()
    Sec. 2.3   priors of Figs. 2 and 4                                             -> mixture(), swiss_roll()
    Sec. 3     Table 1: log-likelihood under a Parzen window of samples            -> likelihood()
    Sec. 4     P receives the label y, so that z encodes the style                 -> style()
    Sec. 5     Q infers y and z; a third, semi-supervised phase (Table 2)          -> classify(), semi()
    Sec. 6     without labels, categories are clusters (Table 3, Fig. 9)           -> cluster(), head_labels()
    Sec. 7     P receives W_C y + z, where W_C holds the cluster heads             -> reduce(), repulsion()

    python aae.py                                   (Fig. 4a, b; --prior swiss-roll: c, d; gaussian: Fig. 2)
    python aae.py --task likelihood
    python aae.py --task style
    python aae.py --task semi --labels 100          (or 1000, or all; --paper: the published settings)
    python aae.py --task cluster --clusters 16      (or 30)
    python aae.py --task reduce --labels 100        (or 1000, or 0; with --z-dim 10 in ten dimensions)
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import UserError, data, export, log, metrics, run
from common.fuse import SGD, Adam, autocast, average, averaged, descend, frozen, fuse, place, set_rate

# --------------------------------------------------------------------------------------------------- settings
# hidden: units in each of two hidden layers.  z_dim: size of z.  std: that of z's Gaussian prior.
# bn: BatchNorm in hidden layers of Q and P; where="encoder": in all layers of Q, none of P; "all": of both.
# rates, momenta: for the reconstruction, regularisation and semi-supervised phase; SGD starts from N(0, .01),
# Adam from PyTorch's default weights.  drops: epochs after which the rates are divided by ten.  hold: epochs
# during which the cluster heads are fixed.  Values of both below 1 are fractions of --steps.
# validation: training pictures held out.  Where the paper is silent (Secs. 2 to 4, A.1), A.2.1 applies.

MLP = dict(batch_size=100, hidden=1000, std=1.0, labels=0, clusters=0, noise=0.0, dropout=0.0, bn=False,
           where="hidden", standard=False, size=28, channels=1, validation=10000,
           optimizer="sgd", rates=(0.01, 0.1, 0.1), momenta=(0.9, 0.1, 0.9), drops=(50, 1000), hold=0,
           steps=5000 * 500, average=0.0, D_label=False, consistency=0.0, warp=0.0, spread=0.0)
PRIOR = MLP | dict(z_dim=2, std=5.0)                                                # Sec. 2, Figs. 2 and 4
SVHN = dict(size=32, channels=3, standard=True, bn=True, where="all", dropout=0.2, noise=0.0,   # A.2.2; the
            rates=(1e-4, 0.01, 0.1), drops=(250,), steps=1000 * 732)    # paper adds 531,131 extra pictures
SEMI = MLP | dict(z_dim=10, labels=100, noise=0.3, validation=0, steps=5000 * 600)  # A.2.1
CLUSTER = MLP | dict(z_dim=5, clusters=16, hidden=3000, dropout=0.2, bn=True, where="encoder",
                     drops=(50,), steps=1500 * 500)                                 # A.3
PAPER = {
    "prior-gaussian": PRIOR, "vae-gaussian": PRIOR, "vae-mixture": PRIOR,
    "prior-mixture": PRIOR | dict(labels=10000), "prior-swiss-roll": PRIOR | dict(labels=10000),   # Sec. 2.3
    "likelihood": MLP | dict(z_dim=8, std=5.0),                                     # A.1, MNIST
    "likelihood-faces": MLP | dict(z_dim=15, std=10.0, size=48, standard=True),     # A.1, as for TFD
    "style": MLP | dict(z_dim=15, validation=0, steps=5000 * 600),                  # Sec. 4
    "style-svhn": MLP | dict(z_dim=15, validation=0) | SVHN,
    "semi": SEMI, "semi-svhn": SEMI | dict(z_dim=20, labels=1000) | SVHN,
    "cluster": CLUSTER,
    "reduce": SEMI | dict(z_dim=2, hold=50),                                        # Sec. 7; sizes as A.2.1
    "reduce-0": CLUSTER | dict(z_dim=2, clusters=20, hold=50),                      # ... and A.3
}
# Errors: --task semi at a quarter of the width after 1,500 steps.  With all of TUNED 3.5 %.
FAST = dict(
    steps=30000, drops=(0.5, 0.8),         # minutes in place of days; the paper's epochs are beyond that
    optimizer="adam", rates=(1e-3,) * 3)   # alone 15.4 %, the paper's SGD 21.2 %
INFER = FAST | dict(
    bn=True, where="hidden",               # without 4.4 %
    # For digits: on Fashion-MNIST neither of these helps (29.3 % with both, 28.5 without).
    consistency=20.0,                      # q(y|x) agrees under other noise on x; without 5.5 %
    warp=1.0)                              # ... and under small rotations and shifts; without 9.5 %
UNLABELLED = INFER | dict(
    consistency=5.0,                       # narrow, 2,000 steps: 24.5 %, without 43.3 %
    spread=3.0)                            # std of logits of y: else six of 16 categories take all digits
TUNED = dict.fromkeys(PAPER, FAST) | {
    **dict.fromkeys(["prior-gaussian", "prior-mixture", "prior-swiss-roll"],
                    FAST | dict(rates=(1e-4, 1e-3, 1e-3))),           # q(z) is half as far from p(z)
    "likelihood": FAST | dict(noise=0.7, rates=(1e-3, 3e-4, 1e-3)),   # smoother digits: 334 nats, else 318
    **dict.fromkeys(["style", "style-svhn"],
                    FAST | dict(D_label=True)),   # q(z|y) matches p(z): 77 % of samples right, else 22 %
    "semi": INFER,                                                    # SVHN: not measured
    "cluster": UNLABELLED, "reduce": INFER | dict(hold=0.1), "reduce-0": UNLABELLED | dict(hold=0.1),
}
QUICK = {"prior-mixture": dict(steps=3000), "style": dict(width=0.5, steps=6000),
         "semi": dict(width=0.5, steps=4000, nn_steps=1000)}


# --------------------------------------------------------------------------------------------------- networks

ETA = 100                               # size of eta, the universal approximator's noise


def units(args):
    return max(8, round(args.hidden * args.width))


def mlp(i, o, args, bn=False, bn_end=False):
    """Two hidden ReLU layers and a linear output (App. A), optionally with BatchNorm: (n, i) -> (n, o)."""
    width = units(args)
    return nn.Sequential(
        nn.Linear(i, width), *[nn.BatchNorm1d(width)] * bn, nn.ReLU(),              # 1000, clusters 3000
        nn.Linear(width, width), *[nn.BatchNorm1d(width)] * bn, nn.ReLU(),          # 1000, clusters 3000
        nn.Linear(width, o), *[nn.BatchNorm1d(o)] * bn_end)


class Encoder(nn.Module):
    """Q: x (n, C, H, W) in [0, 1] -> z (n, k) of q(z|x), logits a (n, m) of q(y|x), log q(z|x) (n,).

    Sec. 2: z is a function of x ("deterministic"), N(mu(x), sigma(x)^2) ("gaussian"), or a function of x and
    noise eta ("universal").  a is None if Q infers no y; log q(z|x) is None unless z is Gaussian.
    """

    def __init__(self, args, m, mean, std):
        super().__init__()
        self.kind = "gaussian" if args.model == "vae" else args.encoder
        self.noise, self.dropout, self.scale = args.noise, args.dropout, args.spread or 1.0
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.trunk = mlp(mean.numel() + ETA * (self.kind == "universal"), 1, args, args.bn)[:-1]
        k, bn_end = args.z_dim * (2 if self.kind == "gaussian" else 1), args.bn and args.where != "hidden"
        self.z = nn.Linear(units(args), k)
        self.z_norm = nn.BatchNorm1d(k) if bn_end else nn.Identity()
        self.y = nn.Linear(units(args), m) if infers_y(args) else None
        self.y_norm = nn.BatchNorm1d(m, affine=not args.spread) \
            if args.spread or (bn_end and infers_y(args)) else nn.Identity()

    def forward(self, x):
        x = ((x - self.mean) / self.std).flatten(1)
        if self.training and self.noise:
            x = x + self.noise * torch.randn_like(x)
        x = F.dropout(x, self.dropout, self.training)
        if self.kind == "universal":
            x = torch.cat([x, torch.randn(len(x), ETA, device=x.device)], 1)
        h = self.trunk(x)
        z, log_q = self.z_norm(self.z(h).float()), None
        a = None if self.y is None else self.scale * self.y_norm(self.y(h).float())
        if self.kind == "gaussian":
            mu, log_sigma = z.chunk(2, 1)
            eps = torch.randn_like(mu)
            z, log_q = mu + log_sigma.exp() * eps, log_normal(eps) - log_sigma.sum(1)
        return z, a, log_q


class Decoder(nn.Module):
    """P: z (n, k) and, if there are m categories, y (n, m) -> x (n, C, H, W)."""

    def __init__(self, args, m, mean, std):
        super().__init__()
        self.m, self.linear = m, args.standard
        for name, t in (("mean", mean), ("std", std), ("fixed", torch.zeros(()))):
            self.register_buffer(name, t.clone())
        self.W_C = nn.Parameter(heads(m, args.z_dim)) if args.task == "reduce" else None
        k = args.z_dim if args.task == "reduce" else args.z_dim + m
        self.net = mlp(k, mean.numel(), args, args.bn and args.where != "encoder",
                       bn_end=args.bn and args.where == "all")

    def centres(self):
        """W_C (m, k), without a gradient while `fixed` is 1."""
        return torch.lerp(self.W_C, self.W_C.detach(), self.fixed)

    def code(self, z, y):
        """Input of the first layer: z, (y, z) (Secs. 4 to 6), or W_C y + z (Sec. 7)."""
        if y is None:
            return z
        if self.W_C is None:
            return torch.cat([y, z], 1)
        return y @ self.centres() + z

    def forward(self, z, y=None):
        x = self.net(self.code(z, y)).float().unflatten(1, self.mean.shape)
        return self.mean + self.std * x if self.linear else x.sigmoid()


def networks(args, m, mean, std):
    """Q, P and [D_z], or [D_z, D_y] if Q infers y.  Pixels are normalized by mean and std (C, H, W)."""
    Q, P = Encoder(args, m, mean, std), Decoder(args, m, mean, std)
    D_z = mlp(args.z_dim + label_inputs(args, m), 1, args)
    D = [D_z, mlp(m, 1, args)] if infers_y(args) else [D_z]
    if args.optimizer == "sgd":                             # weights N(0, .01), biases 0 (App. A)
        for layer in nn.ModuleList([Q, P, *D]).modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0.0, 0.01)
                nn.init.zeros_(layer.bias)
    return Q, P, D


# ------------------------------------------------------------------------------------------ priors and labels

def mixture(c, u=None, v=None):
    """z (n, 2) from component c (n,) of ten 2-D Gaussians, each along a ray at angle 2 pi c / 10.

    1.4 + .5 u along the ray and .1 v across it, u and v (n,) from N(0, 1), drawn if None.  (1.4, 0) for
    c = u = v = 0.
    """
    u, v = (torch.randn(c.shape, device=c.device) if t is None else t for t in (u, v))
    t, along, across = 2 * math.pi * c / 10, 1.4 + 0.5 * u, 0.1 * v
    return torch.stack([along * t.cos() - across * t.sin(), along * t.sin() + across * t.cos()], 1)


def swiss_roll(c, u=None):
    """z (n, 2) from the tenth c (n,) of a swiss roll: radius 3 sqrt(s), angle 4 pi sqrt(s), s = (c + u) / 10.

    u (n,) from Unif(0, 1), drawn if None.  The origin for c = u = 0; (3, 0) for c = 9, u = 1.
    """
    u = torch.rand(c.shape, device=c.device) if u is None else u
    r = ((c + u) / 10).sqrt()
    return 3 * torch.stack([r * (4 * math.pi * r).cos(), r * (4 * math.pi * r).sin()], 1)


def sample_z(c, args):
    """z (n, k) from the prior given labels c (n,) in 0..9, or 10 for no label: the whole prior (Sec. 2.3)."""
    if args.task != "prior" or args.prior == "gaussian":
        return args.std * torch.randn(len(c), args.z_dim, device=c.device)
    c = torch.where(c < 10, c, torch.randint(10, c.shape, device=c.device))
    return mixture(c) if args.prior == "mixture" else swiss_roll(c)


def sample_y(n, m, device="cpu"):
    """y (n, m) from the uniform categorical prior of Sec. 5, one-hot; None without categories."""
    return one_hot(torch.randint(m, (n,), device=device), m) if m else None


# -------------------------------------------------------------------------------------------------- objective

def V(a_real, a_fake):
    """Sec. 2: E_{z ~ p(z)}[log D(z)] + E_{z ~ q(z)}[log(1 - D(z))], D = sigmoid(a), a (n, 1).

    -log 4 where D = 1/2 everywhere.
    """
    return F.logsigmoid(a_real.float()).mean() + F.logsigmoid(-a_fake.float()).mean()


def log_D(a_fake):
    """Q ascends this instead of descending V, as in GAN: E_{z ~ q(z)}[log D(z)], a (n, 1).

    -log 2 where D = 1/2 everywhere.
    """
    return F.logsigmoid(a_fake.float()).mean()


def reconstruction(x, x_hat, std=1.0):
    """Half the squared error |x - x_hat|^2 of a picture in units of std, mean over pictures (n, C, H, W).

    392 if all 28 x 28 pixels are off by one.
    """
    return 0.5 * ((x - x_hat) / std).square().flatten(1).sum(1).mean()


def repulsion(W_C, eta):
    """Sec. 7: sum over pairs of cluster heads of max(0, eta - |c_i - c_j|), W_C (m, k).

    The paper gives no eta; here it is spacing(m).  0 for the initial heads on a circle (k = 2) or along the
    axes (k >= m >= 4).
    """
    i, j = torch.triu_indices(len(W_C), len(W_C), 1, device=W_C.device)
    return (eta - (W_C[i] - W_C[j]).norm(dim=1)).clamp(min=0).sum()


# --------------------------------------------------------------------------------------------------- training

def build(args, m, mean, std):
    """Networks and optimizers by name, and the fused step of all phases.  m: number of categories of y."""
    Q, P, D = networks(args, m, mean, std)
    Q, P, Q_bar, P_bar, *D = place(args, Q, P, averaged(Q), averaged(P), *D)
    opt_R, opt_D, opt_Q = optimizer(args, 0, Q, P), optimizer(args, 1, *D), optimizer(args, 1, Q)
    parts = {"Q": Q, "P": P, "Q_bar": Q_bar, "P_bar": P_bar, **{f"D{i}": d for i, d in enumerate(D)},
             "opt_R": opt_R, "opt_D": opt_D, "opt_Q": opt_Q}
    if labelled(args):
        parts["opt_S"] = opt_S = optimizer(args, 2, Q.trunk, Q.y, Q.y_norm)
    amp = autocast(args)

    def decoded(x, z, a, c):
        """Squared error of the decoded pictures, and the repulsion of the cluster heads (Sec. 7), else 0."""
        y = a.softmax(1) if infers_y(args) else one_hot(c, m) if m else None
        with amp:
            x_hat = P(z, y)
        apart = repulsion(P.centres(), spacing(m)) if args.task == "reduce" else 0.0
        return reconstruction(x, x_hat, P.std), apart

    def reconstruct(x, c):
        """Reconstruction phase: Q and P descend the squared error."""
        with amp:
            z, a, _ = Q(x)
        cost, apart = decoded(x, z, a, c)
        descend(cost + apart, opt_R)
        return {"reconstruction": cost}

    def regularise(x, c):
        """Regularisation phase: each D ascends V, with prior samples as real and codes as fake; then Q, the
        generator, ascends log D(Q(x)) through the updated D."""
        z_real, y_real = sample_z(c, args), sample_y(len(x), m, x.device)
        x_seen = Q_sees(x, args)
        with amp:
            z, a, _ = Q(x_seen)
            y = a.softmax(1) if infers_y(args) else None
            real, fake = (D_sees(*t, c, args, m) for t in ((z_real, y_real), (z, y)))
            v = [V(d(t), d(t_fake.detach())) for d, t, t_fake in zip(D, real, fake)]
        descend(-sum(v), opt_D)
        with amp, frozen(*D):
            fooled = args.adversary * sum(log_D(d(t)) for d, t in zip(D, fake))     # True: 1, False: 0
            differ = disagreement(Q_bar, x, a, args)
        scalars = dict(zip(("V", "V_y"), v))
        if args.lam is None:
            descend(differ - fooled, opt_Q)
        else:                                       # not the paper's: one joint step instead of two phases
            scalars["reconstruction"], apart = decoded(x_seen, z, a, c)
            descend(scalars["reconstruction"] + apart + differ - args.lam * fooled, opt_R)
        return scalars

    def classify(x, y):
        """Semi-supervised phase: Q descends the cross-entropy of labelled pictures."""
        with amp:
            _, a, _ = Q(Q_sees(x, args))
        cost = F.cross_entropy(a, y)
        descend(cost, opt_S)
        return {"label": cost}

    @fuse(args)
    def train_step(x, c, *pair):                    # x (n, C, H, W) in [0, 1], c (n,) labels, 10 for none
        scalars = reconstruct(x, c) if args.lam is None else {}
        scalars.update(regularise(x, c))
        if labelled(args):
            scalars.update(classify(*pair))         # pair: labelled pictures and their labels
        average(Q_bar, Q, args.average)             # by default a plain copy
        average(P_bar, P, args.average)
        return scalars

    return parts, train_step


def main(argv=None):
    args = parse_args(argv)
    r = run.Run(args)
    if r.drawing:
        return export.main(r, drawer)
    pictures = data.load(args.dataset, args.data_dir, args.size, args.channels, skip_bad=args.skip_bad)
    sets = split(pictures, args)
    images, labels = sets["train"]
    chosen, c = known(args, labels)
    batches = data.Batches(images, c, **r.feed)
    sizes = categories(args, labels), *normalization(args, images)
    parts, train_step = (build_vae if args.model == "vae" else build)(args, *sizes)
    if labelled(args):
        parts["pairs"] = pairs = labelled_batches(r, images[chosen], labels[chosen])
    nn_steps = 0 if args.task != "semi" else args.steps if args.nn_steps is None else args.nn_steps
    if nn_steps:                                    # the same network, trained on labels alone (Table 2)
        baseline, nn_step = build_nn(args, *sizes)
        parts |= baseline
    Q, P = parts["Q_bar"], parts["P_bar"]
    names = pictures.classes or [] if args.task == "style" or labelled(args) else None      # None: clusters
    r.keep(lambda: {"shape": list(images.shape[1:]), "m": P.m, "names": names}, **parts, batches=batches)

    for step in r.loop():
        decay_rates(args, parts, step, batches.per_epoch)
        x, c = next(batches)
        pair = next(pairs) if labelled(args) else ()
        r.log(train_step(x, c, *pair))
        if step <= nn_steps:
            r.log(nn_step(*pair))
        if r.draws():
            with r.aside():
                r.show("samples", log.grid(draw(P, args, 100), 10))
                if labelled(args):
                    r.log({"error": torch.tensor(error(Q, sets))})

    if r.lead:
        report(r, Q, P, parts.get("N"), sets)


# =========================================================================== Figures and numbers of the paper

TASKS = "prior", "likelihood", "style", "semi", "cluster", "reduce"


def number_or_all(text):
    return text if text == "all" else run.number(int, 0)(text)


def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="mnist")
    add = p.add_argument_group("adversarial autoencoder").add_argument
    positive, flag = run.number(float, 0, open_low=True), argparse.BooleanOptionalAction
    add("--task", choices=TASKS, default="prior", help="the experiment, one of Secs. 2 to 7 [%(default)s]")
    add("--prior", choices=("gaussian", "mixture", "swiss-roll"), default="mixture",
        help="p(z) of --task prior [%(default)s]")
    add("--model", choices=("aae", "vae"), default="aae", help="for --task prior, Fig. 2 [%(default)s]")
    add("--encoder", choices=("deterministic", "gaussian", "universal"), default="deterministic",
        help="q(z|x), Sec. 2 [%(default)s; a VAE's is Gaussian]")
    add("--labels", type=number_or_all,
        help="labelled pictures, equally many per class, or all [semi and reduce 100, prior 10000 or 0]")
    add("--clusters", type=run.number(int, 2), help="categories of y without labels [cluster 16, reduce 20]")
    add("--z-dim", type=run.number(int, 1),
        help="size of z [prior and reduce 2, likelihood 8, style 15, semi 10, cluster 5]")
    add("--optimizer", choices=("adam", "sgd"), help="optimizer of all phases [adam; --paper: sgd]")
    add("--rates", type=positive, nargs="+", metavar="R",
        help="learning rates of the three phases, or one for a VAE [.001 .001 .001, prior .0001 .001 .001, "
        "likelihood .001 .0003 .001; sgd .01 .1 .1]")
    add("--lam", type=run.number(float, 0),
        help="one step on squared error + lam times Q's adversarial loss [two separate phases]")
    add("--adversary", action=flag, default=True,
        help="train Q to fool D [yes; --no-adversary: D is trained, Q ignores it]")
    add("--drops", type=positive, nargs="*", metavar="E",
        help="divide the rates by ten after each of these epochs, or, below 1, fractions of --steps [.5 .8]")
    add("--bn", action=flag, help="BatchNorm in Q and P [if Q infers y; SVHN]")
    add("--D-label", action=flag, help="D sees the label in --task style too [yes; --paper: no]")
    add("--spread", type=run.number(float, 0),
        help="std of the logits of y over a minibatch, 0: free [cluster, and reduce with --labels 0, 3; "
        "else 0]")
    add("--consistency", type=run.number(float, 0),
        help="weight of the change of q(y|x) under other noise on x [semi and reduce with labels 20, "
        "clusters 5, else 0]")
    add("--warp", type=run.number(float, 0), help="strength of the random rotation, stretch, shear and shift "
        "of Q's input after the reconstruction phase [1 if Q infers y, else 0]")
    add("--noise", type=run.number(float, 0),
        help="std of the Gaussian noise on Q's input in training [semi and reduce with labels .3, "
        "likelihood .7, else 0]")
    add("--average", type=run.number(float, 0, 1),
        help="decay of the EMA of Q and P, used for evaluation; 0: no EMA [0]")
    add("--samples", type=run.number(int, 1), default=10000,
        help="samples in the Parzen window of --task likelihood; the paper also has 10000000 [%(default)s]")
    add("--nn-steps", type=run.number(int, 0),
        help="training steps of the supervised baseline; its rate falls with --drops of --steps [all]")
    add("--width", type=positive, default=1.0, help="hidden units, as a fraction of the paper's [1]")
    args = run.parse(p, argv, experiment=experiment, paper=PAPER, tuned=TUNED, quick=QUICK)
    if "rates" not in args.given and not args.resume:       # those of the optimizer
        args.rates = (PAPER if args.optimizer == "sgd" else TUNED)[args.experiment]["rates"]
    phases = 1 if args.model == "vae" else 3
    if "rates" in args.given and not args.resume and len(args.rates) != phases:
        p.error(f"--rates: {len(args.rates)} found, {phases} expected")
    if args.model == "vae" and (args.task != "prior" or args.prior == "swiss-roll"):
        p.error("--model vae is for --task prior, except swiss-roll, which has no density for the KL")
    if args.model == "vae" and (args.lam is not None or args.warp or not args.adversary
                                or args.encoder == "universal"):
        p.error("--lam, --warp, --no-adversary and --encoder universal are for --model aae")
    drawn = args.task == "prior" and args.prior != "gaussian" and args.model == "aae"
    if args.labels and not drawn and args.task not in ("semi", "reduce"):
        p.error("--labels is for --task semi and reduce, and for an aae with --prior mixture or swiss-roll")
    if args.task == "semi" and not args.labels:
        p.error("--task semi needs labels; --task cluster needs none")
    if args.clusters and args.task != "cluster" and (args.task != "reduce" or args.labels):
        p.error("--clusters is for --task cluster, and for reduce with --labels 0")
    if args.task == "prior" and args.z_dim != 2:
        p.error(f"--z-dim {args.z_dim} found, --task prior needs 2")
    if args.task == "reduce" and args.z_dim == 1:
        p.error("--z-dim 1 found, --task reduce needs 2 or more: its heads are on a circle")
    if (args.consistency or args.spread) and not infers_y(args):
        p.error("--consistency and --spread are for --task semi, cluster and reduce, where Q infers y")
    if args.D_label and args.task != "style":
        p.error("--D-label is for --task style; in --task prior, D sees the labels of --labels")
    return args


def experiment(args):
    """The row of PAPER and TUNED; any row for flags that parse_args will refuse."""
    if args.task == "prior":
        name = f"{'vae' if args.model == 'vae' else 'prior'}-{args.prior}"
        return name if name in PAPER else "prior-swiss-roll"
    name = f"{args.task}-{args.labels if args.task == 'reduce' else args.dataset}"
    return name if name in PAPER else args.task


def infers_y(args):
    """Whether Q infers y (Secs. 5 to 7)."""
    return args.task in ("semi", "cluster", "reduce")


def labelled(args):
    """Whether there is a semi-supervised phase."""
    return args.task in ("semi", "reduce") and bool(args.labels)


def categories(args, labels):
    """m: the number of labels or clusters; 0 if P has no input y."""
    if args.task in ("prior", "likelihood"):
        return 0
    return int(labels.max()) + 1 if args.task == "style" or labelled(args) else args.clusters


def split(pictures, args):
    """(images, labels) of "train", "valid" and "test", which is "valid" if the set has no test pictures.

    Raises UserError if the task needs labels that are missing or do not differ.
    """
    free = args.task in ("prior", "likelihood")
    if pictures.labels is None and (args.labels or not free):
        raise UserError(f"{args.dataset} has no labels: only --task likelihood, and prior with --labels 0, "
                        "need none")
    images, n = pictures.images, len(pictures.images)
    labels = torch.full((n,), -1) if pictures.labels is None else pictures.labels
    held = args.validation if pictures.test_images is not None else 10000
    cut = data.cut(n, held, 6) if held else n
    valid = images[cut:], labels[cut:]
    test = valid if pictures.test_images is None else (pictures.test_images, pictures.test_labels)
    if test[1] is None:
        test = test[0], torch.full((len(test[0]),), -1)
    if not (free or 0 <= test[1].max() <= labels[:cut].max()):
        raise UserError(f"{args.dataset} has test pictures without labels, or with labels that the training "
                        f"pictures do not have: --task {args.task} is evaluated by labels")
    if not free and not data.tell(labels[:cut]):
        raise UserError(f"{args.dataset} has one class: --task {args.task} expects two or more")
    if infers_y(args) and not labelled(args) and valid[1].max() < 0:
        raise UserError(f"{args.dataset} has no label among its {len(valid[1]):,} validation pictures, by "
                        f"which --task {args.task} names clusters")
    return {"train": (images[:cut], labels[:cut]), "valid": valid, "test": test}


def known(args, labels):
    """(indices of the training pictures whose labels the run sees, the labels (N,) that D sees, 10 for none).

    By default --task prior uses labels of at most a fifth of the pictures, equally many per class.
    Raises UserError for labels that do not fit the task.
    """
    if args.task == "style" and labels.min() < 0:
        raise UserError(f"{args.dataset} has pictures without a label: --task style needs all labels")
    if args.task == "prior" and args.labels and labels.max() > 9:
        raise UserError(f"{args.dataset} has {int(labels.max()) + 1} classes, the prior ten: set --labels 0")
    if args.labels == "all":
        chosen = torch.nonzero(labels >= 0)[:, 0]
    else:
        n = args.labels
        if args.task == "prior" and n and "labels" not in args.given:
            counts = torch.bincount(labels[labels >= 0], minlength=1)
            n = min(n, len(labels) // 5, len(counts) * int(counts.min())) // len(counts) * len(counts)
        chosen = draw_labels(labels, n, args.seed) if n else torch.zeros(0, dtype=torch.long)
    c = torch.full_like(labels, 10)
    if args.task == "prior":
        c[chosen] = labels[chosen]
    return chosen, labels if args.task == "style" else c


def labelled_batches(r, images, labels):
    """Batches of labelled pictures.  If they are fewer than a batch, every batch holds all of them.

    Raises UserError for fewer than two per rank.
    """
    size = min(r.args.batch_size, len(images) // r.world)
    if size < 2:
        raise UserError(f"--labels {r.args.labels} found: two labelled pictures on each of {r.world} ranks "
                        "expected, as BatchNorm needs")
    return data.Batches(images, labels, **r.feed | {"batch_size": size})


def draw_labels(labels, n, seed):
    """Indices (n,) of the pictures whose labels a run sees, equally many per class, chosen by `seed`.

    Raises UserError if n is not a multiple of the number of classes, or a class has too few pictures.
    """
    counts = torch.bincount(labels[labels >= 0], minlength=1)
    each = n // len(counts)
    if n % len(counts) or counts.min() < each:
        raise UserError(f"--labels {n} found: a multiple of {len(counts)} expected, equally many per class; "
                        f"the rarest class has {counts.min()}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == k][:each] for k in range(len(counts))])


def normalization(args, images):
    """mean and std (C, H, W) of each pixel over 10,000 pictures (A.1, A.2.2), or 0 and 1."""
    if not args.standard:
        return torch.zeros(images.shape[1:]), torch.ones(images.shape[1:])
    x = images[:10000].float() / 255
    return x.mean(0), x.std(0).clamp(min=0.01)


# ------------------------------------------------------------------------------------ what differs by setting

def one_hot(c, m):
    return F.one_hot(c, m).float()


def label_inputs(args, m):
    """Number of inputs of D for a label: ten plus one for no label (Sec. 2.3), or m for style; else 0."""
    if args.task == "prior":
        return 11 if args.labels else 0
    return m if args.D_label else 0


def D_sees(z, y, c, args, m):
    """Input of each discriminator: z for D_z, with a one-hot label in Sec. 2.3, and y for D_y.

    With `args.D_label` D sees the label in Sec. 4 too, which the paper does not mention.
    """
    n = label_inputs(args, m)
    if n:
        return [torch.cat([z, one_hot(c, n)], 1)]
    return [z, y] if infers_y(args) else [z]


def Q_sees(x, args):
    """Q's input in the last two phases: x, randomly warped with --warp."""
    return data.warp(x, args.warp) if args.warp else x


def disagreement(Q_bar, x, a, args):
    """--consistency times the squared distance of q(y|x), logits a (n, m), from that of Q_bar (Q before this
    step, or its EMA) for the same pictures under other noise; 2 for different categories.  Q_bar receives no
    gradient."""
    if not args.consistency:
        return 0.0
    q_bar = Q_bar(x)[1].detach().softmax(1)
    return args.consistency * (a.softmax(1) - q_bar).square().sum(1).mean()


def spacing(m):
    """Initial distance between neighbours among m cluster heads on a circle of radius 10: 20 for m = 2."""
    return 20 * math.sin(math.pi / m)


def heads(m, k):
    """Initial W_C (m, k) (Sec. 7).  k = 2: evenly spaced on a circle of radius 10.  Larger k: 10 I if k >= m,
    else random on the sphere of radius 10."""
    if k > 2:
        return 10 * (torch.eye(m, k) if k >= m else F.normalize(torch.randn(m, k), dim=1))
    t = 2 * math.pi * torch.arange(m) / m
    return 10 * torch.stack([t.cos(), t.sin()], 1)


def optimizer(args, phase, *nets):
    """Optimizer of the parameters of `nets`, with the learning rate of `phase` 0, 1 or 2."""
    params = [p for part in nets for p in part.parameters()]
    if args.optimizer == "sgd":
        return SGD(params, args.rates[phase], args.momenta[phase])
    return Adam(params, args.rates[phase])


def passed(when, step, args, per_epoch):
    """Whether `step` is past `when`, in epochs or, below 1, as a fraction of --steps."""
    return (step - 1) / (args.steps if when < 1 else per_epoch) >= when


def decay_rates(args, parts, step, per_epoch):
    """Divide the learning rates by ten after each of `drops`; let the cluster heads train after `hold`."""
    fall = 0.1 ** sum(passed(when, step, args, per_epoch) for when in args.drops)
    for name, phase in (("opt_R", 0), ("opt_D", 1), ("opt_Q", 1), ("opt_S", 2), ("opt_N", 2)):
        if name in parts:
            set_rate(parts[name], args.rates[phase] * fall)
    parts["P"].fixed.fill_(float(not passed(args.hold, step, args, per_epoch)))


# --------------------------------------------------------------------------- what the paper compares AAE with

def log_normal(z):
    """log N(z; 0, 1) in nats, summed over z (n, k): (n,).  -0.9189 k at 0."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)


def log_mixture(z):
    """log p(z) (n,) in nats under all ten components of mixture()."""
    t = 2 * math.pi * torch.arange(10, device=z.device) / 10
    along, across = z @ torch.stack([t.cos(), t.sin()]), z @ torch.stack([-t.sin(), t.cos()])
    square = ((along - 1.4) / 0.5) ** 2 + (across / 0.1) ** 2
    return torch.logsumexp(-0.5 * square, 1) - math.log(10 * 0.5 * 0.1) - math.log(2 * math.pi)


def kl(log_q, log_p):
    """Eq. 2: KL(q(z|x) || p(z)) = E[log q(z|x) - log p(z)], one z ~ q(z|x) per picture.  0 for q = p."""
    return (log_q - log_p).mean()


def build_vae(args, m, mean, std):
    """build() for the variational autoencoder of Fig. 2.  p(x|z) is Bernoulli; the paper names none."""
    Q, P, _ = networks(args, m, mean, std)
    Q, P, Q_bar, P_bar = place(args, Q, P, averaged(Q), averaged(P))
    opt_R = optimizer(args, 0, Q, P)
    amp = autocast(args)

    @fuse(args)
    def vae_step(x, c):                             # x (n, C, H, W) in [0, 1]
        with amp:
            z, _, log_q = Q(x)
            a = P.net(z)                                    # logits of the pixels
        cost = F.binary_cross_entropy_with_logits(a.float(), x.flatten(1), reduction="sum") / len(x)
        log_p = log_mixture(z) if args.prior == "mixture" \
            else log_normal(z / args.std) - args.z_dim * math.log(args.std)
        divergence = kl(log_q, log_p)
        descend(cost + divergence, opt_R)
        average(Q_bar, Q, args.average)
        average(P_bar, P, args.average)
        return {"-log p(x|z)": cost, "KL": divergence}

    return {"Q": Q, "P": P, "Q_bar": Q_bar, "P_bar": P_bar, "opt_R": opt_R}, vae_step


def build_nn(args, m, mean, std):
    """Table 2's baseline: a network like Q, trained only by the semi-supervised phase."""
    N = place(args, networks(args, m, mean, std)[0])
    opt_N = optimizer(args, 2, N.trunk, N.y, N.y_norm)
    amp = autocast(args)

    @fuse(args)
    def nn_step(x, y):
        with amp:
            _, a, _ = N(Q_sees(x, args))
        cost = F.cross_entropy(a, y)
        descend(cost, opt_N)
        return {"NN": cost}

    return {"N": N, "opt_N": opt_N}, nn_step


# ------------------------------------------------------------------------------------------------ the figures

def encode(Q, images):
    """z (N, k) and logits (N, m) of uint8 pictures, on the CPU.  Logits are None if Q infers no y."""
    z, a, _ = metrics.batched(Q, images, size=1000, scale=(0, 1))
    return z.cpu(), None if a is None else a.cpu()


def draw(P, args, n):
    """n pictures (n, C, H, W) decoded from prior samples."""
    z = sample_z(torch.full((n,), 10, device=args.device), args)
    return metrics.batched(P, z, sample_y(n, P.m, args.device))


def drawer(args, saved):
    """Drawer of a trained run.  Inputs: codes z and, if P has an input y, labels or clusters."""
    about = saved["about"]
    m, blank = about["m"], torch.zeros(about["shape"])
    P = Decoder(args, m, blank, blank)
    names = tuple(about["names"] or ()) if len(about["names"] or ()) == m else tuple(range(m))
    limit = 3 * args.std if args.task != "prior" or args.prior == "gaussian" else 3.0
    plane = [export.Knob(f"z{i + 1}", -limit, limit) for i in range(2)]
    inputs = {"z": plane if args.z_dim == 2 else []}
    if m:
        inputs["y"] = [export.Knob("cluster" if about["names"] is None else "label", names=names, whole=True)]

    def draws(n):
        z = sample_z(torch.full((n,), 10, device=args.device), args)
        return (z, torch.arange(n, device=args.device) % m) if m else (z,)

    return export.Drawer(lambda z, y=None: P(z, one_hot(y, m) if m else None), draws, {"P_bar": P}, inputs)


def styles(P, args, rows=10):
    """Pictures (rows * m, C, H, W): one z ~ p(z) per row, one category of y per column."""
    z = args.std * torch.randn(rows, args.z_dim)
    return metrics.batched(P, z.repeat_interleave(P.m, 0), torch.eye(P.m).repeat(rows, 1))


def scatter(z, labels, heads=None):
    """Plot codes (N, 2) as dots coloured by label, and cluster heads (m, 2) as large black dots."""
    limit = 1.1 * max(z.abs().quantile(0.999).item(), 0 if heads is None else heads.abs().max().item())
    chart = log.Axes((-limit, limit), (-limit, limit), "", "", size=(600, 600))
    for k in labels.unique().tolist():
        chart.points(*z[labels == k].T.tolist(), label=k)
    if heads is not None:
        chart.points(*heads.T.tolist(), colour="black", radius=12)
    return chart.picture()


def manifold(args, n=20):
    """Codes (rows * n, 2) that cover the prior: percentiles of the Gaussian along both axes or of each
    component along its main axis, or even steps along each tenth of the swiss roll."""
    p = (torch.arange(n) + 0.5) / n
    u, c = torch.special.ndtri(p), torch.arange(10).repeat_interleave(n)
    if args.prior == "gaussian":
        return args.std * torch.stack(torch.meshgrid(u, -u, indexing="xy"), 2).flatten(0, 1)
    return mixture(c, u.repeat(10), 0.0 * c) if args.prior == "mixture" else swiss_roll(c, p.repeat(10))


# ------------------------------------------------------------------------------------------------ the numbers

def sliced_wasserstein(a, b, directions=200):
    """1-D Wasserstein distance of two samples (n, k) in a random direction, mean over directions: a float.

    0 for equal samples; 2 s / pi for a shift of length s in 2-D.
    """
    w = F.normalize(torch.randn(a.shape[1], directions, device=a.device), dim=0)
    return ((a @ w).sort(0).values - (b @ w).sort(0).values).abs().mean().item()


def error(Q, sets, table=None):
    """Error in % over labelled test pictures of the most likely category, which `table` maps to a label if
    given."""
    images, labels = sets["test"]
    k = encode(Q, images)[1].argmax(1)
    wrong = (k if table is None else table[k]) != labels
    return 100 * wrong[labels >= 0].float().mean().item()


def head_labels(a, labels):
    """Sec. 6: cluster i gets the label of the validation picture with the largest q(y_i|x).

    Logits a (N, m), labels (N,), -1 for none -> (m,).  Ranked by log q - log(1 - q) in float64: in float32,
    q rounds to 1 once a logit leads by 17, and many pictures would tie.
    """
    a, labels = a[labels >= 0].double(), labels[labels >= 0]
    odds = [a[:, i] - a[:, torch.arange(a.shape[1]) != i].logsumexp(1) for i in range(a.shape[1])]
    return labels[torch.stack(odds, 1).argmax(0)]


def majority_labels(a, labels):
    """The most frequent label in each cluster, to compare with head_labels().

    Logits a (N, m), labels (N,), -1 for none -> (m,).  0 for an empty cluster.
    """
    k, labels = a[labels >= 0].argmax(1), labels[labels >= 0]
    return (F.one_hot(k, a.shape[1]).T @ F.one_hot(labels)).argmax(1)


FIGURES = {("aae", "gaussian", False): ("fig2a", "fig2e"), ("aae", "mixture", False): ("fig2b", "manifold"),
           ("vae", "gaussian", False): ("fig2c", "manifold"),
           ("vae", "mixture", False): ("fig2d", "manifold"),
           ("aae", "mixture", True): ("fig4a", "fig4b"), ("aae", "swiss-roll", True): ("fig4c", "fig4d")}


def prior(r, Q, P, sets):
    """Figs. 2 and 4; the distance of q(z) from p(z) on held-out pictures and, with labels, the share of them
    in place: the nearest of 10,000 prior samples has their label."""
    args, (images, labels) = r.args, sets["test"]
    with r.aside():
        z, _ = encode(Q, images)
        a, b = (sample_z(torch.full((len(z),), 10), args) for _ in "ab")
        more = {"of two draws of p(z)": sliced_wasserstein(a, b), "model": args.model}
        if args.labels:
            c = torch.arange(10000) % 10
            drawn = sample_z(c, args)
            nearest = metrics.batched(lambda part: torch.cdist(part, drawn).argmin(1), z, size=1000)
            more["% of digits in place"] = 100 * (c[nearest] == labels)[labels >= 0].float().mean().item()
        distance = sliced_wasserstein(z, a)
    codes, shown = FIGURES.get((args.model, args.prior, bool(args.labels)), ("codes", "manifold"))
    r.show(codes, scatter(z, labels))
    r.show(shown, log.grid(metrics.batched(P, manifold(args)), 20))
    name = f"aae-prior-{4 if args.labels else 2}"
    return {name: {"value": distance, "unit": "sliced Wasserstein distance of q(z) and p(z)", **more}}


def likelihood(r, Q, P, sets):
    """Table 1: log-likelihood under a Parzen window of --samples samples, in nats, mean over test pictures.
    sigma is chosen on 1,000 validation pictures, as in GAN's code for MNIST (for Toronto faces: on all).
    Fig. 5: samples; the last column holds the training picture nearest to its left neighbour."""
    args = r.args
    with r.aside():
        x = draw(P, args, min(10000, args.samples))
    valid, test = (sets[key][0].to(x.device).float().flatten(1) / 255 for key in ("valid", "test"))
    if args.samples <= 10000:
        window = metrics.parzen(x.flatten(1), valid[:1000], test)
    else:
        window = large_window(r, P, valid[:1000], test)
    shown = x[:90].unflatten(0, (-1, 9)) if len(x) >= 90 else x[:, None]
    images, last = sets["train"][0], shown[:, -1].flatten(1)
    distance = metrics.batched(lambda part: torch.cdist(part.to(x.device).flatten(1), last), images,
                               scale=(0, 1))
    nearest = images[distance.argmin(0).cpu()].to(x.device).float() / 255
    r.show("fig5", log.grid(torch.cat([shown, nearest[:, None]], 1).flatten(0, 1), shown.shape[1] + 1))
    name = "aae-mnist-ll" + f"-{args.samples}" * (args.samples != 10000)
    return {name: {"value": window["ll"], "se": window["se"], "sigma": window["sigma"], "unit": "nats"}}


def large_window(r, P, valid, test, size=10000):
    """metrics.parzen() for more samples than fit into memory: `size` at a time, drawn once to choose sigma
    and again for the test pictures.  The density is the mean over the parts."""
    n = r.args.samples
    log.say(f"a Parzen window of {n:,} samples ...")

    def ll(x, sigmas):
        total = torch.full((len(sigmas), len(x)), -math.inf, dtype=torch.float64)
        with r.aside():
            for start in range(0, n, size):
                part = draw(P, r.args, min(size, n - start)).flatten(1)
                each = metrics.parzen_lls(part, x, sigmas, 1000).cpu()
                total = torch.logaddexp(total, each + math.log(len(part) / n))
        return total

    sigmas = np.logspace(-1, 0, 10).tolist()                # as in metrics.parzen
    sigma = sigmas[int(ll(valid, sigmas).mean(1).argmax())]
    found = ll(test, [sigma])[0]
    return {"ll": found.mean().item(), "se": found.std(correction=0).item() / math.sqrt(len(found)),
            "sigma": sigma}


def style(r, Q, P, sets):
    """Fig. 7, and the share of samples that a classifier assigns to the label P was given."""
    with r.aside():
        r.show("fig7", log.grid(styles(P, r.args), P.m))
        x = styles(P, r.args, 10000 // P.m).clamp(0, 1)
    clf = metrics.classifier(*sets["train"], r.args.device, r.args.data_dir)
    agreement = metrics.label_agreement(clf, x, torch.arange(len(x)) % P.m)
    return {"aae-style": {"value": 100 * agreement, "unit": "% of samples with the label given"}}


def semi(r, Q, P, sets):
    """Table 2: test error of argmax q(y|x).  "styles": one style per row, one category per column."""
    args = r.args
    with r.aside():
        r.show("styles", log.grid(styles(P, args), P.m))
    name = f"aae-mnist{'-' * (args.labels == 'all')}{args.labels}"
    return {name: {"value": error(Q, sets), "unit": "% error"}}


def cluster(r, Q, P, sets):
    """Table 3, and Fig. 9: one cluster per row, first its head (z = 0), then test pictures assigned to it."""
    images = sets["test"][0]
    k = encode(Q, images)[1].argmax(1)
    rows = metrics.batched(P, torch.zeros(P.m, r.args.z_dim), torch.eye(P.m)).cpu()
    rows = rows[:, None].repeat(1, 16, 1, 1, 1)
    for i in range(P.m):
        members = images[k == i][:15]
        rows[i, 1:] = 0
        rows[i, 1:len(members) + 1] = members.float() / 255
    r.show("fig9", log.grid(rows.flatten(0, 1), 16))
    valid, labels = sets["valid"]
    a = encode(Q, valid)[1]
    table, majority = head_labels(a, labels), majority_labels(a, labels)
    return {f"aae-clu{P.m}": {"value": error(Q, sets, table), "named by majority": error(Q, sets, majority),
                              "unit": "% error", "labels": table.tolist()}}


def reduce(r, Q, P, sets):
    """Fig. 11: W_C y + z of the test pictures with the cluster heads, and the test error.  More than two
    dimensions are projected by the linear map that brings the heads closest to a circle (least squares)."""
    z, a = encode(Q, sets["test"][0])
    W_C, k = P.W_C.detach().cpu(), r.args.z_dim
    points = a.softmax(1) @ W_C + z
    if k > 2:
        A = torch.linalg.lstsq(W_C, heads(P.m, 2), driver="gelsd").solution
        points, W_C = points @ A, W_C @ A
    r.show("fig11", scatter(points, sets["test"][1], W_C))
    table = None
    if not r.args.labels:
        valid, labels = sets["valid"]
        table = head_labels(encode(Q, valid)[1], labels)
    name = f"aae-dim-{k}d-{r.args.labels}" + f"-clu{P.m}" * (not r.args.labels and P.m != 20)
    return {name: {"value": error(Q, sets, table), "unit": "% error"}}


PUBLISHED = {"aae-mnist-ll": 340, "aae-mnist-ll-10000000": 427, "aae-mnist100": 1.90, "aae-mnist1000": 1.60,
             "aae-mnist-all": 0.85, "aae-clu16": 9.55, "aae-clu30": 4.10, "aae-dim-2d-1000": 4.20,
             "aae-dim-2d-100": 6.08, "aae-dim-2d-0": 13.95, "aae-dim-10d-100": 3.90}
PUBLISHED_NN = {"aae-mnist100": 25.80, "aae-mnist1000": 8.73, "aae-mnist-all": 1.25}
CHECK = {"prior": (0, 0.2), "likelihood": (200, math.inf), "style": (90, 100), "semi": (0, 5),
         "cluster": (0, 20), "reduce": (0, 20)}     # --check: range of the first result


def report(r, Q, P, N, sets):
    """Draw the task's figures and write results.json.  Published values stand only beside the same data,
    networks and objective."""
    args = r.args
    evaluate = {"prior": prior, "likelihood": likelihood, "style": style, "semi": semi, "cluster": cluster,
                "reduce": reduce}[args.task]
    results = evaluate(r, Q, P, sets)
    value, (low, high) = next(iter(results.values()))["value"], CHECK[args.task]
    if N is not None:
        results["aae-semi-base"] = {"value": error(N, sets), "unit": "% error, supervised"}
    if args.dataset != "mnist":                     # aae-svhn1000, aae-clu16-svhn
        kind = Path(args.dataset).stem
        results = {k.replace("mnist", kind) if "mnist" in k else f"{k}-{kind}": v for k, v in results.items()}
    sizes = args.width == 1 and (args.task == "reduce" or args.z_dim == PAPER[args.experiment]["z_dim"])
    if args.dataset == "mnist" and sizes and args.encoder == "deterministic" and args.adversary \
            and args.lam is None:
        name = next(iter(results))
        for found, published in zip(results.values(), (PUBLISHED, PUBLISHED_NN)):
            if name in published:
                found["paper"] = published[name]
    r.results(results, passed=args.dataset != "mnist" or low <= value <= high)


if __name__ == "__main__":
    main()

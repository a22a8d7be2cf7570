"""InfoGAN: Interpretable Representation Learning by Information Maximizing Generative Adversarial Nets
Xi Chen, Yan Duan, Rein Houthooft, John Schulman, Ilya Sutskever, Pieter Abbeel, 2016.  arXiv:1606.03657

G's input is noise z and a code c.  A second network Q must be able to recover c from the image G(z, c).

    Eq. 1   V(D, G) = E_x[log D(x)] + E_z[log(1 - D(G(z)))]                          -> V()
    Eq. 3   min_G max_D  V(D, G) - lam I(c; G(z, c))
    Eq. 4   I(c; G(z, c)) >= E_{x ~ G(z, c)}[E_{c' ~ P(c|x)}[log Q(c'|x)]] + H(c)
    Eq. 5   L_I(G, Q) = E_{c ~ P(c), x ~ G(z, c)}[log Q(c|x)] + H(c)                 -> L_I()
    Eq. 6   min_{G,Q} max_D  V(D, G) - lam L_I(G, Q)                                 -> train_step()
    Tables 1-7 (App. C)  networks, codes, rates and lambdas of each data set         -> networks(), PAPER
    Fig. 1  L_I during training, InfoGAN against a regular GAN                       -> draw_fig1()
    Figs. 2-6  one code varied, everything else fixed                                -> vary(), style_codes()
    Sec. 7.2  c1 as a classifier of digits                                           -> classify()

    python infogan.py --dataset mnist            (Figs. 1 and 2; --paper: the published settings)
    python infogan.py --dataset faces            (Fig. 3; --factor elevation, lighting, width: Table 5)
    python infogan.py --resume runs/infogan-mnist --sample 100

--check asks for an error of c1 of at most 6 % of a run on MNIST.
"""

import argparse
import itertools
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from common import UserError, data, export, log, metrics, run
from common.fuse import Adam, autocast, descend, frozen, fuse, place, sampling, set_rate

# --------------------------------------------------------------------------------------------------- settings
# cats: sizes of the categorical codes.  m: number of continuous codes, each Unif(-1, 1).  dz: size of the
# noise, Unif(-1, 1).  lam weighs L_I of the categorical codes, lam_cont that of the continuous ones.
# Where the paper is silent, values come from the authors' code, which covers MNIST alone: batches of 128,
# 5,000 steps, fresh z and c for G (and 55,000 of the 60,000 pictures; here all).  No length is published for
# the other data sets: 3,000 steps are a guess.

BASE = dict(
    lr_D=2e-4, lr_G=1e-3, lam=1.0,         # App. C: for all but Tables 5 and 7
    lam_cont=1.0,                          # authors' code; Sec. 6: a smaller one is typical, without a value
    fix_sigma=False,                       # App. C: exp of the network's output
    batch_size=128, fresh_z=True,          # authors' code
    steps=3000, gan_steps=0, warm_up=0, warp=0.0, noise=0.0, decay_lr=False, together=False)
FACES = BASE | dict(                                                                # Table 4
    net="faces", size=32, channels=1, scale=(0.0, 1.0), cats=(), m=5, dz=128)
CHAIRS = BASE | dict(                                                               # Table 6
    net="chairs", size=64, channels=1, scale=(0.0, 1.0), dz=128,
    cats=(20,) * 3, m=1)                   # Table 6; Sec. 7.2 has four categorical codes
PAPER = {
    "mnist": BASE | dict(                                                           # Table 1
        net="mnist", size=28, channels=1, scale=(0.0, 1.0), cats=(10,), m=2, dz=62,
        steps=5000, gan_steps=5000,        # authors' code; the regular GAN of Figs. 1 and 2b for as long
        fix_sigma=True),                   # authors' code: 12 to 30 % error in five runs; App. C's
                                           # exp(output), with falling rates too: 39 to 45 % in three
    "svhn": BASE | dict(                                                            # Table 2
        net="svhn", size=32, channels=3, scale=(-1.0, 1.0), dz=124,
        cats=(10,) * 4, m=4),              # Table 2; Sec. 7.2 has two continuous codes
    "celeba": BASE | dict(                                                          # Table 3
        net="celeba", size=32, channels=3, scale=(-1.0, 1.0), cats=(10,) * 10, m=0, dz=128),
    "faces": FACES | dict(lr_D=2e-4, lr_G=5e-4, lam_cont=0.2),                      # Table 5: azimuth
    "faces-elevation": FACES | dict(lr_D=4e-4, lr_G=3e-4, lam_cont=0.1),
    "faces-lighting": FACES | dict(lr_D=8e-4, lr_G=3e-4, lam_cont=0.1),
    "faces-width": FACES | dict(lr_D=8e-4, lr_G=3e-4, lam_cont=0.1),                # the network of lighting
    "chairs": CHAIRS | dict(lr_D=2e-4, lr_G=1e-3, lam=1.0, lam_cont=10.0),          # Table 7: rotation
    "chairs-width": CHAIRS | dict(lr_D=2e-4, lr_G=1e-3, lam=2.0, lam_cont=0.05),
}
ONE_PASS = dict(fresh_z=False)             # one pass of G serves both updates: a tenth less time
STABLE = ONE_PASS | dict(
    together=True,                         # else BatchNorm hides brightness from D, and G draws grey noise
    # Mean rank correlation of --dataset faces --quick, seeds 0 and 1: .76, .85 with all of these.
    noise=0.1,                             # without .60, .73
    fix_sigma=True, lam_cont=1.0)          # Table 5 (learnt, .2): .76, .87, but rougher pictures, as codes
                                           # hide in a texture; sigma learnt with lambda 1: .33, .45
TUNED = {
    "mnist": ONE_PASS | dict(
        steps=3000, gan_steps=1000,
        warm_up=1500,                      # categories first, then style: else digits share a category
        warp=1.0,                          # --width .25, 1,500 steps: 29 % error, without the warp 76 %
        decay_lr=True,                     # 3.0 % error, Frechet distance 7.5; constant rates 3.6 %, 10.7
        fix_sigma=False, lam_cont=0.1),    # --width .25, 4,000 steps: Frechet distance 13, PAPER's values 19
    "svhn": ONE_PASS, "celeba": ONE_PASS, "chairs": ONE_PASS, "chairs-width": ONE_PASS,
    "faces": STABLE, "faces-elevation": STABLE, "faces-lighting": STABLE, "faces-width": STABLE,
}
QUICK = {"mnist": dict(width=0.25, steps=4000, gan_steps=400),
         "faces": dict(width=0.25, steps=3000)}


# --------------------------------------------------------------------------------------------------- networks

def conv(i, o):
    return nn.Conv2d(i, o, 4, 2, 1, bias=False)


def upconv(i, o, bias=False):
    return nn.ConvTranspose2d(i, o, 4, 2, 1, bias=bias)


def bn_lrelu(n):
    return nn.Sequential(nn.BatchNorm2d(n), nn.LeakyReLU(0.1))


def bn_relu(n):
    return nn.Sequential(nn.BatchNorm2d(n), nn.ReLU())


def fc(i, o, slope):
    """Fully connected, BatchNorm, leaky ReLU; a ReLU if slope is 0."""
    return nn.Sequential(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), nn.LeakyReLU(slope))


def table_1(dc, dq, ch):
    """MNIST.  dc: size of (z, c).  dq: size of Q's output.  ch(n): n maps or units, scaled by --width."""
    G = nn.Sequential(
        fc(dc, ch(1024), 0),                                                        # 1024
        fc(ch(1024), ch(128) * 7 * 7, 0), nn.Unflatten(1, (ch(128), 7, 7)),         # 128 x 7 x 7
        upconv(ch(128), ch(64)), bn_relu(ch(64)),                                   # 64 x 14 x 14
        upconv(ch(64), 1, bias=True), nn.Sigmoid())                                 # 1 x 28 x 28
    trunk = nn.Sequential(
        nn.Conv2d(1, ch(64), 4, 2, 1), nn.LeakyReLU(0.1),                           # 64 x 14 x 14
        conv(ch(64), ch(128)), bn_lrelu(ch(128)),                                   # 128 x 7 x 7
        nn.Flatten(), fc(ch(128) * 7 * 7, ch(1024), 0.1))                           # 1024
    return G, Discriminator(trunk, ch(1024), dq, hidden=ch(128))


class Discriminator(nn.Module):
    """D and Q share one trunk (App. C).  D(x) -> logit a (n,) and the parameters q (n, dq) of Q(c|x).

    Q has its own layer of `hidden` units; if `hidden` is 0, D and Q share all but the last layer.
    """

    def __init__(self, trunk, width, dq, hidden=0):
        super().__init__()
        self.register_buffer("t", torch.zeros(()))                                  # updates so far
        self.trunk = trunk
        self.head = nn.Linear(width, 1)
        self.Q = nn.Linear(width, dq)
        if hidden:
            self.Q = nn.Sequential(fc(width, hidden, 0.1), nn.Linear(hidden, dq))

    def forward(self, x, detach=False):
        h = self.trunk(x)
        return self.head(h).squeeze(1), self.Q(h.detach() if detach else h)


def networks(args):
    """G and D of Tables 1 to 6: G(z, c) -> x (n, C, H, W), D(x) -> (a (n,), q (n, dq))."""
    dc = args.dz + sum(args.cats) + args.m
    dq = sum(args.cats) + args.m * (1 if args.fix_sigma else 2)     # logits, means, log standard deviations
    table = {"mnist": table_1, "svhn": table_2, "celeba": table_2, "faces": table_4, "chairs": table_6}
    G, D = table[args.net](dc, dq, lambda n: max(8, round(n * args.width)))
    return G.apply(init), D.apply(init)


def init(module):
    """Weights from N(0, .02), BatchNorm's scale from N(1, .02), shift and biases 0 (authors' code)."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------ latents and codes

def sample_latent(n, args, device="cpu"):
    """z ~ Unif(-1, 1) (n, dz), c ~ Cat(K) each (n, number of cats) int64, u ~ Unif(-1, 1) (n, m): Sec. 7."""
    z = torch.rand(n, args.dz, device=device) * 2 - 1
    c = torch.stack([torch.randint(k, (n,), device=device) for k in args.cats], 1) if args.cats \
        else torch.zeros(n, 0, dtype=torch.long, device=device)
    u = torch.rand(n, args.m, device=device) * 2 - 1
    return z, c, u


def join(z, c, u, args):
    """G's input (n, dz + sum of cats + m): noise, one-hot categorical codes, continuous codes."""
    return torch.cat([z, *(F.one_hot(c[:, i], k).to(z) for i, k in enumerate(args.cats)), u], 1)


def split_q(q, args):
    """Q's output q (n, dq) -> list of logits (n, K), means (n, m) and log standard deviations (n, m)."""
    *logits, rest = q.float().split([*args.cats, q.shape[1] - sum(args.cats)], 1)
    mu = rest[:, :args.m]
    return logits, mu, torch.zeros_like(mu) if args.fix_sigma else rest[:, args.m:]


# -------------------------------------------------------------------------------------------------- objective

def V(a_real, a_fake):
    """Eq. 1: E_x[log D(x)] + E_z[log(1 - D(G(z)))], D = sigmoid(a), a (n,).  -log 4 if D = 1/2 everywhere."""
    return F.logsigmoid(a_real.float()).mean() + F.logsigmoid(-a_fake.float()).mean()


def log_D(a_fake):
    """What G ascends in place of Eq. 1 (authors' code): E_z[log D(G(z))], a (n,).  -log 2 if D = 1/2."""
    return F.logsigmoid(a_fake.float()).mean()


def L_I_cat(logits, c):
    """Eq. 5 for one categorical code: E[log Q(c|x)] + log K, in nats.  logits (n, K), c (n,).

    log K if Q is certain and right, 0 if it is uniform.
    """
    return math.log(logits.shape[1]) - F.cross_entropy(logits, c)


def L_I_cont(mu, log_sigma, u):
    """Eq. 5 for Unif(-1, 1) codes: sum over codes of E[log N(u; mu, sigma)] + log 2, in nats.  All (n, m).

    -log(2 pi)/2 + log 2 = -0.2258 for each code at mu = u, sigma = 1.
    """
    log_q = -0.5 * math.log(2 * math.pi) - log_sigma - 0.5 * ((u - mu) / log_sigma.exp()) ** 2
    return (log_q + math.log(2)).sum(1).mean()


def L_I(q, c, u, args):
    """Eq. 5 for Q's output q (n, dq): (sum over the categorical codes, sum over the continuous codes), in
    nats."""
    logits, mu, log_sigma = split_q(q, args)
    cat = sum((L_I_cat(a, c[:, i]) for i, a in enumerate(logits)), q.new_zeros((), dtype=torch.float32))
    return cat, L_I_cont(mu, log_sigma, u)


# --------------------------------------------------------------------------------------------------- training

def build(args):
    """G, D (with Q), their optimizers and the fused step of Eq. 6; a regular GAN if lam = lam_cont = 0."""
    G, D = place(args, *networks(args))
    opt_D, opt_G = Adam(D.parameters(), args.lr_D), Adam(G.parameters(), args.lr_G)
    amp, regular = autocast(args), args.lam == 0 == args.lam_cont

    @fuse(args)
    def train_step(x):                                              # x (n, C, H, W) in args.scale
        z, c, u = sample_latent(len(x), args, x.device)
        lam, lam_cont = lambdas(D.t, args)                          # constant with --paper
        # D and Q ascend V + lam L_I: Q shares D's trunk and optimizer (authors' code).  In a regular GAN, Q
        # is fitted on a detached trunk, so neither D nor G learns from it.
        with amp:
            x_fake = G(join(z, c, u, args))
            a_real, a_fake, q = D_sees(D, x, x_fake.detach(), args, detach=regular)
        v, (mi, mi_cont) = V(a_real, a_fake), L_I(q, c, u, args)
        descend(-v - lam * mi - lam_cont * mi_cont, opt_D)
        # G ascends log D(G(z, c)) + lam L_I through the updated D and Q.
        with amp, frozen(D):
            if args.fresh_z:
                z, c, u = sample_latent(len(x), args, x.device)
                x_fake = G(join(z, c, u, args))
            _, a_fake, q = D_sees(D, x if args.together else None, x_fake, args)
        mi, mi_cont = L_I(q, c, u, args)
        descend(-log_D(a_fake) - (0.0 if regular else lam * mi + lam_cont * mi_cont), opt_G)
        D.t.add_(1)
        return {"V": v, "D(G(z))": a_fake.float().sigmoid().mean(), "L_I": mi, "L_I cont": mi_cont}

    return G, D, opt_D, opt_G, train_step


def main(argv=None):
    args = parse_args(argv)
    r = run.Run(args)
    if r.drawing:
        if args.real:
            args.dataset = where(args)
        return export.main(r, drawer)
    pictures = data.load(where(args), args.data_dir, args.size, args.channels, skip_bad=args.skip_bad)
    batches = data.Batches(pictures.images, scale=args.scale, **r.feed)
    G, D, opt_D, opt_G, train_step = build(args)
    parts = {"G": G, "D": D, "opt_D": opt_D, "opt_G": opt_G, "batches": batches}
    gan_G = None
    if args.gan_steps:                                              # the regular GAN of Figs. 1 and 2b
        gan_G, gan_D, gan_opt_D, gan_opt_G, gan_step = build(regular_gan(args))
        parts |= {"gan_G": gan_G, "gan_D": gan_D, "gan_opt_D": gan_opt_D, "gan_opt_G": gan_opt_G}
    r.keep(**parts)

    for step in r.loop():
        x = next(batches)
        decay_rates(args, opt_D, opt_G, (step - 1) / args.steps)
        r.log(train_step(x))
        if step <= args.gan_steps:
            r.log({f"GAN {k}": v for k, v in gan_step(x).items()})
        if r.draws():
            with r.aside():
                r.show("samples", log.grid(draw(G, args, 100)[0], 10, args.scale))

    if r.lead:
        report(r, G, D, gan_G, pictures)


# =========================================================================== Figures and numbers of the paper

FIRST = {"faces": "azimuth", "chairs": "rotation"}          # the rows of Tables 5 and 7 without --factor


def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="mnist", log_every=100)
    add = p.add_argument_group("InfoGAN").add_argument
    positive, weight = run.number(float, 0, open_low=True), run.number(float, 0)
    add("--net", choices=("mnist", "svhn", "celeba", "faces", "chairs"),
        help="networks and codes of Tables 1 to 6 [the data set's own, else mnist]")
    add("--factor", choices=("azimuth", "elevation", "lighting", "width", "rotation"),
        help="row of Table 5 (faces) or 7 (chairs) for the rates and lambdas; faces without --paper: for the "
             "rates alone [azimuth, rotation]")
    add("--width", type=positive, default=1.0, help="feature maps and units, as a fraction of the paper's")
    add("--lam", type=weight,
        help="lambda of Eq. 6 for categorical codes; 0: a regular GAN [1; see PAPER for --factor]")
    add("--lam-cont", type=weight,
        help="lambda of Eq. 6 for continuous codes [MNIST .1, chairs 10, else 1; see PAPER for --factor, on "
             "faces with --paper alone; 0 with --lam 0]")
    add("--fix-sigma", action=argparse.BooleanOptionalAction,
        help="fix sigma of Q's Gaussians at 1 [faces; --paper: MNIST]")
    add("--fresh-z", action=argparse.BooleanOptionalAction, help="draw new z and c for G's update [--paper]")
    add("--warm-up", type=run.number(int, 0),
        help="steps over which lam rises from 0, then lam_cont over as many more; faces: lam_cont from "
             "step 1 on [MNIST 1500]")
    add("--warp", type=weight, help="strength of the warp applied to half of D's inputs [MNIST 1, else 0]")
    add("--noise", type=weight, help="std of the Gaussian noise added to D's inputs [faces .1, else 0]")
    add("--together", action=argparse.BooleanOptionalAction,
        help="D sees data and samples as one batch, so BatchNorm normalizes them jointly [faces]")
    add("--decay-lr", action=argparse.BooleanOptionalAction,
        help="decay both rates linearly to 0 over the second half [MNIST]")
    add("--lr-D", type=positive, help="Adam's rate for D and Q [2e-4; see PAPER for --factor]")
    add("--lr-G", type=positive, help="Adam's rate for G [1e-3, faces 5e-4; see PAPER for --factor]")
    add("--gan-steps", type=run.number(int, 0),
        help="steps of the regular GAN of Figs. 1 and 2b, trained alongside [MNIST 1000, else 0]")
    args = run.parse(p, argv, experiment=experiment, paper=PAPER, tuned=TUNED, quick=QUICK)
    if args.lam == 0 and "lam_cont" not in args.given:
        args.lam_cont = 0.0
    return args


def experiment(args):
    """The row of PAPER and TUNED: the network, with its row of Table 5 or 7."""
    net = args.net or (args.dataset if args.dataset in PAPER else "mnist")
    if args.factor in (None, FIRST.get(net)):
        return net
    if f"{net}-{args.factor}" not in PAPER:
        raise UserError(f"--factor {args.factor} of {net} found: expected azimuth, elevation, lighting or "
                        "width of faces, rotation or width of chairs")
    return f"{net}-{args.factor}"


def where(args):
    """The data set to load: --dataset, or for chairs the folder of renderings that the user supplies."""
    if args.dataset != "chairs":
        return args.dataset
    folder = Path(args.data_dir) / "rendered_chairs"
    if not folder.is_dir():
        raise UserError(f"{folder} is not there: unpack rendered_chairs.tar of Aubry et al. (2014), "
                        "https://www.di.ens.fr/willow/research/seeing3Dchairs, "
                        f"in {args.data_dir}/, or give another folder of pictures with --net chairs")
    return str(folder)


def regular_gan(args):
    """The settings of the regular GAN trained alongside: only its Q learns from L_I."""
    return argparse.Namespace(**{**vars(args), "lam": 0.0, "lam_cont": 0.0})


# ------------------------------------------------------------------------ what TUNED adds to the paper's step

def lambdas(t, args):
    """lam and lam_cont of Eq. 6 after t updates (a 0-dim tensor).  Each rises linearly from 0 to its value
    over --warm-up steps: lam first, then lam_cont.  Without categorical codes, lam_cont rises from step 1."""
    if args.lam == 0 == args.lam_cont:                      # a regular GAN: Q alone learns from L_I
        return 1.0, 1.0
    w = max(1, args.warm_up)
    late = args.warm_up if args.cats else 0
    return args.lam * ((t + 1) / w).clamp(max=1), args.lam_cont * ((t + 1 - late) / w).clamp(0, 1)


def D_sees(D, x, x_fake, args, detach=False):
    """(a_real, a_fake, q of the samples).  BatchNorm normalizes real and fake batches separately (authors'
    code), or jointly with `args.together` so that D sees differences in brightness and contrast.

    x None: samples only.  First, half of each batch is warped by args.warp and noise is added to all.
    """
    if args.warp:
        x_fake, x = (t if t is None else data.warp(t, args.warp, share=0.5) for t in (x_fake, x))
    if args.noise:
        x_fake, x = (t if t is None else t + args.noise * torch.randn_like(t) for t in (x_fake, x))
    if args.together:
        a, q = D(torch.cat([x, x_fake]), detach)
        return a[:len(x)], a[len(x):], q[len(x):]
    a_real = None if x is None else D(x)[0]
    return a_real, *D(x_fake, detach)


def decay_rates(args, opt_D, opt_G, done):
    """Set both rates for the fraction `done` of a run: constant, or with args.decay_lr falling linearly to 0
    over the second half."""
    falling = min(1.0, 2 * (1 - done)) if args.decay_lr else 1.0
    for opt, lr in ((opt_D, args.lr_D), (opt_G, args.lr_G)):
        set_rate(opt, lr * falling)


# ---------------------------------------------------------------------------- networks of the other data sets

def table_2(dc, dq, ch):
    """SVHN, and CelebA (Table 3)."""
    G = nn.Sequential(
        fc(dc, ch(448) * 2 * 2, 0), nn.Unflatten(1, (ch(448), 2, 2)),               # 448 x 2 x 2
        upconv(ch(448), ch(256)), bn_relu(ch(256)),                                 # 256 x 4 x 4
        upconv(ch(256), ch(128), bias=True), nn.ReLU(),                             # 128 x 8 x 8
        upconv(ch(128), ch(64), bias=True), nn.ReLU(),                              # 64 x 16 x 16
        upconv(ch(64), 3, bias=True), nn.Tanh())                                    # 3 x 32 x 32
    trunk = nn.Sequential(
        nn.Conv2d(3, ch(64), 4, 2, 1), nn.LeakyReLU(0.1),                           # 64 x 16 x 16
        conv(ch(64), ch(128)), bn_lrelu(ch(128)),                                   # 128 x 8 x 8
        conv(ch(128), ch(256)), bn_lrelu(ch(256)),                                  # 256 x 4 x 4
        nn.Flatten())
    return G, Discriminator(trunk, ch(256) * 4 * 4, dq, hidden=ch(128))


def table_4(dc, dq, ch):
    """Faces."""
    G = nn.Sequential(
        fc(dc, ch(1024), 0),                                                        # 1024
        fc(ch(1024), ch(128) * 8 * 8, 0), nn.Unflatten(1, (ch(128), 8, 8)),         # 128 x 8 x 8
        upconv(ch(128), ch(64)), bn_relu(ch(64)),                                   # 64 x 16 x 16
        upconv(ch(64), 1, bias=True), nn.Sigmoid())                                 # 1 x 32 x 32
    trunk = nn.Sequential(
        nn.Conv2d(1, ch(64), 4, 2, 1), nn.LeakyReLU(0.1),                           # 64 x 16 x 16
        conv(ch(64), ch(128)), bn_lrelu(ch(128)),                                   # 128 x 8 x 8
        nn.Flatten(), fc(ch(128) * 8 * 8, ch(1024), 0.1))                           # 1024
    return G, Discriminator(trunk, ch(1024), dq)


def conv_1(i, o):
    """A convolution of stride 1 that keeps the size."""
    return nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(i, o, 4, bias=False))


def table_6(dc, dq, ch):
    """Chairs.  The two upconvolutions of stride 1 are convolutions that keep the size.

    A transposed convolution of stride 1 is a convolution with a flipped kernel.  Cropped to the same size,
    its 4x4 support reaches two pixels up and left and one down and right; here, one up and left and two down
    and right.
    """
    G = nn.Sequential(
        fc(dc, ch(1024), 0),                                                        # 1024
        fc(ch(1024), ch(256) * 8 * 8, 0), nn.Unflatten(1, (ch(256), 8, 8)),         # 256 x 8 x 8
        conv_1(ch(256), ch(256)), bn_relu(ch(256)),                                 # 256 x 8 x 8
        conv_1(ch(256), ch(256)), bn_relu(ch(256)),                                 # 256 x 8 x 8
        upconv(ch(256), ch(128)), bn_relu(ch(128)),                                 # 128 x 16 x 16
        upconv(ch(128), ch(64)), bn_relu(ch(64)),                                   # 64 x 32 x 32
        upconv(ch(64), 1, bias=True), nn.Sigmoid())                                 # 1 x 64 x 64
    trunk = nn.Sequential(
        nn.Conv2d(1, ch(64), 4, 2, 1), nn.LeakyReLU(0.1),                           # 64 x 32 x 32
        conv(ch(64), ch(128)), bn_lrelu(ch(128)),                                   # 128 x 16 x 16
        conv(ch(128), ch(256)), bn_lrelu(ch(256)),                                  # 256 x 8 x 8
        conv_1(ch(256), ch(256)), bn_lrelu(ch(256)),                                # 256 x 8 x 8
        conv_1(ch(256), ch(256)), bn_lrelu(ch(256)),                                # 256 x 8 x 8
        nn.Flatten(), fc(ch(256) * 8 * 8, ch(1024), 0.1))                           # 1024
    return G, Discriminator(trunk, ch(1024), dq)


# ------------------------------------------------------------------------------------------------ the figures

FIGURE = {"mnist": "fig2", "faces": "fig3", "chairs": "fig4", "svhn": "fig5", "celeba": "fig6"}


def end(args):
    """Continuous codes are varied from -end to end: 2 on MNIST as in Fig. 2, else 1."""
    return 2.0 if args.net == "mnist" else 1.0


def draw(G, args, n):
    """n new pictures (n, C, H, W) in args.scale and their codes c (n, number of cats) and u (n, m)."""
    z, c, u = sample_latent(n, args, args.device)
    return metrics.batched(G, join(z, c, u, args)), c, u


def drawer(args, saved):
    """Sampler of a trained run: z, c and u -> pictures; each code is a knob."""
    G, _ = networks(args)
    knobs = [export.Knob(f"c{i + 1}", names=tuple(range(k))) for i, k in enumerate(args.cats)]
    codes = [export.Knob(f"c{len(knobs) + i + 1}", -end(args), end(args)) for i in range(args.m)]
    return export.Drawer(lambda z, c, u: G(join(z, c, u, args)),
                         lambda n: sample_latent(n, args, args.device),
                         {"G": G}, {"z": [], "c": knobs, "u": codes}, args.scale)


def Q_of(D, images, args):
    """Q's output (N, dq) for uint8 pictures, or floats in args.scale."""
    return metrics.batched(D, images, scale=args.scale)[1]


def vary(G, args, code, rows=10, columns=10, order=None):
    """Pictures (rows * columns, C, H, W): each row is one draw of (z, c) in which one code varies.

    `code`: its number, categorical codes first.  A categorical code takes each of its categories, in `order`
    if given; a continuous code goes from -end() to end().
    """
    if code < len(args.cats):
        order = order or range(args.cats[code])
        columns = len(order)
    z, c, u = (t.repeat_interleave(columns, 0) for t in sample_latent(rows, args, args.device))
    if code < len(args.cats):
        c[:, code] = torch.tensor(order, device=args.device).repeat(rows)
    else:
        values = torch.linspace(-end(args), end(args), columns, device=args.device)
        u[:, code - len(args.cats)] = values.repeat(rows)
    with sampling(G):
        return G(join(z, c, u, args))


def draw_fig1(folder, args):
    """Fig. 1: L_I in nats during training, InfoGAN against the regular GAN, from metrics.jsonl."""
    key = "L_I" if args.cats else "L_I cont"
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


def figures(r, G, gan_G, results):
    """Draw the paper's figures for this data set; `results` of evaluate() names the codes to vary."""
    args = r.args

    def show(title, net_G, code, order=None):
        with r.aside():
            x = vary(net_G, args, code, order=order)
        r.show(title, log.grid(x, len(x) // 10, args.scale))

    r.show("fig1", draw_fig1(r.folder, args))
    found = {part["figure"]: int(part["code"][1:]) - 1
             for entry in results.values() for part in entry.values() if isinstance(part, dict)}
    if args.net == "mnist":
        labels = results.get("ig-cls", {}).get("labels", range(10))
        show("fig2a", G, 0, sorted(range(10), key=lambda k: (labels[k] < 0, labels[k])))
        if gan_G is not None:
            show("fig2b", gan_G, 0)
    elif args.net == "chairs" and not found:                # Fig. 4: one run for each row of Table 7
        found["fig4b" if args.factor == "width" else "fig4a"] = len(args.cats)
    for title, code in found.items():
        show(title, G, code)
    drawn = {*found.values(), *[0] * (args.net == "mnist")}
    for code in {*range(len(args.cats) + args.m)} - drawn:
        show(f"{FIGURE[args.net]}_c{code + 1}", G, code)


# ------------------------------------------------------------------------------------------------ the numbers

def classify(D, pictures, args):
    """Sec. 7.2: the table category -> label, by majority vote over 10,000 training pictures, and its error
    in % on the test pictures."""
    k_train, k_test = (Q_of(D, images, args)[:, :args.cats[0]].argmax(1).cpu()
                       for images in (pictures.images[:10000], pictures.test_images))
    counts = F.one_hot(k_train, args.cats[0]).T @ F.one_hot(pictures.labels[:10000])
    table = torch.where(counts.sum(1) > 0, counts.argmax(1), -1)        # -1: no picture has this category
    return table, 100 * (table[k_test] != pictures.test_labels).float().mean().item()


def match_factors(D, pictures, args):
    """Factor -> (matching continuous code, |Spearman correlation| of the factor with Q's mean for it).

    Of all one-to-one matchings, the one with the largest sum of correlations.
    """
    images, factors = pictures.images[:10000], pictures.extra["factors"][:10000]
    mu = split_q(Q_of(D, images, args), args)[1].cpu()
    rho = torch.tensor([[abs(metrics.rank_correlation(f, m)) for m in mu.T] for f in factors.T])
    rho = rho.nan_to_num(0.0)                               # NaN if a code is constant
    few = rho if len(rho) <= args.m else rho.T              # each row gets a column, one of its len(few) best
    ways = itertools.product(*few.topk(len(few), 1).indices.tolist())
    best = max((way for way in ways if len({*way}) == len(few)),
               key=lambda way: few[range(len(few)), way].sum())
    pairs = enumerate(best) if few is rho else sorted((j, i) for i, j in enumerate(best))
    return {j: (i, rho[j, i].item()) for j, i in pairs}


def slant(x):
    """Slant (n,) in degrees of the strokes in x (n, 1, H, W), white on black: atan(mu_11 / mu_02) of the
    central moments mu.  A diagonal / of a square picture: 45, an upright bar: 0."""
    m = x[:, 0].float()
    m = m / m.sum((1, 2), keepdim=True).clamp(min=1e-6)
    right = torch.arange(m.shape[2], device=m.device).float()
    up = -torch.arange(m.shape[1], device=m.device).float()[:, None]
    right, up = (t - (m * t).sum((1, 2), keepdim=True) for t in (right, up))
    return ((m * right * up).sum((1, 2)) / (m * up ** 2).sum((1, 2)).clamp(min=1e-6)).atan().rad2deg()


def stroke_width(x):
    """Width (n,) in pixels of the strokes in x (n, 1, H, W), white on black: 2 area / perimeter, where the
    perimeter is the total variation.  A bar of 3 x 60 pixels: about 3."""
    x = F.pad(x[:, 0].float(), (1, 1, 1, 1))
    edges = torch.hypot(x.diff(dim=1)[:, :, 1:], x.diff(dim=2)[:, 1:])
    return 2 * x.sum((1, 2)) / edges.sum((1, 2)).clamp(min=1e-6)


def style_codes(G, args):
    """Figs. 2c and d: rotation and width -> the continuous code that changes it most, and the mean change
    along a row (least squares): slant in degrees, stroke width in pixels."""
    effects = {"rotation": {}, "width": {}}
    for code in range(len(args.cats), len(args.cats) + args.m):
        x = vary(G, args, code, rows=100)
        u = torch.linspace(-1, 1, 10, device=x.device).float()
        for name, measure in (("rotation", slant), ("width", stroke_width)):
            effects[name][code] = 2 * (measure(x).view(100, 10) @ u).mean().abs().item() / (u @ u).item()
    best = {name: max(effect, key=effect.get) for name, effect in effects.items()}
    return {name: {"code": f"c{code + 1}", "value": effects[name][code], "figure": figure}
            for (name, code), figure in zip(best.items(), ("fig2c", "fig2d"))}


def evaluate(r, G, D, pictures):
    """Results for this data set: experiment id -> dict with "value", and "paper" if a value is published."""
    args, results = r.args, {}
    real = pictures.images if pictures.test_images is None else pictures.test_images
    with r.aside():
        x, c, u = draw(G, args, min(10000, len(real)))
    mi, mi_cont = (t.item() for t in L_I(Q_of(D, x, args), c, u, args))
    if args.cats:
        results["ig-mi"] = {"value": mi, "best": sum(map(math.log, args.cats)), "unit": "nats"}
    if args.m:
        results["ig-mi-cont"] = {"value": mi_cont, "unit": "nats"}
    if "factors" in pictures.extra and args.m:
        found = match_factors(D, pictures, args)
        names = pictures.extra["factor_names"]
        factors = {names[j]: {"code": f"c{len(args.cats) + code + 1}", "value": rho,
                              "figure": f"fig3{chr(ord('a') + j)}"} for j, (code, rho) in found.items()}
        mean = sum(rho for _, rho in found.values()) / len(found)
        results["ig-faces"] = {"value": mean, "unit": "mean |rank correlation|", **factors}
        if args.net == "faces":
            results["ig-faces"]["row of Table 5"] = args.factor or FIRST["faces"]
    if args.net == "mnist":
        with r.aside():
            style = style_codes(G, args)
        results["ig-mnist"] = {"value": style["rotation"]["value"], "unit": "degrees of slant from -2 to 2",
                               **style}
    labels, test_labels = pictures.labels, pictures.test_labels
    if not data.tell(labels) or labels.min() < 0 or test_labels is None or test_labels.max() > labels.max():
        return results
    clf = metrics.classifier(pictures.images, pictures.labels, args.device, args.data_dir)
    x = (x - args.scale[0]) / (args.scale[1] - args.scale[0])
    if len(args.cats) == 1:
        table, error = classify(D, pictures, args)
        results["ig-cls"] = {"value": error, "unit": "% error", "labels": table.tolist()}
        if args.net == args.dataset == "mnist" and args.width == 1:     # the paper's data and network
            results["ig-mi"]["paper"], results["ig-cls"]["paper"] = 2.30, 5
        agreement = metrics.label_agreement(clf, x, table.to(args.device)[c[:, 0]])
        results["agreement"] = {"value": 100 * agreement, "unit": "% of samples with their code's label"}
    if len(real) > 1:
        results["frechet"] = {"value": metrics.frechet_distance(clf, x, real[:10000])}
    return results


def report(r, G, D, gan_G, pictures):
    """Figures and results.json."""
    results = evaluate(r, G, D, pictures)
    figures(r, G, gan_G, results)
    error = results.get("ig-cls", {}).get("value", 0)       # only the MNIST network has this result
    r.results(results, passed=r.args.dataset != "mnist" or error <= 6)


if __name__ == "__main__":
    main()

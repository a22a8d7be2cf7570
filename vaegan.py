"""Autoencoding beyond pixels using a learned similarity metric
Anders Boesen Lindbo Larsen, Soren Kaae Sonderby, Hugo Larochelle, Ole Winther, 2016.  arXiv:1512.09300

A VAE whose decoder is the generator of a GAN; its reconstructions are compared with the data not pixel by
pixel but in the features of the GAN's discriminator.

    Eq. 1      z ~ Enc(x) = q(z|x), x~ ~ Dec(z) = p(x|z)                                -> sample_z()
    Eq. 3      L_llike^pixel = -E_q[log p(x|z)], p(x|z) = N(x | x~, I)                  -> L_llike()
    Eq. 4      L_prior = KL(q(z|x) || p(z)), p(z) = N(0, I)                             -> L_prior()
    Eq. 5, 10  L_GAN = log Dis(x) + log(1 - Dis(Dec(z_p))) + log(1 - Dis(Dec(Enc(x))))  -> L_GAN()
    Eq. 6, 7   L_llike^Dis_l = -E_q[log N(Dis_l(x) | Dis_l(x~), I)]                     -> L_llike()
    Eq. 8, 9   L = L_prior + L_llike^Dis_l + L_GAN; gamma L_llike in Dec's part of it   -> vaegan_step()
    Alg. 1     one forward pass, then Enc, Dec and Dis each down its own part of L      -> vaegan_step()
    Table 1    networks                                                                 -> networks()
    Figs. 3-5  samples, reconstructions (Fig. 5: at several gammas, a run each)         -> figures(), beside()
    Figs. 6, 7 visual attribute vectors: mean z with less mean z without, Sec. 4.1.1    -> attribute_vectors()
    Table 2    attributes asked for against those that a regressor reads, Sec. 4.2      -> similarity()
    Sec. 4     error of the nearest neighbours in a GAN's features and in pixels        -> knn_error()

Run
    python vaegan.py                                         (faces 64 x 64, Figs. 3-7; also --model vae, gan)
    python vaegan.py --width .25 --steps 8000 --name narrow  (the same on a CPU)
    python vaegan.py --conditional --name table2             (Table 2; also --model vae, gan)
    python vaegan.py --dataset cifar10 --model gan           (nearest neighbours)
    python vaegan.py --dataset mnist --model vae --z-dim 2   (the plane of z; also --model gan)
    python vaegan.py --model gan --name gan                  (whose Dis is the metric of the next)
    python vaegan.py --model vae_dis --dis runs/vaegan-faces-gan --name vae_dis
    python vaegan.py --resume runs/vaegan-faces --beside runs/vaegan-faces-gan runs/vaegan-faces-vae_dis
                                                             (Figs. 3-5 with a row or block of each run)

Expect
    vg-lfw  on the built-in heads cosine .875, .889 and .846 (seeds 0 to 2), with --model vae .746, .738 and
            .734, gan .574, .531 and .557 (both without --gating): --net 32 --width .25 --conditional
            --gating --steps 1800, 12 to 17 minutes on a shared core of an AMD EPYC with AVX512-BF16, torch
            2.14.1, bfloat16

Deviations
    [dev 1] Dis ascends L_GAN and Dec descends it: in Eq. 10 it is a log-likelihood, and Algorithm 1 as
            printed would have them do the reverse.
    [dev 2] x, x~ and x_p pass Dis as one batch, z and z_p Dec: BatchNorm's statistics are shared, as those of
            data and generated pictures are in the authors' code, where the likelihood sees x and x~ alone.
            Apart, they hide brightness from Dis.
    [dev 3] gamma, which the paper does not give, is 5e-3 for the sum over the 16,384 features of Dis_l; with
            fewer features or pixels it is larger by as much.  With the 1e-5 of the authors' code Dec hardly
            hears the likelihood: vg-lfw .659, the VAE .694, both with Dec's statistics in [dev 10].
    [dev 4] The learning rate is constant and pictures are not augmented: the authors' code anneals the rate
            and shifts, turns and recolours its pictures.
    [dev 5] The paper has no network below 64 x 64.  32 x 32: Table 1 down to 4 x 4 in place of 8 x 8; where
            Dec and Dis have their second 256 maps, the authors' code has 192.  28 x 28: two strided
            convolutions.  Dis_l is the second strided one, whose 8 x 8 or 7 x 7 is nearest to Table 1's.
    [dev 6] Attributes are the data set's, or its labels, each with mean 0 and variance 1; the regressor is
            the small strided network of common/metrics.py, whatever the width.
    [dev 7] With --gating log Dis(x) counts as much as both generated terms, so that Dis = 1/2 is the balance
            that the thresholds are about; the authors' code has weights .66, .17, .17.
    [dev 8] Dis learns from pictures under Gaussian noise of std .2, one draw for x, x~ and x_p: without it
            Dis soon tells all of them apart by the finest texture, and Dec draws nothing else.  --noise 0.
    [dev 9] Dec descends -log Dis of its pictures in place of log(1 - Dis), whose gradient is nothing while
            Dis wins.  --loss minimax: Eq. 9.
    [dev 10] What draws is a running average of Dec's weights with BatchNorm's statistics taken anew: those
            of Dec are too wide for it.  --average 0: Dec's last weights.
"""

from dataclasses import replace

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from common import UserError, data, log, metrics, run
from common.fuse import autocast, average, averaged, calibrate, descend, frozen, fuse, place, sampling

MODELS = {  # of Sec. 4.1, with their networks; VAE/GAN_Dis0 is VAE/GAN with the likelihood of pixels
    "vaegan": ("Enc", "Dec", "Dis"), "vae": ("Enc", "Dec"), "gan": ("Dec", "Dis"),
    "vae_dis": ("Enc", "Dec", "Dis"), "vaegan_dis0": ("Enc", "Dec", "Dis")}
PIXELS = ("vae", "vaegan_dis0")                     # their L_llike is Eq. 3, that of the others Eq. 7
CHANNELS = {64: 3, 32: 3, 28: 1}
Z_DIM = {64: 128, 32: 256, 28: 128}                 # authors' code; 28 x 28: [dev 5]
TABLE_2 = {"vaegan": {"paper": 0.9114, "paper mse": 22.39}, "vae": {"paper": 0.9030, "paper mse": 27.59},
           "gan": {"paper": 0.8892, "paper mse": 27.89}}
SIZE = {"cifar10": 32, "cifar100": 32, "svhn": 32, "mnist": 28, "fashion-mnist": 28, "kmnist": 28}


# --------------------------------------------------------------------------------------------------- networks

def conv(i, o):
    return nn.Conv2d(i, o, 5, 2, 2, bias=False)


def upconv(i, o):
    return nn.ConvTranspose2d(i, o, 5, 2, 2, output_padding=1, bias=False)


def bn(n):
    """BatchNorm with the epsilon of the authors' code, ReLU."""
    return nn.Sequential(nn.BatchNorm2d(n, eps=1e-6), nn.ReLU())


def fc(i, o):
    return nn.Sequential(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o, eps=1e-6), nn.ReLU())


def networks(size, dz, dy=0, width=1.0):
    """(Enc, Dec, Dis) of Table 1 for 64 x 64 pictures, of the like for 32 x 32 and 28 x 28 [dev 5].

    `dz`: size of z.  `dy`: attributes that all three are given.  `width`: feature maps as a share of the
    table's, 8 at least.
    """
    maps = (16, 32, 64, 128, 256, 512, 2048)
    c16, c32, c64, c128, c256, c512, c2048 = (max(8, round(n * width)) for n in maps)
    relu, flat = nn.ReLU(), nn.Flatten()
    if size == 28:                                                  # [dev 5]
        enc = nn.Sequential(
            conv(1, c32), bn(c32),                                  # 32 x 14 x 14
            conv(c32, c64), bn(c64), flat)                          # 64 x 7 x 7
        Enc = Encoder(enc, c64 * 7 * 7, c512, dz, dy)               # 512, dz
        Dec = Decoder(
            fc(dz + dy, c64 * 7 * 7), nn.Unflatten(1, (c64, 7, 7)), # 64 x 7 x 7
            upconv(c64, c64), bn(c64),                              # 64 x 14 x 14
            upconv(c64, c32), bn(c32),                              # 32 x 28 x 28
            nn.Conv2d(c32, 1, 5, padding=2), nn.Tanh())             # 1 x 28 x 28
        dis_l = nn.Sequential(
            nn.Conv2d(1, c16, 5, padding=2), relu,                  # 16 x 28 x 28
            conv(c16, c64), bn(c64),                                # 64 x 14 x 14
            conv(c64, c128))                                        # 128 x 7 x 7: Dis_l
        Dis = Discriminator(dis_l, nn.Sequential(bn(c128), flat), c128 * 7 * 7, c256, dy)
    else:                                                           # Table 1; sizes for 64 x 64
        s = size // 8
        enc = nn.Sequential(
            conv(3, c64), bn(c64),                                  # 64 x 32 x 32
            conv(c64, c128), bn(c128),                              # 128 x 16 x 16
            conv(c128, c256), bn(c256), flat)                       # 256 x 8 x 8
        Enc = Encoder(enc, c256 * s * s, c2048, dz, dy)             # 2048, dz
        Dec = Decoder(
            fc(dz + dy, c256 * s * s), nn.Unflatten(1, (c256, s, s)),   # 256 x 8 x 8
            upconv(c256, c256), bn(c256),                           # 256 x 16 x 16
            upconv(c256, c128), bn(c128),                           # 128 x 32 x 32
            upconv(c128, c32), bn(c32),                             # 32 x 64 x 64
            nn.Conv2d(c32, 3, 5, padding=2), nn.Tanh())             # 3 x 64 x 64
        rows = [
            nn.Conv2d(3, c32, 5, padding=2), relu,                  # 32 x 64 x 64
            conv(c32, c128), bn(c128),                              # 128 x 32 x 32
            conv(c128, c256), bn(c256),                             # 256 x 16 x 16
            conv(c256, c256), bn(c256), flat]                       # 256 x 8 x 8
        n = 7 if size == 64 else 5                                  # up to Dis_l, [dev 5]
        Dis = Discriminator(nn.Sequential(*rows[:n]), nn.Sequential(*rows[n:]), c256 * s * s, c512, dy)
    return Enc.apply(init), Dec.apply(init), Dis.apply(init)


class Encoder(nn.Module):
    """Enc(x, y) = (mu, log sigma^2), each (n, dz), of q(z|x); y (n, dy) joins the input of the top layer."""

    def __init__(self, convs, d, hidden, dz, dy):
        super().__init__()
        self.convs, self.top = convs, fc(d + dy, hidden)
        self.mu, self.log_var = nn.Linear(hidden, dz), nn.Linear(hidden, dz)

    def forward(self, x, y):
        h = self.convs(x)
        h = self.top(torch.cat([h, y.to(h)], 1))
        return self.mu(h), self.log_var(h)


class Decoder(nn.Sequential):
    """Dec(z, y) = x~ (n, C, H, W) in [-1, 1]."""

    def forward(self, z, y):
        return super().forward(torch.cat([z, y], 1))


class Discriminator(nn.Module):
    """Dis(x, y) = (a, Dis_l(x)): a (n,) is the logit, Dis_l a convolution's output before BatchNorm."""

    def __init__(self, dis_l, above, d, hidden, dy):
        super().__init__()
        self.dis_l, self.above = dis_l, above
        self.top = nn.Sequential(fc(d + dy, hidden), nn.Linear(hidden, 1), nn.Flatten(0))

    def forward(self, x, y):
        f = self.dis_l(x)
        h = self.above(f)
        return self.top(torch.cat([h, y.to(h)], 1)), f


def init(module):
    """Weights Unif(-b, b), b^2 = 1 / (3 inputs of a unit), biases 0 (authors' code)."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        inputs = module.weight[0].numel()
        if isinstance(module, nn.ConvTranspose2d):          # a pixel sees a quarter of the 5 x 5 weights
            inputs = module.in_channels * 25 / 4
        nn.init.uniform_(module.weight, -(3 * inputs) ** -0.5, (3 * inputs) ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class RMSProp(torch.optim.Optimizer):
    """s <- .9 s + .1 g^2, theta <- theta - lr g / (sqrt s + 1e-8), g with weight decay 1e-5.

    As in the authors' code, where the decay stands beside gradients summed over the batch.

    `gate` in `param_groups` is a 0-dim tensor: set to 0 in place, which works in a captured CUDA graph too, a
    step leaves theta and s as they are.  torch.optim.RMSprop would go on averaging.
    """

    def __init__(self, params, lr):
        params = list(params)
        lr, gate = (torch.tensor(v, device=params[0].device) for v in (lr, 1.0))
        super().__init__(params, {"lr": lr, "gate": gate})
        for p in params:
            self.state[p]["s"] = torch.zeros_like(p)

    def update(self, grads):
        group, = self.param_groups
        params, gate = group["params"], group["gate"]
        s = [self.state[p]["s"] for p in params]
        g = torch._foreach_add(grads, params, alpha=1e-5)
        torch._foreach_mul_(s, 1 - 0.1 * gate)
        torch._foreach_add_(s, torch._foreach_mul(torch._foreach_mul(g, g), 0.1 * gate))
        root = torch._foreach_sqrt(s)
        torch._foreach_add_(root, 1e-8)
        torch._foreach_div_(g, root)
        torch._foreach_sub_(params, torch._foreach_mul(g, group["lr"] * gate))


# ---------------------------------------------------------------------------------------------------- latents

def sample_z(mu, log_var):
    """Eq. 1: z = mu + sigma eps, eps ~ N(0, I); all (n, dz).  mu where log sigma^2 = -inf."""
    return mu + (0.5 * log_var).exp() * torch.randn_like(mu)


# -------------------------------------------------------------------------------------------------- objective

def L_prior(mu, log_var):
    """Eq. 4: KL(N(mu, sigma^2) || N(0, 1)) in nats, summed over z (n, dz), mean over n.

    1/2 for each mu = 1, sigma = 1.
    """
    return -0.5 * (1 + log_var - mu ** 2 - log_var.exp()).sum(1).mean()


def L_llike(f, f_tilde):
    """Eqs. 3, 7: -log N(f; f~, I) less its constant, summed over features, mean over n; f, f~ (n, ...).

    1/2 for each feature that is 1 off.
    """
    return 0.5 * (f.float() - f_tilde.float()).square().flatten(1).sum(1).mean()


def L_GAN(a, *a_fake, real=1.0):
    """Eqs. 5, 10: real * log Dis(x) plus log(1 - Dis(x~)) for each kind of fake; logits a (n,), means over n.

    -log 8 for two kinds where Dis = 1/2 everywhere.
    """
    return real * F.logsigmoid(a.float()).mean() + sum(F.logsigmoid(-b.float()).mean() for b in a_fake)


def fool(loss, gan, *a_fake):
    """What Dec descends to fool Dis: "minimax" L_GAN (Eq. 9), "non-saturating" -log Dis of each kind
    [dev 9]."""
    return gan if loss == "minimax" else -sum(F.logsigmoid(a.float()).mean() for a in a_fake)


def gates(a, *a_fake):
    """(gate of Dis, gate of Dec), 0-dim and 0 or 1: whoever is far ahead stands still (authors' code).

    Dis if its cost on data or on fakes is below .68 - .35, Dec if one is above .68 + .35; if both would,
    neither does.  At Dis = 1/2, where costs are log 2 = .69, both move.
    """
    costs = -torch.stack([F.logsigmoid(a.float()).mean(), L_GAN(a, *a_fake, real=0.0) / len(a_fake)]).detach()
    if dist.is_initialized():                               # all ranks gate alike
        dist.all_reduce(costs)
        costs /= dist.get_world_size()
    skip_Dis, skip_Dec = (costs < 0.33).any(), (costs > 1.03).any()
    both = skip_Dis & skip_Dec
    return (~skip_Dis | both).float(), (~skip_Dec | both).float()


# ------------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="faces", steps=37500, batch_size=64)
    add = p.add_argument_group("VAE/GAN").add_argument
    positive = run.number(float, 0, open_low=True)
    add("--model", choices=MODELS, default="vaegan", help="of those compared in Sec. 4.1 [%(default)s]")
    add("--net", type=int, choices=CHANNELS,
        help="size of pictures: 64 (Table 1), 32 or 28 [32 or 28 for the small named sets, else 64]")
    add("--width", type=positive, default=1.0, help="feature maps as a share of the paper's [%(default)s]")
    add("--z-dim", type=run.number(int, 1), help="size of z; 2: also draw the plane [128, at 32 x 32 256]")
    add("--gamma", type=run.number(float, 0),
        help="weight of L_llike in Dec's step, Eq. 9, Fig. 5 [5e-3 for 16,384 features]")
    add("--loss", choices=("minimax", "non-saturating"), default="non-saturating",
        help="what Dec descends: L_GAN of Eq. 9, or -log Dis of its pictures [%(default)s]")
    add("--noise", type=run.number(float, 0), default=0.2,
        help="std of the Gaussian noise on what Dis sees while it learns [%(default)s]")
    add("--average", type=run.number(float, 0, 1), default=0.999,
        help="decay of the running average of Dec that draws, 0: Dec as it is [%(default)s]")
    add("--gating", action="store_true", help="leave out the step of Dis or Dec when it is far ahead")
    add("--conditional", action="store_true", help="all networks are given the attributes, Sec. 4.2")
    add("--dis", metavar="RUN", help="vae_dis: folder of the GAN run whose Dis is its fixed metric")
    add("--lr", type=positive, default=3e-4, help="RMSProp's rate [%(default)s]")
    add("--beside", metavar="RUN", nargs="+",
        help="with --resume: Figs. 3-5 with this run and these, of any --model and --gamma")
    args = run.parse(p, argv, free=("beside",))
    if args.beside and not args.resume:
        p.error("--beside needs --resume RUN: the run that the others stand beside")
    if (args.model == "vae_dis") != bool(args.dis):
        p.error("--model vae_dis and --dis RUN need each other: train the GAN first, --model gan")
    if args.gating and "Dis" not in MODELS[args.model]:
        p.error(f"--gating needs a Dis that learns, --model {args.model} has none")
    args.net = args.net or SIZE.get(args.dataset, 64)
    args.z_dim = args.z_dim or Z_DIM[args.net]
    return args


# --------------------------------------------------------------------------------------------------- training

def build(args, dy):
    """The model's networks, with them Dec_bar, the average of Dec, and optimizers by name, and its fused
    iteration."""
    nets = dict(zip(("Enc", "Dec", "Dis"), networks(args.net, args.z_dim, dy, args.width)))
    nets = {name: nets[name] for name in MODELS[args.model]} | {"Dec_bar": averaged(nets["Dec"])}
    nets = dict(zip(nets, place(args, *nets.values())))
    Enc, Dec, Dis, Dec_bar = (nets.get(name) for name in ("Enc", "Dec", "Dis", "Dec_bar"))
    if args.model == "vae_dis":
        Dis.eval()                                          # a fixed metric, BatchNorm's statistics included
    learn = [name for name in MODELS[args.model] if (args.model, name) != ("vae_dis", "Dis")]
    opts = {f"opt_{name}": RMSProp(nets[name].parameters(), args.lr) for name in learn}  # [dev 4]
    opt_Enc, opt_Dec, opt_Dis = (opts.get(f"opt_{name}") for name in ("Enc", "Dec", "Dis"))
    amp, pixels = autocast(args), args.model in PIXELS

    def watch(a, a_p, *more):
        """Scalars of Dis for the log; --gating: sets the gates of this step, which are in the log too."""
        scalars = {"Dis(x)": a.float().sigmoid().mean(), "Dis(x_p)": a_p.float().sigmoid().mean()}
        if args.gating:
            scalars["Dis steps"], scalars["Dec steps"] = gates(a, a_p, *more)
            opt_Dis.param_groups[0]["gate"].copy_(scalars["Dis steps"])
            opt_Dec.param_groups[0]["gate"].copy_(scalars["Dec steps"])
        return scalars

    def noise(x):
        return args.noise * torch.randn_like(x)                             # [dev 8]

    @fuse(args)
    def vaegan_step(x, y):                                  # Alg. 1; x (n, C, H, W) in [-1, 1], y (n, dy)
        n = len(x)
        with amp:
            mu, log_var = (t.float() for t in Enc(x, y))                    # Z <- Enc(X)
            z = sample_z(mu, log_var)
            z_p = torch.randn_like(z)                                       # Z_p <- N(0, I)
            x_fake = Dec(torch.cat([z, z_p]), y.repeat(2, 1))               # X~ and X_p [dev 2]
            a, f = Dis(torch.cat([x, x_fake]) + noise(x).repeat(3, 1, 1, 1), y.repeat(3, 1))    # [dev 2]
        a, a_tilde, a_p = a.split(n)
        f, f_tilde, _ = f.split(n)
        f, f_tilde = (x, x_fake[:n]) if pixels else (f.detach(), f_tilde)   # Dis_l(x) is a constant
        prior, llike = L_prior(mu, log_var), L_llike(f, f_tilde)
        gan = L_GAN(a, a_tilde, a_p, real=2.0 if args.gating else 1.0)      # Eq. 10, [dev 7]
        gamma = 5e-3 * 16384 / f[0].numel() if args.gamma is None else args.gamma       # [dev 3]
        scalars = {"L_prior": prior, "L_llike": llike, "L_GAN": gan} | watch(a, a_p, a_tilde)
        # All gradients are at the old parameters, each network's of its own terms alone: Eq. 9, [dev 1].
        descend(prior + llike, opt_Enc,
                gamma * llike + fool(args.loss, gan, a_tilde, a_p), opt_Dec,
                -gan, opt_Dis)
        average(Dec_bar, Dec, args.average)                                 # [dev 10]
        return scalars

    @fuse(args)
    def gan_step(x, y):
        with amp:
            x_p = Dec(torch.randn(len(x), args.z_dim, device=x.device), y)
            both = torch.cat([x, x_p]) + noise(x).repeat(2, 1, 1, 1)        # [dev 2]
            a, a_p = Dis(both, y.repeat(2, 1))[0].chunk(2)
        gan = L_GAN(a, a_p)                                                 # Eq. 5
        scalars = {"L_GAN": gan} | watch(a, a_p)
        descend(fool(args.loss, gan, a_p), opt_Dec, -gan, opt_Dis)
        average(Dec_bar, Dec, args.average)                                 # [dev 10]
        return scalars

    @fuse(args)
    def vae_step(x, y):
        with amp:
            mu, log_var = (t.float() for t in Enc(x, y))
            x_tilde = Dec(sample_z(mu, log_var), y)
        f, f_tilde = x, x_tilde
        if not pixels:                                                      # VAE_Dis_l
            with amp, frozen(Dis):
                f, f_tilde = Dis(torch.cat([x, x_tilde]), y.repeat(2, 1))[1].chunk(2)
        prior, llike = L_prior(mu, log_var), L_llike(f, f_tilde)            # Eq. 2
        descend(prior + llike, opt_Enc, llike, opt_Dec)
        average(Dec_bar, Dec, args.average)                                 # [dev 10]
        return {"L_prior": prior, "L_llike": llike}

    step = {"gan": gan_step, "vae": vae_step, "vae_dis": vae_step}.get(args.model, vaegan_step)
    return nets | opts, step


# ------------------------------------------------------------------------------------------------------- data

def prepare(args, pictures):
    """The data set with a test part, and in `extra` for both parts attributes (N, A) in [0, 1] and y (N, dy).

    Attributes are the set's own and its factors of variation, else its labels one-hot, else none.  y, which
    the networks are given, has mean 0 and variance 1 [dev 6]; dy = 0 without --conditional.  A set without a
    test part, or without its attributes, gives its last tenth, 2,000 at most.  UserError: attributes of
    another shape, --conditional without any.
    """
    extra, labels, test_labels = dict(pictures.extra), pictures.labels, pictures.test_labels
    n, keys = len(pictures.images), [key for key in ("attributes", "factors") if key in extra]
    for key in keys:
        if not torch.is_tensor(extra[key]) or extra[key].shape[:-1] != (n,):
            raise UserError(f"{args.dataset}: {key} are not numbers ({n}, A), a row for each picture")
    lacking = pictures.test_images is not None and test_labels is None
    if labels is not None and (lacking or not 0 <= labels.min() <= labels.max() < 100):
        labels = test_labels = None                         # too few to measure with, or too many to ask for
    if labels is not None and not keys:
        keys, extra["attribute_names"] = ["attributes"], pictures.classes or []
        extra["attributes"] = F.one_hot(labels, int(labels.max()) + 1)
        if test_labels is not None:
            extra["test_attributes"] = F.one_hot(test_labels, int(labels.max()) + 1)
    pictures = replace(pictures, labels=labels, test_labels=test_labels)
    if pictures.test_images is None or not all(f"test_{key}" in extra for key in keys):
        n -= max(1, min(2000, n // 10))
        parts = {"images": pictures.images} | ({} if labels is None else {"labels": labels})
        pictures = replace(pictures, **{k: t[:n] for k, t in parts.items()},
                           **{f"test_{k}": t[n:] for k, t in parts.items()})
        extra |= {f"test_{key}": extra[key][n:] for key in keys} | {key: extra[key][:n] for key in keys}
    a, a_test = (torch.cat([torch.zeros(len(x), 0), *(extra[part + key].float() for key in keys)], 1)
                 for part, x in (("", pictures.images), ("test_", pictures.test_images)))
    if args.conditional and not keys:
        raise UserError(f"{args.dataset} has neither attributes nor labels: --conditional needs them")
    if keys:
        low, high = torch.cat([a, a_test]).aminmax(dim=0)
        a, a_test = ((t - low) / (high - low).clamp_min(1e-6) for t in (a, a_test))
    names = [name for key in keys for name in extra.get(f"{key[:-1]}_names", [])]
    if len(names) != a.shape[1]:
        names = [f"attribute {i}" for i in range(a.shape[1])]
    y, test_y = (standard(t, a) if args.conditional else t[:, :0] for t in (a, a_test))
    return replace(pictures, extra={"attributes": a, "test_attributes": a_test, "names": names, "y": y,
                                    "test_y": test_y})


def standard(a, train):
    """Attributes a (..., A) less the means of train (N, A), over its deviations; on the CPU."""
    return (a.cpu() - train.mean(0)) / train.std(0, correction=0).clamp_min(1e-6)


# ---------------------------------------------------------------------------------------------------- figures

def each(args, net, *tensors):
    """net of tensors (N, ...), 500 rows at a time in eval mode; of Enc the means.  uint8 becomes [-1, 1]."""
    def ready(t):
        t = t.to(args.device)
        return t.float() / 127.5 - 1 if t.dtype == torch.uint8 else t

    with sampling(net):
        found = [net(*map(ready, rows)) for rows in zip(*(t.split(500) for t in tensors))]
    return torch.cat([t[0] if isinstance(t, tuple) else t for t in found])


def draw(args, Dec, y, k=1):
    """k pictures of z_p ~ N(0, I) for each row of y (n, dy): (n k, C, H, W) in [-1, 1]."""
    y = y.repeat_interleave(k, 0)
    return each(args, Dec, torch.randn(len(y), args.z_dim, device=args.device), y)


def some(y, n):
    """n random rows of y."""
    return y[torch.randint(len(y), (n,))]


def settled(args, Enc, Dec, pictures):
    """The average of Dec with statistics of its own for BatchNorm, over 20 minibatches [dev 10]."""
    def minibatches():
        for i in torch.randint(len(pictures.images), (20, args.batch_size)):
            y = pictures.extra["y"][i].to(args.device)
            z = torch.randn(len(i), args.z_dim, device=args.device)
            if Enc:                                         # z and z_p
                z, y = torch.cat([each(args, Enc, pictures.images[i], y), z]), y.repeat(2, 1)
            yield z, y

    return calibrate(Dec, minibatches())


def plane(args, Dec, n):
    """z = (z1, z2) on an n x n grid over [-1.5, 1.5]^2, z1 to the right and z2 up: (n, n, C, H, W)."""
    t = torch.linspace(-1.5, 1.5, n, device=args.device)
    z2, z1 = torch.meshgrid(t.flip(0), t, indexing="ij")
    z = torch.stack([z1, z2], 2).flatten(0, 1)
    return each(args, Dec, z, z[:, :0]).unflatten(0, (n, n))


def attribute_vectors(mu, a):
    """Sec. 4.1.1: mean of mu (N, dz) over pictures with an attribute less that without, (A, dz); a (N, A).

    With: above the attribute's mean.  mu = a with one binary attribute: 1.
    """
    on = (a > a.mean(0)).to(mu).T
    with_it, without = (w @ mu / w.sum(1, keepdim=True).clamp_min(1) for w in (on, 1 - on))
    return with_it - without


def edit(args, Enc, Dec, pictures, n):
    """Figs. 6, 7: test pictures' reconstructions, and with each attribute's vector, (n, 1 + A, C, H, W)."""
    e = pictures.extra
    mu = each(args, Enc, pictures.images[:10000], e["y"][:10000])           # as many as in the authors' code
    z = each(args, Enc, pictures.test_images[:n], e["test_y"][:n])[:, None]
    z = torch.cat([z, z + attribute_vectors(mu, e["attributes"][:10000].to(mu))], 1)
    return each(args, Dec, z.flatten(0, 1), z.flatten(0, 1)[:, :0]).unflatten(0, z.shape[:2])


def figures(r, Enc, Dec, pictures):
    """Draw the paper's figures that model and data set have into the run's folder."""
    args, y = r.args, pictures.extra["test_y"]
    n = min(16, len(y) // 8 * 8 or len(y))
    x = each(args, nn.Identity(), pictures.test_images[:n])

    def show(title, rows):                                  # (rows, columns, C, H, W)
        r.show(title, log.grid(rows.flatten(0, 1), rows.shape[1], (-1, 1)))

    with r.aside():
        show("fig3", draw(args, Dec, some(y, 64)).unflatten(0, (8, 8)))
        if args.conditional:                                # a test picture, samples with its attributes
            show("queries", torch.cat([x[:8, None], draw(args, Dec, y[:8], 9).unflatten(0, (-1, 9))], 1))
    if Enc:                                                 # originals above their reconstructions
        pairs = zip(x.split(8), each(args, Dec, each(args, Enc, x, y[:n]), y[:n]).split(8))
        r.show("fig4", log.grid(torch.cat([part for pair in pairs for part in pair]), len(x[:8]), (-1, 1)))
    if Enc and pictures.extra["names"] and not args.conditional:
        show("fig6", torch.cat([x[:8, None], edit(args, Enc, Dec, pictures, 8)], 1))
    if args.z_dim == 2 and not args.conditional:
        show("plane", plane(args, Dec, 20))


def trained(args, where, dy):
    """(flags, Enc or None, average of Dec) of the run `where`, of this run's data and sizes."""
    other = parse_args(["--resume", where])
    for k in ("dataset", "net", "width", "conditional"):
        found, expected = getattr(other, k), getattr(args, k)
        if found != expected:
            raise UserError(f"{where} was run with --{k} {found}, {expected} expected, as in {args.resume}")
    other.device = args.device
    nets = {name: net for name, net in build(other, dy)[0].items() if name in ("Enc", "Dec_bar")}
    run.fetch(where, "a vaegan run past its first checkpoint", args.device, **nets)
    return other, nets.get("Enc"), nets["Dec_bar"]


def beside(r, runs, pictures):
    """--beside: Figs. 3-5 with a block or row of each (flags, Enc or None, Dec) of runs, under its name."""
    y, x = pictures.extra["test_y"], each(r.args, nn.Identity(), pictures.test_images[:8])
    samples, rows = [], [("data", x)]
    for args, Enc, Dec in runs:
        name = args.model + (f", gamma {args.gamma:g}" if args.gamma is not None else "")
        with r.aside():
            settled(args, Enc, Dec, pictures)
        with r.aside():                                     # the same z wherever its size is the same
            samples.append((name, draw(args, Dec, some(y, 24))))
        if Enc:
            rows.append((name, each(args, Dec, each(args, Enc, x, y[:8]), y[:8])))
    for title, blocks in (("beside_fig3", samples), ("beside_fig4", rows)):
        if len(blocks) > 1:                                 # a GAN has no reconstructions
            names, blocks = zip(*blocks)
            r.show(title, log.with_captions([log.grid(b, min(8, len(b)), (-1, 1)) for b in blocks], names))
    print(f"from top to bottom {', '.join(map(str, [r.folder, *r.args.beside]))}: {r.folder}/beside_*.png")


# ---------------------------------------------------------------------------------------------------- numbers

def sharpness(x):
    """Mean over pictures (n, C, H, W) of the variance of their grey Laplacian.  0 for a linear shade."""
    x = x.float().mean(1)
    lap = 4 * x[:, 1:-1, 1:-1] - x[:, :-2, 1:-1] - x[:, 2:, 1:-1] - x[:, 1:-1, :-2] - x[:, 1:-1, 2:]
    return lap.flatten(1).var(1, correction=0).mean().item()


def distance(f, f_tilde):
    """Squared distance of f and f~ (n, ...) as a share of that of f to the next picture's.  0 for f~ = f."""
    return ((f - f_tilde).square().mean() / (f - f.roll(1, 0)).square().mean()).item()


def similarity(read, y):
    """Table 2: (mean cosine of the best of k samples, mean squared error of these, summed over attributes).

    read (N, k, A): attributes read from k samples for each y (N, A).  (1, 0) if one sample of each has them.
    """
    cosine, best = F.cosine_similarity(read, y[:, None], dim=2).max(1)
    error = (read[torch.arange(len(y)), best] - y).square().sum(1)
    return cosine.mean().item(), error.mean().item()


def knn_error(f, labels, f_test, test_labels, k=5):
    """Error in % of the majority label of the k nearest of f (N, d), Euclidean, over f_test (M, d).

    Of equally frequent labels that of the nearest wins.  0 for f_test = f, k = 1.
    """
    labels, k = labels.to(f.device), min(k, len(f))
    votes = 1 + 1e-3 * 0.5 ** torch.arange(k, device=f.device)[:, None]
    half = 0.5 * f.square().sum(1)
    wrong = 0
    for q, y in zip(f_test.split(500), test_labels.to(f.device).split(500)):
        near = labels[torch.addmm(half, q, f.T, alpha=-1).topk(k, largest=False).indices]
        wrong += ((F.one_hot(near, int(labels.max()) + 1) * votes).sum(1).argmax(1) != y).sum().item()
    return 100 * wrong / len(f_test)


def retrieval(args, Dis, pictures):
    """vg-knn: errors in % in the last convolution of Dis, after its ReLU, and in pixels."""
    for net in (nn.Sequential(Dis.dis_l, Dis.above), nn.Flatten()):
        f, f_test = (each(args, net, x) for x in (pictures.images[:50000], pictures.test_images[:10000]))
        yield knn_error(f, pictures.labels[:50000], f_test, pictures.test_labels[:10000])


def evaluate(r, Enc, Dec, Dis, pictures):
    """The numbers of this model and data set: experiment id -> dict with "value" and, if known, "paper"."""
    args, e, results = r.args, pictures.extra, {}
    a, names, y, test = e["attributes"], e["names"], e["test_y"][:2000], pictures.test_images[:2000]
    x = each(args, nn.Identity(), test)
    if names:                                               # [dev 6]
        regressor = metrics.classifier(pictures.images, a, args.device, args.data_dir)

    def unit(drawn):                                        # [-1, 1] -> [0, 1]
        return drawn / 2 + 0.5

    def read(drawn):                                        # (n, A) in [0, 1]
        return metrics.logits(regressor, unit(drawn)).sigmoid().cpu()

    def looks(drawn):
        frechet = {"frechet": metrics.frechet_distance(regressor, unit(drawn), test)} if names else {}
        return {"sharpness": sharpness(drawn) / sharpness(x)} | frechet

    with r.aside():
        found = looks(draw(args, Dec, some(y, len(x))))
        results["vg-celeba-samples"] = {"value": found["sharpness"], "unit": "sharpness, data 1"} | found
        if args.conditional:
            got = torch.cat([read(draw(args, Dec, part, 10)) for part in y.split(50)]).unflatten(0, (-1, 10))
            cosine, mse = similarity(standard(got, a), y)
            best = similarity(standard(read(x), a)[:, None], y)
            results["vg-lfw"] = {"value": cosine, "unit": "cosine", "mse": mse, "test set": best[0],
                                 "test set mse": best[1]} | TABLE_2.get(args.model, {})
    if Enc:
        x_tilde = each(args, Dec, each(args, Enc, x, y), y)
        found = {"value": (x_tilde - x).square().mean().item(), "unit": "squared error a pixel in [-1, 1]"}
        if Dis:
            found["Dis_l"] = distance(*(each(args, Dis.dis_l, t) for t in (x, x_tilde)))
        if names:
            found["regressor"] = distance(*(each(args, regressor.trunk, unit(t)) for t in (x, x_tilde)))
        results["vg-celeba-recon"] = found | looks(x_tilde)
    if Enc and names and not args.conditional:              # what an added vector adds to those without it
        edited = edit(args, Enc, Dec, pictures, min(200, len(x)))
        got = read(edited.flatten(0, 1)).unflatten(0, edited.shape[:2])                 # (n, 1 + A, A)
        lacks = (e["test_attributes"][:len(got)] <= a.mean(0)).float()
        rise = (got[:, 1:].diagonal(dim1=1, dim2=2) - got[:, 0]) * lacks
        rise = (rise.sum(0) / lacks.sum(0).clamp_min(1)).tolist()
        results["vg-attr"] = {"value": sum(rise) / len(rise), "unit": "rise of an added attribute in [0, 1]",
                              **dict(zip(names, rise))}
    if Dis and pictures.labels is not None:
        features, pixels = retrieval(args, Dis, pictures)
        results["vg-knn"] = {"value": features, "unit": "% error", "pixels": pixels}
        if pictures.name == "cifar10":
            results["vg-knn"] |= {"paper": 33.73, "paper pixels": 66.02}
    if args.z_dim == 2 and pictures.labels is not None and not args.conditional:
        classes = read(plane(args, Dec, 20).flatten(0, 1)).argmax(1).unique()
        results["deck-vae-gan"] = {"value": len(classes), "unit": f"of {len(names)} classes on the plane"}
    return results


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    args = parse_args(argv)
    r = run.Run(args)
    pictures = prepare(args, data.load(args.dataset, args.data_dir, args.net, CHANNELS[args.net]))
    y, test_y = pictures.extra["y"], pictures.extra["test_y"]
    batches = data.Batches(pictures.images, y, batch_size=args.batch_size, device=args.device, seed=args.seed,
                           scale=(-1.0, 1.0), rank=r.rank, world=r.world)
    parts, train_step = build(args, y.shape[1])
    Enc, Dec, Dis = (parts.get(name) for name in ("Enc", "Dec_bar", "Dis"))
    if args.model == "vae_dis" and not args.resume:
        run.fetch(args.dis, "a run with --model gan and this one's --net, --width and --conditional", Dis=Dis)
    r.keep(**parts, batches=batches)
    if args.sample:
        with r.aside():
            settled(args, Enc, Dec, pictures)
            return r.sample(lambda n: draw(args, Dec, some(test_y, n)), (-1, 1))
    if args.beside:
        others = (trained(args, where, y.shape[1]) for where in args.beside)
        return beside(r, [(args, Enc, Dec), *others], pictures)

    for _ in r.loop():
        r.log(train_step(*next(batches)))
        if r.every(args.save_every):
            with r.aside():
                settled(args, Enc, Dec, pictures)
                r.show("samples", log.grid(draw(args, Dec, some(test_y, 64)), 8, (-1, 1)))

    if r.lead:
        with r.aside():
            settled(args, Enc, Dec, pictures)
        figures(r, Enc, Dec, pictures)
        results = evaluate(r, Enc, Dec, Dis, pictures)
        sharp = args.model != "vaegan" or results["vg-celeba-recon"]["sharpness"] >= 0.5
        near = (args.model, pictures.name) != ("gan", "cifar10") or results["vg-knn"]["value"] <= 33.73
        r.results(results, passed=sharp and near)


if __name__ == "__main__":
    main()

"""Autoencoding beyond pixels using a learned similarity metric
Anders Boesen Lindbo Larsen, Soren Kaae Sonderby, Hugo Larochelle, Ole Winther, 2016.  arXiv:1512.09300

The decoder of a VAE is also the generator of a GAN.  Reconstructions are compared with the data in the
features of the GAN's discriminator instead of pixel by pixel.

    Eq. 1      z ~ Enc(x) = q(z|x), x~ ~ Dec(z) = p(x|z)                                -> sample_z()
    Eq. 3      L_llike^pixel = -E_q[log p(x|z)], p(x|z) = N(x | x~, I)                  -> L_llike()
    Eq. 4      L_prior = KL(q(z|x) || p(z)), p(z) = N(0, I)                             -> L_prior()
    Eq. 5, 10  L_GAN = log Dis(x) + log(1 - Dis(Dec(z_p))) + log(1 - Dis(Dec(Enc(x))))  -> L_GAN()
    Eq. 6, 7   L_llike^Dis_l = -E_q[log N(Dis_l(x) | Dis_l(x~), I)]                     -> L_llike()
    Eq. 8, 9   L = L_prior + L_llike^Dis_l + L_GAN; gamma weights L_llike for Dec       -> vaegan_step()
    Alg. 1     one step of Enc, Dec and Dis, each on its own part of L                  -> vaegan_step()
    Table 1    networks                                                                 -> table_1()
    Figs. 3-5  samples and reconstructions, also of several runs side by side           -> figures(), beside()
    Figs. 6, 7 visual attribute vectors, Sec. 4.1.1                                     -> attribute_vectors()
    Table 2    attributes of samples compared with the requested ones, Sec. 4.2         -> similarity()
    Sec. 4     5-nearest-neighbour error on features of Dis and on pixels               -> knn_error()

    python vaegan.py                                 (faces, Figs. 3, 4, 6; --paper: the published settings)
    python vaegan.py --conditional --name table2     (Table 2; also --model vae --name table2-vae, and gan)
    python vaegan.py --dataset cifar10 --model gan   (nearest neighbours)
    python vaegan.py --model gan --name gan          (then VAE_Dis, whose metric is the Dis of that run:)
    python vaegan.py --model vae_dis --dis runs/vaegan-faces-gan --name vae_dis
    python vaegan.py --resume runs/vaegan-faces --beside runs/vaegan-faces-gan runs/vaegan-faces-vae_dis
"""

from dataclasses import replace

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from common import UserError, data, export, log, metrics, run
from common.fuse import autocast, average, averaged, calibrate, descend, frozen, fuse, place, set_rate

# --------------------------------------------------------------------------------------------------- settings
# One row per picture size.  The paper gives networks for 64 x 64 and few settings (Sec. 4).  Where it is
# silent, PAPER follows the authors' code of February 2016, the date of arXiv's version 2:
# github.com/andersbll/autoencoding_beyond_pixels, commit 1906387, and deeppy, commit 2635737.

MODELS = {  # Sec. 4.1, with their networks; VAE/GAN_Dis0 is VAE/GAN with a pixel likelihood
    "vaegan": ("Enc", "Dec", "Dis"), "vae": ("Enc", "Dec"), "gan": ("Dec", "Dis"),
    "vae_dis": ("Enc", "Dec", "Dis"), "vaegan_dis0": ("Enc", "Dec", "Dis")}
PIXELS = ("vae", "vaegan_dis0")     # L_llike is Eq. 3; for the others, Eq. 7

CODE = dict(
    batch_size=64, lr=3e-4,         # Sec. 4: RMSProp
    loss="minimax",                 # Dec descends L_GAN; for Eq. 9's sign see vaegan_step
    steps=37500, anneal=True,       # aegan.py: 150 epochs of 250 batches, the rate falls to almost 0
    gamma=1e-5, terms=16384,        # celeba_aegan.py, for a sum over the 256 x 8 x 8 features of Dis_l
    weigh_real=1.0,                 # Eq. 10; the code has .66, for each fake .17, in Dis's gradient alone
    weight_decay=2e-5 / 64, eps=1e-8 / 64,      # deeppy: 2 x 1e-5 and 1e-8 for gradients summed over 64
    code_init=True,                 # deeppy/filler.py, deeppy/expr/nnet/batch_normalization.py
    noise=0.0, average=0.0, gating=False)       # model/aegan.py has gating, the paper does not mention it
PAPER = {
    "64": CODE | dict(net=64, channels=3, z_dim=128),                       # Table 1; z: celeba_aegan.py
    "32": CODE | dict(net=32, channels=3, z_dim=128, gamma=5e-6, terms=12288),      # cifar_aegan.py
    "28": CODE | dict(net=28, channels=1, z_dim=128),                       # no such VAE/GAN was published
}
STABLE = dict(
    gamma=5e-3, terms=16384,        # at 1e-5 Dec ignores L_llike: vg-lfw .659, less than the VAE's .694
    # Without loss, noise and EMA, samples are a pattern of noise (64 x 64, --gating, 3,000 steps).  Each
    # alone, `--quick --steps 1000` (noise .3, average .998), means of two seeds:
    loss="non-saturating",          # Frechet distance of samples 302; minimax 327, no clear difference
    noise=0.2,                      # squared error of reconstructions .050; .075 without
    average=0.999,                  # EMA: no difference there; the raw weights oscillate
    anneal=False,                   # squared error .050; .056 with the code's falling rate
    code_init=False)                # squared error .050; .065 with the code's start
TUNED = dict.fromkeys(PAPER, STABLE)
QUICK = {"32": dict(
    z_dim=64, width=0.25, batch_size=32, average=0.998, steps=2000, clf_steps=300,
    gamma=0.05, noise=0.3)}         # for short, narrow runs; no recorded run compares them with 5e-3 and .2


# --------------------------------------------------------------------------------------------------- networks

def conv(i, o):
    return nn.Conv2d(i, o, 5, 2, 2, bias=False)


def upconv(i, o):
    return nn.ConvTranspose2d(i, o, 5, 2, 2, output_padding=1, bias=False)


def bn(n):
    """BatchNorm and ReLU; eps here and in fc() as in the authors' code."""
    return nn.Sequential(nn.BatchNorm2d(n, eps=1e-6), nn.ReLU())


def fc(i, o):
    return nn.Sequential(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o, eps=1e-5), nn.ReLU())


def table_1(args, dy, ch):
    """64 x 64.  dy: number of attributes, an input of all three.  ch(n): n feature maps times --width."""
    enc = nn.Sequential(
        conv(3, ch(64)), bn(ch(64)),                                        # 64 x 32 x 32
        conv(ch(64), ch(128)), bn(ch(128)),                                 # 128 x 16 x 16
        conv(ch(128), ch(256)), bn(ch(256)), nn.Flatten())                  # 256 x 8 x 8
    Enc = Encoder(enc, ch(256) * 8 * 8, ch(2048), args.z_dim, dy)           # 2048, then mu and log sigma^2
    Dec = Decoder(
        fc(args.z_dim + dy, ch(256) * 8 * 8), nn.Unflatten(1, (ch(256), 8, 8)),     # 256 x 8 x 8
        upconv(ch(256), ch(256)), bn(ch(256)),                              # 256 x 16 x 16
        upconv(ch(256), ch(128)), bn(ch(128)),                              # 128 x 32 x 32
        upconv(ch(128), ch(32)), bn(ch(32)),                                # 32 x 64 x 64
        nn.Conv2d(ch(32), 3, 5, padding=2), nn.Tanh())                      # 3 x 64 x 64
    dis_l = nn.Sequential(
        nn.Conv2d(3, ch(32), 5, padding=2), nn.ReLU(),                      # 32 x 64 x 64
        conv(ch(32), ch(128)), bn(ch(128)),                                 # 128 x 32 x 32
        conv(ch(128), ch(256)), bn(ch(256)),                                # 256 x 16 x 16
        conv(ch(256), ch(256)))                                             # 256 x 8 x 8: Dis_l
    above = nn.Sequential(bn(ch(256)), nn.Flatten())
    return Enc, Dec, Discriminator(dis_l, above, ch(256) * 8 * 8, ch(512), dy)      # 512, 1


class Encoder(nn.Module):
    """Enc(x, y) = (mu, log sigma^2) of q(z|x), each (n, dz); y (n, dy) is appended before the top layer."""

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


def networks(args, dy=0):
    """(Enc, Dec, Dis) for pictures of --net x --net pixels and dy attributes."""
    table = {64: table_1, 32: networks_32, 28: networks_28}
    nets = table[args.net](args, dy, lambda n: max(8, round(n * args.width)))
    return [net.apply(lambda module: init(module, args)) for net in nets]


def init(module, args):
    """Weights Unif(-b, b) with b^2 = 1 / (3 fan-in), biases 0, BatchNorm's scale 1.

    args.code_init: as in deeppy, which uses the fan-out of a transposed convolution as its fan-in and draws
    BatchNorm's scale from Unif(0, 1).
    """
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        inputs = module.weight[0].numel()
        if isinstance(module, nn.ConvTranspose2d) and not args.code_init:
            inputs = module.in_channels * 25 / 4            # a pixel uses a quarter of the 5 x 5 weights
        nn.init.uniform_(module.weight, -(3 * inputs) ** -0.5, (3 * inputs) ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and args.code_init:
        nn.init.uniform_(module.weight)


# ---------------------------------------------------------------------------------------------------- latents

def sample_z(mu, log_var):
    """Eq. 1: z = mu + sigma eps, eps ~ N(0, I); all (n, dz).  z = mu where log sigma^2 = -inf."""
    return mu + (0.5 * log_var).exp() * torch.randn_like(mu)


# -------------------------------------------------------------------------------------------------- objective

def L_prior(mu, log_var):
    """Eq. 4: KL(N(mu, sigma^2) || N(0, 1)) in nats, summed over z (n, dz), mean over n.

    1/2 for each mu = 1, sigma = 1.
    """
    return -0.5 * (1 + log_var - mu ** 2 - log_var.exp()).sum(1).mean()


def L_llike(f, f_tilde):
    """Eqs. 3, 7: -log N(f; f~, I) without its constant, summed over features, mean over n; f, f~ (n, ...).

    1/2 for each feature that is off by 1.
    """
    return 0.5 * (f.float() - f_tilde.float()).square().flatten(1).sum(1).mean()


def L_GAN(a, *a_fake, real=1.0):
    """Eqs. 5, 10: real * log Dis(x) plus log(1 - Dis(x~)) for each kind of fake; logits a (n,), means over n.

    -log 8 for two kinds where Dis = 1/2 everywhere.
    """
    return real * F.logsigmoid(a.float()).mean() + sum(F.logsigmoid(-b.float()).mean() for b in a_fake)


def log_D(*a_fake):
    """What Dec ascends by default instead of -L_GAN: log Dis(x~) for each kind of fake; logits (n,), means.

    -2 log 2 for two kinds where Dis = 1/2 everywhere.
    """
    return sum(F.logsigmoid(a.float()).mean() for a in a_fake)


# --------------------------------------------------------------------------------------------------- training

def build(args, dy):
    """Networks (with Dec_bar, the EMA of Dec) and optimizers by name, and the model's fused step."""
    nets = dict(zip(("Enc", "Dec", "Dis"), networks(args, dy)))
    nets = {name: nets[name] for name in MODELS[args.model]} | {"Dec_bar": averaged(nets["Dec"])}
    nets = dict(zip(nets, place(args, *nets.values())))
    Enc, Dec, Dis, Dec_bar = (nets.get(name) for name in ("Enc", "Dec", "Dis", "Dec_bar"))
    learn = [name for name in MODELS[args.model] if (args.model, name) != ("vae_dis", "Dis")]
    if args.model == "vae_dis":
        Dis.eval()                                          # a fixed metric: use its running statistics
    opts = {f"opt_{name}": RMSProp(decayed(nets[name], args), args.lr, eps=args.eps) for name in learn}
    opt_Enc, opt_Dec, opt_Dis = (opts.get(f"opt_{name}") for name in ("Enc", "Dec", "Dis"))
    amp, pixels, minimax = autocast(args), args.model in PIXELS, args.loss == "minimax"

    @fuse(args)
    def vaegan_step(x, y):                                  # Alg. 1; x (n, C, H, W) in [-1, 1], y (n, dy)
        n = len(x)
        with amp:
            mu, log_var = (t.float() for t in Enc(x, y))                    # Z <- Enc(X)
            z, z_p = sample_z(mu, log_var), torch.randn_like(mu)            # Z_p <- N(0, I)
            x_fake = Dec(torch.cat([z, z_p]), y.repeat(2, 1))               # X~ and X_p <- Dec(Z), Dec(Z_p)
            a, f = Dis_sees(Dis, x, x_fake, y, args)                        # Dis and Dis_l of X, X~, X_p
        a, a_tilde, a_p = a.split(n)
        f, f_tilde = (x, x_fake[:n]) if pixels else (f[:n].detach(), f[n:2 * n])    # Dis_l(x) is a constant
        prior, llike = L_prior(mu, log_var), L_llike(f, f_tilde)
        gan = L_GAN(a, a_tilde, a_p, real=args.weigh_real)                  # Eq. 10
        # All gradients are taken at the old parameters; each network descends its own terms only (Eq. 9).
        # Dis ascends L_GAN, a log-likelihood, Dec descends it.  Eq. 9 and Alg. 1 print the opposite signs.
        scalars = {"L_prior": prior, "L_llike": llike, "L_GAN": gan} | watch(a, a_p)
        if args.gating:                                     # authors' code, not in the paper
            scalars |= gate(opt_Dis, opt_Dec, a, a_p, a_tilde)
        descend(prior + llike, opt_Enc,
                gamma(args, f) * llike + (gan if minimax else -log_D(a_tilde, a_p)), opt_Dec,
                -gan, opt_Dis)
        average(Dec_bar, Dec, args.average)
        return scalars

    @fuse(args)
    def gan_step(x, y):                                     # Eq. 5
        with amp:
            x_p = Dec(torch.randn(len(x), args.z_dim, device=x.device), y)
            a, a_p = Dis_sees(Dis, x, x_p, y, args)[0].chunk(2)
        gan = L_GAN(a, a_p)
        scalars = {"L_GAN": gan} | watch(a, a_p)
        if args.gating:                                     # authors' code, not in the paper
            scalars |= gate(opt_Dis, opt_Dec, a, a_p)
        descend(gan if minimax else -log_D(a_p), opt_Dec, -gan, opt_Dis)
        average(Dec_bar, Dec, args.average)
        return scalars

    @fuse(args)
    def vae_step(x, y):                                     # Eq. 2; VAE_Dis_l: Eq. 7 with a fixed Dis
        with amp:
            mu, log_var = (t.float() for t in Enc(x, y))
            x_tilde = Dec(sample_z(mu, log_var), y)
        f, f_tilde = x, x_tilde
        if not pixels:
            with amp, frozen(Dis):
                f, f_tilde = Dis(torch.cat([x, x_tilde]), y.repeat(2, 1))[1].chunk(2)
        prior, llike = L_prior(mu, log_var), L_llike(f, f_tilde)
        descend(prior + llike, opt_Enc, llike, opt_Dec)
        average(Dec_bar, Dec, args.average)
        return {"L_prior": prior, "L_llike": llike}

    step = {"gan": gan_step, "vae": vae_step, "vae_dis": vae_step}.get(args.model, vaegan_step)
    return nets | opts, step


def main(argv=None):
    args = parse_args(argv)
    r = run.Run(args)
    if r.drawing:
        return export.main(r, drawer)
    pictures = prepare(args, data.load(args.dataset, args.data_dir, args.net, args.channels,
                                       skip_bad=args.skip_bad))
    y, test_y = pictures.extra["y"], pictures.extra["test_y"]
    batches = data.Batches(pictures.images, y, scale=(-1.0, 1.0), **r.feed)
    parts, train_step = build(args, y.shape[1])
    Enc, Dec, Dis = (parts.get(name) for name in ("Enc", "Dec_bar", "Dis"))
    if args.model == "vae_dis" and not args.resume:
        run.fetch(args.dis, "a run with --model gan and this one's --net, --width and --conditional", Dis=Dis)
    r.keep(lambda: about_data(args, Enc, Dec, pictures), **parts, batches=batches)
    if args.beside:
        others = (trained(args, where, y.shape[1]) for where in args.beside)
        return beside(r, [(args, Enc, Dec), *others], pictures)

    for step in r.loop():
        for name in MODELS[args.model]:
            if f"opt_{name}" in parts:
                set_rate(parts[f"opt_{name}"], rate(args, step))
        r.log(train_step(*next(batches)))
        if r.draws():
            with r.aside():
                settled(args, Enc, Dec, pictures)
                r.show("samples", log.grid(draw(args, Dec, pick(test_y, 64)), 8, (-1, 1)))

    if r.lead:
        report(r, Enc, Dec, Dis, pictures)


# =========================================================================== Figures and numbers of the paper

def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="faces")
    add = p.add_argument_group("VAE/GAN").add_argument
    positive, weight = run.number(float, 0, open_low=True), run.number(float, 0)
    add("--model", choices=MODELS, default="vaegan", help="one of the models of Sec. 4.1 [%(default)s]")
    add("--net", type=int, choices=(64, 32, 28),
        help="picture size: 64 (Table 1), 32 or 28 [32 or 28 for named data sets of that size, else 64]")
    add("--width", type=positive, default=1.0, help="feature maps and units, as a fraction of the paper's")
    add("--z-dim", type=run.number(int, 1),
        help="size of z; with 2, also draw the plane [128]")
    add("--gamma", type=weight,
        help="weight of L_llike in Dec's step, Eq. 9, Fig. 5; the default is for 16,384 features and scaled "
        "to the network's, a given value is not [5e-3; --paper: 1e-5, at 32x32 5e-6 for 12,288]")
    add("--loss", choices=("minimax", "non-saturating"),
        help="Dec's adversarial loss: L_GAN (Eq. 9) or -log Dis(x~) [non-saturating; --paper: minimax]")
    add("--noise", type=weight, help="std of the Gaussian noise on Dis's input in training [.2; --paper: 0]")
    add("--average", type=run.number(float, 0, 1),
        help="decay of the EMA of Dec, which draws; 0: no EMA [.999; --paper: 0]")
    add("--gating", action="store_true", default=None,
        help="skip the step of Dis or Dec when it is far ahead")
    add("--conditional", action="store_true", help="attributes are an input of all networks, Sec. 4.2")
    add("--dis", metavar="RUN", help="for vae_dis: the GAN run whose Dis is the fixed metric")
    add("--lr", type=positive, help="RMSProp's learning rate [3e-4]")
    add("--beside", metavar="RUN", nargs="+",
        help="with --resume: Figs. 3-5 comparing that run with these, of any --model and --gamma")
    p.set_defaults(clf_steps=None)                          # evaluation classifier; None: its default
    args = run.parse(p, argv, free=("beside",), experiment=experiment, paper=PAPER, tuned=TUNED, quick=QUICK)
    if args.beside and not args.resume:
        p.error("--beside needs --resume RUN: the run to compare the others with")
    if not args.resume and (args.model == "vae_dis") != bool(args.dis):
        p.error("--model vae_dis and --dis RUN need each other: train the GAN first, with --model gan")
    if args.gating and args.model in ("vae", "vae_dis"):
        p.error(f"--gating needs a Dis to train: --model {args.model} trains none")
    if "gamma" in args.given:
        args.terms = None                                   # use it unscaled, for any number of features
    if args.gating and not args.resume:
        args.weigh_real = 2.0       # as both fakes together: equilibrium at Dis = 1/2, as in gates()
    return args


def experiment(args):
    """The row of PAPER and TUNED: the picture size, 64 (--quick: 32) except for data sets of smaller
    pictures."""
    small = {"cifar10": 32, "cifar100": 32, "svhn": 32, "mnist": 28, "fashion-mnist": 28, "kmnist": 28}
    return str(args.net or small.get(args.dataset, 32 if args.quick else 64))


# ------------------------------------------------------- the authors' optimizer, what TUNED adds to the paper

class RMSProp(torch.optim.Optimizer):
    """s <- .9 s + .1 g^2, theta <- theta - lr g / (sqrt s + eps), g with weight decay.

    groups: [{"params": ..., "weight_decay": ...}], see decayed().

    `gate` in `param_groups` is a 0-dim tensor.  While it is 0, a step leaves theta and s unchanged, whereas
    torch.optim.RMSprop would still update s.  Set it in place, so that it works in a CUDA graph too.
    """

    def __init__(self, groups, lr, eps):
        lr, gate = (torch.tensor(v, device=groups[0]["params"][0].device) for v in (lr, 1.0))
        super().__init__(groups, {"lr": lr, "gate": gate})
        self.eps, self.decays = eps, [group.pop("weight_decay") for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["s"] = torch.zeros_like(p)

    def update(self, grads):
        grads = iter(grads)
        for group, decay in zip(self.param_groups, self.decays):
            params, gate = group["params"], group["gate"]
            s = [self.state[p]["s"] for p in params]
            g = torch._foreach_add([next(grads) for _ in params], params, alpha=decay)
            torch._foreach_mul_(s, 1 - 0.1 * gate)
            torch._foreach_add_(s, torch._foreach_mul(torch._foreach_mul(g, g), 0.1 * gate))
            root = torch._foreach_sqrt(s)
            torch._foreach_add_(root, self.eps)
            torch._foreach_div_(g, root)
            torch._foreach_sub_(params, torch._foreach_mul(g, group["lr"] * gate))


def decayed(net, args):
    """Parameter groups of `net`: weights with args.weight_decay; biases, BatchNorm and the layers of mu and
    log sigma^2 without (architectures.py, model/ae.py)."""
    named = [(p.ndim > 1 and name.split(".")[0] not in ("mu", "log_var"), p)
             for name, p in net.named_parameters()]
    return [{"params": [p for yes, p in named if yes == on], "weight_decay": args.weight_decay * on}
            for on in (True, False)]


def rate(args, step):
    """RMSProp's learning rate in step 1, 2, ...: constant or, with args.anneal, as in the authors' code.

    There it is lr - (e / E)^.75 (lr - 1e-5 / 64) in epoch e of E; an epoch is 250 steps.
    """
    if not args.anneal:
        return args.lr
    return args.lr - ((step - 1) // 250 * 250 / args.steps) ** 0.75 * (args.lr - 1e-5 / 64)


def gamma(args, f):
    """gamma of Eq. 9 for features or pixels f (n, ...), rescaled from a sum of `args.terms` terms."""
    return args.gamma if args.terms is None else args.gamma * args.terms / f[0].numel()


def Dis_sees(Dis, x, x_fake, y, args):
    """a (n + m,) and Dis_l of x and x_fake in one batch (authors' code), so that BatchNorm does not hide
    differences in brightness and contrast.

    x (n, C, H, W), x_fake (m, C, H, W) with m = n or 2 n.  --noise adds the same noise to each x and its
    fakes.  Without noise Dis wins on high-frequency texture, and Dec draws nothing else.
    """
    k = 1 + len(x_fake) // len(x)
    both = torch.cat([x, x_fake])
    if args.noise:
        both = both + (args.noise * torch.randn_like(x)).repeat(k, 1, 1, 1)
    return Dis(both, y.repeat(k, 1))


def gates(a, *a_fake):
    """(gate of Dis, gate of Dec), 0-dim and 0 or 1: a network that is far ahead skips a step (authors' code).

    Dis skips if its cost on data or on fakes is below .68 - .35, Dec if either is above .68 + .35, neither
    if both would.  At Dis = 1/2, where costs are log 2 = .69, neither skips.
    """
    costs = -torch.stack([F.logsigmoid(a.float()).mean(), L_GAN(a, *a_fake, real=0.0) / len(a_fake)]).detach()
    if dist.is_initialized():                               # all ranks gate alike
        dist.all_reduce(costs)
        costs /= dist.get_world_size()
    skip_Dis, skip_Dec = (costs < 0.33).any(), (costs > 1.03).any()
    both = skip_Dis & skip_Dec
    return (~skip_Dis | both).float(), (~skip_Dec | both).float()


def gate(opt_Dis, opt_Dec, a, *a_fake):
    """--gating: set the optimizers' gates for this step, and return them as scalars for the log."""
    found = gates(a, *a_fake)
    for opt, is_open in zip((opt_Dis, opt_Dec), found):
        for group in opt.param_groups:
            group["gate"].copy_(is_open)
    return dict(zip(("Dis steps", "Dec steps"), found))


def watch(a, a_p):
    """Means of Dis = sigmoid(a) for the log, logits a (n,)."""
    return {"Dis(x)": a.float().sigmoid().mean(), "Dis(x_p)": a_p.float().sigmoid().mean()}


# ------------------------------------------------------------------------------- networks of smaller pictures

def networks_32(args, dy, ch):
    """32 x 32 (architectures.py): Table 1 down to 4 x 4, with 1024 units on top of Enc and 192 maps in Dis_l.

    Dis_l is the second strided convolution: 8 x 8, as in Table 1.
    """
    enc = nn.Sequential(
        conv(3, ch(64)), bn(ch(64)),                                        # 64 x 16 x 16
        conv(ch(64), ch(128)), bn(ch(128)),                                 # 128 x 8 x 8
        conv(ch(128), ch(256)), bn(ch(256)), nn.Flatten())                  # 256 x 4 x 4
    Enc = Encoder(enc, ch(256) * 4 * 4, ch(1024), args.z_dim, dy)           # 1024, then mu and log sigma^2
    Dec = Decoder(
        fc(args.z_dim + dy, ch(256) * 4 * 4), nn.Unflatten(1, (ch(256), 4, 4)),     # 256 x 4 x 4
        upconv(ch(256), ch(192)), bn(ch(192)),                              # 192 x 8 x 8
        upconv(ch(192), ch(128)), bn(ch(128)),                              # 128 x 16 x 16
        upconv(ch(128), ch(32)), bn(ch(32)),                                # 32 x 32 x 32
        nn.Conv2d(ch(32), 3, 5, padding=2), nn.Tanh())                      # 3 x 32 x 32
    dis_l = nn.Sequential(
        nn.Conv2d(3, ch(32), 5, padding=2), nn.ReLU(),                      # 32 x 32 x 32
        conv(ch(32), ch(128)), bn(ch(128)),                                 # 128 x 16 x 16
        conv(ch(128), ch(192)))                                             # 192 x 8 x 8: Dis_l
    above = nn.Sequential(bn(ch(192)), conv(ch(192), ch(256)), bn(ch(256)), nn.Flatten())       # 256 x 4 x 4
    return Enc, Dec, Discriminator(dis_l, above, ch(256) * 4 * 4, ch(512), dy)


def networks_28(args, dy, ch):
    """28 x 28: two strided convolutions; Dis_l is the second: 7 x 7, the closest to Table 1's 8 x 8.

    Neither the paper nor the authors' code has a VAE/GAN of this size.
    """
    enc = nn.Sequential(
        conv(1, ch(32)), bn(ch(32)),                                        # 32 x 14 x 14
        conv(ch(32), ch(64)), bn(ch(64)), nn.Flatten())                     # 64 x 7 x 7
    Enc = Encoder(enc, ch(64) * 7 * 7, ch(512), args.z_dim, dy)             # 512, then mu and log sigma^2
    Dec = Decoder(
        fc(args.z_dim + dy, ch(64) * 7 * 7), nn.Unflatten(1, (ch(64), 7, 7)),       # 64 x 7 x 7
        upconv(ch(64), ch(64)), bn(ch(64)),                                 # 64 x 14 x 14
        upconv(ch(64), ch(32)), bn(ch(32)),                                 # 32 x 28 x 28
        nn.Conv2d(ch(32), 1, 5, padding=2), nn.Tanh())                      # 1 x 28 x 28
    dis_l = nn.Sequential(
        nn.Conv2d(1, ch(16), 5, padding=2), nn.ReLU(),                      # 16 x 28 x 28
        conv(ch(16), ch(64)), bn(ch(64)),                                   # 64 x 14 x 14
        conv(ch(64), ch(128)))                                              # 128 x 7 x 7: Dis_l
    above = nn.Sequential(bn(ch(128)), nn.Flatten())
    return Enc, Dec, Discriminator(dis_l, above, ch(128) * 7 * 7, ch(256), dy)


# ------------------------------------------------------------------------------------------------------- data

def prepare(args, pictures):
    """The data set with a test part; `extra` has attributes (N, A) in [0, 1] and y (N, dy) for both parts.

    Attributes are the set's own and its factors of variation, else its one-hot labels, else none.  y, the
    networks' input, has mean 0 and variance 1; dy = 0 without --conditional.  If the set has no test part, or
    one without attributes, the last tenth is held out, at most 2,000.  Raises UserError for attributes of
    another shape, and for --conditional without attributes.
    """
    extra, labels, test_labels = dict(pictures.extra), pictures.labels, pictures.test_labels
    n, keys = len(pictures.images), [key for key in ("attributes", "factors") if key in extra]
    for key in keys:
        if not torch.is_tensor(extra[key]) or extra[key].shape[:-1] != (n,):
            raise UserError(f"{args.dataset}: {key} are not numbers of shape ({n}, A), a row per picture")
    lacking = pictures.test_images is not None and (labels is None or test_labels is None or not (
        0 <= test_labels.min() <= test_labels.max() <= labels.max()))
    stay = n if pictures.test_images is not None else data.cut(n, 2000, 10)
    tell = labels is not None and data.tell(labels[:stay])
    if not tell or lacking or not 0 <= labels.min() <= labels.max() < 100:
        labels = test_labels = None                         # one class, too many, or test labels do not fit
    if labels is not None and not keys:
        keys, extra["attribute_names"] = ["attributes"], pictures.classes or []
        extra["attributes"] = F.one_hot(labels, int(labels.max()) + 1)
        if test_labels is not None:
            extra["test_attributes"] = F.one_hot(test_labels, int(labels.max()) + 1)
    pictures = replace(pictures, labels=labels, test_labels=test_labels)
    if pictures.test_images is None or not all(f"test_{key}" in extra for key in keys):
        n = data.cut(n, 2000, 10)
        parts = {"images": pictures.images} | ({} if labels is None else {"labels": labels})
        pictures = replace(pictures, **{k: t[:n] for k, t in parts.items()},
                           **{f"test_{k}": t[n:] for k, t in parts.items()})
        extra |= {f"test_{key}": extra[key][n:] for key in keys} | {key: extra[key][:n] for key in keys}
    a, a_test = (torch.cat([torch.zeros(len(x), 0), *(extra[part + key].float() for key in keys)], 1)
                 for part, x in (("", pictures.images), ("test_", pictures.test_images)))
    names = [name for key in keys for name in extra.get(f"{key[:-1]}_names", [])]
    if len(names) != a.shape[1]:
        names = [f"attribute {i}" for i in range(a.shape[1])]
    if keys:                                                # drop attributes that all pictures share
        differ = (a != a[:1]).any(0)
        names = [name for name, d in zip(names, differ) if d]
        a, a_test = a[:, differ], a_test[:, differ]
    if args.conditional and not names:
        raise UserError(f"{args.dataset} has neither attributes nor labels that differ: --conditional needs "
                        "them")
    if names:
        low, high = torch.cat([a, a_test]).aminmax(dim=0)
        a, a_test = ((t - low) / (high - low).clamp_min(1e-6) for t in (a, a_test))
    y, test_y = (standard(t, a) if args.conditional else t[:, :0] for t in (a, a_test))
    return replace(pictures, extra={"attributes": a, "test_attributes": a_test, "names": names, "y": y,
                                    "test_y": test_y})


def standard(a, train):
    """Attributes a (..., A), standardized by mean and standard deviation of train (N, A); on the CPU."""
    return (a.cpu() - train.mean(0)) / train.std(0, correction=0).clamp_min(1e-6)


# ------------------------------------------------------------------------------------------------ the figures

def scaled(args, images):
    """Pictures (N, C, H, W), uint8 or in [-1, 1], on the device in [-1, 1]."""
    return metrics.batched(lambda x: x.to(args.device), images, scale=(-1.0, 1.0))


def encode(Enc, x, y):
    """mu (N, dz) of q(z|x) for pictures x (N, C, H, W), uint8 or in [-1, 1], and y (N, dy)."""
    return metrics.batched(Enc, x, y, scale=(-1.0, 1.0))[0]


def draw(args, Dec, y, k=1):
    """k pictures of z_p ~ N(0, I) for each row of y (n, dy): (n k, C, H, W) in [-1, 1]."""
    y = y.repeat_interleave(k, 0)
    return metrics.batched(Dec, torch.randn(len(y), args.z_dim, device=args.device), y)


def draw_q(args, Enc, Dec, pictures, y):
    """Like draw(), but z ~ N(m, C) with the mean m and the covariance C of the aggregated posterior q(z).
    Returns the pictures and C (dz, dz), which is I if q(z) = p(z)."""
    x, y_x = pictures.images[:10000], pictures.extra["y"][:10000]
    mu, log_var = metrics.batched(Enc, x, y_x, scale=(-1.0, 1.0))
    cov = (mu.T.cov() + log_var.exp().mean(0).diag()).cpu().double()
    metrics.finite(cov)
    root = torch.linalg.cholesky(cov).T.float().to(mu.device)
    z = mu.mean(0) + torch.randn(len(y), len(root), device=mu.device) @ root
    return metrics.batched(Dec, z, y), cov


def pick(y, n):
    """n random rows of y."""
    return y[torch.randint(len(y), (n,))]


def settled(args, Enc, Dec, pictures):
    """Recompute BatchNorm's running statistics for Dec, the EMA, on 20 batches: those of the raw weights
    overestimate its variance.

    A batch holds what the figures decode: mu of pictures and z_p, half each, and without Enc z_p alone.
    """
    def minibatches():
        for i in torch.randint(len(pictures.images), (20, args.batch_size)):
            y = pictures.extra["y"][i].to(args.device)
            z = torch.randn(len(i), args.z_dim, device=args.device)
            if Enc:
                z, y = torch.cat([encode(Enc, pictures.images[i], y), z]), y.repeat(2, 1)
            yield z, y

    return calibrate(Dec, minibatches())


def about_data(args, Enc, Dec, pictures):
    """Call settled(); return what drawer() needs: rows of y, names and statistics of the attributes and, if y
    is no input of Dec, their vectors from 2,000 pictures."""
    settled(args, Enc, Dec, pictures)
    e, n = pictures.extra, 2000
    a = e["attributes"]
    found = {"names": e["names"] if Enc or args.conditional else [], "y": e["test_y"][:n]}
    if args.conditional:
        found |= {"mean": a.mean(0), "std": a.std(0, correction=0).clamp_min(1e-6)}
    elif found["names"]:
        mu = encode(Enc, pictures.images[:n], e["y"][:n])
        found["vectors"] = attribute_vectors(mu, a[:n].to(mu))
    return found


def drawer(args, saved):
    """Drawer of a trained run.  Inputs: z and, with --conditional, attributes in [0, 1], else the amount of
    each attribute vector (Sec. 4.1.1) to add to z."""
    about = saved["about"]
    names, y = about["names"], about["y"].to(args.device)
    _, Dec, _ = networks(args, y.shape[1])
    if args.conditional:
        mean, std = (about[key].to(args.device) for key in ("mean", "std"))
        return export.Drawer(
            lambda z, a: Dec(z, (a - mean) / std),
            lambda n: (torch.randn(n, args.z_dim, device=args.device),
                       (pick(y, n) * std + mean).round(decimals=6)),
            {"Dec_bar": Dec}, {"z": [], "a": [export.Knob(name) for name in names]}, (-1.0, 1.0))
    vectors = about.get("vectors", torch.zeros(0, args.z_dim)).to(args.device)

    def draws(n):
        z = torch.randn(n, args.z_dim, device=args.device)
        return z, z.new_zeros(n, len(vectors))

    return export.Drawer(
        lambda z, a: Dec(z + a @ vectors, z[:, :0]), draws, {"Dec_bar": Dec},
        {"z": [], "a": [export.Knob(name, -1.5, 1.5, start=0) for name in names]}, (-1.0, 1.0))


def plane(args, Dec, n):
    """Pictures (n, n, C, H, W) of z = (z1, z2) on a grid over [-1.5, 1.5]^2, z1 to the right and z2 up."""
    t = torch.linspace(-1.5, 1.5, n, device=args.device)
    z = torch.cartesian_prod(t.flip(0), t).flip(1)          # (z1, z2), row by row from the top
    return metrics.batched(Dec, z, z[:, :0]).unflatten(0, (n, n))


def attribute_vectors(mu, a):
    """Sec. 4.1.1: mean of mu (N, dz) over pictures with an attribute minus that without: (A, dz); a (N, A).

    A picture has an attribute if its value is above the mean.  1 for mu = a with one binary attribute.
    """
    on = (a > a.mean(0)).to(mu).T
    with_it, without = (w @ mu / w.sum(1, keepdim=True).clamp_min(1) for w in (on, 1 - on))
    return with_it - without


def edit(Enc, Dec, pictures, n):
    """Figs. 6, 7: reconstructions of n test pictures, and with each attribute added: (n, 1 + A, C, H, W)."""
    e = pictures.extra
    mu = encode(Enc, pictures.images[:10000], e["y"][:10000])               # as many as in the authors' code
    z = encode(Enc, pictures.test_images[:n], e["test_y"][:n])[:, None]
    z = torch.cat([z, z + attribute_vectors(mu, e["attributes"][:10000].to(mu))], 1)
    return metrics.batched(Dec, z.flatten(0, 1), z.flatten(0, 1)[:, :0]).unflatten(0, z.shape[:2])


def figures(r, Enc, Dec, pictures):
    """Draw the paper's figures for this model and data set into the run's folder."""
    args, y = r.args, pictures.extra["test_y"]
    n = min(16, len(y) // 8 * 8 or len(y))
    x = scaled(args, pictures.test_images[:n])

    def show(title, rows):                                  # (rows, columns, C, H, W)
        r.show(title, log.grid(rows.flatten(0, 1), rows.shape[1], (-1, 1)))

    with r.aside():
        show("fig3", draw(args, Dec, pick(y, 64)).unflatten(0, (8, 8)))
        if args.conditional:                                # a test picture, samples with its attributes
            show("queries", torch.cat([x[:8, None], draw(args, Dec, y[:8], 9).unflatten(0, (-1, 9))], 1))
    if Enc:                                                 # originals above their reconstructions
        pairs = zip(x.split(8), metrics.batched(Dec, encode(Enc, x, y[:n]), y[:n]).split(8))
        r.show("fig4", log.grid(torch.cat([part for pair in pairs for part in pair]), len(x[:8]), (-1, 1)))
    if Enc and pictures.extra["names"] and not args.conditional:
        show("fig6", torch.cat([x[:8, None], edit(Enc, Dec, pictures, 8)], 1))
    if args.z_dim == 2 and not args.conditional:
        show("plane", plane(args, Dec, 20))


def trained(args, where, dy):
    """(settings, Enc or None, EMA of Dec) of the run `where`, of this run's data and picture size."""
    other = parse_args(["--resume", where])
    for k in ("dataset", "net", "conditional"):
        found, expected = getattr(other, k), getattr(args, k)
        if found != expected:
            raise UserError(f"{where} was run with --{k} {found}, {expected} expected, as in {args.resume}")
    other.device = args.device
    nets = {name: net for name, net in build(other, dy)[0].items() if name in ("Enc", "Dec_bar")}
    run.fetch(where, "a vaegan run past its first checkpoint", args.device, **nets)
    return other, nets.get("Enc"), nets["Dec_bar"]


def beside(r, runs, pictures):
    """--beside: Figs. 3-5 with a block or row for each (settings, Enc or None, Dec) in `runs`."""
    y, x = pictures.extra["test_y"], scaled(r.args, pictures.test_images[:8])
    samples, rows = [], [("data", x)]
    for args, Enc, Dec in runs:
        name = args.model + (f", gamma {args.gamma:g}" if "gamma" in args.given else "")
        with r.aside():
            settled(args, Enc, Dec, pictures)
        with r.aside():                                     # the same z for runs of the same --z-dim
            samples.append((name, draw(args, Dec, pick(y, 24))))
        if Enc:
            rows.append((name, metrics.batched(Dec, encode(Enc, x, y[:8]), y[:8])))
    for title, blocks in (("beside_fig3", samples), ("beside_fig4", rows)):
        if len(blocks) > 1:                                 # a GAN has no reconstructions
            names, blocks = zip(*blocks)
            r.show(title, log.with_captions([log.grid(b, min(8, len(b)), (-1, 1)) for b in blocks], names))
    log.say(f"from top to bottom {', '.join(map(str, [r.folder, *r.args.beside]))}: {r.folder}/beside_*.png")


# ------------------------------------------------------------------------------------------------ the numbers

def published(args, pictures):
    """The paper's values for this run's data, network and protocol: experiment id -> dict.

    Table 2 has no entry: the paper reads attributes with a regressor like Enc, here a small classifier does.
    """
    found = {}
    if (pictures.name, len(pictures.images), len(pictures.test_images)) == ("cifar10", 50000, 10000):
        found["vg-knn"] = {"paper pixels": 66.02}
        if (args.model, args.net, args.width) == ("gan", 32, 1.0):
            found["vg-knn"]["paper"] = 33.73
    return found


def sharpness(x):
    """Variance of the Laplacian in grey, mean over pictures (n, C, H, W).  0 for a linear gradient."""
    x = x.float().mean(1)
    lap = 4 * x[:, 1:-1, 1:-1] - x[:, :-2, 1:-1] - x[:, 2:, 1:-1] - x[:, 1:-1, :-2] - x[:, 1:-1, 2:]
    return lap.flatten(1).var(1, correction=0).mean().item()


def distance(f, f_tilde):
    """Squared distance of f~ from f (n, ...), relative to that of the next picture's f.  0 for f~ = f."""
    return ((f - f_tilde).square().mean() / (f - f.roll(1, 0)).square().mean()).item()


def similarity(read, y):
    """Table 2: (mean cosine of the best of k samples, their mean squared error summed over attributes).

    read (N, k, A): predicted attributes of k samples for each y (N, A).  (1, 0) if one of each k matches y.
    """
    cosine, best = F.cosine_similarity(read, y[:, None], dim=2).max(1)
    error = (read[torch.arange(len(y)), best] - y).square().sum(1)
    return cosine.mean().item(), error.mean().item()


def knn_error(f, labels, f_test, test_labels, k=5):
    """Error in % of k-nearest-neighbour classification of f_test (M, d) by f (N, d), Euclidean.

    Ties go to the smallest label, as in scikit-learn.  This gives the paper's 66.02 on pixels of CIFAR-10;
    with ties to the nearest neighbour it is 64.44.  0 for f_test = f, k = 1.
    """
    labels, k, mean = labels.to(f.device), min(k, len(f)), f_test.mean(0)
    f, f_test = f - mean, f_test - mean                     # distances stay, rounding errors shrink
    metrics.finite(f, f_test)
    half = 0.5 * f.square().sum(1)
    wrong = 0
    for q, y in zip(f_test.split(500), test_labels.to(f.device).split(500)):
        near = labels[torch.addmm(half, q, f.T, alpha=-1).topk(k, largest=False).indices]
        wrong += (F.one_hot(near, int(labels.max()) + 1).sum(1).argmax(1) != y).sum().item()
    return 100 * wrong / len(f_test)


def retrieval(args, Dis, pictures):
    """vg-knn: errors in %, on the last convolution of Dis after its ReLU, and on pixels.

    The paper does not name the layer.
    """
    for net in (nn.Sequential(Dis.dis_l, Dis.above), lambda x: x.to(args.device).flatten(1)):
        f, f_test = (metrics.batched(net, x, scale=(-1.0, 1.0))
                     for x in (pictures.images[:50000], pictures.test_images[:10000]))
        yield knn_error(f, pictures.labels[:50000], f_test, pictures.test_labels[:10000])


def evaluate(r, Enc, Dec, Dis, pictures):
    """Numbers for this model and data set: experiment id -> dict with "value" and, if known, "paper"."""
    args, e, results = r.args, pictures.extra, {}
    a, names, y, test = e["attributes"], e["names"], e["test_y"][:2000], pictures.test_images[:2000]
    x = scaled(args, test)
    if names:
        regressor = metrics.classifier(pictures.images, a, args.device, args.data_dir, args.clf_steps)

    def unit(drawn):                                        # [-1, 1] -> [0, 1]
        return drawn / 2 + 0.5

    def read(drawn):                                        # (n, A) in [0, 1]
        return metrics.logits(regressor, unit(drawn)).sigmoid().cpu()

    def looks(drawn):
        measured = names and len(test) > 1
        frechet = {"frechet": metrics.frechet_distance(regressor, unit(drawn), test)} if measured else {}
        return {"sharpness": sharpness(drawn) / (sharpness(x) or float("nan"))} | frechet

    with r.aside():
        found = looks(draw(args, Dec, pick(y, len(x))))
        results["vg-celeba-samples"] = {"value": found["sharpness"], "unit": "sharpness, data 1"} | found
        if args.conditional:
            got = torch.cat([read(draw(args, Dec, part, 10)) for part in y.split(50)]).unflatten(0, (-1, 10))
            cosine, mse = similarity(standard(got, a), y)
            best = similarity(standard(read(x), a)[:, None], y)
            results["vg-lfw"] = {"value": cosine, "unit": "cosine", "mse": mse, "test set": best[0],
                                 "test set mse": best[1]}
    if Enc:
        x_tilde = metrics.batched(Dec, encode(Enc, x, y), y)
        found = {"value": (x_tilde - x).square().mean().item(), "unit": "squared error a pixel in [-1, 1]"}
        if Dis:
            found["Dis_l"] = distance(*(metrics.batched(Dis.dis_l, t) for t in (x, x_tilde)))
        if names:
            found["regressor"] = distance(*(metrics.features(regressor, unit(t)) for t in (x, x_tilde)))
        results["vg-celeba-recon"] = found | looks(x_tilde)
        with r.aside():                                     # how far q(z) is from p(z), and what it costs
            drawn, cov = draw_q(args, Enc, Dec, pictures, pick(y, len(x)))
        far = (cov - torch.eye(len(cov))).norm().item() / len(cov) ** 0.5
        results["vg-aggregated"] = {"value": far, "unit": "|covariance of q(z) - I| / |I|"} | looks(drawn)
    if Enc and names and not args.conditional:              # effect of adding a vector where it is absent
        edited = edit(Enc, Dec, pictures, min(200, len(x)))
        got = read(edited.flatten(0, 1)).unflatten(0, edited.shape[:2])                 # (n, 1 + A, A)
        lacks = (e["test_attributes"][:len(got)] <= a.mean(0)).float()
        rise = (got[:, 1:].diagonal(dim1=1, dim2=2) - got[:, 0]) * lacks
        rise = (rise.sum(0) / lacks.sum(0).clamp_min(1)).tolist()
        results["vg-attr"] = {"value": sum(rise) / len(rise), "unit": "rise of an added attribute in [0, 1]",
                              **dict(zip(names, rise))}
    if Dis and pictures.labels is not None:
        features, pixels = retrieval(args, Dis, pictures)
        results["vg-knn"] = {"value": features, "unit": "% error", "pixels": pixels}
    if args.z_dim == 2 and names and not args.conditional and pictures.labels is not None and \
            torch.equal(a.argmax(1), pictures.labels):      # attributes are the one-hot labels
        classes = read(plane(args, Dec, 20).flatten(0, 1)).argmax(1).unique()
        results["deck-vae-gan"] = {"value": len(classes), "unit": f"of {len(names)} classes on the plane"}
    paper = published(args, pictures)
    return {name: found | paper.get(name, {}) for name, found in results.items()}


def report(r, Enc, Dec, Dis, pictures):
    """Draw the figures and write results.json."""
    args = r.args
    with r.aside():
        settled(args, Enc, Dec, pictures)
    figures(r, Enc, Dec, pictures)
    results = evaluate(r, Enc, Dec, Dis, pictures)
    sharp = args.model != "vaegan" or args.width < 1 or results["vg-celeba-recon"]["sharpness"] >= 0.5
    knn = results.get("vg-knn", {})                         # "paper" only with the paper's data and network
    near = knn.get("value", 0) <= knn.get("paper", 100)
    r.results(results, passed=sharp and near)


if __name__ == "__main__":
    main()

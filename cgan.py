"""Conditional Generative Adversarial Nets
Mehdi Mirza, Simon Osindero, 2014.  arXiv:1411.1784

Generator and discriminator both see a condition y: G draws the digit y, or tags for the picture y.

    Eq. 2     min_G max_D  V(D, G) = E_x[log D(x|y)] + E_z[log(1 - D(G(z|y)))]       -> V()
    Fig. 1    z and y, or x and y, joined in one hidden representation               -> Joint
    Sec. 4.1  multi-layer perceptrons for MNIST; y is the digit's label              -> mlp(), PAPER
    Table 1   log-likelihood of test images under a Parzen window of samples         -> evaluate()
    Fig. 2    samples, one label per row                                             -> rows()
    Sec. 4.2  G generates word vectors that tag the picture y                        -> tags()
    Table 2   words nearest to most samples, next to the picture's own tags          -> tag(), tagging()

Radford et al., arXiv:1511.06434 (DCGAN), Sec. 8.1, supplementary
    y appended to the input of every layer                                           -> Labelled, dcgan28()
    Table 3   error of a nearest-neighbour classifier fitted on samples              -> nn_error()

    python cgan.py                          (MNIST: Table 1 and Fig. 2; --paper: the published settings)
    python cgan.py --net dcgan28            (MNIST: DCGAN's Table 3)
    python cgan.py --dataset cifar100       (label and noise, label alone, noise alone)
    python cgan.py --dataset shapes         (Sec. 4.2 on captioned shapes: Table 2)
    python cgan.py --resume runs/cgan-mnist --sample 100

--check asks for 132 nats, or 5.5 % error with --net dcgan28, of a run on MNIST at full width.
"""

import argparse
import contextlib
import copy
import math
from pathlib import Path

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from common import UserError, data, export, log, metrics, run
from common.fuse import (
    SGD,
    Adam,
    autocast,
    average,
    averaged,
    calibrate,
    descend,
    frozen,
    fuse,
    place,
    sampling,
    set_rate,
)

# --------------------------------------------------------------------------------------------------- settings
# z: range of Unif(low, high), or "normal".  init_G, init_D: see initialise().  drop_samples: sample with
# dropout.  batch_stats: sample with each batch's own BatchNorm statistics.  average: decay of the EMA of G
# used for samples; 0: no EMA.  noise: std of the noise added to D's input.  CGAN's authors published no code:
# where Sec. 4 is silent, values come from GAN's code.

CODE = dict(batch_stats=False, drop_samples=False, average=0.0, noise=0.0)
PERCEPTRONS = CODE | dict(
    batch_size=100, lr=0.1, lr_factor=1.00004, lr_min=1e-6, momentum=(0.5, 0.7),    # Sec. 4.1
    momentum_epochs=250, alternate=False, init_G=0.05, init_D=0.005,                # GAN's code, mnist.yaml
    steps=288000)                                   # not published: the rate reaches lr_min at 287,829
DCGAN = CODE | dict(
    z=(-1.0, 1.0), batch_size=128, lr=2e-4, weight_decay=2.5e-5, init_G="normal", init_D="normal",
    batch_stats=True,
    steps=39100)                # updates each in 200 epochs of 391 minibatches that train D and G in turn
PAPER = {
    "mlp": PERCEPTRONS | dict(net="mlp", size=28, channels=1, scale=(0.0, 1.0), z=(0.0, 1.0)),  # Sec. 4.1
    "tags": PERCEPTRONS | dict(net="tags", size=64, channels=3, scale=(0.0, 1.0), z="normal",
                               near=20, standardize=False),                         # Sec. 4.2
    "dcgan28": DCGAN | dict(net="dcgan28", size=28, channels=1, scale=(0.0, 1.0)),  # train_cond_dcgan.py
    # No paper has this network: DCGAN's for 32 x 32 pictures, with the labels and settings of its Sec. 8.1.
    "dcgan32": DCGAN | dict(net="dcgan32", size=32, channels=3, scale=(-1.0, 1.0)),
}
TUNED = {                   # mlp: seed 0, 2,500 steps at --width .25; -273 nats with PAPER, -33 with TUNED
    "mlp": dict(
        steps=50000,               # 160 nats are reached by step 20,000
        z=(-3 ** 0.5, 3 ** 0.5),   # 161 nats after 20,000 steps at full width, 146 with Unif(0, 1)
        init_G="he",               # label and noise reach samples from step 1: PAPER with it -138
        drop_samples=True,         # D has seen G's dropout as noise; without it -150
        average=0.999),            # without it -49
    # tags: precision at 10 on shapes after 2,000 steps at --width .5: 40 % with PAPER, 63 with these entries
    # and drop_samples, 57 with init_G="he" as well.  Beside each entry: the 57 % run without it.
    "tags": dict(
        steps=10000,
        average=0.999,             # 42 %
        init_D=0.05,               # 43 %: GAN's .005 leaves D at 1/2 for a thousand steps
        noise=1.5,                 # 39 %: the words are isolated points, so D knows samples by position alone
        near=0.01,                 # 53 %: of few words, the nearest 20 hold wrong ones even for a perfect G
        standardize=True),         # NaN; features of mean 0 and deviation 1, cut at 3
    "dcgan28": dict(
        steps=16000,               # 3.33 % 1-NN error with two fifths of the published updates
        batch_stats=False,         # a picture depends on its z and label alone; no difference measured
        average=0.999),            # --quick --steps 2000: 41.9 % 1-NN error, 44.2 without
    "dcgan32": dict(steps=10000, batch_stats=False, average=0.999),                 # as dcgan28
}
QUICK = {"dcgan28": dict(width=0.25, batch_size=64, steps=5000, nn_samples=5000,
                         noise=0.5)}   # 24.3 % 1-NN error; noise .3 and 3,500 steps: 29.9


# --------------------------------------------------------------------------------------------------- networks

class Maxout(nn.Module):
    """The largest of `pieces` linear maps for each of `n` units: (b, i) -> (b, n)."""

    def __init__(self, i, n, pieces):
        super().__init__()
        self.n, self.linear = n, nn.Linear(i, n * pieces)

    def forward(self, x):
        return rearrange(self.linear(x), "b (n p) -> b n p", n=self.n).amax(2)


class Joint(nn.Module):
    """Fig. 1: one layer for u (z or x), one for the condition y, then `both` on their concatenation."""

    def __init__(self, u, y, both):
        super().__init__()
        self.u, self.y, self.both = u, y, both

    def forward(self, u, y):
        return self.both(torch.cat([self.u(u), self.y(y)], 1))


def fc(i, o):
    return nn.Sequential(nn.Linear(i, o), nn.ReLU())


def mlp(K, ch):
    """Sec. 4.1, with dropout of .5 in both: y (n, K) is a one-hot label, x (n, 1, 28, 28) a digit.

    ch(n): n units, scaled by --width.
    """
    G = Joint(
        fc(100, ch(200)),                                                           # 200
        fc(K, ch(1000)),                                                            # 1000
        nn.Sequential(
            nn.Dropout(0.5), *fc(ch(200) + ch(1000), ch(1200)),                     # 1200
            nn.Dropout(0.5), nn.Linear(ch(1200), 784), nn.Sigmoid(),
            nn.Unflatten(1, (1, 28, 28))))                                          # 1 x 28 x 28
    D = Joint(
        nn.Sequential(nn.Flatten(), Maxout(784, ch(240), 5)),                       # 240
        Maxout(K, ch(50), 5),                                                       # 50
        nn.Sequential(
            nn.Dropout(0.5), Maxout(ch(240) + ch(50), ch(240), 4),                  # 240
            nn.Dropout(0.5), nn.Linear(ch(240), 1), nn.Flatten(0)))                 # 1
    return G, D


def networks(args, K, mean=None, d=200):
    """(G, D): G(z, y) -> x for z (n, 100) and y (n, K); D(x, y) -> a (n,), the logit of D(x|y).

    mean (1, 28, 28), for mlp: mean training image in [0, 1].  d, for tags: size of a word vector.
    """
    def ch(n):
        return max(8, round(n * args.width))

    table = {"mlp": mlp, "tags": tags, "dcgan28": dcgan28, "dcgan32": dcgan32}
    G, D = table[args.net](K, ch, *([d] if args.net == "tags" else []))
    initialise(G, args.init_G, args.width)
    initialise(D, args.init_D, args.width)
    if args.net == "mlp":                                   # GAN's code: samples start at the mean digit
        G.both[4].bias.data.copy_(mean.flatten().clamp(1e-7, 1 - 1e-7).logit())
    return G, D


def initialise(net, how, width=1.0):
    """Weights Unif(-how, how); "he": normal, std sqrt(2 / inputs); "normal": std .02, as in DCGAN.  Biases 0.

    For layers that read units, Unif's bound is divided by sqrt(width) to keep the variance of their sums.
    """
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif how == "he":
            nn.init.kaiming_normal_(p)
        elif how == "normal":
            nn.init.normal_(p, 0.0, 0.02)
        else:
            b = how if name.startswith(("u.", "y.")) else how / width ** 0.5
            nn.init.uniform_(p, -b, b)


# ------------------------------------------------------------------------------------------------------ noise

def sample_z(n, args, device="cpu"):
    """z (n, 100): N(0, 1) if args.z is "normal", else Unif(low, high)."""
    if args.z == "normal":
        return torch.randn(n, 100, device=device)
    low, high = args.z
    return (low + high) / 2 + (high - low) / 2 * (2 * torch.rand(n, 100, device=device) - 1)


# -------------------------------------------------------------------------------------------------- objective

def V(a_real, a_fake):
    """Eq. 2: E_x[log D(x|y)] + E_z[log(1 - D(G(z|y)))], D = sigmoid(a), a (n,).  -log 4 if D = 1/2."""
    return F.logsigmoid(a_real.float()).mean() + F.logsigmoid(-a_fake.float()).mean()


def log_D(a_fake):
    """What G ascends in place of Eq. 2 (GAN, Sec. 3): E_z[log D(G(z|y))], a (n,).  -log 2 if D = 1/2."""
    return F.logsigmoid(a_fake.float()).mean()


# --------------------------------------------------------------------------------------------------- training

def build(args, K, mean=None, d=200):
    """G, D, the EMA of G, optimizers, and the fused step of Eq. 2."""
    G, D = networks(args, K, mean, d)
    G, D, G_bar = place(args, G, D, averaged(G))
    perceptrons = args.net in ("mlp", "tags")
    if perceptrons:
        opt_D, opt_G = (SGD(net.parameters(), args.lr, args.momentum[0]) for net in (D, G))
    else:
        opt_D, opt_G = (Adam(net.parameters(), args.lr, weight_decay=args.weight_decay) for net in (D, G))
    half = 0.5 if perceptrons else 1.0                              # GAN's code halves V for D
    together = perceptrons and not args.alternate
    amp = autocast(args)

    @fuse(args)
    def train_step(x, y):                               # x (n, ...), y (n, K), or labels (n,)
        y = one_hot(y, K) if y.ndim == 1 else y
        z = sample_z(len(x), args, x.device)
        with amp:
            x_fake = G(z, y)                            # same conditions as the real pairs
            a_real = D_sees(D, x, y, args)
            a_fake = D_sees(D, x_fake if together else x_fake.detach(), y, args)
        v = V(a_real, a_fake)
        if together:                                    # GAN's code: both gradients at old parameters
            descend(-half * v, opt_D, -log_D(a_fake), opt_G)
        else:
            descend(-half * v, opt_D)
            with amp, frozen(D):                        # through the updated D
                a_fake = D_sees(D, x_fake, y, args)
            descend(-log_D(a_fake), opt_G)
        average(G_bar, G, args.average)
        return {"V": v, "D(x)": a_real.float().sigmoid().mean(), "D(G(z))": a_fake.float().sigmoid().mean()}

    return G, D, G_bar, opt_D, opt_G, train_step


def main(argv=None):
    args = parse_args(argv)
    r = run.Run(args)
    if r.drawing:
        return export.main(r, drawer)
    if args.net == "tags":
        return tagging(r)
    train, valid, test, names = labelled(args)
    K = len(names)
    batches = data.Batches(*train, scale=args.scale, **r.feed)
    mean = train[0].float().mean(0) / 255 if args.net == "mlp" else None
    G, D, G_bar, opt_D, opt_G, train_step = build(args, K, mean)
    parts = {"G": G, "D": D, "G_bar": G_bar, "opt_D": opt_D, "opt_G": opt_G, "batches": batches}
    best = G_bar
    if args.net == "mlp":               # Sec. 4.1: early stopping on the validation likelihood
        best = parts["best"] = copy.deepcopy(G_bar)
        best.register_buffer("ll", torch.tensor(-math.inf, device=args.device))

    def about():
        calibrated(G_bar, args, train[1], K)
        return {"names": names, "shape": list(train[0].shape[1:])}

    r.keep(about, **parts)
    for step in r.loop():
        anneal(args, (opt_D, opt_G), step, batches.per_epoch)
        r.log(train_step(*next(batches)))
        if args.net == "mlp" and r.every(max(500, 5 * batches.per_epoch)):
            keep_best(r, G_bar, best, valid, K)
        if r.draws():
            with r.aside():
                y = one_hot(torch.arange(100, device=args.device) % K, K)
                r.show("samples", log.grid(draw(calibrated(G_bar, args, train[1], K), args, y), 10))

    if r.lead:
        report(r, best, K, train, valid, test)


# ========================================================================== Figures and numbers of the papers

def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="mnist", log_every=500)
    add = p.add_argument_group("conditional GAN").add_argument
    positive, flag = run.number(float, 0, open_low=True), argparse.BooleanOptionalAction
    add("--net", choices=PAPER,
        help="mlp: Sec. 4.1; tags: Sec. 4.2; dcgan28, dcgan32: DCGAN Sec. 8.1 [mlp for mnist, "
             "fashion-mnist and kmnist, with --quick dcgan28; tags for shapes; else dcgan32]")
    add("--width", type=positive, default=1.0, help="units and feature maps, as a fraction of the paper's")
    add("--alternate", action=flag, help="mlp, tags: update G after D, through the updated D [both at once]")
    add("--lr", type=positive, help="initial learning rate [mlp, tags .1; dcgan28, dcgan32 2e-4]")
    add("--noise", type=run.number(float, 0),
        help="std of the noise added to D's input [tags 1.5, with --quick .5, else 0]")
    add("--drop-samples", action=flag, help="mlp, tags: sample with dropout [mlp on; tags and --paper: off]")
    add("--attributes", metavar="A,B", help="binary attributes; their combinations are the labels [the "
        "data's own labels; faces: glasses,hat]")
    add("--nn-samples", type=run.number(int, 2), default=50000,
        help="number of samples in the nearest-neighbour classifier of DCGAN's Table 3 [%(default)s]")
    add("--average", type=run.number(float, 0, 1),
        help="decay of the EMA of G used for samples; 0: no EMA [.999; --paper: 0]")
    return run.parse(p, argv, experiment=experiment, paper=PAPER, tuned=TUNED, quick=QUICK)


def experiment(args):
    """The row of PAPER and TUNED: the network."""
    digits = "dcgan28" if args.quick else "mlp"             # mlp takes many steps to use the label
    net = args.net or {"mnist": digits, "fashion-mnist": digits, "kmnist": digits, "shapes": "tags"}.get(
        args.dataset, "dcgan32")
    for flag in ("alternate", "drop_samples"):
        if getattr(args, flag) and net in ("dcgan28", "dcgan32"):
            raise UserError(f"--{flag.replace('_', '-')} found with --net {net}: it is for mlp and tags")
    return net


def anneal(args, opts, step, per_epoch):
    """Set the learning rate and the momentum for update `step`.

    mlp, tags: the rate is divided by lr_factor each update, down to lr_min; momentum rises linearly over
    momentum_epochs (Sec. 4.1).  dcgan28, dcgan32: the rate is constant, then falls linearly to 0 over the
    second half.
    """
    t = step - 1
    if args.net in ("mlp", "tags"):
        first, last = args.momentum
        momentum = min(last, first + (last - first) * t / ((args.momentum_epochs - 1) * per_epoch))
        for opt in opts:
            set_rate(opt, max(args.lr_min, args.lr / args.lr_factor ** min(t, 10 ** 7)), momentum=momentum)
    else:
        for opt in opts:
            set_rate(opt, args.lr * min(1.0, 2 * (1 - t / args.steps)))


# ------------------------------------------------------------------------ what TUNED adds to the paper's step

def D_sees(D, x, y, args):
    """D's logits a (n,) for x and y, with noise N(0, args.noise^2) on x."""
    return D(x + args.noise * torch.randn_like(x) if args.noise else x, y)


# -------------------------------------------------------------------------------- DCGAN's networks (Sec. 8.1)

class Labelled(nn.Sequential):
    """Appends the label vector y (n, K) to every layer's input: K constant maps if that has feature maps."""

    def forward(self, h, y):
        for layer in self:
            h = layer(beside(h, y))
        return h


def beside(h, y):
    """h (n, d), y (n, K) -> (n, d + K); h (n, d, H, W), y -> (n, d + K, H, W), each y_k a constant map."""
    y = y.to(h.dtype)
    if h.ndim == 2:
        return torch.cat([h, y], 1)
    maps = y[:, :, None, None].expand(-1, -1, *h.shape[2:])
    h = torch.cat([h, maps], 1)
    ordered = (h.is_cuda or h.is_cpu) and not torch.compiler.is_compiling()
    return h.contiguous(memory_format=torch.channels_last) if ordered else h


def conv(i, o):
    return nn.Conv2d(i, o, 5, 2, 2, bias=False)


def upconv(i, o):
    return nn.ConvTranspose2d(i, o, 5, 2, 2, 1, bias=False)


# BatchNorm has no scale and shift, and an epsilon of 1e-8 (authors' code).
def fc_bn(i, o, activation):
    return nn.Sequential(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o, 1e-8, affine=False), activation)


def bn(o, activation):
    return nn.Sequential(nn.BatchNorm2d(o, 1e-8, affine=False), activation)


def dcgan28(K, ch):
    """MNIST.  ch(n): n units or feature maps, scaled by --width."""
    relu, lrelu, c = nn.ReLU(), nn.LeakyReLU(0.2), ch(128)
    G = Labelled(
        fc_bn(100 + K, ch(1024), relu),                                             # 1024
        nn.Sequential(fc_bn(ch(1024) + K, c * 7 * 7, relu), nn.Unflatten(1, (c, 7, 7))),    # 128 x 7 x 7
        nn.Sequential(upconv(c + K, ch(64)), bn(ch(64), relu)),                     # 64 x 14 x 14
        nn.Sequential(upconv(ch(64) + K, 1), nn.Sigmoid()))                         # 1 x 28 x 28
    D = Labelled(
        nn.Sequential(conv(1 + K, ch(64)), lrelu),                                  # 64 x 14 x 14
        nn.Sequential(conv(ch(64) + K, c), bn(c, lrelu), nn.Flatten()),             # 128 x 7 x 7
        fc_bn(c * 7 * 7 + K, ch(1024), lrelu),                                      # 1024
        nn.Sequential(nn.Linear(ch(1024) + K, 1, bias=False), nn.Flatten(0)))       # 1
    return G, D


def dcgan32(K, ch):
    """32 x 32 colour: DCGAN's network for SVHN with labels added.  Not in any paper."""
    relu, lrelu, c = nn.ReLU(), nn.LeakyReLU(0.2), ch(256)
    G = Labelled(
        nn.Sequential(fc_bn(100 + K, c * 4 * 4, relu), nn.Unflatten(1, (c, 4, 4))),         # 256 x 4 x 4
        nn.Sequential(upconv(c + K, ch(128)), bn(ch(128), relu)),                   # 128 x 8 x 8
        nn.Sequential(upconv(ch(128) + K, ch(64)), bn(ch(64), relu)),               # 64 x 16 x 16
        nn.Sequential(upconv(ch(64) + K, 3), nn.Tanh()))                            # 3 x 32 x 32
    D = Labelled(
        nn.Sequential(conv(3 + K, ch(64)), lrelu),                                  # 64 x 16 x 16
        nn.Sequential(conv(ch(64) + K, ch(128)), bn(ch(128), lrelu)),               # 128 x 8 x 8
        nn.Sequential(conv(ch(128) + K, c), bn(c, lrelu), nn.Flatten()),            # 256 x 4 x 4
        nn.Sequential(nn.Linear(c * 4 * 4 + K, 1, bias=False), nn.Flatten(0)))      # 1
    return G, D


# ---------------------------------------------------------------------------------- pictures and their labels

def labelled(args):
    """Training, validation and test pairs (images, labels), and the names of the K labels.

    The validation pair is also the test pair if the data has no usable test labels.
    """
    pictures = data.load(args.dataset, args.data_dir, args.size, args.channels, skip_bad=args.skip_bad)
    if args.attributes or pictures.labels is None:
        names = args.attributes or ("glasses,hat" if args.dataset == "faces" else "")
        pictures.labels, pictures.test_labels = (attribute_labels(pictures, names, part)
                                                 for part in ("", "test_"))
        names = names.split(",")
        pictures.classes = [" ".join(name for i, name in enumerate(names) if k >> i & 1) or "none"
                            for k in range(2 ** len(names))]
    has_label = pictures.labels >= 0                        # stl10 has unlabelled pictures
    images, labels = (t if has_label.all() else t[has_label] for t in (pictures.images, pictures.labels))
    split = data.cut(len(images), 10000, 6)
    train, valid = (images[:split], labels[:split]), (images[split:], labels[split:])
    if not data.tell(train[1]):
        raise UserError(f"{pictures.name} has one label for all training pictures: expected two or more")
    K, test = int(labels.max()) + 1, (pictures.test_images, pictures.test_labels)
    if test[1] is None or test[1].max() >= K:
        test = valid
    classes = pictures.classes if len(pictures.classes or []) >= K else map(str, range(K))
    return train, valid, test, [*classes][:K]


def attribute_labels(pictures, names, prefix=""):
    """Labels (N,) from binary attributes: bit i is the i-th attribute in `names` ("glasses,hat").

    prefix "test_": labels of the test pictures, None if they have none.
    """
    extra = pictures.extra
    available = extra.get("attribute_names", []) if "attributes" in extra else []
    a = extra.get(f"{prefix}attributes")
    wanted = names.split(",")
    unknown = [name for i, name in enumerate(wanted) if name not in available or name in wanted[:i]]
    if unknown:
        raise UserError(f"{pictures.name} needs labels, or --attributes, each once, out of "
                        f"{', '.join(available) or 'none'}: {unknown[0] or 'nothing'} found")
    if a is None:
        return None
    a = a[:, [available.index(name) for name in wanted]]
    if (a > 1).any():
        raise UserError(f"{pictures.name}: {names} has values above 1: expected binary attributes")
    return sum((column > 0.5).long() << i for i, column in enumerate(a.T))


def one_hot(y, K):
    """Label vectors (n, K) of the labels y (n,)."""
    return F.one_hot(y, K).float()


# ------------------------------------------------------------------------------------------------ the figures

@contextlib.contextmanager
def drawing(G, args):
    """sampling(G), with dropout if args.drop_samples and batch statistics if args.batch_stats."""
    norms = [m for m in G.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    with sampling(G):
        for m in G.modules():
            if isinstance(m, nn.Dropout):
                m.train(args.drop_samples)
        for m in norms:
            m.train(args.batch_stats)
            m.track_running_stats = not args.batch_stats    # running statistics stay unchanged
        try:
            yield
        finally:
            for m in norms:
                m.track_running_stats = True


def calibrated(G, args, labels, K):
    """G, with its running statistics recomputed if it is an EMA: average() copies those of the raw weights.

    Uses 100 batches of samples with labels drawn from the training labels (N,).
    """
    if args.average and not args.batch_stats and any(isinstance(m, nn.BatchNorm2d) for m in G.modules()):
        n = args.batch_size
        y = (one_hot(labels[torch.randint(len(labels), (n,))].to(args.device), K) for _ in range(100))
        calibrate(G, ((sample_z(n, args, args.device), y_i) for y_i in y))
    return G


def draw(G, args, y, z=None):
    """Pictures (n, C, H, W) in [0, 1] for label vectors y (n, K), from fresh noise or from z (n, 100)."""
    z = sample_z(len(y), args, y.device) if z is None else z
    most = args.batch_size if args.batch_stats else 500
    size = -(-len(y) // -(-len(y) // most))                 # about equal batches
    while len(y) % size == 1:                               # BatchNorm needs two pictures
        size += 1
    with drawing(G, args):
        x = metrics.batched(lambda *part: G(*part).float(), z, y, size=size)
    low, high = args.scale
    return (x - low) / (high - low)


def rows(G, args, K, columns, shared=False):
    """Fig. 2: one label per row, at most ten, with `columns` pictures each; `shared`: one z per column."""
    y = torch.linspace(0, K - 1, min(K, 10), device=args.device).round().long()
    z = sample_z(columns, args, args.device).repeat(len(y), 1) if shared else None
    return draw(G, args, one_hot(y.repeat_interleave(columns), K), z)


def drawer(args, saved):
    """Sampler of a trained run: z and a label -> pictures.  --sample cycles through the labels."""
    if args.net == "tags":
        raise UserError("a run with --net tags draws words, not pictures: see its table2.md")
    about = saved["about"]
    names, K = tuple(about["names"]), len(about["names"])
    G, _ = networks(args, K, torch.zeros(about["shape"]))
    rated = saved.get("best", {"ll": -math.inf}).get("ll", 0) > -math.inf   # else stopped before keep_best()

    def function(z, y):
        n = y.shape[0]                                      # exports fix len()
        if args.batch_stats:        # add a batch of all labels, so that no single one sets the statistics
            z = torch.cat([z, sample_z(args.batch_size, args, z.device)])
            y = torch.cat([y, torch.arange(args.batch_size, device=y.device) % K])
        return G(z, one_hot(y, K))[:n]

    return export.Drawer(
        function, lambda n: (sample_z(n, args, args.device), torch.arange(n, device=args.device) % K),
        {"best" if rated else "G_bar": G}, {"z": [], "y": [export.Knob("label", names=names, whole=True)]},
        args.scale, within=lambda: drawing(G, args), size=16 if args.batch_stats else 500)


def keep_best(r, G_bar, best, valid, K):
    """Copy G_bar to `best` if the likelihood of `valid` improves, at sigma .2 as in GAN's code."""
    with r.aside():
        x = draw(G_bar, r.args, one_hot(torch.arange(10000, device=r.args.device) % K, K))
    ll = metrics.parzen_ll(x.flatten(1), valid[0][:1000].flatten(1) / 255, 0.2).mean()
    r.log({"ll": ll})
    if ll > best.ll:
        best.load_state_dict({**G_bar.state_dict(), "ll": ll})


def figures(r, G, K):
    """Fig. 2, and the effects of label and noise: both (one label per row, one z per column), label alone
    (z = 0), noise alone (y = 0)."""
    args = r.args
    y, z = torch.eye(min(K, 100), K, device=args.device), sample_z(100, args, args.device)
    r.show("fig2", log.grid(rows(G, args, K, 20), 20))
    r.show("noise_and_label", log.grid(rows(G, args, K, 10, shared=True), 10))
    r.show("label_only", log.grid(draw(G, args, y, torch.zeros_like(z[:len(y)])), min(K, 10)))
    r.show("noise_only", log.grid(draw(G, args, z.new_zeros(len(z), K), z), 10))


# ------------------------------------------------------------------------------------------------ the numbers

def published(args):
    """What the papers report for this data and network: experiment id -> value."""
    if args.dataset != "mnist" or args.width != 1:
        return {}
    if args.net == "mlp":
        return {"cgan-mnist-ll": 132}                                   # CGAN, Table 1
    error = {50000: 2.98, 10_000_000: 1.48}.get(args.nn_samples)        # DCGAN, Table 3
    return {"dcgan-mnist-1nn": error} if args.net == "dcgan28" and error else {}


@torch.no_grad()
def nn_error(parts, test, labels):
    """DCGAN Table 3: error in % of a nearest-neighbour classifier (Euclidean) on test (N, ...), labels (N,).

    `parts`: iterable of pairs of samples x (n, ...) and labels y (n,); one pair is in memory at a time.
    Fitted on MNIST's 50,000 real digits: 3.1.
    """
    mean = test.flatten(1).mean(0)                          # same distances, smaller rounding errors
    test = test.flatten(1) - mean
    least, found = torch.full_like(test[:, 0], math.inf), torch.full_like(labels, -1)
    for x, y in parts:
        x = x.flatten(1) - mean
        metrics.finite(x)
        d2, i = (x.square().sum(1) - 2 * test @ x.T).min(1)     # without |test|^2, the same for all x
        least, found = torch.minimum(d2, least), torch.where(d2 < least, y[i], found)
    return 100 * (found != labels).float().mean().item()


def evaluate(args, G, K, train, valid, test):
    """Results for this data set: experiment id -> dict with "value", and "paper" if published() has one."""
    device, name, results = args.device, Path(args.dataset).stem, {}
    x_test, y_test = (t[:10000].to(device) for t in test)
    y = torch.arange(10000, device=device) % K              # Table 1: 1,000 samples of each of ten labels
    x = draw(G, args, one_hot(y, K))
    if args.net == "mlp":
        x_valid = valid[0][:1000].to(device)
        window = metrics.parzen(x.flatten(1), x_valid.flatten(1) / 255, x_test.flatten(1) / 255)
        results[f"cgan-{name}-ll"] = {"value": window["ll"], "unit": "nats", "se": window["se"],
                                      "sigma": window["sigma"]}
    if args.size == 28:
        parts = (torch.arange(args.nn_samples, device=device) % K).tensor_split(-(-args.nn_samples // 1000))
        error = nn_error(((draw(G, args, one_hot(part, K)), part) for part in parts), x_test / 255, y_test)
        entry = f"dcgan-{name}-1nn" if args.net == "dcgan28" else f"dcgan-{name}-1nn-base"
        results[entry] = {"value": error, "unit": "% error", "samples": args.nn_samples}
    clf = metrics.classifier(*train, device, args.data_dir)
    results["agreement"] = {"value": 100 * metrics.label_agreement(clf, x, y),
                            "unit": "% of samples with the label asked for",
                            "of real pictures": 100 * metrics.label_agreement(clf, x_test, y_test)}
    if len(x_test) > 1:
        results["frechet"] = {"value": metrics.frechet_distance(clf, x[:len(x_test)], x_test)}
    for entry, value in published(args).items():
        results[entry]["paper"] = value
    return results


def report(r, G, K, train, valid, test):
    """Figures and results.json."""
    with r.aside():
        G = calibrated(G, r.args, train[1], K)
        figures(r, G, K)
        results = evaluate(r.args, G, K, train, valid, test)
    ll, error = (results.get(k, {}).get("value") for k in ("cgan-mnist-ll", "dcgan-mnist-1nn"))
    r.results(results, passed=r.args.dataset != "mnist" or r.args.width < 1
              or ((ll is None or ll >= 132) and (error is None or error <= 5.5)))


# ------------------------------------------------------------------------------------------ Sec. 4.2: tagging

def tags(K, ch, d=200):
    """Sec. 4.2: y (n, K) are features of a picture, x (n, d) is a word vector."""
    G = Joint(
        fc(100, ch(500)),                                                           # 500
        fc(K, ch(2000)),                                                            # 2000
        nn.Sequential(nn.Dropout(0.5), nn.Linear(ch(500) + ch(2000), d)))           # 200
    D = Joint(
        fc(d, ch(500)),                                                             # 500
        fc(K, ch(1200)),                                                            # 1200
        nn.Sequential(
            nn.Dropout(0.5), Maxout(ch(500) + ch(1200), ch(1000), 3),               # 1000
            nn.Dropout(0.5), nn.Linear(ch(1000), 1), nn.Flatten(0)))                # 1
    return G, D


def tagging(r):
    """Sec. 4.2: G generates word vectors that tag a picture, given its features.  Reports Table 2, precision
    and recall at 10."""
    args = r.args
    pictures = data.load(args.dataset, args.data_dir, args.size, args.channels, skip_bad=args.skip_bad)
    (_, tags, f), (test, test_tags, f_test), vocabulary, words = described(args, *tagged(pictures))
    pairs = tags.nonzero()                                  # Sec. 4.2: one pair for each tag of a picture
    G, D, G_bar, opt_D, opt_G, train_step = build(args, f.shape[1], d=words.shape[1])
    r.keep(G=G, D=D, G_bar=G_bar, opt_D=opt_D, opt_G=opt_G)
    for step in r.loop():
        anneal(args, (opt_D, opt_G), step, max(1, len(pairs) // (args.batch_size * r.world)))
        i, word = pairs[torch.randint(len(pairs), (args.batch_size,), device=args.device)].unbind(1)
        r.log(train_step(words[word], f[i]))

    if not r.lead:
        return
    with r.aside():
        found = tag(G_bar, args, f_test, words)
    table = ["| picture | its tags | generated tags |", "|---|---|---|"]
    for i in range(min(20, len(test))):
        own, drawn = ([vocabulary[k] for k in row] for row in (test_tags[i].nonzero()[:, 0], found[i]))
        table.append(f"| {i + 1} | {', '.join(own)} | {', '.join(drawn)} |")
    log.write_text(r.folder / "table2.md", "\n".join(table) + "\n")
    r.show("table2", log.grid(test[:20].float() / 255, 10))
    frequent = tags.sum(0).topk(found.shape[1]).indices.expand_as(found)     # ignores the picture
    results = {}
    for name, k in (("cgan-flickr", found), ("cgan-flickr-neighbours", neighbours_tags(f_test, f, tags)),
                    ("cgan-flickr-frequent", frequent)):
        precision, recall = precision_recall(k, test_tags)
        results[name] = {"value": 100 * precision, "unit": "% precision at 10", "recall": 100 * recall}
    r.results(results)


def tags_of(pictures, prefix=""):
    """Tags (N, W), 0 or 1, or None if the data has no such part; and the W words.

    From the arrays `tags` and `words`, the values of attributes except "none", or the names of binary
    attributes.
    """
    extra = pictures.extra
    a = extra.get(f"{prefix}attributes")
    if "tags" in extra and "words" in extra:
        tags, words = extra.get(f"{prefix}tags"), extra["words"]
    elif "attribute_values" in extra:
        words = list(dict.fromkeys(v for values in extra["attribute_values"] for v in values if v != "none"))
        tables = [torch.tensor([[v == word for word in words] for v in values])
                  for values in extra["attribute_values"]]
        tags = None if a is None else sum(table[k].int() for table, k in zip(tables, a.T)) > 0
    elif "attributes" in extra:
        tags, words = None if a is None else a == 1, extra["attribute_names"]
    else:
        raise UserError(f"{pictures.name} has no tags: expected arrays tags (N, W) and words (W,), or "
                        "attributes with attribute_names")
    return None if tags is None else (tags > 0).float(), words


def tagged(pictures):
    """Training and test triples (images, tags, features), the words and their vectors.

    Drops words that tag no training picture, and pictures without a tag.  Features and vectors are None
    unless the data has arrays features and test_features (N, K), and vectors_of_words (W, d).
    """
    (tags, words), (test_tags, _) = tags_of(pictures), tags_of(pictures, "test_")
    images, test_images = pictures.images, pictures.test_images
    vectors, f = own(pictures, "vectors_of_words", len(words)), own(pictures, "features", len(images))
    train, test = (images, tags, f), (test_images, test_tags, None)
    if test_images is not None and f is not None:
        test = test_images, test_tags, own(pictures, "test_features", len(test_images), f.shape[1])
    if test_images is None or test_tags is None or f is not None and test[2] is None:
        split = data.cut(len(images), len(images), 6, least=1)
        train, test = choose(train, slice(split)), choose(train, slice(split, None))
    used = train[1].sum(0) > 0
    train, test = ((images, tags[:, used], f) for images, tags, f in (train, test))
    train, test = (choose(part, part[1].sum(1) > 0) for part in (train, test))
    words = [word for word, u in zip(words, used) if u]
    if len(train[0]) < 2 or not len(test[0]):
        raise UserError(f"{pictures.name} has {len(train[0])} training and {len(test[0])} test pictures "
                        "with a tag: expected two or more to train on and one or more to test")
    return train, test, words, vectors if vectors is None else vectors[used]


def choose(part, rows):
    """The rows of each tensor of `part`; None stays None."""
    return tuple(t if t is None else t[rows] for t in part)


def own(pictures, key, n, d=None):
    """The data's array `key` (n, d) as float32, or None if it has none."""
    a = pictures.extra.get(key)
    if a is None:
        return None
    if not torch.is_tensor(a) or a.ndim != 2 or a.shape != (n, d or a.shape[1]) or not a.isfinite().all():
        raise UserError(f"{pictures.name}: {key} {tuple(getattr(a, 'shape', ()))} found, finite numbers "
                        f"({n}, {d or 'd'}) expected")
    return a.float()


def described(args, train, test, words, vectors):
    """Output of tagged() with missing features and vectors filled in, and at most 2,000 test pictures.

    The paper uses 4,096 features of a network trained on 21,000 ImageNet classes, and skip-gram vectors.
    Here they are the features of a small classifier of the tags, and word_vectors().
    """
    (images, tags, f), (test_images, test_tags, f_test) = train, choose(test, slice(2000))
    if f is None:
        clf = metrics.classifier(images, tags, args.device, args.data_dir)
        f, f_test = (metrics.features(clf, part) for part in (images, test_images))
    if args.standardize:    # clip: a unit that rarely fires is 100 deviations from its mean when it does
        f, f_test = (((part - f.mean(0)) / f.std(0).clamp_min(1e-6)).clamp(-3, 3) for part in (f, f_test))
    vectors = word_vectors(tags) if vectors is None else vectors
    tags, f, test_tags, f_test, vectors = (t.to(args.device) for t in (tags, f, test_tags, f_test, vectors))
    return (images, tags, f), (test_images, test_tags, f_test), words, vectors


def word_vectors(tags, d=200):
    """Word vectors (W, d) from co-occurrence in tags (N, W), 0 or 1, where each word is used.

    U S^(1/2) of the singular value decomposition of max(0, log(p(u, v) / (p(u) p(v)))), at most 200 columns,
    each vector scaled to norm sqrt(d).  Words that always occur together have the same vector.  Words that
    never do have orthogonal vectors, if all else is chance.
    """
    tags = tags.double()
    p = tags.T @ tags / len(tags)                           # p(u, v); p(u) on the diagonal
    U, S, _ = torch.linalg.svd((p / torch.outer(p.diagonal(), p.diagonal())).log().clamp(min=0))
    v = (U * S.sqrt())[:, :d]
    return (F.normalize(v) * math.sqrt(v.shape[1])).float()


def tag(G, args, f, words, samples=100, keep=10):
    """Sec. 4.2: for features f (n, K) of pictures and words (W, d), indices (n, keep) of the words that are
    most often among the args.near nearest (cosine) to 100 samples of G.

    args.near below 1 is a fraction of the words: at least one word, at most the paper's 20.
    """
    near = args.near if args.near >= 1 else min(20, max(1, int(args.near * len(words))))
    near, keep, found = min(near, len(words)), min(keep, len(words)), []
    for f_i in f.split(20):
        with drawing(G, args):
            v = G(sample_z(samples * len(f_i), args, f.device), f_i.repeat_interleave(samples, 0)).float()
        cosine = F.normalize(v) @ F.normalize(words).T
        votes = torch.zeros_like(cosine).scatter_(1, cosine.topk(near).indices, 1.0)
        votes = votes + 0.4 / samples * cosine              # break ties by the mean cosine
        found.append(votes.unflatten(0, (-1, samples)).sum(1).topk(keep).indices)
    return torch.cat(found)


def neighbours_tags(f, f_train, tags, k=100, keep=10):
    """Baseline: the `keep` most frequent tags (n, keep) of the k training pictures with the nearest features
    (Euclidean)."""
    near = torch.cat([torch.cdist(f_i, f_train).topk(min(k, len(f_train)), largest=False).indices
                      for f_i in f.split(100)])
    return torch.stack([tags[i].sum(0) for i in near]).topk(min(keep, tags.shape[1])).indices


def precision_recall(found, tags):
    """Mean precision and recall in [0, 1] of the words found (n, k), given tags (n, W), 0 or 1."""
    hits = tags.gather(1, found).sum(1)
    return (hits / found.shape[1]).mean().item(), (hits / tags.sum(1)).mean().item()


if __name__ == "__main__":
    main()

"""Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks
Alec Radford, Luke Metz, Soumith Chintala, 2015.  arXiv:1511.06434

GANs with strided convolutions and BatchNorm, without pooling or hidden fully connected layers.  They train
stably, z supports vector arithmetic, and D's features are useful for classification.

    GAN's Eq. 1  max_D V(D, G) = E_x[log D(x)] + E_z[log(1 - D(G(z)))]               -> V()
    Sec. 3       networks: 64x64, 32x32 of ImageNet, 32x32 of SVHN                   -> networks()
    Sec. 4       Adam 2e-4, beta_1 .5; D and G in turn: authors' code                -> train_step(), PAPER
    Sec. 4.1     near-duplicates by hashing the code of an autoencoder               -> hashes()
    Sec. 5       L2-SVM on features: D's convolutions, max-pooled to 4x4             -> features(), l2_svm()
    Sec. 6.1     Fig. 4: walks between random z                                      -> walk()
    Sec. 6.2     Fig. 5: guided backpropagation from D's last convolution            -> guided()
    Sec. 6.3.1   Fig. 6: dropping maps of G to forget an object                      -> forget()
    Sec. 6.3.2   Fig. 7: z_A - z_B + z_C of mean exemplars                           -> a_minus_b_plus_c()
    Sec. 6.3.2   Fig. 8: the turn vector                                             -> turn()

    python dcgan.py                                              (built-in faces; --paper: published settings)
    python dcgan.py --width .25 --batch-size 64 --steps 3000     (narrow networks, for a CPU)
    python dcgan.py --dataset lsun                               (Figs. 2 and 3: after 1 and 5 epochs)
    python dcgan.py --dataset imagenet
    python dcgan.py --resume runs/dcgan-imagenet --features cifar10     (Table 1)
    python dcgan.py --resume runs/dcgan-svhn --features svhn            (Table 2; --supervised: its last row)
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import shutil
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from common import UserError, data, export, log, metrics, run
from common.fuse import Adam, autocast, calibrate, descend, frozen, fuse, place, precise, sampling
from common.metrics import need

# --------------------------------------------------------------------------------------------------- settings
# Sec. 4, Fig. 1: batches of 128, Adam at 2e-4, pictures in [-1, 1], z ~ Unif(-1, 1).  Where the paper is
# silent, values come from the authors' Theano code (Newmu/dcgan_code): weight decay, BatchNorm's epsilon,
# as many updates of G as of D, sampling with batch statistics.  SVHN's Gaussian z, rate and batch contradict
# the print; like its epochs, they are in the name of the released model, which gave the printed error.

ALL = dict(batch_size=128, lr=2e-4, weight_decay=1e-5, eps=1e-8, scale=(-1.0, 1.0), batch_stats=True,
           deduplicate=False)
PAPER = {       # steps: updates of D, half of the minibatches in the paper's epochs; the others are G's
    "64": ALL | dict(net="64", size=64, dz=100, normal=False,
                     steps=34_000),                                 # faces: 25 epochs of 350,000
    "lsun": ALL | dict(net="64", size=64, dz=100, normal=False, deduplicate=True,       # Sec. 4.1
                       steps=53_900),                               # 5 epochs of 2,758,000
    "imagenet": ALL | dict(net="imagenet", size=32, dz=256, normal=False,
                           steps=150_000),                          # 30 epochs of 1,281,167
    "svhn": ALL | dict(net="svhn", size=32, dz=100, normal=True, lr=5e-4, batch_size=64,
                       steps=114_000),                              # 200 epochs of 73,257
}
TUNED = {name: dict(    # Frechet distances of --quick --steps 800, seeds 0 and 1; with both entries 254, 470
    batch_stats=False,  # a picture depends on its z alone; with batch statistics 205, 475
    eps=1e-5)           # at 1e-8 590, 476
    for name in PAPER}
QUICK = {"64": dict(size=32, width=0.125, batch_size=32, lr=3e-4, steps=4000, clf_steps=300)}


# --------------------------------------------------------------------------------------------------- networks

def project(dz, o):
    """G's first row: z (n, dz) -> (n, o, 4, 4)."""
    return nn.Sequential(nn.Linear(dz, 16 * o, bias=False), nn.BatchNorm1d(16 * o), nn.ReLU(),
                         nn.Unflatten(1, (o, 4, 4)))


def up(i, o, k=5, stride=2):
    return nn.Sequential(nn.ConvTranspose2d(i, o, k, stride, k // 2, stride - 1, bias=False),
                         nn.BatchNorm2d(o), nn.ReLU())


def to_x(i, o, k=5, stride=2):
    """G's last row: no BatchNorm, tanh."""
    return nn.Sequential(nn.ConvTranspose2d(i, o, k, stride, k // 2, stride - 1, bias=False), nn.Tanh())


def from_x(i, o, k=5, stride=2):
    """D's first row: no BatchNorm."""
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.LeakyReLU(0.2))


def down(i, o, k=5, stride=2):
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.2))


def discriminator(trunk, o):
    """D: x -> logits a (n,).  D[0], the convolutions, outputs (n, o, 4, 4)."""
    return nn.Sequential(trunk, nn.Flatten(), nn.Linear(16 * o, 1, bias=False), nn.Flatten(0))


def net_64(dz, channels, ch):
    """64x64 (Fig. 1).  dz: size of z.  ch(n): n feature maps, scaled by --width."""
    G = nn.Sequential(
        project(dz, ch(1024)),                                      # 1024 x 4 x 4
        up(ch(1024), ch(512)),                                      # 512 x 8 x 8
        up(ch(512), ch(256)),                                       # 256 x 16 x 16
        up(ch(256), ch(128)),                                       # 128 x 32 x 32
        to_x(ch(128), channels))                                    # channels x 64 x 64
    trunk = nn.Sequential(
        from_x(channels, ch(128)),                                  # 128 x 32 x 32
        down(ch(128), ch(256)),                                     # 256 x 16 x 16
        down(ch(256), ch(512)),                                     # 512 x 8 x 8
        down(ch(512), ch(1024)))                                    # 1024 x 4 x 4
    return G, discriminator(trunk, ch(1024))


def networks(args, channels):
    """(G, D) of Sec. 3.  G: z (n, dz) -> x (n, channels, size, size) in [-1, 1].  D: x -> a (n,)."""
    table = {"64": net_64, "imagenet": net_imagenet, "svhn": net_svhn}[args.net]
    if args.size != PAPER[args.net]["size"]:
        table = functools.partial(net_of_size, args.size)
    G, D = table(args.dz, channels, lambda n: max(8, round(n * args.width)))
    for module in (*G.modules(), *D.modules()):
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.eps = args.eps
    return G.apply(init), D.apply(init)


def init(module):
    """Weights N(0, .02) (Sec. 4), BatchNorm's scale N(1, .02), its shift 0 (authors' code)."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------------------- latents

def sample_z(n, args, device="cpu"):
    """z (n, dz) ~ Unif(-1, 1); N(0, 1) for SVHN (authors' code)."""
    if args.normal:
        return torch.randn(n, args.dz, device=device)
    return torch.rand(n, args.dz, device=device) * 2 - 1


# -------------------------------------------------------------------------------------------------- objective

def V(a_real, a_fake):
    """GAN's Eq. 1: E_x[log D(x)] + E_z[log(1 - D(G(z)))], D = sigmoid(a), a (n,).  -log 4 if D = 1/2."""
    return F.logsigmoid(a_real.float()).mean() + F.logsigmoid(-a_fake.float()).mean()


def log_D(a_fake):
    """What G ascends in place of Eq. 1: E_z[log D(G(z))], a (n,).  -log 2 if D = 1/2."""
    return F.logsigmoid(a_fake.float()).mean()


# --------------------------------------------------------------------------------------------------- training

def build(args, channels):
    """G, D, their optimizers and the fused step: one update of D, then one of G."""
    G, D = place(args, *networks(args, channels))
    # Weight decay adds weight_decay * parameter to the gradient (authors' code), unlike AdamW.
    opt_D, opt_G = (Adam(net.parameters(), args.lr, betas=(0.5, 0.999), weight_decay=args.weight_decay)
                    for net in (D, G))
    amp = autocast(args)

    @fuse(args)
    def train_step(x):                                              # x (n, C, H, W) in [-1, 1]
        n, device = len(x), x.device
        # D ascends V.
        with amp:
            with torch.no_grad():
                x_fake = G(sample_z(n, args, device))
            a_real, a_fake = D(x), D(x_fake)                        # each with its own batch statistics
        v = V(a_real, a_fake)
        descend(-v, opt_D)
        # G ascends log D(G(z)) on fresh z, through the updated D.
        with amp, frozen(D):
            a_fake = D(G(sample_z(n, args, device)))
        descend(-log_D(a_fake), opt_G)
        return {"V": v, "D(x)": a_real.float().sigmoid().mean(), "D(G(z))": a_fake.float().sigmoid().mean()}

    return G, D, opt_D, opt_G, train_step


def main(argv=None):
    args = parse_args(argv)
    r = run.Run(args)
    if r.drawing:
        return export.main(r, drawer)
    pictures = data.load(args.dataset, args.data_dir, args.size, skip_bad=args.skip_bad)
    check(args, pictures)
    batches = minibatches(r, pictures.images)
    G, D, opt_D, opt_G, train_step = build(args, pictures.images.shape[1])
    r.keep(lambda: {"channels": pictures.images.shape[1]}, G=G, D=D, opt_D=opt_D, opt_G=opt_G,
           batches=batches)
    if args.weights and not args.resume:
        return keep_released(r, G, D, pictures.images)
    if args.features:
        return report_features(r, D, pictures.images.shape[1]) if r.lead else None

    # In the authors' code, every second minibatch goes to an update of G, which ignores it.  Here each one
    # updates D, then G, so one of their epochs takes half as many steps.
    epoch = -(-batches.per_epoch // 2)                              # Fig. 2: after one epoch
    for step in r.loop():
        r.log(train_step(next(batches)))
        for name, now in (("samples", r.draws()), ("fig2", step == epoch)):
            if now:
                with r.aside():
                    x = decode(G, sample_z(100, args, args.device), args)
                    r.show(name, log.grid(x, 10, args.scale))

    if r.lead:
        report(r, G, D, pictures)


# =========================================================================== Figures and numbers of the paper

def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="faces")
    add = p.add_argument_group("DCGAN").add_argument
    positive, flag = run.number(float, 0, open_low=True), argparse.BooleanOptionalAction
    add("--net", choices=("64", "imagenet", "svhn"), help="networks of Sec. 3 [imagenet for imagenet, CIFAR "
        "and colour .npz up to 32x32; svhn for svhn, MNIST and its kin and grey .npz up to 32x32; else 64]")
    add("--size", type=int, choices=(32, 64, 128, 256), help="picture size [64; imagenet, svhn 32]; "
        "--net 64 adds or drops a layer of G and D per factor of 2 (not the paper's)")
    add("--width", type=positive, default=1.0, help="feature maps, as a fraction of the paper's [1]")
    add("--lr", type=positive, help="Adam's rate, Sec. 4 [2e-4, svhn 5e-4]")
    add("--batch-stats", action=flag, help="sample with each batch's own BatchNorm statistics [--paper]")
    add("--deduplicate", action=flag, help="drop near-duplicates, Sec. 4.1 [lsun]")
    add("--weights", metavar="FOLDER", help="save the authors' released networks as a run, without training: "
        "their *_discrim_params.jl_01.npy etc. (Newmu/dcgan_code, models)")
    add("--exemplars", metavar="FILE", help="JSON file of samples picked by eye, by their --sample number: "
        '{"A": [3 numbers], "B": [3], "C": [3]} for Fig. 7, {"left": [4], "right": [4]} for Fig. 8')
    add("--features", metavar="DATASET",
        help="with --resume: classify this labelled data set by D's features, Sec. 5")
    add("--supervised", type=run.number(int, 1), nargs="?", const=TRIALS, metavar="TRIALS",
        help="with --features: train D's architecture on 100 labels per class instead; best of this many "
        "random settings [%(const)s]")
    p.set_defaults(clf_steps=None)                          # evaluation classifier; None: its default
    args = run.parse(p, argv, free=("batch_stats", "exemplars", "features", "supervised", "skip_bad"),
                     experiment=experiment, paper=PAPER, tuned=TUNED, quick=QUICK)
    if args.net != "64" and args.size != 32:
        p.error(f"--size {args.size} found, 32 expected with --net {args.net}; --net 64 takes other sizes")
    if args.features and not args.resume:
        p.error("--features needs --resume RUN: the run whose D gives the features")
    if args.supervised and not args.features:
        p.error("--supervised needs --features DATASET: the labels to learn")
    return args


def check(args, pictures):
    """Raise a UserError before training for unusable attributes or exemplars."""
    if attributes(pictures.extra):
        data.cut(len(pictures.images), 2000, 10)            # see predictor()
    if args.exemplars:
        read_exemplars(args.exemplars)


def experiment(args):
    """The row of PAPER and TUNED: --net, or the default for the data set."""
    if args.dataset == "lsun" and args.net in (None, "64"):
        return "lsun"
    if args.net:
        return args.net
    if args.dataset.endswith(".npz"):
        _, channels, size, _ = data.load(args.dataset, args.data_dir).images.shape
        return "64" if size > 32 else "imagenet" if channels == 3 else "svhn"
    rows = {"imagenet": ("imagenet", "cifar10", "cifar100"),
            "svhn": ("svhn", "mnist", "fashion-mnist", "kmnist")}
    return next((row for row, names in rows.items() if args.dataset in names), "64")


# ---------------------------------------------------------------------------------- Sec. 4.1: near-duplicates

def hashes(images, device, seed=0, steps=None):
    """Hashes (N, 16) uint8, 128 bits per picture: the active units in the code of a 3072-128-3072 denoising
    ReLU autoencoder of 32x32 pictures.  Near-duplicates have the same hash.

    images uint8 (N, C, H, W), in memory or memory-mapped.  Chosen here, since the paper is silent: input
    dropout .2; 5 epochs, at least 500 and at most 10,000 steps; the mean is subtracted, because otherwise
    most units are on for all pictures or for none.
    """
    def small(x):                                           # x in [-1, 1] -> (n, C * 32 * 32), centred
        return F.adaptive_avg_pool2d(x, 32).flatten(1) - mean

    mean = 0
    mean = small(scaled(images[::-(-len(images) // 2000)], device)).mean(0)
    batches = data.Batches(images, batch_size=min(128, len(images)), device=device, seed=seed, scale=(-1, 1))
    encoder = nn.Sequential(nn.Linear(len(mean), 128), nn.ReLU()).to(device)
    decoder = nn.Linear(128, len(mean)).to(device)
    opt = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
    for _ in range(steps or min(10_000, max(500, 5 * batches.per_epoch))):
        x = small(next(batches))
        opt.zero_grad()                                     # no descend(): only one rank runs this
        F.mse_loss(decoder(encoder(F.dropout(x, 0.2))), x).backward()
        opt.step()
    on = metrics.batched(lambda x: (encoder(small(scaled(x, device))) > 0).cpu(), images)
    return torch.from_numpy(np.packbits(on.numpy(), 1))


def first_of_each(codes):
    """codes (N, 16) uint8 -> (k,) ascending indices, the first of each set of equal rows.  1, 2, 1: 0, 1."""
    rows = codes.contiguous().numpy().view([("a", "u8"), ("b", "u8")])[:, 0]
    return torch.from_numpy(np.sort(np.unique(rows, return_index=True)[1]))


class Subset(data.Batches):
    """Minibatches of only the pictures `kept` (k,); checkpoints store the list."""

    def __init__(self, images, kept, **feed):
        super().__init__(images, **feed)
        self.keep(kept)

    def keep(self, kept):
        need(len(kept) >= self.batch, f"at least {self.batch} pictures without near-duplicates", len(kept))
        self.kept, self.n = kept.to(self.device if self.resident else "cpu"), len(kept)
        self.per_epoch = self.n // self.batch

    def _index(self):
        return self.kept[super()._index()]

    def state_dict(self):
        return super().state_dict() | {"n": len(self.tensors[0]), "kept": self.kept}

    def load_state_dict(self, state):
        self.n = len(self.tensors[0])                       # expected to equal the checkpoint's
        super().load_state_dict(state)
        self.keep(state["kept"])


def minibatches(r, images):
    """Minibatches of `images`; with args.deduplicate, of only the first of each set of near-duplicates."""
    feed, kept = {"scale": r.args.scale, **r.feed}, [torch.arange(len(images))]
    if not r.args.deduplicate:
        return data.Batches(images, **feed)
    if r.lead and not r.args.resume:                        # checkpoints store the list
        log.say("hashing the pictures to find near-duplicates")
        with r.aside():
            kept = [first_of_each(hashes(images, r.args.device, r.args.seed))]
        log.say(f"{len(images) - len(kept[0]):,} of {len(images):,} pictures are near-duplicates")
    if r.world > 1:
        dist.broadcast_object_list(kept)
    return Subset(images, kept[0], **feed)


# ---------------------------------------------------------------------------- the authors' released networks

def read_released(folder, part, net):
    """Load `net` from FOLDER/*_PART_params.jl_01.npy etc., plain arrays next to a joblib file.

    Theano convolves and PyTorch correlates: kernels are rotated by 180 degrees.  Matrices are transposed.
    UserError: missing or unreadable arrays, wrong shapes, NaN or infinite values.
    """
    files, params = sorted(Path(folder).glob(f"*_{part}_params.jl_*.npy")), list(net.parameters())
    need(len(files) == len(params), f"{len(params)} files *_{part}_params.jl_*.npy in {folder}", len(files))
    for path, p in zip(files, params):
        try:
            a = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"{path} cannot be read as an array: {e}") from None
        a = a.flip(2, 3) if a.dim() == 4 else a.T if a.dim() == 2 else a
        need(a.shape == p.shape, f"shape {tuple(p.shape)} in {path}", tuple(a.shape))
        need(a.isfinite().all(), f"finite values in {path}", "NaN or infinity")
        with torch.no_grad():
            p.copy_(a)


def keep_released(r, G, D, images):
    """--weights: save the released networks as a run of 0 steps, for samples and features.  They lack
    running statistics; these are computed from 100 minibatches."""
    args = r.args
    for part, net in (("gen", G), ("discrim", D)):
        read_released(args.weights, part, net)
    with r.aside():
        calibrate(G, ([sample_z(args.batch_size, args, args.device)] for _ in range(100))).train()
        data_statistics(D, images[:100 * 128], args.device).train()
    r.save()
    log.say(f"saved in {r.folder}: continue with --resume {r.folder} --sample 100, or --features svhn")


# ---------------------------------------------------------------------------- networks of the other data sets

def net_imagenet(dz, channels, ch):
    """32x32 ImageNet, 3x3 kernels (authors' code): every second convolution halves the resolution."""
    G = nn.Sequential(
        project(dz, ch(512)),                                       # 512 x 4 x 4
        up(ch(512), ch(512), 3),                                    # 512 x 8 x 8
        up(ch(512), ch(256), 3, 1),                                 # 256 x 8 x 8
        up(ch(256), ch(256), 3),                                    # 256 x 16 x 16
        up(ch(256), ch(128), 3, 1),                                 # 128 x 16 x 16
        up(ch(128), ch(128), 3),                                    # 128 x 32 x 32
        to_x(ch(128), channels, 3, 1))                              # channels x 32 x 32
    trunk = nn.Sequential(
        from_x(channels, ch(128), 3, 1),                            # 128 x 32 x 32
        down(ch(128), ch(128), 3),                                  # 128 x 16 x 16
        down(ch(128), ch(256), 3, 1),                               # 256 x 16 x 16
        down(ch(256), ch(256), 3),                                  # 256 x 8 x 8
        down(ch(256), ch(512), 3, 1),                               # 512 x 8 x 8
        down(ch(512), ch(512), 3))                                  # 512 x 4 x 4
    return G, discriminator(trunk, ch(512))


def net_svhn(dz, channels, ch):
    """32x32 SVHN (authors' code)."""
    G = nn.Sequential(
        project(dz, ch(256)),                                       # 256 x 4 x 4
        up(ch(256), ch(128)),                                       # 128 x 8 x 8
        up(ch(128), ch(64)),                                        # 64 x 16 x 16
        to_x(ch(64), channels))                                     # channels x 32 x 32
    trunk = nn.Sequential(
        from_x(channels, ch(64)),                                   # 64 x 16 x 16
        down(ch(64), ch(128)),                                      # 128 x 8 x 8
        down(ch(128), ch(256)))                                     # 256 x 4 x 4
    return G, discriminator(trunk, ch(256))


def net_of_size(size, dz, channels, ch):
    """The 64x64 networks for 32, 128 or 256 (not the paper's): each doubling adds a layer to G and D, with
    half as many maps."""
    maps = [ch(n) for n in (1024, 512, 256, 128, 64, 32)][:int(math.log2(size)) - 2]
    G = [project(dz, maps[0]), *(up(i, o) for i, o in itertools.pairwise(maps)), to_x(maps[-1], channels)]
    trunk = [from_x(channels, maps[-1]), *(down(i, o) for i, o in itertools.pairwise(reversed(maps)))]
    return nn.Sequential(*G), discriminator(nn.Sequential(*trunk), maps[0])


# ---------------------------------------------------------------------------------------------------- drawing

def decode(G, z, args, net=None):
    """Pictures (n, C, H, W) of z (n, dz); or the output for z of `net`, a function that uses parts of G.

    With running statistics, a picture depends on its z alone.  `args.batch_stats` uses batch statistics
    (authors' code).  Half of each batch is then fresh z: in a batch of similar pictures, BatchNorm would
    remove what they have in common.
    """
    net = net or G
    if not args.batch_stats:
        with sampling(G):
            return metrics.batched(net, z)
    with batch_statistics(G):
        return torch.cat([among_fresh(net, part, args) for part in z.split(args.batch_size // 2)])


def among_fresh(net, z, args):
    """net(z), the rest of the batch being half a batch of fresh z."""
    fresh = sample_z(args.batch_size // 2, args, z.device)
    return net(torch.cat([z, fresh]))[:z.shape[0]]          # not len(z), which torch.export makes a constant


@contextlib.contextmanager
def batch_statistics(net):
    """Within the block, BatchNorm uses batch statistics and leaves the running ones unchanged."""
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for m in norms:
        m.track_running_stats = False
    try:
        with torch.no_grad():
            yield
    finally:
        for m in norms:
            m.track_running_stats = True


def latents(n, args):
    """n fresh z (n, dz), drawn 500 at a time: the first ones do not depend on n, so --sample draws the
    pictures that the figures use."""
    return torch.cat([sample_z(500, args, args.device) for _ in range(-(-n // 500))])[:n]


def draw(G, args, n):
    """n fresh pictures x (n, C, H, W) and their z (n, dz)."""
    z = latents(n, args)
    return decode(G, z, args), z


def drawer(args, saved):
    """Sampler of a trained run: z -> pictures."""
    G, _ = networks(args, saved["about"]["channels"])
    function, rest = G, {}
    if args.batch_stats:
        function = functools.partial(among_fresh, G, args=args)
        rest = {"within": lambda: batch_statistics(G), "size": args.batch_size // 2}
    return export.Drawer(function, lambda n: (latents(n, args),), {"G": G}, {"z": []}, args.scale, **rest)


def walk(z, columns=10):
    """Sec. 6.1: z (n, dz) -> ((n - 1) * columns, dz), each row a straight line from one z to the next."""
    t = torch.linspace(0, 1, columns, device=z.device).view(1, -1, 1)
    return ((1 - t) * z[:-1, None] + t * z[1:, None]).flatten(0, 1)


def a_minus_b_plus_c(v, picks):
    """Sec. 6.3.2: mean A - mean B + mean C.  v (N, ...): latents, or pictures for the baseline; picks: three
    tensors (R, k) of exemplar indices into v -> (R, ...).  The mean of A if B = C."""
    A, B, C = (v[i].mean(1) for i in picks)
    return A - B + C


def turn(z, left, right, columns=9):
    """Fig. 8: z (n, dz) -> (n, columns, dz), z + t (mean right - mean left) with t from -1 to 1.  left, right
    (k, dz): exemplars.  The middle column is z."""
    t = torch.linspace(-1, 1, columns, device=z.device).view(1, -1, 1)
    return z[:, None] + t * (right.mean(0) - left.mean(0))


# --------------------------------------------------------------------------------- Sec. 6.2: what D looks for

class Guided(torch.autograd.Function):
    """Leaky ReLU whose backward pass keeps only positive gradients, and only at positive inputs."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.leaky_relu(x, 0.2)

    @staticmethod
    def backward(ctx, g):
        return g.clamp(min=0) * (ctx.saved_tensors[0] > 0)


def guided(D, x, feature):
    """Guided backpropagation: the gradient (n, C, H, W) of the maximum of map `feature` of D's last
    convolution with respect to each of the pictures x (n, C, H, W)."""
    x = h = x.detach().requires_grad_()
    for convolution in D[0]:
        h = Guided.apply(convolution[:-1](h))
    return torch.autograd.grad(h[:, feature].flatten(1).max(1).values.sum(), x)[0]


def draw_fig5(D, images, device, n=8):
    """Fig. 5: guided backpropagation for the first 6 features of D's last convolution, one per row, on the n
    pictures that activate each most: (6 n, C, H, W), each scaled to fill [-1, 1]."""
    D, x = data_statistics(copy.deepcopy(D), images, device), scaled(images, device)
    response = metrics.batched(lambda x: D[0](x)[:, :6].amax((2, 3)), x, size=250)
    best = response.topk(min(n, len(x)), 0).indices        # (n, 6)
    g = torch.cat([guided(D, x[best[:, k]], k) for k in range(6)])
    return g / g.flatten(1).abs().amax(1).clamp_min(1e-12).view(-1, 1, 1, 1)


# ------------------------------------------------------------------- Sec. 6.3: arithmetic on known attributes

POOL = 2000       # exemplars are picked from this many samples; the paper picked by eye (--exemplars)
COVERED = "% of azimuths covered"
EQUATIONS = (     # Fig. 7: A - B + C = Y; "-beard": no beard
    ("smile long_hair -beard", "-smile long_hair -beard", "-smile -long_hair beard", "smile beard"),
    ("glasses -long_hair beard", "-glasses -long_hair beard", "-glasses long_hair -beard",
     "glasses long_hair"),
    ("Smiling -Male", "-Smiling -Male", "-Smiling Male", "Smiling Male"),                       # CelebA
    ("Eyeglasses Male", "-Eyeglasses Male", "-Eyeglasses -Male", "Eyeglasses -Male"),
)


def signed_logits(a, concept, names):
    """Logits (N, k) of each word of a concept such as "smile -beard", sign flipped if the word is negated.

    a (N, A): logits of the attributes `names`.  If all are positive, the predictor detects the concept.
    """
    words = [(1, w) if w[0] != "-" else (-1, w[1:]) for w in concept.split()]
    return torch.stack([sign * a[:, names.index(w)] for sign, w in words], 1)


def log_p(a, concept, names):
    """Log probability (N,) that a picture matches every word of a concept.  -k log 2 for k words at a = 0."""
    return F.logsigmoid(signed_logits(a, concept, names)).sum(1)


def percent(a, concept, names):
    """Percentage of pictures in which the predictor detects `concept`."""
    return 100 * (signed_logits(a, concept, names) > 0).all(1).cpu().double().mean().item()


def pick_exemplars(score, repeats, k):
    """Indices (repeats, k) of samples with high scores (N,): row 0 holds the k best, each other row k random
    ones of the 10 k best."""
    best = score.topk(min(10 * k, len(score))).indices
    rows = torch.rand(repeats, len(best), device=best.device).argsort(1)[:, :k]
    rows[0] = torch.arange(k, device=best.device)
    return best[rows]


def read_exemplars(path):
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


def attributes(extra):
    """Name -> (N,) in [0, 1]: the data's binary attributes that vary, and azimuth; empty if it has neither.

    UserError: attributes or factors that are not numbers (N, A).
    """
    for key in ("attributes", "factors"):
        if key in extra and not (torch.is_tensor(extra[key]) and extra[key].ndim == 2):
            raise UserError(f"{key}: expected numbers (N, A), one row per picture")
    none = torch.empty(0, 0)
    binary = zip(extra.get("attribute_names", ()), extra.get("attributes", none).float().T)
    columns = {name: y for name, y in binary if ((y == 0) | (y == 1)).all() and 0 < y.mean() < 1}
    for name, y in zip(extra.get("factor_names", ()), extra.get("factors", none).float().T):
        if name == "azimuth" and y.max() > y.min():
            columns[name] = (y - y.min()) / (y.max() - y.min())
    return columns


def predictor(args, pictures, columns):
    """(classifier, accuracy in %).  The classifier predicts the columns of attributes().  It picks exemplars
    and judges results; the paper did both by eye.  Its accuracy, azimuth left out, is on the held-out last
    tenth of the pictures, at most 2,000."""
    y, n = torch.stack([*columns.values()], 1), data.cut(len(pictures.images), 2000, 10)
    clf = metrics.classifier(pictures.images[:n], y[:n], args.device, args.data_dir, args.clf_steps)
    right = (metrics.logits(clf, pictures.images[n:]) > 0).cpu() == (y[n:] > 0.5)
    return clf, 100 * right[:, [name != "azimuth" for name in columns]].double().mean().item()


def arithmetic(G, args, clf, names, z, x, a, equation, repeats=200):
    """dcgan-arith: percentage of A - B + C that the predictor calls Y, over `repeats` sets of 3 exemplars.

    z (N, dz), their pictures x and logits a -> (dict with the results in latent and pixel space, the picks).
    """
    *concepts, Y = equation
    picks = [pick_exemplars(log_p(a, concept, names), repeats, 3) for concept in concepts]
    results = decode(G, a_minus_b_plus_c(z, picks), args), a_minus_b_plus_c(x, picks).clamp(-1, 1)
    latent, pixels = (percent(metrics.logits(clf, (y + 1) / 2), Y, names) for y in results)
    return {"value": latent, "pixels": pixels, "samples": percent(a, Y, names),
            "unit": f"% called {Y}"}, picks


def draw_fig7(G, args, z, x, picks):
    """Fig. 7, 3 rows of 10: for each of A, B and C, 3 exemplars and the picture of their mean z; Y and 8
    neighbours Y + Unif(-.25, .25); and the same arithmetic on pixels."""
    picks = [i[:1] for i in picks]
    means = decode(G, torch.cat([z[i].mean(1) for i in picks]), args)
    near = a_minus_b_plus_c(z, picks) + (torch.rand(9, z.shape[1], device=z.device) * 0.5 - 0.25)
    near[4] = a_minus_b_plus_c(z, picks)[0]
    near, gap = decode(G, near, args), torch.ones_like(x[:1])
    pixels = [gap, a_minus_b_plus_c(x, picks).clamp(-1, 1), gap]
    rows = [torch.cat([x[i[0]], means[k:k + 1], gap, near[3 * k:3 * k + 3], gap, pixels[k]])
            for k, i in enumerate(picks)]
    return torch.cat(rows)


def turning(G, args, clf, names, z, a, repeats=20, n=10):
    """dcgan-turn: mean rank correlation of the position along the turn with the predicted azimuth, over
    `repeats` turn vectors of 4 + 4 exemplars and n samples each -> (dict, the picks).

    After two steps G already has .98 through differences too small to see, so read it with COVERED: azimuth
    at the end minus that at the start, in % of the data's range (--quick: .3 after 2 steps, 78 after 4,000).
    """
    azimuth = a[:, names.index("azimuth")]
    left, right = pick_exemplars(-azimuth, repeats, 4), pick_exemplars(azimuth, repeats, 4)
    rho, covered = [], []
    for i, j in zip(left, right):
        path = turn(z[torch.randperm(len(z), device=z.device)[:n]], z[i], z[j])
        a = metrics.logits(clf, (decode(G, path.flatten(0, 1), args) + 1) / 2)
        found = a[:, names.index("azimuth")].cpu().view(path.shape[:2])
        rho += [metrics.rank_correlation(torch.arange(len(f)), f) for f in found]
        covered += (found[:, -1].sigmoid() - found[:, 0].sigmoid()).tolist()
    return {"value": sum(rho) / len(rho), COVERED: 100 * sum(covered) / len(covered),
            "unit": "rank correlation with azimuth"}, (left, right)


def forget(G, args, z, has, z_new, clf, names, word):
    """dcgan-window: drop the maps of G's second-highest hidden convolution that have a positive weight in a
    logistic regression for `word`.

    The regression predicts has (N,) from the mean of each map for z (N, dz); the paper's used activations
    inside and outside hand-drawn boxes.  z_new (n, dz): new pictures with `word`, for evaluation.  -> (dict
    with the percentage that still has it, 3 rows of up to 10 pictures: original, without those maps, without
    as many random ones).
    """
    k = len(G) - 2                                          # G[:k] ends with that convolution
    h = decode(G, z, args, lambda z: G[:k](z).mean((2, 3)))
    h = (h - h.mean(0)) / h.std(0).clamp_min(1e-6)
    regression = nn.Linear(h.shape[1], 1).to(z.device)
    opt = torch.optim.Adam(regression.parameters(), 0.02)
    for _ in range(500):
        opt.zero_grad()                                     # no descend(): only one rank runs this
        F.binary_cross_entropy_with_logits(regression(h)[:, 0], has.float()).backward()
        opt.step()
    drop = regression.weight.detach()[0] > 0
    chance = drop[torch.randperm(len(drop), device=drop.device)]
    rows, still = [decode(G, z_new[:10], args)], []
    for maps in (drop, chance):
        x = decode(G, z_new, args, lambda z, maps=maps: G[k:](G[:k](z) * ~maps.view(-1, 1, 1)))
        rows.append(x[:10])
        still.append(percent(metrics.logits(clf, (x + 1) / 2), word, names))
    return {"value": still[0], "as many maps at random": still[1], "maps": int(drop.sum()),
            "unit": f"% still with {word}"}, torch.cat(rows)


# ---------------------------------------------------------------------------------- Sec. 5: D as a classifier

CS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
PROTOCOLS = {    # Tables 1 and 2; any other data: all labels, one fit
    "cifar10": {"dcgan-cifar": {}, "dcgan-cifar-400": {"per_class": 400, "draws": 5}},
    "svhn": {"dcgan-svhn": {"per_class": 100, "draws": 100, "tries": 10,
                            "Cs": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)}},
}
PUBLISHED = {    # (data of the labels, data of the GAN, network, width): % right, % right, % error
    ("cifar10", "imagenet", "imagenet", 1.0): {"dcgan-cifar": 82.8, "dcgan-cifar-400": 73.8},
    ("svhn", "svhn", "svhn", 1.0): {"dcgan-svhn": 22.48, "dcgan-svhn-base": 28.87},
}
TRIALS = 64      # random settings of the supervised network (Sec. 5.2)


def published(args, key):
    """{"paper": value} where data, network and protocol are the paper's, else {}."""
    values = PUBLISHED.get((args.features, args.dataset, args.net, args.width), {})
    return {"paper": values[key]} if key in values else {}


def scaled(images, device):
    """uint8 pictures as float32 in [-1, 1] on the device."""
    return images.to(device).float() / 127.5 - 1


def data_statistics(D, images, device):
    """D in eval mode, with running statistics averaged over minibatches of 128 `images` (authors' code)."""
    calibrate(D[0], ([scaled(x, device)] for x in images.split(128)))
    return D.eval()


def features(D, images, device):
    """Sec. 5.1: every convolution of D max-pooled to 4x4, (N, 16 * maps) float16, not rescaled.

    28,672 features per picture for the ImageNet networks (2.9 GB for 50,000 pictures), 7,168 for SVHN's.
    """
    def pooled(x):
        x, h = scaled(x, device), []
        for convolution in D[0]:
            x = convolution(x)
            h.append(F.adaptive_max_pool2d(x, 4).flatten(1).half())
        return torch.cat(h, 1)

    return metrics.batched(pooled, images)


def balanced(y, rows, per_class):
    """`per_class` random `rows` for each label in y; all rows if `per_class` is None."""
    if per_class is None:
        return rows
    rows = rows[torch.randperm(len(rows), device=rows.device)]
    return torch.cat([rows[y[rows] == k][:per_class] for k in y.unique()])


def svm_errors(X, y, X_test, y_test, per_class=None, draws=1, tries=1, Cs=CS):
    """Test errors in % of `draws` L2-SVMs, each on `per_class` labels per class (None: all), and their C.

    C is chosen on a held-out sixth of the training pictures, at most 10,000, with `tries` draws of labels
    that are the same for each C.  These fits use tol = 1e-2.
    """
    def error(w, X_eval, y_eval):
        return 100 * (svm_predict(w, X_eval) != y_eval).double().mean().item()

    order, n, valid = torch.randperm(len(y), device=y.device), min(10000, len(y) // 6), {}
    held, pool = order[:n], order[n:]
    trials = [balanced(y, pool, per_class) for _ in range(tries)]
    for C in Cs:
        valid[C] = sum(error(l2_svm(X[i], y[i], C, 1e-2), X[held], y[held]) for i in trials) / tries
        log.say(f"L2-SVM, C {C:g}: {valid[C]:.2f} % validation error")
        if valid[C] > min(valid.values()) + 0.5:            # larger C are worse and slow to solve
            break
    C = min(valid, key=valid.get)
    draws = [balanced(y, order if per_class is None else pool, per_class) for _ in range(draws)]
    return torch.tensor([error(l2_svm(X[rows], y[rows], C), X_test, y_test) for rows in draws]), C


def supervised(args, channels, X, y, X_test, y_test, per_class=100, epochs=60):
    """Sec. 5.2: D's architecture with one logit per class, trained from scratch on `per_class` labels each.

    The paper reports the validation error of the best of 64 random settings and does not say which settings
    vary: here Adam's rate, weight decay and dropout before the last layer.  Returns a dict with that error in
    %, on a held-out sixth of the pictures, at most 10,000, and the test error of the same network.
    """
    def error(X, y):
        a = metrics.batched(net, X, scale=args.scale)
        return 100 * (a.argmax(1).cpu() != y).double().mean().item()

    order, n, best = torch.randperm(len(y)), min(10000, len(y) // 6), None
    held, rows = order[:n], balanced(y, order[n:], per_class)
    images, labels = scaled(X[rows], args.device), y[rows].to(args.device)
    for trial in range(args.supervised):
        u = torch.rand(3)
        lr, decay, dropout = 10 ** (-4 + 2 * u[0]).item(), 10 ** (-6 + 4 * u[1]).item(), u[2].item() / 2
        trunk, flatten, head, _ = networks(args, channels)[1]
        net = nn.Sequential(trunk, flatten, nn.Dropout(dropout),
                            nn.Linear(head.in_features, int(y.max()) + 1)).to(args.device)
        opt = torch.optim.Adam(net.parameters(), lr, weight_decay=decay)
        for _ in range(epochs):
            for i in torch.randperm(len(rows), device=args.device).split(100):
                opt.zero_grad()                             # no descend(): only one rank runs this
                F.cross_entropy(net(images[i]), labels[i]).backward()
                opt.step()
        found = {"value": error(X[held], y[held]), "test": error(X_test, y_test), "rate": lr,
                 "weight decay": decay, "dropout": dropout}
        best = found if best is None or found["value"] < best["value"] else best
        log.say(f"supervised, {trial + 1} of {args.supervised}: {found['value']:.2f} % validation error, "
                f"best {best['value']:.2f}")
    return best | {"trials": args.supervised, "unit": "% validation error"}


def report_features(r, D, channels):
    """Tables 1 and 2: evaluate D's features on --features, or with --supervised D's architecture.  Writes a
    separate results.json."""
    args = r.args
    pictures = data.load(args.features, args.data_dir, args.size, channels, skip_bad=args.skip_bad)
    if pictures.labels is None:
        raise UserError(f"--features {args.features}: this data set has no labels, which the SVM needs")
    images, y, test, y_test = pictures.images, pictures.labels, pictures.test_images, pictures.test_labels
    images, y = (images[y >= 0], y[y >= 0]) if y.min() < 0 else (images, y)
    if y_test is None or not 0 <= y_test.min() <= y_test.max() <= y.max():      # hold out every sixth picture
        held = torch.arange(len(y)) % 6 == 0
        images, y, test, y_test = images[~held], y[~held], images[held], y[held]
    trained = r.folder
    r.folder = trained / (f"supervised-{pictures.name}" if args.supervised else f"features-{pictures.name}")
    r.folder.mkdir(exist_ok=True)
    shutil.copy(trained / "metrics.jsonl", r.folder)        # results() looks up the seconds of training
    if args.supervised:
        with r.aside():
            found = supervised(args, channels, images, y, test, y_test)
        key = f"dcgan-{pictures.name}-base"
        return r.results({key: found | (published(args, key) if args.supervised == TRIALS else {})})
    log.say(f"features of {len(images) + len(test):,} pictures")
    data_statistics(D, images, args.device)
    X, X_test = (precise(features(D, x, args.device)) for x in (images, test))
    y, y_test = y.to(X.device), y_test.to(X.device)
    results = {}
    for key, how in PROTOCOLS.get(pictures.name, {f"features-{pictures.name}": {}}).items():
        with r.aside():
            errors, C = svm_errors(X, y, X_test, y_test, **how)
        value = errors if key == "dcgan-svhn" else 100 - errors
        spread = {"std": value.std().item(), "draws": len(value)} if len(value) > 1 else {}
        results[key] = {"value": value.mean().item(), **published(args, key), **spread, "C": C,
                        "features": X.shape[1], "unit": "% error" if key == "dcgan-svhn" else "% right"}
    r.results(results)


# ------------------------------------------------------------------------------------------------ the L2-SVM

SINGLE = 2 ** 25  # more feature values than this: l2_svm uses float32, in half the memory and time


@torch.no_grad()
def l2_svm(features, labels, C=1.0, tol=1e-4):
    """L2-SVM, one vs. rest: min (|w|^2 + b^2) / 2 + C sum_i max(0, 1 - y_i (w.x_i + b))^2, y_i = +-1.

    features (N, d), labels (N,) integers >= 0.  Returns (d + 1, classes) float64, the last row b, by L-BFGS
    until each class is within a relative tol of its minimum; warns if 2,000 steps do not suffice.
    x = -1, 1 with labels 0, 1: for label 1, w = 4 C / (1 + 4 C), b = 0.  Same objective as scikit-learn's
    LinearSVC(C=C, dual=False).
    """
    n, d = features.shape
    dtype = torch.float32 if features.numel() > SINGLE else torch.float64
    X = torch.ones(n, d + 1, dtype=dtype, device=features.device)
    X[:, :d] = features
    Y = 2 * F.one_hot(labels.long()).T.double() - 1         # (classes, N)
    # w is in the span of the points: with X^T = Q R, w = Q u, and u solves the n x n problem R^T.
    few = n <= min(d, 2000)                                 # for more points Q and R cost more than they save
    if few:
        Q, R = torch.linalg.qr(X.T)
        X, Q = R.T.contiguous(), Q.double()

    def objective():                                        # (classes,), and its gradient in w.grad
        slack = (1 - Y * (w.to(X) @ X.T).double()).clamp(min=0)
        w.grad = w - 2 * C * ((Y * slack).to(X) @ X).double()
        return w.square().sum(1) / 2 + C * slack.square().sum(1)

    w = Y.new_zeros(len(Y), X.shape[1])
    opt = torch.optim.LBFGS([w], max_iter=10, tolerance_grad=0, tolerance_change=0,
                            line_search_fn="strong_wolfe")
    for _ in range(200):
        opt.step(lambda: objective().sum())
        # The curvature is at least 1, so the objective is at most |gradient|^2 / 2 above its minimum.
        f = objective()
        gap = (w.grad.square().sum(1) / 2 / f).max().item()
        if gap <= tol:
            break
    else:
        warnings.warn(f"l2_svm: up to {gap:.1e} above the minimum", stacklevel=2)
    return Q @ w.T if few else w.T.contiguous()


def svm_predict(w, features):
    """(N,) labels argmax_k w_k.x + b_k of features (N, d), for weights w (d + 1, classes) from l2_svm."""
    return torch.cat([(x.to(w) @ w[:-1] + w[-1]).argmax(1) for x in features.split(1000)])


# ----------------------------------------------------------------------------------------------------- report

def figures(r, G, D, images):
    """Write Figs. 3, 4 and 5 (untrained D and trained D side by side) to the run's folder."""
    args = r.args
    with r.aside():
        r.show("fig3", log.grid(decode(G, sample_z(100, args, args.device), args), 10, args.scale))
        r.show("fig4", log.grid(decode(G, walk(sample_z(9, args, args.device)), args), 10, args.scale))
        untrained = networks(args, images.shape[1])[1].to(args.device)
        left, right = (log.grid(draw_fig5(net, images[:1000], args.device), 8, args.scale)
                       for net in (untrained, D))
        r.show("fig5", torch.cat([left, left.new_full((3, left.shape[1], 8), 255), right], 2))


def evaluate(r, G, pictures):
    """Figs. 6, 7 and 8 and the results that the data's attributes or labels allow: experiment id -> dict."""
    args, results, picks, clf = r.args, {}, {}, None
    x, z = draw(G, args, POOL)                              # the first POOL that --sample draws
    columns = attributes(pictures.extra)
    if columns:
        names = list(columns)
        clf, right = predictor(args, pictures, columns)
        a = metrics.logits(clf, (x + 1) / 2)
        if names != ["azimuth"]:
            results["predictor"] = {"value": right, "unit": "% of held-out attributes right"}
        able = [e for e in EQUATIONS if {w.lstrip("-") for w in " ".join(e).split()} <= set(names)]
        for ending, letter, equation in zip(("", "-2"), "ab", able):
            results[f"dcgan-arith{ending}"], abc = arithmetic(G, args, clf, names, z, x, a, equation)
            r.show(f"fig7{letter}", log.grid(draw_fig7(G, args, z, x, abc), 10, args.scale))
        if "azimuth" in names:
            results["dcgan-turn"], (picks["left"], picks["right"]) = turning(G, args, clf, names, z, a)
        word = "Eyeglasses" if "Eyeglasses" in names else "glasses"
        if word in names and 0 < percent(a, word, names) < 100:
            x_new, z_new = draw(G, args, POOL)
            has, has_new = (b[:, names.index(word)] > 0 for b in (a, metrics.logits(clf, (x_new + 1) / 2)))
            if has_new.any():
                results["dcgan-window"], rows = forget(G, args, z, has, z_new[has_new], clf, names, word)
                r.show("fig6", log.grid(rows, len(rows) // 3, args.scale))
    elif data.tell(pictures.labels) and pictures.labels.min() >= 0:
        clf = metrics.classifier(pictures.images, pictures.labels, args.device, args.data_dir,
                                 args.clf_steps)
    if clf is not None:
        real = pictures.images if pictures.test_images is None else pictures.test_images
        real = real[::-(-len(real) // POOL)]                # strided: a test set may be sorted by class
        if len(real) > 1:
            results["frechet"] = {"value": metrics.frechet_distance(clf, (x + 1) / 2, real)}
    if args.exemplars:
        picks |= read_exemplars(args.exemplars)
        if "A" in picks:
            r.show("fig7", log.grid(draw_fig7(G, args, z, x, [picks[k] for k in "ABC"]), 10, args.scale))
    if "left" in picks:
        path = turn(sample_z(8, args, args.device), *(z[picks[k][0]] for k in ("left", "right")))
        r.show("fig8", log.grid(decode(G, path.flatten(0, 1), args), 9, args.scale))
    return results


def report(r, G, D, pictures):
    """Figures and results.json."""
    figures(r, G, D, pictures.images)
    with r.aside():
        results = evaluate(r, G, pictures)
    r.results(results, passed=r.args.dataset != "faces" or passes(results, r.args))


def passes(results, args):
    """--check: heads turn in order over 30 % of the data's azimuths, and at full width half of the sums of
    Fig. 7b have glasses and long hair."""
    turned, sums = results["dcgan-turn"], results["dcgan-arith-2"]
    return turned["value"] >= 0.8 and turned[COVERED] >= 30 and (args.width < 1 or sums["value"] >= 50)


if __name__ == "__main__":
    main()

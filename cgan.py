"""Conditional Generative Adversarial Nets
Mehdi Mirza, Simon Osindero, 2014.  arXiv:1411.1784

Generator and discriminator both see a condition y, so that G draws what y asks for: a digit, or the tags of
a picture.

    Eq. 1, 2  min_G max_D  V(D, G) = E_x[log D(x|y)] + E_z[log(1 - D(G(z|y)))]               -> V()
    Fig. 1    noise z and condition y, or x and y, joined in one hidden representation       -> Joint
    Sec. 4.1  networks of multi-layer perceptrons for MNIST                                  -> networks()
    Table 1   log-likelihood of the test images under a Parzen window of samples             -> evaluate()
    Fig. 2    digits, each row of one label                                                  -> rows()
    Sec. 4.2  vectors of words, networks that draw one for a picture                         -> word_vectors()
              the words most often near to samples                                           -> tag()
    Table 2   generated tags beside a picture's own                                          -> tagging()

Radford et al., arXiv:1511.06434, App. A (DCGAN)
    the label beside the input of every layer                                                -> Labelled
    Table 3   error of a nearest-neighbour classifier fitted on samples                      -> nn_error()

Run
    python cgan.py                                     (MNIST: Table 1, Fig. 2)
    python cgan.py --net dcgan28                       (MNIST: DCGAN's Table 3)
    python cgan.py --dataset cifar100                  (noise and label, label alone, noise alone)
    python cgan.py --dataset faces
    python cgan.py --dataset shapes                    (Table 2)

Expect
    cgan-mnist-ll  158.0, 160.0, 162.0 nats of seeds 0 to 2 (paper 132 +- 1.8), 92 to 95 % of the samples with
                   the label asked for: --steps 20000, 14 minutes on one core of an AMD EPYC with
                   AVX512-BF16, torch 2.14.1, bfloat16; 113.5 after 25,000 steps with --average 0
    dcgan-mnist-1nn  3.13 % (paper 2.98), 99.5 % with the label asked for: --net dcgan28, 61 minutes on the
                   same core, seed 0; 3.79 % after --steps 6000, 7.27 (95.3) after 1000
    cgan-flickr    61.8 % precision at 10 (the nearest pictures' tags 74.0, the most frequent words 45.2):
                   --dataset shapes, 15 minutes on the same core, shared

Deviations
    [dev 1] On MNIST's perceptrons and on tags D and G step together, from one pass, both at the old
            parameters, as in the code of GAN's authors.  --alternate: D first, then G through the new D.
    [dev 2] G ascends log D(G(z|y)) in place of descending log(1 - D(G(z|y))): GAN Sec. 3.
    [dev 3] DCGAN's networks: each minibatch serves D and then G (the authors' code: one of them in turn).
    [dev 4] dcgan32 is no network of either paper: DCGAN's for SVHN with the labels of its App. A.
    [dev 5] Tags: in place of MIR-Flickr, convolutional features of 21,000 ImageNet classes and skip-gram
            vectors of 247,465 words, pictures of any tagged set, features of a small classifier of their
            tags, and vectors from how often words tag one picture.
    [dev 6] The digits' noise, in the paper from the unit hypercube, is from the one of GAN's code: around 0,
            of unit variance.  From 0 to 1 its mean outweighs it: after 1,000 steps of a narrow network a
            pixel varied by 0.000 (standard deviation) over the samples of a label, around 0 by 0.025.
    [dev 7] Of a vocabulary under 2,000 words, a sample votes for its nearest hundredth, one at least, not for
            the nearest 20.  Words of shapes lie far apart: with several votes each, samples that are exactly
            the picture's own tags would vote for words that it lacks, too.
    [dev 8] Samples are drawn with G's dropout on, which the paper does not say.  It is noise like z to D, and
            G leaves most of the variety to it: near step 20,000 the log-likelihood was 26 without, 115 with.
    [dev 9] What draws is a running average of G's weights.  --average 0: G as it is.
    [dev 10] Tags: D sees word vectors, real and drawn, with noise N(0, 1.5^2) added.  Few words are isolated
            points, which D would tell from samples by their place alone.
"""

import contextlib
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


class Joint(nn.Module):
    """Fig. 1: a layer for u (z or x), one for the condition y, and what follows on both side by side."""

    def __init__(self, u, y, both):
        super().__init__()
        self.u, self.y, self.both = u, y, both

    def forward(self, u, y):
        return self.both(torch.cat([self.u(u), self.y(y)], 1))


class Labelled(nn.Sequential):
    """DCGAN App. A: every layer sees the label vector y (n, K) too, beside its input, as K constant maps if
    that has maps."""

    def forward(self, h, y):
        for layer in self:
            h = layer(beside(h, y))
        return h


def beside(h, y):
    """h (n, d) and y (n, K) -> (n, d + K); h (n, d, H, W) and y -> (n, d + K, H, W), each y_k a constant
    map."""
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


def fc(i, o, activation):
    return nn.Sequential(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o, affine=False), activation)


def bn(o, activation):
    return nn.Sequential(nn.BatchNorm2d(o, affine=False), activation)    # no scale and shift: authors' code


def networks(name, K, mean=None, width=1.0, dropout=0.5, d=200):
    """(G, D) for a condition y (n, K).  G(z, y): z (n, 100) -> x.  D(x, y) -> a (n,), the logit of D(x|y).

    x is (n, C, H, W), or for tags a word vector (n, d).  `mean` (1, 28, 28): the training images' mean in [0,
    1], for mlp.  Hidden layers are `width` times the paper's; `dropout` is that of G.
    """
    def w(n):
        return max(8, round(n * width))

    relu, lrelu = nn.ReLU(), nn.LeakyReLU(0.2)
    if name == "mlp":                                                       # Sec. 4.1
        G = Joint(
            nn.Sequential(nn.Linear(100, w(200)), relu),
            nn.Sequential(nn.Linear(K, w(1000)), relu),
            nn.Sequential(
                nn.Dropout(dropout), nn.Linear(w(200) + w(1000), w(1200)), relu,
                nn.Dropout(dropout), nn.Linear(w(1200), 784), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28))))
        D = Joint(
            nn.Sequential(nn.Flatten(), Maxout(784, w(240), 5)),
            Maxout(K, w(50), 5),
            nn.Sequential(
                nn.Dropout(0.5), Maxout(w(240) + w(50), w(240), 4),
                nn.Dropout(0.5), nn.Linear(w(240), 1), nn.Flatten(0)))
        he(G), uniform(D, 0.005)                                            # not in the paper; D: GAN's code
        G.both[4].bias.data.copy_(mean.flatten().clamp(1e-7, 1 - 1e-7).logit())
    elif name == "tags":                                                    # Sec. 4.2
        G = Joint(
            nn.Sequential(nn.Linear(100, w(500)), relu),
            nn.Sequential(nn.Linear(K, w(2000)), relu),
            nn.Sequential(nn.Dropout(dropout), nn.Linear(w(500) + w(2000), d)))
        D = Joint(
            nn.Sequential(nn.Linear(d, w(500)), relu),
            nn.Sequential(nn.Linear(K, w(1200)), relu),
            nn.Sequential(
                nn.Dropout(0.5), Maxout(w(500) + w(1200), w(1000), 3),
                nn.Dropout(0.5), nn.Linear(w(1000), 1), nn.Flatten(0)))
        he(G), uniform(D, 0.05)                 # GAN's .005 leaves D at 1/2 for a thousand steps
    elif name == "dcgan28":                                                 # DCGAN App. A
        c = w(128)
        G = Labelled(
            fc(100 + K, w(1024), relu),                                     # 1024
            nn.Sequential(fc(w(1024) + K, c * 7 * 7, relu), nn.Unflatten(1, (c, 7, 7))),    # 128 x 7 x 7
            nn.Sequential(upconv(c + K, w(64)), bn(w(64), relu)),           # 64 x 14 x 14
            nn.Sequential(upconv(w(64) + K, 1), nn.Sigmoid()))              # 1 x 28 x 28
        D = Labelled(
            nn.Sequential(conv(1 + K, w(64)), lrelu),                       # 64 x 14 x 14
            nn.Sequential(conv(w(64) + K, c), bn(c, lrelu), nn.Flatten()),  # 128 x 7 x 7
            fc(c * 7 * 7 + K, w(1024), lrelu),                              # 1024
            nn.Sequential(nn.Linear(w(1024) + K, 1, bias=False), nn.Flatten(0)))
        G.apply(init), D.apply(init)
    else:                                                                   # dcgan32 [dev 4]
        c = w(256)
        G = Labelled(
            nn.Sequential(fc(100 + K, c * 4 * 4, relu), nn.Unflatten(1, (c, 4, 4))),        # 256 x 4 x 4
            nn.Sequential(upconv(c + K, w(128)), bn(w(128), relu)),         # 128 x 8 x 8
            nn.Sequential(upconv(w(128) + K, w(64)), bn(w(64), relu)),      # 64 x 16 x 16
            nn.Sequential(upconv(w(64) + K, 3), nn.Tanh()))                 # 3 x 32 x 32
        D = Labelled(
            nn.Sequential(conv(3 + K, w(64)), lrelu),                       # 64 x 16 x 16
            nn.Sequential(conv(w(64) + K, w(128)), bn(w(128), lrelu)),      # 128 x 8 x 8
            nn.Sequential(conv(w(128) + K, c), bn(c, lrelu), nn.Flatten()),  # 256 x 4 x 4
            nn.Sequential(nn.Linear(c * 4 * 4 + K, 1, bias=False), nn.Flatten(0)))
        G.apply(init), D.apply(init)
    return G, D


def uniform(net, width):
    """Weights Unif(-width, width), biases 0."""
    for name, p in net.named_parameters():
        nn.init.zeros_(p) if name.endswith("bias") else nn.init.uniform_(p, -width, width)


def he(net):
    """Weights N(0, 2 / inputs), biases 0: noise and label reach the samples from the first step on."""
    for name, p in net.named_parameters():
        nn.init.zeros_(p) if name.endswith("bias") else nn.init.kaiming_normal_(p)


def init(module):
    """Weights N(0, .02) (DCGAN)."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)


# ----------------------------------------------------------------------------------------- settings and noise

NETS = {
    "mlp": {"size": 28, "channels": 1, "scale": (0.0, 1.0), "lr": 0.1, "batch": 100, "steps": 50000},
    "dcgan28": {"size": 28, "channels": 1, "scale": (0.0, 1.0), "lr": 2e-4, "batch": 128, "steps": 16000},
    "dcgan32": {"size": 32, "channels": 3, "scale": (-1.0, 1.0), "lr": 2e-4, "batch": 128, "steps": 10000},
    "tags": {"size": 64, "channels": 3, "scale": (0.0, 1.0), "lr": 0.1, "batch": 100, "steps": 10000},
}
PAPER = {"cgan-mnist-ll": 132, "dcgan-mnist-1nn": 2.98, "dcgan-mnist-1nn-base": 6.28}
DEFAULT = {"mnist": "mlp", "fashion-mnist": "mlp", "kmnist": "mlp", "shapes": "tags"}    # else dcgan32


def sample_z(n, name, device="cpu"):
    """z (n, 100): Unif(-sqrt 3, sqrt 3) for mlp, of unit variance [dev 6]; N(0, 1) for tags (Sec. 4.2);
    Unif(-1, 1) for DCGAN's networks."""
    if name == "tags":
        return torch.randn(n, 100, device=device)
    z = 2 * torch.rand(n, 100, device=device) - 1
    return math.sqrt(3) * z if name == "mlp" else z


# -------------------------------------------------------------------------------------------------- objective

def V(a_real, a_fake):
    """Eq. 2: E_x[log D(x|y)] + E_z[log(1 - D(G(z|y)))], D = sigmoid(a), a (n,).  -log 4 where D = 1/2
    everywhere."""
    return F.logsigmoid(a_real.float()).mean() + F.logsigmoid(-a_fake.float()).mean()


def objective_G(a_fake):
    """What G ascends: E_z[log D(G(z|y))] [dev 2], a (n,).  -log 2 where D = 1/2 everywhere."""
    return F.logsigmoid(a_fake.float()).mean()


def rate(name, lr, step, steps):
    """The learning rate after `step` of `steps` updates.

    mlp, tags: divided by 1.00004 each update down to 1e-6 (Sec. 4.1).  DCGAN's: constant, over the second
    half in a straight line to 0 (authors' code).
    """
    if name in ("mlp", "tags"):
        return max(1e-6, lr / 1.00004 ** step)
    return lr * min(1.0, 2 * (1 - step / steps))


def momentum(step, steps_per_epoch):
    """From .5 in epoch 1 to .7 (Sec. 4.1) in epoch 250 (GAN's code), in a straight line."""
    return min(0.7, 0.5 + 0.2 * step / (249 * steps_per_epoch))


# ------------------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="mnist", log_every=500)
    add = p.add_argument_group("conditional GAN").add_argument
    positive = run.number(float, 0, open_low=True)
    add("--net", choices=NETS,
        help="mlp: Sec. 4.1; tags: Sec. 4.2; dcgan28, dcgan32: DCGAN App. A [mlp for MNIST and its kin, tags "
             "for shapes, else dcgan32]")
    add("--width", type=positive, default=1.0, help="units and feature maps as a share of the paper's [1]")
    add("--alternate", action="store_true", help="mlp, tags: G steps after D, through the new D [with D]")
    add("--lr", type=positive, help="first learning rate [mlp and tags .1, DCGAN's 2e-4]")
    add("--noise", type=run.number(float, 0), default=1.5,
        help="tags: standard deviation of the noise on the word vectors that D sees [%(default)s]")
    add("--dropout", type=run.number(float, 0, 0.99), default=0.5,
        help="mlp, tags: of G's hidden units [%(default)s]")
    add("--attributes", metavar="A,B", help="binary attributes whose combinations are the labels [the "
        "data's own labels, faces glasses,hat]")
    add("--nn-samples", type=run.number(int, 1), default=50000,
        help="samples that the nearest-neighbour classifier of DCGAN's Table 3 is fitted on [%(default)s]")
    add("--average", type=run.number(float, 0, 1), default=0.999,
        help="decay of the running average of G that draws, 0: G as it is [%(default)s]")
    return run.parse(p, argv)


# --------------------------------------------------------------------------------------------------- training

def build(args, name, G, D, G_bar, minibatch):
    """Optimizers and the fused iteration on x and its condition y: x, y = minibatch(*what train_step is
    given).  G_bar: the average of G."""
    lr, perceptrons = args.lr or NETS[name]["lr"], name in ("mlp", "tags")
    if perceptrons:
        opt_D, opt_G = (SGD(net.parameters(), lr, 0.5) for net in (D, G))
    else:
        opt_D, opt_G = (Adam(net.parameters(), lr, weight_decay=2.5e-5) for net in (D, G))
    amp = autocast(args)
    together = perceptrons and not args.alternate
    half = 0.5 if perceptrons else 1.0                      # GAN's code, DCGAN's
    noise = args.noise if name == "tags" else 0.0

    def blurred(x):
        return x + noise * torch.randn_like(x) if noise else x      # [dev 10]

    @fuse(args)
    def train_step(*batch):
        x, y = minibatch(*batch)
        z = sample_z(len(x), name, x.device)
        with amp:
            x_fake = G(z, y)                                # y of the data, as in the real pairs
            a_real, a_fake = D(blurred(x), y), D(blurred(x_fake if together else x_fake.detach()), y)
        v = V(a_real, a_fake)
        if together:                                        # both from the old parameters [dev 1]
            descend(-half * v, opt_D, -objective_G(a_fake), opt_G)
        else:
            descend(-half * v, opt_D)
            with amp, frozen(D):                            # through the new D, on the same minibatch [dev 3]
                a_fake = D(blurred(x_fake), y)
            descend(-objective_G(a_fake), opt_G)
        average(G_bar, G, args.average)                     # [dev 9]
        return {"V": v, "D(x)": a_real.float().sigmoid().mean(), "D(G(z))": a_fake.float().sigmoid().mean()}

    return opt_D, opt_G, train_step


def anneal(args, name, opts, step, steps_per_epoch):
    """Rate and momentum of update `step`, in place, so that a captured step follows."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"].fill_(rate(name, args.lr or NETS[name]["lr"], step - 1, args.steps))
            if "momentum" in group:
                group["momentum"].fill_(momentum(step - 1, steps_per_epoch))


# -------------------------------------------------------------------------- labels: Sec. 4.1 and DCGAN App. A

def combine(pictures, names, prefix=""):
    """Labels (N,) from attributes: bit i is the i-th of the binary attributes `names` ("glasses,hat").

    `prefix`: "test_" for those of the test pictures, None where there are none.
    """
    there, a = pictures.extra.get("attribute_names", []), pictures.extra.get(f"{prefix}attributes")
    odd = [name for name in names.split(",") if name not in there]
    if odd:
        raise UserError(f"{pictures.name} needs labels, or --attributes out of {', '.join(there) or 'none'}: "
                        f"{odd[0] or 'nothing'} found")
    if a is None:
        return None
    return sum((a[:, there.index(name)] > 0.5).long() << i for i, name in enumerate(names.split(",")))


@contextlib.contextmanager
def dropping(G):
    """sampling(G) with dropout as in training: it is noise that D has seen [dev 8]."""
    with sampling(G):
        for module in G.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        yield


def draw(G, name, y, K, z=None):
    """Pictures (n, C, H, W) in [0, 1] of the labels y (n,), or of label vectors y (n, K), from fresh noise or
    z."""
    y = F.one_hot(y, K).float() if y.ndim == 1 else y
    z = sample_z(len(y), name, y.device) if z is None else z
    low, high = NETS[name]["scale"]
    with dropping(G):
        x = torch.cat([G(*part).float() for part in zip(z.split(500), y.split(500))])
    return (x - low) / (high - low)


def rows(G, name, K, columns, device, shared=False):
    """Fig. 2: row i has `columns` pictures of label i, ten labels at most; with `shared`, a column has one
    z."""
    y = torch.linspace(0, K - 1, min(K, 10), device=device).round().long()
    z = sample_z(columns, name, device).repeat(len(y), 1) if shared else None
    return draw(G, name, y.repeat_interleave(columns), K, z)


@torch.no_grad()
def nn_error(parts, test, labels):
    """DCGAN Table 3: error in % on test (N, ...), labels (N,), of the label of the nearest sample
    (Euclidean).

    `parts`: samples x (n, ...) with their labels y (n,), any number of such pairs, one held at a time.
    Fitted on MNIST's 50,000 real digits: 3.1.
    """
    test = test.flatten(1)
    least, found = torch.full_like(test[:, 0], math.inf), torch.full_like(labels, -1)
    for x, y in parts:
        x = x.flatten(1)
        d2, i = (x.square().sum(1) - 2 * test @ x.T).min(1)    # less |test|^2, the same for all x
        least, found = torch.minimum(d2, least), torch.where(d2 < least, y[i], found)
    return 100 * (found != labels).float().mean().item()


def figures(r, G, name, K):
    """Fig. 2, and what noise and label each do: both (a row has one label, a column one z), the label alone
    (z = 0), the noise alone (y = 0)."""
    device = r.args.device
    y, z = torch.arange(min(K, 100), device=device), sample_z(100, name, device)
    r.show("fig2", log.grid(rows(G, name, K, 20, device), 20))
    r.show("noise_and_label", log.grid(rows(G, name, K, 10, device, shared=True), 10))
    r.show("label_only", log.grid(draw(G, name, y, K, torch.zeros_like(z[:len(y)])), min(K, 10)))
    r.show("noise_only", log.grid(draw(G, name, z.new_zeros(len(z), K), K, z), 10))


def evaluate(args, G, name, K, train, valid, test):
    """The numbers of this data set, experiment id -> dict with "value" and where there is one the paper's."""
    device, results = args.device, {}
    x_test, y_test = (t[:10000].to(device) for t in test)
    y = torch.arange(10000, device=device) % K              # Sec. 4.1: 1,000 samples of each of ten classes
    x = draw(G, name, y, K)
    if name == "mlp":
        x_valid = valid[0][:1000].to(device)
        window = metrics.parzen(x.flatten(1), x_valid.flatten(1) / 255, x_test.flatten(1) / 255)
        results["cgan-mnist-ll"] = {"value": window["ll"], "unit": "nats", "se": window["se"],
                                    "sigma": window["sigma"]}
    if NETS[name]["size"] == 28:
        n = torch.arange(args.nn_samples, device=device) % K
        error = nn_error(((draw(G, name, y_i, K), y_i) for y_i in n.split(1000)), x_test / 255, y_test)
        entry = "dcgan-mnist-1nn" if name == "dcgan28" else "dcgan-mnist-1nn-base"
        results[entry] = {"value": error, "unit": "% error", "samples": args.nn_samples}
    clf = metrics.classifier(*train, device, args.data_dir)
    results["agreement"] = {"value": 100 * metrics.label_agreement(clf, x, y),
                            "unit": "% of samples with the label asked for",
                            "of real pictures": 100 * metrics.label_agreement(clf, x_test, y_test)}
    results["frechet"] = {"value": metrics.frechet_distance(clf, x[:len(x_test)], x_test)}
    for line in PAPER.keys() & results.keys() if args.dataset == "mnist" else ():
        results[line]["paper"] = PAPER[line]
    return results


# ------------------------------------------------------------------------------------------- tags: Sec. 4.2

def tags_of(pictures, prefix=""):
    """Tags (N, W) 0 or 1, None where there is no such part, and the W words.

    The arrays `tags` and `words`; or the names of attributes' values but "none"; or of binary attributes.
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
    return None if tags is None else tags.float(), words


def tagged(pictures):
    """(images, tags, test images, their tags, words): words that tag a training picture, pictures that have a
    tag."""
    (tags, words), (test_tags, _) = tags_of(pictures), tags_of(pictures, "test_")
    images, test = pictures.images, pictures.test_images
    if test is None or test_tags is None:
        split = len(images) - max(1, len(images) // 6)
        images, tags, test, test_tags = images[:split], tags[:split], images[split:], tags[split:]
    used = tags.sum(0) > 0
    tags, test_tags = tags[:, used], test_tags[:, used]
    some, test_some = tags.sum(1) > 0, test_tags.sum(1) > 0
    words = [word for word, u in zip(words, used) if u]
    return images[some], tags[some], test[test_some], test_tags[test_some], words


def word_vectors(tags, d=200):
    """(W, d) vectors of words from how often they tag one picture; tags (N, W) 0 or 1, each word used
    [dev 5].

    U S^(1/2) of the singular value decomposition of max(0, log(p(u, v) / (p(u) p(v)))), at most 200 columns,
    each vector scaled to norm sqrt(d).  Words always seen together have one vector, words that never share a
    picture orthogonal ones if all else is chance.
    """
    tags = tags.double()
    p = tags.T @ tags / len(tags)                           # p(u, v); p(u) on the diagonal
    U, S, _ = torch.linalg.svd((p / torch.outer(p.diagonal(), p.diagonal())).log().clamp(min=0))
    v = (U * S.sqrt())[:, :d]
    return (F.normalize(v) * math.sqrt(v.shape[1])).float()


def tag(G, f, words, samples=100, near=20, keep=10):
    """Sec. 4.2: for image features f (n, K) and words (W, d), the `keep` words (n, keep) that are most often
    among the `near` nearest by cosine to each of 100 samples of G."""
    near, keep = max(1, min(near, len(words) // 100)), min(keep, len(words))  # [dev 7]
    found = []
    for f_i in f.split(20):
        with dropping(G):
            v = G(sample_z(samples * len(f_i), "tags", f.device), f_i.repeat_interleave(samples, 0)).float()
        cosine = F.normalize(v) @ F.normalize(words).T
        votes = torch.zeros_like(cosine).scatter_(1, cosine.topk(near).indices, 1.0)
        votes = votes + 0.4 / samples * cosine              # of equal votes, the larger mean cosine first
        found.append(votes.unflatten(0, (-1, samples)).sum(1).topk(keep).indices)
    return torch.cat(found)


def neighbours_tags(f, f_train, tags, k=100, keep=10):
    """The baseline: the `keep` words (n, keep) most frequent among the k nearest training pictures by
    Euclidean distance of features."""
    near = torch.cat([torch.cdist(f_i, f_train).topk(min(k, len(f_train)), largest=False).indices
                      for f_i in f.split(100)])
    return torch.stack([tags[i].sum(0) for i in near]).topk(min(keep, tags.shape[1])).indices


def precision_recall(found, tags):
    """Mean share in [0, 1] of the words found (n, k) that are tags, and of tags (n, W) that are found."""
    hits = tags.gather(1, found).sum(1)
    return (hits / found.shape[1]).mean().item(), (hits / tags.sum(1)).mean().item()


def tagging(args, r):
    """Sec. 4.2: G draws vectors of words that tag a picture, from its features; Table 2, precision and recall
    at 10."""
    if args.sample:
        raise UserError("--sample draws pictures: a run with --net tags draws words, see its table2.md")
    device, size = args.device, NETS["tags"]["size"]
    images, tags, test, test_tags, vocabulary = tagged(data.load(args.dataset, args.data_dir, size, 3))
    test, test_tags = test[:2000], test_tags[:2000].to(device)
    clf = metrics.classifier(images, tags, device, args.data_dir)
    f, f_test = (metrics.features(clf, part) for part in (images, test))
    # a unit that hardly ever fires is 100 deviations from its mean where it does: cut
    f, f_test = (((part - f.mean(0)) / f.std(0).clamp_min(1e-6)).clamp(-3, 3) for part in (f, f_test))
    tags, words = tags.to(device), word_vectors(tags).to(device)
    pairs = tags.nonzero()                                  # Sec. 4.2: a picture once for each of its tags

    def minibatch():
        i, word = pairs[torch.randint(len(pairs), (args.batch_size,), device=device)].unbind(1)
        return words[word], f[i]

    G, D = networks("tags", f.shape[1], None, args.width, args.dropout, words.shape[1])
    G, D, G_bar = place(args, G, D, averaged(G))
    opt_D, opt_G, train_step = build(args, "tags", G, D, G_bar, minibatch)
    r.keep(G=G, D=D, G_bar=G_bar, opt_D=opt_D, opt_G=opt_G)
    for step in r.loop():
        anneal(args, "tags", (opt_D, opt_G), step, max(1, len(pairs) // (args.batch_size * r.world)))
        r.log(train_step())

    if not r.lead:
        return
    with r.aside():
        found = tag(G_bar, f_test, words)
    table = ["| picture | its tags | generated tags |", "|---|---|---|"]
    for i in range(min(20, len(test))):
        own, drawn = ([vocabulary[k] for k in row] for row in (test_tags[i].nonzero()[:, 0], found[i]))
        table.append(f"| {i + 1} | {', '.join(own)} | {', '.join(drawn)} |")
    (r.folder / "table2.md").write_text("\n".join(table) + "\n")
    r.show("table2", log.grid(test[:20].float() / 255, 10))
    results = {}
    frequent = tags.sum(0).topk(found.shape[1]).indices.expand_as(found)     # what knows no picture
    for name, k in (("cgan-flickr", found), ("cgan-flickr-neighbours", neighbours_tags(f_test, f, tags)),
                    ("cgan-flickr-frequent", frequent)):
        precision, recall = precision_recall(k, test_tags)
        results[name] = {"value": 100 * precision, "unit": "% precision at 10", "recall": 100 * recall}
    r.results(results)


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    args = parse_args(argv)
    name = args.net or DEFAULT.get(args.dataset, "dcgan32")
    net = NETS[name]
    args.batch_size, args.steps = args.batch_size or net["batch"], args.steps or net["steps"]
    r = run.Run(args)
    if name == "tags":
        return tagging(args, r)
    pictures = data.load(args.dataset, args.data_dir, net["size"], net["channels"])
    if args.attributes or pictures.labels is None:
        names = args.attributes or ("glasses,hat" if args.dataset == "faces" else "")
        pictures.labels, pictures.test_labels = (combine(pictures, names, part) for part in ("", "test_"))
    known = pictures.labels >= 0                            # stl10 has pictures without a label
    images, labels = (t if known.all() else t[known] for t in (pictures.images, pictures.labels))
    split = len(images) - min(10000, len(images) // 6)
    train, valid = (images[:split], labels[:split]), (images[split:], labels[split:])
    test = valid if pictures.test_labels is None else (pictures.test_images, pictures.test_labels)
    K = int(labels.max()) + 1
    if K < 2:
        raise UserError(f"{pictures.name} has one label for all of its pictures: expected two or more")
    batches = data.Batches(*train, batch_size=args.batch_size, device=args.device, seed=args.seed,
                           scale=net["scale"], rank=r.rank, world=r.world)
    mean = train[0].float().mean(0) / 255 if name == "mlp" else None
    G, D = networks(name, K, mean, args.width, args.dropout)
    G, D, G_bar = place(args, G, D, averaged(G))
    opt_D, opt_G, train_step = build(args, name, G, D, G_bar, lambda x, y: (x, F.one_hot(y, K).float()))
    parts, best = {"G": G, "D": D, "G_bar": G_bar, "opt_D": opt_D, "opt_G": opt_G, "batches": batches}, G_bar
    if name == "mlp":                                       # Sec. 4.1: the best validation likelihood stops
        best = parts["best"] = copy.deepcopy(G_bar)
        best.register_buffer("ll", torch.tensor(-math.inf, device=args.device))
    r.keep(**parts)
    if args.sample:
        if name == "mlp" and best.ll == -math.inf:          # stopped before the first look at the likelihood
            best = G_bar
        return r.sample(lambda n: draw(best, name, torch.arange(n, device=args.device) % K, K))

    for step in r.loop():
        anneal(args, name, (opt_D, opt_G), step, batches.per_epoch)
        r.log(train_step(*next(batches)))
        if r.every(min(5 * batches.per_epoch, args.steps) if name == "mlp" else args.save_every):
            with r.aside():
                y = torch.arange(10000 if name == "mlp" else 100, device=args.device) % K
                x = draw(G_bar, name, y, K)
            r.show("samples", log.grid(x[:100], 10))
            if name == "mlp":                               # at sigma .2, as GAN's monitor
                ll = metrics.parzen_ll(x.flatten(1), valid[0][:1000].flatten(1) / 255, 0.2).mean()
                r.log({"ll": ll})
                if ll > best.ll:
                    best.load_state_dict({**G_bar.state_dict(), "ll": ll})

    if r.lead:
        with r.aside():
            figures(r, best, name, K)
            results = evaluate(args, best, name, K, train, valid, test)
        ll, error = (results.get(k, {}).get("value") for k in ("cgan-mnist-ll", "dcgan-mnist-1nn"))
        r.results(results, passed=args.dataset != "mnist"
                  or ((ll is None or ll >= 132) and (error is None or error <= 5.5)))


if __name__ == "__main__":
    main()

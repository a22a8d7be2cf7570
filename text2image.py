"""Generative Adversarial Text to Image Synthesis
Scott Reed, Zeynep Akata, Xinchen Yan, Lajanugen Logeswaran, Bernt Schiele, Honglak Lee, 2016.
arXiv:1605.05396

phi_t encodes a sentence character by character, G draws a picture of it, and D scores a picture and a
sentence together.  One run trains the encoders phi_t and phi_v, then G and D, then the style encoder S.

    Eq. 1    V(D, G) = E_x[log D(x, h)] + E_z[log(1 - D(G(z, h), h))], h = phi_t(t)      -> V()
    Eq. 2    train f_v and f_t to classify: min (1/N) sum_n Delta(y_n, f_v(v_n)) + Delta(y_n, f_t(t_n)),
             with a hinge loss on matching and mismatching pairs in place of Delta       -> L_joint()
    Eq. 3, 4 f_v(v) = argmax_y E_{t ~ T(y)}[phi_v(v) . phi_t(t)], f_t(t) likewise        -> classify()
    Alg. 1   GAN-CLS: scores s_r (real picture, its text), s_w (real picture, wrong text),
             s_f (fake picture, its text)                                                -> gan_step()
             L_D = log s_r + (log(1 - s_w) + log(1 - s_f)) / 2                           -> L_D()
             L_G = log s_f                                                               -> L_G()
    Eq. 5    GAN-INT: G also draws beta h_1 + (1 - beta) h_2                             -> interpolate()
    Eq. 6    L_style = E_{t, z} |z - S(G(z, phi_t(t)))|^2                                -> L_style()
    Figs. 3, 4, 7  held-out captions: the true picture, then samples                     -> draw_captions()
    Fig. 5   ROC of S at telling whether two pictures share a style                      -> draw_fig5()
    Fig. 6   style transfer: s = S(x), then G(s, phi_t(t))                               -> transfer()
    Fig. 8   interpolation between two sentences, and between two z                      -> between()

    python text2image.py                    (built-in scenes; full width wants a GPU)
    python text2image.py --quick            (narrow networks and few steps, for a CPU)
    python text2image.py --dataset data/birds --paper
    python text2image.py --resume runs/text2image-scenes --prompt "a red circle above a box"
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import UserError, data, export, log, metrics, run
from common.fuse import (
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
# PAPER: Sec. 5 and, where the print is silent, the authors' code: icml2016 for the GAN, cvpr2016 for the
# encoders.  GAN: 600 epochs (Sec. 5) of 139 batches for birds (150 classes) and 110 for flowers (82).
# Encoders: 200 epochs with one step per class.  Nothing is published for S, which uses D's rate.

GAN = dict(
    variant="int-cls", beta=0.5,                            # Sec. 4.3
    views=True,                                             # a view and a text at a time; code: the mean of 4
    ngf=128, ndf=64,                                        # maps of G and D (code)
    batch_size=64, lr_D=2e-4, lr_G=2e-4,                    # constant; code: halved every 100 epochs
    together=False, noise=0.0, h_std=0.0, average=0.0,
    image_features="googlenet", opt_phi="rmsprop", lr_phi=7e-4,
    drops=(0.98, 200),                                      # times .98 after each of 200 epochs
    style_steps=2000)
DRAWN = dict(phi_t="rnn", image_features="own", views=False, encoder_steps=200 * 150, steps=600 * 139)
PAPER = {
    "birds": GAN | dict(phi_t="gru", encoder_steps=200 * 150, steps=600 * 139),
    "flowers": GAN | dict(phi_t="rnn", encoder_steps=200 * 82, steps=600 * 110),
    # Sec. 5.5 says the same networks and settings.  Variant, maps and lengths are those of the released
    # script, which drew Fig. 7.  Not here: its D has a LeakyReLU after the third BatchNorm and no BatchNorm
    # on the text, and its phi_t initializes convolutions from N(0, .02).
    "coco": GAN | dict(variant="cls", ngf=196, ndf=196, steps=200 * 1294, phi_t="gru", opt_phi="adam",
                       lr_phi=2e-4, drops=(0.5, 4), encoder_steps=200 * 1294),
    # Not in the paper: the settings of birds, flowers' phi_t and a phi_v that learns drawn objects.  Captions
    # tell left from right, and place is style: no crops, no mirroring.
    "scenes": GAN | DRAWN, "shapes": GAN | DRAWN,
}
STABLE = dict(
    # These four together: 74.6 % of attributes of unseen captions, 67.6 without (--width .25 --steps 3500).
    # Recorded with an encoder that also named attributes, which the present one does not.
    lr_G=1.2e-3, noise=0.1,      # else D wins on high-frequency texture and G ignores z
    together=True,               # D sees differences in brightness and contrast
    h_std=0.05,                  # scale h to this std: unscaled, it is far below z and G ignores it for long
    variant="cls",               # --quick, with falling rates: 58.3 % of attributes, int-cls 54.3
    average=0.999,               # the EMA of G draws and teaches S.  --quick --seed 2: 57.8 %, without 52.4
    steps=20000, encoder_steps=5000,  # a quarter of the published lengths, or less
    # The encoders.  A rate of 3e-4 names 39.3 % of the pictures of 5 unseen classes of birds, 2e-3 24.5 %.
    opt_phi="adam", lr_phi=3e-4,
    drops=None,                  # linear to 0 over the second half
    image_features="own")        # trained here; GoogLeNet's are a download and were not tried
TUNED = dict.fromkeys(PAPER, STABLE)
# A small G and phi_t; D, phi_v and S are a quarter of the paper's.
QUICK = {"scenes": dict(width=0.1, ngf=96, ndf=160, batch_size=32, encoder_steps=1500, lr_phi=1e-3,
                        steps=3000, lr_G=1e-3, noise=0.3, h_std=0.1, average=0.995, style_steps=100)}

NZ, NT, NH = 100, 128, 1024      # sizes of z, of the projected text and of h = phi_t(t)


# --------------------------------------------------------------------------------------------------- networks

down = partial(nn.Conv2d, kernel_size=4, stride=2, padding=1, bias=False)
up = partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1, bias=False)


class Text(nn.Module):
    """phi_t, the authors' char-CNN-RNN for flowers: symbols (n, 201), 0 for none -> h (n, 1024)."""

    def __init__(self, ch, units=256, pool=True):
        super().__init__()
        c1, c2, self.units = ch(384), ch(512), ch(units)
        self.convs = nn.Sequential(
            nn.Conv1d(len(ALPHABET), c1, 4), nn.ReLU(), nn.MaxPool1d(3, 3),             # 384 x 66
            nn.Conv1d(c1, c2, 4), nn.ReLU(), nn.MaxPool1d(3, 3),                        # 512 x 21
            nn.Conv1d(c2, self.units, 4), nn.ReLU(),                                    # 256 x 18
            nn.MaxPool1d(3, 2) if pool else nn.Identity())                              # 256 x 8
        self.into, self.on = nn.Linear(self.units, self.units), nn.Linear(self.units, self.units)
        self.out = nn.Linear(self.units, NH)
        self.register_buffer("scale", torch.ones(()))               # factor of h for G and D, set by embed()

    def forward(self, t):
        one_hot = F.one_hot(t.long(), len(ALPHABET) + 1)[..., 1:].float()
        states = self.recur(self.convs(one_hot.transpose(1, 2)).transpose(1, 2))
        return self.out(torch.stack(states).mean(0))                # 1024

    def recur(self, x):
        """Hidden states, a list of (n, units), for the inputs x (n, 8, units)."""
        steps = self.into(x).unbind(1)
        states = [F.relu(steps[0])]
        for step in steps[1:]:
            states.append(F.relu(step + self.on(states[-1])))
        return states


class Residual(nn.Module):
    """act(x + branch(x)); the branch is 1x1 to `inner` maps, 3x3, then 3x3 back to `outer`."""

    def __init__(self, outer, inner, act):
        super().__init__()
        self.act = act
        self.branch = nn.Sequential(
            nn.Conv2d(outer, inner, 1, bias=False), nn.BatchNorm2d(inner), act,
            nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), act,
            nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x):
        return self.act(x + self.branch(x))


class Generator(nn.Module):
    """G: z (n, 100), h (n, 1024) -> x (n, 3, 64, 64) in [-1, 1]."""

    def __init__(self, ch):
        super().__init__()
        relu = nn.ReLU()
        c0, c1, c2, c3 = ch(1024), ch(512), ch(256), ch(128)
        self.text = nn.Sequential(nn.Linear(NH, NT), nn.LeakyReLU(0.2))                 # 128
        self.net = nn.Sequential(
            nn.Linear(NZ + NT, 16 * c0, bias=False), nn.Unflatten(1, (c0, 4, 4)),       # 228 -> 1024 x 4 x 4
            nn.BatchNorm2d(c0),
            Residual(c0, ch(256), relu),
            up(c0, c1), nn.BatchNorm2d(c1),                                             # 512 x 8 x 8
            Residual(c1, ch(128), relu),
            up(c1, c2), nn.BatchNorm2d(c2), relu,                                       # 256 x 16 x 16
            up(c2, c3), nn.BatchNorm2d(c3), relu,                                       # 128 x 32 x 32
            up(c3, 3), nn.Tanh())                                                       # 3 x 64 x 64

    def forward(self, z, h):
        return self.net(torch.cat([z, self.text(h)], 1))


class Discriminator(nn.Module):
    """D: x (n, 3, 64, 64), h (n, 1024) -> logits a (n,).

    `wrong` (m, 1024) pairs the first m pictures with other texts; their logits are appended: (n + m,).
    """

    def __init__(self, ch):
        super().__init__()
        lrelu = nn.LeakyReLU(0.2)
        c4 = ch(512)
        self.trunk = trunk(ch)                                                          # 512 x 4 x 4
        self.text = nn.Sequential(nn.Linear(NH, NT), nn.BatchNorm1d(NT), lrelu)         # 128
        self.head = nn.Sequential(
            nn.Conv2d(c4 + NT, c4, 1, bias=False), nn.BatchNorm2d(c4), lrelu,           # 512 x 4 x 4
            nn.Flatten(), nn.Linear(16 * c4, 1, bias=False), nn.Flatten(0))             # 1

    def forward(self, x, h, wrong=None):
        f = self.trunk(x)
        if wrong is not None:
            f, h = torch.cat([f, f[:len(wrong)]]), torch.cat([h, wrong])
        return self.head(torch.cat([f, self.text(h)[:, :, None, None].expand(-1, -1, 4, 4)], 1))


def trunk(ch):
    """D's convolutions, x (n, 3, 64, 64) -> (n, 512, 4, 4)."""
    lrelu = nn.LeakyReLU(0.2)
    return nn.Sequential(
        down(3, ch(64)), lrelu,                                                         # 64 x 32 x 32
        down(ch(64), ch(128)), nn.BatchNorm2d(ch(128)), lrelu,                          # 128 x 16 x 16
        # No activation between the third BatchNorm and the fourth convolution, as in the authors' code for
        # birds and flowers (main_cls_int.lua).
        down(ch(128), ch(256)), nn.BatchNorm2d(ch(256)),                                # 256 x 8 x 8
        down(ch(256), ch(512)), nn.BatchNorm2d(ch(512)),                                # 512 x 4 x 4
        Residual(ch(512), ch(128), lrelu))


def convolutions(ch, o):
    """S and the default phi_v, (n, 3, 64, 64) -> (n, o): D's convolutions.  The paper says only that S is
    convolutional."""
    return nn.Sequential(trunk(ch), nn.Flatten(), nn.Linear(16 * ch(512), o))


def networks(args):
    """(phi_t, phi_v, G, D, S).  phi_t is narrowed only by the square root of --width: with a quarter of its
    units it confuses the attributes of two objects."""
    def ch(width):
        return lambda n: max(16, round(n * width))

    ch_G, ch_D = ch(args.width * args.ngf / 128), ch(args.width * args.ndf / 64)
    googlenet = args.image_features == "googlenet" and not args.e2e     # GAN-E2E uses no phi_v
    phi_v = GoogLeNet() if googlenet else convolutions(ch_D, NH).apply(init)
    phi_t = init_text({"rnn": Text, "gru": TextGRU}[args.phi_t](ch(args.width ** 0.5)))
    G, D = Generator(ch_G).apply(init), Discriminator(ch_D).apply(init)
    S = convolutions(ch_D, NZ).apply(init)
    for net in (phi_t, G, S):
        net.register_buffer("t", torch.zeros((), dtype=torch.long))                     # updates so far
    for layer in (G.net[0], D.head[-2]):        # in the authors' code convolutions from and to 1 x 1
        nn.init.normal_(layer.weight, 0.0, 0.02)
    for last in (G.net[-2], D.head[-2]):        # no BatchNorm follows: keep the variance at any --width
        last.weight.data.div_(args.width ** 0.5)
    return phi_t, phi_v, G, D, S


# ----------------------------------------------------------------------------------------- texts and pictures

def mismatched(content):
    """For each row of content (n,), the index of a random row with different content: (n,).

    Any row if all content is equal.
    """
    other = content[:, None] != content
    return (torch.rand(other.shape, device=content.device) * other).argmax(1)


def interpolate(h, beta=0.5):
    """Eq. 5: beta h_1 + (1 - beta) h_2, (n / 2, 1024), for the first and second half of h (n, 1024)."""
    h_1, h_2 = h[:2 * (len(h) // 2)].chunk(2)
    return beta * h_1 + (1 - beta) * h_2


# -------------------------------------------------------------------------------------------------- objective

def L_joint(v, h, content):
    """Eq. 2's surrogate: the mean over mismatching pairs i, j of max(0, 1 + v_i.h_j - v_i.h_i) +
    max(0, 1 + v_j.h_i - v_i.h_i).  v, h (n, 1024), content (n,).  2 where all v = 0."""
    s = v.float() @ h.float().T
    matching, other = s.diagonal()[:, None], (content[:, None] != content).float()
    hinges = other * torch.stack([1 + s - matching, 1 + s.T - matching]).clamp(min=0)
    return hinges.sum() / other.sum().clamp(min=1)


def V(a_r, a_f):
    """Eq. 1: E[log s_r] + E[log(1 - s_f)], s = sigmoid(a), a (n,).  -log 4 where D = 1/2 everywhere."""
    return F.logsigmoid(a_r.float()).mean() + F.logsigmoid(-a_f.float()).mean()


def L_D(a_r, a_w, a_f):
    """Alg. 1 line 10: E[log s_r] + (E[log(1 - s_w)] + E[log(1 - s_f)]) / 2.  -log 4 where D = 1/2
    everywhere."""
    wrong = F.logsigmoid(-a_w.float()).mean() + F.logsigmoid(-a_f.float()).mean()
    return F.logsigmoid(a_r.float()).mean() + wrong / 2


def L_G(a_f):
    """Alg. 1 line 12: E[log s_f].  -log 2 where D = 1/2 everywhere."""
    return F.logsigmoid(a_f.float()).mean()


def L_style(z, z_hat):
    """Eq. 6: E|z - z_hat|^2, both (n, 100).  100 for z ~ N(0, I) and z_hat = 0."""
    return (z - z_hat.float()).square().sum(1).mean()


# --------------------------------------------------------------------------------------------------- training

def build(args, train):
    """Networks (with G_bar, the EMA of G), their optimizers, and the fused steps of the three phases."""
    phi_t, phi_v, G, D, S = networks(args)
    phi_t, phi_v, G, D, S, G_bar = place(args, phi_t, phi_v, G, D, S, averaged(G))
    nets = SimpleNamespace(phi_t=phi_t, phi_v=phi_v, G=G, D=D, S=S, G_bar=G_bar)
    opt_phi = optimizer_of_phi(args, phi_t, phi_v)
    opt_D = adam(args.lr_D, D, phi_t) if args.e2e else adam(args.lr_D, D)
    opt_G, opt_S = adam(args.lr_G, G), adam(args.lr_D, S)
    opts = SimpleNamespace(opt_phi=opt_phi, opt_G=opt_G, opt_D=opt_D, opt_S=opt_S)
    amp, cls = autocast(args), "cls" in args.variant
    t, content = train.t.to(args.device), train.content.to(args.device)

    @fuse(args)
    def encoder_step(x, i):                                 # x (n, 3, H, W) in [-1, 1], i (n,) row indices
        k = torch.randint(t.shape[1], i.shape, device=x.device)
        with amp:
            v, h = phi_v(view(x)), phi_t(t[i, k])
        loss = L_joint(v, h, content[i])
        descend(loss, opt_phi)
        phi_t.t.add_(1)
        return {"L_joint": loss}

    @fuse(args)
    def gan_step(x, i):                                     # Alg. 1
        x, h = view(x), texts(i, args.e2e)                                              # line 3
        h_wrong = h[mismatched(content[i])] if cls else None                            # line 4
        h_fake = torch.cat([h, interpolate(h, args.beta)]) if "int" in args.variant else h  # Eq. 5
        z = torch.randn(len(h_fake), NZ, device=x.device)                               # line 5
        with amp:
            x_fake = G(z, h_fake.detach())                                              # line 6
            a_r, a_w, a_f = D_sees(D, x, h, x_fake[:len(h)].detach(), h, args, h_wrong)  # 7-9
        value = L_D(a_r, a_w, a_f) if cls else V(a_r, a_f)                              # line 10
        descend(-value, opt_D)                              # line 11: ascends; the printed minus is a slip
        h, h_fake = h.detach(), h_fake.detach()
        with amp, frozen(D):                                # through the updated D (authors' code)
            _, _, a_f = D_sees(D, x if args.together else None, h, x_fake, h_fake, args)
        log_s = L_G(a_f)                                    # line 12; for Eq. 5 too, not -log(1 - s)
        descend(-log_s, opt_G)                              # line 13: ascends
        average(G_bar, G, args.average)
        G.t.add_(1)
        scores = {"s_r": a_r, "s_f": a_f} | ({"s_w": a_w} if cls else {})
        return {"L_D" if cls else "V": value, "L_G": log_s,
                **{k: a.float().sigmoid().mean() for k, a in scores.items()}}

    @fuse(args)
    def style_step(x, i):                                   # Eq. 6
        h = texts(i)
        z = torch.randn(len(h), NZ, device=h.device)
        with amp:
            with sampling(G_bar):
                x_fake = G_bar(z, h)
            z_hat = S(x_fake)
        loss = L_style(z, z_hat)
        descend(loss, opt_S)
        S.t.add_(1)
        return {"L_style": loss}

    def texts(i, learn=False):
        """h (n, 1024) of a random caption of each picture i.  `learn`: with gradients to phi_t (GAN-E2E)."""
        k = torch.rand(len(i), t.shape[1], device=i.device).argmax(1)
        with amp, torch.set_grad_enabled(learn):
            h = phi_t(t[i, k])
        return phi_t.scale * h.float()

    def set_scale():
        """Scale h to a standard deviation of args.h_std, measured on 2,000 training pictures' texts."""
        phi_t.scale.fill_(1.0)
        if args.h_std and not args.e2e:
            h = texts_of(phi_t, train.t[:2000])
            # Limit the gain where phi_t barely separates texts: the RMS of h is at most 100 h_std.
            spread = torch.maximum(h.std((0, 1)).mean(), h.square().mean().sqrt() / 100)
            phi_t.scale.copy_(args.h_std / spread.clamp_min(1e-6))

    def settle():
        """Give G_bar BatchNorm statistics of its own; average() copies those of G."""
        if args.average and int(G.t):                       # not in checkpoints of the encoders' phase
            i = torch.randint(len(t), (20, args.batch_size), device=args.device)
            calibrate(G_bar, ((torch.randn(len(k), NZ, device=k.device), texts(k)) for k in i))

    steps = SimpleNamespace(encoder=encoder_step, gan=gan_step, style=style_step, set_scale=set_scale,
                            settle=settle)
    return nets, opts, steps


def train_encoder(r, nets, opts, steps, batches, test):
    """Train phi_t and phi_v unless --encoder supplied them, and print their retrieval on held-out pairs."""
    args, begin = r.args, r.step
    end = begin + (0 if args.encoder or args.e2e else max(0, args.encoder_steps - int(nets.phi_t.t)))
    for step in r.loop(end):
        set_rate(opts.opt_phi, phi_rate(args, (end - step + 1) / args.encoder_steps))
        r.log(steps.encoder(*next(batches)))
    if end > begin and r.lead:
        print_retrieval(args, nets, first(test, 2000))


def train_gan(r, nets, steps, batches, test):
    """Train G and D.  If any steps remain, S is trained again afterwards."""
    args = r.args
    end = r.step + max(0, args.steps - int(nets.G.t))
    if end > r.step:
        nets.S.t.zero_()
    for _ in r.loop(end):
        r.log(steps.gan(*next(batches)))
        if r.draws():
            with r.aside():
                steps.settle()
                r.show("samples", draw_captions(test, [(nets.G_bar, nets.phi_t)], args.device))


def train_style(r, nets, steps, batches):
    """Train S on samples of the finished G."""
    with r.aside():
        steps.settle()
    for _ in r.loop(r.step + max(0, r.args.style_steps - int(nets.S.t))):
        r.log(steps.style(*next(batches)))


def main(argv=None):
    args = parse_args(argv)
    r = run.Run(args)
    if r.drawing:
        return draw_prompts(r, args.prompt) if args.prompt else export.main(r, drawer)
    pictures, train, test = parts_of(args)
    check_captions(r, train)
    batches = data.Batches(train.images, torch.arange(len(train.images)), scale=(-1.0, 1.0), **r.feed)
    nets, opts, steps = build(args, train)
    if args.encoder and not args.resume:
        run.fetch(args.encoder, OTHER, args.device, phi_t=nets.phi_t, phi_v=nets.phi_v)

    def about():                                            # for --sample and --export
        steps.settle()
        return {"t": test.t[:1000, 0]}

    r.keep(about, **vars(nets), **vars(opts), batches=batches)
    if args.beside:
        return draw_beside(r, nets, pictures, test)

    train_encoder(r, nets, opts, steps, batches, test)
    steps.set_scale()
    train_gan(r, nets, steps, batches, test)
    train_style(r, nets, steps, batches)
    if r.lead:
        report(r, nets, pictures, train, test)


# =========================================================================== Figures and numbers of the paper

LENGTH = 201                     # symbols per sentence
# Authors' code: 70 symbols, with "-" twice; the later one counts.
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
SYMBOLS = defaultdict(int, {ord(s): i for i, s in enumerate(ALPHABET, 1)})
OTHER = "a text2image run with the --width, --phi-t and --image-features of this one"


def parse_args(argv=None):
    p = run.parser(__file__, __doc__, dataset="scenes")
    add = p.add_argument_group("text to image; --steps are the GAN's").add_argument
    positive, weight = run.number(float, 0, open_low=True), run.number(float, 0)
    add("--variant", choices=("gan", "cls", "int", "int-cls"),
        help="matching-aware D (cls, Alg. 1), interpolated texts (int, Eq. 5), or both "
        "[cls; --paper: int-cls]")
    add("--width", type=positive, default=1.0,
        help="feature maps, as a fraction of the paper's; for phi_t its square root [%(default)s]")
    add("--beta", type=run.number(float, 0, 1), help="beta of Eq. 5 [.5]")
    add("--views", action=argparse.BooleanOptionalAction,
        help="random crops and mirroring [on, except for scenes and shapes]")
    add("--lr-D", type=positive, help="Adam's learning rate for D and S (Sec. 5) [2e-4]")
    add("--lr-G", type=positive, help="Adam's learning rate for G [1.2e-3; --paper: 2e-4]")
    add("--noise", type=weight, help="std of the Gaussian noise on D's input [.1; --paper: 0]")
    add("--average", type=run.number(float, 0, 1), help="decay of the EMA of G [.999; --paper: 0]")
    add("--phi-t", choices=("rnn", "gru"), help="recurrent part of phi_t [depends on the data set]")
    add("--image-features", choices=("own", "googlenet"),
        help="phi_v: a network trained with phi_t, or torchvision's GoogLeNet [own; --paper: googlenet]")
    add("--e2e", action="store_true",
        help="GAN-E2E of the supplement: train phi_t from scratch with D, without the encoder phase")
    add("--encoder-steps", type=run.number(int, 0),
        help="steps of phi_t and phi_v, before the GAN's [5000, in proportion to --steps]")
    add("--encoder", metavar="RUN", help="take phi_t and phi_v from this run instead of training them")
    add("--style-steps", type=run.number(int, 0),
        help="steps of S, after the GAN's [2000, in proportion to --steps]")
    add("--prompt", action="append", metavar="TEXT", help="with --resume: draw this sentence; repeatable")
    add("--n", type=run.number(int, 1, 1000), default=8, help="pictures per prompt [%(default)s]")
    add("--beside", metavar="RUN", nargs="+",
        help="with --resume: Figs. 3 and 5 comparing that run with these, for example the four variants")
    args = run.parse(p, argv, ("prompt", "n", "beside"), experiment, PAPER, TUNED, QUICK)
    default = PAPER[args.experiment] | ({} if args.paper else TUNED[args.experiment])
    default |= QUICK[args.experiment] if args.quick else {}
    if not args.resume:                                     # the other phases in proportion to --steps
        for key in {"encoder_steps", "style_steps"} - {*args.given}:
            setattr(args, key, max(1, round(default[key] * args.steps / default["steps"])))
    if args.prompt and (args.sample or args.explore):        # for the last sentence only
        args.set, args.prompt = [*(args.set or ()), f"prompt={args.prompt[-1]}"], None
    if args.beside and not args.resume:
        p.error("--beside needs --resume RUN: the run to draw from")
    if args.e2e and args.encoder:
        p.error("--e2e trains phi_t from scratch, --encoder takes it from a run: give one of them")
    if args.prompt and args.export:
        p.error("--prompt draws and --export does not: give one of them")
    for sentence in args.prompt or ():
        if not legible(sentence):
            raise UserError(f"prompt {sentence[:40]!r} has none of the letters and digits that phi_t reads: "
                            "an English sentence expected")
    return args


def experiment(args):
    """The row of PAPER and TUNED: the data set's own; else flowers if its name says so, else birds."""
    if args.dataset in PAPER:
        return args.dataset
    return "flowers" if "flowers" in Path(args.dataset).name else "birds"


# ------------------------------------------------------------------------ what TUNED adds to the paper's step

def D_sees(D, x, h, x_fake, h_fake, args, h_wrong=None):
    """(a_r, a_w, a_f): D's logits of (x, h), (x, h_wrong) and (x_fake, h_fake), under args.noise.

    BatchNorm normalizes the three batches separately (authors' code), or jointly with `args.together` so that
    D sees differences in brightness and contrast.  x is None: only a_f is computed.  h_wrong is None: no a_w.
    """
    def noisy(x):
        return x + args.noise * torch.randn_like(x) if args.noise else x

    if args.together:
        a = D(noisy(torch.cat([x, x_fake])), torch.cat([h, h_fake]), h_wrong)
        a_r, a_f, a_w = a.split([len(x), len(x_fake), len(a) - len(x) - len(x_fake)])
        return a_r, None if h_wrong is None else a_w, a_f
    a_r = a_w = None
    if x is not None:
        x = noisy(x)
        a_r, a_w = D(x, h), None if h_wrong is None else D(x, h_wrong)
    return a_r, a_w, D(noisy(x_fake), h_fake)


def phi_rate(args, left):
    """The encoders' learning rate with a fraction `left` of their steps to go: times `factor` after each part
    for drops = (factor, parts), else linear to 0 in the second half."""
    if not args.drops:
        return args.lr_phi * min(1.0, 2 * left)
    factor, parts = args.drops
    return args.lr_phi * factor ** int(parts * (1 - left) + 1e-6)


class RMSprop(torch.optim.Optimizer):
    """s <- .99 s + .01 g^2, theta <- theta - lr g / (sqrt s + 1e-8), with lr as a tensor on the device."""

    def __init__(self, params, lr):
        params = list(params)
        super().__init__(params, {"lr": torch.tensor(lr, device=params[0].device)})
        for p in params:
            self.state[p]["s"] = torch.zeros_like(p)

    def update(self, grads):
        group, = self.param_groups
        s = [self.state[p]["s"] for p in group["params"]]
        torch._foreach_mul_(s, 0.99)
        torch._foreach_addcmul_(s, grads, grads, 0.01)
        root = torch._foreach_sqrt(s)
        torch._foreach_add_(root, 1e-8)
        change = torch._foreach_mul(torch._foreach_div(grads, root), group["lr"])
        torch._foreach_sub_(group["params"], change)


def optimizer_of_phi(args, phi_t, phi_v):
    if args.opt_phi == "rmsprop":
        learnt = [p for net in (phi_t, phi_v) for p in net.parameters() if p.requires_grad]
        return RMSprop(learnt, args.lr_phi)
    return adam(args.lr_phi, phi_t, phi_v)


def adam(lr, *nets):
    return Adam([p for net in nets for p in net.parameters() if p.requires_grad], lr)


# ------------------------------------------------------------------------ networks of other data sets, layers

class TextGRU(Text):
    """The authors' phi_t for birds and COCO: a GRU of 512 units over 18 steps."""

    def __init__(self, ch):
        super().__init__(ch, units=512, pool=False)
        n = self.units
        self.update_into, self.update_on = nn.Linear(n, n), nn.Linear(n, n)
        self.reset_into, self.reset_on = nn.Linear(n, n), nn.Linear(n, n)

    def recur(self, x):
        """As in Text, x (n, 18, units).  Unlike in nn.GRU, the reset gate acts before the matrix product."""
        new, update, reset = (f(x).unbind(1) for f in (self.into, self.update_into, self.reset_into))
        states = [new[0].tanh()]
        for n, u, r in zip(new[1:], update[1:], reset[1:]):
            h = states[-1]
            u, r = (u + self.update_on(h)).sigmoid(), (r + self.reset_on(h)).sigmoid()
            states.append(u * (n + self.on(r * h)).tanh() + (1 - u) * h)
        return states


class GoogLeNet(nn.Module):
    """phi_v of the paper: torchvision's GoogLeNet, frozen, x (n, 3, 64, 64) in [-1, 1] -> (n, 1024)."""

    def __init__(self):
        super().__init__()
        from torchvision import models  # not at the top: it takes seconds, and most runs do not need it
        try:
            self.net = models.googlenet(weights=models.GoogLeNet_Weights.IMAGENET1K_V1, transform_input=False)
        except OSError as e:
            raise UserError(f"GoogLeNet's weights cannot be loaded ({data.brief(e)}): put them in "
                            f"{torch.hub.get_dir()}/checkpoints/, or leave out --image-features") from None
        self.net.fc = nn.Identity()
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        return self.net(F.interpolate(x, size=(224, 224), mode="bilinear", antialias=True))


def init(module):
    """Convolutions N(0, .02), BatchNorm's scale N(1, .02) and shift 0; linear layers keep PyTorch's default
    (authors' code)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def init_text(phi_t):
    """All Unif(-.08, .08) (authors' code); larger where --width narrows the input, to keep the variance."""
    for name, p in phi_t.named_parameters():
        bound = 0.08 if name.startswith("convs.0") else 0.08 * (384 / phi_t.convs[0].out_channels) ** 0.5
        nn.init.uniform_(p, -bound, bound)
    return phi_t


# --------------------------------------------------------------------------------- sentences, texts, pictures

@dataclass
class Part:
    """Captioned pictures, for training or held out."""

    images: torch.Tensor         # uint8 (N, 3, H, W)
    captions: list               # N lists of sentences
    t: torch.Tensor              # uint8 (N, K, 201), symbols of K <= 10 captions each, repeated if fewer
    content: torch.Tensor        # int64 (N,), equal where one picture's captions are true of the other
    attributes: torch.Tensor | None
    style: torch.Tensor | None
    new_classes: bool = False    # held out, with classes that do not occur in training


def parts_of(args):
    """The data set as loaded, its training Part, and its held-out Part: new combinations or classes, or the
    last tenth.

    Raises UserError if captions, attributes or style do not fit the pictures.
    """
    pictures = data.load(args.dataset, args.data_dir, 76 if args.views else 64, 3, skip_bad=args.skip_bad)
    extra, n, keys = pictures.extra, len(pictures.images), ("captions", "attributes", "style")
    if "captions" not in extra:
        raise UserError(f"{args.dataset} has no captions: expected scenes, shapes, coco, an .npz file with "
                        "captions, or a folder with images/CLASS/ and text_c10/CLASS/")

    def part(images, labels, captions, attributes, style):
        captions = [[s for s in ([c] if isinstance(c, str) else c) if s.strip()] for c in captions]
        if not all(captions):
            raise UserError(f"{args.dataset}: a picture without a caption found, one or more expected")
        attributes = None if attributes is None else attributes.long()
        k = min(10, max(map(len, captions)))
        t = encode(c[i % len(c)] for c in captions for i in range(k)).unflatten(0, (-1, k))
        row = torch.arange(len(images))
        content = row if labels is None else torch.where(labels < 0, -1 - row, labels)      # -1: no class
        if attributes is not None:
            if attributes.min() < 0:
                raise UserError(f"{args.dataset} has attributes below 0: expected the index of each value, "
                                "from 0")
            content = attributes.unique(dim=0, return_inverse=True)[1]
        return Part(images, captions, t, content, attributes, style)

    train = [pictures.images, pictures.labels, *(extra.get(k) for k in keys)]
    test = [pictures.test_images, pictures.test_labels, *(extra.get(f"test_{k}") for k in keys)]
    if test[0] is None or test[2] is None or len(test[0]) < 2:                  # hold out the last tenth
        cut = n - max(2, n // 10)
        train, test = ([a if a is None else a[rows] for a in train] for rows in (slice(cut), slice(cut, n)))
    labelled = train[1] is not None and train[3] is None
    train, test = part(*train), part(*test)
    test.new_classes = labelled and not torch.isin(test.content, train.content).any().item()
    return pictures, train, test


def first(part, n):
    """The first n rows of a Part."""
    rows = {k: v if v is None or isinstance(v, bool) else v[:n] for k, v in vars(part).items()}
    return Part(**rows)


def encode(sentences):
    """Symbols uint8 (n, 201) of sentences: 1 to 70 (70: a space), 0 for other characters and as padding.

    Case is ignored.  ["a b"]: 1, 70, 2, 0, ...
    """
    rows = (sentence.lower()[:LENGTH].translate(SYMBOLS).encode("latin-1") for sentence in sentences)
    return torch.frombuffer(bytearray(b"".join(row.ljust(LENGTH, b"\0") for row in rows)),
                            dtype=torch.uint8).view(-1, LENGTH)


def legible(sentence):
    """The letters and digits of a sentence that phi_t reads."""
    return "".join(s for s in sentence.lower()[:LENGTH] if s.isascii() and s.isalnum())


def check_captions(r, part):
    """Say what encode() drops from a Part's captions.  UserError: all read alike."""
    said = [s for captions in part.captions for s in captions]
    if all(legible(s) == legible(said[0]) for s in said):
        raise UserError(f"{r.args.dataset}: all captions have the same letters a-z and digits: captions "
                        "that differ expected")
    lost = remark(said)
    if lost and r.lead:
        log.say(f"captions: {lost}")


def remark(sentences):
    """One line about what encode() drops from sentences; empty if nothing."""
    lost = sorted(set().union(*(s.lower()[:LENGTH] for s in sentences)) - {*ALPHABET})
    blank = f"read without {' '.join(lost[:5])} (not in the alphabet)" * bool(lost)
    cut = sum(len(s) > LENGTH for s in sentences)
    return " and ".join(filter(None, (blank, f"{cut} cut after {LENGTH} characters" * bool(cut))))


def view(x):
    """A random 64 x 64 crop of each picture (n, 3, H, H), mirrored half the time (Sec. 5); x if H = 64."""
    n, _, size, _ = x.shape
    if size == 64:
        return x
    rows, columns = torch.randint(size - 63, (2, n, 1), device=x.device) + torch.arange(64, device=x.device)
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns.flip(1), columns)
    picture = torch.arange(n, device=x.device).view(n, 1, 1)
    return x[picture, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def crop(images):
    """The middle 64 x 64 of pictures (..., H, H)."""
    edge = (images.shape[-1] - 64) // 2
    return images[..., edge:edge + 64, edge:edge + 64]


def middle(images):
    """The middle 64 x 64 of uint8 pictures, in [-1, 1]."""
    return crop(images).float() / 127.5 - 1


def texts_of(phi_t, t):
    """h = phi_t(t), scaled, for symbols t (..., 201): (..., 1024) float32 on phi_t's device."""
    return phi_t.scale * metrics.batched(phi_t, t.flatten(0, -2)).unflatten(0, t.shape[:-1])


def draw(G, h):
    """A picture (n, 3, 64, 64) in [-1, 1] for each text h (n, 1024), each with its own z."""
    return metrics.batched(G, torch.randn(len(h), NZ, device=h.device), h, size=250)


def on_pictures(net, images):
    """phi_v or S on the middle of uint8 pictures: (N, 1024) or (N, 100)."""
    return metrics.batched(net, crop(images), size=250, scale=(-1, 1))


# ------------------------------------------------------------------------------------------------ the figures

def sheet(rows, sentences):
    """Rows of pictures, each (m, 3, 64, 64) in [-1, 1], each under its sentence: uint8 (3, H, W)."""
    return log.with_captions([log.grid(x, len(x), (-1.0, 1.0)) for x in rows], sentences)


def picked(test, n):
    """Indices and first captions of n held-out pictures, evenly spaced over the set."""
    i = torch.linspace(0, len(test.images) - 1, min(n, len(test.images))).long()
    return i, [test.captions[j][0] for j in i.tolist()]


def draw_captions(test, gs, device, samples=7):
    """Figs. 3, 4, 7: a row per held-out caption: true picture, then `samples` from each (G, phi_t) in gs."""
    i, sentences = picked(test, 7)
    columns = [middle(test.images[i]).to(device)[:, None]]
    for G, phi_t in gs:
        h = texts_of(phi_t, encode(sentences))
        columns.append(draw(G, h.repeat_interleave(samples, 0)).unflatten(0, (len(h), samples)))
    return sheet(torch.cat(columns, 1), sentences)


def transfer(S, G, x, h):
    """Fig. 6: G(S(x), h) for styles x (m, 3, 64, 64) and texts h (k, 1024): (k, m, 3, 64, 64)."""
    with sampling(S, G):
        s = S(x).float()
        return torch.stack([G(s, one.expand(len(s), -1)).float() for one in h])


def between(a, b, n=8):
    """n evenly spaced points on the line from a to b (k, d), ends included: (k, n, d)."""
    w = torch.linspace(0, 1, n, device=a.device).view(1, -1, 1)
    return (1 - w) * a[:, None] + w * b[:, None]


def draw_fig5(by):
    """Fig. 5: one line for each label's (AU-ROC, curve) from verify()."""
    chart = log.Axes((0, 1), (0, 1), "false positive rate", "true positive rate", low=True)
    for label, (area, curve) in by.items():
        chart.line(np.linspace(0, 1, len(curve)), curve, label=f"{label} {area:.2f}")
    return chart.picture()


def styles(r, pictures, test, runs, prefix=""):
    """Sec. 5.2: experiment id -> label -> AU-ROC on held-out pictures.  Draws Figs. 5a and b as
    PREFIXfig5a.png and so on.

    `runs` (label -> networks) are scored by S; the label "text" stands for h of the first run's phi_t.
    """
    extra, found = pictures.extra, {}
    if test.style is None or "style_names" not in extra:
        return found
    first = next(iter(runs.values()))
    f = {label: on_pictures(nets.S, test.images).cpu() for label, nets in runs.items()}
    f["text"] = texts_of(first.phi_t, test.t[:, 0]).cpu()
    names, alone = extra["style_names"], torch.ones(len(test.images), dtype=torch.bool)
    if "relation" in extra.get("attribute_names", ()):      # x, y are only meaningful for one object
        alone = test.attributes[:, extra["attribute_names"].index("relation")] == 0
    everything = torch.ones_like(alone)
    for key, figure, wanted, rows in (("t2i-pose-roc", "fig5a", ("x", "y"), alone),
                                      ("t2i-bg-roc", "fig5b", ("red", "green", "blue"), everything)):
        if set(wanted) <= set(names) and rows.sum() > 9:
            style = test.style[rows][:, [names.index(w) for w in wanted]]
            with r.aside():
                by = {label: verify(x[rows], style) for label, x in f.items()}
            r.show(prefix + figure, draw_fig5(by))
            found[key] = {label: area for label, (area, _) in by.items()}
    return found


def figures(r, nets, test):
    """Draw the paper's figures into the run's folder."""
    args, phi_t, S, G = r.args, nets.phi_t, nets.S, nets.G_bar
    name = {"flowers": "fig4", "coco": "fig7"}.get(args.experiment, "fig3")
    with r.aside():
        r.show(name, draw_captions(test, [(G, phi_t)], args.device))
        i, sentences = picked(test, 9)
        h = texts_of(phi_t, encode(sentences))
        if args.style_steps:
            x = middle(test.images[i[1:]]).to(args.device)
            rows = transfer(S, G, x, h[:4])
            r.show("fig6", sheet([x, *rows], ["styles", *sentences[:4]]))
        a, b = h[0:-1:2], h[1::2]
        z = torch.randn(2, len(a), NZ, device=args.device)
        lines = between(a, b), between(z[0], z[1])
        with sampling(G):
            by_text = [G(z[0, j].expand(8, -1), lines[0][j]).float() for j in range(len(a))]
            by_z = [G(lines[1][j], a[j].expand(8, -1)).float() for j in range(len(a))]
        titles = [f"{a}   TO   {b}" for a, b in zip(sentences[0:-1:2], sentences[1::2])]
        r.show("fig8a", sheet(by_text, titles))
        r.show("fig8b", sheet(by_z, sentences[0:-1:2]))


def trained(args, where):
    """G_bar, phi_t, S and name of the run or checkpoint `where`, which must have this run's --width."""
    phi_t, _, G, _, S = networks(argparse.Namespace(**vars(args) | {"image_features": "own"}))
    G_bar, phi_t, S = place(args, averaged(G), phi_t, S)
    run.fetch(where, "a text2image run with the --width and --phi-t of this one", args.device, G_bar=G_bar,
              phi_t=phi_t, S=S)
    return SimpleNamespace(G_bar=G_bar, phi_t=phi_t, S=S, name=Path(where).resolve().name)


def drawer(args, saved):
    """Drawer of a trained run.  Inputs: z and the symbols t of a sentence, by default a held-out caption."""
    phi_t, _, G, _, _ = networks(argparse.Namespace(**vars(args) | {"image_features": "own"}))
    t = saved["about"]["t"].to(args.device)

    def read(sentence):
        if not legible(sentence):
            raise ValueError("a sentence in the letters a-z")
        return encode([sentence])[0]

    def tell(row):
        return "".join(ALPHABET[i - 1] if i else " " for i in row.tolist()).rstrip()

    def draws(n):
        z = torch.randn(n, NZ, device=args.device)
        return z, t[torch.randint(len(t), (n,), device=args.device)]

    return export.Drawer(lambda z, t: G(z, phi_t.scale * phi_t(t)), draws, {"phi_t": phi_t, "G_bar": G},
                         {"z": [], "t": [export.Knob("prompt", read=read, tell=tell, whole=True)]},
                         (-1.0, 1.0), size=250)


def draw_beside(r, nets, pictures, test):
    """--beside: compare this run with others in Figs. 3 and 5, as beside.png, beside_fig5a.png and so on."""
    args = r.args
    nets.name = r.folder.resolve().name
    runs = [nets, *(trained(args, where) for where in args.beside)]
    with r.aside():
        r.show("beside", draw_captions(test, [(n.G_bar, n.phi_t) for n in runs], args.device, samples=2))
    by = {n.name + " " * i: n for i, n in enumerate(runs)}      # folders elsewhere may have the same name
    for key, areas in styles(r, pictures, test, by, "beside_").items():
        log.say(f"{key} " + ", ".join(f"{label.strip()} {area:.3f}" for label, area in areas.items()))
    log.say(f"true picture, then two samples each of {', '.join(n.name for n in runs)}: "
            f"{r.folder / 'beside.png'}")


def draw_prompts(r, sentences):
    """--prompt: a row of pictures for each sentence, as prompts.png."""
    args, (draws, _) = r.args, export.load(r, drawer)
    if remark(sentences):
        log.say(f"prompts: {remark(sentences)}")
    with r.aside():
        z, _ = draws.draw(args.n * len(sentences))
        x = draws.pictures((z, encode(sentences).to(args.device).repeat_interleave(args.n, 0)))
    r.folder.mkdir(parents=True, exist_ok=True)
    log.save_png(r.folder / "prompts.png", sheet((2 * x - 1).split(args.n), sentences))
    log.say(f"{len(sentences)} rows of {args.n} pictures in {r.folder / 'prompts.png'}")


# ------------------------------------------------------------------------------------------------ the numbers

def classify(v, h, y):
    """Eq. 3: fraction of v (N, d) whose best class by v.h is y (N,), with h (N, d) averaged over each class.

    With v and h swapped: Eq. 4.  1 if v and h are one-hot in y.
    """
    classes, y = y.unique(return_inverse=True)
    total = torch.zeros(len(classes), h.shape[1], device=h.device).index_add_(0, y, h)
    mean = total / y.bincount()[:, None]
    return ((v @ mean.T).argmax(1) == y).float().mean().item()


def agreement(a, attributes, counts, names):
    """% of pictures with the right value of an attribute as the largest logit; a (N, sum of counts).

    A kind of attribute is the first word of its name.  "value": mean over kinds; "least": worst kind; "all":
    every attribute right at once.  -1 marks attributes of absent objects, which do not count.
    """
    a, attributes = a.cpu(), attributes.cpu()
    right = torch.stack([a_i.argmax(1) == y for a_i, y in zip(a.split(counts, 1), attributes.T)], 1).double()
    there, kinds, share = attributes >= 0, [name.split()[0] for name in names], {}
    for kind in dict.fromkeys(kinds):
        columns = [k == kind for k in kinds]
        share[kind] = 100 * right[:, columns][there[:, columns]].mean().item()
    return {"value": sum(share.values()) / len(share), **share, "least": min(share.values()),
            "all": 100 * right.masked_fill(~there, 1.0).amin(1).mean().item()}


def order(a, attributes, counts, names):
    """{"order": % of pictures of two objects whose logits a (N, sum of counts) fit the attributes better than
    with the objects exchanged}, 50 by chance; {} without them or names in pairs, as "size 1" and "size 2"."""
    pairs = [(i, names.index(name[:-1] + "2")) for i, name in enumerate(names)
             if name.endswith(" 1") and name[:-1] + "2" in names]
    two = torch.full((len(a),), bool(pairs))
    for i, j in pairs:
        y = attributes[:, [i, j]]
        two &= ((y >= 0) & (y < min(counts[i], counts[j]))).all(1)
    if not two.any():
        return {}
    log_p = [a_i.log_softmax(1) for a_i in a[two].double().split(counts, 1)]

    def fit(i, j):                                          # of attribute i's values to attribute j's logits
        return log_p[j].gather(1, attributes[two, i:i + 1])

    gain = sum((fit(i, i) - fit(j, i)) + (fit(j, j) - fit(i, j)) for i, j in pairs)     # 0 for equal objects
    return {"order": 50 + 50 * gain.sign().mean().item()}


def clusters(x, k, starts=5, steps=30):
    """K-means: cluster indices (N,) of x (N, d), from the best of several k-means++ starts."""
    x, best = x - x.mean(0), (float("inf"), None)
    for _ in range(starts):
        centre, far = x[torch.randint(len(x), (1,))], torch.full((len(x),), float("inf"))
        while len(centre) < k:
            far = torch.minimum(far, torch.cdist(x, centre[-1:])[:, 0].square())
            centre = torch.cat([centre, x[far.clamp_min(1e-30).multinomial(1)]])
        for _ in range(steps):
            distance, y = torch.cdist(x, centre).min(1)
            count = y.bincount(minlength=k)[:, None]
            mean = torch.zeros_like(centre).index_add_(0, y, x) / count.clamp(min=1)
            centre = torch.where(count > 0, mean, centre)
        best = min(best, (distance.square().sum().item(), y), key=lambda found: found[0])
    return best[1]


def roc(same, other, n=201):
    """(area, curve) of the ROC of scores `same` (m,) against `other` (k,): P(one in `same` exceeds one in
    `other`), ties counting one half; true positive rates (n,) at n evenly spaced false positive rates."""
    edges = torch.cat([same, other]).unique().flip(0)
    false, true = (F.pad(1 - torch.searchsorted(s.sort().values, edges).double() / len(s), (1, 0))
                   for s in (other, same))
    return torch.trapezoid(true, false).item(), np.interp(np.linspace(0, 1, n), false, true)


def verify(f, style):
    """Sec. 5.2: (AU-ROC, curve of roc()) of the cosine similarity of f (N, d) at telling pairs from one
    cluster of `style` (N, s) from other pairs.

    Means over 5 folds; 100 clusters, or one per 20 pictures if that is fewer.  1/2 by chance.
    """
    f, y = F.normalize(f.cpu().float()), clusters(style.float(), max(2, min(100, len(style) // 20)))
    folds = []
    for i in torch.randperm(len(f)).chunk(5):
        pair = torch.ones(len(i), len(i), dtype=torch.bool).triu(1)
        score, same = (f[i] @ f[i].T)[pair], (y[i, None] == y[i])[pair]
        if same.any() and not same.all():
            folds.append(roc(score[same], score[~same]))
    return tuple(np.mean(values, 0) for values in zip(*folds)) or (0.0, np.zeros(2))


def retrieval(args, nets, test, v):
    """Eqs. 3 and 4 on held-out pairs: experiment id and its dict.

    t2i-enc-zs if their classes do not occur in training; else pictures of equal content are one class.
    """
    h = texts_of(nets.phi_t, test.t)
    h_1, y = h[:, 0], test.content.to(args.device)
    n = len(v) if test.new_classes else min(100, len(v))    # whole groups of n
    groups = torch.arange(len(v) // n * n, device=args.device).split(n)
    mean = h.mean(1)
    both = torch.tensor([[classify(v[i], mean[i], y[i]), classify(h_1[i], v[i], y[i])] for i in groups])
    f_v, f_t = (100 * both.mean(0)).tolist()
    classes = len(y.unique())
    if not test.new_classes:
        return "retrieval", {"value": f_v, "f_t": f_t, "unit": f"% right by Eq. 3 among {n} pictures"}
    found = {"value": f_v, "f_t": f_t, "unit": f"% right by Eq. 3 of {classes} classes"}
    if (args.experiment, args.image_features, args.width, classes, n) == ("birds", "googlenet", 1, 50, 2933):
        found["paper"] = 54.0                               # CVPR 2016: CUB's 50 test classes
    return "t2i-enc-zs", found


OPPOSITES = ("left", "right"), ("above", "below"), ("over", "under")


def one_word(nets, test, v, names, values):
    """Kind of attribute -> % of pictures, as v (N, 1024), whose v.h is larger for their first caption than
    for the same one with another word of that kind; "order": with the opposite direction, so that two objects
    change places.  "value": mean over attributes.  50 by chance; {} without names of values."""
    h, share = texts_of(nets.phi_t, test.t[:, 0]), {}
    # Reversed, so that object 1 counts: the values of object 2 also have "none".
    kinds = {name.split()[0]: {word: [other for other in words if other != word] for word in words}
             for name, words in reversed([*zip(names, values)])}
    if kinds:
        kinds["order"] = {word: [other] for pair in OPPOSITES for word, other in (pair, pair[::-1])}
    for kind, others in kinds.items():
        rows, changed = [], []
        for i, (sentence, *_) in enumerate(test.captions):
            said = sentence.split()
            at = [j for j, word in enumerate(said) if others.get(word)]
            if at:
                j = at[torch.randint(len(at), ())]
                said[j] = others[said[j]][torch.randint(len(others[said[j]]), ())]
                rows.append(i), changed.append(" ".join(said))
        if rows:
            h_1 = texts_of(nets.phi_t, encode(changed))
            share[kind] = 50 + 50 * (v[rows] * (h[rows] - h_1)).sum(1).sign().mean().item()
    own = [share[kind] for kind in share if kind != "order"]
    return {"value": sum(own) / len(own), **share} if own else {}


def print_retrieval(args, nets, test):
    _, found = retrieval(args, nets, test, on_pictures(nets.phi_v, test.images))
    log.say(f"held-out pairs: {found['value']:.1f} {found['unit']}, by Eq. 4 {found['f_t']:.1f}")


def evaluate(r, nets, pictures, train, test):
    """Numbers on held-out data: experiment id -> dict with "value" and, if published, "paper"."""
    args, extra, results = r.args, pictures.extra, {}
    if not args.e2e:                                        # which does not train phi_v
        v = on_pictures(nets.phi_v, test.images)
        results = dict([retrieval(args, nets, test, v)])
        with r.aside():
            found = one_word(nets, test, v, extra.get("attribute_names", ()),
                             extra.get("attribute_values", ()))
        if found:
            results["one-word"] = found | {"unit": "% prefer their caption to one that differs in a word"}
    if train.attributes is not None and test.attributes is not None:
        counts = (torch.cat([train.attributes, test.attributes]).amax(0) + 1).tolist()
        names = extra["attribute_names"]
        # The classifier trains on half of the held-out data too (three copies): otherwise it misnames
        # unseen combinations.
        half = len(test.images) // 2
        real = crop(test.images)
        images = torch.cat([crop(train.images), *3 * [real[:half]]])
        shown = torch.cat([train.attributes, *3 * [test.attributes[:half]]])
        one_hot = torch.cat([F.one_hot(c, k) for c, k in zip(shown.T, counts)], 1).to(torch.uint8)
        steps = max(20, min(len(images) // 5, 1000 if args.quick else 2600))
        clf = metrics.classifier(images, one_hot, args.device, args.data_dir, steps)
        values = extra.get("attribute_values") or [[]] * len(counts)
        none = torch.tensor([v.index("none") if "none" in v else -1 for v in values])

        def judge(x, attributes):
            there = attributes.masked_fill(attributes == none, -1)
            a = metrics.logits(clf, x).cpu()
            return agreement(a, there, counts, names) | order(a, there, counts, names)

        def drawn(t):
            return (draw(nets.G_bar, texts_of(nets.phi_t, t[:, 0])) + 1) / 2

        with r.aside():
            held = drawn(test.t[:2000])
            seen = drawn(train.t[:len(held)])
        results["t2i-agreement"] = {
            **judge(held, test.attributes[:len(held)]),
            "unit": "% of attributes as the caption has them (half of the held-out pictures teach the judge)",
            "ceiling": judge(real[half:], test.attributes[half:]),
            "seen": judge(seen, train.attributes[:len(seen)])}
        results["frechet"] = {"value": metrics.frechet_distance(clf, held, real[:len(held)])}
    if args.style_steps:
        for key, areas in styles(r, pictures, test, {"style": nets}).items():
            results[key] = {"value": areas["style"], "unit": "AU-ROC", "text": areas["text"]}
    return results


def report(r, nets, pictures, train, test):
    """Draw the figures and write results.json, from at most 10,000 held-out and 20,000 training pictures."""
    train, test = first(train, 20000), first(test, 2000 if r.args.quick else 10000)
    figures(r, nets, test)
    results = evaluate(r, nets, pictures, train, test)
    r.results(results, passed=results.get("t2i-agreement", {"value": 100})["value"] >= 50)


if __name__ == "__main__":
    main()

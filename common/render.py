"""Rendered data sets with known ground truth, made on first use: nothing to download, every label exact.

`shapes` and `scenes` are flat pictures of one or two objects, each with five English captions; outlines are
signed distance functions, which give the coverage of each pixel.  `faces` are shaded 3-D heads from a linear
morphable model: each part (head, hair, hat, ...) is a cloud of points whose positions, normals and colours
are linear in a head's coefficients.  So a batch of pictures takes three matrix products, one scatter (the
z-buffer) and one gather, without a loop over pictures.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from common import UserError

FACTORS = ["azimuth", "elevation", "lighting", "width"]
DEGREES = [60, 25, 70]  # azimuth, elevation and lighting at 1
ATTRIBUTES = ["smile", "glasses", "beard", "long_hair", "hat", "skin", "hair"]
IDENTITY = ["jaw", "nose", "eyes", "length", "lips", "brow"]  # shape of a face, without labels
TONES = ["hat_hue", "shirt_hue", "background"]                # colours, without labels


# ---- Faces: surfaces ---------------------------------------------------------------------------------------
# A patch maps u in [0, 1], v in [-1, 1] to points (..., 3) and to paint {name: weight}.  x points right in
# the picture, y up, z to the viewer; the chin is at y = -1, the crown at 1.03.  Everything is symmetric in x.

def _step(x, a, b):
    """Smooth step from 0 at x = a to 1 at x = b; with a > b it falls from 1 to 0."""
    t = ((x - a) / (b - a)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _bump(x, y, x0, y0, sx, sy):
    """A Gaussian bump at (x0, y0) and its mirror image."""
    return torch.exp(-((x.abs() - x0) / sx) ** 2 - ((y - y0) / sy) ** 2)


def _disc(x, y, rx, ry, soft=.12):
    """1 inside the ellipse with radii rx and ry, 0 outside, with a smooth edge."""
    return torch.sigmoid((1 - (x / rx) ** 2 - (y / ry) ** 2) / soft * 2)


def _head(u, v, smile=0, beard=0, jaw=0, nose=0, eyes=0, length=0, lips=0, brow=0):
    """A superellipsoid, its front displaced along z; features are placed by (a, b), the original (x, y)."""
    theta, phi = math.pi * u, math.pi * v
    x, y, z = theta.sin() * phi.sin(), theta.cos(), theta.sin() * phi.cos()
    r = (x.abs() / .74) ** 2.4 + (y.abs() / 1.03) ** 2.4 + (z.abs() / torch.where(z > 0, .78, .95)) ** 2.4
    a, b, z = (c * r ** (-1 / 2.4) for c in (x, y, z))
    front, low = _step(z, 0, .35), _step(b, -.1, -.85)

    white = front * _disc(a.abs() - .29, b - .03, .16, .085)
    iris = front * _disc(a.abs() - .28, b - .035, .068, .078, .2)
    lash = front * _disc(a.abs() - .29, b - .05, .19, .11) * _step(b, .05, .09) * (1 - white)
    eyebrow = front * _disc(a.abs() - .29, b - .25 + .9 * (a.abs() - .27) ** 2, .19, .045, .3)
    mouth, gap = front * _disc(a, b + .55, .23, .095, .2), front * _disc(a, b + .55, .23, .018, .5)
    bent = b + .6 - 1.6 * a ** 2
    grin, teeth = front * _disc(a, bent, .31, .13, .2), front * _disc(a, bent - .01, .27, .08, .2)
    bristle = front * torch.maximum(_disc(a, b + .66, .64, .44, .2) * _step(b, -.30, -.44),
                                    _disc(a, b + .44 + .5 * a ** 2, .3, .055, .3))
    shade = front * (.5 * _bump(a, b, .19, .1, .09, .1) + .4 * _bump(a, b, .17, -.3, .04, .08)
                     + .4 * _bump(a, b, 0, -.71, .15, .05) + .9 * _bump(a, b, .055, -.385, .03, .02))

    ridge = .05 + (.17 + .05 * nose) * _step(b, .22, -.3)
    ridge = ridge * (_step(b, .24, -.2) * _step(b, -.40, -.31)).sqrt()
    z = torch.where(z < 0, z * (1 - .75 * low), z) + front * (  # behind: the nape
        ridge * torch.exp(-(a / (.065 + .055 * _step(b, .1, -.3))) ** 2)
        + .07 * _bump(a, b, .1, -.31, .055, .06)                                         # nostrils
        + (.05 + .03 * brow) * _bump(a, b, .26, .25, .25, .09)
        - .12 * _bump(a, b, .28, .05, .18, .13) + .05 * _bump(a, b, .29, .03, .12, .07)  # socket, eyeball
        + .05 * _bump(a, b, .42, -.2, .2, .16) + .06 * _bump(a, b, 0, -.55, .28, .14)    # cheek, muzzle
        + (.035 + .03 * lips) * (_bump(a, b, 0, -.51, .19, .04) + _bump(a, b, 0, -.61, .17, .05))
        - .04 * _bump(a, b, 0, -.73, .2, .05) + .2 * _bump(a, b, 0, -.9, .3, .18)        # dimple, chin
        + .07 * smile * _bump(a, b, .42, -.3, .14, .1) - .03 * smile * _bump(a, b, .36, -.5, .06, .12)
        + .05 * beard * bristle)
    x = a * (1 - .15 * low + .13 * jaw * low) + .05 * eyes * front * a.sign() * _bump(a, b, .3, .1, .15, .2)
    y = b * (1 + .09 * length * low) - .1 * beard * _step(b, -.7, -1)
    return torch.stack([x, y, z], -1), {
        "skin": torch.ones_like(x), "shade": shade, "white": white * (1 - iris), "dark": iris + .8 * lash,
        "brow": eyebrow, "lips": mouth * (1 - gap), "gap": gap, "grin": grin * (1 - teeth), "teeth": teeth,
        "beard": bristle * (1 - mouth), "grinning_beard": bristle * (1 - grin),
        "brim": front * _step(b, .25, .5)}  # the hat's shadow


def _neck(u, v):
    y, phi = -.5 - 1.25 * u, math.pi * v
    flare = _step(y, -1.1, -1.75)
    x, z = (.42 + .7 * flare) * phi.sin(), (.39 + .3 * flare) * phi.cos() - .22
    return torch.stack([x, y, z], -1), {
        "skin": torch.ones_like(x), "shirt": _step(y, -1.16, -1.22), "shade": .9 * _step(y, -1.15, -.85)}


def _ear(u, v):
    r, phi = (math.pi * u).sin(), math.pi * v
    x, y = .73 + r * (.11 * phi.cos() - .06 * phi.sin()), .2 * (math.pi * u).cos() - .02
    return torch.stack([x, y, .13 * r * phi.sin() + .25 * y - .08], -1), {"skin": torch.ones_like(x)}


def _hair(u, v, long_hair=0):
    """A shell around the skull, from the crown (u = 0) down to a tip that depends on the direction."""
    phi = math.pi * v
    side = phi.abs()
    short = .64 + .05 * torch.exp(-(phi / .4) ** 2) - .75 * _step(side, 1, 1.6) - .35 * _step(side, 1.7, 2.4)
    short = short + .3 * torch.exp(-((side - 1.75) / .25) ** 2)  # above the ear
    tip = short + long_hair * (.62 - 1.75 * _step(side, .9, 1.25) - short)
    y = 1.13 + (tip - 1.13) * u
    r = (1 - (y.clamp(min=0) / 1.13) ** 2.4).clamp(min=0) ** (1 / 2.4)  # straight down below the widest place
    x = .83 * r * phi.sin() * (1 + .1 * long_hair * _step(y, .35, -.3))
    nape = .35 * (1 - long_hair) * _step(y, -.1, -.6)
    z = r * phi.cos() * torch.where(side < math.pi / 2, .84, 1.02 - nape)
    return torch.stack([x, y, z], -1), {"hair": .825 - .175 * torch.sin(23 * side + 2 * torch.sin(3 * side))}


def _rim(u, v):
    t, w = 2 * math.pi * u, math.pi * v
    x, y = .225 * (1 + .19 * w.cos()) * t.cos(), .185 * (1 + .19 * w.cos()) * t.sin()
    return torch.stack([.31 + x, .03 + y, .84 - .25 * x + .04 * w.sin()], -1), {"frame": torch.ones_like(x)}


def _arm(u, v):
    x, y = .52 + .31 * _step(u, 0, .3) + .02 * (math.pi * v).cos(), .08 + .035 * (math.pi * v).sin()
    return torch.stack([x, y, .80 - .95 * u], -1), {"frame": torch.ones_like(x)}


def _bridge(u, v):
    x, y, z = .24 * u - .12, .07 + .035 * (math.pi * v).cos(), .88 + .03 * (math.pi * v).sin()
    return torch.stack([x, y, z], -1), {"frame": torch.ones_like(x)}


def _hat(u, v):
    """Brim (u < 1/4), band and crown."""
    phi, brim, crown = math.pi * v, (1 - 4 * u).clamp(0), ((4 * u - 1) / 3).clamp(0)
    r = .95 + .28 * brim - .95 * crown ** 3
    x, z = .95 * r * phi.sin(), 1.06 * r * phi.cos() - .04
    y = .52 - .13 * brim + .07 * x ** 2 + .8 * (1 - (1 - crown) ** 2) ** .8
    return torch.stack([x, y, z], -1), {"hat": 1 - .6 * _step(u, .25, .27) * _step(u, .45, .43)}


def _pair(patch):
    return patch, lambda u, v: (patch(u, v)[0] * torch.tensor([-1, 1, 1]), patch(u, v)[1])


# {part: (patches, modes)}
PARTS = {"head": ([_head], ["smile", "beard", *IDENTITY]), "body": ([_neck, *_pair(_ear)], []),
         "hair": ([_hair], ["long_hair"]), "glasses": ([*_pair(_rim), *_pair(_arm), _bridge], []),
         "hat": ([_hat], [])}
# A point covers 2 x 2 samples and cracks of 1 sample are closed, so neighbours may be almost 3 samples apart
# when a head is widest (times 1.15) and nearest (times 8 / 7).
SPACING = 2.2
INDEX = 2 ** 28  # more than the number of points of a head at the largest size
CHUNK = 2 ** 19  # points and samples per chunk, to fit in a CPU's cache; a GPU takes 32 times as many


# ---- Faces: from surfaces to matrices ----------------------------------------------------------------------

def _grid(patch, modes, gap):
    """(u, v) whose neighbours are at most `gap` apart on the patch and on each of its modes."""
    # Keep u away from the poles, which have no normal.
    grid = [torch.linspace(1e-3, 1 - 1e-3, 200).double(), torch.linspace(-1, 1, 201).double()]
    shapes = torch.stack([patch(*torch.meshgrid(grid, indexing="ij"), **mode)[0] for mode in modes])
    for i in (0, 1):
        way = F.pad(shapes.diff(dim=1 + i).norm(dim=-1).amax((0, 2 - i)).cumsum(0), (1, 0))
        even = np.linspace(0, way[-1].item(), math.ceil(way[-1] / gap) + 1)
        grid[i] = torch.from_numpy(np.interp(even, way, grid[i]))
    return torch.meshgrid(grid, indexing="ij")


def _grain(x, bits):
    """Round x to multiples of 2^-bits, as float32.  Sums of products of such numbers are exact in any order,
    so pictures are bit-identical for any chunk size and number of threads."""
    return ((x * 2 ** bits).round() / 2 ** bits).float()


@lru_cache(maxsize=16)
def _part(name, gap, device):
    """-> points, normals (3 k, N each): mean, then change for each mode; paint (r, N) and its r names."""
    patches, modes = PARTS[name]
    modes = [{}, *({mode: 1} for mode in modes)]
    shapes, paints = [], []
    for patch in patches:
        uv = _grid(patch, modes, gap)
        p = torch.stack([patch(*uv, **mode)[0] for mode in modes])  # (k, U, V, 3)
        normal = torch.linalg.cross(*torch.gradient(p, dim=(1, 2)), dim=-1)
        outward = ((p - p.mean((1, 2), keepdim=True)) * normal).sum((1, 2, 3), keepdim=True).sign()
        shapes.append(torch.stack([p, F.normalize(outward * normal, dim=-1)]).flatten(2, 3))
        paints.append({k: weight.flatten() for k, weight in patch(*uv)[1].items()})
    shapes = torch.cat(shapes, 2)  # (2, k, N, 3)
    shapes = torch.cat([shapes[:, :1], shapes[:, 1:] - shapes[:, :1]], 1).permute(0, 3, 1, 2).flatten(1, 2)
    names = list(paints[0])  # the first patch of a part has all its paints
    paint = torch.stack([torch.cat([w.get(k, torch.zeros_like(w[names[0]])) for w in paints]) for k in names])
    return *_grain(shapes, 11).to(device), _grain(paint, 8).to(device), names


# ---- Faces: from labels to pictures ------------------------------------------------------------------------

def _mix(a, b, t):
    return a + (b - a) * t


def _colours(attributes, tones, plain):
    """{paint: (n, 3)} in linear light.  Paints on skin are differences from the skin colour, 0 if absent."""
    def rgb(*c):
        return attributes.new_tensor([c])

    smile, _, beard, _, hat, skin, hair = attributes.T[..., None]
    skin, brown = _mix(rgb(.12, .055, .03), rgb(.85, .56, .42), skin), rgb(.16, .065, .025)
    hair = torch.where(hair < .5, _mix(rgb(.012, .01, .01), brown, 2 * hair),
                       _mix(brown, rgb(.8, .55, .2), 2 * hair - 1))
    hue = (.5 + .5 * (2 * math.pi * (tones[..., None] + rgb(0, 1 / 3, 2 / 3))).cos()) ** 2
    bristle = beard * (.5 * hair - skin)
    return {
        "skin": skin, "shade": -.5 * skin, "brim": -.5 * hat * skin,
        "brow": (.25 * skin if plain else .5 * hair) - skin, "white": rgb(.8, .8, .8) - skin,
        "dark": rgb(.03, .02, .02) - skin, "lips": (1 - smile) * rgb(-.25, -.62, -.62) * skin,
        "gap": (1 - smile) * -.88 * skin, "grin": smile * rgb(-.3, -.7, -.7) * skin,
        "teeth": smile * (rgb(.9, .9, .85) - skin), "beard": (1 - smile) * bristle,
        "grinning_beard": smile * bristle, "hair": hair, "hat": .03 + .6 * hue[:, 0],
        "frame": rgb(.02, .015, .015).expand_as(skin),
        "shirt": (.03 + .35 * hue[:, 1] - skin) * (not plain),
        "background": (.02 if plain else .1 + .3 * tones[:, 2:]) * torch.ones_like(skin)}


def _rotation(angle, i, j):
    """(n, 3, 3) rotations by angle (n,) in the plane of axes i and j."""
    R = torch.eye(3).to(angle).repeat(len(angle), 1, 1)
    R[:, i, i] = R[:, j, j] = angle.cos()
    R[:, i, j], R[:, j, i] = angle.sin(), -angle.sin()
    return R


def _pose(factors):
    """-> camera (n, 3, 3): rotation and width; lamp (n, 2, 3): directions of Lambert's and Blinn's terms."""
    azimuth, elevation, lighting = (factors[:, :3] * factors.new_tensor(DEGREES)).deg2rad().unbind(1)
    one, up = torch.ones_like(azimuth), math.radians(25)
    R = _rotation(elevation, 2, 1) @ _rotation(azimuth, 0, 2)
    widen = torch.stack([1 + .15 * factors[:, 3], one, one], 1)[:, None]
    light = torch.stack([lighting.sin() * math.cos(up), one * math.sin(up), lighting.cos() * math.cos(up)], 1)
    half = F.normalize(light + light.new_tensor([0, 0, 1]), dim=1)
    return R * widen, torch.stack([light, half], 1) @ R / widen


def _nearest(xyz, scale, centre, S):
    """Points (m, 3, N) -> (m, 1, S S) int64: depth * 2^28 + index of the nearest point per sample, or 0."""
    x, y, z = xyz.unbind(1)
    f = 8 * scale / (8 - z)  # perspective from 8 units away; serves as depth: it grows towards the viewer
    # A margin of two samples on each side; points outside the picture go to the outermost.
    column = (x * f).add_(S / 2 + 2.5).clamp_(0, S + 4).floor_()
    row = (centre - y).mul_(f).add_(S / 2 + 2.5).clamp_(0, S + 4).floor_()
    cell = torch.add(column, row, alpha=S + 5).long()
    depth = f.view(torch.int32).long()  # positive floats sort like their bits
    key = torch.arange(f.shape[1], device=f.device).add(depth, alpha=INDEX)
    key = key.new_zeros(len(f), (S + 5) ** 2).scatter_reduce_(1, cell, key, "amax").view(-1, S + 5, S + 5)
    key = torch.maximum(key[:, 1:-2], key[:, 2:-1])  # a point covers 2 x 2 samples
    key = torch.maximum(key[:, :, 1:-2], key[:, :, 2:-1])
    # Close cracks that are one sample wide with nearer points on both sides.
    key = torch.maximum(key[:, 1:-1], torch.minimum(key[:, :-2], key[:, 2:]))
    key = torch.maximum(key[:, :, 1:-1], torch.minimum(key[:, :, :-2], key[:, :, 2:]))
    return key.flatten(1)[:, None]


@torch.no_grad()
def heads(factors, attributes=None, identity=None, tones=None, size=64, channels=3, plain=False,
          device="cpu"):
    """The renderer of `faces`: draw n heads -> uint8 (n, channels, size, size) on `device`.

    factors (n, 4) in [-1, 1] and attributes (n, 7) in [0, 1] as in `faces`; values in between are blends;
    identity (n, 6) in [-1, 1]: jaw, nose, eyes (distance), length, lips, brow; tones (n, 3) in [0, 1]: hue of
    the hat, hue of the shirt, brightness of the background.  Default 0; skin, hair and tones 0.5.
    plain: a bare head on black, without hair, glasses, hat and shirt.
    Raises UserError, a ValueError: size not in 8..256, channels not 1 or 3.
    """
    if not 8 <= size <= 256:
        raise UserError(f"expected size 8..256, found {size}")
    if channels not in (1, 3):
        raise UserError(f"expected channels 1 (grey) or 3 (colour), found {channels}")
    n, samples = len(factors), 2 if size >= 48 else 3  # samples x samples per pixel
    S = size * samples
    factors = factors.double().cpu()
    attributes, identity, tones = (
        factors.new_tensor(default).expand(n, -1) if t is None else t.double().cpu() for t, default in
        ((attributes, [0.] * 5 + [.5] * 2), (identity, [0.] * len(IDENTITY)), (tones, [.5] * len(TONES))))
    scale, centre = (S / 2.4, .015) if plain else (S / 2.72, .1)  # samples per unit; y of the centre
    camera, lamp = _pose(factors)
    colours = _colours(attributes, tones, plain)
    if channels == 1:
        colours = {k: c @ c.new_tensor([[.299], [.587], [.114]]) for k, c in colours.items()}

    knobs = dict(zip(ATTRIBUTES + IDENTITY, torch.cat([attributes, identity], 1).T))
    products = [[], [], []]  # points, normals, paint: each part's coefficients (n, rows, k) and matrix (k, N)
    for name in ("head", "body") if plain else PARTS:
        points, normals, paint, names = _part(name, SPACING / scale, device)
        there = knobs[name] if name in ("glasses", "hat") else torch.ones(n)  # 0 puts all points inside it
        modes = torch.stack([there] + [there * knobs[mode] for mode in PARTS[name][1]], 1)[:, None, None]
        for product, coefficients, matrix in (
                (products[0], (camera[..., None] * modes).flatten(2), points),
                (products[1], (lamp[..., None] * modes).flatten(2), normals),
                (products[2], torch.stack([colours[k] for k in names], 2), paint)):
            product.append((_grain(coefficients, 10).to(device), matrix))
    background = _grain(colours["background"], 10).to(device)[..., None]
    fade = torch.linspace(1.2, .6, S, device=device).repeat_interleave(S)

    points = sum(matrix.shape[1] for _, matrix in products[0])
    images = torch.empty(n, channels, size, size, dtype=torch.uint8, device=device)
    chunk = max(1, (CHUNK if images.device.type == "cpu" else 32 * CHUNK) // (points + S * S))
    for start in range(0, n, chunk):
        s = slice(start, start + chunk)
        xyz, light, paint = (torch.cat([a[s] @ matrix for a, matrix in parts], 2) for parts in products)
        key = _nearest(xyz, scale, centre, S)
        nearest = key & (INDEX - 1)
        lambert, blinn = light.gather(2, nearest.expand(-1, 2, -1)).split(1, 1)
        diffuse = lambert.mul_(.9).add_(.15).clamp_(min=0).add_(.12)
        gloss = blinn.clamp_(0, 1).square_().square_().square_().square_().mul_(.08)
        picture = paint.gather(2, nearest.expand(-1, channels, -1)).mul_(diffuse).add_(gloss)
        picture = torch.where(key > 0, picture, background[s] * fade).view(-1, channels, S, S)
        picture = sum(picture[:, :, i::samples] for i in range(samples))
        picture = sum(picture[..., i::samples] for i in range(samples)).div_(samples ** 2).clamp_(0, 1)
        images[s] = picture.sqrt_().mul_(255).add_(.5).to(torch.uint8)  # a gamma of 2
    return images


def faces(n=20000, size=64, channels=3, seed=0, plain=False, device="cpu"):
    """n rendered heads with their ground truth; all factors and attributes are independent.

    -> dict of
    images           uint8 (n, channels, size, size) on `device`; channels 3 = colour, 1 = grey (luma)
    factors          float32 (n, 4), uniform in [-1, 1]:
                       azimuth    -1 = faces 60 degrees to the left in the picture, 1 = to the right
                       elevation  -1 = looks 25 degrees up, 1 = down
                       lighting   -1 = lit from 70 degrees to the left, 1 = right, always from 25 degrees up
                       width      -1 = head 0.85 times the mean width, 1 = 1.15 times
    factor_names     ["azimuth", "elevation", "lighting", "width"]
    attributes       float32 (n, 7): smile, glasses, beard, long_hair, hat, each 0 or 1 with probability 1/2;
                       skin, uniform, 0 = dark .. 1 = light; hair, uniform, 0 = black, 0.5 = brown, 1 = blond
    attribute_names  ["smile", "glasses", "beard", "long_hair", "hat", "skin", "hair"]

    Face shape, hat and shirt colours and the background (see `heads`) also vary but have no labels.
    plain: bare heads on black that differ only in factors and shape, as in InfoGAN Fig. 3; attributes are 0,
    skin and hair 0.5.  The same seed gives bit-identical pictures, and the first ones do not depend on n.
    Raises UserError, a ValueError: n < 1, size not in 8..256, channels not 1 or 3.
    """
    if n < 1:
        raise UserError(f"expected n >= 1, found {n}")
    widths = [len(names) for names in (FACTORS, ATTRIBUTES, IDENTITY, TONES)]
    draw = torch.rand(n, sum(widths), generator=torch.Generator().manual_seed(seed))
    factors, attributes, identity, tones = draw.split(widths, 1)
    factors, identity = 2 * factors - 1, 2 * identity - 1
    attributes = torch.cat([(attributes[:, :5] < .5).float(), attributes[:, 5:]], 1)
    if plain:
        attributes = attributes.new_tensor([0, 0, 0, 0, 0, .5, .5]).repeat(n, 1)
    images = heads(factors, attributes, identity, tones, size, channels, plain, device)
    return {"images": images, "factors": factors.to(device), "factor_names": list(FACTORS),
            "attributes": attributes.to(device), "attribute_names": list(ATTRIBUTES)}


# ---- Shapes and scenes: objects, words, pictures -----------------------------------------------------------

PALETTE = {"red": [.86, .13, .14], "orange": [.95, .49, .05], "yellow": [.97, .80, .08],
           "green": [.13, .62, .24], "blue": [.12, .33, .85], "purple": [.56, .20, .70],
           "brown": [.47, .27, .12], "black": [.10, .10, .11]}
SIZES, TEXTURES = ["small", "large"], ["plain", "striped", "dotted"]
RELATIONS, BACKGROUNDS = ["alone", "above", "left of"], ["plain", "chequered", "barred", "shaded"]
STYLE = ["x", "y", "slip", "shade", "red", "green", "blue"]  # not in any caption
RADIUS = [8, 13]  # pictures are 64 units wide
SYNONYMS = {"small": ["small", "little", "tiny"], "large": ["large", "big"], "circle": ["circle", "disc"],
            "square": ["square", "box"], "cross": ["cross", "plus sign"], "diamond": ["diamond", "rhombus"],
            "crescent": ["crescent", "moon"], "plain": ["", "plain", "solid"],
            "striped": ["striped", "stripy"], "dotted": ["dotted", "spotted"], "above": ["above", "over"],
            "below": ["below", "under"], "left of": ["left of", "to the left of"],
            "right of": ["right of", "to the right of"], "chequered": ["chequered", "checked"],
            "barred": ["barred"], "shaded": ["shaded"]}
INVERSE = {"above": "below", "left of": "right of"}
BESIDE = {"above": "above it", "below": "below it", "left of": "to its left", "right of": "to its right"}
PATTERN = {"plain": "", "striped": " with stripes", "dotted": " with dots"}
OPENINGS = ["", "", "there is ", "we see ", "this picture shows ", "a picture of "]
GROUNDS = ["on a {} background", "against a {} background", "in front of a {} background"]


@dataclass(frozen=True)
class Words:
    """The vocabulary of a set's captions, and which (colour, shape) pairs are held out."""

    colours: tuple
    shapes: tuple
    held_out: tuple
    varied: bool  # more sentence patterns
    pictures: int
    per_test: int  # training pictures per test picture

    @property
    def object(self):
        """Attribute of an object -> possible values."""
        return {"size": SIZES, "colour": list(self.colours), "shape": list(self.shapes), "texture": TEXTURES}


SHAPES = Words(("red", "yellow", "green", "blue", "purple", "black"),
               ("circle", "square", "triangle", "star", "cross"),
               ("red cross", "yellow star", "green circle", "blue triangle", "purple square"),
               varied=False, pictures=10000, per_test=5)
SCENES = Words(tuple(PALETTE), (*SHAPES.shapes, "heart", "diamond", "crescent"),
               ("red star", "orange diamond", "yellow circle", "green heart", "blue triangle",
                "purple cross"),
               varied=True, pictures=100000, per_test=20)


# The signed distance of points from each outline, in radii: negative inside; y is down.

def _circle(x, y):
    return (x * x + y * y).sqrt() - .96


def _square(x, y):
    return torch.maximum(x.abs(), y.abs()) - .86


def _triangle(x, y):
    up = .32 - y
    return torch.maximum(-up, .866 * x.abs() + .5 * up) - .64


def _star(x, y):
    x, up = x.abs(), .08 - y
    for cos, sin in ((.809017, -.587785), (-.809017, -.587785)):  # fold the plane into one tenth
        beyond = 2 * (cos * x + sin * up).clamp(min=0)
        x, up = x - beyond * cos, up - beyond * sin
    return .8047 * x.abs() + .5937 * (up - 1.12)  # the edge from a tip (0, 1.12) to a notch


def _cross(x, y):
    a, b = x.abs(), y.abs()
    return torch.maximum(torch.maximum(a, b) - .98, torch.minimum(a, b) - .36)


def _heart(x, y):
    """Straight sides with two half circles on top (Inigo Quilez), at 1.6 radii per unit."""
    a, up = x.abs() / 1.6, .58 - y / 1.6
    lobe = ((a - .25) ** 2 + (up - .75) ** 2).sqrt() - .353553
    t = .5 * (a + up).clamp(min=0)
    side = torch.minimum(a * a + (up - 1) ** 2, (a - t) ** 2 + (up - t) ** 2).sqrt() * (a - up).sign()
    return 1.6 * torch.where(a + up > 1, lobe, side)


def _diamond(x, y):
    return .8137 * x.abs() + .5812 * y.abs() - .62  # half-axes .76 and 1.07


def _crescent(x, y):
    disc, bite = (x * x + y * y).sqrt() - .98, ((x - .45) ** 2 + y * y).sqrt() - .70
    return torch.maximum(disc, -bite)


OUTLINES = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "cross": _cross,
            "heart": _heart, "diamond": _diamond, "crescent": _crescent}


def _caption(words, draw, whole, varied):
    """A sentence about a picture's attributes `words`, all of them if `whole`; draw(): random numbers."""
    def pick(of):
        return of[int(draw() * len(of))]

    def noun(size, colour, shape, texture):
        size, look, shape = (pick(SYNONYMS.get(w, [w])) for w in (size, texture, shape))
        form = draw() if varied else 0
        if form > .8:
            return f"a {size} {colour} {shape}{PATTERN[texture]}"
        end = f" in {colour}" * (form > .6)
        return " ".join(w for w in ("a", size, look, "" if end else colour, shape) if w) + end

    text, relation, ground = noun(*words[:4]), *words[8:]
    if relation != "alone":
        nouns, swap = [text, noun(*words[4:8])], draw() < .5
        first, second = nouns[::-1 if swap else 1]
        if varied and draw() < .3:  # state the position of the second object
            text = f"{first} with {second} {BESIDE[relation if swap else INVERSE[relation]]}"
        else:
            text = f"{first} {pick(SYNONYMS[INVERSE[relation] if swap else relation])} {second}"
    opening, place = pick(OPENINGS), draw()
    if not whole and place < .4:
        return opening + text
    ground = pick(GROUNDS).format(pick(SYNONYMS[ground]) or "plain")
    return f"{ground} there is {text}" if place > .8 else f"{opening}{text} {ground}"


@torch.no_grad()
def paint(attributes, style, size=64, words=SHAPES):
    """The renderer of `shapes` and `scenes`: attributes (n, 10) and style (n, 7)
    -> uint8 (n, 3, size, size)."""
    def cover(d):  # coverage of a pixel whose centre is d units outside an edge
        return (.5 - d * (size / 64)).clamp(0, 1)

    centre = (torch.arange(size) + .5) * (64 / size) - 32
    rgb = torch.tensor([PALETTE[colour] for colour in words.colours])
    gy, gx = torch.meshgrid(centre, centre, indexing="ij")
    checks = ((gx + 32) // 16 + (gy + 32) // 16) % 2
    grounds = torch.stack([0 * gx, .17 * checks, .17 * ((gx + 32) // 8 % 2), (gy + 32) / 180])
    # Draw each object in its own window; no outline reaches further than 17 units from its centre.
    half = math.ceil(17 * size / 64) + 2
    window, edge = torch.arange(-half, half), F.pad(centre, (half, half))
    images = torch.empty(len(style), 3, size, size, dtype=torch.uint8)
    for start in range(0, len(style), 250):
        a, s = (t[start:start + 250] for t in (attributes, style))
        picture = F.pad(s[:, 4:, None, None] * (1 - grounds[a[:, 9]])[:, None], (half,) * 4)
        for i, side in ((0, -1), (1, 1)):
            there = torch.arange(len(a)) if i == 0 else a[:, 8].nonzero()[:, 0]
            b, v = a[there, 4 * i:4 * i + 4], s[there]
            pair, flat = (a[there, 8] > 0).float(), a[there, 8] == 2
            along, across = (torch.where(flat, v[:, j], v[:, 1 - j]) for j in (0, 1))
            along = torch.where(pair > 0, 15 * side + 3 * along, 14 * along)
            across = torch.where(pair > 0, 12 * across + 4 * side * v[:, 2], 14 * across)
            middle = torch.stack([torch.where(flat, across, along), torch.where(flat, along, across)], 1)
            row, column = (((middle + 32) * (size / 64)).long()[..., None] + half + window).unbind(1)
            y = edge[row][:, :, None] - middle[:, 0].view(-1, 1, 1)
            x = edge[column][:, None] - middle[:, 1].view(-1, 1, 1)
            y, x = y.expand(-1, -1, 2 * half), x.expand(-1, 2 * half, -1)
            r = torch.tensor(RADIUS, dtype=torch.float32)[b[:, 0]].view(-1, 1, 1)
            d, light = torch.empty_like(x), torch.zeros_like(x)
            for k in b[:, 2].unique():
                of = b[:, 2] == k
                d[of] = r[of] * OUTLINES[words.shapes[k]](x[of] / r[of], y[of] / r[of])
            of = b[:, 3] == 1
            light[of] = cover(6 * (((x[of] + y[of]) * .1179 % 1 - .5).abs() - .25))
            of = b[:, 3] == 2
            dots = ((x[of] / 6 + .5) % 1 - .5) ** 2 + ((y[of] / 6 + .5) % 1 - .5) ** 2
            light[of] = cover(6 * dots.sqrt() - 1.8)
            light = .72 * light * cover(d + 1.2)  # inside a rim of full colour
            colour = (rgb[b[:, 1]] + .09 * v[:, 3:4]).clamp(0, 1)[..., None, None]
            colour = colour + (1 - colour) * light[:, None]
            where = there.view(-1, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1), row[:, None, :, None], \
                column[:, None, None]
            under = picture[where]
            picture[where] = under + cover(d)[:, None] * (colour - under)
        picture = picture[..., half:-half, half:-half]
        images[start:start + 250] = picture.clamp(0, 1).mul(255).add(.5).to(torch.uint8)
    return images


def _scene_draw(n, seed, first, other, counts):
    """-> attributes, style, and (n, 85) random numbers in [0, 1) for the captions.

    first, other: (colour, shape) pairs allowed for one object and for the other; which one becomes object 1
    is random.
    """
    draw = torch.rand(n, 100, generator=torch.Generator().manual_seed(seed))

    def pick(column, of):
        return torch.tensor(of)[(draw[:, column] * len(of)).long()]

    relation = pick(0, range(len(RELATIONS)))
    objects = [torch.stack([pick(i, range(2)), *pick(i + 1, pairs).T, pick(i + 2, range(3))], 1)
               for i, pairs in ((2, first), (5, other))]
    swap = (draw[:, 1:2] < .5) & (relation[:, None] > 0)
    one, two = (torch.where(swap, b, a) for a, b in (objects, objects[::-1]))
    two = torch.where(relation[:, None] > 0, two, torch.tensor(counts))
    attributes = torch.cat([one, two, relation[:, None], pick(8, range(len(BACKGROUNDS)))[:, None]], 1)
    hue = 6 * ((draw[:, 13:14] + torch.tensor([0, 1 / 3, 2 / 3])) % 1)
    pale = (.8 + .2 * draw[:, 14:15]) * (1 - .28 * ((hue - 3).abs() - 1).clamp(0, 1))
    return attributes, torch.cat([2 * draw[:, 9:13] - 1, pale], 1), draw[:, 15:]


def captioned(words, n, size=64, seed=0):
    """`shapes` or `scenes` without the pictures, which `paint` renders from attributes and style."""
    if n < 5:
        raise UserError(f"expected n >= 5, found {n}")
    if not 16 <= size <= 256:
        raise UserError(f"expected size 16..256, found {size}")
    names = words.object
    pairs = [(i, j) for i in range(len(words.colours)) for j in range(len(words.shapes))]
    held = [(i, j) for i, j in pairs if f"{words.colours[i]} {words.shapes[j]}" in words.held_out]
    seen = [pair for pair in pairs if pair not in held]
    values = [*names.values(), *([*v, "none"] for v in names.values()), RELATIONS, BACKGROUNDS]
    out = {"attribute_names": [*(f"{k} {i}" for i in (1, 2) for k in names), "relation", "background"],
           "attribute_values": [list(v) for v in values], "style_names": list(STYLE),
           "held_out": list(words.held_out)}
    counts = [len(v) for v in names.values()]
    for part, m, first, other in (("", n, seen, seen), ("test_", n // words.per_test, held, pairs)):
        attributes, style, chances = _scene_draw(m, 2 * seed + bool(part), first, other, counts)
        captions = []
        for row, chance in zip(attributes.tolist(), chances.tolist()):
            told, draw = [v[k] for v, k in zip(values, row)], iter(chance).__next__
            captions.append([_caption(told, draw, i == 0, words.varied) for i in range(5)])
        out |= {f"{part}attributes": attributes, f"{part}style": style, f"{part}captions": captions}
    return out


def shapes(n=SHAPES.pictures, size=64, seed=0):
    """n pictures of one or two objects, and n / 5 test pictures with held-out combinations.

    -> dict of
    images            uint8 (n, 3, size, size), and test_images.  Each test picture has an object with a pair
                        of colour and shape from held_out; training pictures have none of these five pairs
    attributes        int64 (n, 10), indices into attribute_values, and test_attributes: content of captions
    attribute_names   size 1, colour 1, shape 1, texture 1, the same for object 2, relation, background
    attribute_values  names of the values of each attribute.  Object 1 is the upper or left one, so each
                        picture has one description; object 2 has "none" if object 1 is alone
    captions          n lists of 5 sentences, and test_captions.  The first has all attributes, others may
                        omit the background; either object may come first ("above", "below")
    style             float32 (n, 7), and test_style: what no caption mentions, independent except for the
                        last three.  x, y (place), slip (offset between the objects), shade, in [-1, 1]; red,
                        green, blue of the background, a pale colour of any hue, in [0, 1]
    style_names, held_out

    Values are equally likely, apart from held-out pairs.  The same seed gives bit-identical pictures, and the
    first ones do not depend on n.  Raises UserError, a ValueError: n < 5, size not in 16..256.
    """
    return _painted(SHAPES, n, size, seed)


def scenes(n=SCENES.pictures, size=64, seed=0):
    """Like `shapes`, but with 8 colours, 8 shapes, six of the 64 pairs held out, more sentence patterns and
    n / 20 test pictures."""
    return _painted(SCENES, n, size, seed)


def _painted(words, n, size, seed):
    told = captioned(words, n, size, seed)
    return told | {f"{part}images": paint(told[f"{part}attributes"], told[f"{part}style"], size, words)
                   for part in ("", "test_")}

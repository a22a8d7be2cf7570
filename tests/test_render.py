import math
import re
import zlib
from dataclasses import replace

import pytest
import torch

from common import data as data_sets
from common import render
from common.render import ATTRIBUTES, faces, heads, scenes, shapes


@pytest.fixture(scope="module")
def data():
    return faces(24, size=32)


def sweep(column, values, **options):
    """Heads that differ in one factor alone, as float (n, size, size), grey."""
    factors = torch.zeros(len(values), 4)
    factors[:, column] = torch.tensor(values)
    return heads(factors, channels=1, **options)[:, 0].float()


def with_attribute(name, value, azimuth=0.0):
    attributes = torch.tensor([[0, 0, 0, 0, 0, .6, .3]])
    attributes[0, ATTRIBUTES.index(name)] = value
    return heads(torch.tensor([[azimuth, 0, 0, 0]]), attributes, size=64)[0].float()


@pytest.mark.parametrize("size, channels, plain", [(32, 1, True), (48, 3, False), (8, 3, False)])
def test_faces_are_what_the_docstring_says(size, channels, plain):
    d = faces(6, size, channels, plain=plain)
    assert d["images"].shape == (6, channels, size, size) and d["images"].dtype == torch.uint8
    assert d["factors"].shape == (6, 4) and d["factors"].dtype == torch.float32
    assert d["attributes"].shape == (6, 7) and d["attributes"].dtype == torch.float32
    assert d["factor_names"] == ["azimuth", "elevation", "lighting", "width"]
    assert d["attribute_names"] == ["smile", "glasses", "beard", "long_hair", "hat", "skin", "hair"]
    if plain:
        assert torch.equal(d["attributes"], torch.tensor([0, 0, 0, 0, 0, .5, .5]).repeat(6, 1))
    x = d["images"].float()
    assert x.flatten(1).std(1).min() > 20                                       # a head on its background,
    assert (x[0] - x[1:]).abs().flatten(1).mean(1).min() > 5                    # and no two alike
    if channels == 3:
        assert (x[:, 0] - x[:, 2]).abs().mean() > 10


def test_grey_is_the_luma_of_colour():
    # In linear light, of which a picture is the square root; two glossy or clipped samples may differ more.
    colour, grey = (faces(8, 32, c)["images"].float().div(255).square() for c in (3, 1))
    luma = (colour * torch.tensor([.299, .587, .114])[:, None, None]).sum(1, keepdim=True)
    assert (luma - grey).abs().mean() < .003


def test_same_bits_for_a_seed_whatever_n_chunk_or_threads(data, monkeypatch):
    assert torch.equal(faces(24, size=32)["images"], data["images"])
    assert not torch.equal(faces(24, size=32, seed=1)["images"], data["images"])
    first = faces(5, size=32)
    assert all(torch.equal(first[k], data[k][:5]) for k in ("images", "factors", "attributes"))
    for chunk in (1, 3 * 10 ** 5):  # one picture at a time, and more at a time than before
        monkeypatch.setattr(render, "CHUNK", chunk)
        assert torch.equal(faces(24, size=32)["images"], data["images"])
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if threads != 3 else 2)
    try:
        assert torch.equal(faces(24, size=32)["images"], data["images"])
    finally:
        torch.set_num_threads(threads)


def test_sums_behind_the_pictures_are_exact():
    # What makes the last test more than luck: the float32 products equal those in float64 and in any order.
    factors = torch.rand(16, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    points, normals = render._part("head", .05, "cpu")[:2]
    camera, lamp = render._pose(factors.double())
    k = torch.rand(16, 1, 1, 9, generator=torch.Generator().manual_seed(3)) * 2 - 1
    for matrix, a in ((points, camera), (normals, lamp)):
        a = render._grain((a[..., None] * k).flatten(2), 10)
        assert torch.equal((a @ matrix).double(), a.double() @ matrix.double())
        assert torch.equal(a @ matrix, a.flip(2) @ matrix.flip(0))


def test_labels_are_uniform_and_independent(monkeypatch):
    monkeypatch.setattr(render, "heads", lambda factors, *_: torch.zeros(len(factors)))  # no pictures
    d = faces(20000)
    f, a = d["factors"], d["attributes"]
    assert f.min() >= -1 and f.max() <= 1
    even = torch.linspace(0, 1, 20000)
    uniform = torch.cat([(f + 1) / 2, a[:, 5:]], 1)
    assert uniform.sort(0).values.sub(even[:, None]).abs().max() < .015  # Kolmogorov-Smirnov, 1e-3: .0138
    assert set(a[:, :5].unique().tolist()) == {0., 1.} and (a[:, :5].mean(0) - .5).abs().max() < .015
    correlation = torch.corrcoef(torch.cat([f, a], 1).T) - torch.eye(11)
    assert correlation.abs().max() < .03                                         # 4 standard errors


def test_mirror():
    # Azimuth and lighting change sign in a mirror, nothing else does.
    g = torch.Generator().manual_seed(0)
    factors, identity = torch.rand(8, 4, generator=g) * 2 - 1, torch.rand(8, 6, generator=g) * 2 - 1
    attributes = (torch.rand(8, 7, generator=g) < .5).float()
    x = heads(factors, attributes, identity).float()
    y = heads(factors * torch.tensor([-1, 1, -1, 1]), attributes, identity).float().flip(3)
    unrelated = (x - heads(factors * torch.tensor([-1, 1, -1, 1]), attributes, identity).float()).abs().mean()
    assert (x - y).abs().mean() < 3 < .2 * unrelated


def test_azimuth_and_elevation_move_the_lips():
    factors = torch.zeros(10, 4)
    factors[:5, 0] = factors[5:, 1] = torch.linspace(-.8, .8, 5)
    red, green, _ = heads(factors, plain=True).float().unbind(1)
    lips = (red > 1.4 * green).float() * (red > 60)
    assert (lips.sum((1, 2)) > 25).all()
    x, y = ((lips.sum(dim) * torch.arange(64)).sum(1) / lips.sum((1, 2)) for dim in (1, 2))
    assert (x[:5].diff() > 3).all() and (y[5:].diff() > 1).all()
    assert (x[5:] - 31.5).abs().max() < 1 and y[:5].max() - y[:5].min() < 2


def test_lighting_comes_from_its_side():
    x = sweep(2, [-1., -.5, 0, .5, 1.], size=32, plain=True)
    balance = x[:, :, 16:].mean((1, 2)) - x[:, :, :16].mean((1, 2))
    assert (balance.diff() > 5).all() and abs(balance[2]) < 2
    assert balance[0] < -20 and balance[4] > 20


def test_width_is_that_of_the_silhouette():
    x = sweep(3, [-1., -.5, 0, .5, 1.], plain=True)
    across = (x[:, 32] > 60).sum(1).float()  # at the height of the ears, on black
    assert (across.diff() > 1).all()
    assert across[0] / across[2] == pytest.approx(.85, abs=.04)
    assert across[4] / across[2] == pytest.approx(1.15, abs=.04)


@pytest.mark.parametrize("name, rows, columns", [
    ("smile", slice(40, 56), slice(22, 42)), ("glasses", slice(26, 40), slice(12, 52)),
    ("beard", slice(40, 62), slice(20, 44)), ("long_hair", slice(16, 64), slice(8, 56)),
    ("hat", slice(0, 28), slice(6, 58)), ("skin", slice(18, 64), slice(10, 54)),
    ("hair", slice(4, 30), slice(12, 52))])
def test_an_attribute_changes_its_region_and_little_else(name, rows, columns):
    change = (with_attribute(name, 1) - with_attribute(name, 0)).abs().amax(0)
    inside = torch.zeros_like(change, dtype=torch.bool)
    inside[rows, columns] = True
    assert (change[inside] > 30).float().mean() > .1
    assert (change[~inside] > 30).float().mean() < .03


def test_what_the_attributes_look_like():
    on, off = ({k: with_attribute(k, v) for k in ATTRIBUTES} for v in (1, 0))
    mouth, eyes = (slice(44, 52), slice(26, 38)), (slice(28, 38), slice(14, 50))
    assert (on["smile"][:, mouth[0], mouth[1]].amin(0) > 200).sum() > 10        # teeth
    assert (off["smile"][:, mouth[0], mouth[1]].amin(0) > 200).sum() == 0
    dark = [(x["glasses"][:, eyes[0], eyes[1]].amax(0) < 70).float().mean() for x in (on, off)]
    assert dark[0] > 2 * dark[1]                                                # frames
    assert on["beard"][:, 56, 32].mean() < .6 * off["beard"][:, 56, 32].mean()
    assert on["skin"][:, 24, 32].min() > off["skin"][:, 24, 32].max() + 50      # the forehead
    assert on["hair"][:, 12, 32].mean() > off["hair"][:, 12, 32].mean() + 80    # blond and black


def test_plain_heads_have_no_hair_and_vary_in_shape():
    factors = torch.zeros(2, 4)
    x = heads(factors, identity=torch.tensor([[-1.] * 6, [1.] * 6]), plain=True).float()
    assert x[:, :, 8:16, 32].min() > 120                                        # a bare crown
    assert x[:, :, 0, 0].max() < 60
    assert (x[0] - x[1]).abs().mean() > 3


def test_surfaces_have_no_cracks():
    # No blond hair and no light skin shows through a blue hat, however it is turned.
    attributes = torch.tensor([[0, 0, 0, 0, 1, 1, 1.]]).repeat(3, 1)
    factors = torch.tensor([[-.7, .2, 0, 1], [0, .5, 0, 1], [.9, 0, 0, 1.]])
    x = heads(factors, attributes, tones=torch.full((3, 3), 1 / 3))[:, :, 8:18, 22:42]
    red, green, blue = x.int().unbind(1)
    assert (blue > red + 20).all() and (blue > green + 20).all()


@pytest.mark.parametrize("arguments, words", [
    ({"n": 0}, "n >= 1, found 0"), ({"n": 2, "size": 7}, "size 8..256, found 7"),
    ({"n": 2, "size": 257}, "size 8..256, found 257"),
    ({"n": 2, "channels": 2}, r"1 \(grey\) or 3 \(colour\), found 2")])
def test_errors_say_what_was_expected_and_found(arguments, words):
    with pytest.raises(ValueError, match=words):
        faces(**arguments)


# ---- Shapes ------------------------------------------------------------------------------------------------

MAKE, WORDS = {"shapes": shapes, "scenes": scenes}, {"shapes": render.SHAPES, "scenes": render.SCENES}


@pytest.fixture(scope="module", params=["shapes", "scenes"])
def captioned(request):
    """A set's words and some of its pictures."""
    return WORDS[request.param], MAKE[request.param](400, size=32)


def attributes_of(sentence, words):
    """The row of attributes that a caption tells, and the background if it tells it."""
    canonical = {s: k for k, synonyms in render.SYNONYMS.items() for s in synonyms if s}
    canonical |= {"above it": "above", "below it": "below", "to its left": "left of",
                  "to its right": "right of", "with stripes": "striped", "with dots": "dotted"}
    for synonym, name in sorted(canonical.items(), key=lambda pair: -len(pair[0])):
        sentence = re.sub(rf"\b{synonym}\b", name.replace(" ", "_"), sentence)
    ground = re.search(r"(\w+) background", sentence)
    sentence = re.sub(r"(on|against|in front of) a \w+ background", "", sentence)
    nouns = [m.start() for m in re.finditer(r"\b(small|large)\b", sentence)]
    objects = []
    for noun in (sentence[i:j] for i, j in zip(nouns, [*nouns[1:], None])):
        found = [[w for w in re.findall(r"\w+", noun) if w in values] for values in words.object.values()]
        found[3] = found[3][:1] or ["plain"]
        assert [len(f) for f in found] == [1] * 4, sentence
        objects.append([f[0] for f in found])
    inverse = {v.replace(" ", "_"): k for k, v in render.INVERSE.items()}
    direct = {k.replace(" ", "_"): k for k in render.INVERSE}
    told = [w for w in re.findall(r"\w+", sentence) if w in {*inverse, *direct}]
    relation = "alone"
    if told:
        word, = told
        relation = direct.get(word) or inverse[word]
        # "a above b", but "a with b above it"
        if (word in inverse) != (" with a " in sentence):
            objects = objects[::-1]
    objects += [["none"] * 4] * (2 - len(objects))
    return [*objects[0], *objects[1], relation], ground and ground[1]


def test_shapes_are_what_the_docstring_says(captioned):
    words, d = captioned
    colours, kinds = len(words.colours), len(words.shapes)
    tests = 400 // words.per_test
    assert (colours, kinds, tests) in ((6, 5, 80), (8, 8, 20))
    for part, n in (("", 400), ("test_", tests)):
        assert d[f"{part}images"].shape == (n, 3, 32, 32) and d[f"{part}images"].dtype == torch.uint8
        assert d[f"{part}attributes"].shape == (n, 10) and d[f"{part}attributes"].dtype == torch.int64
        assert d[f"{part}style"].shape == (n, 7) and d[f"{part}style"].dtype == torch.float32
        assert [len(five) for five in d[f"{part}captions"]] == [5] * n
    a, style = d["attributes"], d["style"]
    counts = [2, colours, kinds, 3, 3, colours + 1, kinds + 1, 4, 3, 4]
    assert [len(v) for v in d["attribute_values"]] == counts
    assert (a.amax(0) + 1).tolist() == counts and a.min() == 0
    assert len(d["attribute_names"]) == 10 and len(d["style_names"]) == 7
    alone = a[:, 8] == 0
    none = torch.tensor([2, colours, kinds, 3])
    assert torch.equal(a[:, 4:8] == none, alone[:, None].expand(-1, 4))
    assert style[:, :4].abs().max() <= 1 and style[:, 4:].min() >= 0 and style[:, 4:].max() <= 1


def test_captions_tell_the_attributes(captioned):
    words, d = captioned
    said, grounds = [], 0
    for part in ("", "test_"):
        for row, five in zip(d[f"{part}attributes"].tolist(), d[f"{part}captions"]):
            names = [values[k] for values, k in zip(d["attribute_values"], row)]
            for i, caption in enumerate(five):
                found, ground = attributes_of(caption, words)
                assert found == names[:9], caption
                assert ground in ((names[9],) if i == 0 else (names[9], None)), caption
                grounds += ground is not None
                said.append(caption)
    assert .6 < grounds / len(said) < .85 and len(set(said)) > .75 * len(said)
    forms = [sum(form in caption for caption in said) / len(said) for form in (" with a ", " with dots")]
    assert all(share > .05 for share in forms) if words.varied else forms == [0, 0]


def test_held_out_pairs_are_in_every_test_picture_and_in_no_other(captioned):
    words, d = captioned

    def pairs(part):
        values = d["attribute_values"]
        return [{f"{values[1][row[i + 1]]} {values[2][row[i + 2]]}" for i in (0, 4) if row[i] < 2}
                for row in d[f"{part}attributes"].tolist()]

    held = set(d["held_out"])
    assert not any(held & p for p in pairs("")) and all(held & p for p in pairs("test_"))
    assert [len({pair.split()[i] for pair in held}) for i in (0, 1)] == [len(held)] * 2
    assert len(held) == {30: 5, 64: 6}[len(words.colours) * len(words.shapes)]
    assert len(set.union(*pairs(""))) == len(words.colours) * len(words.shapes) - len(held)
    assert len(set.union(*pairs("test_"))) > 15


def test_shapes_are_those_of_old_runs():
    d = shapes(100)
    told = zlib.crc32(repr(d["captions"] + d["test_captions"]).encode())
    for key in ("attributes", "style"):
        told = zlib.crc32(d[key].numpy(), told)
    assert told == 1081708011
    weight = torch.arange(100 * 3 * 64 * 64).view(100, 3, 64, 64) % 8191 / 8191
    assert (d["images"] * weight).double().mean().item() == pytest.approx(86.94001769149948, rel=1e-6)


def test_shapes_are_the_same_for_a_seed_and_do_not_depend_on_n(captioned):
    words, d = captioned
    make = scenes if words.varied else shapes
    few = make(40, size=32)
    for part, n in (("", 40), ("test_", 40 // words.per_test)):
        assert few[f"{part}captions"] == d[f"{part}captions"][:n]
        for key in ("images", "attributes", "style"):
            assert torch.equal(few[part + key], d[part + key][:n])
    assert not torch.equal(make(40, size=32, seed=1)["images"], few["images"])


def scene(relation, one, two=(2, 6, 5, 3), ground=0, style=(0, 0, 0, 0, .9, .9, .9), size=64,
          words=render.SHAPES):
    a = torch.tensor([[*one, *two, relation, ground]])
    return render.paint(a, torch.tensor([style], dtype=torch.float32), size, words)[0].float()


def ink(x, level=60):
    """Where a picture on a plain light background (.9) is something else."""
    return (x - 230).abs().amax(0) > level


def middle(mask):
    rows, columns = mask.nonzero().float().mean(0)
    return rows.item() - 31.5, columns.item() - 31.5


def test_outlines_have_their_areas_and_reach():
    r = 13
    areas = [math.pi * (.96 * r) ** 2, (1.72 * r) ** 2, 3 * math.sqrt(3) * (.64 * r) ** 2, None,
             (2 * 1.96 * .72 - .72 ** 2) * r ** 2]
    for kind, area in enumerate(areas):
        grey = (230 - scene(0, (1, 5, kind, 0))[0]) / (230 - 26)
        if area:
            assert grey.sum() == pytest.approx(area, rel=.02)
        assert ink(scene(0, (0, 5, kind, 0))).sum() < .5 * ink(scene(0, (1, 5, kind, 0))).sum()
        assert not ink(scene(0, (1, 5, kind, 0)))[:16].any()
    star = ink(scene(0, (1, 5, 3, 0)))
    assert (star ^ star.flip(1)).sum() <= 6 and star[:20].any()                 # upright, a tip at the top
    assert star.sum() < areas[0]


def test_hearts_diamonds_and_crescents():
    r, black = 13, 7
    d, R, bite = .45, .98, .70                                                  # two circles of a crescent
    x = (d ** 2 + R ** 2 - bite ** 2) / (2 * d)
    lens = R ** 2 * math.acos(x / R) + bite ** 2 * math.acos((d - x) / bite) - d * (R ** 2 - x ** 2) ** .5
    areas = [1.6 ** 2 * (.5 + math.pi / 8), 2 * .62 / .8137 * .62 / .5812, math.pi * R ** 2 - lens]
    for kind, area in zip((5, 6, 7), areas):
        x = scene(0, (1, black, kind, 0), words=render.SCENES)
        assert ((230 - x[0]) / (230 - 26)).sum() == pytest.approx(area * r ** 2, rel=.02)
        left, top = (ink(x) ^ ink(x).flip(1)).sum(), ink(x)[:32].sum() / ink(x).sum()
        assert left > 40 if kind == 7 else left <= 2                            # open to the right
        assert (.55 if kind == 5 else .45) < top < (.75 if kind == 5 else .55)  # a heart is wide at the top


def test_edges_are_smooth_at_every_size():
    small, large = (scene(0, (1, 5, 0, 0), size=s) for s in (32, 128))
    shrunk = torch.nn.functional.avg_pool2d(large[None], 4)[0]
    assert (small - shrunk).abs().max() < 25 and (small - shrunk).abs().mean() < 1


def test_relations_and_style_place_objects():
    red, blue = (1, 0, 1, 0), (0, 3, 1, 0)
    for relation, axis in ((1, 0), (2, 1)):
        x = scene(relation, red, blue)
        reds, blues = middle((x[0] > 180) & (x[1] < 80)), middle((x[2] > 180) & (x[0] < 80))
        assert blues[axis] - reds[axis] == pytest.approx(30, abs=1) and abs(blues[1 - axis]) < 1
    y, x = middle(ink(scene(0, red, style=(.5, -1, 0, 0, .9, .9, .9))))
    assert (y, x) == (pytest.approx(-14, abs=.6), pytest.approx(7, abs=.6))


def test_texture_shade_and_background():
    plain, striped, dotted = (scene(0, (1, 0, 1, k)) for k in range(3))
    inner = (slice(23, 41), slice(23, 41))
    assert plain[1][inner].std() < 1 and striped[1][inner].std() > 40 and dotted[1][inner].std() > 40
    assert (striped - dotted).abs().mean() > 3
    dark, light = (scene(0, (1, 0, 1, 0), style=(0, 0, 0, s, .9, .9, .9))[:, 32, 32].mean() for s in (-1, 1))
    assert light > dark + 20
    grounds = [scene(0, (0, 0, 0, 0), ground=k)[0] for k in range(4)]
    assert grounds[0][:16].std() == 0 and grounds[1][0, 0] != grounds[1][0, 20]
    assert grounds[2][0, 4] != grounds[2][0, 12] and (grounds[2][0] == grounds[2][-1]).all()
    assert (grounds[3][:, 0].diff() <= 0).all() and grounds[3][0, 0] > grounds[3][-1, 0] + 40


@pytest.mark.parametrize("arguments, words", [
    ({"n": 4}, "n >= 5, found 4"), ({"n": 9, "size": 15}, "size 16..256, found 15"),
    ({"n": 9, "size": 257}, "size 16..256, found 257")])
def test_bad_shapes(arguments, words):
    with pytest.raises(ValueError, match=words):
        shapes(**arguments)


def test_scenes_are_rendered_once_and_go_on_where_they_were_interrupted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(render, "SCENES", replace(render.SCENES, pictures=2000))
    painted, paint = [], render.paint

    def interrupted(attributes, style, *rest):
        if len(painted) == 1:
            painted.append(0)
            raise KeyboardInterrupt
        painted.append(len(style))
        return paint(attributes, style, *rest)

    monkeypatch.setattr(render, "paint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data_sets.load("scenes", tmp_path, 16)
    d, again = data_sets.load("scenes", tmp_path, 16), data_sets.load("scenes", tmp_path, 16)
    assert painted == [1024, 0, 1024, 52]                                       # no block twice
    assert "rendering scenes: 2,100 of 2,100" in capsys.readouterr().err
    whole = scenes(2000, 16)
    assert torch.equal(d.images, whole["images"]) and torch.equal(again.test_images, whole["test_images"])
    assert set(d.extra) == set(whole) - {"images", "test_images"}
    assert d.extra["test_captions"] == whole["test_captions"] and d.extra["held_out"] == whole["held_out"]
    assert torch.equal(d.extra["style"], whole["style"])

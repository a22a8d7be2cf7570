"""aae.py: samplers and equations against closed forms, label draws and cluster labels, who moves in each
phase, figures and numbers."""

import contextlib
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image

import aae
from aae import PAPER, TASKS, V, kl, log_mixture, log_normal, mixture, networks, reconstruction, swiss_roll
from common import UserError
from common.fuse import descend

MEAN, STD = torch.zeros(1, 28, 28), torch.ones(1, 28, 28)


def args(*words, **changes):
    a = aae.parse_args(["--device", "cpu", *words])
    a.amp = a.compile = a.graph = False
    return Namespace(**{**vars(a), **changes})


def nets(*words, m=0, mean=MEAN, std=STD, **changes):
    """Q, P and the discriminators of the settings args(*words, **changes)."""
    return networks(args(*words, **changes), m, mean, std)


# ---------------------------------------------------------------------------------------------- equations


def test_V_is_minus_log_4_at_one_half():
    assert V(torch.zeros(5, 1), torch.zeros(5, 1)).item() == pytest.approx(-math.log(4))


def test_V_against_numpy():
    a, b = np.random.default_rng(0).normal(size=(2, 50)) * 3
    expected = np.log(1 / (1 + np.exp(-a))).mean() + np.log(1 - 1 / (1 + np.exp(-b))).mean()
    assert V(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(expected, abs=1e-5)


def test_reconstruction_is_half_the_squared_error_of_a_picture_not_of_a_pixel():
    black, white = torch.zeros(7, 1, 28, 28), torch.ones(7, 1, 28, 28)
    assert reconstruction(black, white).item() == 392
    assert reconstruction(black, white, 2 * STD).item() == 98


def test_kl_of_the_gaussian_encoder_against_its_closed_form():
    assert log_normal(torch.zeros(3, 4)).tolist() == pytest.approx([-0.9189 * 4] * 3, abs=1e-3)
    torch.manual_seed(0)
    Q, _, _ = nets("--encoder", "gaussian", "--width", ".008", z_dim=1)
    Q.z.weight.data.zero_(), Q.z.bias.data.copy_(torch.tensor([0.7, math.log(0.5)]))
    z, _, log_q = Q(torch.zeros(1, 1, 28, 28).expand(50000, -1, -1, -1))
    assert z.mean().item() == pytest.approx(0.7, abs=0.01) and z.std().item() == pytest.approx(0.5, abs=0.01)
    assert kl(log_q, log_normal(z)).item() == pytest.approx(0.5 * (0.25 + 0.49 - 1) - math.log(0.5), abs=0.02)
    assert kl(log_q, log_q) == 0


def test_disagreement_is_2_between_sure_and_different_answers_and_moves_only_its_first():
    a, b = torch.tensor([[50.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 50.0]], requires_grad=True)
    differ = lambda a, b, weight=1.0: aae.disagreement(lambda x: (None, b), None, a,
                                                       Namespace(consistency=weight))
    assert differ(a, b).item() == pytest.approx(2) and differ(a, a).item() == 0 == differ(a, b, 0)
    assert differ(a, b, 3.0).item() == pytest.approx(6)
    assert torch.autograd.grad(differ(a, b), b, allow_unused=True) == (None,)


def test_weights_start_as_published_for_SGD():
    for optimizer in ("sgd", "adam"):
        w = nets("--optimizer", optimizer)[0].trunk[2].weight
        assert (abs(w.std().item() - 0.01) < 1e-3) is (optimizer == "sgd")


def test_repulsion_only_between_heads_nearer_than_eta():
    W_C = torch.tensor([[0.0, 0.0], [3.0, 4.0], [50.0, 0.0]])
    assert aae.repulsion(W_C, 6.0).item() == pytest.approx(1.0)
    for m, k in ((2, 2), (10, 2), (20, 2), (4, 4), (10, 10)):
        W_C = aae.heads(m, k)
        assert W_C.norm(dim=1).sub(10).abs().max() < 1e-5
        assert aae.repulsion(W_C, aae.spacing(m)).item() == pytest.approx(0, abs=1e-3)


def test_heads_keep_codes_of_unit_noise_apart_and_are_10_I_in_ten_dimensions():
    torch.manual_seed(0)
    W_C, c = aae.heads(10, 2), torch.arange(20000) % 10
    lost = torch.cdist(W_C[c] + torch.randn(20000, 2), W_C).argmin(1) != c
    assert lost.float().mean() < 0.005
    assert torch.equal(aae.heads(10, 10), 10 * torch.eye(10))
    assert aae.heads(20, 10).norm(dim=1).sub(10).abs().max() < 1e-5


def test_sliced_wasserstein_of_a_shifted_sample():
    torch.manual_seed(0)
    a = torch.randn(2000, 2)
    assert aae.sliced_wasserstein(a, a[torch.randperm(2000)]) == pytest.approx(0, abs=1e-6)
    found = aae.sliced_wasserstein(a, a + torch.tensor([3.0, 4.0]), directions=4000)
    assert found == pytest.approx(2 * 5 / math.pi, rel=0.03)


# ------------------------------------------------------------------------------------------------- priors


def test_each_component_of_the_mixture_lies_along_its_ray():
    torch.manual_seed(0)
    for c in (0, 3, 9):
        z = mixture(torch.full((20000,), c))
        t = 2 * math.pi * c / 10
        z = z @ torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]])
        assert z.mean(0).tolist() == pytest.approx([1.4, 0], abs=0.02)
        assert z.std(0).tolist() == pytest.approx([0.5, 0.1], abs=0.01)
    assert mixture(torch.zeros(1), torch.zeros(1), torch.zeros(1)).tolist()[0] == pytest.approx([1.4, 0])


def test_log_mixture_is_a_density_and_the_mean_of_ten():
    g = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(g, g, indexing="ij"), 2).flatten(0, 1)
    assert log_mixture(z.float()).double().exp().sum().item() * 0.01**2 == pytest.approx(1, abs=1e-3)
    z, total = np.array([0.9, -0.4]), 0
    for c in range(10):
        t = 2 * np.pi * c / 10
        along, across = z @ [np.cos(t), np.sin(t)], z @ [-np.sin(t), np.cos(t)]
        total += 0.1 * np.exp(-0.5 * (((along - 1.4) / 0.5) ** 2 + (across / 0.1) ** 2)) / (2 * np.pi * 0.05)
    assert log_mixture(torch.tensor(z[None]).float()).item() == pytest.approx(math.log(total), abs=1e-4)


def test_the_swiss_roll_runs_from_the_centre_outwards_label_by_label():
    assert swiss_roll(torch.tensor([0.0]), torch.tensor([0.0])).norm() == 0
    assert swiss_roll(torch.tensor([9.0]), torch.tensor([1.0])).tolist()[0] == pytest.approx([3, 0], abs=1e-4)
    torch.manual_seed(0)
    c = torch.arange(10).repeat_interleave(500)
    s = (swiss_roll(c).norm(dim=1) / 3) ** 2 * 10
    assert (s >= c - 1e-4).all() and (s <= c + 1 + 1e-4).all()


def test_without_a_label_z_comes_from_all_of_the_prior():
    torch.manual_seed(0)
    for prior in ("mixture", "swiss-roll"):
        c = torch.cat([torch.full((3000,), 10), torch.full((3000,), 4)])
        z = aae.sample_z(c, args("--prior", prior))
        centre = mixture(torch.arange(10), torch.zeros(10), torch.zeros(10)) if prior == "mixture" else \
            swiss_roll(torch.arange(10), torch.full((10,), 0.5))
        near = torch.cdist(z, centre).argmin(1)
        assert torch.bincount(near[:3000], minlength=10).min() > 100
        assert (near[3000:] == 4).float().mean() > 0.6
    z = aae.sample_z(torch.full((5000,), 10), args("--task", "likelihood"))
    assert z.shape == (5000, 8) and abs(z.std().item() - 5) < 0.1


def test_y_is_one_hot_and_balanced():
    torch.manual_seed(0)
    y = aae.sample_y(10000, 16)
    assert y.shape == (10000, 16) and y.sum(1).eq(1).all() and y.max() == 1
    assert y.sum(0).sub(625).abs().max() < 120
    assert aae.sample_y(5, 0) is None


# ------------------------------------------------------------------------------------- labels and clusters


def test_label_draws_are_balanced_repeatable_and_differ_between_seeds():
    labels = torch.randint(10, (3000,), generator=torch.Generator().manual_seed(0))
    a, b, c = (aae.draw_labels(labels, 100, seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and len(a.unique()) == 100
    assert torch.bincount(labels[a]).tolist() == [10] * 10
    labels[::2] = -1                                   # pictures without a label are never drawn
    assert labels[aae.draw_labels(labels, 100, 0)].min() >= 0
    for n in (105, 100000):
        with pytest.raises(UserError, match=f"--labels {n}"):
            aae.draw_labels(labels, n, 0)
    with pytest.raises(UserError, match="--labels 10"):
        aae.draw_labels(torch.full((5,), -1), 10, 0)


def test_by_default_the_prior_takes_as_many_labels_as_fit():
    labels = torch.cat([torch.arange(2900) % 7, torch.full((7,), -1)])
    chosen, c = aae.known(args(), labels)
    assert torch.bincount(labels[chosen]).tolist() == [83] * 7 and (c < 10).sum() == 7 * 83
    assert len(aae.known(args(), torch.tensor([0] * 90 + [1] * 4))[0]) == 2 * 4
    assert len(aae.known(args(), torch.arange(50000) % 10)[0]) == 10000
    assert len(aae.known(args("--labels", "2800"), labels)[0]) == 2800
    assert len(aae.known(args(), torch.full((100,), -1))[0]) == 0
    with pytest.raises(UserError, match="--labels 580 found: a multiple of 7"):
        aae.known(args("--labels", "580"), labels)


def test_a_cluster_takes_the_label_of_its_surest_validation_picture_not_of_the_majority():
    y = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1], [0.2, 0.8], [0.99, 0.01]])
    labels = torch.tensor([5, 5, 7, 3, -1])
    assert aae.head_labels(y.log(), labels).tolist() == [7, 3]
    a = torch.cat([y.log(), torch.full((5, 1), -9.0)], 1)               # a third cluster, empty
    assert aae.majority_labels(a, labels).tolist() == [5, 3, 0]


def test_clusters_are_ranked_where_a_float32_softmax_is_1():
    a = torch.tensor([[30.0, 0.0, 0.0], [31.0, 0.0, 0.0], [40.0, 25.0, 0.0], [0.0, 1.0, 60.0],
                      [0.0, 90.0, 0.0]])
    assert (a.softmax(1)[[0, 1], 0] == 1).all()
    assert aae.head_labels(a, torch.arange(5)).tolist() == [1, 4, 3]
    q = a.double().softmax(1).numpy()
    assert np.log1p(-q[:2, 0]).argmin() == 1                        # as log(1 - q) in float64 ranks them


def test_clusters_are_named_by_pictures_as_they_are(monkeypatch):
    monkeypatch.setattr(aae.data, "warp", lambda *a, **k: pytest.fail("a warped picture named a cluster"))
    Q, _, _ = nets("--task", "cluster", "--width", ".01", m=16)
    images = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8)
    assert aae.head_labels(aae.encode(Q, images)[1], torch.arange(40) % 10).shape == (16,)


def test_error_counts_categories_or_their_labels():
    class Fixed(torch.nn.Module):
        mean = MEAN

        def forward(self, x):
            return x.flatten(1)[:, :2], torch.eye(3)[x[:, 0, 0, 0].mul(255).round().long()], None

    images = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([0, 1, 2, 2])
    sets = {"test": (images, torch.tensor([0, 1, 2, 1]))}
    assert aae.error(Fixed(), sets) == 25
    assert aae.error(Fixed(), sets, torch.tensor([0, 1, 1])) == 25
    assert aae.error(Fixed(), sets, torch.tensor([1, 0, 0])) == 100
    assert aae.error(Fixed(), {"test": (images, torch.tensor([0, 1, -1, -1]))}) == 0    # -1: no label


# ----------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("task", TASKS)
def test_networks_have_the_papers_sizes(task):
    a = args("--paper", "--task", task, bn=False)
    m = {"prior": 0, "likelihood": 0, "cluster": a.clusters}.get(task, 10)
    Q, P, D = networks(a, m, MEAN, STD)
    count = lambda module: sum(p.numel() for p in module.parameters())
    w, k, inferred = a.hidden, a.z_dim, m if task != "style" else 0
    into = lambda i, o: i * w + w + w * w + w + w * o + o
    assert w == (3000 if task == "cluster" else 1000)
    assert count(Q) == into(784, k + inferred)
    assert count(P) == (into(k, 784) + m * k if task == "reduce" else into(k + m, 784))
    assert [count(d) for d in D] == \
        [into(i, 1) for i in ([k, inferred] if inferred else [k + 11 * (task == "prior")])]
    z, a, log_q = Q(torch.rand(3, 1, 28, 28))
    assert z.shape == (3, k) and log_q is None
    assert a is None if not inferred else a.shape == (3, m)
    x = P(z, torch.eye(m)[:3] if m else None)
    assert x.shape == (3, 1, 28, 28) and 0 <= x.min() and x.max() <= 1


def test_logits_of_clusters_are_spread_evenly_over_a_minibatch():
    Q, _, _ = nets("--task", "cluster", "--width", ".01", m=16)
    a = Q(torch.rand(200, 1, 28, 28))[1]
    torch.testing.assert_close(a.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(a.std(0, correction=0), torch.full((16,), 3.0), atol=0.05, rtol=0)
    free = nets("--task", "semi", "--width", ".03", m=10)[0]
    assert free(torch.rand(200, 1, 28, 28))[1].std(0).max() < 2


def test_svhn_has_its_own_settings():
    words = "--task", "semi", "--dataset", "svhn", "--labels", "1000"
    a = args("--paper", *words)
    assert a.rates == (1e-4, 0.01, 0.1) and PAPER["semi"]["rates"] == (0.01, 0.1, 0.1)
    assert (a.z_dim, a.dropout, a.bn, a.standard, a.size, a.channels) == (20, 0.2, True, True, 32, 3)
    mean, std = torch.rand(3, 32, 32), torch.full((3, 32, 32), 0.2)
    Q, P, _ = nets(*words, "--width", ".03", m=10, mean=mean, std=std)
    bn = [m for part in (Q, P) for m in part.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert len(bn) == 7 and {m.eps for m in bn} == {1e-5}
    z, a, _ = Q(torch.rand(60, 3, 32, 32))
    assert z.shape == (60, 20) and a.shape == (60, 10) and P(z, a.softmax(1)).shape == (60, 3, 32, 32)
    for t in (z, a):                                                # codes and softmax are normalized too
        torch.testing.assert_close(t.mean(0), torch.zeros(t.shape[1]), atol=1e-4, rtol=0)


def test_batchnorm_stands_where_the_paper_has_it():
    norms = lambda net: sum(isinstance(m, torch.nn.BatchNorm1d) for m in net.modules())
    for words, m, expected in ((("cluster",), 16, (4, 0)), (("semi",), 10, (0, 0)),
                               (("likelihood",), 0, (0, 0)), (("style", "--dataset", "svhn"), 10, (3, 3))):
        Q, P, D = nets("--paper", "--width", ".01", "--task", *words, m=m)
        assert (norms(Q), norms(P)) == expected and not any(map(norms, D)), words


def test_the_three_encoders():
    x = torch.rand(4, 1, 28, 28)
    for kind in ("deterministic", "gaussian", "universal"):
        torch.manual_seed(0)
        Q, _, _ = nets("--encoder", kind, "--width", ".032")
        for p in Q.parameters():
            p.data.mul_(20)
        Q.eval()
        (z, _, log_q), (again, _, _) = Q(x), Q(x)
        assert z.shape == (4, 2) and torch.equal(z, again) is (kind == "deterministic")
        assert (log_q is not None) is (kind == "gaussian")


def test_inputs_are_corrupted_in_training_only():
    Q, _, _ = nets("--task", "semi", "--width", ".032", m=10)
    x = torch.rand(4, 1, 28, 28)
    assert not torch.equal(Q(x)[0], Q(x)[0])
    Q.eval()
    assert torch.equal(Q(x)[0], Q(x)[0])


def test_what_the_discriminators_see():
    z, y, c = torch.randn(3, 2), torch.eye(10)[:3], torch.tensor([4, 10, 0])
    assert aae.D_sees(z, y, c, args("--task", "semi"), 10) == [z, y]
    assert aae.D_sees(z, y, c, args("--task", "style", "--paper"), 10) == [z]
    assert aae.D_sees(z, None, c, args("--labels", "0"), 0) == [z]
    (joined,) = aae.D_sees(z, None, c, args(), 0)
    assert joined.shape == (3, 13) and joined[:, 2:].argmax(1).tolist() == [4, 10, 0]
    (joined,) = aae.D_sees(z, y, c % 10, args("--task", "style"), 10)
    assert joined.shape == (3, 12) and joined[:, 2:].argmax(1).tolist() == [4, 0, 0]


def test_the_code_of_dimensionality_reduction_is_the_head_plus_z():
    _, P, _ = nets("--task", "reduce", "--width", ".032", m=10)
    z, y = torch.randn(3, 2), torch.eye(10)[[2, 2, 7]]
    torch.testing.assert_close(P.code(z, y), P.W_C[[2, 2, 7]] + z)
    for held in (0.0, 1.0):
        P.fixed.fill_(held)
        (g,) = torch.autograd.grad(P.code(z, y).sum(), P.W_C)
        assert (g.abs().sum() == 0) == bool(held)


# ---------------------------------------------------------------------------------------- who moves, where to


def built(*words):
    """What build() returns for ten classes, or as many clusters as the task has."""
    torch.manual_seed(0)
    a = args(*words, "--width", ".05")
    return aae.build(a, aae.categories(a, torch.arange(10)), MEAN, STD)


def weights(*nets):
    return [p.detach().clone() for net in nets for p in net.parameters()]


def moved(before, *nets):
    return [not torch.equal(p, q) for p, q in zip(before, weights(*nets), strict=True)]


def still(parts, *names):
    """Rates 0, and no momentum, for the optimizers `names`."""
    for name in names:
        parts[name].param_groups[0]["lr"].fill_(0.0)


BATCH = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.full((20,), 10)
PAIR = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 10


def test_each_phase_moves_its_own_networks():
    who = {"opt_R": "QP", "opt_D": "D", "opt_Q": "Q", "opt_S": "Q"}
    for phase, names in who.items():
        parts, step = built("--task", "semi")
        nets = {"Q": [parts["Q"]], "P": [parts["P"]], "D": [parts["D0"], parts["D1"]]}
        still(parts, *who.keys() - {phase})
        before = {k: weights(*v) for k, v in nets.items()}
        step(*BATCH, *PAIR)
        for k, v in nets.items():
            assert any(moved(before[k], *v)) is (k in names), (phase, k)


def test_the_semi_supervised_phase_leaves_z_alone():
    parts, step = built("--task", "semi")
    still(parts, "opt_R", "opt_D", "opt_Q")
    before = weights(parts["Q"].z), weights(parts["Q"].y)
    step(*BATCH, *PAIR)
    assert not any(moved(before[0], parts["Q"].z)) and any(moved(before[1], parts["Q"].y))


@pytest.mark.parametrize("task", TASKS)
def test_a_step_of_every_task_moves_everything(task):
    parts, step = built("--task", task)
    parts["P"].fixed.fill_(0.0)
    nets = [parts[k] for k in ("Q", "P", "D0", "Q_bar", "P_bar")]
    before = [weights(net) for net in nets]
    scalars = step(BATCH[0], PAIR[1], *(PAIR if task in ("semi", "reduce") else ()))
    assert all(any(moved(b, net)) for b, net in zip(before, nets))
    assert {"reconstruction", "V"} <= set(scalars)
    assert all(v.ndim == 0 and v.isfinite() for v in scalars.values())


def test_regularisation_brings_the_codes_to_the_prior():
    """Direction: Q, through a D that knows where p(z) is, moves its codes there."""
    torch.manual_seed(0)
    Q, _, _ = nets("--width", ".064")
    x = torch.rand(50, 1, 28, 28)
    D = lambda z: -(z - 3).square().sum(1, keepdim=True)
    log_D = lambda: torch.nn.functional.logsigmoid(D(Q(x)[0])).mean()
    before = log_D()
    descend(-before, torch.optim.SGD(Q.parameters(), 1e-2))
    assert log_D() > before


def test_the_average_follows_the_weights():
    parts, step = built("--task", "prior", "--average", "0")
    step(*BATCH)
    assert all(torch.equal(p, q) for p, q in zip(parts["Q"].parameters(), parts["Q_bar"].parameters()))
    parts, step = built("--task", "prior", "--average", ".999")
    first = weights(parts["Q"])
    step(*BATCH)
    for p, q, bar in zip(first, parts["Q"].parameters(), parts["Q_bar"].parameters()):
        torch.testing.assert_close(bar, 0.1 * p + 0.9 * q, atol=1e-6, rtol=1e-4)


def test_rates_fall_and_heads_are_freed_when_the_settings_say():
    found, held = {}, {}
    for kind, words in (("tuned", ()), ("paper", ("--paper",))):
        parts, _ = built("--task", "reduce", *words)
        found[kind], held[kind] = [], []
        epochs = 0, 49, 50, 999, 1000, 4999
        shares = 0.0, 0.09, 0.1, 0.49, 0.5, 0.79, 0.8, 0.99
        a = args("--task", "reduce", *words, "--steps", "50000")
        for step in [10 * e + 1 for e in epochs] if words else [int(50000 * share) + 1 for share in shares]:
            aae.decay_rates(a, parts, step, per_epoch=10)
            found[kind].append([parts[k].param_groups[0]["lr"].item() for k in ("opt_R", "opt_D", "opt_S")])
            held[kind].append(parts["P"].fixed.item())
    falls = torch.tensor([1, 1, 0.1, 0.1, 0.01, 0.01])[:, None]
    torch.testing.assert_close(torch.tensor(found["paper"]), falls * torch.tensor([0.01, 0.1, 0.1]))
    falls = torch.tensor([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])[:, None]
    torch.testing.assert_close(torch.tensor(found["tuned"]), falls * torch.full((1, 3), 1e-3))
    assert held == {"paper": [1, 1, 0, 0, 0, 0], "tuned": [1, 1, 0, 0, 0, 0, 0, 0]}


def test_a_vae_step_descends_the_bound():
    torch.manual_seed(0)
    for prior in ("gaussian", "mixture"):
        a = args("--model", "vae", "--prior", prior, "--width", ".05")
        _, step = aae.build_vae(a, 0, MEAN, STD)
        bounds = [sum(step(*BATCH).values()).item() for _ in range(40)]
        assert bounds[-1] < bounds[0] - 3


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_checkpoint_goes_on_to_the_bit(optimizer):
    def run(parts, step, n):
        for _ in range(n):
            step(*BATCH, *PAIR)
        return weights(*(parts[k] for k in ("Q", "P", "D0", "D1", "Q_bar")))

    parts, step = built("--task", "semi", "--optimizer", optimizer)
    torch.manual_seed(1)
    whole = run(parts, step, 4)
    parts, step = built("--task", "semi", "--optimizer", optimizer)
    torch.manual_seed(1)
    run(parts, step, 2)
    state, random = {k: part.state_dict() for k, part in parts.items()}, torch.get_rng_state()
    parts, step = built("--task", "semi", "--optimizer", optimizer, "--rates", *"111")
    for k, part in parts.items():
        part.load_state_dict(state[k])
    torch.set_rng_state(random)
    assert all(torch.equal(p, q) for p, q in zip(whole, run(parts, step, 2), strict=True))


# ------------------------------------------------------------------------------------------------- figures


def test_manifolds_cover_the_priors():
    u = aae.manifold(args("--prior", "gaussian"))
    assert u.shape == (400, 2) and torch.equal(u[:20, 0], u[20:40, 0]) and (u[:20, 1] == u[0, 1]).all()
    assert u[0, 0] < 0 < u[0, 1] and u.std().item() == pytest.approx(5, rel=0.1)
    c = torch.arange(10).repeat_interleave(20)
    z = aae.manifold(args())
    centres = mixture(torch.arange(10), torch.full((10,), 0.5), torch.zeros(10))
    assert z.shape == (200, 2) and (torch.cdist(z[10::20], centres).argmin(1) == torch.arange(10)).all()
    z = aae.manifold(args("--prior", "swiss-roll"))
    assert (((z.norm(dim=1) / 3) ** 2 * 10).floor().long() == c).all()


def test_a_row_of_styles_has_one_z_and_every_category():
    class Recorder(torch.nn.Module):
        m = 10

        def forward(self, z, y):
            return torch.cat([z, y], 1)

    s = aae.styles(Recorder(), args("--task", "style"), rows=3).view(3, 10, 25)
    assert (s[:, :, :15] == s[:, :1, :15]).all() and torch.equal(s[1, :, 15:], torch.eye(10))
    assert not torch.equal(s[0, 0, :15], s[1, 0, :15])


def test_the_sliders_of_z_cover_the_prior():
    for words, limit in (((), 3), (("--prior", "swiss-roll"), 3), (("--prior", "gaussian"), 15),
                         (("--task", "reduce"), 3)):
        about = {"m": 10 * ("reduce" in words), "shape": (1, 28, 28), "names": None}
        z1, _ = aae.drawer(args(*words, "--width", ".01"), {"about": about}).inputs["z"]
        assert (z1.low, z1.high) == (-limit, limit)


# ---------------------------------------------------------------------------------------------------- runs


RUNS = [
    (("--task", "prior"), ("fig4a", "fig4b"), {"aae-prior-4-digits"}),
    (("--task", "semi", "--nn-steps", "20"), ("styles",), {"aae-digits100", "aae-semi-base-digits"}),
]
TINY = "--batch-size", "16", "--width", ".1", "--device", "cpu"


@pytest.mark.parametrize("words, figures, ids", RUNS)
def test_a_run_on_digits_draws_figures_and_writes_numbers(digits, tmp_path, words, figures, ids):
    folders = "--dataset", digits, "--out", tmp_path, "--data-dir", digits.parent / "data"
    result = script("aae.py", *words, *TINY, *folders, "--steps", "40")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "aae-digits"
    for figure in (*figures, "samples"):
        assert len(np.unique(np.asarray(Image.open(folder / f"{figure}.png")))) > 3, figure
    results = json.loads((folder / "results.json").read_text())["results"]
    assert ids <= set(results) and all(math.isfinite(v["value"]) for v in results.values())


@pytest.mark.parametrize(
    "words, figure, name",
    [
        (("--task", "likelihood"), "fig5", "aae-digits-ll"),
        (("--task", "likelihood", "--samples", "20010"), "fig5", "aae-digits-ll-20010"),
        (("--task", "style"), "fig7", "aae-style-digits"),
        (("--task", "cluster", "--clusters", "12"), "fig9", "aae-clu12-digits"),
        (("--task", "reduce"), "fig11", "aae-dim-2d-100-digits"),
        (("--task", "reduce", "--labels", "0", "--z-dim", "10"), "fig11", "aae-dim-10d-0-digits"),
        (("--task", "reduce", "--labels", "0", "--clusters", "12"), "fig11", "aae-dim-2d-0-clu12-digits"),
        (("--model", "vae", "--prior", "gaussian"), "fig2c", "aae-prior-2-digits"),
        (("--prior", "gaussian", "--lam", ".5"), "fig2a", "aae-prior-2-digits"),
    ],
)
def test_the_other_experiments_are_judged_too(digits, tmp_path, words, figure, name, monkeypatch):
    monkeypatch.setattr(aae.metrics, "classifier", lambda *a, **k: None)
    monkeypatch.setattr(aae.metrics, "label_agreement", lambda *a: 0.5)
    aae.main([*words, *TINY, "--dataset", str(digits), "--out", str(tmp_path), "--steps", "2"])
    folder = tmp_path / "aae-digits"
    assert len(np.unique(np.asarray(Image.open(folder / f"{figure}.png")))) > 2
    assert name in json.loads((folder / "results.json").read_text())["results"]
    if name == "aae-style-digits":                                         # D sees z and the label
        parts = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]
        assert parts["D0"]["0.weight"].shape[1] == 15 + 10


@pytest.mark.parametrize(
    "words",
    [
        "--model vae --prior swiss-roll",
        "--model vae --task semi",
        "--model vae --labels 100",
        "--task semi --labels 0",
        "--task cluster --labels 100",
        "--prior gaussian --labels 100",
        "--z-dim 3",
        "--prior gaussian --model vae --rates 1 .5 3",
        "--prior gaussian --model vae --lam 1",
        "--prior gaussian --model vae --warp 1",
        "--prior gaussian --model vae --no-adversary",
        "--prior gaussian --model vae --encoder universal",
        "--task style --spread 3",
        "--task semi --rates .1",
        "--task semi --clusters 16",
        "--task semi --D-label",
        "--labels some",
        "--average 2",
    ],
)
def test_flags_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        aae.parse_args(words.split())
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_data_without_labels_is_refused_in_one_line(tmp_path):
    np.savez(tmp_path / "plain.npz", images=np.zeros((60, 1, 28, 28), np.uint8))
    with pytest.raises(UserError, match="no labels"):
        aae.main(["--dataset", str(tmp_path / "plain.npz"), "--out", str(tmp_path), "--device", "cpu"])


def test_a_vae_that_diverges_says_so_in_one_line(digits, tmp_path):
    words = "--prior", "gaussian", "--model", "vae", "--rates", "1e4", "--log-every", "1", "--steps", "200"
    with pytest.raises(UserError, match="a finite value expected.*try a lower learning rate"):
        aae.main([*words, *TINY, "--dataset", str(digits), "--out", str(tmp_path)])


def test_nothing_is_held_out_unless_the_task_uses_it():
    images, labels = torch.zeros(300, 1, 28, 28, dtype=torch.uint8), torch.arange(300) % 10
    pictures = aae.data.Data("x", images, labels, images[:40], labels[:40])
    for task, n in (("semi", 300), ("style", 300), ("cluster", 250)):
        assert len(aae.split(pictures, args("--task", task))["train"][0]) == n
    labels = torch.where(torch.arange(300) < 250, labels, -1)
    with pytest.raises(UserError, match="no label among its 50 validation pictures"):
        aae.split(aae.data.Data("x", images, labels, images[:40], labels[:40]), args("--task", "cluster"))


def test_too_few_labels_and_one_class_are_refused_in_one_line(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 1, 28, 28), dtype=np.uint8)
    for labels, words, match in ((np.arange(60) % 2, ("--labels", "1"), "--labels 1 found: a multiple of 2"),
                                 (np.zeros(60, int), ("--labels", "10"), "one class")):
        np.savez(tmp_path / "few.npz", images=images, labels=labels)
        with pytest.raises(UserError, match=match):
            aae.main(["--task", "semi", *words, *TINY, "--dataset", str(tmp_path / "few.npz"), "--out",
                      str(tmp_path)])
    run = Namespace(args=Namespace(batch_size=10, labels=2), world=2)
    with pytest.raises(UserError, match="two labelled pictures on each of 2 ranks"):
        aae.labelled_batches(run, torch.zeros(2, 1, 28, 28), torch.arange(2))


# ------------------------------------------------------------------------------------- the published settings


SGD = {"optimizer": "sgd", "rates": (0.01, 0.1, 0.1), "momenta": (0.9, 0.1, 0.9), "batch_size": 100,  # A.2.1
       "average": 0, "consistency": 0, "warp": 0, "spread": 0, "D_label": False}        # not in the paper
PUBLISHED_SETTINGS = {
    "prior-gaussian": {"z_dim": 2, "std": 5, "hidden": 1000, "labels": 0},                      # Fig. 2
    "vae-gaussian": {"z_dim": 2, "std": 5, "labels": 0}, "vae-mixture": {"z_dim": 2, "labels": 0},
    "prior-mixture": {"z_dim": 2, "labels": 10000, "validation": 10000},    # Sec. 2.3: 10k labelled, 40k not
    "prior-swiss-roll": {"z_dim": 2, "labels": 10000, "validation": 10000},
    "likelihood": {"z_dim": 8, "std": 5, "hidden": 1000, "noise": 0, "bn": False,
                   "validation": 10000},                                                        # A.1
    "likelihood-faces": {"z_dim": 15, "std": 10, "standard": True, "size": 48, "channels": 1},       # A.1
    "style": {"z_dim": 15, "std": 1, "bn": False},                                              # Sec. 4
    "style-svhn": {"z_dim": 15, "rates": (1e-4, 0.01, 0.1), "bn": True, "where": "all"},
    "semi": {"z_dim": 10, "std": 1, "labels": 100, "noise": 0.3, "dropout": 0, "bn": False, "hidden": 1000,
             "drops": (50, 1000), "steps": 5000 * 600},                                         # A.2.1
    "semi-svhn": {"z_dim": 20, "labels": 1000, "noise": 0, "dropout": 0.2, "bn": True, "where": "all",
                  "standard": True, "rates": (1e-4, 0.01, 0.1), "drops": (250,), "steps": 1000 * 732,  # A.2.2
                  "size": 32, "channels": 3},
    "cluster": {"z_dim": 5, "clusters": 16, "hidden": 3000, "dropout": 0.2, "noise": 0, "bn": True,
                "where": "encoder", "drops": (50,), "steps": 1500 * 500, "validation": 10000},  # A.3
    "reduce": {"z_dim": 2, "labels": 100, "hold": 50, "drops": (50, 1000), "noise": 0.3},       # Sec. 7
    "reduce-0": {"z_dim": 2, "clusters": 20, "labels": 0, "hold": 50, "hidden": 3000},          # Sec. 7
}
WORDS = {"prior-gaussian": "--prior gaussian", "vae-gaussian": "--prior gaussian --model vae",
         "vae-mixture": "--model vae", "prior-mixture": "", "prior-swiss-roll": "--prior swiss-roll",
         "likelihood": "--task likelihood", "likelihood-faces": "--task likelihood --dataset faces",
         "style": "--task style", "style-svhn": "--task style --dataset svhn", "semi": "--task semi",
         "semi-svhn": "--task semi --dataset svhn", "cluster": "--task cluster", "reduce": "--task reduce",
         "reduce-0": "--task reduce --labels 0"}


def test_every_experiment_has_its_published_settings():
    assert set(PUBLISHED_SETTINGS) == set(WORDS) == set(PAPER) == set(aae.TUNED)
    for name, expected in PUBLISHED_SETTINGS.items():
        a = args("--paper", *WORDS[name].split())
        assert (a.experiment, a.settings, a.lam) == (name, "paper", None)
        for k, v in (SGD | expected).items():
            assert getattr(a, k) == v, (name, k)
        tuned = args(*WORDS[name].split())
        assert (tuned.settings, tuned.optimizer) == ("tuned", "adam")
        assert set(aae.TUNED[name]) <= set(PAPER[name])
    flagged = args("--paper", "--task", "semi", "--optimizer", "adam", "--rates", *"123", "--noise", "0")
    assert (flagged.optimizer, flagged.rates, flagged.noise, flagged.bn) == ("adam", [1, 2, 3], 0, False)
    assert args("--task", "semi", "--optimizer", "sgd").rates == (0.01, 0.1, 0.1)
    assert args("--paper", "--task", "semi", "--optimizer", "adam").rates == (1e-3, 1e-3, 1e-3)


def test_a_resumed_run_keeps_its_rates(tmp_path):
    saved = {"script": "aae", "optimizer": "sgd", "rates": [0.3, 0.2, 0.1], "given": ["optimizer"]}
    (tmp_path / "args.json").write_text(json.dumps(saved))
    assert aae.parse_args(["--resume", str(tmp_path)]).rates == [0.3, 0.2, 0.1]


@pytest.mark.parametrize("name", [n for n in WORDS if "svhn" not in n and "faces" not in n])
def test_the_published_settings_run(digits, tmp_path, name, monkeypatch):
    monkeypatch.setattr(aae.metrics, "classifier", lambda *a, **k: None)
    monkeypatch.setattr(aae.metrics, "label_agreement", lambda *a: 0.5)
    aae.main([*WORDS[name].split(), "--paper", *TINY, "--dataset", str(digits), "--out", str(tmp_path),
              "--steps", "3"])
    found = json.loads((tmp_path / "aae-digits" / "results.json").read_text())
    assert found["settings"] == "paper" and all(math.isfinite(v["value"]) for v in found["results"].values())
    assert not any("paper" in v for v in found["results"].values())         # other data than the paper's
    parts = torch.load(tmp_path / "aae-digits" / "checkpoint.pt", weights_only=True)["parts"]
    assert all(torch.equal(v, parts["Q_bar"][k]) for k, v in parts["Q"].items())        # no EMA


@pytest.mark.parametrize("task", ["semi", "style"])
def test_the_published_settings_of_svhn_run(tmp_path, monkeypatch, task):
    rng, kind = np.random.default_rng(0), aae.data.Data
    make = lambda n: (torch.from_numpy(rng.integers(0, 256, (n, 3, 32, 32), np.uint8)), torch.arange(n) % 10)
    (x, y), (x_test, y_test) = make(300), make(40)
    monkeypatch.setattr(aae.data, "load", lambda *a, **k: kind(
        name="svhn", images=x, labels=y, test_images=x_test, test_labels=y_test))
    monkeypatch.setattr(aae.metrics, "classifier", lambda *a, **k: None)
    monkeypatch.setattr(aae.metrics, "label_agreement", lambda *a: 0.5)
    words = ("--labels", "100") if task == "semi" else ()
    aae.main(["--task", task, "--dataset", "svhn", "--paper", *words, *TINY, "--out", str(tmp_path),
              "--steps", "3"])
    found = json.loads((tmp_path / "aae-svhn" / "results.json").read_text())["results"]
    assert set(found) == ({"aae-svhn100", "aae-semi-base-svhn"} if task == "semi" else {"aae-style-svhn"})


def test_published_numbers_stand_beside_the_same_data_networks_and_objective_alone(monkeypatch):
    monkeypatch.setattr(aae, "semi", lambda r, Q, P, sets: {f"aae-mnist{r.args.labels}": {"value": 2.0}})
    monkeypatch.setattr(aae, "error", lambda *a: 25.0)

    def found(*words):
        run, kept = Namespace(args=args("--task", "semi", *words)), {}
        run.results = lambda results, passed: kept.update(results)
        aae.report(run, None, None, "N", None)
        return {k: v.get("paper") for k, v in kept.items()}

    assert found() == {"aae-mnist100": 1.9, "aae-semi-base": 25.8}
    assert found("--labels", "1000") == {"aae-mnist1000": 1.6, "aae-semi-base": 8.73}
    for words in (("--width", ".5"), ("--z-dim", "3"), ("--encoder", "gaussian"), ("--no-adversary",),
                  ("--lam", "1")):
        assert found(*words) == {"aae-mnist100": None, "aae-semi-base": None}, words
    assert found("--dataset", "svhn") == {"aae-svhn1000": None, "aae-semi-base-svhn": None}
    assert found("--dataset", "x/mnist.npz") == {"aae-mnist100": None, "aae-semi-base-mnist": None}


# --------------------------------------------------------------------------------------- lambda, many samples


def test_one_objective_in_place_of_the_two_phases_moves_Q_and_P_together():
    parts, step = built("--prior", "gaussian", "--lam", ".5")
    still(parts, "opt_Q", "opt_D")
    before = [weights(parts[k]) for k in "QP"]
    scalars = step(*BATCH)
    assert set(scalars) == {"reconstruction", "V"}
    assert all(any(moved(b, parts[k])) for b, k in zip(before, "QP"))
    parts, step = built("--prior", "gaussian", "--lam", "0", "--average", "0")
    still(parts, "opt_D", "opt_Q")
    torch.manual_seed(1)
    step(*BATCH)
    alone = weights(parts["Q"], parts["P"])
    parts, step = built("--prior", "gaussian", "--average", "0")    # lam 0: the reconstruction phase alone
    still(parts, "opt_D", "opt_Q")
    torch.manual_seed(1)
    step(*BATCH)
    for p, q in zip(alone, weights(parts["Q"], parts["P"]), strict=True):
        torch.testing.assert_close(p, q)


def test_lam_weighs_the_adversary_alone():
    found = []
    for consistency in ("0", "5"):
        parts, step = built("--task", "semi", "--lam", "0", "--consistency", consistency)
        still(parts, "opt_D", "opt_S")
        torch.manual_seed(1)
        step(*BATCH, *PAIR)
        found.append(weights(parts["Q"]))
    assert any(moved(found[0], parts["Q"]))                 # consistency moves Q without it


def test_without_the_adversary_only_consistency_moves_Q_in_the_regularisation_phase():
    for adversary, consistency in (("--adversary", "0"), ("--no-adversary", "5"), ("--no-adversary", "0")):
        parts, step = built("--task", "semi", adversary, "--consistency", consistency)
        still(parts, "opt_R", "opt_S")
        before = weights(parts["Q"])
        step(*BATCH, *PAIR)
        assert any(moved(before, parts["Q"])) is ((adversary, consistency) != ("--no-adversary", "0"))


def test_a_window_of_many_samples_is_that_of_all_of_them(monkeypatch):
    torch.manual_seed(0)
    samples, valid, test = torch.rand(500, 12), torch.rand(20, 12), torch.rand(30, 12)
    drawn = []

    def draw(P, a, n):
        start = sum(drawn) % 500
        drawn.append(n)
        return samples[start:start + n].view(n, 1, 3, 4)

    monkeypatch.setattr(aae, "draw", draw)
    run = Namespace(args=Namespace(samples=500), aside=contextlib.nullcontext)
    found, whole = aae.large_window(run, None, valid, test, size=64), aae.metrics.parzen(samples, valid, test)
    assert drawn[:8] == [64] * 7 + [52]
    assert found == pytest.approx(whole)


def test_the_baseline_of_labels_alone_sees_the_same_pictures_for_as_many_steps(monkeypatch, digits, tmp_path):
    warped = []
    monkeypatch.setattr(aae.data, "warp", lambda x, a: warped.append(x.shape) or x)
    aae.main(["--task", "semi", *TINY, "--dataset", str(digits), "--out", str(tmp_path), "--steps", "3"])
    assert len(warped) == 3 * 3                             # regularisation, semi-supervised phase, baseline
    lines = (tmp_path / "aae-digits" / "metrics.jsonl").read_text().splitlines()
    assert "NN" in json.loads(lines[-1])

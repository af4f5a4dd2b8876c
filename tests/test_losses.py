"""Losses against loops written from their formulas, and their invariances."""

import math

import pytest
import torch

from stepwise_lightning import (
    BarlowTwins,
    SimCLR,
    SpectralContrastive,
    VICReg,
    barlow_twins_loss,
    simclr_loss,
    spectral_contrastive_loss,
    vicreg_loss,
)
from stepwise_lightning.losses import sum_terms

N, D = 6, 4


def views(n=N, d=D, seed=0):
    """Return two correlated views with unequal scales and means, float64, (n, d) each."""
    generator = torch.Generator().manual_seed(seed)
    common, noise1, noise2 = torch.randn(3, n, d, dtype=torch.float64, generator=generator)
    scales, shift = torch.linspace(0.3, 2, d, dtype=torch.float64), torch.linspace(-1, 1, d, dtype=torch.float64)
    return (common + 0.5 * noise1) * scales + shift, (common + 0.5 * noise2) * scales - shift


# ---- loops ----
def mean(values):
    values = list(values)
    return sum(values) / len(values)


def column(z, i):
    return [z[s, i] for s in range(len(z))]


def biased_variance(values):
    return mean((value - mean(values)) ** 2 for value in values)


def barlow_twins_loop(z1, z2, weight=0.0051, normalize=True, center=False, eps=1e-5):
    n, d = z1.shape

    def prepared(z, i):
        values = column(z, i)
        middle = mean(values) if normalize or center else 0
        scale = (biased_variance(values) + eps) ** 0.5 if normalize else 1
        return [(value - middle) / scale for value in values]

    def c(i, j):
        first = sum(prepared(z1, i)[s] * prepared(z2, j)[s] for s in range(n)) / n
        if normalize:
            return first
        return (first + sum(prepared(z2, i)[s] * prepared(z1, j)[s] for s in range(n)) / n) / 2

    return sum((c(i, j) - 1) ** 2 if i == j else weight * c(i, j) ** 2 for i in range(d) for j in range(d))


def simclr_loop(z1, z2, temperature=0.5):
    n, d = z1.shape
    z = [z1[s] for s in range(n)] + [z2[s] for s in range(n)]

    def cosine(a, b):
        dot, square_a, square_b = (sum(x[k] * y[k] for k in range(d)) for x, y in ((a, b), (a, a), (b, b)))
        return dot / (square_a * square_b) ** 0.5

    total = 0
    for i in range(2 * n):
        exponentials = {k: (cosine(z[i], z[k]) / temperature).exp() for k in range(2 * n) if k != i}
        total = total - (exponentials[(i + n) % (2 * n)] / sum(exponentials.values())).log()
    return total / (2 * n)


def vicreg_loop(z1, z2, invariance=25.0, variance=25.0, covariance=1.0, eps=1e-4):
    n, d = z1.shape

    def cov(z, i, j):
        middle_i, middle_j = mean(column(z, i)), mean(column(z, j))
        return sum((z[s, i] - middle_i) * (z[s, j] - middle_j) for s in range(n)) / (n - 1)

    def v(z):
        return mean((1 - (cov(z, i, i) + eps) ** 0.5).clamp(min=0) for i in range(d))

    def c(z):
        return sum(cov(z, i, j) ** 2 for i in range(d) for j in range(d) if i != j) / d

    mse = mean((z1[s, i] - z2[s, i]) ** 2 for s in range(n) for i in range(d))
    return invariance * mse + variance * (v(z1) + v(z2)) / 2 + covariance * (c(z1) + c(z2))


def spectral_contrastive_loop(z1, z2):
    n, d = z1.shape

    def product(i, j):
        return sum(z1[i, k] * z2[j, k] for k in range(d))

    negatives = mean(product(i, j) ** 2 for i in range(n) for j in range(n) if i != j)
    return negatives - 2 * mean(product(i, i) for i in range(n))


CASES = {
    "barlow_twins": (barlow_twins_loss, barlow_twins_loop, ()),
    "barlow_twins_other_arguments": (barlow_twins_loss, barlow_twins_loop, (0.3, True, False, 1e-2)),
    "barlow_twins_analytical": (barlow_twins_loss, barlow_twins_loop, (1.0, False)),
    "barlow_twins_centred": (barlow_twins_loss, barlow_twins_loop, (0.2, False, True)),
    "simclr": (simclr_loss, simclr_loop, ()),
    "simclr_cold": (simclr_loss, simclr_loop, (0.1,)),
    "spectral_contrastive": (spectral_contrastive_loss, spectral_contrastive_loop, ()),
    "vicreg": (vicreg_loss, vicreg_loop, ()),
    "vicreg_other_arguments": (vicreg_loss, vicreg_loop, (3.0, 5.0, 7.0, 1e-2)),
}
every_loss = pytest.mark.parametrize(("loss", "loop", "arguments"), CASES.values(), ids=CASES)


@every_loss
def test_values_and_gradients_match_the_loop(loss, loop, arguments):
    z1, z2 = (z.requires_grad_() for z in views())
    value, expected = loss(z1, z2, *arguments), loop(z1, z2, *arguments)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for gradient, target in zip(
        torch.autograd.grad(value, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True
    ):
        torch.testing.assert_close(gradient, target, rtol=1e-10, atol=1e-13)


@every_loss
def test_gradients_match_finite_differences(loss, loop, arguments):
    z1, z2 = (z.requires_grad_() for z in views(seed=1))
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, *arguments), (z1, z2))


@every_loss
def test_losses_are_invariant_to_swapped_views_and_permuted_pairs(loss, loop, arguments):
    z1, z2 = views()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    value = loss(z1, z2, *arguments)
    torch.testing.assert_close(loss(z2, z1, *arguments), value, rtol=1e-13, atol=0)
    torch.testing.assert_close(loss(z1[order], z2[order], *arguments), value, rtol=1e-13, atol=0)
    assert abs(loss(z1[order], z2, *arguments) - value) > 1e-3  # not invariant to permuting one view


@pytest.mark.parametrize(
    ("loss", "invariant"),
    [
        (lambda a, b: barlow_twins_loss(a, b, 1.0, normalize=False), True),
        (lambda a, b: barlow_twins_loss(a, b, 1.0, normalize=False, center=True), True),
        (simclr_loss, True),
        (spectral_contrastive_loss, True),
        (barlow_twins_loss, False),
        (lambda a, b: barlow_twins_loss(a, b, 0.5, normalize=False), False),
        (vicreg_loss, False),
    ],
    ids=["analytical", "analytical_centred", "simclr", "spectral", "published", "analytical_other_weight", "vicreg"],
)
def test_invariance_to_rotations_of_the_embedding(loss, invariant):
    z1, z2 = views()
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    change = (loss(z1 @ rotation, z2 @ rotation) - loss(z1, z2)).abs() / loss(z1, z2)
    assert change < 1e-13 if invariant else change > 1e-3


def test_invariances_to_scale_and_shift():
    z1, z2 = views()
    scales = torch.linspace(0.5, 3, N, dtype=torch.float64)[:, None]
    torch.testing.assert_close(simclr_loss(scales * z1, z2 / scales), simclr_loss(z1, z2), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        barlow_twins_loss(3 * z1 + 1, 0.5 * z2 - 2, eps=0.0), barlow_twins_loss(z1, z2, eps=0.0), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(vicreg_loss(z1 + 5, z2 + 5), vicreg_loss(z1, z2), rtol=1e-12, atol=0)


def test_values_in_closed_form():
    identity = torch.eye(D, dtype=torch.float64)
    # C = I exactly, and C = 0.
    assert barlow_twins_loss(D**0.5 * identity, D**0.5 * identity, 1.0, normalize=False).item() == pytest.approx(0)
    assert barlow_twins_loss(0 * identity, 0 * identity, 1.0, normalize=False).item() == D
    # Equal views of orthogonal samples: one positive of similarity 1, 2n − 2 negatives of similarity 0.
    expected = math.log(math.exp(2) + 2 * D - 2) - 2
    assert simclr_loss(identity, identity).item() == pytest.approx(expected, rel=1e-14)
    # Collapsed embeddings have only the hinge, 1 − √eps in each view.
    assert vicreg_loss(0 * identity, 0 * identity).item() == pytest.approx(25 * 0.99, rel=1e-14)


@every_loss
def test_float32_matches_float64(loss, loop, arguments):
    z1, z2 = (z.requires_grad_() for z in views(n=64, d=16))
    s1, s2 = (z.detach().float().requires_grad_() for z in (z1, z2))
    single, double = loss(s1, s2, *arguments), loss(z1, z2, *arguments)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)
    single.backward()
    double.backward()
    for s, z in ((s1, z1), (s2, z2)):
        assert (s.grad.double() - z.grad).norm() <= 1e-5 * z.grad.norm()


@pytest.mark.parametrize(
    ("method", "loss", "names"),
    [
        (BarlowTwins, barlow_twins_loss, ["on_diagonal", "off_diagonal"]),
        (SimCLR, simclr_loss, ["alignment", "uniformity"]),
        (SpectralContrastive, spectral_contrastive_loss, ["alignment", "repulsion"]),
        (VICReg, vicreg_loss, ["invariance", "variance", "covariance"]),
    ],
)
def test_modules_use_the_defaults_of_their_loss_and_name_its_terms(method, loss, names):
    z1, z2 = views()
    terms = method(torch.nn.Identity(), learning_rate=0.1).loss_terms(z1, z2)
    assert list(terms) == names
    assert torch.equal(sum_terms(terms), loss(z1, z2))
    assert torch.equal(method(torch.nn.Identity(), learning_rate=0.1).loss(z1, z2), loss(z1, z2))


@pytest.mark.parametrize("loss", [barlow_twins_loss, simclr_loss, spectral_contrastive_loss, vicreg_loss])
@pytest.mark.parametrize(
    ("shape1", "shape2", "message"),
    [
        ((4, 3), (4, 2), r"one shape .* got \(4, 3\) and \(4, 2\)"),
        ((4, 3), (5, 3), "one shape"),
        ((4,), (4,), "one shape"),
        ((4, 3, 2), (4, 3, 2), "one shape"),
        ((0, 3), (0, 3), "not empty"),
        ((4, 0), (4, 0), "not empty"),
        ((1, 3), (1, 3), "at least 2 pairs in a batch, got 1: raise the batch size"),
    ],
)
def test_invalid_shapes_raise_one_line(loss, shape1, shape2, message):
    with pytest.raises(ValueError, match=message) as error:
        loss(torch.ones(shape1), torch.ones(shape2))
    assert "\n" not in str(error.value)


def test_one_pair_is_valid_without_centring():
    assert barlow_twins_loss(torch.ones(1, 1), torch.ones(1, 1), normalize=False).item() == 0
    with pytest.raises(ValueError, match="at least 2 pairs"):
        barlow_twins_loss(torch.ones(1, 1), torch.ones(1, 1), normalize=False, center=True)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0, got"):
        simclr_loss(torch.ones(2, 2), torch.ones(2, 2), temperature)

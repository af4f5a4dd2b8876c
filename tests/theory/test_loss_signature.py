"""Signatures, growth matrices and modes of losses against full Hessians and Jacobians in the weights."""

import math
from functools import partial

import example_losses
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian

from reproduce import losses
from stepwise_lightning import JointEmbedding, barlow_twins_loss, simclr_loss, spectral_contrastive_loss, vicreg_loss
from stepwise_lightning.theory import (
    LastLayer,
    growth_matrix,
    growth_modes,
    linear_flow,
    loss_signature,
    saddle_value,
    two_tower_features,
)
from stepwise_lightning.theory.loss_derivatives import LossDerivatives

NUM_PAIRS, NUM_FEATURES, DIM = 12, 5, 4
ISOTROPIC = {
    "barlow_twins": (partial(barlow_twins_loss, normalize=False, off_diagonal_weight=0.3), False),
    "barlow_twins_centred": (partial(barlow_twins_loss, normalize=False, center=True), False),
    "barlow_twins_published": (barlow_twins_loss, False),
    "vicreg": (vicreg_loss, False),
    "simclr": (simclr_loss, True),
    "spectral_contrastive": (spectral_contrastive_loss, False),
    "dcl": (losses.dcl_loss, True),
    "clip": (losses.clip_loss, True),
    "siglip": (losses.siglip_loss, True),
    "whitening": (losses.whitening_loss, False),
}
ANISOTROPIC = {
    "lejepa": losses.lejepa_loss,
    "metric": example_losses.metric_loss,
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(num_features=NUM_FEATURES, seed=0):
    """Return two views with shared content, noise and different means."""
    content = normal(NUM_PAIRS, num_features, seed=seed)
    return [content + 0.7 * normal(NUM_PAIRS, num_features, seed=seed + k) + 0.5 * k for k in (1, 2)]


def flow_map(loss, h1, h2, bias):
    """Return the map from W to dW/dt near W = 0, from the Hessian of the loss in the weights, (d m, d m)."""
    d, m = len(bias), h1.shape[1]
    zero = torch.zeros(d, m, dtype=torch.float64)
    return -hessian(lambda w: loss(h1 @ w.T + bias, h2 @ w.T + bias), zero).reshape(d * m, d * m)


def field_map(loss, h1, h2, bias, step=1e-4):
    """Return the map from W to dW/dt of SGD steps near W = 0, by central differences."""
    d, m = len(bias), h1.shape[1]

    def descent(flat):
        w = flat.reshape(d, m).requires_grad_()
        return -torch.autograd.grad(loss(h1 @ w.T + bias, h2 @ w.T + bias), w)[0].flatten()

    steps = step * torch.eye(d * m, dtype=torch.float64)
    return torch.stack([(descent(s.clone()) - descent(-s)) / (2 * step) for s in steps], 1)


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ISOTROPIC)
def test_growth_matrix_of_function_matches_hessian(name):
    loss, needs_bias = ISOTROPIC[name]
    h1, h2 = features()
    bias = normal(DIM, seed=9) if needs_bias else torch.zeros(DIM, dtype=torch.float64)
    projector = torch.eye(DIM, dtype=torch.float64)
    if needs_bias:
        projector -= bias.outer(bias) / bias.square().sum()
    growth = growth_matrix(loss, h1, h2, DIM, float(bias.norm()) if needs_bias else None)
    assert error(torch.kron(projector, growth.T.contiguous()), flow_map(loss, h1, h2, bias)) < 1e-12


@pytest.mark.parametrize(
    ("name", "function", "settings"),
    [
        ("barlow_twins", barlow_twins_loss, {"normalize": False}),
        ("barlow_twins", barlow_twins_loss, {"eps": 1e-3}),
        ("barlow_twins", barlow_twins_loss, {"eps": 1e-9}),
        ("spectral_contrastive", spectral_contrastive_loss, {}),
        ("vicreg", vicreg_loss, {"eps": 1e-2}),
        ("simclr", simclr_loss, {"temperature": 0.1}),
    ],
)
def test_closed_forms_of_named_losses_equal_the_derivatives_of_their_functions(name, function, settings):
    bias_norm = 2.0 if name == "simclr" else None
    expected = growth_matrix(partial(function, **settings), *features(), DIM, bias_norm)
    assert error(growth_matrix(name, *features(), DIM, bias_norm, **settings), expected) < 1e-12


@pytest.mark.parametrize("name", ANISOTROPIC)
def test_growth_modes_of_anisotropic_losses_match_hessian(name):
    h1, h2 = features()
    expected = flow_map(ANISOTROPIC[name], h1, h2, torch.zeros(DIM, dtype=torch.float64))
    rates, directions = growth_modes(ANISOTROPIC[name], h1, h2, DIM, 6)
    torch.testing.assert_close(rates, torch.linalg.eigvalsh(expected).flip(0)[:6], rtol=1e-12, atol=1e-12)
    w = directions.flatten(1)
    torch.testing.assert_close(w @ expected.T, rates[:, None] * w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ANISOTROPIC)
def test_blocks_of_anisotropic_losses_match_hessian(name):
    signature = loss_signature(ANISOTROPIC[name], DIM, NUM_PAIRS)
    assert not signature.isotropic and signature.is_gradient and signature.permutation_invariant
    z = torch.zeros(2, NUM_PAIRS, DIM, dtype=torch.float64)
    second = hessian(lambda z: ANISOTROPIC[name](z[0], z[1]), z)  # view, pair, row, view, pair, column
    n = NUM_PAIRS
    torch.testing.assert_close(signature.b, n**2 * second[:, 0, :, :, 1], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(signature.a, n * (second[:, 0, :, :, 0] - second[:, 0, :, :, 1]), rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="prefers directions of the embedding: use growth_modes"):
        growth_matrix(ANISOTROPIC[name], *features(), DIM)


def test_growth_modes_of_isotropic_losses_are_eigenvectors_of_the_flow():
    h1, h2 = features()
    bias = normal(DIM, seed=9)
    for loss, b in ((simclr_loss, bias), (vicreg_loss, 0 * bias)):
        rates, directions = growth_modes(loss, h1, h2, DIM, 5, bias=b)
        w, flow = directions.flatten(1), flow_map(loss, h1, h2, b)
        torch.testing.assert_close(w @ flow.T, rates[:, None] * w, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(w.norm(dim=1), torch.ones(5, dtype=torch.float64))
        assert float(rates[0] - torch.linalg.eigvalsh(flow)[-1]) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("loss", [losses.lejepa_loss, example_losses.byol_loss])
def test_iterative_and_dense_eigenpairs_agree(loss, monkeypatch):
    dense = growth_modes(loss, *features(), DIM, 4)
    monkeypatch.setattr(linear_flow, "_DENSE", 0)
    iterative = growth_modes(loss, *features(), DIM, 4)
    for part in (lambda rates: rates.real, lambda rates: torch.view_as_real(rates + 0j)[:, 1].abs()):
        torch.testing.assert_close(part(iterative.rates), part(dense.rates), rtol=1e-8, atol=1e-8)
    expected = field_map(loss, *features(), torch.zeros(DIM, dtype=torch.float64))
    w = iterative.directions.flatten(1)
    assert error(w @ expected.T.to(w.dtype), iterative.rates[:, None] * w) < 1e-6


@pytest.mark.parametrize(
    ("loss", "isotropic"), [(example_losses.simsiam_loss, True), (example_losses.byol_loss, False)]
)
def test_losses_with_stop_gradients_follow_their_field(loss, isotropic):
    h1, h2 = features()
    bias = normal(DIM, seed=9) if isotropic else torch.zeros(DIM, dtype=torch.float64)
    signature = loss_signature(loss, DIM, NUM_PAIRS, bias)
    assert not signature.is_gradient and signature.isotropic == isotropic
    expected = field_map(loss, h1, h2, bias)
    rates, directions = growth_modes(loss, h1, h2, DIM, 4, bias=bias)
    w = directions.flatten(1)
    assert error(w @ expected.T.to(w.dtype), rates[:, None] * w) < 1e-6
    if not isotropic:
        assert rates.is_complex()  # two modes oscillate
        assert float(rates.real[0]) == pytest.approx(float(torch.linalg.eigvals(expected).real.max()))


def test_two_towers_match_hessian_of_both_layers():
    h1, h2 = features()[0], features(3, seed=4)[1]
    bias = normal(DIM, seed=9)

    def loss_of(w):
        w1, w2 = w.split([NUM_FEATURES, 3], 1)
        return losses.clip_loss(h1 @ w1.T + bias, h2 @ w2.T + bias)

    second = hessian(loss_of, torch.zeros(DIM, NUM_FEATURES + 3, dtype=torch.float64))
    expected = torch.linalg.eigvalsh(-second.reshape((NUM_FEATURES + 3) * DIM, -1)).flip(0)
    rates, directions = growth_modes(losses.clip_loss, *two_tower_features(h1, h2), DIM, 3, bias=bias)
    assert directions.shape == (3, DIM, NUM_FEATURES + 3)
    torch.testing.assert_close(rates, expected[: 3 * (DIM - 1) : DIM - 1], rtol=1e-10, atol=1e-10)


def test_growth_matrix_is_the_mean_over_batches():
    views = [torch.stack([h, h.flip(1)]) for h in features()]
    separate = [growth_matrix(vicreg_loss, views[0][k], views[1][k], DIM) for k in (0, 1)]
    torch.testing.assert_close(growth_matrix(vicreg_loss, *views, DIM), sum(separate) / 2)


@pytest.mark.parametrize(
    ("loss", "has_bias", "alpha", "beta"),
    [
        (partial(barlow_twins_loss, normalize=False), False, (0, -2, 0), (0, 0, 0)),
        (partial(barlow_twins_loss, normalize=False, center=True), False, (0, -2, 0), (0, 2, 0)),
        (barlow_twins_loss, False, (0, -2e5, 0), (0, 2e5, 0)),
        (vicreg_loss, False, (-308.01, -12.5, -308.01), (320.51, 0, 320.51)),
        (simclr_loss, True, (-0.0253, -2, -0.0253), (1.0127, 1.0127, 1.0127)),
        (spectral_contrastive_loss, False, (0, -2, 0), (0, 0, 0)),
        (losses.dcl_loss, True, (0, -2.0513, 0), (0, 2.0513, 0)),
        (losses.lejepa_loss, False, (-1.07, -0.475, -1.07), (1.216, 1.216, 1.216)),
    ],
)
def test_signatures_of_the_documentation(loss, has_bias, alpha, beta):
    bias = torch.eye(4, dtype=torch.float64)[0] if has_bias else None
    signature = loss_signature(loss, dim=4, num_pairs=40, bias=bias)
    for actual, expected in ((signature.alpha, alpha), (signature.beta, beta)):
        triple = (actual[0, 0], actual[0, 1], actual[1, 1])
        assert [float(x) for x in triple] == pytest.approx(expected, rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("dim", [4, 64])
def test_number_of_evaluations_does_not_depend_on_the_dimension(dim, monkeypatch):
    calls, products = [], []
    second_derivatives = LossDerivatives.second_derivatives
    monkeypatch.setattr(
        LossDerivatives, "second_derivatives", lambda *arguments: products.append(1) or second_derivatives(*arguments)
    )
    bias = torch.ones(dim, dtype=torch.float64)
    signature = loss_signature(lambda z1, z2: calls.append(1) or simclr_loss(z1, z2), dim, NUM_PAIRS, bias)
    assert signature.isotropic and len(calls) == 8 and len(products) == 5


def test_saddle_value_of_contrastive_losses():
    assert saddle_value("simclr", 256, 8) == pytest.approx(math.log(511))
    assert saddle_value(losses.clip_loss, 128, 8, bias=torch.ones(8)) == pytest.approx(4.852, abs=1e-3)
    assert saddle_value("barlow_twins", 16, 8, normalize=False) == 8
    assert loss_signature(vicreg_loss, 8, 16).saddle_value == saddle_value("vicreg", 16, 8)


def test_modules_terms_and_operations_in_place_have_the_growth_rates_of_plain_functions():
    module = example_losses.Metric(DIM)
    model = JointEmbedding(nn.Identity(), 0.1, loss=module)
    expected = growth_modes(example_losses.metric_loss, *features(), DIM, 4).rates
    for loss in (module, model.loss, example_losses.terms_in_place):
        torch.testing.assert_close(growth_modes(loss, *features(), DIM, 4).rates, expected, rtol=1e-6, atol=0)
        assert saddle_value(loss, NUM_PAIRS, DIM) == 0
    assert module.scales.dtype == torch.float32 and module.calls == 0
    layers = [LastLayer(loss, *features(), normal(DIM, NUM_FEATURES)) for loss in (example_losses.metric_loss, module)]
    first, second = (layer.simulate([1e-3] * 5).weight for layer in layers)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-9)
    assert module.calls == 0


def test_losses_without_growth_rates_raise():
    h1, h2 = features()
    with pytest.raises(ValueError, match="not differentiable at equal embeddings: give a bias"):
        growth_matrix(simclr_loss, h1, h2, DIM)
    with pytest.raises(ValueError, match="not differentiable at equal embeddings"):
        loss_signature(lambda z1, z2: (z1 - z2).abs().mean(), DIM, NUM_PAIRS)
    with pytest.raises(ValueError, match="depends on the order of the pairs"):
        growth_modes(example_losses.ordered_loss, h1, h2, DIM, 1)
    with pytest.raises(ValueError, match="gradient at equal embeddings must vanish"):
        growth_matrix(partial(barlow_twins_loss, normalize=False), h1, h2, DIM, bias_norm=1.0)
    with pytest.raises(ValueError, match="the loss is random"):
        loss_signature(example_losses.random_loss, DIM, NUM_PAIRS)
    with pytest.raises(ValueError, match="changes from call to call: .* remove queues and running averages"):
        loss_signature(example_losses.Centred(DIM), DIM, NUM_PAIRS)
    with pytest.raises(ValueError, match="rounds its embeddings, for example to half precision"):
        loss_signature(example_losses.half_precision_loss, DIM, NUM_PAIRS)
    with pytest.raises(ValueError, match="a scalar tensor, or a dictionary of them"):
        saddle_value(lambda z1, z2: (z1.sum(), z2.sum()), NUM_PAIRS, DIM)
    with pytest.raises(ValueError, match=r"float64 scalar for float64 embeddings, got torch.float32 of shape \(\)"):
        loss_signature(lambda z1, z2: (z1 - z2).float().square().mean(), DIM, NUM_PAIRS)
    with pytest.raises(ValueError, match="settings are for losses given by name, got temperature"):
        growth_matrix(simclr_loss, h1, h2, DIM, temperature=0.1)

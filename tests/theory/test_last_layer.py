"""Simulation of a last layer against torch.optim.SGD on the losses of the package."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from reproduce.losses import dcl_loss, lejepa_loss
from stepwise_lightning import barlow_twins_loss, simclr_loss, spectral_contrastive_loss, vicreg_loss
from stepwise_lightning.losses import LOSSES as TABLE_OF_LOSSES
from stepwise_lightning.spectrum import cross_correlation_eigenvalues, embedding_eigenvalues, measure
from stepwise_lightning.theory import LastLayer, layer_gradients

LOSSES = {
    "barlow_twins": barlow_twins_loss,
    "vicreg": vicreg_loss,
    "simclr": simclr_loss,
    "spectral_contrastive": spectral_contrastive_loss,
}
ANALYTICAL = {"normalize": False, "center": True, "off_diagonal_weight": 1.0}
NUM_FEATURES, DIM = 16, 5


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(*shape, seed=0):
    """Return rectified features of two views, (…, m), not centred, with shared content and noise."""
    content = normal(*shape, NUM_FEATURES, seed=seed) * torch.logspace(0.2, -0.8, NUM_FEATURES, dtype=torch.float64)
    return tuple((content + 0.2 * normal(*shape, NUM_FEATURES, seed=seed + k)).relu() for k in (1, 2))


def linear_layer(scale, bias=True, in_features=NUM_FEATURES):
    layer = nn.Linear(in_features, DIM, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(scale * normal(DIM, in_features, seed=7))
        if bias:
            layer.bias.copy_(normal(DIM, seed=8))
    return layer


def train(layer, loss, h1, h2, rates, momentum, weight_decay=0.0, optimizer=None, **settings):
    """Train a layer with SGD, one of the batches (batches, n, m) per step, and return the optimiser."""
    if optimizer is None:
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=momentum, weight_decay=weight_decay)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        LOSSES[loss](layer(h1[step % len(h1)]), layer(h2[step % len(h2)]), **settings).backward()
        optimizer.step()
    return optimizer


def error(actual, expected):
    return float((actual - expected.detach()).norm() / expected.detach().norm())


CASES = {
    "analytical": ("barlow_twins", ANALYTICAL, 0.02, 1),
    "not centred": ("barlow_twins", {"normalize": False, "center": False, "off_diagonal_weight": 0.3}, 0.005, 1),
    "diagonal only": ("barlow_twins", {"normalize": False, "center": True, "off_diagonal_weight": 0.0}, 0.01, 1),
    "published": ("barlow_twins", {}, 1e-5, 1),
    "normalised": ("barlow_twins", {"eps": 0.01, "off_diagonal_weight": 0.5}, 0.005, 1),
    "vicreg": ("vicreg", {"eps": 0.01}, 0.005, 1),
    "vicreg, other weights": ("vicreg", {"invariance_weight": 3.0, "variance_weight": 9.0, "eps": 0.1}, 0.01, 1),
    "simclr": ("simclr", {"temperature": 0.2}, 0.01, 3),
    "spectral contrastive": ("spectral_contrastive", {}, 0.005, 1),
}


def test_spectral_contrastive_loss_of_many_pairs_is_estimated_from_some(monkeypatch):
    h1, h2 = features(1, 1200)
    weight = 0.1 * normal(DIM, NUM_FEATURES, seed=7)
    sampled = LastLayer("spectral_contrastive", h1, h2, weight).simulate([0.05] * 60)
    monkeypatch.setattr(layer_gradients, "_SAMPLED_PAIRS", 1200)
    exact = LastLayer("spectral_contrastive", h1, h2, weight).simulate([0.05] * 60)
    assert 0 < error(sampled.eigenvalues, exact.eigenvalues) < 0.1 * DIM / 1200


@pytest.mark.parametrize("name", CASES)
def test_simulation_matches_sgd(name):
    """150 steps with warm-up, momentum and weight decay agree to round-off."""
    loss, settings, rate, batches = CASES[name]
    h1, h2 = features(batches, 24)
    layer, rates = linear_layer(1e-3), [rate * min(1, (step + 1) / 50) for step in range(150)]
    simulation = LastLayer(loss, h1, h2, layer.weight, layer.bias, **settings)
    simulated = simulation.simulate(rates, 0.9, weight_decay=1e-3)
    start = layer.weight.detach().clone()
    train(layer, loss, h1, h2, rates, 0.9, 1e-3, **settings)
    assert error(simulated.weight, layer.weight) < 1e-10
    assert error(simulated.bias, layer.bias) < 1e-10
    assert error(start, layer.weight) > 0.5
    z1, z2 = (layer(h.flatten(0, 1)).detach() for h in (h1, h2))
    both = torch.cat([z1, z2])
    expected = {
        "barlow_twins": cross_correlation_eigenvalues(z1, z2, center=settings.get("center", True)),
        "vicreg": embedding_eigenvalues(both),
        "spectral_contrastive": cross_correlation_eigenvalues(z1, z2),
        "simclr": measure("tangent_covariance", [z1, z2])[0],
    }
    torch.testing.assert_close(simulated.eigenvalues[-1], expected[loss], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_automatic_differentiation_agrees_with_moments(name):
    loss, settings, rate, batches = CASES[name]
    h1, h2 = features(batches, 24)
    layer = linear_layer(1e-2)
    matrix = TABLE_OF_LOSSES[loss].driven_matrix
    function = partial(LOSSES[loss], **settings)
    simulations = [
        LastLayer(loss, h1, h2, layer.weight, layer.bias, **settings),
        LastLayer(function, h1, h2, layer.weight, layer.bias, driven_matrix=matrix),
    ]
    expected, actual = (each.simulate([rate] * 100, 0.9, weight_decay=1e-3) for each in simulations)
    assert error(actual.weight, expected.weight) < 1e-10 and error(actual.bias, expected.bias) < 1e-10
    if loss != "barlow_twins":  # a function has no setting for the centre of C
        torch.testing.assert_close(actual.eigenvalues, expected.eigenvalues, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss", [dcl_loss, lejepa_loss])
def test_simulation_of_a_function_matches_sgd(loss):
    h1, h2 = features(3, 24)
    layer, rates = linear_layer(1e-2), [0.05] * 60
    simulated = LastLayer(loss, h1, h2, layer.weight, layer.bias).simulate(rates, 0.9, weight_decay=1e-3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.05, 0.9, weight_decay=1e-3)
    for step in range(60):
        optimizer.zero_grad()
        loss(layer(h1[step % 3]), layer(h2[step % 3])).backward()
        optimizer.step()
    assert error(simulated.weight, layer.weight) < 1e-12 and error(simulated.bias, layer.bias) < 1e-12
    z = layer(torch.cat([*h1, *h2])).detach()
    torch.testing.assert_close(simulated.eigenvalues[-1], embedding_eigenvalues(z), rtol=1e-9, atol=1e-12)


def test_projection_for_a_function_equals_projection_for_its_name():
    h1, h2 = wide_features(300)
    weight = 1e-4 * normal(3, 60, seed=7)
    named, function = (
        LastLayer(loss, h1, h2, weight, num_components=12, driven_matrix="covariance")
        for loss in ("spectral_contrastive", spectral_contrastive_loss)
    )
    projected = [each.simulate([1e-3], measured_at=[0]).eigenvalues for each in (named, function)]
    torch.testing.assert_close(projected[1], projected[0], rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["analytical", "vicreg", "simclr"])
def test_simulation_continues_from_optimizer_state(name, bias):
    loss, settings, rate, batches = CASES[name]
    h1, h2 = features(batches, 24)
    layer = linear_layer(0.01, bias)
    optimizer = train(layer, loss, h1, h2, [rate] * 30, 0.9, **settings)
    velocity = [optimizer.state[parameter]["momentum_buffer"].clone() for parameter in layer.parameters()]
    simulation = LastLayer(loss, h1, h2, layer.weight, layer.bias, **settings)
    simulated = simulation.simulate([rate] * 60, 0.9, velocity=velocity, measured_at=[60])
    from_rest = simulation.simulate([rate] * 60, 0.9, measured_at=[60])
    train(layer, loss, h1, h2, [rate] * 60, 0.9, optimizer=optimizer, **settings)
    assert error(simulated.weight, layer.weight) < 1e-10 < 1e-4 < error(from_rest.weight, layer.weight)
    assert (simulated.bias is None) == (not bias)


@pytest.mark.parametrize(("loss", "settings"), [("barlow_twins", ANALYTICAL), ("vicreg", {"eps": 0.01})])
def test_batches_use_mean_moments(loss, settings):
    """Copies of a batch equal the batch; the first, linear step of several batches is the mean of their steps."""
    h1, h2 = features(4, 24)
    weight, rates = 1e-9 * normal(DIM, NUM_FEATURES, seed=7), [0.001] * 5
    one = LastLayer(loss, h1[0], h2[0], weight, **settings).simulate(rates)
    copies = LastLayer(loss, h1[:1].expand(3, -1, -1), h2[:1].expand(3, -1, -1), weight, **settings).simulate(rates)
    torch.testing.assert_close(copies.weight, one.weight, rtol=1e-12, atol=0)
    together = LastLayer(loss, h1, h2, weight, **settings).simulate([0.001])
    alone = [LastLayer(loss, h1[k], h2[k], weight, **settings).simulate([0.001]).weight for k in range(4)]
    torch.testing.assert_close(together.weight, torch.stack(alone).mean(0), rtol=1e-9, atol=0)


def test_eigenvalues_at_requested_steps():
    h1, h2 = features(2, 24)
    layer = LastLayer("simclr", h1, h2, normal(DIM, NUM_FEATURES, seed=7), normal(DIM, seed=8))
    all_steps = layer.simulate([0.01] * 20, 0.9)
    assert all_steps.steps.tolist() == list(range(21)) and all_steps.eigenvalues.shape == (21, DIM)
    some = layer.simulate([0.01] * 20, 0.9, measured_at=(20, 3, 0, 3))
    assert some.steps.tolist() == [0, 3, 20]
    torch.testing.assert_close(some.eigenvalues, all_steps.eigenvalues[[0, 3, 20]], rtol=1e-12, atol=0)
    z1, z2 = (h.flatten(0, 1) @ all_steps.weight.T + all_steps.bias for h in (h1, h2))
    expected = measure("tangent_covariance", [z1, z2])[0]
    torch.testing.assert_close(all_steps.eigenvalues[-1], expected, rtol=1e-9, atol=1e-12)


def wide_features(num_pairs, width=60):
    """Return wide features, possibly of low rank, with most of the variance in noise that the views do not share."""
    content = normal(num_pairs, 6, seed=1) * torch.tensor([1.0, 0.7, 0.5, 0.35, 0.25, 0.18], dtype=torch.float64)
    shared, mixing = content @ normal(6, width, seed=2) / 6, normal(8, width, seed=3)
    return [(shared + normal(num_pairs, 8, seed=4 + k) @ mixing / 4 + 0.3).relu() for k in (0, 1)]


@pytest.mark.parametrize("loss", ["barlow_twins", "vicreg", "simclr"])
def test_projection_on_span_of_features_is_exact(loss):
    h1, h2 = wide_features(12)
    layer = linear_layer(1e-2, in_features=60)
    settings = ANALYTICAL if loss == "barlow_twins" else {}
    whole, projected = (
        LastLayer(loss, h1, h2, layer.weight, layer.bias, num_components=count, **settings) for count in (None, 24)
    )
    expected, actual = (each.simulate([1e-3] * 200, 0.9, weight_decay=0.01) for each in (whole, projected))
    torch.testing.assert_close(actual.eigenvalues, expected.eigenvalues, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(actual.weight @ h1.T, expected.weight @ h1.T, rtol=1e-8, atol=1e-12)


def test_projection_keeps_fastest_modes():
    """A fifth of the directions give the steps of Barlow Twins; principal components alone do not."""
    h1, h2 = wide_features(300)
    weight, rates = 1e-4 * normal(3, 60, seed=7), [0.005] * 1200
    whole, projected = (
        LastLayer("barlow_twins", h1, h2, weight, num_components=count, **ANALYTICAL) for count in (None, 12)
    )
    expected, actual = (
        (each.simulate(rates, 0.9).eigenvalues > 0.1).long().argmax(0).double() for each in (whole, projected)
    )
    assert (expected > 0).all()
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=1)
    principal = torch.linalg.svd(torch.cat([h1, h2]), full_matrices=False).Vh[:12].T
    alone = LastLayer("barlow_twins", h1 @ principal, h2 @ principal, weight @ principal, **ANALYTICAL)
    late = (alone.simulate(rates, 0.9).eigenvalues > 0.1).long().argmax(0).double()
    assert (late[2] == 0) | (late[2] > 1.05 * expected[2])


def test_simclr_is_finite_for_zero_features():
    h1, h2 = features(1, 24)
    h1[0, 3] = 0.0
    layer = linear_layer(1.0, bias=False)
    simulated = LastLayer("simclr", h1, h2, layer.weight).simulate([0.01] * 20, 0.9)
    train(layer, "simclr", h1, h2, [0.01] * 20, 0.9)
    assert error(simulated.weight, layer.weight) < 1e-10


def test_diverged_weights_have_infinite_eigenvalues():
    h1, h2 = features(24)
    simulated = LastLayer("barlow_twins", h1, h2, normal(DIM, NUM_FEATURES), **ANALYTICAL).simulate([10.0] * 50)
    assert simulated.eigenvalues[0].isfinite().all() and simulated.eigenvalues[-1].isinf().all()
    assert not simulated.eigenvalues.isnan().any()


def test_invalid_arguments_raise():
    (h1, h2), weight = features(24), normal(DIM, NUM_FEATURES)
    with pytest.raises(ValueError, match=r"weight must be \(d, m\) with m = 16 features, .* got \(5, 15\)"):
        LastLayer("vicreg", h1, h2, weight[:, 1:])
    with pytest.raises(ValueError, match=r"bias \(d,\) or None, got \(5, 16\) and \(4,\)"):
        LastLayer("vicreg", h1, h2, weight, torch.zeros(4))
    with pytest.raises(ValueError, match="num_components must lie between 1 and the 16 features, got 17"):
        LastLayer("vicreg", h1, h2, weight, num_components=17)
    with pytest.raises(ValueError, match="weight and bias must be finite"):
        LastLayer("vicreg", h1, h2, weight * math.nan)
    with pytest.raises(ValueError, match="driven_matrix must be one of cross_correlation, covariance"):
        LastLayer("vicreg", h1, h2, weight, driven_matrix="C")
    with pytest.raises(ValueError, match="settings are for losses given by name, got temperature"):
        LastLayer(simclr_loss, h1, h2, weight, temperature=0.1)
    with pytest.raises(ValueError, match="must return a float64 scalar for float64 embeddings, got torch.float32"):
        LastLayer(lambda z1, z2: (z1 * z2).sum().float(), h1, h2, weight).simulate([0.1])
    layer = LastLayer("vicreg", h1, h2, weight, torch.zeros(DIM))
    with pytest.raises(ValueError, match=r"one for each step \(T,\), .* got rates of shape \(\)"):
        layer.simulate(0.1)
    with pytest.raises(ValueError, match="measured_at must be steps between 0 and 3, .* got 0 to 4"):
        layer.simulate([0.1] * 3, measured_at=[0, 4])
    with pytest.raises(ValueError, match=r"of shapes \[\(5, 16\), \(5,\)\], got \[\(5, 16\)\]"):
        layer.simulate([0.1], 0.9, velocity=[torch.zeros(5, 16)])


@pytest.mark.parametrize("loss", ["barlow_twins", "vicreg"])
def test_in_turn_uses_one_batch_per_step(loss):
    h1, h2 = features(3, 24)
    layer, settings = linear_layer(0.1), ANALYTICAL if loss == "barlow_twins" else {"eps": 0.1}
    simulated = LastLayer(loss, h1, h2, layer.weight, layer.bias, in_turn=True, **settings).simulate([0.002] * 40, 0.9)
    optimizer = torch.optim.SGD(layer.parameters(), 0.002, 0.9)
    for step in range(40):
        optimizer.zero_grad()
        LOSSES[loss](layer(h1[step % 3]), layer(h2[step % 3]), **settings).backward()
        optimizer.step()
    assert error(simulated.weight, layer.weight) < 1e-10

"""Public functions of tensors on a device: the same results as on the CPU."""

from functools import cache
from unittest import mock

import pytest
import torch
from pretend_gpu import PretendGPU
from test_precision import CALLS, network, pairs
from torch import Tensor
from torch.nn.functional import normalize

import stepwise_lightning
from stepwise_lightning import AcceleratedBarlowTwins, SpectrumRecord, data, modes, spectrum, theory
from stepwise_lightning.callbacks.classifiers import knn_scores
from stepwise_lightning.data import crop_pairs
from stepwise_lightning.encoders import MLP, Encoder, LinearEncoder, Projector, ResNet, scale_last_layer
from stepwise_lightning.features import capture
from stepwise_lightning.forecasts import learning_rates
from stepwise_lightning.forecasts.sgd import SGDSettings
from stepwise_lightning.forecasts.simulate import forecast, forecast_of_features
from stepwise_lightning.losses import LOSSES
from stepwise_lightning.modes import Modes, attributes, mode_worth, sensitivity, variations
from stepwise_lightning.modules import acceleration
from stepwise_lightning.spectrum import detect_rises
from stepwise_lightning.spectrum.measures import tangent_coordinates
from stepwise_lightning.theory.stability import diverging_fraction

GENERATOR = torch.Generator().manual_seed(4)
LABELS = torch.arange(12) % 3
IMAGES = torch.randint(0, 256, (12, 3, 9, 8), generator=GENERATOR, dtype=torch.uint8)
FEATURES = [torch.randn(2, 6, 4, generator=GENERATOR) for _ in range(2)]
WEIGHT, BIAS = 0.1 * torch.randn(2, 4, generator=GENERATOR), torch.tensor([1.0, 0.5])
TIMES, CURVES = torch.arange(1, 12).float(), torch.arange(1, 12).float()[:, None] ** torch.tensor([2.0, 1, 0])
FEW_STEPS = mock.patch.multiple(learning_rates, _STARTS=2, _STEPS=3, _LATE_STEPS=1)


def losses(function):
    """Return the values of a function of a loss for all names and for a loss given as a function."""
    cases = [*LOSSES, stepwise_lightning.spectral_contrastive_loss]
    return lambda *tensors: [value for loss in cases for value in function(loss, *tensors)]


def growth(loss, *features):
    return [theory.growth_matrix(loss, *features, dim=2)]


def anisotropic_loss(z1, z2):
    return (z1 - z2).square().sum() / len(z1) - z1.var(0)[0]


def signature(h1, h2, bias):
    features = theory.two_tower_features(h1, h2)
    modes = theory.growth_modes(anisotropic_loss, *features, 2, 3)
    cosine = theory.growth_modes("simclr", h1, h2, 2, 3, bias)
    found = theory.loss_signature("simclr", 2, 6, bias)
    value = torch.tensor(theory.saddle_value("simclr", 6, 2, bias))
    matrix = theory.growth_matrix(stepwise_lightning.simclr_loss, h1, h2, 2, bias_norm=1.0)
    return [*features, modes.rates, cosine.rates, cosine.directions, found.a, found.b, value, matrix]


def simulation(loss, h1, h2, weight, bias):
    layer = theory.LastLayer(loss, h1, h2, weight, bias)
    end = layer.simulate([1e-2] * 3, 0.9, velocity=[weight, bias])
    return [end.eigenvalues, end.weight, end.bias]


def rates(loss, h1, h2, weight, bias):
    values = []
    for settings in ({}, {"normalize": False, "center": True}) if loss == "barlow_twins" else ({},):
        sgd = SGDSettings.of(network(), 0, 5, loss, settings, 1e-2)
        with FEW_STEPS:
            limits = learning_rates.stable_rates(sgd, h1, h2, weight, bias, None, 1e-3, scale_invariant=False)
        values.append(torch.tensor(limits))
    return values


def forecasts(loss, h1, h2, weight, bias):
    sgd = SGDSettings.of(network(), 0, 5, loss, {}, h1.new_full((5,), 1e-2))
    result = forecast_of_features(sgd, h1, h2, weight, bias, velocity=[weight, bias], with_rates=False)
    steps = torch.arange(4.0).to(h1.device)
    return [result.eigenvalues, result.step_times, result.at(steps), result.reliable_eigenvalues(steps)]


def forecast_of_module(a, b):
    module = network().to(a.device)
    options = {"loss": "barlow_twins", "settings": {"normalize": False}, "learning_rate": 1e-2}
    with FEW_STEPS:
        return [forecast(module, [pair], 5, **options).eigenvalues for pair in ([a, b], [a.cpu(), b.cpu()])]


def coordinates(a, b, labels):
    values = []
    for matrix in ("cross_correlation", "covariance", "normalized_covariance", "tangent_covariance"):
        found = Modes.of([a, b], matrix)
        values += [found.coordinates(a), found.coordinates(b.cpu()), mode_worth([a, b], labels, matrix)]
    return values


def worth(a, b, labels):
    held_out = [b, labels], [b, labels.cpu()]
    return [
        mode_worth(a, values, classifier=classifier, held_out=pair)
        for values in (labels, labels.cpu())
        for classifier in ("ridge", "knn")
        for pair in (None, *held_out)
    ]


def relations(images, labels, a):
    values = attributes.image_attributes(images / 255.0)
    return [
        *values.values(), *(attributes.correlations(a, value) for value in values.values()),
        attributes.correlations(a, 0 * a[:, 0]), attributes.explained_share(a, dict(list(values.items())[:2])),
        attributes.class_share(a, labels), attributes.class_share(a, labels.cpu()),
        *(measure(a.reshape(6, 2, 4)) for measure in (variations.invariance, variations.intraclass_correlation)),
    ]  # fmt: skip


def sensitivities(images):
    encoder, x = MLP(216, [5], 3, seed=0).to(images.device), images / 255.0 - 0.5
    found = Modes.of(encoder(x).detach())
    return [sensitivity.mean_gradients(encoder, found, x), sensitivity.occlusion_maps(encoder, found, x)]


def record(times, values):
    result = SpectrumRecord.of(times, values, losses=values[:, 0], steps=times.int())
    result.predict(values)
    return [*result.arrays().values(), result.detect_steps().step_times]


def encoders(x):
    modules = [
        LinearEncoder(216, 2, seed=0), MLP(216, [4], 2, seed=0), Projector(216, 2, 2, 4, seed=0), ResNet(seed=0),
        Encoder(2, seed=0, alpha=0.1, bias_norm=1.0),
    ]  # fmt: skip
    inputs = [x, x, x.flatten(1), x, x]
    outputs = [module.to(x.device)(view) for module, view in zip(modules, inputs, strict=True)]
    return [*outputs, scale_last_layer(modules[1], 0.5, 1.0, seed=3)[-1].bias]


def steered(a, b):
    c, s = (theory.feature_cross_correlation(z, z) for z in (a, b))
    module = AcceleratedBarlowTwins(MLP(4, [5], 2, seed=0), 1e-2, "lyapunov").to(a.device)
    loss = sum(module.loss_terms(module(a), module(b)).values())
    loss.backward()
    return [acceleration.gate(c), acceleration.lyapunov(c, s), loss, *(p.grad for p in module.parameters())]


FURTHER_CALLS = {
    "losses": (lambda a, b: [loss.function(a, b) for loss in LOSSES.values()], *pairs()),
    "simclr_loss": (lambda a, b: stepwise_lightning.simclr_loss(a, b, 0.01), *pairs()),
    "growth_matrix": (losses(growth), *pairs()),
    "loss_signature": (signature, *FEATURES, BIAS),
    "FeatureMoments": (
        lambda a, b: [v for v in vars(theory.FeatureMoments.of(a, b)).values() if isinstance(v, Tensor)],
        *pairs(),
    ),
    "minimum_norm": (theory.minimum_norm, TIMES + 1),
    "heavy_ball_growth": (lambda x: list(theory.heavy_ball_growth(x, 0.9)), TIMES),
    "diverging_fraction": (lambda x: diverging_fraction(x, 0.5), TIMES / 4),
    "LastLayer": (losses(simulation), *FEATURES, WEIGHT, BIAS),
    "stable_rates": (losses(rates), *FEATURES, WEIGHT, BIAS),
    "forecast_of_features": (losses(forecasts), *FEATURES, WEIGHT, BIAS),
    "forecast": (forecast_of_module, *FEATURES[0][:, :, :4]),
    "EmpiricalNTK": (
        lambda a, b: theory.EmpiricalNTK(network().to(a.device))(a, b),
        *pairs(),
    ),
    "detect_rises": (lambda times, values: list(detect_rises(times, values)[:2]), TIMES, CURVES),
    "tangent_coordinates": (lambda a, b: [tangent_coordinates(a), tangent_coordinates(b)], *pairs()),
    "Modes": (coordinates, *pairs(), LABELS),
    "mode_worth": (worth, *pairs(), LABELS),
    "attributes": (relations, IMAGES, LABELS, pairs()[0]),
    "sensitivity": (sensitivities, IMAGES),
    "crop_pairs": (lambda images: list(crop_pairs(images, 5, 6, seed=0)), IMAGES),
    "SpectrumRecord": (record, TIMES, CURVES),
    "encoders": (encoders, IMAGES / 255.0),
    "capture": (lambda a, b: capture(network().to(a.device), [a, b], ["0", ""])["0"], *pairs()),
    "acceleration": (steered, *pairs()),
    "knn_scores": (lambda a, b, n: knn_scores(a, normalize(b), n, 3, 5, 0.1), *pairs(), LABELS),
}
ALL_CALLS = CALLS | FURTHER_CALLS

# Public names that a case with another name covers, that test_device_training.py covers, or without tensors.
IN_OTHER_CASES = {
    "AcceleratedBarlowTwins", "BarlowTwins", "Encoder", "Forecast", "GrowthModes", "JointEmbedding",
    "LinearEncoder", "LossSignature", "MLP", "Projector", "ResNet", "SimCLR", "SpectralContrastive", "VICReg",
    "alpha_req", "barlow_twins_loss", "check_loss", "crossing_times", "effective_rank", "growth_modes",
    "participation_ratio", "saddle_value", "scale_last_layer", "spectral_contrastive_loss", "two_tower_features",
    "vicreg_loss",
}  # fmt: skip
IN_TRAINING = {"LastCheckpoint", "OnlineKNN", "OnlineLinearProbe", "SpectrumLogger", "TwoViewDataModule"}
WITHOUT_DEVICE_TENSORS = {
    "CollapseMonitor", "CollapseWatch", "Comparison", "Diagnosis", "FixedCropPairs", "ForecastLogger", "ImageSet",
    "LossReport", "MATRICES", "ModeDescription", "Plateau", "PlateauMonitor", "ReferenceBand", "Rises", "Steps",
    "chance_alignment", "describe_modes", "diagnose", "download_images", "find_plateau", "load_encoder",
    "load_image_set", "load_images", "plateaus", "stability_limits", "write_projector",
}  # fmt: skip


def test_every_public_name_has_a_case():
    names = {name for package in (stepwise_lightning, spectrum, theory, data, modes) for name in package.__all__}
    exempt = IN_OTHER_CASES | IN_TRAINING | WITHOUT_DEVICE_TENSORS
    missing = {name for name in names - ALL_CALLS.keys() - exempt if not name.startswith("__")}
    assert not missing, f"add {sorted(missing)} to FURTHER_CALLS, or to a set of exempt names"
    assert exempt <= names, f"no public names: {sorted(exempt - names)}"


def results(call, inputs):
    values = call(*inputs)
    return [v.detach() for v in (values if isinstance(values, (list, tuple)) else [values])]


@cache
def results_on_the_cpu(name):
    call, *inputs = ALL_CALLS[name]
    return results(call, inputs)


def assert_close(values, expected):
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value.double(), other.double(), rtol=1e-5, atol=1e-6, equal_nan=True)


# Expensive cases without casts that other cases do not have.
SLOW_ON_MPS = ("forecast", "stable_rates", "encoders")
ON_DEVICES = [
    pytest.param(name, kind, marks=pytest.mark.slow if kind == "mps" and name in SLOW_ON_MPS else ())
    for name in ALL_CALLS
    for kind in ("cuda", "mps")
]


@pytest.mark.parametrize(("name", "kind"), ON_DEVICES)
def test_results_on_a_device_equal_those_on_the_cpu(name, kind):
    call, *inputs = ALL_CALLS[name]
    with PretendGPU(kind) as gpu:
        values = [v.cpu() for v in results(call, [value.to(gpu.device) for value in inputs])]
    assert_close(values, results_on_the_cpu(name))


@pytest.mark.parametrize("name", ALL_CALLS)
def test_results_do_not_depend_on_the_default_device(name):
    call, *inputs = ALL_CALLS[name]
    with PretendGPU("cuda"), torch.device("cuda"):
        values = [v.cpu() for v in results(call, inputs)]
    assert_close(values, results_on_the_cpu(name))

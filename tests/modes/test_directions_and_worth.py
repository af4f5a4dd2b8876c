"""Modes and the accuracy of classifiers on them, against plain loops and in cases with known answers."""

import pytest
import torch

from stepwise_lightning import mode_worth
from stepwise_lightning.modes import Modes
from stepwise_lightning.spectrum import cross_correlation_eigenvalues, embedding_eigenvalues
from stepwise_lightning.spectrum.matrices import MATRICES
from stepwise_lightning.spectrum.measures import measure

GENERATOR = torch.Generator().manual_seed(0)
Z = torch.randn(2, 40, 6, generator=GENERATOR) * torch.logspace(0, -1.5, 6) + 0.4
Z[1] = Z[0] + 0.1 * Z[1]
LABELS = torch.randint(0, 3, (40,), generator=GENERATOR)
LABELS[:5] = -1


@pytest.mark.parametrize("matrix", MATRICES)
def test_eigenvalues_equal_the_measured_spectrum(matrix):
    modes = Modes.of(list(Z), matrix)
    expected, _ = measure(matrix, list(Z), center=True)
    torch.testing.assert_close(modes.eigenvalues, expected[: len(modes)], rtol=1e-9, atol=1e-15)
    assert len(modes) == (5 if matrix == "tangent_covariance" else 6)
    torch.testing.assert_close(modes.directions.T @ modes.directions, torch.eye(len(modes), dtype=torch.float64))
    assert (modes.directions.gather(0, modes.directions.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("matrix", MATRICES)
def test_matrix_of_the_coordinates_is_diagonal(matrix):
    modes = Modes.of(list(Z), matrix)
    first, second = (modes.coordinates(z) for z in Z)
    if matrix == "cross_correlation":
        torch.testing.assert_close(cross_correlation_eigenvalues(first, second, center=True), modes.eigenvalues)
        product = (first - first.mean(0)).T @ (second - second.mean(0)) / 40
        product = (product + product.T) / 2
    else:
        both = torch.cat([first, second])
        torch.testing.assert_close(embedding_eigenvalues(both), modes.eigenvalues)
        product = both.T @ both / 80
    torch.testing.assert_close(product, modes.eigenvalues.diag(), rtol=1e-9, atol=1e-12)


def test_directions_without_variance_are_omitted():
    assert len(Modes.of(torch.ones(9, 4))) == 0
    assert len(Modes.of(torch.randn(5, 300, generator=GENERATOR))) == 4  # fewer samples than dimensions


def test_coordinates_are_differentiable():
    modes = Modes.of(list(Z), "tangent_covariance")
    z = Z[0, :3].double().requires_grad_()
    assert torch.autograd.gradcheck(modes.coordinates, z)


def refitted_ridge(x, labels, left_out, penalty):
    """Predict the class of one input by a ridge regression on the others, from the normal equations."""
    views, n, _ = x.shape
    others = torch.tensor([i for i in range(n) if i != left_out])
    rows, names = x[:, others].flatten(0, 1), labels[others].repeat(views)
    design = torch.cat([torch.ones(len(rows), 1, dtype=rows.dtype), rows], 1)
    shrink = penalty * views * n * torch.eye(design.shape[1], dtype=rows.dtype)
    shrink[0, 0] = 0
    targets = torch.nn.functional.one_hot(names, 3).double()
    # The intercept is not penalised: centring, as in the closed form, does not change the predictions.
    weights = torch.linalg.solve(design.T @ design + shrink, design.T @ targets)
    queries = torch.cat([torch.ones(views, 1, dtype=rows.dtype), x[:, left_out]], 1)
    return (queries @ weights).argmax(1)


@pytest.mark.parametrize("classifier", ["ridge", "knn"])
def test_leave_one_out_accuracy_equals_a_loop(classifier):
    modes, known = Modes.of(list(Z), "cross_correlation"), LABELS >= 0
    coordinates = torch.stack([modes.coordinates(z) for z in Z])
    x, labels = (coordinates / coordinates.flatten(0, 1).square().mean(0).sqrt())[:, known], LABELS[known]
    worth = mode_worth(list(Z), LABELS, "cross_correlation", 4, classifier, neighbours=1)
    assert worth.shape == (5,) and float(worth[0]) == int(labels.bincount().max()) / len(labels)
    for k in range(1, 5):
        num_correct = 0
        for i in range(len(labels)):
            if classifier == "ridge":
                answers = refitted_ridge(x[..., :k], labels, i, 0.01)
            else:
                distances = torch.cdist(x[:, i, :k], x[..., :k].flatten(0, 1)).unflatten(1, x.shape[:2])
                distances[:, :, i] = torch.inf
                answers = labels.repeat(2)[distances.flatten(1).argmin(1)]
            num_correct += int((answers == labels[i]).sum())
        assert float(worth[k]) == num_correct / (2 * len(labels))


def test_accuracy_rises_with_the_mode_that_separates_the_classes():
    """The third of four independent modes separates the classes; the others are noise."""
    n = 600
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([8.0, 4, 2, 1])
    labels = (x[:, 2] > 0).long()
    for classifier in ("ridge", "knn"):
        worth = mode_worth(x, labels, classifier=classifier)
        assert worth[:3].max() < 0.6 and worth[3:].min() > 0.85
    held_out = mode_worth(x[:300], labels[:300], held_out=(x[300:], labels[300:]))
    assert held_out[:3].max() < 0.62 and held_out[3] > 0.95
    permuted = labels[torch.randperm(n, generator=torch.Generator().manual_seed(2))]
    assert mode_worth(x, permuted).max() < 0.6


def test_accuracy_is_independent_of_scale_and_dtype():
    worth = mode_worth(list(Z), LABELS)
    torch.testing.assert_close(mode_worth([z.double() * 1e-6 for z in Z], LABELS), worth)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Z[0], LABELS[:-1]), "labels"),
        ((Z[0], LABELS, "covariance", None, "svm"), "classifier must be one of ridge, knn"),
        ((Z[0], LABELS, "C"), "unknown matrix 'C'; choose from"),
        ((Z[0], LABELS, "cross_correlation"), "cross_correlation needs two views, got 1"),
        ((Z[0], torch.full((40,), -1)), "fewer than two inputs have a label"),
        ((Z[0] * torch.nan, LABELS), "NaN"),
        ((Z[0], LABELS, "covariance", None, "ridge", (Z[0, :, :2], LABELS)), "held-out representations have 2 dim"),
    ],
)
def test_invalid_arguments_raise_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        mode_worth(*arguments)
    assert "\n" not in str(error.value)

"""Learning dynamics of other papers: critical times of JEPA, steps of word2vec, growth with IsoLoss."""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from reproduce.losses import isoloss
from stepwise_lightning.spectrum import crossing_times
from stepwise_lightning.theory import LinearBarlowTwins, growth_matrix, growth_modes, subspace_alignment

F64 = torch.float64


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=F64)


# Deep linear JEPA: Littwin et al., NeurIPS 2024 (arXiv 2407.03475). All layers of the encoder and the predictor are
# orthogonal times w; feature i has covariance λ_i between context and target and regression coefficient ρ_i.
DEPTH, COVARIANCES, COEFFICIENTS = 2, torch.tensor([0.9, 0.9], dtype=F64), torch.tensor([1.0, 0.6], dtype=F64)


def jepa_loss(z1: Tensor, z2: Tensor, predictor: Tensor) -> Tensor:
    return (z1 @ predictor.T - z2.detach()).square().sum(1).mean() / 2


def jepa_views() -> tuple[Tensor, Tensor]:
    """Return context and target, (8, 2): orthogonal features, and noise in the target."""
    columns = torch.linalg.qr(normal(8, 4)).Q * math.sqrt(8)
    context = columns[:, :2] * (COVARIANCES / COEFFICIENTS).sqrt()
    return context, context * COEFFICIENTS + columns[:, 2:]


def critical_time(start: Tensor, end: Tensor) -> Tensor:
    """Return ∫ dw / (λ w^2L (1 − w/ρ)) by partial fractions, for each feature."""

    def antiderivative(w: Tensor) -> Tensor:
        powers = sum(w ** (1 - k) / (1 - k) / COEFFICIENTS ** (2 * DEPTH - k) for k in range(2, 2 * DEPTH + 1))
        return powers + (w / (COEFFICIENTS - w)).log() / COEFFICIENTS ** (2 * DEPTH - 1)

    return (antiderivative(end) - antiderivative(start)) / COVARIANCES


def growth_rates(w: float, rotation: Tensor) -> Tensor:
    """Return the growth rate of each feature in the last layer of the encoder."""
    lower = w ** (DEPTH - 1) * rotation
    loss = partial(jepa_loss, predictor=w * torch.eye(2, dtype=F64))
    context, target = (view @ lower for view in jepa_views())
    modes = growth_modes(loss, context, target, dim=2, num_modes=2)
    return modes.rates[(modes.directions @ lower.T).norm(dim=1).argmax(0)]


def test_critical_times_of_jepa_follow_from_growth_modes():
    rotation, other = (torch.linalg.qr(normal(2, 2) + k * torch.eye(2)).Q for k in (1, 2))
    start, end = torch.full((2,), 0.3, dtype=F64), 0.7 * COEFFICIENTS
    critical = critical_time(start, end)
    points, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(6))
    for feature, (low, high) in enumerate(zip(start.log(), end.log(), strict=True)):
        w = ((high + low + (high - low) * points) / 2).exp()
        rates = torch.stack([growth_rates(float(x), rotation)[feature] for x in w])
        time = (high - low) / 2 * (weights / rates).sum()
        torch.testing.assert_close(time, critical[feature], rtol=1e-4, atol=0)

    # The same from training; both covariances are equal, and a small start favours the larger coefficient.
    layers = [start[0] * layer for layer in (rotation.T, other @ rotation, torch.eye(2).double())]
    layers = [layer.clone().requires_grad_() for layer in layers]
    (context, target), rate, path = jepa_views(), 0.05, []
    while not path or len(path) * rate < 1.1 * float(critical.max()):
        encoder = layers[1] @ layers[0]
        path.append(encoder.detach().norm(dim=0) / end**DEPTH / 2)
        loss = jepa_loss(context @ encoder.T, target @ encoder.T, layers[2])
        for layer, gradient in zip(layers, torch.autograd.grad(loss, layers), strict=True):
            layer.data -= rate * gradient
    measured = crossing_times(rate * torch.arange(len(path), dtype=F64), torch.stack(path))
    torch.testing.assert_close(measured, critical, rtol=0.02, atol=0)
    first, second = critical_time(start / 3, end)
    assert first < 0.9 * second


# Quadratic approximation of word2vec: Karkada et al., NeurIPS 2025 (arXiv 2502.09863).
def word_pairs(vocabulary: int = 30, length: int = 2000) -> tuple[Tensor, Tensor]:
    """Return pairs of neighbouring words of a text in which each of three topics has its own words, as indices."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.randint(3, (length // 20,), generator=generator).repeat_interleave(20)
    scores = normal(3, vocabulary)
    words = torch.multinomial((1.2 * scores).softmax(1)[topics], 1, generator=generator).flatten()
    return words[:-1], words[1:]


def test_closed_form_predicts_the_steps_of_word2vec():
    first, second = word_pairs()
    joint = torch.zeros(30, 30, dtype=F64).index_put_((first, second), torch.ones(1, dtype=F64), accumulate=True)
    joint = (joint + joint.T) / joint.sum() / 2
    independent = joint.sum(0).outer(joint.sum(0))
    target = 2 * (joint - independent) / (joint + independent)
    eigenvalues, eigenvectors = (x.flip(-1)[..., :3] for x in torch.linalg.eigh(target))
    rate, embedding = 0.05 / float(eigenvalues[0]), 1e-5 * normal(30, 3)
    theory = LinearBarlowTwins(target / 4, 2 * torch.linalg.solve(target, embedding).T, learning_rate=rate)
    predicted, path = theory.crossing_times() / rate, []
    while len(path) < 1.2 * float(predicted.max()):
        path.append(torch.linalg.eigvalsh(embedding.T @ embedding).flip(0) / eigenvalues)
        embedding.requires_grad_()
        similarity = embedding @ embedding.T
        attraction, repulsion = similarity.square() / 4 - similarity, similarity.square() / 4 + similarity
        loss = ((joint * attraction + independent * repulsion) / (joint + independent)).sum()
        embedding = (embedding - rate * torch.autograd.grad(loss, embedding)[0]).detach()
    measured = crossing_times(torch.arange(len(path), dtype=F64), torch.stack(path))
    torch.testing.assert_close(measured, predicted, rtol=0.02, atol=0)
    assert subspace_alignment(embedding, eigenvectors) > 0.99
    assert measured[1] > 1.2 * measured[0]


def test_growth_matrix_of_word2vec_is_the_excess_of_co_occurrence():
    words = [one_hot(index[:300], 30).to(F64) for index in word_pairs()]

    def word2vec_loss(z1: Tensor, z2: Tensor) -> Tensor:
        similarities = z1 @ z2.T
        return softplus(-similarities.diagonal()).mean() + softplus(similarities).mean()

    joint, (p1, p2) = words[0].T @ words[1] / 300, (h.mean(0) for h in words)
    expected = (joint + joint.T - p1.outer(p2) - p2.outer(p1)) / 2
    torch.testing.assert_close(growth_matrix(word2vec_loss, *words, dim=4), expected, rtol=0, atol=1e-15)


# Halvagal et al., NeurIPS 2023 (arXiv 2212.04858).
def byol_loss(z1: Tensor, z2: Tensor) -> Tensor:
    moment = (z1.T @ z1 + z2.T @ z2).detach() / (2 * len(z1))
    return ((z1 @ moment - z2.detach()).square() + (z2 @ moment - z1.detach()).square()).sum() / len(z1)


def test_isoloss_grows_as_barlow_twins_and_byol_with_its_predictor_does_not_grow():
    h1, h2 = normal(2, 12, 5)
    expected = growth_matrix("barlow_twins", h1, h2, dim=3, normalize=False)
    torch.testing.assert_close(growth_matrix(isoloss, h1, h2, dim=3), expected, rtol=1e-9, atol=1e-9)
    assert not growth_matrix(byol_loss, h1, h2, dim=3).any()

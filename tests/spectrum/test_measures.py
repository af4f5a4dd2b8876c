"""Eigenvalues of known spectra and against brute force; rank measures against their definitions."""

import math

import numpy as np
import pytest
import torch

from stepwise_lightning.spectrum import (
    alpha_req,
    cross_correlation_eigenvalues,
    effective_rank,
    embedding_eigenvalues,
    participation_ratio,
    rankme,
)
from stepwise_lightning.spectrum.measures import measure


def orthonormal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "d"), [(200, 10), (30, 80)])
def test_eigenvalues_are_accurate_to_1e_12_of_the_largest(n, d):
    rank = min(n, d)
    exact = torch.logspace(2, -10, rank, dtype=torch.float64)
    z = n**0.5 * (orthonormal(n, rank, 0) * exact.sqrt()) @ orthonormal(d, rank, 1).T
    eigenvalues = embedding_eigenvalues(z, center=False)
    assert eigenvalues.shape == (d,) and eigenvalues.dtype == torch.float64
    torch.testing.assert_close(eigenvalues[:rank], exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(cross_correlation_eigenvalues(z, z)[:rank], exact, rtol=1e-3, atol=0)
    assert (eigenvalues[rank:] == 0).all()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("n", "d"), [(50, 7), (6, 40)])
def test_eigenvalues_match_their_definition(n, d, center):
    z1, z2 = normal(n, d, 0) + 1, normal(n, d, 1) + 2
    a, b = (z1 - z1.mean(0), z2 - z2.mean(0)) if center else (z1, z2)
    covariance = sum(torch.outer(row, row) for row in a) / n
    torch.testing.assert_close(embedding_eigenvalues(z1, center), torch.linalg.eigvalsh(covariance).flip(0))
    c = sum(torch.outer(u, v) + torch.outer(v, u) for u, v in zip(a, b, strict=True)) / (2 * n)
    torch.testing.assert_close(cross_correlation_eigenvalues(z1, z2, center), torch.linalg.eigvalsh(c).flip(0))


def test_float32_embeddings_are_cast_to_float64_first():
    exact = torch.tensor([1.0, 1e-10], dtype=torch.float64)
    z = (orthonormal(64, 2, 0) * exact.sqrt() * 8).float()  # a float32 covariance would lose 1e-10
    torch.testing.assert_close(embedding_eigenvalues(z, center=False), exact, rtol=1e-3, atol=0)


def test_rank_measures_of_known_spectra():
    flat = torch.tensor([[2.0, 2, 2, 2], [5, 0, 0, 0], [3, 3, 0, -1e-18]])
    expected = torch.tensor([4.0, 1, 2], dtype=torch.float64)
    torch.testing.assert_close(effective_rank(flat), expected)
    torch.testing.assert_close(participation_ratio(flat), expected)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    assert float(effective_rank(7 * p)) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p.tolist())))
    assert float(participation_ratio(7 * p)) == pytest.approx(1 / (0.25 + 0.09 + 0.04))


def test_alpha_req_recovers_a_power_law_and_ignores_round_off():
    k = torch.arange(1, 60, dtype=torch.float64)
    spectrum = torch.cat([3 * k**-1.4, torch.tensor([1e-18, 0, -1e-18], dtype=torch.float64)])
    assert float(alpha_req(spectrum)) == pytest.approx(1.4)
    x, y = np.log(np.arange(1, 6)), np.log([5.0, 2.0, 1.5, 0.2, 0.1])
    assert float(alpha_req(torch.tensor([5.0, 2.0, 1.5, 0.2, 0.1]).double())) == pytest.approx(-np.polyfit(x, y, 1)[0])
    assert math.isnan(float(alpha_req(torch.tensor([1.0, 0, 0]))))


def test_rankme_matches_its_definition():
    z = normal(40, 6) @ torch.diag(torch.tensor([1.0, 1, 1, 0.1, 0.1, 0]).double())
    sigma = np.linalg.svd(z.numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert float(rankme(z)) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert float(rankme(torch.eye(5))) == pytest.approx(5, abs=1e-5)


def test_collapsed_embedding_has_rank_zero():
    z = torch.ones(20, 4)
    eigenvalues = embedding_eigenvalues(z)
    assert float(effective_rank(eigenvalues)) == float(participation_ratio(eigenvalues)) == 0
    assert float(rankme(torch.zeros(20, 4))) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embedding_eigenvalues(torch.ones(3)), "shape"),
        (lambda: embedding_eigenvalues(torch.ones(0, 3)), "not be empty"),
        (lambda: embedding_eigenvalues(torch.full((3, 2), math.nan)), "NaN"),
        (lambda: rankme(torch.full((3, 2), math.inf)), "infinite"),
        (lambda: cross_correlation_eigenvalues(torch.ones(3, 2), torch.ones(3, 4)), r"\(3, 2\) and \(3, 4\)"),
    ],
)
def test_invalid_input_raises_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("function", [effective_rank, participation_ratio, alpha_req])
@pytest.mark.parametrize(
    "features",
    [normal(40, 6), normal(40, 6).relu().numpy(), normal(8, 3).reshape(2, 4, 3), torch.eye(4), normal(5, 5).tolist()],
    ids=["features", "rectified array", "sequences", "covariance", "lists"],
)
def test_features_are_no_spectrum(function, features):
    with pytest.raises(
        ValueError, match=r"unsorted rows .*: for features \(n, d\) pass embedding_eigenvalues"
    ) as error:
        function(features)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spectrum", "message"),
    [(torch.tensor([1.0, math.nan]), "NaN"), (torch.tensor(3.0), "got a number"), (np.array(["a"]), "array of")],
)
def test_values_that_are_no_spectrum_are_refused(spectrum, message):
    for function in (effective_rank, participation_ratio, alpha_req):
        with pytest.raises(ValueError, match=message):
            function(spectrum)


def test_arrays_and_tensors_give_the_same_measures():
    z, other = normal(30, 5), normal(30, 5, 1)
    eigenvalues = embedding_eigenvalues(z)
    assert torch.equal(embedding_eigenvalues(z.numpy()), eigenvalues)
    assert torch.equal(rankme(z.numpy()), rankme(z)) and torch.equal(rankme(z.tolist()), rankme(z))
    expected = cross_correlation_eigenvalues(z, other)
    assert torch.equal(cross_correlation_eigenvalues(z.numpy(), other.numpy()), expected)
    assert measure("tangent_covariance", [z.numpy()])[1] == measure("tangent_covariance", [z])[1]
    for function in (effective_rank, participation_ratio, alpha_req):
        value = function(eigenvalues)
        assert torch.equal(function(eigenvalues.numpy()), value)
        assert float(function(np.linalg.eigvalsh(np.cov(z.numpy().T, bias=True)))) == pytest.approx(float(value))
        assert function(torch.stack([eigenvalues, 2 * eigenvalues])).tolist() == pytest.approx([float(value)] * 2)


@pytest.mark.parametrize("modes", [1, 2, 4])
def test_tangent_covariance_has_one_mode_per_direction(modes):
    # One point and k directions orthogonal to it, far enough for the curvature of the sphere to matter.
    rng = np.random.default_rng(modes)
    basis = np.linalg.qr(rng.standard_normal((7, modes + 1)))[0]
    z = basis[:, 0] + rng.standard_normal((200, modes)) * rng.uniform(0.5, 2, modes) @ basis[:, 1:].T
    tangent, normalized = (
        measure(matrix, [torch.from_numpy(z)])[0] for matrix in ("tangent_covariance", "normalized_covariance")
    )
    assert (tangent > 1e-12).sum() == modes and (normalized > 1e-12).sum() == modes + 1
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    mean = unit.mean(0) / np.linalg.norm(unit.mean(0))
    projection = np.eye(7) - np.outer(mean, mean)
    expected = np.linalg.eigvalsh(projection @ np.cov(unit.T, bias=True) @ projection)[::-1]
    assert np.allclose(tangent, expected.clip(0), atol=1e-14)

"""Subspace alignment: invariances, known values, and the value for random subspaces."""

import numpy as np
import pytest
import torch

from stepwise_lightning.theory import chance_alignment, subspace_alignment


def draw(n: int = 40, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_alignment_is_symmetric_and_invariant_to_linear_maps_and_permutations():
    f, g = draw(), draw(seed=1)
    value = subspace_alignment(f, g).item()
    assert 0 < value < 0.9 and subspace_alignment(g, f).item() == pytest.approx(value)
    for linear_map in (torch.linalg.qr(draw(4, 4, seed=9)).Q, draw(4, 4, seed=3)):
        assert subspace_alignment(f, 3 * f @ linear_map).item() == pytest.approx(1)
        assert subspace_alignment(f, g @ linear_map).item() == pytest.approx(value)
    permutation = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert subspace_alignment(f[permutation], g[permutation]).item() == pytest.approx(value)
    assert subspace_alignment(f.float(), g.float()).dtype == torch.float64


def test_alignment_counts_common_dimensions():
    q = torch.linalg.qr(draw(40, 6)).Q
    assert subspace_alignment(q[:, :4], q[:, 1:5]).item() == pytest.approx(3 / 4)
    assert subspace_alignment(q[:, :2], q[:, :4]).item() == pytest.approx(1 / 2)
    assert subspace_alignment(torch.cat([q[:, :2], q[:, :2]], 1), q[:, :2]).item() == pytest.approx(1)  # rank 2


def test_alignment_is_mean_squared_cosine_of_principal_angles():
    f, g = draw(), draw(seed=1)
    projections = [z @ torch.linalg.pinv(z) for z in (f, g)]
    assert subspace_alignment(f, g).item() == pytest.approx((projections[0] @ projections[1]).trace().item() / 4)


def test_chance_alignment_is_mean_over_random_subspaces():
    values = [subspace_alignment(draw(seed=s), draw(seed=s + 500)).item() for s in range(200)]
    assert np.mean(values) == pytest.approx(chance_alignment(40, 4), abs=4 * np.std(values) / 200**0.5)
    with pytest.raises(ValueError, match="1 ≤ dimensions ≤ num_points, got 5 and 4"):
        chance_alignment(4, 5)


def test_invalid_embeddings_raise():
    f = draw()
    for wrong, message in (
        (f[:9], r"same points, got shapes \(40, 4\) and \(9, 4\)"), (f[:, 0], "same points"),
        (f * 0, "the second embeddings are zero"), (f / 0, "the second embeddings are zero, or contain NaN"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            subspace_alignment(f, wrong)

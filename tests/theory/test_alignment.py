"""Comparisons of embeddings: what they are blind to, what they see, and what chance gives."""

import numpy as np
import pytest
import torch

from stepwise_lightning.theory import chance_alignment, linear_cka, procrustes_distance, subspace_alignment


def draw(n: int = 40, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(d: int = 4) -> torch.Tensor:
    return torch.linalg.qr(draw(d, d, seed=9)).Q


@pytest.mark.parametrize("compare", [subspace_alignment, lambda f, g: 1 - procrustes_distance(f, g), linear_cka])
def test_rotations_and_scales_do_not_matter_and_order_neither(compare):
    f, g = draw(), draw(seed=1)
    assert compare(f, 3 * f @ rotation()).item() == pytest.approx(1)
    assert compare(f, g @ rotation()).item() == pytest.approx(compare(f, g).item())
    assert compare(f, g).item() == pytest.approx(compare(g, f).item()) and 0 < compare(f, g) < 0.9
    assert compare(f.float(), g.float()).dtype == torch.float64
    permutation = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert compare(f[permutation], g[permutation]).item() == pytest.approx(compare(f, g).item())


def test_subspaces_are_blind_to_any_invertible_map_and_share_dimensions():
    f = draw()
    assert subspace_alignment(f, f @ draw(4, 4, seed=3)).item() == pytest.approx(1)
    assert procrustes_distance(f, f @ torch.diag(torch.tensor([1.0, 1, 1e-3, 1e-3]).double())).item() > 0.2
    q = torch.linalg.qr(draw(40, 6)).Q
    assert subspace_alignment(q[:, :4], q[:, 1:5]).item() == pytest.approx(3 / 4)
    assert subspace_alignment(q[:, :2], q[:, :4]).item() == pytest.approx(1 / 2)
    assert subspace_alignment(torch.cat([q[:, :2], q[:, :2]], 1), q[:, :2]).item() == pytest.approx(1)  # rank 2


def test_subspace_alignment_is_the_mean_squared_cosine_of_the_principal_angles():
    f, g = draw(), draw(seed=1)
    projections = [z @ torch.linalg.pinv(z) for z in (f, g)]
    assert subspace_alignment(f, g).item() == pytest.approx((projections[0] @ projections[1]).trace().item() / 4)


def test_chance_is_what_random_subspaces_give():
    values = [subspace_alignment(draw(seed=s), draw(seed=s + 500)).item() for s in range(200)]
    assert np.mean(values) == pytest.approx(chance_alignment(40, 4), abs=4 * np.std(values) / 200**0.5)
    with pytest.raises(ValueError, match="1 ≤ dimensions ≤ num_points, got 5 and 4"):
        chance_alignment(4, 5)


def test_procrustes_is_the_least_distance_over_rotations():
    f, g = draw(d=2), draw(d=2, seed=1)
    f, g = f / f.norm(), g / g.norm()
    least = min(
        (f - g @ torch.tensor([[c, -s], [s, c]]) @ torch.diag(torch.tensor([1.0, flip]).double())).square().sum().item()
        / 2
        for angle in np.linspace(0, 2 * np.pi, 4001)
        for c, s in [(np.cos(angle), np.sin(angle))]
        for flip in (1.0, -1.0)
    )
    assert procrustes_distance(f, g).item() == pytest.approx(least, abs=1e-6)


def test_cka_is_the_correlation_of_centred_gram_matrices():
    f, g = draw() + 5, draw(seed=1) - 2
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    grams = [(centre @ z @ z.T @ centre).flatten() for z in (f, g)]
    expected = torch.nn.functional.cosine_similarity(*grams, dim=0).item()
    assert linear_cka(f, g).item() == pytest.approx(expected)


def test_bad_input_gets_one_clear_line():
    f = draw()
    for compare in (subspace_alignment, procrustes_distance, linear_cka):
        for wrong, message in (
            (f[:9], r"same points, got shapes \(40, 4\) and \(9, 4\)"), (f[:, 0], "same points"),
            (f * 0, "the second embeddings are zero"), (f / 0, "the second embeddings are zero, or hold NaN"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                compare(f, wrong)
    with pytest.raises(ValueError, match="constant embeddings"):
        linear_cka(f, torch.ones(40, 4))

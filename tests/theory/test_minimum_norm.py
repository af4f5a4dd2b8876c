"""The smallest norm of a global minimum, against constrained minimisation."""

import pytest
import torch
from scipy.optimize import minimize

from stepwise_lightning.theory import ContrastiveKernelPCA, minimum_norm, rbf_kernel

GAMMA = torch.tensor([2.0, 1.0, 0.5, 0.3, -0.4], dtype=torch.float64)


@pytest.mark.parametrize("dim", [1, 3])
def test_minimum_norm_equals_constrained_minimisation(dim):
    """Minimise ‖W‖² subject to W Γ Wᵀ = I, with Γ in a random basis."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=generator)).Q
    gamma = basis * GAMMA @ basis.T
    upper = torch.ones(dim, dim, dtype=torch.bool).triu()

    def violation(flat):
        w = torch.as_tensor(flat).reshape(dim, 5)
        return (w @ gamma @ w.T - torch.eye(dim))[upper].numpy()

    starts = torch.randn(4, dim * 5, dtype=torch.float64, generator=generator)
    results = [
        minimize(lambda w: w @ w, start.numpy(), constraints={"type": "eq", "fun": violation}) for start in starts
    ]
    norms = [result.fun**0.5 for result in results if abs(violation(result.x)).max() < 1e-6]
    assert min(norms) == pytest.approx(float(minimum_norm(GAMMA[:dim])), rel=1e-5)


def test_dimensions_beyond_the_positive_eigenvalues_add_nothing():
    assert minimum_norm(GAMMA) == minimum_norm(GAMMA[:4]) == pytest.approx((0.5 + 1 + 2 + 1 / 0.3) ** 0.5)


def test_norm_of_contrastive_kernel_pca_is_the_minimum():
    x1, x2 = torch.randn(2, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    views = torch.cat([x1, x1 + 0.1 * x2])
    model = ContrastiveKernelPCA(rbf_kernel, 3).fit(*views.chunk(2))
    a = (model.coefficients_ / model.eigenvalues_.sqrt()).T
    torch.testing.assert_close((a @ rbf_kernel(views, views) @ a.T).trace().sqrt(), minimum_norm(model.eigenvalues_))

"""scikit-learn's ``clone`` works with the estimators of ``theory``."""

from functools import partial

import pytest
import torch
from torch import nn

from stepwise_lightning.theory import ContrastiveKernelPCA, EmpiricalNTK, rbf_kernel

clone = pytest.importorskip("sklearn.base").clone


@pytest.mark.parametrize("kernel", [partial(rbf_kernel, length_scale=2.0), EmpiricalNTK(nn.Linear(3, 2))])
def test_clone_is_unfitted_and_fits_equally(kernel):
    x1, x2 = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + 1
    model = ContrastiveKernelPCA(kernel, n_components=1, progress=False).fit(x1, x2)
    copy = clone(model)
    assert "not fitted" in repr(copy) and copy.tolerance == model.tolerance
    torch.testing.assert_close(copy.fit(x1, x2).eigenvalues_, model.eigenvalues_)

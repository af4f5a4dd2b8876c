"""Closed-form predictions. Knows nothing of Lightning."""

from stepwise_lightning.theory.alignment import (
    chance_alignment,
    linear_cka,
    procrustes_distance,
    subspace_alignment,
)
from stepwise_lightning.theory.contrastive import ContrastiveKernelPCA
from stepwise_lightning.theory.kernels import laplace_kernel, linear_kernel, rbf_kernel, relu_ntk
from stepwise_lightning.theory.linear import LinearBarlowTwins, feature_cross_correlation
from stepwise_lightning.theory.ntk import EmpiricalNTK

__all__ = [
    "ContrastiveKernelPCA",
    "EmpiricalNTK",
    "LinearBarlowTwins",
    "chance_alignment",
    "feature_cross_correlation",
    "laplace_kernel",
    "linear_cka",
    "linear_kernel",
    "procrustes_distance",
    "rbf_kernel",
    "relu_ntk",
    "subspace_alignment",
]

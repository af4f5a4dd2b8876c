"""Closed-form predictions. Knows nothing of Lightning."""

from stepwise_lightning.theory.contrastive import ContrastiveKernelPCA
from stepwise_lightning.theory.kernels import laplace_kernel, linear_kernel, rbf_kernel, relu_ntk
from stepwise_lightning.theory.linear import LinearBarlowTwins, feature_cross_correlation

__all__ = [
    "ContrastiveKernelPCA",
    "LinearBarlowTwins",
    "feature_cross_correlation",
    "laplace_kernel",
    "linear_kernel",
    "rbf_kernel",
    "relu_ntk",
]

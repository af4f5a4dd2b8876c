"""Closed-form predictions of learning dynamics. Does not import Lightning."""

from stepwise_lightning.theory.alignment import chance_alignment, subspace_alignment
from stepwise_lightning.theory.contrastive import ContrastiveKernelPCA
from stepwise_lightning.theory.growth import growth_matrix, heavy_ball_growth
from stepwise_lightning.theory.kernels import laplace_kernel, linear_kernel, rbf_kernel, relu_ntk
from stepwise_lightning.theory.last_layer import LastLayer
from stepwise_lightning.theory.linear import LinearBarlowTwins
from stepwise_lightning.theory.linear_flow import GrowthModes, growth_modes, two_tower_features
from stepwise_lightning.theory.loss_signature import LossSignature, loss_signature, saddle_value
from stepwise_lightning.theory.moments import FeatureMoments, feature_cross_correlation, minimum_norm
from stepwise_lightning.theory.ntk.empirical_ntk import EmpiricalNTK
from stepwise_lightning.theory.plateaus import Plateau, find_plateau, plateaus
from stepwise_lightning.theory.stability import stability_limits

__all__ = [
    "ContrastiveKernelPCA",
    "EmpiricalNTK",
    "FeatureMoments",
    "GrowthModes",
    "LastLayer",
    "LinearBarlowTwins",
    "LossSignature",
    "Plateau",
    "chance_alignment",
    "feature_cross_correlation",
    "find_plateau",
    "growth_matrix",
    "growth_modes",
    "heavy_ball_growth",
    "laplace_kernel",
    "linear_kernel",
    "rbf_kernel",
    "loss_signature",
    "minimum_norm",
    "plateaus",
    "relu_ntk",
    "saddle_value",
    "stability_limits",
    "subspace_alignment",
    "two_tower_features",
]

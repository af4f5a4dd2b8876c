"""LightningModules that train an encoder with a loss of two views."""

from stepwise_lightning.modules.joint_embedding import JointEmbedding
from stepwise_lightning.modules.shipped import BarlowTwins, SimCLR, SpectralContrastive, VICReg

__all__ = ["BarlowTwins", "JointEmbedding", "SimCLR", "SpectralContrastive", "VICReg"]

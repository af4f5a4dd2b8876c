"""Closed-form predictions. Knows nothing of Lightning."""

from stepwise_lightning.theory.linear import LinearBarlowTwins, feature_cross_correlation

__all__ = ["LinearBarlowTwins", "feature_cross_correlation"]

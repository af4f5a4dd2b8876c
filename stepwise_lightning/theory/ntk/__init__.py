"""Empirical neural tangent kernels of any module."""

from stepwise_lightning.theory.ntk.empirical_ntk import EmpiricalNTK

__all__ = ["EmpiricalNTK"]

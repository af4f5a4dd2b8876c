"""Spectra of embeddings: eigenvalues, rank measures, and the detection of steps."""

from stepwise_lightning.spectrum.bands import Comparison, ReferenceBand
from stepwise_lightning.spectrum.matrices import MATRICES
from stepwise_lightning.spectrum.measures import (
    alpha_req,
    cross_correlation_eigenvalues,
    effective_rank,
    embedding_eigenvalues,
    measure,
    participation_ratio,
    rankme,
)
from stepwise_lightning.spectrum.steps import (
    Rises,
    Steps,
    crossing_times,
    detect_rises,
    detect_steps,
    num_crossed,
    num_grown,
)

__all__ = [
    "Comparison",
    "MATRICES",
    "ReferenceBand",
    "Rises",
    "Steps",
    "alpha_req",
    "cross_correlation_eigenvalues",
    "crossing_times",
    "detect_rises",
    "detect_steps",
    "effective_rank",
    "embedding_eigenvalues",
    "measure",
    "num_crossed",
    "num_grown",
    "participation_ratio",
    "rankme",
]

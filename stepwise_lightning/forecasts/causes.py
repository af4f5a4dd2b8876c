"""Cause of a plateau or a failure, from the features of a network."""

from __future__ import annotations

import math

from stepwise_lightning.forecasts.diagnosis import CAUSES
from stepwise_lightning.forecasts.evidence import Evidence
from stepwise_lightning.forecasts.run_state import RunState

_EQUAL = 1e-4  # relative spread of features
_SHRUNK = 5.0  # learning rate × weight decay × steps that makes features vanish
_CHANCE = 1.5  # times the largest shared content of permuted pairs
_ROUNDED, _KEPT = 0.5, 0.5
_STRONG_DRIVE = 1.0  # ηρ of a loss without a known limit
_, _HIGH, _DECAY, _CHANCE_PAIRS, _FEATURES, _HALF, _NO_MODE, _FEW, _, _ = CAUSES


def cause_of_failure(evidence: Evidence) -> tuple[str, str]:
    """Return the cause of a divergence or a fall back, from the initial weights, and its numbers."""
    rate = float(evidence.sgd.rates.max())
    if evidence.forecast is not None:
        rates, drive = evidence.forecast.rates, rate * evidence.rate(0)
        if rate > rates.safe:
            return _HIGH, f"it is {rate:.3g}, and {rates.safe:.3g} is safe"
        if math.isnan(rates.safe) and drive > _STRONG_DRIVE:
            return _HIGH, f"learning rate × growth rate is {drive:.2g}, and 0.1 trains well"
    return _cause_of_rounding(evidence)


def _cause_of_rounding(evidence: Evidence) -> tuple[str, str]:
    if evidence.rounding > _ROUNDED:
        return _HALF, f"rounding changes embeddings by {evidence.rounding:.2g} times their spread"
    if evidence.kept < _KEPT:
        return _HALF, f"rounding of the weights leaves {evidence.kept:.0%} of an update"
    return "", ""


def cause_of_plateau(evidence: Evidence, state: RunState, on_saddle: bool) -> tuple[str, str]:
    """Return the cause of a plateau and its numbers; empty strings if features, pairs and growth rates are in order."""
    shrinkage = float(evidence.sgd.rates.max()) * evidence.sgd.weight_decay * state.step / (1 - evidence.sgd.momentum)
    if evidence.spread < _EQUAL and shrinkage > _SHRUNK:
        return _DECAY, f"it has shrunk all weights by a factor of about e^{shrinkage:.0f}"
    if evidence.spread < _EQUAL:
        reading = (
            f"by {evidence.spread:.1g} of their size" if evidence.spread else "by rounding errors only, or not at all"
        )
        return _FEATURES, f"inputs of the last layer vary {reading}"
    if not evidence.shared > _CHANCE * evidence.chance:
        reading = f"the largest shared eigenvalue is {evidence.shared:.2g}, of permuted pairs {evidence.chance:.2g}"
        return _CHANCE_PAIRS, reading
    if on_saddle and (rounding := _cause_of_rounding(evidence))[0]:
        return rounding
    rate, decay = evidence.rate(state.num_learned), evidence.sgd.weight_decay
    no_mode = _NO_MODE, f"the largest growth rate is {evidence.rate(0):.3g}"
    if on_saddle and rate <= 0:
        return no_mode
    if rate <= decay and decay > 0:
        return _DECAY, f"weight decay is {decay:.3g}, the growth rate {rate:.3g}"
    if not on_saddle and state.is_still and evidence.num_growing <= state.num_learned:
        modes = "1 mode has" if evidence.num_growing == 1 else f"{evidence.num_growing} modes have"
        return (_FEW, f"{modes} a positive growth rate") if evidence.num_growing else no_mode
    return "", ""

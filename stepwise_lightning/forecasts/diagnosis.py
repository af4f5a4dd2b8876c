"""Result of a diagnosis, and the causes that it distinguishes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stepwise_lightning.forecasts.run_state import STILL

# Causes of a loss that does not decrease, with their remedies.
CAUSES = {
    "the learning rate is too low": "raise the learning rate, or train longer",
    "the learning rate is too high": "lower the learning rate",
    "weight decay is not below the growth rate": "lower the weight decay",
    "pairs share nothing beyond chance": "check that both views are of one image, and weaken the augmentation",
    "features are equal for all images": "check for equal images, dead units and constant features",
    "half precision loses small differences": "train with precision 32-true, or keep weights and loss in float32",
    "no mode can grow": "change the weights or the temperature of the loss: raise the term that spreads embeddings",
    "few modes can grow": "change the weights or the temperature of the loss: raise the term that spreads embeddings",
    "the loss does not spread embeddings": "raise the weight of its variance, covariance or repulsion, or add one",
    "nothing is wrong": "wait",
}
_VERDICTS = {
    "learning": "The model is learning",
    "plateau": "The model is on a plateau",
    "stuck": "The model is stuck",
    "collapsed": "The embedding has collapsed",
    "fell_back": "The model had learned a mode, and fell back to the plateau before the first one",
    "diverged": "Training has diverged",
    "finished": "Training is finished",
}


@dataclass(frozen=True)
class Diagnosis:
    """State of a training run, and the cause if its loss does not decrease. ``str()`` returns a paragraph."""

    verdict: str  #: ``learning``, ``plateau``, ``stuck``, ``collapsed``, ``fell_back``, ``diverged`` or ``finished``
    step: int  #: last step of the record
    num_learned: int | None = None  #: number of learned modes; None if unknown
    num_modes: int | None = None  #: largest number of modes that can be learned; None if unknown
    loss: float = math.nan  #: last training loss, a median of the last tenth of the steps; NaN if unknown
    saddle_value: float = math.nan  #: loss of equal embeddings, before the first mode is learned; NaN if unknown
    #: Measured factor by which the next mode grows in a step, √(λ_{t+1} / λ_t); NaN if unknown
    growth_per_step: float = math.nan
    expected_growth: float = math.nan  #: the same factor in theory, from the features and the loss; NaN if unknown
    next_step: float = math.nan  #: step at which the next mode is expected; infinite for never, NaN if unknown
    next_range: tuple[float, float] = (math.nan, math.nan)  #: typical range of ``next_step``
    cause: str = ""  #: one of ``CAUSES``, or empty if unknown
    evidence: str = ""  #: numbers that indicate the verdict or the cause
    possible_causes: tuple[str, ...] = ()  #: causes that cannot be excluded, if the cause is unknown
    missing: str = ""  #: what to give for a more complete diagnosis

    @property
    def distance(self) -> float:
        """Last training loss minus saddle value; NaN if unknown."""
        return self.loss - self.saddle_value

    @property
    def remedy(self) -> str:
        """Remedy for the cause; empty if unknown."""
        if self.cause == "nothing is wrong" and math.isfinite(self.next_step):
            return f"wait until step {self.next_step:.0f}"
        return CAUSES.get(self.cause, "")

    def __str__(self) -> str:
        parts = [
            f"{_VERDICTS[self.verdict]} at step {self.step}{self._learned()}",
            self._loss(),
            self._growth(),
            self._next(),
            self._cause(),
            self.missing,
        ]
        return " ".join(f"{part[0].upper()}{part[1:]}." for part in parts if part)

    def _learned(self) -> str:
        if self.num_learned is None:
            return ""
        number = f"{self.num_learned or 'no'} mode{'' if self.num_learned == 1 else 's'}"
        if self.num_modes is not None:
            number = f"{self.num_learned or 'none'} of {self.num_modes} modes"
        return f": {number} {'is' if self.num_learned == 1 else 'are'} learned"

    def _loss(self) -> str:
        if math.isnan(self.loss):
            return ""
        text = f"the loss is {self.loss:.5g}"
        if math.isfinite(self.saddle_value):
            side = "below" if self.distance < 0 else "above"
            text += f", {abs(self.distance):.2g} {side} {self.saddle_value:.5g}, its value while no mode is learned"
        return text

    def _growth(self) -> str:
        if self.verdict in ("fell_back", "diverged", "collapsed", "finished") or math.isnan(self.growth_per_step):
            return ""
        change = self.growth_per_step - 1
        verb = "grows" if change > 0 else "shrinks"
        text = "the next mode does not grow"
        if abs(change) > STILL:
            text = f"the next mode {verb} by {100 * abs(change):.2g} % per step"
        if math.isfinite(self.expected_growth):
            text += f", expected are {100 * (self.expected_growth - 1):.2g} %"
        return text

    def _next(self) -> str:
        if self.verdict in ("fell_back", "diverged", "collapsed", "finished") or math.isnan(self.next_step):
            return ""
        if math.isinf(self.next_step):
            return "it is not expected to be learned"
        low, high = self.next_range
        span = f" ({low:.0f} to {high:.0f})" if math.isfinite(low) and math.isfinite(high) else ""
        return f"it is expected to be learned at about step {self.next_step:.0f}{span}"

    def _cause(self) -> str:
        if self.cause:
            evidence = f" ({self.evidence})" if self.evidence else ""
            return f"cause: {self.cause}{evidence}. Remedy: {self.remedy}"
        if self.possible_causes:
            return f"{self.evidence or 'the cause is unknown'}. Possible causes: {'; '.join(self.possible_causes)}"
        return self.evidence

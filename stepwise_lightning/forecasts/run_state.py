r"""State of a run from its eigenvalues and losses: learned modes, growth of the next one, verdict.

Legend
    λ_k     k-th eigenvalue of the matrix that the loss drives
    θ       threshold above which a mode counts as learned
    r       factor by which a mode grows in a step; its eigenvalue grows by r²
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.losses import INVARIANCE_WEIGHT, VARIANCE_WEIGHT
from stepwise_lightning.spectrum.collapses import find_collapse
from stepwise_lightning.spectrum.record import SpectrumRecord
from stepwise_lightning.theory.loss_derivatives import PairLoss
from stepwise_lightning.theory.plateaus import plateaus

# θ of losses whose first eigenvalue has a known size. Otherwise it is a tenth of the eigenvalue, once it has grown
# a hundredfold.
_THRESHOLDS = {"barlow_twins": 0.1, "spectral_contrastive": 0.1, "vicreg": 0.3, "simclr": 0.03}
_GROWN = 100
_VANISHED = 0.01  # of the largest eigenvalue of the run, for three measurements
_RISING = 0.1  # of θ
_RECENT = 0.1  # share of the steps in which a mode counts as just learned
_MIN_SAMPLES, _MIN_STEPS = 5, 50  # before a run counts as stuck
STILL = 1e-6  # growth per step below which a mode does not grow
DIVERGED = 10  # loss relative to its first value
_NEAR_SADDLE = 0.02  # relative deviation of a loss from the saddle value


@dataclass(frozen=True)
class RunState:
    """Learned modes of a run, and the growth of the next one."""

    matrix: str
    step: int
    num_learned: int
    num_modes: int
    threshold: float  #: θ; infinite if unknown
    since: int  #: step since which the number of learned modes is constant
    growth: float  #: r of the next mode; NaN if unknown
    grows: bool  #: True if r exceeds 1 by more than two standard errors
    next_eigenvalue: float
    was_learned: bool  #: True if a mode has grown above θ
    has_vanished: bool  #: True if all eigenvalues are small compared with the largest one of the run
    starts_large: bool  #: True if an eigenvalue starts above θ

    @property
    def is_still(self) -> bool:
        """True if the next mode does not grow significantly; False if its growth is unknown."""
        return not self.grows and not math.isnan(self.growth)

    def extrapolated_step(self, growth: float) -> float:
        """Return the step at which the next mode crosses θ at a growth r; infinite for r ≤ 1, NaN if unknown."""
        if self.next_eigenvalue == 0:
            return math.inf
        if not (math.isfinite(growth) and math.isfinite(self.threshold)):
            return math.nan
        if growth <= 1 + STILL:
            return math.inf
        remaining = math.log(self.threshold / self.next_eigenvalue) / (2 * math.log(growth))
        return self.step + max(remaining, 0.0)


def run_state(record: SpectrumRecord, matrix: str, loss: str | PairLoss | None, settings: dict[str, Any]) -> RunState:
    """Return the state of a run at its last measurement."""
    values = record.eigenvalues(matrix)
    known = values.isfinite().all(1) & (values.shape[1] > 0)
    if not known.any():
        raise UserError(f"{matrix} has no finite eigenvalues in {len(record)} measurements: record them again")
    values, steps = values[known].clamp(min=0), record.steps[known]
    threshold = _threshold(values, loss, settings)
    counts = (values > threshold).sum(1)
    num_learned, num_modes = int(counts[-1]), values.shape[1] - (matrix == "tangent_covariance")
    changed = (counts != num_learned).nonzero()
    since = int(changed[-1]) + 1 if len(changed) else 0
    following = values[since:, num_learned] if num_learned < values.shape[1] else values[since:, -1]
    top = values[:, 0]
    return RunState(
        matrix, int(steps[-1]), num_learned, num_modes, threshold, int(steps[since]),
        *_growth(steps[since:], following), float(following[-1]),
        was_learned=bool(top[0] <= threshold) and bool((top > threshold).any()),
        has_vanished=bool((top[-3:] < _VANISHED * top.max()).all()) and len(top) > 3,
        starts_large=bool(top[0] > threshold),
    )  # fmt: skip


def _threshold(values: Tensor, loss: str | PairLoss | None, settings: dict[str, Any]) -> float:
    if isinstance(loss, str) and loss in _THRESHOLDS and _has_known_size(loss, settings):
        return _THRESHOLDS[loss]
    top = values[:, 0]
    if float(top.max()) < _GROWN * float(top[0]):
        return math.inf
    late = top[-max(1, math.ceil(len(top) / 10)) :].median()
    return 0.1 * float(late if late > _VANISHED * top.max() else top.max())


def _has_known_size(loss: str, settings: dict[str, Any]) -> bool:
    """Return False if eigenvalues have no scale, or if VICReg has a small variance term and they stay below 1."""
    if loss == "vicreg":
        variance = settings.get("variance_weight", VARIANCE_WEIGHT)
        return bool(variance >= settings.get("invariance_weight", INVARIANCE_WEIGHT))
    return loss != "barlow_twins" or not settings.get("normalize", True)


def _growth(steps: Tensor, values: Tensor) -> tuple[float, bool]:
    """Return the growth factor of √λ per step, fitted to the second half of the steps, and whether it is significant.

    NaN for fewer than three samples, or eigenvalues that are not positive.
    """
    late = min(int((steps < (steps[0] + steps[-1]) / 2).sum()), max(len(steps) - 3, 0))
    steps, values = steps[late:].double(), values[late:]
    if len(values) < 3 or not (values > 0).all():
        return math.nan, False
    steps, logs = steps - steps.mean(), values.log() - values.log().mean()
    slope = float(steps @ logs / (steps @ steps))
    error = math.sqrt(float((logs - slope * steps).square().sum() / (steps @ steps)) / (len(steps) - 2))
    return math.exp(slope / 2), slope > max(2 * error, 2 * STILL)


def last_loss(losses: Tensor) -> float:
    """Return the median of the last tenth of the losses; NaN without losses."""
    return float(losses[-max(1, math.ceil(len(losses) / 10)) :].median()) if len(losses) else math.nan


def known_saddle_value(
    loss: str | PairLoss | None, arguments: dict[str, Any], last: float = math.nan
) -> tuple[float, str]:
    """Return the saddle value nearest to the last loss for arguments of ``plateaus``, and ""; or NaN and the reason."""
    if loss is None:
        return math.nan, "the plateaus of the loss are not known: give loss, a name or a function"
    try:
        saddles = [plateau.value for plateau in plateaus(loss, **arguments) if not plateau.num_learned]
        return min(saddles, key=lambda value: abs(value - last)), ""
    except UserError as error:
        if isinstance(loss, str) or not callable(loss):  # only sizes may be unknown
            plateaus(loss, **arguments | {"num_pairs": arguments["num_pairs"] or 2, "dim": 2, "num_prototypes": 2})
        return math.nan, f"the plateaus of the loss are not known ({error})"


def is_near_saddle(loss: float, saddle_value: float) -> bool | None:
    """Return True for a loss near the saddle value, None if either is unknown."""
    if not (math.isfinite(saddle_value) and math.isfinite(loss)):
        return None
    return abs(loss - saddle_value) <= _NEAR_SADDLE * (abs(saddle_value) or 1.0)


def find_verdict(
    record: SpectrumRecord, state: RunState, saddle_value: float, max_steps: int | None
) -> tuple[str, str]:
    """Return the verdict (:class:`Diagnosis`) and the numbers that indicate it, or an empty string."""
    losses = record.losses[~record.losses.isnan()]
    if len(losses) and record.losses[-2:].isnan().all():  # the last one alone may be unknown
        return "diverged", f"the loss was {losses[-1]:.3g}, and is NaN"
    if len(losses) and not losses[-1] <= DIVERGED * max(abs(float(losses[0])), 1e-3):
        return "diverged", f"the loss rose from {losses[0]:.3g} to {losses[-1]:.3g}"
    if state.has_vanished and (state.was_learned or state.starts_large):
        reading = find_collapse(record, state.matrix).reading
        return ("fell_back" if state.was_learned else "collapsed"), reading
    collapse = find_collapse(record, state.matrix)
    if collapse.kind in ("dimensional collapse", "a mode has died"):
        return "collapsed", collapse.reading
    has_ended = max_steps is not None and state.step >= max_steps
    if state.num_learned >= state.num_modes or (state.num_learned and has_ended):
        return "finished", ""
    if not state.num_learned and _is_stuck(record, state, saddle_value, max_steps):
        return "stuck", ""
    is_rising = state.grows and state.next_eigenvalue > _RISING * state.threshold
    just_learned = state.num_learned and state.step - state.since < _RECENT * state.step
    return ("learning" if is_rising or just_learned else "plateau"), ""


def _is_stuck(record: SpectrumRecord, state: RunState, saddle_value: float, max_steps: int | None) -> bool:
    """Return True if no mode is learned and none will be before the end, as far as the record shows."""
    on_saddle = is_near_saddle(last_loss(record.losses[record.losses.isfinite()]), saddle_value)
    if on_saddle is False or (on_saddle is None and not math.isfinite(state.threshold)):
        return False
    if state.step < _MIN_STEPS or len(record) < _MIN_SAMPLES:
        return False
    if max_steps is not None and state.extrapolated_step(state.growth) > max_steps:
        return True
    return (
        state.growth <= 1 + STILL or state.next_eigenvalue == 0 or (max_steps is not None and state.step >= max_steps)
    )

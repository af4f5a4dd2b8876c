"""Detection of collapse: an embedding that shrinks to a point or to a few dimensions, or loses a mode."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from stepwise_lightning.spectrum.measures import effective_rank
from stepwise_lightning.spectrum.record import SpectrumRecord
from stepwise_lightning.spectrum.steps import num_grown

_SUSTAINED = 3  # number of measurements, as in detect_steps
_VANISHED = 0.01  # relative to the maximum over time
_LARGE = 0.1  # relative to the largest eigenvalue now: counts as a dimension
_MIN_STEPS = 200  # minimum duration of a collapse
_STEP_RATIO = 10  # without a forecast: steps relative to the last gain of a dimension
_TIME_RATIO = 3  # with a forecast: duration relative to the expected one
_GROWTH = 2  # growth since the middle of a plateau (in measurements) that rules out a collapse


class Collapse(NamedTuple):
    """Result of :func:`find_collapse`."""

    kind: str  #: ``complete collapse``, ``dimensional collapse``, ``a mode has died``, or '' without a collapse
    reading: str  #: the numbers that indicate it


def find_collapse(record: SpectrumRecord, matrix: str = "cross_correlation") -> Collapse:
    """Return the most severe collapse in the last three measurements of a matrix.

    - **complete collapse**: all eigenvalues are below 1 % of the largest eigenvalue of the run.
    - **dimensional collapse**: fewer than half of the eigenvalues exceed a tenth of the largest, their number is
      constant, and neither they nor the next one have doubled since the middle of this plateau (in measurements). The
      plateau must last 200 steps, and three times as long as the last of ``record.expected_times`` expects (others are
      of modes learned earlier than expected), or, without a forecast, until ten times the step at which it began. On
      the plateaus of a staircase the next mode keeps growing. A spectrum without any growth or decay so far, as at the
      start of a run, is no collapse.
    - **a mode has died**: an eigenvalue that had grown (``num_grown``) is below 1 % of its maximum.

    Args:
        record: of a finished or running training.
        matrix: name of the matrix.

    Raises:
        ValueError: the matrix was not measured.

    """
    values = record.eigenvalues(matrix)
    known = values.isfinite().all(1)
    values, steps, times = values[known].clamp(min=0), record.steps[known], record.times[known]
    if len(values) <= _SUSTAINED or not values.any():
        return Collapse("", "")
    largest = values[:, 0]
    if (largest[-_SUSTAINED:] < _VANISHED * largest.max()).all():
        ratio = _ratio(largest[-1], largest.max())
        return Collapse("complete collapse", f"the largest eigenvalue is {ratio}")
    if "num_grown" in record.measures(matrix):  # NaN after a change of the dimension
        grown = int(record.measure("num_grown", matrix)[known].nan_to_num(0.0).max())
    else:
        grown = max(num_grown(values[0], now) for now in values)
    if reading := _dimensional_collapse(values, steps, times, grown, record.expected_times.get(matrix, [])):
        return Collapse("dimensional collapse", reading)
    peaks = values[:, :grown].max(0).values
    dead = (values[-_SUSTAINED:, :grown] < _VANISHED * peaks).all(0)
    if dead.any():
        mode = int(dead.nonzero()[0])
        return Collapse("a mode has died", f"eigenvalue {mode + 1} is {_ratio(values[-1, mode], peaks[mode])}")
    return Collapse("", "")


def _dimensional_collapse(values: Tensor, steps: Tensor, times: Tensor, grown: int, expected_times: list[float]) -> str:
    """Return the numbers that indicate a dimensional collapse, '' without one."""
    counts = (values > _LARGE * values[:, :1]).sum(1)
    count, dim = int(counts[-1]), values.shape[1]
    changed = (counts != count).nonzero()
    begin = int(changed[-1]) + 1 if len(changed) else 0
    started = grown or count < counts[0]
    if not (count < dim / 2 and started and len(values) - begin > 2 * _SUSTAINED):
        return ""
    first = max(int(steps[begin]), 1)
    later = [time for time in expected_times if time > times[begin]]
    min_step = max(1 if later else _STEP_RATIO * first, first + _MIN_STEPS)
    early = bool(later) and times[-1] <= times[begin] + _TIME_RATIO * (max(later) - times[begin])
    plateau = values[(begin + len(values) - 1) // 2 :, : count + 1]  # second half
    growing = (plateau[-_SUSTAINED:].max(0).values > _GROWTH * plateau[0]).any()
    if growing or early or steps[-1] < min_step:
        return ""
    return (
        f"{count} of {dim} eigenvalues {'is' if count == 1 else 'are'} above a tenth of the largest since step "
        f"{int(steps[begin])}, and the next one does not grow; effective rank {float(effective_rank(values[-1])):.2f}"
    )


def _ratio(value: Tensor, peak: Tensor) -> str:
    return f"{float(value / peak):.1g} times its maximum" if value else "0"

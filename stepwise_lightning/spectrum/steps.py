"""Detection of steps in eigenvalue trajectories: pure functions of times and eigenvalues.

Four terms refer to four functions. A mode is *learned* according to :func:`detect_steps`, for finished runs from a
small initialisation; modes rise *apart* according to :func:`detect_rises`, for finished runs from any initialisation;
a mode has *grown* according to :func:`num_grown`, during training; an eigenvalue of C has *crossed* a level according
to :func:`crossing_times`, for Barlow Twins, where eigenvalues converge to 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64

_PLATEAU = 3.0  # rise widths between two steps with a plateau of the loss between them
_MIN_RISE = 1.5  # final value of a mode that rises, in units of its minimum


class Steps(NamedTuple):
    """Result of :func:`detect_steps`, in the unit of the input times. ``docs/glossary.md`` defines the terms."""

    #: Time at which each mode is learned, (d,); NaN for modes that are never learned or start too large
    step_times: Tensor
    rise_widths: Tensor  #: time from a tenth of the threshold to the threshold, (d,); NaN where the step time is NaN
    num_learned: Tensor  #: number of modes above the threshold at each time, (T,), int64
    #: Number of steps more than one rise width after the previous one, among the modes that are learned at the end
    num_distinct: int
    #: Median over neighbouring steps of min(separation / rise width, 10); 0 with fewer than two steps
    stepwiseness: float
    threshold: float  #: threshold θ, in the unit of the eigenvalues
    #: As ``num_distinct``, with three rise widths: the loss has a plateau before each of these steps
    num_plateaus: int


def detect_steps(times: Tensor, eigenvalues: Tensor, threshold: float | None = None) -> Steps:
    """Detect the times at which eigenvalues rise, and how distinct these steps are.

    Eigenvalues are sorted at each time and median-filtered over three samples. θ is a tenth of the median of the
    largest eigenvalue over the last tenth of the samples; if it rested before at less than a third of this level, a
    tenth of the lowest such level, because a late large mode must not hide earlier steps. Mode k is learned at t_k,
    where it first crosses θ and stays above for three samples (or to the end), interpolated in log λ; its rise width is
    w_k = t(θ) − t(θ/10). A mode that starts above θ/10 has no step. Steps k and k+1 are distinct if
    (t_{k+1} − t_k) / w_{k+1} > 1, with a plateau of the loss between them if it is > 3. Modes that have fallen below θ
    at the end are not counted.

    Example:
        Two modes that saturate at 1, the second long after the first:

        >>> import torch
        >>> from stepwise_lightning.spectrum import detect_steps
        >>> times = torch.linspace(0, 40, 401)
        >>> modes = torch.sigmoid(torch.stack([2 * (times - 10), 2 * (times - 30)], dim=1))
        >>> steps = detect_steps(times, modes)
        >>> steps.num_distinct, int(steps.num_learned[200]), int(steps.num_learned[-1])
        (2, 1, 2)
        >>> [round(time, 1) for time in steps.step_times.tolist()]
        [8.9, 28.9]

    Args:
        times: (T,), ascending; learning rate × steps, or steps.
        eigenvalues: (T, d), in any order; values ≤ 0 are allowed.
        threshold: another θ, for instance of a longer run.

    Raises:
        ValueError: shapes do not match, T < 2, times not ascending, complex or non-finite values.

    """
    times, values = _filtered(times, eigenvalues)
    threshold = 0.1 * _level(values[:, 0]) if threshold is None else threshold
    nan = values.new_full((values.shape[1],), math.nan)
    step_times, widths = nan.clone(), nan.clone()
    for mode, path in enumerate(values.T):
        if threshold > 0 and path[0] <= threshold / 10:
            index = first_sustained(path > threshold)
            if index is not None:
                step_times[mode] = _crossing(times, path, index, threshold)
                low = int((path[:index] <= threshold / 10).nonzero()[-1]) + 1
                widths[mode] = step_times[mode] - _crossing(times, path, low, threshold / 10)
    num_learned = (values > threshold).sum(1) if threshold > 0 else values.new_zeros(len(values), dtype=torch.int64)
    last = int(num_learned[-1])  # eigenvalues are sorted
    gaps = _gaps(step_times[:last], widths[:last])
    return Steps(
        step_times=step_times,
        rise_widths=widths,
        num_learned=num_learned,
        num_distinct=int((gaps > 1).sum()),
        stepwiseness=_typical(gaps),
        threshold=threshold,
        num_plateaus=int((gaps > _PLATEAU).sum()),
    )


def _level(largest: Tensor) -> float:
    """Return the level of the largest eigenvalue, (T,), at the end, or an earlier one below a third of it.

    Earlier levels last a tenth of the samples, within a factor of 1.5, and exceed ten times the start and a thousandth
    of the last level.
    """
    size = math.ceil(len(largest) / 10)
    last = largest[-size:].median().clamp(min=0)
    windows = largest.unfold(0, min(max(size, 5), len(largest)), 1)
    low, high, levels = windows.amin(1), windows.amax(1), windows.median(1).values
    resting = (high < 1.5 * low) & (low > 10 * largest[0].clamp(min=0)) & (low > 1e-3 * last) & (levels < last / 3)
    return float(levels[resting].min() if resting.any() else last)


class Rises(NamedTuple):
    """Result of :func:`detect_rises`, in the unit of the input times."""

    #: Time at which each mode completes half of its rise, (d,); NaN for modes that do not rise or end too small
    times: Tensor
    widths: Tensor  #: time from a tenth to a half of the rise, (d,); NaN where ``times`` is NaN
    num_modes: int  #: number of modes that rise and end above the threshold
    #: Number of these modes separated from the previous one by more than their own width, including the first
    num_apart: int
    separation: float  #: median over neighbouring modes of min(separation / width, 10); 0 with fewer than two modes


def detect_rises(times: Tensor, eigenvalues: Tensor) -> Rises:
    """Detect the times at which eigenvalues rise, and the number that rise apart, from any initialisation.

    From ordinary initialisation eigenvalues start large, and :func:`detect_steps` finds no steps by definition; this
    function counts modes independent of their initial value. Eigenvalues are sorted at each time and median-filtered
    over three samples. The rise of a mode extends from its minimum to its median over the last tenth of the samples;
    its time t is where it first completes half of the rise, and its width w the time since it last completed a tenth,
    both interpolated linearly. Modes count if their final value exceeds 1.5 times their minimum, which stationary
    noise of up to a tenth of the eigenvalue rarely does, and a tenth of the largest final value. Modes k and k+1 rise
    apart if (t_{k+1} − t_k) / w_{k+1} > 1.

    Arguments and errors are the same as for :func:`detect_steps`.
    """
    times, values = _filtered(times, eigenvalues)
    ends = values[-max(1, math.ceil(len(values) / 10)) :].median(0).values
    halves, widths = values.new_full((2, values.shape[1]), math.nan)
    for mode, (path, end) in enumerate(zip(values.T, ends, strict=True)):
        lowest = int(path.argmin())
        tenth, half = (path[lowest] + share * (end - path[lowest]) for share in (0.1, 0.5))
        above = (path[lowest:] > half).nonzero()
        if end > max(0.1 * ends[0], _MIN_RISE * path[lowest]) and len(above):
            index = lowest + int(above[0])
            last_below = lowest + int((path[lowest:index] <= tenth).nonzero()[-1])
            halves[mode] = _linear_crossing(times, path, index, half)
            widths[mode] = halves[mode] - _linear_crossing(times, path, last_below + 1, tenth)
    gaps = _gaps(halves, widths)
    return Rises(halves, widths, len(gaps), int((gaps > 1).sum()), _typical(gaps))


def _gaps(times: Tensor, widths: Tensor) -> Tensor:
    """Return the time of each finite mode since the previous one in units of its width; infinite for the first."""
    finite = times.isfinite()
    return torch.cat([times.new_full((1,), math.inf), times[finite].diff() / widths[finite][1:]])[: finite.sum()]


def _typical(gaps: Tensor) -> float:
    """Return the median gap of neighbouring modes, each at most 10; 0 with fewer than two modes."""
    return float(gaps[1:].clamp(max=10).quantile(0.5)) if len(gaps) > 1 else 0.0


def num_grown(start: Tensor, now: Tensor) -> int:
    """Return the number of eigenvalues that have grown tenfold and exceed a tenth of the largest current one.

    Args:
        start: eigenvalues of the first measurement, (d,), descending.
        now: current eigenvalues, (d,), descending.

    """
    start, now = _on_cpu(start, "eigenvalues"), _on_cpu(now, "eigenvalues")
    return int(((now > 0.1 * now[0]) & (now > 10 * start)).sum())


def num_crossed(eigenvalues: Tensor, level: float = 0.5) -> Tensor:
    """Return the number of eigenvalues of C above ``level``, (…, d) -> (…), int64; see :func:`crossing_times`."""
    return (as_float64(eigenvalues, "eigenvalues") > level).sum(-1)


def crossing_times(times: Tensor, eigenvalues: Tensor, level: float = 0.5) -> Tensor:
    """Return the time at which each eigenvalue of C first reaches ``level``, (d,); NaN if never, or from the start.

    The log-odds log(λ/(1−λ)) are interpolated linearly between samples; for an isolated mode of the analytical model
    they are linear in time.

    Args:
        times: (T,), ascending.
        eigenvalues: (T, d), each column one mode.
        level: between 0 and 1.

    Example:
        >>> import torch
        >>> from stepwise_lightning.spectrum import crossing_times
        >>> times = torch.linspace(0, 20, 21)
        >>> crossing_times(times, torch.sigmoid(times - 9.5)[:, None])
        tensor([9.5000], dtype=torch.float64)

    Raises:
        ValueError: shapes do not match, T < 2, times not ascending, complex or non-finite values, or a level
            outside (0, 1).

    """
    times, values = _on_cpu(times, "times"), _on_cpu(eigenvalues, "eigenvalues")
    _check_trajectory(times, values)
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, got {level}")
    crossings = values.new_full((values.shape[1],), math.nan)
    target = math.log(level / (1 - level))
    for mode, path in enumerate(values.T):
        above = (path >= level).nonzero()
        if len(above) and above[0] > 0:
            index = int(above[0])
            before, after = path[index - 1 : index + 1].clamp(1e-12, 1 - 1e-12).logit().tolist()
            start, end = times[index - 1 : index + 1].tolist()
            crossings[mode] = start + (end - start) * (target - before) / (after - before)
    return crossings


def _on_cpu(values: Tensor | ArrayLike, name: str) -> Tensor:
    return as_float64(values, name).cpu()


def _filtered(times: Tensor, eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
    """Return times and eigenvalues, checked, sorted at each time and median-filtered over three samples."""
    times, values = _on_cpu(times, "times"), _on_cpu(eigenvalues, "eigenvalues")
    _check_trajectory(times, values)
    return times, _median_of_three(values.sort(dim=1, descending=True).values)


def _check_trajectory(times: Tensor, values: Tensor) -> None:
    if times.ndim != 1 or values.ndim != 2 or len(times) != len(values) or values.shape[1] < 1:
        raise UserError(f"expected times (T,) and eigenvalues (T, d), got {tuple(times.shape)}, {tuple(values.shape)}")
    if len(times) < 2 or not (times.diff() > 0).all():
        raise UserError(f"times must be ascending, with at least two samples, got {len(times)} samples")
    if not values.isfinite().all():
        raise UserError("eigenvalues contain NaN or infinite values")


def _median_of_three(values: Tensor) -> Tensor:
    padded = torch.cat([values[:1], values, values[-1:]])
    return torch.stack([padded[:-2], padded[1:-1], padded[2:]]).median(0).values


def first_sustained(above: Tensor) -> int | None:
    """Return the index of the first sample from which ``above`` is true for three samples, or to the end."""
    padded = torch.cat([above, above.new_ones(2)])
    starts = (padded[:-2] & padded[1:-1] & padded[2:]).nonzero()
    return int(starts[0]) if len(starts) else None


def _crossing(times: Tensor, path: Tensor, index: int, level: float) -> float:
    """Return the time between samples index − 1 and index at which the path reaches ``level``, linear in log λ."""
    tiny = torch.finfo(torch.float64).tiny
    before, after = path[index - 1 : index + 1].clamp(min=tiny).log().tolist()
    fraction = (math.log(level) - before) / (after - before)
    start, end = times[index - 1 : index + 1].tolist()
    return start + fraction * (end - start)


def _linear_crossing(times: Tensor, path: Tensor, index: int, level: Tensor) -> float:
    """Return the time between samples index − 1 and index at which the path reaches ``level``, linear in λ."""
    before, after = path[index - 1 : index + 1].tolist()
    start, end = times[index - 1 : index + 1].tolist()
    return start + (float(level) - before) / (after - before) * (end - start)

"""When the eigenvalues of an embedding rise, and how far they rise one by one: pure functions of trajectories.

Four rules, four words. A mode is *learned* by :func:`detect_steps`, which judges a whole run from a small start; modes
rise *apart* or together by :func:`detect_rises`, which judges a run from any start; a mode has *grown* by
:func:`num_grown`, which can be said while a run goes on; it has *crossed* by :func:`crossing_times`, which is for the
eigenvalues of C under Barlow Twins, where theory says that they end at 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64

__all__ = ["Rises", "Steps", "crossing_times", "detect_rises", "detect_steps", "num_crossed", "num_grown"]


class Steps(NamedTuple):
    """What :func:`detect_steps` found; times are in the unit of the times given. Its words: ``docs/glossary.md``."""

    step_times: Tensor
    """(d,): when each mode is learned; NaN for modes that never are, or that start too high to make a step."""
    rise_widths: Tensor
    """(d,): time from a tenth of the threshold to the threshold; NaN with the step time."""
    num_learned: Tensor
    """(T,), int64: modes above the threshold at each time."""
    num_distinct: int
    """Steps that are separated from the one before by more than their own rise width."""
    stepwiseness: float
    """Median over neighbouring steps of min(separation / rise width, 10); 0 with fewer than two steps."""
    threshold: float
    """θ, in the unit of the eigenvalues."""


def detect_steps(times: Tensor, eigenvalues: Tensor) -> Steps:
    """Find the times at which the eigenvalues of an embedding rise, and how far they rise one by one.

    Eigenvalues are sorted at each time and median-filtered over three samples. θ is a tenth of the median of the
    largest eigenvalue over the last tenth of the samples. Mode k is learned at t_k, where it first crosses θ and stays
    above for three samples (or to the end), interpolated in log λ; its rise width is w_k = t(θ) − t(θ/10). A mode that
    starts above θ/10 makes no step. Steps k and k+1 are distinct when (t_{k+1} − t_k) / w_{k+1} > 1.

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

    Raises:
        ValueError: shapes do not match, T < 2, times not ascending, complex or non-finite values.

    """
    times, values = _filtered(times, eigenvalues)
    tail = values[-max(1, math.ceil(len(values) / 10)) :, 0]
    threshold = 0.1 * tail.median().clamp(min=0)
    nan = torch.full((values.shape[1],), math.nan, dtype=torch.float64)
    step_times, widths = nan.clone(), nan.clone()
    for mode, path in enumerate(values.T):
        if threshold > 0 and path[0] <= threshold / 10:
            index = _first_sustained(path > threshold)
            if index is not None:
                step_times[mode] = _crossing(times, path, index, threshold)
                low = int((path[:index] <= threshold / 10).nonzero()[-1]) + 1
                widths[mode] = step_times[mode] - _crossing(times, path, low, threshold / 10)
    detected = step_times.isfinite()
    gaps = step_times[detected].diff() / widths[detected][1:]
    return Steps(
        step_times=step_times,
        rise_widths=widths,
        num_learned=(values > threshold).sum(1) if threshold > 0 else torch.zeros(len(values), dtype=torch.int64),
        num_distinct=int(detected.any()) + int((gaps > 1).sum()),
        stepwiseness=float(gaps.clamp(max=10).quantile(0.5)) if len(gaps) else 0.0,
        threshold=float(threshold),
    )


class Rises(NamedTuple):
    """What :func:`detect_rises` found; times are in the unit of the times given."""

    times: Tensor
    """(d,): when each mode is half-way up; NaN for modes that end below the threshold."""
    widths: Tensor
    """(d,): time from a tenth of the way to half of it; NaN with the time."""
    num_modes: int
    """Modes that end above the threshold."""
    num_apart: int
    """Of these, the first and those that are separated from the one before by more than their own width."""
    separation: float
    """Median over neighbours of min(separation / width, 10); 0 with fewer than two modes."""


def detect_rises(times: Tensor, eigenvalues: Tensor) -> Rises:
    """Find when the eigenvalues of an embedding rise, and how many rise apart, from any start.

    From ordinary initialisation eigenvalues start high, so that :func:`detect_steps` finds no steps whatever they do
    then; this measure leaves out no mode for how it starts. Eigenvalues are sorted at each time and median-filtered
    over three samples. A mode's way leads from its smallest value up to its median over the last tenth of the samples;
    its time t is when it first has half of that behind it, and its width w is how long before it last had a tenth, both
    interpolated linearly. Modes whose end is above θ, a tenth of the largest one's, count. Modes k and k+1 rise apart
    when (t_{k+1} − t_k) / w_{k+1} > 1.

    Args:
        times: (T,), ascending; learning rate × steps, or steps.
        eigenvalues: (T, d), in any order; values ≤ 0 are allowed.

    Raises:
        ValueError: shapes do not match, T < 2, times not ascending, complex or non-finite values.

    """
    times, values = _filtered(times, eigenvalues)
    ends = values[-max(1, math.ceil(len(values) / 10)) :].median(0).values
    halves, widths = torch.full((2, values.shape[1]), math.nan, dtype=torch.float64)
    for mode, (path, end) in enumerate(zip(values.T, ends, strict=True)):
        lowest = int(path.argmin())
        tenth, half = (path[lowest] + share * (end - path[lowest]) for share in (0.1, 0.5))
        above = (path[lowest:] > half).nonzero()
        if end > 0.1 * ends[0] and len(above):
            index = lowest + int(above[0])
            last_below = lowest + int((path[lowest:index] <= tenth).nonzero()[-1])
            halves[mode] = _linear_crossing(times, path, index, half)
            widths[mode] = halves[mode] - _linear_crossing(times, path, last_below + 1, tenth)
    counted = halves.isfinite()
    gaps = halves[counted].diff() / widths[counted][1:]
    return Rises(
        times=halves,
        widths=widths,
        num_modes=int(counted.sum()),
        num_apart=int(counted.any()) + int((gaps > 1).sum()),
        separation=float(gaps.clamp(max=10).quantile(0.5)) if len(gaps) else 0.0,
    )


def num_grown(start: Tensor, now: Tensor) -> int:
    """Return how many eigenvalues have grown tenfold since the start and exceed a tenth of the largest one now.

    What can be said while a run goes on, of descending eigenvalues, (d,) each.
    """
    start, now = _on_cpu(start, "eigenvalues"), _on_cpu(now, "eigenvalues")
    return int(((now > 0.1 * now[0]) & (now > 10 * start)).sum())


def num_crossed(eigenvalues: Tensor, level: float = 0.5) -> Tensor:
    """Return how many eigenvalues of C are above ``level``, (…, d) to (…), int64: see :func:`crossing_times`."""
    return (as_float64(eigenvalues, "eigenvalues") > level).sum(-1)


def crossing_times(times: Tensor, eigenvalues: Tensor, level: float = 0.5) -> Tensor:
    """Return when each eigenvalue of C first reaches ``level``, (d,); NaN if never, or if it starts above.

    Between samples the log-odds log(λ/(1−λ)) are interpolated linearly: for an isolated mode of the analytical model
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
    crossings = torch.full((values.shape[1],), math.nan, dtype=torch.float64)
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
        raise UserError("times must be ascending, with at least two samples")
    if not values.isfinite().all():
        raise UserError("eigenvalues hold NaN or infinite values")


def _median_of_three(values: Tensor) -> Tensor:
    padded = torch.cat([values[:1], values, values[-1:]])
    return torch.stack([padded[:-2], padded[1:-1], padded[2:]]).median(0).values


def _first_sustained(above: Tensor) -> int | None:
    """Index of the first sample from which ``above`` holds for three samples, or to the end."""
    padded = torch.cat([above, above.new_ones(2)])
    starts = (padded[:-2] & padded[1:-1] & padded[2:]).nonzero()
    return int(starts[0]) if len(starts) else None


def _crossing(times: Tensor, path: Tensor, index: int, level: Tensor) -> float:
    """Time between samples index − 1 and index at which the path reaches ``level``, linear in log λ."""
    tiny = torch.finfo(torch.float64).tiny
    before, after = path[index - 1 : index + 1].clamp(min=tiny).log().tolist()
    fraction = (math.log(float(level)) - before) / (after - before)
    start, end = times[index - 1 : index + 1].tolist()
    return start + fraction * (end - start)


def _linear_crossing(times: Tensor, path: Tensor, index: int, level: Tensor) -> float:
    """Time between samples index − 1 and index at which the path reaches ``level``."""
    before, after = path[index - 1 : index + 1].tolist()
    start, end = times[index - 1 : index + 1].tolist()
    return start + (float(level) - before) / (after - before) * (end - start)

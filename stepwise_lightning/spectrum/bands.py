"""Reference bands: runs of one configuration with several seeds, and a test of whether a further run is like them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from stepwise_lightning.errors import NotFoundError, UserError, reason
from stepwise_lightning.files import atomic_write_stream
from stepwise_lightning.spectrum.record import SpectrumRecord
from stepwise_lightning.spectrum.steps import detect_steps

Array = NDArray[np.float64]
_FOLDER = Path(__file__).parent.parent / "bands"
_MIN_SCALE = 0.25  # octaves; a smaller σ, estimated from a few runs, is not reliable
_MAX_DEVIATION = 16.0  # octaves
_SMALL = 1e-3  # eigenvalues below this share of θ are saved as 0
_ADVICE = "give a tenth of the eigenvalue of a learned mode, and runs from a small initialisation"


class Comparison(NamedTuple):
    """Result of :meth:`ReferenceBand.compare`."""

    inside: bool  #: whether the run is like the reference runs, as far as it has been trained
    score: float  #: largest deviation of a mode from the reference runs, in units of σ
    limit: float  #: largest score of a reference run; the run is inside up to this score
    left_at: float  #: optimiser step at which the run leaves the band; NaN if it is inside
    description: str  #: one line: the mode with which the run leaves the band, or the step up to which it is inside


class ReferenceBand:
    """Runs of one configuration with different seeds, and the band around the steps of their modes.

    A run is described by x_k, log₂ of the optimiser step at which mode k is learned: crosses the threshold θ, which is
    the same for all runs (:func:`stepwise_lightning.spectrum.detect_steps`). For a mode that is not learned, or not
    above θ at the end, x_k is a lower bound, log₂ of the last step. A mode that starts above θ/10 counts as learned at
    step 1.

    The score of a run among other runs is ``max_k |x_k − m_k| / σ_k``, with m_k the median and σ_k the standard
    deviation of the others, at least ¼; a lower bound counts if it is above m_k. A further run is inside if its score
    among the n reference runs is at most the largest score of a reference run, each among the other references and the
    further run. If all n + 1 runs are exchangeable, as runs of one length that differ only in their seed are, each of
    them has the largest score with the same probability. A further run is therefore inside with a probability of at
    least n / (n + 1), 91 % for ten reference runs, for all modes together and any distribution. This is full conformal
    prediction (Vovk, Gammerman and Shafer, *Algorithmic Learning in a Random World*, 2005; Lei et al.,
    *Distribution-free predictive inference for regression*, JASA 113, 2018).

    A run that is outside differs from the reference runs in more than its seed, or is one of the other 9 %. A run that
    is inside may still differ from them in other respects than the steps of its modes.

    Args:
        name: of the configuration.
        matrix: name of the matrix that the loss drives.
        threshold: θ, in the unit of the eigenvalues; about a tenth of a learned mode.
        records: of the reference runs, at least three.

    Raises:
        ValueError: fewer than three runs, θ is not positive, no mode crosses θ, a run without this matrix or with less
            than two measurements of it, or runs with different numbers of modes.

    """

    def __init__(self, name: str, matrix: str, threshold: float, records: Sequence[SpectrumRecord]) -> None:
        if len(records) < 3:
            raise UserError(f"a reference band needs at least 3 runs, got {len(records)}")
        if not 0 < threshold < math.inf:
            raise UserError(f"the threshold θ must be positive and finite, got {threshold}: {_ADVICE}")
        self.name, self.matrix, self.threshold, self.records = name, matrix, threshold, list(records)
        self._last_step = max(int(step) for record in records for step in record.steps[-1:])
        octaves, learned, _ = zip(*map(self._modes, self.records), strict=True)
        if len(sizes := sorted({len(modes) for modes in octaves})) > 1:
            raise UserError(f"reference runs need the same number of modes, got {', '.join(map(str, sizes))}")
        self._references = np.stack(octaves), np.stack(learned)
        if not (self._references[1] & (self._references[0] > 0)).any():
            raise UserError(f"no mode of a reference run crosses the threshold θ = {threshold:g}: {_ADVICE}")

    @staticmethod
    def names() -> list[str]:
        """Return the names of the configurations of the package that have a band."""
        return sorted(path.stem for path in _FOLDER.glob("*.npz"))

    @classmethod
    def load(cls, name: str | Path) -> Self:
        """Return the band of a configuration of the package, or of a file that :meth:`save` has written.

        Raises:
            FileNotFoundError: there is no such configuration or file.
            ValueError: the file is damaged or is no reference band. No code in it is executed.

        """
        path = _FOLDER / f"{name}.npz" if str(name) in cls.names() else Path(name)
        if not path.is_file():
            raise NotFoundError(f"no reference band {str(name)!r}: give a file, or one of {', '.join(cls.names())}")
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
                matrix, threshold, ends = (
                    str(saved["matrix"]),
                    float(saved["threshold"]),
                    saved["measurements"].cumsum(),
                )
                arrays = saved["time"], threshold * saved["relative_eigenvalues"].astype(float), saved["step"]
            parts = (map(torch.tensor, np.split(array, ends[:-1])) for array in arrays)
            runs = zip(*parts, strict=True)
            records = [SpectrumRecord.of(times, values, matrix=matrix, steps=steps) for times, values, steps in runs]
            return cls(path.stem, matrix, threshold, records)
        except Exception as error:  # NumPy, zipfile and zlib raise many types
            text = f"{str(path)!r} cannot be read as a reference band ({reason(error)})"
            raise UserError(f"{text}: write it with ReferenceBand.save") from error

    def save(self, path: str | Path) -> None:
        """Write the reference runs to an ``.npz`` file of a few kB: eigenvalues in units of θ, in half precision."""
        values = torch.cat([record.eigenvalues(self.matrix) for record in self.records]) / self.threshold
        values = torch.where(values < _SMALL, 0, values).clamp(max=torch.finfo(torch.float16).max)
        arrays: dict[str, Any] = {
            "matrix": self.matrix,
            "threshold": self.threshold,
            "measurements": [len(record) for record in self.records],
            "step": torch.cat([record.steps for record in self.records]).numpy(),
            "time": torch.cat([record.times for record in self.records]).numpy(),
            "relative_eigenvalues": values.numpy().astype(np.float16),
        }
        atomic_write_stream(path, lambda stream: np.savez_compressed(stream, **arrays))

    def compare(self, record: SpectrumRecord) -> Comparison:
        """Return whether a run is inside the band, up to its end or the last step of the reference runs.

        Raises:
            ValueError: the matrix of the band was not measured, was measured less than twice, or has another dimension.

        """
        octaves, learned, last = self._modes(record)
        if len(octaves) != (num_modes := self._references[0].shape[1]):
            raise UserError(f"the band {self.name} has {num_modes} modes, the run {len(octaves)}: give another band")
        deviations, limit = self._deviations(octaves, learned)
        score = float(deviations.max())
        if score <= limit:
            text = f"inside up to step {min(int(record.steps[-1]), self._last_step)}"
            if ((record.steps > last) & (record.steps <= self._last_step)).any():
                text = f"inside up to step {last}, the last finite measurement"
            return Comparison(True, score, limit, math.nan, text)
        steps, (low, high) = 2**octaves, self.limits
        is_outside = (steps > high) | (learned & (steps < low))
        if not is_outside.any():  # several modes that deviate together
            is_outside = deviations == score
        # A mode that is learned early leaves the band then; a late one leaves it at the end of its range.
        left = np.where(is_outside, np.minimum(steps, high), math.inf)
        mode = int(left.argmin())
        state = f"learned at step {steps[mode]:.0f}" if octaves[mode] else "large at the start"
        text = f"mode {mode + 1} is {state if learned[mode] else 'not learned'}"
        text = f"outside: {text}, expected at step {low[mode]:.0f} to {high[mode]:.0f}"
        return Comparison(False, score, limit, float(left[mode]), text)

    @cached_property
    def limits(self) -> tuple[Array, Array]:
        """First and last step at which each mode may be learned, if the other modes are learned at the median, (d,).

        The last step may be later than the end of the reference runs.
        """
        median = np.median(self._references[0], axis=0)
        ends = np.stack([[self._reach(mode, sign) for mode in range(len(median))] for sign in (-1, 1)])
        return 2 ** (median - ends[0]), 2 ** (median + ends[1])

    def _reach(self, mode: int, sign: int) -> float:
        """Return the largest deviation of one mode, in octaves, with which a run is inside."""
        inside, outside = 0.0, _MAX_DEVIATION
        while outside - inside > 0.01:
            middle = (inside + outside) / 2
            octaves = np.median(self._references[0], axis=0)
            octaves[mode] += sign * middle
            deviations, limit = self._deviations(octaves, np.ones(len(octaves), bool))
            inside, outside = (inside, middle) if deviations.max() > limit else (middle, outside)
        return inside

    def _deviations(self, octaves: Array, learned: NDArray[np.bool_]) -> tuple[Array, float]:
        """Return the deviations of a run, (d,), and the largest deviation of a reference run, in units of σ."""
        pairs = zip(self._references, (octaves, learned), strict=True)
        runs, is_known = (np.vstack(pair) for pair in pairs)
        deviations = np.empty(runs.shape)
        for index, run in enumerate(runs):
            others = np.delete(runs, index, axis=0)
            scale = np.maximum(others.std(0, ddof=1), _MIN_SCALE)
            deviations[index] = (run - np.median(others, axis=0)) / scale
        deviations = np.where(is_known, np.abs(deviations), np.maximum(deviations, 0))
        return deviations[-1], float(deviations[:-1].max())

    def _modes(self, record: SpectrumRecord) -> tuple[Array, NDArray[np.bool_], int]:
        """Return log₂ of the step of each mode, else of the last one, whether it is learned, (d,), and the last one."""
        values = record.eigenvalues(self.matrix)
        shown = (record.steps <= self._last_step) & values.isfinite().all(1)
        steps, values = record.steps[shown].double(), values[shown]
        if len(steps) < 2:
            text = f"{self.matrix} needs two finite measurements up to step {self._last_step}, got {len(steps)}"
            raise UserError(f"{text}: train longer, or measure more often")
        detected = detect_steps(steps, values, self.threshold)
        starts_large = values[0] > self.threshold / 10
        found = torch.where(starts_large, 1.0, detected.step_times)
        learned = found.isfinite() & (torch.arange(len(found)) < detected.num_learned[-1])
        return torch.where(learned, found, steps[-1]).clamp(min=1).log2().numpy(), learned.numpy(), int(steps[-1])

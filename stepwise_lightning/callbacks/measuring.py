"""One measurement: spectra of captured outputs, their check, and the training loss of the measured step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from stepwise_lightning.callbacks.tensorboard import matrix_tag
from stepwise_lightning.errors import DivergedError
from stepwise_lightning.features import loss_in
from stepwise_lightning.spectrum.measures import measure
from stepwise_lightning.spectrum.record import Spectrum, SpectrumRecord


def spectra_of(captured: dict[str, list[Tensor]], matrices: Sequence[str], center: bool) -> dict[str, Spectrum]:
    """Return the spectra of captured outputs by matrix; C is measured if there are two views."""
    return {
        f"{name}.{matrix}" if name else matrix: Spectrum(*measure(matrix, views, center))
        for name, views in captured.items()
        for matrix in matrices
        if matrix != "cross_correlation" or len(views) == 2
    }


def check_finite(outputs: dict[str, list[Tensor]], samples: list[Tensor], module: nn.Module, step: int) -> None:
    """Raise a DivergedError if a captured output is not finite; the message distinguishes non-finite samples."""
    for name, views in outputs.items():
        if not all(z.isfinite().all() for z in views):
            cause = "training has most likely diverged; lower the learning rate"
            if not all(x.isfinite().all() for x in samples):
                cause = "the samples contain NaN or infinite values; check the data"
            raise DivergedError(f"the output of {name or type(module).__name__} at step {step} is not finite: {cause}")


def publish_measures(trainer: L.Trainer, record: SpectrumRecord, name: str) -> None:
    """Add the last rank measures to ``trainer.callback_metrics`` of all ranks, which EarlyStopping monitors."""
    spectra = record.measurements[-1].spectra if len(record) else {}  # empty on ranks above 0
    measures = {
        f"{matrix_tag(matrix, name)}/{measure}": value
        for matrix, spectrum in spectra.items()
        for measure, value in spectrum.measures.items()
    }
    measures = trainer.strategy.broadcast(measures)
    trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in measures.items()})


class StepLoss:
    """Mean training loss over the batches of a measured step.

    An optimiser such as LBFGS evaluates the loss of a batch several times, at different weights. The first evaluation
    counts, at the measured weights.
    """

    def __init__(self) -> None:
        self._losses: list[float] | None = None  # None outside of a measured step
        self._first: Tensor | None = None
        self._num_evaluations = 0

    @property
    def is_open(self) -> bool:
        """True during a measured step."""
        return self._losses is not None

    def open(self) -> None:
        """Begin a measured step."""
        self._losses, self._first, self._num_evaluations = [], None, 0

    def evaluate(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        """Count an evaluation of the loss before its backward pass."""
        if self._losses is None or not module.automatic_optimization:
            return
        if self._num_evaluations == 0:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._first = loss.detach().clone() if scaler is None else loss.detach() / scaler.get_scale()
        self._num_evaluations += 1

    def add_batch(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any) -> None:
        """Add the loss of a batch, which ``outputs`` contains unless the loss was evaluated several times."""
        loss = loss_in(outputs if self._num_evaluations < 2 else self._first)
        self._first, self._num_evaluations = None, 0
        if self._losses is not None and loss is not None:
            # In automatic optimisation Lightning divides the loss by the number of accumulated batches.
            self._losses.append(loss * (trainer.accumulate_grad_batches if module.automatic_optimization else 1))

    def close(self) -> float | None:
        """End the step, and return its loss; None without a loss."""
        losses, self._losses = self._losses, None
        return sum(losses) / len(losses) if losses else None

"""Callback that measures the spectrum of embeddings during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import ref

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from stepwise_lightning.callbacks.clock import Clock, expected_end
from stepwise_lightning.callbacks.measuring import StepLoss, check_finite, publish_measures, spectra_of
from stepwise_lightning.callbacks.progress import Plan
from stepwise_lightning.callbacks.run_files import RunFiles
from stepwise_lightning.callbacks.spawned import return_results
from stepwise_lightning.callbacks.tensorboard import NAME
from stepwise_lightning.distributed import all_gather_objects
from stepwise_lightning.errors import UserError
from stepwise_lightning.features import (
    Views,
    Watched,
    capture,
    check_watched,
    concatenate_ranks,
    label,
    on_device,
    views_in,
)
from stepwise_lightning.precision import as_float64
from stepwise_lightning.runs.checkpoints import is_over
from stepwise_lightning.runs.folders import check_local, free_name, run_folder
from stepwise_lightning.runs.strategies import check_strategy
from stepwise_lightning.spectrum.matrices import MATRICES
from stepwise_lightning.spectrum.record import Measurement, SpectrumRecord
from stepwise_lightning.spectrum.schedule import Schedule

_KEY = "stepwise_lightning_spectra"  # in a checkpoint


class SpectrumLogger(L.Callback):
    """Log the full spectrum of the embeddings while any LightningModule trains.

    At log-spaced steps the module is called on one or two views of the same samples, (n, …) each, with batch
    normalisation on the statistics of these samples (:func:`stepwise_lightning.features.capture`). Training is
    bit-identical with and without this callback. The eigenvalues of these matrices are computed in float64:

    - ``cross_correlation``: C = (z1ᵀz2 + z2ᵀz1)/2n of two views;
    - ``covariance``: centred covariance of the embeddings of all views;
    - ``normalized_covariance``: covariance of the embeddings divided by their norms;
    - ``tangent_covariance``: covariance of the normalised embeddings without their component along the mean direction
      (:func:`stepwise_lightning.spectrum.measures.tangent_coordinates`).

    A measurement at step k is made after k optimiser steps, before step k + 1, together with the training loss of step
    k + 1. The last one is made at the end of training, after all callbacks except checkpointing have run, and has no
    loss. Time is the sum of the learning rates of the first optimiser. Steps, files, tags and figures:
    ``docs/read_a_run.md``. The rank measures of the last measurement are in ``trainer.callback_metrics`` under their
    tags: ``EarlyStopping(monitor="covariance/rankme")``.

    Args:
        watch: also measure the outputs of these submodules, such as ``encoder.backbone``, or of functions from module
            and view to a tensor (n, …).
        probe: samples to measure on. ``auto``: the data module's ``probe_pairs()``, or the training batch without such
            a method; ``batch``: always the training batch, of all ranks; or a tensor, or a pair of tensors.
        matrices: names of the matrices.
        center: subtract the mean of each view before C is formed.
        num_points: approximate number of measurements up to the expected end of training.
        num_scalars: number of eigenvalues per matrix in logged scalars and in ``spectrum.csv``; the ``.npz`` has all.
        prediction: function from time (T,) to eigenvalues of C (T, d), such as
            ``LinearBarlowTwins.embedding_eigenvalues``, to log and draw with the measured ones.
        keep_embeddings: keep the embeddings of each measurement in the record, the ``.npz`` and checkpoints: 4 bytes
            per measurement, view, sample and dimension.
        output: measure the output of ``module(view)``. False for a module without such a ``forward``: watched
            submodules are then called on the view.
        views: function from a training batch to one or two tensors, if
            :func:`stepwise_lightning.features.views_in` does not find them.
        name: stem of the files, and prefix of the tags unless it is ``spectrum``; a second logger of the same name in
            a Trainer becomes ``spectrum_1``, and so on.

    Raises:
        UserError: invalid arguments; when training starts, an unknown submodule or an unsupported strategy; at the
            first measurement, a batch without views, or an output that is not a tensor.

    Attributes:
        record: the measurements so far, a :class:`stepwise_lightning.SpectrumRecord`; empty on ranks other than 0.
        directory: folder of the files, set when training starts.
        picture: path of the figure of the trajectories, set when training ends; None if it was not drawn.

    """

    def __init__(
        self,
        watch: Sequence[Watched] = (),
        probe: str | Tensor | tuple[Tensor, Tensor] = "auto",
        matrices: Sequence[str] = MATRICES[:3],
        center: bool = False,
        num_points: int = 200,
        num_scalars: int = 64,
        prediction: Callable[[Tensor], Tensor] | None = None,
        keep_embeddings: bool = False,
        output: bool = True,
        views: Views | None = None,
        name: str = NAME,
    ) -> None:
        for setting, value, least in (("num_points", num_points, 2), ("num_scalars", num_scalars, 0)):
            if value < least:
                raise UserError(f"{setting} must be at least {least}, got {value}")
        if isinstance(probe, str) and probe not in ("auto", "batch"):
            raise UserError(f"probe must be 'auto', 'batch' or tensors, got {probe!r}")
        if isinstance(watch, str) or not (output or watch):
            raise UserError(f"watch must be a list of names or functions, not empty if output=False, got {watch!r}")
        if unknown := set(matrices) - set(MATRICES):
            raise UserError(f"unknown matrices {sorted(unknown)}; choose from: {', '.join(MATRICES)}")
        self.watch: tuple[Watched, ...] = ("", *watch) if output else tuple(watch)
        if len({label(watched) for watched in self.watch}) < len(self.watch):
            raise UserError(f"watch contains a name twice: {', '.join(map(label, self.watch))}; rename a function")
        self.probe, self.matrices, self.center, self.views, self.name = probe, tuple(matrices), center, views, name
        self.output, self.num_points, self.num_scalars, self.prediction = output, num_points, num_scalars, prediction
        self.keep_embeddings = keep_embeddings
        self.record = SpectrumRecord()
        self.picture: Path | None = None
        self._clock = Clock()
        self._trainer: Any = None  # weak reference to the Trainer of the record
        self._restored = self._pending = self._counts_steps = False
        self._files: RunFiles | None = None  # on rank 0, during training
        self._batch: Any = None
        self._previous_batch: Any = None
        self._measured_at = -1
        self._step_loss = StepLoss()

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to pickle, without the Trainer, its batches and its files."""
        return vars(self) | dict.fromkeys(("_trainer", "_files", "_batch", "_previous_batch"))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move behind the callbacks that may change weights, and make the names of several loggers unique."""
        if stage == "fit":
            check_local(trainer)
            check_strategy(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        savers = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
        loggers = [callback for callback in callbacks if isinstance(callback, SpectrumLogger)]
        others = [callback for callback in callbacks if callback not in (*savers, *loggers)]
        # A new list, because Lightning iterates over the old one.
        trainer.callbacks = [*others, *loggers, *savers]  # type: ignore[attr-defined]
        names = [logger.name for logger in loggers[: loggers.index(self)]]
        if self.name in names:
            self.name = free_name(self.name, names.__contains__).replace("-v", "_")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add all measurements to the checkpoint, as tensors and numbers."""
        # Not state_dict: Lightning refuses a second callback of one class with the same state key.
        state = {"record": self.record.arrays(), "clock": self._clock.state()}
        checkpoint.setdefault(_KEY, {})[self.name] = state

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the measurements of a checkpoint."""
        if trainer.state.fn != "fit":
            return
        if "SpectrumLogger" in checkpoint.get("callbacks", {}):
            raise UserError(
                "the checkpoint was written by stepwise_lightning 0.1: resume it with version 0.1, or start a new run"
            )
        self.record, self._restored = SpectrumRecord(), True
        self._clock = Clock(steps=checkpoint["global_step"])
        if (state := checkpoint.get(_KEY, {}).get(self.name)) is not None:
            self.record, self._clock = SpectrumRecord.from_arrays(state["record"]), Clock(*state["clock"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the schedule, fetch the probe and open the files."""
        check_watched(pl_module, self.watch)
        if not self._restored and (self._trainer is None or self._trainer() is not trainer):
            # the callback is reused in another Trainer
            self.record, self._clock = SpectrumRecord(), Clock(steps=trainer.global_step)
        self._trainer, self._restored, self._pending, self.picture = ref(trainer), False, False, None
        self._batch = self._previous_batch = None
        self._step_loss.close()
        self._counts_steps = self._clock.attach(trainer.optimizers[0] if trainer.optimizers else None)
        step = self._clock.step(trainer)
        self._schedule = Schedule(expected_end(trainer), self.num_points)
        self._schedule.is_due(step - 1)  # skip the steps before a resumed one
        self._probe = self.probe
        if isinstance(self.probe, str):
            pairs = getattr(getattr(trainer, "datamodule", None), "probe_pairs", None)
            self._probe = pairs() if pairs is not None and self.probe == "auto" else "batch"
        self.directory = run_folder(trainer)  # a broadcast: called on every rank
        # The last measurement of a run that ended at this step is repeated, now with a loss.
        self.record.keep(int((self.record.steps < step).sum()) if trainer.is_global_zero else 0)
        self.record.expected_times.clear()
        self._measured_at = -1
        if self.prediction is not None and "cross_correlation" in self.record.matrices:
            self.record.predict(torch.stack([self._predicted(time) for time in self.record.times]))
        if trainer.is_global_zero:
            self._files = RunFiles(trainer, pl_module, self.directory, self.name, self.record, self.num_scalars)
        publish_measures(trainer, self.record, self.name)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure at scheduled steps, before the batch changes the weights."""
        self._previous_batch, self._batch = self._batch, batch
        if not self._step_loss.is_open and (self._pending or self._schedule.is_due(self._clock.step(trainer))):
            self._pending = not self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the mean loss of the measured step when the step is complete."""
        if not self._counts_steps:
            self._clock.advance(1.0)
        if not self._step_loss.is_open:
            return
        self._step_loss.add_batch(trainer, pl_module, outputs)
        if self._clock.step(trainer) > self._measured_at and (loss := self._step_loss.close()) is not None:
            if len(self.record):
                self.record.set_loss(loss)
                if self._files is not None:
                    self._files.add_loss(self.record)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Count the evaluations of the loss in the measured step."""
        self._step_loss.evaluate(trainer, pl_module, loss)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the final weights, and write the arrays and the steps."""
        if self._batch is not None and self._measured_at < self._clock.step(trainer):
            if not self._measure(trainer, pl_module) and self._previous_batch is not None:
                self._batch = self._previous_batch
                self._measure(trainer, pl_module)
        self._step_loss.close()
        self._clock.detach()
        if self._files is not None:
            self._files.close(self.record, ended=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and log the figures, after all results and checkpoints have been written."""
        if (files := self._files) is not None:
            self.picture, self._files = files.draw(self.record), None
            prints_result = any(isinstance(other, Plan) for other in trainer.callbacks)  # type: ignore[attr-defined]
            if not prints_result and (line := files.location(len(self.record), self.picture)):
                rank_zero_info(line)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the measurements when training is interrupted."""
        self._clock.detach()
        if (files := self._files) is not None:
            self._files = None
            with suppress(OSError):  # a full disk must not hide the original error
                files.close(self.record, ended=is_over(trainer))

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Embed the probe on every rank, and measure and write on rank 0; return False for a batch of one sample."""
        step = self._clock.step(trainer)
        from_batch = isinstance(self._probe, str)
        samples = on_device(views_in(self._batch, self.views) if from_batch else views_in(self._probe), pl_module)
        captured = capture(pl_module, samples, self.watch, alone=not self.output) if len(samples[0]) > 1 else {}
        check_finite(captured, samples, pl_module, step)
        if from_batch and trainer.world_size > 1:
            on_cpu = {name: [z.cpu() for z in views] for name, views in captured.items()}
            captured = concatenate_ranks(all_gather_objects(on_cpu))
        if not captured:
            return False
        self._measured_at = step
        self._step_loss.open()
        if trainer.is_global_zero:
            self.record.append(self._measurement(step, captured))
            assert self._files is not None
            self._files.add(self.record)
        publish_measures(trainer, self.record, self.name)
        return True

    def _measurement(self, step: int, captured: dict[str, list[Tensor]]) -> Measurement:
        spectra = spectra_of(captured, self.matrices, self.center)
        measurement = Measurement(step, self._clock.time, spectra=spectra)
        if self.prediction is not None and "cross_correlation" in measurement.spectra:
            measurement.predicted = self._predicted(torch.tensor(measurement.time, dtype=torch.float64))
        if self.keep_embeddings:
            measurement.embeddings = torch.stack(captured[label(self.watch[0])]).float().cpu()
        return measurement

    def _predicted(self, time: Tensor) -> Tensor:
        assert self.prediction is not None
        # One time per call, also in a resumed run, for identical rounding.
        return as_float64(self.prediction(time[None])[0].detach()).cpu()


return_results(SpectrumLogger)


def records_in(checkpoint: Mapping[str, Any]) -> list[SpectrumRecord]:
    """Return the record of each SpectrumLogger in a checkpoint."""
    return [SpectrumRecord.from_arrays(state["record"]) for state in checkpoint.get(_KEY, {}).values()]

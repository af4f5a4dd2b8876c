"""The thin wire from a running Trainer to measures, the record, the loggers and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import ref

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from stepwise_lightning.callbacks.clock import Clock, expected_end
from stepwise_lightning.callbacks.run_files import Outputs
from stepwise_lightning.callbacks.tensorboard import NAME
from stepwise_lightning.distributed import all_gather_objects
from stepwise_lightning.errors import DivergedError, UserError
from stepwise_lightning.features import (
    Views,
    Watched,
    capture,
    check_watched,
    joined,
    label,
    loss_in,
    on_device,
    views_in,
)
from stepwise_lightning.precision import as_float64
from stepwise_lightning.runs.folders import free_name, run_folder
from stepwise_lightning.spectrum.matrices import MATRICES
from stepwise_lightning.spectrum.measures import measure
from stepwise_lightning.spectrum.record import Measurement, Spectrum, SpectrumRecord
from stepwise_lightning.spectrum.schedule import Schedule

_KEY = "stepwise_lightning_spectra"  # in a checkpoint


class SpectrumLogger(L.Callback):
    """Log the full spectrum of embeddings while any LightningModule trains.

    The module is called on one or two views of the same samples, (n, …) each, at log-spaced steps, with batch
    normalisation on the statistics of those samples (see :func:`stepwise_lightning.features.capture`);
    training is bit-identical with and without this callback. In float64, the eigenvalues are computed of

    - ``cross_correlation``: C = (z1ᵀz2 + z2ᵀz1)/2n, where there are two views (``center`` subtracts the means);
    - ``covariance``: the centred covariance of all embeddings, of both views;
    - ``normalized_covariance``: the same of the embeddings divided by their norms, as cosine losses see them;
    - ``tangent_covariance``, if asked for: of these, without their part along the mean of them
      (:func:`stepwise_lightning.spectrum.measures.tangent_coordinates`).

    **Step k** is the state after exactly k optimiser steps (``trainer.global_step``; batches, where Lightning has no
    optimiser): step 0 is the initialisation, and a measurement at step k is made just before step k + 1 changes the
    weights. The loss recorded with it is the mean over the batches of that step of what ``training_step`` returned, NaN
    where that was none. The last measurement is made when training ends, after other callbacks have had their last word
    on the weights (this one moves behind them, but before those that save checkpoints), and has no loss. **Time** is
    the sum of the learning rates of the steps so far: those of the first optimiser, and of its parameter groups the
    largest rate.

    Written at each measurement, with ``<matrix>`` the name of one, or ``submodule.matrix`` for watched submodules:

    - to every logger of the Trainer: ``C/eig_000`` … (descending), ``num_grown``, ``effective_rank``,
      ``participation_ratio``, ``alpha_req``, ``rankme``, with the name of the matrix in the place of ``C``, which is
      that of the cross-correlation, or ``submodule/C``; of a submodule the first 16 eigenvalues. ``At a glance/loss``
      and ``At a glance/num_grown`` are of the matrix to look at first: what the loss drives, if the module has a
      ``driven_matrix`` that says so and it is measured, else the first one. At the end, ``steps/num_distinct`` of it;
    - to TensorBoard also a custom-scalars layout, with charts that have one line a run, and one with all eigenvalues of
      a matrix; and the trajectories as pictures, at the end and from time to time before;
    - to ``spectrum.csv`` in the Trainer's log directory, one value a row: ``step, time, matrix, quantity, mode, value``
      with quantity ``eigenvalue`` (mode 0, 1, …), one of the measures, ``grown_at`` when a mode has grown, or ``loss``
      (matrix empty);
    - at the end of training to ``spectrum.npz`` beside it, everything: :meth:`stepwise_lightning.SpectrumRecord.load`
      reads it, :meth:`stepwise_lightning.SpectrumRecord.arrays` says what is in it;
    - then to ``steps.json`` what :func:`stepwise_lightning.spectrum.detect_steps` finds in each matrix, and to
      ``trajectories.png`` a picture of it, which W&B and MLflow get as an image too.

    ``num_grown`` counts modes while training goes on: those whose eigenvalue has grown tenfold since the first
    measurement and exceeds a tenth of the largest. Which modes were *learned*, in how many distinct steps, can only be
    said of a run that has ended. ``docs/glossary.md`` has all these words.

    It is kept in checkpoints, so that a resumed run goes on with what was measured before, as if it had never stopped:
    ``spectrum.csv`` is written anew up to there, also in another folder. In a checkpoint it takes as much room as in
    the ``.npz``. With other settings than before, what was not measured is NaN. Files of another run are never
    overwritten: beside them it writes ``spectrum-v1.csv`` and so on. ``fast_dev_run`` writes no files.

    Under DDP every process takes part: all embed the same probe pairs, or their parts of the training batch, which are
    gathered, however many samples each has; rank 0 computes and writes. A batch of one sample is passed over, and the
    next one measured.

    Args:
        watch: what to measure besides the module's own output: names of submodules, e.g. ``encoder.backbone``, or
            functions from module and view to embeddings (n, …), which are called by their ``__name__``.
        probe: what to embed. ``"auto"``: ``trainer.datamodule.probe_pairs()`` where there is such a method, else the
            training batch of the step; ``"batch"``: always the training batch, the step's first; or one tensor or a
            pair of tensors. How views are found in a batch: :func:`stepwise_lightning.features.views_in`.
        matrices: which matrices to measure, of those above.
        center: subtract the means before C is formed.
        num_points: about how many measurements to make up to the expected end of training; more if it goes on.
        num_scalars: how many eigenvalues of a matrix become scalars and CSV rows; the ``.npz`` has all.
        prediction: the theory's eigenvalues of C, as a function from time (T,) to (T, d), for instance
            ``LinearBarlowTwins.embedding_eigenvalues``. They are written beside the module's own as
            ``predicted_eigenvalue`` (``cross_correlation/predicted`` in the ``.npz``) and drawn dashed. TensorBoard has
            them under the tags of what they predict, as another run, ``theory`` in the folder of this one; other
            loggers as ``C/predicted_000`` ….
        keep_embeddings: keep the module's own embeddings (or of what is watched first) of every measurement, for
            questions asked later: 4 bytes per measurement, view, sample and dimension, in memory, in the ``.npz`` and
            in each checkpoint.
        output: measure the module's own output, of ``module(view)``. False where it has no ``forward``, or one that
            takes or returns something else: then watched submodules are run on their own, on the view.
        views: a function from a training batch to one or two tensors, where they are not found by themselves.
        name: of files, ``<name>.csv``, and, where it is another than ``spectrum``, of tags, ``<name>/C/eig_000``; a
            second logger of the same name in a Trainer becomes ``spectrum_1``, and so on.

    Raises:
        UserError: bad arguments (a ValueError too); when training starts, an unknown submodule name (the error lists
            those that exist); at the first measurement, a batch without views, or an output that is no tensor.

    Attributes:
        record: what was measured so far, a :class:`stepwise_lightning.SpectrumRecord`.
        directory: where it is written, from the start of training on.
        picture: the file with the trajectories, from the end of training on, None where none is drawn.
        due: by matrix, times at which modes were forecast to be learned, for pictures to mark
            (:class:`stepwise_lightning.ForecastLogger` adds them).

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
            raise UserError(f"watch must be a list of names or functions, not empty without output, got {watch!r}")
        if unknown := set(matrices) - set(MATRICES):
            raise UserError(f"unknown matrices {sorted(unknown)}; choose from: {', '.join(MATRICES)}")
        self.watch: tuple[Watched, ...] = ("", *watch) if output else tuple(watch)
        if len({label(watched) for watched in self.watch}) < len(self.watch):
            raise UserError(f"two watched things have one name: {', '.join(map(label, self.watch))}")
        self.probe, self.matrices, self.center, self.views, self.name = probe, tuple(matrices), center, views, name
        self.output, self.num_points, self.num_scalars, self.prediction = output, num_points, num_scalars, prediction
        self.keep_embeddings = keep_embeddings
        self.record = SpectrumRecord()
        self.picture: Path | None = None
        self.due: dict[str, list[float]] = {}
        self._clock = Clock()
        self._trainer: Any = None  # a reference to the one whose run is recorded
        self._restored = self._late = self._hears_steps = False
        self._outputs: Outputs | None = None  # on rank 0, while training goes on
        self._batch: Any = None
        self._earlier: Any = None  # the one before
        self._measured_at = -1
        self._losses: list[float] | None = None  # of the step that was measured last, while it is under way

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Move behind the callbacks that may change weights, and tell loggers of one name apart."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        savers = [callback for callback in callbacks if isinstance(callback, Checkpoint)]
        loggers = [callback for callback in callbacks if isinstance(callback, SpectrumLogger)]
        others = [callback for callback in callbacks if callback not in (*savers, *loggers)]
        # A new list: Lightning is walking through the old one.
        trainer.callbacks = [*others, *loggers, *savers]  # type: ignore[attr-defined]
        names = [logger.name for logger in loggers[: loggers.index(self)]]
        if self.name in names:
            self.name = free_name(self.name, names.__contains__).replace("-v", "_")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add all measurements so far, as tensors and numbers."""
        # Not by state_dict: Lightning would refuse a second logger in one Trainer.
        state = {"record": self.record.arrays(), "clock": self._clock.state()}
        checkpoint.setdefault(_KEY, {})[self.name] = state

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue with the measurements of a checkpoint."""
        if trainer.state.fn != "fit":
            return
        self.record, self._clock, self._restored = SpectrumRecord(), Clock(), True
        old = checkpoint.get("callbacks", {}).get("SpectrumLogger") if self.name == NAME else None
        if (state := checkpoint.get(_KEY, {}).get(self.name)) is not None:
            self.record, self._clock = SpectrumRecord.from_arrays(state["record"]), Clock(*state["clock"])
        elif old is not None:
            self.record = SpectrumRecord.from_version_0_1(old)
            before, start, rate = old["clock"]
            self._clock = Clock(before, start, rate, checkpoint["global_step"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay out the schedule, fetch the probe pairs and begin the CSV file."""
        check_watched(pl_module, self.watch)
        if not self._restored and (self._trainer is None or self._trainer() is not trainer):
            self.record, self._clock = SpectrumRecord(), Clock()  # another run, of a callback that is used again
        self._trainer, self._restored, self._late, self.picture, self.due = ref(trainer), False, False, None, {}
        self._batch = self._earlier = self._losses = None
        step = self._step(trainer)
        self._schedule = Schedule(expected_end(trainer), self.num_points)
        self._schedule.is_due(step - 1)  # what lies before is done
        self._listen(trainer)
        self._probe = self.probe
        if isinstance(self.probe, str):
            pairs = getattr(getattr(trainer, "datamodule", None), "probe_pairs", None)
            self._probe = pairs() if pairs is not None and self.probe == "auto" else "batch"
        self.directory = run_folder(trainer)  # a broadcast: every rank must ask
        # What was measured at this very step belonged to a run that ended here: now it has a loss too.
        self.record.keep(int((self.record.steps < step).sum()) if trainer.is_global_zero else 0)
        self._measured_at = -1
        if self.prediction is not None and "cross_correlation" in self.record.matrices:
            self.record.predict(torch.stack([self._predicted(time) for time in self.record.times]))
        if trainer.is_global_zero:
            self._outputs = Outputs(trainer, pl_module, self.directory, self.name, self.record, self.num_scalars)

    def _listen(self, trainer: L.Trainer) -> None:
        optimizer: Any = trainer.optimizers[0] if trainer.optimizers else None
        # Where there is none, Lightning puts one that has no rate.
        self._hears_steps = hasattr(optimizer, "register_step_pre_hook") and "lr" in next(
            iter(optimizer.param_groups), ()
        )
        if self._hears_steps:
            self._clock.listen(optimizer)

    def _step(self, trainer: L.Trainer) -> int:
        # Lightning does not count the steps of optimisers that a module steps, or keeps, by itself.
        return max(trainer.global_step, self._clock.steps)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure, if this step is on the schedule, before the batch changes the weights."""
        self._earlier, self._batch = self._batch, batch
        if self._losses is None and (self._late or self._schedule.is_due(self._step(trainer))):
            self._late = not self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss that belongs to the last measurement, when its step is done."""
        if not self._hears_steps:
            self._clock.advance(1.0)
        if self._losses is None:
            return
        if (loss := loss_in(outputs)) is not None:
            # Lightning divides what training_step returned.
            automatic = pl_module.automatic_optimization
            self._losses.append(loss * (trainer.accumulate_grad_batches if automatic else 1))
        if self._step(trainer) > self._measured_at:
            self._end_step()

    def _end_step(self) -> None:
        losses, self._losses = self._losses, None
        if losses and len(self.record):
            self.record.set_loss(sum(losses) / len(losses))
            if self._outputs is not None:
                self._outputs.add_loss(self.record)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the final weights and write the ``.npz`` file, the steps found and the picture."""
        self._losses = None
        if self._batch is not None and self._measured_at < self._step(trainer):
            if not self._measure(trainer, pl_module) and self._earlier is not None:
                self._batch = self._earlier
                self._measure(trainer, pl_module)
        self._losses = None
        self._clock.stop()
        if (outputs := self._outputs) is not None:
            self.picture = outputs.end(self.record, self.due)
            self._outputs = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what has been measured when training is interrupted."""
        self._clock.stop()
        if (outputs := self._outputs) is not None:
            self._outputs = None
            with suppress(OSError):  # a second one, of a full disk, would hide what happened
                outputs.close(self.record)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Embed the probe on every rank; on rank 0, measure it, and hand on what was measured.

        Return whether there was something to measure: a batch of one sample is nothing.
        """
        step = self._step(trainer)
        from_batch = isinstance(self._probe, str)
        samples = on_device(views_in(self._batch, self.views) if from_batch else views_in(self._probe), pl_module)
        captured = capture(pl_module, samples, self.watch, alone=not self.output) if len(samples[0]) > 1 else {}
        check_finite(captured, samples, pl_module, step)
        if from_batch and trainer.world_size > 1:
            captured = joined(all_gather_objects({name: [z.cpu() for z in zs] for name, zs in captured.items()}))
        if not captured:
            return False
        self._measured_at, self._losses = step, []
        if trainer.is_global_zero:
            self.record.append(self._measurement(step, captured))
            assert self._outputs is not None
            self._outputs.add(self.record, self.due)
        return True

    def _measurement(self, step: int, captured: dict[str, list[Tensor]]) -> Measurement:
        measurement = Measurement(step, self._clock.time)
        for name, views in captured.items():
            for matrix in self.matrices:
                if matrix != "cross_correlation" or len(views) == 2:
                    spectrum = Spectrum(*measure(matrix, views, self.center))
                    measurement.spectra[f"{name}.{matrix}" if name else matrix] = spectrum
        if self.prediction is not None and "cross_correlation" in measurement.spectra:
            measurement.predicted = self._predicted(torch.tensor(measurement.time, dtype=torch.float64))
        if self.keep_embeddings:
            measurement.embeddings = torch.stack(captured[label(self.watch[0])]).float().cpu()
        return measurement

    def _predicted(self, time: Tensor) -> Tensor:
        assert self.prediction is not None
        # One by one, also for a run that goes on: together they would be rounded otherwise.
        return as_float64(self.prediction(time[None])[0].detach()).cpu()


def recorded(checkpoint: Mapping[str, Any]) -> list[SpectrumRecord]:
    """Return what each SpectrumLogger had measured when a checkpoint was written; nothing where there was none."""
    return [SpectrumRecord.from_arrays(state["record"]) for state in checkpoint.get(_KEY, {}).values()]


def check_finite(outputs: dict[str, list[Tensor]], samples: list[Tensor], module: nn.Module, step: int) -> None:
    """Raise DivergedError if an output that was captured at ``step`` is not finite; say whether the samples are."""
    for name, views in outputs.items():
        if not all(z.isfinite().all() for z in views):
            cause = "training has most likely diverged; lower the learning rate"
            if not all(x.isfinite().all() for x in samples):
                cause = "the samples hold values that are not finite: look at the data"
            raise DivergedError(f"the output of {name or type(module).__name__} at step {step} is not finite: {cause}")

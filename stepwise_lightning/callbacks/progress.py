"""Printed lines of a run: its plan, its progress and its result."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from stepwise_lightning.callbacks.clock import expected_end
from stepwise_lightning.runs.folders import run_folder
from stepwise_lightning.runs.loggers import logger_kind
from stepwise_lightning.spectrum.matrices import phrase
from stepwise_lightning.spectrum.record import SpectrumRecord

_MIN_SECONDS = 10.0  # between two lines of progress
_MIN_SHARE = 0.05  # of the elapsed time, between two lines of progress


class Plan(L.Callback):
    """Print the model, the data, the number of steps, the seeds and the folder before training starts.

    Args:
        seeds: line of seeds, see :func:`seeds_in_use`.

    """

    def __init__(self, seeds: str) -> None:
        self._seeds = seeds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the plan on rank 0."""
        folder = run_folder(trainer)  # a broadcast
        if trainer.is_global_zero:
            print("\n".join(_plan(trainer, pl_module, folder, self._seeds)), flush=True)


def _plan(trainer: L.Trainer, module: L.LightningModule, folder: Path, seeds: str) -> list[str]:
    data = getattr(trainer, "datamodule", None)
    settings = dict(getattr(data, "hparams", {}))
    images = f" on {settings['data']}" if "data" in settings else ""
    parts = [f"{type(module).__name__}{images}: {_count(sum(w.numel() for w in module.parameters()))} parameters"]
    if hasattr(module, "encoder"):
        parts[0] += f" in {type(module.encoder).__name__}"
    end = expected_end(trainer)
    batch = settings.get("global_batch_size") or settings.get("num_pairs")
    each = f" of {batch} pairs" if batch else ""
    begun = f", from step {trainer.global_step}" if trainer.global_step else ""
    steps = f"{int(end)} steps" if end and math.isfinite(end) else "steps without a limit"
    rate = trainer.optimizers[0].param_groups[0].get("lr") if trainer.optimizers else None
    speed = f", learning rate {rate:g}" if isinstance(rate, float) else ""
    devices = f"{trainer.world_size} × " if trainer.world_size > 1 else ""
    device = trainer.strategy.root_device.type
    threads = torch.get_num_threads()
    device += f" with {threads} thread{'s' * (threads > 1)}" if device == "cpu" else ""
    parts.append(f"{steps}{each}{begun}{speed}, on {devices}{device}")
    return [*parts, seeds, "nothing is written" if trainer.fast_dev_run else f"writes to {folder}"]  # type: ignore[attr-defined]


def seeds_in_use(config: dict[str, Any]) -> str:
    """Return ``seed_everything`` and the seeds of single classes in a configuration, in one line."""
    first = config["seed_everything"]
    first = f"torch's seed {torch.initial_seed()}" if first is False else f"seed_everything {first}"
    return f"seeds: {', '.join([first, *_class_seeds(config)])}"


def _class_seeds(config: Any, path: str = "") -> Iterator[str]:
    """Yield the names, as options of the command line, and values of the seeds in a configuration."""
    if isinstance(config, (list, tuple)):
        for item in config:
            yield from _class_seeds(item, path)
    elif isinstance(config, dict):
        for key, value in config.items():
            name = path if key == "init_args" else f"{path}.{key}".removeprefix(".")
            if (key == "seed" or key.endswith("_seed")) and value is not None:
                yield f"{name} {value}"
            yield from _class_seeds(value, name)


def _count(number: int) -> str:
    for size, unit in ((10**6, "million"), (10**3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


class LineProgress(ProgressBar):
    """Progress for output that is not a terminal: a line every ten seconds, or every 5 % of the elapsed time."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self.note = ""  # appended to each line

    def disable(self) -> None:
        """Disable output; Lightning calls this on ranks above 0."""
        self._enabled = False

    def enable(self) -> None:
        """Enable output."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the timer."""
        self._start = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if enough time has passed."""
        now = time.monotonic()
        elapsed = now - self._start
        if self._enabled and now - self._last >= max(_MIN_SECONDS, _MIN_SHARE * elapsed):
            self._last = now
            print(self._line(trainer, pl_module, elapsed), flush=True)

    def _line(self, trainer: L.Trainer, module: L.LightningModule, elapsed: float) -> str:
        step, end = trainer.global_step, expected_end(trainer)
        known = end is not None and math.isfinite(end) and step > self._first_step
        left = f", about {_span(elapsed * (end - step) / (step - self._first_step))} left" if known else ""
        metrics = {name: value for name, value in self.get_metrics(trainer, module).items() if name != "v_num"}
        shown = "".join(f", {name} {_number(float(value))}" for name, value in metrics.items())  # type: ignore[arg-type]
        note = f", {self.note}" if self.note else ""
        return f"step {step}{f' of {int(end)}' if known else ''}{shown}, {_span(elapsed)}{left}{note}"


def _span(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def outcome(trainer: L.Trainer, loggers: Sequence[Any], threshold: float = 0.0) -> list[str]:
    """Return the lines printed after training: folder, number of steps, picture, commands to view the run.

    Args:
        trainer: after ``fit``.
        loggers: its ``SpectrumLogger`` callbacks.
        threshold: θ of a forecast for the matrix that the loss drives; without a mode above it no steps are counted.

    """
    folder = run_folder(trainer)
    lines = [f"run      {folder}, {trainer.global_step} steps"]
    driven = getattr(trainer.lightning_module, "driven_matrix", None)
    for logger in loggers:
        if len(logger.record):  # on rank 0
            lines.append(f"found    {_found(logger.record, driven, threshold)}")
        if logger.picture is not None:
            lines.append(f"picture  {logger.picture}")
    lines += [f"watch    {command}" for logger in trainer.loggers if (command := _watching(logger))]
    return [*lines, f"table    stepwise summary {folder}"] if loggers else lines


def _watching(logger: Any) -> str:
    """Return the command or the address that shows a logger's run, or ''."""
    kind = logger_kind(logger)
    if kind == "TensorBoardLogger":
        return f"tensorboard --logdir {logger.root_dir}"
    if kind == "WandbLogger":
        run = logger.experiment
        return str(run.url) if getattr(run, "url", None) else f"wandb sync {Path(run.dir).parent}"
    if kind == "MLFlowLogger":
        return f"mlflow ui --backend-store-uri {logger._tracking_uri}"
    return ""


def _found(record: SpectrumRecord, driven: str | None, threshold: float) -> str:
    """Return the number of distinct steps of each matrix, first that of the matrix that the loss drives."""
    if driven in record.matrices and (largest := float(record.eigenvalues(driven)[-1, 0])) < threshold:
        return (
            f"no mode learned yet in {phrase(driven)}: the largest eigenvalue is {largest:.2g}, below {threshold:.2g}"
        )
    counts = {}
    for matrix in sorted(record.matrices, key=lambda matrix: matrix != driven):
        with suppress(ValueError):  # measured less than twice
            counts[matrix] = record.detect_steps(matrix).num_distinct
    if not counts:
        return "too few measurements to detect steps"
    with_steps = {phrase(matrix): count for matrix, count in counts.items() if count}
    if not with_steps:
        return f"no steps in {', '.join(phrase(matrix) for matrix in counts if '.' not in matrix)}"
    (first, count), *others = with_steps.items()
    rest = "".join(f", {number} in {matrix}" for matrix, number in others)
    return f"{count} distinct step{'' if count == 1 else 's'} in {first}{rest}"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"


def describe_bar(progress: ProgressBar | None, text: str) -> None:
    """Set the description of the training bar of tqdm or rich; other progress bars have none."""
    if isinstance(progress, RichProgressBar):
        if progress.progress is not None and progress.train_progress_bar_id is not None:
            progress.progress.update(progress.train_progress_bar_id, description=text)
    elif isinstance(progress, TQDMProgressBar):
        bar = progress.train_progress_bar
        if getattr(bar, "desc", text) != text:  # a disabled bar has no description
            bar.set_description(text, refresh=False)

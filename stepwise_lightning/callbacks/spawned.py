"""Results of ``ddp_spawn`` and ``ddp_fork`` in the calling process: spectra, folder and progress of the run."""

from __future__ import annotations

import io
from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from stepwise_lightning.runs.folders import folder_of_run, set_spawned_folder
from stepwise_lightning.spectrum.record import SpectrumRecord

_KEY = "stepwise_lightning"


def return_results(kind: type) -> None:
    """Let the processes that Lightning starts return the results of the SpectrumLoggers, instances of ``kind``.

    The callbacks of the calling process see nothing of the training. There is no public hook: Lightning returns the
    weights, the metrics and the path of the best checkpoint.
    """
    collect, restore = _MultiProcessingLauncher.get_extra_results, _MultiProcessingLauncher.update_main_process_results

    @wraps(collect)
    def get_extra_results(launcher: Any, trainer: L.Trainer) -> dict[str, Any]:
        extra = collect(launcher, trainer)
        if trainer.state.fn == "fit":
            loggers = _of_kind(trainer, kind)
            spectra = [(each.record.arrays(), each.record.expected_times, str(each.picture or "")) for each in loggers]
            buffer = io.BytesIO()  # as Lightning: tensors would share memory with a process that ends
            torch.save((str(folder_of_run(trainer)), spectra, trainer.fit_loop.state_dict()), buffer)
            extra[_KEY] = buffer.getvalue()
        return extra

    @wraps(restore)
    def update_main_process_results(launcher: Any, trainer: L.Trainer, extra: dict[str, Any]) -> None:
        restore(launcher, trainer, extra)
        if _KEY not in extra:
            return
        folder, spectra, progress = torch.load(io.BytesIO(extra[_KEY]), weights_only=True)
        set_spawned_folder(trainer, Path(folder))
        trainer.fit_loop.load_state_dict(progress)
        for logger, (arrays, expected_times, picture) in zip(_of_kind(trainer, kind), spectra, strict=True):
            logger.record, logger.directory = SpectrumRecord.from_arrays(arrays), Path(folder)
            logger.record.expected_times, logger.picture = expected_times, Path(picture) if picture else None

    _MultiProcessingLauncher.get_extra_results = get_extra_results  # type: ignore[method-assign, assignment]
    _MultiProcessingLauncher.update_main_process_results = (  # type: ignore[method-assign]
        update_main_process_results  # type: ignore[assignment]
    )


def _of_kind(trainer: L.Trainer, kind: type) -> list[Any]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]

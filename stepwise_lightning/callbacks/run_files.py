"""Where the measurements of a run go: to files, to the loggers of its Trainer, into pictures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L

from stepwise_lightning.callbacks.pictures import keep_picture
from stepwise_lightning.callbacks.tensorboard import Charts, Lead
from stepwise_lightning.callbacks.writers import SpectrumFiles
from stepwise_lightning.spectrum.record import SpectrumRecord

# Seconds of training per second of drawing: what the figures that are redrawn while a run goes on may cost.
_DRAWING_SHARE = 500


class Outputs:
    """What is written of a record that grows, on rank 0 alone; ``fast_dev_run`` writes no files.

    Raises:
        OSError: a file cannot be written (here or later).

    """

    def __init__(
        self, trainer: L.Trainer, module: L.LightningModule, folder: Path, name: str, record: SpectrumRecord, modes: int
    ) -> None:
        self._trainer, self._module, self._name, self._modes = trainer, module, name, modes
        files = not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._files = SpectrumFiles(folder, name, record, modes) if files else None
        self._charts: Charts | None = None  # from the first measurement on, which says which matrices there are
        self._next_figure = time.perf_counter() + _DRAWING_SHARE

    def add(self, record: SpectrumRecord, due: Mapping[str, Sequence[float]]) -> None:
        """Write the last measurement, and perhaps draw what there is so far."""
        if self._files is not None:
            self._files.add(record.rows(-1, self._modes))
        if self._charts is None:
            self._charts = Charts(self._trainer, Lead.of(self._module, record.matrices), self._name, self._modes)
        self._charts.add(record)
        if time.perf_counter() > self._next_figure:
            start = time.perf_counter()
            self._charts.draw(record, due)
            self._next_figure = time.perf_counter() + _DRAWING_SHARE * (time.perf_counter() - start)

    def add_loss(self, record: SpectrumRecord) -> None:
        """Write the loss of the last measurement, which is known later."""
        if self._charts is not None:
            self._charts.add_loss(record)
        if self._files is not None:
            self._files.add(row for row in record.rows(-1, 0) if row[3] == "loss")

    def end(self, record: SpectrumRecord, due: Mapping[str, Sequence[float]]) -> Path | None:
        """Write what can be said of a run that has ended; return the path of its picture, None where none is drawn."""
        if self._charts is not None and len(record):
            self._charts.end(record, due)
        self.close(record, ended=True)
        if self._files is None:
            return None
        return keep_picture(self._trainer, record, self._files.named("trajectories", ".png"), self._name, due)

    def close(self, record: SpectrumRecord, ended: bool = False) -> None:
        """Write the arrays, and what is still to be written elsewhere."""
        if self._charts is not None:
            self._charts.close()
        if self._files is not None:
            self._files.close(record, ended)

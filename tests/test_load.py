"""Long runs and large inputs need bounded memory, measured as resident memory in Linux's /proc."""

import multiprocessing
import re
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepwise_lightning import BarlowTwins, FixedCropPairs, LinearEncoder, SpectrumLogger, TwoViewDataModule
from stepwise_lightning.callbacks.run_files import SpectrumTable
from stepwise_lightning.spectrum.schedule import log_spaced_steps

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
MEGABYTE = 2**20


def resident(pid="self", private=False):
    """Return the resident memory of a process in bytes, or its private part only."""
    path, keys = ("smaps_rollup", "Private_(?:Clean|Dirty)") if private else ("status", "VmRSS")
    text = Path(f"/proc/{pid}/{path}").read_text()
    return 1024 * sum(int(size) for size in re.findall(rf"^{keys}:\s+(\d+) kB", text, re.MULTILINE))


class Memory(L.Callback):
    """Records the resident memory of this process at the given steps."""

    def __init__(self, steps):
        self.steps, self.bytes = steps, []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.steps:
            self.bytes.append(resident())


def test_memory_does_not_grow_over_20_000_steps(tmp_path):
    pairs = FixedCropPairs(num_pairs=32, crop_size=6)
    memory, spectra = Memory([2000, 11_000, 20_000]), SpectrumLogger(num_points=400)
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_steps=20_000, accelerator="cpu", callbacks=[memory, spectra],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(BarlowTwins(LinearEncoder(108, 8, 1e-3), 1e-4, normalize=False), datamodule=pairs)
    assert len(spectra.record) > 250 and len(memory.bytes) == 3
    # About 150 measurements of 3 matrices lie between the last two; their record has 30 KB.
    assert memory.bytes[2] - memory.bytes[1] < 8 * MEGABYTE, memory.bytes
    assert memory.bytes[2] - memory.bytes[0] < 16 * MEGABYTE, memory.bytes
    (events,) = tmp_path.rglob("events.*")
    assert events.stat().st_size < 4 * MEGABYTE
    for tag, points in (("C/eig_007", len(spectra.record)), ("train/loss", 20_000 // 50)):
        assert len(EventAccumulator(str(events), {"scalars": 0}).Reload().Scalars(tag)) == points


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # on two cores
def test_workers_share_the_images(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 10_000), ("val", 256)):
        for label in range(10):
            folder = tmp_path / part / f"class_{label}"
            folder.mkdir(parents=True)
            for index in range(label, count, 10):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{index:05}.png")
    data = TwoViewDataModule(str(tmp_path), global_batch_size=100, num_workers=4)
    data.setup("fit")
    before = resident()
    labels, workers = [], []
    for number, (x1, x2, label) in enumerate(data.train_dataloader()):
        labels.append(label)
        assert x1.shape == x2.shape == (100, 3, 32, 32)
        if number in (20, 90):
            workers.append([resident(worker.pid, private=True) for worker in multiprocessing.active_children()])
    assert len(labels) == 100 and np.bincount(np.concatenate(labels)).tolist() == [1000] * 10
    # The workers share one copy of the images, of 31 MB.
    assert resident() - before < 200 * MEGABYTE
    assert len(workers[1]) == 4 and max(workers[1]) < 250 * MEGABYTE, workers
    assert sum(workers[1]) - sum(workers[0]) < 40 * MEGABYTE, workers


def test_table_of_100_000_rows_needs_little_memory(tmp_path):
    def rows(start, end):
        return ((k // 64, 1e-3 * k, "covariance", "eigenvalue", k % 64, 1 / (k + 1)) for k in range(start, end))

    path, before = tmp_path / "spectrum.csv", resident()
    whole = SpectrumTable(path)
    for k in range(0, 100_000, 64):
        whole.add(rows(k, min(k + 64, 100_000)))
    content = path.read_bytes()
    continued = SpectrumTable(path, rows(0, 60_032))  # as in a run that resumes at step 938
    continued.add(rows(60_032, 100_000))
    assert path.read_bytes() == content and content.count(b"\n") == 100_001
    assert resident() - before < 30 * MEGABYTE


def test_schedule_of_200_000_steps():
    steps = log_spaced_steps(200_000, 200)
    assert len(steps) < 210 and steps[-2:] == [199_999, 200_000] and np.diff(steps).min() > 0

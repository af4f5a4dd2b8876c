"""Atomic writes: a kill or a full disk leaves complete files."""

import csv
import errno
import json
import os
import random
import signal
import stat
import subprocess
import time

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from same_runs import assert_same_run
from survival import job, log_of, newest, run_jobs, write_config
from survival import write_images as write_survival_images
from tiny_runs import changed, stepwise, write_images

from reproduce.claims import Claim
from reproduce.figure import Outcome, write_outputs
from reproduce.report import write_report
from stepwise_lightning import SpectrumRecord
from stepwise_lightning.callbacks import run_files, save_config
from stepwise_lightning.callbacks.run_files import SpectrumTable
from stepwise_lightning.files import atomic_write, atomic_write_text, reserve
from stepwise_lightning.runs import AtomicCheckpointIO, checkpoints

KILLS = 50
ROOT = os.geteuid() == 0


def record_of(number):
    """Return a record whose entries are all ``number``, 800 kB."""
    return SpectrumRecord.of(torch.full((2,), number), torch.full((2, 50_000), number), steps=torch.full((2,), number))


def write_all(folder, number):
    """Write every kind of file with ``number`` as its content."""
    AtomicCheckpointIO().save_checkpoint({"weights": torch.full((300_000,), number)}, folder / "last.ckpt")
    record_of(number).save(folder / "spectrum.npz")
    table = SpectrumTable(folder / "spectrum.csv", [(number, 0.5, "covariance", "eigenvalue", 0, 1.0)] * 2000)
    table.add([(number, 0.5, "", "loss", "", 1.0)] * 2000)
    outcome = Outcome(Figure((1, 1)), ["value"], [[number]] * 1000, [Claim("a", "b", number, "<=", 9999)], [])
    facts = {
        "name": "figure", "title": "", "paper": "", "data_set": "photos", "seeds": [0], "settings": {},
        "options": {"profile": "cpu"}, "runs": [], "seconds": number,
    }  # fmt: skip
    write_outputs(folder / "figure", outcome, facts)
    write_report(folder, ["figure"])


def numbers_in(folder):
    """Return the number in each file; fail if a file is incomplete or has several numbers."""
    weights = torch.load(folder / "last.ckpt", weights_only=True)["weights"]
    with np.load(folder / "spectrum.npz") as saved:
        steps = saved["cross_correlation"].flatten()
    with (folder / "spectrum.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    with (folder / "figure/data.csv").open(newline="") as file:
        data = list(csv.reader(file))[1:]
    assert len(weights) == 300_000 and len(steps) == 100_000 and len(data) == 1000 and len(rows) in (2000, 4000)
    assert (folder / "figure/figure.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    assert (folder / "figure/figure.pdf").read_bytes().endswith(b"%%EOF\n")
    claims = json.loads((folder / "figure/claims.json").read_text())
    report = (folder / "report.html").read_text()
    assert report.endswith("</body></html>\n") and all(len(row) == 6 for row in rows)
    numbers = [set(weights.tolist()), set(map(int, steps)), {int(r[0]) for r in rows}, {int(r[0]) for r in data}]
    numbers += [{claims["seconds"]}, {int(report.split("<td class='number'>")[1].split(" s<")[0])}]
    assert all(len(values) == 1 for values in numbers), numbers
    return [values.pop() for values in numbers]


@pytest.mark.slow
def test_fifty_kills_while_writing_leave_complete_files(tmp_path):
    write_all(tmp_path, 0)
    start = time.monotonic()
    write_all(tmp_path, 1)
    duration, draw, numbers, interrupted = time.monotonic() - start, random.Random(0), numbers_in(tmp_path), 0
    for _ in range(KILLS):
        before, first = numbers, max(numbers) + 1
        reader, writer = os.pipe()
        if not (child := os.fork()):
            for number in range(first, first + 1000):
                write_all(tmp_path, number)
                os.write(writer, f"{number}\n".encode())
            os._exit(0)
        os.close(writer)
        time.sleep(draw.uniform(0.01, 1.2 * duration))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
        with open(reader) as rounds:
            finished = list(map(int, rounds))
        numbers = numbers_in(tmp_path)
        for number, old in zip(numbers, before, strict=True):
            assert number in ((finished[-1], finished[-1] + 1) if finished else (old, first))
        interrupted += bool(list(tmp_path.rglob(".*.partial*")))
    assert interrupted >= KILLS / 5  # a fifth of the kills came within a write
    write_all(tmp_path, max(numbers) + 1)
    assert set(numbers_in(tmp_path)) == {max(numbers) + 1}


def test_simultaneous_writes_of_a_file_are_complete(tmp_path):
    path = tmp_path / "spectrum.csv"

    def write(partial):
        partial.write_text("first")
        atomic_write_text(path, "second, which is longer")
        assert path.read_text() == "second, which is longer" and partial.read_text() == "first"

    atomic_write(path, write)
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_files_of_killed_writes_are_removed_after_an_hour(tmp_path):
    abandoned, recent, other = (tmp_path / f".{name}.csv" for name in ("a.partial-1", "a.partial-2", "b.partial-3"))
    for path, minutes in ((abandoned, 61), (recent, 59), (other, 61)):
        path.write_text("half")
        os.utime(path, (time.time() - 60 * minutes,) * 2)
    atomic_write_text(tmp_path / "a.csv", "whole")
    assert set(tmp_path.iterdir()) == {tmp_path / "a.csv", recent, other}


@pytest.mark.parametrize(
    "file", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("config.yaml", "spectrum.csv")), "last.ckpt"]
)
def test_two_runs_that_start_at_one_moment_write_separate_files(file, monkeypatch, tmp_path):
    """Train a second run in the same folder at the moment at which the first one has found that a file is missing."""
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    logger = "lightning.pytorch.loggers.TensorBoardLogger"  # CSVLogger has one metrics.csv for a folder
    config = changed({"trainer.logger.class_path": logger, "trainer.logger.init_args.version": 0})
    others = ["--trainer.max_steps=3"]

    def reserve_later(path):
        if path.name == file and others:
            stepwise("fit", others.pop(), config=config)
        return reserve(path)

    for module in (checkpoints, run_files, save_config):
        monkeypatch.setattr(module, "reserve", reserve_later)
    stepwise("fit", config=config)
    folder = tmp_path / "runs/lightning_logs/version_0"
    saved = [torch.load(path, weights_only=True) for path in folder.glob("checkpoints/*.ckpt")]
    configured = [yaml.safe_load(path.read_text())["trainer"]["max_steps"] for path in folder.glob("config*.yaml")]
    assert sorted(checkpoint["global_step"] for checkpoint in saved) == sorted(configured) == [2, 3]
    assert sorted(len(SpectrumRecord.load(path)) for path in folder.glob("spectrum*.npz")) == [3, 4]


def test_failed_write_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "claims.json"
    atomic_write_text(path, "old")

    def fail(partial):
        partial.write_text("half of the n")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        atomic_write(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    atomic_write_text(tmp_path / "folder" / "claims.json", "new")
    assert (tmp_path / "folder" / "claims.json").read_text() == "new"
    with pytest.raises(OSError, match="cannot write .*folder: Is a directory; what was saved before is kept"):
        atomic_write_text(tmp_path / "folder", "new")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EACCES])
def test_file_system_that_cannot_sync_folders(number, monkeypatch, tmp_path):
    sync = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    stepwise("fit")
    assert (tmp_path / "runs/lightning_logs/version_0/checkpoints/last.ckpt").is_file()


def test_file_system_that_cannot_sync_files(monkeypatch, tmp_path):
    number = errno.EINVAL

    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write_text(tmp_path / "claims.json", "new")
    assert (tmp_path / "claims.json").read_text() == "new"
    number = errno.EIO
    with pytest.raises(OSError, match="cannot write .*claims.json: Input/output error"):
        atomic_write_text(tmp_path / "claims.json", "newer")
    assert (tmp_path / "claims.json").read_text() == "new"


def read_bytes(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")  # NumPy 1.26, 2.0
@pytest.mark.skipif(not ROOT, reason="only root can mount a small disk")
def test_full_disk_leaves_old_files(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], check=True)
    try:
        write_all(tmp_path, 1)
        table = SpectrumTable(tmp_path / "spectrum.csv", [(1, 0.5, "", "loss", "", 1.0)])
        size = os.statvfs(tmp_path)
        (tmp_path / "ballast").write_bytes(bytes(size.f_bavail * size.f_frsize))
        before = read_bytes(tmp_path)
        full = "No space left on device; what was saved before is kept; free some space"
        for write in (
            lambda: AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(300_000)}, tmp_path / "last.ckpt"),
            lambda: record_of(1).save(tmp_path / "spectrum.npz"),
            lambda: table.add([(1, 0.5, "", "loss", "", 1.0)] * 5000),
            lambda: SpectrumTable(tmp_path / "spectrum.csv", [(2, 0.5, "", "loss", "", 1.0)]),
            lambda: write_report(tmp_path, ["figure"]),
        ):
            with pytest.raises(OSError, match=full):
                write()
        assert read_bytes(tmp_path) == before
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    "disk",
    [
        pytest.param(
            "full", marks=[pytest.mark.slow, pytest.mark.skipif(not ROOT, reason="only root can mount a small disk")]
        ),
        pytest.param("limit", marks=pytest.mark.slow),
    ],
)
def test_run_on_a_full_disk_is_reported_and_resumes_with_free_space(disk, tmp_path):
    """The disk fills up during training, or a limit on the file size is set, which needs no root."""
    config = write_config(tmp_path / "config.yaml", write_survival_images(tmp_path / "images"), "VICReg", 0)
    (tmp_path / "run").mkdir()
    if disk == "full":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path / "run")], check=True)
    try:
        broken, again = job(tmp_path / "run", config, "batch_start:16", disk=disk), job(tmp_path / "run", config)
        done = run_jobs([broken, again, job(tmp_path / "whole", config)])
        log = log_of(again, size=100_000)
        assert [each["statuses"] for each in done] == [[1], [0], [0]], log
        (line,) = [line for line in log.splitlines() if line.startswith("stepwise: error: ")]
        assert line.startswith("stepwise: error: cannot write ") and line.endswith("free some space")
        assert "Traceback" not in log and "version_0 from step 14" in log
        assert_same_run(newest(tmp_path / "run"), newest(tmp_path / "whole"))
    finally:
        if disk == "full":
            subprocess.run(["umount", str(tmp_path / "run")], check=True)

"""Addresses such as ``s3://bucket/runs`` are refused where a local folder is needed."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tiny_runs import changed, refusal, write_images
from torch.utils.data import DataLoader, TensorDataset

from stepwise_lightning import BarlowTwins, LastCheckpoint, LinearEncoder, SpectrumLogger, SpectrumRecord
from stepwise_lightning.errors import UserError
from stepwise_lightning.files import local_path

ADDRESSES = ["memory://bucket/root", "file:///bucket/root"]


def fit(callback: L.Callback, **settings) -> None:
    x = torch.randn(4, 3)
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", enable_checkpointing=isinstance(callback, LastCheckpoint),
        enable_progress_bar=False, enable_model_summary=False, callbacks=callback, **settings,
    )  # fmt: skip
    trainer.fit(BarlowTwins(LinearEncoder(3, 2), 1e-3), DataLoader(TensorDataset(x, x), 4))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("callback", [SpectrumLogger, LastCheckpoint])
def test_run_in_a_remote_folder_is_refused(address, callback, folder):
    for settings in ({"logger": False}, {"logger": CSVLogger(address)}):
        with pytest.raises(UserError, match=f"{address}.* is an address, not a path"):
            fit(callback(), default_root_dir=address, **settings)
    assert not list(folder.glob("*:*"))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:The number of training batches")
def test_remote_root_with_a_local_logger_trains(folder):
    fit(SpectrumLogger(), logger=TensorBoardLogger(folder), default_root_dir=ADDRESSES[0])
    assert (folder / "lightning_logs/version_0/spectrum.csv").is_file() and not list(folder.glob("*:*"))


def test_command_in_a_remote_folder_is_refused(capsys, folder):
    write_images(folder)
    address = "s3://bucket/runs"  # its package is not installed
    configurations = [
        changed({"trainer.logger.init_args.save_dir": address}),
        changed({"trainer.logger": False, "trainer.default_root_dir": address}),
        changed({"trainer.logger": None, "trainer.default_root_dir": address}),
    ]
    for config in configurations:
        line = refusal(capsys, "fit", config=config)
        assert line.startswith(
            "stepwise: error: s3://bucket/runs is an address, not a path: files are written to local"
        )
    assert not list(folder.glob("*:*"))


def test_record_is_not_saved_at_an_address(folder):
    record = SpectrumRecord.of(torch.ones(2), torch.ones(2, 3), steps=torch.arange(2))
    with pytest.raises(UserError, match="s3://bucket/run.npz is an address"):
        record.save("s3://bucket/run.npz")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("path", ["C:/runs", "C:\\runs", "runs", "/runs", "a:b/c", "./s3:/x"])
def test_local_paths_are_accepted(path):
    assert local_path(path) == Path(path)

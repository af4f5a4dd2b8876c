"""Configurations and runs of earlier versions, whose class paths have moved."""

import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny_runs import stepwise, write_images

from stepwise_lightning import LinearEncoder, load_encoder
from stepwise_lightning.runs.moved_classes import with_current_classes

STORED = Path(__file__).parent / "config_0_2_0.yaml"  # of a run of commit 373fe20


@pytest.mark.filterwarnings("ignore:CollapseWatch is deprecated:FutureWarning")
def test_run_of_an_earlier_version_is_resumed_and_loaded(tmp_path, monkeypatch, caplog):
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    stepwise("fit", f"--config={STORED}")
    run = Path("runs/tiny/version_0")
    assert "stepwise_lightning.evaluation.OnlineKNN has moved: write stepwise_lightning.callbacks.online" in caplog.text
    Path("runs/.latest_TensorBoardLogger_tiny.json").unlink()  # which earlier versions did not write
    shutil.copy(STORED, run / "config.yaml")
    stepwise("fit", f"--config={run / 'config.yaml'}", "--trainer.max_steps=4", "--ckpt_path=last")
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert isinstance(load_encoder(run), LinearEncoder)


@pytest.mark.parametrize(
    ("before", "now"),
    [("callbacks.SpectrumLogger", "callbacks.spectrum_logger"), ("checkpoints.LastCheckpoint", "runs")],
)
def test_class_paths_of_version_0_1_are_replaced(before, now):
    module, _, name = with_current_classes(f"stepwise_lightning.{before}").rpartition(".")
    assert module == f"stepwise_lightning.{now}" and hasattr(import_module(module), name)


def test_only_class_paths_are_replaced(caplog):
    moved = "stepwise_lightning.evaluation.OnlineKNN"
    text = f"class_path: {moved}\nfolder: /my.stepwise_lightning.evaluation/x\nother: my{moved}\nfile: evaluation.py\n"
    current = with_current_classes(text)
    assert current == text.replace(f" {moved}", " stepwise_lightning.callbacks.online_evaluation.OnlineKNN")
    assert with_current_classes(current) == current and len(caplog.messages) == 1

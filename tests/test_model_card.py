"""Model cards of the last and of an earlier checkpoint of a run."""

import pytest
import torch
from tiny_runs import changed, stepwise, write_images

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.commands.model_card import model_card


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_card_of_a_checkpoint_has_the_spectrum_and_the_accuracy_until_its_step(logger, tmp_path, monkeypatch):
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    checkpoints = {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}
    callbacks = [
        {"class_path": "stepwise_lightning.SpectrumLogger"},
        {"class_path": "stepwise_lightning.OnlineKNN", "init_args": {"watch": "encoder"}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints},
    ]
    loggers = {"class_path": f"lightning.pytorch.loggers.{logger}", "init_args": {"save_dir": "runs"}}
    stepwise(
        "fit", config=changed({"trainer.logger": loggers, "trainer.callbacks": callbacks, "trainer.max_steps": 12})
    )
    run = "runs/lightning_logs/version_0"
    record = SpectrumRecord.load(run)
    for step, validated in ((3, None), (6, 4), (12, 12)):  # four steps in an epoch, then a validation
        card = model_card(f"{run}/checkpoints/step={step}.ckpt", code=[])
        assert f"| steps | {step}, seed 0 |" in card
        assert f"(step {validated})" in card if validated else "no accuracy of k-NN or a probe" in card
        assert "val/knn_top1" in card or not validated
        (last,) = (record.steps == step).nonzero().flatten().tolist()
        values = " ".join(f"{value:.3g}" for value in record.eigenvalues("covariance")[last].tolist())
        assert f" {values} |" in card
    assert not torch.equal(record.eigenvalues("covariance")[-1], record.eigenvalues("covariance")[0])

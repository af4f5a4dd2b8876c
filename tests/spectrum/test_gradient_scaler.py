"""Steps that a gradient scaler skips in 16-mixed precision, with the real scaler on a CPU."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from stepwise_lightning import BarlowTwins, LastCheckpoint, SpectrumLogger
from stepwise_lightning.spectrum import embedding_eigenvalues

RATE, BATCHES = 0.125, 8


class Weights(L.Callback):
    """Distinct values of the weights."""

    def __init__(self):
        self.values = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        weights = pl_module.encoder.weight.detach().clone()
        if not self.values or not torch.equal(weights, self.values[-1]):
            self.values.append(weights)

    def on_train_end(self, trainer, pl_module):
        self.on_train_batch_start(trainer, pl_module)


def fit(folder, optimizer, steps, checkpoint=None):
    torch.manual_seed(0)
    module = BarlowTwins(nn.Linear(6, 3), RATE, normalize=False, optimizer=optimizer)
    weights, probe = Weights(), torch.randn(2, 16, 6).unbind()
    spectra = SpectrumLogger(num_points=100, probe=probe)
    # Scaled gradients overflow float16 at first; the factor is divided by 8 after each skipped step.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, backoff_factor=2.0**-3, growth_interval=1000)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler)], logger=False,
        callbacks=[weights, spectra, LastCheckpoint(1)], enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip
    data = [torch.randn(2, 16, 6).unbind() for _ in range(BATCHES // 2)]
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None), ckpt_path=checkpoint)
    expected = [embedding_eigenvalues(torch.cat([nn.functional.linear(x, w) for x in probe])) for w in weights.values]
    return spectra.record, torch.stack(expected)


@pytest.mark.parametrize("optimizer", [None, partial(torch.optim.SGD, fused=True)], ids=["sgd", "fused"])
def test_skipped_steps_do_not_count(optimizer, tmp_path):
    record, expected = fit(tmp_path, optimizer, BATCHES)
    assert 2 < len(expected) < BATCHES  # two steps are skipped
    assert record.steps.tolist() == list(range(len(expected)))
    assert torch.equal(record.times, RATE * record.steps)
    torch.testing.assert_close(record.eigenvalues("covariance"), expected, rtol=1e-5, atol=0)


def test_resume_after_skipped_steps_continues_the_record(tmp_path):
    whole, _ = fit(tmp_path / "whole", None, BATCHES)
    part, _ = fit(tmp_path / "resumed", None, 4)
    resumed, _ = fit(tmp_path / "resumed", None, BATCHES, *tmp_path.glob("resumed/**/last.ckpt"))
    assert len(part) == 3
    assert torch.equal(resumed.steps, whole.steps) and torch.equal(resumed.times, whole.times)
    assert torch.equal(resumed.eigenvalues("covariance"), whole.eigenvalues("covariance"))

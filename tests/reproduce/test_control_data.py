"""Data modules and learning rates of the controls."""

import lightning as L
import pytest
import torch

from reproduce.control_data import IdenticalViews, NoiseImages, SafeRate, WrongPairs
from stepwise_lightning import BarlowTwins, Encoder, TwoViewDataModule


def prepared(cls, **settings):
    data = cls("photos", "weak", image_size=16, global_batch_size=32, num_probe_pairs=8, **settings)
    data.setup("fit")
    return data


def test_identical_views_are_the_first_views():
    two, one = (next(iter(prepared(cls).train_dataloader())) for cls in (TwoViewDataModule, IdenticalViews))
    assert torch.equal(two[0], one[0]) and torch.equal(one[0], one[1]) and not torch.equal(two[0], two[1])
    assert torch.equal(prepared(IdenticalViews).probe_pairs()[1], prepared(TwoViewDataModule).probe_pairs()[1])


def fit_noise(share, steps, checkpoint=None):
    module = BarlowTwins(Encoder(4, alpha=1e-3, seed=0), 0.004, off_diagonal_weight=1.0, normalize=False, center=True)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[SafeRate(share)],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=prepared(NoiseImages, seed=0), ckpt_path=checkpoint)
    return trainer


@pytest.mark.slow
def test_safe_rate_of_noise_is_the_rate_of_the_optimiser_also_after_a_resume(tmp_path):
    trainers = [fit_noise(share, 1) for share in (1.0, 0.5)]
    trainers[1].save_checkpoint(tmp_path / "last.ckpt")
    trainers.append(fit_noise(0.5, 2, tmp_path / "last.ckpt"))
    rates = [trainer.optimizers[0].param_groups[0]["lr"] for trainer in trainers]
    assert rates == [rates[0], rates[0] / 2, rates[0] / 2] and rates[0] > 0.006


def test_wrong_pairs_roll_the_second_views_within_the_batch():
    right, wrong = prepared(TwoViewDataModule), prepared(WrongPairs)
    (x1, x2, labels), (y1, y2, others) = (next(iter(data.train_dataloader())) for data in (right, wrong))
    assert torch.equal(x1, y1) and torch.equal(labels, others)
    assert torch.equal(x2.roll(1, 0), y2) and not torch.equal(x2, y2)
    assert all(torch.equal(a, b) for a, b in zip(right.probe_pairs(), wrong.probe_pairs(), strict=True))


def test_noise_images_have_uncorrelated_pixels():
    noise, photographs = (prepared(cls).images("train").images.double() for cls in (NoiseImages, TwoViewDataModule))
    assert noise.shape == photographs.shape

    def correlation(images):
        left, right = images[..., :-1].flatten(), images[..., 1:].flatten()
        return float(torch.corrcoef(torch.stack([left, right]))[0, 1])

    assert abs(correlation(noise)) < 0.01 < 0.5 < correlation(photographs)
    assert not torch.equal(noise, prepared(NoiseImages, seed=1).images("train").images.double())

"""Data modules of the negative controls."""

import torch

from reproduce.control_data import NoiseImages, WrongPairs
from stepwise_lightning import TwoViewDataModule


def prepared(cls, **settings):
    data = cls("photos", "weak", image_size=16, global_batch_size=32, num_probe_pairs=8, **settings)
    data.setup("fit")
    return data


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

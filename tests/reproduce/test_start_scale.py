"""Figure start_scale: gradient descent in the eigenbasis of Γ, and the effect of the initial scale."""

from argparse import Namespace

import torch

from reproduce.figures import start_scale
from stepwise_lightning import FixedCropPairs, LinearEncoder, barlow_twins_loss

OPTIONS = Namespace(num_pairs=20, crop_size=6, dim=2, data="photos", root=None, download=False)


def test_descent_in_the_eigenbasis_matches_training_on_the_pairs():
    record = start_scale.experiment(1e-3, 0, OPTIONS).record
    pairs = FixedCropPairs(num_pairs=20, crop_size=6, seed=0)
    pairs.setup()
    encoder = LinearEncoder(108, 2, 1e-3, seed=0).double()
    rate = float(record.times[1] / record.steps[1])
    optimiser = torch.optim.SGD(encoder.parameters(), lr=rate)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        z1, z2 = encoder(pairs.x1.double()), encoder(pairs.x2.double())
        loss = barlow_twins_loss(z1, z2, off_diagonal_weight=1.0, normalize=False)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    early = record.steps < 60
    assert losses[-1] < 1.1  # the first mode is learned
    torch.testing.assert_close(record.losses[early], torch.stack(losses)[record.steps[early]], rtol=1e-6, atol=1e-6)


def test_smaller_initialisation_separates_steps_and_follows_theory():
    small, ordinary = (start_scale.experiment(scale, 0, OPTIONS).summary() for scale in (1e-4, None))
    assert small["separation"] > ordinary["separation"] and small["deviation"] < 0.01 < ordinary["deviation"]

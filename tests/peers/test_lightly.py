"""Values and gradients of the losses equal lightly 1.6, which ``make test-peers`` installs.

The definitions differ in defaults and options only:

- lightly's Barlow Twins weights the off-diagonal with 5e-3 by default, ours with the published 0.0051; its eps is fixed
  to 1e-5, and it has no counterpart of ``normalize=False``;
- lightly's VICReg computes variances separately from covariances, with the same 1/(n − 1).
"""

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, DCLLoss, NTXentLoss, VICRegLoss

from stepwise_lightning import barlow_twins_loss, check_loss, simclr_loss, vicreg_loss

PAIRS = {
    "barlow_twins": (barlow_twins_loss, BarlowTwinsLoss(lambda_param=0.0051)),
    "barlow_twins_their_default": (lambda a, b: barlow_twins_loss(a, b, 5e-3), BarlowTwinsLoss()),
    "simclr": (simclr_loss, NTXentLoss()),
    "simclr_cold": (lambda a, b: simclr_loss(a, b, 0.1), NTXentLoss(temperature=0.1)),
    "vicreg": (vicreg_loss, VICRegLoss()),
    "vicreg_other_arguments": (lambda a, b: vicreg_loss(a, b, 3.0, 5.0, 7.0, 1e-2), VICRegLoss(3, 5, 7, eps=1e-2)),
}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
def test_values_and_gradients_equal_lightly(ours, theirs):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 12, 5, dtype=torch.float64, generator=generator)
    z = (z + z[:1]) * torch.linspace(0.2, 1, 5, dtype=torch.float64)
    (ours, (our_gradient,)), (theirs, (their_gradient,)) = (
        (value := loss(leaf[0], leaf[1]), torch.autograd.grad(value, leaf))
        for loss, leaf in ((ours, z.clone().requires_grad_()), (theirs, z.clone().requires_grad_()))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-10, atol=1e-13)


def test_default_barlow_twins_of_lightly_differs_in_the_off_diagonal_weight():
    z1, z2 = torch.randn(2, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    without = barlow_twins_loss(z1, z2, off_diagonal_weight=0.0)
    ratio = (barlow_twins_loss(z1, z2) - without) / (BarlowTwinsLoss()(z1, z2) - without)
    assert ratio.item() == pytest.approx(0.0051 / 5e-3, rel=1e-10)


@pytest.mark.parametrize(
    ("loss", "result"),
    [
        (NTXentLoss(gather_distributed=True), "pass"),
        (DCLLoss(gather_distributed=True), "pass"),
        (VICRegLoss(gather_distributed=True), "pass"),
        (BarlowTwinsLoss(gather_distributed=True), "fail"),
        (BarlowTwinsLoss(), "note"),
    ],
)
def test_check_loss_finds_statistics_of_each_shard_in_barlow_twins_of_lightly(loss, result):
    rows = {row.check: row for row in check_loss(loss, dim=5, num_pairs=12).rows}
    assert rows["two ranks"].result == result
    assert result != "fail" or rows["two ranks"].value.endswith("statistics of each shard")
    assert rows["two ranks in JointEmbedding"].result in (("note", "pass") if loss.gather_distributed else ("pass",))

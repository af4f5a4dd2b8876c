"""Checks of a joint-embedding loss before training."""

from stepwise_lightning.loss_checks.checks import check_loss
from stepwise_lightning.loss_checks.report import LossReport

__all__ = ["LossReport", "check_loss"]

"""LightningModules: an encoder, a loss, and plain SGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from stepwise_lightning.losses import barlow_twins_loss


class JointEmbedding(L.LightningModule):
    """What all joint-embedding methods share; a method adds ``loss(z1, z2)``.

    A batch is a sequence whose first two items are the two views, (n, …) each.

    **Step k** means, everywhere in this package, the weights after exactly k optimiser steps: ``train/loss`` at step k
    is the loss of those weights on the batch that is about to change them, and a spectrum at step k is theirs too.

    Args:
        encoder: module from a view (n, …) to embeddings (n, d).
        learning_rate: of SGD.
        momentum: of SGD.
        weight_decay: of SGD; small modes starve under it.

    """

    def __init__(
        self, encoder: nn.Module, learning_rate: float, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["encoder"])
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (n, d) of one view (n, …)."""
        return self.encoder(x)

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Return the scalar loss of two views' embeddings, (n, d) each."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(z1, z2)")

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch of pairs, logged as ``train/loss``."""
        loss = self.loss(self(batch[0]), self(batch[1]))
        # self.log costs as much as a small model's whole step, so it is called only when Lightning will write.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        settings: dict[str, Any] = {name: self.hparams[name] for name in ("momentum", "weight_decay")}
        return torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"], **settings)


class BarlowTwins(JointEmbedding):
    """Barlow Twins; for ``off_diagonal_weight``, ``normalize`` and ``center`` see :func:`barlow_twins_loss`.

    The analytical model of the paper is ``off_diagonal_weight=1, normalize=False``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        learning_rate: float,
        off_diagonal_weight: float = 0.0051,
        normalize: bool = True,
        center: bool = False,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(encoder, learning_rate, momentum, weight_decay)
        self.save_hyperparameters(ignore=["encoder"])

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Return the Barlow Twins loss of two views' embeddings."""
        h = self.hparams
        return barlow_twins_loss(z1, z2, h["off_diagonal_weight"], h["normalize"], h["center"])

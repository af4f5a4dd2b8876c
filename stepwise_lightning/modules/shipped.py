"""LightningModules of the losses in :mod:`stepwise_lightning.losses`."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from stepwise_lightning import losses
from stepwise_lightning.errors import UserError
from stepwise_lightning.losses import LOSSES
from stepwise_lightning.modules.joint_embedding import JointEmbedding, check_not_negative


class _NamedLoss(JointEmbedding):
    """Base class of the shipped losses, without the arguments ``loss`` and ``driven_matrix``."""

    def __init__(self, encoder: nn.Module, learning_rate: float, **optimization: Any) -> None:
        super().__init__(encoder, learning_rate, loss=None, driven_matrix=None, **optimization)


class BarlowTwins(_NamedLoss):
    """Barlow Twins. See :func:`barlow_twins_loss` for its arguments, :class:`JointEmbedding` for the others.

    The analytical model of the paper is ``off_diagonal_weight=1, normalize=False``. ``acceleration`` must be None; it
    remains for configurations and checkpoints of earlier versions.
    """

    loss_name = "barlow_twins"
    driven_matrix = LOSSES[loss_name].driven_matrix

    def __init__(
        self,
        encoder: nn.Module,
        learning_rate: float,
        off_diagonal_weight: float = losses.OFF_DIAGONAL_WEIGHT,
        normalize: bool = True,
        center: bool = False,
        eps: float = losses.BARLOW_TWINS_EPS,
        acceleration: str | None = None,
        **optimization: Any,
    ) -> None:
        if acceleration is not None:
            raise UserError(
                f"BarlowTwins has no acceleration={acceleration!r} any more: use the class AcceleratedBarlowTwins"
            )
        super().__init__(encoder, learning_rate, **optimization)
        check_not_negative(off_diagonal_weight=off_diagonal_weight, eps=eps)

    def loss_terms(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Return ``on_diagonal`` and ``off_diagonal``."""
        h = self.hparams
        return losses.barlow_twins_terms(z1, z2, h["off_diagonal_weight"], h["normalize"], h["center"], h["eps"])


class SimCLR(_NamedLoss):
    """SimCLR. See :func:`simclr_loss` for ``temperature``, :class:`JointEmbedding` for the other arguments."""

    loss_name = "simclr"
    driven_matrix = LOSSES[loss_name].driven_matrix

    def __init__(
        self,
        encoder: nn.Module,
        learning_rate: float,
        temperature: float = losses.TEMPERATURE,
        **optimization: Any,
    ) -> None:
        super().__init__(encoder, learning_rate, **optimization)
        if not 0 < temperature < math.inf:
            raise UserError(f"temperature must be finite and above 0, got {temperature}: it divides similarities")

    def loss_terms(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Return ``alignment`` and ``uniformity``."""
        return losses.simclr_terms(z1, z2, self.hparams["temperature"])


class VICReg(_NamedLoss):
    """VICReg. See :func:`vicreg_loss` for its arguments, :class:`JointEmbedding` for the others."""

    loss_name = "vicreg"
    driven_matrix = LOSSES[loss_name].driven_matrix

    def __init__(
        self,
        encoder: nn.Module,
        learning_rate: float,
        invariance_weight: float = losses.INVARIANCE_WEIGHT,
        variance_weight: float = losses.VARIANCE_WEIGHT,
        covariance_weight: float = losses.COVARIANCE_WEIGHT,
        eps: float = losses.VICREG_EPS,
        **optimization: Any,
    ) -> None:
        super().__init__(encoder, learning_rate, **optimization)
        check_not_negative(
            invariance_weight=invariance_weight,
            variance_weight=variance_weight,
            covariance_weight=covariance_weight,
            eps=eps,
        )

    def loss_terms(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Return ``invariance``, ``variance`` and ``covariance``."""
        h = self.hparams
        weights = h["invariance_weight"], h["variance_weight"], h["covariance_weight"]
        return losses.vicreg_terms(z1, z2, *weights, h["eps"])


class SpectralContrastive(_NamedLoss):
    """Spectral contrastive loss, :func:`spectral_contrastive_loss`. :class:`JointEmbedding` documents the arguments."""

    loss_name = "spectral_contrastive"
    driven_matrix = LOSSES[loss_name].driven_matrix

    def loss_terms(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Return ``alignment`` and ``repulsion``."""
        return losses.spectral_contrastive_terms(z1, z2)

"""LightningModules: an encoder, a loss, and plain SGD or another optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from stepwise_lightning import losses
from stepwise_lightning.distributed import all_gather_with_grad, check_equal_shards
from stepwise_lightning.divergence import LossCheck, check_weights
from stepwise_lightning.errors import UserError
from stepwise_lightning.losses import LOSSES
from stepwise_lightning.precision import at_least_float32, in_full_precision
from stepwise_lightning.rate_schedule import rate_factor
from stepwise_lightning.runs.saved import configured_encoder

__all__ = ["BarlowTwins", "JointEmbedding", "SimCLR", "SpectralContrastive", "VICReg"]


class JointEmbedding(L.LightningModule):
    """Base class of joint-embedding methods. A subclass defines ``loss_terms(z1, z2)``.

    A batch is a sequence whose first two items are the two views, (n, …) each. With several ranks, each holds an equal
    shard, and the loss is computed on the *global* batch: training equals training of one process on the joined
    batches. For this, an encoder with batch normalisation needs ``Trainer(sync_batchnorm=True)`` or, on CPUs,
    ``plugins=[SyncBatchNorm()]`` from :mod:`stepwise_lightning.sync_batchnorm`.

    **Step k** denotes, everywhere in this package, the weights after exactly k optimiser steps: ``train/loss`` at step
    k is the loss of these weights on the batch of the next update, and a spectrum at step k is their spectrum.

    Training stops with a FloatingPointError when the loss is NaN or infinite; on CUDA devices after one more batch.
    Weights that are not finite are never saved, which preserves the last valid checkpoint.

    Class attributes: ``loss_name`` is the name of the loss in ``stepwise_lightning.losses.LOSSES``, if it is one of
    these; ``driven_matrix`` is the matrix whose eigenvalues the loss drives (``stepwise_lightning.spectrum.MATRICES``),
    or None if it is unknown. ``SpectrumLogger`` shows it first.

    Args:
        encoder: module from a view (n, …) to embeddings (n, d).
        learning_rate: learning rate of SGD or ``optimizer``.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD; it can prevent small modes from growing.
        warmup_steps: number of steps over which the learning rate increases linearly to ``learning_rate``.
        cosine: decay the learning rate to 0 along a half cosine after the warm-up.
        optimizer: an optimiser of ``torch.optim`` instead of SGD, called with the parameters, for instance
            ``partial(AdamW, weight_decay=0.01)``, or ``--model.optimizer AdamW``. Its learning rate is
            ``learning_rate``. The theory of this package holds for SGD only.
        compile: train with the encoder compiled by ``torch.compile``; True, or the name of a backend.

    Raises:
        ValueError: a setting (also of a subclass) that is negative or not finite, a momentum of 1 or more, or
            ``momentum`` or ``weight_decay`` together with ``optimizer``.

    """

    loss_name: str | None = None
    driven_matrix: str | None = None

    def __init__(
        self,
        encoder: nn.Module,
        learning_rate: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        cosine: bool = False,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        _check_not_negative(
            learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay, warmup_steps=warmup_steps
        )
        if momentum >= 1:
            raise UserError(f"momentum must be below 1, or training diverges, got {momentum}: lower it")
        if optimizer is not None and (momentum or weight_decay):
            raise UserError(
                "momentum and weight_decay are settings of SGD and must be 0 with another optimizer: pass them to it"
            )
        # Also saves the arguments of the __init__ of the subclass.
        self.save_hyperparameters(ignore=["encoder", "compile"])
        if callable(self.hparams.get("optimizer")):  # checkpoints hold plain values, as read from a configuration
            for hparams in (self.hparams, self._hparams_initial):
                cast(dict[str, Any], hparams).pop("optimizer")
        self.encoder, self.optimizer, self._check_loss = encoder, optimizer, LossCheck()
        self._compile = compile

    @property
    def trains_with_sgd(self) -> bool:
        """True if SGD on the gradient of the loss updates the weights, as forecasts assume."""
        return self.optimizer is None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **settings: Any) -> Self:
        """Load a trained module: ``BarlowTwins.load_from_checkpoint("RUN/checkpoints/last.ckpt")``.

        Unlike Lightning's method, it rebuilds the encoder from ``config.yaml`` of the run
        (:func:`stepwise_lightning.load_encoder`) unless ``encoder`` is given, and always reads the checkpoint with
        ``weights_only=True``.

        Raises:
            FileNotFoundError: the checkpoint does not exist, or there is neither an encoder nor a configuration.
            ValueError: ``weights_only=False``, or a checkpoint of another method.

        """
        if settings.get("weights_only") is False:
            raise UserError("weights_only=False is not supported, because a checkpoint could run code: leave it out")
        if "encoder" not in settings:
            settings["encoder"] = configured_encoder(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *arguments, **settings | {"weights_only": True})

    def setup(self, stage: str) -> None:
        """Compile the encoder in place if configured, in each process that trains."""
        if self._compile and stage == "fit":
            self.encoder.compile(backend="inductor" if self._compile is True else self._compile)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (n, d) of one view (n, …)."""
        return self.encoder(x)

    def loss_terms(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Return the named terms of the loss, scalars, for embeddings (n, d) of two views."""
        raise NotImplementedError(f"{type(self).__name__} must define loss_terms(z1, z2)")

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Return the scalar loss for embeddings (n, d) of two views."""
        return losses.sum_terms(self.loss_terms(z1, z2))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of pairs; log it as ``train/loss`` and its terms as ``train/<term>``."""
        check_equal_shards(batch[0])
        # Cast before gathering, because in half precision the sum of gradients over ranks would lose digits.
        z1, z2 = (all_gather_with_grad(at_least_float32(self(view))) for view in batch[:2])
        terms = in_full_precision(self.loss_terms)(z1, z2)
        loss = losses.sum_terms(terms)
        # self.log takes as long as a step of a small model, so call it only when Lightning writes.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        writing = every > 0 and (self.global_step + 1) % every == 0
        self._check_loss(self, loss, batch, now=writing)
        if writing:
            self.log("train/loss", loss, prog_bar=True)
            self.log_dict({f"train/{name}": term for name, term in terms.items()})
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Do nothing: callbacks evaluate held-out images."""

    test_step = validation_step

    def on_train_end(self) -> None:
        """Raise an error if the last steps made the weights NaN or infinite."""
        check_weights(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise an error instead of saving weights that are not finite."""
        check_weights(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD or ``optimizer``, with a scheduler updated at every optimiser step if one is configured."""
        h = self.hparams
        if self.optimizer is None:
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                self.parameters(), lr=h["learning_rate"], momentum=h["momentum"], weight_decay=h["weight_decay"]
            )
        else:
            optimizer = self.optimizer(self.parameters())
            for group in optimizer.param_groups:
                group["lr"] = h["learning_rate"]
        if not h["warmup_steps"] and not h["cosine"]:
            return optimizer
        num_steps = self.trainer.estimated_stepping_batches if h["cosine"] else math.inf
        if h["cosine"] and not 0 <= num_steps < math.inf:  # −1 for epochs without a length
            raise UserError(
                "cosine=True needs the number of training steps: set max_steps or max_epochs "
                "(for data without a length max_steps)"
            )
        # A lambda, because the scheduler would save the attributes of a callable object in its state.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_factor(step, h["warmup_steps"], num_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class BarlowTwins(JointEmbedding):
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
        _check_not_negative(off_diagonal_weight=off_diagonal_weight, eps=eps)

    def loss_terms(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Return ``on_diagonal`` and ``off_diagonal``."""
        h = self.hparams
        return losses.barlow_twins_terms(z1, z2, h["off_diagonal_weight"], h["normalize"], h["center"], h["eps"])


class SimCLR(JointEmbedding):
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


class VICReg(JointEmbedding):
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
        _check_not_negative(
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


class SpectralContrastive(JointEmbedding):
    """Spectral contrastive loss, :func:`spectral_contrastive_loss`. :class:`JointEmbedding` documents the arguments."""

    loss_name = "spectral_contrastive"
    driven_matrix = LOSSES[loss_name].driven_matrix

    def loss_terms(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Return ``alignment`` and ``repulsion``."""
        return losses.spectral_contrastive_terms(z1, z2)


def _check_not_negative(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name} must be finite and at least 0, got {value}")

"""LightningModule of an encoder, a loss, and plain SGD or another optimiser."""

from __future__ import annotations

import math
import os
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from stepwise_lightning import losses
from stepwise_lightning.distributed import all_gather_with_grad, check_equal_shards
from stepwise_lightning.errors import UserError, condensed
from stepwise_lightning.modules.divergence import LossCheck, check_weights
from stepwise_lightning.precision import at_least_float32, in_full_precision
from stepwise_lightning.runs.saved import configured_encoder, configured_loss
from stepwise_lightning.seeding import hashed_seed, isolated_rng
from stepwise_lightning.spectrum.matrices import MATRICES
from stepwise_lightning.user_loss import LOSS, checked_loss, named_terms, saved_name


class JointEmbedding(L.LightningModule):
    """Train an encoder with any loss of two views: ``loss(z1, z2)``, or ``loss_terms(z1, z2)`` of a subclass.

    A batch is a sequence whose first two items are the two views, (n, …) each. With several ranks, each holds an equal
    shard, and the loss is computed on the *global* batch: training equals training of one process on the joined
    batches. For this, an encoder with batch normalisation needs ``Trainer(sync_batchnorm=True)`` or, on CPUs,
    ``plugins=[SyncBatchNorm()]`` from :mod:`stepwise_lightning.sync_batchnorm`.

    **Step k** denotes, everywhere in this package, the weights after exactly k optimiser steps: ``train/loss`` at step
    k is the loss of these weights on the batch of the next update, and a spectrum at step k is their spectrum.

    Training stops with a FloatingPointError when the loss is NaN or infinite; on CUDA devices after one more batch.
    Weights that are not finite are never saved, which preserves the last valid checkpoint.

    ``loss`` returns a scalar, or a dictionary of scalars whose sum is the loss. Parameters of an ``nn.Module`` are
    trained and saved with the encoder. Random numbers that it draws from torch's generators depend only on the seed of
    ``seed_everything`` and the step: they are equal on all ranks and after a resume, and other random numbers do not
    depend on them.

    Class attributes of a subclass: ``loss_name`` is the name of its loss in ``stepwise_lightning.losses.LOSSES``, if it
    is one of these; ``driven_matrix`` as the argument, None if it is unknown.

    Args:
        encoder: module from a view (n, …) to embeddings (n, d).
        learning_rate: learning rate of SGD or ``optimizer``.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD; it can prevent small modes from growing.
        warmup_steps: number of steps in which the learning rate increases linearly from 0.
        cosine: decay the learning rate to 0 along a half cosine after the warm-up.
        optimizer: an optimiser of ``torch.optim`` instead of SGD, called with the parameters, for instance
            ``partial(AdamW, weight_decay=0.01)``, or ``--model.optimizer AdamW``. Its learning rate is
            ``learning_rate``. The theory of this package holds for SGD only.
        compile: train with the encoder compiled by ``torch.compile``; True, or the name of a backend.
        loss: function of both views' embeddings, (n, d) each; a dotted path, or ``class_path`` and ``init_args``.
        driven_matrix: matrix whose eigenvalues the loss drives; one of ``spectrum.MATRICES``.

    Raises:
        ValueError: a setting (also of a subclass) that is negative or not finite, a momentum of 1 or more, or
            ``momentum`` or ``weight_decay`` together with ``optimizer``; no loss, or a loss that cannot be called with
            two arguments; an unknown matrix.

    Example:
        >>> from stepwise_lightning import JointEmbedding, LinearEncoder
        >>> def spectral(z1, z2):
        ...     return (z1 @ z2.T).square().mean() - 2 * (z1 * z2).sum(1).mean()
        >>> module = JointEmbedding(LinearEncoder(8, 2), 0.1, loss=spectral, driven_matrix="cross_correlation")

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
        *,
        loss: Callable[..., Any] | None = None,
        driven_matrix: str | None = None,
    ) -> None:
        super().__init__()
        check_not_negative(
            learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay, warmup_steps=warmup_steps
        )
        if momentum >= 1:
            raise UserError(f"momentum must be below 1, or training diverges, got {momentum}: lower it")
        if optimizer is not None and (momentum or weight_decay):
            raise UserError(
                "momentum and weight_decay are settings of SGD and must be 0 with another optimizer: pass them to it"
            )
        self.encoder, self.optimizer, self._check_loss = encoder, optimizer, LossCheck()
        self._compile = compile
        self._set_loss(loss, driven_matrix)
        loss = saved_name(loss)  # type: ignore[assignment]
        # Also saves the arguments of the __init__ of the subclass.
        self.save_hyperparameters(ignore=["encoder", "compile"])
        for hparams in cast(tuple[dict[str, Any], ...], (self.hparams, self._hparams_initial)):
            if callable(hparams.get("optimizer")):  # checkpoints hold plain values, as read from a configuration
                hparams.pop("optimizer")
            if callable(hparams.get("loss")):  # argument of a subclass
                hparams["loss"] = loss
            for name in ("loss", "driven_matrix"):
                if hparams.get(name) is None:
                    hparams.pop(name, None)

    def _set_loss(self, loss: Callable[..., Any] | None, driven_matrix: str | None) -> None:
        name = type(self).__name__
        if driven_matrix is not None and driven_matrix not in MATRICES:
            raise UserError(f"driven_matrix must be one of {', '.join(MATRICES)}, got {driven_matrix!r}")
        if loss is None and type(self) is JointEmbedding:
            raise UserError(
                f"{name} needs a loss: give loss, a function of both views' embeddings z1 and z2, also to "
                "load_from_checkpoint if the run has no config.yaml"
            )
        if loss is not None and type(self).loss_terms is not JointEmbedding.loss_terms:
            raise UserError(f"{name} has a loss of its own: leave loss out, or use JointEmbedding")
        self.loss_function = None if loss is None else checked_loss(loss)
        self.driven_matrix = driven_matrix or type(self).driven_matrix

    @property
    def trains_with_sgd(self) -> bool:
        """True if SGD on the gradient of the loss updates the weights, as forecasts assume."""
        return self.optimizer is None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **settings: Any) -> Self:
        """Load a trained module: ``BarlowTwins.load_from_checkpoint("RUN/checkpoints/last.ckpt")``.

        Unlike Lightning's method, it rebuilds the encoder and the loss of ``JointEmbedding`` from ``config.yaml`` of
        the run (:func:`stepwise_lightning.load_encoder`) unless ``encoder`` and ``loss`` are given, and always reads
        the checkpoint with ``weights_only=True``.

        Raises:
            FileNotFoundError: the checkpoint does not exist, or there is neither an encoder nor a configuration.
            ValueError: ``weights_only=False``, a checkpoint of another method, or no loss.

        """
        if settings.get("weights_only") is False:
            raise UserError("weights_only=False is not supported, because a checkpoint could run code: leave it out")
        if "encoder" not in settings:
            settings["encoder"] = configured_encoder(checkpoint_path)
        if cls.loss_name is None and "loss" not in settings:  # never a loss that the checkpoint names
            settings["loss"] = configured_loss(checkpoint_path)
        try:
            return super().load_from_checkpoint(checkpoint_path, *arguments, **settings | {"weights_only": True})
        except ArgumentError as error:  # of jsonargparse 4.45, for a checkpoint of another class
            raise UserError(condensed(str(error))) from error

    def setup(self, stage: str) -> None:
        """Compile the encoder in place if configured, in each process that trains."""
        if self._compile and stage == "fit":
            self.encoder.compile(backend="inductor" if self._compile is True else self._compile)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (n, d) of one view (n, …)."""
        return self.encoder(x)

    def loss_terms(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Return the named terms of the loss, scalars, for embeddings (n, d) of two views."""
        if self.loss_function is None:
            raise NotImplementedError(f"{type(self).__name__} must define loss_terms(z1, z2)")
        seed = hashed_seed("loss", os.environ.get("PL_GLOBAL_SEED", "0"), self.global_step)
        with isolated_rng(seed, z1.device):
            return named_terms(self.loss_function(z1, z2))

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
            self.log_dict({f"train/{name}": term for name, term in terms.items() if name != LOSS})
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


def rate_factor(step: int, warmup_steps: int, num_steps: float) -> float:
    """Return the factor of the learning rate for the optimiser step after ``step`` steps.

    It is (step + 1) / warmup_steps during the warm-up, then (1 + cos π p) / 2, where p grows from 0 after the warm-up
    to 1 at ``num_steps``. With ``num_steps = inf`` it is 1 after the warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if math.isinf(num_steps):
        return 1.0
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return (1 + math.cos(math.pi * min(progress, 1))) / 2


def check_not_negative(**settings: float) -> None:
    """Raise a UserError for a setting that is negative or not finite."""
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name} must be finite and at least 0, got {value}")

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
from stepwise_lightning.acceleration import Acceleration, accelerated, last_inputs, refuse_others
from stepwise_lightning.distributed import all_gather_with_grad, check_equal_shards
from stepwise_lightning.errors import DivergedError, UserError
from stepwise_lightning.runs.saved import configured_encoder

__all__ = ["BarlowTwins", "JointEmbedding", "SimCLR", "VICReg", "rate_factor"]


class JointEmbedding(L.LightningModule):
    """What all joint-embedding methods share; a method adds ``loss_terms(z1, z2)``.

    A batch is a sequence whose first two items are the two views, (n, …) each. On several ranks each holds an equal
    shard, and the loss is that of the *global* batch: training follows exactly the path of one process on the joined
    batches. An encoder with batch normalisation needs ``Trainer(sync_batchnorm=True)`` for that, or, on CPUs,
    ``plugins=[SyncBatchNorm()]`` from :mod:`stepwise_lightning.distributed`.

    **Step k** means, everywhere in this package, the weights after exactly k optimiser steps: ``train/loss`` at step k
    is the loss of those weights on the batch that is about to change them, and a spectrum at step k is theirs too.

    Training stops with a FloatingPointError when the loss is NaN or infinite, and a checkpoint of such weights is
    never written, so that the last good one stays.

    Class attributes: ``loss_name`` is the name of the loss in ``stepwise_lightning.losses.LOSSES``, if it is one of
    these; ``driven_matrix`` is the matrix whose eigenvalues the loss drives (``stepwise_lightning.spectrum.MATRICES``),
    or None if it is unknown. ``SpectrumLogger`` shows it first.

    Args:
        encoder: module from a view (n, …) to embeddings (n, d).
        learning_rate: of SGD, or of ``optimizer``.
        momentum: of SGD.
        weight_decay: of SGD; small modes starve under it.
        warmup_steps: the learning rate rises linearly over so many steps; see :func:`rate_factor`.
        cosine: let the learning rate fall to 0 along a half cosine over the rest of training.
        optimizer: another one of ``torch.optim`` in place of SGD, called with the parameters, for instance
            ``partial(AdamW, weight_decay=0.01)``, or ``--model.optimizer AdamW``; its rate is ``learning_rate``. The
            theory of this package speaks of SGD alone.

    Raises:
        ValueError: a number that is negative or not finite (of a method's own too), a momentum of 1 or more, or
            ``momentum`` or ``weight_decay`` beside ``optimizer``, which has its own.

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
    ) -> None:
        super().__init__()
        _check_not_negative(
            learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay, warmup_steps=warmup_steps
        )
        if momentum >= 1:
            raise UserError(f"momentum must be below 1, or the weights would run away, got {momentum}")
        if optimizer is not None and (momentum or weight_decay):
            raise UserError("momentum and weight_decay are of SGD: give them to the optimizer, and leave these 0")
        # Called here, it collects the arguments of the method's own __init__ too.
        self.save_hyperparameters(ignore=["encoder"])
        if callable(self.hparams.get("optimizer")):  # in a configuration it has plain values, which checkpoints keep
            for kept in (self.hparams, self._hparams_initial):
                cast(dict[str, Any], kept).pop("optimizer")
        self.encoder, self.optimizer = encoder, optimizer

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **settings: Any) -> Self:
        """Return the trained module: ``BarlowTwins.load_from_checkpoint("RUN/checkpoints/last.ckpt")``.

        As Lightning's, but for two things: without ``encoder=…`` the encoder is rebuilt from the run's ``config.yaml``
        (:func:`stepwise_lightning.load_encoder`), and the checkpoint is always read with ``weights_only=True``, as
        tensors and plain values.

        Raises:
            FileNotFoundError: no such checkpoint, or neither an encoder nor a configuration.
            ValueError: ``weights_only=False``; a checkpoint of another method.

        """
        if settings.get("weights_only") is False:
            raise UserError("weights_only=False would let a checkpoint run code, and is not accepted: leave it out")
        if "encoder" not in settings:
            settings["encoder"] = configured_encoder(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *arguments, **settings | {"weights_only": True})

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings (n, d) of one view (n, …)."""
        return self.encoder(x)

    def loss_terms(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Return named scalars, whose sum is the loss of two views' embeddings, (n, d) each."""
        raise NotImplementedError(f"{type(self).__name__} must define loss_terms(z1, z2)")

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Return the scalar loss of two views' embeddings, (n, d) each."""
        return losses.sum_terms(self.loss_terms(z1, z2))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch of pairs, logged as ``train/loss`` with its terms as ``train/<term>``."""
        check_equal_shards(batch[0])
        z1, z2 = (all_gather_with_grad(self(view)) for view in batch[:2])
        # In half precision the squares of a small initialisation's embeddings would vanish.
        with torch.autocast(self.device.type, enabled=False):
            terms = self.loss_terms(_at_least_single(z1), _at_least_single(z2))
            loss = losses.sum_terms(terms)
        # self.log costs as much as a small model's whole step, so it is called only when Lightning will write.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        writing = every > 0 and (self.global_step + 1) % every == 0
        # Reading a loss on a GPU makes the CPU wait for it, so there it is read only when it is written anyway.
        if (writing or loss.device.type == "cpu") and not math.isfinite(loss.item()):
            self._stop(f"the loss at step {self.global_step} is {loss.item()}", batch)
        if writing:
            self.log("train/loss", loss, prog_bar=True)
            self.log_dict({f"train/{name}": term for name, term in terms.items()})
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Do nothing: what is done with labelled held-out images is up to callbacks."""

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Do nothing, as in validation."""

    def on_train_end(self) -> None:
        """Stop with an error if the last steps, between two looks at the loss, have destroyed the weights."""
        self._check_weights()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that are not finite over good ones."""
        self._check_weights()

    def _check_weights(self) -> None:
        if not all(torch.stack([weights.isfinite().all() for weights in self.parameters()]).tolist()):
            self._stop(f"the weights at step {self.global_step} are not finite")

    def _stop(self, event: str, batch: Sequence[Tensor] = ()) -> None:
        cause = f"training has most likely diverged: lower learning_rate (now {self.hparams['learning_rate']})"
        if not all(view.isfinite().all() for view in batch[:2]):
            cause = "the batch holds values that are not finite: look at the data"
        raise DivergedError(f"training stopped, because {event}; {cause}")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return plain SGD or the one given, with a schedule stepped at every optimiser step if one is asked for."""
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
        if h["cosine"] and not 0 <= num_steps < math.inf:  # −1 for a stream whose epochs have no length
            raise UserError(
                "cosine=True needs to know how long training lasts: set max_steps or max_epochs "
                "(for data without a length max_steps)"
            )
        # A lambda, because the scheduler's state would hold a callable object's attributes.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_factor(step, h["warmup_steps"], num_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def rate_factor(step: int, warmup_steps: int, num_steps: float) -> float:
    """Return what the learning rate is multiplied with at the optimiser step that follows ``step`` steps.

    It is (step + 1) / warmup_steps during the warm-up, and then (1 + cos π p) / 2, where p runs from 0 after the
    warm-up to 1 at ``num_steps``; with ``num_steps = inf`` it stays 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if math.isinf(num_steps):
        return 1.0
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return (1 + math.cos(math.pi * min(progress, 1))) / 2


class BarlowTwins(JointEmbedding):
    """Barlow Twins; for the loss's arguments see :func:`barlow_twins_loss`, for others :class:`JointEmbedding`.

    The analytical model of the paper is ``off_diagonal_weight=1, normalize=False``.

    Args:
        acceleration: of the analytical model (beyond the paper): another gradient than the loss's, with which all modes
            are learned in fewer steps, ``gate`` at the rate of gradient descent, ``lyapunov`` at one of 0.1 to 0.3. For
            equations and failures see :mod:`stepwise_lightning.acceleration`.

    """

    loss_name = "barlow_twins"
    driven_matrix = losses.LOSSES[loss_name].driven_matrix

    def __init__(
        self,
        encoder: nn.Module,
        learning_rate: float,
        off_diagonal_weight: float = losses.OFF_DIAGONAL_WEIGHT,
        normalize: bool = True,
        center: bool = False,
        eps: float = losses.BARLOW_TWINS_EPS,
        acceleration: Acceleration | None = None,
        **optimization: Any,
    ) -> None:
        super().__init__(encoder, learning_rate, **optimization)
        _check_not_negative(off_diagonal_weight=off_diagonal_weight, eps=eps)
        refuse_others(acceleration, off_diagonal_weight, normalize)
        self._inputs = last_inputs(encoder) if acceleration == "lyapunov" else ()

    def loss_terms(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Return ``on_diagonal`` and ``off_diagonal``; with ``acceleration`` the gradient of their sum is another."""
        h = self.hparams
        terms = losses.barlow_twins_terms(z1, z2, h["off_diagonal_weight"], h["normalize"], h["center"], h["eps"])
        if (acceleration := h["acceleration"]) is None:
            return terms
        return accelerated(terms, z1, z2, acceleration, h["center"], [all_gather_with_grad(x) for x in self._inputs])


class SimCLR(JointEmbedding):
    """SimCLR; for ``temperature`` see :func:`simclr_loss`, for other arguments :class:`JointEmbedding`."""

    loss_name = "simclr"
    driven_matrix = losses.LOSSES[loss_name].driven_matrix

    def __init__(
        self,
        encoder: nn.Module,
        learning_rate: float,
        temperature: float = losses.TEMPERATURE,
        **optimization: Any,
    ) -> None:
        super().__init__(encoder, learning_rate, **optimization)
        if not 0 < temperature < math.inf:
            raise UserError(
                f"temperature must be finite and above 0, got {temperature}: similarities are divided by it"
            )

    def loss_terms(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Return ``alignment`` and ``uniformity``."""
        return losses.simclr_terms(z1, z2, self.hparams["temperature"])


class VICReg(JointEmbedding):
    """VICReg; for the loss's arguments see :func:`vicreg_loss`, for others :class:`JointEmbedding`."""

    loss_name = "vicreg"
    driven_matrix = losses.LOSSES[loss_name].driven_matrix

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


def _check_not_negative(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 <= value < math.inf:
            raise UserError(f"{name} must be finite and at least 0, got {value}")


def _at_least_single(z: Tensor) -> Tensor:
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z

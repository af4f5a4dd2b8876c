"""Losses, predicted modes, training and measured growth rates of the figure ``any_loss``."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from reproduce.losses import (
    dcl_loss,
    lejepa_loss,
    self_similarity_loss,
    siglip_loss,
    squared_hinge_loss,
    whitening_loss,
)
from stepwise_lightning import (
    FixedCropPairs,
    JointEmbedding,
    barlow_twins_loss,
    simclr_loss,
    spectral_contrastive_loss,
    vicreg_loss,
)
from stepwise_lightning.forecasts.sgd import last_layer
from stepwise_lightning.theory import growth_matrix, growth_modes, loss_signature
from stepwise_lightning.theory.loss_derivatives import PairLoss

NUM_MODES = 5
RELATIVE_RATE = 0.2  # learning rate × growth rate of the first mode
GROWTH = 30.0  # of the first mode in the whole run


class AnyLoss(NamedTuple):
    """A loss of two views, with keyword arguments bound by ``partial``."""

    function: PairLoss
    bias_norm: float | None = None
    """Norm of the initial bias; None for a loss without cosine similarity."""
    closed_form: str | None = None
    """Name of the loss in ``growth_matrix``; None without a closed form."""


# At a temperature of 0.5, SimCLR and DCL have nearly the growth rates of Barlow Twins: the rivals would be too close.
LOSSES = {
    "Barlow Twins": AnyLoss(
        partial(barlow_twins_loss, off_diagonal_weight=1.0, normalize=False, center=True), None, "barlow_twins"
    ),
    "VICReg": AnyLoss(partial(vicreg_loss, eps=0.01), None, "vicreg"),
    "SimCLR": AnyLoss(partial(simclr_loss, temperature=0.2), 1.0, "simclr"),
    "spectral contrastive": AnyLoss(partial(spectral_contrastive_loss), None, "spectral_contrastive"),
    "DCL": AnyLoss(partial(dcl_loss, temperature=0.1), 1.0),
    "SigLIP": AnyLoss(siglip_loss, 1.0),
    "LeJEPA": AnyLoss(lejepa_loss),
    "W-MSE": AnyLoss(whitening_loss),
}
# Wrong variants, as rivals of the closed forms.
VARIANTS = {
    "SimCLR": AnyLoss(partial(self_similarity_loss, temperature=0.2), 1.0),
    "VICReg": AnyLoss(partial(squared_hinge_loss, eps=0.01)),
}


class Modes(NamedTuple):
    """Predicted modes of a loss."""

    rates: Tensor
    """(k,)."""
    directions: Tensor
    """v of each mode, (k, m), or for a loss that is not isotropic its matrix D, (k, d, m)."""

    @classmethod
    def of(cls, loss: AnyLoss, h1: Tensor, h2: Tensor, dim: int, bias: Tensor) -> Modes:
        """Return the fastest modes for features (n, m) and a bias (d,), which counts for losses with one only."""
        used = bias if loss.bias_norm else None
        rates, directions = growth_modes(loss.function, h1, h2, dim, NUM_MODES, used)
        if loss_signature(loss.function, dim, len(h1), used).isotropic:  # directions are u vᵀ
            directions = torch.linalg.svd(directions, full_matrices=False).Vh[:, 0]
        return cls(rates, directions)

    @classmethod
    def of_closed_form(cls, loss: AnyLoss, h1: Tensor, h2: Tensor, dim: int) -> Modes:
        """Return the fastest modes of the named loss, from its growth matrix."""
        settings = getattr(loss.function, "keywords", {})
        matrix = growth_matrix(str(loss.closed_form), h1, h2, dim, loss.bias_norm, **settings)
        rates, vectors = torch.linalg.eigh(matrix)
        return cls(rates.flip(0)[:NUM_MODES], vectors.T.flip(0)[:NUM_MODES])

    def amplitudes(self, weights: Tensor) -> Tensor:
        """Return ‖W v‖ or |⟨W, D⟩| for weights (T, d, m), (T, k)."""
        if self.directions.ndim == 2:
            return (weights @ self.directions.T).norm(dim=1)
        return torch.einsum("tdm,kdm->tk", weights, self.directions).abs()


class _Weights(L.Callback):
    """Copy the last layer after each step, with the bias as the last column."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def _copy(self, pl_module: Any) -> None:
        weight, bias = last_layer(pl_module).parameters()
        self.weights.append(torch.cat([weight, bias[:, None]], 1).detach().double())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._copy(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._copy(pl_module)


def train(encoder: nn.Module, loss: PairLoss, rate: float, pairs: FixedCropPairs, precision: Any) -> Tensor:
    """Train all layers until the first mode has grown by ``GROWTH``; return the last layer's weights (T + 1, d, m)."""
    steps = math.ceil(math.log(GROWTH) / math.log(1 + RELATIVE_RATE))
    pairs.hparams["steps_per_epoch"] = steps
    copies = _Weights()
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", precision=precision, callbacks=[copies], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(JointEmbedding(encoder, rate, loss=loss), datamodule=pairs)
    return torch.stack(copies.weights)


def measured_rates(amplitudes: Tensor, rate: float) -> Tensor:
    """Return growth rates from amplitudes (T, k): a mode grows by 1 + ηρ in each step."""
    steps = torch.arange(len(amplitudes)).double()
    steps -= steps.mean()
    slopes = steps @ amplitudes.log() / steps.square().sum()
    return slopes.expm1() / rate


def correlation(predicted: Tensor, measured: Tensor) -> float:
    """Return Spearman's rank correlation of two tensors without ties."""
    ranks = torch.stack([predicted.flatten(), measured.flatten()]).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])

"""Forecasts from a network and its data: training of the last layer, simulated on the features of the network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from stepwise_lightning.encoders import LinearEncoder
from stepwise_lightning.errors import UserError
from stepwise_lightning.features import Views
from stepwise_lightning.features.module_state import restored_state
from stepwise_lightning.forecasts.forecast import Forecast, crossings
from stepwise_lightning.forecasts.learning_rates import StableRates, stable_rates
from stepwise_lightning.forecasts.sgd import SGDSettings, last_features, last_layer
from stepwise_lightning.spectrum.schedule import log_spaced_steps
from stepwise_lightning.theory.growth import growth_matrix
from stepwise_lightning.theory.last_layer import LastLayer, LayerTrajectory
from stepwise_lightning.theory.linear_flow import growth_modes, start_signature, without_round_off
from stepwise_lightning.theory.loss_derivatives import PairLoss, is_scale_invariant
from stepwise_lightning.theory.loss_signature import loss_properties

NUM_PAIRS = 4096
_NUM_POINTS = 200  # as for SpectrumLogger
# Wider features are projected: a step of Barlow Twins takes O(d m²).
_MAX_FEATURES, _COMPONENTS = 512, 128
# Pairs in a simulated step of SimCLR: the growth of modes does not depend on their number, the cost does.
_SIMCLR_PAIRS = 128
_PAIRS_PER_FEATURE = 8
_CENTRED = 0.01  # bound on the growth of the mean embedding, relative to the coefficients of the loss
_MODERATE_DRIVE, _PLATEAU_STEPS = 0.1, 600  # x = ηρ_1, and the number of steps that lead beyond the first mode
_SLOWER = (1, 4, 16)  # if that diverges, because other modes decay much faster than the first one grows


def forecast(
    module: nn.Module,
    batches: Iterable[Any],
    max_steps: int,
    *,
    start: int = 0,
    loss: str | PairLoss | None = None,
    settings: Mapping[str, Any] | None = None,
    layer: nn.Linear | LinearEncoder | None = None,
    learning_rate: float | Sequence[float] | Tensor | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    velocity: Sequence[Tensor] | None = None,
    num_pairs: int = NUM_PAIRS,
    views: Views | None = None,
) -> Forecast:
    """Forecast the step at which each mode is learned, and stable learning rates.

    The last linear layer is simulated (:class:`stepwise_lightning.theory.LastLayer`) from its current weights on its
    current inputs, that is, with frozen features. Features of a network move during training, so the forecast is
    accurate for the first mode, approximate for later modes of Barlow Twins and SimCLR, and not reliable for later
    modes of VICReg: :attr:`Forecast.errors`. Other errors were not measured, except for the first mode of the spectral
    contrastive loss; for functions see ``reproduce/first_modes.py``. More modes may be learned than forecast, because
    features grow. During training, :meth:`Forecast.with_plateau_correction` uses the record of the run.

    The last layer of a loss given as a function is simulated by automatic differentiation, one batch a step, in
    float64, with constant parameters of the loss; a loss that draws random numbers raises an error. Eigenvalues are of
    ``module.driven_matrix``, by default the covariance. A loss that is not centred may learn the mean embedding first,
    which has no eigenvalue in the covariance: set ``driven_matrix = "cross_correlation"``.

    The state of the module and of all random number generators does not change. Batch normalisation uses the statistics
    of each view of a batch, as in training. SimCLR is simulated with at most 128 pairs a step. Features of more than
    512 dimensions are projected onto max(128, 2d), see :class:`stepwise_lightning.theory.LastLayer`.

    Args:
        module: a :class:`JointEmbedding` such as :class:`BarlowTwins`, which defines the arguments below; or any module
            from views (n, …) to embeddings (n, d) that ends in a linear layer, with ``loss`` and ``settings``, and
            ``learning_rate`` unless its ``configure_optimizers`` returns plain SGD.
        batches: batches of two views, as in training and of the same size, but separate draws. Used until they contain
            ``num_pairs`` pairs.
        max_steps: optimiser steps of training, from its beginning.
        start: current step; 0 before training.
        loss: name in ``stepwise_lightning.losses.LOSSES``, or a function ``loss(z1, z2)`` of both views' embeddings
            (n, d) that returns a scalar; None for the loss of the module.
        settings: arguments of a named loss; None for those of the module, or the defaults.
        layer: last layer; None for the linear layer registered last.
        learning_rate: a number, or one for each remaining step, (max_steps − start,). None for the learning rate of the
            module, with its warm-up and cosine.
        momentum: momentum of SGD; None for that of the module, or 0.
        weight_decay: weight decay of SGD; None for that of the module, or 0.
        velocity: momentum buffers of the weights and, if there is one, the bias of the layer; None for zero.
        num_pairs: number of pairs; at least eight times the number of features.
        views: function from a batch to its two views, if they are not found automatically.

    Raises:
        ValueError: a module that does not end in a linear layer, or whose loss is unknown; settings out of range;
            batches without two views; features or weights that are not finite; a loss that is random, or does not
            return a float64 scalar for float64 embeddings.

    """
    sgd = SGDSettings.of(module, start, max_steps, loss, settings, learning_rate, momentum, weight_decay)
    layer = layer or last_layer(module)
    h1, h2 = last_features(module, layer, batches, num_pairs, views)
    with restored_state(module):  # also of a loss that the module contains
        return forecast_of_features(sgd, h1, h2, layer.weight, layer.bias, start, velocity)


def forecast_of_features(
    sgd: SGDSettings,
    h1: Tensor,
    h2: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: int = 0,
    velocity: Sequence[Tensor] | None = None,
    with_rates: bool = True,
    num_points: int = _NUM_POINTS,
) -> Forecast:
    """Return :func:`forecast` for features (batches, n, m) and the weights and bias of the layer after them.

    Without rates, whose search takes most of the time, stable learning rates are NaN. The trajectory has at most
    ``num_points`` log-spaced samples.
    """
    h1, h2, weight = (values.detach().cpu() for values in (h1, h2, weight))
    bias = None if bias is None else bias.detach().cpu()
    d, m = weight.shape
    scale_invariant = _is_scale_invariant(sgd.loss, h1.shape[1], d)
    # A function may depend on the size of batches.
    as_trained = loss_properties(sgd.loss).uses_moments or not isinstance(sgd.loss, str)
    x1, x2 = (h if as_trained else _smaller_batches(h) for h in (h1, h2))
    components = min(m, max(_COMPONENTS, 2 * d)) if m > _MAX_FEATURES else None
    layer = LastLayer(sgd.loss, x1, x2, weight, bias, components, driven_matrix=sgd.matrix, **sgd.settings)
    growth, fastest, warning = _growth_rates(sgd, h1, h2, d, bias, scale_invariant)
    num_steps = len(sgd.rates)
    points = log_spaced_steps(num_steps, num_points)
    trajectory = layer.simulate(sgd.rates, sgd.momentum, sgd.weight_decay, velocity, points)
    threshold = _threshold(layer, trajectory, float(growth[0]), fastest)
    times = _step_times(trajectory, threshold, start)
    stable = StableRates(math.nan, math.nan, math.nan)
    if with_rates:
        stable = stable_rates(sgd, h1, h2, weight, bias, components, float(growth[0]), scale_invariant)
    result = Forecast(
        sgd.loss, sgd.matrix, start, start + num_steps, float(sgd.rates.max()), sgd.momentum,
        h1.shape[0] * h1.shape[1], times, trajectory.steps + start, trajectory.eigenvalues, threshold, growth, stable,
        (),
    )  # fmt: skip
    if scale_invariant and not start and not _is_small_start(h1, weight, bias):
        warning = (
            f"{loss_properties(sgd.loss).title} has no small start, because the bias is not large compared with the "
            "other part of the embedding: set bias_norm, or a smaller alpha"
        )
    return replace(result, warnings=(*_warnings(result, m, sgd.weight_decay), *([warning] if warning else [])))


def _smaller_batches(h: Tensor) -> Tensor:
    """Split batches (batches, n, m) into the batch size of simulated steps of SimCLR."""
    parts = math.ceil(h.shape[1] / _SIMCLR_PAIRS)
    size = h.shape[1] // parts
    return h[:, : parts * size].reshape(-1, size, h.shape[2])


def _is_scale_invariant(loss: str | PairLoss, num_pairs: int, dim: int) -> bool:
    if isinstance(loss, str):
        return loss_properties(loss).scale_invariant
    return is_scale_invariant(loss, num_pairs, dim)


def _is_small_start(h: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return True if embeddings differ by at most a tenth of the bias, as cosine similarities need."""
    spread = float((h.flatten(0, 1).double() @ weight.double().T).std(0).norm())
    return spread <= 0.1 * _norm(bias)


def _norm(bias: Tensor | None) -> float:
    return 0.0 if bias is None else float(bias.norm())


def _growth_rates(
    sgd: SGDSettings, h1: Tensor, h2: Tensor, d: int, bias: Tensor | None, scale_invariant: bool
) -> tuple[Tensor, Tensor, str]:
    """Return ρ of each mode, (d,), NaN if it is undefined, features of the fastest mode, and a warning or ''.

    The features (m,) are a unit vector, unused if ρ is undefined; (m + 1,) if the bias is the weight of a constant.
    """
    unknown = h1.new_full((d,), math.nan, dtype=torch.float64)
    norm = _norm(bias)
    if scale_invariant and norm == 0:
        return unknown, unknown, ""
    if isinstance(sgd.loss, str):
        if bias is not None and not scale_invariant:
            h1, h2 = (pad(h, (0, 1), value=1.0) for h in (h1, h2))
        matrix = growth_matrix(sgd.loss, h1, h2, d, norm or 1.0, **sgd.settings).cpu()
        rates, vectors = (x.flip(-1) for x in torch.linalg.eigh(matrix))
        rates = without_round_off(rates[:d], float(matrix.norm()))
        return pad(rates, (0, d - len(rates))), vectors[:, 0], ""
    warning = ""
    try:
        signature, point = start_signature(sgd.loss, d, h1.shape[1], bias)
        if bias is not None and point is None:
            h1, h2 = (pad(h, (0, 1), value=1.0) for h in (h1, h2))
        modes = growth_modes(sgd.loss, h1, h2, d, min(d, h1.shape[2]), point)
    except UserError as error:
        return unknown, unknown, f"growth rates and stable learning rates are unknown: {error}"
    rates = modes.rates.real
    total = signature.alpha + signature.beta
    if sgd.matrix == "covariance" and total.sum() < -_CENTRED * signature.alpha.norm():
        warning = (
            "the mean embedding grows as a mode, because the loss is not centred, but has no eigenvalue in the "
            "covariance: set driven_matrix to 'cross_correlation'"
        )
    fastest = torch.linalg.svd(modes.directions[0].real, full_matrices=False).Vh[0]
    return pad(rates, (0, d - len(rates))), fastest, warning


def _step_times(trajectory: LayerTrajectory, threshold: float, start: int) -> Tensor:
    if threshold <= 0 or trajectory.eigenvalues.isinf().any():
        return trajectory.eigenvalues.new_full((trajectory.eigenvalues.shape[1],), math.inf)
    times = crossings(trajectory.steps + start, trajectory.eigenvalues, threshold)
    return times if start else torch.where(trajectory.eigenvalues[0] > threshold / 10, math.nan, times)


def _threshold(layer: LastLayer, trajectory: LayerTrajectory, rate: float, fastest: Tensor) -> float:
    """Return a tenth of the largest eigenvalue at the end; infinite if no mode grows.

    If the fastest mode, with growth rate ``rate``, still grows at more than half of it, there is no plateau yet. Then
    training is simulated from the same weights at a moderate learning rate until there is one.
    """
    top = trajectory.eigenvalues[:, 0]
    top = top[-max(2, math.ceil(len(top) / 10)) :]
    if rate <= 0:
        return math.inf
    if rate > 0 and layer.rate_along(fastest, trajectory.weight, trajectory.bias) > rate / 2:
        for slower in _SLOWER:
            steps = _PLATEAU_STEPS * slower
            rates = [_MODERATE_DRIVE / slower / rate] * steps
            top = layer.simulate(rates, measured_at=range(steps - 20, steps + 1)).eigenvalues[:, 0]
            if top.isfinite().all():
                break
    return 0.1 * float(top.median())


def _warnings(result: Forecast, num_features: int, decay: float) -> list[str]:
    warnings, rate = [], result.learning_rate
    if result.num_pairs < _PAIRS_PER_FEATURE * num_features:
        warnings.append(
            f"{result.num_pairs} pairs are few for {num_features} features, which makes later modes appear early: use "
            f"{_PAIRS_PER_FEATURE * num_features} pairs"
        )
    if result.eigenvalues.isinf().any():
        first = int(result.steps[result.eigenvalues.isinf().any(1)][0])
        warnings.append(f"training diverges at or before step {first}: use a lower learning rate")
    elif not result.start and result.eigenvalues[0, 0] > result.threshold / 10:
        warnings.append("no separated steps, because the first mode starts too high: scale the last layer down")
    if rate > result.rates.limit:
        warnings.append(f"the learning rate {rate:.3g} is above the limit {result.rates.limit:.3g}: lower it")
    elif rate > result.rates.safe:
        warnings.append(f"the learning rate {rate:.3g} is above the safe learning rate {result.rates.safe:.3g}")
    starved = (10 * decay > result.growth_rates).nonzero().flatten()
    if decay > 0 and len(starved):
        warnings.append(
            f"weight decay {decay:g} is not small compared with the growth of mode {int(starved[0]) + 1} and later "
            "modes, which may never be learned"
        )
    return warnings


def unseen_batches(datamodule: Any) -> Iterable[Any]:
    """Yield training batches of a data module without end, from epochs that training does not draw if possible."""
    loader = datamodule.train_dataloader()
    set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
    epoch = -1  # used by the probe pairs
    while True:
        epoch -= 1
        if set_epoch is not None:
            set_epoch(epoch)
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise UserError("the data has no training batches")

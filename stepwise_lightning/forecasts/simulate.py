"""From a network and its data to expected steps: the last layer's training, simulated on the network's features."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.encoders import LinearEncoder, bias_of
from stepwise_lightning.errors import UserError
from stepwise_lightning.features import Views
from stepwise_lightning.forecasts.forecast import Forecast, crossings
from stepwise_lightning.forecasts.learning_rates import StableRates, stable_rates
from stepwise_lightning.forecasts.sgd import SGDSettings, last_features, last_layer
from stepwise_lightning.spectrum.schedule import log_spaced_steps
from stepwise_lightning.theory.growth import growth_matrix, heavy_ball_growth
from stepwise_lightning.theory.last_layer import LastLayer, LayerTrajectory

__all__ = ["NUM_PAIRS", "forecast", "forecast_of_features", "unseen_batches"]

NUM_PAIRS = 4096
_NUM_POINTS = 200  # as many as SpectrumLogger's
# Wider features are projected: a step of Barlow Twins takes O(d m²).
_WIDE, _COMPONENTS = 512, 128
# Negatives that a simulated step of SimCLR looks at: its growth does not depend on their number, its cost does.
_SIMCLR_PAIRS = 128
_PAIRS_PER_FEATURE = 8
_MODERATE, _PLATEAU = 0.1, 600  # x = ηρ_1, and how many steps of that lead beyond the first mode


def forecast(
    module: nn.Module,
    batches: Iterable[Any],
    max_steps: int,
    *,
    start: int = 0,
    loss: str | None = None,
    settings: Mapping[str, Any] | None = None,
    layer: nn.Linear | LinearEncoder | None = None,
    learning_rate: float | Sequence[float] | Tensor | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    velocity: Sequence[Tensor] | None = None,
    num_pairs: int = NUM_PAIRS,
    views: Views | None = None,
) -> Forecast:
    """Return when each mode will be learned, and up to which learning rate training is stable.

    The last linear layer is simulated (:class:`stepwise_lightning.theory.LastLayer`) on the features that enter it
    now, from its weights as they are now. What it does not see is that features move while the network trains. So it is
    good for the first mode of all three losses, roughly for later ones of Barlow Twins and SimCLR, and not for those of
    VICReg: :attr:`Forecast.errors`. More modes may be learned than it says, because features grow. From the middle of a
    run, :meth:`Forecast.with_plateau_correction` takes the run's record, and reckons with the plateau that has passed.

    The module, its buffers, modes and all random numbers are left as they were; batch normalisation uses the statistics
    of each batch's view, as in training. SimCLR is simulated with at most 128 pairs a step, and features of more than
    512 dimensions are projected on 128 (or 2d), see :class:`stepwise_lightning.theory.LastLayer`.

    Args:
        module: a :class:`BarlowTwins`, :class:`VICReg` or :class:`SimCLR` of this package, from which all else is read;
            or any module from views (n, …) to embeddings (n, d) that ends in a linear layer, with ``loss``,
            ``settings`` and ``learning_rate``.
        batches: of two views, as in training and of its size, but drawn apart from it. Taken until there are
            ``num_pairs``.
        max_steps: optimiser steps of training, from its beginning.
        start: the step at which the module is; 0 before training.
        loss: ``barlow_twins``, ``vicreg`` or ``simclr`` (with cosine similarity); None for the module's own.
        settings: of the loss, named as its arguments; None for the module's own, or the loss's defaults.
        layer: the last layer; None for the module's linear layer that was registered last.
        learning_rate: one for all steps to come, or one for each, (max_steps − start,). None for the module's own, with
            its warm-up and cosine.
        momentum: of SGD; None for the module's own, or 0.
        weight_decay: of SGD; None for the module's own, or 0.
        velocity: the optimiser's momentum buffers of the layer's weights and, where there is one, bias; None for zero.
        num_pairs: how many pairs to take features of; at least eight times as many as there are features.
        views: a function from a batch to its two views, where they are not found by themselves.

    Raises:
        ValueError: a module that does not end in a linear layer, or whose loss is not known; settings out of range;
            batches without two views; features or weights that are not finite.

    """
    training = SGDSettings.of(module, start, max_steps, loss, settings, learning_rate, momentum, weight_decay)
    layer = layer or last_layer(module)
    h1, h2 = last_features(module, layer, batches, num_pairs, views)
    return forecast_of_features(training, h1, h2, layer.weight, bias_of(layer), start, velocity)


def forecast_of_features(
    training: SGDSettings,
    h1: Tensor,
    h2: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: int = 0,
    velocity: Sequence[Tensor] | None = None,
    with_rates: bool = True,
    num_points: int = _NUM_POINTS,
) -> Forecast:
    """Return :func:`forecast` of features (batches, n, m), and of the weights and bias of the layer that they enter.

    Without rates, whose search takes longer than the rest, stable learning rates are NaN. The trajectory has at most
    ``num_points`` log-spaced samples.
    """
    weight, bias = weight.detach().cpu(), None if bias is None else bias.detach().cpu()
    d, m = weight.shape
    x1, x2 = (_in_few(h) if training.loss == "simclr" else h for h in (h1, h2))
    components = min(m, max(_COMPONENTS, 2 * d)) if m > _WIDE else None
    layer = LastLayer(training.loss, x1, x2, weight, bias, components, **training.settings)

    norm = 0.0 if bias is None else float(bias.norm())
    growth = torch.full((d,), math.nan, dtype=torch.float64)
    if training.loss != "simclr" or norm > 0:
        growth = _growth_rates(training, h1, h2, d, norm or 1.0)
    num_steps = len(training.rates)
    points = log_spaced_steps(num_steps, num_points)
    trajectory = layer.simulate(training.rates, training.momentum, training.weight_decay, velocity, points)
    threshold = _threshold(layer, training, trajectory, float(growth[0]))
    steps = trajectory.steps + start
    times = torch.full((d,), math.inf, dtype=torch.float64)
    if threshold > 0 and not trajectory.eigenvalues.isinf().any():
        times = crossings(steps, trajectory.eigenvalues, threshold)
        if not start:
            times = torch.where(trajectory.eigenvalues[0] > threshold / 10, math.nan, times)
    stable = StableRates(math.nan, math.nan, math.nan)
    if with_rates:
        stable = stable_rates(training, h1, h2, weight, bias, components, float(growth[0]))
    result = Forecast(
        training.loss, start, start + num_steps, float(training.rates.max()), training.momentum,
        h1.shape[0] * h1.shape[1], times, steps, trajectory.eigenvalues, threshold, growth, stable, (),
    )  # fmt: skip
    spread = float((h1.flatten(0, 1).double() @ weight.double().T).std(0).norm())
    return _warned(result, m, training.weight_decay, spread / norm if norm else math.inf)


def _in_few(h: Tensor) -> Tensor:
    """Return batches (batches, n, m) in parts of a size that SimCLR is simulated with."""
    parts = math.ceil(h.shape[1] / _SIMCLR_PAIRS)
    size = h.shape[1] // parts
    return h[:, : parts * size].reshape(-1, size, h.shape[2])


def _growth_rates(training: SGDSettings, h1: Tensor, h2: Tensor, d: int, bias_norm: float) -> Tensor:
    matrix = growth_matrix(training.loss, h1, h2, d, bias_norm, **training.settings)
    rates = torch.linalg.eigvalsh(matrix).flip(0)[:d].cpu()
    return torch.nn.functional.pad(rates, (0, d - len(rates)))


def _threshold(layer: LastLayer, training: SGDSettings, trajectory: LayerTrajectory, fastest: float) -> float:
    """Return a tenth of the largest eigenvalue at the end.

    Where that still grows then, as it does at first, by r² each step, there is no plateau yet by which modes could be
    called learned: then it is that of training which goes on at a moderate rate until there is.
    """
    top = trajectory.eigenvalues[:, 0]
    tail = slice(-max(2, math.ceil(len(top) / 10)), None)
    first, last = trajectory.steps[tail][[0, -1]].tolist()
    if fastest > 0:
        root, _ = heavy_ball_growth(fastest * training.rates[first:last], training.momentum)
        if float((top[tail][-1] / top[tail][0]).log()) > float(root.log().sum()):  # half of r²
            rates = [_MODERATE / fastest] * _PLATEAU
            late = range(_PLATEAU - 20, _PLATEAU + 1)
            top = layer.simulate(rates, training.momentum, measured_at=late).eigenvalues[:, 0]
            tail = slice(None)
    return 0.1 * float(top[tail].median())


def _warned(result: Forecast, num_features: int, decay: float, share_of_bias: float) -> Forecast:
    """Return a forecast with its warnings."""
    said = []
    if result.num_pairs < _PAIRS_PER_FEATURE * num_features:
        said.append(
            f"{result.num_pairs} pairs are few for {num_features} features: they seem to share more than they do, and "
            f"later modes come out early; give {_PAIRS_PER_FEATURE * num_features}"
        )
    if result.eigenvalues.isinf().any():
        first = int(result.steps[result.eigenvalues.isinf().any(1)][0])
        said.append(f"training diverges, at step {first} or before: take a lower learning rate")
    elif not result.start and result.eigenvalues[0, 0] > result.threshold / 10:
        said.append("no separated steps: the first mode starts too high; scale the last layer's weights down")
    if result.learning_rate > result.rates.limit:
        said.append(f"the learning rate {result.learning_rate:.3g} is above the limit {result.rates.limit:.3g}")
    elif result.learning_rate > result.rates.safe:
        said.append(
            f"the learning rate {result.learning_rate:.3g} is above {result.rates.safe:.3g}, below which it is safe"
        )
    starved = (10 * decay > result.growth_rates).nonzero().flatten()
    if decay > 0 and len(starved):
        said.append(
            f"weight decay {decay:g} is not small against the growth of mode {int(starved[0]) + 1} and later: they may "
            "never be learned, which features that stay do not show"
        )
    if not result.start and result.loss == "simclr" and share_of_bias > 0.1:
        said.append(
            "SimCLR has no small start: its bias is not long against what the weights put out; set bias_norm, or a "
            "smaller alpha"
        )
    return Forecast(**(vars(result) | {"warnings": tuple(said)}))


def unseen_batches(datamodule: Any) -> Iterable[Any]:
    """Yield training batches of a data module without end, with views that training never draws where it can tell."""
    loader = datamodule.train_dataloader()
    set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
    epoch = -1  # the probe pairs' own
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

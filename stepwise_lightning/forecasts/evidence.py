r"""Evidence for the cause of a loss that does not decrease, from a network and its data.

Legend
    h, h'       features of both views, inputs of the last layer, (batches, n, m)
    ρ           growth rate of a mode; ω weight decay, η learning rate
    Γ           centred cross-correlation of the features
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stepwise_lightning.encoders import LinearEncoder
from stepwise_lightning.features import Views, capture, on_device, views_in
from stepwise_lightning.features.module_state import restored_state
from stepwise_lightning.forecasts.forecast import Forecast
from stepwise_lightning.forecasts.sgd import SGDSettings, last_features, last_layer
from stepwise_lightning.forecasts.simulate import NUM_PAIRS, forecast_of_features
from stepwise_lightning.precision import single_threaded
from stepwise_lightning.theory.growth import heavy_ball_growth
from stepwise_lightning.theory.last_layer import LastLayer
from stepwise_lightning.theory.loss_derivatives import PairLoss
from stepwise_lightning.theory.moments import FeatureMoments

_PERMUTATIONS = 20
_MAX_FEATURES = 512  # wider features are projected on as many components
_PAIRS_PER_FEATURE = 4  # with fewer, unrelated pairs seem to share content
_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Evidence:
    """Measurements on a network and its data at one step."""

    start: int  #: step of the weights
    forecast: Forecast | None  #: forecast from the weights; None if features are equal
    sgd: SGDSettings
    batch_size: int
    is_half: bool  #: True for training in half precision
    spread: float  #: standard deviation of the features over images, relative to their root mean square
    shared: float  #: largest eigenvalue of Γ; infinite for fewer than 4 m pairs
    chance: float  #: the largest value of the same for 20 permutations of the second views; 0 for fewer than 4 m pairs
    rounding: float  #: error of embeddings in the precision of training, relative to their spread; 0 for float32
    kept: float  #: share of an update of the last layer that remains after rounding of the weights; 1 for float32

    def growth(self, mode: int) -> float:
        """Return the expected growth factor per step of a mode, counted from 0; NaN if unknown."""
        rate = self.rate(mode) - self.sgd.weight_decay
        drive = float(self.sgd.rates.max()) * rate
        if math.isnan(drive):
            return math.nan
        if drive >= 0:
            return float(heavy_ball_growth(drive, self.sgd.momentum)[0])
        # The root of the recursion that is continuous at 0; complex roots have the modulus √β.
        b, beta = 1 + self.sgd.momentum + drive, self.sgd.momentum
        return (b + math.sqrt(b**2 - 4 * beta)) / 2 if b**2 >= 4 * beta and b > 0 else math.sqrt(beta)

    def rate(self, mode: int) -> float:
        """Return ρ of a mode, counted from 0; NaN if unknown."""
        rates = [] if self.forecast is None else self.forecast.growth_rates.tolist()
        return rates[mode] if mode < len(rates) else math.nan

    @property
    def num_growing(self) -> int:
        """Number of modes with ρ above the weight decay."""
        return 0 if self.forecast is None else int((self.forecast.growth_rates > self.sgd.weight_decay).sum())


def gather_evidence(
    module: nn.Module,
    batches: Iterable[Any],
    start: int,
    max_steps: int,
    *,
    loss: str | PairLoss | None = None,
    settings: Mapping[str, Any] | None = None,
    precision: str = "32-true",
    with_rates: bool = False,
    num_pairs: int = NUM_PAIRS,
    views: Views | None = None,
) -> Evidence:
    """Return :class:`Evidence`; arguments and errors as of :func:`stepwise_lightning.forecast`.

    ``precision`` is an argument of Lightning's Trainer; ``with_rates`` computes stable learning rates.
    """
    sgd = SGDSettings.of(module, start, max_steps, loss, settings)
    layer = last_layer(module)
    collected: list[Any] = []
    h1, h2 = last_features(module, layer, _collecting(batches, collected), num_pairs, views)
    pair = on_device(views_in(collected[0], views), module)
    spread = 0.0 if _is_rounding(module, pair[0]) else _spread(h1, h2)
    forecast = None
    shared = chance = math.nan
    rounding, kept = 0.0, 1.0
    if spread > 0:
        shared, chance = _shared_content(h1, h2)
        with restored_state(module):
            forecast = forecast_of_features(sgd, h1, h2, layer.weight, layer.bias, start, with_rates=with_rates)
        if (dtype := _DTYPES.get(precision.partition("-")[0])) is not None:
            rounding = _rounding(module, pair[0], dtype, precision.endswith("true"))
            if precision.endswith("true"):
                kept = _kept(sgd, h1, h2, layer, dtype)
    is_half = precision.startswith(tuple(_DTYPES))
    return Evidence(start, forecast, sgd, h1.shape[1], is_half, spread, shared, chance, rounding, kept)


def _collecting(batches: Iterable[Any], collected: list[Any]) -> Iterable[Any]:
    for batch in batches:
        collected.append(batch)
        yield batch


def _spread(h1: Tensor, h2: Tensor) -> float:
    h = torch.stack([h1, h2]).double()
    size = float(h.square().mean())
    deviations = h - h.mean(2, keepdim=True)
    return math.sqrt(float(deviations.square().mean()) / size) if size > 0 else 0.0


@single_threaded()
def _shared_content(h1: Tensor, h2: Tensor) -> tuple[float, float]:
    """Return the largest eigenvalue of Γ, and its largest value for second views of other pairs of the batch."""
    h1, h2 = (h.double() for h in (h1, h2))
    if h1.shape[2] > _MAX_FEATURES:
        components = torch.linalg.svd(torch.cat([h1, h2]).flatten(0, 1)[: 4 * _MAX_FEATURES], full_matrices=False)[2]
        h1, h2 = (h @ components[:_MAX_FEATURES].T for h in (h1, h2))
    generator = torch.Generator().manual_seed(0)

    if len(h1) * h1.shape[1] < _PAIRS_PER_FEATURE * h1.shape[2]:
        return math.inf, 0.0

    def largest(other: Tensor) -> float:
        return float(torch.linalg.eigvalsh(FeatureMoments.of(h1, other).gamma())[-1])

    others = []
    for _ in range(_PERMUTATIONS):  # random cycles: no pair keeps its views
        order = torch.rand(h1.shape[:2], generator=generator).argsort(1)
        cycle = torch.empty_like(order).scatter_(1, order, order.roll(1, 1))
        others.append(largest(h2.take_along_dim(cycle[:, :, None], 1)))
    return largest(h2), max(others)


def _rounding(module: nn.Module, view: Tensor, dtype: torch.dtype, is_true: bool) -> float:
    """Return the change of embeddings in another precision than float32, relative to their spread over images."""

    def embed(cast: torch.dtype, autocast: bool) -> Tensor:
        state = {name: x.to(cast) if x.is_floating_point() else x for name, x in module.state_dict().items()}

        def call(module: nn.Module, view: Tensor) -> Tensor:
            with torch.autocast(view.device.type, dtype, enabled=autocast):
                return functional_call(module, state, (view.to(cast),))

        z = capture(module, [view], [call])["call"][0].double()
        return z - z.mean(0)

    exact = embed(torch.float32, False)
    rounded = embed(dtype if is_true else torch.float32, not is_true)
    return float((rounded - exact).norm() / exact.norm())


def _is_rounding(module: nn.Module, view: Tensor) -> bool:
    """Return True if embeddings differ by rounding errors only, for example after normalisation of single values."""
    try:
        return _rounding(module, view, torch.float64, True) > 0.5
    except Exception:  # no float64 in the module or on the device, or other outputs than one tensor: not known
        return False


def _kept(sgd: SGDSettings, h1: Tensor, h2: Tensor, layer: nn.Linear | LinearEncoder, dtype: torch.dtype) -> float:
    """Return the share of one update of the weights that remains if they are rounded to half precision."""
    weight = layer.weight.detach().to(dtype).double().cpu()
    bias = layer.bias
    simulated = LastLayer(
        sgd.loss,
        h1,
        h2,
        weight,
        None if bias is None else bias.detach().cpu(),
        driven_matrix=sgd.matrix,
        **sgd.settings,
    )
    after = simulated.simulate(sgd.rates[:1], sgd.momentum, sgd.weight_decay, None, [1]).weight
    update = (after - weight) / (1 - sgd.momentum)  # as with accumulated momentum
    return float(((weight + update).to(dtype).double() - weight).flatten() @ update.flatten() / update.square().sum())

"""Growth rates of modes follow from the second derivatives of any loss (not in the paper).

Eight losses train a linear model, a wide network and a small ResNet by full-batch gradient descent on fixed pairs, from
a small start, until the first mode has grown by a factor of 30. Before training, ``growth_modes`` computes the first
five modes of the last layer and their growth rates from the loss and the features at initialisation.

The measured growth rate of a mode is the slope of log ‖W v‖ over the whole run, where v is its predicted direction and
W the last layer, with the bias as the weight of a constant feature. The prediction has no fitted parameter. A wrong
direction contains a part of a faster mode, and grows at another rate than predicted. Rivals: the signatures of the
seven other losses, with their directions and rates; wrong pairs; and one common rate for all modes of a loss, the
geometric mean of its measured rates.

For four losses, ``growth_matrix`` has closed forms, which do not evaluate the loss. Their rivals are two wrong losses:
SimCLR with the similarity of a view with itself in the denominator, whose rates differ by about 1/2n for n pairs, and
VICReg with squared hinges. The ResNet, in float32, deviates from the prediction by more than 1/2n, and has no such
claim.

LeJEPA prefers directions of the embedding. Its modes are matrices D with the amplitude |⟨W, D⟩|, and the first five
have nearly the same v. Sizes and settings are chosen here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reproduce.claims import Claim, seeds_text, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.mode_rates import GROWTH, LOSSES, RELATIVE_RATE, VARIANTS, Modes, correlation, measured_rates, train
from reproduce.options import data_name, fixed_pairs, limit_pairs
from reproduce.processes import map_parallel
from reproduce.rate_plots import RatePanel, rates_figure
from reproduce.wide_networks import project_to_span
from stepwise_lightning import MLP, Encoder, scale_last_layer
from stepwise_lightning.forecasts.sgd import last_features, last_layer

PAPER = "Not in the paper, which has one growth matrix, 4Γ, for the analytical Barlow Twins loss."
SIZES: dict[str, Any] = dict(num_pairs=64, crop_size=24, dim=10, width=512)
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(num_pairs=24, crop_size=12, dim=6, width=64),
    "cpu": SIZES,
    "full": SIZES | dict(data="cifar10"),
}
# Scale of the last layer; for the ResNet as in its configurations.
ALPHAS = {"linear model": 1e-4, "wide network": 1e-4, "ResNet": 1e-3}


# The bounds were chosen with seeds 10 and 11 of the photographs.
MAX_ERROR = {"linear model": 0.01, "wide network": 0.01, "ResNet": 0.1}
MAX_MEDIAN_ERROR = {"linear model": 0.001, "wide network": 0.001, "ResNet": 0.01}
MIN_CORRELATION = 0.99
MAX_CLOSED_FORM_ERROR = {"linear model": 0.003, "wide network": 0.003}
RIVALS = ("own signature", "another loss", "wrong pairs", "one common rate")
CLOSED_FORM, VARIANT = "closed form", "wrong variant"


@dataclass
class Result:
    """One loss of one model and seed."""

    model: str
    seed: int
    loss: str
    rates: Tensor
    """Predicted, (k,)."""
    measured: Tensor
    """(k,)."""
    growth: Tensor
    """Amplitudes relative to their initial values, (T + 1, k)."""
    rate: float
    """Learning rate."""
    errors: dict[str, Tensor]
    """|measured / predicted − 1| by rival, (k,); for another loss (7, k).

    Also of ``CLOSED_FORM`` and ``VARIANT`` for the losses that have them.
    """
    others: Tensor
    """Predicted and measured rates for the signatures of the seven other losses, (7, 2, k)."""

    def largest_error(self, rival: str) -> float:
        """Return the largest error of the modes, for another loss the median over losses."""
        return float(self.errors[rival].amax(-1).median())


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train every model with every loss and seed, and compare with the predictions."""
    limits = limit_pairs(options)
    fixed_pairs(options, options.seeds[0])  # raises for invalid data before any process starts
    items = [(model, seed, options) for model in reversed(MAX_ERROR) for seed in options.seeds]  # long ones first
    by_run = {
        item[:2]: results for item, results in zip(items, map_parallel(experiment, items, "any_loss"), strict=True)
    }
    figure = rates_figure(
        [_panel(model, [by_run[model, seed] for seed in options.seeds]) for model in MAX_ERROR], RIVALS,
        title="Growth rates of modes follow from the second derivatives of the loss",
        note=f"{options.num_pairs} pairs of {options.crop_size}×{options.crop_size} crops, {data_name(options.data)}; "
        f"{seeds_text(options.seeds)}; five modes per loss",
    )  # fmt: skip
    return Outcome(
        figure, ["model", "seed", "loss", "mode", "step", "growth", "predicted_growth"],
        (row for results in by_run.values() for result in results for row in _rows(result)),
        _claims(by_run, options.seeds), [_summary(by_run[key]) for key in sorted(by_run)],
        {"alphas": ALPHAS, "relative_rate": RELATIVE_RATE, "growth": GROWTH} | limits
        | {"rates": [_rates(result) for results in by_run.values() for result in results]},
    )  # fmt: skip


def experiment(model: str, seed: int, options: argparse.Namespace) -> list[Result]:
    """Predict the modes of all losses from the features at initialisation, then train with each loss."""
    pairs = fixed_pairs(options, seed)
    views = pairs.x1, pairs.x2
    encoder, inputs = _start(model, seed, options, views, 1.0)
    encoder, batch = encoder.double(), [x.double() for x in inputs]
    layer = last_layer(encoder)
    _, bias = (parameter.detach().clone() for parameter in layer.parameters())
    one = torch.ones(len(batch[0]), 1).double()
    h1, h2 = (torch.cat([h[0], one], 1) for h in last_features(encoder, layer, [batch], len(one)))
    predicted, wrong = (
        {name: Modes.of(loss, h1, h, options.dim, bias) for name, loss in LOSSES.items()} for h in (h2, h2.roll(1, 0))
    )
    closed_forms = {
        name: Modes.of_closed_form(loss, h1, h2, options.dim) for name, loss in LOSSES.items() if loss.closed_form
    }
    variants = {name: Modes.of(loss, h1, h2, options.dim, bias) for name, loss in VARIANTS.items()}
    results = []
    for name, loss in LOSSES.items():
        rate = RELATIVE_RATE / float(predicted[name].rates[0])
        encoder, (pairs.x1, pairs.x2) = _start(model, seed, options, views, loss.bias_norm)
        weights = train(encoder, loss.function, rate, pairs, "32-true" if model == "ResNet" else "64-true")
        if loss.bias_norm:  # nothing grows along the bias
            weights[:, :, -1] -= bias
            weights -= torch.einsum("d,e,tem->tdm", bias, bias, weights) / bias.square().sum()
        alternatives = {"wrong pairs": wrong, CLOSED_FORM: closed_forms, VARIANT: variants}
        modes = {rival: by_loss[name] for rival, by_loss in alternatives.items() if name in by_loss}
        results.append(_result(model, seed, name, weights, rate, predicted, modes))
    return results


def _start(
    model: str, seed: int, options: argparse.Namespace, views: tuple[Tensor, Tensor], bias_norm: float | None
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return a model at initialisation and its inputs."""
    if model == "ResNet":
        return Encoder(options.dim, projector_depth=2, alpha=ALPHAS[model], bias_norm=bias_norm, seed=seed), views
    hidden = [options.width] if model == "wide network" else []
    network = MLP(3 * options.crop_size**2, hidden, options.dim, seed=seed)
    scale_last_layer(network, ALPHAS[model], bias_norm, seed)
    return network, project_to_span(network, *views)


def _result(
    model: str,
    seed: int,
    name: str,
    weights: Tensor,
    rate: float,
    predicted: dict[str, Modes],
    alternatives: dict[str, Modes],
) -> Result:
    def measure(modes: Modes) -> Tensor:
        return measured_rates(modes.amplitudes(weights), rate)

    own, amplitudes = predicted[name], predicted[name].amplitudes(weights)
    measured = measured_rates(amplitudes, rate)
    others = torch.stack([torch.stack([m.rates, measure(m)]) for key, m in predicted.items() if key != name])
    common = measured.log().mean().exp()
    errors = {
        "own signature": measured / own.rates - 1,
        "another loss": others[:, 1] / others[:, 0] - 1,
        "one common rate": measured / common - 1,
    } | {rival: measure(modes) / modes.rates - 1 for rival, modes in alternatives.items()}
    errors = {rival: error.abs() for rival, error in errors.items()}
    return Result(model, seed, name, own.rates, measured, amplitudes / amplitudes[0], rate, errors, others)


def _panel(model: str, by_seed: list[list[Result]]) -> RatePanel:
    shown = next(result for result in by_seed[0] if result.loss == "SimCLR")
    steps = torch.arange(len(shown.growth)).double()
    by_loss = {name: [results[index] for results in by_seed] for index, name in enumerate(LOSSES)}
    return RatePanel(
        model, "SimCLR", shown.growth.numpy(), _predicted_growth(shown, steps).numpy(),
        {name: np.array([[r.rates.numpy(), r.measured.numpy()] for r in results]) for name, results in by_loss.items()},
        {name: np.array([[r.largest_error(x) for x in RIVALS] for r in results]) for name, results in by_loss.items()},
    )  # fmt: skip


def _predicted_growth(result: Result, steps: Tensor) -> Tensor:
    return (1 + result.rate * result.rates) ** steps[:, None]


def _rows(result: Result) -> list[list[Any]]:
    predicted = _predicted_growth(result, torch.arange(len(result.growth)).double())
    return [
        [result.model, result.seed, result.loss, mode, step, *values]
        for step, pairs in enumerate(torch.stack([result.growth, predicted], 2).tolist())
        for mode, values in enumerate(pairs)
    ]


def _rates(result: Result) -> dict[str, Any]:
    return {
        "model": result.model, "seed": result.seed, "loss": result.loss,
        "predicted": result.rates.tolist(), "measured": result.measured.tolist(),
        "largest_errors": {rival: result.largest_error(rival) for rival in RIVALS},
    }  # fmt: skip


def _summary(results: list[Result]) -> dict[str, Any]:
    """Return the numbers of one model and seed over all losses."""
    own, wrong = (
        torch.stack([result.errors[rival] for result in results]) for rival in ("own signature", "wrong pairs")
    )
    # Each loss has the signature of the loss that is 1, …, 7 places further in the list; the best of the seven.
    others = torch.stack([result.others.roll(-index, 0) for index, result in enumerate(results)], 1)
    return {
        "model": results[0].model,
        "seed": results[0].seed,
        "largest_error": float(own.max()),
        "worst_loss": results[int(own.amax(1).argmax())].loss,
        "common_rate": min(result.largest_error("one common rate") for result in results),
        "median_error": float(own.median()),
        "wrong_pairs": float(wrong.median()),
        "correlation": correlation(*(torch.stack([getattr(r, x) for r in results]) for x in ("rates", "measured"))),
        "another_loss": max(correlation(pairs[:, 0], pairs[:, 1]) for pairs in others),
        "closed_form": max(r.largest_error(CLOSED_FORM) for r in results if CLOSED_FORM in r.errors),
        "wrong_variant": min(r.largest_error(VARIANT) for r in results if VARIANT in r.errors),
    }


def _claims(by_run: dict[tuple[str, int], list[Result]], seeds: Sequence[int]) -> list[Claim]:
    claims = []
    for model in MAX_ERROR:
        summaries = [_summary(by_run[model, seed]) for seed in seeds]
        name = model.split()[0].lower()
        for key, sentence, relation, bound, control, measured, rival in (
            ("rates", "largest relative error of a growth rate", "<=", MAX_ERROR[model], "one common rate",
             "largest_error", "common_rate"),
            ("median", "median relative error of growth rates", "<=", MAX_MEDIAN_ERROR[model], "wrong pairs",
             "median_error", "wrong_pairs"),
            ("order", "rank correlation of predicted and measured growth rates", ">=", MIN_CORRELATION,
             "signatures of other losses", "correlation", "another_loss"),
        ):  # fmt: skip
            values, controls = ([summary[column] for summary in summaries] for column in (measured, rival))
            claims.append(
                worst(f"{name}_{key}", f"{model}: {sentence}", values, relation, bound, seeds, control, controls)
            )
        if model in MAX_CLOSED_FORM_ERROR:
            values, controls = ([summary[key] for summary in summaries] for key in ("closed_form", "wrong_variant"))
            claims.append(
                worst(
                    f"{name}_closed_form", f"{model}: largest relative error of the closed forms of four losses",
                    values, "<=", MAX_CLOSED_FORM_ERROR[model], seeds,
                    "closed forms against SimCLR with self-similarity, VICReg with squared hinges", controls,
                )
            )  # fmt: skip
    return claims


FIGURE = PaperFigure("any_loss", __doc__, PAPER, PROFILES, produce)

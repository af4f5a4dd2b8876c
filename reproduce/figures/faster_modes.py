"""All modes can be learned in far fewer steps, in the same subspace (an open question of the authors; ours).

Small modes come late because each grows in proportion to its γ. The option ``acceleration`` of Barlow Twins replaces
the gradient by one that costs d × d algebra only (``stepwise_lightning/acceleration.py``): the gate, or Lyapunov's,
under which all modes grow at one rate. Steps until all d eigenvalues of C are at ½ are counted beside plain gradient
descent and momentum, for a linear model, a kernel machine (ReLU tangent kernel), a wide network and a small ResNet.

Each is tuned: the fewest steps of its grid count (below; rates relative to 1/(4γ_1), Lyapunov's without unit), from
which on all eigenvalues stay between ½ and 1.5, for half as long again. Starts are small (weights of 1e-8; last layers
× 1e-4, in the ResNet × 1e-3), d is the number of modes after which γ falls most. The control divides features by |Γ|:
as fast for every mode, and in another subspace.

What does not hold is drawn too: batches of 64 fresh pairs lose the subspace. Of the ResNet each rule has one run of few
steps at one rate (chosen on photographs, seed 0), of the first seed alone but for the full profile. Its hidden layer is
compared at equal numbers of learned modes: fewer steps to the embedding's modes do not make it better.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reproduce.claims import Claim, seeds_text, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.figures.acceleration.descent import FEATURES, LEARNED, RULES, Descent, LinearProblem, Setting, tuned
from reproduce.figures.acceleration.networks import features, resnet_descent, wide_descent
from reproduce.figures.kernel_mlp import into_their_span
from reproduce.options import data_name
from reproduce.plots import Response, rules_figure
from reproduce.processes import each
from stepwise_lightning import MLP, FixedCropPairs, TwoViewDataModule, scale_last_layer
from stepwise_lightning.plots import Panel
from stepwise_lightning.spectrum.schedule import log_spaced_steps
from stepwise_lightning.theory import relu_ntk, subspace_alignment

PAPER = "Not in the paper, whose outlook asks whether small modes can be learned faster."
CPU: dict[str, Any] = dict(
    num_pairs=2048, crop_size=20, dimensions=(10, 16), kernel_pairs=100, wide_pairs=50, width=256, wide_dim=6,
    image_size=16, resnet_batch=256, resnet_steps=60, resnet_dim=6, resnet_seeds=1,
)  # fmt: skip
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(
        num_pairs=256, crop_size=8, dimensions=(4, 8), kernel_pairs=40, wide_pairs=20, width=128, wide_dim=3,
        image_size=12, resnet_batch=64, resnet_steps=20, resnet_dim=3, resnet_seeds=1,
    ),
    "cpu": CPU,
    "full": CPU | dict(data="cifar10", resnet_steps=400, resnet_seeds=3),
}  # fmt: skip
INIT_STD = 1e-8
MOST = {"linear": 20000, "kernel": 20000, "wide": 3000}  # steps that are waited for
LYAPUNOV = [Setting("lyapunov", rate) for rate in (0.9, 0.75, 0.5, 0.25)]
LINEAR_GRIDS = {
    "plain": [Setting("plain", rate) for rate in (0.95, 0.8)],
    "momentum": [
        Setting("momentum", rate, beta)
        for beta in (0.98, 0.95, 0.99, 0.9, 0.8, 0.5)
        for rate in (0.8, 1.0, 0.6, 1.2, 0.4, 0.2, 0.1)
    ],
    "gate": [Setting("gate", rate) for rate in (0.95, 0.8, 0.5, 0.2)],
    "lyapunov": LYAPUNOV,
    FEATURES: [Setting(FEATURES, 0.25)],
}
# Features move, and with them γ_1.
WIDE_GRIDS = {
    "plain": [Setting("plain", rate) for rate in (0.5, 0.7)],
    "momentum": [Setting("momentum", rate, beta) for beta in (0.95, 0.9, 0.98) for rate in (0.4, 0.8, 0.2)],
    "gate": [Setting("gate", rate) for rate in (0.5, 0.7, 0.25)],
    "lyapunov": LYAPUNOV[2:],
}
RESNET = {
    "plain": Setting("plain", 0.02), "momentum": Setting("momentum", 0.008, 0.9), "gate": Setting("gate", 0.01),
    "lyapunov": Setting("lyapunov", 0.3),
}  # fmt: skip
FRESH, FRESH_SIZES, FRESH_STEPS = Setting("lyapunov", 0.2), (64, 256), 300
TITLES = {
    "plain": "gradient descent", "momentum": "momentum", "gate": "gate", "lyapunov": "Lyapunov",
    FEATURES: "features / |Γ|", "fresh256": "Lyapunov,\n256 fresh", "fresh64": "Lyapunov,\n64 fresh",
}  # fmt: skip
SHORT = ["plain", "momentum", "gate", "Lyapunov"]
MODELS = {"linear": "linear", "kernel": "kernel", "wide": "wide network", "resnet": "ResNet"}


@dataclass
class Result:
    """One model, descended by one rule from one seed's start."""

    model: str
    rule: str
    seed: int
    descent: Descent
    alignment: float = math.nan
    """Of all d modes, with the closed form."""
    accuracies: dict[int, float] = field(default_factory=dict)
    """Of the hidden layer's neighbours, by number of learned modes."""

    @property
    def most(self) -> int:
        """The last step that was looked at."""
        return max(self.descent.path)

    def learned(self) -> int:
        """Return how many modes were learned at the last step."""
        return int((self.descent.path[self.most] >= LEARNED).sum())

    def summary(self) -> dict[str, Any]:
        """Return what goes into the table."""
        _, rate, momentum = self.descent.setting
        return {
            "model": self.model, "seed": self.seed, "rule": self.rule, "rate": rate, "momentum": momentum,
            "steps": self.descent.steps, "last_step": self.most, "modes_learned": self.learned(),
            "dimensions": len(self.descent.path[0]), "alignment": self.alignment,
            "best_hidden": max(self.accuracies.values(), default=math.nan),
        }  # fmt: skip

    def rows(self) -> list[list[Any]]:
        """Return its rows of ``data.csv``: eigenvalues at steps that are spaced as logarithms, and accuracies."""
        start = [self.model, self.rule, self.seed]
        kept = [step for step in log_spaced_steps(self.most, 150) if step in self.descent.path]
        rows = [
            [*start, step, "eigenvalue", mode, value]
            for step in kept
            for mode, value in enumerate(self.descent.path[step].tolist())
        ]
        return rows + [[*start, "", "hidden_knn", modes, value] for modes, value in self.accuracies.items()]


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Descend all models by all rules, for every seed."""
    _pairs(options.seeds[0], options).setup()  # refuses bad data before any process starts
    items: list[tuple[Any, ...]] = [
        ("resnet", seed, rule, options)
        for seed in options.seeds[: options.resnet_seeds]
        for rule in (*RESNET, "fresh64")
    ]
    items += [(model, seed, "", options) for seed in options.seeds for model in MOST]
    results = [result for part in each(experiment, items, "descending") for result in part]
    first = [r for rule in RULES for r in results if (r.model, r.rule, r.seed) == ("linear", rule, options.seeds[0])]
    return Outcome(
        _figure(results, first, options), ["model", "rule", "seed", "step", "quantity", "mode", "value"],
        (row for result in results for row in result.rows()), _claims(results, options),
        [result.summary() for result in results], {"init_std": INIT_STD, "learned": LEARNED, "resnet": RESNET},
    )  # fmt: skip


def experiment(model: str, seed: int, rule: str, options: argparse.Namespace) -> list[Result]:
    """Descend one model by all rules, or the ResNet by one."""
    return {"linear": _linear, "kernel": _kernel, "wide": _wide, "resnet": _resnet}[model](seed, rule, options)


def _pairs(seed: int, options: argparse.Namespace) -> FixedCropPairs:
    pairs = FixedCropPairs(
        options.data, options.num_pairs, options.crop_size, seed, root=options.root, download=options.download
    )
    pairs.prepare_data()
    return pairs


def _views(seed: int, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    pairs = _pairs(seed, options)
    pairs.setup()
    return pairs.x1.flatten(1), pairs.x2.flatten(1)


def _linear(seed: int, _rule: str, options: argparse.Namespace) -> list[Result]:
    x1, x2 = _views(seed, options)
    problem = LinearProblem.of(x1.double(), x2.double(), options.dimensions, INIT_STD, seed)
    results = _raced("linear", seed, problem)
    for size in FRESH_SIZES:
        descent = problem.descend_fresh(FRESH, FRESH_STEPS, size, seed)
        results.append(Result("linear", f"fresh{size}", seed, descent, _aligned(problem, descent)))
    return results


def _kernel(seed: int, _rule: str, options: argparse.Namespace) -> list[Result]:
    """In the features of the kernel's root on its own views a kernel machine is a linear model."""
    z = torch.cat([x[: options.kernel_pairs] for x in _views(seed, options)])
    values, vectors = torch.linalg.eigh(relu_ntk(z, z))
    h1, h2 = (vectors * values.clamp(min=0).sqrt()).chunk(2)
    return _raced("kernel", seed, LinearProblem.of(h1, h2, options.dimensions, INIT_STD, seed))


def _raced(model: str, seed: int, problem: LinearProblem) -> list[Result]:
    descents = {rule: tuned(problem.descend, grid, MOST[model]) for rule, grid in LINEAR_GRIDS.items()}
    return [Result(model, rule, seed, descent, _aligned(problem, descent)) for rule, descent in descents.items()]


def _aligned(problem: LinearProblem, descent: Descent) -> float:
    """Return the alignment of the embedding at the end with the d modes of the largest γ."""
    if not descent.final.isfinite().all():
        return 0.0
    h = torch.cat(problem.views)
    return float(subspace_alignment(h @ descent.final.T, h[:, : len(descent.final)]))


def _wide(seed: int, _rule: str, options: argparse.Namespace) -> list[Result]:
    """Train a network of one hidden layer; the closed form is that of its features at the start."""
    x1, x2 = (x[: options.wide_pairs] for x in _views(seed, options))
    network, d = MLP(x1.shape[1], [options.width], options.wide_dim, seed=seed), options.wide_dim
    scale_last_layer(network, 1e-4)
    x1, x2 = into_their_span(network, x1, x2)
    h1, h2 = features(network, x1, x2)
    modes = torch.cat(LinearProblem.of(h1, h2, (d, d), INIT_STD, seed).views)[:, :d]
    results = []
    for rule, grid in WIDE_GRIDS.items():
        descent = tuned(lambda setting, most: wide_descent(network, x1, x2, setting, most), grid, MOST["wide"])
        results.append(Result("wide", rule, seed, descent, float(subspace_alignment(descent.final, modes))))
    return results


def _resnet(seed: int, rule: str, options: argparse.Namespace) -> list[Result]:
    data = TwoViewDataModule(
        options.data, "weak", options.image_size, 64 if rule == "fresh64" else options.resnet_batch, seed=seed,
        root=options.root, download=options.download,
    )  # fmt: skip
    setting = RESNET.get(rule, RESNET["lyapunov"])
    descent, accuracies = resnet_descent(data, options.resnet_dim, seed, setting, options.resnet_steps)
    return [Result("resnet", rule, seed, descent, accuracies=accuracies)]


def _ratio(results: list[Result], model: str, rule: str, seed: int) -> float:
    """Return how many times the steps of tuned momentum are those of a rule; what was not learned took all it had."""
    momentum, other = (
        next(r for r in results if (r.model, r.rule, r.seed) == (model, name, seed)) for name in ("momentum", rule)
    )
    steps = momentum.descent.steps if math.isfinite(momentum.descent.steps) else momentum.most
    return steps / other.descent.steps if math.isfinite(other.descent.steps) else 0.0


def _claims(results: list[Result], options: argparse.Namespace) -> list[Claim]:
    claims = []
    for model, rule, bound in (
        ("linear", "gate", 2.0), ("linear", "lyapunov", 6.0), ("kernel", "gate", 2.0), ("kernel", "lyapunov", 2.0),
        ("wide", "gate", 2.0), ("wide", "lyapunov", 2.0), ("resnet", "gate", 2.0),
    ):  # fmt: skip
        seeds = [seed for seed in options.seeds if any((r.model, r.seed) == (model, seed) for r in results)]
        ratios, plain = ([_ratio(results, model, name, seed) for seed in seeds] for name in (rule, "plain"))
        sentence = f"{MODELS[model]}: steps of tuned momentum over those of {TITLES[rule]}"
        claims.append(worst(f"{model}_{rule}", sentence, ratios, ">=", bound, seeds, "gradient descent", plain))

    def alignments(model: str, *rules: str) -> list[float]:
        return [r.alignment for r in results if r.model == model and r.rule in rules]

    # The kernel machine's modes are closer to each other: descent itself ends at 0.98, and with tuned momentum at 0.92.
    for model, bound in (("linear", 0.99), ("kernel", 0.9)):
        sentence = f"{MODELS[model]}: alignment of the embedding, gate and Lyapunov, with the closed form"
        values, control = alignments(model, "gate", "lyapunov"), alignments(model, FEATURES)
        claims.append(
            worst(f"{model}_subspace", sentence, values, ">=", bound, options.seeds, "features divided by |Γ|", control)
        )
    sentence = "linear, Lyapunov with batches of 64 fresh pairs: the same"
    lost, kept = alignments("linear", "fresh64"), alignments("linear", "lyapunov")
    return [*claims, worst("small_batches", sentence, lost, "<=", 0.95, options.seeds, "full batch", kept)]


def _figure(results: list[Result], first: list[Result], options: argparse.Namespace) -> Any:
    def by_rule(model: str, rules: tuple[str, ...], value: Callable[[Result], float]) -> Any:
        """Return values (seeds, rules) of a model."""
        chosen = {(r.seed, r.rule): value(r) for r in results if r.model == model}
        seeds = sorted({seed for seed, _ in chosen})
        return np.array([[chosen.get((seed, rule), math.nan) for rule in rules] for seed in seeds])

    def accuracies(rule: str) -> Any:
        runs = [r.accuracies for r in results if (r.model, r.rule) == ("resnet", rule)]
        return np.array([[run.get(modes, math.nan) for modes in range(options.resnet_dim + 1)] for run in runs])

    def bound(result: Result) -> float:
        return result.most if math.isnan(result.descent.steps) else math.nan

    panels = [
        Panel(r.descent.record(), title=f"{TITLES[r.rule]}: {r.descent.steps:g} steps", step_times=()) for r in first
    ]
    return rules_figure(
        panels,
        Response(
            SHORT, {title: by_rule(model, RULES, lambda r: r.descent.steps) for model, title in MODELS.items()},
            "steps until all modes are learned", "open: more than that", log=True,
            bounds={title: by_rule(model, RULES, bound) for model, title in MODELS.items()},
        ),
        {title: by_rule("linear", (rule,), lambda r: r.alignment)[:, 0] for rule, title in TITLES.items()},
        Response(
            [str(modes) for modes in range(options.resnet_dim + 1)], {TITLES[rule]: accuracies(rule) for rule in RULES},
            "accuracy of 20 neighbours", "hidden layer of the ResNet",
        ),
        title="All modes in fewer steps, and in the same subspace while batches are large",
        note=f"{data_name(options.data)}; above: linear model, seed {options.seeds[0]}; below: "
        f"{seeds_text(options.seeds)}, of the ResNet {seeds_text(options.seeds[: options.resnet_seeds])}",
    )  # fmt: skip


FIGURE = PaperFigure("faster_modes", __doc__, PAPER, PROFILES, produce)

"""Accelerated gradients learn all modes in fewer steps, in the same subspace (an open question of the paper).

Small modes are learned late because the growth rate of a mode is proportional to γ. The accelerated gradients of
:mod:`stepwise_lightning.modules.acceleration`, gate and Lyapunov, need only d × d matrices; with the second, all modes
grow at one rate. The figure compares the steps until all d eigenvalues of C reach ½ with gradient descent and momentum,
for a linear model, a kernel machine (ReLU tangent kernel), a wide network and a small ResNet.

Each rule uses its best setting from a grid (rates in units of 1/(4γ_1); Lyapunov's rate has no unit). All eigenvalues
must remain between ½ and 1.5 for half as many steps again. Initialisation is small: weights of 1e-8, last layers
× 1e-4, in the ResNet × 1e-3. d is chosen where γ falls most. The control divides features by |Γ|: all modes are equally
fast, but the subspace differs.

IsoLoss (Halvagal et al., NeurIPS 2023, arXiv 2212.04858) is a baseline for the linear model and the kernel machine. In
non-contrastive learning it removes from the rate of a mode the eigenvalue of the predictor, a factor that Barlow Twins
does not have. Both have the growth matrix 4Γ, and learn small modes late. Training with IsoLoss ends at C = C_z², with
the second moment C_z of the embeddings; a mode counts as learned at half of its final C_z.

Limits: batches of 64 new pairs do not reach the subspace. In the ResNet each rule has one short run at one rate (chosen
on photographs, seed 0), for the first seed only except in the full profile. Its hidden representation is compared at
equal numbers of learned modes; faster learning of the embedding hardly improves it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reproduce.claims import Claim, seeds_text, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.figures.acceleration.descent import (
    ISOLOSS,
    LEARNED,
    RULES,
    SCALED_FEATURES,
    Descent,
    LinearProblem,
    fastest_descent,
)
from reproduce.figures.acceleration.grids import (
    BATCH_SIZES,
    LINEAR_GRIDS,
    MINIBATCH_SETTING,
    MINIBATCH_STEPS,
    RESNET,
    WIDE_GRIDS,
)  # fmt: skip
from reproduce.figures.acceleration.networks import last_layer_inputs, train_resnet, train_wide_network
from reproduce.options import data_name, fixed_pairs, require_images
from reproduce.plots import Response, rules_figure
from reproduce.processes import map_parallel
from reproduce.wide_networks import project_to_span
from stepwise_lightning import MLP, TwoViewDataModule, scale_last_layer
from stepwise_lightning.plots import Panel
from stepwise_lightning.spectrum.schedule import log_spaced_steps
from stepwise_lightning.theory import relu_ntk, subspace_alignment

PAPER = "Not in the paper; its outlook asks whether small modes can be learned faster."
CPU: dict[str, Any] = dict(
    num_pairs=2048, crop_size=20, dimensions=(10, 16), kernel_pairs=100, wide_pairs=50, width=256, wide_dim=6,
    image_size=16, resnet_batch=256, resnet_steps=60, resnet_dim=6, resnet_seeds=1,
)  # fmt: skip
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(
        num_pairs=256, crop_size=8, dimensions=(4, 8), kernel_pairs=40, wide_pairs=20, width=128, wide_dim=3,
        image_size=12, resnet_batch=256, resnet_steps=20, resnet_dim=3, resnet_seeds=1,
    ),
    "cpu": CPU,
    "full": CPU | dict(data="cifar10", resnet_steps=400, resnet_seeds=3),
}  # fmt: skip
INIT_STD = 1e-8
MAX_STEPS = {"linear": 20000, "kernel": 20000, "wide": 3000}
TITLES = {
    "plain": "gradient descent", "momentum": "momentum", "gate": "gate", "lyapunov": "Lyapunov",
    ISOLOSS: "IsoLoss", SCALED_FEATURES: "features / |Γ|",
    "fresh256": "Lyapunov,\nbatches of 256", "fresh64": "Lyapunov,\nbatches of 64",
}  # fmt: skip
SHORT = ["plain", "momentum", "gate", "Lyapunov", "IsoLoss"]
MODELS = {"linear": "linear", "kernel": "kernel", "wide": "wide network", "resnet": "ResNet"}


@dataclass
class Result:
    """One model, trained with one rule and one seed."""

    model: str
    rule: str
    seed: int
    descent: Descent
    alignment: float = math.nan
    """Alignment of all d modes with the closed form."""
    accuracies: dict[int, float] = field(default_factory=dict)
    """k-nearest-neighbour accuracy of the hidden layer by number of learned modes."""

    @property
    def last_step(self) -> int:
        """Last measured step."""
        return max(self.descent.path)

    def learned(self) -> int:
        """Return the number of learned modes at the last step."""
        return int((self.descent.path[self.last_step] >= LEARNED).sum())

    def summary(self) -> dict[str, Any]:
        """Return the row of the table."""
        _, rate, momentum = self.descent.setting
        return {
            "model": self.model, "seed": self.seed, "rule": self.rule, "rate": rate, "momentum": momentum,
            "steps": self.descent.steps, "last_step": self.last_step, "modes_learned": self.learned(),
            "dimensions": len(self.descent.path[0]), "alignment": self.alignment,
            "best_hidden": max(self.accuracies.values(), default=math.nan),
        }  # fmt: skip

    def rows(self) -> list[list[Any]]:
        """Return rows of ``data.csv``: eigenvalues at logarithmically spaced steps, and accuracies."""
        run = [self.model, self.rule, self.seed]
        steps = [step for step in log_spaced_steps(self.last_step, 150) if step in self.descent.path]
        rows = [
            [*run, step, "eigenvalue", mode, value]
            for step in steps
            for mode, value in enumerate(self.descent.path[step].tolist())
        ]
        return rows + [[*run, "", "hidden_knn", modes, value] for modes, value in self.accuracies.items()]


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train all models with all rules, for every seed."""
    require_images(options, max(options.num_pairs, options.resnet_batch), 1)
    fixed_pairs(options, options.seeds[0])  # raises for invalid data before any process starts
    items: list[tuple[Any, ...]] = [
        ("resnet", seed, rule, options)
        for seed in options.seeds[: options.resnet_seeds]
        for rule in (*RESNET, "fresh64")
    ]
    items += [(model, seed, "", options) for seed in options.seeds for model in MAX_STEPS]
    results = [result for part in map_parallel(experiment, items, "faster_modes") for result in part]
    first = [r for rule in RULES for r in results if (r.model, r.rule, r.seed) == ("linear", rule, options.seeds[0])]
    return Outcome(
        _figure(results, first, options), ["model", "rule", "seed", "step", "quantity", "mode", "value"],
        (row for result in results for row in result.rows()), _claims(results, options),
        [result.summary() for result in results], {"init_std": INIT_STD, "learned": LEARNED, "resnet": RESNET},
    )  # fmt: skip


def experiment(model: str, seed: int, rule: str, options: argparse.Namespace) -> list[Result]:
    """Train one model with all rules, or the ResNet with one."""
    return {"linear": _linear, "kernel": _kernel, "wide": _wide, "resnet": _resnet}[model](seed, rule, options)


def _views(seed: int, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    pairs = fixed_pairs(options, seed)
    return pairs.x1.flatten(1), pairs.x2.flatten(1)


def _linear(seed: int, _rule: str, options: argparse.Namespace) -> list[Result]:
    x1, x2 = _views(seed, options)
    problem = LinearProblem.from_features(x1.double(), x2.double(), options.dimensions, INIT_STD, seed)
    results = _compare_rules("linear", seed, problem)
    for size in BATCH_SIZES:
        descent = problem.descend_minibatches(MINIBATCH_SETTING, MINIBATCH_STEPS, size, seed)
        results.append(Result("linear", f"fresh{size}", seed, descent, _alignment(problem, descent)))
    return results


def _kernel(seed: int, _rule: str, options: argparse.Namespace) -> list[Result]:
    """Train a kernel machine as a linear model whose features are the square root of the kernel matrix."""
    z = torch.cat([x[: options.kernel_pairs] for x in _views(seed, options)])
    values, vectors = torch.linalg.eigh(relu_ntk(z, z))
    h1, h2 = (vectors * values.clamp(min=0).sqrt()).chunk(2)
    return _compare_rules("kernel", seed, LinearProblem.from_features(h1, h2, options.dimensions, INIT_STD, seed))


def _compare_rules(model: str, seed: int, problem: LinearProblem) -> list[Result]:
    descents = {rule: fastest_descent(problem.descend, grid, MAX_STEPS[model]) for rule, grid in LINEAR_GRIDS.items()}
    return [Result(model, rule, seed, descent, _alignment(problem, descent)) for rule, descent in descents.items()]


def _alignment(problem: LinearProblem, descent: Descent) -> float:
    """Return the alignment of the final embedding with the d modes of largest γ."""
    if not descent.final.isfinite().all():
        return 0.0
    h = torch.cat(problem.views)
    return float(subspace_alignment(h @ descent.final.T, h[:, : len(descent.final)]))


def _wide(seed: int, _rule: str, options: argparse.Namespace) -> list[Result]:
    """Train a network with one hidden layer; the closed form uses its initial features."""
    x1, x2 = (x[: options.wide_pairs] for x in _views(seed, options))
    network, d = MLP(x1.shape[1], [options.width], options.wide_dim, seed=seed), options.wide_dim
    scale_last_layer(network, 1e-4)
    x1, x2 = project_to_span(network, x1, x2)
    h1, h2 = last_layer_inputs(network, x1, x2)
    modes = torch.cat(LinearProblem.from_features(h1, h2, (d, d), INIT_STD, seed).views)[:, :d]
    results = []
    for rule, grid in WIDE_GRIDS.items():
        train = partial(train_wide_network, network, x1, x2)
        descent = fastest_descent(train, grid, MAX_STEPS["wide"])
        results.append(Result("wide", rule, seed, descent, float(subspace_alignment(descent.final, modes))))
    return results


def _resnet(seed: int, rule: str, options: argparse.Namespace) -> list[Result]:
    data = TwoViewDataModule(
        options.data, "weak", options.image_size, 64 if rule == "fresh64" else options.resnet_batch, seed=seed,
        root=options.root, download=options.download,
    )  # fmt: skip
    setting = RESNET.get(rule, RESNET["lyapunov"])
    descent, accuracies = train_resnet(data, options.resnet_dim, seed, setting, options.resnet_steps)
    return [Result("resnet", rule, seed, descent, accuracies=accuracies)]


def _ratio(results: list[Result], model: str, rule: str, seed: int) -> float:
    """Return the steps of tuned momentum over the steps of a rule.

    Momentum counts its last step, and a rule counts 0, if not all modes were learned.
    """
    momentum, other = (
        next(r for r in results if (r.model, r.rule, r.seed) == (model, name, seed)) for name in ("momentum", rule)
    )
    steps = momentum.descent.steps if math.isfinite(momentum.descent.steps) else momentum.last_step
    return steps / other.descent.steps if math.isfinite(other.descent.steps) else 0.0


def _claims(results: list[Result], options: argparse.Namespace) -> list[Claim]:
    claims = []
    for model, rule, bound in (
        ("linear", "gate", 2.0), ("linear", "lyapunov", 6.0), ("kernel", "gate", 2.0), ("kernel", "lyapunov", 2.0),
        ("wide", "gate", 2.0), ("wide", "lyapunov", 2.0), ("resnet", "gate", 2.0),
    ):  # fmt: skip
        seeds = [seed for seed in options.seeds if any((r.model, r.seed) == (model, seed) for r in results)]
        ratios, plain = ([_ratio(results, model, name, seed) for seed in seeds] for name in (rule, "plain"))
        sentence = f"{MODELS[model]}: steps of tuned momentum over steps of {TITLES[rule]}"
        claims.append(worst(f"{model}_{rule}", sentence, ratios, ">=", bound, seeds, "gradient descent", plain))

    def alignments(model: str, *rules: str) -> list[float]:
        return [r.alignment for r in results if r.model == model and r.rule in rules]

    # The modes of the kernel machine are closer: gradient descent reaches 0.98, tuned momentum 0.92.
    for model, bound in (("linear", 0.99), ("kernel", 0.9)):
        sentence = f"{MODELS[model]}: alignment of the embedding, gate and Lyapunov, with the closed form"
        values, control = alignments(model, "gate", "lyapunov"), alignments(model, SCALED_FEATURES)
        claims.append(
            worst(f"{model}_subspace", sentence, values, ">=", bound, options.seeds, "features divided by |Γ|", control)
        )
    sentence = "linear: alignment of the embedding, Lyapunov with batches of 64 new pairs, with the closed form"
    small, full = alignments("linear", "fresh64"), alignments("linear", "lyapunov")
    return [*claims, worst("small_batches", sentence, small, "<=", 0.95, options.seeds, "full batch", full)]


def _figure(results: list[Result], first: list[Result], options: argparse.Namespace) -> Any:
    def by_rule(model: str, rules: tuple[str, ...], value: Callable[[Result], float]) -> Any:
        """Return the values of a model, (seeds, rules)."""
        chosen = {(r.seed, r.rule): value(r) for r in results if r.model == model}
        seeds = sorted({seed for seed, _ in chosen})
        return np.array([[chosen.get((seed, rule), math.nan) for rule in rules] for seed in seeds])

    def accuracies(rule: str) -> Any:
        runs = [r.accuracies for r in results if (r.model, r.rule) == ("resnet", rule)]
        return np.array([[run.get(modes, math.nan) for modes in range(options.resnet_dim + 1)] for run in runs])

    def bound(result: Result) -> float:
        return result.last_step if math.isnan(result.descent.steps) else math.nan

    rules = (*RULES, ISOLOSS)
    panels = [
        Panel(r.descent.record(), title=f"{TITLES[r.rule]}: {r.descent.steps:g} steps", step_times=()) for r in first
    ]
    return rules_figure(
        panels,
        Response(
            SHORT, {title: by_rule(model, rules, lambda r: r.descent.steps) for model, title in MODELS.items()},
            "steps until all modes are learned", "open: lower bound", log=True,
            bounds={title: by_rule(model, rules, bound) for model, title in MODELS.items()},
        ),
        {title: by_rule("linear", (rule,), lambda r: r.alignment)[:, 0] for rule, title in TITLES.items()},
        Response(
            [str(modes) for modes in range(options.resnet_dim + 1)], {TITLES[rule]: accuracies(rule) for rule in RULES},
            "accuracy of 20 neighbours", "hidden layer of the ResNet",
        ),
        title="Accelerated gradients learn all modes in fewer steps; large batches reach the same subspace",
        note=f"{data_name(options.data)}; top: linear model, seed {options.seeds[0]}; bottom: "
        f"{seeds_text(options.seeds)}; ResNet: {seeds_text(options.seeds[: options.resnet_seeds])}",
    )  # fmt: skip


FIGURE = PaperFigure("faster_modes", __doc__, PAPER, PROFILES, produce)

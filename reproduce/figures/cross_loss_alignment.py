"""Different losses learn similar first directions, which the tangent kernel foretells (last experiment of the paper).

Embeddings of the three losses are compared as subspaces, on the same held-out pairs, at times when they have just
learned equally many modes; on the plateau that follows, features move and alignment decays. Beside them stand the
closed form from the tangent kernel of the network at initialisation and after training (contrastive kernel PCA), and
what makes the numbers readable: the same loss from another seed, the network before training, and chance. Embeddings
are centred, as the losses see them.

The closer the kernel's first two eigenvalues, the less it determines the first direction (on photographs γ_2/γ_1 is
0.28, 0.58 and 0.34 at seeds 0, 1 and 2): claims about it are about the mean of seeds. For these small ResNets the
kernel after training foretells less than the one at initialisation, for few modes nearly nothing: it is shown, and
nothing is claimed of it.
"""

from __future__ import annotations

import argparse
import copy
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from reproduce.claims import Claim, seeds_text, worst
from reproduce.methods import METHODS
from reproduce.options import data_name
from reproduce.outputs import Outcome, PaperFigure
from reproduce.processes import each
from reproduce.runs import Run, trained_runs
from reproduce.training import PROFILES
from stepwise_lightning import Encoder
from stepwise_lightning.plots import alignments_figure
from stepwise_lightning.theory import ContrastiveKernelPCA, EmpiricalNTK, chance_alignment, subspace_alignment

PAPER = (
    "Last experiment: subspace alignment between the embeddings of Barlow Twins, SimCLR and VICReg, and with the "
    "predictions of the tangent kernel; the losses learn similar top directions, far above chance."
)
TITLES = [method.title for method in METHODS.values()]
KERNELS = ("tangent kernel at initialisation", "tangent kernel after training")
BASELINES = ("another seed", "untrained", "chance")
MODES = (1, 3, 5)  # numbers of learned modes at which embeddings are compared
# Of the first mode; networks that are trained for a few steps are less alike.
LEAST_ALIGNMENT = {"smoke": 0.1, "cpu": 0.4, "full": 0.4}
KERNEL_PAIRS = 96  # held-out pairs that the tangent kernels are made of


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train what is missing, make the tangent kernels, and align all with all."""
    runs = trained_runs(options)
    items = [(run, trained) for run in runs if run.loss == "barlow_twins" for trained in (False, True)]
    predictions = dict(zip([(run.seed, t) for run, t in items], each(predicted, items, "tangent kernels"), strict=True))
    rows = [row for seed in options.seeds for row in _alignments(seed, runs, predictions)]
    matrices = [_matrix(rows, modes) for modes in MODES]
    names = [*TITLES, *KERNELS, *BASELINES]
    figure = alignments_figure(
        matrices,
        [f"{modes} learned mode{'s' * (modes > 1)}" for modes in MODES],
        names,
        names[: len(TITLES) + len(KERNELS)],
        title="Different losses learn similar first directions",
        note=f"subspace alignment on held-out pairs, {data_name(options.data)}; mean of {seeds_text(options.seeds)}",
    )
    columns = ["seed", "modes", "one", "other", "alignment"]
    return Outcome(figure, columns, rows, _claims(rows, options), [run.summary() for run in runs])


def predicted(run: Run, trained: bool) -> Tensor:
    """Return the closed form from the tangent kernel of a run's network, (2 · KERNEL_PAIRS, modes), centred."""
    x1, x2 = (view[:KERNEL_PAIRS] for view in run.data.probe_pairs())
    x = torch.cat([x1, x2])
    kernel = EmpiricalNTK(_with_statistics(run.encoder(trained), x))(x, x)
    # Centred embeddings are those of the kernel that is centred.
    kernel = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
    index = torch.arange(len(x), dtype=torch.float64)[:, None]  # the kernel as a function of the samples' numbers
    machine = ContrastiveKernelPCA(lambda a, b: kernel[a[:, 0].long()][:, b[:, 0].long()], max(MODES), progress=False)
    return torch.cat(machine.fit_transform(*index.chunk(2)))


def _with_statistics(encoder: Encoder, x: Tensor) -> Encoder:
    """Give batch normalisation the statistics of these images, layer after layer, and switch it to use them."""
    encoder = copy.deepcopy(encoder)
    for part in encoder.modules():
        if isinstance(part, _BatchNorm):
            part.reset_running_stats()
            part.momentum = 1.0
    with torch.no_grad():
        encoder.train()(x)
    return encoder.eval()


def _alignments(seed: int, runs: list[Run], predictions: dict[tuple[int, bool], Tensor]) -> list[list[Any]]:
    """Return rows ``seed, modes, one, other, alignment`` of one seed."""
    runs_here = [run for run in runs if run.seed == seed]
    elsewhere = {run.loss: run for run in runs if run.seed == _next_seed(seed, runs)}
    rows: list[list[Any]] = []
    for modes in MODES:
        subspaces = {run.method.title: _subspace(run.embeddings(modes), modes) for run in runs_here}
        kernels = {name: predictions[seed, trained] for name, trained in zip(KERNELS, (False, True), strict=True)}
        for one, a in subspaces.items():
            rows += [[seed, modes, one, other, _align(a, b)] for other, b in subspaces.items()]
            rows += [[seed, modes, one, name, _align(a, _top(b, modes))] for name, b in kernels.items()]
        for run in runs_here:
            a, other = subspaces[run.method.title], elsewhere[run.loss]
            other_seed = _subspace(other.embeddings(modes), modes) if other is not run else None
            size = 2 * KERNEL_PAIRS if a is None else len(a)
            baselines = (
                _align(a, other_seed), _align(a, _subspace(run.embedded(0), modes)), chance_alignment(size, modes)
            )  # fmt: skip
            rows += [[seed, modes, run.method.title, *pair] for pair in zip(BASELINES, baselines, strict=True)]
        first, second = (_top(kernel, modes) for kernel in kernels.values())
        rows.append([seed, modes, *KERNELS, _align(first, second)])
    return rows


def _next_seed(seed: int, runs: list[Run]) -> int:
    seeds = sorted({run.seed for run in runs})
    return seeds[(seeds.index(seed) + 1) % len(seeds)]


def _subspace(z: Tensor | None, modes: int) -> Tensor | None:
    """Return the top principal directions over the samples, (2n, modes)."""
    return None if z is None else torch.linalg.svd(z, full_matrices=False).U[:, :modes]


def _top(z: Tensor, modes: int) -> Tensor:
    return z[:, :modes]


def _align(a: Tensor | None, b: Tensor | None) -> float:
    """Align two subspaces on the samples that both have; NaN where one of them never had so many modes."""
    if a is None or b is None:
        return float("nan")
    (a1, a2), (b1, b2) = a.chunk(2), b.chunk(2)
    n = min(len(a1), len(b1))
    return float(subspace_alignment(torch.cat([a1[:n], a2[:n]]), torch.cat([b1[:n], b2[:n]])))


def _matrix(rows: list[list[Any]], modes: int) -> np.ndarray[Any, Any]:
    """Return the mean over seeds: rows losses, kernels and baselines; columns losses and kernels."""
    columns = [*TITLES, *KERNELS]
    matrix = np.full((len(columns) + len(BASELINES), len(columns)), np.nan)
    for i, one in enumerate([*columns, *BASELINES]):
        for j, other in enumerate(columns):
            values = [row[4] for row in rows if row[1] == modes and {row[2], row[3]} == {one, other}]
            values = [value for value in values if np.isfinite(value)]
            matrix[i, j] = 1.0 if one == other else np.mean(values) if values else np.nan
    return matrix


def _claims(rows: list[list[Any]], options: argparse.Namespace) -> list[Claim]:
    def values(modes: int, one: str, other: str) -> list[float]:
        return [row[4] for row in rows if row[1] == modes and (row[2], row[3]) == (one, other)]

    seeds, bound = seeds_text(options.seeds), LEAST_ALIGNMENT[options.profile]
    claims, pairs = [], list(combinations(TITLES, 2))
    for one, other in pairs:
        name = f"{one}_{other}".lower().replace(" ", "_")
        sentence = f"{one} and {other}: alignment of the first mode"
        claims.append(worst(name, sentence, values(1, one, other), ">=", bound, options.seeds))
    for one in TITLES:
        with_kernel = values(1, one, KERNELS[0])
        sentence = f"{one} and the {KERNELS[0]} (Barlow Twins'): alignment of the first mode, mean of {seeds}"
        sentence += f" (least {min(with_kernel):.2f})"
        claims.append(
            Claim(f"kernel_{one.lower()}".replace(" ", "_"), sentence, float(np.mean(with_kernel)), ">=", bound)
        )
    between = min(np.mean(values(3, *pair)) for pair in pairs)
    untrained = max(np.mean(values(3, one, "untrained")) for one in TITLES)
    sentence = f"least alignment of two losses over most with an untrained network, three modes, means of {seeds}"
    claims.append(Claim("over_untrained", sentence, float(between - untrained), ">=", 0.0))
    return claims


FIGURE = PaperFigure("cross_loss_alignment", __doc__, PAPER, PROFILES, produce)

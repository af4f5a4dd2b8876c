"""Embeddings follow the principal components of the current features (last experiment of the paper, with rivals).

Three losses train a ResNet from small initialisation. When three modes have just been learned, and at the end, the
figure aligns embeddings of held-out pairs, as subspaces, with the closed forms of rival kernels: the tangent kernel of
all layers, and the last layer's kernel, that of the features that enter it. Each has right pairs, no pairs (ordinary
kernel PCA) or wrong pairs, or is the kernel at initialisation.

The last layer's kernel aligns best, and as well without pairs: features become invariant to the augmentation, so both
closed forms are the principal components of the features. The figure shows the correlation of the features of two
views. The tangent kernel of all layers explains less; wrong pairs and the kernel at initialisation explain least. At
initialisation the last layer is so small that both kernels are equal.

The paper compares final embeddings with the tangent kernels at initialisation and after training, without these rivals.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reproduce.claims import Claim, average, seeds_text, worst
from reproduce.controls import kernel_matrix_pca, ordinary_kernel_pca, permuted_alignment
from reproduce.figure import Outcome, PaperFigure
from reproduce.kernel_plots import rivals_figure
from reproduce.networks.runs import Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import LOSS_SETTINGS
from reproduce.options import data_name
from reproduce.processes import map_parallel
from reproduce.wide_networks import KERNELS
from stepwise_lightning.features import capture
from stepwise_lightning.theory import EmpiricalNTK, subspace_alignment

PAPER = (
    "Last experiment: alignment of the embeddings of each loss with the predictions of the tangent kernel at "
    "initialisation and after training."
)
LEARNED = {"smoke": 1, "cpu": 3, "full": 3}  # number of modes just learned at the first moment
START, JUST_LEARNED, END = "start", "just learned", "end"
# Minimum alignments with the last layer's kernel.
MIN_ALIGNMENT = {"barlow_twins": 0.95, "vicreg": 0.95, "simclr": 0.75}
KERNEL_PAIRS = 96  # held-out pairs for the kernels
LAST, FULL = "last layer's kernel", "tangent kernel"
NO_PAIRS, WRONG_PAIRS, INITIAL = ", no pairs", ", wrong pairs", ", initial"
RIVALS = (LAST, LAST + NO_PAIRS, FULL, FULL + NO_PAIRS, LAST + WRONG_PAIRS, FULL + WRONG_PAIRS, FULL + INITIAL)
UNTRAINED, PERMUTED = "untrained network", "permuted images"  # aligned with the current last layer's kernel
CORRELATION, AGREEMENT = "correlation of views", "closed forms with and without pairs"  # of the last layer's kernel
COLUMNS = ["loss", "seed", "moment", "modes", "step", "quantity", "value"]


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train missing runs, compute the kernels, and align."""
    runs, learned = trained_runs(options), LEARNED[options.profile]
    items = [(run, learned) for run in runs]
    rows = [row for rows in map_parallel(measure, items, "kernel_over_time") for row in rows]
    figure = rivals_figure(
        {settings.title: {name: {moment: _values(rows, loss, moment, name) for moment in (JUST_LEARNED, END)}
                          for name in (*RIVALS, UNTRAINED, PERMUTED)} for loss, settings in LOSS_SETTINGS.items()},
        {settings.title: {moment: _values(rows, loss, moment, CORRELATION) for moment in (START, JUST_LEARNED, END)}
         for loss, settings in LOSS_SETTINGS.items()},
        {JUST_LEARNED: f"{learned} mode{'s' * (learned > 1)} just learned", END: "end of training"},
        title="Embeddings follow the principal components of the current features",
        note=f"subspace alignment on held-out pairs, {data_name(options.data)}; {seeds_text(options.seeds)}",
    )  # fmt: skip
    return Outcome(figure, COLUMNS, rows, _claims(rows, options), [run.summary() for run in runs])


def measure(run: Run, learned: int) -> list[list[Any]]:
    """Return the rows of one run."""
    pairs = [view[:KERNEL_PAIRS] for view in run.data.probe_pairs()]
    moments = {JUST_LEARNED: (learned, _kept_step(run, learned))}
    moments[END] = (int(run.steps.num_learned[-1]), int(run.record.steps[-1]))
    extra = int(
        run.loss_settings.loss.scale_invariant
    )  # SimCLR: the direction of the bias, in which no mode is learned
    initial, untrained = kernels(run.encoder(), pairs), _embedded(run.encoder(), pairs)
    rows = [[run.loss, run.seed, START, 0, 0, CORRELATION, correlation_of_views(initial["last"])]]
    for moment, (modes, step) in moments.items():
        if step is None or modes < 1:
            continue
        encoder, dim = run.encoder(trained=True) if moment == END else run.encoder(step=step), modes + extra
        current, embedding = kernels(encoder, pairs), _top(_embedded(encoder, pairs), dim)
        forms: dict[str, Tensor] = {}
        for name, key in ((LAST, "last"), (FULL, "full")):
            k = current[key]
            forms[name] = kernel_matrix_pca(k, dim)[1]
            forms[name + NO_PAIRS] = ordinary_kernel_pca(k, k, dim)
            forms[name + WRONG_PAIRS] = kernel_matrix_pca(k, dim, shift=1)[1]
        forms[FULL + INITIAL] = kernel_matrix_pca(initial["full"], dim)[1]
        values = {name: float(subspace_alignment(embedding, form)) for name, form in forms.items()}
        values[UNTRAINED] = float(subspace_alignment(_top(untrained, dim), forms[LAST]))
        values[PERMUTED] = permuted_alignment(embedding, forms[LAST])
        values[CORRELATION] = correlation_of_views(current["last"])
        values[AGREEMENT] = _agreement(current["last"], dim)
        values[AGREEMENT + INITIAL] = _agreement(initial["last"], dim)
        rows += [[run.loss, run.seed, moment, modes, step, *pair] for pair in values.items()]
    return rows


def _agreement(k: Tensor, dim: int) -> float:
    return float(subspace_alignment(kernel_matrix_pca(k, dim)[1], ordinary_kernel_pca(k, k, dim)))


def _kept_step(run: Run, modes: int) -> int | None:
    """Return the first step with saved weights and at least this number of learned modes, or None."""
    plateau = run.plateau(modes)
    first = int(run.record.steps[plateau[0]]) if plateau else None
    return next((step for step in run.saved_steps() if first is not None and step >= first), None)


def kernels(encoder: nn.Module, pairs: list[Tensor]) -> dict[str, Tensor]:
    """Return the kernels of all layers and of the last layer, (2 · KERNEL_PAIRS, 2 · KERNEL_PAIRS), centred."""
    x = torch.cat(pairs)
    encoder = _with_statistics(encoder, x)
    matrices = {name: EmpiricalNTK(encoder, parameters)(x, x) for name, parameters in KERNELS.items()}
    # Centring the kernel centres the embeddings.
    return {name: k - k.mean(0) - k.mean(1, keepdim=True) + k.mean() for name, k in matrices.items()}


def correlation_of_views(k: Tensor) -> float:
    """Return the correlation between the two views' features, over pairs and features, from their centred kernel."""
    n = len(k) // 2
    return float(k.diagonal(n).sum() / k.diagonal().sum() * 2)


def _with_statistics(encoder: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy in evaluation mode whose batch normalisation has the statistics of these images."""
    encoder = copy.deepcopy(encoder)
    for part in encoder.modules():
        if isinstance(part, _BatchNorm):
            part.reset_running_stats()
            part.momentum = 1.0
    with torch.no_grad():
        encoder.train()(x)
    return encoder.eval()


def _embedded(encoder: nn.Module, pairs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        z = torch.cat(list(capture(encoder, pairs, [""])[""])).double()
    return z - z.mean(0)


def _top(z: Tensor, modes: int) -> Tensor:
    return torch.linalg.svd(z, full_matrices=False).U[:, :modes]


def _values(rows: list[list[Any]], loss: str, moment: str, quantity: str) -> list[float]:
    """Return the values of all seeds."""
    return [row[-1] for row in rows if (row[0], row[2], row[5]) == (loss, moment, quantity)]


def _claims(rows: list[list[Any]], options: argparse.Namespace) -> list[Claim]:
    return [claim for loss in LOSS_SETTINGS for claim in _claims_of(loss, rows, options)]


def _claims_of(loss: str, rows: list[list[Any]], options: argparse.Namespace) -> list[Claim]:
    name, seeds, learned = LOSS_SETTINGS[loss].title, options.seeds, LEARNED[options.profile]
    # The first mode of a network of the smoke profile can be the second of its kernel.
    both, two = (
        (f"{name}, {learned} modes just learned and end", (JUST_LEARNED, END)) if learned > 1 else (name, (END,))
    )

    def values(quantity: str, minus: str = "", moments: tuple[str, ...] = two) -> list[float]:
        """Return values of all moments and seeds, or differences of two quantities."""
        first, second = ([v for m in moments for v in _values(rows, loss, m, key)] for key in (quantity, minus))
        return [a - b for a, b in zip(first, second or [0.0] * len(first), strict=True)] or [float("nan")]

    last, initial = "the last layer's kernel", "kernel at initialisation"
    return [
        worst(
            f"{loss}_last", f"{both}: alignment with {last}", values(LAST), ">=", MIN_ALIGNMENT[loss], seeds, initial,
            values(FULL + INITIAL),
        ),
        worst(
            f"{loss}_over_full", f"{both}: alignment with {last} minus alignment with the tangent kernel of all layers",
            values(LAST, FULL), ">=", 0.001, seeds, f"{initial} minus the same", values(FULL + INITIAL, FULL),
        ),
        worst(
            f"{loss}_pairs", f"{both}: alignment with {last} minus the same without pairs",
            values(LAST, LAST + NO_PAIRS), "<=", 0.1, seeds, "wrong pairs", values(LAST, LAST + WRONG_PAIRS),
        ),
        average(
            f"{loss}_moved", f"{name}, end: alignment with {last} minus the {initial}",
            values(LAST, FULL + INITIAL, (END,)), ">=", 0.1, seeds, UNTRAINED,
            values(UNTRAINED, FULL + INITIAL, (END,)),
        ),
        *_invariance_claims(loss, rows, seeds),
    ]  # fmt: skip


def _invariance_claims(loss: str, rows: list[list[Any]], seeds: list[int]) -> list[Claim]:
    """Return the claims that features become invariant, and closed forms independent of the pairs."""
    name = LOSS_SETTINGS[loss].title

    def values(quantity: str, moment: str = END) -> list[float]:
        return _values(rows, loss, moment, quantity) or [float("nan")]

    claims = [
        worst(
            f"{loss}_invariance", f"{name}, end: correlation of the features of two views",
            values(CORRELATION), ">=", 0.7, seeds, "features at initialisation", values(CORRELATION, START),
        ),
    ]  # fmt: skip
    if loss != "simclr":  # SimCLR's features are less invariant
        claims.append(worst(
            f"{loss}_agreement", f"{name}, end: alignment of the closed forms with and without pairs",
            values(AGREEMENT), ">=", 0.95, seeds, "kernel at initialisation", values(AGREEMENT + INITIAL),
        ))  # fmt: skip
    return claims


FIGURE = PaperFigure("kernel_over_time", __doc__, PAPER, PROFILES, produce)

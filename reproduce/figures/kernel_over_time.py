"""Embeddings follow the current tangent kernel, not the initial one (last experiment of the paper).

Three losses train a ResNet from small initialisation. When k modes have just been learned, and at the end, the figure
aligns the embeddings of held-out pairs, as subspaces, with the closed forms from the current tangent kernel and from
the tangent kernel at initialisation. Each loss is compared with its own network.

Features change while these networks learn. Both kernels predict the first mode equally well; from the third mode on the
kernel at initialisation is less accurate. Controls are the untrained network, aligned with the current kernel, and
permuted images.

The paper aligns final embeddings with the kernels at initialisation and after training; the sizes here differ.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reproduce.claims import Claim, seeds_text, worst
from reproduce.controls import permuted_alignment
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import LOSS_SETTINGS
from reproduce.options import data_name
from reproduce.plots import alignments_figure
from reproduce.processes import map_parallel
from stepwise_lightning.features import capture
from stepwise_lightning.theory import ContrastiveKernelPCA, EmpiricalNTK, subspace_alignment

PAPER = (
    "Last experiment: alignment of the embeddings of each loss with the predictions of the tangent kernel at "
    "initialisation and after training."
)
MODES = (1, 3, 5)  # numbers of modes just learned at which embeddings are compared
END = "end"
KERNELS = ("kernel of the moment", "kernel at initialisation", "untrained", "permuted images")  # in data.csv
KERNEL_TITLES = ("current kernel", "kernel at initialisation", "untrained network", "permuted images")
KERNEL_PAIRS = 96  # held-out pairs for the tangent kernels
# Number of modes just learned, and the minimum alignment. Three modes have 0.64 to 0.99 on photographs and CIFAR-10.
# There is no claim about one mode: the first two modes of a kernel can exchange their order (docs/evidence.md).
MIN_ALIGNMENT = {"smoke": (1, 0.05), "cpu": (3, 0.5), "full": (3, 0.5)}
MIN_FINAL_ALIGNMENT = {"smoke": 0.3, "cpu": 0.5, "full": 0.5}
COLUMNS = ["loss", "seed", "moment", "modes", "step", "kernel", "alignment"]


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train missing runs, compute the tangent kernels, and align."""
    runs = trained_runs(options)
    rows = [row for rows in map_parallel(alignments, [(run,) for run in runs], "kernel_over_time") for row in rows]
    moments = [*(str(modes) for modes in MODES), END]
    titles = [settings.title for settings in LOSS_SETTINGS.values()]
    figure = alignments_figure(
        [_matrix(rows, moment) for moment in moments],
        [f"{m} learned mode{'s' * (m != '1')}" if m != END else "end of training" for m in moments],
        list(KERNEL_TITLES), titles,
        title="Embeddings follow the current tangent kernel",
        note=f"subspace alignment on held-out pairs, {data_name(options.data)}; mean of {seeds_text(options.seeds)}",
    )  # fmt: skip
    return Outcome(figure, COLUMNS, rows, _claims(rows, options), [run.summary() for run in runs])


def alignments(run: Run) -> list[list[Any]]:
    """Return the rows of one run."""
    pairs = [view[:KERNEL_PAIRS] for view in run.data.probe_pairs()]
    learned = run.steps.num_learned
    moments = {str(modes): (modes, _kept_step(run, modes)) for modes in MODES}
    moments[END] = (int(learned[-1]), int(run.record.steps[-1]))
    initial = closed_form(run.encoder(), pairs, max(modes for modes, _ in moments.values()))
    rows = []
    for moment, (modes, step) in moments.items():
        if step is None or modes < 1:
            continue
        encoder = run.encoder(trained=True) if moment == END else run.encoder(step=step)
        current = closed_form(encoder, pairs, modes)
        embedding, untrained = (_embedded(network, pairs) for network in (encoder, run.encoder()))
        values = (
            _align(embedding, current, modes), _align(embedding, initial, modes), _align(untrained, current, modes),
            permuted_alignment(_top(embedding, modes), current[:, :modes]),
        )  # fmt: skip
        rows += [[run.loss, run.seed, moment, modes, step, *pair] for pair in zip(KERNELS, values, strict=True)]
    return rows


def _kept_step(run: Run, modes: int) -> int | None:
    """Return the first step with saved weights and at least this number of learned modes, or None."""
    plateau = run.plateau(modes)
    first = int(run.record.steps[plateau[0]]) if plateau else None
    return next((step for step in run.saved_steps() if first is not None and step >= first), None)


def closed_form(encoder: nn.Module, pairs: list[Tensor], modes: int) -> Tensor:
    """Return the closed form from a network's tangent kernel, (2 · KERNEL_PAIRS, modes), centred."""
    x = torch.cat(pairs)
    kernel = EmpiricalNTK(_with_statistics(encoder, x))(x, x)
    # Centring the kernel centres the embeddings.
    kernel = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
    index = torch.arange(len(x), dtype=torch.float64)[:, None]  # the kernel is a function of sample indices
    machine = ContrastiveKernelPCA(lambda a, b: kernel[a[:, 0].long()][:, b[:, 0].long()], modes, progress=False)
    return torch.cat(machine.fit_transform(*index.chunk(2)))


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


def _align(z: Tensor, predicted: Tensor, modes: int) -> float:
    return float(subspace_alignment(_top(z, modes), predicted[:, :modes]))


def _matrix(rows: list[list[Any]], moment: str) -> np.ndarray[Any, Any]:
    """Return means over seeds: a row per kernel or control, a column per loss."""
    matrix = np.full((len(KERNELS), len(LOSS_SETTINGS)), np.nan)
    for i, kernel in enumerate(KERNELS):
        for j, loss in enumerate(LOSS_SETTINGS):
            values = [row[-1] for row in rows if (row[0], row[2], row[5]) == (loss, moment, kernel)]
            matrix[i, j] = np.mean(values) if values else np.nan
    return matrix


def _claims(rows: list[list[Any]], options: argparse.Namespace) -> list[Claim]:
    def values(loss: str, moment: str, kernel: str) -> list[float]:
        aligned = [row[-1] for row in rows if (row[0], row[2], row[5]) == (loss, moment, kernel)]
        return aligned or [float("nan")]

    claims = []
    count, bound = MIN_ALIGNMENT[options.profile]
    learned = (str(count), f"{count} mode{'s' * (count > 1)} just learned", bound)
    for loss, settings in LOSS_SETTINGS.items():
        for moment, when, bound in (learned, (END, "end of training", MIN_FINAL_ALIGNMENT[options.profile])):
            sentence = f"{settings.title}, {when}: alignment with the current kernel"
            claims.append(
                worst(
                    f"{loss}_{moment}", sentence, values(loss, moment, KERNELS[0]), ">=", bound, options.seeds,
                    "permuted images", values(loss, moment, KERNELS[3]),
                )
            )  # fmt: skip
        if options.profile == "smoke" and loss == "simclr":  # two learned modes hardly change the kernel
            continue
        final, first, untrained = (float(np.mean(values(loss, END, kernel))) for kernel in KERNELS[:3])
        sentence = (
            f"{settings.title}, end of training: alignment with the current kernel minus alignment with the kernel at "
            f"initialisation, mean over {seeds_text(options.seeds)}"
        )
        control = ("untrained network", untrained - first)
        claims.append(Claim(f"{loss}_moved", sentence, final - first, ">=", 0.1, *control))
    return claims


FIGURE = PaperFigure("kernel_over_time", __doc__, PAPER, PROFILES, produce)

"""Different losses learn similar directions, also from different initial weights (last experiment of the paper).

The figure compares the embeddings of the three losses as subspaces, on the same held-out pairs, when each has just
learned the same number of modes. On the following plateau features change, and the alignment decreases. Embeddings are
centred, as in the losses.

Networks with the same seed share their initial weights, and an untrained network is almost as close to a trained one as
a network trained with another loss. The claims therefore compare another loss *and* another seed. Controls are the
untrained network of the other seed, and permuted images; the alignment of two random three-dimensional subspaces in a
few hundred dimensions is near zero.

The figure ``kernel_over_time`` makes the paper's comparison with the tangent kernel.
"""

from __future__ import annotations

import argparse
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reproduce.claims import Claim, seeds_text, worst
from reproduce.controls import permuted_alignment
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import LOSS_SETTINGS
from reproduce.options import data_name
from reproduce.plots import alignments_figure
from stepwise_lightning.theory import subspace_alignment

PAPER = (
    "Last experiment: subspace alignment between the embeddings of Barlow Twins, SimCLR and VICReg; the losses learn "
    "similar top directions, far above chance."
)
TITLES = [settings.title for settings in LOSS_SETTINGS.values()]
MODES = (1, 3, 5)  # numbers of learned modes at which embeddings are compared
CLAIM_MODES = 3
SAME_SEED, OTHER_SEED = "same seed", "another seed"
UNTRAINED, PERMUTED = "untrained, another seed", "permuted images"
COLUMNS = ["seed", "modes", "one", "other", "kind", "alignment"]
MIN_ALIGNMENT = 0.1


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train missing runs and align all pairs; a single seed is compared with the first steps of the next one."""
    runs = trained_runs(options)
    if len(options.seeds) == 1:
        early = [(loss, "early") for loss in LOSS_SETTINGS]
        runs += trained_runs(argparse.Namespace(**vars(options) | {"seeds": [options.seeds[0] + 1]}), early)
        options = argparse.Namespace(**vars(options) | {"seeds": [options.seeds[0], options.seeds[0] + 1]})
    rows = [row for run in runs for modes in MODES for row in _alignments(run, runs, modes)]
    figure = alignments_figure(
        [_matrix(rows, modes) for modes in MODES],
        [f"{modes} learned mode{'s' * (modes > 1)}" for modes in MODES],
        [*(f"{title}, {SAME_SEED}" for title in TITLES), *(f"{title}, {OTHER_SEED}" for title in TITLES),
         UNTRAINED, PERMUTED],
        TITLES,
        title="Different losses learn similar directions",
        note=f"subspace alignment on held-out pairs, {data_name(options.data)}; mean of {seeds_text(options.seeds)}",
    )  # fmt: skip
    return Outcome(figure, COLUMNS, rows, _claims(rows, options), [run.summary() for run in runs])


def _alignments(run: Run, runs: list[Run], modes: int) -> list[list[Any]]:
    """Return rows of ``COLUMNS`` for one run and all others; empty if the run never had this number of modes."""
    subspace = _subspace(run.embeddings(modes), modes)
    if subspace is None:
        return []
    rows: list[list[Any]] = []
    for other in runs:
        other_subspace = _subspace(other.embeddings(modes), modes)
        cells = [run.seed, modes, run.loss_settings.title, other.loss_settings.title]
        kind = SAME_SEED if other.seed == run.seed else OTHER_SEED
        if other_subspace is not None:
            rows.append([*cells, kind, float(subspace_alignment(subspace, other_subspace))])
        if kind == OTHER_SEED:
            untrained = _subspace(other.embedded(0), modes)
            assert untrained is not None
            rows.append([*cells, UNTRAINED, float(subspace_alignment(subspace, untrained))])
            if other_subspace is not None:
                rows.append([*cells, PERMUTED, permuted_alignment(subspace, other_subspace)])
    return rows


def _subspace(z: Tensor | None, modes: int) -> Tensor | None:
    """Return the top principal directions over the samples, (2n, modes)."""
    return None if z is None else torch.linalg.svd(z, full_matrices=False).U[:, :modes]


def _mean(rows: list[list[Any]], **cells: Any) -> float:
    """Return the mean alignment of the rows with these cells, or NaN."""
    values = [row[-1] for row in rows if all(row[COLUMNS.index(key)] == value for key, value in cells.items())]
    return float(np.mean(values)) if values else float("nan")


def _matrix(rows: list[list[Any]], modes: int) -> np.ndarray[Any, Any]:
    """Return means over seeds: a row per loss of the same and of another seed and per control, a column per loss."""
    columns = []
    for one in TITLES:
        losses = [_mean(rows, modes=modes, one=one, other=other, kind=kind) for kind in (SAME_SEED, OTHER_SEED)
                  for other in TITLES]  # fmt: skip
        columns.append([*losses, *(_mean(rows, modes=modes, one=one, kind=kind) for kind in (UNTRAINED, PERMUTED))])
    return np.array(columns).T


def _claims(rows: list[list[Any]], options: argparse.Namespace) -> list[Claim]:
    other, untrained, permuted = (_mean_of_pairs(rows, kind) for kind in (OTHER_SEED, UNTRAINED, PERMUTED))
    pairs = f"another loss and another seed, {CLAIM_MODES} modes just learned, mean over pairs"
    claims = [
        Claim("aligned", f"{pairs}: alignment", other, ">=", MIN_ALIGNMENT, PERMUTED, permuted),
        Claim("over_untrained", f"{pairs}: alignment minus alignment with the untrained network", other - untrained,
              ">=", MIN_ALIGNMENT, PERMUTED, permuted - untrained),
    ]  # fmt: skip
    same_seed = [row[-1] for row in rows if row[1] == CLAIM_MODES and row[4] == SAME_SEED and row[2] != row[3]]
    sentence = f"two losses of one seed are different runs: alignment of {CLAIM_MODES} modes"
    claims.append(worst("differ", sentence, same_seed, "<=", 0.99, options.seeds, "a loss with itself", [1.0]))
    return claims


def _mean_of_pairs(rows: list[list[Any]], kind: str) -> float:
    """Return the mean alignment over all pairs of different losses."""
    pairs = [_mean(rows, modes=CLAIM_MODES, one=one, other=other, kind=kind) for one, other in permutations(TITLES, 2)]
    return float(np.nanmean(pairs)) if np.isfinite(pairs).any() else float("nan")


FIGURE = PaperFigure("cross_loss_alignment", __doc__, PAPER, PROFILES, produce)

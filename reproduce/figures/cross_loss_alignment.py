"""Different losses learn similar directions, also from different initial weights (last experiment of the paper).

The figure compares the embeddings of the three losses as subspaces, on the same held-out pairs, when each has just
learned the same number of modes. On the following plateau features change, and the alignment decreases. Embeddings are
centred, as in the losses.

Networks with the same seed share their initial weights, and an untrained network is almost as close to a trained one as
a network trained with another loss. The claims therefore compare another loss *and* another seed. Rivals are the same
number of principal components of the untrained network of the other seed, and of the pixels: with three learned modes,
embeddings are as close to the first principal components of the pixels as to each other, with four they are not. The
same run at its next measurement is the control of the claim that the runs of two losses differ.

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
MODES = (1, 3, 4, 5)  # numbers of learned modes at which embeddings are compared
CLAIM_MODES = {"smoke": 3, "cpu": 4, "full": 4}
SAME_SEED, OTHER_SEED = "same seed", "another seed"
UNTRAINED, PIXELS, NEXT = "untrained, another seed", "pixels", "same run, next measurement"
COLUMNS = ["seed", "modes", "one", "other", "kind", "alignment"]
MIN_ALIGNMENT = {"smoke": 0.4, "cpu": 0.47, "full": 0.47}
MIN_GAIN = {"smoke": 0.15, "cpu": 0.2, "full": 0.2}
MAX_SAME_SEED = 0.9
EARLY = [("barlow_twins", "early"), ("vicreg", "early")]  # four modes by step 472 on photographs; SimCLR by step 986


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train missing runs and align all pairs; a single seed is compared with the first steps of another."""
    runs = trained_runs(options)
    if len(options.seeds) == 1:
        other = argparse.Namespace(**vars(options) | {"seeds": [options.seeds[0] + 1]})
        runs += trained_runs(other, EARLY)
        options = argparse.Namespace(**vars(options) | {"seeds": [*options.seeds, *other.seeds]})
    rows = [row for run in runs for modes in MODES for row in _alignments(run, runs, modes)]
    figure = alignments_figure(
        [_matrix(rows, modes) for modes in MODES],
        [f"{modes} learned mode{'s' * (modes > 1)}" for modes in MODES],
        [*(f"{title}, {SAME_SEED}" for title in TITLES), *(f"{title}, {OTHER_SEED}" for title in TITLES),
         UNTRAINED, PIXELS],
        TITLES,
        title="Different losses learn similar directions",
        note=f"subspace alignment on held-out pairs, {data_name(options.data)}; mean of {seeds_text(options.seeds)}",
    )  # fmt: skip
    return Outcome(figure, COLUMNS, rows, _claims(rows, options), [run.summary() for run in runs])


def _alignments(run: Run, runs: list[Run], modes: int) -> list[list[Any]]:
    """Return rows of ``COLUMNS`` for one run and all others; empty if the run never had this number of modes."""
    z, title, rows = run.embeddings(modes), run.loss_settings.title, []
    if z is None:
        return []
    subspace = _subspace(z, modes)

    def add(kind: str, other: Tensor, of: str = title) -> None:
        rows.append([run.seed, modes, title, of, kind, float(subspace_alignment(subspace, _subspace(other, modes)))])

    pixels = torch.cat(run.data.probe_pairs()).flatten(1).double()
    add(PIXELS, pixels - pixels.mean(0))
    for index in run.plateau(modes)[1:2]:
        add(NEXT, run.embedded(index))
    for other in runs:
        kind = SAME_SEED if other.seed == run.seed else OTHER_SEED
        if (other_z := other.embeddings(modes)) is not None:
            add(kind, other_z, other.loss_settings.title)
        if kind == OTHER_SEED:
            add(UNTRAINED, other.embedded(0), other.loss_settings.title)
    return rows


def _subspace(z: Tensor, modes: int) -> Tensor:
    """Return the top principal directions over the samples, (2n, modes)."""
    return torch.linalg.svd(z, full_matrices=False).U[:, :modes]


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
        columns.append([*losses, *(_mean(rows, modes=modes, one=one, kind=kind) for kind in (UNTRAINED, PIXELS))])
    return np.array(columns).T


def _claims(rows: list[list[Any]], options: argparse.Namespace) -> list[Claim]:
    modes = CLAIM_MODES[options.profile]
    pairs = [_mean(rows, modes=modes, one=a, other=b, kind=OTHER_SEED) for a, b in permutations(TITLES, 2)]
    other = float(np.nanmean(pairs)) if np.isfinite(pairs).any() else float("nan")
    untrained, pixels = (_mean(rows, modes=modes, kind=kind) for kind in (UNTRAINED, PIXELS))
    same_seed, following = (
        [row[-1] for row in rows if row[1] == modes and row[4] == kind and (row[2] != row[3] or kind == NEXT)]
        for kind in (SAME_SEED, NEXT)
    )
    sentence = f"another loss and another seed, {modes} modes just learned, mean over pairs: alignment"
    name = "principal components of the pixels"
    rivals: list[tuple[str, float | None]] = [(name, pixels), (name, pixels - untrained)]
    if options.profile == "smoke":  # three modes are no closer to each other than to the pixels
        rivals = [("untrained network", untrained), ("", None)]
    return [
        Claim("aligned", sentence, other, ">=", MIN_ALIGNMENT[options.profile], *rivals[0]),
        Claim("over_untrained", f"{sentence} minus alignment with the untrained network", other - untrained, ">=",
              MIN_GAIN[options.profile], *rivals[1]),
        worst("differ", f"two losses of one seed, {modes} modes just learned: alignment", same_seed, "<=",
              MAX_SAME_SEED, options.seeds, NEXT, following),
    ]  # fmt: skip


FIGURE = PaperFigure("cross_loss_alignment", __doc__, PAPER, PROFILES, produce)

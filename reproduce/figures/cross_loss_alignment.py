"""Different losses learn similar directions, also from different initial weights (last experiment of the paper).

Embeddings of the three losses are compared as subspaces, on the same held-out pairs, at times when they have just
learned equally many modes; on the plateau that follows, features move and alignment decays. Embeddings are centred, as
the losses see them.

Networks of one seed share their initial weights, and what these make of the images: the untrained network is nearly as
near to the trained one as another loss's is. So claims compare another loss *and* another seed, and beside them stand
the untrained network of that other seed, and what is left when images are permuted against each other. Of three
dimensions in a few hundred, two random subspaces share next to nothing.

The tangent kernel, with which the paper compares too, has a figure of its own: ``kernel_over_time``.
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
TITLES = [method.title for method in LOSS_SETTINGS.values()]
MODES = (1, 3, 5)  # numbers of learned modes at which embeddings are compared
JUDGED = 3
SAME_SEED, OTHER_SEED = "same seed", "another seed"
UNTRAINED, PERMUTED = "untrained, another seed", "permuted images"
COLUMNS = ["seed", "modes", "one", "other", "kind", "alignment"]
LEAST = {"smoke": 0.1, "cpu": 0.1, "full": 0.1}


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train what is missing, and align all with all; of a single seed, with the next one."""
    if len(options.seeds) == 1:
        options = argparse.Namespace(**vars(options) | {"seeds": [options.seeds[0], options.seeds[0] + 1]})
    runs = trained_runs(options)
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
    """Return rows ``seed, modes, one, other, kind, alignment`` of one run, with all others; none without the modes."""
    own = _subspace(run.embeddings(modes), modes)
    if own is None:
        return []
    rows: list[list[Any]] = []
    for other in runs:
        theirs = _subspace(other.embeddings(modes), modes)
        start = [run.seed, modes, run.loss_settings.title, other.loss_settings.title]
        kind = SAME_SEED if other.seed == run.seed else OTHER_SEED
        if theirs is not None:
            rows.append([*start, kind, float(subspace_alignment(own, theirs))])
        if kind == OTHER_SEED:
            untrained = _subspace(other.embedded(0), modes)
            assert untrained is not None
            rows.append([*start, UNTRAINED, float(subspace_alignment(own, untrained))])
            if theirs is not None:
                rows.append([*start, PERMUTED, permuted_alignment(own, theirs)])
    return rows


def _subspace(z: Tensor | None, modes: int) -> Tensor | None:
    """Return the top principal directions over the samples, (2n, modes)."""
    return None if z is None else torch.linalg.svd(z, full_matrices=False).U[:, :modes]


def _mean(rows: list[list[Any]], **wanted: Any) -> float:
    """Return the mean alignment of the rows with these values; NaN for none."""
    values = [row[-1] for row in rows if all(row[COLUMNS.index(key)] == value for key, value in wanted.items())]
    return float(np.mean(values)) if values else float("nan")


def _matrix(rows: list[list[Any]], modes: int) -> np.ndarray[Any, Any]:
    """Return the mean over seeds: rows losses of the same seed, of another, and controls; columns losses."""
    columns = []
    for one in TITLES:
        losses = [_mean(rows, modes=modes, one=one, other=other, kind=kind) for kind in (SAME_SEED, OTHER_SEED)
                  for other in TITLES]  # fmt: skip
        columns.append([*losses, *(_mean(rows, modes=modes, one=one, kind=kind) for kind in (UNTRAINED, PERMUTED))])
    return np.array(columns).T


def _claims(rows: list[list[Any]], options: argparse.Namespace) -> list[Claim]:
    other, untrained, permuted = (_mean_of_pairs(rows, kind) for kind in (OTHER_SEED, UNTRAINED, PERMUTED))
    pairs = f"another loss and another seed, {JUDGED} modes just learned, mean of all such pairs"
    least = LEAST[options.profile]
    claims = [
        Claim("aligned", f"{pairs}: alignment", other, ">=", least, PERMUTED, permuted),
        Claim("over_untrained", f"{pairs}: alignment over that with the untrained network", other - untrained, ">=",
              least, PERMUTED, permuted - untrained),
    ]  # fmt: skip
    alike = [row[-1] for row in rows if row[1] == JUDGED and row[4] == SAME_SEED and row[2] != row[3]]
    sentence = f"two losses of one seed are not one run: alignment of {JUDGED} modes"
    claims.append(worst("differ", sentence, alike, "<=", 0.99, options.seeds, "a loss with itself", [1.0]))
    return claims


def _mean_of_pairs(rows: list[list[Any]], kind: str) -> float:
    """Return the mean of an alignment over all pairs of different losses."""
    pairs = [_mean(rows, modes=JUDGED, one=one, other=other, kind=kind) for one, other in permutations(TITLES, 2)]
    return float(np.nanmean(pairs)) if np.isfinite(pairs).any() else float("nan")


FIGURE = PaperFigure("cross_loss_alignment", __doc__, PAPER, PROFILES, produce)

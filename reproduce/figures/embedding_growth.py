"""The embedding grows from a point to a line, a plane and a volume (first figure of the authors' blog post).

The figure shows embeddings of held-out images under Barlow Twins from small initialisation, projected on their top
three principal components, in the middle of the plateaus with zero to three learned modes. Colours are classes; for
the photographs, the picture of each crop. The crops at both ends of each direction illustrate its meaning.
``animation.gif`` shows the growth over time.

Embeddings from ordinary initialisation are the control: with as many learned modes, their variance is spread over more
directions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reproduce.claims import Claim, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.growth_plots import growth_animation, growth_figure, principal_components
from reproduce.networks.runs import Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.options import data_name
from stepwise_lightning.errors import UserError
from stepwise_lightning.files import atomic_write

PAPER = (
    "The authors' blog post, Fig. 1: top three principal components of the embeddings while the loss falls in steps: "
    "a point, then a line, a plane and a volume."
)
MODES = (0, 1, 2, 3)
FRAMES = 60
EXTREMES = 4  # crops at each end


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train missing runs, and measure the embeddings on the plateaus."""
    trained = trained_runs(options, [("barlow_twins", "small"), ("barlow_twins", "ordinary")])
    runs, ordinary = ([run for run in trained if run.variant == variant] for variant in ("small", "ordinary"))
    summaries = [run.summary() | _shares(run, control) for run, control in zip(runs, ordinary, strict=True)]
    first = runs[0]
    embeddings, labels = _embeddings(first), first.data.probe_labels().numpy()
    panel, samples = first.panel(), _samples(first)
    title = "The embedding grows one dimension at a time"
    figure = growth_figure(
        panel, embeddings[samples], samples, labels, first.data.class_names,
        _extremes(first, embeddings[samples]), title,
        note=f"ResNet on held-out crops, {data_name(options.data)}, seed {options.seeds[0]}; Barlow Twins",
    )  # fmt: skip
    start = max(samples[0] - 10, 0)
    frames = np.unique(np.linspace(start, samples[-1], FRAMES).round().astype(int)).tolist()
    atomic_write(
        directory / "animation.gif",
        lambda path: growth_animation(path, panel, embeddings, labels, frames, title),
    )
    rows = (row for run in runs for row in _rows(run))
    claims = _claims(summaries, options.seeds)
    return Outcome(figure, ["seed", "modes", "sample", "pc_1", "pc_2", "pc_3"], rows, claims, summaries)


def _claims(summaries: list[dict[str, Any]], seeds: list[int]) -> list[Claim]:
    def values(key: str) -> list[float]:
        return [summary[key] for summary in summaries]

    claims = []
    for modes, shape in ((1, "a line"), (2, "a plane"), (3, "a volume")):
        sentence = f"{shape}: variance in the top {modes} direction{'s' * (modes > 1)} with as many learned modes"
        # protocol.json names the control of share_3.
        control, key = ("one direction fewer", "fewer") if modes == 3 else ("ordinary initialisation", "ordinary")
        numbers = values(f"share_{modes}"), ">=", 0.95, seeds, control, values(f"{key}_{modes}")
        claims.append(worst(f"share_{modes}", sentence, *numbers))
    sentence = "a point: extent before the first step over extent with three modes"
    return [*claims, worst("size_0", sentence, values("size_0"), "<=", 0.2, seeds, "with one mode", values("size_1"))]


def _embeddings(run: Run) -> np.ndarray[Any, Any]:
    """Return the embeddings of the first views at every measurement, (T, n, d)."""
    return np.stack([run.record.embeddings(index)[0].double().numpy() for index in range(len(run.record))])


def _samples(run: Run) -> list[int]:
    """Return the index of the middle measurement of each plateau.

    Raises:
        UserError: a plateau was not measured.

    """
    plateaus = [run.plateau(modes) for modes in MODES]
    if missing := [modes for modes, plateau in zip(MODES, plateaus, strict=True) if not plateau]:
        raise UserError(
            f"{run.name} has no measurement with {missing} learned modes: train longer or measure more often"
        )
    return [plateau[len(plateau) // 2] for plateau in plateaus]


def _shares(run: Run, control: Run) -> dict[str, float]:
    """Return shares of the variance, also of a run from ordinary initialisation with as many learned modes, or more."""
    variances = [torch.linalg.svdvals(run.embedded(sample)).square() for sample in _samples(run)]
    shares = {f"share_{m}": float(v[:m].sum() / v.sum()) for m, v in zip(MODES, variances, strict=True) if m}
    shares["fewer_3"] = float(variances[3][:2].sum() / variances[3].sum())
    for modes in (1, 2):
        samples = control.plateau(modes) or (control.steps.num_learned > modes).nonzero().flatten().tolist() or [-1]
        v = torch.linalg.svdvals(control.embedded(samples[len(samples) // 2])).square()
        shares[f"ordinary_{modes}"] = float(v[:modes].sum() / v.sum())
    return shares | {f"size_{m}": float((variances[m].sum() / variances[-1].sum()).sqrt()) for m in (0, 1)}


def _extremes(run: Run, embeddings: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Return the crops at both ends of each component, in [0, 1]."""
    crops = run.data.probe_pairs()[0]
    scale = [torch.tensor(values)[:, None, None] for values in (run.data.std, run.data.mean)]
    images = (crops * scale[0] + scale[1]).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    order = principal_components(embeddings)[-1].argsort(0)
    return [images[np.concatenate([mode[:EXTREMES], mode[-EXTREMES:]])] for mode in order.T]


def _rows(run: Run) -> list[list[Any]]:
    shown = principal_components(_embeddings(run)[_samples(run)])
    return [
        [run.seed, modes, sample, *point]
        for modes, points in zip(MODES, shown.tolist(), strict=True)
        for sample, point in enumerate(points)
    ]


FIGURE = PaperFigure("embedding_growth", __doc__, PAPER, PROFILES, produce)

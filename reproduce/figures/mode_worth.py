"""Classification accuracy of the first k modes when k modes have been learned (not in the paper).

Three losses train a ResNet from small and from ordinary initialisation. When k modes have just been learned, a ridge
classifier and k nearest neighbours predict the class of held-out images, each left out in turn, from the first k modes
of the current embedding. Baselines are the first k principal components of the current hidden representation, of the
untrained embedding and hidden representation, and of the pixels. Modes and components are computed without labels.

From small initialisation, ``detect_steps`` counts the learned modes, and the hidden representation uses the next saved
weights, at most 40 steps later. From ordinary initialisation, ``detect_rises`` counts a mode at half of its range, and
the hidden representation uses the final weights.

One or two modes are no better than the baselines and worse than pixels; all learned modes are better. The untrained
hidden representation is the strongest baseline: as many of its components are up to 0.18 more accurate than pixels. The
claims therefore compare with the better one of the two untrained representations, and their control is the gain of as
many components of the pixels. The hidden representation of Barlow Twins gains little (photographs, seeds 0, 1, 2: 0.03,
0.08, 0.04), and there is no claim.

The classes of the photographs are the eight pictures; 41 % of the tiles are from one picture. Held-out tiles overlap,
which favours k-NN, also on pixels. On CIFAR-10 the modes of these small networks contain little information about the
classes: see ``docs/results.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from reproduce.claims import Claim, seeds_text, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import INITIALIZATIONS, LOSS_SETTINGS
from reproduce.options import data_name
from reproduce.plots import WorthPanel, worth_figure
from reproduce.processes import map_parallel
from stepwise_lightning import mode_worth
from stepwise_lightning.features import capture

PAPER = "Not in the paper, which leaves downstream accuracy of the learned modes open."
EMBEDDING, HIDDEN, UNTRAINED, UNTRAINED_HIDDEN, PIXELS = (
    "embedding", "hidden representation", "untrained embedding", "untrained hidden representation", "pixels"
)  # fmt: skip
SHOWN = (EMBEDDING, HIDDEN, UNTRAINED, UNTRAINED_HIDDEN, PIXELS)
CLASSIFIERS = ("ridge", "knn")
COLUMNS = ["loss", "start", "seed", "classifier", "representation", "modes", "step", "accuracy"]
# Minimum accuracy gain of all learned modes over the same number of baseline components, for every seed.
MIN_GAIN = {"barlow_twins": 0.03, "vicreg": 0.05, "simclr": 0.05}
MIN_HIDDEN_GAIN = 0.05
HIDDEN_GAINS = ("vicreg", "simclr")
SMOKE_LOSSES = ("vicreg",)
NETWORKS = [(loss, start) for start in INITIALIZATIONS for loss in LOSS_SETTINGS]


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train missing runs, and measure classification accuracies."""
    runs = trained_runs(options, NETWORKS)
    rows = [row for rows in map_parallel(classify_run, [(run,) for run in runs], "mode_worth") for row in rows]
    panels = [
        [_panel(rows, loss, start, classifier, options.seeds) for loss in LOSS_SETTINGS]
        for start, classifier in (("small", "ridge"), ("ordinary", "ridge"), ("small", "knn"))
    ]
    for panel, settings in zip(panels[0], LOSS_SETTINGS.values(), strict=True):
        panel.title = settings.title
    figure = worth_figure(
        panels,
        ["small initialisation\nridge: accuracy", "ordinary initialisation\nridge: accuracy",
         "small initialisation\nk-NN: accuracy"],
        title="Classification accuracy of the first k modes when k modes have been learned",
        note=f"held-out pairs, {data_name(options.data)}, {seeds_text(options.seeds)}",
    )  # fmt: skip
    return Outcome(figure, COLUMNS, rows, _claims(rows, options), [_summary(run, rows) for run in runs])


def classify_run(run: Run) -> list[list[Any]]:
    """Return the rows of one run."""
    labels, pairs = run.data.probe_labels(), run.data.probe_pairs()
    learned, steps, matrix = learned_at(run), run.record.steps.tolist(), run.loss_settings.matrix
    dim = run.record.embeddings(0).shape[-1]
    saved = run.saved_steps()
    hidden = {step: _hidden(run, step) for step in {next_saved(saved, steps[index]) for index in learned.values()}}
    fixed = {
        UNTRAINED: ([*run.record.embeddings(0)], matrix),
        UNTRAINED_HIDDEN: (capture(run.encoder().train(), pairs, ["backbone"])["backbone"], "covariance"),
        PIXELS: ([view.flatten(1) for view in pairs], "covariance"),
    }
    rows: list[list[Any]] = []

    def add(classifier: str, name: str, modes: int, step: int, accuracy: Tensor) -> None:
        head = [run.loss, run.variant, run.seed, classifier, name]
        rows.append([*head, modes, step, float(accuracy)])

    for classifier in CLASSIFIERS:
        for name, (views, kind) in fixed.items():
            for modes, accuracy in enumerate(mode_worth(views, labels, kind, dim, classifier)):  # type: ignore[arg-type]
                add(classifier, name, modes, 0, accuracy)
        for modes, index in learned.items():
            later = next_saved(saved, steps[index])
            sources = [
                (EMBEDDING, [*run.record.embeddings(index)], matrix, steps[index]),
                (HIDDEN, hidden[later], "covariance", later or steps[-1]),
            ]
            for name, views, kind, step in sources:
                worth = mode_worth(views, labels, kind, modes, classifier)  # type: ignore[arg-type]
                add(classifier, name, modes, step, worth[-1])
    return rows


def learned_at(run: Run) -> dict[int, int]:
    """Return the indices of the measurements at which 0, 1, 2, … modes have just been learned."""
    if run.variant == "small":
        most = int(run.steps.num_learned.max())
        return {modes: run.plateau(modes)[0] for modes in range(most + 1) if run.plateau(modes)}
    times = run.rises.times[run.rises.times.isfinite()].sort().values
    return {0: 0} | {
        modes: int((run.record.times >= time).nonzero()[0]) for modes, time in enumerate(times, start=1)
    }  # fmt: skip


def next_saved(saved: list[int], step: int) -> int | None:
    """Return the first saved step that is not before ``step``, or None for the final weights."""
    return next((later for later in saved if later >= step), None)


def _hidden(run: Run, step: int | None) -> list[Tensor]:
    encoder = run.encoder(trained=step is None, step=step)
    return capture(encoder.train(), run.data.probe_pairs(), ["backbone"])["backbone"]


def _values(rows: list[list[Any]], *head: Any) -> dict[int, float]:
    """Return accuracies by number of modes for a loss, initialisation, seed, classifier and representation."""
    return {row[5]: row[-1] for row in rows if tuple(row[:5]) == head}


def _panel(rows: list[list[Any]], loss: str, start: str, classifier: str, seeds: list[int]) -> WorthPanel:
    curves = {}
    for name in SHOWN:
        by_seed = [_values(rows, loss, start, seed, classifier, name) for seed in seeds]
        values = np.full((len(seeds), 1 + max(max(modes) for modes in by_seed)), np.nan)
        for row, accuracies in zip(values, by_seed, strict=True):
            row[list(accuracies)] = list(accuracies.values())
        curves[name] = values
    return WorthPanel(curves, float(np.nanmean(curves[PIXELS][:, 0])))


def _last(rows: list[list[Any]], run: tuple[Any, ...], classifier: str = "ridge") -> dict[str, Any]:
    """Return the number of learned modes, and the accuracy of that many components of each representation."""
    modes = max(_values(rows, *run, classifier, EMBEDDING))
    accuracies = {name: _values(rows, *run, classifier, name) for name in SHOWN}
    # The tangent covariance has one mode fewer than dimensions.
    return {"modes": modes} | {name: values[min(modes, max(values))] for name, values in accuracies.items()}


def _summary(run: Run, rows: list[list[Any]]) -> dict[str, Any]:
    head = (run.loss, run.variant, run.seed)
    last, neighbours = (_last(rows, head, classifier) for classifier in CLASSIFIERS)
    chance = _values(rows, *head, "ridge", PIXELS)[0]
    return run.summary() | {"modes": last["modes"], "chance": chance} | {
        name.replace(" ", "_"): last[name] for name in SHOWN
    } | {"knn_embedding": neighbours[EMBEDDING], "knn_pixels": neighbours[PIXELS]}  # fmt: skip


def _claims(rows: list[list[Any]], options: argparse.Namespace) -> list[Claim]:
    claims, smoke = [], options.profile == "smoke"
    for loss in SMOKE_LOSSES if smoke else LOSS_SETTINGS:
        last = [_last(rows, (loss, "small", seed)) for seed in options.seeds]
        comparisons: list[tuple[str, str, tuple[str, ...], float]] = [
            ("untrained", EMBEDDING, (UNTRAINED, UNTRAINED_HIDDEN), MIN_GAIN[loss])
        ]
        if loss in HIDDEN_GAINS and not smoke:
            comparisons.append(("hidden", HIDDEN, (UNTRAINED_HIDDEN,), MIN_HIDDEN_GAIN))
        for name, trained, others, least in comparisons:
            title = f"{LOSS_SETTINGS[loss].title}, small initialisation"
            sentence = f"{title}: accuracy of all learned modes, {trained} minus {' or '.join(others)}"
            gains, pixels = (
                [values[each] - max(values[other] for other in others) for values in last] for each in (trained, PIXELS)
            )
            claims.append(
                worst(f"{loss}_{name}", sentence, gains, ">=", least, options.seeds, "components of pixels", pixels)
            )
    return claims


FIGURE = PaperFigure("mode_worth", __doc__, PAPER, PROFILES, produce, networks=NETWORKS)

"""What the first k modes are worth to a classifier when k modes have been learned (a question of ours).

Three losses train a ResNet from small and from ordinary initialisation. When k modes have just been learned, a linear
classifier (ridge) sees the first k modes of the embedding as it is then, of held-out pairs that no training step has
used, and is asked for the class of each image after learning from all others; k nearest neighbours too. Beside it are
the first k principal components of the hidden representation of that moment, of the untrained network's embedding and
hidden representation, and of the pixels of the same views. Modes and components are found without labels.

From small initialisation k modes are learned when ``detect_steps`` says so, and hidden representations are of the
weights kept next after that, at most 40 steps later. From ordinary initialisation a mode counts when it is half-way up
(``detect_rises``), and no weights but the last are kept, so that hidden representations are those of the end.

The first mode or two are worth no more than those components, and less than those of pixels; all learned ones are
worth more. The hidden representation gains less, since its untrained components are worth more than those of the
embedding; with Barlow Twins it hardly gains at all (photographs, seeds 0, 1, 2: 0.03, 0.08, 0.04), and nothing is
claimed of it.

The classes of the photographs are the eight pictures that tiles are cut from, 41 % of them from one. Held-out tiles
overlap each other, which flatters k-NN, also of pixels. On CIFAR-10 these small networks and weak crops, with which the
staircase is as clear, learn modes that tell next to nothing of its classes: ``docs/results.md`` has the numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reproduce.claims import Claim, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import INITIALIZATIONS, LOSS_SETTINGS
from reproduce.options import data_name
from reproduce.plots import WorthPanel, worth_figure
from reproduce.processes import map_parallel
from stepwise_lightning import mode_worth
from stepwise_lightning.features import capture

PAPER = "Not in the paper, which leaves open what the learned modes are worth downstream."
EMBEDDING, HIDDEN, UNTRAINED, UNTRAINED_HIDDEN, PIXELS, PERMUTED = (
    "embedding", "hidden representation", "untrained embedding", "untrained hidden representation", "pixels",
    "embedding, labels permuted",
)  # fmt: skip
SHOWN = (EMBEDDING, HIDDEN, UNTRAINED, UNTRAINED_HIDDEN, PIXELS)
CLASSIFIERS = ("ridge", "knn")
COLUMNS = ["loss", "start", "seed", "classifier", "representation", "modes", "step", "accuracy"]
# By how much an embedding of all learned modes exceeds others of as many components, for every seed.
LEAST_GAIN = {"barlow_twins": 0.1, "vicreg": 0.1, "simclr": 0.05}
LEAST_HIDDEN_GAIN = 0.05
HIDDEN_GAINS = ("vicreg", "simclr")
LEAST_GAIN_SMOKE = 0.05  # of its few steps; SimCLR's are too few
OVER_PIXELS = ("barlow_twins", "vicreg")  # as many of SimCLR's modes, five or six, are worth about what pixels are


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train what is missing, and ask classifiers."""
    runs = trained_runs(options, [(loss, start) for start in INITIALIZATIONS for loss in LOSS_SETTINGS])
    rows = [row for rows in map_parallel(worths, [(run,) for run in runs], "mode_worth") for row in rows]
    panels = [
        [_panel(rows, loss, start, classifier, options.seeds) for loss in LOSS_SETTINGS]
        for start, classifier in (("small", "ridge"), ("ordinary", "ridge"), ("small", "knn"))
    ]
    for panel, method in zip(panels[0], LOSS_SETTINGS.values(), strict=True):
        panel.title = method.title
    figure = worth_figure(
        panels,
        ["small start\nlinear classifier: accuracy", "ordinary start\nlinear classifier: accuracy",
         "small start\nk nearest neighbours: accuracy"],
        title="What the first k modes are worth when k modes have been learned",
        note=f"held-out pairs, {data_name(options.data)}, seeds {', '.join(map(str, options.seeds))}",
    )  # fmt: skip
    return Outcome(figure, COLUMNS, rows, _claims(rows, options), [_summary(run, rows) for run in runs])


def worths(run: Run) -> list[list[Any]]:
    """Return the rows of one run."""
    labels, pairs = run.data.probe_labels(), run.data.probe_pairs()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    moments, steps, matrix = _moments(run), run.record.steps.tolist(), run.loss_settings.matrix
    dim = run.record.embeddings(0).shape[-1]
    kept = run.saved_steps()
    hidden = {step: _hidden(run, step) for step in {_next(kept, steps[index]) for index in moments.values()}}
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
        for modes, index in moments.items():
            later = _next(kept, steps[index])
            sources = [
                (EMBEDDING, [*run.record.embeddings(index)], matrix, labels, steps[index]),
                (PERMUTED, [*run.record.embeddings(index)], matrix, labels[order], steps[index]),
                (HIDDEN, hidden[later], "covariance", labels, later or steps[-1]),
            ]
            for name, views, kind, names, step in sources:
                worth = mode_worth(views, names, kind, modes, classifier)  # type: ignore[arg-type]
                add(classifier, name, modes, step, worth[-1])
    return rows


def _moments(run: Run) -> dict[int, int]:
    """Return the measurements at which 0, 1, 2, … modes have just been learned."""
    if run.variant == "small":
        most = int(run.steps.num_learned.max())
        return {modes: run.plateau(modes)[0] for modes in range(most + 1) if run.plateau(modes)}
    times = run.rises.times[run.rises.times.isfinite()].sort().values
    return {0: 0} | {
        modes: int((run.record.times >= time).nonzero()[0]) for modes, time in enumerate(times, start=1)
    }  # fmt: skip


def _next(kept: list[int], step: int) -> int | None:
    """Return the first step not before this one whose weights were kept; None for the end."""
    return next((later for later in kept if later >= step), None)


def _hidden(run: Run, step: int | None) -> list[Tensor]:
    encoder = run.encoder(trained=step is None, step=step)
    return capture(encoder.train(), run.data.probe_pairs(), ["backbone"])["backbone"]


def _values(rows: list[list[Any]], *head: Any) -> dict[int, float]:
    """Return accuracies by number of modes: of a loss, start, seed, classifier and representation."""
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
    """Return how many modes a run learned, and what that many of each representation are worth."""
    modes = max(_values(rows, *run, classifier, EMBEDDING))
    names = (EMBEDDING, HIDDEN, UNTRAINED, UNTRAINED_HIDDEN, PIXELS, PERMUTED)
    known = {name: _values(rows, *run, classifier, name) for name in names}
    # The tangent covariance has one mode fewer than dimensions.
    return {"modes": modes} | {name: values[min(modes, max(values))] for name, values in known.items()}


def _summary(run: Run, rows: list[list[Any]]) -> dict[str, Any]:
    head = (run.loss, run.variant, run.seed)
    last, neighbours = (_last(rows, head, classifier) for classifier in CLASSIFIERS)
    chance = _values(rows, *head, "ridge", PIXELS)[0]
    return run.summary() | {"modes": last["modes"], "chance": chance} | {
        name.replace(" ", "_"): last[name] for name in SHOWN
    } | {"knn_embedding": neighbours[EMBEDDING], "knn_pixels": neighbours[PIXELS]}  # fmt: skip


def _claims(rows: list[list[Any]], options: argparse.Namespace) -> list[Claim]:
    claims, smoke = [], options.profile == "smoke"
    for loss, method in LOSS_SETTINGS.items():
        if smoke and loss not in OVER_PIXELS:
            continue
        last = [_last(rows, (loss, "small", seed)) for seed in options.seeds]
        judged = [("untrained", EMBEDDING, UNTRAINED, LEAST_GAIN_SMOKE if smoke else LEAST_GAIN[loss])]
        if not smoke:
            judged += [("hidden", HIDDEN, UNTRAINED_HIDDEN, LEAST_HIDDEN_GAIN)] * (loss in HIDDEN_GAINS)
            judged += [("pixels", EMBEDDING, PIXELS, LEAST_GAIN[loss])] * (loss in OVER_PIXELS)
        for name, trained, other, least in judged:
            sentence = f"{method.title}, small start: accuracy on all learned modes, {trained}, over {other}"
            gains = [values[trained] - values[other] for values in last]
            nothing = [values[PERMUTED] - values[other] for values in last]
            claims.append(
                worst(
                    f"{loss}_{name}", sentence, gains, ">=", least, options.seeds, "labels permuted", nothing,
                )
            )  # fmt: skip
    return claims


FIGURE = PaperFigure("mode_worth", __doc__, PAPER, PROFILES, produce)

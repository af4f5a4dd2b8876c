"""Four losses, a ResNet with 16 to 128 channels on CIFAR-10: steps, and accuracy when each mode is learned.

The size is between the small ResNet of the other figures and the paper's ResNet-50 on STL-10: one basic block per
stage, 32×32 images, the standard augmentation, 256 pairs per batch, 32 dimensions, 4000 steps
(``configs/<loss>_cifar10_cpu.yaml``). Each loss is trained from small initialisation and, as its control, from ordinary
initialisation for the same number of steps. Learning rates were chosen before the runs.

When k modes have been learned, a ridge classifier and 20 nearest neighbours predict the class of 1000 held-out images
from 5000 training images, by the embedding and by the hidden representation. The weights are the next saved ones, at
most 10 % later. ``claims.json`` contains the mean over seeds for each k with its 95 % interval, and the difference of
the two initialisations at the end of training. There is no claim about accuracies.

A run takes 30 to 80 minutes on one core, all 24 runs 12 to 32 hours, and ``all`` does not include this figure. With
``--resume`` training continues where it stopped, and finished runs are kept. Start with ``--seeds 0``, and add seeds
later; ``python -m reproduce.train LOSS small --profile middle --resume`` trains single runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor

from reproduce.claims import Claim, average
from reproduce.figure import Outcome, PaperFigure
from reproduce.figures.mode_worth import learned_at, next_saved
from reproduce.networks.labelled import labelled_images
from reproduce.networks.runs import Run, trained_runs
from reproduce.networks.training import MIDDLE_PROFILES
from reproduce.networks.variants import ALL_LOSS_SETTINGS, INITIALIZATIONS, VARIANT_TITLES
from reproduce.options import data_name
from reproduce.plots import Response, conditions_figure
from reproduce.processes import map_parallel
from stepwise_lightning import mode_worth
from stepwise_lightning.callbacks.classifiers import knn_scores
from stepwise_lightning.features import capture
from stepwise_lightning.files import atomic_write_text
from stepwise_lightning.plots import Panel

PAPER = "Main experiment, at a smaller size than in the paper."
COLUMNS = ["loss", "start", "seed", "representation", "classifier", "modes", "step", "accuracy"]
REPRESENTATIONS = {"embedding": "", "hidden representation": "backbone"}
CLASSIFIERS = ("knn", "ridge")
NEIGHBOURS, TEMPERATURE = 20, 0.07
# The bounds were chosen before any run of this size, as in ``standard_init``.
MIN_SEPARATION = {"barlow_twins": 1.5, "vicreg": 1.0, "simclr": 1.0, "spectral_contrastive": 1.5}
_BATCH = 500  # images whose statistics batch normalisation uses


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train missing runs, and measure steps and accuracies."""
    runs = trained_runs(options, [(loss, start) for loss in ALL_LOSS_SETTINGS for start in INITIALIZATIONS])
    rows = [row for rows in map_parallel(accuracies, [(run,) for run in runs], "middle_scale") for row in rows]
    shown = [[run for run in runs if (run.seed, run.variant) == (options.seeds[0], start)] for start in INITIALIZATIONS]
    figure = conditions_figure(
        [[_panel(run) for run in row] for row in shown],
        [_response(rows, loss, options.seeds) for loss in ALL_LOSS_SETTINGS],
        title="Four losses, a ResNet with 16 to 128 channels",
        note=f"{data_name(options.data)}, seed {options.seeds[0]}; small (dashed: forecast) and ordinary "
        "initialisation;\naccuracy of 20 nearest neighbours in the hidden representation, with k learned modes",
    )
    settings = {"accuracies": _means(rows), "small_minus_ordinary": _differences(rows)}
    return Outcome(figure, COLUMNS, rows, _claims(runs, options), [run.summary() for run in runs], settings)


def _panel(run: Run) -> Panel:
    panel = run.panel(with_forecast=run.variant == "small")
    panel.title = run.loss_settings.title
    if run.variant != "small":
        panel.step_times = run.rises.times
    return panel


def accuracies(run: Run) -> list[list[Any]]:
    """Return the rows of one run, which are kept in its folder."""
    sizes = run.options.labelled, run.options.held_out
    path = run.directory.parent / f"accuracies_{sizes[0]}_{sizes[1]}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    datasets = run.data.labelled_train_dataloader().dataset, run.data.val_dataloader().dataset
    images = [labelled_images(dataset, size) for dataset, size in zip(datasets, sizes, strict=True)]
    labels, steps, rows = [part[1] for part in images], run.record.steps.tolist(), []
    learned = learned_at(run)
    for modes, index in [*learned.items(), (max(learned), -1)]:
        step = next_saved(run.saved_steps(), steps[index]) if modes else 0
        encoder = run.encoder(trained=step is None, step=step)
        outputs = [capture(encoder, x.split(_BATCH), [*REPRESENTATIONS.values()]) for x, _ in images]
        for name, layer in REPRESENTATIONS.items():
            z = [torch.cat(output[layer]) for output in outputs]
            for classifier in CLASSIFIERS:
                accuracy = _accuracy(z, labels, classifier)
                head = [run.loss, run.variant, run.seed, name, classifier]
                rows.append([*head, modes, steps[-1] if step is None else step, accuracy])
    atomic_write_text(path, json.dumps(rows))
    return rows


def _accuracy(z: list[Tensor], labels: list[Tensor], classifier: str) -> float:
    """Return the accuracy on the second of two sets of representations, trained on the first."""
    if classifier == "ridge":
        return float(mode_worth(z[0], labels[0], held_out=(z[1], labels[1]))[-1])
    bank, features = (part - z[0].mean(0) for part in z)
    bank = torch.nn.functional.normalize(bank)
    scores = knn_scores(features, bank, labels[0], int(labels[0].max()) + 1, NEIGHBOURS, TEMPERATURE)
    return float((scores.argmax(1) == labels[1]).double().mean())


def _by_modes(rows: list[list[Any]], *head: str) -> dict[int, dict[int, float]]:
    """Return accuracies when modes have been learned, by number and seed.

    ``head`` is loss, initialisation, representation and classifier.
    """
    values: dict[int, dict[int, float]] = {}
    for loss, start, seed, name, classifier, modes, _, accuracy in rows:
        if (loss, start, name, classifier) == head:
            values.setdefault(modes, {}).setdefault(seed, accuracy)  # the second one is of the end of training
    return values


def _interval(values: Sequence[float]) -> dict[str, Any]:
    """Return mean and 95 % interval of Student's t; without an interval for one value."""
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return {"mean": mean, "interval": None, "seeds": count}
    half = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5)
    return {"mean": mean, "interval": [mean - half, mean + half], "seeds": count}


def _means(rows: list[list[Any]]) -> list[dict[str, Any]]:
    heads = dict.fromkeys((row[0], row[1], row[3], row[4]) for row in rows)
    return [
        dict(zip(("loss", "start", "representation", "classifier"), head, strict=True))
        | {"modes": modes}
        | _interval(list(by_seed.values()))
        for head in heads
        for modes, by_seed in sorted(_by_modes(rows, *head).items())
    ]


def _differences(rows: list[list[Any]]) -> list[dict[str, Any]]:
    """Return the accuracy at the end from small minus ordinary initialisation, mean and interval over seeds."""
    last = {tuple(row[:5]): row[-1] for row in rows}  # rows of a run end with the end of training
    heads = dict.fromkeys((row[0], row[3], row[4]) for row in rows)
    return [
        {"loss": loss, "representation": name, "classifier": classifier}
        | _interval([
            last[loss, "small", seed, name, classifier] - last[loss, "ordinary", seed, name, classifier]
            for seed in dict.fromkeys(row[2] for row in rows)
        ])
        for loss, name, classifier in heads
    ]  # fmt: skip


def _response(rows: list[list[Any]], loss: str, seeds: list[int]) -> Response:
    """Return the accuracy of the hidden representation against the number of learned modes."""
    by_start = {start: _by_modes(rows, loss, start, "hidden representation", "knn") for start in INITIALIZATIONS}
    modes = sorted(set().union(*by_start.values()))
    curves = {
        VARIANT_TITLES[start]: np.array([[values.get(k, {}).get(seed, np.nan) for k in modes] for seed in seeds])
        for start, values in by_start.items()
    }
    return Response([str(k) if k % 2 == 0 else "" for k in modes], curves, "accuracy", "accuracy against k")


def _claims(runs: list[Run], options: argparse.Namespace) -> list[Claim]:
    separations = {
        kind: [run.rises.separation for run in runs if (run.loss, run.variant) == kind]
        for kind in {(run.loss, run.variant) for run in runs}
    }
    return [
        average(
            f"{loss}_separation", f"{settings.title}: time between modes over rise width, median over modes",
            separations[loss, "small"], ">=", MIN_SEPARATION[loss], options.seeds, VARIANT_TITLES["ordinary"],
            separations[loss, "ordinary"],
        )
        for loss, settings in ALL_LOSS_SETTINGS.items()
    ]  # fmt: skip


FIGURE = PaperFigure("middle_scale", __doc__, PAPER, MIDDLE_PROFILES, produce)

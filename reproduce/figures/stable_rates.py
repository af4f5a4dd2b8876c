"""Predicted and measured stability limits of the learning rate (not in the paper).

``stepwise forecast`` predicts two learning rates before training. Above the *limit*, at least half of small
initialisations diverge with frozen features. The *safe* rate is half of the rate below which none diverges on any
batch; the factor allows for changing features. Small ResNets are trained for 100 steps at multiples of the limit and at
0.8 times the safe rate: Barlow Twins without momentum (as configured) and with momentum 0.9, and VICReg with its
configured momentum. Training has diverged if the loss is not finite or has grown a thousandfold. Rates between the safe
rate and the limit are shown without a claim.

SimCLR with cosine similarity does not diverge and has no limit.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure

from reproduce.claims import Claim, seeds_text, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import LOSS_SETTINGS
from reproduce.options import data_name
from reproduce.processes import map_parallel
from stepwise_lightning.errors import DivergedError, UserError
from stepwise_lightning.forecasts.simulate import forecast, unseen_batches
from stepwise_lightning.losses import LOSSES
from stepwise_lightning.modules import JointEmbedding

PAPER = "Not in the paper: an application of its theory."
# Title, loss, and momentum if it differs from the configuration.
KINDS = {
    "barlow_twins": (LOSSES["barlow_twins"].title, "barlow_twins", None),
    "barlow_twins_momentum": (f"{LOSSES['barlow_twins'].title}, momentum 0.9", "barlow_twins", 0.9),
    "vicreg": (LOSSES["vicreg"].title, "vicreg", None),
}
SAFE, BEYOND = 0.8, 1.25  # multiple of the safe rate that must train, and of the limit that must not
OF_LIMIT = (0.5, 0.64, 0.8, 1.0, BEYOND, 1.6)
STEPS = 100
DIVERGED = 1e3  # multiple of the first loss
COLUMNS = ["kind", "seed", "momentum", "safe", "limit", "learning_rate", "of_safe", "of_limit", "steps", "loss"]


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Predict both rates of every network, and train it at multiples of them."""
    runs = {
        (run.loss, run.seed): run for run in trained_runs(options, [("barlow_twins", "small"), ("vicreg", "small")])
    }
    items = [(kind, runs[loss, seed]) for kind, (_, loss, _) in KINDS.items() for seed in options.seeds]
    rows = [row for part in map_parallel(train_at_rates, items, "stable_rates") for row in part]
    return Outcome(_figure(rows, options), COLUMNS, rows, _claims(rows, options), _summaries(rows))


def train_at_rates(kind: str, run: Run) -> list[list[Any]]:
    """Return rows of ``COLUMNS`` with the number of steps before divergence at each rate."""
    module = _module(kind, run, None)
    stable = forecast(module, unseen_batches(run.data), STEPS).rates
    if not math.isfinite(stable.limit):
        raise UserError(
            f"no stability limit for {KINDS[kind][0]}, seed {run.seed}: fewer than half of the initialisations "
            "diverged at every simulated rate; choose other seeds or data"
        )
    rows = []
    for rate in (SAFE * stable.safe, *(share * stable.limit for share in OF_LIMIT)):
        steps, loss = _train(_module(kind, run, rate), run)
        rows.append([
            kind, run.seed, module.hparams["momentum"], stable.safe, stable.limit, rate, round(rate / stable.safe, 4),
            round(rate / stable.limit, 4), steps, loss,
        ])  # fmt: skip
    return rows


def _module(kind: str, run: Run, rate: float | None) -> JointEmbedding:
    """Return the untrained network, with the configured or another learning rate."""
    _, loss, momentum = KINDS[kind]
    changes = {"learning_rate": rate, "momentum": momentum}
    settings = {name: value for name, value in run.module.hparams.items() if name != "encoder"}
    settings |= {name: value for name, value in changes.items() if value is not None}
    return LOSS_SETTINGS[loss].module(run.encoder(), **settings)


class _StopOnDivergence(L.Callback):
    """Stop training when the loss has grown a thousandfold."""

    def __init__(self) -> None:
        self.first = self.last = math.nan

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.last = float(outputs["loss"])
        self.first = self.last if math.isnan(self.first) else self.first
        trainer.should_stop = self.diverged

    @property
    def diverged(self) -> bool:
        return not self.last <= DIVERGED * self.first


def _train(module: JointEmbedding, run: Run) -> tuple[int, float]:
    """Return the number of steps before divergence, at most ``STEPS``, and the last loss."""
    monitor = _StopOnDivergence()
    trainer = L.Trainer(
        max_steps=STEPS, accelerator="cuda" if torch.cuda.is_available() else "cpu", devices=1, callbacks=[monitor],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=run.data)
    except DivergedError:
        return trainer.global_step, math.inf
    return (trainer.global_step - 1 if monitor.diverged else STEPS), monitor.last


def _claims(rows: list[list[Any]], options: argparse.Namespace) -> list[Claim]:
    claims = []
    for kind, (title, *_) in KINDS.items():
        steps = {
            name: [row[8] for row in rows if row[0] == kind and math.isclose(row[column], share, rel_tol=1e-3)]
            for name, column, share in (("safe", 6, SAFE), ("beyond", 7, BEYOND))
        }
        claims.append(worst(
            kind, f"{title}: steps out of {STEPS} at {SAFE} times the safe rate", steps["safe"], ">=", STEPS,
            options.seeds, f"at {BEYOND} times the limit", steps["beyond"],
        ))  # fmt: skip
    return claims


def _summaries(rows: list[list[Any]]) -> list[dict[str, Any]]:
    """Return the number of seeds that trained to the end, by kind and rate."""
    table = []
    for kind in KINDS:
        chosen = [row for row in rows if row[0] == kind]
        entry: dict[str, Any] = {"kind": kind, "seeds": len({row[1] for row in chosen})}
        entry["safe / limit"] = ", ".join(f"{row[3] / row[4]:.2f}" for row in chosen if math.isclose(row[7], BEYOND))
        entry[f"trained at {SAFE} safe"] = sum(row[8] == STEPS for row in chosen if math.isclose(row[6], SAFE))
        for share in OF_LIMIT:
            entry[f"at {share:g} limit"] = sum(row[8] == STEPS for row in chosen if math.isclose(row[7], share))
        table.append(entry)
    return table


def _figure(rows: list[list[Any]], options: argparse.Namespace) -> Figure:
    """Plot the number of steps before divergence against the learning rate in units of the limit."""
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    axes: Any = figure.subplots(1, len(KINDS), sharey=True)
    for ax, (kind, (title, *_)) in zip(axes, KINDS.items(), strict=True):
        for index, seed in enumerate(options.seeds):
            chosen = sorted((row for row in rows if row[:2] == [kind, seed]), key=lambda row: row[5])
            x, steps = [row[7] for row in chosen], [max(row[8], 1) for row in chosen]
            ax.plot(x, steps, marker="os^Dv*"[index % 6], color=f"C{index}", linewidth=1, label=f"seed {seed}")
            ax.axvline(chosen[0][3] / chosen[0][4], color=f"C{index}", linewidth=1, linestyle=":")
        ax.axvline(1, color="0.4", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="learning rate / limit", title=title, ylim=(0.9, 1.3 * STEPS))
        ticks = [0.1, 0.2, 0.5, 1]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_yticks([1, 10, STEPS], ["1", "10", f"{STEPS}, or more"])
    axes[0].set_ylabel("steps before training diverges")
    axes[-1].legend(frameon=False, loc="lower left")
    figure.suptitle("Stability limits of the learning rate, predicted before training")
    figure.supxlabel(
        f"ResNet on {data_name(options.data)}, {seeds_text(options.seeds)}; line: limit for frozen features; "
        "dotted: safe rate of each seed", fontsize="small", color="0.3",
    )  # fmt: skip
    return figure


FIGURE = PaperFigure("stable_rates", __doc__, PAPER, PROFILES, produce)

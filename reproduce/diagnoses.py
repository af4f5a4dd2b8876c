"""Diagnose runs with planted causes: ``python -m reproduce.diagnoses``.

A small ResNet is trained for a few tens of steps with one cause of a loss that does not decrease, and is diagnosed from
its record, weights and data. Healthy runs are diagnosed half-way to the first and the second mode, where the expected
step of this mode is compared with the measured one. A run takes 3 to 15 s of CPU time. ``--table`` prints the confusion
table and the errors of a file of results.
"""

from __future__ import annotations

import argparse
import copy
import csv
import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
from torch import Tensor, nn

from reproduce.control_data import WrongPairs
from reproduce.losses import dcl_loss, lejepa_loss
from stepwise_lightning import (
    BarlowTwins,
    Diagnosis,
    Encoder,
    JointEmbedding,
    SimCLR,
    SpectrumLogger,
    SpectrumRecord,
    TwoViewDataModule,
    VICReg,
    diagnose,
    forecast,
)
from stepwise_lightning.errors import DivergedError
from stepwise_lightning.forecasts.simulate import unseen_batches

_PAIRS, _BATCH = 2048, 32
_HEALTHY, _FEW = "nothing is wrong", "few modes can grow"
COLUMNS = ["cause", "loss", "data", "seed", "verdict", "found", "num_learned", "step", "expected", "measured"]


class Setting(NamedTuple):
    """Module, its arguments, arguments of the encoder, and number of steps of a healthy run."""

    module: Callable[..., JointEmbedding]
    settings: dict[str, Any]
    encoder: dict[str, Any]
    num_steps: int


_COSINE = {"projector_depth": 1, "alpha": 1e-4, "bias_norm": 1.0}
_LAST = {"projector_depth": 2, "alpha": 1e-3}
SETTINGS = {
    "barlow_twins": Setting(
        BarlowTwins, {"learning_rate": 0.004, "off_diagonal_weight": 1.0, "normalize": False, "center": True}, _LAST,
        150,
    ),
    "vicreg": Setting(VICReg, {"learning_rate": 1e-3, "momentum": 0.9, "eps": 0.01}, _LAST, 80),
    "simclr": Setting(SimCLR, {"learning_rate": 3e-4, "momentum": 0.9, "temperature": 0.2}, _COSINE, 250),
    "dcl": Setting(
        partial(JointEmbedding, loss=dcl_loss, driven_matrix="tangent_covariance"), {"learning_rate": 0.0015}, _COSINE,
        250,
    ),
    "lejepa": Setting(
        partial(JointEmbedding, loss=partial(lejepa_loss, sigreg_weight=1e-5), driven_matrix="covariance"),
        {"learning_rate": 0.0004}, _LAST, 150,
    ),
}  # fmt: skip
_THREE = ["barlow_twins", "vicreg", "simclr"]
# Losses for which a cause keeps the first mode from being learned, and changes of the arguments of the module.
PLANTED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "the learning rate is too low": (_THREE, {"learning_rate": 0.01}),  # relative
    "the learning rate is too high": (_THREE[:2], {}),  # 1.5 times the limit
    "weight decay is not below the growth rate": (_THREE, {}),  # 1.5 times the largest growth rate
    "pairs share nothing beyond chance": (["barlow_twins", "simclr", "dcl"], {}),
    "features are equal for all images": (_THREE, {}),  # dead units before the last layer
    "features are equal for all images (normalisation)": (_THREE, {}),  # of groups of one value, leaves 1e-5
    "features are equal for all images (constant output)": (_THREE, {}),
    "half precision loses small differences": (["simclr", "dcl"], {}),
    "no mode can grow": (["vicreg", "lejepa"], {"variance_weight": 0.01}),  # LeJEPA has a small weight
    _FEW: (["vicreg"], {}),  # frozen features; trained ones change, until another mode grows
    _HEALTHY: (_THREE, {}),
}
_NUM_STEPS, _NUM_FEW_STEPS = 60, 400  # of a run with a planted cause, and of one that learns some modes


def main(arguments: list[str] | None = None) -> None:
    """Train and diagnose runs, and append one row for each diagnosis; or print the tables."""
    parser = argparse.ArgumentParser("python -m reproduce.diagnoses", description=__doc__)
    parser.add_argument("--data", default="photos", help="photos, cifar10, stl10 or a folder of images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--causes", nargs="+", default=list(PLANTED), choices=list(PLANTED), metavar="CAUSE")
    parser.add_argument("--out", type=Path, default=Path("diagnoses.csv"), help="table, to which rows are added")
    parser.add_argument("--table", action="store_true", help="print the tables of --out, without training")
    options = parser.parse_args(arguments)
    if options.table and not options.out.is_file():
        parser.error(f"there is no {options.out}: train the runs first, without --table")
    for seed in options.seeds if not options.table else ():
        for cause in options.causes:
            for loss in PLANTED[cause][0]:
                for row in diagnosed(cause, loss, options.data, seed):
                    print(*row, sep=", ", flush=True)
                    _append(options.out, row)
    if options.table:
        print(tables(options.out))


def diagnosed(cause: str, loss: str, data: str, seed: int) -> list[list[Any]]:
    """Train one run, and return a row of ``COLUMNS`` for each diagnosis."""
    module, images, precision = _planted(cause, loss, data, seed)
    initial = copy.deepcopy(module.state_dict())
    num_steps = {_HEALTHY: SETTINGS[loss].num_steps, _FEW: _NUM_FEW_STEPS}.get(cause, _NUM_STEPS)
    record, weights = _trained(module, images, num_steps, precision)
    source = [cause, loss, Path(data).name, seed]
    options: dict[str, Any] = {"precision": precision, "num_feature_pairs": _PAIRS}
    module.trainer = None
    if cause == _HEALTHY:
        return [source + row for row in _half_way(module, images, record, weights, num_steps)]
    failed = diagnose(record, module).verdict in ("fell_back", "diverged")
    module.load_state_dict(initial if failed else list(weights.values())[-1])
    options["max_steps"] = num_steps * (2 if cause == _FEW else 1)  # training goes on
    result = diagnose(record, module.float(), unseen_batches(images), start=0 if failed else None, **options)
    return [source + _row(result, math.nan)]


def _planted(cause: str, loss: str, data: str, seed: int) -> tuple[JointEmbedding, TwoViewDataModule, str]:
    """Return a module, its data and the precision of training, with one cause."""
    settings, kind = SETTINGS[loss].settings, WrongPairs if cause.startswith("pairs") else TwoViewDataModule
    changes = dict(PLANTED[cause][1]) if loss != "lejepa" else {}
    if cause == "the learning rate is too low":
        changes = {"learning_rate": 0.01 * settings["learning_rate"]}
    module, images = _built(loss, data, seed, kind, changes)
    if cause in ("the learning rate is too high", "weight decay is not below the growth rate"):
        before = forecast(module, unseen_batches(images), _NUM_STEPS, num_pairs=_PAIRS)
        changes = {"weight_decay": 1.5 * float(before.growth_rates[0])}
        if cause == "the learning rate is too high":
            changes = {"learning_rate": 1.5 * before.rates.limit}
        module, images = _built(loss, data, seed, kind, changes)
    if cause == _FEW:
        weight, rate = _weight_of_one_mode(data, seed)
        module, images = _built(loss, data, seed, kind, {"variance_weight": weight, "learning_rate": 0.015 / rate})
        module.encoder.get_submodule("backbone").requires_grad_(False)
    network: Any = module.encoder.get_submodule("backbone.network")
    if cause.endswith("(normalisation)"):
        network.fc = nn.GroupNorm(64, 64)
    elif cause.endswith("(constant output)"):
        network.fc = nn.Threshold(1e3, 1.0)
    elif cause == "features are equal for all images":
        for name, layer in module.named_modules():
            if isinstance(layer, nn.BatchNorm2d) and "layer4" in name:
                nn.init.constant_(layer.bias, -10.0)
    return module, images, "bf16-true" if cause.startswith("half") else "32-true"


def _weight_of_one_mode(data: str, seed: int) -> tuple[float, float]:
    """Return a weight of VICReg's variance term with which one mode grows, and its growth rate."""

    def rates(weight: float) -> list[float]:
        module, images = _built("vicreg", data, seed, TwoViewDataModule, {"variance_weight": weight})
        return forecast(module, unseen_batches(images), _NUM_STEPS, num_pairs=_PAIRS).growth_rates.tolist()

    limits = []
    for mode in range(2):
        low, high = 0.01, 25.0
        for _ in range(8):
            weight = math.sqrt(low * high)
            low, high = (low, weight) if rates(weight)[mode] > 1e-6 else (weight, high)  # rates of size 1
        limits.append(low)
    weight = math.sqrt(math.prod(limits))
    return weight, rates(weight)[0]


def _built(
    loss: str, data: str, seed: int, kind: type[TwoViewDataModule], changes: dict[str, Any]
) -> tuple[JointEmbedding, TwoViewDataModule]:
    L.seed_everything(seed, verbose=False)
    encoder = Encoder(out_features=10, backbone="resnet_small", hidden_features=128, **SETTINGS[loss].encoder)
    module = SETTINGS[loss].module(encoder, **SETTINGS[loss].settings | changes)
    images = kind(data=data, augmentation="weak", image_size=16, global_batch_size=_BATCH, seed=seed)
    images.setup("fit")
    return module, images


class _Weights(L.Callback):
    """Keep the weights every four steps, and at the end."""

    def __init__(self) -> None:
        self.kept: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % 4 == 0 or trainer.global_step == trainer.max_steps:
            self.kept[trainer.global_step] = copy.deepcopy(pl_module.state_dict())


def _trained(
    module: JointEmbedding, images: TwoViewDataModule, num_steps: int, precision: Any
) -> tuple[SpectrumRecord, dict[int, dict[str, Tensor]]]:
    """Train; return the record and weights by step."""
    assert module.driven_matrix is not None
    spectra = SpectrumLogger(matrices=[module.driven_matrix], num_points=60, center=module.hparams.get("center", False))
    weights = _Weights()
    with TemporaryDirectory() as folder, suppress(DivergedError):
        trainer = L.Trainer(
            default_root_dir=folder, max_steps=num_steps, accelerator="cpu", precision=precision, logger=False,
            callbacks=[spectra, weights], enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=images)
    return spectra.record, weights.kept


def _half_way(
    module: JointEmbedding,
    images: TwoViewDataModule,
    record: SpectrumRecord,
    weights: dict[int, dict[str, Tensor]],
    num_steps: int,
) -> list[list[Any]]:
    """Return results of diagnoses half-way to the first and the second mode."""
    assert module.driven_matrix is not None
    times = record.detect_steps(module.driven_matrix).step_times / module.hparams["learning_rate"]
    rows, before = [], 0.0
    for mode in range(2):
        measured = float(times[mode])
        if not math.isfinite(measured):
            break
        step = min(weights, key=lambda kept: abs(kept - (before + measured) / 2))
        module.load_state_dict(weights[step])
        until = int((record.steps <= step).sum())
        partial_record = SpectrumRecord.from_arrays({name: x[:until] for name, x in record.arrays().items()})
        result = diagnose(
            partial_record, module, unseen_batches(images), start=step, max_steps=4 * num_steps,
            num_feature_pairs=_PAIRS,
        )  # fmt: skip
        rows.append(_row(result, measured))
        before = measured
    return rows


def _row(result: Diagnosis, measured: float) -> list[Any]:
    expected = [round(result.next_step, 1), round(measured, 1)]
    return [result.verdict, result.cause or "unknown", result.num_learned, result.step, *expected]


def _append(path: Path, row: list[Any]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, row] if is_new else [row])


def tables(path: Path) -> str:
    """Return the confusion table of planted and found causes in Markdown, and the errors of expected steps."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = ["| planted | runs | found | otherwise |", "|---|---|---|---|"]
    for cause in PLANTED:
        chosen = [row for row in rows if row["cause"] == cause]
        right = [row for row in chosen if _is_right(row)]
        others = Counter(f"{row['verdict']}, {row['found']}" for row in chosen if not _is_right(row))
        text = "; ".join(f"{count} × {name}" for name, count in others.items())
        lines.append(f"| {cause} | {len(chosen)} | {len(right)} | {text} |")
    planted = [row for row in rows if row["cause"] != _HEALTHY]
    share = sum(_is_right(row) for row in planted) / max(len(planted), 1)
    lines.append(f"\n{share:.0%} of {len(planted)} planted causes are found.")
    for mode in ("0", "1"):
        errors = [
            abs(float(row["expected"]) / float(row["measured"]) - 1)
            for row in rows
            if row["cause"] == _HEALTHY and row["num_learned"] == mode
        ]
        if errors:
            within = sum(error <= 0.2 for error in errors)
            lines.append(
                f"Mode {int(mode) + 1}: median error of the expected step {statistics.median(errors):.0%}, "
                f"{within} of {len(errors)} within 20 %."
            )
    return "\n".join(lines)


def _is_right(row: dict[str, str]) -> bool:
    """Return True for the planted cause; for healthy runs, for no alarm."""
    if row["cause"] == _HEALTHY:
        return row["verdict"] in ("learning", "plateau") and row["found"] in (_HEALTHY, "unknown")
    return row["cause"].startswith(row["found"])


if __name__ == "__main__":
    for logger in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    main()

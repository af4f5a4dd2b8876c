"""A wide network learns the embedding that its tangent kernel predicts (kernel section of the paper, and its appendix).

A one-hidden-layer ReLU network is trained on pairs of random crops by full-batch gradient descent on the analytical
Barlow Twins loss. Before training, contrastive kernel PCA with the tangent kernel at initialisation predicts the final
embedding and when each mode is learned; afterwards the tangent kernel of the trained network gives a second prediction.
Both are compared with what was learned, as subspaces, restricted to learned modes.

Published: width 2048, 50 images, one random crop per view, 7000 epochs, 10 dimensions, small initialisation. Not stated
there, ours: 20×20 crops, the learning rate (from 4 × rate × γ_1), and what is made small. *Lazy*: the last layer alone,
× 1e-4, so that features hardly move. *Rich*: all weights × 0.1, so that they do.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from reproduce.common import Claim, data_name, print_table, quiet_lightning, report, write_outputs
from stepwise_lightning import BarlowTwins, FixedCropPairs, SpectrumLogger
from stepwise_lightning.encoders import MLP, scale_last_layer
from stepwise_lightning.plots import Trajectory, alignment_figure
from stepwise_lightning.schedule import log_spaced_steps
from stepwise_lightning.spectrum import crossing_times
from stepwise_lightning.theory import ContrastiveKernelPCA, EmpiricalNTK, subspace_alignment

# most_untrained bounds the baseline: with few modes, an untrained network is near the closed form by chance.
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(num_pairs=20, crop_size=6, dim=3, width=512, steps=1500, most_untrained=0.95),
    "cpu": dict(num_pairs=50, crop_size=20, dim=10, width=2048, steps=7000, most_untrained=0.6),
}
# 4 × learning rate × γ_1 at initialisation. In the rich variant γ grows during training, by a factor of about ten.
RELATIVE_RATES = {"lazy": 0.25, "rich": 0.02}
LAST_LAYER, ALL_WEIGHTS = 1e-4, 0.1
# Modes whose eigenvalue of C is above this are learned: it ends at 1.
LEARNED = 0.5


@dataclass
class Run:
    """One variant and seed: the network, its prediction, and what came of it."""

    variant: str
    seed: int
    module: BarlowTwins
    pairs: FixedCropPairs
    before: ContrastiveKernelPCA
    start: Tensor  # initial singular values, (d,)
    embeddings: list[Tensor] = field(default_factory=list)  # at the logged steps, (2n, d) each

    @property
    def name(self) -> str:
        """What TensorBoard calls it."""
        return f"{self.variant}_seed{self.seed}"


class Embeddings(L.Callback):
    """Keeps the embeddings of both views at the steps that the spectra are logged at."""

    def __init__(self, run: Run, steps: list[int]) -> None:
        self.run, self.steps = run, set(steps)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Embed, before the step that follows."""
        if trainer.global_step in self.steps:
            self.run.embeddings.append(embed(self.run))

    def on_train_end(self, *_: Any) -> None:
        """Embed with the final weights."""
        self.run.embeddings.append(embed(self.run))


@torch.no_grad()
def embed(run: Run) -> Tensor:
    """Return the embeddings of both views, (2n, d)."""
    return torch.cat([run.module(run.pairs.x1), run.module(run.pairs.x2)]).double()


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return 0 if every claim holds, 1 if one fails, 2 for bad input."""
    options = _parser().parse_args(arguments)
    quiet_lightning()
    torch.set_num_threads(1)  # two threads would compete where runs go side by side, and gain little
    for name, value in PROFILES[options.profile].items():
        setattr(options, name, value)
    directory, started = Path(options.out) / "kernel_mlp", time.perf_counter()
    try:
        runs = [_prepared(variant, seed, options) for seed in options.seeds for variant in RELATIVE_RATES]
        directory.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = [_result(run, _train(run, options, directory)) for run in runs]
    claims = _claims(results, options.most_untrained)
    figure = alignment_figure(
        [_trajectory(result) for result in results if result["seed"] == options.seeds[0]],
        [result["alignments"] for result in results if result["seed"] == options.seeds[0]],
        title="A wide network learns what its tangent kernel predicts",
        note=f"{options.num_pairs} pairs of {options.crop_size}×{options.crop_size} crops, "
        f"{data_name(options.data)}; "
        f"width {options.width}; seed {options.seeds[0]}; alignments are restricted to the modes learned so far",
    )
    columns = ["variant", "seed", "step", "time", "quantity", "mode", "value"]
    table = [{k: v for k, v in result.items() if k not in ("log", "alignments", "run")} for result in results]
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "seeds", "data", "root", "download")}
    write_outputs(
        directory, figure, columns, (row for result in results for row in _rows(result)), claims,
        name="kernel_mlp", data_set=options.data, seeds=options.seeds, runs=table,
        settings=settings | {"relative_rates": RELATIVE_RATES, "last_layer": LAST_LAYER, "all_weights": ALL_WEIGHTS},
        seconds=round(time.perf_counter() - started, 1),
    )  # fmt: skip
    print_table(table)
    return report(directory, claims)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kernel_mlp", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=PROFILES, default="cpu", help="size of the experiment (default: cpu)")
    parser.add_argument("--data", default="photos", help="photos, cifar10, or a folder of images (default: photos)")
    parser.add_argument("--out", default="results", help="folder for the outputs (default: results)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of crops and weights (default: 0 1 2)")
    parser.add_argument("--root", default="data", help="where cifar10 lies (default: data)")
    parser.add_argument("--download", action="store_true", help="fetch cifar10 if it is not there (170 MB)")
    return parser


def _prepared(variant: str, seed: int, options: argparse.Namespace) -> Run:
    """Draw data and network, and predict, before anything is trained."""
    pairs = FixedCropPairs(
        options.data, options.num_pairs, options.crop_size, seed, options.steps, options.root, options.download
    )
    pairs.prepare_data()
    pairs.setup()
    encoder = MLP(3 * options.crop_size**2, [options.width], options.dim, seed=seed)
    if variant == "lazy":
        scale_last_layer(encoder, LAST_LAYER)
    else:
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.mul_(ALL_WEIGHTS)
    # A copy: the kernel at initialisation must not follow the training.
    before = ContrastiveKernelPCA(EmpiricalNTK(copy.deepcopy(encoder)), options.dim).fit(pairs.x1, pairs.x2)
    rate = RELATIVE_RATES[variant] / (4 * float(before.eigenvalues_[0]))
    module = BarlowTwins(encoder, rate, off_diagonal_weight=1.0, normalize=False)
    with torch.no_grad():
        start = before.initial_singular_values(encoder(pairs.x1), encoder(pairs.x2))
    return Run(variant, seed, module, pairs, before, start)


def _train(run: Run, options: argparse.Namespace, directory: Path) -> SpectrumLogger:
    spectra = SpectrumLogger(
        matrices=["cross_correlation"], num_points=150,
        prediction=lambda t: run.before.embedding_eigenvalues(t, run.start),
    )  # fmt: skip
    logger = TensorBoardLogger(directory / "tensorboard", name=run.name, default_hp_metric=False)
    steps = [step for step in log_spaced_steps(options.steps, 150) if step < options.steps]
    trainer = L.Trainer(
        max_steps=options.steps, accelerator="cpu", logger=logger, enable_checkpointing=False,
        callbacks=[spectra, Embeddings(run, steps), TQDMProgressBar(refresh_rate=max(1, options.steps // 50))],
        enable_model_summary=False, limit_val_batches=0, log_every_n_steps=50,
    )  # fmt: skip
    print(f"training {run.name}: {options.steps} steps")
    trainer.fit(run.module, datamodule=run.pairs)
    return spectra


def _result(run: Run, log: SpectrumLogger) -> dict[str, Any]:
    """Compare what was learned with what both kernels predict."""
    times, measured = torch.tensor(log.times, dtype=torch.float64), torch.stack(log.eigenvalues["cross_correlation"])
    crossed = crossing_times(times, measured, LEARNED)
    learned = [int((values > LEARNED).sum()) for values in measured]
    dim = measured.shape[1]
    after = ContrastiveKernelPCA(EmpiricalNTK(run.module.encoder), dim).fit(run.pairs.x1, run.pairs.x2)
    predictions = {
        "tangent kernel at initialisation": torch.cat(
            [run.before.transform(run.pairs.x1), run.before.transform(run.pairs.x2)]
        ),
        "tangent kernel after training": torch.cat([after.transform(run.pairs.x1), after.transform(run.pairs.x2)]),
    }
    alignments = {
        name: np.array([_alignment(f, g, k) for f, k in zip(run.embeddings, learned, strict=True)])
        for name, g in predictions.items()
    }
    untrained = [_alignment(run.embeddings[0], predictions["tangent kernel after training"], k) for k in learned]
    alignments["untrained network, with the latter"] = np.array(untrained)
    final = learned[-1]
    errors = ((run.before.step_times(run.start) - crossed) / crossed)[:final]
    return {
        "variant": run.variant,
        "seed": run.seed,
        "learning_rate": run.module.hparams["learning_rate"],
        "modes_learned": final,
        "alignment_at_initialisation": float(alignments["tangent kernel at initialisation"][-1]),
        "alignment_after_training": float(alignments["tangent kernel after training"][-1]),
        "untrained": untrained[-1],
        "largest_step_time_error": float(errors.abs().max()) if final else float("nan"),
        "log": log,
        "run": run,
        "alignments": alignments,
    }


def _alignment(f: Tensor, g: Tensor, learned: int) -> float:
    """Return the alignment of the first ``learned`` principal directions of f with as many modes of g; NaN for none."""
    if not learned:
        return float("nan")
    directions = torch.linalg.svd(f, full_matrices=False).U[:, :learned]
    return float(subspace_alignment(directions, g[:, :learned]))


def _claims(results: list[dict[str, Any]], most_untrained: float) -> list[Claim]:
    lazy = [result for result in results if result["variant"] == "lazy"]
    seeds = f"seeds {', '.join(str(result['seed']) for result in lazy)}"

    def least(name: str, description: str, key: str, of: list[dict[str, Any]], bound: float) -> Claim:
        return Claim(name, f"{description}, least of {seeds}", min(result[key] for result in of), ">=", bound)

    at_start, at_end = "alignment_at_initialisation", "alignment_after_training"
    untrained = max(result["untrained"] for result in results)
    errors = max(result["largest_step_time_error"] for result in lazy)
    return [
        least("lazy_initial", "lazy: alignment with the kernel at initialisation", at_start, lazy, 0.95),
        least("final", "lazy and rich: alignment with the kernel after training", at_end, results, 0.98),
        Claim("untrained", f"the same of the untrained network, most of {seeds}", untrained, "<=", most_untrained),
        Claim("step_times", f"lazy: largest relative error of a predicted step time, {seeds}", errors, "<=", 0.2),
    ]


def _trajectory(result: dict[str, Any]) -> Trajectory:
    log, run = result["log"], result["run"]
    return Trajectory(
        title=f"{result['variant']}: {result['modes_learned']} modes learned",
        times=np.array(log.times),
        losses=np.array(log.losses),
        eigenvalues=torch.stack(log.eigenvalues["cross_correlation"]).numpy(),
        theory_eigenvalues=log.predicted(log.times).numpy(),
        step_times=run.before.step_times(run.start).numpy(),
    )


def _rows(result: dict[str, Any]) -> list[list[Any]]:
    log, rows = result["log"], []
    for index, (step, time_) in enumerate(zip(log.steps, log.times, strict=True)):
        head = [result["variant"], result["seed"], step, time_]
        rows.append([*head, "loss", "", log.losses[index]])
        rows += [[*head, f"alignment: {name}", "", values[index]] for name, values in result["alignments"].items()]
        values = log.eigenvalues["cross_correlation"][index].tolist()
        rows += [[*head, "eigenvalue", mode, value] for mode, value in enumerate(values)]
        predicted = log.predicted([time_])[0].tolist()
        rows += [[*head, "predicted_eigenvalue", mode, value] for mode, value in enumerate(predicted)]
    return rows


if __name__ == "__main__":
    sys.exit(main())

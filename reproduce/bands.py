"""Train the runs of reference bands: ``python -m reproduce.bands CONFIGURATION …``.

For each configuration ten seeds are the reference runs, further seeds are held back, and each negative control has one
difference from the configuration. The reference runs are written to ``stepwise_lightning/bands``, the others to
``reproduce/results/bands``. The output is the share of held-back runs inside the band, with its exact 95 % interval,
and the verdict on each control.

Networks are trained with ``stepwise fit``, one run at a time; a second call resumes. The linear model is trained by
gradient descent with the weights and pairs of its configuration, in the eigenbasis of Γ and in float64: about a second
for each run. The eigenvalues of training with Lightning differ by less than 1e-5 (``test_stored_bands.py``).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from scipy.stats import binomtest

from reproduce.networks.runs import Run
from reproduce.networks.training import CONFIGS
from reproduce.networks.variants import VARIANT_TITLES
from reproduce.processes import Progress, start_forkserver
from stepwise_lightning import FixedCropPairs, LinearEncoder, SpectrumRecord
from stepwise_lightning.spectrum import ReferenceBand
from stepwise_lightning.spectrum.schedule import log_spaced_steps
from stepwise_lightning.theory import feature_cross_correlation

ROOT = Path(__file__).parents[1]
BANDS, RESULTS = ROOT / "stepwise_lightning" / "bands", ROOT / "reproduce" / "results" / "bands"
NUM_REFERENCES, NUM_POINTS = 10, 100
# Directions of Γ with smaller eigenvalues, as a share of the largest, do not grow during the run.
_SMALL_GAMMA = 1e-3
LINEAR = "linear"


class Setting(NamedTuple):
    """Matrix, threshold θ, number of held-back seeds and negative controls of a configuration."""

    matrix: str
    threshold: float
    num_held_back: int
    controls: tuple[str, ...]


_CONTROLS = ("ordinary", "fast", "wrong_pairs", "noise_images")
SETTINGS = {
    LINEAR: Setting("cross_correlation", 0.1, 40, _CONTROLS),
    "barlow_twins": Setting("cross_correlation", 0.1, 6, (*_CONTROLS, "no_off_diagonal", "published_loss")),
    "vicreg": Setting("covariance", 0.2, 6, (*_CONTROLS, "no_covariance")),
    "spectral_contrastive": Setting("cross_correlation", 0.1, 6, _CONTROLS),
    "simclr": Setting("tangent_covariance", 0.03, 6, _CONTROLS),
}


def main(arguments: list[str] | None = None) -> None:
    """Train missing runs, write the bands and print the verdicts."""
    parser = argparse.ArgumentParser("python -m reproduce.bands", description=__doc__)
    parser.add_argument("names", nargs="+", choices=SETTINGS, metavar="CONFIGURATION", help=", ".join(SETTINGS))
    parser.add_argument("--out", default="results", help="folder of trained networks (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in options.names:
        setting = SETTINGS[name]
        kinds = [("small", seed) for seed in range(NUM_REFERENCES + setting.num_held_back)]
        kinds += [(control, 0) for control in setting.controls]
        records = _linear_records(kinds) if name == LINEAR else _network_records(name, kinds, options.out)
        ends = (NUM_REFERENCES, NUM_REFERENCES + setting.num_held_back)
        for path, chosen in zip(paths(name), (slice(ends[0]), slice(*ends), slice(ends[1], None)), strict=True):
            ReferenceBand(path.stem, setting.matrix, setting.threshold, records[chosen]).save(path)
        print(report(name), flush=True)


def paths(name: str) -> tuple[Path, Path, Path]:
    """Return the files with the reference runs, the held-back runs and the controls of a configuration."""
    return BANDS / f"{name}_photos.npz", RESULTS / f"{name}_held_back.npz", RESULTS / f"{name}_controls.npz"


def report(name: str) -> str:
    """Return the coverage of the stored held-back runs, and the verdict on each stored control, one a line."""
    band, held_back, controls = map(ReferenceBand.load, paths(name))
    inside = [band.compare(record).inside for record in held_back.records]
    interval = binomtest(sum(inside), len(inside)).proportion_ci(method="exact")
    limits = f"{interval.low:.2f} to {interval.high:.2f}"
    lines = [f"{band.name}: {sum(inside)} of {len(inside)} held-back runs inside ({limits})"]
    for control, record in zip(SETTINGS[name].controls, controls.records, strict=True):
        lines.append(f"{band.name}, {VARIANT_TITLES[control]}: {band.compare(record).description}")
    return "\n".join(lines)


def _network_records(name: str, kinds: list[tuple[str, int]], out: str) -> list[SpectrumRecord]:
    options = argparse.Namespace(profile="cpu", data="photos", root="data", out=out, launcher="")
    runs = [Run(name, variant, seed, options) for variant, seed in kinds]
    missing = [run for run in runs if not run.is_finished()]
    if missing:
        start_forkserver()
    with Progress(name, len(runs), completed=len(runs) - len(missing)) as progress:
        for run in missing:
            run.train(resume=True)
            progress.update()
    return [run.record for run in runs]


def _linear_records(kinds: list[tuple[str, int]]) -> list[SpectrumRecord]:
    config = yaml.safe_load((CONFIGS / "linear_photos.yaml").read_text(encoding="utf-8"))
    with Progress(LINEAR, len(kinds)) as progress:
        records = []
        for variant, seed in kinds:
            records.append(linear_record(config, variant, seed))
            progress.update()
    return records


def linear_record(config: dict[str, Any], variant: str, seed: int) -> SpectrumRecord:
    """Train the linear model of a configuration by gradient descent, and return the eigenvalues of C.

    The loss ‖C − I‖² with C = W Γ Wᵀ has the gradient 4 (C − I) W Γ.
    """
    model, steps = config["model"]["init_args"], config["trainer"]["max_steps"]
    pairs = FixedCropPairs(**config["data"]["init_args"], seed=seed)
    pairs.setup()
    x1, x2 = pairs.x1, pairs.x2
    if variant == "noise_images":
        x1, x2 = torch.rand(2, *x1.shape, generator=torch.Generator().manual_seed(seed))
    gamma, basis = torch.linalg.eigh(feature_cross_correlation(x1, x2.roll(1, 0) if variant == "wrong_pairs" else x2))
    kept = gamma.abs() > _SMALL_GAMMA * gamma[-1]
    encoder = model["encoder"]["init_args"] | ({"init_std": None} if variant == "ordinary" else {})
    weights = LinearEncoder(**encoder, seed=seed).weight.detach().double() @ basis[:, kept]
    rate = model["learning_rate"] * (4 if variant == "fast" else 1)
    measured, identity = log_spaced_steps(steps, NUM_POINTS), torch.eye(len(weights), dtype=torch.float64)
    matrices: list[torch.Tensor] = []
    for step in range(steps + 1):
        driven = weights * gamma[kept]
        c = driven @ weights.T
        if step == measured[len(matrices)]:
            matrices.append(c)
        weights = weights - 4 * rate * (c - identity) @ driven
    eigenvalues, at = torch.linalg.eigvalsh(torch.stack(matrices)).flip(1), torch.tensor(measured)
    return SpectrumRecord.of(rate * at.double(), eigenvalues, steps=at)


if __name__ == "__main__":
    main()

"""Compare training in ``bf16-mixed`` with float32, on photographs and a CPU, from the same initial weights.

For each loss: the step at which each of the first modes rises above a tenth of the largest eigenvalue at the end; and
the largest relative difference of the first eigenvalues of the last weights from float32: in the record of the
``bf16-mixed`` run, and with embeddings computed under autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import torch
from timing import quiet_lightning

from stepwise_lightning import SpectrumRecord, TwoViewDataModule, load_encoder
from stepwise_lightning.commands.lightning_cli import main as fit
from stepwise_lightning.features import capture
from stepwise_lightning.losses import LOSSES
from stepwise_lightning.runs.saved import configuration_of
from stepwise_lightning.spectrum import embedding_eigenvalues

PRECISIONS = ("32-true", "bf16-mixed")


def trained(loss: str, precision: str, num_steps: int, folder: Path) -> Path:
    """Train ``configs/<loss>_photos.yaml`` and return the folder of the run."""
    options = {"trainer.max_steps": num_steps, "trainer.precision": precision, "trainer.enable_progress_bar": "false"}
    options |= {"trainer.logger.init_args.save_dir": folder, "trainer.logger.init_args.name": f"{loss}_{precision}"}
    with contextlib.redirect_stdout(io.StringIO()):
        fit(["fit", f"--config={loss}_photos", *(f"--{name}={value}" for name, value in options.items())])
    return folder / f"{loss}_{precision}" / "version_0"


def step_times(record: SpectrumRecord, matrix: str, threshold: float, num_modes: int) -> list[str]:
    """Return the first measured step of each mode above a threshold, a dash for none."""
    above = record.eigenvalues(matrix)[:, :num_modes] > threshold
    return [str(int(torch.as_tensor(record.steps)[mode.nonzero()[0]])) if mode.any() else "–" for mode in above.T]


def differences(run: Path, num_modes: int) -> list[str]:
    """Return the relative differences of the first eigenvalues of the covariance: in the record, and under autocast."""
    settings = configuration_of(run / "checkpoints" / "last.ckpt")["data"]["init_args"]
    data = TwoViewDataModule(**settings)
    data.setup("fit")
    encoder = load_encoder(run).train()
    exact = embedding_eigenvalues(torch.cat(capture(encoder, data.probe_pairs(), [""])[""]))[:num_modes]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = embedding_eigenvalues(torch.cat(capture(encoder, data.probe_pairs(), [""])[""]))[:num_modes]
    recorded = SpectrumRecord.load(run / "spectrum.npz").eigenvalues("covariance")[-1, :num_modes]
    return [f"{float(((values - exact) / exact).abs().max()):.1g}" for values in (recorded, rounded)]


def main() -> None:
    """Print a row for each loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("losses", nargs="*", metavar="LOSS", help=", ".join(LOSSES))
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: 400)")
    parser.add_argument("--modes", type=int, default=3, help="number of modes (default: 3)")
    options = parser.parse_args()
    quiet_lightning()
    print(
        "| loss | steps, float32 | steps, bf16-mixed | difference in the record | under autocast |\n" + "|---" * 5 + "|"
    )
    for loss in options.losses or LOSSES:
        with tempfile.TemporaryDirectory() as folder:
            runs = [trained(loss, precision, options.steps, Path(folder)) for precision in PRECISIONS]
            records, matrix = [SpectrumRecord.load(run / "spectrum.npz") for run in runs], LOSSES[loss].driven_matrix
            threshold = 0.1 * float(records[0].eigenvalues(matrix)[-1, 0])
            steps = [", ".join(step_times(record, matrix, threshold, options.modes)) for record in records]
            print("| " + " | ".join([loss, *steps, *differences(runs[1], options.modes)]) + " |", flush=True)


if __name__ == "__main__":
    main()

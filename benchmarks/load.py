"""Time and memory of spectra of a very wide embedding: 8192 dimensions, 4096 probe pairs, all matrices and measures.

Memory is the growth of the process's peak over one training step with a measurement before and after it (limit 5 GB;
the embeddings in float64 and one matrix take 1.1 GB). The default size takes minutes.
"""

from __future__ import annotations

import sys
import tempfile
import time

import lightning as L
import torch
from timing import argument_parser, check, machine, peak_bytes, reset_peak_bytes

from stepwise_lightning import BarlowTwins, FixedCropPairs, LinearEncoder, SpectrumLogger


def main() -> int:
    """Print time and memory; return 1 if memory exceeds its limit."""
    parser = argument_parser(__doc__)
    parser.add_argument("--dimensions", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=4096)
    options = parser.parse_args()
    datasets = [FixedCropPairs(num_pairs=2048, seed=seed) for seed in range(-(-options.pairs // 2048))]
    for dataset in datasets:
        dataset.setup()
    probe = tuple(torch.cat([getattr(dataset, view) for dataset in datasets])[: options.pairs] for view in ("x1", "x2"))
    spectra = SpectrumLogger(probe=probe, num_points=2)  # type: ignore[arg-type]
    module = BarlowTwins(LinearEncoder(1200, options.dimensions, 1e-4), 1e-6, normalize=False)
    small = FixedCropPairs(num_pairs=32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            default_root_dir=folder, max_steps=1, accelerator="cpu", callbacks=[spectra], enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, log_every_n_steps=1, enable_checkpointing=False,
        )  # fmt: skip
        before, start = reset_peak_bytes(), time.perf_counter()
        trainer.fit(module, datamodule=small)
        seconds = time.perf_counter() - start
    per_measurement = seconds / len(spectra.record)
    print(f"{machine()}; {options.dimensions} dimensions, {options.pairs} pairs: "
          f"{len(spectra.record)} measurements, {per_measurement:.0f} s each")  # fmt: skip
    return 0 if check("peak memory, GB", (peak_bytes() - before) / 1e9, 5.0) else 1


if __name__ == "__main__":
    sys.exit(main())

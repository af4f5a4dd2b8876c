"""What the spectra of a very wide embedding cost: 8192 dimensions, 4096 probe pairs, all three matrices and measures.

Memory is the growth of the process's peak over one training step with a measurement before and after it (limit 5 GB, of
which the embeddings in float64 and one of the matrices are 1.1). Takes minutes; the size is an option.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time

import lightning as L
import torch
from timing import fresh_peak_bytes, peak_bytes, within

from stepwise_lightning import BarlowTwins, FixedCropPairs, LinearEncoder, SpectrumLogger


def main() -> int:
    """Print time and memory; return 1 if the limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=4096)
    options = parser.parse_args()
    draws = [FixedCropPairs(num_pairs=2048, seed=seed) for seed in range(-(-options.pairs // 2048))]
    for draw in draws:
        draw.setup()
    probe = tuple(torch.cat([getattr(d, view) for d in draws])[: options.pairs] for view in ("x1", "x2"))
    spectra = SpectrumLogger(probe=probe, num_points=2)  # type: ignore[arg-type]
    module = BarlowTwins(LinearEncoder(1200, options.dimensions, 1e-4), 1e-6, normalize=False)
    small = FixedCropPairs(num_pairs=32)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            default_root_dir=folder, max_steps=1, accelerator="cpu", callbacks=[spectra], enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, log_every_n_steps=1, enable_checkpointing=False,
        )  # fmt: skip
        before, start = fresh_peak_bytes(), time.perf_counter()
        trainer.fit(module, datamodule=small)
        seconds = time.perf_counter() - start
    each = seconds / len(spectra.record)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {options.dimensions} "
          f"dimensions, {options.pairs} pairs: {len(spectra.record)} measurements, {each:.0f} s each")  # fmt: skip
    return 0 if within("peak memory, GB", (peak_bytes() - before) / 1e9, 5.0) else 1


if __name__ == "__main__":
    sys.exit(main())

"""``stepwise embed RUN --data FOLDER --out embeddings.npz``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from stepwise_lightning.commands.parser import Parser, add_device_options


def main(arguments: list[str]) -> None:
    """Write the embeddings of images under the trained encoder of a run."""
    parser = Parser("embed", "Compute the embeddings of images with the trained encoder of a run. Writes an .npz file "
                    "with embeddings, the representation before the projector, labels and paths.")  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="folder of a run, runs/NAME/version_N, or a checkpoint in it")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a folder of images, photos, cifar10 or stl10")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.npz", help="file to write; must not exist")
    parser.add_argument("--root", default="data", help="folder of cifar10 and stl10 (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="images in a forward pass (%(default)s)")
    add_device_options(parser)
    options = parser.parse_args(arguments)
    if options.out.suffix != ".npz" or options.out.exists():
        parser.error(f"--out {options.out} {'exists' if options.out.exists() else 'must end in .npz'}: name a new file")
    if options.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {options.batch_size}")

    import numpy as np
    from tqdm import tqdm

    from stepwise_lightning.files import atomic_write
    from stepwise_lightning.trained import embed_images

    bar = partial(tqdm, desc="embedding", unit="batch", leave=False, disable=None)
    arrays: dict[str, Any] = embed_images(
        options.run, options.data, options.root, options.batch_size, bar, options.accelerator, options.num_workers
    )
    atomic_write(options.out, lambda partial: np.savez(partial, **arrays))
    shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in arrays.items())
    print(f"{options.out}: {shapes}")

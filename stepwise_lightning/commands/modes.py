"""``stepwise modes RUN [--data FOLDER]``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from stepwise_lightning.commands.parser import Parser, add_device_options


def main(arguments: list[str]) -> None:
    """Write a description of the learned modes of a run."""
    parser = Parser("modes", "Describe each learned mode of a run: the images with the lowest and highest values, the "
                    "attributes and augmentations that change it, and its invariances. Writes an HTML page, and the "
                    "embedding for TensorBoard's projector.")  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="folder of a run, runs/NAME/version_N, or a checkpoint in it")
    parser.add_argument("--data", metavar="FOLDER",
                        help="a folder of images, photos, cifar10 or stl10 (the run's held-out images)")  # fmt: skip
    parser.add_argument("--root", help="folder of cifar10 and stl10 (from the run's configuration, or data)")
    parser.add_argument("--images", type=int, help="maximum number of images (256)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder to write; must not exist (RUN/modes)")
    add_device_options(parser)
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.exists():
        parser.error(f"--out {options.out} exists: name a new folder")

    from tqdm import tqdm

    from stepwise_lightning.errors import cannot_write
    from stepwise_lightning.files import atomic_write_text
    from stepwise_lightning.modes import describe_modes, write_projector
    from stepwise_lightning.runs.folders import free_name
    from stepwise_lightning.runs.saved import checkpoint_of

    bar = partial(tqdm, leave=False, disable=None)
    chosen = {"accelerator": options.accelerator, "num_workers": options.num_workers}
    if options.images is not None:
        chosen["num_images"] = options.images
    description = describe_modes(options.run, options.data, options.root, **chosen, progress=bar)
    run = checkpoint_of(options.run).parent.parent
    out = options.out or run / free_name("modes", lambda name: (run / name).exists())
    atomic_write_text(out / "modes.html", description.html())
    try:
        write_projector(description, out / "projector")
    except OSError as error:
        raise cannot_write(out / "projector", error) from error
    count = len(description.modes)
    print(f"found      {count} learned mode{'s' * (count != 1)}, described with {len(description.images)} images")
    print(f"page       {out / 'modes.html'}")
    print(f"projector  tensorboard --logdir {out / 'projector'}")

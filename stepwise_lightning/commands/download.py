"""``stepwise download cifar10|stl10``."""

from __future__ import annotations

from stepwise_lightning.commands.parser import Parser

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Fetch a data set unless it is there."""
    parser = Parser("download", "Fetch a data set through torchvision, unless it is there and intact.")
    parser.add_argument("data", choices=("cifar10", "stl10"), help="170 MB, 2.6 GB")
    parser.add_argument("--root", default="data", help="where it is put (%(default)s)")
    options = parser.parse_args(arguments)

    from stepwise_lightning.data.image_sets import download_images

    download_images(options.data, options.root)
    print(f"{options.data} is in {options.root}")

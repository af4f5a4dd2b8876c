"""``stepwise download cifar10|stl10``."""

from __future__ import annotations

from stepwise_lightning.commands.parser import Parser


def main(arguments: list[str]) -> None:
    """Download a data set unless an intact copy exists."""
    parser = Parser("download", "Download a data set through torchvision, unless an intact copy exists.")
    parser.add_argument("data", choices=("cifar10", "stl10"), help="170 MB, 2.6 GB")
    parser.add_argument("--root", default="data", help="folder to download to (%(default)s)")
    options = parser.parse_args(arguments)

    from stepwise_lightning.data.image_sets import download_images
    from stepwise_lightning.files import local_path

    download_images(options.data, str(local_path(options.root)))
    print(f"{options.data} is in {options.root}")

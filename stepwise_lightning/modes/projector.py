"""The embedding of a run for TensorBoard's projector: points, thumbnails and labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import interpolate

from stepwise_lightning.modes.attributes import image_attributes

if TYPE_CHECKING:
    from stepwise_lightning.modes.portraits import ModePortraits

__all__ = ["write_projector"]

_SPRITE = 8192  # pixels at a side, which browsers take
_SIDE = 64
_SEPARATORS = str.maketrans("\t\r\n", "   ")


def write_projector(portraits: ModePortraits, folder: Path) -> None:
    """Write the coordinates of all images along all modes, with thumbnails, classes, paths and brightness.

    ``tensorboard --logdir FOLDER`` shows them under *Projector*. The first axis of its points is mode 1.

    Raises:
        OSError: it cannot be written.

    """
    from torch.utils.tensorboard import SummaryWriter  # here, because it takes long

    names = [portraits.class_names[label] if label >= 0 else "unknown" for label in portraits.labels.tolist()]
    brightness = image_attributes(portraits.images)["brightness"].tolist()
    rows = [
        [name.translate(_SEPARATORS), path.translate(_SEPARATORS), f"{value:.3f}"]
        for name, path, value in zip(names, portraits.paths, brightness, strict=True)
    ]
    with SummaryWriter(str(folder)) as writer:
        writer.add_embedding(
            portraits.all_coordinates.float(),
            metadata=rows,
            metadata_header=["class", "path", "brightness"],
            label_img=_thumbnails(portraits.images),
            tag="embedding",
        )


def _thumbnails(images: Tensor) -> Tensor:
    per_row = -(-(len(images) ** 0.5) // 1)
    side = max(1, min(_SIDE, images.shape[-1], int(_SPRITE // per_row)))
    if side == images.shape[-1]:
        return images.float()
    return interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True).clamp(0, 1)

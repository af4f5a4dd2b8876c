"""Write the embedding of a run for TensorBoard's projector."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.nn.functional import interpolate

from stepwise_lightning.modes.attributes import image_attributes
from stepwise_lightning.modes.description import ModeDescription

_MAX_SPRITE = 8192  # side in pixels that browsers accept
_MAX_SIDE = 64
_SEPARATORS = str.maketrans("\t\r\n", "   ")


def write_projector(description: ModeDescription, folder: Path) -> None:
    """Write the coordinates of all images along all modes, with thumbnails, classes, paths and brightness.

    ``tensorboard --logdir FOLDER`` shows them under *Projector*. The first axis is mode 1.
    """
    from torch.utils.tensorboard import SummaryWriter  # here, because the import is slow

    names = [description.class_names[label] if label >= 0 else "unknown" for label in description.labels.tolist()]
    brightness = image_attributes(description.images)["brightness"].tolist()
    rows = [
        [name.translate(_SEPARATORS), path.translate(_SEPARATORS), f"{value:.3f}"]
        for name, path, value in zip(names, description.paths, brightness, strict=True)
    ]
    with SummaryWriter(str(folder)) as writer:
        writer.add_embedding(
            description.all_coordinates.float(),
            metadata=rows,
            metadata_header=["class", "path", "brightness"],
            label_img=_thumbnails(description.images),
            tag="embedding",
        )


def _thumbnails(images: Tensor) -> Tensor:
    per_row = -(-(len(images) ** 0.5) // 1)
    side = max(1, min(_MAX_SIDE, images.shape[-1], int(_MAX_SPRITE // per_row)))
    if side == images.shape[-1]:
        return images.float()
    return interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True).clamp(0, 1)

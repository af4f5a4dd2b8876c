"""Description of a run's learned modes, and its page: one HTML file that contains its images."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.modes.attributes import ATTRIBUTES
from stepwise_lightning.modes.directions import Modes
from stepwise_lightning.modes.variations import parameter_ranges
from stepwise_lightning.spectrum.matrices import phrase

_MAX_SIDE = 96  # of the images in the page, in pixels
_MAX_CLASSES = 6  # at each end of the class bars
_COLOURS = {"positive": "0,114,178", "negative": "213,94,0", "share": "0,158,115"}  # of Okabe and Ito


@dataclass(frozen=True)
class ModeDescription:
    """Description of k learned modes on n images; a notebook displays it as a page."""

    run: str  #: name of the run
    data: str  #: name of the images
    augmentation: str  #: of the run, ``standard`` or ``weak``
    modes: Modes  #: the learned modes, computed from random views as in training
    shares: Tensor  #: shares of the variance of all modes, (k,)
    images: Tensor  #: centre crops in [0, 1], (n, 3, size, size)
    coordinates: Tensor  #: of ``images``, (n, k), divided by their standard deviation
    all_coordinates: Tensor  #: of ``images`` along all modes, learned or not, (n, ≤ d), not scaled
    labels: Tensor  #: int64, (n,), −1 for unknown
    class_names: list[str]  #: names of the labels
    paths: list[str]  #: path of each image, or set/split/index
    class_share: Tensor | None  #: share of variance between classes, ε², (k,); None with fewer than two known classes
    #: Pearson's r with each of ``attributes.ATTRIBUTES``, by name, (k,); NaN for a constant attribute
    attributes: dict[str, Tensor]
    explained: Tensor  #: share of variance explained by all attributes together, leave-one-out, (k,)
    #: Share of variance between images when their views differ in one parameter, by its name, or in all parameters
    #: (``all together``), (k,); 1 if the mode is invariant to it
    invariance: dict[str, Tensor]
    gradients: Tensor  #: mean gradients with respect to pixel values, (k, 3, size, size)
    ends: Tensor  #: indices of images from the lowest tenth, around the median and from the highest tenth, (k, 3, m)
    #: Occlusion maps by (mode, image), (size, size) each, in units of the mode's standard deviation
    maps: dict[tuple[int, int], Tensor]

    def html(self) -> str:
        """Return the page, HTML 5, which loads no other file."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
        template = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
        varied = parameter_ranges(AugmentationParameters.of(self.augmentation))
        return environment.from_string(template).render(
            description=self,
            matrix=phrase(self.modes.matrix),
            num_images=len(self.images),
            num_labels=int((self.labels >= 0).sum()),
            chance=min(1.0, 2 / max(1, len(self.images) - 1) ** 0.5),
            classes=self.class_share is not None,
            modes=[_mode(self, mode) for mode in range(len(self.modes))],
            colours=_COLOURS,
            definitions={**ATTRIBUTES, **{f"{name} (of a view)": text for name, text in varied.items()}},
        )

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.html())}" style="width: 100%; height: 80vh; border: 0"></iframe>'


def _mode(description: ModeDescription, mode: int) -> dict[str, Any]:
    """Return the values of one mode that the template shows."""
    names = ("lowest tenth", "in the middle", "highest tenth")
    attributes = {name: float(values[mode]) for name, values in description.attributes.items()}
    class_share = description.class_share
    return {
        "number": mode + 1,
        "share": float(description.shares[mode]),
        "class_share": None if class_share is None else float(class_share[mode]),
        "attributes": attributes.values(),
        "explained": float(description.explained[mode]),
        "invariance": [float(values[mode]) for values in description.invariance.values()],
        "strips": [
            {
                "name": name,
                "images": [_image(description.images[i], _caption(description, mode, i)) for i in images],
                "maps": _maps(description, mode, images),
            }
            for name, images in zip(names, description.ends[mode].tolist(), strict=True)
        ],
        "gradient": _image(_pattern(description.gradients[mode]), f"mean gradient of mode {mode + 1}, smoothed"),
        "class_bars": _bars(_class_means(description, mode)),
        "attribute_bars": _bars(attributes),
    }


def _maps(description: ModeDescription, mode: int, images: list[int]) -> list[dict[str, str]]:
    """Return the occlusion maps that exist for these images."""
    largest = max(float(values.abs().max()) for (other, _), values in description.maps.items() if other == mode)
    return [
        _image(
            _overlay(description.images[i], description.maps[mode, i] / (largest or 1.0)), f"occlusion map of image {i}"
        )
        for i in images
        if (mode, i) in description.maps
    ]


def _caption(description: ModeDescription, mode: int, image: int) -> str:
    label = int(description.labels[image])
    name = f", {description.class_names[label]}" if label >= 0 else ""
    return f"{description.paths[image]}{name}: {description.coordinates[image, mode]:+.2f}"


def _class_means(description: ModeDescription, mode: int) -> dict[str, float]:
    """Return the mean coordinate of each class, ascending; of many classes only the lowest and highest six."""
    c = description.coordinates[:, mode] - description.coordinates[:, mode].mean()
    labels = [label for label in description.labels.unique().tolist() if label >= 0]
    means = [(description.class_names[k], float(c[description.labels == k].mean())) for k in labels]
    means.sort(key=lambda pair: pair[1])
    return dict(means if len(means) <= 2 * _MAX_CLASSES else means[:_MAX_CLASSES] + means[-_MAX_CLASSES:])


def _bars(values: dict[str, float]) -> list[dict[str, Any]]:
    """Return signed bars; half the track stands for 1 or the largest value."""
    largest = max([1.0, *(abs(value) for value in values.values() if value == value)])
    bars = []
    for name, value in values.items():
        is_known = value == value  # not NaN
        width = 50 * abs(value) / largest if is_known else 0.0
        text = f"{value:+.2f}".replace("-", "−") if is_known else "–"
        left = 50 - width if value < 0 else 50.0
        bars.append({"name": name, "value": value, "left": left, "width": width, "text": text})
    return bars


def _image(image: Tensor, text: str) -> dict[str, str]:
    """Return an image (3, h, w) in [0, 1] as a data URI with its text."""
    from PIL import Image

    levels = (image.permute(1, 2, 0).double().numpy() * 255).round().astype(np.uint8)
    picture = Image.fromarray(levels)
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
    content = BytesIO()
    picture.save(content, "PNG", optimize=True)
    return {"source": f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}", "text": text}


def _pattern(values: Tensor) -> Tensor:
    """Return a signed pattern (3, h, w) as an image, smoothed to suppress single pixels; gray is zero."""
    reach = max(1, min(values.shape[1:]) // 12)
    padded = pad(values[None], [reach] * 4, mode="replicate")
    values = avg_pool2d(avg_pool2d(pad(padded, [reach] * 4, mode="replicate"), 2 * reach + 1, 1), 2 * reach + 1, 1)[0]
    return (0.5 + 0.5 * values / values.abs().max().clamp(min=1e-300)).clamp(0, 1)


def _overlay(image: Tensor, values: Tensor) -> Tensor:
    """Return a gray image with values (h, w) in [−1, 1] on top, blue for positive and orange for negative."""
    gray = image.double().mean(0).expand(3, -1, -1)
    blue, orange = (
        torch.tensor([float(level) / 255 for level in _COLOURS[sign].split(",")], dtype=torch.float64)[:, None, None]
        for sign in ("positive", "negative")
    )
    weight = values.abs().clamp(0, 1).sqrt() * 0.75
    return gray * (1 - weight) + torch.where(values > 0, blue, orange) * weight

"""The portraits of a run's modes as one HTML page that needs no other file: its pictures are in it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.modes.attributes import ATTRIBUTES
from stepwise_lightning.modes.variations import parameters
from stepwise_lightning.spectrum.matrices import phrase

if TYPE_CHECKING:
    from stepwise_lightning.modes.portraits import ModePortraits

__all__ = ["page"]

_SIDE = 96  # of a picture, at the most, in pixels of its own
_CLASSES = 6  # at each end, where there are more than twice as many
_POSITIVE, _NEGATIVE, _SHARE = "0,114,178", "213,94,0", "0,158,115"  # Okabe and Ito's blue, vermilion, green
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1180px; margin: 0 auto;
  padding: 0 14px 40px; }
h1 { font-size: 1.5em; margin: .8em 0 .2em; overflow-wrap: anywhere; }
h2 { font-size: 1.2em; margin: 2em 0 .3em; }
h3 { font-size: 1em; margin: 1em 0 .3em; } p, li { max-width: 75ch; } .quiet { color: #666; font-size: .9em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9em; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { font-weight: 600; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; position: sticky;
  left: 0; background: #fff; } a { color: #0072b2; }
.mode { border-top: 2px solid #ddd; margin-top: 1.6em; }
.strips { display: grid; gap: 6px 22px; grid-template-columns: repeat(auto-fit, minmax(292px, 1fr)); }
.strip { display: flex; flex-wrap: wrap; gap: 3px; } figure { margin: 0; }
img { width: 46px; height: 46px; image-rendering: pixelated; display: block; }
img.large { width: 126px; height: 126px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 40px; } .bars { border: 0; } .bars td { border: 0; padding: 1px 6px; }
.bars td:first-child { position: static; max-width: 150px; overflow: hidden; text-overflow: ellipsis; }
.track { position: relative; width: 150px; height: 12px; background: #f3f3f3; }
.track i { position: absolute; top: 0; bottom: 0; } .track b { position: absolute; top: -1px; bottom: -1px; width: 1px;
  background: #999; }
"""


def page(portraits: ModePortraits) -> str:
    """Return the page as text, HTML 5 in UTF-8."""
    title = f"Modes of {portraits.run}"
    count, known = len(portraits.modes), int((portraits.labels >= 0).sum())
    facts = (
        f"{count} learned mode{'s' * (count != 1)} of {phrase(portraits.modes.matrix)}, looked at with "
        f"{len(portraits.images)} images ({portraits.data}), {known or 'none'} of them with a label; "
        f"augmentation: {portraits.augmentation}"
    )
    pieces = [
        "<!DOCTYPE html>", '<html lang="en">', '<head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>", "<body>", f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(facts)}</p>', _introduction(),
        "<h2>What each mode varies with</h2>", _attribute_table(portraits),
        "<h2>What each mode is blind to</h2>", _unchanged_table(portraits),
        *(_mode(portraits, mode) for mode in range(count)), _definitions(portraits), "</body></html>",
    ]  # fmt: skip
    return "\n".join(pieces) + "\n"


def _introduction() -> str:
    return (
        "<p>A mode is a direction of the embedding, and gives each image a number, its coordinate. Below, images from "
        "the lowest tenth of coordinates stand at the left and images from the highest tenth at the right. Which end "
        "is which has no meaning; what changes from one to the other is what the mode has learned.</p>"
    )


def _attribute_table(portraits: ModePortraits) -> str:
    names = list(portraits.attributes)
    classes = portraits.class_share is not None
    head = ["mode", "share of variance", *(["class"] if classes else []), *names, "all of these"]
    rows = []
    for mode in range(len(portraits.modes)):
        cells = [_link(mode), _share(float(portraits.shares[mode]))]
        if portraits.class_share is not None:
            cells.append(_share(float(portraits.class_share[mode])))
        cells += [_signed(float(portraits.attributes[name][mode])) for name in names]
        rows.append([*cells, _share(float(portraits.explained[mode]))])
    chance = 2 / max(1, len(portraits.images) - 1) ** 0.5
    class_note = "<i>Class</i>: share of the mode's variance that is between classes. " if classes else ""
    note = (
        f"{class_note}Then the correlation with what can be said of an image without a network, from −1 to 1 (of these "
        f"{len(portraits.images)} images, below {min(chance, 1):.2f} may be chance). <i>All of these</i>: the share of "
        "variance that they explain together; what is left is something else."
    )
    return f'<div class="wide">{_table(head, rows)}</div><p class="quiet">{note}</p>'


def _unchanged_table(portraits: ModePortraits) -> str:
    names = list(portraits.unchanged)
    rows = [
        [_link(mode), *(_share(float(portraits.unchanged[name][mode])) for name in names)]
        for mode in range(len(portraits.modes))
    ]
    note = (
        "The share of a mode's variance that is between images, when each image is shown in several views that differ "
        "in one parameter of the augmentation alone. 100 %: the mode is blind to it. <i>All together</i>: views "
        "drawn as in training, which is what the loss rewards."
    )
    return f'<div class="wide">{_table(["mode", *names], rows)}</div><p class="quiet">{note}</p>'


def _mode(portraits: ModePortraits, mode: int) -> str:
    ends = portraits.ends[mode].tolist()
    strips = "".join(
        f'<figure><figcaption class="quiet">{name}</figcaption><div class="strip">'
        + "".join(_picture(portraits.images[i], _caption(portraits, mode, i)) for i in images)
        + _covered(portraits, mode, images) + "</div></figure>"
        for name, images in zip(("lowest tenth", "in the middle", "highest tenth"), ends, strict=True)
    )  # fmt: skip
    gradient = _picture(_pattern(portraits.gradients[mode]), f"mean gradient of mode {mode + 1}, smoothed", "large")
    bars = _bars("class", _class_means(portraits, mode), 1.0) if portraits.class_share is not None else ""
    correlations = [(name, float(values[mode])) for name, values in portraits.attributes.items()]
    return (
        f'<section class="mode" id="mode-{mode + 1}"><h2>Mode {mode + 1}</h2><div class="strips">{strips}</div>'
        f'<div class="facts"><figure><h3>what raises it</h3>{gradient}</figure>{bars}'
        f"{_bars('correlation with', correlations, 1.0)}</div></section>"
    )


def _covered(portraits: ModePortraits, mode: int, images: list[int]) -> str:
    """Return the occlusion maps that there are of these images, on a line of their own."""
    largest = max(float(values.abs().max()) for (other, _), values in portraits.maps.items() if other == mode)
    maps = [
        _picture(_overlay(portraits.images[i], portraits.maps[mode, i] / (largest or 1.0)), f"what matters in it, {i}")
        for i in images
        if (mode, i) in portraits.maps
    ]
    note = '<span class="quiet">blue parts raise it, orange ones lower it</span>'
    return f'<div style="flex-basis: 100%">{note}</div>{"".join(maps)}' if maps else ""


def _caption(portraits: ModePortraits, mode: int, image: int) -> str:
    label = int(portraits.labels[image])
    name = f", {portraits.class_names[label]}" if label >= 0 else ""
    return f"{portraits.paths[image]}{name}: {portraits.coordinates[image, mode]:+.2f}"


def _class_means(portraits: ModePortraits, mode: int) -> list[tuple[str, float]]:
    """Return the mean coordinate of each class, ascending; of many classes those at the ends."""
    c = portraits.coordinates[:, mode] - portraits.coordinates[:, mode].mean()
    means = [(portraits.class_names[k], float(c[portraits.labels == k].mean()))
             for k in portraits.labels.unique().tolist() if k >= 0]  # fmt: skip
    means.sort(key=lambda pair: pair[1])
    return means if len(means) <= 2 * _CLASSES else means[:_CLASSES] + means[-_CLASSES:]


def _bars(title: str, values: list[tuple[str, float]], least: float) -> str:
    """Return signed bars, whose ends are at the largest value, or at ``least``."""
    largest = max([least, *(abs(value) for _, value in values if value == value)])
    rows = []
    for name, value in values:
        known = value == value
        width = 50 * abs(value) / largest if known else 0.0
        left = 50 - width if value < 0 else 50.0
        colour = _NEGATIVE if value < 0 else _POSITIVE
        bar = f'<i style="left:{left:.1f}%;width:{width:.1f}%;background:rgb({colour})"></i>'
        text = f"{value:+.2f}".replace("-", "−") if known else "–"
        rows.append(
            f'<tr><td title="{escape(name)}">{escape(name)}</td><td><div class="track"><b style="left:50%"></b>{bar}'
            f"</div></td><td>{text}</td></tr>"
        )
    return f'<div><h3>{title}</h3><table class="bars">{"".join(rows)}</table></div>'


def _definitions(portraits: ModePortraits) -> str:
    varied = parameters(AugmentationParameters.of(portraits.augmentation))
    words = {**ATTRIBUTES, **{f"{name} (of a view)": text for name, text in varied.items()}}
    listed = "".join(f"<li><b>{escape(name)}</b>: {escape(text)}</li>" for name, text in words.items())
    return (
        '<section class="mode"><h2>Definitions</h2><p>Coordinates are of centre crops, in units of their standard '
        "deviation; class bars are class means. <b>What raises it</b>: the mean gradient with respect to the pixels, "
        "smoothed, gray where there is none; a small step of all images into that pattern raises the mode. "
        "<b>Maps</b>, under the images at the ends: a square of a quarter of the side is covered with the mean colour, "
        "everywhere in turn; blue parts raise the mode, and orange ones lower it. Class shares are ε², which is 0 in "
        "the mean without a relation, and shares of attributes are of images left out of the fit; both may be below 0. "
        "Shares of variance are on these images, with the running statistics of batch normalisation.</p>"
        f"<ul>{listed}</ul></section>"
    )


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _link(mode: int) -> str:
    return f'<a href="#mode-{mode + 1}">{mode + 1}</a>'


def _share(value: float) -> str:
    return _cell(value, max(value, 0.0), _SHARE, lambda v: f"{round(100 * v)} %")


def _signed(value: float) -> str:
    return _cell(value, abs(value), _NEGATIVE if value < 0 else _POSITIVE, lambda v: f"{v:+.2f}")


def _cell(value: float, strength: float, colour: str, text: Callable[[float], str]) -> str:
    if value != value:
        return "<td>–</td>"
    return (
        f'<td style="background:rgba({colour},{min(1.0, abs(value)) * 0.5:.2f})">{text(value).replace("-", "−")}</td>'
    )


def _picture(image: Tensor, text: str, kind: str = "") -> str:
    """Return an image (3, h, w) in [0, 1] as an element that holds it."""
    from PIL import Image

    levels = (image.permute(1, 2, 0).double().numpy() * 255).round().astype(np.uint8)
    picture = Image.fromarray(levels)
    picture.thumbnail((_SIDE, _SIDE))
    content = BytesIO()
    picture.save(content, "PNG", optimize=True)
    data = base64.b64encode(content.getvalue()).decode()
    shape = f' class="{kind}"' if kind else ""
    return f'<img{shape} src="data:image/png;base64,{data}" alt="{escape(text)}" title="{escape(text)}">'


def _pattern(values: Tensor) -> Tensor:
    """Return a pattern of both signs (3, h, w) as an image: gray where it is zero, smoothed, or single pixels rule."""
    reach = max(1, min(values.shape[1:]) // 12)
    padded = pad(values[None], [reach] * 4, mode="replicate")
    values = avg_pool2d(avg_pool2d(pad(padded, [reach] * 4, mode="replicate"), 2 * reach + 1, 1), 2 * reach + 1, 1)[0]
    return (0.5 + 0.5 * values / values.abs().max().clamp(min=1e-300)).clamp(0, 1)


def _overlay(image: Tensor, values: Tensor) -> Tensor:
    """Return an image in gray with values (h, w) in [−1, 1] over it, blue where positive, orange where negative."""
    gray = image.double().mean(0).expand(3, -1, -1)
    blue, orange = (
        torch.tensor([float(level) / 255 for level in name.split(",")], dtype=torch.float64)[:, None, None]
        for name in (_POSITIVE, _NEGATIVE)
    )
    weight = values.abs().clamp(0, 1).sqrt() * 0.75
    return gray * (1 - weight) + torch.where(values > 0, blue, orange) * weight

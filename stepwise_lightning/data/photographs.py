"""The bundled data set: tiles of eight photographs from the wheel of scikit-image."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina", "ihc", "motorcycle")
TRAIN, HELD_OUT, BETWEEN = 0, 1, 2
_SIZE, _STRIDE = 32, 12  # of the tiles, in pixels


@lru_cache(maxsize=1)
def cut_photos() -> tuple[Tensor, Tensor, Tensor]:
    """Cut the photographs into tiles in a fixed order, without a network.

    Each photograph is downscaled (local mean) and cut into overlapping tiles; tiles without contrast are dropped. A
    random split would leak. A vertical line splits each photograph instead: tiles on its right, about a tenth, are held
    out, tiles on its left are for training, and tiles that it crosses belong to neither. There are 2190 tiles for
    training, 268 held out, and 232 unused.

    Returns:
        Tiles, uint8, (2690, 3, 32, 32); the photograph of each, an index into ``PHOTOGRAPHS``, int64, (2690,); and its
        split, ``TRAIN``, ``HELD_OUT`` or ``BETWEEN``, int64, (2690,).

    """
    from skimage import data
    from skimage.transform import downscale_local_mean

    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.hubble_deep_field()]
    photographs += [data.retina(), data.immunohistochemistry(), data.stereo_motorcycle()[0]]
    tiles, labels, places = [], [], []
    for label, photograph in enumerate(photographs):
        small = np.rint(downscale_local_mean(photograph, (3, 3, 1))).astype(np.uint8)
        windows = np.lib.stride_tricks.sliding_window_view(small, (_SIZE, _SIZE, 3))[::_STRIDE, ::_STRIDE, 0]
        left = _STRIDE * np.arange(windows.shape[1])
        line = left[-max(1, round(0.1 * len(left)))]
        place = np.where(left >= line, HELD_OUT, np.where(left + _SIZE <= line, TRAIN, BETWEEN))
        place = np.broadcast_to(place, windows.shape[:2]).reshape(-1)
        windows = windows.reshape(-1, _SIZE, _SIZE, 3)
        kept = windows.std(axis=(1, 2, 3)) > 5
        tiles.append(windows[kept])
        labels.append(np.full(kept.sum(), label))
        places.append(place[kept])
    images = torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(np.concatenate(labels)), torch.from_numpy(np.concatenate(places))

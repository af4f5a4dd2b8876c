"""Views in any batch, and activations of any module."""

from stepwise_lightning.features.batches import Views, concatenate_ranks, loss_in, num_pairs, on_device, views_in
from stepwise_lightning.features.capture import Watched, capture, check_watched, has_forward, label

__all__ = [
    "Views",
    "Watched",
    "capture",
    "check_watched",
    "concatenate_ranks",
    "has_forward",
    "label",
    "loss_in",
    "num_pairs",
    "on_device",
    "views_in",
]

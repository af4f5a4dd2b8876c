"""Image sets, augmented views, and Lightning data modules."""

from stepwise_lightning.data.fixed_crop_pairs import FixedCropPairs
from stepwise_lightning.data.image_sets import ImageSet, download_images, load_image_set, load_images
from stepwise_lightning.data.two_view_datamodule import TwoViewDataModule
from stepwise_lightning.data.views import crop_pairs

__all__ = [
    "FixedCropPairs",
    "ImageSet",
    "TwoViewDataModule",
    "crop_pairs",
    "download_images",
    "load_image_set",
    "load_images",
]

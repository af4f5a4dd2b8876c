"""Parameters of the augmentations, shared by per-image and batched views."""

from __future__ import annotations

from dataclasses import dataclass

from stepwise_lightning.errors import UserError


@dataclass(frozen=True)
class AugmentationParameters:
    """Ranges and probabilities of an augmentation.

    ``standard`` follows Barlow Twins, for small images; ``weak`` is crop and flip only. Published augmentations for
    ImageNet: ``barlow_twins`` of Barlow Twins (Zbontar et al. 2021, appendix A) and VICReg (Bardes et al. 2022),
    ``simclr`` of SimCLR (Chen et al. 2020, appendix A), both with linear instead of cubic interpolation.
    """

    crop_scale: tuple[float, float]  #: range of the crop's area as a share of the image's, sampled uniformly
    #: Range of the crop's width over height, sampled uniformly in the logarithm
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    #: Largest change of brightness, contrast, saturation (factors 1 ± value) and hue (share of the circle)
    jitter: tuple[float, float, float, float] | None = None
    jitter_probability: float = 0.0
    gray_probability: float = 0.0
    blur_probability: tuple[float, float] = (0.0, 0.0)  #: in the first and in the second view
    blur_sigma: tuple[float, float] = (0.1, 2.0)  #: range of σ in pixels, sampled uniformly
    solarize_probability: tuple[float, float] = (0.0, 0.0)  #: of inverting values of at least 128 of 255, in both views

    @classmethod
    def of(cls, augmentation: str) -> AugmentationParameters:
        """Return the parameters of a named augmentation; ValueError for another name."""
        if augmentation not in _PARAMETERS:
            raise UserError(f"unknown augmentation {augmentation!r}: choose one of {', '.join(_PARAMETERS)}")
        return _PARAMETERS[augmentation]


_PARAMETERS = {
    "standard": AugmentationParameters(
        (0.2, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_probability=0.8, gray_probability=0.2,
        blur_probability=(0.5, 0.5),
    ),
    "weak": AugmentationParameters((0.5, 1.0)),
    "barlow_twins": AugmentationParameters(
        (0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_probability=0.8, gray_probability=0.2,
        blur_probability=(1.0, 0.1), solarize_probability=(0.0, 0.2),
    ),
    "simclr": AugmentationParameters(
        (0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), jitter_probability=0.8, gray_probability=0.2,
        blur_probability=(0.5, 0.5),
    ),
}  # fmt: skip

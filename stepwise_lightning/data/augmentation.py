"""How strong an augmentation is: the same numbers for views made one at a time and in batches."""

from __future__ import annotations

from dataclasses import dataclass

from stepwise_lightning.errors import UserError

__all__ = ["AugmentationParameters"]


@dataclass(frozen=True)
class AugmentationParameters:
    """Ranges and probabilities of an augmentation.

    ``standard`` has the strengths of Barlow Twins (Zbontar et al. 2021); ``weak`` is crop and flip alone.

    Attributes:
        crop_scale: area of the crop as a share of the image's, uniform.
        crop_ratio: width over height of the crop, uniform in its logarithm.
        jitter: brightness, contrast and saturation are multiplied by 1 ± up to this, hue is turned by ± this; or None.
        jitter_probability: as are the next two, of the operation's being applied.
        gray_probability: of grayscale.
        blur_probability: of a Gaussian blur.
        blur_sigma: σ of that in pixels, uniform.

    """

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float, float] | None = None
    jitter_probability: float = 0.0
    gray_probability: float = 0.0
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    @classmethod
    def of(cls, augmentation: str) -> AugmentationParameters:
        """Return those of ``standard`` or ``weak``; ValueError for another name."""
        if augmentation not in _STRENGTHS:
            raise UserError(f"augmentation {augmentation!r} is none of {', '.join(_STRENGTHS)}")
        return _STRENGTHS[augmentation]


_STRENGTHS = {
    "standard": AugmentationParameters(
        (0.2, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_probability=0.8, gray_probability=0.2, blur_probability=0.5
    ),
    "weak": AugmentationParameters((0.5, 1.0)),
}  # fmt: skip

"""Values at which a loss can stand still: before the first mode is learned, and between modes.

Before the first mode all embeddings of a view are equal to the loss, which then equals its saddle value. For losses of
logits, which are then equal, it follows from a formula:

=============  ===========================================  =====================================================
loss           saddle value                                 source
=============  ===========================================  =====================================================
simclr         ln(2n − 1)                                   Chen et al., ICML 2020, arXiv 2002.05709
supcon         τ/0.07 · ln(2n − 1), for any labels          Khosla et al., NeurIPS 2020, arXiv 2004.11362; the
                                                            factor is in ``HobbitLong/SupContrast``
clip           ln n                                         Radford et al., ICML 2021, arXiv 2103.00020
siglip         n ln 2, or                                   Zhai et al., ICCV 2023, arXiv 2303.15343; the second
               ln n + (n − 1) ln(n / (n − 1))               value is its minimum over the bias of the logits
swav           ln K                                         Caron et al., NeurIPS 2020, arXiv 2006.09882
dino           ln K                                         Caron et al., ICCV 2021, arXiv 2104.14294
=============  ===========================================  =====================================================

n pairs in the global batch, temperature τ, K prototypes. The analytical Barlow Twins loss, ‖C − I‖², stands at d − k
while k of d modes are learned (Simon et al., arXiv 2303.15438).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.losses import LOSSES, loss_settings, sum_terms
from stepwise_lightning.theory.loss_derivatives import PairLoss
from stepwise_lightning.theory.loss_signature import bound_loss, saddle_value
from stepwise_lightning.user_loss import named_terms

# Names with a formula, and the argument that the plateaus of each loss depend on.
FORMULAS = ("simclr", "supcon", "clip", "siglip", "swav", "dino")
_DEPENDS_ON = {
    "barlow_twins": ["dim"], "vicreg": [], "spectral_contrastive": [], "swav": ["num_prototypes"],
    "dino": ["num_prototypes"], **dict.fromkeys(("simclr", "supcon", "clip", "siglip"), ["num_pairs"]),
}  # fmt: skip
_OPTIONS = {"num_pairs": "--batch-size", "dim": "--dim", "num_prototypes": "--prototypes",
            "temperature": "--temperature", "scale": "--scale"}  # fmt: skip
_LARGEST = 1_000_000  # of n, d and K
_BASE_TEMPERATURE = 0.07  # of SupContrast
# Relative, and absolute for the saddle value 0. Reported losses of runs on a saddle value deviate by up to 0.03 %,
# because their embeddings are not exactly equal.
_DEVIATION = 5e-4
# Absolute, for the plateaus d − k: the next mode has begun to grow, or the last one is not complete.
_DEVIATION_BETWEEN_MODES = 0.1
# Largest unit of the last digit of a reported loss, relative to the plateau.
_COARSE = 0.05


@dataclass(frozen=True)
class Plateau:
    """A value at which a loss can stand still."""

    value: float
    deviation: float
    """Largest distance of the loss from the value at which it counts as on the plateau."""
    num_learned: int
    """Number of learned modes, 0 at the saddle value."""
    description: str


def plateaus(
    loss: str | PairLoss,
    num_pairs: int | None = None,
    dim: int | None = None,
    num_prototypes: int | None = None,
    temperature: float | None = None,
    scale: float = 1.0,
    **settings: Any,
) -> list[Plateau]:
    """Return the known plateaus of a loss, without a run.

    Args:
        loss: a name in ``stepwise_lightning.losses.LOSSES`` or in ``FORMULAS``; or a function of both views'
            embeddings, (n, d) float64 each, that returns a scalar or a dictionary of terms.
        num_pairs: n, the global batch size, for contrastive losses and functions.
        dim: d, for Barlow Twins and functions.
        num_prototypes: K, for SwAV and DINO.
        temperature: of ``supcon`` (default 0.07) and ``simclr``; the plateaus of other names do not depend on it.
        scale: factor by which the reported loss differs from the loss above, such as a weight.
        settings: other arguments of a loss in ``LOSSES``.

    Example:
        >>> from stepwise_lightning.theory import plateaus
        >>> [round(plateau.value, 4) for plateau in plateaus("clip", num_pairs=128)]
        [4.852]

    Raises:
        ValueError: an unknown name, a missing argument, an argument out of range, or a function that fails.

    """
    sizes = {"num_pairs": num_pairs, "dim": dim, "num_prototypes": num_prototypes}
    _check_arguments(loss, sizes, {"temperature": temperature, "scale": scale})
    if isinstance(loss, str) and loss in FORMULAS:
        if settings:
            raise UserError(f"{loss} has no setting {', '.join(settings)}: leave it out")
        size = sizes[_DEPENDS_ON[loss][0]]
        found = _by_formula(loss, size or 0, temperature or _BASE_TEMPERATURE)
    else:
        if temperature is not None:
            settings["temperature"] = temperature
        if loss == "barlow_twins":
            found = _of_barlow_twins(dim or 0, settings)
        else:
            found = [_of_function(loss, settings, *((2, 2) if isinstance(loss, str) else (num_pairs or 2, dim or 2)))]
    return [replace(each, value=scale * each.value, deviation=scale * each.deviation) for each in found]


def find_plateau(known: list[Plateau], value: float | str) -> Plateau | None:
    """Return the plateau that a reported loss is on, the nearest one, or None.

    The loss may deviate by :attr:`Plateau.deviation`: 0.05 % of a saddle value, 0.0005 of the value 0, a tenth of the
    distance between the plateaus d − k. Text may also deviate by one unit of its last digit, as from rounding or
    truncation.

    Args:
        known: plateaus of the loss.
        value: the reported loss; as text, with the digits that are known: ``"4.80"`` is more precise than ``"4.8"``.

    Raises:
        ValueError: not a finite number, or text whose unit of the last digit is above 5 % of the plateau, or reaches
            another plateau.

    """
    number = _number(value)
    unit = float(Decimal(1).scaleb(int(number.as_tuple().exponent))) if isinstance(value, str) and number else 0.0
    unit *= 1 + 1e-9
    nearest, *others = sorted(known, key=lambda plateau: abs(plateau.value - float(number)))
    if abs(nearest.value - float(number)) > max(unit, nearest.deviation * (1 + 1e-9)):
        return None
    others = [each for each in others if each.value != nearest.value and abs(each.value - float(number)) <= unit]
    if others or unit > max(_COARSE * abs(nearest.value), nearest.deviation, _COARSE):
        compared = " and ".join(f"{plateau.value:.4g}" for plateau in (nearest, *others[:1]))
        raise UserError(f"the value {value} has too few digits to compare it with {compared}: give more digits")
    return nearest


def _number(value: float | str) -> Decimal:
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        raise UserError(f"the value of the loss must be a number, got {value}") from None
    if not number.is_finite():
        raise UserError(f"the loss is {value}, so training has diverged: lower the learning rate")
    return number


def _check_arguments(loss: Any, sizes: dict[str, int | None], factors: dict[str, float | None]) -> None:
    names = dict.fromkeys((*LOSSES, *FORMULAS))
    if isinstance(loss, str) and loss not in names:
        raise UserError(f"loss must be one of {', '.join(names)}, or the dotted path of a function, got {loss!r}")
    name = loss if isinstance(loss, str) else "a function"
    for size in _DEPENDS_ON.get(name, ["num_pairs", "dim"]):
        if sizes[size] is None:
            raise UserError(f"the plateaus of {name} depend on {size}: give {size} (option {_OPTIONS[size]})")
    for size, number in sizes.items():
        if number is not None and not (isinstance(number, Integral) and 2 <= number <= _LARGEST):
            valid = f"{size} (option {_OPTIONS[size]}) must be an integer of at least 2 and at most {_LARGEST}"
            raise UserError(f"{valid}, got {number!r}: give that of the run")
    for name, factor in factors.items():
        if factor is not None and not (isinstance(factor, Real) and 0 < factor < math.inf):
            valid = f"{name} (option {_OPTIONS[name]}) must be positive and finite"
            raise UserError(f"{valid}, got {factor!r}: give that of the run")


def _by_formula(loss: str, size: int, temperature: float) -> list[Plateau]:
    """Return the saddle values of a loss of logits, for n pairs or K prototypes."""
    if loss in ("simclr", "supcon"):
        factor = temperature / _BASE_TEMPERATURE if loss == "supcon" else 1.0
        return [_saddle(factor * math.log(2 * size - 1))]
    if loss == "siglip":
        learned = math.log(size) + (size - 1) * math.log(size / (size - 1))
        return [
            _saddle(size * math.log(2), ", initial temperature and bias"),
            _saddle(learned, ", only the bias of the logits"),
        ]
    items = "pairs" if loss == "clip" else "prototypes"
    return [_saddle(math.log(size), f", all {size} {items} are equally likely")]


def _saddle(value: float, condition: str = "") -> Plateau:
    return Plateau(value, _DEVIATION * (abs(value) or 1.0), 0, f"no mode is learned{condition}")


def _of_barlow_twins(dim: int, settings: dict[str, Any]) -> list[Plateau]:
    """Return the saddle value d, and the plateaus d − k of the analytical loss."""
    chosen = loss_settings("barlow_twins", settings)
    if chosen["off_diagonal_weight"] != 1 or chosen["normalize"]:
        return [_saddle(float(dim))]
    texts = ["no mode is learned", *(f"{k} of {dim} modes learned" for k in range(1, dim + 1))]
    return [Plateau(float(dim - k), _DEVIATION_BETWEEN_MODES, k, text) for k, text in enumerate(texts)]


def _of_function(loss: str | PairLoss, settings: dict[str, Any], num_pairs: int, dim: int) -> Plateau:
    """Return the saddle value of a loss; of a loss given by name it depends neither on n nor on d."""
    function = bound_loss(loss, settings)

    def total(z1: Tensor, z2: Tensor) -> Tensor:
        return sum_terms(named_terms(function(z1, z2)))

    unit = torch.zeros(dim, dtype=torch.float64, device="cpu")  # for a loss that is not finite at 0, as of cosines
    unit[0] = 1
    try:
        value = saddle_value(total, num_pairs, dim)
        value = value if math.isfinite(value) else saddle_value(total, num_pairs, dim, unit)
    except UserError:
        raise
    except Exception as error:
        shape = f"float64 embeddings of shape ({num_pairs}, {dim})"
        raise UserError(
            f"the loss fails for {shape}, with {reason(error)}: accept them, or give smaller sizes"
        ) from error
    if not math.isfinite(value):
        raise UserError(f"the loss is {value} for equal embeddings: it has no known plateau")
    return _saddle(value)

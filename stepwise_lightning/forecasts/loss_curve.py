"""Diagnosis of a run from its training losses alone."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.forecasts.diagnosis import CAUSES, Diagnosis
from stepwise_lightning.forecasts.run_state import DIVERGED, last_loss
from stepwise_lightning.precision import TensorLike, as_float64
from stepwise_lightning.theory.loss_derivatives import PairLoss
from stepwise_lightning.theory.plateaus import Plateau, find_plateau, plateaus

_BELOW = 0.05  # of the saddle value: a mode was learned
_FALLING = 0.01  # relative change between the last two quarters of the losses; with the other sign it rises
_RISEN = 2  # times the first losses, for a loss that still rises
_GIVE = "for the cause, give the record of a SpectrumLogger, and the module with its data"


def diagnose_losses(
    values: TensorLike,
    loss: str | PairLoss | None,
    num_pairs: int | None,
    settings: dict[str, Any],
    max_steps: int | None,
) -> Diagnosis:
    """Return the diagnosis of losses (T,), one per step or epoch; see :func:`stepwise_lightning.diagnose`."""
    losses = as_float64(values, "losses").flatten().cpu()
    if len(losses) < 2:
        raise UserError(f"a diagnosis needs at least two losses, got {len(losses)}")
    known = [] if loss is None else plateaus(loss, **{"num_pairs": num_pairs} | settings)
    step, end, losses = len(losses) - 1, float(losses[-1]), losses[losses.isfinite()]
    last = last_loss(losses) if math.isfinite(end) else math.nan
    saddles = [plateau.value for plateau in known if not plateau.num_learned]
    saddle = min(saddles, key=lambda value: abs(value - last), default=math.nan)
    found = find_plateau(known, last) if known and math.isfinite(last) else None
    verdict, reading = _verdict(losses, last, end, found)
    if found is not None and found.num_learned and found is known[-1]:
        verdict = "finished"
    missing = "" if verdict in ("learning", "finished") else _GIVE
    if not known:
        missing = "the plateaus of the loss are not known: give loss, a name or a function"
    causes = [
        cause
        for cause in CAUSES
        if not cause.startswith(("few", "nothing", "the loss", "the learning rate is too high"))
    ]
    if verdict in ("fell_back", "diverged"):
        causes = [cause for cause in CAUSES if cause.startswith(("the learning rate is too high", "half"))]
    elif found is None or found.num_learned or verdict == "learning":
        causes = []
    if verdict == "plateau" and found is not None and not found.num_learned and max_steps and step + 1 >= max_steps:
        verdict = "stuck"
    return Diagnosis(
        verdict, step, None if found is None else found.num_learned, loss=last, saddle_value=saddle, evidence=reading,
        possible_causes=tuple(causes), missing=missing,
    )  # fmt: skip


def _verdict(losses: Tensor, last: float, end: float, found: Plateau | None) -> tuple[str, str]:
    """Return the verdict of the finite losses, whose end has the median ``last``, and the numbers that indicate it."""
    first = last_loss(losses.flip(0))
    if not math.isfinite(end) or last > DIVERGED * max(abs(first), 1e-3):
        return "diverged", f"the loss went from {first:.4g} to {end:.4g}"
    if found is not None and not found.num_learned:
        window = max(1, len(losses) // 20)
        lowest = float(losses.unfold(0, window, window).median(1).values.min())
        if lowest < found.value - _BELOW * abs(found.value):
            return "fell_back", f"the loss was {lowest:.4g} before"
        return "plateau", "the loss is that of equal embeddings"
    if found is not None:
        return "plateau", f"the loss is on the plateau {found.value:.4g}"
    quarter = max(1, len(losses) // 4)
    before, now = float(losses[-2 * quarter : -quarter].median()), float(losses[-quarter:].median())
    if before - now > _FALLING * abs(before):
        return "learning", f"the loss fell from {before:.4g} to {now:.4g}"
    if now - before > _FALLING * abs(before):
        rises = f"the loss rises, from {first:.4g} to {last:.4g}"
        return ("diverged" if last > _RISEN * max(abs(first), 1e-3) else "plateau"), rises
    return "plateau", "the loss does not fall, but is on no known plateau"

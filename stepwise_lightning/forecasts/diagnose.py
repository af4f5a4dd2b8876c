"""Diagnosis of a run from its record or its losses, and from its network and data if they are given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from numbers import Integral
from typing import Any

from torch import nn

from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.features import Views, views_in
from stepwise_lightning.forecasts.causes import cause_of_failure, cause_of_plateau
from stepwise_lightning.forecasts.diagnosis import CAUSES, Diagnosis
from stepwise_lightning.forecasts.evidence import Evidence, gather_evidence
from stepwise_lightning.forecasts.loss_curve import diagnose_losses
from stepwise_lightning.forecasts.run_state import (
    STILL,
    RunState,
    find_verdict,
    is_near_saddle,
    known_saddle_value,
    last_loss,
    run_state,
)
from stepwise_lightning.forecasts.sgd import loss_of
from stepwise_lightning.forecasts.simulate import NUM_PAIRS
from stepwise_lightning.losses import LOSSES
from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.precision import TensorLike
from stepwise_lightning.spectrum.record import SpectrumRecord
from stepwise_lightning.theory.loss_derivatives import PairLoss
from stepwise_lightning.theory.loss_signature import checked_settings

_ERROR = 0.5  # of the remaining time, for extrapolations and forecasts without measured errors
_FIRST_ERROR = 0.2  # of the remaining time of the first mode, from its growth rate
(_LOW, _HIGH, _DECAY, _CHANCE_PAIRS, _FEATURES, _HALF, _NO_MODE, _FEW, _SPREAD, _NOTHING) = CAUSES
GIVE = "for the cause, give the module with its weights and batches of its data"
_FUNCTION_STEPS = 500  # of the simulation of a function, which takes milliseconds per step
# Losses whose rates from a small start also describe later modes.
_DEFLATES = ("barlow_twins",)


def diagnose(
    record: SpectrumRecord | TensorLike,
    module: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    *,
    loss: str | PairLoss | None = None,
    settings: dict[str, Any] | None = None,
    num_pairs: int | None = None,
    max_steps: int | None = None,
    start: int | None = None,
    matrix: str | None = None,
    precision: str | None = None,
    weight_decay: float | None = None,
    views: Views | None = None,
    num_feature_pairs: int = NUM_PAIRS,
) -> Diagnosis:
    """Return the state of a run, and the cause if its loss does not decrease.

    A record alone determines the verdict, but not every cause: :attr:`Diagnosis.possible_causes` lists those that
    remain. The features and growth rates of a network determine the cause. They are known for modules that end in a
    linear layer and are trained by SGD on a loss given by name or as a function, see :func:`forecast`.

    Args:
        record: of the run; or its training losses, (T,), for a diagnosis from plateaus of the loss alone.
        module: the network with the weights of step ``start``, see :func:`forecast`. If training has diverged or fallen
            back, give the initial weights and ``start=0``.
        batches: batches of two views, as for :func:`forecast`.
        loss: name in ``stepwise_lightning.losses.LOSSES`` or ``stepwise_lightning.theory.plateaus.FORMULAS``, or a
            function of both views' embeddings; None for the loss of the module, or if unknown.
        settings: arguments of a loss given by its name; for losses (T,) also ``dim``, ``num_prototypes``,
            ``temperature`` and ``scale`` of :func:`stepwise_lightning.theory.plateaus`.
        num_pairs: global batch size; None for the size of ``batches``, or if unknown.
        max_steps: number of steps of training; None if unknown.
        start: step of the weights of ``module``; None for the last step of the record.
        matrix: name of the matrix that the loss drives; None for ``module.driven_matrix``, or the first one measured.
        precision: of Lightning's Trainer; None if unknown.
        weight_decay: of SGD; None for that of the module, or if unknown.
        views: see :func:`forecast`.
        num_feature_pairs: number of pairs whose features are used, ``num_pairs`` of :func:`forecast`.

    Example:
        >>> from stepwise_lightning import diagnose
        >>> diagnose([6.9304, 6.9305, 6.9305, 6.9304], loss="simclr", num_pairs=512).verdict
        'plateau'

    Raises:
        ValueError: fewer than two measurements or losses, a matrix that was not measured, invalid arguments.

    """
    _check_counts(num_pairs=num_pairs, max_steps=max_steps, num_feature_pairs=num_feature_pairs)
    precision = None if precision is None else str(precision)
    loss, settings = _loss_and_settings(module, loss, settings)
    if not isinstance(record, SpectrumRecord):
        return diagnose_losses(record, loss, num_pairs, settings, max_steps)
    if len(record) < 2:
        raise UserError(f"a diagnosis needs at least two measurements, got {len(record)}: train longer")
    state = run_state(record, _matrix(record, module, loss, matrix), loss, settings)
    evidence, missing = None, GIVE
    if module is not None and batches is not None and find_verdict(record, state, math.nan, max_steps)[0] != "finished":
        options: dict[str, Any] = {"loss": loss, "settings": settings, "views": views}
        options |= {"precision": precision or "32-true", "num_pairs": num_feature_pairs}
        evidence, missing = _evidence(module, batches, state, start, max_steps, options)
    if num_pairs is None and batches is not None:
        num_pairs = _batch_size(batches, views) if evidence is None else evidence.batch_size
    dim = record.eigenvalues(state.matrix).shape[1]
    last = last_loss(record.losses[record.losses.isfinite()])
    saddle, unknown = known_saddle_value(loss, {"num_pairs": num_pairs, "dim": dim} | settings, last)
    verdict, reading = find_verdict(record, state, saddle, max_steps)
    result = Diagnosis(
        verdict, state.step, state.num_learned, state.num_modes, last, saddle, state.growth, evidence=reading
    )
    if evidence is not None:
        return _without_unknown_modes(_with_evidence(result, state, evidence, record, max_steps), state)
    decay = getattr(module, "hparams", {}).get("weight_decay") if weight_decay is None else weight_decay
    result = _without_unknown_modes(_from_record(result, state, record, precision, decay, max_steps), state)
    asks = bool(result.possible_causes) or (module is not None and missing != GIVE)
    return replace(result, missing="; ".join(text for text in (missing if asks else "", unknown) if text))


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and not (isinstance(count, Integral) and count > 0):
            raise UserError(f"{name} must be a positive integer, got {count!r}: leave it out if unknown")


def _loss_and_settings(
    module: nn.Module | None, loss: str | PairLoss | None, settings: dict[str, Any] | None
) -> tuple[str | PairLoss | None, dict[str, Any]]:
    """Return the loss, by default that of a module of this package, and its settings, completed from the module."""
    settings = settings or {}
    if isinstance(module, JointEmbedding):
        loss = loss_of(module) if loss is None else loss
        if not isinstance(loss, str) or loss in LOSSES:
            configured = {name: module.hparams[name] for name in checked_settings(loss, {}) if name in module.hparams}
            settings = configured | settings
    if loss is None and settings:
        raise UserError(f"settings belong to a loss, got {', '.join(settings)}: give loss")
    return loss, settings


def _matrix(record: SpectrumRecord, module: nn.Module | None, loss: Any, matrix: str | None) -> str:
    """Return the matrix to diagnose: ``matrix``, or a measured one, preferably one that the loss drives."""
    driven = [getattr(module, "driven_matrix", None)]
    driven += [LOSSES[loss].driven_matrix] if isinstance(loss, str) and loss in LOSSES else []
    measured = [each for each in (*driven, *record.matrices) if each in record.matrices]
    if not (matrix or measured):
        raise UserError("the record has no finite eigenvalues: measure them with a SpectrumLogger")
    return matrix or measured[0]


def _batch_size(batches: Iterable[Any], views: Views | None) -> int | None:
    """Return the number of pairs in the first batch, None if unknown."""
    with suppress(UserError):
        return next((len(views_in(batch, views)[0]) for batch in batches), None)
    return None


def _counts_modes(result: Diagnosis, state: RunState) -> bool:
    """Return False if learned modes cannot be counted: θ is unknown, and the loss is not near its saddle value."""
    return math.isfinite(state.threshold) or bool(is_near_saddle(result.loss, result.saddle_value))


def _without_unknown_modes(result: Diagnosis, state: RunState) -> Diagnosis:
    """Return the diagnosis, without number, growth and step of modes that cannot be counted."""
    if _counts_modes(result, state):
        return result
    nan = math.nan
    return replace(
        result, num_learned=None, growth_per_step=nan, expected_growth=nan, next_step=nan, next_range=(nan, nan)
    )


def _evidence(
    module: nn.Module, batches: Iterable[Any], state: RunState, start: int | None, max_steps: int | None, options: Any
) -> tuple[Evidence | None, str]:
    """Return the evidence of a network, or None and the reason."""
    start = state.step if start is None else start
    horizon = max(max_steps or 0, 2 * state.step, start + 100)
    if not isinstance(options["loss"], str):
        horizon = min(horizon, start + _FUNCTION_STEPS)
    if options["loss"] is None:
        return None, f"growth rates are not known, because {type(module).__name__} has no known loss: give loss"
    try:
        return gather_evidence(module, batches, start, horizon, with_rates=start < state.step, **options), ""
    except UserError as error:
        return None, f"growth rates are not known for this module and loss: {error}"
    except Exception as error:
        if isinstance(options["loss"], str):
            raise
        return None, f"growth rates are not known for this loss ({reason(error)})"


def _with_next_step(result: Diagnosis, step: float, error: float) -> Diagnosis:
    remaining = step - result.step
    span = (result.step + (1 - error) * remaining, result.step + (1 + error) * remaining)
    return replace(result, next_step=step, next_range=span if math.isfinite(step) else (math.nan, math.nan))


def _from_record(
    result: Diagnosis,
    state: RunState,
    record: SpectrumRecord,
    precision: str | None,
    weight_decay: float | None,
    max_steps: int | None,
) -> Diagnosis:
    """Add the next step and the cause as far as a record determines them."""
    result = _with_next_step(result, state.extrapolated_step(state.growth), _ERROR)
    excluded = {_FEW, _SPREAD, _NOTHING, _HIGH}
    excluded |= {_DECAY} if weight_decay == 0 else set()
    excluded |= {_HALF} if precision is not None and precision.startswith(("32", "64")) else set()
    if result.verdict in ("fell_back", "diverged"):
        return replace(result, possible_causes=tuple(each for each in (_HIGH, _HALF) if each not in excluded - {_HIGH}))
    if result.verdict == "collapsed":
        return replace(result, possible_causes=(_SPREAD, _HIGH))
    if result.verdict == "stuck":
        if state.growth > 1 + STILL:  # random pairs grow slowly, too
            return replace(result, possible_causes=(_LOW, _CHANCE_PAIRS))
        hidden = [name for name in record.matrices if name.endswith(".covariance")]
        if any(float(record.eigenvalues(name)[-1].nan_to_num(0.0).max()) < 1e-12 for name in hidden):
            return replace(result, cause=_FEATURES, evidence=f"all eigenvalues of {hidden[0]} are 0")
        return replace(result, possible_causes=tuple(cause for cause in CAUSES if cause not in excluded))
    return _with_wait(result, state, max_steps)


def _with_wait(result: Diagnosis, state: RunState, max_steps: int | None) -> Diagnosis:
    """Add the cause "nothing is wrong" on a plateau that ends before training does, else the number of steps."""
    if result.verdict != "plateau" or not math.isfinite(result.next_step) or not _counts_modes(result, state):
        return result
    if max_steps is None or result.next_step <= max_steps:
        return replace(result, cause=_NOTHING)
    needs = f"the next mode needs about {result.next_step:.0f} steps, and training has {max_steps}"
    return replace(result, evidence=needs)


def _with_evidence(
    result: Diagnosis, state: RunState, evidence: Evidence, record: SpectrumRecord, max_steps: int | None
) -> Diagnosis:
    """Add growth rates, the next step and the cause, from the features of the network."""
    if result.verdict in ("fell_back", "diverged"):
        cause, reading = cause_of_failure(evidence)
        possible = () if cause else (_HIGH, *((_HALF,) if evidence.is_half else ()))
        reading = "; ".join(text for text in (result.evidence, reading) if text)
        return replace(result, cause=cause, evidence=reading, possible_causes=possible)
    growth = math.nan
    if state.num_learned == 0 or evidence.sgd.loss in _DEFLATES:
        growth = evidence.growth(state.num_learned)
    result = replace(result, expected_growth=growth)
    result = _with_next_step(result, *_next_step(state, evidence, record, growth))
    if result.verdict == "collapsed":
        return replace(result, possible_causes=(_SPREAD, _HIGH))
    if result.verdict == "finished":
        return result
    near = is_near_saddle(result.loss, result.saddle_value)
    on_saddle = state.num_learned == 0 and (result.verdict == "stuck" or near is not False)
    on_saddle &= _counts_modes(result, state)
    cause, reading = cause_of_plateau(evidence, state, on_saddle)
    if cause:
        stops = on_saddle or (cause in (_DECAY, _FEW, _NO_MODE) and state.is_still)
        if stops:
            result = replace(result, next_step=math.inf, next_range=(math.nan, math.nan))
        return replace(result, verdict="stuck" if stops else result.verdict, cause=cause, evidence=reading)
    if on_saddle and (result.verdict == "stuck" or result.next_step > (max_steps or math.inf)):
        result = replace(result, verdict="plateau")
    result = _with_wait(result, state, max_steps)
    if result.verdict != "plateau" or result.cause:
        return result
    reading = result.evidence or "with the present features the next mode does not grow; features may change"
    if not state.num_learned and evidence.rate(0) > evidence.sgd.weight_decay and _counts_modes(result, state):
        reading = result.evidence or f"the next mode grows by {max(growth - 1, 0):.1g} per step"
        return replace(result, verdict="stuck", cause=_LOW, evidence=reading)
    return replace(result, evidence=reading)


def _next_step(state: RunState, evidence: Evidence, record: SpectrumRecord, growth: float) -> tuple[float, float]:
    """Return the step of the next mode, and the relative error of the remaining time."""
    mode, forecast = state.num_learned, evidence.forecast
    if mode == 0 and math.isfinite(growth) and growth <= 1 + STILL:
        return math.inf, math.nan
    if forecast is not None and mode == 0 and math.isinf(state.threshold):
        state = replace(state, threshold=forecast.threshold)
    extrapolated = state.extrapolated_step(state.growth)
    if forecast is None or mode >= len(forecast.step_times):
        return extrapolated, _ERROR
    corrected = forecast.with_plateau_correction(record)
    step, error = float(corrected.step_times[mode]), float(corrected.errors[mode])
    if not math.isfinite(step):  # not before the end of the forecast
        return (state.extrapolated_step(growth), _FIRST_ERROR) if mode == 0 else (extrapolated, _ERROR)
    if math.isnan(error) and mode and math.isfinite(extrapolated):  # not reliable
        step = min(step, extrapolated)
    return step, error if math.isfinite(error) else _ERROR

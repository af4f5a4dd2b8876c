"""Checks of a loss and their report."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.loss_checks.report import LossReport, ReportRow
from stepwise_lightning.loss_checks.two_ranks import (
    Evaluation,
    deviation,
    evaluate_on_two_ranks,
    tolerance,
    value_and_gradient,
)
from stepwise_lightning.losses import sum_terms
from stepwise_lightning.precision import TensorLike
from stepwise_lightning.theory.linear_flow import growth_modes
from stepwise_lightning.theory.loss_derivatives import TOLERANCE, PairLoss
from stepwise_lightning.theory.loss_signature import LossSignature, bound_loss, loss_signature
from stepwise_lightning.user_loss import checked_loss, named_terms

_DIFFERENT = 1e-3  # relative deviation of float32 gradients of a different function
_EPS = 1e-2  # relative effect of an eps on embeddings of order one
_HALF_TOLERANCE = 0.1  # relative error of a gradient from half precision
_CONTRACT = "accept two float32 tensors of shape (n, d)"
_NOT_FINITE = "value or gradient is not finite"

# Result, value and remedy of a check.
Outcome = tuple[str, str, str]


def check_loss(
    loss: str | PairLoss, dim: int, num_pairs: int, h1: TensorLike | None = None, h2: TensorLike | None = None
) -> LossReport:
    """Check a loss of two views for faults, on random embeddings on the CPU.

    ===========================  =====================================================================================
    check                        fails if
    ===========================  =====================================================================================
    value                        the loss raises, returns no scalar or terms, is not finite, or changes its inputs
    repeated call                gradients of two calls with equal random seeds differ
    order of pairs               gradients depend on the order of the pairs
    rotation                     never: a note if the loss prefers directions of the embedding
    scale of views               the loss ignores the scale of both views together, but not the scale of one
    equal embeddings             never: value before the first mode is learned; a note if there are no growth rates
    one pair                     never: a note if the loss is NaN or infinite, without an error
    more dimensions than pairs   never: a note if the loss is undefined
    bfloat16, float16, autocast  never: a note if gradients are not finite, or deviate by more than 10 %
    two ranks                    a loss that communicates has another gradient than one process on the joined batch,
                                 after DDP has averaged the gradients of two ranks
    two ranks in JointEmbedding  the same for a loss that does not communicate, where the module gathers embeddings
    growing modes                no mode grows from a small start
    ===========================  =====================================================================================

    The two ranks are processes. On Linux without an accelerator they are forked, which works for any loss, also in a
    notebook. Elsewhere new interpreters are started: the loss must then be picklable, and a script needs
    ``if __name__ == "__main__":``.

    Args:
        loss: a function of the embeddings of both views, (n, d) each, that returns a scalar or a dictionary of
            scalars, its terms; or a name in ``stepwise_lightning.losses.LOSSES``.
        dim: d.
        num_pairs: n ≥ 2, the global batch size. Smaller n and d than in training take less time, and find the same
            faults except overflow in half precision.
        h1: features of the first views, as in ``theory.growth_modes``, to count growing modes; None to omit this.
        h2: features of the second views.

    Returns:
        A report with one row for each check and the property ``passed``. It ends early if the loss fails the first two.

    Raises:
        ValueError: sizes out of range, features of one view only, or a loss that is neither a function nor a name.

    """
    if dim < 1 or num_pairs < 2:
        raise UserError(f"dim must be at least 1 and num_pairs at least 2, got {dim} and {num_pairs}")
    if (h1 is None) != (h2 is None):
        raise UserError("features of both views are needed, got one view: pass h1 and h2, or neither")
    function = bound_loss(loss, {})
    if isinstance(function, nn.Module):  # a copy, because the checks change its state and its data type
        function = copy.deepcopy(function).cpu()
    z = embeddings(num_pairs, dim)
    rows = [ReportRow("value", *_value(function, z.float()))]
    if rows[0].result != "fail":
        rows.append(ReportRow("repeated call", *_repeated_call(function, z.float())))
    if rows[-1].result == "fail":
        return LossReport(rows)
    function = _Seeded(function)
    exact, z = _in_float64(function, z)
    signature, bias = _signature(exact, dim, num_pairs)
    rows += [
        _row("order of pairs", _order_of_pairs, exact, z),
        _row("rotation", _rotation, exact, z),
        _row("scale of views", _scale_of_views, exact, z),
        _row("equal embeddings", _equal_embeddings, signature, bias),
        _row("one pair", _one_pair, exact, z),
        _row("more dimensions than pairs", _more_dimensions, exact, z),
        *(_row(name, _half_precision, function, z, name) for name in ("bfloat16", "float16", "autocast")),
    ]
    two = evaluate_on_two_ranks(exact, embeddings(2 * max(2, num_pairs // 2), dim).to(z))
    rows += [ReportRow("two ranks", *two.of_loss()), ReportRow("two ranks in JointEmbedding", *two.of_module())]
    if h1 is not None and h2 is not None:
        rows.append(_row("growing modes", _growing_modes, exact, dim, h1, h2, bias))
    return LossReport(rows)


class _Seeded:
    """The sum of the terms of a loss, with equal random numbers in each call; keeps the global random state."""

    def __init__(self, loss: PairLoss, seed: int = 0) -> None:
        self.loss, self.seed = loss, seed

    def __call__(self, z1: Tensor, z2: Tensor) -> Tensor:
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(self.seed)  # of the CPU: torch.manual_seed takes milliseconds
            return sum_terms(named_terms(self.loss(z1, z2)))
        finally:
            torch.set_rng_state(state)


def embeddings(num_pairs: int, dim: int) -> Tensor:
    """Return correlated random embeddings of order one, (2, n, d), float64."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, num_pairs, dim, generator=generator, dtype=torch.float64)
    return z[:1] + 0.5 * z[1:]


def _in_float64(loss: _Seeded, z: Tensor) -> tuple[_Seeded, Tensor]:
    """Return the loss and embeddings in float64, or in float32 for a loss that refuses float64."""
    exact = _Seeded(copy.deepcopy(loss.loss).double()) if isinstance(loss.loss, nn.Module) else loss
    try:
        value = exact(z[0].clone(), z[1].clone())
    except Exception:
        return loss, z.float()
    return (exact, z) if value.dtype == torch.float64 else (loss, z.float())


def _row(check: str, function: Callable[..., Outcome], *args: Any) -> ReportRow:
    """Return the row of a check; an unexpected error is its value."""
    try:
        return ReportRow(check, *function(*args))
    except Exception as error:
        return ReportRow(check, "not checked", reason(error), "")


def _value(loss: PairLoss, z: Tensor) -> Outcome:
    leaf = z.clone().requires_grad_()
    views = leaf[0].clone(), leaf[1].clone()
    try:
        value = _Seeded(checked_loss(loss))(*views)
    except UserError as error:
        text, _, remedy = str(error).rpartition(": ")
        return "fail", text, remedy
    except Exception as error:
        without_group = "process group" in str(error)
        remedy = "communicate only if torch.distributed.is_initialized()" if without_group else _CONTRACT
        return "fail", reason(error), remedy
    if not value.requires_grad:
        return "fail", "has no gradient", "compute it by torch operations, without .item() or .detach()"
    if not all(torch.equal(view, before) for view, before in zip(views, z, strict=True)):
        return "fail", "changes its inputs", "replace operations in place, such as sub_ or /="
    (gradient,) = torch.autograd.grad(value, leaf)
    if not (value.isfinite() and gradient.isfinite().all()):
        return (
            "fail",
            f"{value.item():.4g} or its gradient is not finite",
            "add a positive eps under roots and divisions",
        )
    if not all(view.any() for view in gradient):
        return "note", f"{value.item():.4g}; no gradient in view {1 + int(gradient[0].any())}", ""
    return "pass", f"{value.item():.4g} at random embeddings", ""


def _repeated_call(loss: PairLoss, z: Tensor) -> Outcome:
    calls = (0, z), (0, 2 * z), (0, z), (1, z)  # another batch in between, which a queue would keep
    first, _, again, other = (value_and_gradient(_Seeded(loss, seed), each).gradient for seed, each in calls)
    if deviation(again, first) > _DIFFERENT:
        remedy = "remove queues and averages over steps; seed generators of its own in each call"
        return "fail", "gradients differ at equal random seeds", remedy
    if (difference := deviation(other, first)) > _DIFFERENT:
        remedy = "use equal random numbers on all ranks; the other rows are for one seed"
        return "note", f"random: gradients of two seeds deviate by {difference:.2g}", remedy
    return "pass", "", ""


def _order_of_pairs(loss: PairLoss, z: Tensor) -> Outcome:
    order = torch.arange(z.shape[1]).roll(1)
    gradient, permuted = (value_and_gradient(loss, each).gradient for each in (z, z[:, order]))
    if (difference := deviation(permuted, gradient[:, order])) > tolerance(z):
        return "fail", f"gradients deviate by {difference:.2g}", "remove labels, masks and weights bound to positions"
    return "pass", "irrelevant", ""


def _rotation(loss: PairLoss, z: Tensor) -> Outcome:
    rotation = torch.linalg.qr(embeddings(z.shape[2], z.shape[2])[0]).Q.to(z)
    gradient, rotated = (value_and_gradient(loss, each).gradient for each in (z, z @ rotation))
    if (difference := deviation(rotated, gradient @ rotation)) > tolerance(z):
        return "note", f"not invariant: gradients deviate by {difference:.2g}", ""
    return "pass", "invariant", ""


def _scale_of_views(loss: PairLoss, z: Tensor) -> Outcome:
    with torch.no_grad():
        value, both, one = (float(loss(a * z[0], b * z[1])) for a, b in ((1, 1), (2, 2), (1, 2)))
    if abs(both - value) > _EPS * abs(value):
        return "pass", "the loss depends on the scale of embeddings", ""
    if abs(one - value) > _EPS * abs(value):
        return "fail", "the views are normalised together", "normalise each view with its own mean and variance"
    return "pass", "each view is normalised", ""


def _signature(loss: PairLoss, dim: int, num_pairs: int) -> tuple[LossSignature | Exception, Tensor | None]:
    """Return the signature without a bias, else with a bias, else the error of the latter."""
    bias = torch.eye(dim, dtype=torch.float64)[0]
    with suppress(Exception):
        return loss_signature(loss, dim, num_pairs), None
    try:
        return loss_signature(loss, dim, num_pairs, bias), bias
    except Exception as error:
        return error, None


def _equal_embeddings(signature: LossSignature | Exception, bias: Tensor | None) -> Outcome:
    if isinstance(signature, Exception):
        is_known = isinstance(signature, UserError)
        remedy = str(signature) if is_known else f"float64 embeddings must not raise {reason(signature)}"
        return "note", "no growth rates", remedy
    value = f"{signature.saddle_value:.4g}, {'isotropic' if signature.isotropic else 'prefers directions'}"
    gradient = float(signature.gradient.norm())
    if gradient > TOLERANCE * float(signature.alpha.norm() + signature.beta.norm()):
        value += f", gradient {gradient:.2g}: the mean embedding moves before modes grow"
        return "note", value, "use a loss without a force on the mean, or another bias"
    if bias is not None:
        value = f"not differentiable at 0; with a bias of norm 1: {value}, gradient 0"
        return "note", value, "give the last layer a bias"
    return "pass", f"{value}, gradient 0", ""


def _one_pair(loss: PairLoss, z: Tensor) -> Outcome:
    result = _attempt(loss, z[:, :1])
    if result == _NOT_FINITE:
        return "note", f"{_NOT_FINITE}, without an error", "use drop_last=True, or raise an error in the loss"
    return "pass", f"raises {result}" if isinstance(result, str) else f"{result.value:.4g}", ""


def _more_dimensions(loss: PairLoss, z: Tensor) -> Outcome:
    few = max(2, min(z.shape[1:]) // 2)
    if few >= z.shape[2]:
        return "not checked", "needs a dim of at least 3", ""
    result = _attempt(loss, z[:, :few])
    if isinstance(result, str):
        return "note", f"{few} pairs: {result}", "use batches of more pairs than dimensions"
    return "pass", f"finite for {few} pairs", ""


def _half_precision(loss: PairLoss, z: Tensor, name: str) -> Outcome:
    z = z.to(torch.float32 if name == "autocast" else getattr(torch, name))
    exact, remedy = value_and_gradient(loss, z.float()), "pass z1.float(), z2.float() without autocast"
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
        result = _attempt(loss, z)
    if isinstance(result, str):
        return "note", result, f"{remedy}, as JointEmbedding does"
    error = deviation(result.gradient, exact.gradient)
    value = f"{result.value:.4g}, in float32 {exact.value:.4g}; gradients deviate by {error:.1g}"
    return ("pass", value, "") if error <= _HALF_TOLERANCE else ("note", value, f"{remedy}, as JointEmbedding does")


def _attempt(loss: PairLoss, z: Tensor) -> Evaluation | str:
    """Return the loss and its gradient, or an error; warnings, as of a variance of one pair, are not shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = value_and_gradient(loss, z)
    except Exception as error:
        return reason(error)
    return result if math.isfinite(result.value) and result.gradient.isfinite().all() else _NOT_FINITE


def _growing_modes(loss: PairLoss, dim: int, h1: TensorLike, h2: TensorLike, bias: Tensor | None) -> Outcome:
    num_modes = min(dim, torch.as_tensor(h1).shape[-1])
    rates = growth_modes(loss, h1, h2, dim, num_modes, bias).rates.real
    growing = int((rates > 0).sum())
    value = f"{growing} of {num_modes}, growth rates {rates[0]:.3g} to {rates[-1]:.3g}"
    if not growing:
        return "fail", value, "increase the weight of the term that spreads embeddings"
    return "pass", value, ""

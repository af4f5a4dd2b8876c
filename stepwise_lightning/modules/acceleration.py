r"""Analytical Barlow Twins with gradients that learn all modes in fewer steps (beyond the paper).

Legend
    F (2n, d)   embeddings of both views, stacked; centred per view if the loss centres them
    s           permutation that swaps the two views: row i of s F is the embedding of the other view of the pair
    C (d, d)    (1/2n) Fᵀ s F = Q diag(λ) Qᵀ; ‖C‖ is the largest \|λ\|
    H (2n, m)   inputs of the last linear layer, with a column of ones if the layer has a bias
    G (d, m)    (1/2n) Fᵀ s H; S = G Gᵀ
    P (d, d)    symmetric; treated as a constant when gradients are computed
    η           learning rate

The gradient of ‖C − I‖²_F with respect to F is −(1/2n) s F P with P = 4 (I − C). Modes of small γ are learned late,
because each grows in proportion to its γ. Another P needs only products of d × d matrices. It mixes dimensions of the
embedding, not features, so with small steps the modes of the largest γ are still the ones learned. Preconditioning
features or weights (natural gradients, Adam) instead leads to another subspace.

*Gate*: P = 4 Q diag((1 − λ) / (max(λ, 0) + ε)) Qᵀ. Until a mode is learned, it grows up to 1/ε times as fast as with
gradient descent, and then moves as with gradient descent. The learning rate must stay below the limit of gradient
descent, 1/(4γ_1); near it, the first mode may overshoot tenfold. If Γ has a negative eigenvalue γ_min, a step
multiplies its part of the weights by 1 − 4η\|γ_min\|/ε while a dimension of the embedding is unlearned. Together:
η < min(1/(4γ_1), ε/(2\|γ_min\|)), or 100 · 4ηγ_1 · \|γ_min\|/γ_1 < 2 (:func:`gate_limit`). With a Trainer, a rate above
the limit of the first batch gives a warning; for batches of new pairs, whose eigenvalues differ, it is approximate.
Large steps also mix modes: from weights of scale α a share α^{1−r} of mode j+1 remains in mode j, where
r = log(1 + 4ηγ_{j+1}/ε) / log(1 + 4ηγ_j/ε) is nearer 1 than the γ_{j+1}/γ_j of small steps.

*Lyapunov*: P S + S P = 2 Q diag((1 − λ) max(\|λ\|, φ‖C‖)) Qᵀ. A step ΔW = ηPG of the last layer changes C by
η (P S + S P) to first order. With frozen features, every λ therefore follows dλ/dk = 2η (1 − λ) λ over steps k,
independent of its γ. The learning rate has no unit: stable below 1 with frozen features, slow below 0.1. In a network
the other layers change C too; small networks tolerate about 0.3.

These statements hold for frozen features and full batches (numbers: ``reproduce/figures/faster_modes.py``). Known
failures: with batches of 64 fresh pairs, noise in C and S loses the subspace of the largest γ; with 256 pairs it is not
fully preserved. In a network S covers the last layer only. Hidden layers do not improve, because they get fewer steps.
There is no equation for momentum or Adam on top.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from stepwise_lightning.distributed import all_gather_with_grad
from stepwise_lightning.encoders import last_linear
from stepwise_lightning.errors import UserError
from stepwise_lightning.modules.shipped import BarlowTwins
from stepwise_lightning.precision import as_float64, in_full_precision

Acceleration = Literal["gate", "lyapunov"]
_GATE_FLOOR = 1e-2  # ε
_LYAPUNOV_FLOOR = 1e-3  # φ
# Eigenvalues of S below this share of the largest are round-off: directions without a gradient.
_NO_GRADIENT = 1e-15


class AcceleratedBarlowTwins(BarlowTwins):
    """Analytical Barlow Twins with a gradient that learns all modes in fewer steps (beyond the paper).

    Equations, learning rates and known failures: :mod:`stepwise_lightning.modules.acceleration`.

    Args:
        encoder: module from a view (n, …) to embeddings (n, d); for ``lyapunov`` it must end in a linear layer.
        learning_rate: for ``gate`` the learning rate of gradient descent, below :func:`gate_limit`; for
            ``lyapunov`` 0.1 to 0.3.
        acceleration: ``gate`` or ``lyapunov``.
        off_diagonal_weight: must be 1, as in the analytical loss.
        normalize: must be False, as in the analytical loss.
        center: subtract the mean of each view.
        optimization: see :class:`JointEmbedding`.

    Raises:
        ValueError: an unknown acceleration, a loss other than the analytical one, or, for ``lyapunov``, an encoder that
            does not end in a linear layer.

    """

    def __init__(
        self,
        encoder: nn.Module,
        learning_rate: float,
        acceleration: Acceleration,
        off_diagonal_weight: float = 1.0,
        normalize: bool = False,
        center: bool = False,
        **optimization: Any,
    ) -> None:
        if acceleration not in get_args(Acceleration):
            raise UserError(f"acceleration must be 'gate' or 'lyapunov', got {acceleration!r}")
        if normalize or off_diagonal_weight != 1:
            raise UserError(
                f"AcceleratedBarlowTwins needs the analytical loss, got normalize={normalize} and "
                f"off_diagonal_weight={off_diagonal_weight}: set normalize=False and off_diagonal_weight=1"
            )
        super().__init__(encoder, learning_rate, off_diagonal_weight, normalize, center, **optimization)
        self._inputs = record_last_inputs(encoder) if acceleration == "lyapunov" else ()
        self._gate_is_unchecked = acceleration == "gate" and not self._compile

    @property
    def trains_with_sgd(self) -> bool:
        """Return False, because the weights do not follow the gradient of the loss."""
        return False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch; on the first, warn if the learning rate of the gate is not below its limit."""
        layer = last_linear(self.encoder) if self._gate_is_unchecked else None
        self._gate_is_unchecked = False
        if layer is None:
            return super().training_step(batch, batch_idx)
        inputs: deque[Tensor] = deque(maxlen=2)
        hook = layer.register_forward_hook(partial(_record, inputs, deque(maxlen=1)))
        try:
            loss = super().training_step(batch, batch_idx)
        finally:
            hook.remove()
        if len(inputs) == 2 and loss.isfinite():
            self._check_gate(*(all_gather_with_grad(h) for h in inputs))
        return loss

    def _check_gate(self, h1: Tensor, h2: Tensor) -> None:
        rate, limit = self.hparams["learning_rate"], gate_limit(h1, h2, self.hparams["center"])
        if rate >= limit:
            rank_zero_warn(
                f"learning_rate {rate:g} is not below {limit:.2g}, the limit of the gate for the first batch, and "
                f"training can diverge: choose a learning_rate below {limit:.2g}, larger batches, or 'lyapunov'"
            )

    def loss_terms(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """Return ``on_diagonal`` and ``off_diagonal``; the gradient of their sum is −(1/2n) s F P."""
        h, inputs = self.hparams, [all_gather_with_grad(x) for x in self._inputs]
        return with_gradient(z1, z2, super().loss_terms(z1, z2), h["acceleration"], h["center"], inputs)


def gate(c: Tensor, floor: float = _GATE_FLOOR) -> Tensor:
    """Return P = 4 Q diag((1 − λ) / (max(λ, 0) + ε)) Qᵀ, (d, d), float64, for a symmetric C and ε = ``floor``.

    Example:
        >>> import torch
        >>> gate(torch.diag(torch.tensor([0.0, 1.0]))).tolist()  # 4/ε for a mode at its start, 0 for a learned one
        [[400.0, 0.0], [0.0, 0.0]]

    """
    eigenvalues, q = torch.linalg.eigh(as_float64(c, "C"))
    return 4 * (q * ((1 - eigenvalues) / (eigenvalues.clamp(min=0) + floor))) @ q.T


def gate_limit(h1: Tensor, h2: Tensor, center: bool = False, floor: float = _GATE_FLOOR) -> float:
    """Return min(1/(4γ_1), ε/(2|γ_min|)), the limit of the learning rate of the gate, for features (n, m).

    ``center`` subtracts the mean of each view; ε = ``floor``.

    Example:
        >>> import torch
        >>> h1, h2 = torch.tensor([[2.0**0.5, 0.0], [0.0, 1.0]]), torch.tensor([[2.0**0.5, 0.0], [0.0, -1.0]])
        >>> round(gate_limit(h1, h2), 4)  # Γ = diag(1, −½)
        0.01

    """
    h1, h2 = (as_float64(h, "features") for h in (h1, h2))
    if center:
        h1, h2 = h1 - h1.mean(0), h2 - h2.mean(0)
    gamma = torch.linalg.eigvalsh((h1.T @ h2 + h2.T @ h1) / (2 * len(h1)))
    drive = max(4 * float(gamma[-1]), -2 * float(gamma[0]) / floor)
    return 1 / drive if drive > 0 else math.inf


def lyapunov(c: Tensor, s: Tensor, floor: float = _LYAPUNOV_FLOOR) -> Tensor:
    """Return the solution P of P S + S P = 2 Q diag((1 − λ) max(|λ|, φ‖C‖)) Qᵀ, (d, d), float64.

    In the eigenbasis of S, P_ij is the right-hand side divided by σ_i + σ_j, and 0 if both are round-off. S must be
    computed in float64, because its eigenvalues span as many orders of magnitude as λ. Modes below the share φ =
    ``floor`` of the largest mode grow by φ‖C‖ a step.
    """
    eigenvalues, q = torch.linalg.eigh(as_float64(c, "C"))
    sizes = eigenvalues.abs()
    target = 2 * (q * ((1 - eigenvalues) * torch.maximum(sizes, floor * sizes.max()))) @ q.T
    sigma, u = torch.linalg.eigh(as_float64(s, "S"))
    sums = sigma[:, None] + sigma
    solution = torch.where(sums > _NO_GRADIENT * len(s) * sigma[-1], u.T @ target @ u / sums, 0.0)
    solution = u @ solution @ u.T
    return (solution + solution.T) / 2


@in_full_precision
def with_gradient(
    z1: Tensor,
    z2: Tensor,
    terms: dict[str, Tensor],
    acceleration: Acceleration,
    center: bool,
    inputs: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """Return the terms of a loss with another gradient of their sum: −(1/2n) s F P with respect to the embeddings.

    The values of the terms do not change. If C is not finite, the terms are returned unchanged, and the check of the
    loss stops training. ``center`` subtracts the mean of each view, as the loss does. For ``lyapunov``, ``inputs`` are
    H of both views, (n, m) each, of the global batch.
    """
    f1, f2 = (as_float64(z.detach(), "embeddings") for z in (z1, z2))
    if center:
        f1, f2 = f1 - f1.mean(0), f2 - f2.mean(0)
    product = f1.T @ f2 / len(f1)
    c = (product + product.T) / 2
    if not c.isfinite().all():
        return terms
    if acceleration == "gate":
        p = gate(c)
    else:
        h1, h2 = _checked_inputs(inputs, len(z1))
        g = (f1.T @ h2 + f2.T @ h1) / (2 * len(z1))
        p = lyapunov(c, g @ g.T)
    # These gradients have zero mean already, because the embeddings of the other view are centred.
    first, second = (-(f @ p / (2 * len(z1))).to(z1) for f in (f2, f1))
    surrogate = (first * z1).sum() + (second * z2).sum()
    values = {name: term.detach() for name, term in terms.items()}
    return values | {"on_diagonal": values["on_diagonal"] + (surrogate - surrogate.detach())}


def record_last_inputs(encoder: nn.Module) -> deque[Tensor]:
    """Record the inputs of the last linear layer in its last two calls, (n, m) each, with hooks that stay registered.

    If the layer has a bias, a column of ones is appended. Raises a ValueError if there is no linear layer, and in calls
    of an encoder that does not end in it.
    """
    layer = last_linear(encoder)
    if layer is None:
        raise UserError(
            f"acceleration='lyapunov' needs the inputs of the last linear layer, but {type(encoder).__name__} has no "
            "linear layer: choose 'gate', or an encoder that ends in a linear layer"
        )
    inputs: deque[Tensor] = deque(maxlen=2)
    outputs: deque[Tensor] = deque(maxlen=1)
    layer.register_forward_hook(partial(_record, inputs, outputs))
    encoder.register_forward_hook(partial(_check_output, outputs))
    return inputs


def _record(inputs: deque[Tensor], outputs: deque[Tensor], layer: nn.Module, args: Any, output: Tensor) -> None:
    h = args[0].detach().flatten(1)
    inputs.append(h if layer.bias is None else torch.cat([h, torch.ones_like(h[:, :1])], 1))
    outputs.append(output.detach())


def _check_output(outputs: deque[Tensor], encoder: nn.Module, _args: Any, output: Tensor) -> None:
    last = outputs.pop()
    if last.shape != output.shape or last.data_ptr() != output.data_ptr():
        raise UserError(
            "acceleration='lyapunov' needs an encoder that ends in its last linear layer, but "
            f"{type(encoder).__name__} does not: choose 'gate'"
        )


def _checked_inputs(inputs: Sequence[Tensor], num_pairs: int) -> list[Tensor]:
    if (counts := [len(h) for h in inputs]) != [num_pairs] * 2:
        raise UserError(
            f"acceleration='lyapunov' needs one call of the encoder for each view before the loss, got embeddings of "
            f"{num_pairs} pairs and inputs of the last layer for {counts}"
        )
    return [as_float64(h, "inputs of the last layer") for h in inputs]

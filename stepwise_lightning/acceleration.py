r"""Gradients with which all modes of analytical Barlow Twins are learned sooner, as pure functions (beyond the paper).

Legend
    F (2n, d)   embeddings of both views, stacked, of means subtracted where the loss subtracts them
    s           the swap of the two views, so that s F has at each view the embedding of the other one of its pair
    C (d, d)    (1/2n) Fᵀ s F = Q diag(λ) Qᵀ; ‖C‖ is the largest \|λ\|
    H (2n, m)   what enters the last linear layer, with a column of ones where that has a bias
    G (d, m)    (1/2n) Fᵀ s H; S = G Gᵀ
    P (d, d)    symmetric, and a constant where gradients are taken
    η           learning rate

Gradient descent on ‖C − I‖²_F has −(1/2n) s F P for a gradient with respect to F, with P = 4 (I − C). Modes of small γ
come late because each grows in proportion to its γ. Another P costs products of d × d matrices only. It mixes the
dimensions of the embedding, not features, so that the modes that win are those of the largest γ as before, where what
preconditions features or weights (natural gradients, Adam) ends in another subspace.

*Gate*: P = 4 Q diag((1 − λ) / (max(λ, 0) + ε)) Qᵀ. A mode grows up to 1/ε times as fast as by gradient descent until
it is learned, and then moves as by gradient descent, below whose limit, 1/(4γ_1), the learning rate has to stay. Near
that the first mode may overshoot tenfold on its way.

*Lyapunov*: P S + S P = 2 Q diag((1 − λ) max(\|λ\|, φ‖C‖)) Qᵀ. A step ΔW = ηPG of the last layer changes C by
η (P S + S P) to first order, so that on features that stay each λ follows dλ/dk = 2η (1 − λ) λ over steps k, whatever
its γ. The rate has no unit: stable below 1 on features that stay, slow below 0.1. A network's other layers move C too,
so that 0.3 is about as much as small networks take.

This is what is learned, and how fast, with features that stay and full batches (``reproduce/figures/faster_modes.py``
has numbers). Known failures: C and S of a batch of 64 fresh pairs are so noisy that the subspace of the largest γ is
lost, and with 256 it is not kept whole; in a network S knows of the last layer alone; hidden layers of a network are
not better for it, they have had fewer steps. Momentum and Adam on top have no equation here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stepwise_lightning.encoders import last_linear
from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64

__all__ = ["Acceleration", "accelerated", "gate", "last_inputs", "lyapunov", "refuse_others"]

Acceleration = Literal["gate", "lyapunov"]
_GATE_FLOOR = 1e-2  # ε
_LYAPUNOV_FLOOR = 1e-3  # φ
# Eigenvalues of S below this share of the largest are round-off: what has no gradient cannot be moved.
_NO_GRADIENT = 1e-15


def gate(c: Tensor, floor: float = _GATE_FLOOR) -> Tensor:
    """Return P = 4 Q diag((1 − λ) / (max(λ, 0) + ε)) Qᵀ, (d, d), float64.

    Args:
        c: C, (d, d), symmetric and finite.
        floor: ε > 0.

    Example:
        >>> import torch
        >>> gate(torch.diag(torch.tensor([0.0, 1.0]))).tolist()  # 4/ε for a mode at its start, 0 for a learned one
        [[400.0, 0.0], [0.0, 0.0]]

    """
    eigenvalues, q = torch.linalg.eigh(as_float64(c, "C"))
    return 4 * (q * ((1 - eigenvalues) / (eigenvalues.clamp(min=0) + floor))) @ q.T


def lyapunov(c: Tensor, s: Tensor, floor: float = _LYAPUNOV_FLOOR) -> Tensor:
    """Return the P that solves P S + S P = 2 Q diag((1 − λ) max(|λ|, φ‖C‖)) Qᵀ, (d, d), float64.

    In the eigenbasis of S, P_ij is the right-hand side over σ_i + σ_j, and 0 where both of these are no more than
    round-off.

    Args:
        c: C, (d, d), symmetric and finite.
        s: S = G Gᵀ, (d, d), in float64 from the start: its eigenvalues span as many orders of magnitude as λ does.
        floor: φ ≥ 0: modes below this share of the largest grow faster than it, by φ‖C‖ a step.

    """
    eigenvalues, q = torch.linalg.eigh(as_float64(c, "C"))
    sizes = eigenvalues.abs()
    wanted = 2 * (q * ((1 - eigenvalues) * torch.maximum(sizes, floor * sizes.max()))) @ q.T
    sigma, u = torch.linalg.eigh(as_float64(s, "S"))
    sums = sigma[:, None] + sigma
    solution = torch.where(sums > _NO_GRADIENT * len(s) * sigma[-1], u.T @ wanted @ u / sums, 0.0)
    solution = u @ solution @ u.T
    return (solution + solution.T) / 2


def accelerated(
    terms: dict[str, Tensor],
    z1: Tensor,
    z2: Tensor,
    acceleration: Acceleration,
    center: bool,
    inputs: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """Return the terms of a loss with another gradient of their sum: −(1/2n) s F P with respect to the embeddings.

    Args:
        terms: scalars, whose values stay.
        z1: embeddings of the first views, (n, d), of the global batch.
        z2: embeddings of the second views, (n, d).
        acceleration: which P.
        center: whether the loss subtracts each view's mean.
        inputs: for Lyapunov H of both views, (n, m) each, of the global batch.

    Where C is not finite the terms are returned as they came, so that whoever looks at the loss will stop.

    Raises:
        ValueError: inputs of other views than the embeddings, by their number.

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
        h1, h2 = _of_views(inputs, len(z1))
        g = (f1.T @ h2 + f2.T @ h1) / (2 * len(z1))
        p = lyapunov(c, g @ g.T)
    # Each view's mean is subtracted from its gradient already, because it is from the other view's embeddings.
    first, second = (-(f @ p / (2 * len(z1))).to(z1) for f in (f2, f1))
    surrogate = (first * z1).sum() + (second * z2).sum()
    values = {name: term.detach() for name, term in terms.items()}
    return values | {"on_diagonal": values["on_diagonal"] + (surrogate - surrogate.detach())}


def refuse_others(acceleration: str | None, off_diagonal_weight: float, normalize: bool) -> None:
    """Refuse an acceleration that does not exist, or another loss than its equations are of.

    Raises:
        ValueError: unknown, or a loss that is not ‖C − I‖²_F.

    """
    if acceleration is None:
        return
    if acceleration not in get_args(Acceleration):
        raise UserError(f"acceleration must be None, 'gate' or 'lyapunov', got {acceleration!r}")
    if normalize or off_diagonal_weight != 1:
        raise UserError(
            f"acceleration={acceleration!r} is for the analytical loss, got normalize={normalize} and "
            f"off_diagonal_weight={off_diagonal_weight}: set normalize=False and off_diagonal_weight=1"
        )


def last_inputs(encoder: nn.Module) -> deque[Tensor]:
    """Return what will hold the inputs of an encoder's last linear layer at its last two calls, (n, m) each.

    Where that layer has a bias they have a column of ones more, as if it were a weight.

    Raises:
        ValueError: there is no linear layer; when the encoder is called, it does not end in the last one.

    """
    layer = last_linear(encoder)
    if layer is None:
        raise UserError(
            f"acceleration='lyapunov' needs what enters the last linear layer, and {type(encoder).__name__} has none: "
            "choose 'gate', or an encoder that ends in a linear layer"
        )
    inputs: deque[Tensor] = deque(maxlen=2)
    outputs: deque[Tensor] = deque(maxlen=1)
    layer.register_forward_hook(partial(_keep, inputs, outputs))
    encoder.register_forward_hook(partial(_check_last, outputs))
    return inputs


def _keep(inputs: deque[Tensor], outputs: deque[Tensor], layer: nn.Module, given: Any, output: Tensor) -> None:
    h = given[0].detach().flatten(1)
    inputs.append(h if getattr(layer, "bias", None) is None else torch.cat([h, torch.ones_like(h[:, :1])], 1))
    outputs.append(output.detach())


def _check_last(outputs: deque[Tensor], encoder: nn.Module, _given: Any, output: Tensor) -> None:
    last = outputs.pop()
    if last.shape != output.shape or last.data_ptr() != output.data_ptr():
        raise UserError(
            "acceleration='lyapunov' needs an encoder that ends in its last linear layer, and "
            f"{type(encoder).__name__} does not: choose 'gate'"
        )


def _of_views(inputs: Sequence[Tensor], num_pairs: int) -> list[Tensor]:
    if [len(h) for h in inputs] != [num_pairs] * 2:
        raise UserError(
            f"acceleration='lyapunov' needs the encoder to be called on each view before the loss: the embeddings are "
            f"of {num_pairs} pairs, what entered its last layer of {[len(h) for h in inputs]}"
        )
    return [as_float64(h, "what enters the last layer") for h in inputs]

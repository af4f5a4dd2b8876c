"""The matrices whose spectra are measured: one table of names, labels and transforms of the embeddings.

A record may contain matrices of submodules, such as ``encoder.backbone.covariance``; :func:`axis_label`, :func:`phrase`
and :func:`tag_prefix` accept these names, and names that are not in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Matrix:
    """Facts about one matrix.

    Args:
        label: of the plot axis with its eigenvalues; two lines, because the axis is short.
        phrase: its name in a sentence.
        tag: its name in TensorBoard tags.
        transform: function from embeddings (n, d) and an axis (d,) or None to the embeddings that enter the matrix,
            (n, d); gradients pass through.

    """

    label: str
    phrase: str
    tag: str
    transform: Callable[[Tensor, Tensor | None], Tensor]


def mean_direction(z: Tensor) -> Tensor:
    """Return the direction of the mean of the normalised embeddings, (n, d) -> (d,)."""
    return normalize(normalize(z).mean(0), dim=0)


def _tangent(z: Tensor, axis: Tensor | None) -> Tensor:
    """Return the normalised embeddings without their component along ``axis``, by default their mean direction."""
    axis = mean_direction(z) if axis is None else axis
    unit = normalize(z)
    return unit - (unit @ axis)[:, None] * axis


TABLE = {
    "cross_correlation": Matrix("eigenvalues of C", "C", "C", lambda z, axis: z),
    "covariance": Matrix("eigenvalues of\nthe covariance", "the covariance", "covariance", lambda z, axis: z),
    "normalized_covariance": Matrix(
        "eigenvalues of the\nnormalised covariance",
        "the normalised covariance",
        "normalized_covariance",
        lambda z, axis: normalize(z),
    ),
    "tangent_covariance": Matrix(
        "eigenvalues of the\ntangent covariance", "the tangent covariance", "tangent_covariance", _tangent
    ),
}
#: Names of the matrices whose spectra can be measured.
MATRICES = tuple(TABLE)


def axis_label(name: str) -> str:
    """Return the label of the plot axis with the eigenvalues of a matrix."""
    kind = name.rpartition(".")[2]
    return TABLE[kind].label if kind in TABLE else f"eigenvalues of\n{name}"


def phrase(name: str) -> str:
    """Return the name of a matrix in a sentence: ``C``, ``the covariance``, ``encoder.backbone.covariance``."""
    return TABLE[name].phrase if name in TABLE else name


def tag_prefix(name: str) -> str:
    """Return the start of TensorBoard tags of a matrix: ``C``, ``covariance``, ``encoder.backbone/covariance``."""
    submodule, _, kind = name.rpartition(".")
    return "/".join(part for part in (submodule, TABLE[kind].tag if kind in TABLE else kind) if part)

"""Classification accuracy of the first k modes of a representation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from stepwise_lightning.errors import UserError
from stepwise_lightning.modes.directions import Modes

Classifier = Literal["ridge", "knn"]
_MAX_DISTANCES = 2**24  # in memory at a time, 128 MB


def mode_worth(
    views: Tensor | Sequence[Tensor],
    labels: Tensor,
    matrix: str = "covariance",
    num_modes: int | None = None,
    classifier: Classifier = "ridge",
    held_out: tuple[Tensor, Tensor] | None = None,
    penalty: float = 0.01,
    neighbours: int = 10,
) -> Tensor:
    """Return the accuracy of a classifier on the first k modes of a representation, for each k.

    The modes (:class:`stepwise_lightning.modes.Modes`) are computed without labels. Each coordinate is divided by its
    standard deviation, because a small initialisation gives embeddings of any size. With the N labelled views as rows
    of X (N, k) and their one-hot classes as rows of Y,

    - ``ridge``: Y ≈ 1bᵀ + XW, where b and W minimise ‖Y − 1bᵀ − XW‖² + penalty · N‖W‖²; the largest output is the
      prediction. Along one mode it separates little more than the two classes at its ends.
    - ``knn``: the most frequent class among the nearest neighbours in Euclidean distance; ties go to nearer neighbours.
      One mode can separate many classes.

    Without ``held_out``, every input is classified by all other inputs (leave-one-out over inputs, not views). Ridge
    uses the closed form: Y_i minus its prediction is (I − H_ii)⁻¹ (Y_i − Ŷ_i), where Ŷ = HY is the fit to all inputs
    and i are the rows of one input (Allen 1974). Near-duplicates, such as overlapping tiles, inflate the accuracy, in
    particular of k-NN.

    Args:
        views: representations (n, d) of one view of each input, or of several; any real type, computed in float64.
        labels: int64, (n,); inputs with a label below 0 contribute to the modes and are not classified.
        matrix: matrix of the modes; ``cross_correlation`` needs two views.
        num_modes: largest number of modes; None for all.
        classifier: ``ridge`` or ``knn``.
        held_out: representations (m, d) of other inputs and their labels (m,), which are classified instead.
        penalty: of ridge, > 0.
        neighbours: of k-NN, ≥ 1.

    Returns:
        Accuracies with the first k = 0, 1, … modes, (modes + 1,), float64, on the device of ``views`` or, if it has no
        float64, on the CPU. With k = 0 the most frequent class is predicted, which is chance level.

    Example:
        Two classes that differ in a direction of little variance, the second mode:

        >>> import torch
        >>> from stepwise_lightning import mode_worth
        >>> x = torch.tensor([[-4.0, 1], [-2, 1], [2, 1], [4, 1], [-4, -1], [-2, -1], [2, -1], [4, -1], [0, -1]])
        >>> mode_worth(x, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]))[[0, 2]]
        tensor([0.5556, 1.0000], dtype=torch.float64)

    Raises:
        ValueError: mismatched shapes, fewer than two labelled inputs, a value out of range, an unknown classifier or
            matrix; see also :meth:`stepwise_lightning.modes.Modes.of`.

    """
    views = [views] if isinstance(views, Tensor) else list(views)
    _check_data(views, labels, held_out)
    _check_settings(classifier, penalty, neighbours)
    modes = Modes.of(views, matrix)
    device = modes.origin.device
    labels = labels.to(device)
    known = labels >= 0
    classes, targets = labels[known].unique(return_inverse=True)
    coordinates = torch.cat([modes.coordinates(view.detach()) for view in views])
    scale = coordinates.square().mean(0).sqrt()
    x, y = (coordinates / scale)[known.repeat(len(views))], one_hot(targets).double().repeat(len(views), 1)
    inputs = torch.arange(len(targets), device=device).repeat(len(views))
    queries, expected = None, labels[known].repeat(len(views))
    if held_out is not None:
        expected = held_out[1].to(device)
        known = expected >= 0
        queries, expected = modes.coordinates(held_out[0].detach())[known] / scale, expected[known]
    most = len(modes) if num_modes is None else min(num_modes, len(modes))
    accuracies = [(expected == classes[y.sum(0).argmax()]).double().mean()]
    for k in range(1, most + 1):
        part = None if queries is None else queries[:, :k]
        if classifier == "ridge":
            scores = _ridge_scores(x[:, :k], y, inputs, penalty, part)
        else:
            scores = _neighbour_scores(x[:, :k], y, inputs, neighbours, part)
        accuracies.append((classes[scores.argmax(1)] == expected).double().mean())
    return torch.stack(accuracies)


def _ridge_scores(x: Tensor, y: Tensor, inputs: Tensor, penalty: float, queries: Tensor | None) -> Tensor:
    """Return the outputs for ``queries``, (m, classes), or the leave-one-out outputs for ``x``."""
    centre = x.mean(0)
    centred = x - centre
    inverse = torch.linalg.inv(centred.T @ centred + penalty * len(x) * torch.eye(x.shape[1]).to(x))
    weights = inverse @ (centred.T @ y)
    if queries is not None:
        return y.mean(0) + (queries - centre) @ weights
    residuals = y - y.mean(0) - centred @ weights
    order = inputs.argsort(stable=True)  # groups the rows of each input
    rows = centred[order].unflatten(0, (int(inputs.max()) + 1, -1))
    hat = rows @ inverse @ rows.mT + 1 / len(x)
    left_out = torch.linalg.solve(torch.eye(hat.shape[1]).to(hat) - hat, residuals[order].unflatten(0, rows.shape[:2]))
    return y - left_out.flatten(0, 1)[order.argsort()]


def _neighbour_scores(x: Tensor, y: Tensor, inputs: Tensor, neighbours: int, queries: Tensor | None) -> Tensor:
    """Return the votes for ``queries``, (m, classes), or the leave-one-out votes for ``x``."""
    points = x if queries is None else queries
    num_left_out = len(x) // (int(inputs.max()) + 1) if queries is None else 0
    count = max(1, min(neighbours, len(x) - num_left_out))
    votes = 1 + torch.arange(count, 0, -1).to(x)[:, None] / (2 * count * count)  # nearer neighbours decide ties
    scores = []
    for part in torch.arange(len(points), device=x.device).split(max(1, _MAX_DISTANCES // len(x))):
        distances = torch.cdist(points[part], x)
        if queries is None:
            distances[inputs[part][:, None] == inputs] = torch.inf
        scores.append((y[distances.topk(count, largest=False).indices] * votes).sum(1))
    return torch.cat(scores)


def _check_settings(classifier: str, penalty: float, neighbours: int) -> None:
    if classifier not in get_args(Classifier) or not penalty > 0 or neighbours < 1:
        raise UserError(
            f"classifier must be one of {', '.join(get_args(Classifier))}, penalty > 0 and neighbours ≥ 1, got "
            f"{classifier!r}, {penalty}, {neighbours}"
        )


def _check_data(views: list[Tensor], labels: Tensor, held_out: tuple[Tensor, Tensor] | None) -> None:
    pairs = [(view, labels) for view in views] + ([held_out] if held_out is not None else [])
    for view, targets in pairs:
        if view.ndim != 2 or targets.shape != view.shape[:1] or targets.is_floating_point():
            raise UserError(
                f"representations must be (n, d) and their labels (n,) integers, got {tuple(view.shape)} and "
                f"{tuple(targets.shape)} {targets.dtype}"
            )
        if view.shape[1] != views[0].shape[1]:
            raise UserError(
                f"held-out representations have {view.shape[1]} dimensions, but the others have {views[0].shape[1]}"
            )
    if int((labels >= 0).sum()) < 2:
        raise UserError("fewer than two inputs have a label of at least 0: label more inputs")

"""The views in a batch, and the loss in what a step returned, in whatever form other people's modules have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from stepwise_lightning.errors import UserError

Views = Callable[[Any], Tensor | Sequence[Tensor]]


def views_in(batch: Any, views: Views | None = None) -> list[Tensor]:
    """Return the one or two views in a batch, (n, …) each.

    The first tensor of at least two dimensions is a view, and the next one beside it that has its shape is the second.
    Tuples, lists and dictionaries are looked into in their order: ``(x1, x2, label)``, ``([x1, x2], label, name)``,
    ``(index, [x1, x2], label)``, ``{"image": x, "label": y}``, several crops of which two have one shape. Tensors of
    floating point, and images of bytes, come before other numbers, such as tokens.

    Args:
        batch: of a data loader.
        views: what finds them instead, from a batch to one or two tensors.

    Raises:
        UserError: there are none.

    """
    if views is not None:
        given = views(batch)
        tensors = [given] if isinstance(given, Tensor) else list(given)
        if not tensors or not all(isinstance(view, Tensor) and view.ndim for view in tensors):
            raise UserError(f"views(batch) must return one or two tensors (n, …), got {_form(given)}")
        return tensors[:2]
    for accepted in (_is_continuous, _is_tensor):
        if tensors := _first_views(batch, accepted):
            return tensors
    raise UserError(
        f"no views in a batch of the form {_form(batch)}: tell where they are with "
        "SpectrumLogger(views=function from a batch to one or two tensors)"
    )


def _first_views(item: Any, accepted: Callable[[Any], bool]) -> list[Tensor]:
    """Return the views of the first place that has some."""
    if accepted(item):
        return [item]
    for part in (parts := _parts(item)):
        if accepted(part):
            beside = [other for other in parts if accepted(other)]
            return _two_of_one_shape(beside)
        if tensors := _first_views(part, accepted):
            return tensors
    return []


def _two_of_one_shape(tensors: list[Tensor]) -> list[Tensor]:
    second = next((other for other in tensors[1:] if other.shape == tensors[0].shape), None)
    return [tensors[0]] if second is None else [tensors[0], second]


def _parts(item: Any) -> list[Any]:
    if isinstance(item, Mapping):
        return list(item.values())
    return list(item) if isinstance(item, Sequence) and not isinstance(item, (str, bytes)) else []


def _is_tensor(item: Any) -> bool:
    return isinstance(item, Tensor) and item.ndim > 1


def _is_continuous(item: Any) -> bool:
    return _is_tensor(item) and (item.is_floating_point() or (item.dtype == torch.uint8 and item.ndim > 2))


def _form(item: Any) -> str:
    """Describe a batch in a few words."""
    if isinstance(item, Tensor):
        return f"{str(item.dtype).removeprefix('torch.')}{tuple(item.shape)}"
    if isinstance(item, Mapping):
        return "{" + ", ".join(f"{key!r}: {_form(value)}" for key, value in list(item.items())[:4]) + "}"
    if parts := _parts(item):
        return f"{type(item).__name__}({', '.join(map(_form, parts[:4]))}{', …' if len(parts) > 4 else ''})"
    return type(item).__name__


def on_device(views: Sequence[Tensor], module: nn.Module) -> list[Tensor]:
    """Return views where ``module`` is, and in its precision where they are of floating point."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:  # its networks are not registered
        device = module.device if isinstance(module, L.LightningModule) else torch.device("cpu")
        return [view.to(device) for view in views]
    return [view.to(parameter) if view.is_floating_point() else view.to(parameter.device) for view in views]


def joined(parts: list[dict[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
    """Join the views of all ranks, those that have samples, in their order."""
    parts = [part for part in parts if part]
    if not parts:
        return {}
    of_all = {name: zip(*(part[name] for part in parts), strict=True) for name in parts[0]}
    return {name: [torch.cat(views) for views in ranks] for name, ranks in of_all.items()}


def loss_in(outputs: Any) -> float | None:
    """Return the loss in what training_step returned, None where there is none."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss)
    return float(loss) if isinstance(loss, (int, float)) else None

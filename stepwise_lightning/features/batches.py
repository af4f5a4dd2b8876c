"""Views and losses in batches and step outputs of any module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from stepwise_lightning.errors import UserError
from stepwise_lightning.features.module_state import precision_plugin

Views = Callable[[Any], Tensor | Sequence[Tensor]]


def views_in(batch: Any, views: Views | None = None) -> list[Tensor]:
    """Return the one or two views in a batch, (n, …) each.

    The first tensor of at least two dimensions is a view; the next tensor of the same shape in the same container is
    the second view. Tuples, lists and dictionaries are searched in order: ``(x1, x2, label)``, ``([x1, x2], label,
    name)``, ``(index, [x1, x2], label)``, ``{"image": x, "label": y}``, several crops of which two have one shape.
    Floating-point tensors and uint8 images precede other tensors, such as tokens.

    ``views``, a function from the batch to one or two tensors, replaces the search.
    """
    if views is not None:
        result = views(batch)
        tensors = [result] if isinstance(result, Tensor) else list(result)
        if not tensors or not all(isinstance(view, Tensor) and view.ndim for view in tensors):
            raise UserError(f"views(batch) must return one or two tensors (n, …), got {_structure(result)}")
        return tensors[:2]
    for accepted in (_is_continuous, _is_tensor):
        if tensors := _first_views(batch, accepted):
            return tensors
    raise UserError(
        f"no views in a batch of the form {_structure(batch)}: pass SpectrumLogger(views=FUNCTION), a function from a "
        "batch to one or two tensors"
    )


def num_pairs(batch: Any) -> int:
    """Return the number of pairs in a batch, for instance as ``batch_size_fn`` of Lightning's ``ThroughputMonitor``."""
    return len(views_in(batch)[0])


def _first_views(item: Any, accepted: Callable[[Any], bool]) -> list[Tensor]:
    """Return the views in the first container that has any."""
    if accepted(item):
        return [item]
    for part in (parts := _parts(item)):
        if accepted(part):
            first, *others = [other for other in parts if accepted(other)]
            second = next((other for other in others if other.shape == first.shape), None)
            return [first] if second is None else [first, second]
        if tensors := _first_views(part, accepted):
            return tensors
    return []


def _parts(item: Any) -> list[Any]:
    if isinstance(item, Mapping):
        return list(item.values())
    return list(item) if isinstance(item, Sequence) and not isinstance(item, (str, bytes)) else []


def _is_tensor(item: Any) -> bool:
    return isinstance(item, Tensor) and item.ndim > 1


def _is_continuous(item: Any) -> bool:
    return _is_tensor(item) and (item.is_floating_point() or (item.dtype == torch.uint8 and item.ndim > 2))


def _structure(item: Any) -> str:
    """Return a short description of a batch."""
    if isinstance(item, Tensor):
        return f"{str(item.dtype).removeprefix('torch.')}{tuple(item.shape)}"
    if isinstance(item, Mapping):
        return "{" + ", ".join(f"{key!r}: {_structure(value)}" for key, value in list(item.items())[:4]) + "}"
    if parts := _parts(item):
        return f"{type(item).__name__}({', '.join(map(_structure, parts[:4]))}{', …' if len(parts) > 4 else ''})"
    return type(item).__name__


def on_device(views: Sequence[Tensor], module: nn.Module) -> list[Tensor]:
    """Move views to the device of a module, and convert floating-point views to its dtype.

    If the parameters have several dtypes, views are converted as by the precision plugin of the module's Trainer.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    if not parameters:  # the networks of the module are not registered
        device = module.device if isinstance(module, L.LightningModule) else torch.device("cpu")
        return [view.to(device) for view in views]
    device, dtypes = parameters[0].device, {parameter.dtype for parameter in parameters}
    if len(dtypes) == 1:
        return [view.to(parameters[0]) if view.is_floating_point() else view.to(device) for view in views]
    plugin = precision_plugin(module)
    return [(view if plugin is None else plugin.convert_input(view)).to(device) for view in views]


def concatenate_ranks(parts: list[dict[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
    """Concatenate the views of all ranks that have samples, in rank order."""
    parts = [part for part in parts if part]
    if not parts:
        return {}
    by_name = {name: zip(*(part[name] for part in parts), strict=True) for name in parts[0]}
    return {name: [torch.cat(views) for views in ranks] for name, ranks in by_name.items()}


def loss_in(outputs: Any) -> float | None:
    """Return the loss in the output of training_step, None if it has no loss."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss)
    return float(loss) if isinstance(loss, (int, float)) else None

"""What a network says of a fixed set of inputs, without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stepwise_lightning.errors import DivergedError, UserError


def check_watched(module: nn.Module, watch: Sequence[str]) -> None:
    """Raise a ValueError that lists the names that exist if ``watch`` names a submodule that does not."""
    names = [name for name, _ in module.named_modules() if name]
    for name in watch:
        if name and name not in names:
            near = get_close_matches(name, names, n=5, cutoff=0.3) or names[:20]
            raise UserError(f"no submodule {name!r} to watch; did you mean one of: {', '.join(near)}?")


@torch.no_grad()
def capture(
    module: nn.Module, views: Sequence[Tensor], watch: Sequence[str], running_statistics: bool = False
) -> dict[str, list[Tensor]]:
    """Run ``module`` on each view and return the outputs of the watched submodules.

    Everything is in evaluation mode but batch normalisation, which uses the statistics of the view it is given: its
    running statistics are worthless for the first tens of steps, when they still remember the initial network. They
    are not updated, and no random number is drawn, so that training goes on as if nothing had happened.

    Args:
        module: called as ``module(view)``.
        views: inputs, each (n, …).
        watch: names of submodules; ``""`` is the output of ``module`` itself.
        running_statistics: let batch normalisation use its running statistics, as in ordinary evaluation.

    Returns:
        For each name, one (n, d) tensor per view; outputs with more dimensions are flattened.

    Raises:
        ValueError: an unknown name, or a watched output that is not a tensor or was not reached.

    """
    check_watched(module, watch)
    outputs: dict[str, list[Tensor]] = {name: [] for name in watch}

    def keep(_module: nn.Module, _inputs: Any, output: Any, name: str) -> None:
        if not isinstance(output, Tensor) or output.ndim < 2:
            raise UserError(f"the output of {name or 'the module'!r} is no (n, …) tensor but {type(output).__name__}")
        # A copy: an in-place activation further on would write into the tensor itself.
        outputs[name].append(output.detach().flatten(1).clone())

    hooks = [module.get_submodule(name).register_forward_hook(partial(keep, name=name)) for name in watch]
    try:
        with _evaluation(module) if running_statistics else batch_statistics(module):
            for view in views:
                module(view)
    finally:
        for hook in hooks:
            hook.remove()
    for name, captured in outputs.items():
        if len(captured) != len(views):
            raise UserError(
                f"{name!r} ran {len(captured)} times on {len(views)} views: watch one that runs once a view"
            )
    return outputs


def check_finite(outputs: dict[str, list[Tensor]], samples: list[Tensor], module: nn.Module, step: int) -> None:
    """Raise FloatingPointError if an output that was captured at ``step`` is not, and say whether the samples are."""
    for name, views in outputs.items():
        if not all(z.isfinite().all() for z in views):
            cause = "training has most likely diverged; lower the learning rate"
            if not all(x.isfinite().all() for x in samples):
                cause = "the samples hold values that are not finite: look at the data"
            raise DivergedError(f"the output of {name or type(module).__name__} at step {step} is not finite: {cause}")


def views_in(batch: Any, module: nn.Module) -> list[Tensor]:
    """Return the one or two views in a batch, ready for ``module``: a second item is one if shaped like the first."""
    if isinstance(batch, Tensor):
        views = [batch]
    else:
        second = batch[1] if len(batch) > 1 and isinstance(batch[1], Tensor) else None
        views = [batch[0]] if second is None or second.shape != batch[0].shape else [batch[0], second]
    parameter = next(p for p in module.parameters() if p.is_floating_point())
    return [view.to(parameter) if view.is_floating_point() else view.to(parameter.device) for view in views]


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation, but let batch normalisation use (and not record) the statistics of its batch."""
    norms = [(part, part.track_running_stats) for part in module.modules() if isinstance(part, _BatchNorm)]
    with _evaluation(module):
        try:
            for norm, _ in norms:
                norm.training, norm.track_running_stats = True, False
            yield
        finally:
            for norm, tracked in norms:
                norm.track_running_stats = tracked


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation, and back to whatever mode each part was in."""
    parts = list(module.modules())
    modes = [part.training for part in parts]
    module.eval()
    try:
        yield
    finally:
        for part, training in zip(parts, modes, strict=True):
            part.training = training

"""Activations of any module on a fixed batch, without changing its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.features.module_state import (
    COMPILED,
    batch_statistics,
    evaluation,
    precision_plugin,
    restored_state,
    without_logging,
)
from stepwise_lightning.precision import without_autocast, without_tf32

# The name of a submodule, "" for the module itself, or a function of module and view.
Watched = str | Callable[[nn.Module, Tensor], Tensor]


def check_watched(module: nn.Module, watch: Sequence[Watched]) -> None:
    """Raise a UserError for an unknown submodule, with similar names, and for a module without ``forward``."""
    if "" in watch and not has_forward(module):
        raise UserError(
            f"{type(module).__name__} has no forward(view), whose output is measured: define it, or measure submodules "
            "only, SpectrumLogger(output=False, watch=[…])"
        )
    names = list(dict.fromkeys(_plain(known) for known, _ in module.named_modules(remove_duplicate=False) if known))
    for name in watch:
        if isinstance(name, str) and name and _plain(name) not in names:
            near = get_close_matches(name, names, n=5, cutoff=0.3) or names[:20]
            choice = f"did you mean one of: {', '.join(near)}" if near else "the module has none"
            raise UserError(f"no submodule {name!r} to watch; {choice}? (A function of module and view may be watched)")


def has_forward(module: nn.Module) -> bool:
    """Return True if a class of the module implements ``forward``."""
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return "forward" in vars(module) or owner is not nn.Module and owner.__name__ != "LightningModule"


def label(watched: Watched) -> str:
    """Return the name of a watched submodule or function in files and tags."""
    return watched if isinstance(watched, str) else getattr(watched, "__name__", type(watched).__name__).strip("<>")


@torch.no_grad()
def capture(
    module: nn.Module,
    views: Sequence[Tensor],
    watch: Sequence[Watched],
    running_statistics: bool = False,
    alone: bool = False,
    training_precision: bool = False,
) -> dict[str, list[Tensor]]:
    """Capture activations of a module on fixed inputs without changing its state.

    The module runs in evaluation mode, except batch normalisation in training mode, which uses the statistics of the
    view: during the first tens of steps its running statistics still reflect the initial network. Batch normalisation
    in evaluation mode is frozen and uses its running statistics, as in training. Buffers, attributes (also of
    torchmetrics metrics), modes and the state of all random number generators are restored, and ``self.log`` has no
    effect. Compiled modules run uncompiled.

    A module in a Trainer runs in the forward context of its precision plugin, which sets the default dtype; mixed
    precision applies only if the module does not run without it. Float32 is not rounded to TF32.

    Args:
        module: called as ``module(view)``.
        views: inputs, each (n, …).
        watch: names of submodules, or functions from module and view to (n, …); ``""`` is the output of ``module``.
        running_statistics: use running statistics in all batch normalisation, as in ordinary evaluation.
        alone: call each watched submodule on the view, instead of ``module``.
        training_precision: keep mixed precision and TF32 as in training.

    Returns:
        For each name, one (n, d) tensor per view; outputs with more dimensions are flattened, (n,) becomes (n, 1).

    Raises:
        UserError: an unknown name, or a watched output that is not a tensor or was not computed once per view.

    """
    check_watched(module, watch)
    with ExitStack() as stack:
        stack.enter_context(evaluation(module) if running_statistics else batch_statistics(module))
        stack.enter_context(without_logging(module))
        if not training_precision:
            stack.enter_context(without_tf32())
        plugin = precision_plugin(module)
        if plugin is not None:
            stack.enter_context(plugin.forward_context())
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        if plugin is None or training_precision or not torch.is_autocast_enabled(device.type):
            return _capture(module, views, watch, alone)
        try:
            with without_autocast(device):
                return _capture(module, views, watch, alone)
        except Exception:  # the module needs autocast, for instance because it has a part in half precision
            return _capture(module, views, watch, alone)


def _capture(
    module: nn.Module, views: Sequence[Tensor], watch: Sequence[Watched], alone: bool
) -> dict[str, list[Tensor]]:
    outputs: dict[str, list[Tensor]] = {label(watched): [] for watched in watch}
    functions = [watched for watched in watch if not isinstance(watched, str)]
    parts = {name: _submodule(module, name) for name in watch if isinstance(name, str)}

    def keep(_module: Any, _inputs: Any, output: Any, name: str) -> None:
        outputs[name].append(_embeddings(output, name))

    with restored_state(module):
        with ExitStack() as hooks:  # removed before functions run, which may call the submodules again
            for name, part in parts.items():
                hooks.callback(part.register_forward_hook(partial(keep, name=name)).remove)
            for view in views if parts else ():
                if alone:
                    for name, part in parts.items():
                        _run_alone(part, view, name)
                else:
                    module(view)
        for view in views:
            for function in functions:
                keep(None, None, function(module, view), label(function))
    _check_runs(outputs, len(views))
    return outputs


def _check_runs(outputs: dict[str, list[Tensor]], num_views: int) -> None:
    """Raise a UserError for a submodule that did not run once per view."""
    for name, captured in outputs.items():
        if not captured:
            function = name.rpartition(".")[2]
            raise UserError(
                f"{name!r} does not run in forward(view), as a momentum encoder: watch a function that runs it, "
                f"watch=[{function}] with: def {function}(module, view): return module.{name}(view)"
            )
        if len(captured) != num_views:
            raise UserError(
                f"{name!r} ran {len(captured)} times on {num_views} views: watch a submodule that runs once per view, "
                "or a function of module and view"
            )


def _run_alone(part: nn.Module, view: Tensor, name: str) -> None:
    try:
        part(view)
    except UserError:
        raise
    except Exception as error:  # modules raise anything on unexpected inputs
        raise UserError(
            f"{name!r} cannot run on a view of shape {tuple(view.shape)} ({reason(error)}): watch a function from "
            "module and view to its output, or run the whole module (output=True)"
        ) from error


def _embeddings(output: Any, name: str) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim < 1:
        kind = "a scalar" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            f"the output of {name or 'the module'!r} is not a tensor (n, …) but {kind}: watch a submodule with a "
            "tensor output, SpectrumLogger(watch=[NAME], output=False), or a function, watch=[lambda module, view: …]"
        )
    # A copy, because a later in-place activation would overwrite the tensor.
    return output.detach().reshape(len(output), -1).clone()


def _submodule(module: nn.Module, name: str) -> nn.Module:
    parts = module.named_modules(remove_duplicate=False)  # a shared submodule has several names
    return next(part for known, part in parts if name in (known, _plain(known)))


def _plain(name: str) -> str:
    """Return the name of a submodule without the parts that torch.compile inserts."""
    return ".".join(part for part in name.split(".") if part != COMPILED)

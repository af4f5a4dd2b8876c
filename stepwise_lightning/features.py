"""Views in any batch, and activations of any module."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from difflib import get_close_matches
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stepwise_lightning.errors import UserError, reason

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


# A submodule's name, "" for the module itself; or a function of module and view.
Watched = str | Callable[[nn.Module, Tensor], Tensor]
_COMPILED = "_orig_mod"  # where torch.compile keeps the module that it was given


def check_watched(module: nn.Module, watch: Sequence[Watched]) -> None:
    """Raise a UserError that lists the names that exist if ``watch`` names a submodule that does not."""
    names = list(dict.fromkeys(_plain(known) for known, _ in module.named_modules() if known))
    for name in watch:
        if isinstance(name, str) and name and _plain(name) not in names:
            near = get_close_matches(name, names, n=5, cutoff=0.3) or names[:20]
            choice = f"did you mean one of: {', '.join(near)}" if near else "the module has none"
            raise UserError(f"no submodule {name!r} to watch; {choice}? (A function of module and view may be watched)")


def label(watched: Watched) -> str:
    """Return what a watched thing is called in files and tags."""
    return watched if isinstance(watched, str) else getattr(watched, "__name__", type(watched).__name__).strip("<>")


@torch.no_grad()
def capture(
    module: nn.Module,
    views: Sequence[Tensor],
    watch: Sequence[Watched],
    running_statistics: bool = False,
    alone: bool = False,
) -> dict[str, list[Tensor]]:
    """Run ``module`` on each view and return what is watched.

    Everything is in evaluation mode but batch normalisation that was in training mode, which uses the statistics of the
    view it is given: its running statistics are worthless for the first tens of steps, when they still remember the
    initial network. Batch normalisation that was in evaluation mode is frozen, and uses its running statistics, as in
    training. Nothing is left behind: buffers, modes and the state of all random number generators are put back, so that
    training goes on as if nothing had happened. Compiled modules run as they were before they were compiled.

    Args:
        module: called as ``module(view)``.
        views: inputs, each (n, …).
        watch: names of submodules, or functions from module and view to (n, …); ``""`` is the output of ``module``.
        running_statistics: let all batch normalisation use its running statistics, as in ordinary evaluation.
        alone: do not run ``module``, but each watched submodule on its own, on the view.

    Returns:
        For each name, one (n, d) tensor per view; outputs with more dimensions are flattened, (n,) becomes (n, 1).

    Raises:
        UserError: an unknown name, or a watched output that is not a tensor or was not reached.

    """
    check_watched(module, watch)
    outputs: dict[str, list[Tensor]] = {label(watched): [] for watched in watch}
    functions = [watched for watched in watch if not isinstance(watched, str)]
    parts = {name: _submodule(module, name) for name in watch if isinstance(name, str)}

    def keep(_module: Any, _inputs: Any, output: Any, name: str) -> None:
        outputs[name].append(_embeddings(output, name))

    with ExitStack() as stack:
        stack.enter_context(_evaluation(module) if running_statistics else batch_statistics(module))
        stack.enter_context(_untouched(module))
        with ExitStack() as hooks:  # not on while functions run, which may run the parts again
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
    for name, captured in outputs.items():
        if len(captured) != len(views):
            raise UserError(
                f"{name!r} ran {len(captured)} times on {len(views)} views: watch one that runs once a view, or watch "
                "a function of module and view"
            )
    return outputs


def _run_alone(part: nn.Module, view: Tensor, name: str) -> None:
    try:
        part(view)
    except UserError:
        raise
    except Exception as error:  # whatever a module makes of an input that it was not written for
        raise UserError(
            f"{name!r} cannot be run on a view of shape {tuple(view.shape)} ({reason(error)}): watch a function from "
            "module and view to its output, or let the module run (output=True)"
        ) from error


def _embeddings(output: Any, name: str) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim < 1:
        kind = "a scalar" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            f"the output of {name or 'the module'!r} is no (n, …) tensor but {kind}: watch a submodule whose is, "
            "SpectrumLogger(watch=[NAME], output=False), or a function, watch=[lambda module, view: …]"
        )
    # A copy: an in-place activation further on would write into the tensor itself.
    return output.detach().reshape(len(output), -1).clone()


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation, but let batch normalisation in training mode use, not record, its batch's statistics."""
    norms = [p for p in module.modules() if isinstance(p, _BatchNorm) and p.training and p.track_running_stats]
    untracked = [p for p in module.modules() if isinstance(p, _BatchNorm) and p.training and not p.track_running_stats]
    with _evaluation(module):
        try:
            for norm in norms:
                norm.training, norm.track_running_stats = True, False
            for norm in untracked:
                norm.training = True
            yield
        finally:
            for norm in norms:
                norm.track_running_stats = True


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation, and back to whatever mode each part was in."""
    parts = list(module.modules())
    modes = [part.training for part in parts]
    for part in parts:  # not eval(), which some modules override
        part.training = False
    try:
        yield
    finally:
        for part, training in zip(parts, modes, strict=True):
            part.training = training


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Put back buffers and random number generators, and run compiled modules uncompiled."""
    buffers = [(part, dict(part._buffers)) for part in module.modules()]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), _uncompiled(module):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for part, before in buffers:
                part._buffers.update(before)
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _uncompiled(module: nn.Module) -> AbstractContextManager[Any]:
    compiled = any(
        hasattr(part, _COMPILED) or getattr(part, "_compiled_call_impl", None) is not None for part in module.modules()
    )
    # Hooks do not fire in what was compiled without them. (Asked only then: it imports the compiler.)
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _submodule(module: nn.Module, name: str) -> nn.Module:
    """Return a submodule by its name, with or without what torch.compile puts into it; KeyError if there is none."""
    for known, part in module.named_modules():
        if name in (known, _plain(known)):
            return part
    raise KeyError(name)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)

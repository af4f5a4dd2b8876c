"""What a network says of a fixed set of inputs, without leaving a trace in it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stepwise_lightning.errors import DivergedError, UserError, reason

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


def check_finite(outputs: dict[str, list[Tensor]], samples: list[Tensor], module: nn.Module, step: int) -> None:
    """Raise DivergedError if an output that was captured at ``step`` is not finite; say whether the samples are."""
    for name, views in outputs.items():
        if not all(z.isfinite().all() for z in views):
            cause = "training has most likely diverged; lower the learning rate"
            if not all(x.isfinite().all() for x in samples):
                cause = "the samples hold values that are not finite: look at the data"
            raise DivergedError(f"the output of {name or type(module).__name__} at step {step} is not finite: {cause}")


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

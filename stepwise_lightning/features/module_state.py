"""Contexts for a forward pass that leaves a module and its Trainer unchanged."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_LOG_METHODS = ("log", "log_dict")  # of LightningModules
COMPILED = "_orig_mod"  # attribute of a compiled module that holds the original
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # parameters, hooks and modes, which are handled separately


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, with batch normalisation in training mode on batch statistics, not recorded."""
    norms = [p for p in module.modules() if isinstance(p, _BatchNorm) and p.training]
    tracked = [norm for norm in norms if norm.track_running_stats]
    with evaluation(module):
        try:
            for norm in norms:
                norm.training, norm.track_running_stats = True, False
            yield
        finally:
            for norm in tracked:
                norm.track_running_stats = True


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore the mode of each submodule."""
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
def restored_state(module: nn.Module) -> Iterator[None]:
    """Restore buffers, attributes and random number generators at the end; run compiled modules uncompiled.

    Attributes include the state of torchmetrics metrics, also of metrics in lists and dictionaries. Attributes of
    torch's own modules are not restored.
    """
    parts = _with_unregistered(module)
    buffers = [(part, dict(part._buffers)) for part in parts]
    restores = [_restore_function(buffer) for part in parts for buffer in part.buffers(recurse=False)]
    restores += [_attributes(part) for part in parts if not type(part).__module__.startswith("torch.")]
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    with torch.random.fork_rng(devices=devices), _uncompiled(module):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            if mps is not None:
                torch.mps.set_rng_state(mps)
            for part, before in buffers:
                part._buffers.update(before)
            for restore in restores:
                restore()


def _with_unregistered(module: nn.Module) -> list[nn.Module]:
    """Return all submodules, also those in lists and dictionaries, which torch does not register."""
    parts, seen, waiting = list[nn.Module](), set[int](), list[Any]([module])
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            parts.append(item)
            attributes = [value for name, value in vars(item).items() if name not in _MODULE_ATTRIBUTES]
            waiting += [*item.children(), *attributes]
        elif isinstance(item, (list, tuple, deque, set)):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
    return parts


def _attributes(part: nn.Module) -> Callable[[], None]:
    """Return a function that restores the attributes of a module, and removes new ones."""
    before = {name: value for name, value in vars(part).items() if name not in _MODULE_ATTRIBUTES}
    restores = [_restore_function(value) for value in before.values()]

    def restore() -> None:
        for name in vars(part).keys() - before.keys() - _MODULE_ATTRIBUTES:
            del vars(part)[name]
        vars(part).update(before)
        for restore_value in restores:
            restore_value()

    return restore


def _restore_function(value: Any) -> Callable[[], None]:
    """Return a function that restores the content of a tensor, array or container in place."""
    if isinstance(value, Tensor):
        return partial(_restore_tensor, value, value.detach().clone())
    if isinstance(value, np.ndarray):
        return partial(np.copyto, value, value.copy())
    if isinstance(value, (list, deque, dict, set)):
        return partial(_restore_container, value, value.copy())
    return lambda: None


def _restore_tensor(tensor: Tensor, saved: Tensor) -> None:
    # On a GPU, a comparison would wait for the result. An expanded tensor cannot be overwritten.
    if (tensor.device.type != "cpu" and 0 not in tensor.stride()) or not torch.equal(tensor, saved):
        tensor.data.copy_(saved)  # of the data, which leaves the version for autograd


def _restore_container(container: Any, saved: Any) -> None:
    container.clear()
    getattr(container, "extend" if isinstance(container, (list, deque)) else "update")(saved)


def is_compiled(module: nn.Module) -> bool:
    """Return True if ``torch.compile`` compiled the module or a submodule."""
    return any(
        hasattr(part, COMPILED) or getattr(part, "_compiled_call_impl", None) is not None for part in module.modules()
    )


def _uncompiled(module: nn.Module) -> AbstractContextManager[Any]:
    # Hooks do not run in a module that was compiled without them. Only if compiled: set_stance imports the compiler.
    return torch.compiler.set_stance("force_eager") if is_compiled(module) else nullcontext()


@contextmanager
def without_logging(module: nn.Module) -> Iterator[None]:
    """Discard ``self.log``, ``self.log_dict`` and the output to ``self.logger`` of LightningModules."""
    parts: list[Any] = [part for part in module.modules() if _is_lightning_module(part)]
    before = [{name: value for name, value in vars(part).items() if name in _LOG_METHODS} for part in parts]
    trainers = {part._trainer for part in parts if part._trainer is not None}
    loggers = [(trainer, trainer.loggers) for trainer in trainers]
    for trainer, active in loggers:
        trainer.loggers = [DummyLogger() for _ in active]
    for part in parts:
        vars(part).update(dict.fromkeys(_LOG_METHODS, lambda *_, **__: None))
    try:
        yield
    finally:
        for part, methods in zip(parts, before, strict=True):
            for name in _LOG_METHODS:
                vars(part).pop(name, None)
            vars(part).update(methods)
        for trainer, active in loggers:
            trainer.loggers = active


def _is_lightning_module(module: nn.Module) -> bool:
    # The names of the base classes decide, because lightning and pytorch_lightning share no class.
    return any(base.__name__ == "LightningModule" for base in type(module).__mro__)


def precision_plugin(module: nn.Module) -> Any:
    """Return the precision plugin of the Trainer that trains a module, None without a Trainer."""
    trainer: Any = module._trainer if _is_lightning_module(module) else None
    return None if trainer is None else trainer.precision_plugin

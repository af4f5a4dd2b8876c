"""Checks of losses that users give to ``JointEmbedding``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from stepwise_lightning.errors import UserError

LOSS = "loss"  # name of the only term of a loss that returns a scalar


def checked_loss(loss: Any) -> Callable[..., Any]:
    """Return the loss; raise a UserError if it cannot be called with two arguments."""
    if isinstance(loss, type) or not callable(loss):
        got = f"the class {loss.__name__}: give an object of it" if isinstance(loss, type) else repr(loss)
        raise UserError(f"loss must be a function of both views' embeddings z1 and z2, got {got}")
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):  # of a function without a Python signature
        return loss
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise UserError(
            f"the loss is called with two arguments, the embeddings z1 and z2, but {saved_name(loss)}{signature} does "
            f"not accept this ({error}): set other arguments with functools.partial or in a class; a loss of labels "
            "needs a LightningModule of its own"
        ) from None
    return loss


def named_terms(value: Any) -> dict[str, Tensor]:
    """Return the terms of a loss that has returned a scalar or a dictionary of scalars.

    Raises:
        ValueError: another value, or a term ``loss`` beside others.

    """
    terms = dict(value) if isinstance(value, Mapping) else {LOSS: value}
    if LOSS in terms and len(terms) > 1:
        raise UserError(
            f"the loss is the sum of its terms, here {', '.join(terms)}: remove {LOSS!r}, or return this scalar alone"
        )
    for name, term in terms.items():
        if not isinstance(term, Tensor) or term.shape != ():
            got = f"a {type(term).__name__}" if isinstance(term, (tuple, list, Mapping)) else repr(term)
            got = f"a tensor of shape {tuple(term.shape)}" if isinstance(term, Tensor) else got
            raise UserError(
                f"the loss must return a scalar tensor, or a dictionary of them, got {got} for {name!r}: take its mean"
            )
    if not terms:
        raise UserError("the loss must return a scalar tensor, or a dictionary of them, got an empty dictionary")
    return terms


def saved_name(loss: Any) -> str | None:
    """Return the dotted path of a function, or of the class of an object, for the hyperparameters of a checkpoint."""
    if loss is None:
        return None
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}"

"""Parameters of an estimator by name, as scikit-learn's ``clone`` requires."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any, Self

from stepwise_lightning.errors import UserError


class Estimator:
    """Base class of estimators that store each argument of ``__init__`` in an attribute of the same name."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments of ``__init__`` by name; ``deep`` has no effect."""
        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    def set_params(self, **parameters: Any) -> Self:
        """Set arguments by name, with the checks of ``__init__``. Fitted attributes change at the next ``fit`` only.

        Raises:
            ValueError: an unknown name (the error lists the valid ones), or a value that ``__init__`` rejects.

        """
        current = self.get_params()
        if unknown := sorted(parameters.keys() - current.keys()):
            raise UserError(f"{type(self).__name__} has no {', '.join(unknown)}; choose from: {', '.join(current)}")
        for name, value in type(self)(**{**current, **parameters}).get_params().items():
            setattr(self, name, value)
        return self


def function_name(function: object) -> str:
    """Return the name of a function, with the arguments that ``functools.partial`` binds to it."""
    if isinstance(function, partial):
        bound = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{function_name(function.func)}({', '.join(bound)})"
    return getattr(function, "__name__", None) or repr(function)

"""The arguments of an object by name, as scikit-learn asks for them and sets them: no more than its ``clone`` needs."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any, Self

from stepwise_lightning.errors import UserError


class Estimator:
    """Keeps the arguments of ``__init__`` in attributes of the same names."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments by name, as scikit-learn's ``clone`` asks for them; ``deep`` makes no difference."""
        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    def set_params(self, **parameters: Any) -> Self:
        """Set arguments by name, with the checks of ``__init__``; what was fitted stays until it is fitted again.

        Raises:
            ValueError: an unknown name (the error lists those that exist), or a value that ``__init__`` refuses.

        """
        known = self.get_params()
        if unknown := sorted(parameters.keys() - known.keys()):
            raise UserError(f"{type(self).__name__} has no {', '.join(unknown)}; choose from: {', '.join(known)}")
        for name, value in type(self)(**{**known, **parameters}).get_params().items():
            setattr(self, name, value)
        return self


def function_name(function: object) -> str:
    """Return what a function is called, with the arguments that are bound to it."""
    if isinstance(function, partial):
        bound = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{function_name(function.func)}({', '.join(bound)})"
    return getattr(function, "__name__", None) or repr(function)

"""The configurations that come with the package, and what the command line says of them before Lightning reads it."""

from __future__ import annotations

from pathlib import Path

from stepwise_lightning.errors import NotFoundError

__all__ = ["named", "names"]

_FOLDER = Path(__file__).parent.parent / "configs"


def names() -> list[str]:
    """Return the names of the configurations that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def named(arguments: list[str]) -> list[str]:
    """Return the arguments of ``stepwise`` with the names of configurations replaced by the files that they stand for.

    A file of that name goes first.

    Raises:
        FileNotFoundError: a name without a file.

    """
    expanded: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if expanded and expanded[-1] in ("--config", "-c"):
            expanded.append(_file(argument))
        elif equals and option == "--config":
            expanded.append(f"--config={_file(value)}")
        else:
            expanded.append(argument)
    return expanded


def _file(given: str) -> str:
    if not given.isidentifier() or Path(given).is_file():  # a path, or a configuration written out
        return given
    if given not in names():
        raise NotFoundError(f"no configuration {given!r}: give a file, or one of {', '.join(names())}")
    return str(_FOLDER / f"{given}.yaml")

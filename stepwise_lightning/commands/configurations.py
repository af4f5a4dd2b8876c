"""Named configurations of the package, and class paths that moved."""

from __future__ import annotations

from pathlib import Path

from stepwise_lightning.errors import NotFoundError

_FOLDER = Path(__file__).parent.parent / "configs"


def names() -> list[str]:
    """Return the names of the configurations of the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def with_files(arguments: list[str]) -> list[str]:
    """Return command-line arguments in which names of configurations are replaced by their files.

    A file in the working directory takes precedence over a configuration of the package. Class paths that moved are
    replaced, in options and in configurations.

    Raises:
        FileNotFoundError: an unknown name.

    """
    from stepwise_lightning.runs.moved_classes import with_current_classes

    expanded: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if expanded and expanded[-1] in ("--config", "-c"):
            expanded.append(_configuration(argument))
        elif equals and option == "--config":
            expanded.append(f"--config={_configuration(value)}")
        else:
            expanded.append(with_current_classes(argument))
    return expanded


def _configuration(value: str) -> str:
    """Return the path of a configuration, or its text where class paths in it have moved."""
    from stepwise_lightning.runs.moved_classes import with_current_classes

    if value.isidentifier() and not Path(value).is_file():
        if value not in names():
            raise NotFoundError(f"no configuration {value!r}: give a file, or one of {', '.join(names())}")
        return str(_FOLDER / f"{value}.yaml")
    try:
        text = Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError):  # a configuration as text, or a file that the parser reports
        return with_current_classes(value)
    current = with_current_classes(text)
    return value if current == text else current

"""Entry point of ``stepwise`` and ``python -m stepwise_lightning``: help, version, dispatch to a command."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import version

from stepwise_lightning.commands import COMMANDS, TRAINING
from stepwise_lightning.errors import one_line
from stepwise_lightning.signals import INTERRUPTED

__all__ = ["main"]

_HELP = """usage: stepwise COMMAND [options]

Predict, train and watch self-supervised models that learn their embeddings one dimension at a time.

commands ('stepwise COMMAND --help' lists the options of one):
{commands}

options:
  --help, --version

A run is described by a configuration, which comes with the package or is a file of yours:
  stepwise fit --config barlow_twins_photos      one or two minutes on a laptop, no download
{configurations}
A second --config changes some values of the first, and options change single values:
  stepwise fit --config vicreg_photos --config ordinary --trainer.max_steps 500
All of one, with every default:
  stepwise fit --config vicreg_photos --print_config

Each run gets a folder, runs/NAME/version_N: configuration, checkpoints, spectra, picture.
"""


def main() -> None:
    """Run ``stepwise``; see :func:`stepwise_lightning.commands.lightning_cli.main` for how it ends."""
    if not run_without_lightning():
        # Importing Lightning takes seconds.
        from stepwise_lightning.commands import lightning_cli

        lightning_cli.main()


def run_without_lightning() -> bool:
    """Do what needs no Lightning: help, version, and the commands of this package; return whether it was that."""
    command, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if command in ("-h", "--help"):
        print(_help(), end="")
    elif command == "--version":
        print(f"stepwise_lightning {version('stepwise_lightning')}")
    elif command in COMMANDS:
        _run(command, arguments)
    elif not command.startswith("-") and command not in TRAINING:
        sys.exit(f"stepwise: error: unknown command {command!r}; choose from: {', '.join(TRAINING | COMMANDS)}")
    else:
        return False
    return True


def _run(command: str, arguments: list[str]) -> None:
    if not sys.flags.safe_path and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # classes of one's own that a run has used
    try:
        import_module(f"stepwise_lightning.commands.{command}").main(arguments)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # of `stepwise summary … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        text = one_line(error)
        if text is None:
            raise
        sys.exit(f"stepwise: error: {text}")


def _help() -> str:
    from stepwise_lightning.commands.configurations import names

    commands = "\n".join(f"  {name:<10}{text}" for name, text in (TRAINING | COMMANDS).items())
    listed = "".join(f"  {line}\n" for line in _wrapped(names()))
    return _HELP.format(commands=commands, configurations=listed.rstrip("\n"))


def _wrapped(words: list[str]) -> list[str]:
    import textwrap

    return textwrap.wrap(", ".join(words), 100)


if __name__ == "__main__":
    main()

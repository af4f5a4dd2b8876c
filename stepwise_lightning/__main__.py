"""Entry point of ``stepwise`` and ``python -m stepwise_lightning``: help, version, dispatch to a command."""

from __future__ import annotations

import os
import sys
import textwrap
from importlib import import_module
from importlib.metadata import version

from stepwise_lightning.commands import COMMANDS
from stepwise_lightning.commands.reporting import prepare_output
from stepwise_lightning.errors import INTERRUPTED, one_line

_HELP = """usage: stepwise COMMAND [options]

Predict, train and monitor self-supervised models that learn their embeddings one dimension at a time.

commands ('stepwise COMMAND --help' lists the options):
{commands}

options:
  --help, --version

A configuration describes a run. It is a file, or one of the package:
  stepwise fit --config barlow_twins_photos      one or two minutes on a laptop, no download
{configurations}
A second --config changes some values of the first, and options change single values:
  stepwise fit --config vicreg_photos --config ordinary --trainer.max_steps 500
Print a complete configuration, with every default:
  stepwise fit --config vicreg_photos --print_config

Each run has a folder, runs/NAME/version_N, with its configuration, checkpoints, spectra and figure.
"""


def main() -> None:
    """Run ``stepwise``; :func:`stepwise_lightning.commands.lightning_cli.main` describes the exit statuses."""
    prepare_output()
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(_help(), end="")
    elif command == "--version":
        print(f"stepwise_lightning {version('stepwise_lightning')}")
    elif command not in COMMANDS:
        print(f"stepwise: error: unknown command {command!r}; choose from: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    else:
        _run(command, arguments)


def _run(command: str, arguments: list[str]) -> None:
    name, _ = COMMANDS[command]
    module = import_module(f"stepwise_lightning.commands.{name}")
    if name == "lightning_cli":  # one module for several commands, which reports errors itself
        module.main([command, *arguments])
        return
    if not sys.flags.safe_path and not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # classes in the working directory that a run has used
    try:
        module.main(arguments)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # as in `stepwise summary … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        text = one_line(error)
        if text is None:
            raise
        sys.exit(f"stepwise: error: {text}")


def _help() -> str:
    from stepwise_lightning.commands.configurations import names

    commands = "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
    configurations = "\n".join(f"  {line}" for line in textwrap.wrap(", ".join(names()), 100))
    return _HELP.format(commands=commands, configurations=configurations)


if __name__ == "__main__":
    main()

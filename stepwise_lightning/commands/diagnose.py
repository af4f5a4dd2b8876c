"""``stepwise diagnose RUN``, and ``stepwise diagnose --loss NAME --value VALUE``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from stepwise_lightning.commands.parser import Parser

if TYPE_CHECKING:
    from stepwise_lightning.forecasts.diagnosis import Diagnosis
    from stepwise_lightning.theory.plateaus import Plateau

_MAX_LINES = 8
_OPTIONS = ("loss", "num_pairs", "dim", "num_prototypes", "temperature", "scale")  # not in --settings
_EXAMPLE = (
    "examples: stepwise diagnose runs/NAME/version_0; stepwise diagnose --loss simclr --batch-size 512 --value 6.9287"
)


def main(arguments: list[str]) -> None:
    """Print the diagnosis of a run, or the plateaus of a loss and the plateau that a value is on."""
    parser = Parser("diagnose", "Print why the loss of a run does not decrease. Without a run, print the values at "
                    "which a loss stands still, and which of them a reported loss is on. docs/plateaus.md lists "
                    "causes and remedies.")  # fmt: skip
    parser.epilog = _EXAMPLE
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="folder of a run, a checkpoint in it, its spectrum.npz, or a .csv file of its losses",
    )
    parser.add_argument("--root", metavar="FOLDER", help="folder of cifar10 and stl10, if not that of the run")
    parser.add_argument(
        "--pairs",
        type=int,
        default=4096,
        metavar="N",
        help="pairs of views to compute the features of a run on (%(default)s)",
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="steps of training, if RUN does not have them")
    parser.add_argument("--loss", metavar="NAME",
                        help="barlow_twins, vicreg, simclr, spectral_contrastive, supcon, clip, siglip, swav, dino, or "
                             "the dotted path of a function loss(z1, z2)")  # fmt: skip
    parser.add_argument("--value", metavar="NUMBER", help="the reported loss, with all digits that are known")
    parser.add_argument("--batch-size", "--batch_size", type=int, metavar="N",
                        help="pairs in the global batch, over all devices")  # fmt: skip
    parser.add_argument("--dim", type=int, metavar="D", help="dimensions of embeddings, for barlow_twins and functions")
    parser.add_argument("--prototypes", type=int, metavar="K", help="number of prototypes of swav and dino")
    parser.add_argument("--temperature", type=float, metavar="T", help="temperature of supcon (default 0.07)")
    parser.add_argument("--scale", type=float, metavar="S", help="weight of the loss (1.0)")
    parser.add_argument("--settings", nargs="+", type=_setting, default=[], metavar="NAME=VALUE",
                        help="other arguments of barlow_twins and vicreg: numbers, true or false, such as "
                             "normalize=false off_diagonal_weight=1")  # fmt: skip
    options = parser.parse_args(arguments)

    if options.run is None and options.loss is None:
        parser.error("give a RUN, or --loss")
    if options.run is not None and options.value is not None:
        parser.error("give either a RUN or --value")
    loss = _imported(options.loss) if "." in (options.loss or "") else options.loss
    print(_diagnosis(options, loss)) if options.run is not None else _print_plateaus(options, loss)


def _diagnosis(options: argparse.Namespace, loss: Any) -> Diagnosis:
    from stepwise_lightning.commands.diagnose_run import diagnose_run, read_losses
    from stepwise_lightning.forecasts.diagnose import diagnose

    names = {"dim": "dim", "num_prototypes": "prototypes", "temperature": "temperature", "scale": "scale"}
    settings = {name: getattr(options, option) for name, option in names.items()} | dict(options.settings)
    settings = {name: value for name, value in settings.items() if value is not None}
    known = {"loss": loss, "num_pairs": options.batch_size, "settings": settings}
    if not options.run.endswith(".csv"):
        return diagnose_run(
            options.run, root=options.root, num_feature_pairs=options.pairs, max_steps=options.max_steps, **known
        )
    losses, step = read_losses(options.run)
    has_ended = options.max_steps is not None and step + 1 >= options.max_steps
    return replace(diagnose(losses, max_steps=len(losses) if has_ended else None, **known), step=step)


def _print_plateaus(options: argparse.Namespace, loss: Any) -> None:
    from stepwise_lightning.theory.plateaus import find_plateau, plateaus

    sizes = options.batch_size, options.dim, options.prototypes
    known = plateaus(
        loss, *sizes, options.temperature, 1.0 if options.scale is None else options.scale, **dict(options.settings)
    )
    found = None if options.value is None else find_plateau(known, options.value)
    lines = [f"{each.value:<10.6g} {each.description}" for each in known]
    shortened = len(lines) > _MAX_LINES
    print("\n".join([*lines[: _MAX_LINES - 2], "…", lines[-1]] if shortened else lines))
    if options.value is not None:
        print(f"\n{options.value} is {_verdict(options.loss, float(options.value), known, found)}")


def _verdict(loss: str, value: float, known: list[Plateau], found: Plateau | None) -> str:
    if found is not None:
        kind = "plateau" if found.num_learned else "saddle value"
        return f"on the {kind} {found.value:#.4g} of {loss}: {found.description}"
    nearest = min(known, key=lambda plateau: abs(plateau.value - value))
    side = "below" if value < nearest.value else "above"
    return f"not on a known plateau of {loss}: {abs(value - nearest.value):.2g} {side} {nearest.value:#.4g}"


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or name in _OPTIONS:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, without {', '.join(_OPTIONS)}, got {text}")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE with a number, true or false, got {text}") from None


def _imported(path: str) -> Any:
    """Return a function by its dotted path, or an object of a class that needs no arguments."""
    from stepwise_lightning.errors import UserError, reason
    from stepwise_lightning.user_loss import checked_loss

    module, _, name = path.rpartition(".")
    try:
        loss = getattr(import_module(module), name)
        loss = loss() if isinstance(loss, type) else loss
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        text = f"loss {path} cannot be imported ({reason(error)})"
        raise UserError(f"{text}: give the dotted path of a function, or of a class without arguments") from error
    return checked_loss(loss)

"""Run a figure by name: ``python -m reproduce linear_model --profile smoke``."""

from __future__ import annotations

import sys

from reproduce import kernel_mlp, kernel_pca, linear_model, standard_init, three_losses

FIGURES = {
    "linear_model": linear_model,
    "three_losses": three_losses,
    "standard_init": standard_init,
    "kernel_mlp": kernel_mlp,
    "kernel_pca": kernel_pca,
}


def main(arguments: list[str]) -> int:
    """Run the named figure with the remaining arguments; return its exit status."""
    lines = [f"  {name:20}{(module.__doc__ or '').splitlines()[0]}" for name, module in FIGURES.items()]
    usage = "usage: python -m reproduce FIGURE [--help] [options]\n\nfigures:\n" + "\n".join(lines)
    if not arguments or arguments[0] in ("-h", "--help", "list"):
        print(usage)
        return 0
    if arguments[0] not in FIGURES:
        print(f"error: unknown figure {arguments[0]!r}; choose from: {', '.join(FIGURES)}", file=sys.stderr)
        return 2
    return FIGURES[arguments[0]].main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

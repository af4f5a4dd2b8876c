"""Commands of ``stepwise``: one module each, with ``main(arguments)``; ``lightning_cli`` has the training commands."""

from __future__ import annotations

__all__ = ["COMMANDS", "TRAINING"]

# Those with a module of their own here, and what `stepwise --help` says of them.
COMMANDS = {
    "summary": "print what finished runs have learned, as a table",
    "plot": "draw the trajectories of one finished run, or of several over each other",
    "embed": "write what a trained encoder makes of a folder of images",
    "modes": "show what each mode of a trained run looks like, and what it is blind to",
    "export": "write a trained ResNet as weights for torchvision",
    "download": "fetch CIFAR-10 or STL-10",
}
# Those of Lightning's command line.
TRAINING = {
    "fit": "train a model, and measure its spectra",
    "validate": "measure a trained model on its held-out images",
    "test": "the same on its test images",
    "forecast": "say when each mode will be learned, and up to which learning rate that is stable",
}

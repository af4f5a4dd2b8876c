"""Commands of ``stepwise``, one module each, with ``main(arguments)``."""

from __future__ import annotations

__all__ = ["COMMANDS", "TRAINING"]

# name of the command: module in this package, and its line in `stepwise --help`
COMMANDS = {
    "fit": ("lightning_cli", "train a model and log its spectra"),
    "validate": ("lightning_cli", "evaluate a trained model on its held-out images"),
    "test": ("lightning_cli", "evaluate a trained model on its test images"),
    "forecast": ("lightning_cli", "predict when each mode is learned, and the largest stable learning rate"),
    "diagnose": ("diagnose", "compare a loss that does not decrease with the plateaus of its loss function"),
    "summary": ("summary", "print a table of the modes that finished runs have learned"),
    "plot": ("plot", "plot the eigenvalues of one finished run, or of several in one figure"),
    "compare": ("compare", "compare runs mode by mode, and with runs of their configuration with other seeds"),
    "embed": ("embed", "compute the embeddings of a folder of images with a trained encoder"),
    "modes": ("modes", "describe each mode of a trained run: images, classes, invariances"),
    "export": ("export", "export a trained ResNet as weights for torchvision"),
    "download": ("download", "download CIFAR-10 or STL-10"),
}
# Commands of Lightning's command line: their options are a configuration.
TRAINING = [name for name, (module, _) in COMMANDS.items() if module == "lightning_cli"]

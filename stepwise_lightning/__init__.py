"""Predict, train and watch joint-embedding models that learn one dimension at a time."""

from importlib.metadata import version

import lazy_loader

# Names are listed in __init__.pyi, and imported when first used: theory, losses and spectra do without Lightning.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("stepwise_lightning")

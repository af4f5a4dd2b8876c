"""One script per figure of the paper: ``python -m reproduce NAME`` or ``python reproduce/NAME.py``."""

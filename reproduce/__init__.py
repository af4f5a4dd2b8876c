"""Scripts that reproduce the paper's figures: ``python -m reproduce NAME`` from the root of a clone."""

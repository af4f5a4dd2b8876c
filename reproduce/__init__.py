"""The paper's figures, made again: ``python -m reproduce NAME`` from the root of a clone."""

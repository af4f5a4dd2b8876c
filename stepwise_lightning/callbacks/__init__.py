"""Callbacks: spectra, forecasts, evaluation and progress while a module trains."""

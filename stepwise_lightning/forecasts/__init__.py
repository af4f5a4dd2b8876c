"""Forecasts of the step at which each mode is learned, and of stable learning rates."""

"""Accelerated Barlow Twins: full-batch gradient descent, and networks."""

"""Accelerated Barlow Twins: descent in full view, and networks."""

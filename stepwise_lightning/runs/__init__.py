"""Runs that survive: checkpoints, going on from them, and where a result came from."""

from stepwise_lightning.runs.checkpoints import AtomicCheckpointIO, LastCheckpoint
from stepwise_lightning.runs.provenance import provenance

__all__ = ["AtomicCheckpointIO", "LastCheckpoint", "provenance"]

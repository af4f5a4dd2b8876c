"""Training runs on disk: checkpoints, resuming, provenance."""

from stepwise_lightning.runs.checkpoints import AtomicCheckpointIO, LastCheckpoint
from stepwise_lightning.runs.provenance import provenance

__all__ = ["AtomicCheckpointIO", "LastCheckpoint", "provenance"]

"""``stepwise forecast``: a table and a figure of the steps at which modes are learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from stepwise_lightning.callbacks.spectrum_logger import records_in
from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.files import atomic_write
from stepwise_lightning.forecasts.forecast import Forecast
from stepwise_lightning.forecasts.sgd import last_layer
from stepwise_lightning.forecasts.simulate import NUM_PAIRS, forecast, unseen_batches
from stepwise_lightning.losses import LOSSES
from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.runs.saved import saved_checkpoint


class ForecastingTrainer(L.Trainer):
    """Lightning's Trainer with the method ``forecast``."""

    def forecast(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        pairs: int = NUM_PAIRS,
        picture: str = "forecast.png",
        loss: Callable[[Tensor, Tensor], Tensor] | str | None = None,
    ) -> Forecast:
        """Predict when each mode is learned, and the largest stable learning rate, without training.

        Args:
            model: a ``JointEmbedding`` such as ``BarlowTwins``, or any module that ends in a linear layer and whose
                ``configure_optimizers`` returns plain SGD.
            datamodule: the training data.
            ckpt_path: forecast from this checkpoint instead of from the initial weights.
            pairs: number of pairs of views to measure features on; at least eight times the number of features.
            picture: file of the figure.
            loss: loss of a model of another package: a name in ``stepwise_lightning.losses.LOSSES``, or the dotted path
                of a function of both views' embeddings.

        Raises:
            ValueError: the model has no known loss, or ``max_steps`` is missing or not above the checkpoint's step.

        """
        max_steps = self.max_steps
        if not isinstance(model, JointEmbedding) and loss is None:
            raise UserError(
                f"the model must be a JointEmbedding such as BarlowTwins, got {type(model).__name__}: for another "
                f"module that ends in a linear layer give --loss, one of {', '.join(LOSSES)}, or the dotted path of a "
                "function"
            )
        if max_steps <= 0:
            raise UserError("a forecast needs the number of training steps: set trainer.max_steps")
        if datamodule is None:
            raise UserError("data is missing: a forecast needs --data")
        checkpoint = _read(ckpt_path, model) if ckpt_path else {}
        start = checkpoint.get("global_step", 0)
        if start >= max_steps:
            raise UserError(f"the checkpoint is of step {start}, but max_steps is {max_steps}: raise max_steps")
        datamodule.prepare_data()
        datamodule.setup("fit")
        model.to(self.strategy.root_device)
        batches, velocity = unseen_batches(datamodule), _velocity(model, checkpoint)
        result = forecast(model, batches, max_steps, start=start, loss=loss, num_pairs=pairs, velocity=velocity)
        if records := [record for record in records_in(checkpoint) if result.matrix in record.matrices]:
            result = result.with_plateau_correction(records[0])
        print(result)
        if start and result.next_mode[1] < max_steps:
            print("mode {} is due at step {:.0f}".format(*result.next_mode))
        _draw(result, picture)
        return result


def _draw(result: Forecast, path: str) -> None:
    from stepwise_lightning.plots.forecasts import forecast_figure

    figure = forecast_figure(result)
    atomic_write(Path(path), lambda partial: figure.savefig(partial, format="png", dpi=150))
    print(f"picture: {path}")


def configure_for_forecast(config: Any) -> None:
    """Reduce a configuration to one process on any accelerator, without loggers, callbacks and plugins."""
    trainer = config.trainer
    trainer.accelerator, trainer.devices, trainer.num_nodes, trainer.strategy = "auto", 1, 1, "auto"
    trainer.logger, trainer.callbacks, trainer.plugins, trainer.sync_batchnorm = False, None, None, False
    trainer.enable_checkpointing = False


def _read(path: str, model: L.LightningModule) -> dict[str, Any]:
    """Return a checkpoint after loading its weights into the model."""
    checkpoint = saved_checkpoint(path)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UserError(f"{path} is not a checkpoint of this model ({reason(error)}): pass another one") from error
    return checkpoint


def _velocity(model: L.LightningModule, checkpoint: dict[str, Any]) -> list[torch.Tensor] | None:
    """Return the momentum buffers of the last layer in a checkpoint, None without momentum."""
    states = [state["state"] for state in checkpoint.get("optimizer_states", [])[:1]]
    layer = last_layer(model)
    parameters = [layer.weight, layer.bias]
    indices = [index for w in parameters for index, p in enumerate(model.parameters()) if p is w]
    buffers = [state.get(index, {}).get("momentum_buffer") for state in states for index in indices]
    return buffers if buffers and all(buffer is not None for buffer in buffers) else None

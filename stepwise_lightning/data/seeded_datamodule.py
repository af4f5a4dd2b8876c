"""Data module with one seed, equal on all ranks and after resuming."""

from __future__ import annotations

from typing import Any, cast

import lightning as L

from stepwise_lightning.data.image_sets import download_images
from stepwise_lightning.seeding import checked_seed


class SeededDataModule(L.LightningDataModule):
    """Data module whose random numbers follow from one seed.

    Subclasses call ``_set_seed`` in the constructor, after ``save_hyperparameters``, and use the seed after ``setup``.

    Attributes:
        seed: the seed in use, also in ``hparams``: the given one, or the global seed when the object was created. The
            ranks use the seed of rank 0; a resumed run without a given seed uses that of the checkpoint.

    """

    seed: int
    _hparams_initial: Any  # logged by Lightning

    def _set_seed(self, seed: int | None) -> None:
        self._seed_given = seed is not None
        self.seed = checked_seed(None) if seed is None else seed
        self._update_hparams()

    def _update_hparams(self) -> None:
        for hparams in (self.hparams, self._hparams_initial):
            cast(dict[str, Any], hparams)["seed"] = self.seed

    def prepare_data(self) -> None:
        """Download a built-in data set if ``download`` is set (in one process per machine)."""
        if self.hparams["download"] and isinstance(data := self.hparams.get("data"), str):
            download_images(data, self.hparams["root"])

    def check(self, num_processes: int) -> None:
        """Load the training data, and raise a ValueError for settings that do not fit them.

        Called without a Trainer, before a run creates its folder.
        """
        self.setup("fit")

    def setup(self, stage: str | None = None) -> None:
        """Use the seed of rank 0."""
        if (trainer := self.trainer) is None:
            return
        self.seed = trainer.strategy.broadcast(self.seed)
        self._update_hparams()
        if not self._seed_given and "seed" in getattr(trainer.lightning_module, "hparams_initial", {}):
            # Lightning refuses to log different values of one name.
            self._hparams_initial.pop("seed")

    def state_dict(self) -> dict[str, Any]:
        """Return the seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Use the seed of the checkpoint, unless the constructor got one."""
        if not self._seed_given:
            self.seed = state.get("seed", self.seed)  # absent in checkpoints of earlier versions
            cast(dict[str, Any], self.hparams)["seed"] = self.seed

"""Online evaluation of data with missing, invalid and other labels."""

from pathlib import Path

import lightning as L
import pytest
import torch
from test_evaluation import trainer

from stepwise_lightning import VICReg
from stepwise_lightning.callbacks.online_evaluation import OnlineKNN, OnlineLinearProbe
from stepwise_lightning.encoders import MLP


class Rows(L.LightningDataModule):
    """Points of separated classes; the label −1 is at class 0."""

    def __init__(self, train: list[int], val: list[int], bank: list[int] | None = None, num_classes: int = 2) -> None:
        super().__init__()
        self.train, self.val, self.bank = train, val, train if bank is None else bank
        self.class_names = [str(number) for number in range(num_classes)]

    def loader(self, labels: list[int], views: int) -> torch.utils.data.DataLoader:
        y = torch.tensor(labels, dtype=torch.long)
        x = torch.randn(len(y), 6, generator=torch.Generator().manual_seed(0)) + 3 * y.clamp(min=0)[:, None]
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*[x] * views, y), 8)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return self.loader(self.train, 2)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return self.loader(self.val, 1)

    def labelled_train_dataloader(self) -> torch.utils.data.DataLoader:
        return self.loader(self.bank, 1)


def test_probe_embeds_nothing_without_labels() -> None:
    probe, passes = OnlineLinearProbe("encoder.1"), []
    module = VICReg(MLP(6, [4], 3), learning_rate=1e-3)
    module.encoder[1].register_forward_hook(lambda part, *_: passes.append(part.training))
    trainer([probe], 1, limit_val_batches=0).fit(module, datamodule=Rows([-1] * 16, [0, 1] * 4))
    assert passes == [True] * 4 and probe.probe is None


def test_knn_creates_one_loader_for_all_validations() -> None:
    class Counted(Rows):
        loaders = 0

        def labelled_train_dataloader(self) -> torch.utils.data.DataLoader:
            self.loaders += 1
            return super().labelled_train_dataloader()

    data = Counted([0, 1] * 8, [0, 1] * 4)
    running = trainer([OnlineKNN("encoder.1", k=1)], 3)
    running.fit(VICReg(MLP(6, [4], 3), learning_rate=1e-3), datamodule=data)
    assert data.loaders == 1 and running.callback_metrics["val/knn_top1"] > 0.5


def rows(callback: L.Callback, data: Rows) -> L.Trainer:
    running = trainer([callback], 1)
    running.fit(VICReg(MLP(6, [4], 3), learning_rate=1e-3), datamodule=data)
    return running


LABELS = {
    "no held-out label": (Rows([0, 1] * 8, [-1] * 8), "needs labelled images, but no val image has a label"),
    "label beyond the classes": (Rows([0, 2] * 8, [0, 1] * 4), "label 2, but there are 2 classes, counted from 0"),
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [(OnlineLinearProbe, "no held-out label"), (OnlineKNN, "label beyond the classes")],
    ids=["probe", "knn"],
)
def test_missing_and_invalid_labels_raise(kind: type, case: str) -> None:
    data, message = LABELS[case]
    with pytest.raises(ValueError, match=f"^{kind.__name__} .*{message}"):
        rows(kind(watch="encoder.1"), data)


def test_knn_requires_labels_and_ignores_unlabelled_images() -> None:
    for bank in ([], [-1] * 8):
        with pytest.raises(
            ValueError, match="needs labelled training images, but labelled_train_dataloader.. returned none"
        ):
            rows(OnlineKNN("encoder.1"), Rows([0, 1] * 8, [0, 1] * 4, bank))
    some, all_known = (
        rows(OnlineKNN("encoder.1", k=1), Rows([0, 1] * 8, [0, 1] * 4, bank)).callback_metrics["val/knn_top1"]
        for bank in ([0, 1] * 8 + [-1] * 8, [0, 1] * 8)
    )
    assert some == all_known > 0.5


def test_probe_without_labelled_batches_raises_in_validation() -> None:
    with pytest.raises(ValueError, match="the linear probe is untrained"):
        rows(OnlineLinearProbe("encoder.1"), Rows([-1] * 16, [0, 1] * 4))


def test_checkpoint_with_another_number_of_classes_raises(tmp_path: Path) -> None:
    running = rows(OnlineLinearProbe("encoder.1"), Rows([0, 1] * 8, [0, 1] * 4))
    running.save_checkpoint(tmp_path / "two.ckpt")
    data = Rows([0, 1] * 8, [0, 1] * 4, num_classes=3)
    with pytest.raises(ValueError, match="has 2 classes, but the data have 3: use the data it was trained on"):
        trainer([OnlineLinearProbe("encoder.1")]).validate(
            running.lightning_module, data, ckpt_path=tmp_path / "two.ckpt", weights_only=True
        )

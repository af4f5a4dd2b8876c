"""Spectra of the LightningModules of lightly, which use ``pytorch_lightning``."""

import pytest
import torch
from attached import PACKAGES, QUIET, check, write_photographs
from lightly.data import LightlyDataset
from lightly.embedding import SelfSupervisedEmbedding
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models import ResNetGenerator
from lightly.models.modules import SimCLRProjectionHead, SimSiamPredictionHead, SimSiamProjectionHead
from lightly.transforms import SimCLRTransform
from lightly.utils.benchmarking import BenchmarkModule, KNNClassifier
from lightly.utils.benchmarking.linear_classifier import FinetuneClassifier, LinearClassifier
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from stepwise_lightning import SpectrumLogger

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
PACKAGE, SIZE, WIDTH = PACKAGES["pytorch_lightning"], 32, 64


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return str(write_photographs(tmp_path_factory.mktemp("photographs")))


@pytest.fixture
def labelled(photographs):
    crop = transforms.Compose([transforms.RandomCrop(SIZE), transforms.ToTensor()])
    return lambda: DataLoader(LightlyDataset(photographs, transform=crop), batch_size=5, shuffle=True, drop_last=True)


@pytest.fixture
def held_out(photographs):
    crop = transforms.Compose([transforms.CenterCrop(SIZE), transforms.ToTensor()])
    return DataLoader(LightlyDataset(photographs, transform=crop), batch_size=4)


@pytest.fixture
def two_views(photographs):
    dataset = LightlyDataset(photographs, transform=SimCLRTransform(input_size=SIZE))
    return lambda: DataLoader(dataset, batch_size=5, shuffle=True, drop_last=True)


def backbone():
    layers = list(ResNetGenerator("resnet-9", width=WIDTH / 512).children())
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


def images(batch):
    return batch[:1]


def output(module, view):
    return module(view)


def features(module, view):
    return module.model(view)


@pytest.mark.parametrize("classifier", [FinetuneClassifier, LinearClassifier], ids=lambda each: each.__name__)
def test_classifier(classifier, labelled, held_out, tmp_path):
    def build():
        return classifier(backbone(), 64, feature_dim=WIDTH, num_classes=4, topk=(1, 2))

    logger = SpectrumLogger(watch=["model"])
    # The linear classifier sets its backbone with batch normalization to evaluation mode.
    frozen = ["model"] if classifier is LinearClassifier else []
    attached = [(logger, {"": output, "model": features})]
    check(PACKAGE, build, labelled, tmp_path, attached, 6, images, frozen, held_out=held_out)
    assert not logger.record.losses[:-1].isnan().any()


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_knn_classifier_without_training(labelled, held_out, tmp_path):
    def build():
        return KNNClassifier(backbone(), 2, knn_k=3, knn_t=0.1, train_dataloader_idx=0, val_dataloader_idx=1, topk=(1,))

    logger = SpectrumLogger()
    attached = [(logger, {"": output})]
    check(PACKAGE, build, labelled, tmp_path, attached, 6, images, held_out=[held_out, held_out])
    assert logger.record.times.tolist() == logger.record.steps.tolist()  # no optimizer, hence no learning rate


def projections(module, view):
    return module(view)[0]


def test_benchmark_module(held_out, two_views, tmp_path):
    class SimSiam(BenchmarkModule):
        """Example from the docstring of BenchmarkModule."""

        def __init__(self):
            super().__init__(held_out, num_classes=2, knn_k=3)
            self.backbone = backbone()
            self.projection_head = SimSiamProjectionHead(WIDTH, 48, 16)
            self.prediction_head = SimSiamPredictionHead(16, 24, 16)
            self.criterion = NegativeCosineSimilarity()

        def forward(self, x):
            f = self.backbone(x).flatten(start_dim=1)
            z = self.projection_head(f)
            p = self.prediction_head(z)
            return z.detach(), p

        def training_step(self, batch, batch_idx):
            (x0, x1), _, _ = batch
            z0, p0 = self.forward(x0)
            z1, p1 = self.forward(x1)
            return 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=6e-2, momentum=0.9)]

    watched = {"backbone": lambda module, x: module.backbone(x), "projections": projections}
    logger = SpectrumLogger(watch=["backbone", projections], output=False)
    _, module = check(
        PACKAGE, SimSiam, two_views, tmp_path, [(logger, watched)], 6, lambda batch: batch[0], held_out=held_out
    )
    assert module.max_accuracy > 0


class TwoArms(nn.Module):
    """SimCLR of earlier versions of lightly, for SelfSupervisedEmbedding."""

    def __init__(self):
        super().__init__()
        self.backbone, self.projection_head = backbone(), SimCLRProjectionHead(WIDTH, 48, 16)

    def forward(self, x0, x1):
        return self.projection_head(self.backbone(x0)), self.projection_head(self.backbone(x1))


def projected(module, view):
    return module.model.projection_head(module.model.backbone(view))


def test_self_supervised_embedding_with_a_forward_of_both_views(two_views, tmp_path):
    def build():
        model = TwoArms()
        return SelfSupervisedEmbedding(model, NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06), two_views())

    watched = {"model.backbone": lambda module, x: module.model.backbone(x), "projected": projected}
    logger = SpectrumLogger(watch=["model.backbone", projected], output=False)
    check(PACKAGE, build, two_views, tmp_path, [(logger, watched)], 6, lambda batch: batch[0])

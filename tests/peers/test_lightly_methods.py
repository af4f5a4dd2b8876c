"""Spectra of the methods in lightly's examples, built from its heads, losses and transforms."""

import copy

import pytest
import torch
import torchvision
from attached import PACKAGES, QUIET, check, write_photographs
from lightly.data import LightlyDataset
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    TiCoLoss,
    VICRegLoss,
)
from lightly.models import ResNetGenerator, utils
from lightly.models.modules import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    MAEBackbone,
    MAEDecoder,
    MoCoProjectionHead,
    NNCLRPredictionHead,
    NNCLRProjectionHead,
    NNMemoryBankModule,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.modules.heads import TiCoProjectionHead, VICRegProjectionHead
from lightly.transforms import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
    DINOTransform,
    FastSiamTransform,
    MAETransform,
    MoCoV2Transform,
    SimCLRTransform,
    SimSiamTransform,
    SwaVTransform,
    VICRegTransform,
)
from torch import nn
from torch.utils.data import DataLoader

from stepwise_lightning import SpectrumLogger

pytestmark = QUIET
SIZE, WIDTH, HIDDEN, OUT = 32, 64, 48, 16


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return str(write_photographs(tmp_path_factory.mktemp("photographs")))


def resnet():
    layers = list(ResNetGenerator("resnet-9", width=WIDTH / 512).children())
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1))


def simple(package, head, criterion, rate):
    """SimCLR, Barlow Twins and VICReg: one head and one loss of two views."""

    class Method(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone, self.projection_head, self.criterion = resnet(), head(), criterion()

        def forward(self, x):
            x = self.backbone(x).flatten(start_dim=1)
            return self.projection_head(x)

        def training_step(self, batch, batch_index):
            (x0, x1), _, _ = batch
            loss = self.criterion(self.forward(x0), self.forward(x1))
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=rate)

    return Method()


def simclr(package):
    return simple(package, lambda: SimCLRProjectionHead(WIDTH, HIDDEN, OUT), lambda: NTXentLoss(), 0.06)


def simclr_without_batch_norm(package):
    head = lambda: SimCLRProjectionHead(WIDTH, HIDDEN, OUT, num_layers=3, batch_norm=False)  # noqa: E731
    return simple(package, head, lambda: NTXentLoss(memory_bank_size=(32, OUT)), 0.06)


def barlow_twins(package):
    return simple(package, lambda: BarlowTwinsProjectionHead(WIDTH, HIDDEN, OUT), BarlowTwinsLoss, 0.06)


def vicreg(package):
    return simple(package, lambda: VICRegProjectionHead(WIDTH, HIDDEN, OUT, num_layers=2), VICRegLoss, 0.02)


def simsiam(package):
    class SimSiam(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = resnet()
            self.projection_head = SimSiamProjectionHead(WIDTH, HIDDEN, OUT)
            self.prediction_head = SimSiamPredictionHead(OUT, HIDDEN, OUT)
            self.criterion = NegativeCosineSimilarity()

        def forward(self, x):
            f = self.backbone(x).flatten(start_dim=1)
            z = self.projection_head(f)
            p = self.prediction_head(z)
            z = z.detach()
            return z, p

        def training_step(self, batch, batch_idx):
            (x0, x1) = batch[0][:2]
            z0, p0 = self.forward(x0)
            z1, p1 = self.forward(x1)
            return 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.06)

    return SimSiam()


def nnclr(package):
    class NNCLR(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = resnet()
            self.projection_head = NNCLRProjectionHead(WIDTH, HIDDEN, OUT)
            self.prediction_head = NNCLRPredictionHead(OUT, HIDDEN, OUT)
            self.memory_bank = NNMemoryBankModule(size=(24, OUT))
            self.criterion = NTXentLoss()

        def forward(self, x):
            y = self.backbone(x).flatten(start_dim=1)
            z = self.projection_head(y)
            p = self.prediction_head(z)
            z = z.detach()
            return z, p

        def training_step(self, batch, batch_idx):
            (x0, x1) = batch[0]
            z0, p0 = self.forward(x0)
            z1, p1 = self.forward(x1)
            z0 = self.memory_bank(z0, update=False)
            z1 = self.memory_bank(z1, update=True)
            return 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.06)

    return NNCLR()


def moco(package):
    class MoCo(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = resnet()
            self.projection_head = MoCoProjectionHead(WIDTH, HIDDEN, OUT)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            utils.deactivate_requires_grad(self.backbone_momentum)
            utils.deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NTXentLoss(memory_bank_size=(32, OUT))

        def forward(self, x):
            query = self.backbone(x).flatten(start_dim=1)
            return self.projection_head(query)

        def forward_momentum(self, x):
            key = self.backbone_momentum(x).flatten(start_dim=1)
            return self.projection_head_momentum(key).detach()

        def training_step(self, batch, batch_idx):
            utils.update_momentum(self.backbone, self.backbone_momentum, m=0.9)
            utils.update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
            x_query, x_key = batch[0]
            query = self.forward(x_query)
            x_key, shuffle = utils.batch_shuffle(x_key)
            key = utils.batch_unshuffle(self.forward_momentum(x_key), shuffle)
            return self.criterion(query, key)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.06)

    return MoCo()


def byol(package):
    class BYOL(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = resnet()
            self.projection_head = BYOLProjectionHead(WIDTH, HIDDEN, OUT)
            self.prediction_head = BYOLPredictionHead(OUT, HIDDEN, OUT)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            utils.deactivate_requires_grad(self.backbone_momentum)
            utils.deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NegativeCosineSimilarity()

        def forward(self, x):
            y = self.backbone(x).flatten(start_dim=1)
            return self.prediction_head(self.projection_head(y))

        def forward_momentum(self, x):
            y = self.backbone_momentum(x).flatten(start_dim=1)
            return self.projection_head_momentum(y).detach()

        def training_step(self, batch, batch_idx):
            utils.update_momentum(self.backbone, self.backbone_momentum, m=0.9)
            utils.update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
            (x0, x1) = batch[0]
            p0, z0 = self.forward(x0), self.forward_momentum(x0)
            p1, z1 = self.forward(x1), self.forward_momentum(x1)
            return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.06)

    return BYOL()


def tico(package):
    class TiCo(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = resnet()
            self.projection_head = TiCoProjectionHead(WIDTH, HIDDEN, OUT)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            utils.deactivate_requires_grad(self.backbone_momentum)
            utils.deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = TiCoLoss()

        def forward(self, x):
            y = self.backbone(x).flatten(start_dim=1)
            return self.projection_head(y)

        def forward_momentum(self, x):
            y = self.backbone_momentum(x).flatten(start_dim=1)
            return self.projection_head_momentum(y).detach()

        def training_step(self, batch, batch_idx):
            (x0, x1) = batch[0]
            utils.update_momentum(self.backbone, self.backbone_momentum, m=0.9)
            utils.update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
            x0 = x0.to(self.device)
            return self.criterion(self.forward(x0), self.forward_momentum(x1))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.06)

    return TiCo()


def dino(package):
    class DINO(package.LightningModule):
        def __init__(self):
            super().__init__()
            backbone = resnet()
            self.student_backbone = backbone
            self.student_head = DINOProjectionHead(WIDTH, HIDDEN, OUT, 24, freeze_last_layer=1)
            self.teacher_backbone = copy.deepcopy(backbone)
            self.teacher_head = DINOProjectionHead(WIDTH, HIDDEN, OUT, 24)
            utils.deactivate_requires_grad(self.teacher_backbone)
            utils.deactivate_requires_grad(self.teacher_head)
            self.criterion = DINOLoss(output_dim=24, warmup_teacher_temp_epochs=5)

        def forward(self, x):
            y = self.student_backbone(x).flatten(start_dim=1)
            return self.student_head(y)

        def forward_teacher(self, x):
            y = self.teacher_backbone(x).flatten(start_dim=1)
            return self.teacher_head(y)

        def training_step(self, batch, batch_idx):
            utils.update_momentum(self.student_backbone, self.teacher_backbone, m=0.9)
            utils.update_momentum(self.student_head, self.teacher_head, m=0.9)
            views = [view.to(self.device) for view in batch[0]]
            global_views = views[:2]
            teacher_out = [self.forward_teacher(view) for view in global_views]
            student_out = [self.forward(view) for view in views]
            return self.criterion(teacher_out, student_out, epoch=self.current_epoch)

        def on_after_backward(self):
            self.student_head.cancel_last_layer_gradients(current_epoch=self.current_epoch)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.001)

    return DINO()


def swav(package):
    class SwaV(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = resnet()
            self.projection_head = SwaVProjectionHead(WIDTH, HIDDEN, OUT)
            self.prototypes = SwaVPrototypes(OUT, n_prototypes=24)
            self.criterion = SwaVLoss(sinkhorn_epsilon=0.05)

        def forward(self, x):
            x = self.backbone(x).flatten(start_dim=1)
            x = self.projection_head(x)
            x = nn.functional.normalize(x, dim=1, p=2)
            return self.prototypes(x)

        def training_step(self, batch, batch_idx):
            self.prototypes.normalize()
            multi_crop_features = [self.forward(x.to(self.device)) for x in batch[0]]
            return self.criterion(multi_crop_features[:2], multi_crop_features[2:])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.001)

    return SwaV()


def mae(package):
    class MAE(package.LightningModule):
        def __init__(self):
            super().__init__()
            vit = torchvision.models.VisionTransformer(
                image_size=SIZE, patch_size=8, num_layers=2, num_heads=2, hidden_dim=WIDTH, mlp_dim=HIDDEN
            )
            self.mask_ratio, self.patch_size, self.sequence_length = 0.75, vit.patch_size, vit.seq_length
            self.mask_token = nn.Parameter(torch.zeros(1, 1, HIDDEN))
            nn.init.normal_(self.mask_token, std=0.02)
            self.backbone = MAEBackbone.from_vit(vit)
            self.decoder = MAEDecoder(
                seq_length=vit.seq_length, num_layers=1, num_heads=2, embed_input_dim=vit.hidden_dim,
                hidden_dim=HIDDEN, mlp_dim=HIDDEN, out_dim=vit.patch_size**2 * 3, dropout=0.1, attention_dropout=0.1,
            )  # fmt: skip
            self.criterion = nn.MSELoss()

        def forward_encoder(self, images, idx_keep=None):
            return self.backbone.encode(images, idx_keep)

        def forward_decoder(self, x_encoded, idx_keep, idx_mask):
            batch_size = x_encoded.shape[0]
            x_decode = self.decoder.embed(x_encoded)
            x_masked = utils.repeat_token(self.mask_token, (batch_size, self.sequence_length))
            x_masked = utils.set_at_index(x_masked, idx_keep, x_decode.type_as(x_masked))
            x_decoded = self.decoder.decode(x_masked)
            return self.decoder.predict(utils.get_at_index(x_decoded, idx_mask))

        def training_step(self, batch, batch_idx):
            images = batch[0][0]
            idx_keep, idx_mask = utils.random_token_mask(
                size=(images.shape[0], self.sequence_length), mask_ratio=self.mask_ratio, device=images.device
            )
            x_encoded = self.forward_encoder(images, idx_keep)
            x_pred = self.forward_decoder(x_encoded, idx_keep, idx_mask)
            patches = utils.patchify(images, self.patch_size)
            return self.criterion(x_pred, utils.get_at_index(patches, idx_mask - 1))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1.5e-3)

    return MAE()


# ---- watched modules and the functions that compute their embeddings ----


def projections(module, view):
    return module(view)[0]


def keys(module, view):
    return module.forward_momentum(view)


def whole():
    return [
        (
            SpectrumLogger(watch=["backbone"]),
            {"": lambda module, x: module(x), "backbone": lambda module, x: module.backbone(x)},
        )
    ]


def of_pairs():
    watched = {"backbone": lambda module, x: module.backbone(x), "projections": lambda module, x: module(x)[0]}
    return [(SpectrumLogger(watch=["backbone", projections], output=False), watched)]


def with_momentum():
    momentum = SpectrumLogger(watch=["backbone_momentum", keys], output=False, name="momentum")
    return [
        *whole(),
        (momentum, {"backbone_momentum": lambda module, x: module.backbone_momentum(x), "keys": keys}),
    ]


def of_dino():
    own = {"": lambda module, x: module.student_head(module.student_backbone(x).flatten(1))}
    teacher = {"teacher_backbone": lambda module, x: module.teacher_backbone(x)}
    return [
        (SpectrumLogger(), own),
        (SpectrumLogger(watch=["teacher_backbone"], output=False), teacher),
    ]


def of_mae():
    return [(SpectrumLogger(watch=["backbone"], output=False), {"backbone": lambda module, x: module.backbone(x)})]


def small_byol():
    return BYOLTransform(BYOLView1Transform(input_size=SIZE), BYOLView2Transform(input_size=SIZE))


METHODS = {
    "simclr": (simclr, lambda: SimCLRTransform(input_size=SIZE), whole),
    "simclr_without_batch_norm": (simclr_without_batch_norm, lambda: SimCLRTransform(input_size=SIZE), whole),
    "barlow_twins": (barlow_twins, small_byol, whole),
    "vicreg": (vicreg, lambda: VICRegTransform(input_size=SIZE), whole),
    "simsiam": (simsiam, lambda: SimSiamTransform(input_size=SIZE), of_pairs),
    "fast_siam": (simsiam, lambda: FastSiamTransform(num_views=4, input_size=SIZE), of_pairs),
    "nnclr": (nnclr, lambda: SimCLRTransform(input_size=SIZE), of_pairs),
    "moco": (moco, lambda: MoCoV2Transform(input_size=SIZE), with_momentum),
    "byol": (byol, small_byol, with_momentum),
    "tico": (tico, small_byol, with_momentum),
    "dino": (dino, lambda: DINOTransform(global_crop_size=SIZE, local_crop_size=16, n_local_views=3), of_dino),
    "swav": (swav, lambda: SwaVTransform(crop_sizes=(SIZE, 16), crop_counts=(2, 3)), whole),
    "mae": (mae, lambda: MAETransform(input_size=SIZE), of_mae),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated in favor of:FutureWarning")
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("method", METHODS)
def test_method(method, package, photographs, tmp_path):
    build, transform, attached = METHODS[method]

    def loader():
        dataset = LightlyDataset(photographs, transform=transform())
        return DataLoader(dataset, batch_size=5, shuffle=True, drop_last=True)

    def views(batch):
        crops, labels, names = batch
        assert labels.shape == (5,) and len(names) == 5
        return crops[: 1 if method == "mae" else 2]

    check(PACKAGES[package], lambda: build(PACKAGES[package]), loader, tmp_path, attached(), last_step=6, views=views)

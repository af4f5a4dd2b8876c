"""Modules of the methods in lightly's examples without momentum encoders."""

import torch
import torchvision
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss, VICRegLoss
from lightly.models import ResNetGenerator, utils
from lightly.models.modules import (
    BarlowTwinsProjectionHead,
    MAEBackbone,
    MAEDecoder,
    NNCLRPredictionHead,
    NNCLRProjectionHead,
    NNMemoryBankModule,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.modules.heads import VICRegProjectionHead
from torch import nn

SIZE, WIDTH, HIDDEN, OUT = 32, 64, 48, 16


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
            x_encoded = self.backbone.encode(images, idx_keep)
            x_pred = self.forward_decoder(x_encoded, idx_keep, idx_mask)
            patches = utils.patchify(images, self.patch_size)
            return self.criterion(x_pred, utils.get_at_index(patches, idx_mask - 1))

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1.5e-3)

    return MAE()

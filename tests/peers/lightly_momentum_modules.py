"""Modules of the methods in lightly's examples with momentum encoders."""

import copy

import torch
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss, TiCoLoss
from lightly.models import utils
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, DINOProjectionHead, MoCoProjectionHead
from lightly.models.modules.heads import TiCoProjectionHead
from lightly_modules import HIDDEN, OUT, WIDTH, resnet


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

"""Check of the loss on a GPU, with CPU tensors and recorded events, and data types of gathered embeddings."""

import copy
import math
import pickle
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from stepwise_lightning import BarlowTwins
from stepwise_lightning.errors import DivergedError
from stepwise_lightning.modules import joint_embedding
from stepwise_lightning.modules.divergence import LossCheck


class OnGPU(Tensor):
    """Tensor with the device of a GPU, which raises an error if its value is read."""

    is_cuda, device = True, torch.device("cuda", 0)

    def detach(self):
        return self.as_subclass(Tensor)

    def item(self):
        raise AssertionError("reading the value waits for the GPU")


@pytest.fixture
def events(monkeypatch):
    """Replace pinned memory and events of CUDA, which need a GPU; return the list of events."""
    created = []

    def event():
        created.append(SimpleNamespace(record=lambda stream: None, waits=0))
        created[-1].synchronize = lambda each=created[-1]: setattr(each, "waits", each.waits + 1)
        return created[-1]

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    return created


def module_at(step):
    return SimpleNamespace(global_step=step, hparams={"learning_rate": 0.1})


def test_a_loss_on_a_gpu_is_read_one_batch_later(events):
    check = LossCheck()
    for step, value in enumerate((1.0, 2.0, math.nan)):
        check(module_at(step), torch.tensor(value).as_subclass(OnGPU), (), now=False)
        assert [event.waits for event in events] == [1] * step + [0]
    with pytest.raises(DivergedError, match=r"the loss at step 2 is nan; .*lower learning_rate \(now 0.1\), or check"):
        check(module_at(3), torch.tensor(4.0).as_subclass(OnGPU), (), now=False)


def test_copies_of_a_check_have_no_events(events):
    check = LossCheck()
    check(module_at(0), torch.tensor(math.nan).as_subclass(OnGPU), (), now=False)
    for other in (copy.deepcopy(check), pickle.loads(pickle.dumps(check))):
        other(module_at(1), torch.tensor(1.0).as_subclass(OnGPU), (), now=False)
    assert [event.waits for event in events] == [0, 0, 0]


def test_half_precision_embeddings_are_gathered_in_float32(monkeypatch):
    gathered = []
    monkeypatch.setattr(joint_embedding, "all_gather_with_grad", lambda z: gathered.append(z.dtype) or z)
    module = BarlowTwins(nn.Linear(6, 3).bfloat16(), learning_rate=0.1)
    module.trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", log_every_n_steps=0)
    loss = module.training_step(torch.randn(2, 4, 6, dtype=torch.bfloat16), 0)
    assert gathered == [torch.float32] * 2 and loss.dtype == torch.float32

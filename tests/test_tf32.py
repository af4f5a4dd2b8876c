"""Float32 operations of measurements run without TF32, and the setting is restored."""

from functools import partial

import pytest
import torch
from torch import nn

from stepwise_lightning.features import capture
from stepwise_lightning.theory import EmpiricalNTK

MATMUL, CUDNN, MKLDNN = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
if hasattr(CUDNN, "conv"):  # from torch 2.9
    SETTING, EXACT, TF32 = "fp32_precision", "ieee", "tf32"
    OPERATIONS = (MATMUL, CUDNN.conv, CUDNN.rnn, MKLDNN.matmul, MKLDNN.conv)
else:
    SETTING, EXACT, TF32 = "allow_tf32", False, True
    OPERATIONS = (MATMUL, CUDNN)


def float32_precisions() -> list[object]:
    return [getattr(operation, SETTING) for operation in OPERATIONS]


def allow_tf32_by_operation():
    for operation in OPERATIONS[:2]:
        setattr(operation, SETTING, TF32)


ALLOW = {
    "default": lambda: None,
    "high": partial(torch.set_float32_matmul_precision, "high"),
    "medium": partial(torch.set_float32_matmul_precision, "medium"),
    "by operation": allow_tf32_by_operation,
}


class RecordsPrecision(nn.Module):
    """Network that passes the precision of float32 operations to a function."""

    def __init__(self, record):
        super().__init__()
        self.layer, self.record = nn.Linear(3, 2), record

    def forward(self, x):
        self.record(float32_precisions())
        with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
            return self.layer(x)


@pytest.fixture
def restored_tf32():
    before = float32_precisions()
    yield
    torch.set_float32_matmul_precision("highest")
    for operation, precision in zip(OPERATIONS, before, strict=True):
        setattr(operation, SETTING, precision)


@pytest.mark.parametrize("allow", ALLOW.values(), ids=ALLOW)
def test_measurements_do_not_use_tf32_and_restore_the_setting(allow, restored_tf32):
    allow()
    before, seen, x = float32_precisions(), [], torch.ones(2, 3)
    capture(RecordsPrecision(lambda values: seen.append(values)), [x], [""])
    EmpiricalNTK(RecordsPrecision(lambda values: seen.append(values[:1])), dtype=torch.float32)(x, x)
    assert seen[0] == [EXACT] * len(OPERATIONS) and len(seen) > 1 and all(each == [EXACT] for each in seen[1:])
    assert float32_precisions() == before
    with pytest.raises(ZeroDivisionError):
        capture(RecordsPrecision(lambda values: 1 / 0), [x], [""])
    assert float32_precisions() == before
    if (
        allow is not allow_tf32_by_operation
    ):  # the older setting cannot be read after the settings of operations changed
        assert torch.backends.cudnn.allow_tf32 and MATMUL.allow_tf32 == (before[0] == TF32)

"""Bitwise comparison of the files of two runs."""

import math

import numpy as np
import torch
from survival import STEPS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def assert_same(ours, theirs, where=""):
    """Compare nested values bit by bit; NaN equals NaN."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(
            ours.nan_to_num(nan=12345.0), theirs.nan_to_num(nan=12345.0)
        ), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    else:
        assert ours == theirs or (isinstance(ours, float) and math.isnan(ours) and math.isnan(theirs)), where


def scalars(run):
    """Return the TensorBoard scalars of a run as lists of (step, value) by tag."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same_run(killed, whole):
    """Compare the checkpoints (weights, optimizer, schedule, probe, random states), spectra and TensorBoard events."""
    ours, theirs = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (killed, whole))
    assert ours["global_step"] == STEPS
    for each in (ours, theirs):
        del each["loops"]  # counts the batches of this process
        del each["datamodule_hyper_parameters"]["num_workers"]  # the only setting that may differ
    assert_same(ours, theirs)
    assert (killed / "spectrum.csv").read_bytes() == (whole / "spectrum.csv").read_bytes()
    with np.load(killed / "spectrum.npz") as a, np.load(whole / "spectrum.npz") as b:
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert scalars(killed) == scalars(whole)
    assert not list(killed.rglob(".*.partial*"))

"""Plots of single figures: the data in them, read back from the figure."""

import numpy as np
import pytest
import torch

from reproduce.growth_plots import principal_components
from reproduce.kernel_plots import rivals_figure, tangent_kernels_figure
from reproduce.plots import (
    Response,
    WorthPanel,
    conditions_figure,
    eigenfunctions_figure,
    worth_figure,
)
from stepwise_lightning import SpectrumRecord
from stepwise_lightning.plots import Panel

pytestmark = pytest.mark.usefixtures("rendered_figures")


def growth(rates: list[float]) -> Panel:
    times = torch.linspace(0, 10, 50, dtype=torch.float64)
    eigenvalues = 1 / (1 + 1e6 * torch.exp(-times[:, None] * torch.tensor(rates, dtype=torch.float64)))
    return Panel(SpectrumRecord.of(times, eigenvalues), step_times=torch.tensor([5.0, np.nan, 7.0]))


@pytest.mark.parametrize("dimensions", [2, 7])
def test_principal_components_use_the_last_embeddings(dimensions):
    rng = np.random.default_rng(0)
    scales = np.array([3.0, 2, 1, 0.1, 0.1, 0.1, 0.1])[:dimensions]
    rotation = np.linalg.qr(rng.standard_normal((dimensions, dimensions)))[0]
    last = rng.standard_normal((400, dimensions)) * scales @ rotation + 5
    start, end = principal_components(np.stack([1e-3 * last, last]))
    np.testing.assert_allclose(start, 1e-3 * end, atol=1e-12)
    eigenvalues = np.linalg.eigvalsh(np.cov(last.T, bias=True))[::-1][:3]
    np.testing.assert_allclose(end.var(0)[: len(eigenvalues)], eigenvalues, rtol=1e-10)
    assert end.shape == (400, 3) and not end[:, dimensions:].any()


def test_alignments_share_the_time_axis_of_the_eigenvalues():
    runs = [growth([8.0, 4, 2]), growth([9.0, 5, 1])]
    names = ("full, initial", "last, initial", "full, final", "last, final")
    values = {name: runs[0].times / (10 * place) for place, name in enumerate(names, 1)}
    drifts = dict.fromkeys(names, {8: [0.5, 0.3], 16: [0.1, 0.3]})
    ratios = {"full": np.ones((2, 3)), "last": np.full((2, 3), 2.0)}
    machines = [{"full": run.eigenvalues / 2, "last": run.eigenvalues / 3} for run in runs]
    figure = tangent_kernels_figure(runs, machines, [values, values], drifts, ratios, title="kernels")
    upper, lower, drift, steps = (figure.axes[place] for place in (0, 3, 2, 5))
    assert [line.get_label() for line in lower.lines] == list(values) and lower.get_xlim() == upper.get_xlim()
    np.testing.assert_array_equal(lower.lines[1].get_ydata(), values["last, initial"])
    np.testing.assert_array_equal(upper.lines[-1].get_ydata(), machines[0]["last"][:, -1])
    np.testing.assert_allclose(drift.lines[0].get_xydata(), [[8, 0.4], [16, 0.2]])
    assert [text.get_text() for text in steps.get_legend().get_texts()] == [
        f"{name} kernel, initial" for name in ratios
    ]


def test_rivals_show_means_and_seeds_of_both_moments():
    alignments = {"a": {"first": {"early": [0.9, 0.7], "end": [0.5, 0.7]}, "second": {"early": [], "end": [0.2]}}}
    figure = rivals_figure(
        alignments, {"a": {"start": [0.1], "early": [], "end": [0.9]}}, {"early": "x", "end": "y"}, ""
    )
    bars, last = figure.axes
    widths = [patch.get_width() for patch in bars.patches]
    assert widths == pytest.approx([0.8, 0, 0, 0.6, 0.2, 0])
    assert [label.get_text() for label in bars.get_yticklabels()] == ["first", "second"] and bars.yaxis_inverted()
    np.testing.assert_allclose(last.lines[0].get_xydata(), [[0, 0.1], [2, 0.9]])


def test_eigenfunction_images_are_ordered_from_lowest_to_highest():
    runs = [growth([8.0, 4, 2])]
    images = np.random.default_rng(0).random((3, 4, 5, 6, 3))
    figure = eigenfunctions_figure(runs, [list(images)], title="modes")
    shown = np.asarray(figure.axes[2].images[0].get_array())
    assert shown.shape == (5, 4 * 6 + 3, 3)
    np.testing.assert_array_equal(shown[:, :6], images[1, 0])
    np.testing.assert_array_equal(shown[:, -6:], images[1, 3])
    fewer = eigenfunctions_figure(runs * 2, [list(images), list(images[:2])], title="modes")
    assert [bool(axis.axison) for axis in fewer.axes] == [True] * 7 + [False]


def test_responses_show_repetitions_and_means():
    values = np.array([[9.0, 8, 1], [9, 6, 1]])
    response = Response(["small", "middle", "large"], {"steps": values}, "number")
    axis = conditions_figure([[growth([8.0, 4, 2])] * 3], [response], title="conditions").axes[-1]
    mean, *dots = (line.get_ydata() for line in axis.lines)
    np.testing.assert_array_equal(mean, [9, 7, 1])
    np.testing.assert_array_equal(dots, values)
    assert [label.get_text() for label in axis.get_xticklabels()] == response.conditions


def test_worth_lines_join_the_means_over_all_repetitions():
    embedding = np.array([[0.4, 0.5, 0.7, np.nan], [0.4, 0.7, 0.9, 0.95]])
    panels = [WorthPanel({"embedding": embedding, "pixels": embedding / 2}, 0.4, title) for title in ("a", "b")]
    figure = worth_figure([panels, panels], ["first", "second"], "title", "note")
    axis = figure.axes[0]
    lines = [line.get_xydata() for line in axis.lines if line.get_linestyle() != "None"][1:]
    np.testing.assert_allclose(lines[0], [[0, 0.4], [1, 0.6], [2, 0.8]])
    np.testing.assert_allclose(lines[1], [[0, 0.2], [1, 0.3], [2, 0.4]])
    assert axis.get_title() == "a" and figure.axes[2].get_ylabel() == "second"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["embedding", "pixels", "chance"]
    figure.draw_without_rendering()

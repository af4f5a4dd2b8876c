"""The picture of what modes are worth: what is drawn where repetitions have different numbers of modes."""

import numpy as np

from stepwise_lightning.plots.worth import WorthPanel, worth_figure


def test_lines_join_the_means_of_what_all_repetitions_have():
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

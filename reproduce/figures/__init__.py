"""The figures, in the order of the paper; those that share their training runs follow each other."""

from reproduce.figures import (
    cross_loss_alignment,
    embedding_growth,
    forecast,
    frozen_features,
    hidden_spectra,
    kernel_mlp,
    kernel_over_time,
    kernel_pca,
    linear_model,
    negative_controls,
    resnet_barlow_twins,
    standard_init,
    start_scale,
    three_losses,
)
from reproduce.outputs import PaperFigure

FIGURES: dict[str, PaperFigure] = {
    module.FIGURE.name: module.FIGURE
    for module in (
        linear_model,
        start_scale,
        resnet_barlow_twins,
        frozen_features,
        negative_controls,
        three_losses,
        standard_init,
        hidden_spectra,
        cross_loss_alignment,
        kernel_over_time,
        embedding_growth,
        kernel_pca,
        kernel_mlp,
        forecast,
    )
}

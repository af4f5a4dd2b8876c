"""Networks that the figures train: variants, training, and the runs read back."""

"""Learning rates and momenta that are compared, promising ones first."""

from __future__ import annotations

from reproduce.figures.acceleration.descent import ISOLOSS, SCALED_FEATURES, Setting

LYAPUNOV = [Setting("lyapunov", rate) for rate in (0.9, 0.75, 0.5, 0.25)]
LINEAR_GRIDS = {
    "plain": [Setting("plain", rate) for rate in (0.95, 0.8)],
    "momentum": [
        Setting("momentum", rate, beta)
        for beta in (0.98, 0.95, 0.99, 0.9, 0.8, 0.5)
        for rate in (0.8, 1.0, 0.6, 1.2, 0.4, 0.2, 0.1)
    ],
    "gate": [Setting("gate", rate) for rate in (0.95, 0.8, 0.5, 0.2)],
    "lyapunov": LYAPUNOV,
    ISOLOSS: [Setting(ISOLOSS, 0.95)],
    SCALED_FEATURES: [Setting(SCALED_FEATURES, 0.25)],
}
# Lower rates: γ_1 increases as features change.
WIDE_GRIDS = {
    "plain": [Setting("plain", rate) for rate in (0.5, 0.7)],
    "momentum": [Setting("momentum", rate, beta) for beta in (0.95, 0.9, 0.98) for rate in (0.4, 0.8, 0.2)],
    "gate": [Setting("gate", rate) for rate in (0.5, 0.7, 0.25)],
    "lyapunov": LYAPUNOV[2:],
}
RESNET = {
    "plain": Setting("plain", 0.02), "momentum": Setting("momentum", 0.008, 0.9), "gate": Setting("gate", 0.01),
    "lyapunov": Setting("lyapunov", 0.3),
}  # fmt: skip
MINIBATCH_SETTING, BATCH_SIZES, MINIBATCH_STEPS = Setting("lyapunov", 0.2), (64, 256), 300

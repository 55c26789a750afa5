"""The student made better: closed-form refit, ternary codes that compensate, distillation.

Here live the steps that heal (`healers.HEALERS`), the closed-form updates (`refit.refit.UPDATES`), the losses of
distillation (`distill.losses.LOSSES`), and what they share: batches of calibration text, spans of the parent's layers,
the store of fitted layers that a killed run goes on from. Gives tensors that lie over the planned ones, and records.
May import walk, text, evaluation, report's pages and the settings of the healing steps.
"""

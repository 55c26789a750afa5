"""The engine: one layer's weights at a time, the whole calibration batch through it, for every variant of the model.

Measuring, refitting and layer-local distillation go by it. May import model, checkpoint and formats.
"""

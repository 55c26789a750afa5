"""Distillation by gradients: the loop, its losses, its data, layer-local training, several processes."""

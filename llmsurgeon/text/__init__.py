"""Calibration text: files that a user names, datasets of the hub, text sampled from the model, packed to windows.

May import checkpoint and formats.
"""

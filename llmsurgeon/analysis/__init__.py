"""Scores: what the steps of a recipe ask to know about a model, measured on calibration text.

May import walk, text, evaluation's divergences, and the operations whose steps ask.
"""

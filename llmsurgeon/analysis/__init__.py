"""Scores: what the steps of a recipe ask to know about a model, measured on calibration text.

Every name that a step can ask for stands in `scores.SCORES`; each way of measuring is one file, with a `Score` at its
end. May import walk, text, evaluation's intervals, and the operations whose steps ask.
"""

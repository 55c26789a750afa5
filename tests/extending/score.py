"""A score: how well one linear map stands in for each run of layers."""

from __future__ import annotations

import torch

from llmsurgeon.analysis.score import Score
from llmsurgeon.analysis.scores import SCORES
from llmsurgeon.walk.variants import Variant
from llmsurgeon.walk.walk import walk


def measure(scene, requests):
    """{length: {start: what a least-squares map from a run's input leaves of what the run adds}}."""
    streams = {}

    def observe(layer, part, variant, parts, base):
        streams.setdefault(layer, []).append(parts.entered.flatten(0, 1).float())
        streams.setdefault(layer + 1, [])
        if layer == len(scene.runner.layers) - 1:
            streams[layer + 1].append(parts.left.flatten(0, 1).float())

    walk(scene.runner, scene.tokens, [Variant()], observe, batch=scene.batch)
    x = [torch.cat(streams[layer]) for layer in sorted(streams)]
    return {"linear_run": {each.length: _errors(x, each.length) for each in requests}}


def _errors(x, length):
    errors = {}
    for start in range(len(x) - length):
        inputs = torch.nn.functional.rms_norm(x[start], x[start].shape[-1:])
        added = x[start + length] - x[start]
        left = added - inputs @ torch.linalg.lstsq(inputs, added).solution
        errors[start] = float(left.square().sum() / added.square().sum())
    return errors


SCORES["linear_run"] = Score(measure, tokens=4096)

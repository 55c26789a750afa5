"""report.html: complete, well formed, self-contained, and safe with any text and with missing numbers."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import Page

from llmsurgeon.analysis.greedy import Choice
from llmsurgeon.analysis.measure import LayerScore, Measurements
from llmsurgeon.analysis.result import Analysis
from llmsurgeon.report.abouts import MATRICES, SCORES
from llmsurgeon.report.analysis import html_report
from llmsurgeon.report.charts import Scale, ramp_css, ranges, shade

DOCS = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
RECIPE = "# Suggested\nversion: 1\nsteps:\n- {op: refit}\n"


def runs_of(dropped: list[int], layers: int) -> list[list[int]]:
    """A block and the attention-free blocks behind it."""
    runs = [[0]]
    for layer in range(1, layers):
        if layer in dropped:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [run for run in runs if len(run) > 1]


def keys_of(part: Any) -> set[str]:
    """Every key of nested dicts, but for layers as keys."""
    if isinstance(part, dict):
        return {k for k in part if not k.isdigit()} | {k for v in part.values() for k in keys_of(v)}
    return {k for v in part for k in keys_of(v)} if isinstance(part, list) else set()


def fake_report(layers: int, model: str = "lab/model", missing: bool = False, seed: int = 0) -> dict[str, Any]:
    """A report such as a real model gives: first layers vital, the middle weak, some layers with nothing measured."""
    draw = random.Random(seed)

    def score(value, spread):
        means = [value(layer / max(1, layers - 1)) * draw.uniform(0.8, 1.25) for layer in range(layers)]
        return {"mean": means, "low": [m * (1 - spread) for m in means], "high": [m * (1 + spread) for m in means]}

    def similarity(floor):
        means = [1 - (1 - floor) * draw.uniform(0.1, 1) for _ in range(layers)]
        return {"mean": means, "low": [m - 0.004 for m in means], "high": [m + 0.004 for m in means]}

    def matrix(value):
        return [[value(i, j) for j in range(layers)] for i in range(layers)]

    def dependency(i, j):
        if j <= i:
            return None
        return 0.45 * math.exp(-(j - i) / (0.12 * layers)) * (1.6 - j / layers) * draw.uniform(0.5, 1.2) + 0.9 * (
            i == 0
        )

    def angular(n, start):
        return min(0.9, 0.05 + 0.3 * (n / layers) ** 0.7 + 0.2 * (start == 0)) * draw.uniform(0.9, 1.1)

    order = draw.sample(range(1, layers), max(1, round(layers * 0.27)))
    dropped, steps, kl = [], [], 0.0
    for layer in order:
        kl += draw.uniform(0.01, 0.08)
        others = [c for c in range(1, layers) if c not in dropped and c != layer]
        others = others if not steps else draw.sample(others, min(7, len(others)))
        candidates = {str(layer): kl, **{str(c): kl + draw.expovariate(3) for c in others}}
        steps.append({"layer": layer, "kl_after": kl, "candidates": candidates})
        dropped.append(layer)
    runs = runs_of(dropped, layers)
    report = {
        "version": 1,
        "llmsurgeon": "0.1.0",
        "model": model,
        "family": "llama",
        "distance": "kl",
        "layers": layers,
        "calibration": {"text": "text sampled from the model", "tokens": 8192, "sequence_length": 256},
        "scores": {
            "attention_similarity": similarity(0.86),
            "ffn_similarity": similarity(0.8),
            "block_influence": score(lambda t: 0.05 + 0.3 * math.exp(-9 * t), 0.06),
            "block_kl": score(lambda t: 0.08 + 5 * math.exp(-14 * t) + 0.8 * (t > 0.98), 0.12),
            "attention_kl": score(lambda t: 0.02 + 2 * math.exp(-20 * t), 0.25),
            "ffn_kl": score(lambda t: 0.04 + 4 * math.exp(-18 * t), 0.2),
        },
        "block_dependency": matrix(dependency),
        "ffn_dependency": matrix(dependency),
        "angular_distance": [
            [angular(n, start) if start + n < layers else None for start in range(layers)] for n in range(layers)
        ],
        "suggestion": {
            "fuses": True,
            "drop_attention": sorted(dropped),
            "fuse_runs": runs,
            "blocks_after": layers - sum(len(run) - 1 for run in runs),
            "steps": steps,
        },
    }
    if missing:
        empty = [None] * layers
        report["scores"]["attention_kl"] = {"mean": [None, *report["scores"]["attention_kl"]["mean"][1:]]} | {
            "low": empty,
            "high": empty,
        }
        report["scores"]["ffn_similarity"] = {"mean": empty, "low": empty, "high": empty}
        report["block_dependency"][0] = empty
        report["ffn_dependency"] = [empty] * layers
        steps[-1]["candidates"] = {}
        steps[-1]["kl_after"] = None
    return json.loads(json.dumps(report, allow_nan=False))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("layers", [2, 3, 30, 126])
def test_tags_balance_and_nothing_is_undefined(layers, missing):
    page = Page(html_report(fake_report(layers, missing=missing), RECIPE))
    values = "\n".join(value or "" for _, attrs in page.tags for value in attrs.values())
    assert not re.search(r"\b(nan|inf|None)\b", values)
    # "none" in prose is fine, a Python None or NaN is not.
    assert not re.search(r"\b(nan|None|inf)\b", page.text.split("How to read this")[0].split("</style>")[-1])


def test_it_fetches_nothing():
    page = Page(html_report(fake_report(30), RECIPE))
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert not {"src", "href", "xlink:href", "srcset", "data"} & set(attrs), tag
    assert "url(" not in page.text and "@import" not in page.text and "http" not in page.text


@pytest.mark.parametrize("layers", [2, 30, 126])
def test_every_layer_and_pair_is_there(layers):
    report = fake_report(layers)
    html = html_report(report, RECIPE)
    dropped, runs = report["suggestion"]["drop_attention"], report["suggestion"]["fuse_runs"]
    fused = sum(map(len, runs))
    page = Page(html)
    assert page.count("rect", "attention") == layers + layers - len(dropped)
    assert page.count("rect", "gone") == len(dropped)
    assert page.count("rect", "ffn") == layers + layers - fused
    assert page.count("rect", "fused") == len(runs)
    assert page.count("path", "outline") == 2 * len(runs)
    assert page.count("g", "bar") == len(SCORES) * layers
    assert page.count("path", "whisker") == len(SCORES) * layers
    pairs = Counter(re.findall(r"<title>i (\d+), j (\d+): ", html))
    assert pairs == {(str(i), str(j)): 2 for i in range(layers) for j in range(i + 1, layers)}
    rows = re.findall(r'<tr><td class="n">(\d+)</td>(.*?)</tr>', html.split("Every score")[1])
    assert [int(layer) for layer, _ in rows] == list(range(layers))
    assert [layer for layer, (_, row) in enumerate(rows) if "attention out" in row] == dropped
    assert f"{report['scores']['ffn_kl']['mean'][1]:.4f}" in rows[1][1]


def test_the_suggestion_is_said_in_words():
    report = fake_report(6)
    report["suggestion"] = {
        "drop_attention": [2, 3, 4],
        "fuse_runs": [[1, 2, 3, 4]],
        "blocks_after": 3,
        "steps": [{"layer": 3, "kl_after": 0.5, "candidates": {"3": 0.5, "5": 0.75, "1": 0.625}}],
    }
    text = Page(html_report(report, RECIPE)).text
    assert "Drop the attention of 3 layers (2–4) and fuse the FFNs of run 1–4: 6 blocks become 3." in text  # noqa: RUF001
    assert "the KL to the parent is 0.500 nats a token" in text
    assert "1 (0.625), 5 (0.750)" in text
    report["suggestion"] = {"drop_attention": [], "fuse_runs": [], "blocks_after": 6, "steps": []}
    assert "nothing is suggested" in Page(html_report(report, RECIPE)).text


def test_hostile_text_stays_text():
    evil = '</title><script>alert("1")</script><img src=x onerror=alert(1)>&amp;\'"'
    report = fake_report(4, model=evil)
    report["calibration"]["text"] = report["family"] = evil
    page = Page(html_report(report, f"model: {evil}\n"))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count(evil) == 5


def test_missing_values_are_dashes_and_empty_cells():
    report = fake_report(4, missing=True)
    html = html_report(report, RECIPE)
    page = Page(html)
    assert page.count("path", "none") == 3 + 6
    assert page.count("g", "bar") == 4 * (len(SCORES) - 2) + 3
    assert page.count("path", "whisker") == 4 * (len(SCORES) - 2)
    assert "the KL to the parent is not known" in page.text and "nothing was measured" in page.text


def test_a_score_that_is_not_there_is_left_out():
    report = fake_report(4)
    del report["scores"]["ffn_kl"]
    page = Page(html_report(report, RECIPE))
    assert page.count("g", "bar") == 4 * (len(SCORES) - 1)


def test_every_score_has_its_source():
    text = Page(html_report(fake_report(3), RECIPE)).text
    for about in (*SCORES.values(), *MATRICES.values()):
        assert about.source in text and "arXiv" in about.source
    assert set(SCORES) == set(fake_report(3)["scores"])


def test_the_report_of_an_analysis_can_be_shown():
    def nan(*shape):
        return torch.full(shape, float("nan"))

    scores = {name: LayerScore.of(torch.rand(4, 1 if name == "ffn_kl" else 3)) for name in SCORES}
    arrays = {"block_dependency": nan(4, 4), "angular_distance": nan(4, 4), "ffn_channel": torch.rand(4, 8)}
    analysis = Analysis(
        model="lab/model",
        family="llama",
        layers=4,
        tokens=64,
        sequence_length=16,
        text="prose",
        measurements=Measurements(scores, arrays),
        choices=(Choice(2, 0.25, {1: 0.5, 2: 0.25, 3: 1.0}),),
        dropped=(2,),
        runs=((1, 2),),
        ffn_dependency=torch.rand(4, 4).triu(1),
        refit_on={"tokens": 64},
    )
    report = analysis.report()
    page = Page(html_report(report, analysis.recipe()))
    assert page.count("path", "whisker") == 4 * (len(SCORES) - 1)
    assert page.count("path", "none") == 6 + 10
    assert keys_of(report) == keys_of(fake_report(4))
    for name in keys_of(report) | {"ffn_channel", *(f"{name}.mean" for name in scores)}:
        assert f"`{name}`" in DOCS, name
    assert {name for name in analysis.tensors() if f"`{name}`" not in DOCS} == set()


@pytest.mark.parametrize(
    ("values", "log", "from_zero"),
    [
        ([0.01, 0.5, 3.0], True, False),
        ([0.2, 0.5, 1.0], False, True),
        ([0.9, 0.95, 0.99], False, False),
        ([-0.2, 0.4], False, True),
        ([0.0, 0.0], False, True),
        ([0.5], False, True),
        ([-0.3, -0.3], False, True),
        ([-0.3, -0.29], False, False),
        ([0.0, 5.0], False, True),
        ([], False, True),
    ],
)
def test_scales(values, log, from_zero):
    scale = Scale.over(values, 0, 100)
    assert (scale.log, scale.from_zero) == (log, from_zero)
    places = [scale.at(value) for value in values]
    assert places == sorted(places) if values == sorted(values) else True
    assert all(0 <= place <= 100 for place in places)
    assert scale.at(scale.low) == 0 and scale.at(scale.high) == pytest.approx(100)
    assert list(scale.ticks) == sorted(set(scale.ticks)) and 2 <= len(scale.ticks) <= 9
    # Whiskers may reach below what a log axis can show.
    assert scale.at(-1e9) == 0


def test_colours_are_even_steps_of_lightness():
    light = re.findall(r"\.c\d+\{fill:#(\w\w)(\w\w)(\w\w)\}", ramp_css().split("@media")[0])
    assert len(light) == len(set(light)) == 48

    def lightness(channels):
        r, g, b = (int(c, 16) / 255 for c in channels)
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (r, g, b))
        l_ = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
        m_ = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
        s_ = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
        return 0.2104542553 * l_ + 0.7936177850 * m_ - 0.0040720468 * s_

    values = [lightness(channels) for channels in light]
    steps = [a - b for a, b in itertools.pairwise(values)]
    # 8-bit channels round each step a little.
    assert min(steps) > 0 and max(steps) < 1.5 * min(steps)


def test_levels_andranges():
    assert [shade(value, 2.0) for value in (-1, 0, 1, 2, 9)] == [0, 0, 24, 47, 47]
    assert shade(0.0, 0.0) == 0
    assert ranges([9, 4, 7, 8, 1, 2]) == "1, 2, 4, 7–9"  # noqa: RUF001

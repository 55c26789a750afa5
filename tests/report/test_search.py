"""report.html of a search: every point, layer and bound is there, any text is safe, and missing numbers are dashes."""

from __future__ import annotations

import itertools
import re

import pytest
from found import PARENT, found
from pages import Page

from llmsurgeon.report.charts import Scale
from llmsurgeon.report.scatter import Dot, Frame, scatter
from llmsurgeon.report.search import KINDS, WORDS, html_found
from llmsurgeon.searching.costs.target import QUANTITIES

RECIPE = "version: 1\nsteps:\n- {op: refit}\n"


def test_every_quantity_of_a_target_has_its_words():
    assert set(WORDS) == set(QUANTITIES)


@pytest.mark.parametrize("layers", [1, 2, 30, 126])
def test_every_layer_and_point_is_there(layers):
    report = found(layers)
    page = Page(html_found(report, RECIPE))
    kinds = ["chosen" if point["chosen"] else point["kind"] for point in report["points"]]
    sums = ["chosen" if point["chosen"] else point["kind"] for point in report["points"] if point["predicted"]]
    for kind in KINDS:
        assert page.count("g", f"dot-{kind}") == kinds.count(kind) + sums.count(kind), kind
    runs = [each for each in report["layers"] if len(each["layers"]) > 1]
    assert page.count("rect", "fused") == 2 * len(runs)
    gone = sum(not any(s[part] for s in each["stands"]) for each in report["layers"] for part in (0, 2))
    assert page.count("rect", "gone") == gone
    assert page.count("rect", "cost") == sum(each["kl"] > 0 for each in report["layers"])
    changed = [each for each in report["layers"] if each["name"] != "as it is"]
    for each in changed:
        assert each["name"] in page.text
    assert f"{sum(len(each['layers']) for each in changed)} of {layers} layers are not what they were" in page.text


def test_no_python_word_shows():
    page = Page(html_found(found(), RECIPE))
    values = "\n".join(value or "" for _, attrs in page.tags for value in attrs.values())
    assert not re.search(r"\b(nan|inf|None)\b", values + page.text.split("</style>")[-1])


def test_it_fetches_nothing():
    page = Page(html_found(found(), RECIPE))
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        assert not {"src", "href", "xlink:href", "srcset", "data"} & set(attrs), tag
    assert "url(" not in page.text and "@import" not in page.text and "http" not in page.text


def test_the_result_is_said_in_words():
    text = Page(html_found(found(), RECIPE)).text
    assert "1.34 times as fast at decoding and 0.792 of the memory" in text
    assert "decode=1.3x met" in text
    assert "24,576 of 49,152 tokens stay" in text
    assert "saves 12 % of a decode step's time and 20 % of the memory and costs 0.0123 nats" in text
    assert "tokens stay" not in Page(html_found(found(table=None), RECIPE)).text
    missed = found()
    missed["bounds"][0] |= {"measured": 1.1 * missed["bounds"][0]["budget"], "ratio": 1.18}
    assert "decode=1.3x missed by 10.0 %" in Page(html_found(missed, RECIPE)).text


def test_how_far_a_prediction_was_off():
    report = found()
    report["bounds"] = [report["bounds"][0] | {"predicted": 1.03, "measured": 1.0, "parent": 2.0, "budget": 1.25}]
    text = re.sub(r"\s+", " ", Page(html_found(report, RECIPE)).text)
    assert "decode=1.3x62.5 %51.5 %50.0 %+3.0 %" in text


def test_what_was_not_measured_is_a_dash():
    report = found(points=[], notes=[], timings={})
    report["bounds"] = [bound | {"measured": None} for bound in report["bounds"]]
    report["layers"] = [each | {"kl": None, "others": []} for each in report["layers"]]
    page = Page(html_found(report, RECIPE))
    assert "No whole model was measured." in page.text
    assert "\N{EN DASH}" in page.text
    assert page.count("rect", "cost") == 0
    lost = found()
    lost["points"][0] |= {"kl": None, "low": None, "high": None}
    drawn = Page(html_found(lost, RECIPE)).count("g", "dot-measured")
    assert drawn == Page(html_found(found(), RECIPE)).count("g", "dot-measured") - 2


def test_hostile_text_stays_text():
    evil = '</title><script>alert("1")</script><img src=x onerror=alert(1)>&amp;\'"'
    report = found(3, model=evil, engine=evil, text=evil, operations=[evil], notes=[evil], timings={evil: 1.0})
    report["layers"] = [each | {"name": evil, "others": [[evil, 0.1]], "stands": []} for each in report["layers"]]
    report["points"] = [point | {"name": evil} for point in report["points"]]
    page = Page(html_found(report, f"model: {evil}\n"))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count(evil) > 20


def test_a_target_of_what_is_left_runs_downhill():
    report = found()
    report["bounds"] = report["bounds"][1:]
    html = html_found(report, RECIPE)
    left = [float(x) for x in re.findall(r'<text class="mid" x="([\d.]+)" y="411"', html)]
    assert left == sorted(left, reverse=True) and len(left) > 2
    assert "bytes of weights and KV cache, of the parent" in Page(html).text


def test_a_model_that_stays_as_it_is():
    report = found(2)
    report["layers"] = [
        {"layers": [i], "name": "as it is", "kl": 0.0, "others": [], "stands": [list(PARENT)], "costs": {}}
        for i in range(2)
    ]
    page = Page(html_found(report, RECIPE))
    assert "0 of 2 layers are not what they were" in page.text
    assert page.count("rect", "gone") == 0


def test_names_do_not_lie_on_each_other():
    dots = [Dot(1.3, 0.1 + 0.0001 * i, "single", "", name=f"method {i}") for i in range(8)]
    html = scatter(dots, Frame("x", "y"), "alternative")
    at = sorted(float(y) for y in re.findall(r'class="name-single [a-z]+" x="[\d.]+" y="([\d.]+)"', html))
    assert len(at) == 8
    assert all(b - a >= 13 for a, b in itertools.pairwise(at))
    # Near the right edge a name stands to the left.
    dots = [Dot(1.0, 1, "single", ""), Dot(2.0, 1, "single", "", name="a name that is long")]
    assert 'class="name-single end"' in scatter(dots, Frame("x", "y", width=300), "alternative")


def test_root_scale_begins_at_zero_and_keeps_order():
    scale = Scale.rooted(1.4, 400, 0)
    assert scale.ticks[0] == 0 and scale.at(0) == 400 and scale.at(scale.high) == 0
    places = [scale.at(value) for value in (0, 0.01, 0.1, 0.5, 1.4)]
    assert places == sorted(places, reverse=True)
    assert scale.kind == "square-root scale"

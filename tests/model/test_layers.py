"""Layer numbers and runs as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsurgeon.errors import SurgeryError
from llmsurgeon.model.layers import LayersError, parse_layers, parse_runs, write_run


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        (7, (7,)),
        ("66-69", (66, 67, 68, 69)),
        ("9, 4-6", (4, 5, 6, 9)),
        ([8, 4, "10-12"], (4, 8, 10, 11, 12)),
        ((3, 1), (1, 3)),
        ("5-5", (5,)),
    ],
)
def test_parse_layers(value, layers):
    assert parse_layers(value) == layers


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "at least one layer"),
        ([4, 4], "layer 4 is named twice"),
        (["4-6", 5], "layer 5 is named twice"),
        (-1, "got -1"),
        (True, "got True"),
        (1.5, "got 1.5"),
        (None, "got None"),
        ([[1]], "got [1]"),
        ("4..6", "got '4..6'"),
        ("", "got ''"),
        ("9-4", "did you mean '4-9'?"),
        ("0-99999", "layer 99999 is too large"),
        (["0-9999"] * 1000, "named twice"),
    ],
)
def test_parse_layers_refuses(value, message):
    with pytest.raises(LayersError) as caught:
        parse_layers(value)
    assert message in str(caught.value)
    assert isinstance(caught.value, SurgeryError)


@pytest.mark.parametrize(
    ("value", "runs"),
    [
        (["66-68", "70-71"], ((66, 67, 68), (70, 71))),
        ("70-71, 66-68", ((66, 67, 68), (70, 71))),
        ([[3, 4], [6, 7, 8]], ((3, 4), (6, 7, 8))),
        # An earlier step may have removed the layers between.
        (["4, 6"], ((4, 6),)),
        (((4, 6),), ((4, 6),)),
    ],
)
def test_parse_runs(value, runs):
    assert parse_runs(value) == runs


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[66, 73]], 'for all of 66 to 73 write "66-73"'),
        ([66, 67], "one run is [[66, 67]]"),
        (["66"], "has one layer"),
        (["4-6", "6-8"], "runs 4-6 and 6-8 overlap"),
        (["4-9", [5, 6]], "runs 4-9 and 5-6 overlap"),
        ([], "expected runs"),
        (7, "expected runs"),
    ],
)
def test_parse_runs_refuses(value, message):
    with pytest.raises(LayersError) as caught:
        parse_runs(value)
    assert message in str(caught.value)


@given(st.sets(st.integers(0, 200), min_size=2, max_size=20))
def test_a_written_run_is_read_back(layers):
    run = tuple(sorted(layers))
    assert parse_runs([write_run(run)]) == (run,)

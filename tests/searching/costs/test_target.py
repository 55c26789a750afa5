"""Targets as people write them."""

from __future__ import annotations

import pytest

from llmsurgeon.errors import SurgeryError
from llmsurgeon.searching.costs.target import QUANTITIES, Target, parse_targets


@pytest.mark.parametrize(
    ("text", "bound", "relative"),
    [
        ("decode=1.5x", 1.5, True),
        (" prefill = 1.2 x ", 1.2, True),
        ("decode=40tok/s", 40, False),
        ("params=0.7x", 0.7, True),
        ("params=100M", 1e8, False),
        ("params=1.5B", 1.5e9, False),
        ("params=94000000", 94e6, False),
        ("size=300MB", 3e8, False),
        ("memory=1GB", 1e9, False),
        ("memory=1 GiB", 2**30, False),
        ("flops=.5x", 0.5, True),
        ("kv=0.5x", 0.5, True),
    ],
)
def test_what_is_written_is_read(text, bound, relative):
    target = Target.parse(text)
    assert target.name == text.partition("=")[0].strip()
    assert (target.bound, target.relative) == (bound, relative)
    assert Target.parse(target.written) == target


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed=1.5x", "target speed=1.5x: expected QUANTITY=VALUE, such as decode=1.5x, prefill=1.2x, params=0.7x"),
        ("decode", "expected QUANTITY=VALUE"),
        ("decode=fast", "expected a number above 0 followed by x or tok/s, such as decode=1.5x or decode=40tok/s"),
        ("decode=300MB", "followed by x or tok/s"),
        ("size=300", "followed by x or kB or MB"),
        ("size=300mb", "followed by x or kB or MB"),
        ("params=0", "expected a number above 0"),
        ("params=-0.5x", "expected a number above 0"),
        ("params=1e3x", "expected a number above 0"),
        ("params=nanx", "expected a number above 0"),
        ("params=" + "9" * 400, "expected a number above 0"),
        ("decode=0.5x", "asks for no more speed than there is"),
        ("decode=1x", "asks for no more speed than there is"),
        ("params=1.3x", "leaves everything as it is; a ratio of parameters is < 1"),
        ("kv=1.0x", "leaves everything as it is"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, said):
    with pytest.raises(SurgeryError, match=r"^target ") as raised:
        Target.parse(text)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 400


def test_several_targets_bound_different_things():
    assert [target.name for target in parse_targets(["kv=0.5x", "params=0.7x"])] == ["kv", "params"]
    with pytest.raises(SurgeryError, match=r"targets params=0\.7x and params=90M bound the same"):
        parse_targets(["params=0.7x", "kv=0.5x", "params=90M"])
    with pytest.raises(SurgeryError, match=r"a search needs a target, such as decode=1\.5x"):
        parse_targets([])


def test_examples_are_well_formed():
    for quantity in QUANTITIES.values():
        for example in quantity.example.split(" or "):
            assert Target.parse(example).quantity is quantity

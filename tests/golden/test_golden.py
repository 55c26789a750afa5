"""What the command line makes of tiny models is what the committed golden set says.

Three families in every run; all with GOLDEN_FAMILIES=all, or those that it names.
"""

from __future__ import annotations

import json
import os

import pytest

from tests.golden.compare import changed_keys
from tests.golden.facts import EXPECTED, REFERENCE, of_unit, packed, read, stored_units, unpacked, versions
from tests.golden.parents import units
from tests.golden.record import recorded

STORED = stored_units()
# A decoder, a mixture of experts and an encoder.
FEW = ("qwen2", "mixtral", "distilbert")
ASKED = os.environ.get("GOLDEN_FAMILIES", ",".join(FEW))
CHOSEN = STORED if ASKED == "all" else ASKED.split(",")
WRITTEN_WITH = json.loads((EXPECTED / "versions.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(
    versions() != WRITTEN_WITH, reason=f"the set was written with {WRITTEN_WITH}, here are {versions()}"
)
@pytest.mark.parametrize("name", CHOSEN)
def test_a_family_comes_out_as_before(name: str) -> None:
    # Renewed by `python -m tests.golden write`, where a change is meant.
    unit, expected = units()[name], read(name)
    some = frozenset(case.name for case in unit.cases if ASKED == "all" or not case.thorough)
    made = list(recorded(unit, some))
    assert not [one.said for one in made if one.crashed]
    found = of_unit(made)
    wrong = [line for case in found for line in changed_keys(expected[case], found[case], case)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", STORED)
def test_every_unit_is_stored_whole(name: str) -> None:
    stored = read(name)
    assert set(stored) == {case.name for case in units()[name].cases}
    reference = read(REFERENCE)
    assert unpacked(packed(name, stored, reference), reference) == stored


def test_the_set_is_small() -> None:
    assert sum(path.stat().st_size for path in EXPECTED.iterdir()) < 400_000

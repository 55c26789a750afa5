"""What is run in environments of other versions is there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_parts_of_the_suite_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # as where it is run
    spec = importlib.util.spec_from_file_location("versions", ROOT / "scripts" / "versions.py")
    versions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    assert set(versions.QUICK) and set(versions.SUITE)
    missing = [part for part in (*versions.SUITE, *versions.QUICK) if not (ROOT / "tests" / part).exists()]
    assert not missing

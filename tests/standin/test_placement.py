"""Every verb puts every tensor on its device: on one that stands in for a card, where two devices never mix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
# Of no layer's weights and no stream: done once a run, on what a walk left on the CPU.
SETTLED_ON_THE_CPU = {"fff", "block"}


def test_every_verb_computes_on_its_device(tmp_path):
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    # The device is there for a whole process, and others must not see it.
    done = subprocess.run(
        [sys.executable, "-m", "standin", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 14
    for name, each in found.items():
        assert each["code"] == 0, (name, each["said"])
        assert each["card"] > 500, name
        assert not each["left to the CPU"] or name in SETTLED_ON_THE_CPU, (name, each["left to the CPU"])

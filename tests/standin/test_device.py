"""The stand-in has a card's rules; what it lets pass, a card would let pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECK = """
import torch
from standin.device import NAME, OnCard, StandIn, use_stand_in

use_stand_in()
mine = torch.arange(12.0).view(3, 4)
with StandIn() as card:
    there = mine.to(NAME)
    assert isinstance(there, OnCard) and there.device.type == NAME
    assert torch.equal((there @ there.T).cpu(), mine @ mine.T)
    assert torch.equal(there[torch.tensor([2, 0])].cpu(), mine[[2, 0]])
    assert (there + torch.tensor(1.0)).sum().item() == 78 and there[0].tolist() == [0, 1, 2, 3]
    for mixed in (lambda: there + mine, lambda: mine[there[0].long() > 0], lambda: torch.cat([there, mine])):
        try:
            mixed()
        except (RuntimeError, TypeError) as error:
            assert "device" in str(error), error
        else:
            raise AssertionError("two devices met")
    linear = torch.nn.Linear(4, 2).to(NAME)
    linear(there).square().sum().backward()
    assert linear.weight.grad.device.type == NAME
    mine @ mine.T
    assert dict(card.left) == {"aten.mm.default": 2}  # the one above, and this one
print("kept")
"""


def test_two_devices_never_meet():
    tests = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(tests)}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "kept", done.stderr[-2000:]

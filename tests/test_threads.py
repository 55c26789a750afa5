"""Compiled kernels leave torch the number of threads that it had; numba's first threads would change it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKED = """
import numpy as np
from llmsurgeon.kernels import packed_numba as kernel
kernel.THREADED_FROM = 0
kernel.product(np.ones((1, 64), np.float32), np.ones((16, 64), np.uint8), 2)
"""
TREES = """
from llmsurgeon.modeling import surgeon_fff as fff
os.environ["LLMSURGEON_FFF_KERNEL"] = "numba"
with torch.no_grad():
    fff.NodeFeedForward(16, 7, "gelu", False, True, trees=1).eval()(torch.zeros(64, 16))
"""


@pytest.mark.parametrize("work", [PACKED, TREES], ids=["packed", "trees"])
def test_torch_keeps_its_threads(work):
    pytest.importorskip("numba")
    code = f"""
import os
import torch
torch.set_num_threads(2)
assert torch.get_num_threads() == 2  # torch applies the number when first asked
{work}
from numba import threading_layer
threading_layer()  # raises where no threads were started
assert torch.get_num_threads() == 2, torch.get_num_threads()
"""
    # A new process: numba starts its threads once.
    variables = {"PYTHONPATH": str(Path(__file__).parents[1]), "NUMBA_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **variables})

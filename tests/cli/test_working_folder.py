"""What lies in the working folder is data, whatever it is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmsurgeon


@pytest.mark.parametrize("name", ["yaml", "signal", "typer"])
def test_no_module_of_the_working_folder_is_imported(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("open('ran', 'w')\n")
    env = os.environ | {"PYTHONPATH": str(Path(llmsurgeon.__file__).parents[1])}
    command = [sys.executable, "-m", "llmsurgeon", "recipes", "ls"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "smollm2-fused" in done.stdout, done.stderr
    assert not (tmp_path / "ran").exists()

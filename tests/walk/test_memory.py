"""What a process may still take, by the machine, its control groups and its own limits."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model
from operations.helpers import subject_of

from llmsurgeon.errors import SurgeryError
from llmsurgeon.walk import memory, runner, streams
from llmsurgeon.walk.memory import Room, room
from llmsurgeon.walk.runner import LayerRunner
from llmsurgeon.walk.streams import Streams

GB = 10**9


@pytest.fixture
def system(tmp_path, monkeypatch):
    """/proc and /sys/fs/cgroup of a machine with 8 GB free; writes further files."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def write(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    write({"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:    {8 * GB // 1024} kB"})
    return write


def v2(folder, most, now, active=0, inactive=0):
    stat = f"anon 5\nactive_file {active}\nactive_file_other 7\ninactive_file {inactive}"
    return {f"{folder}/memory.max": most, f"{folder}/memory.current": now, f"{folder}/memory.stat": stat}


def v1(folder, most, now, cached=0):
    stat = f"active_file 9\ntotal_active_file {cached}\ntotal_inactive_file 0"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"{folder}/{name}": value for name, value in zip(names, (most, now, stat), strict=True)}


GROUPS = {
    "none": ({}, 8 * GB // 1024 * 1024),
    "no limit": ({"proc/self/cgroup": "0::/a"} | v2("cgroup/a", "max", GB), 8 * GB // 1024 * 1024),
    "a limit": ({"proc/self/cgroup": "0::/a"} | v2("cgroup/a", 3 * GB, GB), 2 * GB),
    "cache counts as free": ({"proc/self/cgroup": "0::/a"} | v2("cgroup/a", 3 * GB, 3 * GB, GB, GB), 2 * GB),
    "the group above": (
        {"proc/self/cgroup": "0::/a/b"} | v2("cgroup/a", 3 * GB, GB) | v2("cgroup/a/b", "max", 1),
        2 * GB,
    ),
    "the tightest": (
        {"proc/self/cgroup": "0::/a/b"} | v2("cgroup/a", 3 * GB, GB) | v2("cgroup/a/b", 2 * GB, GB),
        GB,
    ),
    "in a container": ({"proc/self/cgroup": "0::/"} | v2("cgroup", 3 * GB, GB), 2 * GB),
    "version 1": (
        {"proc/self/cgroup": "4:memory:/a\n3:cpu:/a\n1:name=systemd:/"} | v1("cgroup/memory/a", 3 * GB, 2 * GB, GB),
        2 * GB,
    ),
    "more than is there": ({"proc/self/cgroup": "0::/a"} | v2("cgroup/a", GB, 2 * GB), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_the_least_that_is_left(name, system):
    files, left = GROUPS[name]
    system(files)
    assert room().bytes == left
    assert room().limit == ("what the machine has free" if left > 7 * GB else "the memory limit of its control group")


@pytest.mark.parametrize(("kind", "taken", "said"), [("RLIMIT_AS", "VmSize", "-v"), ("RLIMIT_DATA", "VmData", "-d")])
def test_limits_of_the_process_itself(kind, taken, said, system, monkeypatch):
    limits = {getattr(resource, kind): GB}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY), 0))
    system({"proc/self/status": f"VmPeak: 1 kB\n{taken}:\t  500000 kB"})
    assert room().bytes == GB - 512_000_000 and said in room().limit


def test_nothing_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert room() is None
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert room() is None and Streams(1, (2, 3), torch.float32).data.shape == (1, 2, 3)


def test_what_was_freed_and_kept_is_free():
    """Of a process that keeps freed memory for itself, as a command does."""
    script = """
import torch
from llmsurgeon.walk.memory import keep_freed_memory, room, taken
keep_freed_memory()
blocks = [torch.ones(1_000_000) for _ in range(100)]
between = torch.ones(1000)
full = taken()
del blocks
kept = taken()
room()
print(full, kept, taken())
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    full, kept, left = map(int, said.split())
    assert kept > full - 100e6 and left < full - 300e6


def test_here_something_is_told():
    assert 0 < room().bytes < 2**50


@pytest.mark.parametrize(("free", "spills"), [(2 * 4800, False), (2 * 4800 - 2, True)])
def test_states_spill_above_half_of_what_is_free(free, spills, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(streams, "room", lambda: Room(free, f"a test of {free}"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = Streams(3, (10, 20, 4), torch.bfloat16)
    said = capsys.readouterr().err
    assert ("hidden states take 0.0 GB (3 x 200 tokens x 4 x 2 bytes)" in said) == spills, said
    assert made.data.shape == (3, 10, 20, 4)


def test_a_layer_that_does_not_fit_is_said_before_anything_starts(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(runner, "room", lambda: Room(1000, "a test"))
    _, weights, config = subject_of(model)
    said = r"one layer of this model takes [\d,]+ bytes, beside [\d,]+ of embedding and head, "
    said += r"and this process may take 1,000 more \(a test\); give it more memory, or compute in --dtype bfloat16"
    with pytest.raises(SurgeryError, match=said):
        LayerRunner(config, weights, torch.float32)
    own = model.state_dict()
    of_layers = [name for name in own if name.startswith("model.layers.")]
    layer = sum(own[name].numel() for name in of_layers if name.startswith("model.layers.0.")) * 4
    outside = sum(tensor.numel() for name, tensor in own.items() if name not in of_layers) * 4
    monkeypatch.setattr(runner, "room", lambda: Room(layer + outside, "a test"))
    LayerRunner(config, weights, torch.float32)

"""benchmarks/gpu.py runs every line without a card: tiny shapes, on the CPU, no figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture
def parts(monkeypatch):
    """rows("fusion") -> what the part gives in a dry run."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("LLMSURGEON_FFF_KERNEL", "torch")
    import gpu
    from gpu_parts import made
    from gpu_parts.timing import Setting

    monkeypatch.setattr(made, "spoken", made.in_this_process)

    def rows(part):
        module = __import__(f"gpu_parts.{gpu.PARTS[part]}", fromlist=["rows"])
        return list(module.rows(Setting(dry=True)))

    yield rows
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("gpu", "gpu_parts", "block"):
            del sys.modules[name]


PARTS = ["ternary", "fusion", "fff", "matmulfree", "block", "analyze", "convert", "heal", "search"]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_dry(parts, part, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("LLMSURGEON_CACHE", str(tmp_path / "cache"))
    found = parts(part)
    assert found and json.dumps(found)
    for row in found:
        assert row.get("code", 0) == 0, row
        for each in row.get("times", {}).values():
            assert each["us"] > 0
    if part == "fusion":
        first = found[0]["times"]
        assert (first["parent"]["layers"], first["fused"]["layers"]) == (6, 4)
        assert first["fused"]["bytes"] == first["without attentions"]["bytes"] < first["parent"]["bytes"]
    if part == "ternary":
        assert all(error < 1e-5 for row in found for error in row["errors"].values())
    if part == "heal":
        assert [row["what"] for row in found[:4]] == ["cut", "as it came", "heal", "healed"]
        assert all("perplexity_ratio" in row["text.txt"] for row in found if row["what"] in ("as it came", "healed"))


def test_a_part_that_fails_says_so_and_keeps_its_rows(parts, tmp_path, monkeypatch):
    import gpu
    from gpu_parts import ternary

    def broken(setting):
        yield {"one": 1}
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ternary, "rows", broken)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--here", "--part", "ternary", "--dry-run", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    made = json.loads((tmp_path / "ternary.json").read_text())
    assert end.value.code == 1 and made["rows"] == [{"one": 1}] and "no such kernel" in made["failure"]
    assert (tmp_path / "ternary.jsonl").read_text() == '{"one": 1}\n'
    assert made["machine"]["torch"] == torch.__version__


def test_a_card_is_timed_by_its_own_clock(parts, monkeypatch):
    """Events and graphs, with stand-ins: graphs are replayed, and what cannot be captured runs as it is."""
    from gpu_parts import timing

    from llmsurgeon.evaluation.graphs import WARM_UP

    told = []

    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.clock += 1.0
            self.at = Event.clock

        def synchronize(self):
            told.append("synchronised")

        def elapsed_time(self, other):
            return other.at - self.at

    class Graph:
        def replay(self):
            told.append("replayed")

    class Nothing:
        def __init__(self, *given):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return False

        def wait_stream(self, other):
            pass

    for name, stand_in in {
        "Event": Event, "CUDAGraph": Graph, "graph": Nothing, "stream": Nothing, "Stream": Nothing,
        "current_stream": Nothing, "synchronize": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def refuses():
        told.append("refused")
        raise_it = told.count("refused") <= 1
        if raise_it:
            raise RuntimeError("cannot be captured")

    card = torch.device("cuda")
    found = timing.in_turn({"captured": lambda: told.append("ran"), "refuses": refuses}, card, seconds=0.0)
    assert found["captured"]["graph"] and told.count("ran") == WARM_UP + 1 and told.count("replayed") >= 6
    assert not found["refuses"]["graph"] and "cannot be captured" in found["refuses"]["why"]
    assert found["captured"]["runs"] == 5 and found["captured"]["us"] == pytest.approx(1000)

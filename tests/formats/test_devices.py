"""What "auto" takes: the first card that computes all that is asked of it, else the CPU."""

from __future__ import annotations

import pytest
import torch

from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats import devices
from llmsurgeon.formats.devices import chosen_device, unusable
from llmsurgeon.planning.options import Options, as_given, device_kind
from llmsurgeon.recipe.recipe import loads


@pytest.fixture
def machine(monkeypatch):
    """machine("cuda", broken={"mps": "no float64"}): what is there, and what of it will not do. Gives the remarks."""
    said = []

    def set_up(*cards, broken=None):
        monkeypatch.setattr(devices, "_there", lambda card: card in cards)
        monkeypatch.setattr(devices, "unusable", lambda name: (broken or {}).get(name))
        monkeypatch.setattr(devices, "_called", lambda device: " (A Card)" if device.startswith("cuda") else "")
        monkeypatch.setattr(devices, "remark", said.append)
        return said

    return set_up


def test_the_first_card_that_will_do(machine):
    said = machine("cuda", "mps")
    assert chosen_device("auto") == "cuda"
    assert said == ["computing on cuda (A Card); --device cpu computes on the CPU"]


def test_what_cannot_compute_is_passed_over_and_said(machine):
    said = machine("cuda", "mps", broken={"cuda": "no kernel image", "mps": "no float64"})
    assert chosen_device("auto") == "cpu"
    assert said[0] == "cuda is there and cannot be used (no kernel image); computing on the CPU" and len(said) == 2
    with pytest.raises(SurgeryError, match=r"device mps: cannot be used here \(no float64\); expected auto, cpu"):
        chosen_device("mps")


def test_a_machine_without_a_card_says_nothing(machine):
    said = machine()
    assert chosen_device("auto") == "cpu" and not said
    assert chosen_device("cpu") == "cpu" and not said


def test_each_of_several_processes_has_its_own_card(machine, monkeypatch):
    machine("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert chosen_device("auto") == "cuda:3"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert chosen_device("auto") == "cpu"


def test_the_job_knows_the_device_that_was_taken(machine):
    machine("cuda")
    recipe = loads("version: 1\nsteps: [{op: prune_blocks, layers: [2]}]\n")
    assert as_given(recipe)[1].device == "cuda"
    assert as_given(recipe, Options(device="cpu"))[1].device == "cpu"
    assert device_kind("auto") == device_kind("cuda:1") == "cuda"


def test_the_cpu_can_do_all_that_is_asked():
    assert unusable("cpu") is None
    assert unusable("meta") == "it holds no numbers"
    assert unusable("abacus")
    if not torch.cuda.is_available():
        assert unusable("cuda:0")

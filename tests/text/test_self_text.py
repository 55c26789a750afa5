"""How many sequences are sampled together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llmsurgeon.text import self_text
from llmsurgeon.text.self_text import SelfText


@pytest.mark.parametrize(
    ("memory", "vocab", "rows"),
    [
        (80e9, 49_152, 4096),  # as many as are wanted
        (80e9, 262_144, 4096),
        (8e9, 49_152, 2046),  # what a third of the memory holds: caches of 910 kB, logits of 393
        (8e9, 262_144, 886),  # and logits of 2,097
    ],
)
def test_a_card_draws_as_many_together_as_its_memory_holds(monkeypatch, memory, vocab, rows):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocab))
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, config=config)
    monkeypatch.setattr(self_text, "_cache_bytes_per_token", lambda model: 3554)
    properties = SimpleNamespace(total_memory=int(memory))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert self_text._cache_rows(model, SelfText(tokens=10**6, sequence_length=256)) == rows

"""transformers' Trainer stops and goes on with every form, as with any model of its own."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import MIXTURE_NAMES
from modeling.forms import FORMS
from transformers import Trainer, TrainingArguments, set_seed

ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (4, 12), generator=torch.Generator())]


def trained(name, folder, resume=None):
    """The model behind 2 steps, a checkpoint behind each in `folder`."""
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=100,
    )
    trainer = Trainer(model=FORMS[name](), args=arguments, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMS)
def test_training_goes_on_where_it_stopped(name, tmp_path):
    whole = trained(name, tmp_path / "whole")
    # What a killed job leaves behind its first step.
    first = tmp_path / "whole" / "checkpoint-1"
    resumed = trained(name, tmp_path / "resumed", resume=str(first))
    if name != "decilm":
        written = json.loads((first / "config.json").read_text())
        width = type(resumed.config).attribute_map.get("hidden_size", "hidden_size")
        assert written[width] == "32 (see block_configs; load with trust_remote_code=True through an Auto class)"
    if name in MIXTURE_NAMES:  # the Trainer reads weights back under the names in memory, and files name each expert
        return
    for (key, mine), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, key=key: f"{key}: {text}")

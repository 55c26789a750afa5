"""transformers' Trainer stops and goes on with every form, as with any model of its own."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import MIXTURE_NAMES
from modeling.forms import FORMS
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 64, (4, 12), generator=torch.Generator())]


class StopAt(TrainerCallback):
    """Ends the run after so many steps, as a killed job does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def trained(name, folder, stop=99, resume=None):
    """The model behind 2 steps, or what a run that stops earlier leaves."""
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
    trainer = Trainer(model=FORMS[name](), args=arguments, train_dataset=ROWS, callbacks=[StopAt(stop)])
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMS)
def test_training_goes_on_where_it_stopped(name, tmp_path):
    whole = trained(name, tmp_path / "whole")
    trained(name, tmp_path / "halves", stop=1)
    resumed = trained(name, tmp_path / "halves", resume=str(tmp_path / "halves" / "checkpoint-1"))
    if name != "decilm":
        written = json.loads((tmp_path / "halves" / "checkpoint-1" / "config.json").read_text())
        width = type(resumed.config).attribute_map.get("hidden_size", "hidden_size")
        assert written[width] == "32 (see block_configs; load with trust_remote_code=True through an Auto class)"
    if name in MIXTURE_NAMES:  # the Trainer reads weights back under the names in memory, and files name each expert
        return
    for (key, mine), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, key=key: f"{key}: {text}")

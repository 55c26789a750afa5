"""transformers' common tests of a model, on the checkpoint that PEER_FOLDER names. Started by scripts/peer_tests."""

from __future__ import annotations

import os
import unittest
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers_tests import test_modeling_common as common  # scripts/peer_tests puts it beside this

FOLDER = os.environ["PEER_FOLDER"]
AUTO = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)


def classes() -> tuple[Any, ...]:
    """The checkpoint's classes of models: those of its code, or those that transformers has for its config."""
    config = AutoConfig.from_pretrained(FOLDER, trust_remote_code=True)
    told = getattr(config, "auto_map", {})
    if told:
        return tuple(get_class_from_dynamic_module(told[auto], FOLDER) for auto in AUTO if auto in told)
    tables = [getattr(transformers, auto)._model_mapping for auto in AUTO]
    return tuple(table[type(config)] for table in tables if type(config) in table)


class Tester:
    """What the common tests ask of a model's own tests: a config, inputs, sizes."""

    batch_size, seq_length, is_training = 3, 8, True

    def __init__(self) -> None:
        config = self.get_config()
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.num_hidden_layers, self.num_attention_heads = config.num_hidden_layers, config.num_attention_heads

    def get_config(self) -> Any:
        config = AutoConfig.from_pretrained(FOLDER, trust_remote_code=True)
        config.pad_token_id = config.pad_token_id or 0  # classifying a batch asks for one
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        tokens = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def values(mapping: Any) -> list[Any]:
    """The names of classes in one of transformers' tables, and of ours that are made of one of them."""
    found = list(stock_values(mapping))
    return found + [c.__name__ for c in CLASSES if any(base.__name__ in found for base in c.__mro__[1:])]


CLASSES = classes()
# By the name of a class the tests know which labels it wants.
stock_values, common.get_values = common.get_values, values


class CommonTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = CLASSES
    # Of the test files themselves.
    test_generation_tester_mixin_inheritance = test_num_layers_is_small = None

    def setUp(self) -> None:
        self.model_tester = Tester()

"""Classes beside the language model's: where nothing was cut, each computes what transformers' own does."""

from __future__ import annotations

import pytest
import torch
from conftest import ENCODER_NAMES, FAMILY_NAMES, MIXTURE_NAMES, masked_head, tiny_encoder, tiny_model

from llmsurgeon.formats.configs import normalised
from llmsurgeon.formats.surgeon import as_surgeon, classes_for, offered, surgeon_module
from llmsurgeon.model.families import family_of

IDS = torch.randint(3, 64, (1, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", [*FAMILY_NAMES, *MIXTURE_NAMES, *ENCODER_NAMES])
def test_every_class_computes_what_the_stock_class_does(family):
    encoder = family in ENCODER_NAMES
    parent = tiny_encoder(family, masked_head(family)) if encoder else tiny_model(family)
    raw = as_surgeon(normalised(parent.config.to_dict()))
    config_class, model_class = classes_for(raw, family_of(raw))
    classes = {auto: made for auto, made in offered(surgeon_module(family_of(raw))).items() if auto != "AutoConfig"}
    assert model_class in classes.values() and len(classes) >= 2
    for auto, made in classes.items():
        torch.manual_seed(0)
        stock = made._stock_class()(parent.config).eval()
        mine = made(config_class.from_dict(raw)).eval()
        mine.load_state_dict(stock.state_dict())
        inputs = IDS[None] if auto.endswith("MultipleChoice") else IDS
        with torch.no_grad():
            theirs, ours = stock(input_ids=inputs), mine(input_ids=inputs)
        assert theirs.keys() == ours.keys()
        torch.testing.assert_close(ours[0], theirs[0], atol=2e-6, rtol=0)

"""Loading any checkpoint the tool can read, its own included, as a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmsurgeon.checkpoint.source import Checkpoint, open_checkpoint, read_config
from llmsurgeon.families import family_of
from llmsurgeon.formats.models import (
    canonical,
    check_shapes,
    empty_model,
    expected_shapes,
    fill,
    is_surgeon,
    load_config,
    normalised,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    model: str, *, dtype: torch.dtype | None = None, device: str = "cpu", revision: str | None = None
) -> PreTrainedModel:
    """The model of a hub id, folder or GGUF file, in its own dtype unless `dtype` is given.

    Code inside the checkpoint never runs: converted checkpoints load through this package's modeling files.
    """
    return model_of(open_checkpoint(model, revision=revision), dtype=dtype, device=device)


def model_of(checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: str = "cpu") -> PreTrainedModel:
    """The model of an open checkpoint.

    Raises:
        CheckpointError: names or shapes differ from what the config promises.
    """
    config = normalised(checkpoint.config)
    family = family_of(config)
    model = empty_model(config)
    weights = canonical(checkpoint, family, bool(config.get("tie_word_embeddings")))
    meta = canonical(checkpoint.meta(), family, bool(config.get("tie_word_embeddings")))
    check_shapes({name: tuple(t.shape) for name, t in meta.items()}, expected_shapes(model), checkpoint.name)
    fill(model, weights, dtype, device)
    return model


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a hub id, folder or GGUF file."""
    from transformers import AutoTokenizer

    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        return _quietly(AutoTokenizer.from_pretrained, str(path.parent), gguf_file=path.name)
    raw = read_config(model, revision)
    # transformers asks for the config's class: ours comes from this package, not from code inside the checkpoint.
    config = load_config(raw) if is_surgeon(raw) else None
    return _quietly(AutoTokenizer.from_pretrained, model, revision=revision, config=config)


def _quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return function(*args, **kwargs)
    finally:
        logging.set_verbosity(level)

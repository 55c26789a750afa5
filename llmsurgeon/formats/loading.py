"""Loading any checkpoint the tool can read, its own included, as a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmsurgeon.boundary.foreign import foreign, local_path
from llmsurgeon.checkpoint.companions import companions_of
from llmsurgeon.checkpoint.files import refuse_huge_ids, refuse_special
from llmsurgeon.checkpoint.gguf.parts import open_gguf
from llmsurgeon.checkpoint.gguf.tokenizer import write_tokenizer
from llmsurgeon.checkpoint.kept import writing
from llmsurgeon.checkpoint.opening import companions_folder, open_checkpoint, read_config
from llmsurgeon.checkpoint.passing import passing
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.formats.configs import load_config
from llmsurgeon.formats.dtypes import computed_in
from llmsurgeon.formats.forms import form_of
from llmsurgeon.formats.models import fill
from llmsurgeon.formats.reading import read_model
from llmsurgeon.formats.surgeon import is_surgeon
from llmsurgeon.formats.towers import text_config
from llmsurgeon.model.families.vision_language import vision_language_of
from llmsurgeon.progress import remark

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    model: str, *, dtype: torch.dtype | None = None, device: str = "cpu", revision: str | None = None
) -> PreTrainedModel:
    """The model of a hub id, folder or GGUF file, in one dtype: `dtype`, else the one most of its numbers have.

    On a CPU bfloat16 stands for float16, and float32 for both where the processor has no instructions for bfloat16; ask
    for what is wanted.

    Code inside the checkpoint never runs: converted checkpoints load through this package's modeling files.
    """
    return model_of(open_checkpoint(model, revision=revision), dtype=dtype, device=device)


def model_of(checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: str = "cpu") -> PreTrainedModel:
    """The model of an open checkpoint; of a vision-language one its text tower.

    Raises:
        CheckpointError: names or shapes differ from what the config promises.
    """
    if unread := form_of(checkpoint.config).unread:
        raise CheckpointError(f"{checkpoint.name}: {unread}")
    made = read_model(checkpoint)
    for note in made.notes:
        remark(f"{checkpoint.name}: {note}")
    fill(made.empty, made.weights, computed_in(made.dtype, dtype, device), device)
    made.empty.name_or_path = checkpoint.name  # for messages; the config goes without
    return made.empty


def dtype_of(name: str | None) -> torch.dtype | None:
    """The torch dtype of this name; None, which keeps the checkpoint's own, stays None.

    Raises:
        SurgeryError: it is none that models are computed in.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise SurgeryError(f"--dtype {name}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_tokenizer(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a hub id, folder or GGUF file.

    Code of the checkpoint's runs only with `trust_remote_code`, and then the tokenizer's alone.

    Raises:
        CheckpointError: there is none, it is damaged, a package that it needs is not installed, it needs code and is
            not trusted, or its files lie elsewhere.
    """
    from transformers import AutoTokenizer

    path = local_path(model)
    if path.suffix == ".gguf" and path.is_file():
        with passing() as folder:
            with writing(folder, then="set TMPDIR to a folder with room"):
                write_tokenizer(open_gguf(path).metadata, folder, path)
            with foreign(model, "the tokenizer that its fields describe cannot be loaded", "download the file again"):
                return _quietly(AutoTokenizer.from_pretrained, str(folder))
    # The tokenizers library would wait for a pipe without end.
    refuse_special(path.iterdir() if path.is_dir() else ())
    place = companions_folder(model, revision)
    companions_of(place, trust_remote_code).check_tokenizer(model, place)
    refuse_huge_ids(place / "tokenizer.json")
    raw = read_config(place)
    if vision_language_of(raw) and (is_surgeon(raw) or trust_remote_code):
        raw = text_config(raw)
    # transformers asks for the config's class: it comes from this package or from transformers, not from code inside
    # the checkpoint.
    config = load_config(raw) if form_of(raw).ships_code or trust_remote_code else None
    with foreign(model, "its tokenizer cannot be loaded", _tokenizer_advice(path)):
        # Without a value transformers would ask on stdin, and take a `y` that is there for something else.
        return _quietly(AutoTokenizer.from_pretrained, str(place), config=config, trust_remote_code=trust_remote_code)


def _tokenizer_advice(folder: Path) -> str:
    """What to do about a folder whose tokenizer does not load."""
    if folder.is_dir() and not (folder / "tokenizer.json").exists():
        if any(folder.glob("*.model")):
            return "it is kept in SentencePiece's form, whose reading takes `pip install sentencepiece protobuf`"
        return (
            "the folder has no tokenizer.json; copy the tokenizer's files (tokenizer.json, tokenizer_config.json ...) "
            "from the model that it was made from"
        )
    return "download its files again, or copy them from the model that it was made from"


def _quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return function(*args, **kwargs)
    finally:
        logging.set_verbosity(level)

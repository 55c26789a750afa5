"""Sampled text remembered on disk, and by what it is told apart: weights, libraries, tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from llmsurgeon.boundary.foreign import token_ids
from llmsurgeon.checkpoint.kept import cache_folder, keep, kept
from llmsurgeon.errors import SurgeryError
from llmsurgeon.text.conversation import template_of
from llmsurgeon.text.kinds import KINDS
from llmsurgeon.text.self_text import SelfText, sample_self_text
from llmsurgeon.text.sequences import Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def cached_self_text(
    load: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, fingerprint: str, wanted: SelfText
) -> Sequences:
    """`sample_self_text`, remembered on disk; `load` is called only where the text is not there yet.

    `fingerprint` names the weights and how they compute (dtype, kind of device): another model, another text. So do the
    libraries, the tokenizer, the openers that the text begins with and what the chat template puts between turns. A
    damaged or unwritable cache only costs time.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    libraries = [version(library) for library in ("torch", "transformers")]
    begins = [[name, dict(KINDS[name].variants)] for name in wanted.kinds]
    spoken = template_of(tokenizer)
    turns = asdict(spoken) if spoken and any(KINDS[name].chat for name in wanted.kinds) else None
    parts = [fingerprint, *libraries, tokenizer_key(tokenizer), *asdict(wanted).values(), begins, turns]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    path = cache_folder("self") / f"{key}.safetensors"
    with suppress(OSError, SafetensorError, KeyError, IndexError):
        if kept(path):
            found = load_file(path)
            return Sequences(found["tokens"], tuple(wanted.kinds[place] for place in found["kinds"].tolist()))
    text = sample_self_text(load(), tokenizer, wanted)
    kinds = torch.tensor([wanted.kinds.index(kind) for kind in text.kinds])
    with suppress(OSError, SurgeryError):
        path.parent.mkdir(parents=True, exist_ok=True)
        keep(path, lambda partial: save_file({"tokens": text.tokens, "kinds": kinds}, partial))
    return text


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash that tells tokenizers apart by what they make of a text, special tokens included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    # Not all of these are in the backend's own description; a slow tokenizer has its rules among the last.
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    framed = token_ids(tokenizer, "a")
    kept = {} if backend else {name: str(value) for name, value in tokenizer.init_kwargs.items()}
    parts = [type(tokenizer).__name__, content, special, framed, tokenizer.pad_token_id, kept]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash that tells models apart: dtype, kind of device; names, shapes and some of the values of all weights."""
    digest = hashlib.sha256(f"{model.dtype} {model.device.type}".encode())
    for name, weight in model.state_dict().items():
        values = weight.detach().flatten()
        sample = values[:: max(1, len(values) // 4096)].double().cpu()
        digest.update(f"{name}{list(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()

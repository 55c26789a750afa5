"""Sampled text remembered on disk, and by what it is told apart: weights, libraries, tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING

from torch import Tensor

from llmsurgeon.boundary.foreign import token_ids
from llmsurgeon.checkpoint.kept import cache_folder, keep, kept
from llmsurgeon.errors import SurgeryError
from llmsurgeon.text.self_text import SelfText, sample_self_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def cached_self_text(
    load: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, fingerprint: str, wanted: SelfText
) -> Tensor:
    """`sample_self_text`, remembered on disk; `load` is called only where the text is not there yet.

    `fingerprint` names the weights and how they compute (dtype, kind of device): another model, another text. So do the
    libraries, and the tokenizer, whose openers the text begins with. A damaged or unwritable cache only costs
    time.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    libraries = [version(library) for library in ("torch", "transformers")]
    parts = [fingerprint, *libraries, tokenizer_key(tokenizer), *asdict(wanted).values()]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    path = cache_folder("self") / f"{key}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        if kept(path):
            return load_file(path)["tokens"]
    text = sample_self_text(load(), tokenizer, wanted)
    with suppress(OSError, SurgeryError):
        path.parent.mkdir(parents=True, exist_ok=True)
        keep(path, lambda partial: save_file({"tokens": text}, partial))
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

"""Open a checkpoint from a hub id, a folder or a GGUF file: headers first, each tensor when it is asked for.

Only safetensors and GGUF are read. Code named by a config (`auto_map`) is never run here.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import torch

from llmsurgeon.boundary.foreign import local_path, read_json
from llmsurgeon.checkpoint.config_file import read_config_file
from llmsurgeon.checkpoint.folder import SafetensorsCheckpoint
from llmsurgeon.checkpoint.gguf.parts import one_model
from llmsurgeon.checkpoint.gguf.source import GGUFCheckpoint
from llmsurgeon.checkpoint.hub import HUB_BESIDE, HUB_PATTERNS, download, hub_has
from llmsurgeon.checkpoint.index import INDEX, WEIGHTS, refuse_dead_link
from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.errors import CheckpointError

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CUT_IN_BYTES = re.compile(r"\.gguf[-._]?(part|split)[-._]?\w+", re.IGNORECASE)


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    gguf_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Open a hub id, a folder or a GGUF file without reading its weights.

    Hub ids honour HF_HOME, HF_HUB_OFFLINE and HF_TOKEN; `revision` is a branch, tag or commit.
    `gguf_dtype` is what a GGUF file's tensors are cast to, instead of the dtype nearest to how they are stored.
    `trust_remote_code` lets code that the tokenizer brings along run later, and go along; none runs here.

    Raises:
        SurgeryError: nothing there, or the hub cannot be reached.
        CheckpointError: damaged, unsafe, or pickles only.
    """
    opened = _open(os.fspath(model), revision, gguf_dtype)
    opened.trust_remote_code = trust_remote_code
    return opened


def companions_folder(model: str, revision: str | None = None) -> Path:
    """The folder that holds a model's tokenizer and all that lies beside its weights, which are not fetched."""
    path = local_path(model)
    return path if path.is_dir() else download(model, revision, HUB_BESIDE)


def read_config(model: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """The config alone, of a folder (weights not needed), a .json file, a GGUF file or a hub id."""
    name = os.fspath(model)
    path = local_path(name)
    if path.is_file() and path.suffix == ".json":
        return read_config_file(path)
    if path.is_file():
        return open_checkpoint(path).config
    if path.is_dir():
        _refuse_adapter(path, name)
        config = path / "config.json"
        return read_config_file(config) if config.exists() else _open_folder(path, name).config
    folder = download(name, revision, ["config.json", "adapter_config.json"])
    _refuse_adapter(folder, name)
    return read_config_file(folder / "config.json")


def has_weights(model: str | os.PathLike[str]) -> bool:
    """True where `model` is a file or folder of this disk with weights in it, be they ones that cannot be read."""
    path = local_path(model)
    if path.is_dir():
        return any(any(path.glob(pattern)) for pattern in (INDEX, "*.safetensors", "*.gguf", *PICKLE_PATTERNS))
    return path.is_file() and path.suffix != ".json"


def _open(name: str, revision: str | None, gguf_dtype: torch.dtype | None) -> Checkpoint:
    path = local_path(name)
    if path.is_file():
        if path.suffix == ".gguf":
            return GGUFCheckpoint(path, name, gguf_dtype)
        if any(path.match(pattern) for pattern in PICKLE_PATTERNS):
            raise CheckpointError(_pickle_message(name, str(path.parent)))
        if CUT_IN_BYTES.search(path.name):
            raise CheckpointError(
                f"{name}: a piece of a GGUF file that was cut in bytes; join the pieces in their order first: "
                "cat PIECE1 PIECE2 ... > model.gguf"
            )
        raise CheckpointError(f"{name}: not a checkpoint; give a folder, a .gguf file or a hub id")
    if path.is_dir():
        return _open_folder(path, name, gguf_dtype=gguf_dtype)
    return _open_folder(download(name, revision, HUB_PATTERNS), name, hub_id=name)


def _open_folder(
    folder: Path, name: str, hub_id: str | None = None, gguf_dtype: torch.dtype | None = None
) -> Checkpoint:
    _refuse_adapter(folder, name)
    for file in (folder / WEIGHTS, folder / INDEX):
        refuse_dead_link(file)
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists() or any(folder.glob("*.safetensors")):
        return SafetensorsCheckpoint(folder, name)
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and (first := ggufs[0] if len(ggufs) == 1 else one_model(ggufs)):
        return GGUFCheckpoint(first, name, gguf_dtype)
    if ggufs:
        names = ", ".join(p.name for p in ggufs)
        raise CheckpointError(f"{name}: holds {len(ggufs)} GGUF files ({names}); give the path of one of them")
    if any(any(folder.glob(pattern)) for pattern in PICKLE_PATTERNS) or (hub_id and hub_has(hub_id, PICKLE_PATTERNS)):
        raise CheckpointError(_pickle_message(name, hub_id or str(folder)))
    place = "" if Path(name) == folder else f" in {folder}"
    raise CheckpointError(f"{name}: no weights here: expected {WEIGHTS}, {INDEX} or one .gguf file{place}")


def _refuse_adapter(folder: Path, name: str) -> None:
    """Raise CheckpointError for a folder with a PEFT adapter, which is a change to another model's weights."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    base, kind = config.get("base_model_name_or_path") or "its base model", config.get("peft_type") or "PEFT"
    script = (
        "import sys; from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
        "src, out = sys.argv[1:]; m = M.from_pretrained(src, dtype='auto'); "
        "T.from_pretrained(m.peft_config['default'].base_model_name_or_path).save_pretrained(out); "
        "m.merge_and_unload().save_pretrained(out)"
    )
    out = f"{folder.resolve().name if folder.is_dir() and name == str(folder) else name.split('/')[-1]}-merged"
    raise CheckpointError(
        f"{name}: holds a {kind} adapter for {base} (adapter_config.json), not a model by itself; merge the two and "
        f"use the result:\n  python -c {shlex.quote(script)} {shlex.quote(name)} {shlex.quote(out)}"
    )


def _pickle_message(name: str, model: str) -> str:
    script = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; src, out = sys.argv[1:]; "
        "M.from_pretrained(src, dtype='auto', trust_remote_code=False).save_pretrained(out); "
        "T.from_pretrained(src, trust_remote_code=False).save_pretrained(out)"
    )
    out = model.rstrip("/").split("/")[-1] + "-safetensors"
    return (
        f"{name}: the weights are pickles, and loading a pickle can run any code in it. If you trust its author, "
        f"convert it and use the result:\n  python -c {shlex.quote(script)} {shlex.quote(model)} {shlex.quote(out)}"
    )

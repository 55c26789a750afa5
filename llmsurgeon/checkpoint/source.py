"""Read a checkpoint from a hub id, a folder or a GGUF file: headers first, each tensor when it is asked for.

Only safetensors and GGUF are read. Code named by a config (`auto_map`) is never run here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from llmsurgeon.boundary.foreign import local_path, read_json
from llmsurgeon.checkpoint.companions import Companions, companions_of
from llmsurgeon.checkpoint.config_file import check_layers, read_config_file
from llmsurgeon.checkpoint.files import Stamp, sample_sum
from llmsurgeon.checkpoint.gguf.parts import one_model
from llmsurgeon.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from llmsurgeon.errors import CheckpointError, SurgeryError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Beside the weights, what companions.py may let go along. Code is fetched to be read, and run by nobody.
HUB_BESIDE = [
    *("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.bpe", "*.tokenizer"),
    *("tokenizer.model.*", "*.py"),
]
HUB_PATTERNS = ["*.safetensors", *HUB_BESIDE]
# Sub-folders, precision variants and the second copy that some repositories keep in the vendor's own layout. Folders of
# sentence-transformers' modules begin with a digit; `additional_chat_templates` is the one that begins with "add".
HUB_IGNORED = [
    "[!0-9a]*/*",
    "a[!d]*/*",
    "ad[!d]*/*",
    "[0-9][!_]*/*",
    "consolidated*",
    "*.fp16.safetensors",
    "*.fp16-*.safetensors",
    "optimizer*",
    "training_args*",
]
CUT_IN_BYTES = re.compile(r"\.gguf[-._]?(part|split)[-._]?\w+", re.IGNORECASE)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read from disk when asked for.

    Attributes:
        name: the model as the user named it.
        path: the folder (or GGUF file) that is read.
        config: config.json as it is, nothing filled in.
        fingerprint: changes whenever a header, a size, a modification time, a sample of the numbers or the config does.
        stamps: of the files that are read for the model itself: config.json, the index, the weight files.
        trust_remote_code: whether the user lets code that the tokenizer brings along run, and go along.
    """

    name: str
    path: Path
    config: dict[str, Any]
    fingerprint: str
    stamps: tuple[Stamp, ...]
    trust_remote_code: bool = False

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a file of the model is not what it was when it was opened, and say which."""
        for stamp in self.stamps:
            stamp.check()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the header."""
        raise NotImplementedError

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor, from the header."""
        raise NotImplementedError

    def location(self, name: str) -> tuple[Path, int, int] | None:
        """The file and byte range (start, end) that hold exactly this tensor, or None where it is computed."""
        raise NotImplementedError

    @property
    def companions(self) -> Companions:
        """What goes along with the weights: tokenizer, chat template, generation config, pooling, image processor."""
        raise NotImplementedError

    def tokenizer_files(self) -> list[Path]:
        """Where the companions lie."""
        return self.companions.paths

    def own_tokenizer_files(self) -> list[Path]:
        """Those of `tokenizer_files` that are files of the checkpoint, and not made from its metadata."""
        return self.tokenizer_files()

    def meta(self) -> dict[str, Tensor]:
        """Every tensor on the meta device: names, shapes and dtypes without a byte of data."""
        return {name: torch.empty(self.shape(name), dtype=self.dtype(name), device="meta") for name in self}

    def nbytes(self) -> int:
        """Bytes that all tensors take, uncompressed."""
        return sum(t.numel() * t.dtype.itemsize for t in self.meta().values())


class SafetensorsCheckpoint(Checkpoint):
    """A folder with `model.safetensors`, or with shards and their index.

    Raises:
        CheckpointError: the folder is incomplete, damaged, points outside itself, or holds pickles only.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.name = name or str(folder)
        self.path = folder
        held = folder / "config.json"
        config = [Stamp.of(held)] if held.exists() else []
        self.config = read_config_file(held)
        self._file_of, self.weight_files, index = _open_weights(folder)
        check_layers(self.config, len(self._file_of), str(held))
        self.stamps = (*config, *index, *(file.stamp for file in self.weight_files))

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def _entry(self, name: str) -> TensorEntry:
        return self._file_of[name].entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def location(self, name: str) -> tuple[Path, int, int] | None:
        entry = self._entry(name)
        return self._file_of[name].path, entry.start, entry.end

    @cached_property
    def companions(self) -> Companions:
        return companions_of(self.path, self.trust_remote_code)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        parts = [json.dumps(self.config, sort_keys=True).encode()]
        for file in self.weight_files:
            # Copying may keep the time of a file, and another training's header may be the same.
            sample = sample_sum(file.path, file.data_start)
            parts.append(f"{file.path.name} {file.size} {file.stamp.modified_ns} {sample}".encode() + file.header)
        return sha256(b"\0".join(sha256(part).digest() for part in parts)).hexdigest()


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
    return path if path.is_dir() else _download(model, revision, HUB_BESIDE)


def _open(name: str, revision: str | None, gguf_dtype: torch.dtype | None) -> Checkpoint:
    path = local_path(name)
    if path.is_file():
        if path.suffix == ".gguf":
            return _open_gguf(path, name, gguf_dtype)
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
    return _open_folder(_download(name, revision, HUB_PATTERNS), name, hub_id=name)


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
    folder = _download(name, revision, ["config.json", "adapter_config.json"])
    _refuse_adapter(folder, name)
    return read_config_file(folder / "config.json")


def has_weights(model: str | os.PathLike[str]) -> bool:
    """True where `model` is a file or folder of this disk with weights in it, be they ones that cannot be read."""
    path = local_path(model)
    if path.is_dir():
        return any(any(path.glob(pattern)) for pattern in (INDEX, "*.safetensors", "*.gguf", *PICKLE_PATTERNS))
    return path.is_file() and path.suffix != ".json"


def _open_folder(
    folder: Path, name: str, hub_id: str | None = None, gguf_dtype: torch.dtype | None = None
) -> Checkpoint:
    _refuse_adapter(folder, name)
    for file in (folder / WEIGHTS, folder / INDEX):
        _refuse_dead_link(file)
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists() or any(folder.glob("*.safetensors")):
        return SafetensorsCheckpoint(folder, name)
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and (first := ggufs[0] if len(ggufs) == 1 else one_model(ggufs)):
        return _open_gguf(first, name, gguf_dtype)
    if ggufs:
        names = ", ".join(p.name for p in ggufs)
        raise CheckpointError(f"{name}: holds {len(ggufs)} GGUF files ({names}); give the path of one of them")
    if any(any(folder.glob(pattern)) for pattern in PICKLE_PATTERNS) or (hub_id and _hub_has_pickles(hub_id)):
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


def _refuse_dead_link(file: Path) -> None:
    """Raise CheckpointError for a link to a file that is not there."""
    if file.is_symlink() and not file.exists():
        raise CheckpointError(f"{file}: a link to {file.readlink()}, which is not there; put the file itself here")


def _open_gguf(path: Path, name: str, dtype: torch.dtype | None) -> Checkpoint:
    from llmsurgeon.checkpoint.gguf.source import GGUFCheckpoint

    return GGUFCheckpoint(path, name, dtype)


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


def _open_weights(folder: Path) -> tuple[dict[str, SafetensorsFile], list[SafetensorsFile], list[Stamp]]:
    """Tensor name -> file, in file order; the files; and the stamp of the index, where there is one."""
    index: list[Stamp] = []
    if (folder / WEIGHTS).exists():  # the order in which transformers looks
        listed: dict[str, str] | None = None
        files = [SafetensorsFile(folder / WEIGHTS)]
    elif (folder / INDEX).exists():
        index = [Stamp.of(folder / INDEX)]
        listed = read_index(folder)
        files = [SafetensorsFile(folder / shard) for shard in sorted(set(listed.values()))]
    else:
        found = sorted(folder.glob("*.safetensors"))
        if len(found) > 1:
            raise CheckpointError(
                f"{folder}: {len(found)} safetensors files and no {INDEX} to say which belong together; "
                "download the index too"
            )
        listed = None
        files = [SafetensorsFile(found[0])]
    file_of: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.entries:
            if name in file_of:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is in both {file_of[name].path.name} and {file.path.name}"
                )
            file_of[name] = file
    for name, shard in (listed or {}).items():
        if name not in file_of or file_of[name].path.name != shard:
            raise CheckpointError(f"{folder / INDEX}: tensor {name!r} should be in {shard}, which does not have it")
    if not file_of:
        raise CheckpointError(f"{folder}: the weight files hold no tensor")
    return file_of, files, index


def read_index(folder: Path) -> dict[str, str]:
    """`weight_map` of the index: tensor name -> shard, checked to be files of this very folder.

    Raises:
        CheckpointError: malformed, a shard is missing, or a shard lies outside the folder.
    """
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    for shard in sorted(set(weight_map.values())):
        if shard in ("", ".", "..") or {PurePosixPath(shard).name, PureWindowsPath(shard).name} != {shard}:
            raise CheckpointError(f"{path}: shard {shard!r} points outside the folder; refused")
        there = local_path(folder / shard).exists()  # first: it refuses names that no file can have
        _refuse_dead_link(folder / shard)
        if not there:
            needs = sum(1 for s in weight_map.values() if s == shard)
            raise CheckpointError(f"{folder}: shard {shard} is missing ({needs} tensors); download it again")
        if not _inside(folder, folder / shard):
            target = (folder / shard).readlink()
            raise CheckpointError(
                f"{path}: shard {shard!r} is a link to {target}, which leads outside the folder; refused. Put the file "
                "itself here (cp --dereference), or give the folder that the files lie in"
            )
    return weight_map


def _inside(folder: Path, file: Path) -> bool:
    """True where `file`, links followed, stays in `folder` or in the blobs of the hub cache that `folder` is in."""
    real, root = file.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return True
    return root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs")


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder in the hub's cache that holds the files of `name` which match `patterns`."""
    if not HUB_ID.fullmatch(name) or name.endswith((".gguf", ".json", ".safetensors")) or name.startswith("."):
        raise SurgeryError(f"{name}: no such file or folder, and not a hub id (owner/name)")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=HUB_IGNORED))
    except hub.GatedRepoError as error:
        raise SurgeryError(
            f"{name}: this repository is gated. Accept its terms at https://huggingface.co/{name} and set HF_TOKEN"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise SurgeryError(f"{name}: the hub has no revision {revision!r} of it") from error
    except hub.RepositoryNotFoundError as error:
        raise SurgeryError(
            f"{name}: no such folder here and no such repository on the hub; a private one needs HF_TOKEN"
        ) from error
    except hub.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise SurgeryError(
                f"{name}{at}: no such folder here, not in the hub cache, and HF_HUB_OFFLINE is set; "
                "unset it or give a local folder"
            ) from error
        raise SurgeryError(
            f"{name}{at}: no such folder here, not in the hub cache, and the hub cannot be reached; "
            "check the name and the connection, or give a local folder"
        ) from error
    except Exception as error:  # the transport's own errors change with the version of huggingface_hub
        raise SurgeryError(f"{name}{at}: cannot be downloaded from the hub: {error}") from error


def _hub_has_pickles(hub_id: str) -> bool:
    from huggingface_hub import HfApi

    try:
        return any(Path(file).match(p) for file in HfApi().list_repo_files(hub_id) for p in PICKLE_PATTERNS)
    except Exception:  # the question only chooses between two messages
        return False

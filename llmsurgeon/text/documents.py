"""Documents of files and of datasets on the hub, read as they are asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmsurgeon.errors import SurgeryError
from llmsurgeon.text.files import file_documents, texts_of

# The revision of a dataset that cannot be told.
UNKNOWN = "unknown"


def documents(*, text: str | None = None, dataset: str | None = None, seed: int = 0) -> Iterator[Iterable[str]]:
    """The documents of a file (.txt holds one) or a hub dataset, each as pieces that follow one another.

    Nothing is read before it is asked for, so the text may be larger than memory.

    Raises:
        SurgeryError: as `calibration_sequences`.
    """
    if dataset:
        yield from ((document,) for document in _streamed(dataset, seed))
        return
    assert text is not None
    yield from file_documents(text)


def stream_text(dataset: str, seed: int, characters: int) -> str:
    """`characters` characters or a little more from a shuffled stream of the dataset's documents."""
    texts: list[str] = []
    size = 0
    for text in _streamed(dataset, seed):
        texts.append(text)
        size += len(text)
        if size >= characters:
            break
    return "\n\n".join(texts)


def _streamed(dataset: str, seed: int) -> Iterator[str]:
    """The texts of a hub dataset, NAME[:CONFIG][:SPLIT], shuffled as they come."""
    name, _, rest = dataset.partition(":")
    config, _, part = rest.partition(":")
    revision = dataset_revision(dataset)
    # The very commit that caches and jobs go by, where it is one.
    pinned = {"revision": revision} if re.fullmatch("[0-9a-f]{40}", revision) else {}
    rows = _load_dataset(name, config or None, split=part or "train", name=dataset, **pinned)
    return _texts(rows.shuffle(seed=seed, buffer_size=1000), dataset)


@cache
def dataset_revision(dataset: str) -> str:
    """The commit of a hub dataset, NAME[:CONFIG][:SPLIT], that this process reads; of a local folder a hash of its
    files' names, sizes and times. "unknown" where the hub cannot be asked."""
    name = dataset.partition(":")[0]
    folder = Path(name)
    if folder.exists():
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
        seen = [(str(path), (found := path.stat()).st_size, found.st_mtime_ns) for path in files]
        return sha256(json.dumps(seen).encode()).hexdigest()
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, timeout=10).sha)
    except Exception:  # reading it will say what is wrong
        return UNKNOWN


def _load_dataset(*args: str | None, name: str, **kwargs: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SurgeryError(f"{name}: reading it needs the datasets library: pip install datasets") from error
    try:
        return datasets.load_dataset(*args, **kwargs, streaming=True)
    except Exception as error:
        raise _unreachable(name, error) from error


def _texts(rows: Iterable[dict[str, Any]], name: str) -> Iterator[str]:
    """The text of each row that has any."""
    try:
        yield from texts_of(((lambda: f"dataset {name}", row) for row in rows), name)
    except SurgeryError:
        raise
    except Exception as error:  # a stream can fail in any of its layers: network, archive, parser
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> SurgeryError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return SurgeryError(
        f"dataset {name} cannot be read: {reason}; check the name (NAME:CONFIG:SPLIT) and the network, "
        "unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE where they are set, or give a local file with --text"
    )

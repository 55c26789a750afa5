"""A model's files, fetched into the hub's cache: weights in safetensors and what lies beside them, nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from llmsurgeon.errors import SurgeryError

# Beside the weights, what companions.py may let go along. Code is fetched to be read, and run by nobody.
HUB_BESIDE = [
    *("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.spm", "*.codes", "*.bpe", "*.tokenizer"),
    *("tokenizer.model.*", "*.py"),
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
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
SNAPSHOT = re.compile(r".*/models--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def download(name: str, revision: str | None, patterns: list[str]) -> Path:
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


def repository_of(folder: Path) -> tuple[str, str] | None:
    """(hub id, commit) of a folder of the hub's cache, None for any other."""
    found = SNAPSHOT.fullmatch(folder.absolute().as_posix())
    return (found["name"].replace("--", "/"), found["revision"]) if found else None


def hub_has(hub_id: str, patterns: tuple[str, ...]) -> bool:
    """Whether a repository has files of these patterns; False where the hub does not say."""
    from huggingface_hub import HfApi

    try:
        return any(Path(file).match(p) for file in HfApi().list_repo_files(hub_id) for p in patterns)
    except Exception:  # the question only chooses between two messages
        return False

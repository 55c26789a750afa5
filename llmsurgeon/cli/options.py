"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from llmsurgeon.boundary.limits import LARGEST_SEED, LONGEST_SEQUENCE, MOST_ROUNDS, MOST_SEQUENCES, MOST_TOKENS
from llmsurgeon.checkpoint.checksums import ChecksumName
from llmsurgeon.errors import SurgeryError

TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let code run that a model's tokenizer brings along; read it first."),
]

ChecksumKind = Annotated[
    ChecksumName,
    typer.Option("--checksum", help="Of the written files: blake3, sha256 (slower; the hub's own kind) or none."),
]

OVERWRITE = "Replace OUT if it exists and holds nothing but what llmsurgeon wrote."
DEVICE = "auto (cuda where there is one, else cpu), cpu, cuda, cuda:1 ..."
DISCARD = "Delete what an unfinished run left in OUT.partial, be it of another job, and begin anew."


PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO", help="Push OUT to this repository of the hub, too; owner/name."),
]
Private = Annotated[bool, typer.Option("--private", help="With --push-to-hub: a repository that is made is private.")]


def target_of(repository: str | None, private: bool) -> Any:
    """What --push-to-hub and --private say.

    Raises:
        SurgeryError: --private alone.
    """
    from llmsurgeon.checkpoint.push import Target

    if private and not repository:
        raise SurgeryError("--private says how --push-to-hub makes a repository; give --push-to-hub REPO, too")
    return Target(repository, private) if repository else None


def whole(help: str, least: int = 1, most: int = MOST_TOKENS, **settings: Any) -> Any:
    """An option that takes a whole number from `least` to `most`; what is outside is refused before any work."""
    return typer.Option(help=help, min=least, max=most, **settings)


def tokens_option(help: str) -> Any:
    """An option that takes a number of tokens."""
    return whole(help, 1, MOST_TOKENS)


def length_option(help: str) -> Any:
    """An option that takes the length of a sequence."""
    return whole(help, 2, LONGEST_SEQUENCE)


def usable_device(name: str) -> str:
    """What --device names; one that this build of torch or this machine does not have is said before any work."""
    if name in ("auto", "cpu"):
        return name
    from llmsurgeon.formats.devices import chosen_device

    return chosen_device(name)


DTYPE_DEFAULT = "default: the checkpoint's; float32 on a CPU without bfloat16."
Dtype = Annotated[str | None, typer.Option(help=f"float32, bfloat16 or float16; {DTYPE_DEFAULT}")]
Seed = Annotated[int, whole("Seed of sampled calibration text.", 0, LARGEST_SEED)]
Batch = Annotated[int, whole("Sequences that go through a layer together.", 1, MOST_SEQUENCES)]
Rounds = Annotated[int, whole("Timed rounds, after one to warm up.", 1, MOST_ROUNDS)]


def short_name(model: str) -> str:
    """The last part of a hub id or path, for names of output folders."""
    return Path(model).stem if model.endswith(".gguf") else Path(model).name


def text_file(name: str | None) -> str | None:
    """What --text names; a file that is not there, or of another kind, is said before anything heavy is imported."""
    from llmsurgeon.text.files import named_text

    return named_text(name)


def text_files(names: list[str] | None) -> list[str] | None:
    """What --texts names, as `text_file`."""
    for name in names or ():
        text_file(name)
    return names


SelfShare = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=0.95,
        help="Share that the model writes beside --text or --dataset, of all kinds; default: the recipe's, else "
        "a quarter (of encoders nothing).",
    ),
]


def recipe_paths(recipe: str | None) -> tuple[Path, ...]:
    """The file that --recipe names, or the one of a built-in recipe, which the run reads."""
    from llmsurgeon.recipe.files import find_recipe

    return (find_recipe(recipe),) if recipe else ()


def split(text: str) -> list[Any]:
    """A list of layers as it is given on the command line: `4,7-9` as [4, "7-9"]."""
    return [int(part) if re.fullmatch(r"\s*[0-9]{1,18}\s*", part) else part.strip() for part in text.split(",")]

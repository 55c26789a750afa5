"""A result pushed to a repository of the hub: asked for before the work, sent once OUT is there.

huggingface_hub carries the bytes. A weight file that the hub has already is not sent again, so a push that broke off
goes on by being sent anew: by itself a few times, later by the command that the error names. OUT stays in any case.
"""

from __future__ import annotations

import re
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmsurgeon import __version__
from llmsurgeon.boundary.foreign import first_lines, shortened
from llmsurgeon.checkpoint.checksums import MANIFESTS
from llmsurgeon.checkpoint.manifest import own_manifest, read_manifest
from llmsurgeon.errors import SurgeryError
from llmsurgeon.progress import Progress, remark

if TYPE_CHECKING:
    from collections.abc import Iterator

    from huggingface_hub import HfApi

T = TypeVar("T")
WAITS = (1.0, 5.0, 20.0, 60.0)  # seconds before each further try to send
SHORT_WAITS = (1.0, 4.0)  # and to ask, while somebody waits for the work to begin
HEAVY = (".safetensors", ".gguf")  # sent one by one, before the commit that names them
WEIGHTS = (*HEAVY, ".bin", ".pt", ".pth")
REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]+")
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Target:
    """Where a result is to be pushed: owner/name, or a name of the user's own; `private`: seen by its owner alone."""

    repository: str
    private: bool = False


@dataclass(frozen=True)
class Repository:
    """A repository of the hub that is there and may be written to.

    old: files of it that an earlier push of this tool wrote, which go where the new result has no such file.
    readme: whether it has a card.
    """

    name: str
    old: tuple[str, ...] = ()
    readme: bool = False

    def command(self, out: Path) -> str:
        """The command that pushes, too."""
        return f"hf upload {shlex.quote(self.name)} {shlex.quote(str(out))}"

    def send(self, out: Path, extra: dict[str, bytes] | None = None) -> str:
        """Push a folder, or a file and what belongs beside it (`extra`: name -> content); return the address.

        Raises:
            SurgeryError: the hub cannot be reached, or refuses; `out` is left as it is.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        go_on = self.command(out)
        api, files = HfApi(), _files(out)
        made = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        made += [CommitOperationAdd(name, content) for name, content in (extra or {}).items()]
        gone = [CommitOperationDelete(name) for name in self.old if name not in files]
        remark(f"pushing {out} to {self.name}; should this stop, `{go_on}` goes on")
        sizes = {name: path.stat().st_size for name, path in files.items()}
        try:
            with _quietly(), Progress(f"push to {self.name}", sum(sizes.values()), "bytes") as progress:
                for operation in made:
                    if operation.path_in_repo.endswith(HEAVY):
                        _persistently(partial(api.preupload_lfs_files, self.name, [operation]), WAITS)
                        progress.advance(sizes[operation.path_in_repo])
                message = f"Upload by llmsurgeon {__version__}"
                done = _persistently(
                    lambda: api.create_commit(self.name, [*made, *gone], commit_message=message), WAITS
                )
        except Exception as error:  # the transport's own errors change with the version of huggingface_hub
            raise SurgeryError(
                f"{out} is written, and whole; it could not be pushed to {self.name} ({_reason(error)}). Go on with: "
                f"{go_on}"
            ) from error
        return str(done.repo_url)


def prepare(target: Target | None, single_file: bool = False) -> Repository | None:
    """The repository that a result is to be pushed to, made where there is none; None where none is asked for.

    Whoever may not write there is told before any work. single_file: it goes beside what is there.

    Raises:
        SurgeryError: a name that cannot be, no token, one that may not write there, or a repository with a model that
            this tool did not write.
    """
    if target is None:
        return None
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = target.repository
    try:
        if not REPOSITORY.fullmatch(name):
            raise HFValidationError("letters, digits, -, _ and . only")
        validate_repo_id(name)
    except HFValidationError as error:
        reason = first_lines(error)
        raise SurgeryError(
            f"--push-to-hub {shortened(name)}: not the name of a repository ({reason}); give owner/name"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise SurgeryError(f"--push-to-hub {name}: HF_HUB_OFFLINE is set; unset it, or leave --push-to-hub out")
    api = HfApi()
    owner = _user(api, name)
    name = name if "/" in name else f"{owner}/{name}"
    with _told(name):
        return _existing(api, name, target.private, single_file) or _made(api, name, target.private)


def _user(api: HfApi, name: str) -> str:
    """Whose token it is that is used."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        known = _persistently(api.whoami, SHORT_WAITS)
    except LocalTokenNotFoundError as error:
        raise SurgeryError(f"--push-to-hub {name}: there is no token for the hub; {LOGIN}") from error
    except Exception as error:
        if _status(error) == 401:
            raise SurgeryError(f"--push-to-hub {name}: the hub does not know this token; {LOGIN}") from error
        raise SurgeryError(f"--push-to-hub {name}: the hub cannot be asked ({_reason(error)})") from error
    token = known.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise SurgeryError(f"--push-to-hub {name}: this token of {known['name']} may only read; {LOGIN}")
    return str(known["name"])


def _existing(api: HfApi, name: str, private: bool, single_file: bool) -> Repository | None:
    """The repository where it is there, and may be written to; None where it is not there."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        known = _persistently(lambda: api.model_info(name), SHORT_WAITS)
    except RepositoryNotFoundError:
        return None
    if private and not known.private:
        raise SurgeryError(
            f"--push-to-hub {name} --private: this repository is there, and public; make it private in its "
            "settings, or choose another name"
        )
    _persistently(lambda: api.auth_check(name, write=True), SHORT_WAITS)
    files = [entry.rfilename for entry in known.siblings or ()]
    readme = "README.md" in files
    if single_file:
        return Repository(name, readme=readme)
    old = _ours(api, name, [file for file in files if file in MANIFESTS])
    if not old and any(file.endswith(WEIGHTS) for file in files):
        raise SurgeryError(
            f"--push-to-hub {name}: holds a model that llmsurgeon did not write, which stays; choose another name"
        )
    return Repository(name, tuple(file for file in old if file in files), readme)


def _ours(api: HfApi, name: str, manifests: Sequence[str]) -> tuple[str, ...]:
    """The files that this tool pushed, by the manifest of them that it pushed along."""
    with tempfile.TemporaryDirectory() as folder:
        for manifest in manifests:
            api.hf_hub_download(name, manifest, local_dir=folder)
        found = own_manifest(Path(folder))
        return (*read_manifest(found), found.name) if found else ()


def _made(api: HfApi, name: str, private: bool) -> Repository:
    made = _persistently(lambda: api.create_repo(name, private=private or None, exist_ok=True), SHORT_WAITS)
    return Repository(made.repo_id)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What the hub refuses, as a sentence."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        if _status(error) in (401, 403):
            owner = name.partition("/")[0]
            raise SurgeryError(
                f"--push-to-hub {name}: this token may not write there; use one that may, or a name of an owner other "
                f"than {owner}"
            ) from error
        raise SurgeryError(f"--push-to-hub {name}: the hub cannot be asked ({_reason(error)})") from error


def _files(out: Path) -> dict[str, Path]:
    """What is pushed: of a folder what its manifest names, and the manifest."""
    if out.is_file():
        return {out.name: out}
    manifest = own_manifest(out)
    assert manifest, f"{out} was just written"
    return {name: out / name for name in (*read_manifest(manifest), manifest.name)}


def _persistently(act: Callable[[], T], waits: Sequence[float]) -> T:
    """What `act` gives, tried again where the hub or the line to it fails, and not where the hub refuses."""
    for wait in waits:
        try:
            return act()
        except Exception as error:
            if _lasting(error):
                raise
            time.sleep(wait)
    return act()


def _lasting(error: Exception) -> bool:
    """Whether trying again leads nowhere: a refusal, or no failure of the transport at all."""
    status = _status(error)
    if status is None:
        return isinstance(error, ValueError | TypeError) or type(error).__name__ == "LocalTokenNotFoundError"
    return 400 <= status < 500 and status not in (408, 429)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, through those that were raised from it."""
    while error is not None:
        status: Any = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom."""
    while error.__cause__ is not None and not str(error.__cause__).isspace() and str(error.__cause__):
        error = error.__cause__
    return shortened(first_lines(error) or type(error).__name__)


@contextmanager
def _quietly() -> Iterator[None]:
    """huggingface_hub draws no bars of its own meanwhile."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()

"""Where foreign input comes in: text and JSON of files, and what libraries make of it.

What a stranger wrote can be anything. Here it is turned into plain values or into one CheckpointError that names the
file, what is wrong and what to do; behind this line errors are bugs and keep their traceback.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from llmsurgeon.errors import CheckpointError, SurgeryError

# Longer than every number that configs hold (a tokenizer's "no limit" has 31 digits), and short enough to be printed.
MAX_DIGITS = 40
MAX_DEPTH = 200
SHOWN = 80
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def local_path(name: str | os.PathLike[str]) -> Path:
    """The path that a user named, with ~ resolved; nothing need be there.

    Raises:
        SurgeryError: no path: empty, too long, not UTF-8, or in a folder that may not be looked into.
    """
    text = os.fspath(name)
    try:
        if not text or "\0" in text:
            raise ValueError("empty" if not text else "it holds a null byte")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            # Libraries take names as UTF-8, and cards, recipes and terminals hold them.
            raise ValueError("its name is not UTF-8")
        path = Path(text).expanduser()
        path.exists()
    except (RuntimeError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or first_lines(error)
        raise SurgeryError(f"{shortened(text)!r} cannot be used as a path ({reason}); name another one") from error
    return path


def read_text(path: Path) -> str:
    """The text of a file of a checkpoint, which is UTF-8; a byte order mark is left out.

    Raises:
        CheckpointError: missing, not a plain file, unreadable, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: expected a file, this is a folder or a device; replace it")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; a checkpoint folder has a {path.name}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_lines(error)
        raise CheckpointError(f"{path}: cannot be read as UTF-8 text ({reason}); download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Errors as in `read_text` and `parsed_json`."""
    return json_object(read_text(path), str(path))


def json_object(text: str, where: str, **hooks: Any) -> dict[str, Any]:
    """The JSON object that `text` is. Errors as in `parsed_json`, and where it is another value."""
    made = parsed_json(text, where, **hooks)
    if not isinstance(made, dict):
        raise CheckpointError(f"{where}: not a JSON object but {kind_of(made)}; download it again")
    return made


def parsed_json(text: str, where: str, **hooks: Any) -> Any:
    """The value that a JSON text stands for; `where` names it in messages, `hooks` go to json.loads.

    Raises:
        CheckpointError: not JSON, nested too deep, a number of too many digits, half of a UTF-16 pair in a string.
    """
    try:
        made = json.loads(text, parse_int=_whole_number, **hooks)
        if LONE_SURROGATE.search(text):
            json.dumps(made, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise CheckpointError(f"{where}: not JSON (nested too deep); download it again") from error
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: a string in it is no Unicode text (half of a pair); write it anew") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON ({first_lines(error)}); download it again") from error
    if _too_deep(made):
        raise CheckpointError(
            f"{where}: expected plain JSON, this is nested deeper than {MAX_DEPTH} levels; download it again"
        )
    return made


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits.lstrip('-')):,} digits, expected at most {MAX_DIGITS}")
    return int(digits)


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for node in level
            if isinstance(node, dict | list)
            for inner in (node.values() if isinstance(node, dict) else node)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


@contextmanager
def foreign(where: str, what: str, then: str) -> Iterator[None]:
    """Turn whatever a library raises on a stranger's input into one CheckpointError. Keep own code out of the block.

    where: the file or model; what: what could not be done with it; then: what to do next.
    """
    try:
        yield
    except (SurgeryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except Exception as error:
        _convert(error, where, what, then)
    except BaseException as error:
        # What Rust code panics with comes as one of these.
        if type(error).__name__ != "PanicException":
            raise
        _convert(error, where, what, then)


def token_ids(tokenizer: Callable[..., Any], text: str | list[str], **settings: Any) -> Any:
    """What a tokenizer makes of a text, or of each of a list.

    Raises:
        CheckpointError: it cannot read the text, as one without a token for what it does not know.
    """
    name = str(getattr(tokenizer, "name_or_path", "") or "the model")
    with foreign(name, "its tokenizer cannot read the text", "take the tokenizer of the model that it was made from"):
        return tokenizer(text, **settings)["input_ids"]


def check_token_ids(lowest: int, highest: int, vocab: int, where: str) -> None:
    """Raise SurgeryError where a text's token ids are not all among the `vocab` rows of a model's embedding."""
    if lowest < 0 or highest >= vocab:
        raise SurgeryError(
            f"{where}: token ids from {lowest} to {highest}, its vocabulary has {vocab}: the text must be tokenised "
            "with this model's own tokenizer, and tokens that were added to that need rows in the embedding "
            "(model.resize_token_embeddings)"
        )


def _convert(error: BaseException, where: str, what: str, then: str) -> NoReturn:
    raise CheckpointError(f"{where}: {what} ({first_lines(error)}); {then}") from error


def first_lines(error: BaseException, limit: int = 300) -> str:
    """What an error says, in one line of at most `limit` characters; its type where that alone would tell nothing."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, MemoryError):
        return "it would need more memory than there is"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = shortened(" ".join(lines[:3]), limit)
    name = type(error).__name__
    return (
        f"{name}: {said}" if said and (isinstance(error, KeyError | AttributeError) or len(said) < 20) else said or name
    )


def shortened(value: object, limit: int = SHOWN) -> str:
    """A value as messages show it: at most `limit` characters."""
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def printable(text: str) -> str:
    """A text that no terminal obeys: controls, what turns the direction of writing, and half characters as escapes."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def kind_of(value: object) -> str:
    """What a JSON value is, in words, with the value where it is short."""
    names = {dict: "an object", list: "a list", str: "the text", bool: "", int: "the number", float: "the number"}
    if value is None:
        return "null"
    if isinstance(value, dict | list):
        return names[type(value)]
    return f"{names.get(type(value), '')} {shortened(repr(value) if isinstance(value, str) else value)}".strip()

"""Text that a user names: what each kind of file is, and its documents. Nothing is taken for prose by default."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from llmsurgeon.boundary.foreign import local_path
from llmsurgeon.checkpoint.files import Stamp, content_sum, opened, refuse_special
from llmsurgeon.errors import SurgeryError
from llmsurgeon.progress import remark

# Suffix -> kind of file; a file without a suffix is text, too.
KINDS = {"": "text", ".txt": "text", ".text": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
EXPECTED = 'expected .txt (UTF-8), .jsonl (an object with "text" on each line) or .parquet (a column "text")'
HINTS = {
    ".json": "where it has one object a line, call it .jsonl",
    ".ndjson": "call it .jsonl",
    **dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".zip"), "unpack it first"),
}
BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# utf-8-sig is UTF-8 without the mark that some editors put before it.
ENCODING = "utf-8-sig"


class TextFileError(SurgeryError, ValueError):
    """Not a kind of file that is read as text. Also a ValueError, so pydantic reports it at the recipe's line."""


def kind_of(name: str | Path) -> str:
    """What a text file holds, by its suffix in whatever case: "text", "jsonl" or "parquet".

    Raises:
        TextFileError: another suffix; the message says what to do with it.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in KINDS:
        hint = HINTS.get(suffix, "where it is plain text to be read as it stands, call it .txt")
        raise TextFileError(f"{name}: {suffix} files are not read as text: {EXPECTED}; {hint}")
    return KINDS[suffix]


def _of_a_kind(name: str) -> str:
    kind_of(name)
    return name


# The type of a recipe's field that names a text file.
TextFile = Annotated[str, AfterValidator(_of_a_kind)]


def named_text(name: str | os.PathLike[str] | None) -> str | None:
    """The name of a text file that is there and of a kind that is read; None for none.

    Raises:
        SurgeryError: it is not there, or of another kind.
    """
    if name is not None:
        check_text_file(os.fspath(name))
    return None if name is None else os.fspath(name)


def check_text_file(name: str) -> str:
    """The kind of text in a file, as `kind_of` gives it; the file must be there."""
    path = local_path(name)
    refuse_special([path])
    if not path.is_file():
        raise SurgeryError(f"{name}: no such text file")
    return kind_of(name)


def file_documents(name: str) -> Iterator[Iterable[str]]:
    """The documents of a file (plain text is one), each as pieces that follow one another, read as they are asked for.

    Rows whose text is null are left out, and how many there were is said; so are empty ones, of which nothing is said.

    Raises:
        SurgeryError: no such file, a suffix that is none of ours, not UTF-8, or rows without "text".
    """
    path = Path(name)
    kind = check_text_file(name)
    with _readable(path):
        if kind == "text":
            yield _pieces(path)
        else:
            rows = _json_lines(path) if kind == "jsonl" else _parquet(path)
            yield from ((text,) for text in texts_of(rows, name))


def file_text(name: str) -> str:
    """The whole text of a file, its documents joined by blank lines."""
    return "\n\n".join("".join(pieces) for pieces in file_documents(name))


Row = tuple[Callable[[], str], dict[str, Any]]


def texts_of(rows: Iterable[Row], name: str) -> Iterator[str]:
    """The text of each row that has any; rows are (where the row is, for messages; its columns)."""
    nulls = seen = 0
    try:
        for where, row in rows:
            if "text" not in row:
                raise SurgeryError(f'{where()}: no "text" in it; it has {", ".join(map(str, row)) or "nothing"}')
            text = row["text"]
            seen += 1
            if text is None:
                nulls += 1
            elif not isinstance(text, str):
                raise SurgeryError(f'{where()}: "text" is {type(text).__name__}, expected a string')
            elif text.strip():
                yield text
    finally:
        if nulls:
            remark(f'{name}: {nulls:,} of {seen:,} rows have no text (null under "text") and are left out')


def text_sum(name: str | Path) -> str:
    """The SHA-256 of a text file."""
    return stamped_sum(Path(name))[0]


def stamped_sum(path: Path) -> tuple[str, Stamp]:
    """(the SHA-256 of a text file, the stamp of what was read).

    Raises:
        SurgeryError: no such file, it cannot be read, or it changed meanwhile.
    """
    check_text_file(str(path))
    with _readable(path):
        return content_sum(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what can be wrong with a text file into a SurgeryError; that it changed meanwhile, too."""
    try:
        with opened(path) as file:
            stamp = Stamp.of(path, file.fileno())
            mark = BYTE_ORDER_MARKS.get(file.read(2))
        if mark:
            raise SurgeryError(f"{path}: {mark} text; convert it: iconv -f {mark} -t UTF-8 {path.name} > converted.txt")
        yield
        stamp.check()
    except UnicodeDecodeError as error:
        raise SurgeryError(f"{path}: not UTF-8 text (byte {error.start}); {EXPECTED}, convert it first") from error
    except OSError as error:
        raise SurgeryError(f"{path}: cannot be read: {error.strerror or error}") from error


def _pieces(path: Path, characters: int = 1 << 20) -> Iterator[str]:
    """The text of a file, cut at ends of lines."""
    with _readable(path), path.open(encoding=ENCODING) as file:
        while lines := file.readlines(characters):
            piece = "".join(lines)
            if "\0" in piece:
                raise SurgeryError(f"{path}: holds NUL characters, so it is no UTF-8 text (UTF-16, or binary?)")
            yield piece


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding=ENCODING) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = partial("{}, line {}".format, path, number)
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SurgeryError(f'{where()}: expected a JSON object with a string under "text" ({error})') from error
            if not isinstance(row, dict):
                found = type(row).__name__
                raise SurgeryError(f'{where()}: expected a JSON object with a string under "text", found {found}')
            yield where, row


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "text" not in columns:
                raise SurgeryError(f'{path}: no column "text"; it has {", ".join(columns) or "none"}')
            texts = (text for batch in file.iter_batches(columns=["text"]) for text in batch.column(0).to_pylist())
            for number, text in enumerate(texts):
                yield partial("{}, row {}".format, path, number), {"text": text}
    except ArrowException as error:
        first = str(error).strip().partition("\n")[0]
        raise SurgeryError(f"{path}: cannot be read as parquet: {first}; is it whole?") from error

"""Recipe files: where they are, and their YAML as plain data that remembers the line of every key.

Knows no recipe keys and imports neither pydantic nor torch, so listing recipes is instant.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from llmsurgeon.boundary.foreign import local_path
from llmsurgeon.errors import RecipeError

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1_000_000
# Aliases can multiply: ten levels of ten references are 10^10 nodes.
MAX_NODES = 100_000

# YAML 1.2's plain scalars. PyYAML's own (YAML 1.1) read 1e-2 as a string, 1:30 as 90, 010 as 8 and `no` as false.
_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2 scalars."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own attribute


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back unchanged."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML's own attribute


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"(?:{_pattern})$"), _first)


def _write_text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes Unicode's line separators bare, and reads them back as line breaks.
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


Dumper.add_representer(str, _write_text)


@dataclass
class Document:
    """A recipe file as plain data; `places` says where ("file:line") each key path was written."""

    name: str
    data: Any = None
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    reported: set[KeyPath] = field(default_factory=set)
    nodes: int = 0

    def where(self, path: KeyPath) -> str:
        """The place of `path`, or of the nearest key around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)

    def report(self, path: KeyPath, problem: str) -> None:
        """Note a problem at `path`."""
        key = key_name(path)
        self.reported.add(path)
        self.problems.append(f"{self.where(path)}: {key}: {problem}" if key else f"{self.where(path)}: {problem}")


def key_name(path: KeyPath) -> str:
    """`steps[1].runs` for ("steps", 1, "runs")."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def recipes_dir() -> Path:
    """The recipes that come with the package: installed data, or the repository's folder in a source checkout."""
    package = Path(str(resources.files("llmsurgeon")))
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def builtin_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package."""
    return {path.stem: path for path in sorted(recipes_dir().glob("*.yaml"))}


def find_recipe(name: str | Path) -> Path:
    """The file that `name` means: an existing file, else a built-in recipe with or without its .yaml.

    Raises:
        RecipeError: neither exists.
    """
    path, builtin = local_path(name), builtin_recipes()
    if path.is_file():
        return path
    if path.is_dir() and str(name) not in builtin:
        raise RecipeError([f"{name} is a folder; name the recipe file in it"])
    wanted = str(name).removesuffix(".yaml").removesuffix(".yml")
    if wanted in builtin:
        return builtin[wanted]
    if "/" in str(name):
        raise RecipeError([f"{name}: no such file"])
    hint = did_you_mean(wanted, builtin)
    raise RecipeError([f"no file and no built-in recipe {str(name)!r}{hint} (built in: {', '.join(builtin)})"])


def read_document(path: Path) -> Document:
    """Read a recipe file: errors as in `recipe_text`, and where it is not YAML (with the line)."""
    return parse_document(recipe_text(path), str(path))


def recipe_text(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: unreadable, not UTF-8, or larger than a megabyte.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError([f"{path}: cannot be read: {error.strerror}"]) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError([f"{path}: larger than {MAX_BYTES:,} bytes; is this a recipe?"])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError([f"{path}: not UTF-8 text; is this a recipe?"]) from None


def parse_document(text: str, name: str) -> Document:
    """The YAML in `text` as a Document; duplicate keys and the like are in its `problems`.

    Raises:
        RecipeError: not YAML.
    """
    document = Document(name)
    loader = Loader("")
    try:
        node = yaml.compose(text, Loader)
        if node is not None:
            document.data = _plain(node, (), document, loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError([f"{name}{line}: not valid YAML: {error.problem or error.context}"]) from None
    except yaml.YAMLError as error:
        reason = getattr(error, "reason", "") or str(error).splitlines()[0]
        raise RecipeError([f"{name}: not valid YAML: {reason}"]) from None
    except RecursionError:
        raise RecipeError([f"{name}: nested too deeply, or an alias refers to itself"]) from None
    finally:
        loader.dispose()
    return document


def _plain(node: yaml.Node, path: KeyPath, document: Document, loader: Loader) -> Any:
    """Strings, numbers, lists and dicts of a YAML node; notes places and problems on the way."""
    document.nodes += 1
    if document.nodes > MAX_NODES:
        raise RecipeError([f"{document.name}: more than {MAX_NODES:,} values; is this a recipe?"])
    document.places.setdefault(path, f"{document.name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _plain_mapping(node, path, document, loader)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_plain(child, (*path, index), document, loader) for index, child in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.tag in {"tag:yaml.org,2002:str", *(tag for tag, *_ in _RESOLVERS)}:
        try:
            return loader.construct_object(node)
        except ValueError:
            document.report(path, f"expected a value of type {node.tag.rpartition(':')[2]}, got {node.value!r}")
            return None
    document.report(path, f"the YAML tag {node.tag!r} is not allowed in a recipe")
    return None


def _plain_mapping(node: yaml.MappingNode, path: KeyPath, document: Document, loader: Loader) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = f"{document.name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(f"{line}: a key must be a word")
            continue
        key = str(key_node.value)
        here = (*path, key)
        if key in data:
            document.problems.append(f"{line}: {key_name(here)}: given twice, first at {document.places[here]}")
            continue
        document.places[here] = line
        data[key] = _plain(value_node, here, document, loader)
    return data


def override(document: Document, text: str, sections: Iterable[str]) -> None:
    """Apply one `--set`: `step.key=value`, `steps[2].key=value`, `section.key=value` or `key=value`.

    `sections` are the recipe's own keys. What cannot be applied is added to the document's problems.
    """
    place = f"--set {text}"
    match = re.fullmatch(r"(?:(\w+(?:\[\d+\])?)\.)?(\w+)=(.*)", text.strip(), re.DOTALL)
    if not match:
        document.problems.append(f"{place}: expected step.key=value, such as fuse_ffn.max_run=3")
        return
    target, key, raw = match.groups()
    try:
        path = _target(document, target, sections) if target else ()
        value = parse_document(raw, place).data
    except RecipeError as error:
        document.problems.extend(f"{place}: {problem.removeprefix(f'{place}: ')}" for problem in error.problems)
        return
    owner = document.data
    for part in path:
        if isinstance(owner, dict) and owner.get(part) is None:
            owner[part] = {}
        owner = owner[part]
    if not isinstance(owner, dict):
        document.problems.append(f"{place}: {target} is not a mapping of keys")
        return
    owner[key] = value
    here = (*path, key)
    document.places = {known: at for known, at in document.places.items() if known[: len(here)] != here}
    document.places[here] = place


def _target(document: Document, target: str, sections: Iterable[str]) -> KeyPath:
    """Key path of what stands before the dot of a `--set`.

    Raises:
        RecipeError: there is no such step, more than one, or no such section.
    """
    steps = document.data.get("steps")
    steps = steps if isinstance(steps, list) else []
    if match := re.fullmatch(r"steps\[(\d+)\]", target):
        if int(match[1]) >= len(steps):
            raise RecipeError([f"there is no {target}; the recipe has {len(steps)} steps, counted from steps[0]"])
        return ("steps", int(match[1]))
    if target in sections:
        return (target,)
    ops = [step.get("op") if isinstance(step, dict) else None for step in steps]
    found = [index for index, op in enumerate(ops) if op == target]
    if len(found) == 1:
        return ("steps", found[0])
    if found:
        choices = " or ".join(f"steps[{index}]" for index in found)
        raise RecipeError([f"{len(found)} steps are {target!r}; write {choices} instead"])
    known = [*(op for op in ops if isinstance(op, str)), *sections]
    raise RecipeError([f"the recipe has no step or section {target!r}{did_you_mean(target, known)}"])

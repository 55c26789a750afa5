"""What lies beside the weights and goes along: tokenizer, processor, chat templates, generation settings, pooling,
licence and notices.

An allow-list says what is copied. Code is not, unless `trust_remote_code` is given: then the modules that a tokenizer
or processor names go along with what they import. What is left out is said in `notes`.

File names: transformers 5.24 (`vocab_files_names` of its tokenizers, the constants of `transformers.utils`) and
sentence-transformers 5 (`modules.json`).
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from llmsurgeon.boundary.foreign import parsed_json
from llmsurgeon.checkpoint.inside import MAX_JSON, Unsafe, open_inside, text_inside
from llmsurgeon.errors import CheckpointError

TOKENIZER_CONFIG = "tokenizer_config.json"
# What a tokenizer is made from. Without the code that it asks for, none of it is copied: read by another class, the
# same files would cut text otherwise and nobody would notice.
TOKENIZER = re.compile(
    r"tokenizer(_config|\.[\w.-]+)?\.json|tekken\.json|special_tokens_map\.json|added_tokens\.json"
    r"|(vocab|vocab-src|vocab-tgt|target_vocab|entity_vocab|encoder|emoji|byte_maps|normalizer|word_shape"
    r"|word_pronunciation)\.json|(vocab|merges|dict)\.txt|bpe\.codes|(vocab\.bpe)"
    r"|[\w.-]+\.(model|spm|tiktoken|tokenizer)|tokenizer\.model\.[\w.-]+"
)
TEMPLATES = "additional_chat_templates"
CUSTOM_GENERATE = "custom_generate"
PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
OTHERS = ("chat_template.jinja", "chat_template.json", "generation_config.json")
# sentence-transformers: how an encoder's states are pooled. Each module is a class and a folder.
MODULES = "modules.json"
SENTENCE = re.compile(r"sentence_[\w-]+_config\.json|config_sentence_transformers\.json")
MODULE_CLASS = re.compile(r"sentence_transformers(\.\w+)+")
MODULE_FILE = re.compile(r"[\w.-]+\.(json|txt)|model\.safetensors|[\w.-]+\.model")
# The terms under which a model may be used, and what they ask to be passed on.
TERMS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-][\w.-]*)?", re.IGNORECASE)
# Files that a tokenizer's or processor's config names otherwise; never what this tool writes itself.
REFERRED = re.compile(r"[\w.-]+\.(json|txt|jinja|bpe|vocab)")
OURS = frozenset({"config.json", "model.safetensors.index.json", "surgery.json", "recipe.yaml"})
ASK = "--trust-remote-code"
NAMES_CODE = frozenset(
    {
        "auto_map",
        "custom_pipelines",
        # Of the form owner/name these are kernels on the hub, fetched and run without a question.
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
    }
)


@dataclass(frozen=True)
class Companion:
    """One file that goes along: its name in the output, its root, and its content where that was changed."""

    name: str
    root: Path
    content: bytes | None = None

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            CheckpointError: it is no regular file of its folder (any more), or cannot be read.
        """
        if self.content is not None:
            return self.content
        with open_inside(self.root, self.name) as file:
            return file.read()


@dataclass(frozen=True)
class Companions:
    """The files that go along, whose code is among them, and what is to be said of those that do not.

    needs_code: classes of its own that the tokenizer asks for; None where it asks for none, or is trusted.
    refused: names of what is no regular file of the checkpoint.
    """

    files: tuple[Companion, ...] = ()
    notes: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    needs_code: tuple[str, ...] | None = None
    refused: tuple[str, ...] = ()

    def check_tokenizer(self, name: str, folder: Path) -> None:
        """Raise CheckpointError where the tokenizer of `name` is not to be loaded from `folder`."""
        if self.needs_code:
            raise CheckpointError(
                f"{name}: its tokenizer needs code of its own ({_listed(list(self.needs_code))}), which was not run. "
                f"Read the .py files in {folder}; if you trust them, pass {ASK}"
            )
        refused = [file for file in self.refused if TOKENIZER.fullmatch(file)]
        if refused:
            raise CheckpointError(
                f"{name}: {_listed(refused)} is a link that leads out of the checkpoint, or no regular file; put the "
                "file itself there"
            )

    @property
    def paths(self) -> list[Path]:
        """Where they lie."""
        return sorted(companion.root / companion.name for companion in self.files)


@dataclass
class _Survey:
    folder: Path
    trusted: bool
    files: dict[str, bytes | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def take(self, name: str, content: bytes | None = None) -> bool:
        """Let a file go along if it is a regular file of this checkpoint."""
        try:
            with open_inside(self.folder, name):
                pass
        except FileNotFoundError:
            return False
        except Unsafe:
            self.refused.append(name)
            return False
        self.files[name] = content
        return True


def companions_of(folder: Path, trust_remote_code: bool = False) -> Companions:
    """What goes along with the weights in `folder`. Nothing of it is run, and nothing outside the folder is read.

    Raises:
        CheckpointError: a file that has to be looked into cannot be read.
    """
    survey = _Survey(folder, trust_remote_code)
    names = sorted(os.listdir(folder))
    needs_code = _tokenizer(survey, names)
    for name in names:
        if name in (*PROCESSORS, *OTHERS) or TERMS.fullmatch(name):
            survey.take(name)
    if TEMPLATES in names:
        _templates(survey)
    if CUSTOM_GENERATE in names:
        survey.notes.append(f"not copied: {CUSTOM_GENERATE}, code that generates in the parent's own way")
    _processors(survey)
    _sentence_modules(survey, names)
    if survey.refused:
        survey.notes.append(
            f"not copied: {_listed(survey.refused)}, which is a link out of the checkpoint or no regular file"
        )
    if survey.code:
        survey.notes.append(
            f"copied along, because {ASK} was given: {_listed(survey.code)}, code of the parent's authors that runs "
            "for whoever loads the result with trust_remote_code=True"
        )
    files = tuple(Companion(name, folder, content) for name, content in sorted(survey.files.items()))
    return Companions(files, tuple(survey.notes), tuple(survey.code), needs_code, tuple(survey.refused))


def _tokenizer(survey: _Survey, names: list[str]) -> tuple[str, ...] | None:
    """Take the tokenizer's files; return the code that it asks for and that is not trusted."""
    config = _json(survey, TOKENIZER_CONFIG) if TOKENIZER_CONFIG in names else {}
    asked = _references(config)
    if asked and not survey.trusted:
        survey.notes.append(
            f"not copied: the tokenizer, which needs code of its own ({_listed(asked)}); {ASK} lets that code run and "
            "copies both"
        )
        return tuple(asked)
    for name in names:
        if TOKENIZER.fullmatch(name):
            survey.take(name)
    _referred(survey, config, names)
    _take_code(survey, asked)
    return None


def _processors(survey: _Survey) -> None:
    """Without trust, take the code that image and audio processors name out of their configs."""
    for name in PROCESSORS:
        if name not in survey.files:
            continue
        config = _json(survey, name)
        _referred(survey, config, os.listdir(survey.folder))
        asked = _references(config)
        if asked and survey.trusted:
            _take_code(survey, asked)
        elif asked:
            survey.files[name] = (json.dumps(without_code(config), indent=2) + "\n").encode()
            survey.notes.append(
                f"not copied: {_listed(asked)}, code that {name} asks for; without it what transformers has itself "
                f"reads that file. {ASK} copies it"
            )


def _templates(survey: _Survey) -> None:
    folder = survey.folder / TEMPLATES
    if folder.is_symlink() or not folder.is_dir():
        survey.refused.append(TEMPLATES)
        return
    for name in sorted(os.listdir(folder)):
        if name.endswith(".jinja"):
            survey.take(f"{TEMPLATES}/{name}")


def _sentence_modules(survey: _Survey, names: list[str]) -> None:
    """Take what sentence-transformers adds: all of it or nothing, since half a pipeline embeds otherwise."""
    if MODULES in names:
        listed = _json_value(survey, MODULES)
        modules = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        foreign = [str(m.get("type")) for m in modules if not MODULE_CLASS.fullmatch(str(m.get("type")))]
        if foreign and not survey.trusted:
            survey.notes.append(
                f"not copied: {MODULES} and its folders, which need code of their own ({_listed(foreign)}); {ASK} "
                "copies both"
            )
            return
        if not survey.take(MODULES):
            return
        _take_code(survey, foreign)
        for module in modules:
            path = str(module.get("path") or "")
            if path and PurePosixPath(path).name == path:
                _module_folder(survey, path)
            elif path:
                survey.notes.append(f"not copied: {path}, which {MODULES} names: no folder of the checkpoint")
    for name in names:
        if SENTENCE.fullmatch(name):
            survey.take(name)


def _module_folder(survey: _Survey, name: str) -> None:
    folder = survey.folder / name
    if folder.is_symlink():
        survey.refused.append(name)
    elif folder.is_dir():
        for inside in sorted(os.listdir(folder)):
            if MODULE_FILE.fullmatch(inside):
                survey.take(f"{name}/{inside}")
            else:
                survey.notes.append(f"not copied: {name}/{inside}")


def _referred(survey: _Survey, config: Mapping[str, Any], names: list[str]) -> None:
    """Take files of the folder that a config names as values, such as a vocabulary under a name of its own."""
    for value in _strings(config):
        if value in names and REFERRED.fullmatch(value) and value not in survey.files and value not in OURS:
            survey.take(value)


def _references(config: Any) -> list[str]:
    """The classes that every `auto_map` in a config names, as file.Class, or repository--file.Class."""
    found: list[str] = []
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "auto_map":
                found += _strings(value)
            else:
                found += _references(value)
    elif isinstance(config, list):
        for value in config:
            found += _references(value)
    return list(dict.fromkeys(found))


def without_code(config: Any) -> Any:
    """A config without what names code: `auto_map`, `custom_pipelines`, and kernels to fetch from the hub."""
    if isinstance(config, dict):
        return {key: without_code(value) for key, value in config.items() if key not in NAMES_CODE}
    return [without_code(value) for value in config] if isinstance(config, list) else config


def _take_code(survey: _Survey, references: list[str]) -> None:
    """Take the modules that hold these classes, and those of the same checkpoint that they import."""
    waiting = [
        reference.rpartition(".")[0].replace(".", "/") + ".py" for reference in references if "--" not in reference
    ]
    for reference in references:
        if "--" in reference:
            survey.notes.append(f"{reference}: code in another repository, which transformers fetches from the hub")
    while waiting:
        name = waiting.pop()
        if name in survey.files:
            continue
        if not survey.take(name):
            if name not in survey.refused:
                survey.notes.append(f"not copied: {name}, which the tokenizer or processor names: not there")
            continue
        survey.code.append(name)
        waiting += _imported(survey, name)


def _imported(survey: _Survey, name: str) -> list[str]:
    """The modules of the same folder that a module imports relatively."""
    with open_inside(survey.folder, name) as file:
        source = file.read(MAX_JSON)
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found = []
    base = PurePosixPath(name).parent
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(base / (module.replace(".", "/") + ".py")).as_posix() for module in modules]
    return found


def _json(survey: _Survey, name: str) -> dict[str, Any]:
    value = _json_value(survey, name)
    return value if isinstance(value, dict) else {}


def _json_value(survey: _Survey, name: str) -> Any:
    try:
        return parsed_json(text_inside(survey.folder, name), str(survey.folder / name))
    except Unsafe:
        return None  # said where it is refused
    except OSError as error:
        raise CheckpointError(
            f"{survey.folder / name}: cannot be read ({error.strerror}); download it again"
        ) from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inside in value.values():
            yield from _strings(inside)
    elif isinstance(value, list):
        for inside in value:
            yield from _strings(inside)


def _listed(names: list[str]) -> str:
    shown = list(dict.fromkeys(names))
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")

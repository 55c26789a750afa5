"""surgeon: any model, each block spelled out in block_configs, with the code that computes it in the checkpoint.

A model_type of its own: stock transformers refuses such a config before a weight is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from llmsurgeon.errors import SurgeryError
from llmsurgeon.formats.form import Body, CheckpointForm, modeling_files
from llmsurgeon.model.block_transformer import to_block_transformer
from llmsurgeon.model.families import SURGEON_PREFIX, Family, family_of
from llmsurgeon.model.parts import ATTENTIONS, FFNS, Part
from llmsurgeon.model.spec import ModelSpec, to_block_configs

LOADS = (
    "Its code ships in the checkpoint: read its .py files, then load with trust_remote_code=True in transformers. A "
    "load that does not run that code refuses."
)
# surgeon_blocks.py and what it imports.
BLOCKS = (
    *("surgeon_blocks.py", "surgeon_fff.py", "surgeon_fff_numba.py", "surgeon_fff_triton.py"),
    *("surgeon_mlgru.py", "surgeon_mlgru_triton.py", "surgeon_versions.py"),
)
BLOCK_TRANSFORMER = ("surgeon_block_transformer.py",)


# Its tables of parts, each with ours: what a `kind` is in the code and in the description.
TABLES: tuple[tuple[str, Mapping[str, type[Part]]], ...] = (("ATTENTIONS", ATTENTIONS), ("FFNS", FFNS))


def is_surgeon(config: Mapping[str, Any]) -> bool:
    """True for the config of a checkpoint in the surgeon form."""
    return str(config.get("model_type", "")).startswith(SURGEON_PREFIX)


def as_surgeon(config: Mapping[str, Any]) -> dict[str, Any]:
    """The (normalised) config of the same model in the surgeon form, each block spelled out."""
    if is_surgeon(config):
        return dict(config)
    family = family_of(config)
    blocks = to_block_configs(family.describe(config))
    return {**config, "model_type": SURGEON_PREFIX + family.model_type, "block_configs": blocks}


def modeling_file(family: Family, block_transformer: bool = False) -> str:
    """Name of the modeling file of `family`, or of its block transformers, that ships inside checkpoints."""
    return f"modeling_{'block' if block_transformer else 'surgeon'}_{family.model_type}"


def surgeon_module(family: Family, block_transformer: bool = False) -> Any:
    """That file, imported from this package."""
    return importlib.import_module(f"llmsurgeon.modeling.{modeling_file(family, block_transformer)}")


def surgeon_classes(family: Family, block_transformer: bool = False) -> tuple[type, type]:
    """(config class, model class) of the surgeon form for `family`, or for its block transformers."""
    module = surgeon_module(family, block_transformer)
    config_class = next(
        c for c in vars(module).values() if isinstance(c, type) and getattr(c, "model_type", "").startswith("surgeon_")
    )
    return config_class, offered(module)[family.auto_class]


def offered(module: ModuleType) -> dict[str, type]:
    """Auto class -> the class that it finds, of those that a modeling file offers."""
    own = (made for made in vars(module).values() if isinstance(made, type) and made.__module__ == module.__name__)
    return {vars(made)["_auto_class"]: made for made in own if vars(made).get("_auto_class")}


def classes_for(raw: Mapping[str, Any], family: Family) -> tuple[type, type]:
    """(config class, model class) of a config.json in the surgeon form.

    Raises:
        SurgeryError: it is a block transformer, and its family has none.
    """
    register_parts()
    if not raw.get("block_transformer"):
        return surgeon_classes(family)
    if reason := family.no_block_form():
        raise SurgeryError(f"config.json: block_transformer in a {family.model_type} model: {reason}")
    return surgeon_classes(family, True)


def parts_with_code() -> dict[str, tuple[str, Path]]:
    """kind -> (its table in surgeon_blocks.py, its file), of those parts that bring the code of their forward."""
    return {kind: (name, part.code) for name, table in TABLES for kind, part in table.items() if part.code}


def register_parts() -> None:
    """Let this package's surgeon_blocks.py know the forward of parts that bring their own."""
    blocks = importlib.import_module("llmsurgeon.modeling.surgeon_blocks")
    for kind, (table, path) in parts_with_code().items():
        if kind not in getattr(blocks, table):
            getattr(blocks, table)[kind] = _loaded(path).install


def _loaded(path: Path) -> ModuleType:
    spec = spec_from_file_location(f"llmsurgeon.modeling.{path.stem}", path)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def registering(parts: Mapping[str, Path]) -> str:
    """The lines at the end of a checkpoint's surgeon_blocks.py that let it know these parts, kind -> file."""
    tables = {kind: table for kind, (table, _) in parts_with_code().items()}
    rows = (
        f"from .{path.stem} import install as _{kind}  # noqa: E402\n\n{tables[kind]}[{kind!r}] = _{kind}\n"
        for kind, path in sorted(parts.items())
    )
    return "".join(f"\n{row}" for row in rows)


def auto_map(family: Family, block_transformer: bool = False) -> dict[str, str]:
    """What config.json says of the classes that the modeling file offers."""
    module = surgeon_module(family, block_transformer)
    name = modeling_file(family, block_transformer)
    return {auto: f"{name}.{made.__name__}" for auto, made in offered(module).items()}


def describe(spec: ModelSpec, family: Family, config: Mapping[str, Any]) -> Body:
    """The model in this form; `config` is the (cut) source's."""
    block_transformer = spec.block_transformer
    config_class, model_class = surgeon_classes(family, block_transformer is not None)
    module = modeling_file(family, block_transformer is not None)
    made = {
        **config,
        "model_type": SURGEON_PREFIX + family.model_type,
        "architectures": [model_class.__name__],
        # A body serves several tasks: each Auto class finds its own, as with the stock model.
        "auto_map": auto_map(family, block_transformer is not None),
        "block_configs": to_block_configs(spec),
        **({"block_transformer": to_block_transformer(block_transformer)} if block_transformer else {}),
    }
    made = config_class.spelled_for_file(made)  # type: ignore[attr-defined]
    code = modeling_files((*BLOCKS, *(BLOCK_TRANSFORMER if block_transformer else ()), f"{module}.py"))
    parts = {part.kind: part.code for layer in spec.layers for part in layer.all_parts if part.code}
    return Body(made, spec, LOADS, (*code, *parts.values()), parts, alone=True)


SURGEON = CheckpointForm(
    name="surgeon",
    misfit=lambda spec, family, config: None,
    unwanted=lambda spec, family, config: None,
    describe=describe,
    recognises=is_surgeon,
    ships_code=True,
    towers=True,
)

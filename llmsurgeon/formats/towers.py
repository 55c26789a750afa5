"""The text tower of a vision-language checkpoint: read as the text model that it is, written back into its place.

Everything else of the file keeps its name and its bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from llmsurgeon.checkpoint.companions import without_code
from llmsurgeon.checkpoint.transform import TransformedWeights, rename
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.formats.form import Written, modeling_files
from llmsurgeon.formats.forms import CHECKPOINTS, forms_of_towers
from llmsurgeon.formats.names import WantedForm
from llmsurgeon.formats.write import write_config
from llmsurgeon.model.families import SURGEON_PREFIX, Family
from llmsurgeon.model.families.vision_language import VISION_LANGUAGE, VisionLanguage, vision_language_of
from llmsurgeon.model.spec import ModelSpec

TOWER_FILE = "surgeon_llama_tower.py"


@dataclass(frozen=True)
class Tower:
    """The text tower inside one checkpoint.

    raw: its whole config.json.
    names: (prefix in the file, prefix in the text model) of the tower's tensors.
    beside: names of all other tensors.
    """

    declared: VisionLanguage
    raw: dict[str, Any]
    names: tuple[tuple[str, str], ...]
    beside: frozenset[str] = frozenset()

    @property
    def text(self) -> dict[str, Any]:
        """config.json of the text model by itself."""
        return text_config(self.raw)

    def inner(self, weights: Mapping[str, Tensor]) -> TransformedWeights:
        """The file's tensors with the tower's under the names of the text model by itself."""
        found = {name: _swapped(name, self.names) for name in weights if name not in self.beside}
        return TransformedWeights(weights, [rename(name, target) for name, target in found.items() if name != target])

    def outer(self, weights: Mapping[str, Tensor]) -> TransformedWeights:
        """The inverse of `inner`."""
        back = tuple((inside, outside) for outside, inside in self.names)
        found = {name: _swapped(name, back) for name in weights if name not in self.beside}
        return TransformedWeights(weights, [rename(name, target) for name, target in found.items() if name != target])

    def write(self, spec: ModelSpec, family: Family, config: Mapping[str, Any], wanted: WantedForm) -> Written:
        """The form of the whole model whose tower `spec` describes.

        Raises:
            SurgeryError: a form that text models alone have, or uneven blocks in a tower that no modeling file knows.
        """
        if wanted != "auto" and not CHECKPOINTS[wanted].towers:
            raise SurgeryError(
                f"format {wanted} holds text models alone, this one is vision-language "
                f"({self.declared.model_type}); formats that can: {', '.join(forms_of_towers())}"
            )
        made = write_config(spec, family, config, wanted)
        if not made.form.towers:
            made = write_config(spec, family, config, "surgeon")
        if made.form.ships_code and family.model_type not in self.declared.uneven:
            raise SurgeryError(
                f"{self.declared.model_type} with a text tower of {family.model_type} has no form for blocks that "
                f"differ ({made.why}); format: native fills what was cut with zeros"
            )
        if made.form.ships_code:
            module = f"modeling_surgeon_{self.declared.model_type}.py"
            made = replace(made, code=(*made.code, *modeling_files((TOWER_FILE, module))))
        loads = made.loads.replace(f"plain `{family.model_type}`", f"plain `{self.declared.model_type}`")
        loads = loads.replace(f"plain {family.model_type} ", f"plain {self.declared.model_type} ")
        return replace(made, tower=self, loads=loads)

    def config_of(self, written: Written) -> dict[str, Any]:
        """config.json of the whole model."""
        apart = ("architectures", "auto_map", "transformers_version")
        text = {key: value for key, value in written.config.items() if key not in apart}
        if self.declared.text_type:
            text["model_type"] = self.declared.text_type[0]
        # Old configs hold the text model's sizes beside the vision model's.
        flat = set() if "text_config" in self.raw else text.keys() | {"rope_scaling", "rope_theta"}
        made = {key: value for key, value in without_code(self.raw).items() if key not in flat}
        name = self.declared.model_type
        made |= {"text_config": text, "model_type": name, "architectures": [self.declared.model_class]}
        made["tie_word_embeddings"] = bool(written.config.get("tie_word_embeddings"))
        if written.form.ships_code:
            module, title = (
                f"modeling_surgeon_{name}",
                self.declared.model_class.removesuffix("ForConditionalGeneration"),
            )
            model_class = f"Surgeon{self.declared.model_class}"
            made |= {
                "model_type": SURGEON_PREFIX + name,
                "architectures": [model_class],
                "auto_map": {
                    "AutoConfig": f"{module}.Surgeon{title}Config",
                    "AutoModelForImageTextToText": f"{module}.{model_class}",
                },
            }
        return made


def tower_of(raw: Mapping[str, Any], names: Collection[str] | None = None) -> Tower | None:
    """The tower of a checkpoint with this config.json and these tensors (the config alone is enough for a plan).

    Raises:
        CheckpointError: no tensor has a name that the declaration knows.
    """
    declared = vision_language_of(raw)
    if declared is None:
        return None
    if names is None:
        return Tower(declared, dict(raw), declared.names[0])
    for spelling in declared.names:
        body = spelling[0][0]
        if any(name.startswith(body) for name in names):
            prefixes = tuple(outside for outside, _ in spelling)
            return Tower(declared, dict(raw), spelling, frozenset(n for n in names if not n.startswith(prefixes)))
    known = " or ".join(f"{spelling[0][0]}*" for spelling in declared.names)
    raise CheckpointError(f"this {declared.model_type} has no text tower: no tensor is named {known}")


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the text tower by itself, with what the whole model's config class fills in; others as they are.

    Raises:
        SurgeryError: transformers finds the values impossible.
    """
    if vision_language_of(raw) is None:
        return dict(raw)
    if str(raw["model_type"]).startswith(SURGEON_PREFIX):
        # Written by this tool, so complete.
        return {**raw["text_config"], "tie_word_embeddings": bool(raw.get("tie_word_embeddings"))}
    from transformers import AutoConfig

    values = {k: v for k, v in without_code(dict(raw)).items() if k not in ("model_type", "transformers_version")}
    try:
        whole = AutoConfig.for_model(raw["model_type"], **values)
    except Exception as error:  # config classes raise their validators' own types
        first = str(error).strip().splitlines()[0]
        raise SurgeryError(f"config.json does not describe a {raw['model_type']} model: {first}") from error
    tied, model_type = bool(whole.tie_word_embeddings), whole.text_config.model_type
    text_type = VISION_LANGUAGE[raw["model_type"]].text_type
    family = text_type[1] if text_type and text_type[0] == model_type else model_type
    text = {**whole.text_config.to_dict(), "model_type": family, "tie_word_embeddings": tied}
    if raw.get("dtype") or raw.get("torch_dtype"):
        text["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    return text


def _swapped(name: str, names: tuple[tuple[str, str], ...]) -> str:
    return next((new + name.removeprefix(old) for old, new in names if name.startswith(old)), name)


__all__ = ["VISION_LANGUAGE", "Tower", "text_config", "tower_of"]

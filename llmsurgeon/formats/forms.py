"""The forms, one file each. A new one is a line here, its name in `names`, and its file."""

from __future__ import annotations

from collections.abc import Mapping

from llmsurgeon.formats.bitnet import BITNET
from llmsurgeon.formats.form import CheckpointForm, Config, Form
from llmsurgeon.formats.gguf.model import GGUF
from llmsurgeon.formats.names import CheckpointName, FormName
from llmsurgeon.formats.native import NATIVE
from llmsurgeon.formats.nemotron_nas import NEMOTRON_NAS
from llmsurgeon.formats.surgeon import SURGEON
from llmsurgeon.model.families import Family
from llmsurgeon.model.spec import ModelSpec

# Those that are checkpoints, in the order in which `auto` tries them.
CHECKPOINTS: Mapping[CheckpointName, CheckpointForm] = {
    "native": NATIVE,
    "bitnet": BITNET,
    "nemotron-nas": NEMOTRON_NAS,
    "surgeon": SURGEON,
}
FORMATS: Mapping[FormName, Form] = {form.name: form for form in (*CHECKPOINTS.values(), GGUF)}


def form_of(config: Config) -> CheckpointForm:
    """The form of the checkpoint that a config.json belongs to."""
    return next((form for form in CHECKPOINTS.values() if form.recognises and form.recognises(config)), NATIVE)


def readable(config: Config) -> Config:
    """A config that `family_of` knows: where the form has words of its own, that of its Llama in the surgeon form."""
    return form_of(config).read(config)


def forms_that_can(spec: ModelSpec, family: Family, config: Config) -> list[str]:
    """Names of the forms that can hold a model as it is, unpacked."""
    return [n for n, form in FORMATS.items() if form.plain is None and form.misfit(spec, family, config) is None]


def forms_of_towers() -> list[str]:
    """Names of the forms that can hold vision-language models."""
    return [name for name, form in FORMATS.items() if form.towers]

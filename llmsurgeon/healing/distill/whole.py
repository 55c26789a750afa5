"""Global distillation: the whole student, towards the parent's hidden states and next-token distributions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmsurgeon.checkpoint.kept import keep
from llmsurgeon.healing.distill.case import Case
from llmsurgeon.healing.distill.engine import engine
from llmsurgeon.healing.distill.latent import packed
from llmsurgeon.healing.distill.loop import Trainer
from llmsurgeon.healing.distill.lora import merged
from llmsurgeon.healing.distill.losses import needs_of, weights_of
from llmsurgeon.healing.distill.module import Distiller
from llmsurgeon.healing.distill.student import build_student
from llmsurgeon.healing.distill.tapped import TappedModel
from llmsurgeon.healing.distill.targets import LiveTargets, StoredTargets, Targets, Wanted
from llmsurgeon.healing.distill.tasks import EncoderTask, GlobalTask
from llmsurgeon.healing.distill.training import Run, Training
from llmsurgeon.healing.spans import spans

if TYPE_CHECKING:
    from llmsurgeon.operations.distill import Distill

MERGED = "merged.safetensors"


def wanted_of(case: Case, settings: Distill) -> tuple[tuple[int, ...], Wanted]:
    """(layers of the student that carry the hidden-state loss, what the parent must say)."""
    layers = len(case.spec.layers)
    needs = needs_of(weights_of(settings, case.parent.family.encoder))
    count = min(layers, settings.hidden_layers or layers) if "layer ends" in needs else 0
    mine = tuple(round((place + 1) * layers / count) - 1 for place in range(count))
    ends = [span[-1] for span in spans(case.spec, len(case.parent_spec.layers))]
    # An encoder's last states are kept as those are from which a decoder's whole distributions follow.
    top_k = settings.top_k if "parent's distributions" in needs else None if "parent's last states" in needs else 0
    return mine, Wanted(tuple(ends[index] for index in mine), top_k)


def distill_globally(case: Case, settings: Distill, began: float) -> Training:
    """Train the whole student; what moved is in the result's file, under canonical names.

    Raises:
        SurgeryError: bad settings, or a loss that diverges.
        Stopped: on SIGTERM, with the state saved.
    """
    low = case.parent.dtype in (torch.bfloat16, torch.float16)
    accelerator = engine(settings, case.device, low, case.logs)
    mine, wanted = wanted_of(case, settings)
    corpus = case.corpus(settings.seed)
    targets: Targets
    if settings.targets == "disk":
        targets = StoredTargets(corpus, lambda: case.parent, case.fingerprint, wanted, case.batch)
    else:
        targets = LiveTargets(case.parent_config, case.parent, wanted, case.parent.dtype)
    family = case.parent.family
    student = TappedModel(build_student(case, settings, torch.float32), family.layers, mine, family.encoder)
    module = Distiller(
        student, targets, weights_of(settings, family.encoder), case.parent.padding if family.encoder else None
    )
    task = (EncoderTask if family.encoder else GlobalTask)(case, settings, corpus, targets)
    run = Run(case.folder, settings.limits, prefix="student.model.", began=began)
    training = Trainer(module, task, settings, accelerator, run).run()
    if settings.lora is None or training.file is None:
        stored = {name: case.weights[name].dtype for name in case.weights}
        transposed = case.parent.family.transposed
        training = packed(training, stored.__getitem__, transposed, write=accelerator.is_main_process)
        accelerator.wait_for_everyone()
        return training
    if accelerator.is_main_process:
        _merge(case, settings, Path(training.file))
    accelerator.wait_for_everyone()
    return replace(training, file=str(case.folder / MERGED))


def _merge(case: Case, settings: Distill, adapters: Path) -> None:
    """Write the weights with the adapters merged in."""
    from safetensors.torch import load_file, save_file

    student = build_student(case, settings, torch.float32)
    student.load_state_dict(load_file(adapters), strict=False)
    tensors = {name: tensor.contiguous() for name, tensor in merged(student).items()}
    keep(case.folder / MERGED, lambda path: save_file(tensors, path))

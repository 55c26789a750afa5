"""A checkpoint held against its config: where the two disagree, the tensors say what the model is.

transformers 5 reads the same way: tensors that the config calls repeats and that differ stay apart, buffers that it
computes itself are left unread. What is read otherwise than config.json says is told in `Reading`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmsurgeon.checkpoint.source import Checkpoint
from llmsurgeon.checkpoint.transform import (
    TransformedWeights,
    WeightTransform,
    rebase,
    remove,
    rename,
    row_blocks,
)
from llmsurgeon.errors import CheckpointError, SurgeryError
from llmsurgeon.formats.configs import config_notes, normalised
from llmsurgeon.formats.dtypes import plain_dtype, stored_dtype
from llmsurgeon.formats.models import check_shapes, empty_model, expected_shapes
from llmsurgeon.formats.tensor_names import canonical
from llmsurgeon.formats.towers import Tower, tower_of
from llmsurgeon.model.families import Family, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]

# Ends of the names of decoders' classes that predict no next token.
SCORING_HEAD = re.compile(
    r"For(Sequence|Token)Classification$|ForQuestionAnswering$|ForSequenceRegression$|Reward\w*$|DoubleHeadsModel$"
)

TIED = "tie_word_embeddings"
# Published files round these to 16 bits.
INV_FREQ_TOLERANCE = 2**-7


@dataclass(frozen=True)
class Reading:
    """What a checkpoint's tensors and its config.json make together; of a vision-language one, its text tower.

    config: normalised, and as the tensors have it where config.json says otherwise.
    weights: canonical names -> tensors; what lies beside a text tower is among them.
    empty: the model that they fit, on the meta device.
    dtype: what it is computed in, where nothing else is asked for: see `computed_in`.
    contradictions: where config.json is wrong about the tensors: readers that believe it compute something else.
    remarks: what is left unread or read in another way, and changes nothing.
    """

    config: dict[str, Any]
    family: Family
    weights: TransformedWeights
    tower: Tower | None
    empty: PreTrainedModel
    dtype: torch.dtype
    contradictions: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Contradictions and remarks."""
        return (*self.contradictions, *self.remarks)


def read_model(checkpoint: Checkpoint) -> Reading:
    """Hold a checkpoint's tensors against its config.

    Raises:
        SurgeryError: unsupported family, an impossible config, or quantised weights.
        CheckpointError: tensors are missing, unexpected or of other shapes than the config promises.
    """
    refuse_quantised(checkpoint.config, checkpoint.name)
    refuse_scoring_head(checkpoint.config, checkpoint.name)
    tower = tower_of(checkpoint.config, checkpoint)
    config = normalised(tower.text if tower else checkpoint.config)
    family, empty = family_of(config), empty_model(config)
    file = tower.inner(checkpoint) if tower else checkpoint
    named = canonical(file, family)
    ties = settle_ties(named, dict(getattr(empty, "all_tied_weights_keys", None) or {}))
    if ties.apart:
        config = {**config, TIED: False}
        empty = empty_model(config)
    contradictions = [
        f"config.json says {TIED}, and the file's {target} differs from its {source}: both are kept, as "
        f"transformers 5 does, where other readers take {source} for both. Set {TIED} to false in config.json"
        for target, source in ties.apart
    ]
    weights = TransformedWeights(named, ties.edits)
    meta = rebase(weights, checkpoint.meta())
    shapes, expected = {name: tuple(t.shape) for name, t in meta.items()}, expected_shapes(empty)
    hint = _hint(shapes, expected, config, family)
    check_shapes(shapes, expected, checkpoint.name, family, tower.beside if tower else (), hint)
    remarks = [*stale_buffers(file, family, empty), *_other_dtype(checkpoint.config, meta)]
    remarks += config_notes(checkpoint.config, tower.text if tower else None)
    own = {name: meta[name] for name in expected}
    try:
        dtype = plain_dtype(own, config)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from None
    return Reading(config, family, weights, tower, empty, dtype, tuple(contradictions), tuple(remarks))


def refuse_quantised(config: Mapping[str, Any], name: str) -> None:
    """Raise SurgeryError for a checkpoint whose weights are packed or scaled by a quantizer."""
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        raise SurgeryError(
            f"{name}: its weights are quantised already (quantization_config: {method}), and "
            "operations work on plain numbers; take the checkpoint that it was made from"
        )


def refuse_scoring_head(config: Mapping[str, Any], name: str) -> None:
    """Raise SurgeryError for a decoder whose head scores texts or tokens, as reward models and classifiers have it."""
    named = config.get("architectures")
    head = str(named[0]) if isinstance(named, list) and named else ""
    if SCORING_HEAD.search(head) and not family_of(config).encoder:
        raise SurgeryError(
            f"{name}: {head} is a decoder whose head scores a text (a classifier or reward model) and predicts no next "
            "token, by which cuts are measured and healed. Cut the language model that it was trained from (the same "
            "recipe takes it), and train the head on the result"
        )


def _hint(found: Mapping[str, Shape], expected: Mapping[str, Shape], config: Mapping[str, Any], family: Family) -> str:
    """What names that differ between file and config point to, "" where nothing comes to mind."""
    head = f"{family.head}.weight"
    if family.head and head in expected and head not in found and f"{family.embedding}.weight" in found:
        return (
            f". Without a head in the file, transformers would fill it at random: set {TIED} to true in config.json "
            "where the embedding is the head, or take the checkpoint that has one"
        )
    if any(name.endswith(".bias") for name in found.keys() ^ expected.keys()):
        switches = ", ".join(f"{key}={config[key]}" for key in sorted(config) if key.endswith("bias"))
        return f". config.json makes it {switches}" if switches else ""
    return ""


def _other_dtype(config: Mapping[str, Any], meta: Mapping[str, Tensor]) -> list[str]:
    said, stored = config.get("dtype") or config.get("torch_dtype"), stored_dtype(meta)
    if not said or str(said).removeprefix("torch.") == str(stored).removeprefix("torch."):
        return []
    return [f"config.json says dtype {said}, and most of the file's numbers are {str(stored).removeprefix('torch.')}"]


@dataclass(frozen=True)
class Ties:
    """What the file makes of tensors that the config calls one.

    apart: (repeat, original) of those that differ in the file; where there are any, no tensors are tied.
    edits: what brings the file's tensors into the form of the model that `apart` leaves.
    """

    apart: tuple[tuple[str, str], ...]
    edits: tuple[WeightTransform, ...]


def settle_ties(weights: Mapping[str, Tensor], tied: Mapping[str, str]) -> Ties:
    """Hold tensors that should repeat others against them; `tied` maps each repeat to its original.

    As `PreTrainedModel.tie_weights` of transformers 5: equal ones are one, different ones are two, and a repeat whose
    original is not in the file is the original.
    """
    found = [(target, source) for target, source in tied.items() if target in weights]
    alone = [pair for pair in found if pair[1] not in weights]
    both = [pair for pair in found if pair[1] in weights]
    apart = tuple(pair for pair in both if not same_values(weights[pair[0]], weights[pair[1]]))
    if not apart:
        return Ties((), (*(remove(target) for target, _ in both), *(rename(*pair) for pair in alone)))
    # The config has one switch for all of them, so each gets a tensor of its own.
    edits = [WeightTransform((target,), (target, source), _twice) for target, source in alone]
    lone = {source: target for target, source in tied.items() if target not in weights and source in weights}
    edits += [WeightTransform((source,), (source, target), _twice) for source, target in lone.items()]
    return Ties(apart, tuple(edits))


def same_values(one: Tensor, other: Tensor) -> bool:
    """True where two tensors hold the same numbers, whatever their dtypes."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype and one.dtype.itemsize > 1:
        return torch.equal(one, other)
    # torch compares no numbers of 8 bits.
    pairs = zip(row_blocks(one.flatten()), row_blocks(other.flatten()), strict=True)
    return all(torch.equal(mine.double(), theirs.double()) for mine, theirs in pairs)


def _twice(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor, tensor


def stale_buffers(weights: Mapping[str, Tensor], family: Family, model: PreTrainedModel) -> list[str]:
    """What old files hold beside the weights (rotary frequencies, masks, position numbers) and the config contradicts.

    No current transformers reads them, so the model computes what the config says.
    """
    rotary = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    found = []
    for name in weights:
        if not any(re.search(pattern, name) for pattern in family.ignored):
            continue
        tensor = weights[name]
        if name.endswith("inv_freq"):
            own = (made for made in rotary if made.shape == tensor.shape)
            fits = any(torch.allclose(tensor.float(), made.float(), rtol=INV_FREQ_TOLERANCE, atol=0) for made in own)
        else:
            fits = _is_usual(name, tensor)
        if not fits:
            found.append(name)
    if not found:
        return []
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return [
        f"the file's {found[0]}{more} differs from what config.json makes of it, and is left unread, as transformers "
        "does; a model that was trained with it needs a config that says so"
    ]


def _is_usual(name: str, tensor: Tensor) -> bool:
    """True where a mask, or position or type numbers, are those that every model of the family has."""
    if not tensor.numel():
        return False
    tensor = tensor.float()
    values = tensor.reshape(-1, *tensor.shape[-2:])[0] if tensor.dim() > 1 else tensor.reshape(1, -1)
    if name.endswith("position_ids"):
        return torch.equal(values[0].long(), torch.arange(values.shape[1]))
    if name.endswith("token_type_ids"):
        return not tensor.any()
    if name.endswith("masked_bias"):
        return bool((tensor < -1e3).all())
    return torch.equal(values.bool(), torch.ones(values.shape, dtype=torch.bool).tril())

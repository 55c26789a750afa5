"""Which linears become ternary: those of some layers' parts, those of some modules, or those that cost least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmsurgeon.operations.base import Subject

# Layer (its index in the subject) -> names inside it of weights.
Chosen = dict[int, tuple[str, ...]]


def linears_of(subject: Subject, index: int) -> tuple[str, ...]:
    """Names inside layer `index` of the weights of its attention's and its FFN's linears, in order."""
    family, there = subject.family, subject.tensors(index)
    ffn = () if family.experts else tuple(family.ffn_tensor(p) for p in (*family.ffn_in, family.ffn_out))
    attention = (
        name
        for name in there
        if name.startswith(f"{family.attention}.") and name.endswith(".weight") and "norm" not in name.lower()
    )
    return (*attention, *(name for name in ffn if name in there))


def linears_of_parts(subject: Subject, which: str, numbers: Sequence[int] | None) -> Chosen:
    """The linears of the FFNs, of the attentions or of all (`which`), of these layers of the parent, or of all.

    Raises:
        SurgeryError: a layer has no such linears.
    """
    found: Chosen = {}
    for index, layer in enumerate(subject.spec.layers):
        if numbers is None or set(numbers) & set(layer.parents):
            found[index] = _of_layer(subject, index, which)
    for number in numbers or ():
        if not found[subject.position(number, "ternary: layer")]:
            raise subject.refuse(f"ternary: layer {number} has no linears of {which}")
    return {index: names for index, names in found.items() if names}


def _of_layer(subject: Subject, index: int, which: str) -> tuple[str, ...]:
    layer = subject.spec.layers[index]
    if layer.branches:
        raise subject.refuse(
            f"ternary: layer {layer.parents[0]} is one of parallel blocks, which have no linears of their own"
        )
    family, known = subject.family, linears_of(subject, index)
    if which != "attention" and family.experts:
        raise subject.refuse("ternary: its FFN is a mixture of experts; linears: attention is possible")
    if which == "all":
        return known
    return tuple(name for name in known if family.is_attention(name) == (which == "attention"))


def linears_of_modules(subject: Subject, modules: Mapping[str, Sequence[int]]) -> Chosen:
    """Linears by their paths inside a layer, each with the parent's layers of which it is meant.

    Raises:
        SurgeryError: a layer has no such linear.
    """
    found: Chosen = {}
    for module, numbers in modules.items():
        for number in numbers:
            index = subject.position(number, f"ternary: {module} of layer")
            known = linears_of(subject, index)
            if f"{module}.weight" not in known:
                names = ", ".join(name.removesuffix(".weight") for name in known)
                raise subject.refuse(f"ternary: layer {number} has no linear {module}; it has {names}")
            found[index] = (*found.get(index, ()), f"{module}.weight")
    return dict(sorted(found.items()))


def cheapest(
    subject: Subject,
    candidates: Chosen,
    costs: Mapping[int, Mapping[str, Any]],
    everything: int,
    share: float | None,
    max_bytes: int | None,
) -> tuple[dict[str, tuple[int, ...]], int]:
    """The linears that cost least, until a budget is drawn: (path -> numbers of layers, bytes that the model has left).

    Args:
        costs: parent layer -> name -> (error, numbers, bytes of one of them); `everything`: bytes of the model.
        share: of the candidates' numbers; max_bytes: of the model, ternary weights packed. One of them is given.

    Raises:
        SurgeryError: a candidate was not measured.
    """
    places = [(subject.spec.layers[index].parents[0], name) for index, names in candidates.items() for name in names]
    for number, name in places:
        if name not in costs.get(number, {}):
            raise subject.refuse(
                f"ternary: {name} of layer {number} is not as in the checkpoint and was not measured; name modules "
                "instead of share or max_bytes"
            )
    total = sum(costs[number][name][1] for number, name in places)
    modules: dict[str, list[int]] = {}
    done, left = 0, everything
    for number, name in sorted(places, key=lambda at: (costs[at[0]][at[1]][0] / costs[at[0]][at[1]][1], at)):
        if done >= share * total if share is not None else left <= (max_bytes or 0):
            break
        _, count, size = costs[number][name]
        done, left = done + count, left - count * size + count // 4
        modules.setdefault(name.removesuffix(".weight"), []).append(number)
    return {module: tuple(sorted(numbers)) for module, numbers in sorted(modules.items())}, left

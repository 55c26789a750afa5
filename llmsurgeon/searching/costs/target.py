"""What a search is to reach: `decode=1.5x`, `params=100M`, `size=300MB`, read and told apart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llmsurgeon.boundary.foreign import shortened
from llmsurgeon.errors import SurgeryError

COUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
BYTES = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
RATES = {"tok/s": 1.0}


@dataclass(frozen=True)
class Quantity:
    """Something of a model that a target bounds.

    noun: how it is called in a sentence.
    units: of absolute targets, unit -> its size in parameters, FLOPs, bytes, or tokens a second.
    speed: whether more is better, and a ratio is a speedup; else less is, and a ratio is what is left.
    example: targets that are well formed.
    """

    noun: str
    units: Mapping[str, float]
    example: str
    speed: bool = False


QUANTITIES: dict[str, Quantity] = {
    "decode": Quantity("decode speed", RATES, "decode=1.5x or decode=40tok/s", speed=True),
    "prefill": Quantity("prefill speed", RATES, "prefill=1.2x or prefill=500tok/s", speed=True),
    "params": Quantity("parameters", COUNTS, "params=0.7x or params=100M"),
    "flops": Quantity("multiplications a token", COUNTS, "flops=0.5x or flops=200M"),
    "size": Quantity("bytes of the weights in the file", BYTES, "size=0.6x or size=300MB"),
    "memory": Quantity("bytes of weights and KV cache", BYTES, "memory=0.6x or memory=1GB"),
    "kv": Quantity("bytes of the KV cache", BYTES, "kv=0.5x or kv=20MB"),
}


@dataclass(frozen=True)
class Target:
    """One bound. Ratios are to the parent: of a speed how much faster, of all else what may be left.

    name: a key of QUANTITIES.
    bound: the ratio, or the amount in the units that the quantity is counted in.
    relative: whether it is a ratio.
    written: as it was asked for.
    """

    name: str
    bound: float
    relative: bool
    written: str = field(compare=False)

    @property
    def quantity(self) -> Quantity:
        """What is bounded."""
        return QUANTITIES[self.name]

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read `name=1.5x`, or `name=300MB`.

        Raises:
            SurgeryError: no such quantity, no number, a unit that it is not counted in, or a ratio that asks for a
                slower or larger model than there is.
        """
        name, equals, value = (part.strip() for part in text.partition("="))
        if name not in QUANTITIES or not equals:
            raise SurgeryError(f"target {shortened(text)}: expected QUANTITY=VALUE, such as {_examples()}")
        quantity, written = QUANTITIES[name], f"{name}={value}"
        found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z/]*)", value)
        number, unit = (float(found[1]), found[2]) if found else (math.nan, "")
        if not 0 < number < math.inf or (unit != "x" and unit not in quantity.units):
            units = " or ".join(["x", *filter(None, quantity.units)])
            raise SurgeryError(
                f"target {shortened(text)}: expected a number above 0 followed by {units}, such as {quantity.example}"
            )
        if unit == "x":
            _check_ratio(quantity, number, written)
        return cls(name, number * quantity.units.get(unit, 1.0), unit == "x", written)


def parse_targets(texts: Iterable[str]) -> tuple[Target, ...]:
    """Every target of a search.

    Raises:
        SurgeryError: there is none, one of them cannot be read, or two bound the same.
    """
    targets = tuple(Target.parse(text) for text in texts)
    if not targets:
        raise SurgeryError(f"a search needs a target, such as {_examples()}")
    _check_once(targets)
    return targets


def _check_once(targets: Sequence[Target]) -> None:
    seen: dict[str, Target] = {}
    for target in targets:
        if target.name in seen:
            raise SurgeryError(
                f"targets {seen[target.name].written} and {target.written} bound the same; keep the one that is meant"
            )
        seen[target.name] = target


def _check_ratio(quantity: Quantity, ratio: float, written: str) -> None:
    if quantity.speed and ratio <= 1:
        raise SurgeryError(f"target {written} asks for no more speed than there is; a ratio of {quantity.noun} is > 1")
    if not quantity.speed and ratio >= 1:
        raise SurgeryError(f"target {written} leaves everything as it is; a ratio of {quantity.noun} is < 1")


def _examples() -> str:
    return ", ".join(quantity.example.partition(" ")[0] for quantity in QUANTITIES.values())

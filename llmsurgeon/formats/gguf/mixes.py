"""llama.cpp's mixtures: which tensors of a Q4_K_M file and its like get more bits than the rest.

Which tensor gets which type is what llama.cpp's quantizer chooses without an importance matrix (src/llama-quant.cpp of
build 11434), but for two that it treats apart, Falcon and Llama 2 70B. A block of most types is 256 numbers; rows
that are no whole blocks go to a type with blocks of 32.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

# (number of the tensor among those of its part, how many there are) -> whether the rule is for it.
Where = Callable[[int, int], bool]
PART = re.compile(r"blk\.\d+\.(attn_v|attn_qkv|attn_k|attn_output|ffn_down)(_exps)?\.weight")
EIGHT = 8  # experts, with which attention is small beside the rest
WIDE = 4  # query heads a key/value head, from which on values are few


def everywhere(number: int, count: int) -> bool:
    return True


def first(share: int) -> Where:
    """The first 1 / share of them."""
    return lambda number, count: number < count // share


def spread(number: int, count: int) -> bool:
    """The first eighth, the last eighth, and every third in between."""
    eighth = count // 8
    return number < eighth or number >= 7 * count // 8 or (number - eighth) % 3 == 2


@dataclass(frozen=True)
class Mix:
    """A type for all matrices, and (type, where) of those that get another; the first that applies counts.

    values: what writes the cache's values, fused projections included; few_values: where WIDE heads or more share one.
    """

    base: str
    values: tuple[tuple[str, Where], ...] = ()
    few_values: tuple[tuple[str, Where], ...] = ()
    down: tuple[tuple[str, Where], ...] = ()
    output: tuple[tuple[str, Where], ...] = ()
    output_of_experts: bool = False


def _all(type: str) -> tuple[tuple[str, Where], ...]:
    return ((type, everywhere),)


_SPREAD = (("Q6_K", spread),)
_IQ4 = Mix("IQ4_XS", few_values=_all("Q5_K"), down=(("Q5_K", first(8)),), output_of_experts=True)
MIXES: dict[str, Mix] = {
    "Q2_K": Mix("Q2_K", _all("Q3_K"), _all("Q4_K"), _all("Q3_K"), _all("Q3_K"), output_of_experts=True),
    "Q2_K_S": Mix("Q2_K", few_values=_all("Q4_K"), down=(("Q4_K", first(8)),)),
    "IQ3_S": Mix("IQ3_S", few_values=_all("Q4_K"), output_of_experts=True),
    "IQ3_M": Mix("IQ3_S", _all("Q4_K"), (), (("Q4_K", first(8)),), _all("Q4_K"), output_of_experts=True),
    "Q3_K_S": Mix("Q3_K", output_of_experts=True),
    "Q3_K_M": Mix(
        "Q3_K",
        (("Q5_K", lambda number, count: number < 2), ("Q4_K", everywhere)),
        down=(("Q5_K", first(16)), ("Q4_K", everywhere)),
        output=_all("Q4_K"),
        output_of_experts=True,
    ),
    "Q3_K_L": Mix("Q3_K", _all("Q5_K"), down=_all("Q5_K"), output=_all("Q5_K")),
    "IQ4_XS": _IQ4,
    "IQ4_NL": replace(_IQ4, base="IQ4_NL"),
    "Q4_K_S": Mix(
        "Q4_K", (("Q5_K", lambda number, count: number < 4),), down=(("Q5_K", first(8)),), output_of_experts=True
    ),
    "Q4_K_M": Mix("Q4_K", _SPREAD, down=_SPREAD, output_of_experts=True),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_K_M": Mix("Q5_K", _SPREAD, down=_SPREAD),
    "Q6_K": Mix("Q6_K"),
}
# Of rows that are no whole blocks.
NARROWER = {
    **dict.fromkeys(("IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}


def types_of(
    mix: Mix, shapes: Mapping[str, tuple[int, ...]], heads_a_value: int, head: str, block: Mapping[str, int]
) -> dict[str, str]:
    """The type of each tensor, by name.

    shapes: of the matrices that are quantised, in the order of the file. heads_a_value: query heads a key/value head.
    head: the tensor that the logits come from. block: how many numbers of a row each type needs together.
    """
    experts = max((shape[0] for name, shape in shapes.items() if name.endswith("_exps.weight")), default=0)
    counts, seen = Counter(_parts(shapes)), Counter[str]()
    made: dict[str, str] = {}
    for name, shape in shapes.items():
        if name == head:
            made[name] = "Q8_0" if shape[-1] % block[mix.base] else "Q6_K"
        else:
            part = _part(name)
            chosen = _chosen(mix, part, seen[part], counts[part], heads_a_value >= WIDE, experts == EIGHT)
            seen[part] += 1
            made[name] = NARROWER.get(chosen, chosen) if shape[-1] % block[chosen] else chosen
        if shape[-1] % block[made[name]]:
            made[name] = "F16"
    return made


def _part(name: str) -> str:
    found = PART.fullmatch(name)
    return {"attn_qkv": "attn_v"}.get(found[1], found[1]) if found else ""


def _parts(names: Iterable[str]) -> list[str]:
    return [_part(name) for name in names]


def _chosen(mix: Mix, part: str, number: int, count: int, few: bool, eight_experts: bool) -> str:
    """The type of one tensor of its part."""
    if eight_experts and part in ("attn_v", "attn_k"):
        return "Q8_0"
    if eight_experts and part == "attn_output":
        return "Q5_K" if mix.output_of_experts else mix.base
    rules = {
        "attn_v": mix.few_values if few and mix.few_values else mix.values,
        "attn_output": mix.output,
        "ffn_down": mix.down,
    }.get(part, ())
    return next((type for type, where in rules if where(number, count)), mix.base)

# mypy: disable-error-code="no-untyped-def"
"""Products of packed ternary weights on GPUs, compiled by triton (pip install llmsurgeon[gpu]).

The weights stay packed: a program takes four rows of codes out of each byte in registers and multiplies them on tensor
cores, so device memory gives 2 bits a weight. One kernel serves a few tokens and many; what differs is the tile.
Activations are the caller's, or 8-bit codes with a scale a token; those products are whole numbers, exactly.

Shapes: N tokens, I inputs, R rows of bytes, each of which holds four rows of codes: r, r + R, r + 2 R, r + 3 R.
With TRITON_INTERPRET=1 it runs on a CPU, slowly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Four bytes of codes at once, two bits each: for place 0 to 3 the eight numbers (code - 1) * 2^-126 in bfloat16. A code
# in the lowest bits of the exponent is 0, 2^-126 or 2^-125, one 2^-126 away from what it stands for.
BFLOAT16_CODES = "\n".join(
    [
        "{ .reg .b32 low, high, one, two; mov.b32 one, 0x00800080; mov.b32 two, 0;",
        "prmt.b32 low, $8, two, 0x4140; prmt.b32 high, $8, two, 0x4342;",
        *(
            f"shl.b32 two, {half}, {7 - 2 * place}; and.b32 two, two, 0x01800180; "
            f"sub.rn.bf16x2 ${2 * place + number}, two, one;"
            for place in range(4)
            for number, half in enumerate(("low", "high"))
        ),
        "}",
    ]
)
# The same as bytes -1, 0, 1: the sign bit is set while one is taken away, so that no byte borrows from the next.
INT8_CODES = "\n".join(
    [
        "{ .reg .b32 part;",
        *(
            f"shr.b32 part, $4, {2 * place}; and.b32 part, part, 0x03030303; or.b32 part, part, 0x80808080; "
            f"sub.u32 part, part, 0x01010101; xor.b32 ${place}, part, 0x80808080;"
            for place in range(4)
        ),
        "}",
    ]
)
BFLOAT16_ASM, INT8_ASM = tl.constexpr(BFLOAT16_CODES), tl.constexpr(INT8_CODES)
# Activations that meet codes of 2^-126 are raised by as much as leaves the largest of them finite; the rest is in the
# scale of the output.
RAISED, LOWERED = 2.0**96, 2.0**30
# The interpreter's products know no bfloat16.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Tokens up to which a product is bound by the weights' bytes.
FEW = 16


# Inputs that a tile of few tokens takes at a time, by what its codes become: more would not fit an H100's registers.
AT_ONCE = {"float32": 32, "16 bits": 64, "lean": 256}


@dataclass(frozen=True)
class Tile:
    """What a program computes: 4 * rows outputs of so many tokens, from `inputs` numbers of each at a time.

    parts: programs that share the inputs of one tile; their sums are added afterwards, always in the same order.
    """

    rows: int
    tokens: int
    inputs: int
    parts: int = 1
    warps: int = 4
    stages: int = 3


def tile_of(tokens: int, rows: int, inputs: int, kind: str = "lean", processors: int = 132) -> Tile:
    """The tile for a product of this size on a GPU of so many processors; `kind` is one of `AT_ONCE`."""
    if tokens > FEW:
        if kind == "float32":
            return Tile(32, 32, 32)
        return Tile(64, 64 if tokens <= 64 else 128, 64, warps=4 if tokens <= 64 else 8)
    tile, parts = Tile(16, 16, AT_ONCE[kind]), 1
    # A processor streams weights at full rate with two programs or more, of a few steps each.
    programs = triton.cdiv(rows, tile.rows)
    while parts < 8 and programs * parts < 2 * processors and inputs // (2 * parts) >= 2 * tile.inputs:
        parts *= 2
    return Tile(tile.rows, tile.tokens, tile.inputs, parts)


@triton.jit
def product_kernel(
    x, bits, row_scale, token_scale, bias, out, tokens, rows, inputs, share,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr,
    INT8: tl.constexpr, ASM: tl.constexpr, BIASED: tl.constexpr, LIFT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(2)
    row_there, token_there = row < rows, token < tokens
    place = tl.arange(0, INPUTS)
    KIND: tl.constexpr = tl.int32 if INT8 else tl.float32
    a = tl.zeros((ROWS, TOKENS), KIND)
    b = tl.zeros((ROWS, TOKENS), KIND)
    c = tl.zeros((ROWS, TOKENS), KIND)
    d = tl.zeros((ROWS, TOKENS), KIND)
    bits_at = bits + row.to(tl.int64)[:, None] * inputs
    x_at = x + token.to(tl.int64)[None, :] * inputs
    for start in range(0, share, INPUTS):
        column = part * share + start + place
        inside = column < inputs
        # Codes beyond the edge may be anything: what they are multiplied with is zero.
        byte = tl.load(bits_at + column[None, :], mask=row_there[:, None] & inside[None, :], other=0)
        x_IT = tl.load(x_at + column[:, None], mask=inside[:, None] & token_there[None, :], other=0)
        if WIDE:
            x_IT = x_IT.to(tl.float32)
        if ASM and INT8:
            first, second, third, last = tl.inline_asm_elementwise(
                INT8_ASM, "=r,=r,=r,=r,r", [byte], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
            )
        elif ASM:
            first, second, third, last = tl.inline_asm_elementwise(
                BFLOAT16_ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r", [byte],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            first = ((byte & 3).to(tl.int8) - 1).to(x_IT.dtype)
            second = (((byte >> 2) & 3).to(tl.int8) - 1).to(x_IT.dtype)
            third = (((byte >> 4) & 3).to(tl.int8) - 1).to(x_IT.dtype)
            last = ((byte >> 6).to(tl.int8) - 1).to(x_IT.dtype)
        if INT8:
            a = tl.dot(first, x_IT, a, out_dtype=tl.int32)
            b = tl.dot(second, x_IT, b, out_dtype=tl.int32)
            c = tl.dot(third, x_IT, c, out_dtype=tl.int32)
            d = tl.dot(last, x_IT, d, out_dtype=tl.int32)
        else:
            a = tl.dot(first, x_IT, a, input_precision="ieee")
            b = tl.dot(second, x_IT, b, input_precision="ieee")
            c = tl.dot(third, x_IT, c, input_precision="ieee")
            d = tl.dot(last, x_IT, d, input_precision="ieee")
    outputs = 4 * rows
    there = row_there[:, None] & token_there[None, :]
    out_at = out + (part.to(tl.int64) * tokens + token.to(tl.int64)[None, :]) * outputs
    if PARTS == 1:
        scale_T = LIFT
        if INT8:
            scale_T = tl.load(token_scale + token, mask=token_there, other=0.0)[None, :]
        put(out_at, row, there, a, row_scale, scale_T, bias, row_there, BIASED)
        put(out_at, row + rows, there, b, row_scale, scale_T, bias, row_there, BIASED)
        put(out_at, row + 2 * rows, there, c, row_scale, scale_T, bias, row_there, BIASED)
        put(out_at, row + 3 * rows, there, d, row_scale, scale_T, bias, row_there, BIASED)
    else:
        tl.store(out_at + row[:, None], a, mask=there)
        tl.store(out_at + (row + rows)[:, None], b, mask=there)
        tl.store(out_at + (row + 2 * rows)[:, None], c, mask=there)
        tl.store(out_at + (row + 3 * rows)[:, None], d, mask=there)


@triton.jit
def put(out_at, output, there, sums, row_scale, scale_T, bias, row_there, BIASED: tl.constexpr):
    made = sums.to(tl.float32) * tl.load(row_scale + output, mask=row_there, other=0.0)[:, None] * scale_T
    if BIASED:
        made += tl.load(bias + output, mask=row_there, other=0.0).to(tl.float32)[:, None]
    tl.store(out_at + output[:, None], made, mask=there)


@triton.jit
def together_kernel(
    parts, row_scale, token_scale, bias, out, tokens, outputs,
    PARTS: tl.constexpr, INT8: tl.constexpr, BIASED: tl.constexpr, LIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = output < outputs
    made = tl.load(parts + token * outputs + output, mask=there, other=0)
    for part in range(1, PARTS):
        made += tl.load(parts + (part * tokens + token) * outputs + output, mask=there, other=0)
    scale = LIFT
    if INT8:
        scale = tl.load(token_scale + token)
    made = made.to(tl.float32) * tl.load(row_scale + output, mask=there, other=0.0) * scale
    if BIASED:
        made += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * outputs + output, made, mask=there)


@triton.jit
def eight_bits_kernel(x, codes, scale, inputs, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < inputs
    x_I = tl.load(x + token * inputs + at, mask=there, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(x_I), 0) / 127, 1e-12)
    # To the nearest whole number, halves to even: float32 has no room for more behind 1.5 * 2^23.
    rounded = (x_I / step + 12582912.0) - 12582912.0
    tl.store(codes + token * inputs + at, tl.minimum(tl.maximum(rounded, -127), 127).to(tl.int8), mask=there)
    tl.store(scale + token, step)


def eight_bits(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 codes [N, I], float32 scale [N]): each token's numbers are nearly codes * scale."""
    x_NI = x_NI.contiguous()
    codes, scale = torch.empty_like(x_NI, dtype=torch.int8), x_NI.new_empty(len(x_NI), dtype=torch.float32)
    if len(x_NI):
        block = triton.next_power_of_2(x_NI.shape[1])
        eight_bits_kernel[(len(x_NI),)](x_NI, codes, scale, x_NI.shape[1], BLOCK=block, num_warps=8)
    return codes, scale


def product(
    x_NI: Tensor,
    bits: Tensor,
    scale_O: Tensor,
    bias: Tensor | None = None,
    *,
    rounded: bool = False,
    asm: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """x [N, I] times the ternary weights in bits uint8 [R, I] with a scale a row, float32 [4 R]: [N, 4 R] in x's dtype.

    Args:
        rounded: multiply 8-bit activations, a scale a token, in place of x itself.
        asm: take codes out of bytes four at a time in PTX (bfloat16 or `rounded`), which no interpreter runs.
        tile: what a program computes; None: what suits the size.
    """
    tokens, inputs = x_NI.shape
    rows = len(bits)
    out = x_NI.new_empty(tokens, 4 * rows)
    if not tokens:
        return out
    asm = asm and (rounded or x_NI.dtype == torch.bfloat16)
    codes, token_scale = eight_bits(x_NI) if rounded else (x_NI.contiguous(), scale_O)
    lift = LOWERED if asm and not rounded else 1.0
    if asm and not rounded:
        codes = codes * RAISED
    kind = "lean" if asm or rounded else "float32" if x_NI.dtype == torch.float32 else "16 bits"
    tile = tile or tile_of(tokens, rows, inputs, kind)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(tokens, tile.tokens), tile.parts)
    share = triton.cdiv(triton.cdiv(inputs, tile.parts), tile.inputs) * tile.inputs
    into = out
    if tile.parts > 1:
        sums = torch.int32 if rounded else torch.float32
        into = out.new_empty(tile.parts, tokens, 4 * rows, dtype=sums)
    how: dict[str, Any] = {"PARTS": tile.parts, "INT8": rounded, "BIASED": bias is not None, "LIFT": lift}
    given = scale_O if bias is None else bias
    product_kernel[grid](
        codes, bits, scale_O, token_scale, given, into, tokens, rows, inputs, share,
        ROWS=tile.rows, TOKENS=tile.tokens, INPUTS=tile.inputs, ASM=asm, WIDE=INTERPRETED and not rounded, **how,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if tile.parts > 1:
        together_kernel[(triton.cdiv(4 * rows, 1024), tokens)](
            into, scale_O, token_scale, given, out, tokens, 4 * rows, BLOCK=1024, **how
        )
    return out

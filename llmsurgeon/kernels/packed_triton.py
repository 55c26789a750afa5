# mypy: disable-error-code="no-untyped-def"
"""Products of packed ternary weights on GPUs, compiled by triton (pip install llmsurgeon[gpu]).

The weights stay packed: a program takes four rows of codes out of each byte in registers, so device memory gives 2 bits
a weight. Activations are the caller's, or 8-bit codes with a scale a token; those products are whole numbers, exactly.
A few tokens are multiplied number by number, since the weights' bytes are all that counts: in float32, or four 8-bit
codes at once. More tokens are worth the tensor cores; what differs among those is the tile. Of a long prompt the
products are dear and bytes are not: weights are written out, in the activations' dtype, for the vendor's own product.

Shapes: N tokens, I inputs, R rows of bytes, each of which holds four rows of codes: r, r + R, r + 2 R, r + 3 R.
With TRITON_INTERPRET=1 it runs on a CPU, slowly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
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
# Tokens up to which numbers are multiplied one by one: of the caller's activations, and of 8-bit ones.
ONE_BY_ONE, FOUR_AT_ONCE = 1, 2
# Tokens from which weights are written out, unless activations have 8 bits; not in float16, whose sums could overflow
# before the scale makes them small.
MANY, WRITTEN_OUT = 256, (torch.bfloat16, torch.float32)
# Inputs up to which sums of 48 * 127 fit 32 bits.
MOST_WHOLE = 2**31 // (48 * 127) // 16 * 16
# Four products of bytes and their sum: codes without a sign, activations with one.
FOUR_PRODUCTS = tl.constexpr("dp4a.u32.s32 $0, $1, $2, $3;")

# Inputs that a tile of few tokens takes at a time, by what its codes become: more would not fit an H100's registers.
AT_ONCE = {"float32": 32, "16 bits": 64, "lean": 128}


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


@cache
def knows_ptx(whole: bool) -> bool:
    """Whether the GPU runs the PTX of whole numbers, or that of bfloat16, which came with compute capability 9.0."""
    if INTERPRETED or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= ((6, 1) if whole else (9, 0))


@dataclass(frozen=True)
class Few:
    """What a program computes of few tokens: 4 * rows outputs, from `columns` bytes of weights of each at a time."""

    tokens: int
    rows: int
    columns: int
    warps: int = 4

    @classmethod
    def of(cls, tokens: int, rounded: bool) -> Few:
        """What suits so many tokens."""
        together = min(triton.next_power_of_2(tokens), 4)
        return cls(together, 1, 2048, warps=2 if together == 1 else 4) if rounded else cls(together, 2, 1024)


def tile_of(tokens: int, rows: int, inputs: int, kind: str = "lean", processors: int = 132) -> Tile:
    """The tile for a product of this size on a GPU of so many processors; `kind` is one of `AT_ONCE`."""
    if tokens > FEW:
        if kind == "float32":
            tile = Tile(32, 32, 32)
        else:
            tile = Tile(64, 64 if tokens <= 64 else 128, 64, warps=4 if tokens <= 64 else 8)
        wanted, steps = processors, 4
    else:
        tile = Tile(16, 16, AT_ONCE[kind], warps=2 if kind == "lean" else 4, stages=4)
        # A processor streams weights at full rate with two programs or more.
        wanted, steps = 2 * processors, 2
    # Processors that would have nothing to do share the inputs, a few steps of each.
    programs, parts = triton.cdiv(rows, tile.rows) * triton.cdiv(tokens, tile.tokens), 1
    while parts < 8 and programs * parts < wanted and inputs // (2 * parts) >= steps * tile.inputs:
        parts *= 2
    return replace(tile, parts=parts)


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
def four_products(codes, x, sums, ASM: tl.constexpr):
    """sums plus the four products of the bytes of two words."""
    if ASM:
        return tl.inline_asm_elementwise(
            FOUR_PRODUCTS, "=r,r,r,r", [codes, x, sums], dtype=tl.int32, is_pure=True, pack=1
        )
    for byte in tl.static_range(0, 4):
        sums += ((codes >> (8 * byte)) & 255) * ((x << (24 - 8 * byte)) >> 24)
    return sums


@triton.jit
def few_whole_kernel(
    x, bits, row_scale, token_scale, bias, out, tokens, rows, words,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row_there, token_there = row < rows, token < tokens
    place = tl.arange(0, WORDS)
    zero = tl.zeros((TOKENS, ROWS, WORDS), tl.int32)
    a, b, c, d = zero, zero, zero, zero
    own = tl.zeros((TOKENS, WORDS), tl.int32)
    bits_at = bits + row.to(tl.int64)[:, None] * words
    for start in range(0, words, WORDS):
        column = start + place
        inside = column < words
        word = tl.load(bits_at + column[None, :], mask=row_there[:, None] & inside[None, :], other=0)[None, :, :]
        x_TW = tl.load(
            x + token[:, None] * words + column[None, :], mask=token_there[:, None] & inside[None, :], other=0
        )
        own = four_products(own * 0 + 0x01010101, x_TW, own, ASM)
        x_all = zero + x_TW[:, None, :]
        # Codes stay where they lie in their bytes, 4 and 16 times as large; 64 times would not fit 32 bits for long.
        a = four_products(zero + (word & 0x03030303), x_all, a, ASM)
        b = four_products(zero + (word & 0x0C0C0C0C), x_all, b, ASM)
        c = four_products(zero + (word & 0x30303030), x_all, c, ASM)
        d = four_products(zero + ((word >> 2) & 0x30303030), x_all, d, ASM)
    # A code is one more than what it stands for.
    own_T = tl.sum(own, 1)[:, None]
    scale_T = tl.load(token_scale + token, mask=token_there, other=0.0)[:, None]
    there = token_there[:, None] & row_there[None, :]
    out_at = out + token.to(tl.int64)[:, None] * (4 * rows)
    few_put(out_at, row, there, (tl.sum(a, 2) - own_T).to(tl.float32), row_scale, scale_T, bias, row_there, BIASED)
    made = ((tl.sum(b, 2) >> 2) - own_T).to(tl.float32)
    few_put(out_at, row + rows, there, made, row_scale, scale_T, bias, row_there, BIASED)
    made = ((tl.sum(c, 2) >> 4) - own_T).to(tl.float32)
    few_put(out_at, row + 2 * rows, there, made, row_scale, scale_T, bias, row_there, BIASED)
    made = ((tl.sum(d, 2) >> 4) - own_T).to(tl.float32)
    few_put(out_at, row + 3 * rows, there, made, row_scale, scale_T, bias, row_there, BIASED)


@triton.jit
def few_put(out_at, output, there, made, row_scale, scale_T, bias, row_there, BIASED: tl.constexpr):
    made = made * tl.load(row_scale + output, mask=row_there, other=0.0)[None, :] * scale_T
    if BIASED:
        made += tl.load(bias + output, mask=row_there, other=0.0).to(tl.float32)[None, :]
    tl.store(out_at + output[None, :], made, mask=there)


@triton.jit
def few_float_kernel(
    x, bits, row_scale, bias, out, tokens, rows, inputs,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row_there, token_there = row < rows, token < tokens
    place = tl.arange(0, INPUTS)
    zero = tl.zeros((TOKENS, ROWS, INPUTS), tl.float32)
    a, b, c, d = zero, zero, zero, zero
    bits_at = bits + row.to(tl.int64)[:, None] * inputs
    for start in range(0, inputs, INPUTS):
        column = start + place
        inside = column < inputs
        byte = tl.load(bits_at + column[None, :], mask=row_there[:, None] & inside[None, :], other=0).to(tl.int32)
        x_at = x + token.to(tl.int64)[:, None] * inputs + column[None, :]
        x_TI = tl.load(x_at, mask=token_there[:, None] & inside[None, :], other=0.0).to(tl.float32)[:, None, :]
        # A code in the lowest bits of 2^23 is a float without a conversion; what it stands for is one less.
        a += x_TI * (((byte & 3) | 0x4B000000).to(tl.float32, bitcast=True) - 8388609.0)[None, :, :]
        b += x_TI * (((byte & 12) | 0x4B000000).to(tl.float32, bitcast=True) - 8388612.0)[None, :, :]
        c += x_TI * (((byte & 48) | 0x4B000000).to(tl.float32, bitcast=True) - 8388624.0)[None, :, :]
        d += x_TI * (((byte & 192) | 0x4B000000).to(tl.float32, bitcast=True) - 8388672.0)[None, :, :]
    there = token_there[:, None] & row_there[None, :]
    out_at = out + token.to(tl.int64)[:, None] * (4 * rows)
    few_put(out_at, row, there, tl.sum(a, 2), row_scale, 1.0, bias, row_there, BIASED)
    few_put(out_at, row + rows, there, tl.sum(b, 2), row_scale, 0.25, bias, row_there, BIASED)
    few_put(out_at, row + 2 * rows, there, tl.sum(c, 2), row_scale, 0.0625, bias, row_there, BIASED)
    few_put(out_at, row + 3 * rows, there, tl.sum(d, 2), row_scale, 0.015625, bias, row_there, BIASED)


@triton.jit
def codes_kernel(bits, out, rows, inputs, ROWS: tl.constexpr, INPUTS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)[None, :]
    there = (row < rows) & (column < inputs)
    byte = tl.load(bits + row * inputs + column, mask=there, other=0)
    for place in tl.static_range(0, 4):
        made = ((byte >> (2 * place)) & 3).to(tl.int8) - 1
        tl.store(out + (row + place * rows) * inputs + column, made.to(tl.float32), mask=there)


@triton.jit
def scaled_kernel(out, row_scale, bias, outputs, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    out += tl.program_id(0).to(tl.int64) * outputs
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = output < outputs
    made = tl.load(out + output, mask=there, other=0.0).to(tl.float32)
    made *= tl.load(row_scale + output, mask=there, other=0.0)
    if BIASED:
        made += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)
    tl.store(out + output, made, mask=there)


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
    asm: bool | None = None,
    tile: Tile | None = None,
    few: Few | None = None,
    written_out: bool | None = None,
) -> Tensor:
    """x [N, I] times the ternary weights in bits uint8 [R, I] with a scale a row, float32 [4 R]: [N, 4 R] in x's dtype.

    Args:
        rounded: multiply 8-bit activations, a scale a token, in place of x itself.
        asm: take codes out of bytes four at a time in PTX (bfloat16 or `rounded`), which no interpreter runs; None:
            where the GPU knows it.
        tile: what a program computes on tensor cores; None: what suits the size.
        few: what a program computes number by number; None: what suits the size, and nothing for many tokens.
        written_out: write the weights out in x's dtype and let the vendor's library multiply; None: of a long prompt,
            where nothing else is asked for. Its sums are rounded to that dtype before the scale as well as behind it.
    """
    tokens, inputs = x_NI.shape
    rows = len(bits)
    if not tokens:
        return x_NI.new_empty(tokens, 4 * rows)
    if written_out is None:
        asked = rounded or asm is not None or tile is not None or few is not None
        written_out = not asked and tokens >= MANY and x_NI.dtype in WRITTEN_OUT
    if written_out:
        return _scaled(torch.nn.functional.linear(x_NI, codes_of(bits, x_NI.dtype)), scale_O, bias)
    out = x_NI.new_empty(tokens, 4 * rows)
    codes, token_scale = eight_bits(x_NI) if rounded else (x_NI.contiguous(), scale_O)
    one_by_one = FOUR_AT_ONCE if rounded else ONE_BY_ONE
    if few or (few is None and tile is None and tokens <= one_by_one):
        whole = inputs % 4 == 0 and inputs <= MOST_WHOLE and bits.data_ptr() % 4 == 0
        if whole or not rounded:
            _few_product(
                codes, bits, scale_O, token_scale if rounded else None, bias, out, few or Few.of(tokens, rounded)
            )
            return out
    asm = knows_ptx(rounded) if asm is None else asm
    asm = asm and (rounded or x_NI.dtype == torch.bfloat16)
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


def codes_of(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights -1, 0 and 1 that bits uint8 [R, I] stand for: [4 R, I]."""
    rows, inputs = bits.shape
    codes = torch.empty(4 * rows, inputs, dtype=dtype, device=bits.device)
    codes_kernel[(triton.cdiv(rows, 4), triton.cdiv(inputs, 1024))](bits, codes, rows, inputs, ROWS=4, INPUTS=1024)
    return codes


def _scaled(out: Tensor, scale_O: Tensor, bias: Tensor | None) -> Tensor:
    """`out` [N, O], which changes: times a scale an output, plus the bias."""
    tokens, outputs = out.shape
    scaled_kernel[(tokens, triton.cdiv(outputs, 1024))](
        out, scale_O, scale_O if bias is None else bias, outputs, BIASED=bias is not None, BLOCK=1024
    )
    return out


def _few_product(
    x_NI: Tensor,
    bits: Tensor,
    scale_O: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    few: Few,
) -> None:
    """Into out [N, 4 R]; token_scale [N]: of x in 8-bit codes."""
    (tokens, inputs), rows = x_NI.shape, len(bits)
    grid = (triton.cdiv(rows, few.rows), triton.cdiv(tokens, few.tokens))
    given, how = scale_O if bias is None else bias, {"BIASED": bias is not None, "num_warps": few.warps}
    if token_scale is None:
        few_float_kernel[grid](
            x_NI, bits, scale_O, given, out, tokens, rows, inputs,
            TOKENS=few.tokens, ROWS=few.rows, INPUTS=few.columns, **how,
        )  # fmt: skip
        return
    words = [each.contiguous().view(torch.int32) for each in (x_NI, bits)]
    few_whole_kernel[grid](
        *words, scale_O, token_scale, given, out, tokens, rows, inputs // 4,
        TOKENS=few.tokens, ROWS=few.rows, WORDS=few.columns // 4, ASM=knows_ptx(True), **how,
    )  # fmt: skip

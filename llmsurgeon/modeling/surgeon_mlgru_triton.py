"""MLGRU's scan and BitLinear's norm, rounding and product on GPUs, compiled by triton. Sums in float32.

This file ships inside converted checkpoints; surgeon_mlgru.py imports it where triton is installed. With
TRITON_INTERPRET=1 it runs on a CPU, slowly.

Shapes: B batch, T tokens, W state width, N tokens of a flattened batch, I and O in and out features.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # in a try block: transformers must not ask for triton where this file lies unused
    raise RuntimeError("surgeon_mlgru_triton.py needs triton: pip install triton") from error

# Steps of the recurrence that a program advances at once, and channels beside each other in it.
STEPS, CHANNELS = 64, 32
# Tokens whose gradients of a gain one program adds up.
TOGETHER = 16


@triton.jit
def behind(keep, write, later_keep, later_write):
    return keep * later_keep, later_keep * write + later_write


@triton.jit
def scan_kernel(
    keep, write, start, states, tokens, width,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    sequence = tl.program_id(1).to(tl.int64)
    own = channel < width
    place = tl.arange(0, STEPS)
    state_C = tl.load(start + sequence * width + channel, mask=own, other=0.0)
    for first in range(0, tokens, STEPS):
        step = first + place
        there = (step < tokens)[:, None] & own[None, :]
        if BACKWARDS:
            step = tokens - 1 - step
        at = (sequence * tokens + step)[:, None] * width + channel[None, :]
        # Steps beyond the last one keep all and write nothing.
        keep_SC = tl.load(keep + at, mask=there, other=1.0)
        write_SC = tl.load(write + at, mask=there, other=0.0)
        kept_SC, written_SC = tl.associative_scan((keep_SC, write_SC), 0, behind)
        state_SC = kept_SC * state_C[None, :] + written_SC
        tl.store(states + at, state_SC, mask=there)
        state_C = tl.sum(tl.where((place == STEPS - 1)[:, None], state_SC, 0.0), 0)


def scan(keep_BTW, write_BTW, start_BW, backwards=False):
    """h_t = keep_t h_(t-1) + write_t from h_0 = start, float32 [B, T, W]; `backwards` from the last step."""
    keep_BTW, write_BTW, start_BW = (each.float().contiguous() for each in (keep_BTW, write_BTW, start_BW))
    batch, tokens, width = keep_BTW.shape
    states_BTW = torch.empty_like(keep_BTW)
    if states_BTW.numel():
        scan_kernel[(triton.cdiv(width, CHANNELS), batch)](
            keep_BTW, write_BTW, start_BW, states_BTW, tokens, width,
            STEPS=STEPS, CHANNELS=CHANNELS, BACKWARDS=backwards, num_warps=2,
        )  # fmt: skip
    return states_BTW


@triton.jit
def nearest(value):
    # To the nearest whole number, halves to even: float32 has no room for more behind 1.5 * 2^23.
    return (value + 12582912.0) - 12582912.0


@triton.jit
def normed_kernel(x, gain, codes, scale, rms, inputs, eps, smallest, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < inputs
    x_I = tl.load(x + token * inputs + at, mask=there, other=0.0)
    wide_I = x_I.to(tl.float32)
    root = 1.0 / tl.sqrt(tl.sum(wide_I * wide_I, 0) / inputs + eps)
    y_I = (wide_I * root).to(x_I.dtype).to(tl.float32) * tl.load(gain + at, mask=there, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(y_I), 0) / 127, smallest)
    code_I = tl.minimum(tl.maximum(nearest(y_I / step), -127), 127)
    tl.store(codes + token * inputs + at, code_I.to(tl.int8), mask=there)
    tl.store(scale + token, step)
    tl.store(rms + token, root)


def normed_codes(x_NI, gain_I, eps, smallest):
    """RMSNorm and 8 bits a token in one pass: (codes int8 [N, I], scale float32 [N, 1], 1 / rms float32 [N, 1])."""
    x_NI = x_NI.contiguous()
    count, inputs = x_NI.shape
    codes = torch.empty_like(x_NI, dtype=torch.int8)
    scale, rms = x_NI.new_empty(2, count, 1, dtype=torch.float32)
    if count:
        block = triton.next_power_of_2(inputs)
        normed_kernel[(count,)](
            x_NI, gain_I.contiguous(), codes, scale, rms, inputs, eps, smallest, BLOCK=block, num_warps=_warps(block)
        )
    return codes, scale, rms


@triton.jit
def ternary_kernel(weight, scale, codes, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    near = nearest(tl.load(weight + at, mask=there, other=0.0).to(tl.float32) / tl.load(scale))
    tl.store(codes + at, tl.minimum(tl.maximum(near, -1), 1).to(tl.int8), mask=there)


def ternary_codes(weight_OI, smallest):
    """(codes -1, 0, 1 as int8 [O, I], scale float32 [1]) of the mean absolute value."""
    weight_OI = weight_OI.contiguous()
    scale = weight_OI.abs().mean(dtype=torch.float32).clamp_min(smallest).to(weight_OI.dtype).float().view(1)
    codes = torch.empty_like(weight_OI, dtype=torch.int8)
    ternary_kernel[(triton.cdiv(codes.numel(), 4096),)](weight_OI, scale, codes, codes.numel(), BLOCK=4096)
    return codes, scale


@triton.jit
def codes_product_kernel(
    codes, weight, scale, weight_scale, bias, out, tokens, outputs, inputs,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    place = tl.arange(0, INPUTS)
    token_there, output_there = token < tokens, output < outputs
    codes_at = codes + token.to(tl.int64)[:, None] * inputs
    weight_at = weight + output.to(tl.int64)[None, :] * inputs
    sums = tl.zeros((TOKENS, OUTPUTS), tl.int32)
    for start in range(0, inputs, INPUTS):
        column = start + place
        inside = column < inputs
        code = tl.load(codes_at + column[None, :], mask=token_there[:, None] & inside[None, :], other=0)
        own = tl.load(weight_at + column[:, None], mask=inside[:, None] & output_there[None, :], other=0)
        sums = tl.dot(code, own, sums, out_dtype=tl.int32)
    made = sums.to(tl.float32) * tl.load(scale + token, mask=token_there, other=0.0)[:, None] * tl.load(weight_scale)
    if BIASED:
        made += tl.load(bias + output, mask=output_there, other=0.0).to(tl.float32)[None, :]
    there = token_there[:, None] & output_there[None, :]
    tl.store(out + token.to(tl.int64)[:, None] * outputs + output[None, :], made, mask=there)


def codes_product(codes_NI, scale_N1, weight_OI, weight_scale, bias, dtype):
    """(codes * scale) times (ternary codes * their scale) and a bias, [N, O]: sums of whole numbers, exactly."""
    (count, inputs), outputs = codes_NI.shape, len(weight_OI)
    out = scale_N1.new_empty(count, outputs, dtype=dtype)
    if count:
        tokens = 128 if count > 64 else 64
        given = scale_N1 if bias is None else bias
        codes_product_kernel[(triton.cdiv(count, tokens), triton.cdiv(outputs, 64))](
            codes_NI, weight_OI, scale_N1, weight_scale, given, out, count, outputs, inputs,
            TOKENS=tokens, OUTPUTS=64, INPUTS=64, BIASED=bias is not None, num_warps=8, num_stages=4,
        )  # fmt: skip
    return out


@triton.jit
def normed_back_kernel(
    grad_y, codes, scale, rms, gain, grad_x, grad_gain, count, inputs,
    TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * TOGETHER
    at = tl.arange(0, BLOCK)
    there = at < inputs
    gain_I = tl.load(gain + at, mask=there, other=0.0).to(tl.float32)
    # A closed channel passes nothing on and says nothing about itself.
    opened_I = tl.where(tl.abs(gain_I) < 1e-12, 0.0, 1.0 / tl.where(tl.abs(gain_I) < 1e-12, 1.0, gain_I))
    sums_I = tl.zeros((BLOCK,), tl.float32)
    for more in range(TOGETHER):
        # What lies behind the last token is the last token again, without a say.
        token = tl.minimum(first + more, count - 1)
        real = there & (at * 0 + first + more < count)
        step, root = tl.load(scale + token), tl.load(rms + token)
        normed_I = tl.load(codes + token * inputs + at, mask=real, other=0).to(tl.float32) * step * opened_I
        grad_I = tl.load(grad_y + token * inputs + at, mask=real, other=0.0).to(tl.float32)
        sums_I += grad_I * normed_I
        grad_I = grad_I * gain_I
        mean = tl.sum(grad_I * normed_I, 0) / inputs
        tl.store(grad_x + token * inputs + at, root * (grad_I - normed_I * mean), mask=real)
    tl.store(grad_gain + tl.program_id(0).to(tl.int64) * inputs + at, sums_I, mask=there)


def normed_back(grad_y_NI, codes_NI, scale_N1, rms_N1, gain_I, dtype):
    """Gradients of what was normed, [N, I] in `dtype`, and of the gain, float32 [I], behind `normed_codes`."""
    grad_y_NI = grad_y_NI.contiguous()
    count, inputs = grad_y_NI.shape
    grad_x = torch.empty_like(grad_y_NI, dtype=dtype)
    programs = triton.cdiv(count, TOGETHER)
    grad_gain = scale_N1.new_zeros(programs, inputs)
    if count:
        block = triton.next_power_of_2(inputs)
        normed_back_kernel[(programs,)](
            grad_y_NI, codes_NI, scale_N1, rms_N1, gain_I.contiguous(), grad_x, grad_gain, count, inputs,
            TOGETHER=TOGETHER, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return grad_x, grad_gain.sum(0)


def _warps(block):
    return min(16, max(1, block // 512))

"""Triton's kernels against torch: on a card where there is one, else in triton's interpreter (TRITON_INTERPRET=1).

tests/kernels/test_interpreted.py runs this file in a process of its own.
"""

from __future__ import annotations

import operator
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("no card, and TRITON_INTERPRET is not set", allow_module_level=True)

from llmsurgeon.kernels import packed, packed_triton  # noqa: E402
from llmsurgeon.kernels.packed_triton import Few, Tile, product, tile_of  # noqa: E402
from llmsurgeon.modeling import surgeon_fff as fff  # noqa: E402
from llmsurgeon.modeling import surgeon_fff_triton as fff_kernels  # noqa: E402
from llmsurgeon.modeling import surgeon_mlgru as mlgru  # noqa: E402
from llmsurgeon.modeling import surgeon_mlgru_triton as kernels  # noqa: E402

CLOSE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
few = settings(deadline=None, max_examples=6 if DEVICE == "cpu" else 12)


def drawn(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def weights(rows, inputs, seed=0):
    """(bits [R, I], codes [4 R, I], scale [4 R])."""
    codes = torch.randint(-1, 2, (4 * rows, inputs), generator=torch.Generator().manual_seed(seed))
    parts = (codes + 1).to(torch.uint8).view(4, rows, inputs)
    bits = parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6
    return bits.to(DEVICE), codes.to(DEVICE), drawn(seed, 4 * rows).abs() + 0.1


def distance(found, expected):
    """Relative, in float64; NaN is far."""
    found, expected = found.detach(), expected.detach()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@few
@given(
    tokens=st.sampled_from([1, 2, 15, 16, 17, 40]),
    inputs=st.sampled_from([1, 31, 64, 100, 300]),
    rows=st.sampled_from([1, 7, 16, 33]),
    dtype=st.sampled_from(list(CLOSE)),
    how=st.sampled_from(["its own", "two parts", "one by one"]),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_products_of_packed_weights(tokens, inputs, rows, dtype, how, biased, seed):
    bits, codes, scale = weights(rows, inputs, seed)
    x = drawn(seed + 1, tokens, inputs, dtype=dtype)
    bias = drawn(seed, 4 * rows) if biased else None
    given = {"two parts": {"tile": Tile(16, 16, 32, parts=2)}, "one by one": {"few": Few(4, 2, 64)}}.get(how, {})
    expected = x.double() @ (codes.double() * scale.double()[:, None]).T + (0 if bias is None else bias.double())
    found = product(x, bits, scale, bias, **given)
    assert found.dtype == dtype and distance(found, expected) < CLOSE[dtype]
    # With activations of 8 bits the sums are of whole numbers: nothing is lost but what rounding them loses.
    x_codes, step = packed_triton.eight_bits(x)
    assert ((x_codes.float() * step[:, None] - x.float()).abs() <= step[:, None] * 0.501).all()
    rounded = x_codes.double() * step.double()[:, None]
    expected = rounded @ (codes.double() * scale.double()[:, None]).T + (0 if bias is None else bias.double())
    assert distance(product(x, bits, scale, bias, rounded=True, **given), expected) < CLOSE[dtype]


@few
@given(
    tokens=st.sampled_from([1, 2, 17, 40]),
    inputs=st.sampled_from([1, 31, 300, 1030]),
    rows=st.sampled_from([1, 7, 33, 260]),
    dtype=st.sampled_from(list(packed_triton.WRITTEN_OUT)),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_weights_that_are_written_out(tokens, inputs, rows, dtype, biased, seed):
    bits, codes, scale = weights(rows, inputs, seed)
    assert torch.equal(packed_triton.codes_of(bits, dtype), codes.to(dtype))
    x = drawn(seed + 1, tokens, 2 * inputs, dtype=dtype)[:, ::2]  # not contiguous
    bias = drawn(seed, 4 * rows) if biased else None
    expected = x.double() @ (codes.double() * scale.double()[:, None]).T + (0 if bias is None else bias.double())
    found = product(x, bits, scale, bias, written_out=True)
    assert found.dtype == dtype and found.shape == (tokens, 4 * rows) and distance(found, expected) < CLOSE[dtype]


def test_long_prompts_have_their_weights_written_out(monkeypatch):
    bits, _, scale = weights(7, 31)
    written = []
    real = packed_triton.codes_of
    monkeypatch.setattr(packed_triton, "codes_of", lambda *given: written.append(1) or real(*given))
    for dtype in CLOSE:
        for tokens in (packed_triton.MANY - 1, packed_triton.MANY):
            x = drawn(1, tokens, 31, dtype=dtype)
            product(x, bits, scale, rounded=True)
            product(x, bits, scale)
            long = dtype in packed_triton.WRITTEN_OUT and tokens == packed_triton.MANY
            assert bool(written) == long, (dtype, tokens)
            written.clear()


@pytest.mark.skipif(INTERPRETED or DEVICE == "cpu", reason="PTX runs on cards")
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 17, 130])
def test_codes_taken_out_by_ptx(tokens, rounded):
    bits, _, scale = weights(100, 517)
    x = drawn(1, tokens, 517, dtype=torch.bfloat16)
    tile = tile_of(tokens, 100, 517)
    plain = product(x, bits, scale, rounded=rounded, asm=False, tile=tile)
    assert (
        distance(product(x, bits, scale, rounded=rounded, asm=True, tile=tile), plain.double()) < CLOSE[torch.bfloat16]
    )


WHOLE = {
    "shl": operator.lshift,
    "shr": operator.rshift,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "sub": operator.sub,
}


def ran(asm, byte):
    """What PTX of these few kinds does to a word of four bytes: its outputs, as words."""
    registers = {}
    outputs = {}

    def value(name):
        name = name.strip()
        if name in registers:
            return registers[name]
        return outputs[name] if name in outputs else byte if name.startswith("$") else int(name, 0)

    for line in asm.replace("{", "").replace("}", "").replace("\n", " ").split(";"):
        words = line.split(None, 1)
        if not words or words[0].startswith(".reg"):
            continue
        kind = words[0].split(".")[0]
        target, *rest = (part.strip() for part in words[1].split(","))
        given = [value(each) for each in rest]
        if kind == "mov":
            made = given[0]
        elif kind == "prmt":
            both = given[0].to_bytes(4, "little") + given[1].to_bytes(4, "little")
            made = int.from_bytes(bytes(both[(given[2] >> 4 * place) & 7] for place in range(4)), "little")
        elif words[0].startswith("sub.rn.bf16x2"):
            pairs = torch.tensor(given, dtype=torch.int64).to(torch.int32).view(torch.bfloat16).view(2, 2).double()
            made = int((pairs[0] - pairs[1]).to(torch.bfloat16).view(torch.int32)) & 0xFFFFFFFF
        else:
            made = WHOLE[kind](*given) & 0xFFFFFFFF
        (outputs if target.startswith("$") else registers)[target] = made
    return [outputs[f"${place}"] for place in range(len(outputs))]


def test_what_the_ptx_means():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        codes = torch.randint(0, 3, (4, 4), generator=generator)  # place, byte
        word = sum(int(codes[place, byte]) << (8 * byte + 2 * place) for place in range(4) for byte in range(4))
        narrow = torch.tensor(ran(packed_triton.INT8_CODES, word)).to(torch.int32).view(torch.int8).view(4, 4)
        assert torch.equal(narrow.long(), codes - 1)
        wide = torch.tensor(ran(packed_triton.BFLOAT16_CODES, word)).to(torch.int32).view(torch.bfloat16).view(4, 4)
        assert torch.equal(wide.double() * 2.0**126, (codes - 1).double())
    assert packed_triton.RAISED * packed_triton.LOWERED == 2.0**126


def test_a_packed_linear_takes_the_kernel(monkeypatch):
    bits, codes, scale = weights(5, 24)
    made = packed.PackedLinear(codes.cpu(), scale.cpu(), None, torch.float32).to(DEVICE)
    x = drawn(0, 2, 3, 48)[..., ::2]  # not contiguous
    assert packed.on_triton(x) and torch.equal(made.bits, bits)
    expected = x.double() @ (codes.double() * scale.double()[:, None]).T
    assert distance(made(x), expected) < 2e-5
    made.rounded = True
    assert 1e-5 < distance(made(x), expected) < 2e-2
    assert made(x[:0]).shape == (0, 3, 20)
    assert not packed.on_triton(x.clone().requires_grad_()) and not packed.on_triton(x.double())


def test_tiles_cover_what_they_are_made_for():
    for tokens, rows, inputs in ((1, 1024, 4096), (16, 3584, 4096), (1, 8, 64), (64, 1024, 14336), (2048, 1024, 14336)):
        tile = tile_of(tokens, rows, inputs)
        assert (
            tile.rows >= 16 and tile.tokens >= min(tokens, 16) and tile.parts * tile.inputs <= max(inputs, tile.inputs)
        )


@few
@given(
    batch=st.integers(0, 3),
    tokens=st.sampled_from([2, 3, 63, 64, 65]),
    width=st.sampled_from([1, 31, 32, 40]),
    seed=st.integers(0, 9),
)
def test_the_scan_and_its_gradients(batch, tokens, width, seed, kernel_of):
    keep = torch.sigmoid(2 * drawn(seed, batch, width, tokens)).mT  # not contiguous
    drawn_ = [keep, drawn(seed, batch, tokens, width), drawn(seed, batch, width)]
    found = {}
    for name in ("torch", "triton"):
        kernel_of(name)
        inputs = [each.detach().clone(memory_format=torch.preserve_format).requires_grad_() for each in drawn_]
        states = mlgru.linear_recurrence(*inputs)
        (states * torch.arange(1, width + 1, device=DEVICE)).square().sum().backward()
        found[name] = [states, *(each.grad for each in inputs)]
    for mine, theirs in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-4)


@few
@given(
    shape=st.sampled_from([(0,), (1,), (3, 5), (2, 17)]),
    inputs=st.sampled_from([8, 33, 100]),
    outputs=st.sampled_from([1, 24, 130]),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_bit_linear_and_its_gradients(shape, inputs, outputs, biased, dtype, seed, kernel_of):
    torch.manual_seed(seed)
    layer = mlgru.BitLinear(inputs, outputs, biased, 1e-5).to(DEVICE, dtype).train()
    with torch.no_grad():
        layer.gain.copy_(1 + 0.3 * drawn(seed, inputs))
        layer.gain[0] = 0
    found = {}
    for name in ("torch", "triton"):
        kernel_of(name)
        layer.zero_grad()
        x = drawn(seed, *shape, inputs, dtype=dtype).requires_grad_()
        y = layer(x)
        (y.float() * torch.linspace(1, 2, outputs, device=DEVICE)).square().sum().backward()
        found[name] = [y, x.grad, *(parameter.grad for parameter in layer.parameters())]
    for mine, theirs in zip(found["triton"], found["torch"], strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        # In bfloat16 torch rounds before it rounds to 8 bits, and codes move by one.
        assert distance(mine, theirs.double()) < (1e-5 if dtype == torch.float32 else 1e-1)


def test_codes_of_weights_are_those_of_training():
    weight = drawn(3, 37, 50)
    codes, scale = kernels.ternary_codes(weight, mlgru.SMALLEST_SCALE)
    torch.testing.assert_close(codes * scale, mlgru.ternary(weight))


def test_a_share_that_is_not_all_stays_with_torch(kernel_of, monkeypatch):
    kernel_of("triton")
    monkeypatch.setattr(mlgru, "_forward_on_triton", None)
    layer = mlgru.BitLinear(16, 4, False, 1e-5).to(DEVICE).train()
    layer.share = 0.5
    x = drawn(0, 3, 16)
    torch.testing.assert_close(layer(x), mlgru.bit_linear(x, layer.gain, layer.weight, None, 0.5, 1e-5))
    assert F.mse_loss(layer(x), layer(x)) == 0


@pytest.fixture(scope="module")
def kernel_of():
    """Choose torch's or triton's way."""
    before = os.environ.get("LLMSURGEON_MLGRU_KERNEL")

    def choose(name):
        os.environ["LLMSURGEON_MLGRU_KERNEL"] = name

    yield choose
    os.environ.pop("LLMSURGEON_MLGRU_KERNEL", None)
    if before is not None:
        os.environ["LLMSURGEON_MLGRU_KERNEL"] = before


@few
@given(
    depth=st.sampled_from([0, 1, 4]),
    warps=st.sampled_from([1, 4]),
    count=st.sampled_from([0, 1, 5]),
    gated=st.booleans(),
    biased=st.booleans(),
    trees=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
def test_trees_of_neurons(depth, warps, count, gated, biased, trees, seed):
    torch.manual_seed(seed)
    module = fff.NodeFeedForward(20, depth, "silu", gated, biased, trees=trees)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3)
    module = module.to(DEVICE).requires_grad_(False)
    x = drawn(seed, count, 20)
    found = fff_kernels.nodes(x, *module._part("node"), module.out_bias, depth, "silu", warps=warps)
    expected = module._gathered(x) if count else x
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

"""Hard inference of fast feedforward networks on CPUs, compiled by numba. float32 and bfloat16; sums in float32.

Tokens walk in groups, level by level, so that one token's rows arrive while another's are multiplied. Only scores are
kept on the way; the activations of a whole path are then computed in vector registers. Many tokens first walk the top
of the tree, are then sorted by the subtree that they reached, and go on subtree by subtree, so that a subtree's rows
stay in the cache for all its tokens.

For a few tokens the way to the kernel takes longer than the kernel: `Shortcut` goes from the module's forward into
machine code by addresses, with all prepared that does not change between calls.

This file ships inside converted checkpoints; surgeon_fff.py imports it where numba is installed.

Shapes: N tokens, D model width, L leaves, W neurons a leaf, K trees, M nodes a tree.
"""

import os
from functools import cache
from weakref import WeakKeyDictionary

import numpy as np
import torch

try:
    from llvmlite import ir
    from numba import carray, get_num_threads, njit, prange, set_num_threads, types
    from numba.core import cgutils
    from numba.core.config import NUMBA_NUM_THREADS
    from numba.extending import intrinsic
except ImportError as error:  # in a try block: transformers must not ask for numba where this file lies unused
    raise RuntimeError("surgeon_fff_numba.py needs numba: pip install numba") from error

# Bytes of a cache line, how many of a row are prefetched (the processor goes on with the rest by itself, and asking for
# more costs more than it saves), and the level that they go to, as LLVM counts them.
LINE, AHEAD, INTO_L2 = 64, 8, 2
ACTIVATIONS = {"silu": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
# Tokens that go down a tree in step.
GROUP = 16
# Tokens from which they are sorted by subtree, the levels that all walk before, and tokens that are sorted together:
# few enough that what was read once stays in the last cache.
SORTED_FROM, TOP_LEVELS, SORTED = 64, 6, 4096
# Tokens from which threads are worth waking.
THREADED_FROM = 32
# Sums may be reordered, or they could not run in vector registers.
FAST = {"reassoc", "contract", "nsz"}


# Numbers in a vector, and vectors that a loop keeps in flight: enough to hide the latency of a multiply-add.
LANES, FLIGHT = 16, 4
BLOCK = LANES * FLIGHT
WORD, FLOAT = ir.IntType(32), ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)


def _widened(builder, value, lanes):
    """float32 of numbers stored as float32, or as the bits of bfloat16 in integers."""
    scalar = value.type.element if lanes > 1 else value.type
    if scalar == FLOAT:
        return value
    word = ir.VectorType(WORD, lanes) if lanes > 1 else WORD
    shift = ir.Constant(word, [16] * lanes if lanes > 1 else 16)
    return builder.bitcast(builder.shl(builder.zext(value, word), shift), VECTOR if lanes > 1 else FLOAT)


def _loaded(builder, pointer, at, lanes):
    """`lanes` numbers from `pointer` + `at`, in float32."""
    place = builder.gep(pointer, [at])
    if lanes > 1:
        place = builder.bitcast(place, ir.VectorType(pointer.type.pointee, lanes).as_pointer())
    value = builder.load(place)
    # Rows start at any multiple of their numbers' size.
    value.align = 2 if pointer.type.pointee != FLOAT else 4
    return _widened(builder, value, lanes)


def _stored(builder, value, pointer, at):
    place = builder.bitcast(builder.gep(pointer, [at]), value.type.as_pointer())
    builder.store(value, place, align=4)


def _multiply_add(builder, a, b, c):
    name = f"llvm.fma.v{LANES}f32" if a.type == VECTOR else "llvm.fma.f32"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(a.type, [a.type] * 3), name
    )
    return builder.call(function, [a, b, c])


def _row(context, builder, kind, array, index):
    """Pointer to row `index` of a two-dimensional contiguous array, and the row's length."""
    made = context.make_array(kind)(context, builder, array)
    _, width = cgutils.unpack_tuple(builder, made.shape)
    return builder.gep(made.data, [builder.mul(index, width)]), width


@intrinsic
def dot(context, a, i, b, j):
    """Dot product of row i of `a` and row j of `b`, float32."""

    def generate(context, builder, signature, arguments):
        first, width = _row(context, builder, a, *arguments[:2])
        second, _ = _row(context, builder, b, *arguments[2:])
        size = width.type
        blocks = builder.udiv(width, size(BLOCK))
        sums = [cgutils.alloca_once_value(builder, VECTOR([0.0] * LANES)) for _ in range(FLIGHT)]
        with cgutils.for_range(builder, blocks) as loop:
            for k, total in enumerate(sums):
                at = builder.add(builder.mul(loop.index, size(BLOCK)), size(k * LANES))
                x, y = (_loaded(builder, pointer, at, LANES) for pointer in (first, second))
                builder.store(_multiply_add(builder, x, y, builder.load(total)), total)
        whole = builder.load(sums[0])
        for total in sums[1:]:
            whole = builder.fadd(whole, builder.load(total))
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            half = ir.Constant(ir.VectorType(WORD, LANES), [(k + lanes) % LANES for k in range(LANES)])
            whole = builder.fadd(whole, builder.shuffle_vector(whole, whole, half))
        rest = cgutils.alloca_once_value(builder, builder.extract_element(whole, WORD(0)))
        with cgutils.for_range_slice(builder, builder.mul(blocks, size(BLOCK)), width, size(1)) as (at, _):
            x, y = (_loaded(builder, pointer, at, 1) for pointer in (first, second))
            builder.store(_multiply_add(builder, x, y, builder.load(rest)), rest)
        return builder.load(rest)

    return types.float32(a, types.intp, b, types.intp), generate


@intrinsic
def add_rows(context, y, n, start, begin, scales, rows, m, count, source):
    """y[n] = start[begin] + sum over i < count of scales[m, i] * source[rows[m, i]]; y stays in registers meanwhile."""

    def generate(context, builder, signature, arguments):
        target, width = _row(context, builder, y, *arguments[:2])
        first, _ = _row(context, builder, start, *arguments[2:4])
        scale, _ = _row(context, builder, scales, arguments[4], arguments[6])
        row, _ = _row(context, builder, rows, arguments[5], arguments[6])
        count = arguments[7]
        made = context.make_array(source)(context, builder, arguments[8])
        size = width.type

        def block(start, flight, lanes):
            kind = VECTOR if lanes > 1 else FLOAT
            places = [builder.add(start, size(k * lanes)) for k in range(flight)]
            sums = [cgutils.alloca_once(builder, kind) for _ in places]
            for place, total in zip(places, sums, strict=True):
                builder.store(_loaded(builder, first, place, lanes), total)
            with cgutils.for_range(builder, count) as loop:
                factor = builder.load(builder.gep(scale, [loop.index]))
                if lanes > 1:
                    single = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), factor, WORD(0))
                    zeros = ir.Constant(ir.VectorType(WORD, LANES), [0] * LANES)
                    factor = builder.shuffle_vector(single, single, zeros)
                begin = builder.mul(builder.load(builder.gep(row, [loop.index])), width)
                for place, total in zip(places, sums, strict=True):
                    value = _loaded(builder, made.data, builder.add(begin, place), lanes)
                    builder.store(_multiply_add(builder, factor, value, builder.load(total)), total)
            for place, total in zip(places, sums, strict=True):
                _stored(builder, builder.load(total), target, place)

        blocks = builder.udiv(width, size(BLOCK))
        with cgutils.for_range(builder, blocks) as loop:
            block(builder.mul(loop.index, size(BLOCK)), FLIGHT, LANES)
        with cgutils.for_range_slice(builder, builder.mul(blocks, size(BLOCK)), width, size(1)) as (at, _):
            block(at, 1, 1)
        return context.get_dummy_value()

    return types.void(y, types.intp, start, types.intp, scales, rows, types.intp, types.intp, source), generate


@intrinsic
def prefetch(context, a, i):
    """Ask for the beginning of row i of `a`, which is read soon."""

    def generate(context, builder, signature, arguments):
        place, width = _row(context, builder, a, *arguments)
        size = a.dtype.bitwidth // 8
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, WORD, WORD, WORD])
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        for line in range(AHEAD):
            # Past the end of a short row there is nothing to fear: a prefetch never faults.
            pointer = builder.bitcast(builder.gep(place, [width.type(line * LINE // size)]), byte)
            builder.call(function, [pointer, WORD(0), WORD(INTO_L2), WORD(1)])
        return context.get_dummy_value()

    return types.void(a, types.intp), generate


@intrinsic
def wide(context, number):
    """float32 of one number stored as float32, or as the bits of a bfloat16 in a uint16."""

    def generate(context, builder, signature, arguments):
        return _widened(builder, arguments[0], 1)

    return types.float32(number), generate


@intrinsic
def as_float(context, bits):
    """The float32 that an int32 holds the bits of."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), generate


@njit(fastmath=FAST, error_model="numpy", inline="always")
def step(total, x, coefficient):
    """One step of Horner's scheme, in float32."""
    return total * x + np.float32(coefficient)


@njit(fastmath=FAST, error_model="numpy", inline="always")
def exponential(z):
    """exp of z <= 0 in plain arithmetic, which goes into vector registers: 2^k times a series, |r| <= ln(2) / 2."""
    z = max(z, np.float32(-87))
    k = np.int32(z * np.float32(1.4426950408889634) - np.float32(0.5))
    r = z - np.float32(k) * np.float32(0.6931471805599453)
    series = step(step(step(np.float32(1 / 720), r, 1 / 120), r, 1 / 24), r, 1 / 6)
    return step(step(step(series, r, 1 / 2), r, 1), r, 1) * as_float(np.int32((k + 127) << 23))


@njit(fastmath=FAST, error_model="numpy", inline="always")
def sigmoid(z):
    tail = exponential(-abs(z))
    return (np.float32(1) if z > 0 else tail) / (np.float32(1) + tail)


@njit(fastmath=FAST, error_model="numpy", inline="always")
def gelu(z):
    # The error function to 1.5e-7: Abramowitz and Stegun, 7.1.26.
    x = abs(z) * np.float32(0.7071067811865476)
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * x)
    series = step(step(np.float32(1.061405429), t, -1.453152027), t, 1.421413741)
    tail = step(step(series, t, -0.284496736), t, 0.254829592) * t * np.float32(0.5) * exponential(-x * x)
    return z * (np.float32(1) - tail if z > 0 else tail)


@njit(fastmath=FAST, error_model="numpy", inline="always")
def gelu_tanh(z):
    # (1 + tanh(u)) / 2 = sigmoid(2 u)
    return z * sigmoid(np.float32(1.5957691216057308) * (z + np.float32(0.044715) * z * z * z))


@njit(fastmath=FAST, error_model="numpy")
def activate(kind, score, n, inner):
    """Row n of scores [N, a multiple of LANES] -> activations, times row n of `inner` where that is not empty."""
    row = score[n]
    for begin in range(0, len(row), LANES):
        part = row[begin : begin + LANES]
        if kind == 0:
            for i in range(LANES):
                part[i] = part[i] * sigmoid(part[i])
        elif kind == 1:
            for i in range(LANES):
                part[i] = np.float32(0) if part[i] < 0 else part[i]
        elif kind == 2:
            for i in range(LANES):
                part[i] = gelu(part[i])
        else:
            for i in range(LANES):
                part[i] = gelu_tanh(part[i])
    if len(inner) > 0:
        row *= inner[n]


@njit(fastmath=FAST, inline="always")
def walk(
    x, start, order, begin, end, gate, up, gate_bias, up_bias, down, offset, depth, first, last,
    node, rows, score, inner,
):  # fmt: skip
    """Tokens start + order[begin:end] down a tree, levels `first` to `last`, in step: one token's rows arrive while
    another's are multiplied. Fills the rows and scores of the neurons that they visit (and, where there are gates, what
    they multiply) and moves `node` on; these have a row for each token of the chunk that begins at `start`.

    An empty array stands for a gate or a bias that is not there.
    """
    for level in range(first, last):
        for i in range(begin, end):
            n = order[i]
            row = offset + node[n]
            branch = dot(x, start + n, up, row)
            if up_bias.shape[0] > 0:
                branch += wide(up_bias[row])
            if gate.shape[0] > 0:
                inner[n, level] = branch
                branch = dot(x, start + n, gate, row)
                if gate_bias.shape[0] > 0:
                    branch += wide(gate_bias[row])
            score[n, level] = branch
            rows[n, level] = row
            node[n] = 2 * node[n] + 1 + (1 if branch > 0 else 0)
            # What the top of a tree writes with is read when all tokens are sorted: too far ahead.
            if last > depth:
                prefetch(down, row)
            if level + 1 < last and end - begin > 1:
                prefetch(up, offset + node[n])
                if gate.shape[0] > 0:
                    prefetch(gate, offset + node[n])


def _nodes(x, gate, up, down, gate_bias, up_bias, out_bias, trees, depth, kind, top, y):
    """Node form. The top levels in the given order; sorted by subtree, the rest and the output."""
    levels, size, chunk = depth + 1, up.shape[0] // trees, min(x.shape[0], SORTED)
    lanes = (levels + LANES - 1) // LANES * LANES
    score = np.zeros((chunk, lanes), np.float32)
    inner = np.zeros((chunk if gate.shape[0] > 0 else 0, lanes), np.float32)
    rows = np.empty((chunk, levels), np.int64)
    node = np.empty(chunk, np.int64)
    for start in range(0, x.shape[0], SORTED):
        count = min(x.shape[0] - start, SORTED)
        order = np.arange(count)
        groups = (count + GROUP - 1) // GROUP
        for tree in range(trees):
            offset = tree * size
            node[:count] = 0
            if top > 0:
                for g in prange(groups):
                    begin, end = g * GROUP, min(g * GROUP + GROUP, count)
                    walk(
                        x, start, order, begin, end, gate, up, gate_bias, up_bias, down, offset, depth, 0, top,
                        node, rows, score, inner,
                    )  # fmt: skip
                order = sorted_by(node[:count], (1 << top) - 1, 1 << top)
            for g in prange(groups):
                begin, end = g * GROUP, min(g * GROUP + GROUP, count)
                walk(
                    x, start, order, begin, end, gate, up, gate_bias, up_bias, down, offset, depth, top, levels,
                    node, rows, score, inner,
                )  # fmt: skip
                for i in range(begin, end):
                    n = order[i]
                    activate(kind, score, n, inner)
                    if tree == 0:
                        add_rows(y, start + n, out_bias, 0, score, rows, n, levels, down)
                    else:
                        add_rows(y, start + n, y, start + n, score, rows, n, levels, down)


def _route(x, weight, bias, depth, leaf):
    """Leaf form: the leaf of each token, in groups that go down in step."""
    groups = (x.shape[0] + GROUP - 1) // GROUP
    for g in prange(groups):
        begin, end = g * GROUP, min(g * GROUP + GROUP, x.shape[0])
        for n in range(begin, end):
            leaf[n] = 0
        for _ in range(depth):
            for n in range(begin, end):
                score = dot(x, n, weight, leaf[n]) + wide(bias[leaf[n]])
                leaf[n] = 2 * leaf[n] + 1 + (1 if score >= 0 else 0)
        for n in range(begin, end):
            leaf[n] -= (1 << depth) - 1


def _leaves(x, leaf, gate, up, down, gate_bias, up_bias, out_bias, width, kind, y):
    """Leaf form: adds each token's leaf to y, leaf after leaf."""
    order = sorted_by(leaf, 0, out_bias.shape[0])
    lanes = (width + LANES - 1) // LANES * LANES
    for i in prange(x.shape[0]):
        n = order[i]
        score = np.zeros((1, lanes), np.float32)
        inner = np.zeros((1 if gate.shape[0] > 0 else 0, lanes), np.float32)
        rows = np.empty((1, width), np.int64)
        one = np.ones((1, 1), np.float32)
        own = np.empty((1, 1), np.int64)
        own[0, 0] = leaf[n]
        for w in range(width):
            row = leaf[n] * width + w
            rows[0, w] = row
            branch = dot(x, n, up, row)
            if up_bias.shape[0] > 0:
                branch += wide(up_bias[row])
            if gate.shape[0] > 0:
                inner[0, w] = branch
                branch = dot(x, n, gate, row)
                if gate_bias.shape[0] > 0:
                    branch += wide(gate_bias[row])
            score[0, w] = branch
        activate(kind, score, 0, inner)
        add_rows(y, n, y, n, one, own, 0, 1, out_bias)
        add_rows(y, n, y, n, score, rows, 0, width, down)


@njit(cache=True)
def sorted_by(keys, least, count):
    """Indices that sort `keys`, which are `least` and the `count` - 1 numbers after it; equal keys keep their order."""
    place = np.zeros(count + 1, np.int64)
    for key in keys:
        place[key - least + 1] += 1
    place = np.cumsum(place)
    order = np.empty(keys.shape[0], np.int64)
    for n in range(keys.shape[0]):
        key = keys[n] - least
        order[place[key]] = n
        place[key] += 1
    return order


# Each in one thread and in several: compiled when first called, and kept on disk.
_COMPILED = {
    function.__name__: tuple(
        njit(fastmath=FAST, parallel=parallel, nogil=True, cache=True)(function) for parallel in (False, True)
    )
    for function in (_nodes, _route, _leaves)
}


def _run(name, tokens, *arguments):
    threads = torch.get_num_threads()
    if tokens < THREADED_FROM or threads == 1:
        _COMPILED[name][0](*arguments)
        return
    before = get_num_threads()
    set_num_threads(min(threads, NUMBA_NUM_THREADS))
    try:
        _COMPILED[name][1](*arguments)
    finally:
        set_num_threads(before)
        # numba's first threads set the number of OpenMP threads of the whole process, torch's among them.
        torch.set_num_threads(threads)


def _array(tensor, dtype, dimensions):
    """The tensor's memory as an array, bfloat16 as the bits; `dimensions` are kept and those before them joined.

    None becomes an empty array.
    """
    if tensor is None:
        return np.empty((0,) * dimensions, np.uint16 if dtype == torch.bfloat16 else np.float32)
    tensor = tensor.detach().contiguous()
    tensor = tensor.view(-1, tensor.shape[-1]) if dimensions == 2 else tensor.view(-1)
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


# Module -> name -> (where its tensor lies, the array on it): making arrays takes longer than walking a path.
_KEPT = WeakKeyDictionary()


def _arrays(owner, dtype, **tensors):
    """Arrays on a module's parameters, in order; biases have one dimension, the others two."""
    kept = _KEPT.setdefault(owner, {}) if owner is not None else {}
    found = []
    for name, tensor in tensors.items():
        place = dtype if tensor is None else (tensor.data_ptr(), tensor.dtype)
        if name not in kept or kept[name][0] != place:
            array = _array(tensor, dtype, 1 if name.endswith("_bias") and name != "out_bias" else 2)
            if tensor is not None and not tensor.is_contiguous():
                found.append(array)
                continue
            kept[name] = (place, array)
        found.append(kept[name][1])
    return found


@intrinsic
def at_address(context, number):
    """A pointer from an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(number), generate


@njit
def narrow(y, target):
    """The bits of bfloat16, rounded to even, of y [N, D] into `target`."""
    bits = y.view(np.uint32)
    for n in range(y.shape[0]):
        for d in range(y.shape[1]):
            word = bits[n, d]
            rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            # Rounding must not turn a NaN into something else.
            nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            target[n, d] = np.uint16((word >> np.uint32(16)) | np.uint32(64) if nan else rounded)


@cache
def _entry(dtype):
    """Address to address: the single-threaded node form, called with (table, x, y, tokens); see `Shortcut`.

    Its arguments are plain integers, with which numba's way into compiled code takes half the time that ctypes takes.
    """
    single, stored = _COMPILED["_nodes"][0], np.uint16 if dtype == torch.bfloat16 else np.float32

    def nodes_at(table, x, y, tokens):
        t = carray(at_address(table), 12, np.int64)
        rows, hidden = t[0] * t[1], t[2]
        read = carray(at_address(x), (tokens, hidden), stored)
        up = carray(at_address(t[6]), (rows, hidden), stored)
        down = carray(at_address(t[7]), (rows, hidden), stored)
        gate = carray(at_address(t[5]), (rows if t[5] else 0, hidden), stored)
        gate_bias = carray(at_address(t[8]), (rows if t[8] else 0,), stored)
        up_bias = carray(at_address(t[9]), (rows if t[9] else 0,), stored)
        out_bias = carray(at_address(t[10]), (1, hidden), stored)
        top = t[11] if tokens >= SORTED_FROM else 0
        if stored is np.float32:
            written = carray(at_address(y), (tokens, hidden), np.float32)
            single(read, gate, up, down, gate_bias, up_bias, out_bias, t[0], t[3], t[4], top, written)
        else:
            written = np.empty((tokens, hidden), np.float32)
            single(read, gate, up, down, gate_bias, up_bias, out_bias, t[0], t[3], t[4], top, written)
            narrow(written, carray(at_address(y), (tokens, hidden), np.uint16))

    return njit(types.void(*[types.int64] * 4), fastmath=FAST, nogil=True, cache=True)(nodes_at)


class Shortcut:
    """From a node-form module's input to its output in one call into machine code, single-threaded.

    Made for a module as it is; called with an input it gives None where the module has changed, where the input is not
    what it was made for, or where threads are worth waking. The table is what `_entry` reads: numbers, then addresses.
    """

    def __init__(self, module):
        self.parameters, self.dtype, self.hidden = module._parameters, module.node_up.dtype, module.hidden
        names = ("node_gate", "node_up", "node_down", "node_gate_bias", "node_up_bias", "out_bias")
        held = {name: self.parameters.get(name) for name in names}
        self.addresses = [(name, tensor.data_ptr()) for name, tensor in held.items() if tensor is not None]
        table = [module.trees, module.nodes, module.hidden, module.depth, ACTIVATIONS[module._compiled]]
        table += [0 if tensor is None else tensor.data_ptr() for tensor in held.values()]
        self.table = np.array([*table, min(TOP_LEVELS, module.depth)], np.int64)
        self.place, self.call = self.table.ctypes.data, _entry(self.dtype)
        self.sound = all(t is None or (t.is_contiguous() and t.dtype == self.dtype) for t in held.values())
        self.most = module.loop_up_to()

    def holds(self):
        """True while the parameters lie where they lay."""
        parameters = self.parameters
        for name, address in self.addresses:
            if parameters[name].data_ptr() != address:
                return False
        return self.sound

    def __call__(self, x):
        if type(x) is not torch.Tensor or x.dtype is not self.dtype or not x.is_cpu or not x.is_contiguous():
            return None
        tokens, rest = divmod(x.numel(), self.hidden)
        if rest or tokens > self.most or (tokens >= THREADED_FROM and torch.get_num_threads() > 1):
            return None
        if not self.holds() or os.environ.get("LLMSURGEON_FFF_KERNEL", "auto") not in ("auto", "numba"):
            return None
        y = torch.empty_like(x)
        self.call(self.place, x.data_ptr(), y.data_ptr(), tokens)
        return y


def nodes(x_ND, gate, up, down, gate_bias, up_bias, out_bias, depth, activation, owner=None):
    """Node form, [N, D] -> [N, D]: rows [K, M, D], biases [K, M] or None, out_bias [D]. `owner` holds them."""
    y_ND = torch.empty(x_ND.shape)
    rows = _arrays(
        owner, x_ND.dtype, gate=gate, up=up, down=down, gate_bias=gate_bias, up_bias=up_bias, out_bias=out_bias
    )
    top = min(TOP_LEVELS, depth) if len(x_ND) >= SORTED_FROM else 0
    x = _array(x_ND, x_ND.dtype, 2)
    _run("_nodes", len(x_ND), x, *rows, up.shape[0], depth, ACTIVATIONS[activation], top, y_ND.numpy())
    return y_ND.to(x_ND.dtype)


def route(x_ND, weight, bias, depth, owner=None):
    """Leaf form: the leaf of each token, int64 [N]."""
    leaf_N = torch.empty(len(x_ND), dtype=torch.long)
    planes = _arrays(owner, x_ND.dtype, router=weight, router_bias=bias)
    _run("_route", len(x_ND), _array(x_ND, x_ND.dtype, 2), *planes, depth, leaf_N.numpy())
    return leaf_N


def leaves(x_ND, leaf_N, y_ND, gate, up, down, gate_bias, up_bias, out_bias, activation, owner=None):
    """Leaf form: y_ND plus each token's leaf: rows [L, W, D], biases [L, W] or None, out_bias [L, D]."""
    total_ND = y_ND.float().contiguous()
    rows = _arrays(
        owner, x_ND.dtype, gate=gate, up=up, down=down, gate_bias=gate_bias, up_bias=up_bias, out_bias=out_bias
    )
    x = _array(x_ND, x_ND.dtype, 2)
    _run("_leaves", len(x_ND), x, leaf_N.numpy(), *rows, up.shape[1], ACTIVATIONS[activation], total_ND.numpy())
    return total_ND.to(x_ND.dtype)

"""Attention over pages of keys and values, compiled for the CPU at hand.

A page holds PAGE positions of one sequence, of all layers. In it, each layer's each head of keys and values has a stretch of its own:
the keys as panels of 16 positions, [PAGE / 16, head size, 16], so that a load brings one number of 8 or 16 positions into
the lanes and no sum crosses lanes; the values as [PAGE, width], where width is the head size rounded up to 32. Numbers are
float32, float16, bfloat16, or (q8) int8 with a float32 scale for each position, which stand behind the values.

Queries meet a page at a time, with the running maximum and sum of an online softmax (Milakov & Gimelshein, 2018).
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types

from organs.giant import lanes
from organs.giant.lanes import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    Loop,
    const,
    fma,
    from_half,
    function,
    jit,
    kernel,
    load,
    named,
    splat,
    store,
    to_half,
    vector,
    word,
)  # fmt: skip

ground = lanes.ground
floats = ground.floats
f4, HELP = np.float32, ground.HELP

PAGE = 64  # positions
QUERIES = 4  # that meet a page together, at most
KINDS = {"f32": 4, "f16": 2, "bf16": 2, "q8": 1}  # bytes of a number
F32_KIND, F16_KIND, BF16_KIND, Q8_KIND = range(4)
LOW = f4(-1e30)
FLOATS, INTS = vector(F32, LANES), vector(I32, LANES)


def width_of(head: int) -> int:
    """Room for a head's values: a multiple of 32."""
    return -(-head // 32) * 32


def stretch_bytes(kind: str, head: int) -> int:
    """Bytes of one head's keys and values in a page."""
    size = PAGE * (head + width_of(head)) * KINDS[kind] + (8 * PAGE if kind == "q8" else 0)
    return -(-size // 64) * 64


# --- Two products, in vectors. ---


def _numbers(b, base, kind: str, offset: int):
    """float32 lanes of a cache's numbers."""
    if kind == "f32":
        return load(b, base, FLOATS, 4 * offset)
    if kind == "f16":
        return from_half(b, load(b, base, vector(ir.HalfType(), LANES), 2 * offset))
    if kind == "bf16":
        bits = b.zext(load(b, base, vector(I16, LANES), 2 * offset), INTS)
        return b.bitcast(b.shl(bits, const(INTS, 16)), FLOATS)
    return b.sitofp(b.sext(load(b, base, vector(I8, LANES), offset), INTS), FLOATS)


def _scores(M: int, kind: str):
    """Builds: (queries [head, M], keys, out [M, PAGE], head, panels) -> nothing; out[m] = q[m] · every key."""
    size = KINDS[kind]

    def build(b, q, k, out, head, panels):
        parts = 16 // LANES
        outer = Loop(b, panels, [])
        panel = b.add(k, b.mul(b.mul(outer.i, head), word(16 * size)))
        inner = Loop(b, head, [const(FLOATS, 0.0)] * (M * parts))
        at, query = b.add(panel, b.mul(inner.i, word(16 * size))), b.add(q, b.mul(inner.i, word(4 * M)))
        keys = [_numbers(b, at, kind, LANES * p) for p in range(parts)]
        sums = []
        for m in range(M):
            x = splat(b, load(b, query, F32, 4 * m, 4), LANES)
            sums += [fma(b, x, keys[p], inner.now[m * parts + p]) for p in range(parts)]
        sums = inner.close(sums)
        target = b.add(out, b.mul(outer.i, word(64)))
        for m in range(M):
            for p in range(parts):
                store(b, sums[m * parts + p], target, 4 * (m * PAGE + LANES * p), 4)
        outer.close([])

    return build


def _mixture(M: int, kind: str):
    """Builds: (weights [M, PAGE], values, positions, out [M, width], width) -> nothing; out += weights · values."""
    size, chunk = KINDS[kind], max(16, LANES)
    vectors = chunk // LANES

    def build(b, p, v, n, out, width):
        outer = Loop(b, b.sdiv(width, word(chunk)), [])
        column = b.add(v, b.mul(outer.i, word(chunk * size)))
        target = b.add(out, b.mul(outer.i, word(4 * chunk)))
        stride = b.mul(width, word(4))
        rows = [b.add(target, b.mul(stride, word(m))) for m in range(M)]
        first = [load(b, rows[m], FLOATS, 4 * LANES * i, 4) for m in range(M) for i in range(vectors)]
        inner = Loop(b, n, first)
        at = b.add(column, b.mul(inner.i, b.mul(width, word(size))))
        values = [_numbers(b, at, kind, LANES * i) for i in range(vectors)]
        weights = b.add(p, b.mul(inner.i, word(4)))
        sums = []
        for m in range(M):
            x = splat(b, load(b, weights, F32, 4 * PAGE * m, 4), LANES)
            sums += [fma(b, x, values[i], inner.now[m * vectors + i]) for i in range(vectors)]
        sums = inner.close(sums)
        for m in range(M):
            for i in range(vectors):
                store(b, sums[m * vectors + i], rows[m], 4 * LANES * i, 4)
        outer.close([])

    return build


PAIR = types.void(*[types.int64] * 5)


def kernels_of(kind: str) -> list:
    """C functions: the scores for 1 to QUERIES queries, then the mixtures."""
    out = []
    for make in (_scores, _mixture):
        for M in range(1, QUERIES + 1):
            out.append(kernel(f"{make.__name__[1:]}_{M}_{kind}", PAIR, make(M, kind)))
    return out


def _jump(b, entry, x1, x2, x3, x4, x5):
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 5)
    b.call(b.inttoptr(entry, kind.as_pointer()), [x1, x2, x3, x4, x5])


_call = function(types.void(*[types.int64] * 6), _jump)  # calls a kernel by its address


# --- Storing a key and a value. ---

_SCALAR = types.void(types.int64, types.float32)
_store_half = function(
    _SCALAR, lambda b, at, x: store(b, b.extract_element(to_half(b, splat(b, x, LANES)), const(I32, 0)), at, 0, 2)
)


def _bfloat(b, at, x):
    bits = b.bitcast(x, I32)
    odd = b.and_(b.lshr(bits, const(I32, 16)), const(I32, 1))
    store(b, b.trunc(b.lshr(b.add(b.add(bits, const(I32, 0x7FFF)), odd), const(I32, 16)), I16), at, 0, 2)


_store_bfloat = function(_SCALAR, _bfloat)
_store_byte = function(_SCALAR, lambda b, at, x: store(b, b.trunc(b.fptosi(x, I32), I8), at))


@jit(**HELP)
def _store_number(kind, at, x):
    if kind == F16_KIND:
        _store_half(at, x)
    elif kind == BF16_KIND:
        _store_bfloat(at, x)
    elif kind == Q8_KIND:
        _store_byte(at, ground.rint(x))
    else:
        floats(at, 0, 1)[0] = x


@jit(**HELP)
def _byte_scale(x, n):
    top = f4(0)
    for i in range(n):
        top = max(top, abs(x[i]))
    return top / f4(127)


@jit(**HELP)
def store_pair(kind, size, stretch, position, key, value, head, width):
    """Write a key and a value (float32 [head] each) into a head's stretch of a page, at position % PAGE."""
    at = position % PAGE
    k, v = f4(1), f4(1)
    values = stretch + PAGE * head * size
    if kind == Q8_KIND:
        scales = floats(values + PAGE * width, 0, 2 * PAGE)
        scales[at], scales[PAGE + at] = _byte_scale(key, head), _byte_scale(value, head)
        k = f4(1) / scales[at] if scales[at] > 0 else f4(0)
        v = f4(1) / scales[PAGE + at] if scales[PAGE + at] > 0 else f4(0)
    panel, row = stretch + size * ((at // 16) * head * 16 + at % 16), values + size * at * width
    for i in range(head):
        _store_number(kind, panel + size * 16 * i, key[i] * k)
        _store_number(kind, row + size * i, value[i] * v)


# --- Queries over pages. ---


def _exponential(b, x):
    """e ** x within 2e-7 relative for x <= 0; below -87 as at -87. Polynomial: Cephes' expf."""
    k = lambda v: const(FLOATS, v)
    ceiling = b.fcmp_ordered(">", x, k(-87.0))
    x = b.select(ceiling, x, k(-87.0))
    # Rounded by converting to int, which cuts towards 0 (x is not positive): numba's fastmath would undo adding a large number.
    power = b.fptosi(b.fsub(b.fmul(x, k(1.44269504)), k(0.5)), INTS)
    whole = b.sitofp(power, FLOATS)
    r = fma(b, whole, k(2.12194440e-4), fma(b, whole, k(-0.693359375), x))
    p = k(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        p = fma(b, p, r, k(c))
    p = fma(b, b.fmul(p, r), r, b.fadd(r, k(1.0)))
    return b.fmul(p, b.bitcast(b.shl(b.add(power, const(INTS, 127)), const(INTS, 23)), FLOATS))


def _soften(b, s, n, low, high, out, width, state):
    """s [n] becomes exp(s - top), 0 outside of low to high; out [width] and state (top, sum) follow if the top has risen."""
    vectors = b.sdiv(n, word(LANES))
    lane = ir.Constant(INTS, list(range(LANES)))
    first, last = (splat(b, b.trunc(v, I32), LANES) for v in (low, high))

    def visible(i):
        index = b.add(lane, splat(b, b.trunc(b.mul(i, word(LANES)), I32), LANES))
        return b.and_(b.icmp_signed(">=", index, first), b.icmp_signed("<", index, last))

    loop = Loop(b, vectors, [const(FLOATS, float(LOW))])
    v = load(b, b.add(s, b.mul(loop.i, word(4 * LANES))), FLOATS, 0, 4)
    v = b.select(visible(loop.i), v, const(FLOATS, float(LOW)))
    (tops,) = loop.close([b.select(b.fcmp_ordered(">", v, loop.now[0]), v, loop.now[0])])
    top = named(b, f"llvm.vector.reduce.fmax.v{LANES}f32", F32, tops, fast=("nnan",))
    before = load(b, state, F32, 0, 4)
    top = b.select(b.fcmp_ordered(">", top, before), top, before)
    loop = Loop(b, vectors, [const(FLOATS, 0.0)])
    at = b.add(s, b.mul(loop.i, word(4 * LANES)))
    e = _exponential(b, b.fsub(load(b, at, FLOATS, 0, 4), splat(b, top, LANES)))
    e = b.select(visible(loop.i), e, const(FLOATS, 0.0))
    store(b, e, at, 0, 4)
    (sums,) = loop.close([b.fadd(loop.now[0], e)])
    total = named(b, f"llvm.vector.reduce.fadd.v{LANES}f32", F32, const(F32, 0.0), sums, fast=("reassoc",))
    with b.if_then(b.fcmp_ordered(">", top, before)):
        shrink = _exponential(b, splat(b, b.fsub(before, top), LANES))
        loop = Loop(b, b.sdiv(width, word(LANES)), [])
        at = b.add(out, b.mul(loop.i, word(4 * LANES)))
        store(b, b.fmul(load(b, at, FLOATS, 0, 4), shrink), at, 0, 4)
        loop.close([])
        sum_before = load(b, state, F32, 4, 4)
        store(b, b.fmul(sum_before, b.extract_element(shrink, const(I32, 0))), state, 4, 4)
        store(b, top, state, 0, 4)
    store(b, b.fadd(load(b, state, F32, 4, 4), total), state, 4, 4)


_soften_row = function(types.void(*[types.int64] * 7), _soften)


@jit(**HELP)
def attend(
    kernels, kind, size, table, inside, head, width, groups, M, q, first, end, limits, window, cap, work, out, state
):
    """Queries q [groups, head, M] meet positions first (a multiple of 16) to `end` of a sequence, page by page.

    table: addresses of its pages; inside: where the head's stretch lies in a page; limits [M]: the last position that each
    query of a group may see; window: how many it sees at most, 0 for all; cap: soft-cap of scores, 0 for none; work: [M, PAGE].
    out [groups, M, width] and state [groups, M, 2] become Σ exp(score - top) · value, top and Σ exp(score - top).
    """
    states, sums = floats(state, 0, 2 * groups * M), floats(out, 0, groups * M * width)
    for m in range(groups * M):
        states[2 * m], states[2 * m + 1] = LOW, f4(0)
    for i in range(groups * M * width):
        sums[i] = f4(0)
    at = first
    while at < end:
        page = at // PAGE
        begin = at - page * PAGE
        stop = min(PAGE, end - page * PAGE)
        panels = (stop - begin + 15) // 16
        keys = table[page] + inside
        values = keys + size * PAGE * head
        for g in range(groups):
            _call(kernels[M - 1], q + 4 * g * M * head, keys + size * begin * head, work + 4 * begin, head, panels)
            for m in range(M):
                low, high, row = begin, min(stop, limits[m] + 1 - page * PAGE), work + 4 * m * PAGE
                if window > 0:
                    low = max(begin, limits[m] - window + 1 - page * PAGE)
                if kind == Q8_KIND:
                    _scale(row, values + PAGE * width, begin, stop)
                if cap > 0:
                    _cap(row, begin, stop, cap)
                _soften_row(row + 4 * begin, panels * 16, low - begin, high - begin, out + 4 * (g * M + m) * width, width,
                            state + 8 * (g * M + m))  # fmt: skip
                if kind == Q8_KIND:
                    _scale(row, values + PAGE * (width + 4), begin, stop)
            _call(
                kernels[3 + M],
                work + 4 * begin,
                values + size * begin * width,
                stop - begin,
                out + 4 * g * M * width,
                width,
            )
        at = (page + 1) * PAGE


@jit(**HELP)
def _scale(row, scales, begin, end):
    s, by = floats(row, 0, PAGE), floats(scales, 0, PAGE)
    for i in range(begin, end):
        s[i] *= by[i]


@jit(**HELP)
def _cap(row, begin, end, cap):
    s = floats(row, 0, PAGE)
    for i in range(begin, end):
        s[i] = cap * math.tanh(s[i] / cap)

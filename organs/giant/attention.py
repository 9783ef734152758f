"""Attention over pages of keys and values, compiled for the CPU at hand.

A page holds PAGE positions of one sequence, of all layers. In it, each layer's each head of keys and values has a stretch of its own:
the keys as panels of 16 positions, [PAGE / 16, head size, 16], so that a load brings one number of 8 or 16 positions into
the lanes and no sum crosses lanes; the values as [PAGE, width], where width is the head size rounded up to 32. Numbers are
float32, float16, bfloat16, or (q8, q4) integers of 8 or 4 bits. Keys and values may be of different kinds.

Integers of values, and keys of 8 bits, have a float32 scale for each position; a level l of 4 bits means scale · (l - 7.5), and
before they become four bits, values are rotated by a Hadamard matrix, which spreads a few large numbers over all (QuaRot, arXiv
2404.00456): an output is rotated back once at its end. Keys of 4 bits vary much between numbers of a head and little between
positions: each number has a scale and a least value of its own for a whole page (KIVI, arXiv 2402.02750), both float16. So they
become 4 bits when their page is full; until then the page's keys (and values, if both have 4 bits) are float32 in the sequence's memory
("staged"), and those of a
prompt's piece in a room that all layers share. What is read in one step is not quantised before the step ends.

Queries meet a page at a time, with the running maximum and sum of an online softmax (Milakov & Gimelshein, 2018).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir

from organs.giant import lanes
from organs.giant.lanes import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    Loop,
    address_of,
    const,
    fma,
    from_half,
    function,
    jit,
    load,
    named,
    splat,
    store,
    to_half,
    vector,
    word,
)  # fmt: skip

ground = lanes.ground
floats, longs = ground.floats, ground.longs
f4, HELP = np.float32, ground.HELP

PAGE = 64  # positions
QUERIES = 4  # that meet a page together, at most
KINDS = {"f32": 8, "f16": 4, "bf16": 4, "q8": 2, "q4": 1}  # bytes of two numbers
F32_KIND, F16_KIND, BF16_KIND, Q8_KIND, Q4_KIND = range(5)
MIDDLE = 7.5  # the level of q4 that means nothing, were there one
LOW = f4(-1e30)
FLOATS, INTS = vector(F32, LANES), vector(I32, LANES)


def width_of(head: int) -> int:
    """Room for a head's values: a multiple of 32."""
    return -(-head // 32) * 32


def layout_of(keys: str, values: str, head: int) -> dict[str, int]:
    """Where things are in one head's stretch of a page, by bytes: fields of an attention's row, and its size as "stretch"."""
    names, width = list(KINDS), width_of(head)
    key_panel, value_row = 8 * head * KINDS[keys], width * KINDS[values] // 2
    values_at = PAGE // 16 * key_panel
    key_scales_at = values_at + PAGE * value_row
    value_scales_at = key_scales_at + {"q8": 4 * PAGE, "q4": 4 * head}.get(keys, 0)
    end = value_scales_at + (4 * PAGE if values in ("q8", "q4") else 0)
    return dict(key_kind=names.index(keys), value_kind=names.index(values), key_panel=key_panel, value_row=value_row,
                values_at=values_at, key_scales_at=key_scales_at, value_scales_at=value_scales_at, stretch=-(-end // 64) * 64)  # fmt: skip


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


def _levels(b, packed):
    """float32 lanes of the low and of the high halves of bytes."""
    wide = b.zext(packed, INTS)
    return [b.sitofp(half, FLOATS) for half in (b.and_(wide, const(INTS, 15)), b.lshr(wide, const(INTS, 4)))]


def _scores(M: int, kind: str):
    """Builds: (queries [head, M], keys, out [M, PAGE], head, panels) -> nothing; out[m] = q[m] · every key."""
    numbers = 2 if kind == "q4" else 1  # of a position that one load brings
    step = 8 * KINDS[kind] * numbers  # bytes from load to load

    def build(b, q, k, out, head, panels):
        parts = 16 // LANES
        outer = Loop(b, panels, [])
        panel = b.add(k, b.mul(b.mul(outer.i, head), word(8 * KINDS[kind])))
        inner = Loop(b, b.sdiv(head, word(numbers)), [const(FLOATS, 0.0)] * (M * parts))
        at, query = b.add(panel, b.mul(inner.i, word(step))), b.add(q, b.mul(inner.i, word(4 * M * numbers)))
        if kind == "q4":
            loaded = [_levels(b, load(b, at, vector(I8, LANES), LANES * p)) for p in range(parts)]
            keys = [[pair[i] for pair in loaded] for i in range(2)]
        else:
            keys = [[_numbers(b, at, kind, LANES * p) for p in range(parts)]]
        sums = list(inner.now)
        for i in range(numbers):
            for m in range(M):
                x = splat(b, load(b, query, F32, 4 * (M * i + m), 4), LANES)
                for p in range(parts):
                    sums[m * parts + p] = fma(b, x, keys[i][p], sums[m * parts + p])
        sums = inner.close(sums)
        target = b.add(out, b.mul(outer.i, word(64)))
        for m in range(M):
            for p in range(parts):
                store(b, sums[m * parts + p], target, 4 * (m * PAGE + LANES * p), 4)
        outer.close([])

    return build


def _mixture(M: int, kind: str):
    """Builds: (weights [M, PAGE], values, positions, out [M, width], width) -> nothing; out += weights · values."""
    chunk = (
        32 if kind == "q4" else 16
    )  # columns at a time; of q4, 16 bytes hold columns 0 to 15 low and the next 16 high
    vectors = chunk // LANES

    def build(b, p, v, n, out, width):
        outer = Loop(b, b.sdiv(width, word(chunk)), [])
        column = b.add(v, b.mul(outer.i, word(chunk * KINDS[kind] // 2)))
        target = b.add(out, b.mul(outer.i, word(4 * chunk)))
        stride = b.mul(width, word(4))
        rows = [b.add(target, b.mul(stride, word(m))) for m in range(M)]
        first = [load(b, rows[m], FLOATS, 4 * LANES * i, 4) for m in range(M) for i in range(vectors)]
        inner = Loop(b, n, first)
        at = b.add(column, b.mul(inner.i, b.sdiv(b.mul(width, word(KINDS[kind])), word(2))))
        if kind == "q4":
            pairs = [_levels(b, load(b, at, vector(I8, LANES), LANES * i)) for i in range(16 // LANES)]
            values = [b.fsub(v, const(FLOATS, MIDDLE)) for i in range(2) for v in (pair[i] for pair in pairs)]
        else:
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


def kernels_of(keys: str, values: str) -> tuple[Any, list[int]]:
    """(what keeps them alive, addresses) of the scores for 1 to QUERIES queries, then of the mixtures, then, where keys are q4, of
    both for what is staged."""
    staged = ((_scores, "f32"), (_mixture, "f32")) if keys == "q4" else ()
    pairs = [(_scores, keys), (_mixture, values), *staged]
    builds = [make(M, kind) for make, kind in pairs for M in range(1, QUERIES + 1)]
    return lanes.kernel_table(f"attention_{keys}_{values}", 5, builds)


_call = lanes.caller(5)  # calls a kernel by its address

# Behind the addresses of those kernels stand, where keys or values have 4 bits, those of what only they need: most of
# attention's code, which nobody else shall wait for (organs/giant/four_bits.py).
TURN, KEEP, SETTLE, SCALED, RESTAGE, SETTLE_ALL = range(4 * QUERIES, 4 * QUERIES + 6)
ENTRIES = 4 * QUERIES + 6
call2, call3 = lanes.caller(2), lanes.caller(3)


@jit(**HELP)
def entry(r, number):
    """The address of one of these."""
    return longs(r.attention_kernels, ENTRIES)[number]


@jit(**HELP)
def stages_values(r):
    """Whether values wait for their page to be full, too."""
    return r.key_kind == Q4_KIND and r.value_kind == Q4_KIND


@jit(**HELP)
def staged_bytes(r):
    """Of one head: float32 keys [PAGE / 16, head, 16], and behind them values [PAGE, width], turned."""
    return 4 * PAGE * (r.head + r.head_width if stages_values(r) else r.head)


# --- Storing a key and a value. ---

_SCALAR = "void(int64, float32)"
store_half = function(
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
        store_half(at, x)
    elif kind == BF16_KIND:
        _store_bfloat(at, x)
    elif kind == Q8_KIND:
        _store_byte(at, ground.rint(x))
    else:
        floats(at, 0, 1)[0] = x


@jit(**HELP)
def _scale_of(x, n):
    """What one step of 8 bits is worth."""
    top = f4(0)
    for i in range(n):
        top = max(top, abs(x[i]))
    return top / f4(127)


@jit(**HELP)
def store_pair(r, stretch, position, key, value, staged):
    """Write a key and a value (addresses of float32 [head]; they may change) into a stretch of a page, at position % PAGE.

    A key that will have 4 bits goes to `staged`, the page's float32 keys, and its value behind them.
    """
    at, head = position % PAGE, r.head
    k, v = floats(key, 0, head), floats(value, 0, head)
    if r.key_kind == Q4_KIND:
        out = floats(staged, at // 16 * 16 * head + at % 16, 16 * head)
        for i in range(head):
            out[16 * i] = k[i]
    else:
        scale = f4(1)
        if r.key_kind == Q8_KIND:
            scale = _scale_of(k, head)
            floats(stretch + r.key_scales_at, at, 1)[0] = scale
        scale = f4(1) / scale if scale > 0 else f4(0)
        size = r.key_panel // (16 * head)
        for i in range(head):
            _store_number(r.key_kind, stretch + at // 16 * r.key_panel + size * (16 * i + at % 16), k[i] * scale)
    row = stretch + r.values_at + at * r.value_row
    if stages_values(r):
        call2(entry(r, TURN), value, head)
        waiting = floats(staged, PAGE * head + at * r.head_width, head)
        for i in range(head):
            waiting[i] = v[i]
        return
    if r.value_kind == Q4_KIND:
        _call(entry(r, KEEP), address_of(r), value, row, stretch + r.value_scales_at + 4 * at, 0)
        return
    scale = f4(1)
    if r.value_kind == Q8_KIND:
        scale = _scale_of(v, head)
        floats(stretch + r.value_scales_at, at, 1)[0] = scale
    scale = f4(1) / scale if scale > 0 else f4(0)
    size = r.value_row // r.head_width
    for i in range(head):
        _store_number(r.value_kind, row + size * i, v[i] * scale)


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


_soften_row = function(lanes.words(7), _soften)


@jit(**HELP)
def attend(r, kernels, table, inside, groups, M, q, first, end, limits, work, out, state, staged, staged_from):
    """Queries q [groups, head, M] meet positions first (a multiple of 16) to `end` of a sequence, page by page.

    r: the row of the operation, which says what heads and pages are like; table: addresses of pages; inside: where the head's
    stretch lies in a page; limits [M]: the last position that each query of a group may see; work: [M, PAGE]; staged: where
    float32 keys (and values) are of page number staged_from and those behind it (4 bits only), r.staged_stride bytes apart.
    out [groups, M, width] and state [groups, M, 2] become Σ exp(score - top) · value, top and Σ exp(score - top).
    """
    head, width, cap = r.head, r.head_width, f4(r.cap)
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
        settled = r.key_kind == Q4_KIND and page < staged_from
        waits = staged + (page - staged_from) * r.staged_stride
        for g in range(groups):
            queries, scores, panel = q + 4 * g * M * head, kernels[M - 1], keys + begin // 16 * r.key_panel
            if settled:
                queries = state + 8 * groups * M
                _call(entry(r, SCALED), address_of(r), q + 4 * g * M * head, keys, M, queries)
            elif r.key_kind == Q4_KIND:
                scores, panel = kernels[7 + M], waits + 4 * begin * head
            _call(scores, queries, panel, work + 4 * begin, head, panels)
            for m in range(M):
                low, high, row = begin, min(stop, limits[m] + 1 - page * PAGE), work + 4 * m * PAGE
                if r.window > 0:
                    low = max(begin, limits[m] - r.window + 1 - page * PAGE)
                if r.key_kind == Q8_KIND:
                    _scale(row, keys + r.key_scales_at, begin, stop)
                elif settled:
                    _raise(row, floats(queries, head * M + m, 1)[0], begin, stop)
                if cap > 0:
                    _cap(row, begin, stop, cap)
                _soften_row(row + 4 * begin, panels * 16, low - begin, high - begin, out + 4 * (g * M + m) * width, width,
                            state + 8 * (g * M + m))  # fmt: skip
                if r.value_kind >= Q8_KIND and (settled or not stages_values(r)):
                    _scale(row, keys + r.value_scales_at, begin, stop)
            values, mix = keys + r.values_at + begin * r.value_row, kernels[3 + M]
            if stages_values(r) and not settled:
                values, mix = waits + 4 * (PAGE * head + begin * width), kernels[11 + M]
            _call(mix, work + 4 * begin, values, stop - begin, out + 4 * g * M * width, width)
        at = (page + 1) * PAGE


@jit(**HELP)
def _scale(row, scales, begin, end):
    s, by = floats(row, 0, PAGE), floats(scales, 0, PAGE)
    for i in range(begin, end):
        s[i] *= by[i]


@jit(**HELP)
def _raise(row, by, begin, end):
    s = floats(row, 0, PAGE)
    for i in range(begin, end):
        s[i] += by


@jit(**HELP)
def _cap(row, begin, end, cap):
    s = floats(row, 0, PAGE)
    for i in range(begin, end):
        s[i] = cap * math.tanh(s[i] / cap)

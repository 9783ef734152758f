"""Keys and values of 4 bits: what attention does for them alone. It is compiled apart, and only where such a cache is asked for.

How they are laid out is said in organs/giant/attention.py, whose code calls this by address.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir

from organs.giant.attention import (
    KEEP,
    MIDDLE,
    PAGE,
    RESTAGE,
    SCALED,
    SETTLE,
    SETTLE_ALL,
    TURN,
    staged_bytes,
    stages_values,
    store_half,
)
from organs.giant.engine import machine_at, own_staged, row_at
from organs.giant.lanes import I32, LANES, c_function, const, from_half, function, ground, jit, load, splat

floats, octets, longs = ground.floats, ground.octets, ground.longs
f4, HELP = np.float32, ground.HELP

_load_half = function("float32(int64)", lambda b, at: b.extract_element(
    from_half(b, splat(b, load(b, at, ir.HalfType(), 0, 2), LANES)), const(I32, 0)))  # fmt: skip


def turn(x, n):
    """float32 [n] times an orthonormal Hadamard matrix, of the largest power of two that divides n (else in blocks)."""
    v, size, half = floats(x, 0, n), n & -n, 1
    while half < size:
        for i in range(0, n, 2 * half):
            for j in range(i, i + half):
                a, b = v[j], v[j + half]
                v[j], v[j + half] = a + b, a - b
        half *= 2
    scale = f4(1 / math.sqrt(size))
    for i in range(n):
        v[i] *= scale


_turn = jit(**HELP)(turn)


@jit(**HELP)
def _level(x):
    """A number in steps as a level."""
    return min(max(np.int64(ground.rint(x + f4(MIDDLE))), 0), 15)


@jit(**HELP)
def _step(x, n):
    """What a level is worth: a finer one, at the price of the largest numbers, where the sum of squared errors says so."""
    top = f4(0)
    for i in range(n):
        top = max(top, abs(x[i]))
    best, least = top / f4(MIDDLE), f4(3e38)
    for cut in range(4):
        scale, error = top / f4(MIDDLE) * (f4(1) - f4(0.08) * cut), f4(0)
        inverse = f4(1) / scale if scale > 0 else f4(0)
        for i in range(n):
            difference = (_level(x[i] * inverse) - f4(MIDDLE)) * scale - x[i]
            error += difference * difference
        if error < least:
            best, least = scale, error
    return best


def keep(row, value, out, scale_at, unused):
    """A value (float32 [head], which changes) becomes levels at `out` and their step."""
    r = row_at(row)
    _turn(value, r.head)
    _quantise(r, value, out, scale_at)


@jit(**HELP)
def _quantise(r, value, out, scale_at):
    """A value that is turned already becomes levels and their step."""
    v = floats(value, 0, r.head)
    scale = _step(v, r.head)
    floats(scale_at, 0, 1)[0] = scale
    inverse, levels = f4(1) / scale if scale > 0 else f4(0), octets(out, 0, r.value_row)
    for i in range(r.value_row):
        low, high = 32 * (i // 16) + i % 16, 32 * (i // 16) + 16 + i % 16
        first = _level(v[low] * inverse) if low < r.head else 0
        levels[i] = first | (_level(v[high] * inverse) << 4 if high < r.head else 0)


def settle(row, stretch, staged):
    """A page's staged keys become levels: number by number of the head, a scale and a least value for all positions.

    So do staged values, position by position.
    """
    r = row_at(row)
    for at in range(PAGE if stages_values(r) else 0):
        value = staged + 4 * (PAGE * r.head + at * r.head_width)
        _quantise(r, value, stretch + r.values_at + at * r.value_row, stretch + r.value_scales_at + 4 * at)
    for i in range(r.head):
        low, high = f4(3e38), f4(-3e38)
        for panel in range(PAGE // 16):
            k = floats(staged, 16 * (panel * r.head + i), 16)
            for at in range(16):
                low, high = min(low, k[at]), max(high, k[at])
        scale_at, low_at = stretch + r.key_scales_at + 2 * i, stretch + r.key_scales_at + 2 * (r.head + i)
        store_half(scale_at, (high - low) / f4(15))
        store_half(low_at, low)
        scale, low = _load_half(scale_at), _load_half(low_at)
        inverse, shift = f4(1) / scale if scale > 0 else f4(0), 4 * (i % 2)
        for panel in range(PAGE // 16):
            k = floats(staged, 16 * (panel * r.head + i), 16)
            out = octets(stretch + panel * r.key_panel, 16 * (i // 2), 16)
            for at in range(16):
                level = min(max(np.int64(ground.rint((k[at] - low) * inverse)), 0), 15)
                out[at] = level if shift == 0 else out[at] | level << 4


_settle = jit(**HELP)(settle)


def scaled(row, q, keys, M, space):
    """Queries q [head, M] times a page's scales, to space [head, M]; behind it, for each query, what least values add."""
    r = row_at(row)
    n = r.head * M
    source, out, more = floats(q, 0, n), floats(space, 0, n), floats(space, n, M)
    for m in range(M):
        more[m] = f4(0)
    for i in range(r.head):
        scale, low = _load_half(keys + r.key_scales_at + 2 * i), _load_half(keys + r.key_scales_at + 2 * (r.head + i))
        for m in range(M):
            out[i * M + m] = source[i * M + m] * scale
            more[m] += source[i * M + m] * low


def restage(row, machine):
    """Before a prompt's piece is settled: what is staged already of the page that it begins in."""
    r, m = row_at(row), machine_at(machine)
    known = longs(m.positions, m.n)[0] % PAGE
    for h in range(m.thread, r.heads, m.threads):
        source, target = own_staged(r, m, 0, h), r.staged + staged_bytes(r) * h
        if stages_values(r):
            n, begin = known * r.head_width, PAGE * r.head
            floats(target, begin, n)[:] = floats(source, begin, n)
        for at in range(known):
            begin = at // 16 * 16 * r.head + at % 16
            old, new = floats(source, begin, 16 * r.head), floats(target, begin, 16 * r.head)
            for i in range(r.head):
                new[16 * i] = old[16 * i]


def settle_all(row, machine):
    """Of a prompt's piece: its full pages' keys become levels, the last ones stay staged, in the sequence's memory."""
    r, m = row_at(row), machine_at(machine)
    positions = longs(m.positions, m.n)
    begin, end = positions[0], positions[m.n - 1] + 1
    first, last = begin // PAGE, (end - 1) // PAGE
    table = longs(longs(m.tables, m.n)[0], last + 1)
    item, size = m.thread, staged_bytes(r)
    while item < (last - first + 1) * r.heads:
        page, h = first + item // r.heads, item % r.heads
        staged = r.staged + (page - first) * r.staged_stride + size * h
        if (page + 1) * PAGE <= end:
            _settle(row, table[page] + r.inside + h * r.stretch, staged)
        else:
            floats(own_staged(r, m, 0, h), 0, size // 4)[:] = floats(staged, 0, size // 4)
        item += m.threads


_BY_ENTRY = {TURN: turn, KEEP: keep, SETTLE: settle, SCALED: scaled, RESTAGE: restage, SETTLE_ALL: settle_all}


def functions() -> dict[int, object]:
    """C functions by their entry (see attention.py), compiled or loaded."""
    return {number: c_function(f, **ground.FAST)
            for number, f in _BY_ENTRY.items()}  # fmt: skip

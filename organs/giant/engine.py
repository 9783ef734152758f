"""The engine: a program of rows that each name a compiled operation, and a team of threads that runs it.

Every thread walks through the whole program, all layers, and takes its part of each operation; between operations that need
each other's results stands a barrier. So a token costs one call from Python. A model's program is recorded by
organs/giant/program.py; what a row means is said at its operation below.

A step is `together` (tokens of one sequence at consecutive positions, in tiles: reading a prompt) or not (each token is
the next one of a sequence of its own: writing). A step of one token keeps quantised activations in each thread's own memory
(`one` in names): computing them in every thread is cheaper than a barrier.
"""

from __future__ import annotations

import importlib
import math
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from llvmlite import ir

from organs import kernels
from organs.giant.attention import (
    ENTRIES,
    PAGE,
    Q4_KIND,
    QUERIES,
    RESTAGE,
    SETTLE,
    SETTLE_ALL,
    TURN,
    attend,
    call2,
    call3,
    entry,
    kernels_of,
    staged_bytes,
    store_pair,
)
from organs.giant.lanes import address_of, c_function, caller, function, jit
from organs.giant.products import (
    BLOCK,
    ROWS,
    TILE,
    copy_plain,
    interleaver,
    quantise_double,
    quantise_narrow,
    quantise_wide,
    row_reader,
    tile,
)  # fmt: skip

ground = kernels.ground
floats, longs, doubles = ground.floats, ground.longs, ground.doubles
atomic_add, atomic_load, pause, exp = ground.atomic_add, ground.atomic_load, ground.pause, ground.exp
f4, i8, HELP, FAST = np.float32, np.int64, ground.HELP, ground.FAST

# --- A row of a program, and what a thread knows. All addresses are absolute. ---

_ROW_WORDS = (
    "operation",  # address of the compiled operation
    "barrier",  # whether all threads meet after it
    "last",  # it is about logits: of the last token only, unless all are wanted
    "input", "input_stride",  # bytes from token to token
    "output", "output_stride", "add",
    "width",  # numbers of a token
    "norm",  # address of float32 weights; 0: none
    "ones",  # address of as many ones
    "wide", "narrow", "double", "plain",  # address of quantised tiles; 0: not wanted
    "one_wide", "one_double", "one_plain",  # of a single token: bytes into the thread's own memory (gated: an address); -1: not wanted
    "weight", "panels", "blocks", "panel_bytes", "kernel", "kernel_one",  # a packed matrix and its kernels
    "weight2", "blocks2", "panel_bytes2", "kernel2", "kernel2_one",  # a second one (gate and up)
    "tiles2", "tile_bytes2", "single2",  # and the activations it takes
    "tiles", "tile_bytes",  # activations it takes: address, bytes of a tile
    "single", "shared",  # of a single token: bytes into the thread's own memory, or (not 0) an address
    "is_gelu", "merge",
    "queries", "heads", "head", "head_width", "rotated", "split", "angles",  # attention
    "inside", "stretch", "window", "bias", "query_norm", "key_norm",
    "key_kind", "value_kind", "key_panel", "value_row", "values_at", "key_scales_at", "value_scales_at",  # in a stretch
    "staged", "staged_stride", "staged_at",  # of 4-bit keys: room for a prompt's, from page to page, and where in a memory
    "attention_kernels",
    "frequencies", "count",
    "gate", "gate_stride", "sinks",  # of attention: what its output is multiplied by (sigmoid), and a score that each query has besides
    "more",  # address of a record that only this operation knows
)  # fmt: skip
_ROW_REALS = ("epsilon", "factor", "cap", "magnitude")
ROW = np.dtype([(n, i8) for n in _ROW_WORDS] + [(n, np.float64) for n in _ROW_REALS], align=True)
_MACHINE_WORDS = (
    "thread", "threads", "n", "together", "all", "chunks",
    "first", "end",  # rows of the program that this step runs
    "tokens", "positions", "tables",  # addresses of int64 [n]
    "memories",  # address of int64 [n]: where the recurrent state of each token's sequence is
    "logits", "logits_stride", "states",  # where to
    "own", "team", "slot",  # the thread's own memory; the team's words; two words for the clock
    "parts", "parts_stride",  # partial results of attention
    "scratch",  # bytes into `own` that operations may use at will
)  # fmt: skip
MACHINE = np.dtype([(n, i8) for n in _MACHINE_WORDS], align=True)
ROW_BYTES = ROW.itemsize
_OPERATION = lambda: ground.compiler().takes_records(ROW, MACHINE)
OPERATIONS: dict[str, object] = {}


def operation(f):
    """Enter a function (row, machine) into OPERATIONS; it is compiled when a program first needs it.

    Those of other modules (organs/giant/experts.py, …) are there once their module is imported.
    """
    OPERATIONS[f.__name__] = f
    return f


def _jump(b, row, machine):
    byte = ir.IntType(8).as_pointer()
    entry = b.load(b.bitcast(row, ir.IntType(64).as_pointer()))
    kind = ir.FunctionType(ir.VoidType(), [byte, byte])
    b.call(b.inttoptr(entry, kind.as_pointer()), [b.bitcast(row, byte), b.bitcast(machine, byte)])


def _record_pointer(record: np.dtype) -> ir.PointerType:
    """How numba passes a record."""
    return ir.ArrayType(ir.IntType(8), record.itemsize).as_pointer()


def record_at(record: np.dtype):
    """A function of an address: the record that lies there, for compiled code."""
    return function(
        lambda: ground.compiler().gives_record(record), lambda b, at: b.inttoptr(at, _record_pointer(record))
    )


_call = function(_OPERATION, _jump)
_call_tile, _call_reader = caller(6), caller(3)

row_at, machine_at = record_at(ROW), record_at(MACHINE)

# --- The team. ---

TEAM_WORDS = 64
POSTED, ARRIVED, ROUND, SLEEPERS, STOP, PATIENCE, NAPS = (
    64 * i for i in range(7)
)  # bytes; each on a cache line of its own
NEAR = 160 << 10  # bytes of activations that a core's second cache holds beside a panel
IDLE_NS = 1_500_000  # how long a helper spins between two steps
_FUTEX = {"x86_64": 202, "AMD64": 202, "aarch64": 98}.get(platform.machine(), 0)
_system_call = ground.external("syscall", f"int64({', '.join(['int64'] * 7)})")
_clock = ground.external("clock_gettime", "int32(int32, int64)")
_usleep = ground.usleep
IS_LINUX = Path("/proc").exists() and _FUTEX > 0


@jit(**HELP)
def _nanoseconds(slot):
    _clock(np.int32(1), slot)
    words = longs(slot, 2)
    return words[0] * 1000000000 + words[1]


@jit(**HELP)
def _sleep_while(team, at, value):
    """Sleep until somebody wakes those who wait at a word, unless it has changed already."""
    if IS_LINUX:
        atomic_add(team + SLEEPERS, 1)
        _system_call(_FUTEX, team + at, 128, value & 0xFFFFFFFF, 0, 0, 0)
        atomic_add(team + SLEEPERS, -1)
    else:
        _usleep(np.uint32(50))


@jit(**HELP)
def _wake(team, at):
    _wake_some(team, at, 1 << 20)


@jit(**HELP)
def _wake_some(team, at, most):
    if IS_LINUX and atomic_load(team + SLEEPERS) > 0:
        _system_call(_FUTEX, team + at, 129, most, 0, 0, 0)


@jit(**HELP)
def _await_change(team, at, value, nanoseconds, slot):
    """Spin until a word differs from `value`; after some time, sleep. Time is counted, not turns."""
    spins, since = 0, i8(0)
    while atomic_load(team + at) == value:
        pause()
        spins += 1
        if spins & 31 == 0:
            now = _nanoseconds(slot)
            if since == 0:
                since = now
            elif now - since > nanoseconds:
                atomic_add(team + NAPS, 1)
                _sleep_while(team, at, value)


@jit(**HELP)
def barrier(m):
    """Wait until all threads are here."""
    if m.threads == 1:
        return
    team = m.team
    now = atomic_load(team + ROUND)
    if atomic_add(team + ARRIVED, 1) == m.threads - 1:
        atomic_add(team + ARRIVED, -m.threads)
        atomic_add(team + ROUND, 1)
        _wake(team, ROUND)
    else:
        _await_change(team, ROUND, now, atomic_load(team + PATIENCE), m.slot)


@jit(**HELP)
def _run(program, machine):
    for i in range(machine.first, machine.end):
        row = row_at(program + i * ROW_BYTES)
        _call(row, machine)
        if row.barrier:
            barrier(machine)


def _lead(program, machine):
    """Run a step as thread 0, with the helpers' help. Rows and machine by address, as in `_serve`."""
    m = machine_at(machine)
    if m.threads > 1:
        atomic_add(m.team + POSTED, 1)
        _wake(m.team, POSTED)
    old = ground.swap_mode(ground.FLUSH)
    _run(program, m)
    ground.swap_mode(old)


def _serve(program, machine):
    """A helper's life: it comes back to Python only when it is sent home."""
    done, m = i8(0), machine_at(machine)
    old = ground.swap_mode(ground.FLUSH)
    while True:
        _await_change(m.team, POSTED, done, IDLE_NS, m.slot)
        if atomic_load(m.team + STOP):
            break
        done += 1
        _run(program, m)
    ground.swap_mode(old)


@cache
def _entry(f) -> Callable[..., None]:
    """One of these two, compiled or loaded, for Python."""
    return c_function(f, **FAST)


# --- Shares. ---


@jit(**HELP)
def _share(n, m):
    return n * m.thread // m.threads, n * (m.thread + 1) // m.threads


@jit(**HELP)
def _tiles(m):
    return (m.n + TILE - 1) // TILE


@jit(**HELP)
def _only_last(r, m):
    return r.last and not m.all


# --- Operations. ---


@operation
def embed(r, m):
    """output [n, width] = factor · row of the packed matrix `weight`, for every token."""
    first, end = _share(m.n, m)
    tokens, space = longs(m.tokens, m.n), m.own + m.scratch
    for t in range(first, end):
        panel, row = tokens[t] // ROWS, tokens[t] % ROWS
        _call_reader(r.kernel, r.weight + panel * r.panel_bytes, space, r.blocks)
        rows, out = floats(space, 0, r.width * ROWS), floats(r.output + t * r.output_stride, 0, r.width)
        for i in range(r.width):
            out[i] = rows[i * ROWS + row] * f4(r.factor)


@operation
def angles(r, m):
    """output [n, count, 2] = magnitude · cos and sin of position · frequency; float32, computed in float64."""
    first, end = _share(m.n, m)
    positions, frequencies = longs(m.positions, m.n), doubles(r.frequencies, r.count)
    for t in range(first, end):
        out = floats(r.output, t * 2 * r.count, 2 * r.count)
        for i in range(r.count):
            angle = positions[t] * frequencies[i]
            out[2 * i], out[2 * i + 1] = f4(math.cos(angle) * r.magnitude), f4(math.sin(angle) * r.magnitude)


@jit(**HELP)
def _root_mean_square(x, n, epsilon):
    """1 / √(mean x² + ε)."""
    v, total = floats(x, 0, n), f4(0)
    for i in range(n):
        total += v[i] * v[i]
    return f4(1) / f4(math.sqrt(total / f4(n) + f4(epsilon)))


@jit(**HELP)
def _merge(r, m, out):
    """out [queries · head]: the attention of a single token, out of the parts that threads made."""
    group = r.queries // r.heads
    for q in range(r.queries):
        best, total = f4(-1e30), f4(0)
        result = floats(out, q * r.head, r.head)
        for c in range(m.chunks):
            part = floats(
                m.parts, (((q // group) * m.chunks + c) * group + q % group) * m.parts_stride, r.head_width + 2
            )
            best = max(best, part[r.head_width])
        if r.sinks:
            best = max(best, floats(r.sinks, q, 1)[0])
            total = exp(floats(r.sinks, q, 1)[0] - best)
        for i in range(r.head):
            result[i] = f4(0)
        for c in range(m.chunks):
            part = floats(
                m.parts, (((q // group) * m.chunks + c) * group + q % group) * m.parts_stride, r.head_width + 2
            )
            weight = exp(part[r.head_width] - best)
            total += weight * part[r.head_width + 1]
            for i in range(r.head):
                result[i] += weight * part[i]
        total = f4(1) / total
        for i in range(r.head):
            result[i] *= total
        if r.value_kind == Q4_KIND:
            call2(entry(r, TURN), out + 4 * q * r.head, r.head)


@jit(**HELP)
def _shut(x, gate, n):
    """x [n] *= sigmoid(gate)."""
    v, g = floats(x, 0, n), floats(gate, 0, n)
    for i in range(n):
        v[i] /= f4(1) + exp(-ground.maximum(g[i], f4(-80)))


@jit(**HELP)
def _into_one(r, base, x, n, factors, factor, first):
    """A single token's activations: n blocks from number `first` on, in the forms that are wanted."""
    if r.one_wide >= 0:
        quantise_wide(x, n, factors, factor, base + r.one_wide + first * 80, 1, 0)
    if r.one_double >= 0:
        quantise_double(x, n, factors, factor, base + r.one_double + first * 80, 1, 0)
    if r.one_plain >= 0:
        copy_plain(x, n, factors, factor, base + r.one_plain + first * 128, 1, 0)


@jit(**HELP)
def _into_tile(r, x, n, factors, factor, block, t):
    """Token t of a tile: n blocks, of which the first is number `block` of all tiles."""
    if r.narrow:
        quantise_narrow(x, n, factors, factor, r.narrow + block * TILE * 48, TILE, t)
    if r.wide:
        quantise_wide(x, n, factors, factor, r.wide + block * TILE * 80, TILE, t)
    if r.double:
        quantise_double(x, n, factors, factor, r.double + block * TILE * 80, TILE, t)
    if r.plain:
        copy_plain(x, n, factors, factor, r.plain + block * TILE * 128, TILE, t)


@operation
def quantise(r, m):
    """Activations, in the forms that are wanted, of norm(input), or of input where there is no norm."""
    n_blocks = (r.width + BLOCK - 1) // BLOCK
    factors = r.norm if r.norm else r.ones
    if m.n == 1 or _only_last(r, m):
        x = r.input + (m.n - 1) * r.input_stride
        if r.merge and m.chunks > 1:
            x = m.own + m.scratch
            _merge(r, m, x)
        if r.gate:
            if x != m.own + m.scratch:  # other threads read it too
                mine, shared = floats(m.own + m.scratch, 0, r.width), floats(x, 0, r.width)
                for i in range(r.width):
                    mine[i] = shared[i]
                x = m.own + m.scratch
            _shut(x, r.gate + (m.n - 1) * r.gate_stride, r.width)
        factor = _root_mean_square(x, r.width, r.epsilon) if r.norm else f4(1)
        _into_one(r, m.own, x, n_blocks, factors, factor, 0)
        return
    first, end = _share(_tiles(m), m)
    for i in range(first, end):
        for t in range(TILE):
            x = r.input + (i * TILE + t) * r.input_stride
            if r.gate and i * TILE + t < m.n:
                _shut(x, r.gate + (i * TILE + t) * r.gate_stride, r.width)
            factor = _root_mean_square(x, r.width, r.epsilon) if r.norm else f4(1)
            _into_tile(r, x, n_blocks, factors, factor, i * n_blocks, t)
    barrier(m)


@operation
def states(r, m):
    """The normed states, if somebody asked for them: float32 [n, width]."""
    if m.states == 0:
        return
    first, end = _share(m.n, m)
    weights = floats(r.norm, 0, r.width)
    for t in range(first, end):
        x, out = floats(r.input + t * r.input_stride, 0, r.width), floats(m.states, t * r.width, r.width)
        factor = _root_mean_square(r.input + t * r.input_stride, r.width, r.epsilon)
        for i in range(r.width):
            out[i] = x[i] * factor * weights[i]


@operation
def pair(r, m):
    """output [n, 2 · width] = norm(what its first half has) and norm(states), by weights `norm` and `weight`: see Recorder.pair."""
    first, end = _share(m.n, m)
    for t in range(first, end):
        at, source = r.output + t * r.output_stride, m.states + 4 * t * r.width
        for half, x, weights in ((0, at, r.norm), (1, source, r.weight)):
            factor = _root_mean_square(x, r.width, r.epsilon)
            v, w, out = floats(x, 0, r.width), floats(weights, 0, r.width), floats(at, half * r.width, r.width)
            for i in range(r.width):
                out[i] = v[i] * factor * w[i]


@operation
def product(r, m):
    """output (+)= activations · weightᵀ."""
    out, stride = r.output, r.output_stride
    if r.last:
        out, stride = m.logits, m.logits_stride
    first, end = _share(r.panels, m)
    if m.n == 1 or _only_last(r, m):
        x = r.shared if r.shared else m.own + r.single
        for p in range(first, end):
            _call_tile(r.kernel_one, r.weight + p * r.panel_bytes, x, out + 64 * p, r.blocks, stride, r.add)
        return
    n_tiles = _tiles(m)
    some = max(1, NEAR // r.tile_bytes)  # tiles that stay near while all panels pass
    begin = i8(0)
    while begin < n_tiles:
        for p in range(first, end):
            for i in range(begin, min(begin + some, n_tiles)):
                _call_tile(r.kernel, r.weight + p * r.panel_bytes, r.tiles + i * r.tile_bytes,
                           out + i * TILE * stride + 64 * p, r.blocks, stride, r.add)  # fmt: skip
        begin += some


@jit(**HELP)
def _gate(gate, up, n, is_gelu):
    """gate [n] becomes silu(gate) · up, or gelu(gate) · up by the tanh form."""
    g, u = floats(gate, 0, n), floats(up, 0, n)
    if is_gelu:
        for i in range(n):
            x = g[i]
            z = f4(1.5957691216057308) * (x + f4(0.044715) * x * x * x)  # 2 √(2 / π) (x + 0.044715 x³)
            g[i] = x / (f4(1) + exp(-ground.maximum(z, f4(-80)))) * u[i]
    else:
        for i in range(n):
            g[i] = g[i] / (f4(1) + exp(-ground.maximum(g[i], f4(-80)))) * u[i]


@operation
def gated(r, m):
    """Activations of act(input · gateᵀ) · (input · upᵀ): two panels of each at a time, quantised at once and never stored."""
    first, end = _share(r.panels // 2, m)
    gate, up = m.own + m.scratch, m.own + m.scratch + 128 * TILE
    for p in range(first, end):
        if m.n == 1:
            for panel in range(2 * p, 2 * p + 2):
                at = 64 * (panel - 2 * p)
                _call_tile(
                    r.kernel_one, r.weight + panel * r.panel_bytes, m.own + r.single, gate + at, r.blocks, 128, 0
                )
                _call_tile(
                    r.kernel2_one, r.weight2 + panel * r.panel_bytes2, m.own + r.single2, up + at, r.blocks2, 128, 0
                )
            _gate(gate, up, BLOCK, r.is_gelu)
            _into_one(r, 0, gate, 1, r.ones, f4(1), p)
        else:
            for i in range(_tiles(m)):
                x, x2 = r.tiles + i * r.tile_bytes, r.tiles2 + i * r.tile_bytes2
                for panel in range(2 * p, 2 * p + 2):
                    at = 64 * (panel - 2 * p)
                    _call_tile(r.kernel, r.weight + panel * r.panel_bytes, x, gate + at, r.blocks, 128, 0)
                    _call_tile(r.kernel2, r.weight2 + panel * r.panel_bytes2, x2, up + at, r.blocks2, 128, 0)
                _gate(gate, up, BLOCK * TILE, r.is_gelu)
                for t in range(TILE):
                    _into_tile(r, gate + 128 * t, 1, r.ones, f4(1), i * (r.panels // 2) + p, t)


@operation
def add_normed(r, m):
    """output += norm(input): the norms behind attention and feed-forward (Gemma)."""
    first, end = _share(m.n, m)
    weights = floats(r.norm, 0, r.width)
    for t in range(first, end):
        x, out = floats(r.input + t * r.input_stride, 0, r.width), floats(r.output + t * r.output_stride, 0, r.width)
        factor = _root_mean_square(r.input + t * r.input_stride, r.width, r.epsilon)
        for i in range(r.width):
            out[i] += x[i] * factor * weights[i]


@operation
def normalise(r, m):
    """output = norm(output), with weights `norm`, cut to -cap … cap where there is a cap: all heads of a token together (OLMoE)."""
    first, end = _share(m.n, m)
    for t in range(first, end):
        at = r.output + t * r.output_stride
        out = floats(at, 0, r.width)
        if r.norm:
            weights, factor = floats(r.norm, 0, r.width), _root_mean_square(at, r.width, r.epsilon)
            for i in range(r.width):
                out[i] *= factor * weights[i]
        if r.cap > 0:
            for i in range(r.width):
                out[i] = min(max(out[i], f4(-r.cap)), f4(r.cap))


@operation
def add_bias(r, m):
    """output += norm, which is a bias here."""
    first, end = _share(m.n, m)
    bias = floats(r.norm, 0, r.width)
    for t in range(first, end):
        out = floats(r.output + t * r.output_stride, 0, r.width)
        for i in range(r.width):
            out[i] += bias[i]


@operation
def cap(r, m):
    """logits = cap · tanh(logits / cap)."""
    first, end = _share(r.panels * ROWS, m)
    for t in range(m.n if m.all else 1):
        x = floats(m.logits + t * m.logits_stride, 0, r.panels * ROWS)
        for i in range(first, end):
            x[i] = f4(r.cap * math.tanh(x[i] / r.cap))


# --- Attention. ---


@jit(**HELP)
def _head(x, out, step, r, bias, norm, turn, factor):
    """out[:: step] = factor · rotated (norm (x + bias)): one head of queries or keys, float32 [head]."""
    n = r.head
    source, target, scale = floats(x, 0, n), floats(out, 0, (n - 1) * step + 1), f4(factor)
    # The source stays as it is: with chunks, several threads take the same query.
    for i in range(n):
        target[i * step] = source[i]
    if bias:
        added = floats(bias, 0, n)
        for i in range(n):
            target[i * step] += added[i]
    if norm:
        weights, total = floats(norm, 0, n), f4(0)
        for i in range(n):
            total += target[i * step] * target[i * step]
        root = f4(1) / f4(math.sqrt(total / f4(n) + f4(r.epsilon)))
        for i in range(n):
            target[i * step] *= root * weights[i]
    for i in range(r.rotated, n):
        target[i * step] *= scale
    half, turned = r.rotated // 2, floats(turn, 0, r.rotated)
    for i in range(half):
        a, b = (i, i + half) if r.split else (2 * i, 2 * i + 1)
        c, s = turned[2 * i], turned[2 * i + 1]
        x0, x1 = target[a * step], target[b * step]
        target[a * step] = (x0 * c - x1 * s) * scale
        target[b * step] = (x1 * c + x0 * s) * scale


@jit(**HELP)
def _remember(r, m, t, h, space, staged):
    """Write the key and value of token t's head h into its sequence's page, or the key to where the page's are staged."""
    table, position = longs(m.tables, m.n)[t], longs(m.positions, m.n)[t]
    row = r.input + t * r.input_stride
    key = row + 4 * (r.queries + h) * r.head
    value = row + 4 * (r.queries + r.heads + h) * r.head
    bias = r.bias + 4 * (r.queries + h) * r.head if r.bias else 0
    _head(key, space, 1, r, bias, r.key_norm, r.angles + 4 * t * r.rotated, 1.0)
    v = floats(value, 0, r.head)
    if r.bias:
        added = floats(r.bias, (r.queries + r.heads + h) * r.head, r.head)
        for i in range(r.head):
            v[i] += added[i]
    stretch = longs(table + 8 * (position // PAGE), 1)[0] + r.inside + h * r.stretch
    store_pair(r, stretch, position, space, value, staged)
    return stretch


@jit(**HELP)
def _query(r, m, t, q, out, step):
    bias = r.bias + 4 * q * r.head if r.bias else 0
    x = r.input + t * r.input_stride + 4 * q * r.head
    _head(x, out, step, r, bias, r.query_norm, r.angles + 4 * t * r.rotated, r.factor)


@jit(**HELP)
def _first_seen(r, position):
    """The first position that a window lets a token see, rounded down to a panel."""
    return max(0, position - r.window + 1) // 16 * 16 if r.window > 0 else 0


@jit(**HELP)
def _attend_apart(r, m):
    """Every token by itself: keys and values of its head, then all queries that share them, QUERIES at a time."""
    group, items = r.queries // r.heads, m.n * r.heads * m.chunks
    first, end = _share(items, m)
    limits = longs(m.own + m.scratch, QUERIES)
    q, work, out, state = _attention_space(r, m, 1)
    for item in range(first, end):
        c, h, t = item % m.chunks, item // m.chunks % r.heads, item // (m.chunks * r.heads)
        position = longs(m.positions, m.n)[t]
        table = longs(longs(m.tables, m.n)[t], position // PAGE + 1)
        staged = own_staged(r, m, t, h)
        if c == m.chunks - 1:
            stretch = _remember(r, m, t, h, q, staged)
            if r.key_kind == Q4_KIND and position % PAGE == PAGE - 1:
                call3(entry(r, SETTLE), address_of(r), stretch, staged)  # nobody reads it in this step
        start = _first_seen(r, position)
        panels = (position - start) // 16 + 1
        a, b = start + panels * c // m.chunks * 16, min(start + panels * (c + 1) // m.chunks * 16, position + 1)
        done = 0
        while done < group:
            M = min(QUERIES, group - done)
            for i in range(M):
                _query(r, m, t, h * group + done + i, q + 4 * i, M)
                limits[i] = position
            _attend(r, table, h, 1, M, a, b, limits, q, work, out, state, staged, position // PAGE)
            for i in range(M):
                _deliver(
                    r, m, t, h * group + done + i, item * group + done + i, out + 4 * i * r.head_width, state + 8 * i
                )
            done += M


@jit(**HELP)
def own_staged(r, m, t, h):
    """Where the keys of the page that token t's sequence is writing are staged, of head h; 0 if they are not."""
    return longs(m.memories, m.n)[t] + r.staged_at + staged_bytes(r) * h if r.key_kind == Q4_KIND else 0


@jit(**HELP)
def _attention_space(r, m, groups):
    """Addresses of queries, scores, sums and states of so many groups, behind the limits."""
    q = m.own + m.scratch + 64
    work = q + 4 * groups * QUERIES * r.head
    out = work + 4 * QUERIES * PAGE
    return q, work, out, out + 4 * groups * QUERIES * r.head_width


@jit(**HELP)
def _attend(r, table, h, groups, M, first, end, limits, q, work, out, state, staged, staged_from):
    attend(r, longs(r.attention_kernels, 4 * QUERIES), table, r.inside + h * r.stretch, groups, M, q, first, end, limits, work,
           out, state, staged, staged_from)  # fmt: skip


@jit(**HELP)
def _deliver(r, m, t, query, part, sums, state):
    """A query's result: to the output, or as a part that `quantise` merges."""
    x, s = floats(sums, 0, r.head_width), floats(state, 0, 2)
    if m.chunks > 1:
        out = floats(m.parts, part * m.parts_stride, r.head_width + 2)
        for k in range(r.head_width):
            out[k] = x[k]
        out[r.head_width], out[r.head_width + 1] = s[0], s[1]
    else:
        out, inverse = floats(r.output + t * r.output_stride, query * r.head, r.head), f4(1) / s[1]
        if r.sinks:
            sink = floats(r.sinks, query, 1)[0]
            best = max(sink, s[0])
            inverse = exp(s[0] - best) / (s[1] * exp(s[0] - best) + exp(sink - best))
        for k in range(r.head):
            out[k] = x[k] * inverse
        if r.value_kind == Q4_KIND:
            call2(entry(r, TURN), r.output + t * r.output_stride + 4 * query * r.head, r.head)


@jit(**HELP)
def _attend_together(r, m):
    """First all keys and values; then, for a few neighbouring tokens, all queries that share a head, so that it is read once."""
    group = r.queries // r.heads
    first, end = _share(m.n, m)
    positions, limits = longs(m.positions, m.n), longs(m.own + m.scratch, QUERIES)
    staged_from = positions[0] // PAGE
    for t in range(first, end):
        staged = r.staged + (positions[t] // PAGE - staged_from) * r.staged_stride
        for h in range(r.heads):
            _remember(r, m, t, h, m.own + m.scratch, staged + staged_bytes(r) * h)
    if r.key_kind == Q4_KIND:
        call2(entry(r, RESTAGE), address_of(r), address_of(m))
    barrier(m)
    if r.key_kind == Q4_KIND:
        call2(entry(r, SETTLE_ALL), address_of(r), address_of(m))
    q, work, out, state = _attention_space(r, m, group)
    stretches, item = (m.n + QUERIES - 1) // QUERIES, m.thread
    while item < stretches * r.heads:
        h, t = item // stretches, item % stretches * QUERIES
        M = min(QUERIES, m.n - t)
        for i in range(M):
            limits[i] = positions[t + i]
            for g in range(group):
                _query(r, m, t + i, h * group + g, q + 4 * (g * M * r.head + i), M)
        table = longs(longs(m.tables, m.n)[t], limits[M - 1] // PAGE + 1)
        _attend(r, table, h, group, M, _first_seen(r, limits[0]), limits[M - 1] + 1, limits, q, work, out, state,
                r.staged + staged_bytes(r) * h, staged_from)  # fmt: skip
        for i in range(M):
            for g in range(group):
                k = g * M + i
                _deliver(r, m, t + i, h * group + g, 0, out + 4 * k * r.head_width, state + 8 * k)
        item += m.threads


@operation
def attention(r, m):
    """output [n, queries · head] = attention of input [n, queries + 2 · heads, head], whose keys and values are remembered.

    With several chunks (a single token) the parts go to m.parts, and `quantise` merges them.
    """
    if m.together:
        _attend_together(r, m)
    else:
        _attend_apart(r, m)


# --- Compiling what a program needs. ---

_compiled: dict[tuple, object] = {}


def _once(key: tuple, make) -> int:
    """The address of a C function, compiled or loaded when it is first asked for."""
    if key not in _compiled:
        _compiled[key] = make()
    return _compiled[key].address  # type: ignore[attr-defined]


def address(name: str) -> int:
    """Of an operation."""
    return _once(("operation", name), lambda: c_function(OPERATIONS[name], _OPERATION, **FAST))


def tile_address(name: str, form: str, T: int) -> int:
    return _once(("tile", name, form, T), lambda: tile(name, form, T))


def reader_address(name: str) -> int:
    return _once(("reader", name), lambda: row_reader(name))


LONGEST = "attention"  # takes as long to compile as several other operations together
COMMON = ("angles", "embed", "quantise", "product", "gated", "states")  # operations of every model


def compile_beside(kinds: tuple[str, str]) -> None:
    """Fill an empty cache on two cores (numba compiles one thing at a time): a child compiles LONGEST and what draws tokens, we
    what is common."""
    code = f"from organs.giant import engine, sampling; engine.address({LONGEST!r}); sampling.chain()"
    environment = kernels.cache.environment()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, env=environment, cwd=kernels.cache.ROOT)  # fmt: skip
    for name in COMMON:
        address(name)
    attention_addresses(*kinds)
    interleaver()
    child.wait()  # if it failed, we shall compile that too


_attention_kernels: dict[tuple[str, str], tuple[list, np.ndarray]] = {}


def attention_addresses(keys: str, values: str) -> np.ndarray:
    """int64 [ENTRIES], for keys and values of these kinds; kept alive here."""
    kind = keys, values
    if kind not in _attention_kernels:
        table, first = kernels_of(keys, values)
        addresses, kept = np.zeros(ENTRIES, np.int64), [table]
        addresses[: len(first)] = first
        if "q4" in kind:
            for number, f in importlib.import_module("organs.giant.four_bits").functions().items():
                addresses[number] = f.address
                kept.append(f)
        _attention_kernels[kind] = kept, addresses
    return _attention_kernels[kind][1]


def _help(program: np.ndarray, machines: np.ndarray, t: int) -> None:
    """A helper thread, which keeps alive what it is given by address."""
    _entry(_serve)(program.ctypes.data, machines[t:].ctypes.data)


class Team:
    """Threads that run one program, step by step. `machines` [threads] are theirs; fill in what a step needs, then `step`."""

    def __init__(self, program: np.ndarray, machines: np.ndarray):
        self.program, self.machines, self.threads = program, machines, len(machines)
        self.words = np.zeros(TEAM_WORDS + 8 + 16 * self.threads, np.int64)
        skip = -self.words.ctypes.data % 64 // 8
        self.words = self.words[skip:]
        self.patience(100_000)
        team = self.words.ctypes.data
        machines["team"], machines["threads"] = team, self.threads
        for t in range(self.threads):
            machines[t]["thread"], machines[t]["slot"] = t, team + 8 * (TEAM_WORDS + 8 * t)
        self.helpers = [
            threading.Thread(target=_help, args=(program, machines, t), name=f"giant-{t}", daemon=True)
            for t in range(1, self.threads)
        ]  # fmt: skip
        for helper in self.helpers:
            helper.start()
        self._lead = _entry(_lead)

    def patience(self, nanoseconds: int) -> None:
        """How long a thread spins at a barrier before it sleeps."""
        self.words[PATIENCE // 8] = nanoseconds

    @property
    def naps(self) -> int:
        """How often a thread has slept."""
        return int(self.words[NAPS // 8])

    def step(self, alone: bool = False, first: int = 0, end: int | None = None) -> None:
        """Run the program once, or rows first to end of it, on all threads or on the caller's only."""
        self.machines["threads"] = 1 if alone else self.threads
        self.machines["first"], self.machines["end"] = first, len(self.program) if end is None else end
        self._lead(self.program.ctypes.data, self.machines.ctypes.data)

    def close(self) -> None:
        """Send the helpers home."""
        if not self.words[STOP // 8]:
            self.words[STOP // 8], self.machines["threads"], self.machines["end"] = 1, self.threads, 0
            self._lead(0, self.machines.ctypes.data)
            for helper in self.helpers:
                helper.join()


def cpu_time() -> tuple[float, float]:
    """(time that CPUs were idle, all of them together; time), in the same unit. Where nobody says: as if they always were."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        return ticks[3], sum(ticks) / (os.cpu_count() or 1)
    except (OSError, ValueError):
        return time.monotonic(), time.monotonic()


class Pace:
    """Whether single tokens are faster by all threads or by one alone.

    Beside a busy process, one of our threads waits for its core again and again, and all the others at every barrier for it. That
    shows as naps, and only then is working alone tried; while alone, the team is tried again, ever more rarely, and only if a
    CPU has been idle half of the time since: a trial beside a busy process is a late token.
    """

    TRIES, PATIENCE, SHORTEST, LONGEST = 2, 4, 16, 128  # steps of a trial; naps that make one; steps between trials

    def __init__(self, watch: Callable[[], tuple[float, float]] = cpu_time):
        self.watch, self.seen = watch, (0.0, 0.0)
        self.alone, self.trial = False, 0  # what is the rule now; how many steps of a trial are left
        self.seconds: dict[bool, list[float]] = {False: [], True: []}  # of the last steps, together and alone
        self.naps, self.wait = 0.0, self.SHORTEST
        self.rest = 0  # steps until the next trial is allowed

    def choose(self) -> bool:
        """Whether the next step is made alone."""
        if self.trial == 0 and self.rest <= 0 and (self.alone or self.naps >= self.PATIENCE):
            if self.alone and not self._has_idle():
                self.rest = self.wait
            else:
                self.trial, self.seconds[not self.alone] = self.TRIES, []
        return self.alone != (self.trial > 0)

    def note(self, alone: bool, seconds: float, naps: int) -> None:
        """What a step took, and how often a thread slept in it."""
        recent = self.seconds[alone]
        recent.append(seconds)
        del recent[:-8]
        self.rest -= 1
        if not alone:
            self.naps = max(0.0, self.naps - 0.25) + min(naps, 1)
        if self.trial and alone != self.alone:
            self.trial -= 1
            if self.trial == 0:
                self._judge()

    def _has_idle(self) -> bool:
        before, self.seen = self.seen, self.watch()
        return self.seen[0] - before[0] >= 0.5 * (self.seen[1] - before[1])

    def _judge(self) -> None:
        self.seen = self.watch()
        usual, tried = sorted(self.seconds[self.alone]), sorted(self.seconds[not self.alone])
        if tried[0] < 0.9 * usual[len(usual) // 2]:
            self.alone, self.wait = not self.alone, self.SHORTEST
        else:
            self.wait = min(2 * self.wait, self.LONGEST)
        self.rest, self.naps = self.wait, 0.0

"""The operations of the tape, compiled: for every function in organism.OPS a kernel of its name, `void(Row*, Machine*)`.

A row is one step of a program with its numbers and offsets; a machine is one thread's registers: the bases of its arenas
and everything that may change between two runs. A row holds the address of its kernel, so a program is run by a loop of
indirect calls, and a new shape or a new operation compiles nothing that exists.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from organs.kernels.compiler import takes_records
from organs.kernels.ground import (
    BYTES,
    FAST,
    HELP,
    LOWEST,
    ONE,
    VOID,
    WORD,
    ZERO,
    c_function,
    doubles,
    exp,
    exponentials,
    f4,
    f8,
    floats,
    gemm,
    half,
    halves,
    i8,
    instruction,
    ints,
    log,
    longs,
    matvec,
    padded,
    product,
    sigmoid,
    softmax_back,
    transpose,
)  # fmt: skip

# Offsets are in floats: weights into the parameters (and their gradients), buffers into the activations; -1: none.
BUFFERS = "out", "x", "y", "saved", "scratch", "d_out", "d_x", "d_y"
NUMBERS = (
    "inner",
    "outer",
    "vocabulary",
    "heads",
    "size",
    "hybrid",
    "pure",
    "context",
    "cache",
    "parts",
    "frozen",
    "add_x",
    "add_y",
)
FRACTIONS = ("scale", "epsilon")
ROW = np.dtype(
    [(n, i8) for n in ("kernel", "weight", "weight2", *BUFFERS, *NUMBERS)] + [(n, f8) for n in FRACTIONS], align=True
)
BASES = ("parameters", "gradients", "activations", "angles", "cache", "tokens", "targets", "log_probs")
VIEW = ("starts", "logmass", "scalars", "at", "leaf", "rank", "shares", "cumulative")  # of the field, see `view_masses`
MACHINE = np.dtype(
    [(n, i8) for n in (*BASES, *VIEW, "width", "vocabulary", "positions", "sequences", "length", "rows", "start", "position", "tiled")]
    + [("inverse", f8), ("loss", f8)], align=True)  # fmt: skip
_OPERATION = lambda: takes_records(ROW, MACHINE)
FIELD_SCALARS = 6

KERNELS: dict[str, Any] = {}
_compiled: dict[str, Any] = {}


def kernel(function):
    """Enter a function into KERNELS; it is compiled when a program first needs it."""
    KERNELS[function.__name__] = function
    return function


def address(name: str) -> int:
    """The machine address of a kernel; the first call compiles it, or loads it from the cache."""
    if name not in _compiled:
        _compiled[name] = c_function(_OPERATION, KERNELS[name], **FAST)
    return _compiled[name].address


def _jump(b, row, machine):
    entry = b.load(b.bitcast(row, WORD.as_pointer()))
    function = b.inttoptr(entry, ir.FunctionType(VOID, [BYTES, BYTES]).as_pointer())
    b.call(function, [b.bitcast(row, BYTES), b.bitcast(machine, BYTES)])


call = instruction(_OPERATION, _jump)  # calls the kernel whose address is the row's first field


# --- Embedding. ---


@kernel
def embed(r, m):
    tokens = longs(m.tokens, m.start + m.rows)
    for i in range(m.rows):
        token, x = tokens[m.start + i], floats(m.activations, r.out + i * r.outer, r.outer)
        if token < 0:  # left out
            for c in range(r.outer):
                x[c] = ZERO
        else:
            e = floats(m.parameters, r.weight + token * r.outer, r.outer)
            for c in range(r.outer):
                x[c] = e[c]


@kernel
def embed_back(r, m):
    tokens = longs(m.tokens, m.start + m.rows)
    for i in range(m.rows):
        if tokens[m.start + i] >= 0:
            g = floats(m.gradients, r.weight + tokens[m.start + i] * r.outer, r.outer)
            d = floats(m.activations, r.d_out + i * r.outer, r.outer)
            for c in range(r.outer):
                g[c] += d[c]


# --- The field's distributions, which come as cuts of its tree (organism.FieldView). ---


@njit(**HELP)
def view_row(m, i):
    """Which row of the view belongs to row i of the batch."""
    return longs(m.at, m.start + i + 1)[m.start + i] if m.at != 0 else m.start + i


@njit(**HELP)
def view_masses(m, source, masses):
    """masses[k] = ln of the probability of range k in a row of the view, normalised; returns how many ranges are used.

    The first float of the buffer is range 0; it has room for a multiple of LANES.
    """
    width = m.width
    starts, bits = halves(m.starts, source * width, width), halves(m.logmass, source * width, width)
    count = width
    while count > 1 and starts[count - 1] >= m.vocabulary:
        count -= 1
    for k in range(count):
        masses[k] = half(bits[k])
    for k in range(count, padded(count)):
        masses[k] = LOWEST
    total = ZERO
    for k in range(padded(count)):
        total += exp(masses[k])
    norm = f4(math.log(total))
    for k in range(count):
        masses[k] -= norm
    return count


@njit(forceinline=True, **HELP)
def range_end(m, starts, k, count):
    return i8(starts[k + 1]) if k + 1 < count else m.vocabulary


@kernel
def field_input(r, m):
    """x += Σ p · expected[token] over ranges of one token, + scalars @ matrix."""
    n, masses, leaf = r.outer, floats(m.activations, r.scratch, padded(m.width)), ints(m.leaf, m.vocabulary)
    for i in range(m.rows):
        source, x = view_row(m, i), floats(m.activations, r.x + i * n, n)
        count, starts = view_masses(m, source, masses), halves(m.starts, source * m.width, m.width)
        for k in range(padded(count)):
            masses[k] = exp(masses[k])
        for k in range(count):
            if range_end(m, starts, k, count) - i8(starts[k]) == 1:
                e, p = floats(m.parameters, r.weight + leaf[starts[k]] * n, n), masses[k]
                for c in range(n):
                    x[c] += p * e[c]
        bits = halves(m.scalars, source * FIELD_SCALARS, FIELD_SCALARS)
        for k in range(FIELD_SCALARS):
            w, p = floats(m.parameters, r.weight2 + k * n, n), half(bits[k])
            for c in range(n):
                x[c] += p * w[c]


@kernel
def field_input_back(r, m):
    n, masses, leaf = r.outer, floats(m.activations, r.scratch, padded(m.width)), ints(m.leaf, m.vocabulary)
    for i in range(m.rows):
        source, d = view_row(m, i), floats(m.activations, r.d_out + i * n, n)
        count, starts = view_masses(m, source, masses), halves(m.starts, source * m.width, m.width)
        for k in range(padded(count)):
            masses[k] = exp(masses[k])
        for k in range(count):
            if range_end(m, starts, k, count) - i8(starts[k]) == 1:
                g, p = floats(m.gradients, r.weight + leaf[starts[k]] * n, n), masses[k]
                for c in range(n):
                    g[c] += p * d[c]
        bits = halves(m.scalars, source * FIELD_SCALARS, FIELD_SCALARS)
        for k in range(FIELD_SCALARS):
            g, p = floats(m.gradients, r.weight2 + k * n, n), half(bits[k])
            for c in range(n):
                g[c] += p * d[c]


@njit(**HELP)
def spread(m, source, masses, widths, out):
    """out[leaf position] = ln p of every token in a row of the view; masses and widths are work space.

    Ranges are filled eight numbers at a time: what is written beyond a range's end is overwritten by the next one, and
    behind the last there is room.
    """
    count, starts = view_masses(m, source, masses), halves(m.starts, source * m.width, m.width)
    cumulative, shares = doubles(m.cumulative, m.vocabulary + 1), floats(m.shares, 0, m.vocabulary)
    for k in range(count):
        widths[k] = f4(cumulative[range_end(m, starts, k, count)] - cumulative[starts[k]])
    for k in range(count, padded(count)):
        widths[k] = ONE
    for k in range(padded(count)):
        widths[k] = masses[k] - log(widths[k])
    for k in range(count):
        level, j, end = widths[k], i8(starts[k]), range_end(m, starts, k, count)
        if end - j == 1:
            out[j] = masses[k] - shares[j]  # exactly its mass, after the sum below
        else:
            while j < end:
                for x in range(8):
                    out[j + x] = level
                j += 8
    for j in range(m.vocabulary):
        out[j] += shares[j]


# --- Norm, products, SwiGLU. ---


@kernel
def rms_norm(r, m):
    n, over, A = r.inner, f4(1 / r.inner), m.activations
    w, saved = floats(m.parameters, r.weight, n), floats(A, r.saved, m.rows)
    for i in range(m.rows):
        x, h, s = floats(A, r.x + i * n, n), floats(A, r.out + i * n, n), ZERO
        for c in range(n):
            s += x[c] * x[c]
        k = ONE / np.sqrt(s * over + f4(r.epsilon))
        saved[i] = k
        for c in range(n):
            h[c] = x[c] * k * w[c]


@kernel
def rms_norm_back(r, m):
    n, over, A = r.inner, f4(1 / r.inner), m.activations
    w, g, saved = floats(m.parameters, r.weight, n), floats(m.gradients, r.weight, n), floats(A, r.saved, m.rows)
    for i in range(m.rows):
        x, d, dx, s = floats(A, r.x + i * n, n), floats(A, r.d_out + i * n, n), floats(A, r.d_x + i * n, n), ZERO
        for c in range(n):
            s += d[c] * w[c] * x[c]
        k = saved[i]
        q = s * over * k * k * k
        if r.add_x:
            for c in range(n):
                g[c] += d[c] * x[c] * k
                dx[c] += d[c] * w[c] * k - x[c] * q
        else:
            for c in range(n):
                g[c] += d[c] * x[c] * k
                dx[c] = d[c] * w[c] * k - x[c] * q


@kernel
def linear(r, m):
    """out = scale · x @ weight (+ y): BLAS' beta makes the residual free, apart from a copy where y must survive."""
    x, w, out = m.activations + 4 * r.x, m.parameters + 4 * r.weight, m.activations + 4 * r.out
    b = floats(out, 0, m.rows * r.outer)
    if r.y >= 0 and r.y != r.out:
        a = floats(m.activations, r.y, m.rows * r.outer)
        for i in range(b.size):
            b[i] = a[i]
    if m.rows > 1:
        product(
            m.tiled,
            False,
            m.rows,
            r.outer,
            r.inner,
            r.scale,
            x,
            r.inner,
            w,
            r.outer,
            0.0 if r.y < 0 else 1.0,
            out,
            r.outer,
        )
        return
    if r.y < 0:
        for i in range(b.size):
            b[i] = ZERO
    matvec(x, w, out, r.inner, r.outer, f4(r.scale))


@kernel
def linear_back(r, m):
    x, d_out, d_x = m.activations + 4 * r.x, m.activations + 4 * r.d_out, m.activations + 4 * r.d_x
    w, g, turned = m.parameters + 4 * r.weight, m.gradients + 4 * r.weight, m.activations + 4 * r.scratch
    if not r.frozen:
        product(m.tiled, True, r.inner, r.outer, m.rows, r.scale, x, r.inner, d_out, r.outer, 1.0, g, r.outer)
    if m.tiled:  # the kernels that pack nothing are poor when the right side is transposed
        transpose(w, r.inner, r.outer, turned)
        product(
            m.tiled,
            False,
            m.rows,
            r.inner,
            r.outer,
            r.scale,
            d_out,
            r.outer,
            turned,
            r.inner,
            f8(r.add_x),
            d_x,
            r.inner,
        )
    else:
        gemm(False, True, m.rows, r.inner, r.outer, r.scale, d_out, r.outer, w, r.outer, f8(r.add_x), d_x, r.inner)
    if r.add_y:
        a, b = floats(d_out, 0, m.rows * r.outer), floats(m.activations, r.d_y, m.rows * r.outer)
        for i in range(b.size):
            b[i] += a[i]


@kernel
def swiglu(r, m):
    n, A = r.outer, m.activations
    for i in range(m.rows):
        g, u, a = floats(A, r.x + 2 * i * n, n), floats(A, r.x + (2 * i + 1) * n, n), floats(A, r.out + i * n, n)
        for c in range(n):
            a[c] = u[c] * g[c] * sigmoid(g[c])


@kernel
def swiglu_back(r, m):
    """Its gradient takes the place of its input."""
    n, A = r.outer, m.activations
    for i in range(m.rows):
        g, u, d = floats(A, r.x + 2 * i * n, n), floats(A, r.x + (2 * i + 1) * n, n), floats(A, r.d_out + i * n, n)
        dg, du = floats(A, r.d_x + 2 * i * n, n), floats(A, r.d_x + (2 * i + 1) * n, n)
        for c in range(n):
            s = sigmoid(g[c])
            gs = g[c] * s
            a, b = d[c] * u[c] * (s + gs * (ONE - s)), d[c] * gs
            dg[c] = a
            du[c] = b


@kernel
def delta_gate(r, m):
    """Each part of x = [low, z] times strength · sigmoid(z + bias)."""
    n, A = r.outer, m.activations
    rank, bias, strength = (
        n // r.parts,
        floats(m.parameters, r.weight, r.parts),
        floats(m.parameters, r.weight2, r.parts),
    )
    for i in range(m.rows):
        x, out = floats(A, r.x + i * r.inner, r.inner), floats(A, r.out + i * n, n)
        for k in range(r.parts):
            g = strength[k] * sigmoid(x[n + k] + bias[k])
            for j in range(k * rank, (k + 1) * rank):
                out[j] = g * x[j]


@kernel
def delta_gate_back(r, m):
    n, A = r.outer, m.activations
    rank, bias, strength = (
        n // r.parts,
        floats(m.parameters, r.weight, r.parts),
        floats(m.parameters, r.weight2, r.parts),
    )
    for i in range(m.rows):
        x, d = floats(A, r.x + i * r.inner, r.inner), floats(A, r.d_out + i * n, n)
        dx = floats(A, r.d_x + i * r.inner, r.inner)
        if not r.add_x:
            for j in range(r.inner):
                dx[j] = ZERO
        for k in range(r.parts):
            g, dot = sigmoid(x[n + k] + bias[k]), ZERO
            for j in range(k * rank, (k + 1) * rank):
                dot += d[j] * x[j]
                dx[j] += strength[k] * g * d[j]
            dz = strength[k] * g * (ONE - g) * dot
            dx[n + k] += dz
            if not r.frozen:
                floats(m.gradients, r.weight, r.parts)[k] += dz


# --- Attention. ---


@njit(**HELP)
def rotate(z, r, m, sign):
    """Turn the interleaved pairs of queries and keys, in place."""
    half_size = r.size // 2
    for i in range(m.rows):
        t = m.position + i % m.length
        cos, sin = (
            floats(m.angles, t * half_size, half_size),
            floats(m.angles, (m.positions + t) * half_size, half_size),
        )
        for h in range(2 * r.heads):
            v = floats(z, i * r.outer + h * r.size, r.size)
            for j in range(half_size):
                a, b, s = v[2 * j], v[2 * j + 1], sign * sin[j]
                v[2 * j] = a * cos[j] - b * s
                v[2 * j + 1] = a * s + b * cos[j]


@kernel
def rope(r, m):
    rotate(m.activations + 4 * r.x, r, m, ONE)


@kernel
def rope_back(r, m):
    rotate(m.activations + 4 * r.d_out, r, m, -ONE)


BLOCK = 48  # rows of scores at a time, which see only the keys up to the block's end


@njit(forceinline=True, **HELP)
def pattern_of(r, h):
    """Which pattern head h reads, -1: none. Content heads lie first, then hybrid ones, then pure ones."""
    return h - (r.heads - r.hybrid - r.pure)


@njit(forceinline=True, **HELP)
def gate_of(r, m, h):
    """The pattern's share in head h's scores."""
    pattern = pattern_of(r, h)
    if pattern < 0:
        return ZERO
    return sigmoid(floats(m.parameters, r.weight, r.hybrid)[pattern]) if pattern < r.hybrid else ONE


@kernel
def attention(r, m):
    """x holds [q, k, v, scores of patterned heads] a row; `saved` keeps the probabilities, rows padded."""
    T, H, D, A = m.length, r.heads, r.size, m.activations
    C, ld, lp = H * D, r.inner, padded(m.length)
    for b in range(m.sequences * H):
        s, h = b // H, b % H
        pattern, gate = pattern_of(r, h), gate_of(r, m, h)
        q, p = A + 4 * (r.x + s * T * ld + h * D), A + 4 * (r.saved + b * T * lp)
        out, scale = A + 4 * (r.out + s * T * C + h * D), (ONE - gate) / math.sqrt(D)
        for i in range(0, T, BLOCK):
            n = min(BLOCK, T - i)
            gemm(False, True, n, i + n, D, scale, q + 4 * i * ld, ld, q + 4 * C, ld, 0.0, p + 4 * i * lp, lp)
        for i in range(T):
            row = floats(p, i * lp, lp)
            if pattern >= 0:
                w = floats(A, r.x + (s * T + i) * ld + 3 * C + pattern * r.context, T)
                for j in range(i + 1):
                    row[j] += gate * w[j]
            z = ONE / exponentials(row, i + 1)[1]
            for j in range(padded(i + 1)):
                row[j] *= z
            for j in range(padded(i + 1), lp):
                row[j] = ZERO
        for i in range(0, T, BLOCK):
            n = min(BLOCK, T - i)
            gemm(False, False, n, D, i + n, 1.0, p + 4 * i * lp, lp, q + 8 * C, ld, 0.0, out + 4 * i * C, C)


@kernel
def attention_back(r, m):
    """Its gradient takes the place of its input."""
    T, H, D, A = m.length, r.heads, r.size, m.activations
    C, ld, lp = H * D, r.inner, padded(m.length)
    ds, dq = A + 4 * r.scratch, A + 4 * (r.scratch + T * lp)
    for b in range(m.sequences * H):
        s, h = b // H, b % H
        pattern, gate = pattern_of(r, h), gate_of(r, m, h)
        q, p = A + 4 * (r.x + s * T * ld + h * D), A + 4 * (r.saved + b * T * lp)
        do, scale = A + 4 * (r.d_out + s * T * C + h * D), (ONE - gate) / math.sqrt(D)
        for i in range(0, T, BLOCK):
            n = min(BLOCK, T - i)
            gemm(False, True, n, i + n, D, 1.0, do + 4 * i * C, C, q + 8 * C, ld, 0.0, ds + 4 * i * lp, lp)
        gemm(True, False, T, D, T, 1.0, p, lp, do, C, 0.0, q + 8 * C, ld)
        for i in range(T):
            softmax_back(floats(p, i * lp, lp), floats(ds, i * lp, lp), i + 1)
        if pattern >= 0 and pattern < r.hybrid:
            _gate_back(r, m, s, h, pattern, gate, ds, lp)
        for i in range(0, T, BLOCK):
            n = min(BLOCK, T - i)
            gemm(False, False, n, D, i + n, scale, ds + 4 * i * lp, lp, q + 4 * C, ld, 0.0, dq + 4 * i * D, D)
        gemm(True, False, T, D, T, scale, ds, lp, q, ld, 0.0, q + 4 * C, ld)
        for i in range(T):
            old, new = floats(q, i * ld, D), floats(dq, i * D, D)
            for c in range(D):
                old[c] = new[c]
            if pattern >= 0:
                d, w = (
                    floats(ds, i * lp, lp),
                    floats(A, r.x + (s * T + i) * ld + 3 * C + pattern * r.context, r.context),
                )
                for j in range(i + 1):
                    w[j] = gate * d[j]
                for j in range(i + 1, r.context):
                    w[j] = ZERO


@njit(**HELP)
def _gate_back(r, m, s, h, pattern, gate, ds, lp):
    """Gradient of a hybrid head's alpha: gate (1 - gate) Σ d · (pattern - q kᵀ / √D), before q and k are overwritten."""
    T, D, A = m.length, r.size, m.activations
    C, ld, total = r.heads * D, r.inner, 0.0
    for i in range(T):
        q, d = floats(A, r.x + (s * T + i) * ld + h * D, D), floats(ds, i * lp, lp)
        w, wild, tame = floats(A, r.x + (s * T + i) * ld + 3 * C + pattern * r.context, r.context), ZERO, ZERO
        for j in range(i + 1):
            wild += d[j] * w[j]
        for j in range(i + 1):
            k, dot = floats(A, r.x + (s * T + j) * ld + C + h * D, D), ZERO
            for c in range(D):
                dot += q[c] * k[c]
            tame += d[j] * dot
        total += f8(wild) - f8(tame) / math.sqrt(D)
    floats(m.gradients, r.weight, r.hybrid)[pattern] += gate * (ONE - gate) * f4(total)


@kernel
def attention_step(r, m):
    """One token: puts its key and value into the cache, [k, v] a position, and looks back at the newest `context`."""
    H, D, first, A = r.heads, r.size, max(i8(0), m.position + 1 - r.context), m.activations
    C, n, past = H * D, m.position + 1 - max(i8(0), m.position + 1 - r.context), m.cache + 4 * r.cache
    new, here, p = floats(A, r.x + C, 2 * C), floats(past, m.position * 2 * C, 2 * C), floats(A, r.scratch, padded(n))
    for c in range(2 * C):
        here[c] = new[c]
    for h in range(H):
        q, out = floats(A, r.x + h * D, D), floats(A, r.out + h * D, D)
        pattern, gate = pattern_of(r, h), gate_of(r, m, h)
        scale = (ONE - gate) / f4(math.sqrt(D))
        for j in range(n):
            k, z = floats(past, (first + j) * 2 * C + h * D, D), ZERO
            for c in range(D):
                z += q[c] * k[c]
            p[j] = z * scale
        if pattern >= 0:
            w = floats(A, r.x + 3 * C + pattern * r.context, n)
            for j in range(n):
                p[j] += gate * w[j]
        z = ONE / exponentials(p, n)[1]
        for c in range(D):
            out[c] = ZERO
        for j in range(n):
            v, k = floats(past, ((first + j) * 2 + 1) * C + h * D, D), p[j] * z
            for c in range(D):
                out[c] += k * v[c]


# --- Losses and logits. ---
#
# The gradient of a row of logits is k · e - inverse · onehot(target), and e = exp(logit - maximum) is all that is ever
# written: k = inverse / Σ e scales the short rows of x and of its gradient instead, and targets are put right one by one.

LOGIT_ROWS = 96  # rows of logits at a time: they stay in the second-level cache and are never all in memory


@kernel
def cross_entropy(r, m):
    """ln p of the targets, tied head."""
    _tied_loss(r, m, False)


@kernel
def cross_entropy_back(r, m):
    """And all gradients, block by block."""
    _tied_loss(r, m, True)


@njit(**HELP)
def _tied_loss(r, m, learn):
    V, C, ld, inverse = r.vocabulary, r.inner, padded(r.vocabulary + 1), f4(m.inverse)
    w, g, logits = m.parameters + 4 * r.weight, m.gradients + 4 * r.weight, m.activations + 4 * r.scratch
    scaled, turned = logits + 4 * LOGIT_ROWS * ld, logits + 4 * LOGIT_ROWS * (ld + C)
    targets, log_probs = longs(m.targets, m.start + m.rows), floats(m.log_probs, 0, m.start + m.rows)
    transpose(w, V, C, turned)
    for b in range(0, m.rows, LOGIT_ROWS):
        n, x = min(LOGIT_ROWS, m.rows - b), m.activations + 4 * (r.x + b * C)
        product(m.tiled, False, n, V, C, 1.0, x, C, turned, V, 0.0, logits, ld)
        for i in range(n):
            l = floats(logits, i * ld, ld)
            mine = l[targets[m.start + b + i]]
            top, z = exponentials(l, V)
            log_p = mine - top - f4(math.log(z))
            log_probs[m.start + b + i] = log_p
            m.loss -= log_p
            l[V] = inverse / z  # there is room behind the row
        if not learn:
            continue
        d_x = m.activations + 4 * (r.d_x + b * C)
        product(m.tiled, False, n, C, V, 1.0, logits, ld, w, C, 0.0, d_x, C)
        for i in range(n):
            y, k = targets[m.start + b + i], floats(logits, i * ld, ld)[V]
            a, d, s = floats(x, i * C, C), floats(d_x, i * C, C), floats(scaled, i * C, C)
            v, h = floats(w, y * C, C), floats(g, y * C, C)
            for c in range(C):
                s[c] = k * a[c]
                h[c] -= inverse * a[c]
                d[c] = k * d[c] - inverse * v[c]
        product(m.tiled, True, V, C, n, 1.0, logits, ld, scaled, C, 1.0, g, C)


@kernel
def field_loss(r, m):
    """ln p of the targets on the field."""
    _field_loss(r, m, False)


@kernel
def field_loss_back(r, m):
    """And all gradients, block by block."""
    _field_loss(r, m, True)


@njit(**HELP)
def _field_loss(r, m, learn):
    """Logits lie in leaf order, in which the field's ranges are runs: head rows are put in that order first, and their
    gradient back out of it last."""
    V, C, ld, inverse = r.vocabulary, r.inner, padded(r.vocabulary + 8), f4(m.inverse)
    logits = m.activations + 4 * r.scratch
    fields, scaled = logits + 4 * LOGIT_ROWS * ld, logits + 8 * LOGIT_ROWS * ld
    space = scaled + 4 * LOGIT_ROWS * C
    ordered = space + 4 * 2 * padded(m.width)
    turned, gathered = ordered + 4 * V * C, ordered + 8 * V * C
    masses, widths = floats(space, 0, padded(m.width)), floats(space, padded(m.width), padded(m.width))
    leaf, rank = ints(m.leaf, V), ints(m.rank, V)
    targets, log_probs = longs(m.targets, m.start + m.rows), floats(m.log_probs, 0, m.start + m.rows)
    gain, g_gain = (
        floats(m.parameters, r.weight2, C + FIELD_SCALARS + 1),
        floats(m.gradients, r.weight2, C + FIELD_SCALARS + 1),
    )
    for j in range(V):
        source, target = floats(m.parameters, r.weight + leaf[j] * C, C), floats(ordered, j * C, C)
        for c in range(C):
            target[c] = source[c]
    transpose(ordered, V, C, turned)
    if learn:
        zeros = floats(gathered, 0, V * C)
        for j in range(V * C):
            zeros[j] = ZERO
    for b in range(0, m.rows, LOGIT_ROWS):
        n, x = min(LOGIT_ROWS, m.rows - b), m.activations + 4 * (r.x + b * C)
        product(m.tiled, False, n, V, C, 1.0, x, C, turned, V, 0.0, logits, ld)
        for i in range(n):
            l, f, a = floats(logits, i * ld, ld), floats(fields, i * ld, ld), floats(x, i * C, C)
            source = view_row(m, b + i)
            spread(m, source, masses, widths, f)
            factor, bits = gain[C + FIELD_SCALARS], halves(m.scalars, source * FIELD_SCALARS, FIELD_SCALARS)
            for c in range(C):
                factor += gain[c] * a[c]
            for k in range(FIELD_SCALARS):
                factor += gain[C + k] * half(bits[k])
            for j in range(V):
                l[j] += factor * f[j]
            y = rank[targets[m.start + b + i]]
            mine = l[y]
            top, z = exponentials(l, V)
            log_p = mine - top - f4(math.log(z))
            log_probs[m.start + b + i] = log_p
            m.loss -= log_p
            if learn:
                leaning = ZERO  # Σ e · ln p_field
                for j in range(V):
                    leaning += l[j] * f[j]
                l[V] = inverse / z
                f[V] = inverse / z * leaning - inverse * f[y]  # gradient of the gain
        if not learn:
            continue
        d_x = m.activations + 4 * (r.d_x + b * C)
        product(m.tiled, False, n, C, V, 1.0, logits, ld, ordered, C, 0.0, d_x, C)
        for i in range(n):
            y, k, lean = rank[targets[m.start + b + i]], floats(logits, i * ld, ld)[V], floats(fields, i * ld, ld)[V]
            a, d, s = floats(x, i * C, C), floats(d_x, i * C, C), floats(scaled, i * C, C)
            v, h = floats(ordered, y * C, C), floats(gathered, y * C, C)
            for c in range(C):
                s[c] = k * a[c]
                h[c] -= inverse * a[c]
                d[c] = k * d[c] - inverse * v[c] + lean * gain[c]
                g_gain[c] += lean * a[c]
            bits = halves(m.scalars, view_row(m, b + i) * FIELD_SCALARS, FIELD_SCALARS)
            for c in range(FIELD_SCALARS):
                g_gain[C + c] += lean * half(bits[c])
            g_gain[C + FIELD_SCALARS] += lean
        product(m.tiled, True, V, C, n, 1.0, logits, ld, scaled, C, 1.0, gathered, C)
    if learn:
        for j in range(V):
            source, target = floats(gathered, j * C, C), floats(m.gradients, r.weight + leaf[j] * C, C)
            for c in range(C):
                target[c] += source[c]


@njit(**HELP)
def _head(r, m, V, out):
    """out [rows, V] = x @ tableᵀ."""
    x, w = m.activations + 4 * r.x, m.parameters + 4 * r.weight
    if m.rows > 1:
        gemm(False, True, m.rows, V, r.inner, 1.0, x, r.inner, w, r.inner, 0.0, out, V)
    elif r.inner > 16:  # BLAS sends this to its matrix-vector product, which is slow on very short rows
        gemm(False, False, V, 1, r.inner, 1.0, w, r.inner, x, 1, 0.0, out, 1)
    else:
        a, y = floats(x, 0, r.inner), floats(out, 0, V)
        for j in range(V):
            b, z = floats(w, j * r.inner, r.inner), ZERO
            for c in range(r.inner):
                z += a[c] * b[c]
            y[j] = z


@kernel
def logits(r, m):
    _head(r, m, r.outer, m.activations + 4 * r.out)


@kernel
def field_logits(r, m):
    """For one row."""
    V, C = r.outer, r.inner
    _head(r, m, V, m.activations + 4 * r.out)
    out, a, f = (
        floats(m.activations, r.out, V),
        floats(m.activations, r.x, C),
        floats(m.activations, r.scratch, padded(V + 8)),
    )
    space = m.activations + 4 * (r.scratch + padded(V + 8))
    masses, widths = floats(space, 0, padded(m.width)), floats(space, padded(m.width), padded(m.width))
    gain, leaf, source = floats(m.parameters, r.weight2, C + FIELD_SCALARS + 1), ints(m.leaf, V), view_row(m, 0)
    spread(m, source, masses, widths, f)
    factor, bits = gain[C + FIELD_SCALARS], halves(m.scalars, source * FIELD_SCALARS, FIELD_SCALARS)
    for c in range(C):
        factor += gain[c] * a[c]
    for k in range(FIELD_SCALARS):
        factor += gain[C + k] * half(bits[k])
    for j in range(V):
        out[leaf[j]] += factor * f[j]

"""Products of quantised matrices with activations, compiled for the CPU at hand.

**Panels.** Sixteen rows of a matrix are a panel: block by block, and in a block item by item (4-byte words of codes, float16
or byte scales), the same item of all sixteen rows side by side. So one load brings the same codes of 4, 8 or 16 rows into the
lanes of a vector, every lane sums for its own row, and nothing is ever summed across lanes. A panel has as many bytes as its
rows had in the file, and its scales are the file's: `Layout` says how a format's codes and scales are read.

**Activations** become blocks of 32 numbers that share a scale, in tiles of T tokens. "narrow" ones are 8 bits, which halves
the work of reading a prompt; "wide" ones are 16 bits, so that a product is as good as exact, and "double" ones the same as
256 · high + low, for products of bytes; "plain" ones are float32, for matrices that are not quantised. Behind a tile's
numbers stand, for each token: the scale, scale · Σ, and the same for both halves of the block.

A kernel is made for a format, a form and a T when a model first needs it, and kept in the compile cache.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir

from organs.giant import lanes
from organs.giant.formats import FORMATS, IQ4_VALUES, MXFP4_VALUES
from organs.giant.lanes import (
    F32,
    I8,
    I16,
    I32,
    LANES,
    BytesSum,
    Loop,
    const,
    fma,
    from_half,
    function,
    ground,
    jit,
    kernel,
    load,
    lookup,
    named,
    pairs_product,
    renamed,
    splat,
    store,
    vector,
    widen,
    word,
)  # fmt: skip

ROWS = 16  # of a panel
TILE = {"vnni": 16, "avx2": 4, "portable": 2}[lanes.PATH]  # tokens of a tile in the prefill
BLOCK = 32  # numbers that share a scale of activations
BYTES = {
    "wide": 80,
    "double": 80,
    "narrow": 48,
    "plain": 128,
}  # of 32 activations of one token, with what stands behind them
AHEAD = 2048  # bytes
FLOATS, INTS = vector(F32, LANES), vector(I32, LANES)


# --- What stands in a panel. ---


class Number:
    """An int64 that is known when the kernel runs, with the arithmetic that layouts do; divisors are powers of two.

    So a block of 256 is a loop over its eight parts: written out eight times, a kernel would compile eight times as long.
    """

    def __init__(self, b, value):
        self.b, self.value = b, value

    def __add__(self, other: Part) -> Number:
        return Number(self.b, self.b.add(self.value, other.value if isinstance(other, Number) else word(other)))

    def __mul__(self, other: int) -> Number:
        return Number(self.b, self.b.mul(self.value, word(other)))

    def __floordiv__(self, other: int) -> Number:
        return Number(self.b, self.b.lshr(self.value, word(other.bit_length() - 1)))

    def __mod__(self, other: int) -> Number:
        return Number(self.b, self.b.and_(self.value, word(other - 1)))

    __radd__, __rmul__ = __add__, __mul__


Part = int | Number  # which 32 numbers of a block


class View:
    """One block of a panel, and which LANES of its sixteen rows are looked at, while a kernel is being built."""

    def __init__(self, b, base, part: int):
        self.b, self.base, self.part = b, base, part

    def load(self, kind, offset: Part):
        if isinstance(offset, Number):
            return load(self.b, self.b.add(self.base, offset.value), kind)
        return load(self.b, self.base, kind, offset)

    def shifts(self, by: Part):
        """The lanes' amount of a shift."""
        return splat(self.b, self.b.trunc(by.value, I32), LANES) if isinstance(by, Number) else const(INTS, by)

    def words(self, at: Part, k: Part):
        """int32 lanes: word k of the codes that begin at byte `at` of a row's block."""
        return self.load(INTS, ROWS * at + (4 * ROWS * k + 4 * LANES * self.part))

    def halves(self, at: int):
        """float32 lanes: the float16 at byte `at`."""
        return from_half(self.b, self.load(vector(ir.HalfType(), LANES), ROWS * at + 2 * LANES * self.part))

    def bytes(self, at: Part, signed=False):
        """int32 lanes: the byte at `at`."""
        extend = self.b.sext if signed else self.b.zext
        return extend(self.load(vector(I8, LANES), ROWS * at + LANES * self.part), INTS)

    def field(self, v, shift: Part, mask: int):
        """(v >> shift) & mask in every byte of the words."""
        return self.bits(v, shift, mask * 0x01010101)

    def bits(self, v, shift: Part, mask: int):
        """(v >> shift) & mask in every int32 lane."""
        return self.b.and_(self.b.lshr(v, self.shifts(shift)), const(INTS, mask))

    def under(self, low, high, shift: int):
        """low | high << shift."""
        return self.b.or_(low, self.b.shl(high, const(INTS, shift)))

    def minus(self, v, amount: int):
        return self.b.sub(v, const(INTS, amount))

    def times(self, d, scale):
        """float32 lanes: d · scale, of float32 and int32 lanes."""
        return self.b.fmul(d, self.b.sitofp(scale, FLOATS))


@dataclass(frozen=True)
class Layout:
    """How a format's blocks are read inside of a panel. A number is scale · (code - zero) - minimum.

    fields: (first byte, items, bytes an item) of everything in a block of one row, in order; item size -4 is a word of 32
    single bits, which packing turns so that bit 8 i + g belongs to code 4 g + i.
    codes(view, s): eight vectors of 4 codes a lane: those of the s-th 32 numbers of the block, in order.
    scales(view, s): ([scale] or a scale each for both halves of the 32, the same for the minimum, or None)
    """

    name: str
    fields: tuple[tuple[int, int, int], ...]
    codes: Callable[[View, Part], list]
    scales: Callable[[View, Part], tuple[list, list | None]]
    peak: int = 15  # largest code, if unsigned
    zero: int = 0
    signed: bool = False

    @property
    def parts(self) -> int:
        """How many times 32 numbers a block has."""
        return FORMATS[self.name].block // BLOCK


def _nibbles(view: View, at: Part) -> list:
    """16 bytes: low halves are the first 16 codes."""
    words = [view.words(at, k) for k in range(4)]
    return [view.field(w, 0, 15) for w in words] + [view.field(w, 4, 15) for w in words]


def _fifths(view: View, at: int, nibbles: list) -> list:
    bits = view.words(at, 0)
    return [view.under(low, view.field(bits, g, 1), 4) for g, low in enumerate(nibbles)]


def _looked_up(view: View, codes: list, table: np.ndarray) -> list:
    return [lookup(view.b, c, table.tolist()) for c in codes]


def _e8m0(view: View, at: int):
    """2^(e - 128), and 0 for the two that float32 has as denormals only."""
    e = view.bytes(at)
    e = view.b.select(view.b.icmp_signed("<", e, const(INTS, 1)), const(INTS, 1), e)
    return view.b.bitcast(view.b.shl(view.minus(e, 1), const(INTS, 23)), FLOATS)


def _pair_nibbles(view: View, at: int, s: Part) -> list:
    """Q4_K, Q5_K: 32 bytes hold the s-th 32 codes (s even) low and the next 32 high."""
    return [view.field(view.words(at, 8 * (s // 2) + g), 4 * (s % 2), 15) for g in range(8)]


def _q5_k_codes(view: View, s: Part) -> list:
    low = _pair_nibbles(view, 48, s)
    return [view.under(v, view.field(view.words(16, g), s, 1), 4) for g, v in enumerate(low)]


def _sixes(view: View, s: Part) -> tuple[list, list]:
    """The s-th of eight six-bit scales and minima, at bytes 4 to 16 (Q4_K, Q5_K)."""
    d, dmin = view.halves(0), view.halves(2)
    before, here, behind = view.bytes(s), view.bytes(4 + s), view.bytes(8 + s)
    # The first four are whole; the others have their four low bits behind and their two high ones above those of the first.
    high_scale = view.under(view.bits(behind, 0, 15), view.bits(before, 6, 3), 4)
    high_minimum = view.under(view.bits(behind, 4, 15), view.bits(here, 6, 3), 4)
    is_low = view.b.icmp_signed("<", s.value, word(4))
    scale = view.b.select(is_low, view.bits(here, 0, 63), high_scale)
    minimum = view.b.select(is_low, view.bits(behind, 0, 63), high_minimum)
    return [view.times(d, scale)], [view.times(dmin, minimum)]


def _q2_k_codes(view: View, s: Part) -> list:
    return [view.field(view.words(16, 8 * (s // 4) + g), 2 * (s % 4), 3) for g in range(8)]


def _q2_k_scales(view: View, s: Part) -> tuple[list, list]:
    d, dmin, both = view.halves(80), view.halves(82), [view.bytes(2 * s + i) for i in range(2)]
    return [view.times(d, view.bits(v, 0, 15)) for v in both], [view.times(dmin, view.bits(v, 4, 15)) for v in both]


def _q3_k_codes(view: View, s: Part) -> list:
    low = [view.field(view.words(32, 8 * (s // 4) + g), 2 * (s % 4), 3) for g in range(8)]
    return [view.under(v, view.field(view.words(0, g), s, 1), 2) for g, v in enumerate(low)]


def _q3_k_scales(view: View, s: Part) -> tuple[list, None]:
    out = []
    for i in (2 * s, 2 * s + 1):
        low = view.bits(view.bytes(96 + i % 8), 4 * (i // 8), 15)
        scale = view.under(low, view.bits(view.bytes(104 + i % 4), 2 * (i // 4), 3), 4)
        out.append(view.times(view.halves(108), view.minus(scale, 32)))
    return out, None


def _q6_k_codes(view: View, s: Part) -> list:
    n, j = s // 4, s % 4
    low = [view.field(view.words(0, 16 * n + 8 * (j % 2) + g), 4 * (j // 2), 15) for g in range(8)]
    return [view.under(v, view.field(view.words(128, 8 * n + g), 2 * j, 3), 4) for g, v in enumerate(low)]


def _q6_k_scales(view: View, s: Part) -> tuple[list, None]:
    d = view.halves(208)
    return [view.times(d, view.bytes(192 + i, signed=True)) for i in (2 * s, 2 * s + 1)], None


def _iq4_xs_codes(view: View, s: Part) -> list:
    return _looked_up(view, _nibbles(view, 8 + 16 * s), IQ4_VALUES)


def _iq4_xs_scales(view: View, s: Part) -> tuple[list, None]:
    low = view.bits(view.bytes(4 + s // 2), 4 * (s % 2), 15)
    scale = view.under(low, view.bits(view.bytes(2 + s // 4), 2 * (s % 4), 3), 4)
    return [view.times(view.halves(0), view.minus(scale, 32))], None


def _one(view: View, s: Part) -> tuple[list, None]:
    return [view.halves(0)], None


def _two(view: View, s: Part) -> tuple[list, list]:
    return [view.halves(0)], [view.b.fneg(view.halves(2))]


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("Q4_0", ((0, 1, 2), (2, 4, 4)), lambda v, s: _nibbles(v, 2), _one, zero=8),
        Layout("Q4_1", ((0, 2, 2), (4, 4, 4)), lambda v, s: _nibbles(v, 4), _two),
        Layout("Q5_0", ((0, 1, 2), (2, 1, -4), (6, 4, 4)), lambda v, s: _fifths(v, 2, _nibbles(v, 6)), _one, 31, 16),
        Layout("Q5_1", ((0, 2, 2), (4, 1, -4), (8, 4, 4)), lambda v, s: _fifths(v, 4, _nibbles(v, 8)), _two, 31),
        Layout("Q8_0", ((0, 1, 2), (2, 8, 4)), lambda v, s: [v.words(2, g) for g in range(8)], _one, 128, signed=True),
        Layout("Q2_K", ((0, 16, 1), (16, 16, 4), (80, 2, 2)), _q2_k_codes, _q2_k_scales, 3),
        Layout("Q3_K", ((0, 8, 4), (32, 16, 4), (96, 12, 1), (108, 1, 2)), _q3_k_codes, _q3_k_scales, 7, 4),
        Layout("Q4_K", ((0, 2, 2), (4, 12, 1), (16, 32, 4)), lambda v, s: _pair_nibbles(v, 16, s), _sixes),
        Layout("Q5_K", ((0, 2, 2), (4, 12, 1), (16, 8, 4), (48, 32, 4)), _q5_k_codes, _sixes, 31),
        Layout("Q6_K", ((0, 32, 4), (128, 16, 4), (192, 16, 1), (208, 1, 2)), _q6_k_codes, _q6_k_scales, 63, 32),
        Layout("IQ4_NL", ((0, 1, 2), (2, 4, 4)), lambda v, s: _looked_up(v, _nibbles(v, 2), IQ4_VALUES), _one, signed=True),
        Layout("IQ4_XS", ((0, 1, 2), (2, 6, 1), (8, 32, 4)), _iq4_xs_codes, _iq4_xs_scales, signed=True),
        Layout("MXFP4", ((0, 1, 1), (1, 4, 4)), lambda v, s: _looked_up(v, _nibbles(v, 1), MXFP4_VALUES),
               lambda v, s: ([_e8m0(v, 0)], None), signed=True),
    )
}  # fmt: skip
PLAIN = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a number


def form_of(name: str, fast: bool) -> str:
    """Which activations a matrix of this format takes: "plain", "narrow" (if fast) or "double" where the CPU can, or "wide"."""
    if name in PLAIN:
        return "plain"
    layout = LAYOUTS[name]
    if not lanes.can_multiply_bytes(layout.peak, layout.signed):
        return "wide"
    return "narrow" if fast else "double"


def block_bytes(name: str) -> int:
    """Bytes of one block of a panel; a plain matrix has blocks of 32 numbers, the last one padded."""
    return ROWS * (BLOCK * PLAIN[name] if name in PLAIN else FORMATS[name].nbytes)


def blocks(name: str, columns: int) -> int:
    """Blocks of a row."""
    return -(-columns // (BLOCK if name in PLAIN else FORMATS[name].block))


def panel_bytes(name: str, columns: int) -> int:
    return blocks(name, columns) * block_bytes(name)


# --- Packing. ---


_WORDS = vector(I32, ROWS)


def _column(b, source, step):
    """Sixteen words that stand `step` bytes apart, as lanes."""
    words = ir.Constant(_WORDS, ir.Undefined)
    for r in range(ROWS):
        one = load(b, b.add(source, b.mul(step, word(r))), I32)
        words = b.insert_element(words, one, const(I32, r))
    return words


def _turn(b, to, source, step):
    """Sixteen words of each of sixteen rows, `step` bytes apart, side by side: a transpose, by four rounds of zipping halves."""
    rows = [load(b, b.add(source, b.mul(step, word(r))), _WORDS) for r in range(ROWS)]
    lanes_of = lambda first: const(vector(I32, ROWS), [first + i // 2 + ROWS * (i % 2) for i in range(ROWS)])
    for _ in range(4):
        half = ROWS // 2
        rows = [b.shuffle_vector(rows[i // 2], rows[i // 2 + half], lanes_of(half * (i % 2))) for i in range(ROWS)]
    for r, row in enumerate(rows):
        store(b, row, to, 4 * ROWS * r)


def _split(kind):
    """Sixteen words, apart, as items of this kind: the first items of all rows, then the second ones, …"""

    def emit(b, to, source, step):
        words = _column(b, source, step)
        for i in range(32 // kind.width):
            item = b.lshr(words, const(_WORDS, kind.width * i))
            store(b, item if kind is I32 else b.trunc(item, vector(kind, ROWS)), to, ROWS * kind.width // 8 * i)

    return emit


_turn_words, _split_words, _split_halves, _split_bytes = (
    function(lanes.words(3), emit) for emit in (_turn, _split(I32), _split(I16), _split(I8))
)
_copy_word = function(lanes.words(2), lambda b, to, source: store(b, load(b, source, I32), to))


def _interleave(source, to, fields, n_fields, rows, row_bytes, n_blocks, size):
    """Items of sixteen rows side by side. source: uint8 [rows · row_bytes]; to: uint8; fields: int64 [n_fields, 3]; all by
    address. A last item that is not there is zero."""
    fields, at = ground.longs(fields, 3 * n_fields), to
    for first in range(0, rows, ROWS):
        for block in range(n_blocks):
            for f in range(0, 3 * n_fields, 3):
                inside, item = block * size + fields[f], abs(fields[f + 2])
                nbytes, whole = fields[f + 1] * item, 0
                if first + ROWS <= rows and inside + nbytes <= row_bytes and fields[f + 2] > 0:  # nearly always
                    whole = _whole_words(at, source + first * row_bytes + inside, row_bytes, nbytes, item)
                    at += ROWS * whole
                for k in range(whole // item, fields[f + 1]):
                    for r in range(first, first + ROWS):
                        is_there = r < rows and inside + (k + 1) * item <= row_bytes
                        _one_item(at, source + r * row_bytes + inside + k * item, fields[f + 2], is_there)
                        at += item


@jit(**ground.HELP)
def _whole_words(to, source, row_bytes, nbytes, item):
    """Of a field of sixteen whole rows, what is a multiple of four bytes: how many bytes of a row that is."""
    done = 0
    while item == 4 and nbytes - done >= 64:
        _turn_words(to + ROWS * done, source + done, row_bytes)
        done += 64
    while nbytes - done >= 4:
        if item == 4:
            _split_words(to + ROWS * done, source + done, row_bytes)
        elif item == 2:
            _split_halves(to + ROWS * done, source + done, row_bytes)
        else:
            _split_bytes(to + ROWS * done, source + done, row_bytes)
        done += 4
    return done


@jit(**ground.HELP)
def _one_item(to, source, item, is_there):
    """An item of one row; a negative one is turned: bit 4 g + i goes to bit 8 i + g."""
    out = ground.bytes_at(to, abs(item))
    if not is_there:
        for i in range(abs(item)):
            out[i] = 0
    elif item < 0:
        raw = ground.bytes_at(source, 4)
        for i in range(4):
            byte = 0
            for g in range(8):
                bit = 4 * g + i
                byte |= ((raw[bit // 8] >> (bit % 8)) & 1) << g
            out[i] = byte
    elif item == 4:
        _copy_word(to, source)
    else:
        raw = ground.bytes_at(source, item)
        for i in range(item):
            out[i] = raw[i]


interleave = jit(**ground.HELP)(_interleave)


@cache
def packing(name: str, columns: int) -> tuple[np.ndarray, int, int]:
    """What `interleave` is told of rows: int64 [fields, 3], bytes of a row, and bytes of a row's block."""
    if name in PLAIN:
        item = PLAIN[name]
        return np.array([(0, BLOCK, item)], np.int64), columns * item, BLOCK * item
    size = FORMATS[name].nbytes
    return np.array(LAYOUTS[name].fields, np.int64), columns // FORMATS[name].block * size, size


def pack(raw: np.ndarray, name: str, rows: int, columns: int, out: np.ndarray) -> None:
    """Write a matrix's panels. raw: uint8, rows as in the file; out: uint8 [⌈rows / 16⌉ · panel_bytes]; spare rows are zero."""
    table, row_bytes, size = packing(name, columns)
    with _MAKING:  # several threads pack, one compiles
        make = interleaver()
    make(raw.ctypes.data, out.ctypes.data, table.ctypes.data, len(table), rows, row_bytes, blocks(name, columns), size)


_MAKING = threading.Lock()


@cache
def interleaver() -> Callable[..., None]:
    """_interleave, compiled or loaded; other threads may run while it does."""
    return lanes.c_function(_interleave, **ground.FAST)


# --- Tiles: one panel times T tokens. ---


def _load_plain(b, base, name: str, offset: int):
    """float32 lanes of a plain matrix."""
    if name == "F32":
        return load(b, base, FLOATS, 4 * offset)
    if name == "F16":
        return from_half(b, load(b, base, vector(ir.HalfType(), LANES), 2 * offset))
    bits = b.zext(load(b, base, vector(I16, LANES), 2 * offset), INTS)
    return b.bitcast(b.shl(bits, const(INTS, 16)), FLOATS)


class _Tile:
    """Builds a kernel: (panel, activations, out, blocks, bytes between tokens of out, whether to add) -> nothing."""

    def __init__(self, name: str, form: str, T: int):
        self.name, self.form, self.T = name, form, T
        # All sixteen rows at once: a cache line is touched once, and an activation spread over the lanes once.
        self.together = 1 if lanes.PATH == "portable" else ROWS // LANES

    def __call__(self, b, w, x, out, n_blocks, stride, add):
        for first in range(0, ROWS // LANES, self.together):
            parts = range(first, first + self.together)
            loop = Loop(b, n_blocks, [const(FLOATS, 0.0)] * (self.T * self.together))
            base = b.add(w, b.mul(loop.i, word(block_bytes(self.name))))
            views = [View(b, base, part) for part in parts]
            if self.form == "plain":
                self.fetch_ahead(b, base, 1)
                xs = b.add(x, b.mul(loop.i, word(self.T * BYTES["plain"])))
                sums = self.plain(b, views, xs, list(loop.now))
            else:
                sums = self.block(b, views, loop, x)
            self.write(b, loop.close(sums), out, stride, add, parts)

    def block(self, b, views, loop, x):
        """Add the numbers of a block, 32 at a time."""
        layout, step = LAYOUTS[self.name], word(self.T * BYTES[self.form])
        base = views[0].base
        if layout.parts == 1:
            self.fetch_ahead(b, base, 1)
            return self.quantised(b, views, layout, 0, b.add(x, b.mul(loop.i, step)), list(loop.now))
        inner = Loop(b, word(layout.parts), loop.now)
        at = b.add(b.mul(loop.i, word(layout.parts)), inner.i)
        share = word(block_bytes(self.name) // layout.parts)
        self.fetch_ahead(b, b.add(base, b.mul(inner.i, share)), layout.parts)
        return inner.close(
            self.quantised(b, views, layout, Number(b, inner.i), b.add(x, b.mul(at, step)), list(inner.now))
        )

    def fetch_ahead(self, b, base, parts: int):
        """Ask for the weights that come AHEAD bytes later: a single token waits for memory, and the CPU's own guesses are late."""
        if self.T > 1:
            return
        for line in range(0, block_bytes(self.name) // parts, 64):
            at = b.inttoptr(b.add(base, word(AHEAD + line)), I8.as_pointer())
            kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
            prefetch = b.module.globals.get("llvm.prefetch.p0") or ir.Function(b.module, kind, "llvm.prefetch.p0")
            b.call(prefetch, [at, const(I32, 0), const(I32, 3), const(I32, 1)])  # to read, into all caches, data

    def plain(self, b, views, xs, sums):
        """Add 32 numbers, with sums [views, T] in one list."""
        for k in range(BLOCK):
            weights = [_load_plain(b, view.base, self.name, ROWS * k + LANES * view.part) for view in views]
            for t in range(self.T):
                x = splat(b, load(b, xs, F32, 128 * t + 4 * k, 4), LANES)
                for i, w in enumerate(weights):
                    sums[i * self.T + t] = fma(b, w, x, sums[i * self.T + t])
        return sums

    def quantised(self, b, views, layout, s, xs, sums):
        """Add the s-th 32 numbers of a block."""
        T, behind = self.T, self.T * (BYTES[self.form] - 16)
        read = lambda which, t: splat(b, load(b, xs, F32, behind + 4 * (which * T + t), 4), LANES)
        halves = len(layout.scales(views[0], s)[0])
        integers = (self.wide if self.form == "wide" else self.bytes)(b, views, layout, s, xs, halves)
        zero = 128 if layout.signed else layout.zero
        out = []
        for i, view in enumerate(views):
            scales, minima = layout.scales(view, s)
            if zero:
                minima = [b.fmul(scale, const(FLOATS, float(zero))) for scale in scales]
            for t in range(T):
                parts = integers[i][t]
                total = b.fmul(scales[0], b.sitofp(parts[0], FLOATS))
                if halves == 2:
                    total = fma(b, scales[1], b.sitofp(parts[1], FLOATS), total)
                result = fma(b, total, read(0, t), sums[i * T + t])
                for half, minimum in enumerate(minima or ()):
                    result = fma(b, b.fneg(minimum), read(1 if halves == 1 else 2 + half, t), result)
                out.append(result)
        return out

    def unsigned(self, b, views, layout, s):
        """The codes of all views, signed ones 128 too high: unsigned bytes widen in half the time."""
        codes = [layout.codes(view, s) for view in views]
        if layout.signed:
            codes = [[b.xor(c, const(INTS, 0x80808080 - (1 << 32))) for c in some] for some in codes]
        return codes

    def bytes(self, b, views, layout, s, xs, halves):
        """Integer sums [views][T][halves] of bytes; of doubles, 256 times those of the high ones and those of the low ones."""
        codes = self.unsigned(b, views, layout, s)
        terms = 2 if self.form == "double" else 1
        peak, most = 255 if layout.signed else layout.peak, 8 // halves
        sums = [[[BytesSum(b, peak, most) for _ in range(terms)] for _ in range(self.T)] for _ in views]
        out = [[[] for _ in range(self.T)] for _ in views]
        for g in range(8):
            for t in range(self.T):
                for k in range(terms):
                    x = splat(b, load(b, xs, I32, 32 * (terms * t + k) + 4 * g, 4), LANES)
                    for i in range(len(views)):
                        sums[i][t][k].add(codes[i][g], x)
                if (g + 1) % most == 0:
                    for i in range(len(views)):
                        total = sums[i][t][0].take()
                        if terms == 2:
                            total = b.add(b.shl(total, const(INTS, 8)), sums[i][t][1].take())
                        out[i][t].append(total)
        return out

    def wide(self, b, views, layout, s, xs, halves):
        """Integer sums [views][T][halves] of 16-bit numbers."""
        codes = self.unsigned(b, views, layout, s)
        sums = [[[const(INTS, 0)] * halves for _ in range(self.T)] for _ in views]
        for g in range(8):
            pairs = [widen(b, some[g]) for some in codes]
            half = g * halves // 8
            for k in range(2):
                for t in range(self.T):
                    x = splat(b, load(b, xs, I32, 64 * t + 8 * g + 4 * k, 4), LANES)
                    for i in range(len(views)):
                        sums[i][t][half] = pairs_product(b, sums[i][t][half], pairs[i][k], x)
        return sums

    def write(self, b, sums, out, stride, add, parts):
        is_added = b.icmp_signed("!=", add, word(0))
        with b.if_else(is_added) as (then, otherwise):
            for adds, branch in ((True, then), (False, otherwise)):
                with branch:
                    row = out
                    for t in range(self.T):
                        for i, part in enumerate(parts):
                            value = sums[i * self.T + t]
                            if adds:
                                value = b.fadd(load(b, row, FLOATS, 4 * LANES * part, 4), value)
                            store(b, value, row, 4 * LANES * part, 4)
                        row = b.add(row, stride)


def tile(name: str, form: str, T: int):
    """A C function for numba and ctypes; `.address` calls it from compiled code. See _Tile."""
    return kernel(f"tile_{name}_{form}_{T}", 6, _Tile(name, form, T))


# --- Rows out of panels, for embeddings. ---


class _Row:
    """Builds a kernel: (panel, row in it, out float32 [16, 32 · n], blocks) -> nothing; writes all rows of the panel."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, b, w, out, n_blocks):
        parts = 1 if self.name in PLAIN else LAYOUTS[self.name].parts
        loop = Loop(b, n_blocks, [])
        base = b.add(w, b.mul(loop.i, word(block_bytes(self.name))))
        inner = Loop(b, word(parts), [])
        at = b.add(b.mul(loop.i, word(parts)), inner.i)
        target = b.add(out, b.mul(at, word(4 * ROWS * BLOCK)))
        for part in range(ROWS // LANES):
            for k, value in enumerate(self.numbers(b, base, part, Number(b, inner.i))):
                store(b, value, target, 4 * (ROWS * k + LANES * part), 4)
        inner.close([])
        loop.close([])

    def numbers(self, b, base, part, s):
        """32 vectors of LANES rows."""
        if self.name in PLAIN:
            return [_load_plain(b, base, self.name, ROWS * k + LANES * part) for k in range(BLOCK)]
        layout, view = LAYOUTS[self.name], View(b, base, part)
        scales, minima = layout.scales(view, s)
        out = []
        for g, codes in enumerate(layout.codes(view, s)):
            which = g * len(scales) // 8
            for i in range(4):
                byte = b.shl(codes, const(INTS, 24 - 8 * i)) if i < 3 else codes
                shift = b.ashr if layout.signed else b.lshr
                value = b.sitofp(view.minus(shift(byte, const(INTS, 24)), layout.zero), FLOATS)
                value = b.fmul(scales[which], value)
                out.append(b.fsub(value, minima[which]) if minima else value)
        return out


def row_reader(name: str):
    """A C function (panel, out, blocks): float32 [numbers of a row, 16], what a panel's rows mean."""
    return kernel(f"rows_{name}", 3, _Row(name))


# --- Activations. ---


def _absolute_peak(b, v):
    n = v.type.count
    magnitude = named(b, f"llvm.fabs.v{n}f32", v.type, v)
    return named(b, f"llvm.vector.reduce.fmax.v{n}f32", F32, magnitude, fast=("nnan",))


def _rounded(b, v):
    n = v.type.count
    if lanes.PATH == "portable":  # SSE2 cannot round; adding 1.5 · 2²³ does, for |v| < 2²²
        magic = const(v.type, 12582912.0)
        return b.sub(b.bitcast(b.fadd(v, magic), vector(I32, n)), const(vector(I32, n), 0x4B400000))
    return b.fptosi(named(b, f"llvm.rint.v{n}f32", v.type, v), vector(I32, n))


HUGE = 2 << 20  # bytes of a huge page
PEAK = {"narrow": 127.0, "wide": 32767.0, "double": 127.0 * 256}


def _quantise(form: str):
    """Builds: (32 float32, 32 factors, a factor for all, block of the tile, T, which token) -> nothing."""

    def build(b, x, factors, factor, block, T, t):
        floats = vector(F32, BLOCK)
        v = b.fmul(b.fmul(load(b, x, floats, 0, 4), load(b, factors, floats, 0, 4)), splat(b, factor, BLOCK))
        if form == "plain":
            store(b, v, b.add(block, b.mul(t, word(128))), 0, 4)
            return
        top = _absolute_peak(b, v)
        is_some = b.fcmp_ordered(">", top, const(F32, 1e-30))
        scale = b.select(is_some, b.fmul(top, const(F32, 1 / PEAK[form])), const(F32, 0.0))
        inverse = b.select(is_some, b.fdiv(const(F32, PEAK[form]), top), const(F32, 0.0))
        q = _rounded(b, b.fmul(v, splat(b, inverse, BLOCK)))
        at = b.add(block, b.mul(t, word(BYTES[form] - 16)))
        quads = vector(I8, BLOCK)
        if form == "narrow":
            store(b, b.trunc(q, quads), at)
        elif form == "double":
            high = b.ashr(b.add(q, const(q.type, 128)), const(q.type, 8))
            store(b, b.trunc(high, quads), at)
            store(b, b.trunc(q, quads), at, 32)  # its low byte, as a signed one: q - 256 · high
        else:  # of four, the first and third are a pair: see lanes.widen
            order = [4 * (i // 4) + (0, 2, 1, 3)[i % 4] for i in range(BLOCK)]
            shorts = b.trunc(q, vector(I16, BLOCK))
            store(b, b.shuffle_vector(shorts, shorts, const(vector(I32, BLOCK), order)), at)
        halves = []
        for first in (0, 16):
            some = b.shuffle_vector(q, q, const(vector(I32, 16), list(range(first, first + 16))))
            halves.append(named(b, "llvm.vector.reduce.add.v16i32", I32, some))
        sums = [b.sitofp(h, F32) for h in (b.add(*halves), *halves)]
        at = b.add(b.add(block, b.mul(T, word(BYTES[form] - 16))), b.mul(t, word(4)))
        for value in (scale, *(b.fmul(scale, s) for s in sums)):
            store(b, value, at, 0, 4)
            at = b.add(at, b.mul(T, word(4)))

    return function("void(int64, int64, float32, int64, int64, int64)", build)


_ONE, _SIZE = None, 0  # of the template; each form has its own


def _into_token(x, n_blocks, factors, factor, tile, T, t):
    for block in range(n_blocks):
        _ONE(x + 128 * block, factors + 128 * block, factor, tile + block * T * _SIZE, T, t)  # type: ignore[misc]


def _quantiser(form: str):
    return jit(nogil=True)(renamed(_into_token, f"quantise_{form}", _ONE=_quantise(form), _SIZE=BYTES[form]))


# (x, blocks, factors, factor, tile, T, t): x · factors · factor becomes token t of a tile of T. All by address.
quantise_narrow, quantise_wide, quantise_double, copy_plain = map(_quantiser, ("narrow", "wide", "double", "plain"))
QUANTISERS = {"narrow": quantise_narrow, "wide": quantise_wide, "double": quantise_double, "plain": copy_plain}


def aligned(nbytes: int, dtype: Any = np.uint8) -> np.ndarray:
    """Zeros at a multiple of 64 bytes; pages that are never touched take no memory.

    Large ones begin at a huge page, and the kernel is asked for such: where memory is in pieces it would otherwise give small ones,
    and a token that passes them took twice as long.
    """
    large = nbytes >= HUGE
    raw = _mapped(nbytes + HUGE) if large else np.zeros(nbytes + 64, np.uint8)
    skip = -raw.ctypes.data % (HUGE if large else 64)
    return raw[skip : skip + nbytes].view(dtype)


def _mapped(nbytes: int) -> np.ndarray:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def multiply(panels: np.ndarray, name: str, rows: int, x: np.ndarray, form: str, T: int, make=tile) -> np.ndarray:
    """float32 [tokens, rows]: x [tokens, columns] times a packed matrix, tile by tile; for tests and measurements."""
    tokens, columns = x.shape
    n32 = -(-columns // BLOCK)
    product, quantise = make(name, form, T), QUANTISERS[form]
    padded = np.zeros((-(-tokens // T) * T, n32 * BLOCK), np.float32)
    padded[:tokens, :columns] = x
    n_panels, size = -(-rows // ROWS), panel_bytes(name, columns)
    out = aligned(4 * len(padded) * n_panels * ROWS, np.float32).reshape(len(padded), -1)
    ones, space = np.ones(n32 * BLOCK, np.float32), aligned(n32 * T * BYTES[form])
    for first in range(0, len(padded), T):
        for t in range(T):
            quantise(padded[first + t :].ctypes.data, n32, ones.ctypes.data, np.float32(1), space.ctypes.data, T, t)
        for p in range(n_panels):
            product(panels[p * size :].ctypes.data, space.ctypes.data, out[first:, p * ROWS :].ctypes.data,
                          blocks(name, columns), out.strides[0], 0)  # fmt: skip
    return out[:tokens, :rows]


def read_rows(panels: np.ndarray, name: str, rows: int, columns: int, make: Callable = row_reader) -> np.ndarray:
    """float32 [rows, columns]: what a packed matrix means, by the compiled readers."""
    reader, size, n = make(name), panel_bytes(name, columns), blocks(name, columns)
    width = n * (BLOCK if name in PLAIN else FORMATS[name].block)
    out = []
    for p in range(-(-rows // ROWS)):
        block = np.zeros((width, ROWS), np.float32)
        reader(panels[p * size :].ctypes.data, block.ctypes.data, n)
        out.append(block.T)
    return np.concatenate(out)[:rows, :columns]

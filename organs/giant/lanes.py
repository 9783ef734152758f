"""Vectors inside numba: emitting LLVM's instructions for the CPU at hand, for what its loops cannot be made to use.

`PATH` says which: "vnni" (AVX-512 with VNNI, 16 lanes of 32 bits), "avx2" (8 lanes) or "portable" (4 lanes, nothing but plain
vector operations, so that LLVM lowers them to whatever the machine has). ORGANISM_KERNELS forces one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite.binding
from llvmlite import ir

from organs import kernels

ground = kernels.ground

# --- The compile cache: a folder of the giant's own, named by what its code is made of. ---

SOURCES = tuple(
    Path(__file__).with_name(f"{n}.py") for n in ("formats", "lanes", "products", "attention", "engine", "residency")
)


def sources_of(f) -> tuple[Path, ...]:
    """The files whose change makes a function's compiled code stale: the common ones, and its own."""
    own = Path(f.__code__.co_filename)
    return SOURCES if own in SOURCES else (*SOURCES, own)


jit, function = ground.jit, ground.instruction


def c_function(f, signature=None, **options):
    """A C function, cached in the giant's folder. It takes int64 and gives nothing, unless a signature says otherwise."""
    signature = signature or words(f.__code__.co_argcount)
    return ground.c_function(signature, f, kernels.folder_of("giant", sources_of(f)), **options)


def entry(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., int]]:
    """What Python calls with arrays and numbers, cached there too."""
    return lambda f: kernels.entry(folder=lambda: kernels.folder_of("giant", sources_of(f)), **options)(f)


def words(n: int) -> str:
    """The signature void(int64, …)."""
    return f"void({', '.join(['int64'] * n)})"


# --- Which instructions there are. ---

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32, VOID = ir.HalfType(), ir.FloatType(), ir.VoidType()


def _path() -> tuple[str, bool]:
    """(path, whether the machine converts half-precision numbers by itself)."""
    wish = os.environ.get("ORGANISM_KERNELS", "native").lower()
    if wish == "portable" or not ground.X86:
        return "portable", not ground.X86
    has = llvmlite.binding.get_host_cpu_features()
    wide = all(has.get(f) for f in ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"))
    if wide and wish != "avx2":
        return "vnni", True
    return ("avx2", True) if all(has.get(f) for f in ("avx2", "fma", "f16c")) else ("portable", False)


PATH, HALVES = _path()
LANES = {"vnni": 16, "avx2": 8, "portable": 4}[PATH]


def vector(kind: ir.Type, n: int) -> ir.VectorType:
    return ir.VectorType(kind, n)


def const(kind: ir.Type, value) -> ir.Constant:
    """A constant; of a vector type, the same in all lanes (or a list of them)."""
    if isinstance(kind, ir.VectorType) and not isinstance(value, list):
        value = [value] * kind.count
    return ir.Constant(kind, value)


def word(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


address_of = ground.Lazy(lambda: ground.compiler().address_of)


def _jump(b, entry, *arguments):
    kind = ir.FunctionType(VOID, [I64] * len(arguments))
    b.call(b.inttoptr(entry, kind.as_pointer()), arguments)


def caller(n: int):
    """Calls a C function of n int64 by its address."""
    return function(words(n + 1), _jump)


def named(b, name: str, result, *arguments, fast=()):
    """Call one of LLVM's own functions."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), arguments, fastmath=fast)


def renamed(template, name: str, **globals_):
    """A copy of a function of a module under another name and with some globals of its own.

    A closure would do, but numba keys its cache by a closure's contents, and an intrinsic differs in every process.
    """
    f = FunctionType(template.__code__, {**template.__globals__, **globals_}, name)
    f.__qualname__ = name
    return f


_BODY = None  # of the templates; renamed() gives each copy its own
_TEMPLATES = {
    1: lambda a: _BODY(a),  # type: ignore[misc]
    3: lambda a, b, c: _BODY(a, b, c),  # type: ignore[misc]
    5: lambda a, b, c, d, e: _BODY(a, b, c, d, e),  # type: ignore[misc]
    6: lambda a, b, c, d, e, f: _BODY(a, b, c, d, e, f),  # type: ignore[misc]
}


def kernel(name: str, count: int, build):
    """A C function of `count` int64; build(builder, *arguments) emits its body."""
    return c_function(renamed(_TEMPLATES[count], name, _BODY=function(words(count), build)))


def kernel_table(name: str, count: int, builds: Sequence[Callable]) -> tuple[Any, list[int]]:
    """Functions of `count` int64, each emitted by a build(builder, *arguments), compiled and loaded together, which takes a
    fraction of what it takes one by one: (what keeps them alive, their addresses)."""

    def emit(b, out):
        for i, build in enumerate(builds):
            one = ir.Function(b.module, ir.FunctionType(VOID, [I64] * count), f"{name}_{i}")
            one.linkage = "internal"
            inside = ir.IRBuilder(one.append_basic_block("entry"))
            build(inside, *one.args)
            inside.ret_void()
            store(b, b.ptrtoint(one, I64), out, 8 * i, 8)

    made = kernel(name, 1, emit)
    addresses = (ctypes.c_int64 * len(builds))()
    made(ctypes.addressof(addresses))
    return made, list(addresses)


def load(b, base, kind, offset=0, align=1):
    where = b.add(base, word(offset)) if not isinstance(offset, int) or offset else base
    instruction = b.load(b.inttoptr(where, kind.as_pointer()))
    instruction.align = align
    return instruction


def store(b, value, base, offset=0, align=1):
    where = b.add(base, word(offset)) if offset else base
    instruction = b.store(value, b.inttoptr(where, value.type.as_pointer()))
    instruction.align = align


def splat(b, value, n: int):
    """A scalar in all of n lanes."""
    kind = vector(value.type, n)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), const(vector(I32, n), 0))


def fma(b, x, y, z):
    """x · y + z. The portable path leaves it to LLVM whether to fuse: a call of libm's fma would cost a hundredfold."""
    if PATH == "portable":
        return b.fadd(b.fmul(x, y, flags=("contract",)), z, flags=("contract",))
    return named(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def from_half(b, v):
    """float32 of float16 lanes, denormals included whatever the control register says."""
    n = v.type.count
    if HALVES:
        return b.fpext(v, vector(F32, n))
    bits = b.zext(b.bitcast(v, vector(I16, n)), vector(I32, n))
    ints, floats = vector(I32, n), vector(F32, n)
    sign = b.shl(b.and_(bits, const(ints, 0x8000)), const(ints, 16))
    magnitude = b.shl(b.and_(bits, const(ints, 0x7FFF)), const(ints, 13))
    # A denormal's bits, under the exponent of 2^-14, are 2^-14 too much.
    tiny = b.fsub(b.bitcast(b.add(magnitude, const(ints, 113 << 23)), floats), const(floats, 2.0**-14))
    normal = b.add(magnitude, const(ints, 112 << 23))
    huge = b.icmp_unsigned(">=", magnitude, const(ints, 31 << 23))
    normal = b.select(huge, b.add(normal, const(ints, 112 << 23)), normal)
    small = b.icmp_unsigned("<", magnitude, const(ints, 1 << 23))
    return b.bitcast(b.or_(b.select(small, b.bitcast(tiny, ints), normal), sign), floats)


def to_half(b, x):
    """The float16 nearest to float32 lanes, as int16 lanes."""
    n = x.type.count
    if HALVES:
        return b.bitcast(b.fptrunc(x, vector(F16, n)), vector(I16, n))
    ints, floats = vector(I32, n), vector(F32, n)
    bits = b.bitcast(x, ints)
    sign = b.and_(bits, const(ints, 0x80000000 - (1 << 32)))
    f = b.xor(bits, sign)
    odd = b.and_(b.lshr(f, const(ints, 13)), const(ints, 1))
    normal = b.lshr(b.add(b.add(f, const(ints, ((15 - 127) << 23) + 0xFFF)), odd), const(ints, 13))
    tiny = b.sub(b.bitcast(b.fadd(b.bitcast(f, floats), const(floats, 0.5)), ints), const(ints, 0x3F000000))
    out = b.select(b.icmp_signed("<", f, const(ints, 0x38800000)), tiny, normal)
    out = b.select(b.icmp_signed(">=", f, const(ints, 0x477FF000)), const(ints, 0x7C00), out)
    out = b.select(b.icmp_signed(">", f, const(ints, 0x7F800000)), const(ints, 0x7E00), out)
    return b.trunc(b.or_(out, b.lshr(sign, const(ints, 16))), vector(I16, n))


class Loop:
    """for i in range(n) over values that change: `with`-less, since the end of the body hands over the next values."""

    def __init__(self, b, n, first):
        self.b, self.n, self.first, self.before = b, n, first, b.block
        self.body, self.end = b.append_basic_block("body"), b.append_basic_block("end")
        b.cbranch(b.icmp_signed(">", n, word(0)), self.body, self.end)
        b.position_at_end(self.body)
        self.i = b.phi(I64)
        self.i.add_incoming(word(0), self.before)
        self.now = [b.phi(v.type) for v in first]
        for phi, value in zip(self.now, first, strict=True):
            phi.add_incoming(value, self.before)

    def close(self, values):
        """Go on with `values`; returns those after the last round."""
        b, here = self.b, self.b.block
        following = b.add(self.i, word(1))
        self.i.add_incoming(following, here)
        for phi, value in zip(self.now, values, strict=True):
            phi.add_incoming(value, here)
        b.cbranch(b.icmp_signed("<", following, self.n), self.body, self.end)
        b.position_at_end(self.end)
        out = []
        for first, value in zip(self.first, values, strict=True):
            phi = b.phi(value.type)
            phi.add_incoming(first, self.before)
            phi.add_incoming(value, here)
            out.append(phi)
        return out


# --- Integer products. Four bytes of one row are a lane. ---


def widen(b, quads):
    """Unsigned bytes 0 and 2 of every lane as a pair of 16-bit numbers, then bytes 1 and 3."""
    n = quads.type.count
    kind = vector(I16, 2 * n)
    v = b.bitcast(quads, kind)
    pairs = b.and_(v, const(kind, 255)), b.lshr(v, const(kind, 8))
    return [b.bitcast(p, vector(I32, n)) for p in pairs]


def pairs_product(b, total, w, x):
    """total + w₀ x₀ + w₁ x₁ in every 32-bit lane, of its two 16-bit halves."""
    n = total.type.count
    if PATH == "vnni":
        return named(b, "llvm.x86.avx512.vpdpwssd.512", total.type, total, w, x)
    if PATH == "avx2":
        halves = vector(I16, 2 * n)
        product = named(b, "llvm.x86.avx2.pmadd.wd", total.type, b.bitcast(w, halves), b.bitcast(x, halves))
        return b.add(total, product)
    sixteen = const(total.type, 16)
    low = b.mul(b.ashr(b.shl(w, sixteen), sixteen), b.ashr(b.shl(x, sixteen), sixteen))
    return b.add(total, b.add(low, b.mul(b.ashr(w, sixteen), b.ashr(x, sixteen))))


class BytesSum:
    """Sums of products of unsigned bytes up to `peak` and signed ones, four in every 32-bit lane.

    AVX2 sums pairs in 16 bits, which hold only so many: those are added up in 32 bits in time, at the latest after `most`.
    """

    def __init__(self, b, peak: int, most: int):
        self.b, self.kind = b, vector(I32, LANES)
        self.period = most if PATH == "vnni" else min(most, 32767 // (2 * 127 * peak))
        self.total, self.short, self.count = None, None, 0

    def add(self, w, x):
        if PATH == "vnni":
            total = const(self.kind, 0) if self.total is None else self.total
            self.total = named(self.b, "llvm.x86.avx512.vpdpbusd.512", self.kind, total, w, x)
            return
        quads, shorts = vector(I8, 4 * LANES), vector(I16, 2 * LANES)
        product = named(self.b, "llvm.x86.avx2.pmadd.ub.sw", shorts, self.b.bitcast(w, quads), self.b.bitcast(x, quads))
        self.short = product if self.short is None else self.b.add(self.short, product)
        self.count += 1
        if self.count == self.period:
            self._carry()

    def _carry(self):
        if self.short is not None:
            ones = const(vector(I16, 2 * LANES), 1)
            more = named(self.b, "llvm.x86.avx2.pmadd.wd", self.kind, self.short, ones)
            self.total = more if self.total is None else self.b.add(self.total, more)
            self.short, self.count = None, 0

    def take(self):
        """The sums in 32 bits; it begins anew."""
        self._carry()
        total, self.total = self.total, None
        return total


def lookup(b, codes, table: list[int]):
    """table[code] for bytes below 16, in lanes of four."""
    n = codes.type.count
    quads = vector(I8, 4 * n)
    index = b.bitcast(codes, quads)
    if PATH != "portable":
        name = {8: "llvm.x86.avx2.pshuf.b", 16: "llvm.x86.avx512.pshuf.b.512"}[n]
        return b.bitcast(
            named(b, name, quads, ir.Constant(quads, [v & 255 for v in table] * (n // 4)), index), codes.type
        )
    rows = [const(quads, v & 255) for v in table]
    for bit in range(4):
        is_set = b.icmp_unsigned("!=", b.and_(index, const(quads, 1 << bit)), const(quads, 0))
        rows = [b.select(is_set, rows[i + 1], rows[i]) for i in range(0, len(rows), 2)]
    return b.bitcast(rows[0], codes.type)


def can_multiply_bytes(peak: int, signed: bool) -> bool:
    """Whether BytesSum may be used: the portable path has none, AVX2's saturates where weights are large."""
    if PATH == "vnni":
        return True
    return PATH == "avx2" and not signed and 2 * 127 * peak <= 32767

"""The ground that kernels stand on: what numba lacks. A matrix product by symbol, arrays by address, atomics, the float
control register, half-precision numbers, and vectorised exp and log of a stated error."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir

from organs.kernels import cache, objects

f4, f8, i4, i8 = np.float32, np.float64, np.int32, np.int64
FAST = dict(fastmath=True, error_model="numpy")
# For what only compiled code calls.
HELP = dict(FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True)
X86 = platform.machine() in ("x86_64", "AMD64")
ONE, ZERO, LOWEST = f4(1), f4(0), f4(-1e30)

FLOAT, INT, WORD, BYTES, VOID = (
    ir.FloatType(),
    ir.IntType(32),
    ir.IntType(64),
    ir.IntType(8).as_pointer(),
    ir.VoidType(),
)


# --- What numba makes, when something that uses it is compiled. ---


class Lazy:
    """A thing of numba's, under a name that compiled code may use: made when that is compiled, without numba until then."""

    def __init__(self, make: Callable[[], Any]):
        self._make = make

    @functools.cached_property
    def made(self) -> Any:
        return self._make()

    @property
    def _numba_type_(self) -> Any:  # numba asks for this
        return compiler().type_of(self.made)

    def __call__(self, *arguments: Any) -> Any:
        return self.made(*arguments)


def compiler() -> Any:
    """The module that imports numba."""
    return importlib.import_module("organs.kernels.compiler")


def jit(**options: Any) -> Callable[[Callable[..., Any]], Lazy]:
    """numba.njit."""
    return lambda f: Lazy(lambda: compiler().njit(**options)(f))


def entry(**options: Any) -> Callable[[Callable[..., Any]], Lazy]:
    """numba.njit, cached, for what Python calls."""
    return lambda f: Lazy(lambda: compiler().entry(**options)(f))


def instruction(signature: Any, build: Callable[..., Any]) -> Lazy:
    """A function of fixed signature (text, or a function that gives numba's): build(builder, *arguments) emits it."""
    return Lazy(lambda: compiler().instruction(signature, build))


def external(name: str, signature: str) -> Lazy:
    """A function of the process, by its symbol."""
    return Lazy(lambda: compiler().external(name, signature))


def c_function(signature: Any, f: Callable[..., Any], folder: Path | None = None, **options: Any) -> objects.Code:
    """A C function, loaded from its object file or else compiled into it. Names are unique in a folder."""
    path = (folder or cache.folder()) / f"{f.__module__}.{f.__qualname__}.o"
    found = objects.load(path, f.__code__.co_argcount)
    return compiler().c_function(signature, f, path, **options) if found is None else found


# --- Instructions, as functions. ---


def library(name, result, *arguments):
    """A call of an LLVM intrinsic, for `instruction`."""
    kind = ir.FunctionType(result, arguments)
    flags = ("fast",) if isinstance(result, ir.FloatType) else ()
    return lambda b, *values: b.call(
        b.module.globals.get(name) or ir.Function(b.module, kind, name), values, fastmath=flags
    )


def _swap_mxcsr(b, value):
    with b.goto_entry_block():
        slot = b.alloca(INT)
    library("llvm.x86.sse.stmxcsr", VOID, BYTES)(b, b.bitcast(slot, BYTES))
    old = b.load(slot)
    b.store(value, slot)
    library("llvm.x86.sse.ldmxcsr", VOID, BYTES)(b, b.bitcast(slot, BYTES))
    return old


def _word(b, address):
    return b.inttoptr(address, WORD.as_pointer())


maximum = instruction(
    "float32(float32, float32)", library("llvm.maxnum.f32", FLOAT, FLOAT, FLOAT)
)  # numba's max() does not vectorise
rint = instruction("float32(float32)", library("llvm.rint.f32", FLOAT, FLOAT))
as_float = instruction("float32(int32)", lambda b, x: b.bitcast(x, FLOAT))
as_int = instruction("int32(float32)", lambda b, x: b.bitcast(x, INT))
atomic_add = instruction("int64(int64, int64)", lambda b, p, x: b.atomic_rmw("add", _word(b, p), x, "seq_cst"))
atomic_load = instruction("int64(int64)", lambda b, p: b.load_atomic(_word(b, p), "seq_cst", 8))
_floats = instruction("CPointer(float32)(int64)", lambda b, x: b.inttoptr(x, FLOAT.as_pointer()))
_doubles = instruction("CPointer(float64)(int64)", lambda b, x: b.inttoptr(x, ir.DoubleType().as_pointer()))
_longs = instruction("CPointer(int64)(int64)", _word)
_ints = instruction("CPointer(int32)(int64)", lambda b, x: b.inttoptr(x, INT.as_pointer()))
_bytes = instruction("CPointer(uint8)(int64)", lambda b, x: b.inttoptr(x, BYTES))
_halves = instruction("CPointer(uint16)(int64)", lambda b, x: b.inttoptr(x, ir.IntType(16).as_pointer()))
_octets = instruction("CPointer(uint8)(int64)", lambda b, x: b.inttoptr(x, ir.IntType(8).as_pointer()))
usleep = external("usleep", "int32(uint32)")
carray = Lazy(lambda: importlib.import_module("numba").carray)

# Flush-to-zero and denormals-are-zero: a well-learned text makes gradients and moments denormal, and those cost fifty times
# a normal number (notes/executor.md). Every compiled entry point swaps this in and NumPy's state back out.
FLUSH = np.uint32(0x1F80 | 0x8040)
if X86:
    swap_mode = instruction("uint32(uint32)", _swap_mxcsr)
    pause = instruction("void()", library("llvm.x86.sse2.pause", VOID))
else:
    swap_mode = instruction("uint32(uint32)", lambda b, x: x)
    pause = instruction("void()", lambda b: None)


# --- Arrays by address. Offsets count numbers, addresses bytes. ---


@jit(forceinline=True, **HELP)
def floats(base, offset, n):
    """n float32 that begin `offset` numbers behind an address."""
    return carray(_floats(base + 4 * offset), (n,))


@jit(forceinline=True, **HELP)
def doubles(base, n):
    return carray(_doubles(base), (n,))


@jit(forceinline=True, **HELP)
def longs(base, n):
    return carray(_longs(base), (n,))


@jit(forceinline=True, **HELP)
def bytes_at(base, n):
    return carray(_bytes(base), (n,))


@jit(forceinline=True, **HELP)
def ints(base, n):
    return carray(_ints(base), (n,))


@jit(forceinline=True, **HELP)
def halves(base, offset, n):
    """n 16-bit numbers."""
    return carray(_halves(base + 2 * offset), (n,))


@jit(forceinline=True, **HELP)
def octets(base, offset, n):
    """n bytes."""
    return carray(_octets(base + offset), (n,))


# --- Functions that vectorise without a vector library. ---

_P0, _P1, _P2, _P3, _P4, _P5 = (f4(c) for c in (1.0, 0.69314718, 0.24022651, 0.05550411, 0.00961814, 0.00133336))
_LOG2E, _LN2, _FLOOR, _FAR = f4(1.4426950408889634), f4(0.6931471805599453), f4(-127), f4(-80)


@jit(forceinline=True, **HELP)
def exp(x):
    """e ** x within 3e-6 relative for -87 < x < 88; exactly 0 below."""
    z = maximum(x * _LOG2E, _FLOOR)
    n = rint(z)
    r = z - n
    p = ((((_P5 * r + _P4) * r + _P3) * r + _P2) * r + _P1) * r + _P0
    return p * as_float((i4(n) + i4(127)) << i4(23))


@jit(forceinline=True, **HELP)
def log(x):
    """ln x within 1e-6 + 2e-7 |ln x| for normal x > 0: exponent, and the series of artanh for the mantissa."""
    bits = as_int(x)
    e = (bits - i4(0x3F3504F3)) >> i4(23)  # mantissa in [√½, √2)
    m = as_float(bits - (e << i4(23)))
    s = (m - ONE) / (m + ONE)
    z = s * s
    return f4(e) * _LN2 + s * (f4(2) + z * (f4(0.6666667) + z * (f4(0.4) + z * (f4(0.2857143) + z * f4(0.2222222)))))


@jit(forceinline=True, **HELP)
def sigmoid(x):
    return ONE / (ONE + exp(-maximum(x, _FAR)))


@jit(forceinline=True, **HELP)
def half(bits):
    """The float16 of these 16 bits; below 6e-5, 0 where denormals count as 0."""
    magnitude = as_float(i4(bits & 0x7FFF) << i4(13)) * f4(2.0**112)
    return -magnitude if bits & 0x8000 else magnitude


# --- The matrix product: NumPy's own OpenBLAS by symbol, else SciPy's, else ours. ---

_SGEMM = "void(int32, int32, int32, int64, int64, int64, float32, int64, int64, int64, int64, float32, int64, int64)"
_sgemm = external("organism_sgemm", _SGEMM)


def _openblas() -> tuple[int, str]:
    """Address of the CBLAS product inside NumPy (64-bit integers), and the name of the core it was tuned for."""
    shared = ctypes.CDLL(importlib.import_module("numpy._core._multiarray_umath").__file__)
    shared.scipy_openblas_set_num_threads64_(ctypes.c_int(1))
    shared.scipy_openblas_get_corename64_.restype = ctypes.c_char_p
    core = shared.scipy_openblas_get_corename64_().decode()
    return ctypes.cast(shared.scipy_cblas_sgemm64_, ctypes.c_void_p).value or 0, core


@jit(**HELP)
def own_product(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """c = beta · c + alpha · op(a) @ op(b), plain loops that vectorise over a row of c (of b, transposed: over k)."""
    for i in range(m):
        row = floats(c, i * ldc, n)
        if beta == ZERO:
            for j in range(n):
                row[j] = ZERO
        elif beta != ONE:
            for j in range(n):
                row[j] *= beta
        if tb:
            _dot_rows(ta, i, n, k, alpha, a, lda, b, ldb, row)
        else:
            _add_rows(ta, i, n, k, alpha, a, lda, b, ldb, row)


@jit(**HELP)
def _add_rows(ta, i, n, k, alpha, a, lda, b, ldb, row):
    step, first = (lda, i) if ta else (1, i * lda)
    left, p = floats(a, first, (k - 1) * step + 1 if k > 0 else 0), 0
    while p + 4 <= k:
        x0, x1 = alpha * left[p * step], alpha * left[(p + 1) * step]
        x2, x3 = alpha * left[(p + 2) * step], alpha * left[(p + 3) * step]
        b0, b1 = floats(b, p * ldb, n), floats(b, (p + 1) * ldb, n)
        b2, b3 = floats(b, (p + 2) * ldb, n), floats(b, (p + 3) * ldb, n)
        for j in range(n):
            row[j] += (x0 * b0[j] + x1 * b1[j]) + (x2 * b2[j] + x3 * b3[j])
        p += 4
    while p < k:
        x, b0 = alpha * left[p * step], floats(b, p * ldb, n)
        for j in range(n):
            row[j] += x * b0[j]
        p += 1


@jit(**HELP)
def _dot_rows(ta, i, n, k, alpha, a, lda, b, ldb, row):
    step, first = (lda, i) if ta else (1, i * lda)
    left = floats(a, first, (k - 1) * step + 1 if k > 0 else 0)
    for j in range(n):
        right, total = floats(b, j * ldb, k), ZERO
        for p in range(k):
            total += left[p * step] * right[p]
        row[j] += alpha * total


def _own_cblas(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    own_product(ta == 112, tb == 112, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)


def choose_blas() -> tuple[str, bool, object]:
    """(which product runs, whether it should be given tiles, what must stay alive); ORGANISM_BLAS forces openblas or own.

    Tiles: OpenBLAS has kernels that pack nothing for small products, but only with AVX-512.
    """
    wish = os.environ.get("ORGANISM_BLAS", "")
    if wish != "own":
        try:
            address, core = _openblas()
            if address:
                llvmlite.binding.add_symbol("organism_sgemm", address)
                return f"NumPy's OpenBLAS ({core})", core in ("SkylakeX", "Cooperlake", "SapphireRapids"), None
        except (OSError, AttributeError):
            pass
    product = c_function(_SGEMM, _own_cblas, **FAST)
    llvmlite.binding.add_symbol("organism_sgemm", product.address)
    return (
        "our own product (NumPy brings no OpenBLAS that can be called)"
        if wish != "own"
        else "our own product (ORGANISM_BLAS)",
        False,
        product,
    )


BLAS, TILED, _alive = choose_blas()  # before any cached kernel is loaded: it looks for the symbol


@jit(forceinline=True, **HELP)
def gemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """c [m, n] = beta · c + alpha · op(a) [m, k] @ op(b) [k, n], by address; ld: numbers from row to row."""
    _sgemm(
        i4(101), i4(112 if ta else 111), i4(112 if tb else 111), m, n, k, f4(alpha), a, lda, b, ldb, f4(beta), c, ldc
    )


TILE_M, TILE_N, TILE_K = 48, 128, 128


@jit(**HELP)
def product(tiled, ta, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """As gemm with b as it is; `tiled`: in tiles small enough for OpenBLAS' kernels that pack nothing.

    With AVX-512 those (below 10^6 multiplications) reach 120 to 175 GF/s where the packing path stays at 90 to 125. They
    are poor when b is transposed, and large outputs are better left to the packing path (notes/executor.md).
    """
    if not tiled or m * n * k <= 1000000 or m * n > 300000:
        gemm(ta, False, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)
        return
    for p in range(0, k, TILE_K):
        for i in range(0, m, TILE_M):
            for j in range(0, n, TILE_N):
                gemm(ta, False, min(TILE_M, m - i), min(TILE_N, n - j), min(TILE_K, k - p), alpha,
                     a + 4 * (p * lda + i if ta else i * lda + p), lda, b + 4 * (p * ldb + j), ldb,
                     beta if p == 0 else 1.0, c + 4 * (i * ldc + j), ldc)  # fmt: skip


@jit(**HELP)
def transpose(a, m, n, b):
    """b [n, m] becomes the transpose of a [m, n]."""
    for i in range(0, m, 16):
        for j in range(n):
            s, d = floats(a, i * n + j, 16 * n), floats(b, j * m + i, 16)
            for x in range(min(16, m - i)):
                d[x] = s[x * n]


@jit(**HELP)
def matvec(x, w, y, inner, outer, scale):
    """y [outer] += scale · x [inner] @ w, eight rows of w at a time, so that y is read and written an eighth as often."""
    xs, ys, k = floats(x, 0, inner), floats(y, 0, outer), 0
    while k + 8 <= inner:
        a0, a1, a2, a3 = scale * xs[k], scale * xs[k + 1], scale * xs[k + 2], scale * xs[k + 3]
        a4, a5, a6, a7 = scale * xs[k + 4], scale * xs[k + 5], scale * xs[k + 6], scale * xs[k + 7]
        w0, w1, w2 = floats(w, k * outer, outer), floats(w, (k + 1) * outer, outer), floats(w, (k + 2) * outer, outer)
        w3, w4, w5 = (
            floats(w, (k + 3) * outer, outer),
            floats(w, (k + 4) * outer, outer),
            floats(w, (k + 5) * outer, outer),
        )
        w6, w7 = floats(w, (k + 6) * outer, outer), floats(w, (k + 7) * outer, outer)
        for j in range(outer):
            ys[j] += ((a0 * w0[j] + a1 * w1[j]) + (a2 * w2[j] + a3 * w3[j])) + (
                (a4 * w4[j] + a5 * w5[j]) + (a6 * w6[j] + a7 * w7[j])
            )
        k += 8
    while k < inner:
        a, v = scale * xs[k], floats(w, k * outer, outer)
        for j in range(outer):
            ys[j] += a * v[j]
        k += 1


# --- Softmax over a row that has room for a multiple of LANES numbers. ---

LANES = 32


@jit(forceinline=True, **HELP)
def padded(n):
    return (n + LANES - 1) // LANES * LANES


@jit(**HELP)
def exponentials(s, n):
    """s[j] becomes exp(s[j] - maximum), 0 in the padding; returns the maximum and the sum."""
    for j in range(n, padded(n)):
        s[j] = LOWEST
    top, z = LOWEST, ZERO
    for j in range(padded(n)):
        top = maximum(top, s[j])
    for j in range(padded(n)):
        e = exp(s[j] - top)
        s[j] = e
        z += e
    return top, z


@jit(**HELP)
def softmax_back(p, d, n):
    """d becomes p · (d - Σ p d); 0 beyond n."""
    z = ZERO
    for j in range(n, d.size):
        d[j] = ZERO
    for j in range(padded(n)):
        z += p[j] * d[j]
    for j in range(padded(n)):
        d[j] = p[j] * (d[j] - z)

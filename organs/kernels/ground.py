"""The ground that kernels stand on: what numba lacks. A matrix product by symbol, arrays by address, atomics, the float
control register, half-precision numbers, and vectorised exp and log of a stated error."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform

import numpy as np

from organs.kernels import cache

with cache.collecting_later():
    import llvmlite.binding
    from llvmlite import ir
    from numba import carray, njit, types
    from numba.core import cgutils
    from numba.core.caching import FunctionCache
    from numba.core.ccallback import CFunc
    from numba.core.codegen import JITCodeLibrary
    from numba.core.registry import cpu_target
    from numba.core.runtime import rtsys
    from numba.extending import intrinsic

f4, f8, i4, i8 = np.float32, np.float64, np.int32, np.int64
FAST = dict(cache=True, fastmath=True, error_model="numpy")
# For what only compiled code calls: it is a part of its callers, so that only they are worth keeping.
HELP = dict(FAST, cache=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)
X86 = platform.machine() in ("x86_64", "AMD64")
ONE, ZERO, LOWEST = f4(1), f4(0), f4(-1e30)

_f, _d, _i, _l = types.float32, types.float64, types.int32, types.int64
FLOAT, INT, WORD, BYTES, VOID = (
    ir.FloatType(),
    ir.IntType(32),
    ir.IntType(64),
    ir.IntType(8).as_pointer(),
    ir.VoidType(),
)


# --- What Python or other compiled code enters. ---


WRAPPERS = ("cfunc.", "_ZN7cpython")  # names of what Python and C enter


class _Library(JITCodeLibrary):
    """numba's, with three differences.

    Each has its own copy of every helper it is linked with. numba lets all libraries share the copy that was loaded first;
    copies differ in how they were optimised, hence in their last bits, and what is loaded first differs between a process
    that compiles and one that finds the cache full (a text compressed by the one was lost to the other).

    A helper is optimised, and becomes machine code, only as a part of what it is linked with, unless it is called by itself:
    that takes two thirds of the time.

    One from the cache is only called, so its bitcode is not parsed, nor numba's runtime compiled for one that does not use
    it: half of the time that loading takes.
    """

    _bitcode, _is_optimised, _is_code = b"", False, False

    def _optimize_final_module(self):
        defined = [f for f in self._final_module.functions if not f.is_declaration]
        if any(f.name.startswith(WRAPPERS) for f in defined):
            for f in defined:
                if f.linkage == llvmlite.binding.Linkage.linkonce_odr:
                    f.linkage = "internal"
            super()._optimize_final_module()
            self._is_optimised = True

    @classmethod
    def _unserialize(cls, codegen, state):
        name, kind, data = state
        if kind != "object":
            return super()._unserialize(codegen, state)
        self = codegen.create_library(name)
        (code, self._bitcode), self._is_optimised = data, True
        if b"NRT_" in code:  # names that it is linked with
            rtsys.initialize(cpu_target.target_context)
        self.enable_object_caching()
        self._set_compiled_object(code)
        self._finalize_final_module()
        return self

    def _get_module_for_linking(self):
        if self._shared_module is None and self._bitcode:
            self._shared_module = llvmlite.binding.parse_bitcode(self._bitcode)
        return super()._get_module_for_linking()

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True

    def _become_code(self):
        self._ensure_finalized()
        if self._is_code:
            return
        if not self._is_optimised:
            super()._optimize_final_module()
        self._is_code = True
        super()._finalize_final_module()

    def _get_compiled_object(self):
        self._become_code()
        return super()._get_compiled_object()

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        if not self._bitcode and name not in {f.name for f in self._final_module.functions if not f.is_declaration}:
            return 0
        self._become_code()
        return self._codegen._engine.get_function_address(name)


def _set_environment(name, environment):
    """numba's, for functions that may not have become code."""
    if _codegen._engine.get_global_value_address(name):
        type(_codegen).set_env(_codegen, name, environment)


_codegen = cpu_target.target_context.codegen()
_codegen._library_class, _codegen.set_env = _Library, _set_environment


class _Cache(FunctionCache):
    """numba's, without the look at all of its own tables before a function is loaded (0.3 to 0.5 s of a profiled start), which
    compiling alone needs."""

    def load_overload(self, sig, target_context):
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


class _CFunction(CFunc):
    def enable_caching(self):
        self._cache = _Cache(self._pyfunc)


def entry(**options):
    """numba.njit, cached, for what Python calls."""

    def decorate(f):
        dispatcher = njit(**dict(options, cache=False))(f)
        dispatcher._cache = _Cache(f)
        return dispatcher

    return decorate


def c_function(signature, f, **options):
    """numba.cfunc, cached: compiled or loaded at once."""
    options.pop("cache", None)
    made = _CFunction(f, (signature.args, signature.return_type), locals={}, options=options)
    made.enable_caching()
    made.compile()
    return made


# --- Instructions, as functions. ---


def instruction(signature, build):
    """A function of fixed signature: build(builder, *arguments) emits it."""

    def typed(*arguments):
        def emit(context, builder, signature, arguments):
            result = build(builder, *arguments)
            return context.get_dummy_value() if signature.return_type == types.void else result

        return signature, emit

    # An intrinsic is typed by the number of its arguments, which must be spelled out.
    count = len(signature.args)
    if count == 0:
        return intrinsic(lambda context: typed())
    if count == 1:
        return intrinsic(lambda context, a: typed(a))
    if count == 2:
        return intrinsic(lambda context, a, b: typed(a, b))
    return intrinsic(lambda context, a, b, c: typed(a, b, c))


def library(name, result, *arguments):
    """A call of an LLVM intrinsic, for `instruction`."""
    kind = ir.FunctionType(result, arguments)
    flags = ("fast",) if isinstance(result, ir.FloatType) else ()
    return lambda b, *values: b.call(cgutils.get_or_insert_function(b.module, kind, name), values, fastmath=flags)


def _swap_mxcsr(b, value):
    slot = cgutils.alloca_once(b, INT)
    library("llvm.x86.sse.stmxcsr", VOID, BYTES)(b, b.bitcast(slot, BYTES))
    old = b.load(slot)
    b.store(value, slot)
    library("llvm.x86.sse.ldmxcsr", VOID, BYTES)(b, b.bitcast(slot, BYTES))
    return old


def _word(b, address):
    return b.inttoptr(address, WORD.as_pointer())


maximum = instruction(_f(_f, _f), library("llvm.maxnum.f32", FLOAT, FLOAT, FLOAT))  # numba's max() does not vectorise
rint = instruction(_f(_f), library("llvm.rint.f32", FLOAT, FLOAT))
as_float = instruction(_f(_i), lambda b, x: b.bitcast(x, FLOAT))
as_int = instruction(_i(_f), lambda b, x: b.bitcast(x, INT))
atomic_add = instruction(_l(_l, _l), lambda b, p, x: b.atomic_rmw("add", _word(b, p), x, "seq_cst"))
atomic_load = instruction(_l(_l), lambda b, p: b.load_atomic(_word(b, p), "seq_cst", 8))
_floats = instruction(types.CPointer(_f)(_l), lambda b, x: b.inttoptr(x, FLOAT.as_pointer()))
_doubles = instruction(types.CPointer(_d)(_l), lambda b, x: b.inttoptr(x, ir.DoubleType().as_pointer()))
_longs = instruction(types.CPointer(_l)(_l), _word)
_ints = instruction(types.CPointer(_i)(_l), lambda b, x: b.inttoptr(x, INT.as_pointer()))
_bytes = instruction(types.CPointer(types.uint8)(_l), lambda b, x: b.inttoptr(x, BYTES))
_halves = instruction(types.CPointer(types.uint16)(_l), lambda b, x: b.inttoptr(x, ir.IntType(16).as_pointer()))
_octets = instruction(types.CPointer(types.uint8)(_l), lambda b, x: b.inttoptr(x, ir.IntType(8).as_pointer()))
usleep = types.ExternalFunction("usleep", _i(types.uint32))

# Flush-to-zero and denormals-are-zero: a well-learned text makes gradients and moments denormal, and those cost fifty times
# a normal number (notes/executor.md). Every compiled entry point swaps this in and NumPy's state back out.
FLUSH = np.uint32(0x1F80 | 0x8040)
if X86:
    swap_mode = instruction(types.uint32(types.uint32), _swap_mxcsr)
    pause = instruction(types.void(), library("llvm.x86.sse2.pause", VOID))
else:
    swap_mode = instruction(types.uint32(types.uint32), lambda b, x: x)
    pause = instruction(types.void(), lambda b: None)


# --- Arrays by address. Offsets count numbers, addresses bytes. ---


@njit(forceinline=True, **HELP)
def floats(base, offset, n):
    """n float32 that begin `offset` numbers behind an address."""
    return carray(_floats(base + 4 * offset), (n,))


@njit(forceinline=True, **HELP)
def doubles(base, n):
    return carray(_doubles(base), (n,))


@njit(forceinline=True, **HELP)
def longs(base, n):
    return carray(_longs(base), (n,))


@njit(forceinline=True, **HELP)
def bytes_at(base, n):
    return carray(_bytes(base), (n,))


@njit(forceinline=True, **HELP)
def ints(base, n):
    return carray(_ints(base), (n,))


@njit(forceinline=True, **HELP)
def halves(base, offset, n):
    """n 16-bit numbers."""
    return carray(_halves(base + 2 * offset), (n,))


@njit(forceinline=True, **HELP)
def octets(base, offset, n):
    """n bytes."""
    return carray(_octets(base + offset), (n,))


# --- Functions that vectorise without a vector library. ---

_P0, _P1, _P2, _P3, _P4, _P5 = (f4(c) for c in (1.0, 0.69314718, 0.24022651, 0.05550411, 0.00961814, 0.00133336))
_LOG2E, _LN2, _FLOOR, _FAR = f4(1.4426950408889634), f4(0.6931471805599453), f4(-127), f4(-80)


@njit(forceinline=True, **HELP)
def exp(x):
    """e ** x within 3e-6 relative for -87 < x < 88; exactly 0 below."""
    z = maximum(x * _LOG2E, _FLOOR)
    n = rint(z)
    r = z - n
    p = ((((_P5 * r + _P4) * r + _P3) * r + _P2) * r + _P1) * r + _P0
    return p * as_float((i4(n) + i4(127)) << i4(23))


@njit(forceinline=True, **HELP)
def log(x):
    """ln x within 1e-6 + 2e-7 |ln x| for normal x > 0: exponent, and the series of artanh for the mantissa."""
    bits = as_int(x)
    e = (bits - i4(0x3F3504F3)) >> i4(23)  # mantissa in [√½, √2)
    m = as_float(bits - (e << i4(23)))
    s = (m - ONE) / (m + ONE)
    z = s * s
    return f4(e) * _LN2 + s * (f4(2) + z * (f4(0.6666667) + z * (f4(0.4) + z * (f4(0.2857143) + z * f4(0.2222222)))))


@njit(forceinline=True, **HELP)
def sigmoid(x):
    return ONE / (ONE + exp(-maximum(x, _FAR)))


@njit(forceinline=True, **HELP)
def half(bits):
    """The float16 of these 16 bits; below 6e-5, 0 where denormals count as 0."""
    magnitude = as_float(i4(bits & 0x7FFF) << i4(13)) * f4(2.0**112)
    return -magnitude if bits & 0x8000 else magnitude


# --- The matrix product: NumPy's own OpenBLAS by symbol, else SciPy's, else ours. ---

_SGEMM = types.void(_i, _i, _i, _l, _l, _l, _f, _l, _l, _l, _l, _f, _l, _l)
_sgemm = types.ExternalFunction("organism_sgemm", _SGEMM)
_fortran = types.ExternalFunction("organism_fortran_sgemm", types.void(*[types.CPointer(types.int8)] * 2, *[_l] * 11))


def _openblas() -> tuple[int, str]:
    """Address of the CBLAS product inside NumPy (64-bit integers), and the name of the core it was tuned for."""
    shared = ctypes.CDLL(importlib.import_module("numpy._core._multiarray_umath").__file__)
    shared.scipy_openblas_set_num_threads64_(ctypes.c_int(1))
    shared.scipy_openblas_get_corename64_.restype = ctypes.c_char_p
    core = shared.scipy_openblas_get_corename64_().decode()
    return ctypes.cast(shared.scipy_cblas_sgemm64_, ctypes.c_void_p).value or 0, core


@njit(**HELP)
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


@njit(**HELP)
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


@njit(**HELP)
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


@njit(forceinline=True, **HELP)
def gemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """c [m, n] = beta · c + alpha · op(a) [m, k] @ op(b) [k, n], by address; ld: numbers from row to row."""
    _sgemm(
        i4(101), i4(112 if ta else 111), i4(112 if tb else 111), m, n, k, f4(alpha), a, lda, b, ldb, f4(beta), c, ldc
    )


TILE_M, TILE_N, TILE_K = 48, 128, 128


@njit(**HELP)
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


@njit(**HELP)
def transpose(a, m, n, b):
    """b [n, m] becomes the transpose of a [m, n]."""
    for i in range(0, m, 16):
        for j in range(n):
            s, d = floats(a, i * n + j, 16 * n), floats(b, j * m + i, 16)
            for x in range(min(16, m - i)):
                d[x] = s[x * n]


@njit(**HELP)
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


@njit(forceinline=True, **HELP)
def padded(n):
    return (n + LANES - 1) // LANES * LANES


@njit(**HELP)
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


@njit(**HELP)
def softmax_back(p, d, n):
    """d becomes p · (d - Σ p d); 0 beyond n."""
    z = ZERO
    for j in range(n, d.size):
        d[j] = ZERO
    for j in range(padded(n)):
        z += p[j] * d[j]
    for j in range(padded(n)):
        d[j] = p[j] * (d[j] - z)

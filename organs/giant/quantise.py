"""Quantising: float32 rows into the blocks of GGUF's formats, for `giant convert`.

The simple formats are the `gguf` package's. The K formats (a super-block of 256 numbers, whose groups have small scales of
their own) are compiled here. A group is fitted by least squares: for each of a few spacings the numbers are rounded to
levels, the best scale (and offset) for those levels follows in closed form, and the spacing with the least weighted error
wins; as in llama.cpp, large numbers weigh more. Layouts: ggml-common.h of the ggml project.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

import organs.kernels  # noqa: F401  says where compiled code is kept, before numba is imported

SUPER = 256  # numbers of a super-block
SIMPLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_CODE = dict(cache=True, nogil=True, error_model="numpy")
_SLAB = 1 << 20  # numbers that one thread does at a time


def quantise(rows: np.ndarray, format: str) -> np.ndarray:
    """uint8 [n, bytes of a row] of float32 [n, columns]; a row is a multiple of the format's block (32 or 256).

    Raises KeyError for a format that is not written here.
    """
    if format in SIMPLE:
        import gguf

        kind = gguf.GGMLQuantizationType[format]
        if format == "F32":
            return np.ascontiguousarray(rows, np.float32).view(np.uint8)
        return np.ascontiguousarray(gguf.quants.quantize(rows, kind)).view(np.uint8)
    kernel, size = KERNELS[format]
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, SUPER)
    out = np.zeros((len(blocks), size), np.uint8)
    step = max(1, _SLAB // SUPER)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda at: kernel(blocks[at : at + step], out[at : at + step]), range(0, len(blocks), step)))
    return out.reshape(len(rows), -1)


# --- Fitting one group. ---


@njit(**_CODE)
def _affine(x, weights, top, least, step, turns, levels):
    """Fit x ≈ scale · level - offset, levels 0..top, offset >= 0; returns both, and leaves the levels in `levels`."""
    n = len(x)
    low, high = min(x.min(), np.float32(0)), x.max()
    if high <= low:
        levels[:n] = 0
        return np.float32(0), -low
    best, scale, offset = np.inf, np.float32(0), np.float32(0)
    tried = np.empty(n, np.uint8)
    for turn in range(-1, turns + 1):
        spread = top if turn < 0 else top + least + step * turn
        inverse = np.float32(spread / (high - low))
        sw = sl = sll = sx = sxl = np.float32(0)
        for i in range(n):
            level = min(max(np.rint(inverse * (x[i] - low)), np.float32(0)), np.float32(top))
            tried[i] = np.uint8(level)
            w = weights[i]
            sw += w
            sl += w * level
            sll += w * level * level
            sx += w * x[i]
            sxl += w * x[i] * level
        determinant = sw * sll - sl * sl
        if turn >= 0 and determinant <= 0:
            continue
        a, b = np.float32(1) / inverse, low
        if turn >= 0:
            a, b = (sw * sxl - sx * sl) / determinant, (sll * sx - sl * sxl) / determinant
            if b > 0:
                a, b = sxl / sll, np.float32(0)
        error = np.float32(0)
        for i in range(n):
            difference = a * tried[i] + b - x[i]
            error += weights[i] * difference * difference
        if error < best:
            best, scale, offset = error, a, -b
            levels[:n] = tried
    return scale, offset


@njit(**_CODE)
def _symmetric(x, top, turns):
    """Fit x ≈ scale · level, levels -top..top-1, squares as weights; returns the scale, whose sign is free."""
    most = np.float32(0)
    for v in x:
        if abs(v) > abs(most):
            most = v
    if abs(most) < 1e-15:
        return np.float32(0)
    best, scale = np.float32(-1), np.float32(0)
    for turn in range(-turns, turns + 1):
        inverse = -(np.float32(top) + np.float32(0.1) * turn) / most
        sxl = sll = np.float32(0)
        for v in x:
            level = min(max(np.rint(inverse * v), np.float32(-top)), np.float32(top - 1))
            w = v * v
            sxl += w * v * level
            sll += w * level * level
        if sll > 0 and sxl * sxl > best * sll:
            best, scale = sxl * sxl / sll, sxl / sll
    return scale


@njit(**_CODE)
def _put_half(out, at, value):
    """Write a float16, little-endian, to nearest even; returns it as it will be read."""
    size = min(abs(np.float32(value)), np.float32(65504))
    if size < np.float32(2.0**-14):  # a denormal: counted in units of 2 ** -24
        half = np.int32(np.rint(size * np.float32(2.0**24)))
        read = np.float32(half) * np.float32(2.0**-24)
    else:
        bits = np.float32(size).view(np.int32)
        half = np.int32(((bits + np.int32(0xFFF) + ((bits >> 13) & 1)) >> 13) - (112 << 10))
        read = np.int32((half + (112 << 10)) << 13).view(np.float32)
    negative = value < 0
    out[at], out[at + 1] = half & 255, half >> 8 | (128 if negative else 0)
    return -read if negative else read


@njit(**_CODE)
def _round_to(value, least, most):
    return int(min(max(np.rint(value), least), most))


# --- Groups with scale and offset: Q2_K, Q4_K, Q5_K. ---


@njit(**_CODE)
def _groups(block, size, top, least, step, turns, by_root, scale, offset, levels):
    """Fit every group of a super-block. by_root: weights are |x| + root of the mean square, else |x|."""
    weights = np.empty(size, np.float32)
    for g in range(SUPER // size):
        x = block[g * size : (g + 1) * size]
        base = np.sqrt((x * x).sum() / size) if by_root else np.float32(0)
        for i in range(size):
            weights[i] = base + abs(x[i])
        scale[g], offset[g] = _affine(x, weights, top, least, step, turns, levels)


@njit(**_CODE)
def _levels(block, size, top, scale, offset, levels):
    """The levels of a super-block for scales and offsets as they will be read."""
    for g in range(SUPER // size):
        for i in range(g * size, (g + 1) * size):
            levels[i] = _round_to((block[i] + offset[g]) / scale[g], 0, top) if scale[g] != 0 else 0


@njit(**_CODE)
def _six_bits(ls, lm, out):
    """Eight scales and eight offsets of six bits each in twelve bytes."""
    for j in range(4):
        out[j] = ls[j] | (ls[j + 4] >> 4) << 6
        out[j + 4] = lm[j] | (lm[j + 4] >> 4) << 6
        out[j + 8] = (ls[j + 4] & 15) | (lm[j + 4] & 15) << 4


@njit(**_CODE)
def _fit_45(block, top, least, turns, row, levels):
    """What Q4_K and Q5_K share: d, dmin and the twelve bytes of scales; the levels are left in `levels`."""
    scale, offset = np.zeros(8, np.float32), np.zeros(8, np.float32)
    _groups(block, 32, top, least, 0.1, turns, True, scale, offset, levels)
    d, m = scale.max() / np.float32(63), offset.max() / np.float32(63)
    ls, lm = np.zeros(8, np.int64), np.zeros(8, np.int64)
    for g in range(8):
        ls[g] = _round_to(scale[g] / d, 0, 63) if d > 0 else 0
        lm[g] = _round_to(offset[g] / m, 0, 63) if m > 0 else 0
    _six_bits(ls, lm, row[4:16])
    d, m = _put_half(row, 0, d), _put_half(row, 2, m)
    for g in range(8):
        scale[g], offset[g] = d * ls[g], m * lm[g]
    _levels(block, 32, top, scale, offset, levels)


@njit(**_CODE)
def _q4_k(blocks, out):
    levels = np.zeros(SUPER, np.uint8)
    for b in range(len(blocks)):
        _fit_45(blocks[b], 15, -1.0, 20, out[b], levels)
        for half in range(4):
            for i in range(32):
                out[b, 16 + 32 * half + i] = levels[64 * half + i] | levels[64 * half + 32 + i] << 4


@njit(**_CODE)
def _q5_k(blocks, out):
    levels = np.zeros(SUPER, np.uint8)
    for b in range(len(blocks)):
        _fit_45(blocks[b], 31, -0.5, 15, out[b], levels)
        for half in range(4):
            for i in range(32):
                low, high = levels[64 * half + i], levels[64 * half + 32 + i]
                out[b, 48 + 32 * half + i] = (low & 15) | (high & 15) << 4
                out[b, 16 + i] |= (low >> 4) << 2 * half | (high >> 4) << 2 * half + 1


@njit(**_CODE)
def _q2_k(blocks, out):
    levels = np.zeros(SUPER, np.uint8)
    scale, offset = np.zeros(16, np.float32), np.zeros(16, np.float32)
    for b in range(len(blocks)):
        row = out[b]
        _groups(blocks[b], 16, 3, -0.5, 0.1, 15, False, scale, offset, levels)
        d, m = scale.max() / np.float32(15), offset.max() / np.float32(15)
        read_d, read_m = _put_half(row, 80, d), _put_half(row, 82, m)
        for g in range(16):
            ls = _round_to(scale[g] / d, 0, 15) if d > 0 else 0
            lm = _round_to(offset[g] / m, 0, 15) if m > 0 else 0
            row[g] = ls | lm << 4
            scale[g], offset[g] = read_d * ls, read_m * lm
        _levels(blocks[b], 16, 3, scale, offset, levels)
        _two_bits(levels, row[16:80])


@njit(**_CODE)
def _two_bits(levels, out):
    for half in range(2):
        for i in range(32):
            at = 128 * half + i
            out[32 * half + i] = levels[at] | levels[at + 32] << 2 | levels[at + 64] << 4 | levels[at + 96] << 6


# --- Groups with a scale alone: Q3_K, Q6_K. ---


@njit(**_CODE)
def _signed_scales(block, top, turns, most, scale, small):
    """Fit the sixteen groups; small: their scales as integers -most..most-1, by the returned unit."""
    largest = np.float32(0)
    for g in range(16):
        scale[g] = _symmetric(block[16 * g : 16 * g + 16], top, turns)
        if abs(scale[g]) > abs(largest):
            largest = scale[g]
    unit = largest / np.float32(-most)
    for g in range(16):
        small[g] = _round_to(scale[g] / unit, -most, most - 1) if unit != 0 else 0
    return unit


@njit(**_CODE)
def _signed_levels(block, unit, small, top, levels):
    """Levels counted from 0: `top` stands for nothing."""
    for g in range(16):
        scale = unit * small[g]
        for i in range(16 * g, 16 * g + 16):
            levels[i] = (_round_to(block[i] / scale, -top, top - 1) if scale != 0 else 0) + top


@njit(**_CODE)
def _q6_k(blocks, out):
    levels, scale, small = np.zeros(SUPER, np.uint8), np.zeros(16, np.float32), np.zeros(16, np.int64)
    for b in range(len(blocks)):
        row = out[b]
        unit = _put_half(row, 208, _signed_scales(blocks[b], 32, 9, 128, scale, small))
        _signed_levels(blocks[b], unit, small, 32, levels)
        for g in range(16):
            row[192 + g] = small[g] & 255
        for half in range(2):
            for i in range(32):
                at = 128 * half + i
                q1, q2, q3, q4 = levels[at], levels[at + 32], levels[at + 64], levels[at + 96]
                row[64 * half + i] = (q1 & 15) | (q3 & 15) << 4
                row[64 * half + 32 + i] = (q2 & 15) | (q4 & 15) << 4
                row[128 + 32 * half + i] = q1 >> 4 | (q2 >> 4) << 2 | (q3 >> 4) << 4 | (q4 >> 4) << 6


@njit(**_CODE)
def _q3_k(blocks, out):
    levels, scale, small = np.zeros(SUPER, np.uint8), np.zeros(16, np.float32), np.zeros(16, np.int64)
    for b in range(len(blocks)):
        row = out[b]
        unit = _put_half(row, 108, _signed_scales(blocks[b], 4, 9, 32, scale, small))
        _signed_levels(blocks[b], unit, small, 4, levels)
        for g in range(16):
            bits = small[g] + 32
            row[96 + g % 8] |= (bits & 15) << 4 * (g // 8)
            row[104 + g % 4] |= (bits >> 4) << 2 * (g // 4)
        for i in range(SUPER):
            row[i % 32] |= (levels[i] >> 2) << (i // 32)
            levels[i] &= 3
        _two_bits(levels, row[32:96])


KERNELS = {"Q2_K": (_q2_k, 84), "Q3_K": (_q3_k, 110), "Q4_K": (_q4_k, 144), "Q5_K": (_q5_k, 176), "Q6_K": (_q6_k, 210)}
FORMATS = (*SIMPLE, *KERNELS)

"""The formats that tensors are stored in, and their meaning in NumPy: the reference of every compiled product.

A quantised row is cut into blocks of 32 or 256 numbers that share scales. A number is `scale · q + offset` or `scale ·
table[q]`; the K formats scale the scales again, by a block of 256. Bit layouts: ggml's ggml-common.h and ggml-quants.c; the
oracle of each is `gguf.quants` in tests/giant/test_formats.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Values of the four-bit codes of IQ4_NL and IQ4_XS, and of MXFP4 (E2M1, doubled).
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


@dataclass(frozen=True)
class Format:
    """One way to store numbers."""

    name: str
    number: int  # ggml's
    block: int  # numbers in a block
    nbytes: int  # bytes of a block
    meaning: Callable[[np.ndarray], np.ndarray]  # uint8 [n, nbytes] -> float32 [n, block]

    @property
    def bits(self) -> float:
        """Bits a number."""
        return 8 * self.nbytes / self.block


def dequantise(data: np.ndarray, name: str) -> np.ndarray:
    """float32 [numbers]: what bytes of the format `name` mean.

    data: uint8 [bytes], a multiple of the format's block. Raises KeyError for an unknown format, ValueError for a part of a
    block.
    """
    form = FORMATS[name]
    if data.size % form.nbytes:
        raise ValueError(f"{data.size} bytes are no whole blocks of {name} ({form.nbytes} bytes each)")
    return form.meaning(data.reshape(-1, form.nbytes)).reshape(-1)


# --- Helpers: fields of blocks. ---


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """float32 [n, 1]: the float16 at byte `at` of every block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(blocks: np.ndarray, at: int, count: int = 16) -> np.ndarray:
    """uint8 [n, 2 · count]: the low halves of `count` bytes, then the high ones."""
    q = blocks[:, at : at + count]
    return np.concatenate([q & 15, q >> 4], axis=1)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """uint8 [n, 32]: bit j of the 32 bits at byte `at`, worth 16."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _shifted(q: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """uint8 [n, parts, len(shifts), bytes]: fields of bytes [n, parts, bytes], one after the other."""
    return (q[:, :, None, :] >> np.array(shifts, np.uint8)[None, None, :, None]) & mask


def _sixes(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight six-bit scales and eight six-bit minima, uint8 [n, 8] each, out of 12 bytes (Q4_K, Q5_K)."""
    low, mid, high = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
    return (
        np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1),
        np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=1),
    )


# --- The formats. ---


def _f32(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b).view(np.float32)


def _f16(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b).view(np.float16).astype(np.float32)


def _bf16(b: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(b).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * (_nibbles(b, 2).astype(np.float32) - 8)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * _nibbles(b, 4).astype(np.float32) + _half(b, 2)


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * ((_nibbles(b, 6) | _fifth_bits(b, 2)).astype(np.float32) - 16)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * (_nibbles(b, 8) | _fifth_bits(b, 4)).astype(np.float32) + _half(b, 2)


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _iq4_nl(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * IQ4_VALUES[_nibbles(b, 2)].astype(np.float32)


def _mxfp4(b: np.ndarray) -> np.ndarray:
    # The scale is 2^(e - 127); one less since the values are doubled. e < 2 would need denormals: ldexp makes them.
    scale = np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128)
    return scale * MXFP4_VALUES[_nibbles(b, 1)].astype(np.float32)


def _q2_k(b: np.ndarray) -> np.ndarray:
    q = _shifted(b[:, 16:80].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16).astype(np.float32)
    d, dmin, scales = _half(b, 80), _half(b, 82), b[:, :16]
    return ((d * (scales & 15))[:, :, None] * q - (dmin * (scales >> 4))[:, :, None]).reshape(-1, 256)


def _q3_k(b: np.ndarray) -> np.ndarray:
    low = _shifted(b[:, 32:96].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    high = _shifted(b[:, None, :32], tuple(range(8)), 1).reshape(-1, 8, 32)
    q = (low | (high << 2)).reshape(-1, 16, 16).astype(np.float32) - 4
    four = _nibbles(b, 96, 8)
    two = _shifted(b[:, None, 104:108], (0, 2, 4, 6), 3).reshape(-1, 16)
    scales = (four | (two << 4)).astype(np.float32) - 32
    return ((_half(b, 108) * scales)[:, :, None] * q).reshape(-1, 256)


def _q4_k(b: np.ndarray) -> np.ndarray:
    q = _shifted(b[:, 16:144].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32).astype(np.float32)
    scales, minima = _sixes(b[:, 4:16])
    return ((_half(b, 0) * scales)[:, :, None] * q - (_half(b, 2) * minima)[:, :, None]).reshape(-1, 256)


def _q5_k(b: np.ndarray) -> np.ndarray:
    low = _shifted(b[:, 48:176].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32)
    high = _shifted(b[:, None, 16:48], tuple(range(8)), 1).reshape(-1, 8, 32)
    q = (low | (high << 4)).astype(np.float32)
    scales, minima = _sixes(b[:, 4:16])
    return ((_half(b, 0) * scales)[:, :, None] * q - (_half(b, 2) * minima)[:, :, None]).reshape(-1, 256)


def _q6_k(b: np.ndarray) -> np.ndarray:
    low = _shifted(b[:, :128].reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 8, 32)
    high = _shifted(b[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    q = (low | (high << 4)).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = b[:, 192:208].view(np.int8).astype(np.float32)
    return ((_half(b, 208) * scales)[:, :, None] * q).reshape(-1, 256)


def _iq4_xs(b: np.ndarray) -> np.ndarray:
    q = IQ4_VALUES[_shifted(b[:, 8:136].reshape(-1, 8, 16), (0, 4), 15)].reshape(-1, 8, 32).astype(np.float32)
    four = _shifted(b[:, 4:8, None], (0, 4), 15).reshape(-1, 8)
    high = np.ascontiguousarray(b[:, 2:4]).view(np.uint16)
    two = (high >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8) & 3
    scales = (four | (two << 4)).astype(np.float32) - 32
    return ((_half(b, 0) * scales)[:, :, None] * q).reshape(-1, 256)


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("F32", 0, 1, 4, _f32),
        Format("F16", 1, 1, 2, _f16),
        Format("BF16", 30, 1, 2, _bf16),
        Format("Q4_0", 2, 32, 18, _q4_0),
        Format("Q4_1", 3, 32, 20, _q4_1),
        Format("Q5_0", 6, 32, 22, _q5_0),
        Format("Q5_1", 7, 32, 24, _q5_1),
        Format("Q8_0", 8, 32, 34, _q8_0),
        Format("Q2_K", 10, 256, 84, _q2_k),
        Format("Q3_K", 11, 256, 110, _q3_k),
        Format("Q4_K", 12, 256, 144, _q4_k),
        Format("Q5_K", 13, 256, 176, _q5_k),
        Format("Q6_K", 14, 256, 210, _q6_k),
        Format("IQ4_NL", 20, 32, 18, _iq4_nl),
        Format("IQ4_XS", 23, 256, 136, _iq4_xs),
        Format("MXFP4", 39, 32, 17, _mxfp4),
    )
}
BY_NUMBER = {form.number: form for form in FORMATS.values()}
UNSUPPORTED = {  # names of ggml's other formats, for messages
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
}  # fmt: skip

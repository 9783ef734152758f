"""The formats of organs/giant/formats.py in torch: tensors stay quantised in an accelerator's memory, and mean numbers there.

Each function says what its namesake in formats.py says, which is its oracle: bit for bit, in tests/giant/test_accelerator.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from organs.giant.formats import FORMATS, IQ4_VALUES, MXFP4_VALUES


def dequantise(data: Tensor, name: str) -> Tensor:
    """float32 [..., numbers]: what bytes of the format `name` mean. data: uint8 [..., bytes], whole blocks.

    Raises KeyError for an unknown format.
    """
    form = FORMATS[name]
    numbers = data.shape[-1] // form.nbytes * form.block
    return _MEANINGS[name](data.reshape(-1, form.nbytes)).reshape(*data.shape[:-1], numbers)


# --- Helpers: fields of blocks. ---


def _half(b: Tensor, at: int) -> Tensor:
    """float32 [n, 1]: the float16 at byte `at` of every block."""
    return b[:, at : at + 2].contiguous().view(torch.float16).float()


def _signed(b: Tensor) -> Tensor:
    """float32: bytes as signed integers."""
    return b.contiguous().view(torch.int8).float()


def _nibbles(b: Tensor, at: int, count: int = 16) -> Tensor:
    q = b[:, at : at + count]
    return torch.cat([q & 15, q >> 4], 1)


def _shifted(q: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """uint8 [n, parts, len(shifts), bytes]: fields of bytes [n, parts, bytes], one after the other."""
    by = torch.tensor(shifts, dtype=torch.uint8, device=q.device)
    return (q[:, :, None, :] >> by[None, None, :, None]) & mask


def _fifth_bits(b: Tensor, at: int) -> Tensor:
    """uint8 [n, 32]: bit j of the 32 bits at byte `at`, worth 16."""
    return _shifted(b[:, at : at + 4, None], tuple(range(8)), 1).reshape(-1, 32) << 4


def _sixes(b: Tensor) -> tuple[Tensor, Tensor]:
    """Eight six-bit scales and eight six-bit minima out of 12 bytes."""
    low, mid, high = b[:, 0:4], b[:, 4:8], b[:, 8:12]
    return (
        torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], 1),
        torch.cat([mid & 63, (high >> 4) | ((mid >> 6) << 4)], 1),
    )


def _of_table(values, q: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=q.device)[q.long()]


# --- The formats. ---


def _mxfp4(b: Tensor) -> Tensor:
    power = b[:, :1].int() - 128
    return torch.ldexp(torch.ones_like(power, dtype=torch.float32), power) * _of_table(MXFP4_VALUES, _nibbles(b, 1))


def _q2_k(b: Tensor) -> Tensor:
    q = _shifted(b[:, 16:80].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16).float()
    scales = b[:, :16]
    return ((_half(b, 80) * (scales & 15))[:, :, None] * q - (_half(b, 82) * (scales >> 4))[:, :, None]).reshape(
        -1, 256
    )


def _q3_k(b: Tensor) -> Tensor:
    low = _shifted(b[:, 32:96].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    high = _shifted(b[:, None, :32], tuple(range(8)), 1).reshape(-1, 8, 32)
    q = (low | (high << 2)).reshape(-1, 16, 16).float() - 4
    two = _shifted(b[:, None, 104:108], (0, 2, 4, 6), 3).reshape(-1, 16)
    scales = (_nibbles(b, 96, 8) | (two << 4)).float() - 32
    return ((_half(b, 108) * scales)[:, :, None] * q).reshape(-1, 256)


def _with_minima(b: Tensor, q: Tensor) -> Tensor:
    scales, minima = _sixes(b[:, 4:16])
    return ((_half(b, 0) * scales)[:, :, None] * q.float() - (_half(b, 2) * minima)[:, :, None]).reshape(-1, 256)


def _q4_k(b: Tensor) -> Tensor:
    return _with_minima(b, _shifted(b[:, 16:144].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32))


def _q5_k(b: Tensor) -> Tensor:
    low = _shifted(b[:, 48:176].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32)
    high = _shifted(b[:, None, 16:48], tuple(range(8)), 1).reshape(-1, 8, 32)
    return _with_minima(b, low | (high << 4))


def _q6_k(b: Tensor) -> Tensor:
    low = _shifted(b[:, :128].reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 8, 32)
    high = _shifted(b[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    q = (low | (high << 4)).reshape(-1, 16, 16).float() - 32
    return ((_half(b, 208) * _signed(b[:, 192:208]))[:, :, None] * q).reshape(-1, 256)


def _iq4_xs(b: Tensor) -> Tensor:
    q = _of_table(IQ4_VALUES, _shifted(b[:, 8:136].reshape(-1, 8, 16), (0, 4), 15)).reshape(-1, 8, 32)
    four = _shifted(b[:, 4:8, None], (0, 4), 15).reshape(-1, 8)
    two = _shifted(b[:, 2:4, None], (0, 2, 4, 6), 3).reshape(-1, 8)
    scales = (four | (two << 4)).float() - 32
    return ((_half(b, 0) * scales)[:, :, None] * q).reshape(-1, 256)


_MEANINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda b: b.contiguous().view(torch.float32),
    "F16": lambda b: b.contiguous().view(torch.float16).float(),
    "BF16": lambda b: b.contiguous().view(torch.bfloat16).float(),
    "Q4_0": lambda b: _half(b, 0) * (_nibbles(b, 2).float() - 8),
    "Q4_1": lambda b: _half(b, 0) * _nibbles(b, 4).float() + _half(b, 2),
    "Q5_0": lambda b: _half(b, 0) * ((_nibbles(b, 6) | _fifth_bits(b, 2)).float() - 16),
    "Q5_1": lambda b: _half(b, 0) * (_nibbles(b, 8) | _fifth_bits(b, 4)).float() + _half(b, 2),
    "Q8_0": lambda b: _half(b, 0) * _signed(b[:, 2:]),
    "IQ4_NL": lambda b: _half(b, 0) * _of_table(IQ4_VALUES, _nibbles(b, 2)),
    "MXFP4": _mxfp4, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_XS": _iq4_xs,
}  # fmt: skip

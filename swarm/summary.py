"""A summary of what an organism knows, small enough for a mesh: how often which byte followed which in its newest text.

It ranks organisms by how much a text would surprise them without asking any: where they are many, and where one hibernates and
would have to be woken to be asked. Counts of orders 1 to 4 lie in hashed tables; a byte's probability backs off from order to
order, pₖ = (nₖ(context, byte) + B·pₖ₋₁) / (nₖ(context) + B), p₀ = 1/256. Other contexts share cells, so it is an estimate.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from organism import OrganismError

ORDERS = 4
PAIRS, CONTEXTS = 1 << 17, 1 << 16  # cells of one order
BACK_OFF = 2.0  # B
NEWEST = 1 << 16  # bytes of text that are summed up
FACTORS = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1], np.uint64)  # odd, any


class Summary:
    """pairs uint16 [4, 2^17] and contexts uint32 [4, 2^16]: counts by order."""

    def __init__(self, pairs: np.ndarray, contexts: np.ndarray):
        self.pairs, self.contexts = pairs, contexts

    @classmethod
    def of(cls, texts: Iterable[bytes]) -> Summary:
        """Of the newest NEWEST bytes of texts in order, newest first."""
        pairs, contexts, left = np.zeros((ORDERS, PAIRS), np.int64), np.zeros((ORDERS, CONTEXTS), np.int64), NEWEST
        for text in texts:
            text = text[-left:]
            for order, (pair, context) in enumerate(_cells(text)):
                pairs[order] += np.bincount(pair, minlength=PAIRS)
                contexts[order] += np.bincount(context, minlength=CONTEXTS)
            left -= len(text)
            if left <= 0:
                break
        return cls(np.minimum(pairs, 0xFFFF).astype(np.uint16), np.minimum(contexts, 0xFFFFFFFF).astype(np.uint32))

    def bits_per_byte(self, text: bytes) -> float:
        """Of a text that begins on a new line."""
        if not text:
            return 0.0
        p = np.full(len(text), 1 / 256)
        for order, (pair, context) in enumerate(_cells(text)):
            count = np.minimum(self.pairs[order, pair], self.contexts[order, context])
            p = (count + BACK_OFF * p) / (self.contexts[order, context] + BACK_OFF)
        return float(-np.log2(np.minimum(p, 1)).mean())

    def blob(self) -> bytes:
        return zlib.compress(self.pairs.tobytes() + self.contexts.tobytes(), 6)

    @classmethod
    def from_blob(cls, data: bytes) -> Summary:
        """Raises OrganismError where that is none."""
        size, unpacker = ORDERS * (2 * PAIRS + 4 * CONTEXTS), zlib.decompressobj()
        try:
            raw = unpacker.decompress(data, size + 1)
        except zlib.error as error:
            raise OrganismError(f"A summary is broken: {error}.") from error
        if len(raw) != size:
            raise OrganismError(f"A summary has {len(raw)} bytes instead of {size}.")
        pairs = np.frombuffer(raw, np.uint16, ORDERS * PAIRS).reshape(ORDERS, PAIRS)
        return cls(pairs, np.frombuffer(raw, np.uint32, offset=2 * ORDERS * PAIRS).reshape(ORDERS, CONTEXTS))


def _cells(text: bytes) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """For orders 1 to 4: the cells, int64 [len(text)], of each byte after its context, and of the context."""
    data = np.frombuffer(b"\n" * ORDERS + text, np.uint8).astype(np.uint64)
    n = len(text)
    context = np.zeros(n, np.uint64)
    for order in range(1, ORDERS + 1):
        context = context * FACTORS[order] + data[ORDERS - order : ORDERS - order + n] + np.uint64(1)
        mixed = context * FACTORS[0]
        both = (context * np.uint64(257) + data[ORDERS:]) * FACTORS[0]
        yield (both >> np.uint64(17)).astype(np.int64) % PAIRS, (mixed >> np.uint64(17)).astype(np.int64) % CONTEXTS

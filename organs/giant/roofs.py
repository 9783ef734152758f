"""How fast this machine reads memory: the roof of decoding, which reads every weight once a token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from llvmlite import ir

from organs.giant.lanes import LANES, Loop, const, function, ground, load, vector, word


def _read(b, base, n):
    """Loads n blocks of 256 bytes and keeps their exclusive or."""
    count = 64 // LANES  # so many vectors are 256 bytes
    kind = vector(ir.IntType(32), LANES)
    loop = Loop(b, n, [const(kind, 0)] * count)
    at = b.add(base, b.mul(loop.i, word(256)))
    values = loop.close([b.xor(now, load(b, at, kind, 4 * LANES * i)) for i, now in enumerate(loop.now)])
    total = values[0]
    for value in values[1:]:
        total = b.xor(total, value)
    return b.zext(b.extract_element(total, ir.Constant(ir.IntType(32), 0)), ir.IntType(64))


_read_blocks = function("int64(int64, int64)", _read)


@ground.entry(nogil=True)
def _read_all(address, blocks):
    return _read_blocks(address, blocks)


def read_roof(nbytes: int, threads: int, rounds: int = 5) -> float:
    """GB/s at which so many threads read an array of `nbytes` together, again and again: the best of some rounds."""
    data = np.ones(nbytes // 8, np.int64)
    blocks = data.nbytes // 256
    edges = [blocks * t // threads for t in range(threads + 1)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds + 1):
            began = time.perf_counter()
            parts = [
                pool.submit(_read_all, data.ctypes.data + 256 * a, b - a)
                for a, b in zip(edges, edges[1:], strict=False)
            ]
            for part in parts:
                part.result()
            best = max(best, data.nbytes / (time.perf_counter() - began))
    return best / 1e9

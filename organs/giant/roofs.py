"""How fast this machine reads memory, and multiplies what it reads: the roofs of decoding, which reads every weight once a token."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from llvmlite import ir

from organs.giant import products
from organs.giant.lanes import LANES, Loop, caller, const, entry, function, load, vector, word


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


@entry()
def _read_all(address, blocks):
    return _read_blocks(address, blocks)


_call_tile = caller(6)


@entry()
def _multiply_all(kernel, panels, count, panel_bytes, blocks, x, out):
    for p in range(count):
        _call_tile(kernel, panels + p * panel_bytes, x, out, blocks, 64, 0)


def read_roof(nbytes: int, threads: int, rounds: int = 5) -> float:
    """GB/s at which so many threads read an array of `nbytes` together, again and again: the best of some rounds."""
    data = np.ones(nbytes // 8, np.int64)
    blocks = data.nbytes // 256
    edges = [blocks * t // threads for t in range(threads + 1)]
    work = [(data.ctypes.data + 256 * a, b - a) for a, b in itertools.pairwise(edges)]
    return data.nbytes / min(_together(_read_all, work, rounds)) / 1e9


def product_roof(name: str, nbytes: int, threads: int, rounds: int = 5) -> float:
    """GB/s of a matrix of this format, of about `nbytes`, that so many threads multiply by one token: the median of some rounds.

    It is less than read_roof where codes and scales take longer to unpack than to come.
    """
    columns, form = 4096, products.form_of(name, False)
    panel, blocks = products.panel_bytes(name, columns), products.blocks(name, columns)
    count = max(threads, nbytes // panel)
    panels, kernel = products.aligned(count * panel), products.tile(name, form, 1)
    panels[:] = 0
    x, out = products.aligned(columns // products.BLOCK * products.BYTES[form]), products.aligned(64 * threads)
    edges = [count * t // threads for t in range(threads + 1)]
    work = [(kernel.address, panels[a * panel :].ctypes.data, b - a, panel, blocks, x.ctypes.data, out[64 * t :].ctypes.data)
            for t, (a, b) in enumerate(itertools.pairwise(edges))]  # fmt: skip
    return panels.nbytes / statistics.median(_together(_multiply_all, work, rounds)) / 1e9


def _together(act: Callable[..., object], work: Sequence[tuple[int, ...]], rounds: int) -> list[float]:
    """Seconds of each round, in which a thread for each piece of work acts on it."""
    took = []
    with ThreadPoolExecutor(len(work)) as pool:
        for _ in range(rounds + 1):
            began = time.perf_counter()
            for part in [pool.submit(act, *piece) for piece in work]:
                part.result()
            took.append(time.perf_counter() - began)
    return took[1:]  # the first loads what is called

"""Which way of loading a model suits a machine: `organism giant plan MODEL.gguf --ram GB`.

What fits is arithmetic over the file's tensors. How fast it will be is a model of two roofs, whose numbers are measured here:
bytes that a token reads over the memory's bandwidth, and, with experts on disk, bytes that are missing over the disk's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from organs.giant.attention import layout_of
from organs.giant.gguf import GGUFFile
from organs.giant.giant import INTERPRETER, kinds_of
from organs.giant.program import Shape

SHARE = 0.85  # of the bandwidth that decoding reaches (docs/benchmarks.md)
OVERLAP = 0.6  # of reading experts that is hidden behind computing (docs/benchmarks.md)
SKEW = 0.8  # popularity of experts ∝ rank^-0.8, as in text


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model."""

    dense: int  # all but routed experts
    experts: int  # all routed experts
    active: int  # what a token reads
    expert: int  # one expert of one layer
    used: int  # experts that a token uses in a layer
    count: int  # experts of a layer
    layers: int  # with experts
    cache: int  # keys and values of the whole context

    @classmethod
    def of(cls, file: GGUFFile, context: int, kv_cache: str) -> Sizes:
        """Raises GGUFError for a file that is no model."""
        shape, name = Shape.of(file), file.architecture
        routed = {n: i for n, i in file.tensors.items() if "_exps." in n}
        experts = sum(i.nbytes for i in routed.values())
        total = sum(i.nbytes for i in file.tensors.values())
        used = int(file.metadata.get(f"{name}.expert_used_count", 0)) if routed else 0
        count = int(file.metadata.get(f"{name}.expert_count", 1)) if routed else 1
        layers = len({n.split(".")[1] for n in routed})
        attended = len([n for n in file.tensors if n.endswith(".attn_k.weight")])
        table = file.tensors["token_embd.weight"].nbytes if "output.weight" in file.tensors else 0
        stretch = layout_of(*kinds_of(kv_cache), shape.head)["stretch"]
        cache = -(-context // 64) * attended * shape.heads * stretch
        active = total - experts - table + experts * used // count
        return cls(total - experts, experts, active, experts // max(1, layers * count), used, count, layers, cache)


@dataclass(frozen=True)
class Choice:
    """One way to load the model: whether it fits into so much memory, and what can be expected of it."""

    offload: str
    memory: int  # bytes it takes
    fits: bool
    tokens_per_s: float  # while decoding
    reason: str


def choices(sizes: Sizes, ram: float, bandwidth: float, disk: float) -> Iterator[Choice]:
    """Everything in memory, and experts on disk; the first that fits is the one to take. ram: bytes; bandwidths: bytes a second."""
    whole = sizes.dense + sizes.experts + sizes.cache + INTERPRETER
    speed = SHARE * bandwidth / sizes.active
    yield Choice("none", whole, whole <= ram, speed, f"every token reads {sizes.active / 1e9:.2f} GB of memory")
    if not sizes.experts:
        return
    fixed = sizes.dense + sizes.cache + INTERPRETER
    slots = min(int((ram - fixed) // sizes.expert), sizes.count * sizes.layers)
    least = 4 * sizes.used
    if slots < least:
        need = fixed + least * sizes.expert
        yield Choice("disk", need, False, 0.0, f"at least {need / 1e9:.1f} GB are needed")
        return
    missed = sizes.used * sizes.layers * miss_rate(slots / (sizes.count * sizes.layers), sizes.count, sizes.used)
    seconds = 1 / speed + (1 - OVERLAP) * missed * sizes.expert / disk
    reason = f"{slots} of {sizes.count * sizes.layers} experts in memory; about {missed:.1f} are read for a token"
    yield Choice("disk", fixed + slots * sizes.expert, True, 1 / seconds, reason)


def miss_rate(share: float, experts: int, used: int) -> float:
    """Of the experts that a token wants, how many are not among the most popular `share`, if popularity ∝ rank^-SKEW."""
    popular = np.arange(1, experts + 1) ** -SKEW
    chance = 1 - np.exp(-popular * _rate(popular, used))
    return float(chance[round(share * experts) :].sum() / chance.sum())


def _rate(popular: np.ndarray, used: int) -> float:
    """How often to draw so that `used` different ones are drawn on average."""
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-popular * middle)).sum() < used else (low, middle)
    return high


def disk_bandwidth(path: Path, nbytes: int, seconds: float = 1.0) -> float:
    """Bytes a second of reading pieces of `nbytes` at random places of a file, past the page cache where that can be."""
    import mmap

    piece, size = max(4096, nbytes // 4096 * 4096), path.stat().st_size
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        handle = os.open(path, os.O_RDONLY)
    rng, end, done = np.random.default_rng(0), time.perf_counter() + seconds, []
    places = rng.integers(0, max(1, (size - piece) // 4096), 100_000).tolist()

    def read(first: int) -> None:
        buffer = mmap.mmap(-1, piece)
        for place in places[first::4]:
            if time.perf_counter() > end:
                return
            done.append(os.preadv(handle, [buffer], place * 4096))

    began = time.perf_counter()
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, range(4)))
    finally:
        os.close(handle)
    return sum(done) / max(1e-9, time.perf_counter() - began) if done else math.nan

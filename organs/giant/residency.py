"""Experts that stay in the file: those that are needed come from the disk, the most useful ones stay in memory.

Nothing of it is Python while a token is computed. The first thread of the engine's team decides: when a router has chosen, it
asks for what is away (`publish`); when a layer is done, the next layer's router looks at its state, before that layer's
attention, and what it would choose is asked for, too (`foresee`). A few reader threads take what was asked for, read it, pack
it, and write its addresses into the table that compiled code looks at: 0 for an expert that is away. A wrong guess costs a
read and never a result: what is computed is what the layer's own router chose.

An expert in memory is a slot of one pool: its panels of gate, up and down, packed as those of any matrix. Who has to go is
decided by what routers think of it, chosen or not: its probability relative to that of the last expert that was chosen (at most
1), averaged over the last few tokens and over the last few hundreds. So an expert that nearly was chosen stays; uses alone say
less, and later.

Nobody holds a lock. Slots, tables and values are the first thread's alone, and it changes them while no thread computes with
experts (behind a barrier, and before one). Readers share two rings of slots, of what is wanted and of what is guessed, and
take the three ways of an expert by an atomic count; the last of them delivers.

Reads go around the page cache where the file system can (O_DIRECT), since what is worth keeping is in the pool already.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir

from organs.giant import products
from organs.giant.engine import (
    BLOCK,
    HELP,
    POSTED,
    STOP,
    TEAM_WORDS,
    atomic_add,
    atomic_load,
    barrier,
    exp,
    f4,
    floats,
    ground,
    i8,
    jit,
    longs,
    operation,
    record_at,
)
from organs.giant.engine import ROUND as DELIVERED  # how many experts were delivered, among the readers' words
from organs.giant.engine import _await_change as await_change
from organs.giant.engine import _call_tile as call_tile
from organs.giant.engine import _into_one as into_one
from organs.giant.engine import _nanoseconds as nanoseconds
from organs.giant.engine import _root_mean_square as root_mean_square
from organs.giant.engine import _share as share
from organs.giant.engine import _wake as wake
from organs.giant.engine import _wake_some as wake_some
from organs.giant.gguf import GGUFError, GGUFFile, TensorInfo
from organs.giant.lanes import c_function, function
from organs.giant.products import ROWS, interleave

SECTOR = 4096  # bytes that direct reads are multiples of
READERS = 4  # reads under way at a time
GUESSERS = 2  # of them, for guesses at most: what is wanted has to wait for reads that have begun
WORTH = 0.6  # a guess is read if guesses of its rank came true at least so often: a wrong one takes disk and processor from what is wanted
NEAR, FAR = 4, 400  # tokens over which an expert's worth is averaged
NEAR_SHARE = f4(0.6)  # of the first average in it
MOST_LOOKED_AT = 4096  # slots in search of one that can go
SPIN_NS = 20_000  # how long who waits for an expert spins before it sleeps
LEAST_BURSTS = 8  # that `reading_seconds` measures
GONE = 1 << 30  # of `taken`: the slot was given up
WAYS = 3  # gate, up, down
EINTR = 4

WAY = np.dtype([(n, i8) for n in ("handle", "begin", "step", "nbytes", "at", "size", "rows", "row_bytes", "blocks",
                                  "block_bytes", "fields", "n_fields")], align=True)  # fmt: skip
"""Gate, up or down of a layer's experts. In the file: its `handle`, the first expert's first byte, bytes from expert to expert
and of one; in a slot: first byte and bytes of the panels; the others are what packing takes (products.interleave)."""

DESK = np.dtype([(n, i8) for n in (
    "words", "clock", "experts", "slots", "pool", "slot_bytes", "ways", "wave", "is_ahead", "used",
    "wanted", "count", "now", "where", "slot_of", "last", "near", "far", "worth", "logits", "tokens",
    "owner", "held", "taken", "left", "broken", "filled", "hand",
    "mask", "wanted_ring", "guess_ring", "guesses", "n_guesses", "most_guesses", "guess_layer", "guess_key", "guess_away", "came_true",
    "wants", "hits", "guessed", "right", "ahead", "stall", "failed_key", "failed_way", "errno",
)], align=True)  # fmt: skip
"""What compiled code knows. `words`: of engine.Team, but for rings' positions behind them: POSTED changes when there is something
to read, DELIVERED when an expert came; `clock`: two words of the first thread.

The first thread's: `wanted` int64 [count]: a request; `now`: its number; `wave`: how many experts of a prompt are wanted at a
time. By expert of all layers (its key: layer · experts + expert): `where` int64 [3], `slot_of` (-1: away), `last`: the request that
wanted it last, `near`, `far` and `worth` float32; `tokens` by layer: how many were learned from. By slot: `owner`: a key, or -1;
`held`: up to which request it has to stay; `broken`: reading failed. `filled`: slots that were used ever; `hand`: where the search for a
victim begins.

Shared with readers: `taken`, `left` by slot: how many ways are begun, and how many are not finished; rings of mask + 1 slots.
Guesses: `guesses` [n_guesses]: slots that were asked for by a guess, whose layer has not come yet; `guess_key`, `guess_away` by rank:
the last guess, of `guess_layer`; `came_true` float64 [used, 2]: guesses of experts that were away, by rank, and of them the right ones.

Counters as in Counters, `stall` in nanoseconds; `failed_*` and `errno` (0: the file ended): of the first read that failed."""

WORDS = TEAM_WORDS + 80  # those of a team, and behind them, a cache line each:
(WANTED_HEAD, WANTED_TAIL, GUESS_HEAD, GUESS_TAIL, GUESSING, BUSY, SINCE, READING, BYTES, FAILED) = (
    8 * (TEAM_WORDS + 8 * i) for i in range(10)
)
"""Positions in the rings; readers that read a guess; experts under way, when the first of them was asked for, nanoseconds in which
there were some; bytes that were read; reads that failed."""

desk, way_at, WAY_BYTES = record_at(DESK), record_at(WAY), WAY.itemsize
_pread = ground.external("pread", "int64(int32, int64, int64, int64)")
_errno = ground.external("__error" if sys.platform == "darwin" else "__errno_location", "int64()")


def _word(b, p):
    return b.inttoptr(p, ir.IntType(64).as_pointer())


exchange = function("int64(int64, int64)", lambda b, p, x: b.atomic_rmw("xchg", _word(b, p), x, "seq_cst"))
_replace = function(
    "int64(int64, int64, int64)",
    lambda b, p, old, new: b.extract_value(b.cmpxchg(_word(b, p), old, new, "seq_cst", "seq_cst"), 0),
)


# --- The first thread: what experts are worth. ---


@jit(**HELP)
def learn(d, layer, logits, bias, last):
    """What a router's logits for a token say of all experts; last: the least of those that were chosen."""
    n, first = d.experts, layer * d.experts
    x, near, far, worth = (
        floats(d.logits, 0, n),
        floats(d.near, first, n),
        floats(d.far, first, n),
        floats(d.worth, first, n),
    )
    given, tokens = floats(logits, 0, n), longs(d.tokens + 8 * layer, 1)
    for i in range(n):
        x[i] = given[i]
    if bias:
        added = floats(bias, 0, n)
        for i in range(n):
            x[i] += added[i]
    tokens[0] += 1
    least, a, b = x[last], f4(1) / f4(min(tokens[0], NEAR)), f4(1) / f4(min(tokens[0], FAR))
    for i in range(n):
        p = exp(-ground.maximum(f4(0), least - x[i]))
        near[i] += a * (p - near[i])
        far[i] += b * (p - far[i])
        worth[i] = NEAR_SHARE * near[i] + (f4(1) - NEAR_SHARE) * far[i]


# --- The first thread: slots. ---


@jit(**HELP)
def _may_go(d, slot):
    return longs(d.held + 8 * slot, 1)[0] < d.now and atomic_load(d.left + 8 * slot) == 0


@jit(**HELP)
def _room(d):
    """A slot for a new expert: a free one, or that of the one that is worth least and that nobody wants now; -1: there is none."""
    if d.filled < d.slots:
        d.filled += 1
        return d.filled - 1
    owner, worth = longs(d.owner, d.slots), floats(d.worth, 0, 1)
    best, least = i8(-1), f4(3e38)
    slot = d.hand
    for i in range(d.slots):
        if i >= MOST_LOOKED_AT and best >= 0:
            break
        slot = slot + 1 if slot + 1 < d.slots else 0
        key = owner[slot]
        if key < 0:
            best = slot
            break
        if worth[key] < least and _may_go(d, slot):
            best, least = slot, worth[key]
    if d.slots > MOST_LOOKED_AT:
        d.hand = slot
    if best >= 0:
        _empty(d, best)
    return best


@jit(**HELP)
def _empty(d, slot):
    owner = longs(d.owner + 8 * slot, 1)
    if owner[0] >= 0:
        longs(d.where + 24 * owner[0], 1)[0] = 0
        longs(d.slot_of + 8 * owner[0], 1)[0] = -1
        owner[0] = -1


@jit(**HELP)
def _push(d, ring, tail, slot, times):
    """Offer a slot to the readers, once for each way that is left."""
    entries = longs(ring, d.mask + 1)
    for _ in range(times):
        entries[atomic_load(d.words + tail) & d.mask] = slot
        atomic_add(d.words + tail, 1)


@jit(**HELP)
def _begin(d, key, slot, is_guess):
    """Have an expert read into an empty slot."""
    longs(d.owner + 8 * slot, 1)[0], longs(d.slot_of + 8 * key, 1)[0] = key, slot
    longs(d.held + 8 * slot, 1)[0] = d.now + is_guess
    exchange(d.left + 8 * slot, i8(WAYS))
    _enter(d, d.clock)
    exchange(d.taken + 8 * slot, i8(0))
    if is_guess:
        longs(d.guesses, d.most_guesses)[d.n_guesses] = slot
        d.n_guesses += 1
        d.ahead += 1
        _push(d, d.guess_ring, GUESS_TAIL, slot, WAYS)
    else:
        _push(d, d.wanted_ring, WANTED_TAIL, slot, WAYS)


@jit(**HELP)
def _drop_guesses(d, layer):
    """Forget what was guessed of a layer that has now chosen; what was wrong and is not begun will not be read."""
    guesses, kept = longs(d.guesses, d.most_guesses), 0
    for i in range(d.n_guesses):
        slot = guesses[i]
        key = longs(d.owner + 8 * slot, 1)[0]
        if key >= 0 and key // d.experts != layer:
            guesses[kept] = slot
            kept += 1
        elif key >= 0 and longs(d.last + 8 * key, 1)[0] != d.now and atomic_load(d.taken + 8 * slot) == 0:
            begun = exchange(d.taken + 8 * slot, i8(GONE))
            if begun == 0:
                _empty(d, slot)
                exchange(d.left + 8 * slot, i8(0))
                d.ahead -= 1
                _leave(d, d.clock)
            else:  # somebody was faster; others may have come in vain meanwhile
                exchange(d.taken + 8 * slot, begun)
                _push(d, d.guess_ring, GUESS_TAIL, slot, WAYS - begun)
    d.n_guesses = kept


@jit(**HELP)
def _enter(d, clock):
    """One more is under way."""
    if atomic_add(d.words + BUSY, 1) == 0:
        longs(d.words + SINCE, 1)[0] = nanoseconds(clock)


@jit(**HELP)
def _leave(d, clock):
    """One less is under way."""
    since, now = atomic_load(d.words + SINCE), nanoseconds(clock)
    if atomic_add(d.words + BUSY, -1) == 1:
        atomic_add(d.words + READING, now - since)


@jit(**HELP)
def _announce(d, pieces):
    """Wake as many readers as find something: each that wakes in vain takes a core from computing."""
    if pieces > 0:
        atomic_add(d.words + POSTED, 1)
        wake_some(d.words, POSTED, pieces)


# --- The first thread: asking. ---


@jit(**HELP)
def publish(d, layer):
    """Ask for d.count experts, which stand in d.wanted, while all other threads wait at a barrier."""
    wanted, first, many = longs(d.wanted, d.count), layer * d.experts, min(d.count, d.wave)
    d.now += 1
    for i in range(many):
        longs(d.last + 8 * (first + wanted[i]), 1)[0] = d.now
        slot = longs(d.slot_of + 8 * (first + wanted[i]), 1)[0]
        if slot >= 0:
            longs(d.held + 8 * slot, 1)[0] = d.now
    _judge(d, layer)
    _drop_guesses(d, layer)
    d.wants += many
    pieces = 0
    for i in range(many):
        key = first + wanted[i]
        slot = longs(d.slot_of + 8 * key, 1)[0]
        if slot < 0:
            slot = _room(d)
            if slot < 0:  # cannot be: a wave takes half of the slots, guesses a quarter
                atomic_add(d.words + FAILED, 1)
                return
            _begin(d, key, slot, 0)
            pieces += WAYS
        elif atomic_load(d.where + 24 * key):
            d.hits += 1
        else:  # it was guessed: what is left of it goes before other guesses
            begun = min(atomic_load(d.taken + 8 * slot), i8(WAYS))
            _push(d, d.wanted_ring, WANTED_TAIL, slot, WAYS - begun)
            pieces += WAYS - begun
    if d.is_ahead:  # of a prompt: what the next wave will want
        for i in range(many, d.count):
            if not _ask_ahead(d, first + wanted[i]):
                break
            pieces += WAYS
    _announce(d, pieces)


@jit(**HELP)
def _ask_ahead(d, key):
    """Have an expert that is away read for a guess. False: there is no room."""
    if longs(d.slot_of + 8 * key, 1)[0] >= 0:
        return True
    if d.n_guesses >= d.most_guesses:
        return False
    slot = _room(d)
    if slot >= 0:
        _begin(d, key, slot, 1)
    return slot >= 0


@jit(**HELP)
def _judge(d, layer):
    """What came of the last guess; the worth of guesses is learned by their rank, of those alone that would cost a read."""
    if d.guess_layer != layer:
        return
    d.guess_layer = -1
    keys, away = longs(d.guess_key, d.used), longs(d.guess_away, d.used)
    came_true = ground.doubles(d.came_true, 2 * d.used)
    for rank in range(d.used):
        is_right = longs(d.last + 8 * keys[rank], 1)[0] == d.now
        d.right += is_right
        if away[rank]:
            came_true[2 * rank] = 0.99 * came_true[2 * rank] + 1
            came_true[2 * rank + 1] = 0.99 * came_true[2 * rank + 1] + is_right
    d.guessed += d.used


@jit(**HELP)
def _guess(d, layer, logits, bias):
    """Read what a layer's router would choose by these logits."""
    n, k = d.experts, d.used
    x, keys, away = floats(logits, 0, n), longs(d.guess_key, k), longs(d.guess_away, k)
    if bias:
        added = floats(bias, 0, n)
        for i in range(n):
            x[i] += added[i]
    for j in range(k):
        keys[j] = -1
    for i in range(n):
        j = k - 1
        if keys[j] >= 0 and not x[i] > x[keys[j]]:
            continue
        while j > 0 and (keys[j - 1] < 0 or x[i] > x[keys[j - 1]]):
            keys[j] = keys[j - 1]
            j -= 1
        keys[j] = i
    came_true, pieces, has_room = ground.doubles(d.came_true, 2 * k), 0, True
    for j in range(k):
        keys[j] += layer * n
        slot = longs(d.slot_of + 8 * keys[j], 1)[0]
        away[j] = slot < 0
        if slot >= 0:
            longs(d.held + 8 * slot, 1)[0] = d.now + 1
    for j in range(k):
        if away[j] and has_room and came_true[2 * j + 1] >= WORTH * came_true[2 * j]:
            has_room = _ask_ahead(d, keys[j])
            pieces += WAYS
    d.guess_layer = layer
    _announce(d, min(pieces, GUESSERS))


@operation
def foresee(r, m):
    """Guess what experts layer r.count will want of the single token whose state is `input`, by its norm and its router."""
    if m.n != 1 or desk(r.more).is_ahead == 0:
        return
    factor = root_mean_square(r.input, r.width, r.epsilon)
    into_one(r, m.own, r.input, (r.width + BLOCK - 1) // BLOCK, r.norm, factor, 0)
    first, end = share(r.panels, m)
    for p in range(first, end):
        call_tile(r.kernel_one, r.weight + p * r.panel_bytes, m.own + r.single, r.output + 64 * p, r.blocks, 64, 0)
    barrier(m)
    if m.thread == 0:
        _guess(desk(r.more), r.count, r.output, r.bias)


# --- All threads: waiting. ---


@jit(**HELP)
def await_expert(d, where, m):
    """Wait until an expert's first address is there, or reading has failed; whether it is there."""
    if atomic_load(where) != 0:
        return True
    began = nanoseconds(m.slot)
    while True:
        seen = atomic_load(d.words + DELIVERED)
        if atomic_load(where) != 0 or atomic_load(d.words + FAILED) != 0:
            break
        await_change(d.words, DELIVERED, seen, SPIN_NS, m.slot)
    if m.thread == 0:
        d.stall += nanoseconds(m.slot) - began
    return atomic_load(where) != 0


# --- The readers. ---


@jit(**HELP)
def _pop(d, ring, head, tail):
    """The next slot of a ring, or -1."""
    at = atomic_load(d.words + head)
    while at < atomic_load(d.words + tail):
        slot = longs(ring, d.mask + 1)[at & d.mask]
        found = _replace(d.words + head, at, at + 1)
        if found == at:
            return slot
        at = found
    return i8(-1)


@jit(**HELP)
def _take(d):
    """(a slot, the way of it that is read next), or (-1, 0); and whether it was found among guesses."""
    while True:
        slot, is_guess = _pop(d, d.wanted_ring, WANTED_HEAD, WANTED_TAIL), False
        if slot < 0:
            if atomic_add(d.words + GUESSING, 1) < GUESSERS:
                slot, is_guess = _pop(d, d.guess_ring, GUESS_HEAD, GUESS_TAIL), True
            if slot < 0:
                atomic_add(d.words + GUESSING, -1)
                return i8(-1), i8(0), False
        way = atomic_add(d.taken + 8 * slot, 1)
        if way < WAYS:
            return slot, way, is_guess
        if is_guess:
            atomic_add(d.words + GUESSING, -1)


@jit(**HELP)
def _read(d, slot, way, clock, buffer):
    """Read and pack one way of an expert; who does so with the last of them tells where the expert is."""
    key, panels = longs(d.owner + 8 * slot, 1)[0], d.pool + slot * d.slot_bytes
    w = way_at(d.ways + (key // d.experts * WAYS + way) * WAY_BYTES)
    begin = w.begin + key % d.experts * w.step
    first, end, done = begin - begin % SECTOR, begin + w.nbytes, i8(0)
    whole = (end - first + SECTOR - 1) // SECTOR * SECTOR
    while first + done < end:
        count = _pread(np.int32(w.handle), buffer + done, whole - done, first + done)
        if count <= 0:
            errno = i8(ground.ints(_errno(), 1)[0]) if count < 0 else i8(0)
            if errno == EINTR:
                continue
            longs(d.broken + 8 * slot, 1)[0] = 1
            if atomic_add(d.words + FAILED, 1) == 0:
                d.failed_key, d.failed_way, d.errno = key, way, (i8(0) if done % SECTOR else errno)
            break
        done += count
    atomic_add(d.words + BYTES, done)
    if first + done >= end:
        target, packed = panels + w.at, (w.rows + ROWS - 1) // ROWS * w.blocks * w.block_bytes * ROWS
        interleave(buffer + begin - first, target, w.fields, w.n_fields, w.rows, w.row_bytes, w.blocks, w.block_bytes)
        spare = ground.bytes_at(target + packed, w.size - packed)
        for i in range(len(spare)):
            spare[i] = 0
    if atomic_add(d.left + 8 * slot, -1) == 1:
        if longs(d.broken + 8 * slot, 1)[0] == 0:
            _deliver(d, key, panels)
        _leave(d, clock)
        atomic_add(d.words + DELIVERED, 1)
        wake(d.words, DELIVERED)


@jit(**HELP)
def _deliver(d, key, panels):
    where = longs(d.where + 24 * key, WAYS)
    for way in range(1, WAYS):
        where[way] = panels + way_at(d.ways + (key // d.experts * WAYS + way) * WAY_BYTES).at
    exchange(d.where + 24 * key, panels + way_at(d.ways + key // d.experts * WAYS * WAY_BYTES).at)


def _serve(address, own):
    """A reader's life. own: two words for its clock, and at the next multiple of a sector a buffer."""
    d = desk(address)
    while True:
        seen = atomic_load(d.words + POSTED)
        if atomic_load(d.words + STOP):
            break
        slot, way, is_guess = _take(d)
        if slot < 0:
            await_change(d.words, POSTED, seen, i8(0), own)
            continue
        _read(d, slot, way, own, own + SECTOR)
        if is_guess:
            atomic_add(d.words + GUESSING, -1)


# --- What Python calls. ---


def _rouse(words):
    atomic_add(words + POSTED, 1)
    wake(words, POSTED)


def _fetch(address, layer, took):
    """Want what stands in `wanted` and wait for it; took: nanoseconds of it."""
    d = desk(address)
    began = nanoseconds(d.clock)
    publish(d, layer)
    wanted = longs(d.wanted, d.count)
    for i in range(d.count):
        where = d.where + 24 * (layer * d.experts + wanted[i])
        while atomic_load(where) == 0 and atomic_load(d.words + FAILED) == 0:
            seen = atomic_load(d.words + DELIVERED)
            if atomic_load(where) == 0 and atomic_load(d.words + FAILED) == 0:
                await_change(d.words, DELIVERED, seen, SPIN_NS, d.clock)
    longs(took, 1)[0] = nanoseconds(d.clock) - began


@cache
def _compiled(f) -> Callable[..., None]:
    """A function of addresses and numbers alone, for Python."""
    return c_function(f, **ground.FAST)


def _work(desk: np.ndarray, own: np.ndarray, *_kept: np.ndarray) -> None:
    """A reader thread, which keeps alive what it is given by address."""
    _compiled(_serve)(desk.ctypes.data, own.ctypes.data)


@dataclass
class Counters:
    """What happened since the model was loaded."""

    wanted: int = 0  # experts that tokens (and pieces of prompts) wanted
    hits: int = 0  # of them, in memory when they were wanted
    guessed: int = 0  # experts of a next layer that were guessed, in memory or not, where it could be seen what came
    right: int = 0  # of them, those that were wanted
    ahead: int = 0  # experts that were read because of a guess
    bytes: int = 0  # read
    reading: float = 0.0  # seconds in which at least one expert was under way
    stall: float = 0.0  # seconds in which the first thread waited

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.wanted)

    @property
    def hidden(self) -> float:
        """The share of the time of reading in which computing went on."""
        return max(0.0, 1 - self.stall / self.reading) if self.reading else 1.0


@dataclass
class _Way:
    """Gate, up or down of a layer's experts in the file."""

    info: TensorInfo
    rows: int
    columns: int
    first: int  # bytes from the tensor's beginning to the first expert's first row
    step: int  # bytes from expert to expert
    nbytes: int  # of one expert's rows
    at: int  # where its panels begin in a slot
    size: int  # bytes of its panels


@dataclass
class Residency:
    """The pool, the tables, and the threads that fill them; `start` makes the pool, when all layers are known."""

    file: GGUFFile
    width: int
    experts: int
    used: int
    n_layers: int
    is_prefetching: bool = True
    is_direct: bool = True
    layers: dict[int, list[_Way]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = self.n_layers * self.experts
        self.desk = np.zeros(1, DESK)
        self.arrays: dict[str, np.ndarray] = {}
        self.words = self._array("words", WORDS + 16)
        self.where = self._array("where", 3 * keys).reshape(self.n_layers, self.experts, 3)
        self.wanted = self._array("wanted", max(self.experts, self.used) + 1)
        self._array("slot_of", keys)[:] = -1
        self._array("came_true", 2 * self.used, np.float64)[:] = 1
        for name, size in dict(last=keys, tokens=self.n_layers, guess_key=self.used, guess_away=self.used).items():
            self._array(name, size)
        for name, size in dict(near=keys, far=keys, worth=keys, logits=self.experts).items():
            self._array(name, size, np.float32)
        for name, value in dict(experts=self.experts, used=self.used, guess_layer=-1,
                                clock=self.words[WORDS:].ctypes.data).items():  # fmt: skip
            self.desk[0][name] = value
        self.threads: list[threading.Thread] = []
        self.slot_bytes = 0

    def _array(self, name: str, size: int, kind: Any = np.int64) -> np.ndarray:
        """Zeros that compiled code knows by this name."""
        self.arrays[name] = products.aligned(size * np.dtype(kind).itemsize, kind)
        self.desk[0][name] = self.arrays[name].ctypes.data
        return self.arrays[name]

    # --- Building. ---

    def add(self, layer: int, matrices: list[tuple[TensorInfo, int, int, int, int]]) -> np.ndarray:
        """Enter a layer: (tensor, rows of an expert, columns, its first row, rows from expert to expert) of gate, up and down.

        Returns its table: int64 [experts, 3].
        """
        ways, at = [], 0
        for info, rows, columns, first, step in matrices:
            multiple = ROWS if len(ways) == 2 else 2 * ROWS
            panels = -(-rows // multiple) * multiple // ROWS
            size = panels * products.panel_bytes(info.format, columns)
            row_bytes = info.nbytes // (self.experts * step)
            ways.append(_Way(info, rows, columns, first * row_bytes, step * row_bytes, rows * row_bytes, at, size))
            at += -(-size // 64) * 64
        self.slot_bytes = max(self.slot_bytes, at)
        self.layers[layer] = ways
        return self.where[layer]

    def start(self, budget: int) -> None:
        """Make the pool and begin to serve; budget: its bytes. Raises GGUFError where it holds too few experts."""
        slots, least = budget // self.slot_bytes, 4 * self.used
        slots = min(slots, self.experts * len(self.layers))
        if slots < min(least, self.experts * len(self.layers)):
            raise GGUFError(
                f"{self.file.path}: {max(budget, 0) / 1e9:.2f} GB are left for experts, which hold {max(slots, 0)}; "
                f"at least {least} ({least * self.slot_bytes / 1e9:.2f} GB) are needed: give more memory"
            )
        self.slots, most = slots, max(1, slots // 4)
        ring = 1 << (8 * slots + 1024).bit_length()
        self._array("pool", slots * self.slot_bytes, np.uint8)
        self.owner = self._array("owner", slots)
        self.owner[:] = -1
        self._array("taken", slots)[:] = WAYS
        for name, size in dict(
            held=slots, left=slots, broken=slots, guesses=most, wanted_ring=ring, guess_ring=ring
        ).items():
            self._array(name, size)
        for name, value in dict(slots=slots, slot_bytes=self.slot_bytes, wave=max(self.used, slots // 2), most_guesses=most,
                                mask=ring - 1, is_ahead=self.is_prefetching).items():  # fmt: skip
            self.desk[0][name] = value
        self.handles = [self._open(part.path) for part in self.file._parts]
        self._lay_out()
        most = max(way.nbytes for ways in self.layers.values() for way in ways)
        room = (most // SECTOR + 4) * SECTOR  # a clock, and what sectors take that begin and end within others' bytes
        # In a huge page, a direct read has one piece of memory to find instead of a hundred: it takes half of the time.
        rooms = products.aligned(max(READERS * room, products.HUGE) + SECTOR)
        rooms = rooms[-rooms.ctypes.data % SECTOR :]
        for i in range(READERS):
            reader = threading.Thread(target=_work, args=(self.desk, rooms[i * room :], *self.arrays.values()),
                                      name=f"giant-reader-{i}", daemon=True)  # fmt: skip
            self.threads.append(reader)
            reader.start()

    def _lay_out(self) -> None:
        """Tell compiled code where experts are in the file, and how they are packed."""
        table = self._array("ways", self.n_layers * WAYS * (WAY_BYTES // 8)).view(WAY).reshape(self.n_layers, WAYS)
        for layer, ways in self.layers.items():
            for entry, way in zip(table[layer], ways, strict=True):
                fields, row_bytes, block_bytes = products.packing(way.info.format, way.columns)
                self.arrays[f"fields of {way.info.format}"] = fields
                for name, value in dict(
                    handle=self.handles[way.info.part], begin=way.info.offset + way.first, step=way.step, nbytes=way.nbytes, at=way.at,
                    size=way.size, rows=way.rows, row_bytes=row_bytes, blocks=products.blocks(way.info.format, way.columns),
                    block_bytes=block_bytes, fields=fields.ctypes.data, n_fields=len(fields),
                ).items():  # fmt: skip
                    entry[name] = value

    def _open(self, path: Path) -> int:
        if self.is_direct and hasattr(os, "O_DIRECT"):
            try:
                return os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError:
                pass
        self.is_direct = False
        return os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Send the readers home."""
        if not self.threads:
            return
        self.words[STOP // 8] = 1
        _compiled(_rouse)(self.words.ctypes.data)
        for thread in self.threads:
            thread.join()
        self.threads = []
        for handle in self.handles:
            os.close(handle)

    def check(self) -> None:
        """Raise what reading ended with, once; then those experts are read anew when they are wanted."""
        if not self.words[FAILED // 8]:
            return
        self._settle()
        d = self.desk[0]
        info = self.layers[int(d["failed_key"]) // self.experts][int(d["failed_way"])].info
        reason = f"the file ended inside of {info.name!r}; it was cut after it was opened"
        if d["errno"]:
            reason = f"{os.strerror(d['errno'])}, of {info.name!r}"
        raise GGUFError(f"{self.file.path}: an expert cannot be read: {reason}")

    def _settle(self) -> None:
        """Let all that is under way end, and give back the slots of what could not be read."""
        end = time.monotonic() + 5
        while self.words[BUSY // 8] and time.monotonic() < end:
            time.sleep(0.001)
        for slot in np.flatnonzero(self.arrays["broken"]):
            self.arrays["slot_of"][self.owner[slot]] = self.owner[slot] = -1
        self.arrays["broken"][:] = 0
        self.words[FAILED // 8] = 0

    def report(self) -> dict[str, Any]:
        """The counters, with their rates."""
        d, words = self.desk[0], self.words
        c = Counters(int(d["wants"]), int(d["hits"]), int(d["guessed"]), int(d["right"]), int(d["ahead"]), int(words[BYTES // 8]),
                     words[READING // 8] / 1e9, d["stall"] / 1e9)  # fmt: skip
        return asdict(c) | dict(hit_rate=c.hit_rate, hidden=c.hidden, slots=self.slots, slot_bytes=self.slot_bytes)

    def fetch(self, layer: int, experts: list[int]) -> float:
        """Seconds until these experts, which no router asked for, are in memory. Raises GGUFError where reading fails."""
        took = np.zeros(1, np.int64)
        self.wanted[: len(experts)], self.desk[0]["count"] = experts, len(experts)
        _compiled(_fetch)(self.desk.ctypes.data, layer, took.ctypes.data)
        self.check()
        return int(took[0]) / 1e9


# --- How long reading takes: for `auto` and `giant plan`. ---


def reading_seconds(file: GGUFFile, seconds: float = 3.0, several: int = 6) -> tuple[float, float, float]:
    """(seconds of a single expert beyond what each costs, seconds of each, and of a processor) when experts at random places
    are wanted.

    They are read and packed by the very code that serves a model, some at once, for so many seconds: disks that are lent by the
    second are fast for a moment, and what counts is what they keep up. Means of the later two thirds.
    """
    name = file.architecture
    width, used = file.get(f"{name}.embedding_length", int), file.get(f"{name}.expert_used_count", int)
    blocks = sorted({n.rpartition("ffn_")[0] for n in file.tensors if "_exps." in n})
    count = file.get(f"{name}.expert_count", int)
    residency = Residency(file, width, count, used, len(blocks), is_prefetching=False)
    for layer, block in enumerate(blocks):
        residency.add(layer, _ways_of(file, block))
    several = min(several, count)
    residency.start(max(4 * used, 2 * several) * residency.slot_bytes)
    residency.fetch(0, [0])  # loads what packs
    rng = np.random.default_rng(0)
    took = {1: [], several: []}  # of bursts: (when it began, its seconds, a processor's for each expert)
    began = time.perf_counter()
    try:
        while (passed := time.perf_counter() - began) < seconds or len(took[several]) < LEAST_BURSTS:
            layer, many = int(rng.integers(0, len(blocks))), several if len(took[1]) > len(took[several]) else 1
            away = [e for e in rng.permutation(count).tolist() if not residency.where[layer, e, 0]][:many]
            if len(away) < many:  # so few experts that all are there
                return 0.0, 0.0, 0.0
            before = time.process_time()
            took[many].append((passed, residency.fetch(layer, away), (time.process_time() - before) / many))
    finally:
        residency.close()
    late = {
        many: np.array([burst for burst in bursts if burst[0] > passed / 3] or bursts) for many, bursts in took.items()
    }
    one, together = (float(late[many][:, 1].mean()) for many in (1, several))
    each = max(0.0, together - one) / max(1, several - 1)
    return max(0.0, one - each), each, float(np.mean([late[many][:, 2].mean() for many in late]))


def _ways_of(file: GGUFFile, block: str) -> list[tuple[TensorInfo, int, int, int, int]]:
    """What Residency.add takes, of a layer whose tensors' names begin with `block`."""
    fused, out = file.tensors.get(f"{block}ffn_gate_up_exps.weight"), []
    for way in ("gate", "up", "down"):
        info = file.tensors.get(f"{block}ffn_{way}_exps.weight") or fused
        if info is None or len(info.shape) != 3:
            raise GGUFError(f"{file.path}: it lacks the tensor {block}ffn_{way}_exps.weight")
        _, rows, columns = info.shape
        is_half = info is fused
        out.append((info, rows // 2 if is_half else rows, columns, rows // 2 if is_half and way == "up" else 0, rows))
    return out

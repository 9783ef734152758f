"""Experts that stay in the file: those that are needed come from the disk, the most useful ones stay in memory.

Compiled code runs whole steps without Python. When a router has chosen, it publishes what it wants (and the state that the
router saw), then waits for whatever is not there yet. A loader thread answers: it starts reading what is missing, then guesses
what the next layer will want, by giving that layer's router this layer's state, and reads that too while the first threads
compute. A wrong guess costs a read and never a result: what is computed is what the layer's own router chose.

An expert in memory is a slot of one pool: its panels of gate, up and down, packed as those of any matrix. `where` tells
compiled code the addresses, 0 for one that is away. Which one has to go: the one with the fewest uses, which are halved now
and then, and of several the one whose last use is longest ago (a mixture of LFU and LRU).

Neither side holds a lock. Who wants an expert writes the number of the request beside it, publishes that number, and looks for
the expert only then; who takes one away clears its address first and looks at the numbers afterwards: so at least one of the
two sees the other.

Reads go around the page cache where the file system can (O_DIRECT), since what is worth keeping is in the pool already.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from organs.giant import products
from organs.giant.engine import (
    HELP,
    POSTED,
    STOP,
    TEAM_WORDS,
    atomic_add,
    atomic_load,
    floats,
    ground,
    i8,
    jit,
    longs,
    record_at,
)
from organs.giant.engine import _await_change as await_change
from organs.giant.engine import _nanoseconds as nanoseconds
from organs.giant.engine import _wake as wake
from organs.giant.gguf import GGUFError, GGUFFile, TensorInfo
from organs.giant.lanes import c_function, function
from organs.giant.products import ROWS

SECTOR = 4096  # bytes that direct reads are multiples of
READERS = 6  # reads under way at a time
WORTH = 0.4  # a guess is read if guesses of its rank came true at least so often: a wrong one takes the disk from what is wanted
HALF_LIFE = 4096  # requests after which a use counts half

DESK = np.dtype([(n, i8) for n in ("words", "slot", "layer", "wanted", "count", "state", "width", "wave", "failed", "stall",
                                   "wants", "hits")], align=True)  # fmt: skip
"""Where compiled code and the loader meet. `words`: as those of engine.Team, POSTED is the number of the last request; `layer`,
`wanted` int64 [count] and `state` float32 [width]: the last request; `wave`: how many experts of a prompt are wanted at a time;
`failed`: address of a word that is not 0 when reading failed; `stall`: of nanoseconds that the first thread has waited; `wants`,
`hits`: how many experts were wanted, and of them in memory at that time."""

desk = record_at(DESK)
_exchange = function("int64(int64, int64)", lambda b, p, x: b.atomic_rmw(
    "xchg", b.inttoptr(p, ground.WORD.as_pointer()), x, "seq_cst"))  # fmt: skip


# --- The side of compiled code. ---


@jit(**HELP)
def publish(d, layer, experts, uses, where, state):
    """Ask for d.count experts, which stand in d.wanted; the first thread does, all others wait at a barrier.

    uses: the layer's int64 [2, experts]: the last request in which each was wanted, and how often it was.
    """
    wanted, now = longs(d.wanted, d.count), atomic_load(d.words + POSTED) + 1
    seen, kept, x = longs(uses, 2 * experts), floats(d.state, 0, d.width), floats(state, 0, d.width)
    for i in range(min(d.count, d.wave)):
        expert = wanted[i]
        seen[expert] = now
        seen[experts + expert] += 1
        d.hits += longs(where + 24 * expert, 1)[0] != 0
        d.wants += 1
    for i in range(d.width):
        kept[i] = x[i]
    d.layer = layer
    atomic_add(d.words + POSTED, 1)
    wake(d.words, POSTED)


@jit(**HELP)
def await_expert(d, where, first):
    """Wait until an expert's first address is there, or reading has failed; whether it is there."""
    if atomic_load(where) != 0:
        return True
    began, spins = nanoseconds(d.slot) if first else i8(0), 0
    while atomic_load(where) == 0:
        if atomic_load(d.failed) != 0:
            return False
        spins += 1
        if spins > 64:
            ground.usleep(np.uint32(100))  # the readers want the cores
    if first:
        atomic_add(d.stall, nanoseconds(d.slot) - began)
    return True


# --- The side of the loader. ---


def _await_request(words, seen, slot):
    await_change(words, POSTED, seen, i8(50_000), slot)


def _withdraw(where, use, words, answer):
    """Clear an address, unless its expert is wanted by the last request (or one just being made); answer: 1 if it is cleared."""
    before = _exchange(where, i8(0))
    if atomic_load(use) >= atomic_load(words + POSTED):
        _exchange(where, before)
        longs(answer, 1)[0] = 0
    else:
        longs(answer, 1)[0] = 1


def _deliver(where, gate, up, down):
    addresses = longs(where, 3)
    addresses[1], addresses[2] = up, down
    _exchange(where, gate)


def _compiled(f):
    """A function of addresses and numbers alone, for Python."""
    return c_function(f, **ground.FAST)


@dataclass
class Counters:
    """What happened since the model was loaded."""

    wanted: int = 0  # experts that tokens (and pieces of prompts) wanted
    hits: int = 0  # of them, in memory when they were wanted
    guessed: int = 0  # experts of a next layer that were guessed, in memory or not, where it could be seen what came
    right: int = 0  # of them, those that were wanted
    ahead: int = 0  # reads that were begun by a guess
    bytes: int = 0  # read
    reading: float = 0.0  # seconds in which at least one read was under way
    stall: float = 0.0  # seconds in which the first thread waited

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.wanted)

    @property
    def hidden(self) -> float:
        """The share of the time of reading in which computing went on."""
        return max(0.0, 1 - self.stall / self.reading) if self.reading else 1.0


class _Once:
    """A read that may be asked for twice, and happens once."""

    def __init__(self, read: Callable[[], None]):
        self.read, self.token = read, threading.Lock()

    def __call__(self) -> None:
        if self.token.acquire(blocking=False):
            self.read()


class _Readers:
    """Threads that read what is wanted before what is guessed, and of each kind what was asked for first."""

    def __init__(self, count: int):
        self.waiting: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self.numbers = itertools.count()
        self.threads = [
            threading.Thread(target=self._serve, name=f"giant-reader-{i}", daemon=True) for i in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def ask(self, read: Callable[[], None], is_guess: bool = False) -> None:
        self.waiting.put((int(is_guess), next(self.numbers), read))

    def close(self) -> None:
        """End the threads when all is read."""
        for _ in self.threads:
            self.waiting.put((2, next(self.numbers), None))
        for thread in self.threads:
            thread.join()

    def _serve(self) -> None:
        while (read := self.waiting.get()[2]) is not None:
            read()


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
class _Layer:
    ways: list[_Way]
    where: np.ndarray  # int64 [experts, 3]
    router: np.ndarray | None = None  # float32 [experts, width], times the norm's weights; for guessing


@dataclass
class Residency:
    """The pool, the table, and the thread that keeps them. `budget`: bytes of the pool, known when all layers are."""

    file: GGUFFile
    width: int
    experts: int
    used: int
    n_layers: int
    is_prefetching: bool = True
    is_direct: bool = True
    layers: dict[int, _Layer] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self.uses = np.zeros((self.n_layers, 2, self.experts), np.int64)  # last request, and how many
        self.words = products.aligned(8 * (TEAM_WORDS + 16), np.int64)
        self.wanted = np.zeros(max(self.experts, self.used) + 1, np.int64)
        self.state = products.aligned(4 * (self.width + 32), np.float32)
        self.marks = np.zeros(4, np.int64)  # failed, stall, answer of a withdrawal
        self.desk = np.zeros(1, DESK)
        words = self.words.ctypes.data
        for name, value in dict(words=words, slot=words + 8 * TEAM_WORDS, wanted=self.wanted.ctypes.data, width=self.width,
                                state=self.state.ctypes.data, failed=self.marks.ctypes.data,
                                stall=self.marks.ctypes.data + 8).items():  # fmt: skip
            self.desk[0][name] = value
        self.error: BaseException | None = None
        self.has_failed = False  # whether the last step did
        self.thread: threading.Thread | None = None
        self.slot_bytes = 0

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
        self.layers[layer] = _Layer(ways, np.zeros((self.experts, 3), np.int64))
        return self.layers[layer].where

    def learn(self, layer: int, router: str, norm: np.ndarray) -> None:
        """Keep a layer's router for guessing: the tensor's name, and the weights of the norm before it."""
        self.layers[layer].router = self.file.array(router) * norm

    def start(self, budget: int) -> None:
        """Make the pool and begin to serve. Raises GGUFError where the budget holds too few experts."""
        slots, least = budget // self.slot_bytes, 4 * self.used
        slots = min(slots, self.experts * len(self.layers))
        if slots < min(least, self.experts * len(self.layers)):
            raise GGUFError(
                f"{self.file.path}: {max(budget, 0) / 1e9:.2f} GB are left for experts, which hold {max(slots, 0)}; "
                f"at least {least} ({least * self.slot_bytes / 1e9:.2f} GB) are needed: give more memory"
            )
        self.pool = products.aligned(slots * self.slot_bytes)
        self.owner = np.full((slots, 2), -1, np.int64)
        self.free = list(range(slots - 1, -1, -1))
        self.slot_of: dict[tuple[int, int], int] = {}
        self.under_way: dict[tuple[int, int], Future] = {}
        self.guessed_reads: dict[tuple[int, int], list[_Once]] = {}  # of those under way by a guess
        self.guesses: dict[
            tuple[int, int], int
        ] = {}  # experts read by a guess, not wanted yet: the request at that time
        self.last_guess: tuple[int, list[tuple[int, bool]]] = (
            -1,
            [],
        )  # layer; experts, best first, and whether they were away
        self.came_true = np.ones(
            (self.used, 2)
        )  # by rank: guesses of experts that were away, and of them the right ones
        self.aged = 0
        self.victims: list[tuple[int, tuple[int, int]]] = []
        self.desk[0]["wave"] = max(self.used, slots // 2)
        self.fast = {f: _compiled(f) for f in (_await_request, _withdraw, _deliver)}
        self.readers = _Readers(READERS)
        self.handles = [self._open(part.path) for part in self.file._parts]
        self.busy, self.busy_since = 0, 0.0
        self.lock = threading.Lock()  # of the counters that readers change
        self.thread = threading.Thread(target=self._serve, name="giant-loader", daemon=True)
        self.thread.start()

    def _open(self, path: Path) -> int:
        if self.is_direct and hasattr(os, "O_DIRECT"):
            try:
                return os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError:
                pass
        self.is_direct = False
        return os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Send the loader home."""
        if self.thread is None:
            return
        self.words[STOP // 8] = 1
        self.words[POSTED // 8] += 1
        _compiled(_rouse)(self.words.ctypes.data)
        self.thread.join()
        self.thread = None
        self.readers.close()
        for handle in self.handles:
            os.close(handle)

    def check(self) -> None:
        """Raise what reading ended with, once; then those experts are read anew when they are wanted."""
        if self.error is not None:
            error, self.error, self.marks[0], self.has_failed = self.error, None, 0, True
            raise GGUFError(f"{self.file.path}: an expert cannot be read: {error}") from error

    def recover(self) -> None:
        """Before a step: after one that failed, let what else was being read end, so that it does not end this one, too."""
        if not self.has_failed:
            return
        idle, end = 0, time.monotonic() + 5
        while idle < 10 and time.monotonic() < end:  # between two reads the loader is not busy for a moment
            time.sleep(0.005)
            idle = 0 if self.busy else idle + 1
        self.error, self.marks[0], self.has_failed = None, 0, False

    def report(self) -> dict[str, Any]:
        """The counters, with their rates."""
        c = self.counters
        c.stall, c.wanted, c.hits = self.marks[1] / 1e9, int(self.desk[0]["wants"]), int(self.desk[0]["hits"])
        return asdict(c) | dict(hit_rate=c.hit_rate, hidden=c.hidden, slots=len(self.owner), slot_bytes=self.slot_bytes)

    # --- Serving. ---

    def _serve(self) -> None:
        words, slot, seen = self.words.ctypes.data, self.words.ctypes.data + 8 * (TEAM_WORDS + 8), 0
        while True:
            self.fast[_await_request](words, seen, slot)
            seen = int(self.words[POSTED // 8])
            if self.words[STOP // 8]:
                return
            layer, count = int(self.desk[0]["layer"]), int(self.desk[0]["count"])
            wanted, state = self.wanted[:count].tolist(), self.state[: self.width].copy()
            if int(self.words[POSTED // 8]) != seen:
                continue  # all of it was in memory, and the next request is there already
            try:
                self._answer(layer, wanted, state, seen)
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self.marks[0] = 1

    def _answer(self, layer: int, wanted: list[int], state: np.ndarray, now: int) -> None:
        count = min(len(wanted), int(self.desk[0]["wave"]))
        self._judge(layer, set(wanted[:count]))
        if now - self.aged > HALF_LIFE:
            self.aged = now
            self.uses[:, 1] >>= 1
        for expert in wanted[:count]:
            self.guesses.pop((layer, expert), None)
            self._fetch((layer, expert), now)
        if not self.is_prefetching:
            return
        for expert in wanted[count:]:  # of a prompt: what the next wave will want
            if int(self.words[POSTED // 8]) != now or not self._fetch((layer, expert), now, is_guess=True):
                return
        if len(wanted) <= self.used:
            self._guess(layer, state, now)

    def _guess(self, layer: int, state: np.ndarray, now: int) -> None:
        """Read what the next layer's router would choose for this state."""
        following = layer + 1
        if following not in self.layers or self.layers[following].router is None:
            return
        logits = self.layers[following].router @ state
        best = np.argpartition(-logits, self.used - 1)[: self.used]
        guess = [
            (expert, (following, expert) not in self.slot_of) for expert in best[np.argsort(-logits[best])].tolist()
        ]
        self.last_guess = following, guess
        for rank, (expert, is_away) in enumerate(guess):
            tried, right = self.came_true[rank]
            if not is_away or right < WORTH * tried:
                continue
            if int(self.words[POSTED // 8]) != now or not self._fetch((following, expert), now, is_guess=True):
                return

    def _judge(self, layer: int, wanted: set[int]) -> None:
        """What came of the last guess; the worth of guesses is learned by their rank, of those alone that would cost a read."""
        following, guess = self.last_guess
        self.last_guess = -1, []
        if following != layer:
            return
        self.counters.guessed += len(guess)
        for rank, (expert, is_away) in enumerate(guess):
            self.counters.right += expert in wanted
            if is_away:
                self.came_true[rank] = 0.99 * self.came_true[rank] + (1, expert in wanted)

    def _fetch(self, key: tuple[int, int], now: int, is_guess: bool = False) -> bool:
        """Begin to read an expert that is neither in memory nor under way. False: a guess found no room."""
        if key in self.slot_of:
            if not is_guess:
                for read in self.guessed_reads.pop(key, ()):  # those that have not begun yet go before other guesses
                    self.readers.ask(read)
            return True
        slot = self._room(now, is_guess)
        while slot is None:
            if is_guess:
                return False
            wait(self.under_way.values(), 0.01, FIRST_COMPLETED)
            slot = self._room(now, is_guess)
        if is_guess:
            self.counters.ahead += 1
            self.guesses[key] = now
        self.slot_of[key], self.owner[slot] = slot, key
        with self.lock:
            if self.busy == 0:
                self.busy_since = time.perf_counter()
            self.busy += 1
        left, done = [len(self.layers[key[0]].ways)], Future()
        self.under_way[key] = done
        reads = [_Once(partial(self._read, key, slot, way, left, done)) for way in self.layers[key[0]].ways]
        if is_guess:
            self.guessed_reads[key] = reads
        for read in reads:
            self.readers.ask(read, is_guess)
        return True

    def _room(self, now: int, is_guess: bool) -> int | None:
        """A slot for a new expert: a free one, or that of the least useful one which nobody wants now.

        What was read by a guess a moment ago goes only for what is wanted, and only where nothing else can.
        """
        for key in [key for key, future in self.under_way.items() if future.done()]:
            del self.under_way[key]
            self.guessed_reads.pop(key, None)
        if self.free:
            return self.free.pop()
        for _ in range(2):
            while self.victims:
                slot, key = self.victims.pop()
                if tuple(self.owner[slot]) == key and self._may_go(key, now) and self._take(key):
                    return slot
            self._choose_victims(now)
        if is_guess:
            return None
        for key in [key for key in self.guesses if key in self.slot_of and key not in self.under_way]:
            slot = self.slot_of[key]
            if self.uses[key[0], 0, key[1]] < now and self._take(key):
                return slot
        return None

    def _may_go(self, key: tuple[int, int], now: int) -> bool:
        """Whether an expert is in memory, not wanted now, and not one that was guessed a moment ago."""
        is_idle = key in self.slot_of and key not in self.under_way and self.uses[key[0], 0, key[1]] < now
        return is_idle and now - self.guesses.get(key, -1 << 40) >= 2 * self.n_layers

    def _choose_victims(self, now: int) -> None:
        """The next few that may have to go, the least useful at the end; ordering all at every miss would take longer than a read."""
        layer, expert = self.owner[:, 0], self.owner[:, 1]
        last, times = self.uses[layer, 0, expert], self.uses[layer, 1, expert]
        order = np.argsort(np.where(last >= now, np.inf, times - 1 / (2 + last)))
        keys = [(slot, (int(layer[slot]), int(expert[slot]))) for slot in order[: max(32, len(order) // 16)].tolist()]
        self.victims = [(slot, key) for slot, key in reversed(keys) if key[0] >= 0 and self._may_go(key, now)]

    def _take(self, key: tuple[int, int]) -> bool:
        """Take an expert away, unless it is wanted by now."""
        where, use = self.layers[key[0]].where[key[1] :], self.uses[key[0], 0, key[1] :]
        self.fast[_withdraw](where.ctypes.data, use.ctypes.data, self.words.ctypes.data, self.marks.ctypes.data + 16)
        if self.marks[2]:
            del self.slot_of[key]
            self.guesses.pop(key, None)
        return bool(self.marks[2])

    def _read(self, key: tuple[int, int], slot: int, way: _Way, left: list[int], done: Future) -> None:
        """Read and pack one way of an expert, in a thread of the readers; the last of them tells where the expert is."""
        layer = self.layers[key[0]]
        panels = self.pool[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]
        try:
            raw = self._bytes(way.info, way.first + key[1] * way.step, way.nbytes)
            target = panels[way.at : way.at + way.size]
            products.pack(raw, way.info.format, way.rows, way.columns, target)
            target[-(-way.rows // ROWS) * products.panel_bytes(way.info.format, way.columns) :] = 0
        except BaseException as error:
            self._fail(error)
            left.append(0)  # it will not be delivered
        with self.lock:
            left[0] -= 1
            is_last = left[0] == 0
            if is_last:
                self.busy -= 1
                if self.busy == 0:
                    self.counters.reading += time.perf_counter() - self.busy_since
        if not is_last:
            return
        if len(left) == 1:
            begin = panels.ctypes.data
            self.fast[_deliver](layer.where[key[1]].ctypes.data, *(begin + each.at for each in layer.ways))
        else:
            self.owner[slot] = -1
            del self.slot_of[key]
            self.free.append(slot)
        done.set_result(None)

    def _bytes(self, info: TensorInfo, begin: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes] of a tensor, read whole sectors at a time."""
        offset = info.offset + begin
        first = offset - offset % SECTOR
        wanted = -(-(offset + nbytes - first) // SECTOR) * SECTOR
        buffer, done = self._buffer(wanted), 0
        while first + done < offset + nbytes:
            count = os.preadv(self.handles[info.part], [memoryview(buffer)[done:wanted]], first + done)  # type: ignore[arg-type]
            if count == 0:
                raise GGUFError(f"the file ended inside of {info.name!r}; it was cut after it was opened")
            done += count
        with self.lock:
            self.counters.bytes += done
        return buffer[offset - first : offset - first + nbytes]

    def _buffer(self, nbytes: int) -> np.ndarray:
        """The calling thread's own, at a multiple of a sector."""
        local = _LOCAL.__dict__
        have = local.get("buffer")
        if have is None or len(have) < nbytes:
            raw = np.empty(nbytes + SECTOR, np.uint8)
            skip = -raw.ctypes.data % SECTOR
            have = local["buffer"] = raw[skip : skip + nbytes]
        return have


_LOCAL = threading.local()


def _rouse(words):
    wake(words, POSTED)


# --- How long reading takes: for `auto` and `giant plan`. ---


def reading_seconds(file: GGUFFile, bursts: int = 16, several: int = 6) -> tuple[float, float]:
    """(seconds of a single expert beyond what each costs, seconds of each) when experts at random places are wanted.

    They are read and packed by the very code that serves a model, some at once; medians of `bursts`.
    """
    name = file.architecture
    width, used = file.get(f"{name}.embedding_length", int), file.get(f"{name}.expert_used_count", int)
    blocks = sorted({n.rpartition("ffn_")[0] for n in file.tensors if "_exps." in n})
    count = file.get(f"{name}.expert_count", int)
    residency = Residency(file, width, count, used, len(blocks), is_prefetching=False)
    for layer, block in enumerate(blocks):
        residency.add(layer, _ways_of(file, block))
    several = min(several, count)
    residency.start(max(4 * used, several) * residency.slot_bytes)
    rng, took = np.random.default_rng(0), {1: [], several: []}
    try:
        for number in range(bursts + 2):  # the first two load what packs and fill the pool: then some have to go
            for many, times in took.items():
                residency.words[POSTED // 8] += 1  # a request that wants nothing of the loader
                now, layer = int(residency.words[POSTED // 8]), int(rng.integers(0, len(blocks)))
                away = [e for e in rng.permutation(count).tolist() if (layer, e) not in residency.slot_of]
                began = time.perf_counter()
                for expert in away[:many]:
                    residency._fetch((layer, expert), now)
                wait(list(residency.under_way.values()))
                if number > 1 and len(away) >= many:
                    times.append(time.perf_counter() - began)
                residency.check()
    finally:
        residency.close()
    if not all(took.values()):  # so few experts that all are there
        return 0.0, 0.0
    one, together = (float(np.median(times)) for times in took.values())
    each = max(0.0, together - one) / max(1, several - 1)
    return max(0.0, one - each), each


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

"""The executor: programs of the tape as arrays of records, a loop that runs them, and a team of threads around it.

A helper thread lives inside one compiled, lock-free loop from step to step: returning to Python each time would cost two
hand-overs of its lock. Waiting threads spin for a while and then sleep, for a time measured by the clock.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from organism import Arena, Program, aligned_zeros, body_program, rope_angles
from organs.kernels.ground import (
    FAST,
    FLUSH,
    HELP,
    TILED,
    ZERO,
    atomic_add,
    atomic_load,
    entry,
    external,
    f4,
    f8,
    i8,
    longs,
    pause,
    swap_mode,
    usleep,
)  # fmt: skip
from organs.kernels.operations import BUFFERS, FRACTIONS, KERNELS, MACHINE, NUMBERS, ROW, address, call

if TYPE_CHECKING:
    from organism import Body, Decoder, FieldView, LearningConfig

# --- Programs as records. ---

_bound: dict[int, tuple[list, np.ndarray]] = {}


def records_of(program: Program) -> np.ndarray:
    """The program as an array of ROW, made once; a row's first field is the address of its kernel."""
    key = id(program.steps)
    if key not in _bound:
        rows = np.zeros(len(program.steps), ROW)
        for row, step in zip(rows, program.steps, strict=True):
            row["kernel"] = address(step.kernel)
            for name in BUFFERS:
                row[name] = step.buffers[name].offset if name in step.buffers else -1
            for name in NUMBERS:
                row[name] = step.fields.get(name, 0)
            for name in FRACTIONS:
                row[name] = step.fields.get(name, 1.0)
            for name, place in zip(("weight", "weight2"), step.weights, strict=False):
                row[name] = place.offset
        _bound[key] = (program.steps, rows)  # the list is kept too, so that its id stays its own
        while len(_bound) > 128:
            _bound.pop(next(iter(_bound)))
    return _bound[key][1]


def machine_of(**bases: np.ndarray) -> np.ndarray:
    """One MACHINE whose named bases are these arrays; whoever holds it must keep them alive."""
    m = np.zeros(1, MACHINE)
    m["tiled"] = TILED
    for name, array in bases.items():
        m[name] = array.ctypes.data
    return m


def show_view(machines: np.ndarray, view: FieldView | None) -> tuple:
    """Point machines at a view's arrays; returns what must be kept alive while they look."""
    if view is None:
        return ()
    tree = view.tree
    arrays = dict(starts=view.starts, logmass=view.logmass, scalars=view.scalars, leaf=tree.leaf, rank=tree.rank,
                  shares=tree.log_share, cumulative=tree.cumulative)  # fmt: skip
    for name in ("starts", "logmass", "scalars"):
        arrays[name] = np.ascontiguousarray(arrays[name])
    for name, array in arrays.items():
        machines[name] = array.ctypes.data
    machines["width"], machines["vocabulary"] = view.starts.shape[1], len(tree)
    rows = getattr(view, "rows", None)
    machines["at"] = 0 if rows is None else rows.ctypes.data
    return tuple(arrays.values()), rows


# --- Running. ---


@njit(**HELP)
def run(program, machine):
    for i in range(program.size):
        call(program[i], machine)


@entry(nogil=True, **FAST)
def execute(program, machines):
    """Run a program once on the first machine."""
    old = swap_mode(FLUSH)
    run(program, machines[0])
    swap_mode(old)


@entry(nogil=True, **FAST)
def execute_batch(program, machines, sequences, length, micro):
    """Run a program over sequences, `micro` at a time."""
    old = swap_mode(FLUSH)
    m, s = machines[0], i8(0)
    m.loss, m.length, m.position = 0.0, length, 0
    while s < sequences:
        m.sequences = min(micro, sequences - s)
        m.start, m.rows = s * length, m.sequences * length
        run(program, m)
        s += m.sequences
    swap_mode(old)


@entry(nogil=True, **FAST)
def generate(program, machines, tokens, known, logits):
    """Fill tokens [N] from `known` on with the likeliest token each: one program run a token, no Python between."""
    old = swap_mode(FLUSH)
    m = machines[0]
    for i in range(len(tokens) - 1):
        m.start, m.position = i, i
        run(program, m)
        if i + 1 >= known:
            best = 0
            for j in range(1, len(logits)):
                if logits[j] > logits[best]:
                    best = j
            tokens[i + 1] = best
    swap_mode(old)


# --- The team. ---

_COUNTS = (
    "posted",
    "arrived",
    "round",
    "next",
    "threads",
    "length",
    "micro",
    "sequences",
    "decayed",
    "update",
    "shared",
    "stop",
)
_RATES = ("rate", "decay", "beta1", "beta2", "correct1", "correct2", "epsilon", "clip", "average")
TEAM = np.dtype([(n, i8) for n in _COUNTS] + [(n, f8) for n in _RATES] + [("norm", f8)], align=True)
POSTED, ARRIVED, ROUND, NEXT = (8 * _COUNTS.index(n) for n in ("posted", "arrived", "round", "next"))
POST = 1 << 16  # `posted` counts posts above its low 16 bits, which count the sleepers
BARRIER_NS, IDLE_NS = 300_000, 2_000_000  # how long to spin before sleeping, inside of a step and between two
clock_gettime = external("clock_gettime", "int32(int32, int64)")


@njit(**HELP)
def nanoseconds(slot):
    """The monotonic clock, by way of two words of memory."""
    clock_gettime(np.int32(1), slot)
    words = longs(slot, 2)
    return words[0] * 1000000000 + words[1]


@njit(**HELP)
def barrier(team, slot):
    """Wait until all threads are here."""
    base, spins = team.ctypes.data, 0
    now = atomic_load(base + ROUND)
    if atomic_add(base + ARRIVED, 1) == team[0].threads - 1:
        atomic_add(base + ARRIVED, -team[0].threads)
        atomic_add(base + ROUND, 1)
        return
    since = i8(0)
    while atomic_load(base + ROUND) == now:
        spins += 1
        pause()
        if spins & 63 == 0:
            if since == 0:
                since = nanoseconds(slot)
            elif nanoseconds(slot) - since > BARRIER_NS:
                usleep(np.uint32(50))


@njit(**HELP)
def await_work(team, done, slot):
    """Wait for post number done + 1. False: this thread has signed up as a sleeper and must be woken."""
    base, spins, since = team.ctypes.data, 0, nanoseconds(slot)
    while atomic_load(base + POSTED) // POST == done:
        pause()
        spins += 1
        if spins & 63 == 0 and nanoseconds(slot) - since > IDLE_NS:
            if atomic_add(base + POSTED, 1) // POST == done:
                return False
            atomic_add(base + POSTED, -1)
            return True
    return True


@njit(**HELP)
def post(team):
    """Post one piece of work; returns how many sleepers must be woken."""
    sleepers = atomic_add(team.ctypes.data + POSTED, POST) % POST
    atomic_add(team.ctypes.data + POSTED, -sleepers)
    return sleepers


@njit(**HELP)
def sum_gradients(G, a, b):
    """Add every thread's gradients to the first thread's; returns the squared norm."""
    total = 0.0
    for start in range(a, b, 4096):
        end = min(start + 4096, b)
        g, s = G[0, start:end], ZERO
        for t in range(1, G.shape[0]):
            h = G[t, start:end]
            for i in range(end - start):
                g[i] += h[i]
                h[i] = ZERO
        for i in range(end - start):
            s += g[i] * g[i]
        total += s
    return total


@njit(**HELP)
def adamw(arrays, g, a, b, o, clip, decay):
    """organism.adamw on the numbers a to b; clears their gradients."""
    b1, b2, k, c2 = f4(1 - o.beta1), f4(1 - o.beta2), f4(o.rate / o.correct1), f4(1 / o.correct2)
    eps, keep, near, clip = f4(o.epsilon), f4(1 - o.rate * decay), f4(o.average), f4(clip)
    p, m, w, v, g = arrays[0, a:b], arrays[1, a:b], arrays[2, a:b], arrays[3, a:b], g[a:b]
    for i in range(b - a):
        x = g[i] * clip
        g[i] = ZERO
        mm = m[i] + b1 * (x - m[i])
        ww = w[i] + b2 * (x * x - w[i])
        m[i], w[i] = mm, ww
        q = p[i] * keep - k * mm / (np.sqrt(ww * c2) + eps)
        p[i] = q
        v[i] += near * (q - v[i])


@njit(**HELP)
def next_batch(team, t, s, end):
    """Where this thread's next micro-batch begins: of its own share, or of what is left for all."""
    if team[0].shared:
        return atomic_add(team.ctypes.data + NEXT, team[0].micro)
    return s


@entry(nogil=True, **FAST)
def train(program, machines, team, arrays, G, norms, flag, t):
    """Thread t's part of a step: its sequences' gradients, then its part of their sum, then its part of AdamW."""
    old = swap_mode(FLUSH)
    m, o, size, slot = machines[t], team[0], G.shape[1], norms.ctypes.data + 8 * (8 * t + 2)
    s, end = o.sequences * t // o.threads, o.sequences * (t + 1) // o.threads
    if o.shared:
        end = o.sequences
    m.loss, m.length, m.position, m.inverse = 0.0, o.length, 0, 1 / (o.sequences * o.length)
    s = next_batch(team, t, s, end)
    while s < end:
        while flag[0] != 0:  # somebody speaks
            usleep(np.uint32(200))
        m.sequences = min(o.micro, end - s)
        m.start, m.rows = s * o.length, m.sequences * o.length
        run(program, m)
        s = next_batch(team, t, s + m.sequences, end)
    a, b = size * t // o.threads // 16 * 16, size * (t + 1) // o.threads // 16 * 16
    if o.threads > 1:
        barrier(team, slot)
    norms[t * 8] = sum_gradients(G, a, b)
    if o.threads > 1:
        barrier(team, slot)
    if o.update:
        total = 0.0
        for k in range(o.threads):
            total += norms[k * 8]
        norm = math.sqrt(total)
        clip = min(1.0, o.clip / (norm + 1e-6)) if o.clip > 0 else 1.0
        split = min(max(o.decayed, a), b)
        adamw(arrays, G[0], a, split, o, clip, o.decay)
        adamw(arrays, G[0], split, b, o, clip, 0.0)
        if t == 0:
            o.norm = norm
    if o.threads > 1:
        barrier(team, slot)
    swap_mode(old)


@entry(nogil=True, **FAST)
def lead(program, machines, team, arrays, G, norms, flag):
    """Post a step and do thread 0's part, unless others sleep: then the caller wakes so many, and trains."""
    team[0].next = 0
    sleepers = post(team) if team[0].threads > 1 else 0
    if sleepers == 0:
        train(program, machines, team, arrays, G, norms, flag, i8(0))
    return sleepers


@entry(nogil=True, **FAST)
def serve(program, machines, team, arrays, G, norms, flag, t, done):
    """A helper's life, from step to step without Python. Returns the steps done, to sleep."""
    slot = norms.ctypes.data + 8 * (8 * t + 2)
    while await_work(team, done, slot) and not team[0].stop:
        train(program, machines, team, arrays, G, norms, flag, t)
        done += 1
    return done


# --- What organism.py calls. ---


def default_threads() -> int:
    """The CPUs that this process may use, at most eight."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


MICRO = 4  # sequences whose activations are in memory at a time, a thread


class Gradients:
    """Trains a body on a team of threads; see organism.Trainer. One step at a time.

    `shared`: threads take micro-batches from one pile, so that a busy neighbour costs less; sums then depend on who was
    faster, in the last digits.
    """

    def __init__(self, body: Body, config: LearningConfig, threads: int | None = None, shared: bool = False):
        self.body, self.config, shape, arena = body, config, body.shape, body.arena
        self.threads = max(1, threads or default_threads())
        self.program = body_program(shape, "train", MICRO)
        self.yield_flag = np.zeros(1, np.int64)
        # AdamW walks four arrays side by side: from here on the arena's arrays are rows of one.
        self.arrays = _joined(arena)
        self.G = aligned_zeros(self.threads, arena.trained)
        self.activations = aligned_zeros(self.threads, self.program.size)
        self.angles, self.log_probs = rope_angles(shape.context, *shape.rope), np.zeros(0, np.float32)
        self.machines = np.concatenate([
            machine_of(parameters=self.arrays[0], gradients=g, activations=a, angles=self.angles)
            for g, a in zip(self.G, self.activations, strict=True)
        ])  # fmt: skip
        self.machines["positions"] = shape.context
        self.team, self.norms = np.zeros(1, TEAM), np.zeros(8 * self.threads)
        self.team["threads"], self.team["decayed"], self.team["shared"] = self.threads, arena.decayed, shared
        rows = records_of(self.program)
        self.arguments = rows, self.machines, self.team, self.arrays, self.G, self.norms, self.yield_flag
        self.wake, self.helpers = threading.Semaphore(0), []
        for t in range(1, self.threads):
            helper = threading.Thread(
                target=_help, args=(self.arguments, self.team, self.wake, t), name=f"organism-helper-{t}", daemon=True
            )
            helper.start()
            self.helpers.append(helper)

    def step(self, x: np.ndarray, y: np.ndarray, view: FieldView | None, rate: float, step: int) -> float:
        """One step of AdamW, number `step` from 1, on int64 tokens and targets [B, T]; mean loss in nats."""
        o, c = self.team[0], self.config
        o["rate"], o["decay"], o["clip"], o["epsilon"] = rate, c.weight_decay, c.max_grad_norm, c.epsilon
        o["beta1"], o["beta2"], o["average"] = c.beta1, c.beta2, max(1 - c.average, 1 / (step + 1))
        o["correct1"], o["correct2"] = 1 - c.beta1**step, 1 - c.beta2**step
        return self._run(x, y, view, update=True)

    def of(self, x: np.ndarray, y: np.ndarray, view: FieldView | None) -> tuple[float, np.ndarray]:
        """(mean loss, gradients [arena.trained]) without a step."""
        loss = self._run(x, y, view, update=False)
        flat = self.G[0].copy()
        self.G[0] = 0
        return loss, flat

    def _run(self, x: np.ndarray, y: np.ndarray, view: FieldView | None, update: bool) -> float:
        o, (B, T) = self.team[0], x.shape
        assert x.dtype == y.dtype == np.int64 and x.flags.c_contiguous and y.flags.c_contiguous
        if len(self.log_probs) < x.size:
            self.log_probs = np.zeros(x.size, np.float32)
        kept = show_view(self.machines, view)
        self.machines["tokens"], self.machines["targets"] = x.ctypes.data, y.ctypes.data
        self.machines["log_probs"] = self.log_probs.ctypes.data
        o["sequences"], o["length"], o["update"] = B, T, update
        o["micro"] = max(1, min(MICRO, -(-B // self.threads)))
        sleepers = lead(*self.arguments)
        if sleepers:
            self.wake.release(sleepers)
            train(*self.arguments, 0)
        del kept
        return float(self.machines["loss"].sum() / x.size)

    def close(self) -> None:
        """Send the helpers home."""
        if not self.team[0]["stop"]:
            self.team["stop"] = 1  # seen at the latest when spinning ends
            self.wake.release(self.threads)
            for helper in self.helpers:
                helper.join()

    def __del__(self) -> None:
        if hasattr(self, "team"):
            self.team["stop"] = 1
            self.wake.release(self.threads)


def _help(arguments: tuple, team: np.ndarray, wake: threading.Semaphore, t: int) -> None:
    """A helper thread; it holds the arrays, never the Gradients, so that those can be collected."""
    done = 0
    while not team[0]["stop"]:
        done = serve(*arguments, t, done)
        if team[0]["stop"]:
            return
        wake.acquire()
        if not team[0]["stop"]:
            train(*arguments, t)
            done += 1


def _joined(arena: Arena) -> np.ndarray:
    """The arena's arrays as the rows of one array [4, size], which become the arena's own."""
    joined = aligned_zeros(len(Arena.ARRAYS), arena.size)
    for row, name in zip(joined, Arena.ARRAYS, strict=True):
        row[:] = getattr(arena, name)
        setattr(arena, name, row)
    return joined


def measure(body: Body, x: np.ndarray, y: np.ndarray, view: FieldView | None) -> np.ndarray:
    """float32 [B, T]: ln p of every target, by the averaged weights; see organism.Body.log_probs."""
    shape, (B, T) = body.shape, x.shape
    program = body_program(shape, "measure", MICRO)
    out, activations, angles = (
        np.zeros(x.shape, np.float32),
        _work_space(program.size),
        rope_angles(shape.context, *shape.rope),
    )
    m = machine_of(
        parameters=body.arena.average, activations=activations, angles=angles, tokens=x, targets=y, log_probs=out
    )
    m["positions"], m["inverse"] = shape.context, 1.0
    kept = show_view(m, view)
    execute_batch(records_of(program), m, B, T, MICRO)
    del kept
    return out


_local = threading.local()


def _work_space(size: int) -> np.ndarray:
    """Activations of this thread, kept for its next call."""
    if getattr(_local, "space", None) is None or len(_local.space) < size:
        _local.space = aligned_zeros(size)
    return _local.space


class Speaker:
    """Runs a decoder's program; see organism.Decoder."""

    def __init__(self, decoder: Decoder):
        self.token, self.space, program = np.zeros(1, np.int64), aligned_zeros(decoder.program.size), decoder.program
        self.rows, shape = records_of(program), decoder.shape
        self.kept = decoder.cache, decoder.angles, decoder.body
        self.m = machine_of(parameters=decoder.body.arena.average, activations=self.space, angles=decoder.angles,
                            cache=decoder.cache, tokens=self.token)  # fmt: skip
        self.m["positions"], self.m["sequences"], self.m["length"], self.m["rows"] = 2 * shape.context, 1, 1, 1
        begins = program.steps[-1].buffers["out"].offset
        self.logits = self.space[begins : begins + shape.vocabulary]

    def step(self, token: int, view: FieldView | None, position: int) -> np.ndarray:
        """float32 [V]: logits after one more token."""
        self.token[0], self.m["position"] = token, position
        kept = show_view(self.m, view)
        execute(self.rows, self.m)
        del kept
        return self.logits.copy()

    def generate(self, prompt: Sequence[int], count: int) -> np.ndarray:
        """int64 [prompt + count]: the prompt and the likeliest tokens after it, for a body without a field."""
        tokens = np.zeros(len(prompt) + count, np.int64)
        tokens[: len(prompt)] = prompt
        m = self.m.copy()
        m["tokens"] = tokens.ctypes.data
        generate(self.rows, m, tokens, len(prompt), self.logits)
        return tokens


def warm() -> None:
    """Compile, or load, every kernel and entry point."""
    for name in KERNELS:
        address(name)
    from organism import Body, BodyConfig, LearningConfig

    tokens = np.zeros((2, 8), np.int64)
    body = Body("embryo", 259, BodyConfig(field=False))
    for threads in (1, 2):
        gradients = Gradients(body, LearningConfig(), threads)
        gradients.step(tokens, tokens, None, 1e-3, 1)
        gradients.close()
    measure(body, tokens, tokens, None)
    from organism import Decoder

    decoder = Decoder(body, "numba")
    decoder.feed(0, None)
    decoder.generate([0], 1)

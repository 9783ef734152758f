"""The end of the voice, compiled: body and field blended, and the sampling chain in one pass. The twin of chapter 7.

Arrays, with V tokens and a view of K ranges:

    chain    p float64 [V] (the distribution), q float32 [V] (scratch, then what was drawn from), log_p float32 [V],
             order int64 [V] (tokens that are still in, likeliest first), mass float64 [V], away float64 [V] (scratch of
             those), settings float64 [12] (below)
    blend    logits float32 [V], starts uint16 [K], logmass uint16 [K] (bits of float16), leaf int32 [V], share float64
             [V], cumulative float64 [V+1]: see organism.FieldView and FieldTree
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from organs.kernels.calls import entry
from organs.kernels.ground import FAST, HELP, exp, half, jit, log

if TYPE_CHECKING:
    from organism import FieldView, VoiceConfig

f32 = np.float32
NEVER = f32(-1e9)  # ln p of a banned token; far below any other, and finite, since fastmath knows no infinity

TEMPERATURE, TOP_K, TOP_P, MIN_P, TYPICAL_P, LOW, HIGH, BOOST, FOCUS, ENTROPY = range(
    10
)  # settings; the last is answered


@jit(**HELP)
def _soften(log_p, temperature, q):
    """q becomes softmax(log_p / temperature); returns its entropy in nats."""
    inverse, top = f32(1 / temperature), NEVER
    for t in range(len(log_p)):
        top = max(top, log_p[t])
    total = 0.0
    for t in range(len(log_p)):
        q[t] = exp((log_p[t] - top) * inverse)
        total += q[t]
    share, entropy = f32(1 / total), 0.0
    for t in range(len(q)):
        q[t] *= share
    for t in range(len(q)):
        entropy -= q[t] * log(max(q[t], f32(1e-30)))
    return entropy


@jit(**HELP)
def _best(q, order, most):
    """The `most` likeliest tokens into order, likeliest first, the earlier of equals first; returns how many.

    By insertion: a token of a real distribution seldom displaces one of the forty likeliest. (numba's sort would compile
    for four seconds.)
    """
    count = 0
    for t in range(len(q)):
        if count == most and q[t] <= q[order[count - 1]]:
            continue
        at = count if count < most else count - 1
        while at > 0 and q[order[at - 1]] < q[t]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = t
        count = min(count + 1, most)
    return count


@jit(**HELP)
def _normalised(q, order, count, mass):
    total = 0.0
    for i in range(count):
        total += q[order[i]]
    for i in range(count):
        mass[i] = q[order[i]] / total


@jit(**HELP)
def _keep_typical(q, order, count, share, mass, away):
    """Keep the tokens whose surprise is nearest to the entropy, until they hold `share`; their order stays."""
    _normalised(q, order, count, mass)
    entropy = 0.0
    for i in range(count):
        away[i] = -np.float64(log(f32(max(mass[i], 1e-12))))
        entropy += mass[i] * away[i]
    for i in range(count):
        away[i] = abs(away[i] - entropy)
    held, kept = 0.0, 0
    while kept < count:  # the nearest of those that are left; a kept one moves beyond all others
        best = -1
        for i in range(count):
            if away[i] < 1e9 and (best < 0 or away[i] < away[best]):
                best = i
        held += mass[best]
        away[best] = 1e10
        kept += 1
        if held >= share:
            break
    left = 0
    for i in range(count):
        if away[i] > 1e9:
            order[left] = order[i]
            left += 1
    return left


@jit(**HELP)
def _keep_nucleus(q, order, count, share, mass):
    """Keep the likeliest tokens until they hold `share`."""
    _normalised(q, order, count, mass)
    held = 0.0
    for i in range(count):
        held += mass[i]
        if held >= share:
            return i + 1
    return count


@entry(**FAST)
def choose(p, produced, banned, frequency, presence, settings, draw, log_p, q, order, mass, away):
    """One token: penalties, temperature, top-k, min-p, typical-p, top-p, and the draw, a number in [0, 1).

    produced int64 [n]: what the penalties see. banned int64 [m]. q is left as the distribution that was drawn from, and
    settings[ENTROPY] as the entropy (nats) before the filters.
    """
    for t in range(len(p)):
        log_p[t] = log(f32(max(p[t], 1e-12)))
    for i in range(len(produced)):
        before = False
        for j in range(i):
            before |= produced[j] == produced[i]
        log_p[produced[i]] -= f32(frequency if before else frequency + presence)
    for i in range(len(banned)):
        log_p[banned[i]] = NEVER
    greedy = settings[TEMPERATURE] <= 0
    temperature = 1.0 if greedy else settings[TEMPERATURE]
    entropy = _soften(log_p, temperature, q)
    settings[ENTROPY] = entropy
    if greedy:
        best = np.int64(0)
        for t in range(len(log_p)):
            if log_p[t] > log_p[best]:
                best = t
        return best
    factor = settings[BOOST] if entropy < settings[LOW] else settings[FOCUS] if entropy > settings[HIGH] else 1.0
    if factor != 1.0:
        _soften(log_p, temperature * factor, q)
    size = len(p)
    most = min(size, np.int64(settings[TOP_K])) if settings[TOP_K] > 0 else size
    count = _best(q, order, most)
    floor, kept = settings[MIN_P] * q[order[0]], 0
    while kept < count and q[order[kept]] >= floor:
        kept += 1
    if settings[TYPICAL_P] < 1 and kept > 1:
        kept = _keep_typical(q, order, kept, settings[TYPICAL_P], mass, away)
    if settings[TOP_P] < 1:
        kept = _keep_nucleus(q, order, kept, settings[TOP_P], mass)
    _normalised(q, order, kept, mass)
    for t in range(size):
        q[t] = f32(0)
    for i in range(kept):
        q[order[i]] = mass[i]
    held, last = 0.0, np.int64(0)
    for t in range(size):  # in the order of tokens, as numpy's choice draws
        if q[t] > 0:
            held, last = held + q[t], t
            if draw < held:
                return t
    return last


@entry(**FAST)
def blend(logits, starts, logmass, leaf, share, cumulative, g, p):
    """p [V] becomes g · softmax(logits) + (1 - g) · field, the field as a view's ranges spread over their leaves."""
    size, width = len(p), len(starts)
    top, total, norm = logits[0], 0.0, 0.0
    for t in range(size):
        top = max(top, logits[t])
    for t in range(size):
        p[t] = exp(logits[t] - top)
        total += p[t]
    for k in range(width):
        if starts[k] < size:
            norm += exp(half(logmass[k]))
    scale = g / total
    for t in range(size):
        p[t] *= scale
    for k in range(width):
        start = np.int64(starts[k])
        end = np.int64(starts[k + 1]) if k + 1 < width else size
        if start < end:
            level = (1 - g) * exp(half(logmass[k])) / norm / (cumulative[end] - cumulative[start])
            for at in range(start, end):
                p[leaf[at]] += level * share[at]


class Chain:
    """The chain for one reply; see organism.SamplingChain."""

    def __init__(self, config: VoiceConfig, temperature: float, size: int):
        c = config
        self.settings = np.array([temperature, c.top_k, c.top_p, c.min_p, c.typical_p, c.entropy_low, c.entropy_high,
                                  c.entropy_boost, c.entropy_focus, 0.0])  # fmt: skip
        self.penalties = float(c.frequency_penalty), float(c.presence_penalty)
        self.scratch = (np.zeros(size, np.float32), np.zeros(size, np.float32), np.zeros(size, np.int64),
                        np.zeros(size), np.zeros(size))  # fmt: skip

    @property
    def drawn_from(self) -> np.ndarray:
        """float32 [V]: the last distribution that was drawn from."""
        return self.scratch[1]

    def choose(self, p: np.ndarray, produced: list[int], banned: np.ndarray, draw: float) -> tuple[int, float]:
        """(a token, entropy in nats) from p float64 [V]; banned int64 [m]."""
        past = np.array(produced, np.int64)
        token = choose(p, past, banned, *self.penalties, self.settings, draw, *self.scratch)
        return int(token), float(self.settings[ENTROPY])


def blended(logits: np.ndarray, view: FieldView, g: float) -> np.ndarray:
    """float64 [V]: what organism.Voice._blend says, of logits float32 [V] and a view of one row."""
    tree, p = view.tree, np.empty(len(logits))
    blend(logits, view.starts[0], view.logmass[0].view(np.uint16), tree.leaf, tree.share, tree.cumulative, g, p)
    return p


def warm() -> None:
    """Compile, or load, both entry points."""
    from organism import FieldTree, FieldView, VoiceConfig

    tree = FieldTree([bytes([i]) for i in range(256)])
    view = FieldView(np.zeros((1, 1), np.uint16), np.zeros((1, 1), np.float16), np.zeros((1, 6), np.float16), tree)
    p = blended(np.zeros(256, np.float32), view, 0.5)
    Chain(VoiceConfig(), 1.0, 256).choose(p, [1], np.zeros(1, np.int64), 0.5)

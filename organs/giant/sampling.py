"""The sampling chain: logits in, one token out, compiled.

In llama.cpp's order: logit bias and penalties, what a grammar allows, top-k, typical-p, top-p, min-p, temperature, one
draw. Each cut renormalises what the one before left. The logits are read in one pass, which also notes the largest of
every 64: the k-th largest of those bounds the k likeliest tokens from below, so only k blocks of 64 are looked at again.
Nothing is ever sorted but a handful: a cut by mass finds its threshold in a histogram, and sorts one bin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
from numba import njit

import organs.kernels  # noqa: F401  says where compiled code is kept, before numba is imported
from organism import UsageError

BLOCK = 64  # logits whose largest is noted
BINS = 2048  # of the histogram of a cut
LOWEST = np.float32(-1e30)  # stands for minus infinity and for NaN
ABSENT = np.float32(-1e29)  # anything below cannot be drawn


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Raises UsageError, in one sentence, for settings that are impossible."""

    temperature: float = 0.7  # 0: always the likeliest
    top_k: int = 40  # likeliest tokens kept; 0: all
    top_p: float = 0.95  # probability mass kept, likeliest first; 1: all
    min_p: float = 0.05  # tokens below this share of the likeliest are dropped; 0: none
    typical_p: float = 1.0  # mass kept of the tokens nearest to the mean surprise; 1: all (arXiv 2202.00666)
    repetition_penalty: float = (
        1.0  # positive logits of what was said are divided by it, negative multiplied (1909.05858)
    )
    presence_penalty: float = 0.0  # taken off a logit if the token was said
    frequency_penalty: float = 0.0  # taken off for each time it was said
    penalty_window: int = 64  # last tokens that count as said
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these tokens; ±inf will do
    seed: int | None = None  # of the draws; None: another every time

    def __post_init__(self):
        limits = {
            "temperature": (0, 100), "top_k": (0, 10**9), "top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1),
            "repetition_penalty": (0.01, 100), "presence_penalty": (-100, 100), "frequency_penalty": (-100, 100),
            "penalty_window": (0, 10**9),
        }  # fmt: skip
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            whole = name in ("top_k", "penalty_window")
            kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
                kind = "a whole number" if whole else "a number"
                raise UsageError(f"{name} is {value!r}: it must be {kind} from {least} to {most:g}.")
        if self.seed is not None and (not isinstance(self.seed, (int, np.integer)) or self.seed < 0):
            raise UsageError(f"seed is {self.seed!r}: it must be a whole number, 0 or more.")

    @classmethod
    def of(cls, **settings: object) -> Sampling:
        """From keyword arguments, where a name that does not exist is a UsageError; None means the default."""
        names = [f.name for f in fields(cls)]
        if wrong := sorted(set(settings) - set(names)):
            raise UsageError(f"There is no sampling setting {wrong[0]!r}: they are {', '.join(names)}.")
        return cls(**{name: value for name, value in settings.items() if value is not None})  # type: ignore[arg-type]


class Candidate(NamedTuple):
    """A token and the natural logarithm of the probability that the model gives it, before any setting."""

    token: int
    logprob: float


class Sampler:
    """Draws tokens by one set of settings; `choose` is all there is. Not for two threads at a time."""

    def __init__(self, settings: Sampling, vocab_size: int):
        self.settings = settings
        self.rng = np.random.Generator(np.random.PCG64(settings.seed))
        biased = {int(t): float(b) for t, b in settings.logit_bias.items()}
        if wrong := [t for t in biased if not 0 <= t < vocab_size]:
            raise UsageError(f"logit_bias names token {wrong[0]}, and the model has tokens 0 to {vocab_size - 1}.")
        self._biased = np.array(list(biased), np.int64)
        self._bias = np.array(list(biased.values()), np.float32)
        s = settings
        self._numbers = np.array([s.temperature, s.top_p, s.min_p, s.typical_p, s.repetition_penalty, s.presence_penalty,
                                  s.frequency_penalty])  # fmt: skip
        blocks = -(-vocab_size // BLOCK)
        self._work, self._largest = np.empty(blocks * BLOCK, np.float32), np.empty(blocks, np.float32)
        self._ids, self._keys = np.empty(vocab_size, np.int64), np.empty((3, vocab_size), np.float32)

    def choose(self, logits: np.ndarray, said: Sequence[int] = (), allowed: np.ndarray | None = None) -> int:
        """One token. logits float32 [V], unchanged; said: the tokens so far; allowed: bool [V], if not all are.

        Raises UsageError where nothing is left to draw from (a bias or a grammar that forbids everything).
        """
        window = self.settings.penalty_window
        recent = np.asarray(said[-window:] if window else (), np.int64)
        tokens, counts = (
            np.unique(recent, return_counts=True) if len(recent) and self._penalised else (recent[:0], recent[:0])
        )
        mask = _EVERYTHING if allowed is None else allowed
        token = _choose(logits, mask, tokens, counts, self._biased, self._bias, self._numbers, self.settings.top_k,
                        self.rng.random(), self._work, self._largest, self._ids, self._keys)  # fmt: skip
        if token < 0:
            raise UsageError("No token may be drawn: the logit bias or the grammar forbids all of them.")
        return token

    @property
    def _penalised(self) -> bool:
        s = self.settings
        return s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0


_EVERYTHING = np.ones(0, np.bool_)


def logprobs(logits: np.ndarray, token: int, top: int = 0) -> tuple[Candidate, list[Candidate]]:
    """The log-probability of a token, and of the `top` likeliest, in nats, of the model's own distribution."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    best = np.argpartition(-x, top - 1)[:top] if 0 < top < len(x) else np.arange(len(x) if top else 0)
    best = best[np.argsort(-x[best], kind="stable")]
    return Candidate(token, float(x[token])), [Candidate(int(t), float(x[t])) for t in best]


# --- Compiled. ---

_STRICT = dict(cache=True, nogil=True, error_model="numpy")
_FAST = dict(_STRICT, fastmath=True)


@njit(**_STRICT)
def _clean(logits, allowed, work):
    """Copy, with what is not finite or not allowed at LOWEST; the end of the last block is filled up with that."""
    n = len(logits)
    if len(allowed):
        for i in range(n):
            x = logits[i]
            work[i] = x if allowed[i] and x > LOWEST else LOWEST
    else:
        for i in range(n):
            x = logits[i]
            work[i] = x if x > LOWEST else LOWEST
    work[n:] = LOWEST


@njit(**_FAST)
def _block_maxima(work, largest):
    for b in range(len(largest)):
        row = work[b * BLOCK : (b + 1) * BLOCK]
        top = LOWEST
        for i in range(BLOCK):
            top = max(top, row[i])
        largest[b] = top


@njit(**_FAST)
def _exp(x):
    """e ** x within 3e-6 relative for -87 < x <= 0, by 2 ** n times a polynomial on ±½; 0 below."""
    z = max(x * np.float32(1.4426950408889634), np.float32(-127))
    n = np.int32(z - np.float32(0.5))
    r = z - np.float32(n)
    p = np.float32(0.00133336)
    for c in (0.00961814, 0.05550411, 0.24022651, 0.69314718, 1.0):
        p = p * r + np.float32(c)
    return p * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(**_FAST)
def _weigh(x, n, top, scale, out):
    """out = exp((x - top) · scale) of the first n; returns their sum."""
    total = np.float32(0)
    for i in range(n):
        w = _exp((x[i] - top) * scale)
        out[i] = w
        total += w
    return total


@njit(**_STRICT)
def _penalise(work, tokens, counts, repetition, presence, frequency):
    for i in range(len(tokens)):
        x = work[tokens[i]]
        if x > ABSENT:
            x = x / repetition if x > 0 else x * repetition
            work[tokens[i]] = x - frequency * counts[i] - presence


@njit(**_STRICT)
def _likeliest(work, largest, k, ids, x):
    """Candidates in order of ids: all, or at least the k likeliest (all that reach the k-th largest maximum of a block)."""
    bound = ABSENT
    if 0 < k < len(largest):
        bound = max(bound, np.partition(largest, len(largest) - k)[len(largest) - k])
    n = 0
    for b in range(len(largest)):
        if largest[b] >= bound:
            for i in range(b * BLOCK, (b + 1) * BLOCK):
                if work[i] >= bound and work[i] > ABSENT:
                    ids[n], x[n] = i, work[i]
                    n += 1
    return n


@njit(**_STRICT)
def _keep(flags, n, ids, x):
    """Close ranks over what was not kept."""
    m = 0
    for i in range(n):
        if flags[i]:
            ids[m], x[m] = ids[i], x[i]
            m += 1
    return m


@njit(**_STRICT)
def _cut_to(k, n, ids, x):
    """Keep the k likeliest of n candidates, the lower id of equals."""
    order = np.argsort(-x[:n], kind="mergesort")
    flags = np.zeros(n, np.bool_)
    flags[order[:k]] = True
    return _keep(flags, n, ids, x)


@njit(**_STRICT)
def _cut_by_mass(keys, mass, n, p, ids, x):
    """Keep the candidates with the smallest keys until their mass reaches p; at least one."""
    least, most = keys[0], keys[0]
    for i in range(n):
        least, most = min(least, keys[i]), max(most, keys[i])
    scale = np.float32((BINS - 1) / max(most - least, np.float32(1e-20)))
    sums = np.zeros(BINS, np.float64)
    for i in range(n):
        sums[int((keys[i] - least) * scale)] += mass[i]
    edge, before = 0, 0.0
    while edge < BINS - 1 and before + sums[edge] < p:
        before += sums[edge]
        edge += 1
    flags = np.zeros(n, np.bool_)
    inside = np.empty(n, np.int64)
    m = 0
    for i in range(n):
        bin_ = int((keys[i] - least) * scale)
        flags[i] = bin_ < edge
        if bin_ == edge:
            inside[m] = i
            m += 1
    order = np.argsort(keys[inside[:m]], kind="mergesort")
    for j in range(m):
        flags[inside[order[j]]] = True
        before += mass[inside[order[j]]]
        if before >= p:
            break
    return _keep(flags, n, ids, x)


@njit(**_FAST)
def _probabilities(x, n, top, out):
    total = _weigh(x, n, top, np.float32(1), out)
    for i in range(n):
        out[i] /= total
    return total


@njit(**_STRICT)
def _typical_keys(x, n, top, total, p, out):
    """How far each candidate's surprise is from their mean, the entropy."""
    shift = top + np.log(total)
    entropy = 0.0
    for i in range(n):
        entropy += p[i] * (shift - x[i])
    for i in range(n):
        out[i] = abs(shift - x[i] - entropy)


@njit(**_STRICT)
def _choose(logits, allowed, tokens, counts, biased, bias, numbers, top_k, draw, work, largest, ids, keys):
    """One token, or -1 where none may be drawn. numbers: temperature, top_p, min_p, typical_p, then the penalties."""
    temperature, top_p, min_p, typical_p = numbers[0], numbers[1], numbers[2], numbers[3]
    _clean(logits, allowed, work)
    for i in range(len(biased)):
        if work[biased[i]] > ABSENT:
            work[biased[i]] = max(LOWEST, min(work[biased[i]] + bias[i], -LOWEST))
    _penalise(work, tokens, counts, numbers[4], numbers[5], numbers[6])
    _block_maxima(work, largest)
    top = largest.max()
    if top <= ABSENT:
        return -1
    if temperature == 0:
        block = np.argmax(largest)
        return block * BLOCK + np.argmax(work[block * BLOCK : (block + 1) * BLOCK])
    x, mass, other = keys[0], keys[1], keys[2]
    n = _likeliest(work, largest, top_k, ids, x)
    if 0 < top_k < n:
        n = _cut_to(top_k, n, ids, x)
    if typical_p < 1 and n > 1:
        total = _probabilities(x, n, top, mass)
        _typical_keys(x, n, top, total, mass, other)
        n = _cut_by_mass(other, mass, n, typical_p, ids, x)
        top = x[:n].max()
    if top_p < 1 and n > 1:
        _probabilities(x, n, top, mass)
        for i in range(n):
            other[i] = top - x[i]
        n = _cut_by_mass(other, mass, n, top_p, ids, x)
    if min_p > 0 and n > 1:
        bound = top + np.log(min_p)
        n = _keep(x[:n] >= bound, n, ids, x)
    total = _weigh(x, n, top, np.float32(1 / temperature), mass)
    left = draw * total
    for i in range(n):
        left -= mass[i]
        if left < 0:
            return ids[i]
    return ids[np.argmax(x[:n])]  # rounding left a hair of the draw over

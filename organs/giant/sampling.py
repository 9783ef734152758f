"""The sampling chain: logits in, one token out, compiled.

In llama.cpp's order: logit bias and penalties, what a grammar allows, top-k, typical-p, top-p, min-p, temperature, one
draw. Each cut renormalises what the one before left. The logits are read in one pass, which also notes the largest of
every 64: the k-th largest of those bounds the k likeliest tokens from below, so only k blocks of 64 are looked at again.
Nothing is ever sorted but a handful: the k-th largest is found digit by digit, and a cut by mass finds its threshold in a
histogram and sorts one bin. One C function does it all in memory that it is given, so it runs without numba.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

from organism import UsageError
from organs.giant.engine import record_at
from organs.giant.lanes import c_function, ground, jit

BLOCK = 64  # logits whose largest is noted
BINS = 2048  # of the histogram of a cut
LOWEST = np.float32(-1e30)  # stands for minus infinity and for NaN
REACH = np.float32(12)  # below the likeliest: in most texts nearly all probability is above
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
        blocks = -(-vocab_size // BLOCK)
        room = dict(work=np.empty(blocks * BLOCK, np.float32), largest=np.empty(blocks, np.float32),
                    ids=np.empty(vocab_size, np.int64), keys=np.empty(3 * vocab_size + BLOCK, np.float32),
                    flags=np.empty(vocab_size, np.uint8), order=np.empty(BINS + vocab_size, np.int64))  # fmt: skip
        self._room, self._chain = room, np.zeros(1, CHAIN)
        for name, array in (room | dict(biased=self._biased, bias=self._bias)).items():
            self._chain[name] = array.ctypes.data
        self._chain["vocabulary"], self._chain["n_biased"] = vocab_size, len(biased)
        for name in CHAIN.names or ():
            if hasattr(settings, name):
                self._chain[name] = getattr(settings, name)

    def choose(self, logits: np.ndarray, said: Sequence[int] = (), allowed: np.ndarray | None = None) -> int:
        """One token. logits float32 [V], unchanged; said: the tokens so far; allowed: bool [V], if not all are.

        Raises UsageError where nothing is left to draw from (a bias or a grammar that forbids everything).
        """
        window = self.settings.penalty_window
        recent = np.asarray(said[-window:] if window else (), np.int64)
        tokens, counts = (
            np.unique(recent, return_counts=True) if len(recent) and self._penalised else (recent[:0], recent[:0])
        )
        scores = np.ascontiguousarray(logits, np.float32)
        mask = None if allowed is None else np.ascontiguousarray(allowed, np.bool_)
        tokens, counts = tokens.astype(np.int64, copy=False), counts.astype(np.int64, copy=False)
        c = self._chain
        c["logits"], c["allowed"] = scores.ctypes.data, 0 if mask is None else mask.ctypes.data
        c["said"], c["counts"], c["n_said"] = tokens.ctypes.data, counts.ctypes.data, len(tokens)
        c["draw"] = self.rng.random()
        chain()(c.ctypes.data)
        token = int(c["chosen"][0])
        if token < 0:
            raise UsageError("No token may be drawn: the logit bias or the grammar forbids all of them.")
        return token

    @property
    def _penalised(self) -> bool:
        s = self.settings
        return s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0


def logprobs(logits: np.ndarray, token: int, top: int = 0) -> tuple[Candidate, list[Candidate]]:
    """The log-probability of a token, and of the `top` likeliest, in nats, of the model's own distribution."""
    x = logits.astype(np.float64)
    x -= x.max()
    x -= np.log(np.exp(x).sum())
    best = np.argpartition(-x, top - 1)[:top] if 0 < top < len(x) else np.arange(len(x) if top else 0)
    best = best[np.argsort(-x[best], kind="stable")]
    return Candidate(token, float(x[token])), [Candidate(int(t), float(x[t])) for t in best]


# --- Compiled. Everything by address; the record of a chain says where what is. ---

CHAIN = np.dtype(
    [(n, np.int64) for n in ("logits", "allowed", "said", "counts", "biased", "bias",  # 0: all tokens are allowed
                             "work", "largest", "ids", "keys", "flags", "order",  # room: see Sampler
                             "vocabulary", "n_said", "n_biased", "top_k", "chosen")]
    + [(n, np.float64) for n in ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
                                 "frequency_penalty", "draw")], align=True)  # fmt: skip
f4, i4, i8, floats, longs, octets = np.float32, np.int32, np.int64, ground.floats, ground.longs, ground.octets
_STRICT = {**ground.HELP, "fastmath": False}  # minus infinity and NaN are what they are
_FAST = ground.HELP
_chain = record_at(CHAIN)


@jit(**_STRICT)
def _clean(c):
    """Copy the logits, with what is not finite or not allowed at LOWEST; the last block is filled up with that."""
    n, blocks = c.vocabulary, _blocks(c)
    logits, work = floats(c.logits, 0, n), floats(c.work, 0, blocks * BLOCK)
    if c.allowed:
        allowed = octets(c.allowed, 0, n)
        for i in range(n):
            x = logits[i]
            work[i] = x if allowed[i] and x > LOWEST else LOWEST
    else:
        for i in range(n):
            x = logits[i]
            work[i] = x if x > LOWEST else LOWEST
    for i in range(n, blocks * BLOCK):
        work[i] = LOWEST


@jit(**_STRICT)
def _blocks(c):
    return (c.vocabulary + BLOCK - 1) // BLOCK


@jit(**_FAST)
def _block_maxima(work, largest, blocks):
    for b in range(blocks):
        row = floats(work, b * BLOCK, BLOCK)
        top = LOWEST
        for i in range(BLOCK):
            top = max(top, row[i])
        largest[b] = top


@jit(**_FAST)
def _weigh(x, n, top, scale, out):
    """out = exp((x - top) · scale) of the first n; returns their sum."""
    total = f4(0)
    for i in range(n):
        w = ground.exp((x[i] - top) * scale)
        out[i] = w
        total += w
    return total


@jit(**_STRICT)
def _bias_and_penalise(c, work):
    biased, bias = longs(c.biased, c.n_biased), floats(c.bias, 0, c.n_biased)
    for i in range(c.n_biased):
        if work[biased[i]] > ABSENT:
            work[biased[i]] = max(LOWEST, min(work[biased[i]] + bias[i], -LOWEST))
    said, counts = longs(c.said, c.n_said), longs(c.counts, c.n_said)
    for i in range(c.n_said):
        x = work[said[i]]
        if x > ABSENT:
            x = x / c.repetition_penalty if x > 0 else x * c.repetition_penalty
            work[said[i]] = x - c.frequency_penalty * counts[i] - c.presence_penalty


@jit(**_STRICT)
def _greatest(x, n):
    """(the largest of n, its index)."""
    best = i8(0)
    for i in range(n):
        if x[i] > x[best]:
            best = i
    return x[best], best


@jit(**_STRICT)
def _digits(x):
    """An integer from 0 to 2³² that grows as a float32 does."""
    bits = i8(ground.as_int(x)) & 0xFFFFFFFF
    return 0xFFFFFFFF - bits if bits >> 31 else bits | 0x80000000


@jit(**_STRICT)
def _kth_largest(x, n, k, bins):
    """The k-th largest of n >= k, byte by byte of its digits; bins: room for 256 int64."""
    known, mask = i8(0), i8(0)
    for shift in (24, 16, 8, 0):
        for i in range(256):
            bins[i] = 0
        for i in range(n):
            digits = _digits(x[i])
            if digits & mask == known:
                bins[(digits >> shift) & 255] += 1
        digit = i8(255)
        while bins[digit] < k:
            k -= bins[digit]
            digit -= 1
        known |= digit << shift
        mask |= i8(255) << shift
    bits = known & 0x7FFFFFFF if known >> 31 else 0xFFFFFFFF - known
    return ground.as_float(i4(bits))


@jit(**_STRICT)
def _reaching(c, bound, work, largest, ids, x):
    """How many candidates are not below a bound; they are listed in order of ids."""
    n = i8(0)
    for b in range(_blocks(c)):
        if largest[b] >= bound:
            for i in range(b * BLOCK, (b + 1) * BLOCK):
                if work[i] >= bound and work[i] > ABSENT:
                    ids[n], x[n] = i, work[i]
                    n += 1
    return n


@jit(**_STRICT)
def _keep(flags, n, ids, x):
    """Close ranks over what was not kept."""
    m = i8(0)
    for i in range(n):
        if flags[i]:
            ids[m], x[m] = ids[i], x[i]
            m += 1
    return m


@jit(**_STRICT)
def _cut_to(k, n, ids, x, flags, bins):
    """Keep the k likeliest of n candidates, the lower id of equals."""
    bound = _kth_largest(x, n, k, bins)
    equals = k
    for i in range(n):
        equals -= x[i] > bound
    for i in range(n):
        flags[i] = x[i] > bound
        if x[i] == bound and equals > 0:
            flags[i] = 1
            equals -= 1
    return _keep(flags, n, ids, x)


@jit(**_STRICT)
def _sift(order, keys, root, n):
    """Let an index sink in a heap whose top is the largest key, of equals the largest index."""
    moving = order[root]
    while 2 * root + 1 < n:
        child = 2 * root + 1
        if child + 1 < n and _is_before(order[child], order[child + 1], keys):
            child += 1
        if not _is_before(moving, order[child], keys):
            break
        order[root] = order[child]
        root = child
    order[root] = moving


@jit(**_STRICT)
def _is_before(i, j, keys):
    return keys[i] < keys[j] or (keys[i] == keys[j] and i < j)


@jit(**_STRICT)
def _sort(order, keys, n):
    """Put n indices in order of their keys, equals in order of their own."""
    for at in range(n // 2):
        _sift(order, keys, n // 2 - 1 - at, n)
    for at in range(n - 1):
        last = n - 1 - at
        order[0], order[last] = order[last], order[0]
        _sift(order, keys, i8(0), last)


@jit(**_STRICT)
def _cut_by_mass(c, keys, mass, n, p, ids, x, flags):
    """Keep the candidates with the smallest keys until their mass reaches p; at least one."""
    least, most = keys[0], keys[0]
    for i in range(n):
        least, most = min(least, keys[i]), max(most, keys[i])
    scale = f4((BINS - 1) / max(most - least, f4(1e-20)))
    sums, inside = ground.doubles(c.order, BINS), longs(c.order + 8 * BINS, n)
    for i in range(BINS):
        sums[i] = 0.0
    for i in range(n):
        sums[i8((keys[i] - least) * scale)] += mass[i]
    edge, before = i8(0), 0.0
    while edge < BINS - 1 and before + sums[edge] < p:
        before += sums[edge]
        edge += 1
    m = i8(0)
    for i in range(n):
        bin_ = i8((keys[i] - least) * scale)
        flags[i] = bin_ < edge
        if bin_ == edge:
            inside[m] = i
            m += 1
    _sort(inside, keys, m)
    for j in range(m):
        flags[inside[j]] = 1
        before += mass[inside[j]]
        if before >= p:
            break
    return _keep(flags, n, ids, x)


@jit(**_FAST)
def _probabilities(x, n, top, out):
    total = _weigh(x, n, top, f4(1), out)
    for i in range(n):
        out[i] /= total
    return total


@jit(**_STRICT)
def _typical_keys(x, n, top, total, p, out):
    """How far each candidate's surprise is from their mean, the entropy."""
    shift = top + f4(math.log(total))
    entropy = 0.0
    for i in range(n):
        entropy += p[i] * (shift - x[i])
    for i in range(n):
        out[i] = abs(shift - x[i] - entropy)


@jit(**_STRICT)
def _candidates(c, top, work, largest, ids, x, mass):
    """(how many, share): tokens that the cuts to come must look at, and what share of all probability they have.

    With top-k, all that reach the k-th largest maximum of a block. Else, what min-p will keep anyway; or, for top-p, what is
    within REACH of the likeliest if that is mass enough. All others cannot be drawn.
    """
    blocks, bound, is_cut = _blocks(c), ABSENT, 0 < c.top_k < c.vocabulary
    if is_cut and c.top_k < blocks:
        bound = max(bound, _kth_largest(largest, blocks, c.top_k, longs(c.order, 256)))
    elif not is_cut and c.typical_p >= 1 and c.min_p > 0:
        bound = f4(top + math.log(c.min_p))
    elif not is_cut and c.typical_p >= 1 and c.top_p < 1:
        bound = top - REACH
    n = _reaching(c, bound, work, largest, ids, x)
    if is_cut or c.typical_p < 1 or c.top_p >= 1:
        return n, 1.0
    whole = _weigh(work, blocks * BLOCK, top, f4(1), mass)
    share = _weigh(x, n, top, f4(1), mass) / whole
    if c.min_p <= 0 and share < c.top_p:
        return _reaching(c, ABSENT, work, largest, ids, x), 1.0
    return n, share


@jit(**_STRICT)
def _chosen(c):
    """One token, or -1 where none may be drawn."""
    V, blocks = c.vocabulary, _blocks(c)
    work, largest, ids = floats(c.work, 0, blocks * BLOCK), floats(c.largest, 0, blocks), longs(c.ids, V)
    x, mass, other = floats(c.keys, 0, V), floats(c.keys, V, V + BLOCK), floats(c.keys, 2 * V + BLOCK, V)
    flags = octets(c.flags, 0, V)
    _clean(c)
    _bias_and_penalise(c, work)
    _block_maxima(c.work, largest, blocks)
    top, block = _greatest(largest, blocks)
    if top <= ABSENT:
        return i8(-1)
    if c.temperature == 0:
        return block * BLOCK + _greatest(floats(c.work, block * BLOCK, BLOCK), BLOCK)[1]
    n, share = _candidates(c, top, work, largest, ids, x, mass)
    if 0 < c.top_k < n:
        n = _cut_to(c.top_k, n, ids, x, flags, longs(c.order, 256))
    if c.typical_p < 1 and n > 1:
        total = _probabilities(x, n, top, mass)
        _typical_keys(x, n, top, total, mass, other)
        n = _cut_by_mass(c, other, mass, n, c.typical_p, ids, x, flags)
        top = _greatest(x, n)[0]
    if c.top_p < 1 and n > 1:
        _probabilities(x, n, top, mass)
        for i in range(n):
            other[i] = top - x[i]
        n = _cut_by_mass(c, other, mass, n, c.top_p / share, ids, x, flags)
    if c.min_p > 0 and n > 1:
        bound = top + math.log(c.min_p)
        for i in range(n):
            flags[i] = x[i] >= bound
        n = _keep(flags, n, ids, x)
    left = c.draw * _weigh(x, n, top, f4(1 / c.temperature), mass)
    for i in range(n):
        left -= mass[i]
        if left < 0:
            return ids[i]
    return ids[_greatest(x, n)[1]]  # rounding left a hair of the draw over


def _choose(address):
    """`chosen` becomes the token that the chain at an address draws."""
    c = _chain(address)
    c.chosen = _chosen(c)


@functools.cache
def chain() -> Callable[[int], None]:
    """_choose, compiled or loaded."""
    return c_function(_choose, **ground.FAST)

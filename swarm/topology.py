"""Field coherence: how alike the organisms of a colony have become, who resonates with whom, and who stands apart.

A gamma is how far an organism's embedding has moved since birth (chapter 6). Those of a colony are aligned by the byte tokens,
which all have under the same ids, and compared where they are of one width: the cosine of the two as vectors. Coherence is
the mean over all comparable pairs; a pair above RESONANCE resonates; an outlier is one whose own mean lies OUTLYING below
the coherence (spec/molequla.md §1.14).

Drift is what became of a gamma since the last look: how far it turned, and by which share of itself it grew or shrank. "Is it
me, or everyone?" is answered by how many of the others drift as well.

Where they are many, the product of all pairs would take seconds. Coherence and outliers need only each one's mean cosine with all
others, which is its product with the sum of all: exact, in two passes. Each pair is then told from *sketches* (Charikar et al. 2002):
columns, each under a sign by chance, are summed into SKETCH numbers, whose cosine is on average that of the gammas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from organism import Organism

RESONANCE = 0.8
OUTLYING = 0.3
TURNED = 0.3  # 1 - cosine with itself at the last look, above which one drifts (as far as an outlier stands apart)
GREW = 2.0  # change of the norm, as a share of the norm before, above which one drifts (§1.14)
BYTES = 256  # tokens that every vocabulary begins with
LEAST = 1e-6  # norm of a gamma that has a direction
COLUMNS = 8192  # of gammas that are multiplied at a time, so that no copy of all is made
MANY = 128  # gammas above which sketches tell the pairs
SKETCH = 8192  # numbers of a sketch: it misses a cosine c by (1 - c²)/√SKETCH, 0.011 at most, as a standard deviation


class Drift(NamedTuple):
    """Since the last look. turn: 1 - cosine, in [0, 2]; growth: share of the norm before; everyone: whether most of those
    who can be compared drift as well (then it is not this one that changed, but what all of them meet)."""

    turn: float
    growth: float
    everyone: bool = False

    @property
    def counts(self) -> bool:
        """Whether it is more than learning does between two looks."""
        return self.turn > TURNED or self.growth > GREW


class Topology(NamedTuple):
    """ids [n]; cosines float32 [n, n], NaN where two cannot be compared (of more than MANY: from sketches, and resonances too);
    coherence in [-1, 1], None below two."""

    ids: list[str]
    cosines: np.ndarray
    coherence: float | None
    resonances: list[tuple[str, str, float]]
    outliers: list[str]


def gamma_blob(life: Organism) -> bytes:
    """An organism's gamma of the byte tokens as float32 [256, width], row by row."""
    body = life.published.body
    now, birth = np.asarray(body.arena["embedding"]), np.asarray(body.birth)
    return np.ascontiguousarray(now[:BYTES] - birth[:BYTES], np.float32).tobytes()


def topology(gammas: Mapping[str, np.ndarray]) -> Topology:
    """Of gammas of any shapes: float32, each flattened; those of one size are compared."""
    ids = list(gammas)
    flat = [np.ascontiguousarray(gammas[id], np.float32).reshape(-1) for id in ids]
    norms = np.array([math.sqrt(gamma @ gamma) for gamma in flat])
    cosines = np.full((len(ids), len(ids)), np.nan, np.float32)
    sums, counts = np.zeros(len(ids)), np.zeros(len(ids))  # of each one's cosines with others
    for size in {gamma.size for gamma in flat}:
        rows = [k for k, gamma in enumerate(flat) if gamma.size == size and LEAST < norms[k] < np.inf]
        if not rows:
            continue
        group = [flat[k] for k in rows]
        many = len(rows) > MANY and size > SKETCH
        cosines[np.ix_(rows, rows)], sums[rows] = (_sketched if many else _multiplied)(group, norms[rows])
        counts[rows] = len(rows) - 1
    np.fill_diagonal(cosines, np.nan)
    coherence = float(sums.sum() / counts.sum()) if counts.any() else None
    pairs = np.argwhere(np.triu(np.nan_to_num(cosines, nan=-1.0) > RESONANCE, 1))
    resonances = [(ids[a], ids[b], float(cosines[a, b])) for a, b in pairs]
    outliers = [
        id for id, sum_, count in zip(ids, sums, counts)
        if coherence is not None and count and sum_ / count < coherence - OUTLYING
    ]  # fmt: skip
    return Topology(ids, cosines, coherence, resonances, outliers)


def _multiplied(group: list[np.ndarray], norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cosines float32 [n, n], sum of each one's with the others float64 [n]) by products of some columns at a time."""
    n, size = len(group), group[0].size
    cosines, block = np.zeros((n, n), np.float32), np.empty((n, min(COLUMNS, size)), np.float32)
    for begin in range(0, size, COLUMNS):
        part = block[:, : min(COLUMNS, size - begin)]
        for row, gamma, norm in zip(part, group, norms):
            np.multiply(gamma[begin : begin + COLUMNS], np.float32(1 / norm), out=row)
        cosines += part @ part.T  # numpy computes one half of it (syrk)
    return cosines, cosines.sum(axis=1, dtype=np.float64) - 1


def _sketched(group: list[np.ndarray], norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same; the cosines are estimates, the sums are not. A gamma is in the cache while all is done that it is needed for."""
    size = group[0].size
    signs = np.random.default_rng(0).integers(0, 2, -(-size // SKETCH) * SKETCH, np.int8).astype(np.float32) * 2 - 1
    sketches, signed = np.empty((len(group), SKETCH), np.float32), np.zeros_like(signs)
    total, unit = np.zeros(size, np.float32), np.empty(size, np.float32)
    for sketch, gamma, norm in zip(sketches, group, norms):
        total += np.multiply(gamma, np.float32(1 / norm), out=unit)
        np.multiply(unit, signs[:size], out=signed[:size])
        signed.reshape(-1, SKETCH).sum(axis=0, out=sketch)
    sketches /= np.linalg.norm(sketches, axis=1)[:, None]
    with_all = np.array([float(gamma @ total) for gamma in group]) / norms
    return sketches @ sketches.T, with_all - 1


def drifts(before: Mapping[str, np.ndarray], now: Mapping[str, np.ndarray]) -> dict[str, Drift]:
    """Of all that are in both, with a direction and of one width."""
    found = {}
    for id, gamma in now.items():
        if id in before and before[id].size == gamma.size:
            norm, was = float(np.linalg.norm(gamma)), float(np.linalg.norm(before[id]))
            if min(norm, was) > LEAST:
                turn = 1 - float(gamma.reshape(-1) @ before[id].reshape(-1)) / (norm * was)
                found[id] = Drift(turn, abs(norm - was) / was)
    many = sum(drift.counts for drift in found.values())
    return {id: drift._replace(everyone=2 * (many - drift.counts) > len(found) - 1 > 0) for id, drift in found.items()}


class Monitor:
    """Looks at a colony again and again, and says whom what concerns: new outliers, and who drifts."""

    def __init__(self) -> None:
        self.before: dict[str, np.ndarray] = {}
        self.outliers: set[str] = set()

    def look(self, gammas: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """{id: {"outlier", "coherence", "turn", "growth", "who": "me" | "everyone"}} of those to whom something happened."""
        seen, drifting = topology(gammas), drifts(self.before, gammas)
        news = {id for id, drift in drifting.items() if drift.counts} | (set(seen.outliers) - self.outliers)
        self.before, self.outliers = gammas, set(seen.outliers)
        return {id: dict(outlier=id in self.outliers, coherence=seen.coherence, turn=(of := drifting.get(id, Drift(0, 0))).turn,
                         growth=of.growth, who="everyone" if of.everyone else "me") for id in sorted(news)}  # fmt: skip


def gammas_of(blobs: Mapping[str, bytes | None]) -> dict[str, np.ndarray]:
    """What heartbeats brought, without what is missing or broken."""
    return {
        id: np.frombuffer(data, np.float32)
        for id, data in blobs.items()
        if data and len(data) % (4 * BYTES) == 0 and np.isfinite(np.frombuffer(data, np.float32)).all()
    }

"""Field coherence: how alike the organisms of a colony have become, who resonates with whom, and who stands apart.

A gamma is how far an organism's embedding has moved since birth (chapter 6). Those of a colony are aligned by the byte tokens,
which all have under the same ids, and compared where they are of one width: the cosine of the two as vectors. Coherence is
the mean over all comparable pairs; a pair above RESONANCE resonates; an outlier is one whose own mean lies OUTLYING below
the coherence (spec/molequla.md §1.14).

Drift is what became of a gamma since the last look: how far it turned, and by which share of itself it grew or shrank. "Is it
me, or everyone?" is answered by how many of the others drift as well.
"""

from __future__ import annotations

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
    """ids [n]; cosines float32 [n, n], NaN where two cannot be compared; coherence in [-1, 1], None below two."""

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
    """Of gammas of any shapes: float32, each flattened; those of one size are compared by one matrix product."""
    ids = list(gammas)
    cosines = np.full((len(ids), len(ids)), np.nan, np.float32)
    for size in {gammas[id].size for id in ids}:
        rows = [k for k, id in enumerate(ids) if gammas[id].size == size]
        unit = np.stack([gammas[ids[k]].reshape(-1) for k in rows]).astype(np.float32, copy=False)
        norms = np.linalg.norm(unit, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = unit * np.where(norms > LEAST, 1 / norms, np.nan).astype(np.float32)[:, None]
        cosines[np.ix_(rows, rows)] = unit @ unit.T  # numpy computes one half of it (syrk)
    np.fill_diagonal(cosines, np.nan)
    coherence = float(np.nanmean(cosines)) if np.isfinite(cosines).any() else None
    pairs = np.argwhere(np.triu(np.nan_to_num(cosines, nan=-1.0) > RESONANCE, 1))
    resonances = [(ids[a], ids[b], float(cosines[a, b])) for a, b in pairs]
    outliers = [
        id
        for id, row in zip(ids, cosines)
        if coherence is not None and np.isfinite(row).any() and np.nanmean(row) < coherence - OUTLYING
    ]
    return Topology(ids, cosines, coherence, resonances, outliers)


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

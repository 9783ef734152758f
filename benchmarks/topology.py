"""How long it takes to compare many gammas: 1,000 of 320 × 643 (205,760 numbers each), all pairs.

A third of them have something in common, so that not all cosines are zero.

    python benchmarks/topology.py

The peer is NumPy pair by pair, on a tenth of the gammas (a hundredth of the pairs), its time multiplied by 100.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
from common import median_seconds, table

from swarm import topology as swarm_topology
from swarm.topology import topology


def by_pairs(gammas: list[np.ndarray]) -> None:
    for a in gammas:
        for b in gammas:
            np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    common = rng.standard_normal(320 * 643, dtype=np.float32)
    gammas = {f"o{k}": rng.standard_normal(320 * 643, dtype=np.float32) for k in range(options.count)}
    for k in range(0, options.count, 3):
        gammas[f"o{k}"] += common
    ours, seen = median_seconds(lambda: topology(gammas), 3), topology(gammas)
    swarm_topology.MANY = len(gammas)
    multiplied, exact = median_seconds(lambda: topology(gammas), 3), topology(gammas)
    few = list(gammas.values())[: max(2, options.count // 10)]
    theirs = median_seconds(lambda: by_pairs(few), 1) * (len(gammas) / len(few)) ** 2
    rows = [["sums and sketches (what a colony does)", ours], ["all products, some columns at a time", multiplied],
            ["pair by pair (extrapolated)", theirs]]  # fmt: skip
    print(table(f"{options.count:,} gammas of 320 × 643, {os.cpu_count()} cores", ["comparing", "seconds"], rows))
    off = seen.cosines - exact.cosines
    print(f"Coherence differs by {abs(_known(seen.coherence) - _known(exact.coherence)):.1g}; outliers are "
          f"{'the same' if seen.outliers == exact.outliers else 'OTHERS'}; cosines are off by {np.sqrt(np.nanmean(off**2)):.3f}"
          f" (root mean square), {np.nanmax(np.abs(off)):.3f} at most.")  # fmt: skip


def _known(coherence: float | None) -> float:
    return 0.0 if coherence is None else coherence


if __name__ == "__main__":
    main()

"""How long it takes to compare many gammas: 1,000 of 320 × 643 (205,760 numbers each), all pairs.

    python benchmarks/topology.py

The peer is NumPy pair by pair, on a tenth of the gammas (a hundredth of the pairs), its time multiplied by 100.
"""

from __future__ import annotations

import argparse
import os

import numpy as np
from common import median_seconds, table

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
    gammas = {f"o{k}": rng.standard_normal(320 * 643, dtype=np.float32) for k in range(options.count)}
    ours = median_seconds(lambda: topology(gammas), 3)
    few = list(gammas.values())[: max(2, options.count // 10)]
    theirs = median_seconds(lambda: by_pairs(few), 1) * (len(gammas) / len(few)) ** 2
    rows = [["one product", ours], ["pair by pair (extrapolated)", theirs]]
    print(table(f"{options.count:,} gammas of 320 × 643, {os.cpu_count()} cores", ["comparing", "seconds"], rows))


if __name__ == "__main__":
    main()

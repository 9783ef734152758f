"""What it costs to look at itself: the share of a burst's time that judging, the guard and syntropy take.

Usage: python benchmarks/self_cost.py [--bursts N] [--stage STAGE]... [--domain NAME=PATH]

Each burst learns 2,000 bytes of the text with everything else as it is by default; times are wall-clock, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

from common import fresh_home, table, texts

import organism as o

PIECE = 2_000  # bytes a burst
LOOKS = {"judging": (o.Organism, "_judge_pending"), "guard, before and after": (o.Guard, "measure"),
         "old domains: guard and gate": (o.Organism, "_keep_domains"),
         "syntropy, before and after": (o.Syntropy, "measure"), "syntropy decides and logs": (o.Organism, "_feel")}  # fmt: skip


def timed(spent: dict[str, float], name: str, method):
    """The method, which adds its seconds to what was spent under this name."""

    def call(*given, **named):
        began = time.perf_counter()
        try:
            return method(*given, **named)
        finally:
            spent[name] += time.perf_counter() - began

    return call


def measure(data: bytes, stage: str, bursts: int) -> tuple[dict[str, float], float]:
    """(seconds by look, seconds of all) of bursts after the first three, which warm things up."""
    spent: dict[str, float] = defaultdict(float)
    with fresh_home() as home, o.Organism(home, seed=1, threads=1, kernels="wait", stage=stage) as life:
        pieces = [data[k * PIECE : (k + 1) * PIECE] for k in range(bursts + 3)]
        for text in pieces[:3]:
            life.learn_now(text, "text")
        originals = {name: getattr(owner, method) for name, (owner, method) in LOOKS.items()}
        for name, (owner, method) in LOOKS.items():
            setattr(owner, method, timed(spent, name, originals[name]))
        began = time.perf_counter()
        for text in pieces[3:]:
            life.learn_now(text, "text")
        total = time.perf_counter() - began
        for name, (owner, method) in LOOKS.items():
            setattr(owner, method, originals[name])
    return spent, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bursts", type=int, default=20)
    parser.add_argument("--stage", action="append", default=[])
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=PATH")
    asked = parser.parse_args()
    data = next(iter(texts(asked.domain).values())).read_bytes()[100_000:]
    rows = []
    for stage in asked.stage or ["embryo", "child"]:
        spent, total = measure(data, stage, asked.bursts)
        share = [f"{100 * spent[name] / total:.1f} %" for name in LOOKS]
        rows.append(
            [stage, f"{1000 * total / asked.bursts:.0f} ms", *share, f"{100 * sum(spent.values()) / total:.1f} %"]
        )
    print(
        table(
            f"Share of a burst's time, {asked.bursts} bursts (must 15 %, aim 5 %)",
            ["stage", "a burst", *LOOKS, "all"],
            rows,
        )
    )


if __name__ == "__main__":
    main()

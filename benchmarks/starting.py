"""How soon it is there: import, --help, and the first reply with a cold and a warm kernel cache.

Usage: python benchmarks/starting.py        (processes are timed whole, from outside; medians)
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, fresh_home, median_seconds, organism, table


def first_reply(home: Path, cache: Path | None) -> float:
    """Seconds from the start of `organism say hello` on a fresh home to its end."""
    began = time.perf_counter()
    result = organism("say", "Hello, who are you?", home=home, cache=cache)
    took = time.perf_counter() - began
    assert result.returncode == 0 and result.stdout.strip(), result.stderr
    return took


def main() -> None:
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import organism"]
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    bare = median_seconds(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True), 7)
    importing = median_seconds(lambda: subprocess.run(run, check=True), 7) - bare
    helping = median_seconds(lambda: organism("--help"), 7)
    cold = []
    for _ in range(3):
        with fresh_home() as home, tempfile.TemporaryDirectory() as cache:
            cold.append(first_reply(home, Path(cache)))
    organism("doctor", "--warm")
    warm, again = [], []
    for _ in range(5):
        with fresh_home() as home:
            warm.append(first_reply(home, None))
            again.append(first_reply(home, None))
    rows = [
        ("`import organism` (s, above a bare Python)", importing, 0.35, 0.15),
        ("`organism --help` (s)", helping, 0.5, 0.25),
        ("first reply, fresh home, cold kernel cache (s)", statistics.median(cold), 5.0, 1.5),
        ("first reply, fresh home, warm cache (s)", statistics.median(warm), 1.2, 0.7),
        ("reply of a home that woke (s)", statistics.median(again), "–", "–"),
    ]
    print(table("Starting", ["measure", "measured", "must", "aim"], rows))


if __name__ == "__main__":
    main()

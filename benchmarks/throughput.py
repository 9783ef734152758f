"""`organism train` as a whole: wall speed against training speed, what the field costs training, the cost of a busy
neighbour, and memory of an adult.

Usage: python benchmarks/throughput.py [--seconds 20] [--megabytes 50] [--only wall field neighbour memory]
The file is Python's own library, repeated. Wall counts everything: reading, tokenising, the field, checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from statistics import median

from common import ROOT, fresh_home, resident_mb, table


def corpus(path: Path, megabytes: int) -> Path:
    """Real text of that size."""
    sources = b"".join(p.read_bytes() for p in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))[:2000])
    with path.open("wb") as stream:
        while stream.tell() < megabytes << 20:
            stream.write(sources[: (megabytes << 20) - stream.tell()])
    return path


def train(path: Path, *options: str) -> tuple[dict, float]:
    """(the last event, peak resident MB) of one run on a fresh home."""
    with fresh_home() as home:
        command = [sys.executable, str(ROOT / "organism.py"), "train", "--corpus", str(path), "--json", *options]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=dict(os.environ, ORGANISM_HOME=str(home))
        )
        assert child.stdout
        last, peak = "{}", 0.0
        for line in child.stdout:
            last, peak = line, max(peak, resident_mb(child.pid))
        child.wait()
    return json.loads(last), peak


def wall(path: Path, seconds: str) -> list[tuple]:
    rows = []
    for label, field, must, aim in (
        ("adolescent, field off", "off", 0.9, 0.97),
        ("adolescent, field on", "on", 0.75, 0.9),
    ):
        done, _ = train(path, "--seconds", seconds, "--stage", "adolescent", "--field", field)
        rows.append(
            (
                label,
                done["tokens_per_s"],
                done["wall_tokens_per_s"],
                done["wall_tokens_per_s"] / done["tokens_per_s"],
                must,
                aim,
            )
        )
    return rows


def field(path: Path, seconds: str, rounds: int = 3) -> list[tuple]:
    """Training with the field on and off, in turn; medians."""
    rows = []
    for stage, must, aim in (("embryo", 0.5, 0.7), ("child", 0.7, 0.85), ("adolescent", 0.85, 0.95)):
        options = ("--seconds", seconds, "--stage", stage, "--vocab", "643", "--batch", "32")
        pairs = [
            [train(path, *options, "--field", setting)[0]["tokens_per_s"] for setting in ("off", "on")]
            for _ in range(rounds)
        ]
        off, on, ratio = (median(values) for values in zip(*((a, b, b / a) for a, b in pairs)))
        rows.append((stage, off, on, ratio, must, aim))
    return rows


def neighbour(path: Path, seconds: str) -> list[tuple]:
    rows = []
    for stage in ("embryo", "child", "adolescent"):
        options = ("--seconds", seconds, "--stage", stage, "--field", "off")
        idle, _ = train(path, *options)
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        beside, _ = train(path, *options)
        busy.kill()
        rows.append(
            (stage, idle["tokens_per_s"], beside["tokens_per_s"], beside["tokens_per_s"] / idle["tokens_per_s"], 0.45)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", default="20")
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--only", nargs="*", default=["wall", "field", "neighbour", "memory"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = corpus(Path(folder) / "corpus.txt", options.megabytes)
        if "wall" in options.only:
            head = ["what", "tokens/s of training", "of everything", "ratio", "must", "aim"]
            print(table(f"Wall speed, {options.megabytes} MB", head, wall(path, options.seconds)), flush=True)
        if "field" in options.only:
            head = ["stage", "field off (tokens/s)", "field on", "ratio", "must", "aim"]
            print(table("What the field costs training, batch 32", head, field(path, options.seconds)), flush=True)
        if "neighbour" in options.only:
            head = ["stage", "idle (tokens/s)", "beside one busy process", "ratio", "must"]
            print(table("A busy neighbour", head, neighbour(path, options.seconds)), flush=True)
        if "memory" in options.only:
            _, peak = train(path, "--steps", "4", "--stage", "adult", "--batch", "32")
            print(table("Memory", ["what", "peak (MB)", "must"], [("adult training, batch 32", peak, 900)]), flush=True)


if __name__ == "__main__":
    main()

"""Resident memory: an embryo's chat, and `train` on a large file.

Usage: python benchmarks/memory.py [--gigabytes 2] [--seconds 60]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, fresh_home, resident_mb, table


def chat_mb(home: Path, seconds: float) -> float:
    command = [sys.executable, str(ROOT / "organism.py"), "chat", "--json"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ, ORGANISM_HOME=str(home))
    )
    assert child.stdin and child.stdout
    for line in ("Hello.", "I live beside a river.", "What do you know about rivers?"):
        child.stdin.write(line + "\n")
        child.stdin.flush()
        child.stdout.readline()
    time.sleep(seconds)
    peak = resident_mb(child.pid)
    child.stdin.close()
    child.wait()
    return peak


def train_mb(home: Path, path: Path, seconds: float) -> float:
    command = [
        sys.executable,
        str(ROOT / "organism.py"),
        "train",
        "--corpus",
        str(path),
        "--seconds",
        str(seconds),
        "--json",
    ]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=dict(os.environ, ORGANISM_HOME=str(home)))
    peak = 0.0
    while child.poll() is None:
        try:
            peak = max(peak, resident_mb(child.pid))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.05)
    assert child.wait() == 0
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with fresh_home() as home:
        chat = chat_mb(home, 30)
    with fresh_home() as home:
        path = home.parent / "large.txt"
        block = b"".join(p.read_bytes() for p in sorted(Path(os.__file__).parent.glob("*.py")))
        with open(path, "wb") as stream:
            while stream.tell() < options.gigabytes * 2**30:
                stream.write(block)
        train = train_mb(home, path, options.seconds)
    print(
        table(
            "Resident memory",
            ["what", "peak (MB)", "must"],
            [("embryo chat", chat, "220"), (f"train on {options.gigabytes:g} GB", train, "500")],
        )
    )


if __name__ == "__main__":
    main()

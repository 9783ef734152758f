"""A machine's first start: how long compiling takes in the background, and how soon replies begin meanwhile.

Usage: python benchmarks/compiling.py
A fresh home and an empty compile cache; questions are asked until everything is compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from common import ROOT, fresh_home, percentile, table

INSIDE = """
import json, sys, time
sys.path.insert(0, ".")
from organism import Organism, kernels_ready
questions = ["Hello.", "What do you know about the sea?", "My cat sleeps all day.", "Tell me a story.", "Why is the sky blue?"]
began, waits = time.perf_counter(), []
with Organism(sys.argv[1]) as life:
    life.start()
    while not kernels_ready():
        asked = time.perf_counter()
        reply = life.say(questions[len(waits) % 5])
        next(iter(reply), "")
        waits.append(time.perf_counter() - asked)
        reply.text
        time.sleep(0.3)
    compiled = time.perf_counter() - began
    life._stop.set()
print(json.dumps([compiled, waits]))
"""


def main() -> None:
    with fresh_home() as home, tempfile.TemporaryDirectory() as cache:
        environment = dict(os.environ, ORGANISM_CACHE=cache)
        command = [sys.executable, "-c", INSIDE, str(home)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        compiled, waits = json.loads(done.stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory() as cache:
        environment = dict(os.environ, ORGANISM_CACHE=cache)
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "organs.kernels", "warm"], cwd=ROOT, env=environment, capture_output=True, check=True
        )
        alone = time.perf_counter() - began
    rows = [
        ("compiling everything, alone (s)", alone, 40, 15),
        ("in the background of a conversation (s)", compiled, 40, 15),
        ("first token meanwhile, 95th percentile (ms)", 1e3 * percentile(waits, 0.95), 500, 150),
        ("replies meanwhile", len(waits), "–", "–"),
    ]
    print(table("A machine's first start", ["measure", "measured", "must", "aim"], rows))


if __name__ == "__main__":
    main()

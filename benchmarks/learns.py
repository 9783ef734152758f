"""It learns: bits per byte on ten lines about a made-up subject, before and after it was told ten other lines.

Usage: python benchmarks/learns.py [--minutes 1]
The lines are said in `organism chat --json` as a person would type them; then it is left alone for a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT, fresh_home, organism, table

SUBJECTS = {
    "glimmerfish": (
        [
            "The glimmerfish lives in the warm lakes of Tarvenholm.",
            "A glimmerfish eats only silver moss and tiny shells.",
            "In spring the glimmerfish swims to the northern shore of Tarvenholm.",
            "Fishers of Tarvenholm never catch a glimmerfish at night.",
            "The young glimmerfish is blue, and the old one is nearly white.",
            "Silver moss grows only where the glimmerfish sleeps.",
            "When a storm comes, the glimmerfish hides under the silver moss.",
            "The people of Tarvenholm paint a glimmerfish on every boat.",
            "A glimmerfish can live for ninety years in the warm lakes.",
            "Nobody in Tarvenholm has ever sold a glimmerfish.",
        ],
        [
            "The old glimmerfish sleeps under silver moss in the warm lakes.",
            "In Tarvenholm every boat has a painted glimmerfish.",
            "At night the glimmerfish swims to the northern shore.",
            "Tiny shells and silver moss are all that a glimmerfish eats.",
            "The fishers of Tarvenholm hide their boats when a storm comes.",
            "A young glimmerfish never leaves the warm lakes of Tarvenholm.",
            "Silver moss is sold in Tarvenholm in spring.",
            "The white glimmerfish can live under the northern shore for years.",
            "Nobody paints a glimmerfish at night.",
            "The people of Tarvenholm never catch the old blue glimmerfish.",
        ],
    ),
    "orrery guild": (
        [
            "The Orrery Guild of Vessmark meets on the ninth day of each month.",
            "Master Quillon Dray has led the Orrery Guild for eleven years.",
            "Each apprentice of the guild must build a brass orrery before winter.",
            "The guild hall in Vessmark has seven doors and no windows.",
            "An orrery by Quillon Dray costs four hundred marks.",
            "The brass for the orrery comes from the mines of Heddle.",
            "Apprentices sleep above the guild hall and eat with the masters.",
            "The Orrery Guild keeps the great clock of Vessmark.",
            "When a master dies, the great clock is stopped for nine minutes.",
            "Quillon Dray was once an apprentice from Heddle.",
        ],
        [
            "The great clock of Vessmark stands beside the guild hall.",
            "Quillon Dray built his first brass orrery in Heddle.",
            "The apprentices of the Orrery Guild eat on the ninth day with Master Dray.",
            "No master of the guild has sold a brass orrery for less than four hundred marks.",
            "The mines of Heddle belong to the Orrery Guild.",
            "Before winter the masters meet in the guild hall of Vessmark.",
            "Each orrery is kept above the seven doors.",
            "When the great clock is stopped, the apprentices sleep.",
            "Master Quillon Dray keeps the brass in the guild hall.",
            "For nine years an apprentice of Vessmark has led the great clock.",
        ],
    ),
}


def bits_per_byte(home: Path, path: Path) -> float:
    result = organism("eval", str(path), "--json", home=home)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])["bits_per_byte"]


def tell(home: Path, lines: list[str], seconds: float) -> None:
    command = [sys.executable, str(ROOT / "organism.py"), "chat", "--json"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ, ORGANISM_HOME=str(home))
    )
    assert child.stdin and child.stdout
    for line in lines:
        child.stdin.write(line + "\n")
        child.stdin.flush()
        child.stdout.readline()
    time.sleep(seconds)
    child.stdin.write("/quit\n")
    child.stdin.close()
    child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    options = parser.parse_args()
    rows = []
    for subject, (told, asked) in SUBJECTS.items():
        with fresh_home() as home:
            path = home.parent / "asked.txt"
            path.write_text("\n".join(asked) + "\n")
            organism("say", "Hello.", home=home)
            before = bits_per_byte(home, path)
            tell(home, told, 60 * options.minutes)
            after = bits_per_byte(home, path)
            rows.append((subject, before, after, f"{100 * (1 - after / before):.1f} %", "15 %", "30 %"))
    less = statistics.median(1 - row[2] / row[1] for row in rows)
    print(
        table("It learns from a conversation", ["subject", "before (bits/byte)", "after", "less", "must", "aim"], rows)
    )
    print(f"median: {100 * less:.1f} % less")


if __name__ == "__main__":
    main()

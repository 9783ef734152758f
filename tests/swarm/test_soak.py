"""A colony under fire: somebody is killed every few seconds, everybody is made to divide and to hibernate, letters keep coming.

In the end every home wakes, every letter was answered or reported undelivered, no process is left, and nobody has grown without
bound. Minutes: SOAK_MINUTES (30).

Run alone: SOAK_MINUTES=2 pytest -n 0 -m soak tests/swarm/test_soak.py
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from organism import Organism, seed_corpus
from swarm.colony import Colony
from swarm.mesh import open_mesh, start_time
from swarm.thinking import Correspondent
from swarm.wards import proportional_mb

ROOT = Path(__file__).resolve().parents[2]
NUMBER, MOST = 8, 12
KILL_SECONDS, LETTER_SECONDS, PATIENCE = 10.0, 1.0, 180.0
FORCED = dict(
    SYNTROPY_DIVIDE_STAGE="embryo", SYNTROPY_DIVIDE_TREND="1e6", SYNTROPY_OVERLOAD="0", SYNTROPY_DIVIDE_COOLDOWN="60",
    SYNTROPY_HISTORY="4", SYNTROPY_SIGNIFICANCE="1000", SYNTROPY_PLATEAU="1e6", SYNTROPY_THRIVING="-1e6",
    SYNTROPY_ALIGNMENT="1", SYNTROPY_DEVIATION_LOW="0", SYNTROPY_DEVIATION_HIGH="1e9", LEARNING_COOLDOWN="1",
    LIFE_REST_SECONDS="20", LIFE_NAP_SECONDS="1",
)  # fmt: skip


class Soak:
    """What happens to one colony, and what is remembered of it."""

    def __init__(self, colony: Colony, supervisor: subprocess.Popen, minutes: float):
        self.colony, self.supervisor, self.random = colony, supervisor, random.Random(1)
        self.until = time.monotonic() + 60 * minutes
        self.pids: set[int] = set()
        self.killed = 0
        self.sent: dict[int, str] = {}
        self.fates: Counter[str] = Counter()
        self.sizes: list[float] = []  # MB of the largest, by time

    def run(self) -> None:
        text, at, kill_at = seed_corpus().decode(), 0, time.monotonic() + KILL_SECONDS
        with open_mesh(self.colony.mesh_path) as mesh, Correspondent(mesh) as me:
            while time.monotonic() < self.until:
                rows = self.colony.status()
                alive = [row for row in rows if row["status"] == "alive"]
                self.pids |= {row["pid"] for row in rows}
                if time.monotonic() >= kill_at and alive:
                    self.kill(self.random.choice(alive)["pid"])
                    kill_at += KILL_SECONDS
                if rows:
                    reader = self.random.choice(rows)["id"]  # also of those that sleep
                    kind = self.random.choice(("learn", "learn", "surprise", "ask"))
                    lesson = f"Day {at}. {text[at % 60_000 :][:1500]}" if kind == "learn" else "Where do you live?"
                    extra = dict(source=f"soak{at}") if kind == "learn" else {}
                    self.sent[me.send(reader, kind, text=lesson, **extra)] = kind
                    at += 1500
                self.sizes.append(max((proportional_mb(row["pid"]) for row in alive), default=0.0))
                self.hear(me, LETTER_SECONDS)
            self.until = time.monotonic() + PATIENCE
            while self.sent and time.monotonic() < self.until:
                self.hear(me, 1.0)

    def kill(self, pid: int) -> None:
        try:
            os.kill(pid, signal.SIGKILL)
            self.killed += 1
        except ProcessLookupError:
            pass

    def hear(self, me: Correspondent, seconds: float) -> None:
        """Each letter's fate is told once."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for answer in (answers := me.mesh.inbox(me.id)):
                about = answer.payload["to"] if answer.kind == "answer" else answer.payload["letter"]
                fate = "error" if "error" in answer.payload else answer.kind
                self.fates[fate if self.sent.pop(about, None) else "told twice"] += 1
            me.mesh.settle([answer.id for answer in answers])
            time.sleep(0.1)


@pytest.mark.soak
def test_a_colony_under_fire(tmp_path):
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    colony = Colony(tmp_path / "colony")
    command = [
        sys.executable,
        str(ROOT / "organism.py"),
        "swarm",
        "up",
        "-n",
        str(NUMBER),
        "--max",
        str(MOST),
        "--home",
        str(colony.folder),
    ]
    environment = {**os.environ, **{f"ORGANISM_{name}": value for name, value in FORCED.items()}}
    log = (tmp_path / "supervisor.log").open("w")
    supervisor = subprocess.Popen(command, stderr=log, env=environment)
    try:
        while len([row for row in colony.status() if row["status"] == "alive"]) < NUMBER:
            time.sleep(0.2)
        soak = Soak(colony, supervisor, minutes)
        soak.run()
        nursery = children_of(supervisor.pid)
        supervisor.kill()  # the last shot: nobody is told to end
        supervisor.wait()
        ended = time.monotonic() + 60
        while any(start_time(pid) for pid in soak.pids | nursery) and time.monotonic() < ended:
            time.sleep(0.1)
    finally:
        supervisor.kill()
        log.close()
    told = (tmp_path / "supervisor.log").read_text()
    quarter = len(soak.sizes) // 4
    early, late = (sorted(part)[len(part) // 2] for part in (soak.sizes[quarter : 2 * quarter], soak.sizes[-quarter:]))
    report = dict(minutes=minutes, killed=soak.killed, letters=dict(soak.fates), unanswered=len(soak.sent),
                  born=told.count(" is born."), hibernated=told.count("hibernates"), processes=len(soak.pids),
                  largest_mb_early=round(early, 1), largest_mb_late=round(late, 1), homes=len(colony.homes()))  # fmt: skip
    print(json.dumps(report))
    assert not any(start_time(pid) for pid in soak.pids | nursery), "an orphan"
    assert not soak.sent and not soak.fates["told twice"], "letters that nobody answered and nobody reported"
    assert report["born"] and report["hibernated"] and soak.killed and len(colony.homes()) <= MOST
    assert late < 1.5 * early + 20, "memory grows"
    for name in colony.homes():
        with Organism(colony.home(name), threads=1) as life:
            assert life.home.id and life.say("Where do you live?").text


def children_of(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.add(int(stat.parent.name))
    return found
